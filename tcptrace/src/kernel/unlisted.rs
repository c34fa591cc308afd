//! What a socket is that a process holds and that no table lists.
//!
//! A TCP socket leaves the kernel's tables when its connection is over, whether or not its process
//! closes it: after `shutdown(2)` and the peer's FIN, or a reset. From then on `sock_diag`, and `ss`
//! with it, do not know it. Its descriptor stays until it is closed, and only that leads to the
//! socket.
//!
//! So it is asked through a duplicate of the descriptor, which is closed at once. That changes nothing
//! that the process could notice. The duplicate is a reference, though: should the process close its
//! own in these microseconds, the socket goes when the duplicate does. And the kernel marks a received
//! socket with the receiver's class in the cgroup controllers `net_cls` and `net_prio`
//! (`__receive_sock()`), which does not matter where its connection is over. So ask only for what no
//! dump lists.
//!
//! To read `TCP_INFO`, or the socket's addresses, the kernel takes the socket's lock, and waits for it as long as its
//! owner holds it. So this is to be done in a process that nobody waits for: [`Helpers`](super::helper::Helpers). What
//! `poll()` shows, which takes no lock, comes first: a socket that never was connected has its lock left alone.
//! Where BPF is to be had, all this is read without lock and without duplicate: [`over`].
//!
//! On 6.18, 2 cores: 5 µs for a socket that is not TCP, 10 µs for one that is.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{fstat, getxattr};
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, getsockname, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tcptrace_ebpf::{OpenSocketDetail, State};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout};

use super::capabilities::Capability;
use super::procfs::{Descriptor, Handle};
use super::sock_diag::TcpInfo;
use super::system::System;
use crate::{event::address_bytes, exhausted, reason::Reason};

/// What a descriptor refers to whose inode no dump of `sock_diag` lists.
#[derive(Debug)]
pub enum Unlisted {
    /// No TCP socket; MPTCP counts as another protocol.
    NotTcp,
    /// A TCP socket without a connection: new, bound, its `connect()` failed, or a listener that was
    /// shut down.
    Fresh,
    /// A TCP socket in a state that is listed: the dump missed it, or was of other namespaces.
    Open,
    /// A TCP socket whose connection is over.
    Finished(Finished),
    /// It has been closed meanwhile.
    Closed,
    /// It may be a TCP socket. Why it could not be asked: the right to trace the process is missing
    /// (`CAP_SYS_PTRACE`, or Yama forbids it), or the kernel is older than 5.6.
    Refused(io::Error),
}

/// A socket whose connection is over, and whose descriptor is still open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its cookie, the one that it had while it was listed.
    pub cookie: u64,
    /// Inode number of its network namespace. None without `CAP_NET_ADMIN` in it.
    pub netns: Option<u32>,
    /// Local address and port. IPv4 on an IPv6 socket is shown as IPv4.
    pub local: SocketAddr,
    /// Remote address and port. None when the kernel does not say.
    pub remote: Option<SocketAddr>,
    /// Whether the process shut its sending side down (there is no other way to a FIN with the
    /// descriptor open) and the peer acknowledged that. If not, a reset or a timeout came first. None
    /// when the counters do not tell: of a reset connection made here with all its data acknowledged,
    /// or of an accepted one whose FIN went out together with data.
    pub shut_down: Option<bool>,
    /// There is an error, `ECONNRESET` for instance, that the process has not read.
    pub error_unread: bool,
    /// When it last moved. The connection ended at the last ACK received or later: then and there, if
    /// both sides sent a FIN.
    pub tcp_info: TcpInfo,
}

