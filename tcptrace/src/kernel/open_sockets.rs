//! Who holds which TCP socket, told by the kernel, which walks all open files itself (`iter/task_file`): a fraction of
//! the work of reading `/proc`.

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;

use hashbrown::HashMap;
use rustix::fs::CWD;
use rustix::io::Errno;
use tcptrace_ebpf::OpenSocket;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::procfs::{Descriptor, Handle, open_dir};

/// As many records as the kernel hands over at once (`bpf_seq_read()`: eight pages).
const ROOM: usize = (8 << 12) / size_of::<OpenSocket>();

/// Hands the descriptors of TCP sockets that `records` tells of to `each`, if `wants` takes their inode and `/proc` shows
/// that the process has them: of TCP, what [`sockets_by_part`](super::procfs::sockets_by_part) would find, in one part.
///
/// # Errors
///
/// When `records` cannot be read, or no file descriptor is left to open a process with (`EMFILE`).
pub fn sockets<P: Default>(
    mut records: impl Read,
    wants: impl Fn(&mut P, u32) -> bool,
    each: impl Fn(&mut P, &Handle, Descriptor),
) -> io::Result<P> {
    let proc = open_dir(CWD, "/proc")?;
    let mut part = P::default();
    let mut buffer = [OpenSocket::new_zeroed(); ROOM];
    let mut process = Current::default();
    // By process, whose table is taken: that of its first thread; if that has ended, of the first that has sockets.
    // Others share it, mostly.
    let mut tables = HashMap::new();
    loop {
        let length = match records.read(buffer.as_mut_bytes()) {
            Ok(0) => return Ok(part),
            Ok(length) => length,
            // The kernel has come by a million files without such a socket (`MAX_ITER_OBJECTS`), and goes on from there.
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                continue;
            }
            Err(error) => return Err(error),
        };
        if length % size_of::<OpenSocket>() != 0 {
            return Err(ErrorKind::InvalidData.into());
        }
        // Between two reads the kernel keeps no process, but looks for the same number again.
        process.is_confirmed = false;
        for &OpenSocket {
            inode,
            pid,
            tid,
            fd,
        } in &buffer[..length / size_of::<OpenSocket>()]
        {
            if *tables.entry(pid).or_insert(tid) != tid || !wants(&mut part, inode) {
                continue;
            }
            let descriptor = Descriptor { inode, tid, fd };
            if let Some(process) = process.holding(&proc, pid, descriptor)? {
                each(&mut part, process, descriptor);
            }
        }
    }
}

/// The process whose descriptors come one after the other.
#[derive(Default)]
struct Current {
    pid: u32,
    /// None if it has ended.
    process: Option<Handle>,
    /// `/proc` has shown that it has one of the descriptors: its pid is not another's by now.
    is_confirmed: bool,
}

