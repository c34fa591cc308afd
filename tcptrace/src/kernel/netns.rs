//! The network namespaces of the host, and looks into them.
//!
//! Nothing of a namespace is kept open between looks. An open `sock_diag` socket, an open
//! `/proc/net` file, an open namespace file, even one opened with `O_PATH`, keeps the namespace
//! alive after its last process and mount. Measured on 6.18: without, it is gone 17 ms after
//! `ip netns del`; with one, it and its timewait sockets are there until that is closed. To hold
//! them would change what is observed. So what is kept are paths that lead into it, and each look
//! enters through one of them, on a thread of its own. That costs 0.2 ms beside the look itself.

use std::collections::{BTreeMap, HashMap};
use std::error::Error as _;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, fstat, fstatfs, open, openat2, statat};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::mount_tables::{self, MountTables};
use super::netstat::TcpExt;
use super::procfs::{self, Unseen};
use super::sock_diag::Diag;
use crate::exhausted;
use crate::reason::Reason;

/// Paths kept for one namespace: a process may end between the look at `/proc` and the entry.
const DOORS: usize = 4;

/// The network namespaces that could be found.
#[derive(Debug)]
pub struct Namespaces {
    by_inode: BTreeMap<u32, Namespace>,
    unseen: Unseen,
}

/// One network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    inode: u32,
    name: Option<String>,
    own: bool,
    doors: Vec<PathBuf>,
}

/// Why a namespace could not be looked into.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the ways into it leads there any more. It may live on in another process's
    /// descriptors or sockets.
    #[error("network namespace {inode} is gone")]
    Gone {
        /// Which one.
        inode: u32,
    },
    /// A privilege is missing.
    #[error("network namespace {inode} cannot be entered: that needs {capability} (run as root)")]
    Denied {
        /// Which one.
        inode: u32,
        /// What is missing.
        capability: &'static str,
    },
    /// Anything else, out of descriptors for instance.
    #[error("network namespace {inode} cannot be looked into")]
    Other {
        /// Which one.
        inode: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why namespaces could not be looked into: those that lack the same privilege together.
#[must_use]
pub fn reasons(errors: &[Error]) -> Vec<Reason> {
    let mut reasons = Vec::new();
    for wanted in ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"] {
        let denied = errors.iter().filter_map(|error| match error {
            Error::Denied { inode, capability } if *capability == wanted => Some(inode),
            _ => None,
        });
        let inodes: Vec<&u32> = denied.collect();
        let what = match inodes.as_slice() {
            [] => continue,
            [one] => format!("network namespace {one} cannot be entered"),
            [first, ..] => format!(
                "network namespaces that cannot be entered: {} (the first is {first})",
                inodes.len()
            ),
        };
        reasons.push(Reason::new(what, format!("run as root, or with {wanted}")));
    }
    let others = errors
        .iter()
        .filter(|error| matches!(error, Error::Other { .. }));
    reasons.extend(others.map(|error| match error.source() {
        Some(source) => Reason::new(format_args!("{error}: {source}"), fix_of(source)),
        None => Reason::new(error, "look at that namespace with `ss`"),
    }));
    reasons
}

