//! Names of code that was made at run time, as runtimes write them for `perf`: `/tmp/perf-PID.map`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    sync::{Mutex, MutexGuard, PoisonError},
    time::UNIX_EPOCH,
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::process::{Key, number_and_user, open_in};
use crate::{event::Printable, kernel::clock};

/// No more of a map is read.
const MOST_BYTES: u64 = 16 << 20;
/// How much is read at once. What has no end of a line in so much is no map.
const BLOCK: usize = 64 << 10;

/// The map of a process, which its runtime goes on writing, or writes only at the end.
pub(super) struct PerfMap {
    key: Key,
    /// The process's id in its own pid namespace.
    number: u32,
    /// Its user, as files show it here.
    uid: u32,
    /// The process sees the same files as this one, so that its map is to be found after its end.
    is_here: bool,
    read: Mutex<Lines>,
}

/// How much of a map has been read.
#[derive(Clone, Copy)]
pub(super) struct Read {
    pub(super) bytes: u64,
    /// More will not come.
    pub(super) is_over: bool,
}

#[derive(Default)]
struct Lines {
    file: Option<File>,
    /// How many bytes have been read.
    until: u64,
    /// No more of it is read.
    is_over: bool,
    /// Start, end and name, in the order written.
    functions: Vec<(u64, u64, Box<str>)>,
}

impl PerfMap {
    /// Where the map of this process is, or will be: in its own tree, under its own number.
    pub(super) fn of(key: Key) -> Option<Self> {
        let (number, uid) = number_and_user(key.pid)?;
        let mut map = Self {
            key,
            number,
            uid,
            is_here: is_same_root(key.pid),
            read: Mutex::default(),
        };
        let file = map.open(true);
        map.read.get_mut().ok()?.file = file;
        Some(map)
    }

    fn open(&self, lives: bool) -> Option<File> {
        let root = match (lives, self.is_here) {
            (true, _) => format!("/proc/{}/root", self.key.pid),
            (false, true) => "/".to_owned(),
            (false, false) => return None,
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, root, flags, Mode::empty()).ok()?;
        let file = open_in(&root, &format!("tmp/perf-{}.map", self.number))?;
        let metadata = file.metadata().ok()?;
        // Anybody may write there; perf believes its own user and root, too.
        if ![0, self.uid].contains(&metadata.uid()) {
            return None;
        }
        // Somebody who had this number before can have left one.
        let written = metadata.modified().ok()?;
        let written = written.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        let started = i128::from(self.key.start_ns()) + i128::from(clock::boot_to_utc_ns());
        (written as i128 >= started).then_some(file)
    }

    /// Reads what has been added. To be called before [`name`](Self::name).
    pub(super) fn read(&self) -> Read {
        // Before the file: what is not in it then will not come.
        let lives = self.key.check().is_ok();
        let mut lines = self.lines();
        if lines.file.is_none() {
            lines.file = self.open(lives);
        }
        // An error ends the map where it is.
        let _ = lines.read();
        Read {
            bytes: lines.until,
            is_over: !lives || lines.is_over,
        }
    }

    /// The function at this address. Of two, the one written last: the other has been thrown away.
    pub(super) fn name(&self, address: u64) -> Option<Box<str>> {
        let lines = self.lines();
        let mut functions = lines.functions.iter().rev();
        let found = functions.find(|(start, end, _)| (*start..*end).contains(&address));
        found.map(|(_, _, name)| name.clone())
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut bytes = vec![0; BLOCK];
        while !self.is_over {
            let read = file.read_at(&mut bytes, self.until)?;
            let whole = bytes[..read].iter().rposition(|byte| *byte == b'\n');
            let whole = whole.map_or(0, |at| at + 1);
            let lines = bytes[..whole].split(|byte| *byte == b'\n');
            self.functions.extend(lines.filter_map(parse));
            self.until += whole as u64;
            self.is_over = read == BLOCK && whole == 0 || self.until >= MOST_BYTES;
            if read < BLOCK {
                break;
            }
        }
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

/// See [`crate::fuzz`]: a perf map.
pub(crate) fn fuzz(map: &[u8]) {
    for line in map.split(|byte| *byte == b'\n') {
        if let Some((start, end, name)) = parse(line) {
            assert!(start <= end, "{start:x} {end:x}");
            assert!(!name.contains(char::is_control), "{name:?}");
        }
    }
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

    #[test]
    fn a_map_is_read_up_to_its_last_line_and_no_more_than_it_may_be() {
        use std::io::Write as _;

        let read = |parts: &[&[u8]]| {
            let mut written = tempfile();
            let mut lines = Lines {
                file: Some(written.try_clone().unwrap()),
                ..Lines::default()
            };
            for part in parts {
                written.write_all(part).unwrap();
                lines.read().unwrap();
            }
            (lines.functions.len(), lines.until, lines.is_over)
        };
        assert_eq!(read(&[b"10 1 a\n20 1"]), (1, 7, false));
        assert_eq!(read(&[b"10 1 a\n20 1", b" b\n"]), (2, 14, false));
        let many = b"10 1 a\n".repeat(100_000);
        assert_eq!(read(&[&many]), (100_000, 700_000, false));
        // No line, and what comes after it is not looked at.
        assert_eq!(read(&[&[b'x'; BLOCK], b"\n10 1 a\n"]), (0, 0, true));
        let (_, until, is_over) = read(&[&many.repeat(24), b"10 1 a\n"]);
        assert!(is_over && until < MOST_BYTES + BLOCK as u64);
    }

    /// Open, and deleted.
    fn tempfile() -> File {
        File::from(rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn only_the_process_and_root_are_believed() {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        fs::write(&path, "10 1 a\n").unwrap();
        let key = Key::of_this();
        let found = |uid| {
            let mut map = PerfMap::of(key).unwrap();
            map.uid = uid;
            map.open(true).is_some()
        };
        let own = rustix::process::geteuid().as_raw();
        let own_found = [found(own), found(own + 1)];
        if own == 0 {
            std::os::unix::fs::chown(&path, Some(4321), None).unwrap();
        }
        let others_found = [found(own), found(4321)];
        fs::remove_file(&path).unwrap();
        assert_eq!(own_found, [true, own == 0]);
        assert_eq!(others_found, [own != 0, own == 0]);
    }
}
