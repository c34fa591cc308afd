//! What is opened of a traced process. That takes privileges, so it is done here, and not by the reader.
//!
//! Nothing of a file is read here but a few lines that the kernel writes (`stat`, `status`).

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    time::UNIX_EPOCH,
};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use tcptrace_ebpf as kernel;

use crate::{event::StackEnd, kernel::clock};

/// A process, as long as it runs the same program: the kernel lays the stack out anew with each `execve()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) pid: u32,
    /// Since boot, in the ticks in which `/proc` tells it.
    start: u64,
    pub(super) start_stack: u64,
}

/// As much of `/proc/PID/maps` is read here as the reader reads, where files are to be opened by their names.
const MOST_MAPS: u64 = 12 << 20;

impl Key {
    pub(super) fn of(record: &kernel::Stack) -> Self {
        Self {
            pid: record.header.pid,
            start: clock::ticks_of_start(record.header.start),
            start_stack: record.start_stack,
        }
    }

    #[cfg(test)]
    pub(super) fn of_this() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let mut fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
        let mut number = |skip| fields.nth(skip).unwrap().parse().unwrap();
        Self {
            pid: std::process::id(),
            start: number(19),
            start_stack: number(5),
        }
    }

    /// When the process started, boot time nanoseconds.
    pub(super) fn start_ns(&self) -> u64 {
        clock::start_of_ticks(self.start)
    }

    /// Whether the process is still there, and runs the same program.
    pub(super) fn check(&self) -> Result<(), StackEnd> {
        let stat = fs::read(format!("/proc/{}/stat", self.pid)).map_err(|_| StackEnd::Gone)?;
        // The name in brackets may hold anything.
        let after = stat.iter().rposition(|byte| *byte == b')');
        let text = String::from_utf8_lossy(&stat[after.map_or(0, |at| at + 1)..]);
        // proc_pid_stat(5): 22 is the start, 28 the stack; the first here is 3.
        let mut fields = text.split_ascii_whitespace();
        let state = fields.next();
        let start: Option<u64> = fields.nth(18).and_then(|field| field.parse().ok());
        let stack: Option<u64> = fields.nth(5).and_then(|field| field.parse().ok());
        match (state, start, stack) {
            (Some(state), Some(start), Some(stack)) if start == self.start => match stack {
                stack if stack == self.start_stack => Ok(()),
                // Shown to who may trace the process; and it has none any more when it has ended.
                0 if !matches!(state, "Z" | "X") => Err(StackEnd::NotPermitted),
                _ => Err(StackEnd::Gone),
            },
            _ => Err(StackEnd::Gone),
        }
    }

    /// What it has mapped, to be read.
    pub(super) fn maps(&self) -> Result<File, StackEnd> {
        File::open(format!("/proc/{}/maps", self.pid)).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => StackEnd::NotPermitted,
            _ => StackEnd::Gone,
        })
    }

    /// Device and inode of its program.
    pub(super) fn exe(&self) -> Option<(u64, u64)> {
        let exe = fs::metadata(format!("/proc/{}/exe", self.pid)).ok()?;
        Some((exe.dev(), exe.ino()))
    }

    fn root(&self) -> Option<OwnedFd> {
        directory(&format!("/proc/{}/root", self.pid))
    }

    /// The files that are mapped from and to these addresses, wherever they are, and even if they have been deleted;
    /// else the files of these names in the process's own tree, if they are the same.
    pub(super) fn files(&self, ranges: &[(u64, u64)]) -> Vec<Option<File>> {
        let mut names = None;
        let open = |&(start, end): &(u64, u64)| {
            let direct = format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid);
            match openat(CWD, direct, FILE, Mode::empty()) {
                Ok(file) => regular(file),
                // That takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
                Err(rustix::io::Errno::PERM) => {
                    let names = names.get_or_insert_with(|| Named::read(self));
                    names.as_ref()?.open(start, end)
                }
                Err(_) => None,
            }
        };
        ranges.iter().map(open).collect()
    }

    /// The debug file of a build, as distributions install them: where the process lives, or here.
    pub(super) fn debug_file(&self, build_id: &[u8]) -> Option<File> {
        let (first, rest) = build_id.split_first()?;
        let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = format!("usr/lib/debug/.build-id/{first:02x}/{rest}.debug");
        let there = self.root().and_then(|root| open_in(&root, &path));
        there.or_else(|| open_in(&directory("/")?, &path))
    }
}

