//! Names of code that was made at run time, as runtimes write them for `perf`: `/tmp/perf-PID.map`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    sync::{Mutex, PoisonError},
    time::UNIX_EPOCH,
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::process::{Key, open_in, own_number};
use crate::{event::Printable, kernel::clock};

/// No more of a map is read.
const MOST_BYTES: u64 = 128 << 20;

/// The map of a process, which its runtime goes on writing, or writes only at the end.
pub(super) struct PerfMap {
    key: Key,
    /// The process's id in its own pid namespace.
    number: u32,
    /// The process sees the same files as this one, so that its map is to be found after its end.
    is_here: bool,
    read: Mutex<Lines>,
}

#[derive(Default)]
struct Lines {
    file: Option<File>,
    /// How many bytes have been read.
    until: u64,
    /// Start, end and name, in the order written.
    functions: Vec<(u64, u64, Box<str>)>,
}

impl PerfMap {
    /// Where the map of this process is, or will be: in its own tree, under its own number.
    pub(super) fn of(key: Key) -> Option<Self> {
        let number = own_number(key.pid)?;
        let mut map = Self {
            key,
            number,
            is_here: is_same_root(key.pid),
            read: Mutex::default(),
        };
        let file = map.open();
        map.read.get_mut().ok()?.file = file;
        Some(map)
    }

    fn open(&self) -> Option<File> {
        let lives = self.key.check().is_ok();
        let root = match (lives, self.is_here) {
            (true, _) => format!("/proc/{}/root", self.key.pid),
            (false, true) => "/".to_owned(),
            (false, false) => return None,
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, root, flags, Mode::empty()).ok()?;
        let file = open_in(&root, &format!("tmp/perf-{}.map", self.number))?;
        // Somebody who had this number before can have left one.
        let written = file.metadata().ok()?.modified().ok()?;
        let written = written.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        let started = i128::from(self.key.start_ns()) + i128::from(clock::boot_to_utc_ns());
        (written as i128 >= started).then_some(file)
    }

    /// The function at this address. Of two, the one written last: the other has been thrown away.
    pub(super) fn name(&self, address: u64) -> Option<Box<str>> {
        let mut lines = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.file.is_none() {
            lines.file = self.open();
        }
        // An error ends the map where it is.
        let _ = lines.read();
        let mut functions = lines.functions.iter().rev();
        let found = functions.find(|(start, end, _)| (*start..*end).contains(&address));
        found.map(|(_, _, name)| name.clone())
    }
}

/// Whether a process has the same root directory as this one, in the same mount namespace.
fn is_same_root(pid: u32) -> bool {
    let same = |name: &str| {
        let [own, other] =
            ["self", &pid.to_string()].map(|who| fs::metadata(format!("/proc/{who}/{name}")));
        match (own, other) {
            (Ok(own), Ok(other)) => (own.dev(), own.ino()) == (other.dev(), other.ino()),
            _ => false,
        }
    };
    same("ns/mnt") && same("root")
}

impl Lines {
    /// Reads what has been added, up to the last whole line.
    fn read(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let size = file.metadata()?.len().min(MOST_BYTES);
        if size <= self.until {
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(size - self.until).unwrap_or(0)];
        file.read_exact_at(&mut bytes, self.until)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n');
        let whole = whole.map_or(0, |at| at + 1);
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
