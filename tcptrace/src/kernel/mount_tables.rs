//! Which network namespaces are mounted in which mount namespace: kept from scan to scan, within bounds.
//!
//! Every user can make mount namespaces, with 100,000 mounts in each (`fs.mount-max`) and paths of 4 KiB. The kernel
//! writes a mount table at some 35 MB/s (measured on 6.18), so tables of others could take a scan minutes.
//!
//! - A table is read once for all processes in the namespace, and again only when it may have changed.
//! - All tables of a scan together are read up to [`MOST_BYTES`], the smallest first. What is left out is counted.
//!
//! The kernel would report a change (`poll()`) of an open table. But an open table keeps its mount namespace, and that
//! keeps the network namespaces that are mounted in it: see [`netns`](super::netns). So a mount namespace is recognized
//! by its number, which no other gets until the next boot, and its table by how many mounts it has and which is the
//! newest: numbers of mounts only rise. (A mount that was made before another and attached after it can escape this:
//! `fsmount()` and `move_mount()`. So a table is read again after [`OLD`] in any case.) This needs Linux 6.12; before,
//! every table is read in every scan.

use std::{
    collections::HashMap,
    fs::File,
    io::Read as _,
    mem,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
};

use super::{
    mountinfo,
    procfs::{self, Handle},
};

const MNT: &str = "mnt:[";

/// How much of all mount tables is read in one scan, bytes.
pub(super) const MOST_BYTES: usize = 8 << 20;
/// At a time: it takes the kernel a millisecond or two.
const BLOCK: usize = 64 * 1024;
/// When a table is read again that seems not to have changed.
const OLD: Duration = Duration::from_secs(60);
/// Processes that are kept of a mount namespace: one may end before its table is read.
const DOORS: usize = 4;

/// A mount namespace that a scan has found.
#[derive(Debug)]
pub(super) struct Found {
    /// Its inode number.
    pub(super) inode: u32,
    /// Some of the processes in it.
    pub(super) pids: Vec<u32>,
}

impl Found {
    pub(super) fn add(&mut self, pid: u32) {
        if self.pids.len() < DOORS {
            self.pids.push(pid);
        }
    }
}

/// What is kept of the mount tables.
#[derive(Debug, Default)]
pub(super) struct MountTables {
    by_inode: HashMap<u32, Table>,
}

#[derive(Debug, Default)]
struct Table {
    version: Option<Version>,
    /// When.
    read: Option<Instant>,
    /// It was read to its end.
    is_whole: bool,
    /// Network namespaces, and where they are mounted, without the slash at the beginning.
    mounted: Vec<(u32, PathBuf)>,
}

/// A state of a mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    /// `mnt_ns_info.mnt_ns_id`.
    namespace: u64,
    mounts: u32,
    /// The newest mount.
    newest: u64,
}

/// What of the mount tables a scan could not see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// Mount namespaces whose table was not read to its end.
    pub(super) count: u32,
    /// A process in the first of them.
    pub(super) first: Option<u32>,
}

impl MountTables {
    /// Hands on every network namespace that is mounted somewhere: its inode number, a process in the mount namespace,
    /// and the path as that process sees it, without the slash at the beginning. At most `most` bytes are read. Mount
    /// namespaces that were not found are forgotten.
    pub(super) fn scan(
        &mut self,
        found: Vec<Found>,
        most: usize,
        mut each: impl FnMut(u32, u32, &Path),
    ) -> LeftOut {
        let mut before = mem::take(&mut self.by_inode);
        let mut left_out = LeftOut::default();
        let mut due = Vec::new();
        for namespace in found {
            let versions = namespace.pids.iter();
            let version = versions
                .copied()
                .find_map(|pid| version(pid, namespace.inode));
            match before.remove(&namespace.inode) {
                Some(table) if table.is_current(version) => {
                    self.keep(&namespace, table, &mut left_out, &mut each);
                }
                old => due.push((namespace, version, old)),
            }
        }
        // Somebody who makes large tables must not keep the others from being read.
        due.sort_by_key(|(_, version, _)| version.map_or(0, |version| version.mounts));
        let mut left = most;
        for (namespace, version, old) in due {
            let mut pids = namespace.pids.iter().copied();
            let table = if left == 0 {
                // What it had is better than nothing.
                Some(old.unwrap_or_default().without_end())
            } else {
                pids.find_map(|pid| Table::read(pid, namespace.inode, version, &mut left))
            };
            // Where there is none, the processes have ended.
            if let Some(table) = table {
                self.keep(&namespace, table, &mut left_out, &mut each);
            }
        }
        left_out
    }

    fn keep(
        &mut self,
        namespace: &Found,
        table: Table,
        left_out: &mut LeftOut,
        each: &mut impl FnMut(u32, u32, &Path),
    ) {
        let Some(&pid) = namespace.pids.first() else {
            return;
        };
        for (netns, point) in &table.mounted {
            each(*netns, pid, point);
        }
        if !table.is_whole {
            left_out.count += 1;
            left_out.first.get_or_insert(pid);
        }
        self.by_inode.insert(namespace.inode, table);
    }
}

