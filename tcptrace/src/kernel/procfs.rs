//! Processes: who they are, and which descriptors of theirs refer to sockets.
//!
//! A pass over all file descriptors of a host is one readlink per descriptor, with no allocation
//! and no path from the root; that is why the directories are read here and not through a crate
//! that makes an object of each.

mod descendants;
mod details;
mod handle;
mod sockets;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{CWD, Mode, OFlags, RawDir, openat, readlinkat_raw};
use rustix::io::{Errno, retry_on_intr};
use rustix::path::Arg;

use super::capabilities::{self, Capabilities, Capability};
use crate::reason::Reason;

pub use descendants::{descendants, own_pid};
pub use details::Details;
pub use handle::{Handle, Process};
pub use sockets::{Descriptor, sockets, sockets_by_part};

/// What a pass over `/proc` could not see, so that its answer may lack something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Processes that could not be read. Kernel threads and zombies do not count: they hold
    /// nothing.
    pub unreadable: u32,
    /// The first of them.
    pub first: Option<u32>,
    /// Why there may be processes that `/proc` does not even list.
    pub hidden: Option<Hidden>,
    /// Mount namespaces whose table was not read to its end: what is mounted there may be missing.
    pub mount_tables: u32,
    /// A process in the first of them.
    pub first_mount_table: Option<u32>,
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

impl Unseen {
    /// Why, and what can be done about it, for a program with these capabilities.
    #[must_use]
    pub fn reasons(&self, capabilities: Capabilities) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if self.unreadable > 0 {
            let which = match (self.unreadable, self.first) {
                (1, Some(pid)) => format!("1 (pid {pid})"),
                (count, Some(pid)) => format!("{count} (the first is pid {pid})"),
                (count, None) => count.to_string(),
            };
            let missing =
                capabilities.missing(&[Capability::SYS_PTRACE, Capability::DAC_READ_SEARCH]);
            let fix = if missing.is_empty() {
                "a security module forbids it, or their user namespace is another one: run on the host, where \
                 that is allowed"
                    .to_owned()
            } else {
                format!("run as root, or with {}", capabilities::list(&missing))
            };
            reasons.push(Reason::new(
                format_args!("processes that could not be read: {which}"),
                fix,
            ));
        }
        if self.mount_tables > 0 {
            let which = match self.first_mount_table {
                Some(pid) => format!("{} (the first is that of pid {pid})", self.mount_tables),
                None => self.mount_tables.to_string(),
            };
            reasons.push(Reason::new(
                format_args!("mount namespaces with too many mounts to read them all: {which}"),
                "see who makes that many (wc -l /proc/PID/mountinfo)",
            ));
        }
        match self.hidden {
            None => {}
            Some(Hidden::Hidepid) => reasons.push(Reason::new(
                "/proc hides processes (hidepid)",
                "run as root, or with CAP_SYS_PTRACE",
            )),
            Some(Hidden::PidNamespace) => reasons.push(Reason::new(
                "processes outside this pid namespace are out of sight",
                "run on the host, or share its pid namespace",
            )),
        }
        reasons
    }
}

/// Calls `visit` for every process. One that ends meanwhile (`ENOENT`, `ESRCH`) is passed over, one
/// that may not be read (`EACCES`, `EPERM`) is counted.
pub(super) fn processes(visit: impl FnMut(&Handle) -> Result<(), Errno>) -> io::Result<Unseen> {
    let (proc, pids) = pids()?;
    let mut unseen = each_of(&proc, &pids, visit)?;
    unseen.hidden = hidden(&proc);
    Ok(unseen)
}

/// `/proc`, and the processes that it lists.
fn pids() -> Result<(OwnedFd, Vec<u32>), Errno> {
    let proc = open_dir(CWD, "/proc")?;
    let mut pids = Vec::new();
    numbers(&proc, &mut pids)?;
    Ok((proc, pids))
}

