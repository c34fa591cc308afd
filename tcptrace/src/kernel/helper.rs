//! A child process for system calls that may wait for the lock of somebody else's socket.
//!
//! Whoever calls `setsockopt()` or `sendmsg()` on a socket holds its lock while the kernel copies from the caller's
//! memory. That memory can be a page that never comes: userfaultfd, FUSE, NFS. To read `TCP_INFO` or
//! `INET_DIAG_INFO` of the socket, the kernel takes the same lock (`tcp_get_info()`, 4.4 to 6.18), and waits for it in
//! state D: no signal ends that, not even SIGKILL. So those calls are made by a child, which runs this program in a
//! role of its own. The child answers within a deadline or is given up. It has nothing of the parent's but one socket,
//! so that it keeps no probe attached, no pipe open and no command from ending.
//!
//! Packets to the child: a task and what belongs to it. Packets from it: answers of `unlisted`, or datagrams of
//! `sock_diag` with the time at which the kernel had written them in front.

use std::{
    fs,
    io::{self, ErrorKind, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
        socketpair,
    },
};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{
    clock,
    procfs::{Descriptor, Handle},
    sock_diag, unlisted,
};

/// The first argument by which this program runs as the child. It is no option: no help names it.
pub const ROLE: &str = "__ask-sockets";

/// How long a child may be in state D before it is given up. Locks are held for microseconds, unless their owner waits
/// for memory.
const LOCKED: Duration = Duration::from_secs(1);
/// How long it may be silent for another reason: a busy machine.
const SILENT: Duration = Duration::from_secs(10);
/// How often it is checked meanwhile.
const CHECK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
/// So many children may be given up and still wait. Each costs a process and the deadline.
const MOST_STUCK: usize = 3;
/// So many descriptors are asked for by one packet. The answers must fit the socket's buffer.
const BATCH: usize = 64;
/// A packet, and a datagram of `sock_diag`, is no longer.
const PACKET: usize = 64 * 1024;

/// What a packet to the child asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Task {
    /// Descriptors: `u32` numbers, the process, the thread, the descriptor and the inode of each.
    Unlisted = 1,
    /// One request of `sock_diag`, for the socket that comes with it. Answers come until the kernel says that it is
    /// done.
    Dump = 2,
    /// Requests of `sock_diag`, of [`sock_diag::EXACT`] bytes each, for the socket that comes with them. Each has one
    /// answer.
    Exact = 3,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The child waits for a lock, and was given up.
    Stuck,
    /// So many children wait for locks that no other is started.
    TooManyStuck,
    /// The child could not be started, or ended.
    Broken(io::Error),
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::Broken(error.into())
    }
}

/// A socket that a process holds, to be asked about.
pub type Asked = (u32, Descriptor);

/// The children: one that works, and those that were given up.
#[derive(Debug, Default)]
pub struct Helpers {
    working: Option<Helper>,
    stuck: Vec<Child>,
}

#[derive(Debug)]
struct Helper {
    child: Child,
    socket: OwnedFd,
}

impl Helpers {
    /// Whether a child that was given up still waits.
    pub fn are_stuck(&mut self) -> bool {
        // Somebody else may have waited for the child (`ECHILD`): then it has ended as well.
        self.stuck
            .retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        !self.stuck.is_empty()
    }