impl Current {
    /// The process `pid`, if it is the one that has this descriptor.
    fn holding(
        &mut self,
        proc: impl AsFd,
        pid: u32,
        descriptor: Descriptor,
    ) -> Result<Option<&Handle>, Errno> {
        if self.pid != pid {
            *self = Self {
                pid,
                process: match Handle::open_at(proc, pid) {
                    Ok(process) => Some(process),
                    Err(Errno::NOENT | Errno::SRCH) => None,
                    Err(error) => return Err(error),
                },
                is_confirmed: false,
            };
        }
        let Some(process) = &self.process else {
            return Ok(None);
        };
        self.is_confirmed = self.is_confirmed || process.has(descriptor) == Ok(true);
        Ok(self.is_confirmed.then_some(process))
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::process;

    use super::*;

    /// What is found of these records, when all is wanted.
    fn found(records: &[OpenSocket]) -> Vec<(u32, Descriptor)> {
        let each = |found: &mut Vec<_>, process: &Handle, descriptor| {
            found.push((process.pid(), descriptor));
        };
        sockets(records.as_bytes(), |_, _| true, each).unwrap()
    }

    fn open(socket: &TcpListener) -> OpenSocket {
        let fd = socket.as_raw_fd();
        let file = std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap();
        OpenSocket {
            inode: file.ino() as u32,
            pid: process::id(),
            tid: process::id(),
            fd: fd as u32,
        }
    }

    /// The same by a descriptor that nobody has.
    fn closed(open: OpenSocket) -> OpenSocket {
        OpenSocket {
            fd: 1_000_000,
            ..open
        }
    }

    fn descriptor(open: OpenSocket) -> (u32, Descriptor) {
        let OpenSocket {
            inode,
            pid,
            tid,
            fd,
        } = open;
        (pid, Descriptor { inode, tid, fd })
    }

    #[test]
    fn what_is_wanted_is_found() {
        let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let all = listeners.each_ref().map(open);
        assert_eq!(found(&all), all.map(descriptor));
        let each = |found: &mut Vec<u32>, _: &Handle, one: Descriptor| found.push(one.inode);
        let wants = |_: &mut Vec<u32>, inode| inode == all[1].inode;
        let some = sockets(all.as_bytes(), wants, each).unwrap();
        assert_eq!(some, [all[1].inode]);
    }

    /// Another process may have the pid by now: it does not have the descriptor.
    #[test]
    fn who_does_not_have_it_is_not_named() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = open(&socket);
        let parent = std::os::unix::process::parent_id();
        let elsewhere = OpenSocket {
            pid: parent,
            tid: parent,
            ..closed(open)
        };
        let ended = OpenSocket {
            pid: u32::MAX,
            tid: u32::MAX,
            ..open
        };
        let all = [elsewhere, ended, ended, open];
        assert_eq!(found(&all), [descriptor(open)]);
        drop(socket);
        assert_eq!(found(&all), []);
    }

    /// Once it is known that a process is the one that was told of, nothing is asked of it any more: a descriptor
    /// may be closed at any moment anyway.
    #[test]
    fn the_first_open_descriptor_vouches_for_the_process() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = open(&socket);
        let closed = closed(open);
        assert_eq!(
            found(&[closed, open, closed]),
            [descriptor(open), descriptor(closed)]
        );
    }

    /// Threads of a process whose first one has ended come each with all that they share.
    #[test]
    fn threads_that_share_are_taken_once() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let tid = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let one = OpenSocket {
            tid,
            ..open(&socket)
        };
        let other = OpenSocket { tid: 1, ..one };
        assert_eq!(found(&[one, other, one]), [descriptor(one); 2]);
    }

    /// What comes of reading, the last first.
    struct Pauses(Vec<io::Result<Vec<u8>>>);
    impl Read for Pauses {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some(next) = self.0.pop() else {
                return Ok(0);
            };
            next.map(|bytes| {
                buffer[..bytes.len()].copy_from_slice(&bytes);
                bytes.len()
            })
        }
    }

    /// Between two reads, its number may have gone to another process.
    #[test]
    fn each_read_has_to_be_vouched_for() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = open(&socket);
        let closed = closed(open);
        let reads = vec![
            Ok([closed, open].as_bytes().to_vec()),
            Ok([closed].as_bytes().to_vec()),
            Ok([open].as_bytes().to_vec()),
        ];
        let each = |found: &mut Vec<u32>, _: &Handle, one: Descriptor| found.push(one.fd);
        let found = sockets(Pauses(reads), |_, _| true, each).unwrap();
        assert_eq!(found, [open.fd; 2]);
    }

    /// The kernel stops now and then, and goes on.
    #[test]
    fn a_walk_may_pause() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let bytes = open(&socket).as_bytes().to_vec();
        let count = |parts| {
            sockets(
                Pauses(parts),
                |_, _| true,
                |count: &mut u32, _, _| *count += 1,
            )
        };
        let pause = || Err(ErrorKind::WouldBlock.into());
        let parts = vec![Ok(bytes.clone()), pause(), pause(), Ok(bytes.clone())];
        assert_eq!(count(parts).unwrap(), 2);
        let half = count(vec![Ok(bytes[..8].to_vec())]).unwrap_err();
        assert_eq!(half.kind(), ErrorKind::InvalidData);
        let broken = count(vec![Err(ErrorKind::PermissionDenied.into())]).unwrap_err();
        assert_eq!(broken.kind(), ErrorKind::PermissionDenied);
    }
}
