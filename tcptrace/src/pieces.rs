//! Lines put together piece by piece: what is constant as it stands, numbers and addresses without a
//! formatter in between. There may be a million lines a second.

use std::{fmt, io::Write as _, net::Ipv6Addr};

use crate::{event::Comm, json::Time};

/// What a line is made of, appended to a buffer.
pub(crate) trait Pieces {
    /// As it stands.
    fn text(&mut self, text: &str) -> &mut Self;
    /// In decimal.
    fn number(&mut self, number: impl itoa::Integer) -> &mut Self;
    /// In hexadecimal, without prefix.
    fn hex(&mut self, number: u64) -> &mut Self;
    /// IPv4 as IPv4.
    fn address(&mut self, address: &[u8; 16]) -> &mut Self;
    /// In quotes, with what JSON wants escaped.
    fn string(&mut self, text: &str) -> &mut Self;
    /// The name of a process, likewise.
    fn name(&mut self, comm: &Comm) -> &mut Self;
    /// As it shows itself.
    fn shown(&mut self, what: &impl fmt::Display) -> &mut Self;
    /// Seconds of nanoseconds, as JSON has numbers that need not be whole.
    fn seconds(&mut self, ns: u64) -> &mut Self;
    /// `true` or `false`.
    fn truth(&mut self, is_so: bool) -> &mut Self;
    /// Blanks.
    fn blanks(&mut self, count: usize) -> &mut Self;
}

impl Pieces for Vec<u8> {
    fn text(&mut self, text: &str) -> &mut Self {
        self.extend_from_slice(text.as_bytes());
        self
    }

    fn number(&mut self, number: impl itoa::Integer) -> &mut Self {
        self.text(itoa::Buffer::new().format(number))
    }

    fn hex(&mut self, number: u64) -> &mut Self {
        let mut digits = [0; 16];
        self.extend_from_slice(hex(number, &mut digits));
        self
    }

    fn address(&mut self, address: &[u8; 16]) -> &mut Self {
        let address = Ipv6Addr::from(*address);
        let Some(v4) = address.to_ipv4_mapped() else {
            return self.shown(&address);
        };
        let [a, b, c, d] = v4.octets();
        self.number(a).text(".").number(b).text(".");
        self.number(c).text(".").number(d)
    }

    fn string(&mut self, text: &str) -> &mut Self {
        if text
            .bytes()
            .all(|byte| is_plain(byte) && byte != b'"' && byte != b'\\')
        {
            return self.text("\"").text(text).text("\"");
        }
        let written = serde_json::to_writer(&mut *self, text);
        debug_assert!(written.is_ok(), "neither a vector nor a string can fail");
        self
    }

    fn name(&mut self, comm: &Comm) -> &mut Self {
        match std::str::from_utf8(comm.as_bytes()) {
            Ok(name) => self.string(name),
            Err(_) => self.string(&comm.to_string()),
        }
    }

    fn shown(&mut self, what: &impl fmt::Display) -> &mut Self {
        // A vector takes everything.
        let _ = write!(self, "{what}");
        self
    }

    fn seconds(&mut self, ns: u64) -> &mut Self {
        // The shortest number that means this one of 64 bits is the decimal one itself, where that has at most
        // 15 digits. The smallest are written with an exponent.
        if !(100_000..1_000_000_000_000_000).contains(&ns) {
            let written = serde_json::to_writer(&mut *self, &(ns as f64 / 1e9));
            debug_assert!(written.is_ok(), "neither a vector nor a number can fail");
            return self;
        }
        self.number(ns / 1_000_000_000).text(".");
        let begin = self.len() + 1;
        self.extend_from_slice(&fraction(ns % 1_000_000_000));
        let zeros = self[begin..]
            .iter()
            .rev()
            .take_while(|digit| **digit == b'0');
        let end = self.len() - zeros.count();
        self.truncate(end);
        self
    }

    fn truth(&mut self, is_so: bool) -> &mut Self {
        self.text(if is_so { "true" } else { "false" })
    }

    fn blanks(&mut self, count: usize) -> &mut Self {
        self.resize(self.len() + count, b' ');
        self
    }
}