/// A file of whatever kind, without waiting for anything, and without becoming anybody's terminal.
const FILE: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

fn directory(path: &str) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).ok()
}

fn regular(file: OwnedFd) -> Option<File> {
    let file = File::from(file);
    file.metadata().ok()?.is_file().then_some(file)
}

/// A regular file in somebody else's tree, in which no link leads out of it.
fn open_in(root: &OwnedFd, path: &str) -> Option<File> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    regular(openat2(root, path, FILE, Mode::empty(), resolve).ok()?)
}

/// Names of mapped files, where nothing leads to the files themselves. They are read here, and not taken from the
/// reader: which files are opened must not be for it to say.
struct Named {
    maps: Vec<u8>,
    root: OwnedFd,
}

impl Named {
    fn read(key: &Key) -> Option<Self> {
        let mut maps = Vec::new();
        let file = key.maps().ok()?;
        file.take(MOST_MAPS).read_to_end(&mut maps).ok()?;
        let root = key.root()?;
        Some(Self { maps, root })
    }

    fn open(&self, start: u64, end: u64) -> Option<File> {
        let range = format!("{start:08x}-{end:08x}");
        let mut lines = self.maps.split(|byte| *byte == b'\n');
        let line = lines.find(|line| line.starts_with(range.as_bytes()))?;
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let inode: u64 = std::str::from_utf8(fields.nth(4)?).ok()?.parse().ok()?;
        let path = std::str::from_utf8(fields.next()?.trim_ascii()).ok()?;
        let file = open_in(&self.root, path.strip_prefix('/')?)?;
        (file.metadata().ok()?.ino() == inode).then_some(file)
    }
}

/// Where the map of a process's code made at run time is, or will be: in its own tree, under its own number.
pub(super) struct PerfMapPath {
    key: Key,
    /// The process's id in its own pid namespace.
    number: u32,
    /// Its user, as files show it here.
    uid: u32,
    /// The process sees the same files as this one, so that its map is to be found after its end.
    is_here: bool,
}

impl PerfMapPath {
    pub(super) fn of(key: Key) -> Option<Self> {
        let (number, uid) = number_and_user(key.pid)?;
        let is_here = is_same_root(key.pid);
        Some(Self {
            key,
            number,
            uid,
            is_here,
        })
    }

    pub(super) fn open(&self, lives: bool) -> Option<File> {
        let root = match (lives, self.is_here) {
            (true, _) => self.key.root(),
            (false, true) => directory("/"),
            (false, false) => None,
        };
        let file = open_in(&root?, &format!("tmp/perf-{}.map", self.number))?;
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

/// The number that a process has in its own pid namespace, and the user as whom it makes files.
fn number_and_user(pid: u32) -> Option<(u32, u32)> {
    let mut status = vec![0; 8 << 10];
    let file = File::open(format!("/proc/{pid}/status")).ok()?;
    let read = file.read_at(&mut status, 0).ok()?;
    let status = std::str::from_utf8(&status[..read]).ok()?;
    // The last of pids is that in the innermost namespace; of users, that of the file system.
    let last = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next_back()?.parse().ok()
    };
    Some((last("NSpid:")?, last("Uid:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_and_root_are_believed() {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        fs::write(&path, "10 1 a\n").unwrap();
        let key = Key::of_this();
        let found = |uid| {
            let mut map = PerfMapPath::of(key).unwrap();
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

    #[test]
    fn a_file_is_found_by_its_mapping_and_by_its_name() {
        let key = Key::of_this();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let exe = fs::metadata("/proc/self/exe").unwrap();
        let line = maps.lines().next().unwrap();
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let hex = |digits| u64::from_str_radix(digits, 16).unwrap();
        let range = (hex(start), hex(end));
        let named = Named::read(&key).unwrap();
        let files = key.files(&[range, (1, 2)]);
        assert!(files[1].is_none() && named.open(1, 2).is_none());
        let found = named.open(range.0, range.1).unwrap().metadata().unwrap();
        assert_eq!((found.dev(), found.ino()), (exe.dev(), exe.ino()));
        // Root alone has a way to the file itself.
        if let Some(found) = &files[0] {
            assert_eq!(found.metadata().unwrap().ino(), exe.ino());
        }
    }
}