/// Finds out what `descriptor` of `process` refers to. Nothing about the socket is changed but what
/// the [module](self) says.
///
/// # Errors
///
/// When this program has no descriptor or memory left for it.
pub fn unlisted(process: &Handle, descriptor: Descriptor) -> io::Result<Unlisted> {
    match is_tcp(process, descriptor) {
        Ok(true) => {}
        // The path may lead to another file by now.
        Ok(false) if process.has(descriptor) == Ok(false) => return Ok(Unlisted::Closed),
        Ok(false) => return Ok(Unlisted::NotTcp),
        Err(error) => return unanswered(process, descriptor, error),
    }
    match duplicate(process, descriptor).and_then(|socket| ask(&socket)) {
        Ok(unlisted) => Ok(unlisted),
        Err(error) => unanswered(process, descriptor, error),
    }
}

/// [`unlisted`]'s result as bytes, for the process that has asked for it to be found out.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Answer {
    /// A [`Kind`].
    kind: u32,
    errno: i32,
    cookie: u64,
    local: [u8; 16],
    remote: [u8; 16],
    netns: u32,
    sent_ms: u32,
    received_ms: u32,
    acked_ms: u32,
    local_port: u16,
    remote_port: u16,
    /// 0 no, 1 yes, 2 not known.
    shut_down: u8,
    /// 1 or 0, like the next two.
    error_unread: u8,
    has_remote: u8,
    has_netns: u8,
}

#[derive(Clone, Copy)]
#[repr(u32)]
enum Kind {
    Failed,
    NotTcp,
    Fresh,
    Open,
    Finished,
    Closed,
    Refused,
}

impl Answer {
    pub(in crate::kernel) fn new(result: &io::Result<Unlisted>) -> Self {
        let mut answer = Self::new_zeroed();
        let errno = |error: &io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let kind = match result {
            // The process has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Kind::Closed,
            Err(error) => {
                answer.errno = errno(error);
                Kind::Failed
            }
            Ok(Unlisted::NotTcp) => Kind::NotTcp,
            Ok(Unlisted::Fresh) => Kind::Fresh,
            Ok(Unlisted::Open) => Kind::Open,
            Ok(Unlisted::Closed) => Kind::Closed,
            Ok(Unlisted::Refused(error)) => {
                answer.errno = errno(error);
                Kind::Refused
            }
            Ok(Unlisted::Finished(finished)) => {
                answer.cookie = finished.cookie;
                answer.netns = finished.netns.unwrap_or(0);
                answer.has_netns = finished.netns.is_some().into();
                answer.local = address_bytes(finished.local.ip());
                answer.local_port = finished.local.port();
                if let Some(remote) = finished.remote {
                    answer.remote = address_bytes(remote.ip());
                    answer.remote_port = remote.port();
                    answer.has_remote = 1;
                }
                answer.shut_down = finished.shut_down.map_or(2, u8::from);
                answer.error_unread = finished.error_unread.into();
                answer.sent_ms = finished.tcp_info.last_data_sent_ms;
                answer.received_ms = finished.tcp_info.last_data_recv_ms;
                answer.acked_ms = finished.tcp_info.last_ack_recv_ms;
                Kind::Finished
            }
        };
        answer.kind = kind as u32;
        answer
    }

    /// What [`unlisted`] returned.
    ///
    /// # Errors
    /// What it failed with.
    pub fn result(&self) -> io::Result<Unlisted> {
        let error = io::Error::from_raw_os_error(self.errno);
        let address =
            |bytes: [u8; 16], port| SocketAddr::new(Ipv6Addr::from(bytes).to_canonical(), port);
        const NOT_TCP: u32 = Kind::NotTcp as u32;
        const FRESH: u32 = Kind::Fresh as u32;
        const OPEN: u32 = Kind::Open as u32;
        const FINISHED: u32 = Kind::Finished as u32;
        const CLOSED: u32 = Kind::Closed as u32;
        const REFUSED: u32 = Kind::Refused as u32;
        Ok(match self.kind {
            NOT_TCP => Unlisted::NotTcp,
            FRESH => Unlisted::Fresh,
            OPEN => Unlisted::Open,
            CLOSED => Unlisted::Closed,
            REFUSED => Unlisted::Refused(error),
            FINISHED => Unlisted::Finished(Finished {
                cookie: self.cookie,
                netns: (self.has_netns != 0).then_some(self.netns),
                local: address(self.local, self.local_port),
                remote: (self.has_remote != 0).then(|| address(self.remote, self.remote_port)),
                shut_down: match self.shut_down {
                    0 => Some(false),
                    1 => Some(true),
                    _ => None,
                },
                error_unread: self.error_unread != 0,
                tcp_info: TcpInfo {
                    last_data_sent_ms: self.sent_ms,
                    last_data_recv_ms: self.received_ms,
                    last_ack_recv_ms: self.acked_ms,
                },
            }),
            _ => return Err(error),
        })
    }
}

