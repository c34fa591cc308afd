//! Processes: who they are, and which of them hold a socket.
//!
//! A pass over all file descriptors of a host is one readlink per descriptor, with no allocation
//! and no path from the root; that is why the directories are read here and not through a crate
//! that makes an object of each.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, RawDir, openat, readlinkat_raw};
use rustix::io::Errno;
use rustix::path::{Arg, DecInt};

use crate::event::Comm;

/// A file descriptor that refers to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Holder {
    /// Inode of the socket's file, as `sock_diag` tells it.
    pub inode: u32,
    /// The process, as this program's `/proc` numbers it.
    pub pid: u32,
    /// Its file descriptor.
    pub fd: u32,
}

/// What a pass over `/proc` could not see, so that its answer may lack something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Processes that could not be read. Kernel threads and zombies do not count: they hold
    /// nothing.
    pub unreadable: u32,
    /// Why there may be processes that `/proc` does not even list.
    pub hidden: Option<Hidden>,
}

/// Why `/proc` may not list all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hidden {
    /// `/proc` is mounted with `hidepid`, and this program lacks `CAP_SYS_PTRACE`.
    Hidepid,
    /// This program runs in a pid namespace of its own (a container) and sees what is in it.
    PidNamespace,
}

impl Unseen {
    /// True when nothing was out of sight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Unseen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("every process could be read");
        }
        if self.unreadable > 0 {
            write!(
                f,
                "processes that could not be read: {} (CAP_SYS_PTRACE is missing, or a security module forbids it)",
                self.unreadable
            )?;
        }
        if self.unreadable > 0 && self.hidden.is_some() {
            f.write_str("; ")?;
        }
        match self.hidden {
            None => Ok(()),
            Some(Hidden::Hidepid) => f.write_str(
                "/proc hides processes (hidepid): run as root, or with CAP_SYS_PTRACE",
            ),
            Some(Hidden::PidNamespace) => f.write_str(
                "processes outside this pid namespace are out of sight: run on the host, or share its pid namespace",
            ),
        }
    }
}

