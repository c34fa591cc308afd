//! Names of code that was made at run time, as runtimes write them for `perf`: `/tmp/perf-PID.map`.

use std::io::Write as _;

use super::{
    super::worker::protocol::FileId,
    handed::Handed,
    ledger::{Charge, Ledger},
};
use crate::event::Printable;

/// No more of a map is read ...
const MOST_BYTES: u64 = 16 << 20;
/// ... and no more is made of it: a line can have six bytes, and takes more than that here.
const MOST_MADE: usize = 24 << 20;
/// How much is read at once. What has no end of a line in so much is no map.
const BLOCK: usize = 64 << 10;
/// So much of a name is kept.
const MOST_NAME: usize = 512;

/// A map, which its runtime goes on writing, or writes only at the end. One file can be the map of many processes.
pub(super) struct PerfMap {
    file: Handed,
    /// How many bytes have been read.
    pub(super) until: u64,
    /// No more of it is read: it is as large as can be, or no map.
    pub(super) is_over: bool,
    /// There is more, for which there is no room.
    pub(super) is_cut: bool,
    /// In the order written.
    functions: Vec<Function>,
    /// Their names, one behind the other.
    names: Vec<u8>,
    charge: Option<Charge>,
}

struct Function {
    start: u64,
    end: u64,
    /// Where its name ends. It begins where that of the one before ends.
    name_end: u32,
}

impl PerfMap {
    pub(super) const fn new(file: Handed) -> Self {
        Self {
            file,
            until: 0,
            is_over: false,
            is_cut: false,
            functions: Vec::new(),
            names: Vec::new(),
            charge: None,
        }
    }

    pub(super) const fn id(&self) -> FileId {
        self.file.id
    }

    /// Reads what has been added, up to the last whole line. To be called before [`name`](Self::name).
    pub(super) fn read(&mut self, ledger: &Ledger) {
        let mut bytes = vec![0; BLOCK];
        while !self.is_over {
            // An error ends the map where it is.
            let Ok(read) = self.file.read_at(&mut bytes, self.until) else {
                return;
            };
            let whole = bytes[..read].iter().rposition(|byte| *byte == b'\n');
            let whole = whole.map_or(0, |at| at + 1);
            if whole > 0 && !self.make_room(ledger) {
                (self.is_over, self.is_cut) = (true, true);
                return;
            }
            for line in bytes[..whole].split(|byte| *byte == b'\n') {
                self.add(line);
            }
            self.until += whole as u64;
            self.is_cut = self.until >= MOST_BYTES;
            self.is_over = read == BLOCK && whole == 0 || self.is_cut;
            if read < BLOCK {
                break;
            }
        }
    }

    fn add(&mut self, line: &[u8]) -> Option<()> {
        let (start, end, name) = parse(line)?;
        let before = self.names.len();
        // Cannot fail: memory takes it.
        let _ = write!(
            self.names,
            "{}",
            Printable(&name[..name.len().min(MOST_NAME)])
        );
        let name_end = u32::try_from(self.names.len());
        let Ok(name_end) = name_end else {
            self.names.truncate(before);
            return None;
        };
        self.functions.push(Function {
            start,
            end,
            name_end,
        });
        Some(())
    }

    /// Sees to it that another block can be taken in. What lists take is doubled when they are full, and both the
    /// old and the new are there for a moment.
    fn make_room(&mut self, ledger: &Ledger) -> bool {
        /// The most that is made of a block: lines of five bytes, names of which each byte is written as four.
        const GROWTH: usize = BLOCK / 5 * size_of::<Function>() + 4 * BLOCK;
        let made = size_of::<Function>() * self.functions.len() + self.names.len();
        if made + GROWTH > MOST_MADE {
            return false;
        }
        let counted = ((made + GROWTH) as u64).next_power_of_two();
        if self.charge.as_ref().is_none_or(|had| had.bytes() < counted) {
            let Some(more) = ledger.charge(counted) else {
                return false;
            };
            self.charge = Some(more);
        }
        true
    }

