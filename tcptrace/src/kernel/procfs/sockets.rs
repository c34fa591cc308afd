//! Who holds which socket.

use std::os::fd::{AsFd, AsRawFd};
use std::{io, panic, thread};

use rustix::io::Errno;
use rustix::path::DecInt;

use super::{Handle, Unseen, each_of, link_inode, pids, processes};

/// A file descriptor that refers to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Descriptor {
    /// Inode of the socket's file, as `sock_diag` tells it.
    pub inode: u32,
    /// Whose table of descriptors it is in: the process's first thread, or if that has ended,
    /// another one.
    pub tid: u32,
    /// Its number there.
    pub fd: u32,
}

/// Hands every file descriptor that refers to a socket, of any kind, to `each`, in one pass over all
/// processes. A socket may have several.
///
/// A process whose threads do not share their descriptors (`CLONE_FILES`) is seen as its first
/// thread sees it. Processes that end meanwhile are left out.
///
/// # Errors
///
/// When `/proc` cannot be read at all, or no file descriptor is left to read it with (`EMFILE`).
pub fn sockets(mut each: impl FnMut(&Handle, Descriptor)) -> io::Result<Unseen> {
    let mut fds = Vec::new();
    processes(|process| sockets_of(process, &mut fds, &mut each))
}

/// The same by so many threads, each with a part of the processes, and what it has found of them: in the order
/// of one pass.
///
/// # Errors
///
/// As above.
pub fn sockets_by_part<P: Default + Send>(
    parts: usize,
    each: impl Fn(&mut P, &Handle, Descriptor) + Sync,
) -> io::Result<Vec<P>> {
    let (proc, pids) = pids()?;
    let part = |pids: &[u32]| -> io::Result<P> {
        let (mut part, mut fds) = (P::default(), Vec::new());
        each_of(&proc, pids, |process| {
            sockets_of(process, &mut fds, &mut |process, descriptor| {
                each(&mut part, process, descriptor);
            })
        })?;
        Ok(part)
    };
    if parts < 2 {
        return Ok(vec![part(&pids)?]);
    }
    let part = &part;
    thread::scope(|scope| {
        let length = pids.len().div_ceil(parts).max(1);
        let threads: Vec<_> = pids
            .chunks(length)
            .map(|pids| {
                let reader = thread::Builder::new().name("holders".to_owned());
                (pids, reader.spawn_scoped(scope, move || part(pids)))
            })
            .collect();
        let join = |(pids, thread): (&[u32], io::Result<thread::ScopedJoinHandle<'_, _>>)| {
            match thread {
                Ok(thread) => {
                    let joined = thread.join();
                    joined.unwrap_or_else(|panic| panic::resume_unwind(panic))
                }
                // Without a thread to spare (`EAGAIN`), it only takes longer.
                Err(_) => part(pids),
            }
        };
        threads.into_iter().map(join).collect()
    })
}

