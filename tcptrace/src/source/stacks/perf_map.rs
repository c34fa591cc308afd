//! Names of code that was made at run time, as runtimes write them for `perf`: `/tmp/perf-PID.map`.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    sync::Mutex,
};

use super::process::{open_in, own_number};
use crate::event::Printable;

/// No more of a map is read.
const MOST_BYTES: u64 = 128 << 20;

/// A map, which its runtime goes on writing.
pub(super) struct PerfMap {
    file: File,
    read: Mutex<Lines>,
}

#[derive(Default)]
struct Lines {
    /// How many bytes have been read.
    until: u64,
    /// Start, end and name, in the order written.
    functions: Vec<(u64, u64, Box<str>)>,
}

impl PerfMap {
    /// The map that a process writes in its own tree, under its own number; `None` if there is none.
    pub(super) fn open(pid: u32, root: &OwnedFd) -> Option<Self> {
        let number = own_number(pid)?;
        let file = open_in(root, &format!("tmp/perf-{number}.map"))?;
        Some(Self {
            file,
            read: Mutex::default(),
        })
    }

    /// The function at this address. Of two, the one written last: the other has been thrown away.
    pub(super) fn name(&self, address: u64) -> Option<Box<str>> {
        let mut lines = self
            .read
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // An error ends the map where it is.
        let _ = lines.read(&self.file);
        let mut functions = lines.functions.iter().rev();
        let found = functions.find(|(start, end, _)| (*start..*end).contains(&address));
        found.map(|(_, _, name)| name.clone())
    }
}

impl Lines {
    /// Reads what has been added, up to the last whole line.
    fn read(&mut self, file: &File) -> std::io::Result<()> {
        let size = file.metadata()?.len().min(MOST_BYTES);
        if size <= self.until {
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(size - self.until).unwrap_or(0)];
        file.read_exact_at(&mut bytes, self.until)?;
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        self.until += whole as u64;
        let lines = bytes[..whole].split(|byte| *byte == b'\n');
        self.functions.extend(lines.filter_map(parse));
        Ok(())
    }
}

/// `START SIZE NAME`, both numbers hexadecimal.
fn parse(line: &[u8]) -> Option<(u64, u64, Box<str>)> {
    let mut fields = line.splitn(3, |byte| *byte == b' ');
    let mut number = || {
        let digits = std::str::from_utf8(fields.next()?).ok()?;
        u64::from_str_radix(digits.trim_start_matches("0x"), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    let name = fields.next()?.trim_ascii();
    Some((
        start,
        start.checked_add(size)?,
        Printable(name).to_string().into(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_map() {
        let line = b"7f00aa00 1c0 JS:~leak here /srv/app.js:12:3";
        let (start, end, name) = parse(line).unwrap();
        assert_eq!((start, end), (0x7f00_aa00, 0x7f00_abc0));
        assert_eq!(&*name, "JS:~leak here /srv/app.js:12:3");
        assert_eq!(&*parse(b"0x10 0x20 a\x1bb").unwrap().2, "a\\u{1b}b");
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
}
