//! Network namespaces.

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process, thread,
};

use std::os::fd::AsFd;

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use socket2::{Domain, Socket, Type};

/// A network namespace with a working loopback interface. It is gone when this value, every process
/// in it and every socket of it are.
#[derive(Debug)]
pub struct Netns {
    file: File,
    name: Option<PathBuf>,
}

impl Netns {
    /// Makes one that no path leads to.
    ///
    /// # Errors
    /// What `unshare` says: EPERM without privilege.
    ///
    /// # Panics
    /// When the loopback interface cannot be set up.
    pub fn new() -> Result<Self, Errno> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::set_own_loopback_up().expect("lo can be set up");
            Ok(File::open("/proc/thread-self/ns/net").expect("our own"))
        };
        // A thread can be moved alone; this one is not needed afterwards.
        let file = thread::scope(|scope| scope.spawn(make).join().expect("no panic"))?;
        Ok(Self { file, name: None })
    }

    /// Sets the loopback interface of the calling thread's namespace up; its addresses come by themselves.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_own_loopback_up() -> Result<(), Errno> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        // SAFETY: all zeros are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        // SAFETY: the request is complete and outlives the call.
        let result = unsafe {
            libc::ioctl(
                socket.as_raw_fd(),
                libc::SIOCSIFFLAGS as _,
                &raw const request,
            )
        };
        Errno::result(result).map(drop)
    }

    /// Mounts it at `path`, as `ip netns add` does under `/run/netns`: it then lasts without a
    /// process. Unmounted when this value goes.
    ///
    /// # Panics
    /// When `path` cannot be made or mounted on.
    pub fn mount_at(&mut self, path: &Path) {
        fs::create_dir_all(path.parent().expect("an absolute path")).expect("a folder");
        File::create_new(path).expect("a new file");
        let none = None::<&str>;
        let (from, flags) = (self.path(), MsFlags::MS_BIND);
        mount(Some(&from), path, none, flags, none).expect("a bind mount of nsfs");
        self.name = Some(path.to_owned());
    }

    /// The inode number: how the kernel and `lsns` name a namespace.
    ///
    /// # Panics
    /// Never: the file is open.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.file.metadata().expect("an open file").ino()
    }

    /// A path to it that lasts as long as this value.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd()).into()
    }

    /// Runs `act` inside. Sockets made by it belong to the namespace.
    ///
    /// # Panics
    /// When `act` does.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let work = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).expect("we made it");
            act()
        };
        thread::scope(|scope| scope.spawn(work).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Sets `/proc/sys/net/NAME` of this namespace.
    ///
    /// # Panics
    /// When the kernel has no such setting, or refuses the value.
    pub fn set(&self, name: &str, value: &str) {
        self.inside(|| {
            let path = Path::new("/proc/sys/net").join(name);
            fs::write(&path, value).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        });
    }

    /// The value of a counter in `/proc/net/netstat`, such as `TCPTimeWaitOverflow`.
    ///
    /// # Panics
    /// When the kernel has no such counter.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        let text = self.inside(|| fs::read_to_string("/proc/thread-self/net/netstat"));
        let text = text.expect("Linux has it");
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
        for pair in lines.chunks(2) {
            if let Some(column) = pair[0].iter().position(|title| *title == name) {
                return pair[1][column].parse().expect("a number");
            }
        }
        panic!("no counter {name}");
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = umount2(name, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(name);
        }
    }
}
