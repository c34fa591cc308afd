//! The bytes of a `sock_diag` dump, read without trusting them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::event::{Socket, Tuple, address_bytes};
use tcptrace_ebpf::State;
use zerocopy::byteorder::network_endian::U16 as U16Be;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One TCP socket as the kernel shows it, full, half made or timewait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// By when the kernel had written this down, boot time nanoseconds.
    pub time: u64,
    /// How long before that it may have been, nanoseconds: the kernel walks through a table of all sockets, and
    /// another process may run meanwhile.
    pub within: u64,
    /// The socket cookie, which `ss -e` prints as `sk:`. The dump gives one to a socket that had
    /// none. A request socket (see [`State::SynRecv`] in [`state`](Self::state)) leaves its cookie
    /// to the connection it becomes, and a full socket to its timewait socket.
    pub cookie: u64,
    /// The state. A timewait socket has the state it stands for: `TIME_WAIT`, or `FIN_WAIT2` while
    /// the peer has not closed. `SYN_RECV` is mostly a request socket, which the kernel keeps
    /// among the connections since 4.4 and which has no inode, no owner and no queues.
    pub state: State,
    /// `AF_INET` or `AF_INET6`: of the socket, not of its addresses.
    pub family: u8,
    /// Local address and port. IPv4 on an IPv6 socket is shown as IPv4.
    pub local: SocketAddr,
    /// Remote address and port; unspecified and 0 for a listener.
    pub remote: SocketAddr,
    /// Index of the interface that the socket is bound to; 0 when to none.
    pub interface: u32,
    /// Which timer runs.
    pub timer: Timer,
    /// Milliseconds until that timer fires, rounded to jiffies; 0 when it is due or none runs.
    pub expires_ms: u32,
    /// How often what that timer stands for was sent again without an answer (`idiag_retrans`):
    /// data, or a SYN ([`Timer::Retransmit`]); a request socket's SYN-ACK; probes of a closed window
    /// ([`Timer::WindowProbe`]) or keepalives. An answer sets it back to 0, and it is 0 without a
    /// timer and on timewait sockets (`inet_sk_diag_fill()`).
    pub retransmits: u8,
    /// Bytes received and not read, a FIN counted as one; for a listener, connections not accepted.
    /// 0 on timewait and request sockets.
    pub recv_queue: u32,
    /// Bytes written and not acknowledged, SYN and FIN counted as one each; for a listener, the
    /// limit of its accept queue.
    pub send_queue: u32,
    /// User id that made the socket; 0 on timewait and request sockets, whoever made them.
    pub uid: u32,
    /// Inode of the socket's file; 0 when it has none: timewait and request sockets, a connection
    /// not yet accepted, one closed by its process.
    pub inode: u32,
    /// `sk_shutdown`: bit 0 no more reading, bit 1 no more writing. None on timewait and request
    /// sockets.
    pub shutdown: Option<u8>,
    /// Id of the cgroup (v2) the socket was made in. None before Linux 5.8, and on timewait and
    /// request sockets.
    pub cgroup: Option<u64>,
    /// Parts of `struct tcp_info`, where they were asked for and the socket is a full one.
    pub tcp_info: Option<TcpInfo>,
}

impl Entry {
    /// True for a timewait socket, in either of its states; false for a full `FIN_WAIT2`.
    #[must_use]
    pub fn is_timewait(&self) -> bool {
        self.timer == Timer::TimeWait
    }

    /// Which socket it is, of the namespace with this inode number.
    #[must_use]
    pub fn socket(&self, netns: u32) -> Socket {
        Socket {
            cookie: self.cookie,
            netns,
            tuple: Tuple {
                local_addr: address_bytes(self.local.ip()),
                remote_addr: address_bytes(self.remote.ip()),
                local_port: self.local.port(),
                remote_port: self.remote.port(),
            },
        }
    }
}

/// The timer of a socket, `idiag_timer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// No timer runs.
    None,
    /// Retransmission of data, of a SYN, or of a request socket's SYN-ACK.
    Retransmit,
    /// Keepalive, or how long an orphan stays in `FIN_WAIT2`.
    Keepalive,
    /// The end of a timewait socket.
    TimeWait,
    /// Probe of a peer's closed window.
    WindowProbe,
    /// One of another number (5 is the delayed ACK, since 6.15).
    Other(u8),
}

impl From<u8> for Timer {
    fn from(number: u8) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Retransmit,
            2 => Self::Keepalive,
            3 => Self::TimeWait,
            4 => Self::WindowProbe,
            other => Self::Other(other),
        }
    }
}

/// How long ago a connection last moved, in milliseconds, from `struct tcp_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Since data was sent.
    pub last_data_sent_ms: u32,
    /// Since data was received.
    pub last_data_recv_ms: u32,
    /// Since an ACK was received; a FIN carries one.
    pub last_ack_recv_ms: u32,
}

impl TcpInfo {
    /// From the bytes of a `struct tcp_info`, as many as the kernel gave. None when they are too few.
    pub(in crate::kernel) fn read(bytes: &[u8]) -> Option<Self> {
        // Offsets are part of the kernel's interface: it only grows at its end.
        let at = |offset: usize| {
            let (value, _) = u32::read_from_prefix(bytes.get(offset..)?).ok()?;
            Some(value)
        };
        Some(Self {
            last_data_sent_ms: at(44)?,
            last_data_recv_ms: at(52)?,
            last_ack_recv_ms: at(56)?,
        })
    }
}

/// `struct nlmsghdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct MessageHeader {
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) port: u32,
}