impl Table {
    fn is_current(&self, now: Option<Version>) -> bool {
        let is_young = self.read.is_some_and(|read| read.elapsed() < OLD);
        is_young && now.is_some() && self.version == now
    }

    /// There was no room to read it: it is due in the next scan as well.
    fn without_end(self) -> Self {
        Self {
            version: None,
            is_whole: false,
            ..self
        }
    }

    /// Reads the table of a process's mount namespace, but no more than is `left`. `None` when the process has ended, or
    /// has moved elsewhere.
    fn read(pid: u32, inode: u32, version: Option<Version>, left: &mut usize) -> Option<Self> {
        let process = process_in(pid, inode)?;
        let mut table = Self {
            version,
            read: Some(Instant::now()),
            is_whole: false,
            mounted: Vec::new(),
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mut file = match openat(&process, "mountinfo", flags, Mode::empty()) {
            Ok(file) => File::from(file),
            // `EINVAL`: it has just ended.
            Err(Errno::NOENT | Errno::SRCH | Errno::INVAL) => return None,
            Err(_) => return Some(table),
        };
        let mut text = Vec::with_capacity(BLOCK);
        loop {
            let block = BLOCK.min(*left);
            if block == 0 {
                return Some(table);
            }
            match (&mut file).take(block as u64).read_to_end(&mut text) {
                Ok(0) => break,
                Ok(read) => *left -= read,
                Err(_) => return Some(table),
            }
            // The last line may go on in the next block.
            let whole = text
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
            table.mounted.extend(mounted(&text[..whole]));
            text.drain(..whole);
        }
        table.is_whole = true;
        Some(table)
    }
}

/// The network namespaces in a mount table.
fn mounted(text: &[u8]) -> impl Iterator<Item = (u32, PathBuf)> + '_ {
    mountinfo::mounts(text).filter_map(|mount| {
        let inode = procfs::bracketed(&mount.root, "net:[")?;
        let below = mount.point.strip_prefix("/").unwrap_or(&mount.point);
        Some((inode, below.to_owned()))
    })
}

/// A process that is in this mount namespace.
fn process_in(pid: u32, inode: u32) -> Option<Handle> {
    let process = Handle::open(pid).ok()?;
    let own = procfs::link_inode(&process, "ns/mnt", MNT).ok()??;
    (own == inode).then_some(process)
}

/// `struct mnt_ns_info` (`include/uapi/linux/nsfs.h`, 6.12).
#[derive(Default)]
#[repr(C)]
struct NamespaceInfo {
    size: u32,
    mounts: u32,
    id: u64,
}

/// `NS_MNT_GET_INFO`: `_IOR(0xb7, 10, struct mnt_ns_info)`.
const NS_MNT_GET_INFO: libc::c_ulong = 0x8010_b70a;

/// `struct mnt_id_req` of 32 bytes, `MNT_ID_REQ_SIZE_VER1` (`include/uapi/linux/mount.h`, 6.11).
#[repr(C)]
struct ListRequest {
    size: u32,
    spare: u32,
    /// Below which mount.
    mount: u64,
    /// Behind which one; 0 for the end, as it is listed in reverse.
    last: u64,
    namespace: u64,
}

const SYS_LISTMOUNT: libc::c_long = 458;
/// `LSMT_ROOT`: all.
const ROOT: u64 = u64::MAX;
const LISTMOUNT_REVERSE: u32 = 1;

/// The state of a process's mount namespace; `None` where the kernel does not tell.
fn version(pid: u32, inode: u32) -> Option<Version> {
    let process = process_in(pid, inode)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = openat(&process, "ns/mnt", flags, Mode::empty()).ok()?;
    let mut info = NamespaceInfo::default();
    // SAFETY: the kernel writes one `mnt_ns_info`, whose size is in the number of the request. Older ones, and other
    // files, do not know the number.
    let told = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_MNT_GET_INFO as _, &raw mut info) };
    if told != 0 || info.id == 0 {
        return None;
    }
    let request = ListRequest {
        size: size_of::<ListRequest>() as u32,
        spare: 0,
        mount: ROOT,
        last: 0,
        namespace: info.id,
    };
    let mut newest = 0_u64;
    // SAFETY: the request is as long as it says, and there is room for one number.
    let count = unsafe {
        libc::syscall(
            SYS_LISTMOUNT,
            &raw const request,
            &raw mut newest,
            1_usize,
            LISTMOUNT_REVERSE,
        )
    };
    (count == 1).then_some(Version {
        namespace: info.id,
        mounts: info.mounts,
        newest,
    })
}

#[cfg(test)]
mod tests;