    /// The function at this address. Of two, the one written last: the other has been thrown away.
    pub(super) fn name(&self, address: u64) -> Option<String> {
        let mut functions = self.functions.iter().enumerate().rev();
        let found =
            functions.find(|(_, function)| (function.start..function.end).contains(&address));
        let (index, function) = found?;
        let before = index.checked_sub(1).map(|before| &self.functions[before]);
        let from = before.map_or(0, |before| before.name_end);
        let name = self.names.get(from as usize..function.name_end as usize)?;
        Some(String::from_utf8_lossy(name).into_owned())
    }
}

/// `START SIZE NAME`, both numbers hexadecimal.
fn parse(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut fields = line.splitn(3, |byte| *byte == b' ');
    let mut number = || {
        let digits = std::str::from_utf8(fields.next()?).ok()?;
        u64::from_str_radix(digits.trim_start_matches("0x"), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    let name = fields.next()?.trim_ascii();
    Some((start, start.checked_add(size)?, name))
}

/// See [`crate::fuzz`]: a perf map.
pub(crate) fn fuzz(map: &[u8]) {
    for line in map.split(|byte| *byte == b'\n') {
        if let Some((start, end, name)) = parse(line) {
            assert!(start <= end, "{start:x} {end:x}");
            assert!(name.len() <= line.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd};

    use super::*;

    #[test]
    fn lines_of_a_map() {
        let line = b"7f00aa00 1c0 JS:~leak here /srv/app.js:12:3";
        let (start, end, name) = parse(line).unwrap();
        assert_eq!((start, end), (0x7f00_aa00, 0x7f00_abc0));
        assert_eq!(name, b"JS:~leak here /srv/app.js:12:3");
        for wrong in [
            &b""[..],
            b"10",
            b"10 20",
            b"x 20 name",
            b"ffffffffffffffff 2 name",
        ] {
            assert!(parse(wrong).is_none());
        }
    }

    /// What is known of a map of which these parts are written one after the other.
    fn read(parts: &[&[u8]], most: u64) -> PerfMap {
        let mut written = tempfile();
        let file = OwnedFd::from(written.try_clone().unwrap());
        let mut map = PerfMap::new(Handed::new(file).unwrap());
        let ledger = Ledger::new(most);
        for part in parts {
            written.write_all(part).unwrap();
            map.read(&ledger);
        }
        map
    }

    #[test]
    fn a_map_is_read_up_to_its_last_line_and_no_more_than_it_may_be() {
        let read = |parts: &[&[u8]]| {
            let map = read(parts, u64::MAX);
            (map.functions.len(), map.until, map.is_over)
        };
        assert_eq!(read(&[b"10 1 a\n20 1"]), (1, 7, false));
        assert_eq!(read(&[b"10 1 a\n20 1", b" b\n"]), (2, 14, false));
        let many = b"10 1 a\n".repeat(100_000);
        assert_eq!(read(&[&many]), (100_000, 700_000, false));
        // No line, and what comes after it is not looked at.
        assert_eq!(read(&[&[b'x'; BLOCK], b"\n10 1 a\n"]), (0, 0, true));
        let long = [b"10 1 ", &[b'n'; 1000][..], b"\n"].concat().repeat(17_000);
        let (_, until, is_over) = read(&[&long]);
        assert!(is_over && (MOST_BYTES..MOST_BYTES + BLOCK as u64).contains(&until));
    }

    #[test]
    fn what_is_made_of_a_map_is_limited_as_well() {
        let many = b"1 1 a\n".repeat(2_500_000);
        for most in [u64::MAX, 10 << 20] {
            let map = read(&[&many], most);
            let made = size_of::<Function>() * map.functions.capacity() + map.names.capacity();
            assert!(made < 2 * MOST_MADE.min(usize::try_from(most).unwrap_or(usize::MAX)));
            assert!(map.is_over && map.is_cut);
            assert_eq!(map.name(1).as_deref(), Some("a"));
        }
    }

    #[test]
    fn of_two_functions_the_one_written_last() {
        let map = read(&[b"10 10 old\n18 1 new\x1b\n0x30 1 c\n"], u64::MAX);
        assert_eq!(map.name(0x11).as_deref(), Some("old"));
        assert_eq!(map.name(0x18).as_deref(), Some("new\\u{1b}"));
        assert_eq!(map.name(0x30).as_deref(), Some("c"));
        assert_eq!(map.name(0x31), None);
    }

    /// Open, and deleted.
    fn tempfile() -> File {
        File::from(rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
    }
}
