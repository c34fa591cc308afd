//! Who holds which TCP socket, told by the kernel, which walks all open files itself (`iter/task_file`): a fraction of
//! the work of reading `/proc`. It shows what the sockets hold as well, without taking their locks.

use std::io::{self, ErrorKind, Read};
use std::ops::ControlFlow;
use std::os::fd::AsFd;

use hashbrown::HashMap;
use rustix::fs::CWD;
use rustix::io::Errno;
use tcptrace_ebpf::{OpenSocket, OpenSocketDetail, State};
use zerocopy::FromBytes as _;

use super::procfs::{Descriptor, Handle, open_dir};

/// As many bytes as the kernel hands over at once (`bpf_seq_read()`: eight pages).
const ROOM: usize = 8 << 12;
/// `IPPROTO_TCP`; the program passes over all but this and MPTCP.
const TCP: u16 = 6;

/// A descriptor of a socket, as the walk shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The descriptor.
    pub descriptor: Descriptor,
    /// The socket's state; `None` if it is one of MPTCP, whose state is another than the tables'.
    pub state: Option<State>,
    /// What the socket holds, if that was asked for of its state.
    pub detail: Option<OpenSocketDetail>,
}

/// Hands what `records` shows to `each`, if `wants` takes it and `/proc` shows that the process has it. Between two
/// reads, `pause` is called; it can end the walk.
///
/// # Errors
///
/// When `records` cannot be read, or no file descriptor is left to open a process with (`EMFILE`).
pub fn sockets(
    mut records: impl Read,
    mut wants: impl FnMut(&Open) -> bool,
    mut each: impl FnMut(&Handle, &Open),
    mut pause: impl FnMut() -> ControlFlow<()>,
) -> io::Result<()> {
    let proc = open_dir(CWD, "/proc")?;
    let mut buffer = vec![0; ROOM];
    let mut process = Current::default();
    // By process, whose table is taken: that of its first thread; if that has ended, of the first that has sockets.
    // Others share it, mostly.
    let mut tables = HashMap::new();
    loop {
        if pause().is_break() {
            return Ok(());
        }
        let length = match records.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            // The kernel has come by a million files without such a socket (`MAX_ITER_OBJECTS`), and goes on from there.
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                continue;
            }
            Err(error) => return Err(error),
        };
        // Between two reads the kernel keeps no process, but looks for the same number again.
        process.is_confirmed = false;
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let (pid, open) = next(&mut rest).ok_or(ErrorKind::InvalidData)?;
            let descriptor = open.descriptor;
            if *tables.entry(pid).or_insert(descriptor.tid) != descriptor.tid || !wants(&open) {
                continue;
            }
            if let Some(process) = process.holding(&proc, pid, descriptor)? {
                each(process, &open);
            }
        }
    }
}

/// Takes the next record off the front of `bytes`: a process, and what it has. The kernel hands over whole ones.
fn next(bytes: &mut &[u8]) -> Option<(u32, Open)> {
    let (open, rest) = OpenSocket::read_from_prefix(bytes).ok()?;
    *bytes = rest;
    let detail = match open.detailed {
        0 => None,
        _ => {
            let (detail, rest) = OpenSocketDetail::read_from_prefix(bytes).ok()?;
            *bytes = rest;
            Some(detail)
        }
    };
    let OpenSocket { inode, tid, fd, .. } = open;
    let state = State::from_number(open.state).filter(|_| open.protocol == TCP);
    let descriptor = Descriptor { inode, tid, fd };
    Some((
        open.pid,
        Open {
            descriptor,
            state,
            detail,
        },
    ))
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

    use zerocopy::{FromZeros as _, IntoBytes as _};

    use super::*;

    /// What is found of these records, when all is wanted.
    fn found(records: &[OpenSocket]) -> Vec<(u32, Descriptor)> {
        let mut found = Vec::new();
        let each = |process: &Handle, open: &Open| found.push((process.pid(), open.descriptor));
        sockets(records.as_bytes(), |_| true, each, go_on).unwrap();
        found
    }

    fn go_on() -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn open(socket: &TcpListener) -> OpenSocket {
        let fd = socket.as_raw_fd();
        let file = std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap();
        OpenSocket {
            inode: file.ino() as u32,
            pid: process::id(),
            tid: process::id(),
            fd: fd as u32,
            state: State::Listen as u8,
            detailed: 0,
            protocol: TCP,
            reserved: 0,
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
            ..
        } = open;
        (pid, Descriptor { inode, tid, fd })
    }

    #[test]
    fn what_is_wanted_is_found() {
        let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let all = listeners.each_ref().map(open);
        assert_eq!(found(&all), all.map(descriptor));
        let mut some = Vec::new();
        let each = |_: &Handle, one: &Open| some.push(one.descriptor.inode);
        let wants = |one: &Open| one.descriptor.inode == all[1].inode;
        sockets(all.as_bytes(), wants, each, go_on).unwrap();
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
        let mut found = Vec::new();
        let each = |_: &Handle, one: &Open| found.push(one.descriptor.fd);
        sockets(Pauses(reads), |_| true, each, go_on).unwrap();
        assert_eq!(found, [open.fd; 2]);
    }

    #[test]
    fn what_a_socket_holds_comes_behind_it() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let plain = open(&socket);
        let detailed = OpenSocket {
            detailed: 1,
            state: State::CloseWait as u8,
            ..plain
        };
        let mptcp = OpenSocket {
            protocol: 262,
            ..plain
        };
        let detail = OpenSocketDetail {
            cookie: 7,
            ..OpenSocketDetail::new_zeroed()
        };
        let bytes = [
            plain.as_bytes(),
            detailed.as_bytes(),
            detail.as_bytes(),
            mptcp.as_bytes(),
        ];
        let mut found = Vec::new();
        let each = |_: &Handle, one: &Open| found.push((one.state, one.detail));
        sockets(&*bytes.concat(), |_| true, each, go_on).unwrap();
        let expected = [
            (Some(State::Listen), None),
            (Some(State::CloseWait), Some(detail)),
            (None, None),
        ];
        assert_eq!(found, expected);
        // Without what is announced, it makes no sense.
        let cut = sockets(&*bytes[..2].concat(), |_| true, |_, _| (), go_on);
        assert_eq!(cut.unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn a_walk_can_be_broken_off() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let bytes = open(&socket).as_bytes().to_vec();
        let (mut count, mut pauses) = (0, 0);
        let pause = || {
            pauses += 1;
            match pauses {
                1 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        };
        let reads = Pauses(vec![Ok(bytes.clone()), Ok(bytes)]);
        sockets(reads, |_| true, |_, _| count += 1, pause).unwrap();
        assert_eq!(count, 1);
    }

    /// The kernel stops now and then, and goes on.
    #[test]
    fn a_walk_may_pause() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let bytes = open(&socket).as_bytes().to_vec();
        let count = |parts| {
            let mut count = 0;
            sockets(Pauses(parts), |_| true, |_, _| count += 1, go_on).map(|()| count)
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