/// What the walk over all open files shows of a socket in state CLOSE, if its connection is over: the same as
/// [`unlisted`] would find out. There are `hz` jiffies in a second.
#[must_use]
pub fn over(detail: &OpenSocketDetail, hz: u32) -> Option<Finished> {
    let info = Info {
        state: State::Close,
        times: TcpInfo {
            last_data_sent_ms: jiffies_to_ms(detail.sent_ago, hz),
            last_data_recv_ms: u32::MAX,
            last_ack_recv_ms: jiffies_to_ms(detail.acked_ago, hz),
        },
        bytes_acked: detail.bytes_acked,
        bytes_sent: detail.bytes_sent,
        bytes_retrans: detail.bytes_retrans,
        data_segs_out: detail.data_segs_out,
        delivered: detail.delivered,
    };
    let address =
        |bytes: [u8; 16], port| SocketAddr::new(Ipv6Addr::from(bytes).to_canonical(), port);
    info.was_connected().then(|| Finished {
        cookie: detail.cookie,
        netns: Some(detail.netns),
        local: address(detail.local_addr, detail.local_port),
        remote: Some(address(detail.remote_addr, detail.remote_port)),
        shut_down: info.fin_acknowledged(),
        error_unread: detail.error != 0,
        tcp_info: info.times,
    })
}

/// So many jiffies, at `hz` a second, in milliseconds.
#[must_use]
pub fn jiffies_to_ms(jiffies: u32, hz: u32) -> u32 {
    let ms = u64::from(jiffies) * 1000 / u64::from(hz.max(1));
    u32::try_from(ms).unwrap_or(u32::MAX)
}

/// Why sockets of other processes cannot be asked, on a system such as this. `error` is what the kernel said of one of
/// them, if one was tried.
#[must_use]
pub fn refusal(what: impl fmt::Display, error: Option<&io::Error>, system: &System) -> Reason {
    let errno = error.and_then(io::Error::raw_os_error);
    if let Some(fix) = errno.and_then(exhausted::fix) {
        return Reason::new(what, fix);
    }
    let missing = system.capabilities.missing(&[Capability::SYS_PTRACE]);
    let fix = if system.ptrace_scope.is_some_and(|scope| scope > 2) {
        "boot without kernel.yama.ptrace_scope=3, which forbids it to everybody"
    } else if !missing.is_empty() {
        "run as root, or with CAP_SYS_PTRACE"
    } else if system.is_before(5, 6) {
        "it needs a kernel of 5.6 or later (pidfd_getfd)"
    } else {
        "a security module or a container runtime forbids pidfd_getfd(): allow it there, or run on the host"
    };
    Reason::new(what, fix)
}

/// Whether this system knows the call that duplicates descriptors of processes, tried on one of this.
///
/// # Errors
/// What the kernel, or a filter of system calls, says.
pub fn try_duplicate() -> io::Result<()> {
    let own = std::fs::File::open("/proc/self/status")?;
    let pidfd = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    pidfd_getfd(&pidfd, own.as_raw_fd(), PidfdGetfdFlags::empty())?;
    Ok(())
}

