//! One process, whatever becomes of its pid.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statat, statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::{numbers, open_dir, read};
use crate::event::Comm;
use crate::kernel::clock;

/// One process, by its open directory in `/proc`: what is read through it is of this process and of
/// no other, even after its pid has gone to the next. Of one that has ended, nothing can be read
/// (`ESRCH`).
#[derive(Debug)]
pub struct Handle {
    pid: u32,
    dir: OwnedFd,
    /// How many descriptors it had when they were listed, or counted.
    fds: Cell<Option<u32>>,
}

/// Who a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id, as this program's `/proc` numbers it.
    pub pid: u32,
    /// Its parent's; 0 when that is outside this pid namespace, or there is none.
    pub ppid: u32,
    /// `comm` of its first thread.
    pub comm: Comm,
    /// When it started, [boot time](clock::boot_ns) in nanoseconds, cut to clock ticks of 10 ms. With the pid
    /// it names a process for good.
    pub start: u64,
}

impl Handle {
    /// The process that has this pid now.
    ///
    /// # Errors
    ///
    /// `ErrorKind::NotFound` when there is none, or `/proc` hides it; `EMFILE` and the like.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self::open_at(open_dir(CWD, "/proc")?, pid)?)
    }

    pub(in crate::kernel) fn open_at(proc: impl AsFd, pid: u32) -> Result<Self, Errno> {
        // To look up what is in it needs no permission to list it.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(proc, DecInt::new(pid), flags, Mode::empty())?;
        Ok(Self {
            pid,
            dir,
            fds: Cell::new(None),
        })
    }

    /// Its id, as this program's `/proc` numbers it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Who it is. None when it has ended, or `/proc` hides it.
    #[must_use]
    pub fn identity(&self) -> Option<Process> {
        let stat = read(self, "stat").ok()?;
        let (comm, fields) = Fields::of(&stat)?;
        Some(Process {
            pid: self.pid,
            ppid: u32::try_from(fields.number(4)?).ok()?,
            comm: Comm::new(comm),
            start: clock::start_of_ticks(fields.number(22)?),
        })
    }

    /// Whether it runs the same file as this process.
    #[must_use]
    pub fn runs_this_program(&self) -> bool {
        // What is known of the file is enough: to ask its file system can take for ever, if that is another's (FUSE).
        let flags = AtFlags::STATX_DONT_SYNC;
        let file = |dir: BorrowedFd<'_>, path: &str| {
            let file = statx(dir, path, flags, StatxFlags::INO).ok()?;
            Some((file.stx_dev_major, file.stx_dev_minor, file.stx_ino))
        };
        let own = file(CWD, "/proc/self/exe");
        own.is_some() && own == file(self.as_fd(), "exe")
    }

    /// Fills `fds` with the numbers of its descriptors. Returns whose table that is, a thread's id,
    /// and the table itself, a directory of links.
    ///
    /// Threads share one table, mostly (`CLONE_FILES`), and that of the first is taken. When the
    /// first thread has ended, its part in the table has ended with it: then it is that of the first
    /// thread that has descriptors.
    pub(super) fn descriptors(&self, fds: &mut Vec<u32>) -> Result<(u32, OwnedFd), Errno> {
        let table = self.table(fds)?;
        self.fds.set(u32::try_from(fds.len()).ok());
        Ok(table)
    }

    /// How many descriptors it has, or had when they were listed. `None` if this user may not know.
    pub(super) fn descriptor_count(&self) -> Option<u32> {
        if self.fds.get().is_none() {
            // The size of that directory is their number (`proc_readfd_count()`, since Linux 6.2), for everybody to see;
            // to list them takes the longer the more there are.
            let counted = statat(self, "fd", AtFlags::empty()).map_or(0, |fd| fd.st_size);
            match u32::try_from(counted) {
                Ok(count @ 1..) => self.fds.set(Some(count)),
                _ => drop(self.descriptors(&mut Vec::new()).ok()?),
            }
        }
        self.fds.get()
    }

    fn table(&self, fds: &mut Vec<u32>) -> Result<(u32, OwnedFd), Errno> {
        let table_of = |tid: u32, fds: &mut Vec<u32>| {
            let table = open_dir(self, format!("task/{tid}/fd"))?;
            numbers(&table, fds).map(|()| table)
        };
        let first = table_of(self.pid, fds);
        match first {
            Ok(table) if !fds.is_empty() => return Ok((self.pid, table)),
            // What is left of a thread belongs to root alone: EACCES.
            Ok(_) | Err(Errno::NOENT | Errno::SRCH | Errno::ACCESS) => {}
            Err(error) => return Err(error),
        }
        let mut tids = Vec::new();
        numbers(open_dir(self, "task")?, &mut tids)?;
        for tid in tids.into_iter().filter(|&tid| tid != self.pid) {
            match table_of(tid, fds) {
                Ok(table) if !fds.is_empty() => return Ok((tid, table)),
                Ok(_) | Err(Errno::NOENT | Errno::SRCH) => {}
                Err(error) => return Err(error),
            }
        }
        fds.clear();
        first.map(|table| (self.pid, table))
    }

    /// Whether a process that refused to be read is alive (one that ends refuses, too) and no kernel
    /// thread. That is in its `stat`, which everyone may read.
    pub(super) fn may_hold_something(&self) -> bool {
        const PF_KTHREAD: u64 = 0x0020_0000;
        let stat = match read(self, "stat") {
            Ok(stat) => stat,
            Err(error) => return !matches!(error, Errno::NOENT | Errno::SRCH),
        };
        let Some((_, fields)) = Fields::of(&stat) else {
            return true;
        };
        // The state is that of the first thread, which others may outlive.
        let ended = fields.is_zombie() && fields.number(20).is_some_and(|threads| threads <= 1);
        let kernel_thread = fields
            .number(9)
            .is_some_and(|flags| flags & PF_KTHREAD != 0);
        !ended && !kernel_thread
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// The fields of `/proc/PID/stat` behind the comm.
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    /// The comm, without its parentheses, and what is behind it. A comm may contain blanks and
    /// parentheses, the fields behind it do not.
    fn of(stat: &'a [u8]) -> Option<(&'a [u8], Self)> {
        let open = stat.iter().position(|&byte| byte == b'(')?;
        let close = stat.iter().rposition(|&byte| byte == b')')?;
        let comm = stat.get(open + 1..close)?;
        let fields = std::str::from_utf8(&stat[close + 1..]).ok()?;
        Some((comm, Self(fields)))
    }

    /// Field `number`, counted from 1 as in proc_pid_stat(5), at least 4.
    fn number(&self, number: usize) -> Option<u64> {
        let mut fields = self.0.split_ascii_whitespace();
        fields.nth(number.checked_sub(3)?)?.parse().ok()
    }

    fn is_zombie(&self) -> bool {
        self.0.trim_start().starts_with(['Z', 'X'])
    }
}