    /// Asks what these descriptors refer to, in order, and hands each answer to `each`. `pause` is called while it
    /// waits.
    ///
    /// # Errors
    /// After the first that has no answer, nothing more is asked: it is the one behind the last answer.
    pub fn unlisted(
        &mut self,
        asked: &[Asked],
        pause: &mut dyn FnMut(),
        mut each: impl FnMut(Asked, unlisted::Answer),
    ) -> Result<(), Failure> {
        for batch in asked.chunks(BATCH) {
            let numbers = batch.iter().flat_map(|(pid, descriptor)| {
                let Descriptor { inode, tid, fd } = *descriptor;
                [*pid, tid, fd, inode]
            });
            let mut packet = vec![Task::Unlisted as u8];
            packet.extend(numbers.flat_map(u32::to_ne_bytes));
            self.attempt(|helper| {
                helper.send(&packet, None)?;
                let mut answer = [0; size_of::<unlisted::Answer>() + 1];
                for one in batch {
                    let length = helper.receive(&mut answer, pause)?;
                    let read = unlisted::Answer::read_from_bytes(&answer[..length]);
                    each(*one, read.map_err(|_other_length| Errno::PROTO)?);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Has `request` made on `diag`, an open socket of `sock_diag`. Hands datagrams to `each`, with the time at which
    /// the kernel had written them, until that returns true.
    ///
    /// # Errors
    /// When the child does not answer. The socket should be closed then: its answer may be half read.
    pub fn dump(
        &mut self,
        diag: BorrowedFd<'_>,
        request: &[u8],
        pause: &mut dyn FnMut(),
        mut each: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), Failure> {
        let packet = [&[Task::Dump as u8], request].concat();
        let mut buffer = vec![0; PACKET + 8];
        self.attempt(|helper| {
            helper.send(&packet, Some(diag))?;
            loop {
                let (time, datagram) = helper.datagram(&mut buffer, pause)?;
                if each(time, datagram) {
                    return Ok(());
                }
            }
        })
    }

    /// The same for requests that each have one answer. After the first that has none, nothing more is asked.
    ///
    /// # Errors
    /// As above.
    pub fn exact(
        &mut self,
        diag: BorrowedFd<'_>,
        requests: &[[u8; sock_diag::EXACT]],
        pause: &mut dyn FnMut(),
        mut each: impl FnMut(u64, &[u8]),
    ) -> Result<(), Failure> {
        let mut buffer = vec![0; PACKET + 8];
        for batch in requests.chunks(BATCH) {
            let packet = [&[Task::Exact as u8], batch.as_flattened()].concat();
            self.attempt(|helper| {
                helper.send(&packet, Some(diag))?;
                for _ in batch {
                    let (time, datagram) = helper.datagram(&mut buffer, pause)?;
                    each(time, datagram);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn attempt(
        &mut self,
        work: impl FnOnce(&mut Helper) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut helper = match self.working.take() {
            Some(helper) => helper,
            None if self.are_stuck() && self.stuck.len() >= MOST_STUCK => {
                return Err(Failure::TooManyStuck);
            }
            None => Helper::start().map_err(Failure::Broken)?,
        };
        let worked = work(&mut helper);
        match worked {
            Ok(()) => self.working = Some(helper),
            Err(_) => {
                // It ends as soon as it can. It is not awaited: that may be never.
                let _ = helper.child.kill();
                self.stuck.push(helper.child);
            }
        }
        worked
    }
}

impl Helper {
    fn start() -> io::Result<Self> {
        let (socket, childs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let child = Command::new("/proc/self/exe")
            .arg(ROLE)
            .env_clear()
            .current_dir("/")
            // Ctrl-C is for the parent.
            .process_group(0)
            .stdin(Stdio::from(childs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { child, socket })
    }

    fn send(&self, packet: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
        let fds = fd.map(|fd| [fd]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let packet = [IoSlice::new(packet)];
        retry_on_intr(|| sendmsg(&self.socket, &packet, &mut control, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// One packet into `buffer`. Returns its length.
    fn receive(&self, buffer: &mut [u8], pause: &mut dyn FnMut()) -> Result<usize, Failure> {
        let began = Instant::now();
        loop {
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            if retry_on_intr(|| poll(&mut ready, Some(&CHECK)))? > 0 {
                let (length, _) =
                    retry_on_intr(|| recv(&self.socket, &mut *buffer, RecvFlags::empty()))?;
                return match length {
                    0 => Err(Failure::Broken(ErrorKind::UnexpectedEof.into())),
                    length => Ok(length),
                };
            }
            pause();
            let waited = began.elapsed();
            if waited >= LOCKED && self.is_in_the_kernel() || waited >= SILENT {
                return Err(Failure::Stuck);
            }
        }
    }

    /// A datagram of `sock_diag`, and when the kernel had written it.
    fn datagram<'a>(
        &self,
        buffer: &'a mut [u8],
        pause: &mut dyn FnMut(),
    ) -> Result<(u64, &'a [u8]), Failure> {
        let length = self.receive(buffer, pause)?;
        let (time, datagram) =
            u64::read_from_prefix(&buffer[..length]).map_err(|_too_short| Errno::PROTO)?;
        match i32::read_from_bytes(datagram) {
            // Netlink has longer headers: it is the error for which there is no datagram.
            Ok(errno) => Err(Failure::Broken(io::Error::from_raw_os_error(errno))),
            Err(_longer) => Ok((time, datagram)),
        }
    }

    /// Whether it is in a system call that no signal interrupts: state D.
    fn is_in_the_kernel(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        stat.is_ok_and(|stat| {
            let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
            fields.trim_start().starts_with('D')
        })
    }
}

/// Runs as the child: answers what comes on its standard input, until that is closed.
#[must_use]
pub fn serve() -> ExitCode {
    // What whoever started the parent has left open is not to stay open for as long as this waits for a lock.
    // SAFETY: this program has opened nothing yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    // Otherwise it would have the name of the link that it was started by.
    let _ = rustix::thread::set_name(c"tcptrace-ask");
    match answer_all(io::stdin().as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_nobody_listens) => ExitCode::FAILURE,
    }
}

fn answer_all(parent: BorrowedFd<'_>) -> io::Result<()> {
    let mut packet = vec![0; PACKET];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let mut room = [IoSliceMut::new(&mut packet)];
            recvmsg(parent, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        let diag = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let Some((task, body)) = packet[..received.bytes].split_first() else {
            return Ok(());
        };
        match (*task, diag) {
            (task, _) if task == Task::Unlisted as u8 => {
                for one in body.chunks_exact(16) {
                    send_all(parent, &[ask(one).as_bytes()])?;
                }
            }
            (task, Some(diag)) if task == Task::Dump as u8 => forward(parent, &diag, body, true)?,
            (task, Some(diag)) if task == Task::Exact as u8 => {
                for request in body.chunks_exact(sock_diag::EXACT) {
                    forward(parent, &diag, request, false)?;
                }
            }
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
}

fn ask(numbers: &[u8]) -> unlisted::Answer {
    let mut numbers = numbers.chunks_exact(4).map(|number| {
        let number = number.try_into().map(u32::from_ne_bytes);
        number.unwrap_or_default()
    });
    let [pid, tid, fd, inode] = [(); 4].map(|()| numbers.next().unwrap_or_default());
    let descriptor = Descriptor { inode, tid, fd };
    let answer = Handle::open(pid).and_then(|process| unlisted::unlisted(&process, descriptor));
    unlisted::Answer::new(&answer)
}

/// Makes a request, and forwards what the kernel answers: all datagrams of a dump, or one.
fn forward(
    parent: BorrowedFd<'_>,
    diag: &OwnedFd,
    request: &[u8],
    is_dump: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; PACKET];
    let sent = send(diag, request, SendFlags::empty());
    // The kernel writes the first datagram while it is asked, and the next one while it hands one over.
    let mut written = clock::boot_ns();
    loop {
        let received = match sent {
            Ok(_) => retry_on_intr(|| recv(diag, &mut *buffer, RecvFlags::empty())),
            Err(error) => Err(error),
        };
        let time = written;
        written = clock::boot_ns();
        match received {
            Ok((length, _)) => {
                let datagram = &buffer[..length];
                send_all(parent, &[time.as_bytes(), datagram])?;
                if !is_dump || sock_diag::is_last(datagram) {
                    return Ok(());
                }
            }
            Err(error) => {
                let errno = error.raw_os_error();
                return send_all(parent, &[time.as_bytes(), errno.as_bytes()]);
            }
        }
    }
}

fn send_all(parent: BorrowedFd<'_>, parts: &[&[u8]]) -> io::Result<()> {
    let parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut none = SendAncillaryBuffer::default();
    retry_on_intr(|| sendmsg(parent, &parts, &mut none, SendFlags::NOSIGNAL))?;
    Ok(())
}
