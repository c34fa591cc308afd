//! The path of a cgroup, by its id.

use std::ffi::c_int;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;

use super::{mountinfo, procfs};
use crate::exhausted;
use crate::reason::Reason;

/// The cgroup2 file system, to find a cgroup's path by its id.
#[derive(Debug)]
pub struct Cgroups {
    mount: OwnedFd,
    point: PathBuf,
}

/// `struct file_handle` with the id of a kernfs node, `FILEID_KERNFS`.
#[repr(C)]
struct KernfsHandle {
    bytes: u32,
    kind: c_int,
    id: u64,
}

/// `include/linux/exportfs.h`; kernfs handles are these eight bytes since Linux 5.5.
const FILEID_KERNFS: c_int = 0xfe;

/// What is lost without cgroup2.
#[must_use]
pub fn reason(error: &io::Error) -> Reason {
    exhausted::reason(
        "the container of a socket is not known",
        error,
        "mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup (where version 1 is, at a folder of its own)",
    )
}

impl Cgroups {
    /// Finds the cgroup2 mount, wherever it is: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a
    /// host with both versions.
    ///
    /// # Errors
    ///
    /// `ErrorKind::NotFound` when there is none; or what opening it says.
    pub fn open() -> io::Result<Self> {
        let table = procfs::read(CWD, "/proc/self/mountinfo")?;
        // The last mount on a point is the one that is seen.
        let mount = mountinfo::mounts(&table)
            .filter(|mount| mount.kind == b"cgroup2")
            .last()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "cgroup2 is not mounted"))?;
        Ok(Self {
            mount: procfs::open_dir(CWD, &mount.point)?,
            point: mount.point,
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// The path of the cgroup `id` below the mount, beginning with a slash. None when that cgroup
    /// is gone.
    ///
    /// With `CAP_DAC_READ_SEARCH` this is three system calls. Without, it walks all cgroups:
    /// remember the answer.
    #[must_use]
    pub fn path(&self, id: u64) -> Option<String> {
        let path = match self.open_by_id(id) {
            Ok(dir) => fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).ok()?,
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => return None,
            Err(_not_permitted) => find(&self.point, id)?,
        };
        let below = path.strip_prefix(&self.point).ok()?;
        Some(format!("/{}", below.to_string_lossy()))
    }

    fn open_by_id(&self, id: u64) -> io::Result<OwnedFd> {
        let mut handle = KernfsHandle {
            bytes: size_of::<u64>() as u32,
            kind: FILEID_KERNFS,
            id,
        };
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: the handle has the layout of `struct file_handle` with as many bytes behind it
        // as it says, and the kernel only reads it.
        let fd = unsafe {
            libc::open_by_handle_at(
                self.mount.as_raw_fd(),
                (&raw mut handle).cast::<libc::file_handle>(),
                flags,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The directory at or below `dir` whose inode number is `id`: on 64-bit machines that is the
/// cgroup's id.
fn find(dir: &Path, id: u64) -> Option<PathBuf> {
    if fs::metadata(dir).ok()?.ino() == id {
        return Some(dir.to_owned());
    }
    let entries = fs::read_dir(dir).ok()?;
    entries.flatten().find_map(|entry| {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        match is_dir {
            true if entry.ino() == id => Some(entry.path()),
            true => find(&entry.path(), id),
            false => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_by_id_both_ways() {
        let cgroups = match Cgroups::open() {
            Ok(cgroups) => cgroups,
            Err(error) => {
                eprintln!("left out: {error}");
                return;
            }
        };
        // Any cgroup below the root, or the root where there is none.
        let below = fs::read_dir(&cgroups.point)
            .unwrap()
            .flatten()
            .find(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map_or(cgroups.point.clone(), |entry| entry.path());
        let id = fs::metadata(&below).unwrap().ino();
        let path = format!("/{}", below.strip_prefix(&cgroups.point).unwrap().display());
        assert_eq!(cgroups.path(id), Some(path));
        assert_eq!(find(&cgroups.point, id), Some(below));
        assert_eq!(cgroups.path(u64::MAX), None);
    }
}