/// `struct inet_diag_sockid`: which socket.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SocketId {
    local_port: U16Be,
    remote_port: U16Be,
    local: [u8; 16],
    remote: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

impl SocketId {
    /// All with these ports; 0 is any.
    pub(super) fn of_ports(local: u16, remote: u16) -> Self {
        Self {
            local_port: local.into(),
            remote_port: remote.into(),
            local: [0; 16],
            remote: [0; 16],
            interface: 0,
            cookie: [0; 2],
        }
    }

    /// The socket that a dump has shown.
    pub(super) fn of(entry: &Entry) -> Self {
        let bytes = |address: IpAddr| {
            let mut bytes = [0; 16];
            match address {
                IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
                IpAddr::V6(v6) => bytes = v6.octets(),
            }
            bytes
        };
        Self {
            local_port: entry.local.port().into(),
            remote_port: entry.remote.port().into(),
            local: bytes(entry.local.ip()),
            remote: bytes(entry.remote.ip()),
            interface: entry.interface,
            cookie: [entry.cookie as u32, (entry.cookie >> 32) as u32],
        }
    }
}

/// `struct inet_diag_msg`, without the attributes that follow it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DiagMessage {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
    expires: u32,
    recv_queue: u32,
    send_queue: u32,
    uid: u32,
    inode: u32,
}

/// `struct nlattr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AttributeHeader {
    length: u16,
    kind: u16,
}

const _: () = {
    assert!(size_of::<MessageHeader>() == 16);
    assert!(size_of::<DiagMessage>() == 72);
};

/// `INET_DIAG_INFO`: the attribute with `struct tcp_info`.
pub(super) const INET_DIAG_INFO: u16 = 2;
/// `INET_DIAG_SHUTDOWN`: one byte, `sk_shutdown`.
const INET_DIAG_SHUTDOWN: u16 = 8;
/// `INET_DIAG_CGROUP_ID`: eight bytes.
const INET_DIAG_CGROUP_ID: u16 = 21;
/// `NLA_TYPE_MASK`: an attribute's kind without its two flag bits.
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// One netlink message.
pub(super) struct Message<'a> {
    pub(super) header: MessageHeader,
    pub(super) body: &'a [u8],
}

/// The bytes are not what netlink says they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Takes the next message off the front of `datagram`; None at its end.
pub(super) fn next_message<'a>(datagram: &mut &'a [u8]) -> Option<Result<Message<'a>, Malformed>> {
    if datagram.is_empty() {
        return None;
    }
    let bytes = std::mem::take(datagram);
    let Ok((header, _)) = MessageHeader::read_from_prefix(bytes) else {
        return Some(Err(Malformed));
    };
    let length = header.length as usize;
    let Some(body) = bytes.get(size_of::<MessageHeader>()..length) else {
        return Some(Err(Malformed));
    };
    // Messages begin at multiples of four; the last one may lack its padding.
    *datagram = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(Ok(Message { header, body }))
}

/// Reads the body of one message of a dump: an `inet_diag_msg` and its attributes.
pub(super) fn entry(body: &[u8]) -> Result<Entry, Malformed> {
    let (message, attributes) =
        DiagMessage::read_from_prefix(body).map_err(|_too_short| Malformed)?;
    let id = message.id;
    let mut entry = Entry {
        time: 0,
        within: 0,
        cookie: u64::from(id.cookie[0]) | u64::from(id.cookie[1]) << 32,
        state: State::from_number(message.state).ok_or(Malformed)?,
        family: message.family,
        local: address(message.family, id.local, id.local_port)?,
        remote: address(message.family, id.remote, id.remote_port)?,
        interface: id.interface,
        timer: Timer::from(message.timer),
        expires_ms: message.expires,
        retransmits: message.retransmits,
        recv_queue: message.recv_queue,
        send_queue: message.send_queue,
        uid: message.uid,
        inode: message.inode,
        shutdown: None,
        cgroup: None,
        tcp_info: None,
    };
    let mut rest = attributes;
    while !rest.is_empty() {
        let (kind, value) = next_attribute(&mut rest)?;
        match kind {
            INET_DIAG_SHUTDOWN => entry.shutdown = value.first().copied(),
            INET_DIAG_CGROUP_ID => {
                entry.cgroup = u64::read_from_prefix(value).ok().map(|(id, _)| id);
            }
            INET_DIAG_INFO => entry.tcp_info = TcpInfo::read(value),
            _ => {}
        }
    }
    Ok(entry)
}

fn next_attribute<'a>(rest: &mut &'a [u8]) -> Result<(u16, &'a [u8]), Malformed> {
    let (header, _) = AttributeHeader::read_from_prefix(rest).map_err(|_too_short| Malformed)?;
    let length = usize::from(header.length);
    let value = rest
        .get(size_of::<AttributeHeader>()..length)
        .ok_or(Malformed)?;
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Ok((header.kind & ATTRIBUTE_KIND, value))
}

fn address(family: u8, bytes: [u8; 16], port: U16Be) -> Result<SocketAddr, Malformed> {
    let [a, b, c, d, ..] = bytes;
    let ip = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(),
        _ => return Err(Malformed),
    };
    Ok(SocketAddr::new(ip, port.get()))
}

/// See [`crate::fuzz`]: a datagram of a dump.
pub(crate) fn fuzz(mut datagram: &[u8]) {
    while let Some(message) = next_message(&mut datagram) {
        if let Ok(message) = message
            && let Ok(entry) = entry(message.body)
        {
            let socket = entry.socket(1);
            assert_eq!(socket.tuple.local_port, entry.local.port());
        }
    }
}