/// Finds every file descriptor that refers to a socket in `wanted`, in one pass over all
/// processes, and hands it to `each`. A socket may have several holders.
///
/// A process whose threads do not share their descriptors (`CLONE_FILES`) is seen as its first
/// thread sees it. Processes that end meanwhile are left out.
///
/// # Errors
///
/// When `/proc` cannot be read at all, or no file descriptor is left to read it with (`EMFILE`).
pub fn holders(wanted: &HashSet<u32>, mut each: impl FnMut(Holder)) -> io::Result<Unseen> {
    let mut fds = Vec::new();
    let mut tids = Vec::new();
    processes(|proc, pid| {
        let mut scan = |table: OwnedFd| -> Result<bool, Errno> {
            numbers(&table, &mut fds)?;
            for &fd in &fds {
                let inode = match link_inode(&table, DecInt::new(fd), "socket:[") {
                    Err(Errno::NOENT) => continue, // closed meanwhile
                    inode => inode?,
                };
                if let Some(inode) = inode.filter(|inode| wanted.contains(inode)) {
                    each(Holder { inode, pid, fd });
                }
            }
            Ok(!fds.is_empty())
        };
        if scan(open_dir(proc, format!("{pid}/fd"))?)? {
            return Ok(());
        }
        // The first thread may have ended, its descriptors with it, while others live on.
        let tasks = open_dir(proc, format!("{pid}/task"))?;
        numbers(&tasks, &mut tids)?;
        for tid in tids.iter().filter(|&&tid| tid != pid) {
            match open_dir(&tasks, format!("{tid}/fd")).and_then(&mut scan) {
                Ok(true) => break,
                Ok(false) | Err(Errno::NOENT | Errno::SRCH) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id, as this program's `/proc` numbers it.
    pub pid: u32,
    /// `comm` of its first thread.
    pub comm: Comm,
    /// When it started, `CLOCK_BOOTTIME` in nanoseconds, cut to clock ticks of 10 ms. With the pid
    /// it names a process for good.
    pub start: u64,
}

/// Who `pid` is. None when there is no such process, or `/proc` hides it.
#[must_use]
pub fn process(pid: u32) -> Option<Process> {
    let stat = read(CWD, format!("/proc/{pid}/stat")).ok()?;
    let (comm, start) = comm_and_start(&stat)?;
    Some(Process {
        pid,
        comm: Comm::new(comm),
        start: start.saturating_mul(tick()),
    })
}

/// Nanoseconds in a clock tick of `/proc/PID/stat`: 10 ms everywhere but on alpha and ia64.
fn tick() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

/// Field 2, without its parentheses, and field 22, in clock ticks since boot, of
/// `/proc/PID/stat`. A comm may contain blanks and parentheses, the fields behind it do not.
fn comm_and_start(stat: &[u8]) -> Option<(&[u8], u64)> {
    let open = stat.iter().position(|&byte| byte == b'(')?;
    let close = stat.iter().rposition(|&byte| byte == b')')?;
    let comm = stat.get(open + 1..close)?;
    Some((comm, stat_field(&stat[close + 1..], 22)?))
}

/// Field `number` (counted from 1, at least 3) of `/proc/PID/stat`, of the part behind the comm.
fn stat_field(behind_comm: &[u8], number: usize) -> Option<u64> {
    let behind_comm = std::str::from_utf8(behind_comm).ok()?;
    let mut fields = behind_comm.split_ascii_whitespace();
    fields.nth(number.checked_sub(3)?)?.parse().ok()
}

/// Calls `visit` for every process, with the directory `/proc`. A process that ends meanwhile
/// (`ENOENT`, `ESRCH`) is passed over, one that may not be read (`EACCES`, `EPERM`) is counted.
pub(super) fn processes(
    mut visit: impl FnMut(&OwnedFd, u32) -> Result<(), Errno>,
) -> io::Result<Unseen> {
    let proc = open_dir(CWD, "/proc")?;
    let mut unseen = Unseen {
        unreadable: 0,
        hidden: hidden(&proc),
    };
    let mut pids = Vec::new();
    numbers(&proc, &mut pids)?;
    for pid in pids {
        match visit(&proc, pid) {
            Ok(()) | Err(Errno::NOENT | Errno::SRCH) => {}
            Err(Errno::ACCESS | Errno::PERM) => {
                unseen.unreadable += u32::from(may_hold_something(&proc, pid));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(unseen)
}

/// `PROC_PID_INIT_INO`: the inode number of the initial pid namespace, part of the kernel's
/// interface.
const INITIAL_PID_NAMESPACE: u32 = 0xEFFF_FFFC;

fn hidden(proc: &OwnedFd) -> Option<Hidden> {
    // Every pid namespace has a process 1, and hidepid hides it from those it hides others from.
    if matches!(open_dir(proc, "1"), Err(Errno::NOENT)) {
        return Some(Hidden::Hidepid);
    }
    match link_inode(proc, "self/ns/pid", "pid:[") {
        Ok(Some(INITIAL_PID_NAMESPACE)) => None,
        _ => Some(Hidden::PidNamespace),
    }
}

/// Whether a process that refused to be read is alive (one that ends refuses, too) and no kernel
/// thread. That is in `/proc/PID/stat`, which everyone may read.
fn may_hold_something(proc: &OwnedFd, pid: u32) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let stat = match open_dir(proc, pid.to_string()).and_then(|dir| read(&dir, "stat")) {
        Ok(stat) => stat,
        Err(error) => return !matches!(error, Errno::NOENT | Errno::SRCH),
    };
    let Some(close) = stat.iter().rposition(|&byte| byte == b')') else {
        return true;
    };
    let fields = &stat[close + 1..];
    let dead = matches!(fields, [b' ', b'Z' | b'X', ..]);
    let kernel_thread = stat_field(fields, 9).is_some_and(|flags| flags & PF_KTHREAD != 0);
    !dead && !kernel_thread
}

pub(super) fn open_dir(at: impl AsFd, path: impl Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(at, path, flags, Mode::empty())
}

/// The whole of a file, which `/proc` writes anew at each opening.
pub(super) fn read(at: impl AsFd, path: impl Arg) -> Result<Vec<u8>, Errno> {
    let file = openat(at, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::new();
    match File::from(file).read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

/// The numbers among a directory's names, in place of what `into` held.
pub(super) fn numbers(dir: impl AsFd, into: &mut Vec<u32>) -> Result<(), Errno> {
    // About a thousand names of `/proc` at a time.
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    into.clear();
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if let Some(number) = decimal(entry.file_name().to_bytes()) {
            into.push(number);
        }
    }
    Ok(())
}

/// The inode number in a link of the form `kind:[123]`; None when it is of another kind.
pub(super) fn link_inode(
    at: impl AsFd,
    path: impl Arg,
    kind_and_bracket: &str,
) -> Result<Option<u32>, Errno> {
    // Longer targets are paths of files, and cut.
    let mut target = [0_u8; 64];
    let length = readlinkat_raw(at, path, &mut target)?;
    Ok(bracketed(&target[..length], kind_and_bracket))
}

/// `123` of `kind:[123]`.
pub(super) fn bracketed(name: &[u8], kind_and_bracket: &str) -> Option<u32> {
    let inner = name.strip_prefix(kind_and_bracket.as_bytes())?;
    decimal(inner.strip_suffix(b"]")?)
}

fn decimal(digits: &[u8]) -> Option<u32> {
    // `parse` alone would take a plus sign.
    if !digits.first()?.is_ascii_digit() {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_comm_may_look_like_the_fields_behind_it() {
        let stat = b"7 (a) S 1 (b 2) R 1 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 5551212 1 2 3";
        let (comm, start) = comm_and_start(stat).unwrap();
        assert_eq!(comm, b"a) S 1 (b 2");
        assert_eq!(start, 5_551_212);
    }

    #[test]
    fn a_cut_stat_is_no_process() {
        let stat = b"7 (cat) R 1 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 5551212 1 2 3\n";
        let end = stat.windows(8).position(|w| w == b"5551212 ").unwrap();
        for length in 0..end {
            assert_eq!(comm_and_start(&stat[..length]), None, "{length} bytes");
        }
        assert_eq!(comm_and_start(b") ("), None);
    }

    #[test]
    fn links_of_another_kind_have_no_inode() {
        assert_eq!(
            bracketed(b"socket:[4294967295]", "socket:["),
            Some(u32::MAX)
        );
        for link in [
            &b"socket:[4294967296]"[..],
            b"socket:[+1]",
            b"socket:[]",
            b"socket:[12",
            b"pipe:[12]",
            b"/tmp/socket:[12]",
            b"",
        ] {
            assert_eq!(bracketed(link, "socket:["), None);
        }
    }

    #[test]
    fn this_process_is_itself() {
        let me = process(std::process::id()).unwrap();
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(me.comm, Comm::new(comm.trim_end().as_bytes()));
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let age = now.checked_sub(me.start).expect("it started in the past");
        assert!(age < 3600 * 1_000_000_000, "{age} ns old");
    }

    #[test]
    fn a_process_that_never_was_is_none() {
        assert_eq!(process(u32::MAX), None);
    }

    #[test]
    fn a_socket_is_found_by_each_descriptor_that_holds_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let second = listener.try_clone().unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let inode = |fd| {
            let path = format!("/proc/self/fd/{fd}");
            std::fs::metadata(path).unwrap().ino() as u32
        };
        let wanted = HashSet::from([inode(listener.as_raw_fd())]);
        assert!(!wanted.contains(&inode(other.as_raw_fd())));

        let mut found = Vec::new();
        holders(&wanted, |holder| found.push(holder)).unwrap();

        found.sort_unstable();
        let mut expected = [listener.as_raw_fd(), second.as_raw_fd()].map(|fd| Holder {
            inode: inode(fd),
            pid: std::process::id(),
            fd: fd as u32,
        });
        expected.sort_unstable();
        assert_eq!(found, expected);
    }

    #[test]
    fn what_was_not_seen_is_said() {
        let unseen = Unseen {
            unreadable: 3,
            hidden: Some(Hidden::PidNamespace),
        };
        assert_eq!(
            unseen.to_string(),
            "processes that could not be read: 3 (CAP_SYS_PTRACE is missing, or a security module \
             forbids it); processes outside this pid namespace are out of sight: run on the host, \
             or share its pid namespace"
        );
    }
}