fn unanswered(process: &Handle, descriptor: Descriptor, error: Errno) -> io::Result<Unlisted> {
    match error {
        Errno::MFILE | Errno::NFILE | Errno::NOMEM => Err(error.into()),
        _ if process.has(descriptor) == Ok(false) => Ok(Unlisted::Closed),
        _ => Ok(Unlisted::Refused(error.into())),
    }
}

/// The name of a socket's protocol, `sk_prot_creator->name` with its zero, since Linux 3.7. Asking for
/// it opens nothing, and takes no lock.
///
/// # Errors
/// What the kernel says, if it is closed meanwhile for instance.
pub fn is_tcp(process: &Handle, descriptor: Descriptor) -> Result<bool, Errno> {
    // `struct proto.name` has 32 bytes.
    let mut name = [0; 32];
    let path = process.path(descriptor);
    let length = getxattr(path, "system.sockprotoname", &mut name)?;
    Ok(matches!(&name[..length], b"TCP\0" | b"TCPv6\0"))
}

fn duplicate(process: &Handle, descriptor: Descriptor) -> Result<OwnedFd, Errno> {
    let Descriptor { inode, tid, fd } = descriptor;
    // A pidfd is of a process's first thread, unless it is asked for another one: since Linux 6.9.
    const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
    let flags = if tid == process.pid() {
        PidfdFlags::empty()
    } else {
        PIDFD_THREAD
    };
    let pid = i32::try_from(tid).ok().and_then(Pid::from_raw);
    let fd = i32::try_from(fd).map_err(|_too_large| Errno::BADF)?;
    let pidfd = pidfd_open(pid.ok_or(Errno::SRCH)?, flags)?;
    let socket = pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())?;
    // The descriptor may be of another file by now, and the pid of another process.
    if fstat(&socket)?.st_ino != u64::from(inode) {
        return Err(Errno::SRCH);
    }
    Ok(socket)
}

fn ask(socket: &OwnedFd) -> Result<Unlisted, Errno> {
    // This much can be had without the lock (`tcp_poll()`, 4.4 to 6.18).
    let shown = revents(socket, PollFlags::RDHUP)?;
    if !shown.contains(PollFlags::HUP) {
        return Ok(Unlisted::Open);
    }
    // `tcp_done()` shuts down both sides, and `tcp_disconnect()` undoes that: after a `connect()` that failed, on a
    // listener that was shut down. One in CLOSE_WAIT that has only just sent its FIN is open still: it shows both.
    if !shown.contains(PollFlags::RDHUP) {
        return Ok(Unlisted::Fresh);
    }
    // `struct tcp_info`, of which some kernels have more.
    let mut buffer = [MaybeUninit::uninit(); 256];
    let info = getsockopt(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut buffer)?;
    let info = Info::of(info).ok_or(Errno::NOSYS)?;
    if info.state != State::Close {
        return Ok(Unlisted::Open);
    }
    if !info.was_connected() {
        return Ok(Unlisted::Fresh);
    }
    let local = SocketAddr::try_from(getsockname(socket)?)?;
    Ok(Unlisted::Finished(Finished {
        cookie: sockopt::socket_cookie(socket)?,
        netns: netns(socket),
        local: canonical(local),
        remote: remote(socket, local).map(canonical),
        shut_down: info.fin_acknowledged(),
        error_unread: has_error(socket)?,
        tcp_info: info.times,
    }))
}

/// Parts of `struct tcp_info`, which was as long as this needs in Linux 4.19.
struct Info {
    state: State,
    times: TcpInfo,
    /// Sequence numbers: SYN and FIN count as one each, but the SYN of an accepted connection.
    bytes_acked: u64,
    /// Payload, with what was sent again.
    bytes_sent: u64,
    bytes_retrans: u64,
    /// Segments with payload, with what was sent again.
    data_segs_out: u32,
    /// Segments that arrived: SYN or SYN-ACK, payload, a FIN without.
    delivered: u32,
}