fn each_of(
    proc: &OwnedFd,
    pids: &[u32],
    mut visit: impl FnMut(&Handle) -> Result<(), Errno>,
) -> io::Result<Unseen> {
    let mut unseen = Unseen::default();
    for &pid in pids {
        let process = match Handle::open_at(proc, pid) {
            Ok(process) => process,
            Err(Errno::NOENT | Errno::SRCH) => continue,
            Err(error) => return Err(error.into()),
        };
        match visit(&process) {
            Ok(()) | Err(Errno::NOENT | Errno::SRCH) => {}
            Err(Errno::ACCESS | Errno::PERM) => {
                if process.may_hold_something() {
                    unseen.unreadable += 1;
                    unseen.first.get_or_insert(pid);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(unseen)
}

/// `PROC_PID_INIT_INO`: the inode number of the initial pid namespace, part of the kernel's
/// interface.
const INITIAL_PID_NAMESPACE: u32 = 0xEFFF_FFFC;

/// Whether this program's `/proc` numbers processes otherwise than the initial pid namespace does, and
/// with it the probes.
#[must_use]
pub fn has_private_pids() -> bool {
    open_dir(CWD, "/proc").is_ok_and(|proc| is_private(&proc))
}

fn is_private(proc: &OwnedFd) -> bool {
    let own = link_inode(proc, "self/ns/pid", "pid:[");
    own != Ok(Some(INITIAL_PID_NAMESPACE))
}

/// `PROC_USER_INIT_INO`: the inode number of the initial user namespace.
const INITIAL_USER_NAMESPACE: u32 = 0xEFFF_FFFD;

/// Whether this program is in a user namespace of its own, in which it can be root without being it
/// elsewhere.
#[must_use]
pub fn has_own_user_namespace() -> bool {
    let own = link_inode(CWD, "/proc/self/ns/user", "user:[");
    // Without the file, this kernel has none.
    matches!(own, Ok(Some(inode)) if inode != INITIAL_USER_NAMESPACE)
}

fn hidden(proc: &OwnedFd) -> Option<Hidden> {
    // Every pid namespace has a process 1, and hidepid hides it from those it hides others from.
    if matches!(open_dir(proc, "1"), Err(Errno::NOENT)) {
        return Some(Hidden::Hidepid);
    }
    is_private(proc).then_some(Hidden::PidNamespace)
}

pub(super) fn open_dir(at: impl AsFd, path: impl Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(at, path, flags, Mode::empty())
}

/// Most that is read of one file about a process, bytes. `stat`, `status`, `limits` and `cgroup` have a few
/// kilobytes; `cgroup` grows with the paths that others choose, to 4 KiB for each of a dozen hierarchies.
const MOST_BYTES: usize = 1 << 20;

/// The whole of a small file, which `/proc` writes anew at each opening. `EFBIG` if it is longer than 1 MiB.
pub(super) fn read(at: impl AsFd, path: impl Arg) -> Result<Vec<u8>, Errno> {
    read_most(at, path, MOST_BYTES)
}

/// The whole of a file; `EFBIG` if it is longer than `most` bytes. How long a file is, `/proc` does not say
/// before, and it is as long as others make it.
pub(crate) fn read_most(at: impl AsFd, path: impl Arg, most: usize) -> Result<Vec<u8>, Errno> {
    let file = openat(at, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // Room for most of them.
    let mut bytes = Vec::with_capacity(4096);
    loop {
        bytes.reserve(1024);
        if retry_on_intr(|| rustix::io::read(&file, spare_capacity(&mut bytes)))? == 0 {
            return Ok(bytes);
        }
        if bytes.len() > most {
            return Err(Errno::FBIG);
        }
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

/// See [`crate::fuzz`].
pub(crate) mod fuzz {
    pub(crate) use super::{details::fuzz as details, handle::fuzz as stat};

    /// The target of a link to a socket or a namespace.
    pub(crate) fn link(target: &[u8]) {
        for kind in ["socket:[", "net:["] {
            if let Some(inode) = super::bracketed(target, kind) {
                // Leading zeros are the only other way to write a number.
                let digits = &target[kind.len()..target.len() - 1];
                let zeros = digits.iter().take_while(|digit| **digit == b'0').count();
                let plain = inode.to_string();
                assert!(
                    digits[zeros..] == *plain.as_bytes() || inode == 0,
                    "{target:?}"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_file_without_an_end_is_not_read_to_it() {
        assert_eq!(read(CWD, "/dev/zero"), Err(Errno::FBIG));
        let own = read(CWD, "/proc/self/limits").unwrap();
        assert_eq!(
            read_most(CWD, "/proc/self/limits", own.len()),
            Ok(own.clone())
        );
        assert_eq!(
            read_most(CWD, "/proc/self/limits", own.len() - 1),
            Err(Errno::FBIG)
        );
    }

    #[test]
    fn what_was_not_seen_is_said() {
        let unseen = Unseen {
            unreadable: 3,
            first: Some(7),
            hidden: Some(Hidden::PidNamespace),
            mount_tables: 2,
            first_mount_table: Some(9),
        };
        let said = |capabilities| -> Vec<String> {
            let reasons = unseen.reasons(capabilities);
            reasons.iter().map(Reason::to_string).collect()
        };
        assert_eq!(
            said(Capabilities(0)),
            [
                "processes that could not be read: 3 (the first is pid 7); run as root, or with \
                 CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
                "mount namespaces with too many mounts to read them all: 2 (the first is that of pid 9); see who makes \
                 that many (wc -l /proc/PID/mountinfo)",
                "processes outside this pid namespace are out of sight; run on the host, or share \
                 its pid namespace"
            ]
        );
        let all = said(Capabilities(u64::MAX));
        assert!(all[0].contains("a security module"), "{all:?}");
        assert!(Unseen::default().reasons(Capabilities(0)).is_empty());
    }
}