fn fix_of(source: &(dyn std::error::Error + 'static)) -> &'static str {
    let errno = source
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error);
    if let Some(fix) = errno.and_then(exhausted::fix) {
        return fix;
    }
    match errno {
        Some(libc::EPROTONOSUPPORT) => "modprobe tcp_diag",
        Some(libc::EACCES | libc::EPERM) => "a security module forbids it: allow it there",
        _ => "please report it, with the output of `tcptrace doctor`",
    }
}

impl Namespaces {
    /// Finds the namespaces that a process or a thread is in, and those that are mounted: in
    /// `/run/netns` and anywhere else, in the mount namespace of any process. Nothing is open
    /// afterwards: to refresh is to discover again.
    ///
    /// A namespace that lives by nothing but an open descriptor or socket is not found.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read at all. What else could not be seen is in
    /// [`unseen`](Self::unseen), and the own namespace is always there.
    pub fn discover() -> io::Result<Self> {
        let own = own_inode()?;
        let mut found = Found::default();
        found.namespace(own).own = true;
        found.names();
        if let Some(mnt) = procfs::link_inode(CWD, "/proc/self/ns/mnt", MNT)? {
            found.mount_namespace(mnt, std::process::id());
        }
        let mut unseen = found.processes()?;
        found.mounts(&mut unseen);
        Ok(Self {
            by_inode: found.by_inode,
            unseen,
        })
    }

    /// The namespace with this inode number.
    #[must_use]
    pub fn get(&self, inode: u32) -> Option<&Namespace> {
        self.by_inode.get(&inode)
    }

    /// All of them, by inode number.
    pub fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.by_inode.values()
    }

    /// What may be missing here.
    #[must_use]
    pub fn unseen(&self) -> Unseen {
        self.unseen
    }
}

impl Namespace {
    /// The inode number, by which `lsns` names it and which every record carries. The kernel gives
    /// the number of a namespace that is gone to a later one.
    #[must_use]
    pub fn inode(&self) -> u32 {
        self.inode
    }