/// Of one process. `fds` is room for its descriptors.
fn sockets_of(
    process: &Handle,
    fds: &mut Vec<u32>,
    each: &mut impl FnMut(&Handle, Descriptor),
) -> Result<(), Errno> {
    let (tid, table) = process.descriptors(fds)?;
    for &fd in &*fds {
        match link_inode(&table, DecInt::new(fd), SOCKET) {
            Ok(Some(inode)) => each(process, Descriptor { inode, tid, fd }),
            // A file, or closed meanwhile.
            Ok(None) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

const SOCKET: &str = "socket:[";

impl Handle {
    /// Path of a descriptor's link, for calls that know no directory but this process's own.
    pub(in crate::kernel) fn path(&self, descriptor: Descriptor) -> String {
        let Descriptor { tid, fd, .. } = descriptor;
        let dir = self.as_fd().as_raw_fd();
        format!("/proc/thread-self/fd/{dir}/task/{tid}/fd/{fd}")
    }

    /// Whether a descriptor still refers to its socket, and not to another file or to none.
    ///
    /// # Errors
    /// When this user may not know (`EACCES`).
    pub(crate) fn has(&self, descriptor: Descriptor) -> Result<bool, Errno> {
        let Descriptor { inode, tid, fd } = descriptor;
        match link_inode(self, format!("task/{tid}/fd/{fd}"), SOCKET) {
            Ok(now) => Ok(now == Some(inode)),
            Err(Errno::NOENT | Errno::SRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};
    use std::{env, thread};

    use super::*;
    use crate::kernel::unlisted::{Unlisted, unlisted};

    fn inode(socket: &impl AsRawFd) -> u32 {
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        std::fs::metadata(path).unwrap().ino() as u32
    }

    #[test]
    fn parts_together_are_the_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (socket, me) = (inode(&listener), std::process::id());
        for parts in [1, 2, 3, 1_000_000] {
            let each =
                |found: &mut Vec<(u32, Descriptor)>, process: &Handle, descriptor: Descriptor| {
                    found.push((process.pid(), descriptor));
                };
            let found = sockets_by_part(parts, each).unwrap();
            let mine = |one: &&(u32, Descriptor)| one.0 == me && one.1.inode == socket;
            assert_eq!(found.iter().flatten().filter(mine).count(), 1, "{parts}");
            let pids = found.iter().flatten().map(|(pid, _)| *pid);
            assert!(pids.is_sorted(), "in the order of one pass");
        }
    }

    /// Descriptors of these processes. (Children that other tests start have all descriptors of this
    /// process, too, until they run their program.)
    fn holders(wanted: u32, pids: &[u32]) -> Vec<(u32, Descriptor)> {
        let mut found = Vec::new();
        let each = |process: &Handle, descriptor: Descriptor| {
            if descriptor.inode == wanted && pids.contains(&process.pid()) {
                found.push((process.pid(), descriptor));
            }
        };
        sockets(each).unwrap();
        found.sort_unstable();
        found
    }

    #[test]
    fn a_socket_is_found_by_each_descriptor_that_holds_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let second = listener.try_clone().unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = inode(&listener);
        assert_ne!(socket, inode(&other));
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(OwnedFd::from(listener.try_clone().unwrap()))
            .spawn()
            .unwrap();

        let me = std::process::id();
        let found = holders(socket, &[me, child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();

        let mut expected = [
            (me, listener.as_raw_fd()),
            (me, second.as_raw_fd()),
            (child.id(), 0),
        ]
        .map(|(pid, fd)| {
            let descriptor = Descriptor {
                inode: socket,
                tid: pid,
                fd: fd as u32,
            };
            (pid, descriptor)
        });
        expected.sort_unstable();
        assert_eq!(found, expected);
        let handle = Handle::open(me).unwrap();
        let (_, mine) = expected.into_iter().find(|(pid, _)| *pid == me).unwrap();
        assert_eq!(handle.has(mine), Ok(true));
        drop((listener, second));
        assert_eq!(handle.has(mine), Ok(false));
    }

    const HELPER: &str = "TCPTRACE_TEST_END_FIRST_THREAD";

    /// Not a test, but a program for the next one, whose first thread ends while another lives on.
    #[test]
    fn first_thread_ends() {
        extern "C" fn end_this_thread(_signal: libc::c_int) {
            // SAFETY: ends the thread, which runs nothing any more, and touches no memory.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
        if env::var_os(HELPER).is_none() {
            return;
        }
        let other = thread::spawn(|| {
            let mut line = String::new();
            // Until the other end is closed.
            let _ = io::stdin().read_line(&mut line);
            std::process::exit(0);
        });
        let handler: extern "C" fn(libc::c_int) = end_this_thread;
        let first = std::process::id();
        // SAFETY: the handler makes one system call, and the signal is for the first thread, which
        // does nothing but wait for tests.
        unsafe {
            libc::signal(libc::SIGUSR1, handler as libc::sighandler_t);
            libc::syscall(libc::SYS_tgkill, first, first, libc::SIGUSR1);
        }
        other.join().unwrap();
    }

    #[test]
    fn the_first_thread_may_have_ended() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let wanted = inode(&socket);
        let mut child = Command::new("/proc/self/exe")
            .arg("first_thread_ends")
            .env(HELPER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(OwnedFd::from(socket.try_clone().unwrap()))
            .spawn()
            .unwrap();
        let pid = child.id();
        let handle = Handle::open(pid).unwrap();
        let has_ended = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(')').next().unwrap().starts_with(" Z")
        };
        let in_time = (0..1000).any(|_| {
            thread::sleep(std::time::Duration::from_millis(10));
            has_ended()
        });

        let found = holders(wanted, &[pid]);
        let details = handle.details();
        let alive = handle.may_hold_something();
        let asked = found
            .first()
            .map(|(_, descriptor)| unlisted(&handle, *descriptor).unwrap());
        drop(child.stdin.take());
        child.wait().unwrap();

        assert!(in_time, "the first thread ends");
        let [(_, descriptor)] = found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(descriptor.fd, 2);
        assert_ne!(descriptor.tid, pid);
        assert!(details.unwrap().fds.unwrap() >= 3);
        assert!(alive);
        match asked.unwrap() {
            Unlisted::Open => {}
            Unlisted::Refused(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                eprintln!("left out: to ask for a thread's descriptor takes Linux 6.9");
            }
            other => panic!("{other:?}"),
        }
    }
}
