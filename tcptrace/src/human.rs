//! Numbers as people read them.

use std::fmt;

/// A whole number with commas: 1,198.
pub(crate) struct Count(pub(crate) u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() * 4 / 3);
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

/// A time in seconds, in its two greatest units: 2 h 13 min.
pub(crate) struct Duration(pub(crate) f64);

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0;
        let whole = seconds as u64;
        let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
        let text = if seconds < 0.0995 {
            format!("{:.1} ms", seconds * 1e3)
        } else if seconds < 60.0 {
            format!("{seconds:.1} s")
        } else if whole < 3600 {
            format!("{minutes} min {} s", whole % 60)
        } else if days == 0 {
            format!("{hours} h {minutes} min")
        } else if days < 1000 {
            format!("{days} d {hours} h")
        } else {
            format!("{} years", days / 365)
        };
        f.pad(&text)
    }
}

/// The word for so many.
pub(crate) const fn plural<'a>(count: usize, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_commas() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(Count(number).to_string(), text);
        }
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, text) in [
            (0.0, "0.0 ms"),
            (0.0123, "12.3 ms"),
            (0.0999, "0.1 s"),
            (59.94, "59.9 s"),
            (59.96, "60.0 s"),
            (60.0, "1 min 0 s"),
            (3599.0, "59 min 59 s"),
            (7981.2, "2 h 13 min"),
            (90_000.0, "1 d 1 h"),
            (1e9, "31 years"),
        ] {
            assert_eq!(Duration(seconds).to_string(), text);
        }
    }
}