/// Hexadecimal digits, as many as it takes.
pub(crate) fn hex(number: u64, digits: &mut [u8; 16]) -> &[u8] {
    let mut left = number;
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b"0123456789abcdef"[(left & 15) as usize];
        left >>= 4;
        if left == 0 {
            return &digits[at..];
        }
    }
}

/// Nine digits of a billionth part.
fn fraction(mut billionths: u64) -> [u8; 9] {
    let mut digits = [0; 9];
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (billionths % 10) as u8;
        billionths /= 10;
    }
    digits
}

/// Whether a byte is a character that stands for itself, on a terminal as well.
pub(crate) const fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

/// Times of day in RFC 3339. Times that follow each other share their second: only the rest of them is written
/// anew.
pub(crate) struct Stamp {
    second: i64,
    /// The last one that was asked for.
    text: [u8; Self::LENGTH],
}

impl Stamp {
    /// `1970-01-01T00:00:00.000000000Z`.
    const LENGTH: usize = 30;

    pub(crate) const fn new() -> Self {
        Self {
            second: 0,
            text: *b"1970-01-01T00:00:00.000000000Z",
        }
    }

    pub(crate) fn of(&mut self, time: Time) -> &str {
        let second = time.utc_ns.div_euclid(1_000_000_000);
        if second != self.second {
            self.second = second;
            // 64 bits of nanoseconds end in years of four digits.
            for (to, from) in self.text.iter_mut().zip(time.to_string().bytes()) {
                *to = from;
            }
        } else {
            let rest = time.utc_ns.rem_euclid(1_000_000_000).cast_unsigned();
            self.text[20..29].copy_from_slice(&fraction(rest));
        }
        std::str::from_utf8(&self.text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::address_bytes, json::seconds};

    fn written(write: impl FnOnce(&mut Vec<u8>) -> &mut Vec<u8>) -> String {
        let mut to = Vec::new();
        write(&mut to);
        String::from_utf8(to).unwrap()
    }

    fn scattered(step: u64) -> u64 {
        step.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Numbers of every length, and what is beside those that have one digit more than others.
    fn numbers() -> Vec<u64> {
        let any = (0..20_000_u64).map(|step| scattered(step) >> (step % 64));
        let powers = (0..20).map(|power| 10_u64.pow(power));
        let beside = powers.flat_map(|one| [one - 1, one, one + 1, one / 2]);
        any.chain(beside).chain([u64::MAX]).collect()
    }

    #[test]
    fn seconds_are_as_serde_json_writes_them() {
        for ns in numbers() {
            let expected = serde_json::to_string(&seconds(ns)).unwrap();
            assert_eq!(written(|to| to.seconds(ns)), expected, "{ns}");
        }
    }

    #[test]
    fn hexadecimal_digits_are_as_many_as_it_takes() {
        for number in numbers() {
            assert_eq!(written(|to| to.hex(number)), format!("{number:x}"));
        }
    }

    #[test]
    fn addresses_are_as_people_know_them() {
        for address in [
            "0.0.0.0",
            "127.0.0.1",
            "255.250.25.1",
            "::",
            "::1",
            "fe80::1",
            "::1.2.3.4",
            "2001:db8:1111:2222:3333:4444:5555:6666",
        ] {
            let bytes = address_bytes(address.parse().unwrap());
            let known = Ipv6Addr::from(bytes).to_canonical().to_string();
            assert_eq!(written(|to| to.address(&bytes)), known);
        }
    }

    #[test]
    fn strings_are_as_serde_json_writes_them() {
        for text in [
            "",
            "web",
            "a b~",
            "a\"b",
            "a\\b",
            "a\nb",
            "\u{7f}",
            "m\u{fc}ller",
            "\u{2028}",
        ] {
            let expected = serde_json::to_string(text).unwrap();
            assert_eq!(written(|to| to.string(text)), expected);
        }
    }

    #[test]
    fn a_stamp_is_the_time_in_whatever_order_it_is_asked() {
        let mut stamp = Stamp::new();
        let any =
            (0..10_000).map(|step| (scattered(step) % 3_000_000_000).cast_signed() - 1_000_000_000);
        for utc_ns in any.chain([i64::MIN, i64::MAX, 0, 1, -1, 1_795_200_302_123_456_789]) {
            let time = Time { utc_ns };
            assert_eq!(stamp.of(time), time.to_string());
        }
    }
}