    /// Its name in `/run/netns`, as `ip netns` knows it.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Opens a `sock_diag` socket in it. Drop it when the dump is read: as long as it is open, the
    /// namespace cannot go.
    ///
    /// The own namespace needs no privilege, others need `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn diag(&self) -> Result<Diag, Error> {
        self.within(Diag::open)
    }

    /// Reads its TCP counters. Privilege as for [`diag`](Self::diag).
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn tcp_ext(&self) -> Result<TcpExt, Error> {
        self.within(|| {
            let text = fs::read_to_string("/proc/thread-self/net/netstat")?;
            TcpExt::parse(&text)
                .ok_or_else(|| io::Error::other("/proc/net/netstat has no TCPTimeWaitOverflow"))
        })
    }

    /// Runs `look` in the namespace, on a thread that ends with it. The calling thread stays where
    /// it is, and so no thread of this program is ever in a foreign namespace after a look.
    fn within<T: Send>(&self, look: impl FnOnce() -> io::Result<T> + Send) -> Result<T, Error> {
        if self.own {
            return look().map_err(|error| self.other(error));
        }
        let door = self.open()?;
        thread::scope(|scope| {
            let entered = || {
                let kind = Some(LinkNameSpaceType::Network);
                match move_into_link_name_space(door.as_fd(), kind) {
                    Ok(()) => look().map_err(|error| self.other(error)),
                    Err(Errno::PERM) => Err(self.denied("CAP_SYS_ADMIN")),
                    Err(error) => Err(self.other(error.into())),
                }
            };
            thread::Builder::new()
                .name("netns look".to_owned())
                .spawn_scoped(scope, entered)
                .map_err(|error| self.other(error))?
                .join()
                .unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// Opens the first door that still leads to this namespace and to no other.
    ///
    /// A door may be in a container's file system, where anything can have taken the place of what
    /// was there. So it is looked at (`O_PATH` does nothing to a device or a pipe) before it is
    /// opened.
    fn open(&self) -> Result<OwnedFd, Error> {
        let (mut denied, mut slow) = (false, false);
        for door in &self.doors {
            match open_cached(door) {
                Ok(file) if namespace_inode(&file) == Some(self.inode) => {
                    let file = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
                    return open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                        .map_err(|error| self.other(error.into()));
                }
                Ok(_) | Err(Errno::NOENT | Errno::SRCH) => {}
                Err(Errno::ACCESS | Errno::PERM) => denied = true,
                Err(Errno::AGAIN) => slow = true,
                Err(error) => return Err(self.other(error.into())),
            }
        }
        if slow {
            let what =
                "a file system on the way to it would have to be asked, which can take for ever";
            return Err(self.other(io::Error::other(what)));
        }
        if denied {
            return Err(self.denied("CAP_SYS_PTRACE"));
        }
        Err(Error::Gone { inode: self.inode })
    }

    fn denied(&self, capability: &'static str) -> Error {
        Error::Denied {
            inode: self.inode,
            capability,
        }
    }

    fn other(&self, source: io::Error) -> Error {
        Error::Other {
            inode: self.inode,
            source,
        }
    }
}

/// Opens a path as a mere place (`O_PATH`), without asking any file system: `EAGAIN` where that would be needed.
///
/// All directories on the way to a mount are known to the kernel. Those of a FUSE file system may be so old that its
/// server is asked again, and that can be anybody's process, and never answer.
fn open_cached(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // The kernel follows the links of `/proc` in no other way. They lead there at once.
    let (base, below) = match behind_root(path) {
        Some((root, below)) => (open(root, flags | OFlags::DIRECTORY, Mode::empty())?, below),
        None if path.starts_with("/proc") => return open(path, flags, Mode::empty()),
        None => (open("/", flags | OFlags::DIRECTORY, Mode::empty())?, path),
    };
    let cached = ResolveFlags::CACHED | ResolveFlags::IN_ROOT;
    match openat2(&base, below, flags, Mode::empty(), cached) {
        // Linux 5.12 can.
        Err(Errno::INVAL | Errno::NOSYS) => open(path, flags, Mode::empty()),
        opened => opened,
    }
}

/// `/proc/PID/root` and what is below it.
fn behind_root(path: &Path) -> Option<(&Path, &Path)> {
    let root = path.ancestors().find(|root| {
        root.file_name().is_some_and(|name| name == "root")
            && root.parent().and_then(Path::parent) == Some(Path::new("/proc"))
    })?;
    Some((root, path.strip_prefix(root).ok()?))
}

/// `NSFS_MAGIC`, `include/uapi/linux/magic.h`.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// The inode number of an open file if it is a namespace, of any kind.
fn namespace_inode(file: &OwnedFd) -> Option<u32> {
    let is_namespace = fstatfs(file).ok()?.f_type as u64 == NSFS_MAGIC;
    let inode = fstat(file).ok()?.st_ino;
    is_namespace.then(|| u32::try_from(inode).ok()).flatten()
}

const NET: &str = "net:[";
const MNT: &str = "mnt:[";

/// What a discovery found so far.
#[derive(Default)]
struct Found {
    by_inode: BTreeMap<u32, Namespace>,
    mount_namespaces: Vec<mount_tables::Found>,
    /// By inode number: the place in that list.
    mount_namespace_at: HashMap<u32, usize>,
}

/// Kept from scan to scan, whoever asks.
static MOUNT_TABLES: LazyLock<Mutex<MountTables>> = LazyLock::new(Mutex::default);

impl Found {
    fn namespace(&mut self, inode: u32) -> &mut Namespace {
        self.by_inode.entry(inode).or_insert(Namespace {
            inode,
            name: None,
            own: false,
            doors: Vec::new(),
        })
    }

    fn door(&mut self, inode: u32, path: impl FnOnce() -> PathBuf) {
        let namespace = self.namespace(inode);
        if namespace.own || namespace.doors.len() == DOORS {
            return;
        }
        let path = path();
        if !namespace.doors.contains(&path) {
            namespace.doors.push(path);
        }
    }

    /// The entries of `/run/netns`: mounts (`ip netns add`), or links to `/proc/PID/ns/net`.
    fn names(&mut self) {
        // Where the directory is missing or closed, there are no names; its mounts are found
        // without it.
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let path = entry.path();
            // What is left of a name after a crash is a plain file.
            let inode = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .ok()
                .and_then(|file| namespace_inode(&file));
            if let Some(inode) = inode {
                let name = entry.file_name().to_string_lossy().into_owned();
                self.namespace(inode).name = Some(name);
                self.door(inode, || path);
            }
        }
    }

    fn mount_namespace(&mut self, inode: u32, pid: u32) {
        let next = self.mount_namespaces.len();
        let at = *self.mount_namespace_at.entry(inode).or_insert(next);
        if at == next {
            self.mount_namespaces.push(mount_tables::Found {
                inode,
                pids: Vec::new(),
            });
        }
        self.mount_namespaces[at].add(pid);
    }

    /// The network namespaces that the mount namespaces have mounted.
    fn mounts(&mut self, unseen: &mut Unseen) {
        let found = mem::take(&mut self.mount_namespaces);
        let mut tables = MOUNT_TABLES.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = tables.scan(found, mount_tables::MOST_BYTES, |inode, pid, point| {
            self.door(inode, || {
                Path::new(&format!("/proc/{pid}/root")).join(point)
            });
        });
        (unseen.mount_tables, unseen.first_mount_table) = (left_out.count, left_out.first);
    }

    /// The namespaces of all processes and threads, and their mount namespaces.
    fn processes(&mut self) -> io::Result<Unseen> {
        let mut tids = Vec::new();
        procfs::processes(|process| {
            let pid = process.pid();
            match procfs::link_inode(process, "ns/net", NET) {
                Ok(Some(inode)) => self.door(inode, || format!("/proc/{pid}/ns/net").into()),
                // The first thread may have ended while others live on.
                Ok(None) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
            // The directory has two links more than threads: most processes end here.
            if statat(process, "task", AtFlags::empty())?.st_nlink > 3 {
                let tasks = procfs::open_dir(process, "task")?;
                procfs::numbers(&tasks, &mut tids)?;
                for &tid in tids.iter().filter(|&&tid| tid != pid) {
                    match procfs::link_inode(&tasks, format!("{tid}/ns/net"), NET) {
                        Ok(Some(inode)) => {
                            self.door(inode, || format!("/proc/{pid}/task/{tid}/ns/net").into())
                        }
                        Ok(None) | Err(Errno::NOENT | Errno::SRCH) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            let Some(mnt) = procfs::link_inode(process, "ns/mnt", MNT)? else {
                return Ok(());
            };
            self.mount_namespace(mnt, pid);
            Ok(())
        })
    }
}

/// Inode number of the network namespace of the calling thread.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn own_inode() -> io::Result<u32> {
    procfs::link_inode(CWD, "/proc/thread-self/ns/net", NET)?
        .ok_or_else(|| io::Error::other("/proc/thread-self/ns/net names no namespace"))
}

/// Finds the inode number of a network namespace by what a person calls it: a name of `ip netns`, a
/// path (`/proc/PID/ns/net`), or the inode number itself.
///
/// # Errors
/// When there is no such namespace.
pub fn resolve(text: &str) -> io::Result<u32> {
    if let Ok(inode) = text.parse() {
        return Ok(inode);
    }
    let path = if text.contains('/') {
        PathBuf::from(text)
    } else {
        Path::new("/run/netns").join(text)
    };
    let stat = rustix::fs::stat(&path).map_err(|error| {
        let message = format!(
            "no network namespace at {}: {}; `ip netns` lists names",
            path.display(),
            io::Error::from(error)
        );
        io::Error::other(message)
    })?;
    let nsfs = rustix::fs::stat("/proc/thread-self/ns/net")?.st_dev;
    match u32::try_from(stat.st_ino) {
        Ok(inode) if stat.st_dev == nsfs => Ok(inode),
        _ => {
            let message = format!("{} is not a network namespace", path.display());
            Err(io::Error::other(message))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::TcpListener;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_place_behind_the_root_of_a_process() {
        let split = |path| behind_root(Path::new(path));
        let expected = (Path::new("/proc/7/root"), Path::new("run/netns/a"));
        assert_eq!(split("/proc/7/root/run/netns/a"), Some(expected));
        for path in [
            "/run/netns/root",
            "/proc/7/ns/net",
            "/root/proc/7",
            "/proc/root",
        ] {
            assert_eq!(split(path), None, "{path}");
        }
        let inner = (Path::new("/proc/7/root"), Path::new("proc/8/root/a"));
        assert_eq!(split("/proc/7/root/proc/8/root/a"), Some(inner));
    }

    use rustix::thread::{
        CapabilitySet, UnshareFlags, capabilities, set_capabilities, unshare_unsafe,
    };

    use super::*;
    use crate::kernel::sock_diag::Query;

    fn here() -> u32 {
        procfs::link_inode(CWD, "/proc/thread-self/ns/net", NET)
            .unwrap()
            .unwrap()
    }

    fn listener() -> (TcpListener, u32) {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let inode = fstat(&listener).unwrap().st_ino as u32;
        (listener, inode)
    }

    /// Inodes of the sockets that a look into `namespace` finds.
    fn sockets(namespace: &Namespace) -> HashSet<u32> {
        let mut inodes = HashSet::new();
        let mut diag = namespace.diag().unwrap();
        let complete = diag.dump(Query::ALL, |entry| {
            inodes.insert(entry.inode);
        });
        assert!(complete.is_ok(), "{complete:?}");
        inodes
    }

    #[test]
    fn the_own_namespace_needs_no_privilege() {
        let (_listener, inode) = listener();
        let all = Namespaces::discover().unwrap();
        let own = all.get(here()).unwrap();
        assert!(sockets(own).contains(&inode));
        own.tcp_ext().unwrap();
    }

    #[test]
    fn a_door_that_leads_elsewhere_is_not_taken() {
        let namespace = Namespace {
            inode: 1,
            name: None,
            own: false,
            doors: ["/proc/self/ns/net", "/dev/null", "/proc/0/ns/net"]
                .map(PathBuf::from)
                .into(),
        };
        assert!(matches!(namespace.diag(), Err(Error::Gone { inode: 1 })));
    }

    /// A namespace that only one thread is in, while `test` runs with its inode number and that of
    /// a listener in it. False when this needs a privilege that is missing.
    fn with_namespace_of_a_thread(test: impl FnOnce(u32, u32)) -> bool {
        let (to_test, from_thread) = mpsc::channel();
        let (to_thread, from_test) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                // SAFETY: a new network namespace changes no descriptor that exists.
                if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
                    eprintln!("left out: other network namespaces, making one: {error}");
                    return;
                }
                let (_listener, inode) = listener();
                to_test.send((here(), inode)).unwrap();
                // Ends when the other side is dropped.
                from_test.recv().unwrap_err();
            });
            let Ok((namespace, listener)) = from_thread.recv() else {
                return false;
            };
            test(namespace, listener);
            drop(to_thread);
            true
        })
    }

    #[test]
    fn a_namespace_that_only_a_thread_is_in_is_found_and_can_go() {
        let before = here();
        let mut kept = None;
        let ran = with_namespace_of_a_thread(|inode, listener| {
            let all = Namespaces::discover().unwrap();
            let namespace = all.get(inode).expect("a thread is in it");
            assert!(sockets(namespace).contains(&listener));
            assert!(!sockets(all.get(before).unwrap()).contains(&listener));
            namespace.tcp_ext().unwrap();
            assert_eq!(here(), before, "a look does not move the thread that asks");
            kept = Some(namespace.clone());
        });
        if ran {
            // A thread that was joined may still be on its way out of the kernel.
            let namespace = kept.unwrap();
            let gone = (0..500).any(|_| {
                thread::sleep(Duration::from_millis(10));
                matches!(namespace.diag(), Err(Error::Gone { .. }))
            });
            assert!(gone, "it can still be entered");
        }
    }

    #[test]
    fn without_the_privilege_the_error_names_it() {
        with_namespace_of_a_thread(|inode, _| {
            let all = Namespaces::discover().unwrap();
            let mut sets = capabilities(None).unwrap();
            let all_capabilities = sets;
            sets.effective.remove(CapabilitySet::SYS_ADMIN);
            // Of this thread alone, and its children.
            set_capabilities(None, sets).unwrap();
            let denied = all.get(inode).unwrap().diag();
            set_capabilities(None, all_capabilities).unwrap();
            assert_eq!(
                denied.unwrap_err().to_string(),
                format!(
                    "network namespace {inode} cannot be entered: that needs CAP_SYS_ADMIN (run as root)"
                )
            );
        });
    }
}