/// See [`crate::fuzz`]: `/proc/PID/stat`.
pub(crate) fn fuzz(stat: &[u8]) {
    if let Some((comm, fields)) = Fields::of(stat) {
        assert!(comm.len() < stat.len());
        std::hint::black_box(fields.is_zombie());
        for number in 0..60 {
            std::hint::black_box(fields.number(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comm_and_start(stat: &[u8]) -> Option<(&[u8], u64)> {
        let (comm, fields) = Fields::of(stat)?;
        Some((comm, fields.number(22)?))
    }

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
    fn another_program_is_not_this_one() {
        let me = Handle::open(std::process::id()).unwrap();
        assert!(me.runs_this_program());
        let mut other = std::process::Command::new("sleep")
            .arg("9")
            .spawn()
            .unwrap();
        // It runs this program until it has become the other one.
        let start = std::time::Instant::now();
        let handle = Handle::open(other.id()).unwrap();
        while handle.runs_this_program() {
            assert!(start.elapsed() < std::time::Duration::from_secs(5));
        }
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!handle.runs_this_program());
    }

    #[test]
    fn this_process_is_itself() {
        let me = Handle::open(std::process::id()).unwrap();
        let me = me.identity().unwrap();
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(me.comm, Comm::new(comm.trim_end().as_bytes()));
        assert_eq!(me.pid, std::process::id());
        assert_eq!(me.ppid, std::os::unix::process::parent_id());
        let age = clock::boot_ns()
            .checked_sub(me.start)
            .expect("it started in the past");
        assert!(age < 3600 * 1_000_000_000, "{age} ns old");
    }

    #[test]
    fn a_process_that_never_was_is_not_found() {
        let error = Handle::open(u32::MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn nothing_is_left_of_a_process_that_has_ended() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let handle = Handle::open(child.id()).unwrap();
        let alive = handle.identity().unwrap();
        assert_eq!((alive.pid, alive.ppid), (child.id(), std::process::id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(handle.identity(), None);
        assert_eq!(handle.details(), None);
        let mut fds = Vec::new();
        assert!(handle.descriptors(&mut fds).is_err());
        assert!(!handle.may_hold_something());
    }
}