impl Info {
    fn of(bytes: &[u8]) -> Option<Self> {
        // Offsets are part of the kernel's interface: it only grows at its end.
        let u32_at = |offset: usize| Some(u32::read_from_prefix(bytes.get(offset..)?).ok()?.0);
        let u64_at = |offset: usize| Some(u64::read_from_prefix(bytes.get(offset..)?).ok()?.0);
        Some(Self {
            state: State::from_number(*bytes.first()?)?,
            times: TcpInfo::read(bytes)?,
            bytes_acked: u64_at(120)?,
            data_segs_out: u32_at(156)?,
            delivered: u32_at(192)?,
            bytes_sent: u64_at(200)?,
            bytes_retrans: u64_at(208)?,
        })
    }

    /// Whether the handshake was completed. (The reset of a refused `connect()` counts in `segs_in`,
    /// and `snd_wnd` outlives `connect(AF_UNSPEC)`: measured on 6.18.)
    fn was_connected(&self) -> bool {
        self.delivered > 0
    }

    fn fin_acknowledged(&self) -> Option<bool> {
        let payload = self.bytes_sent.wrapping_sub(self.bytes_retrans);
        match self.bytes_acked.wrapping_sub(payload).cast_signed() {
            // Payload that was not acknowledged, or payload and nothing else.
            ..=0 => Some(false),
            // The SYN of a connection made here, or the FIN of an accepted one: that is a segment
            // more than handshake and payload, unless it had payload.
            1 => (self.delivered > self.data_segs_out.saturating_add(1)).then_some(true),
            // SYN and FIN.
            2.. => Some(true),
        }
    }
}

/// Whether `sk_err` is set. To read it would clear it; poll only looks.
fn has_error(socket: &OwnedFd) -> Result<bool, Errno> {
    Ok(revents(socket, PollFlags::empty())?.contains(PollFlags::ERR))
}

/// What poll shows of a socket at this moment: hang-up and error, and of `asked`.
fn revents(socket: &OwnedFd, asked: PollFlags) -> Result<PollFlags, Errno> {
    let mut poll_fd = [PollFd::new(socket, asked)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut poll_fd, Some(&at_once))?;
    Ok(poll_fd[0].revents())
}

/// The peer's address. `getpeername()` refuses it in this state, `SO_PEERNAME` does not (`inet_getname()`
/// and `inet6_getname()` with `peer` 2).
fn remote(socket: &OwnedFd, local: SocketAddr) -> Option<SocketAddr> {
    // It does not accept room for more than the address has.
    let length = match local {
        SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
        SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
    };
    let mut buffer = [MaybeUninit::uninit(); size_of::<libc::sockaddr_in6>()];
    let address = getsockopt(
        socket,
        libc::SOL_SOCKET,
        libc::SO_PEERNAME,
        &mut buffer[..length],
    );
    let address = address.ok().filter(|address| address.len() == length)?;
    // SAFETY: these bytes are initialized, and a whole address of the socket's family.
    let address = unsafe { SocketAddrAny::read(address.as_ptr().cast(), length as u32) };
    SocketAddr::try_from(address).ok()
}

fn canonical(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}

/// Inode number of the socket's network namespace.
fn netns(socket: &OwnedFd) -> Option<u32> {
    // SAFETY: this request takes no argument, and returns a new descriptor or -1.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGSKNS as _) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let namespace = unsafe { OwnedFd::from_raw_fd(fd) };
    u32::try_from(fstat(&namespace).ok()?.st_ino).ok()
}

/// Reads an option into `buffer`. Returns as much of it as the kernel has written.
fn getsockopt<'a>(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    buffer: &'a mut [MaybeUninit<u8>],
) -> Result<&'a [u8], Errno> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is what the buffer has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    let written = (length as usize).min(buffer.len());
    // SAFETY: the kernel has initialized as many bytes as it says it has written.
    Ok(unsafe { buffer[..written].assume_init_ref() })
}

#[cfg(test)]
mod tests;
