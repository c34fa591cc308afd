//! The kernel's own list of TCP sockets, read with nothing of the product's.
//!
//! Layouts: `include/uapi/linux/inet_diag.h`, unchanged since 3.3.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Mutex,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::Netns;

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// The kernel's numbers of the states (`include/net/tcp_states.h`) and their names.
const STATES: [&str; 13] = [
    "",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
];

/// A TCP socket in the kernel's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// As `ss -e` prints it.
    pub cookie: String,
    /// Its state.
    pub state: &'static str,
    /// A timewait socket: in TIME_WAIT, or an orphan in FIN_WAIT2.
    pub timewait: bool,
    /// Address and port here.
    pub local: SocketAddr,
    /// Address and port there.
    pub remote: SocketAddr,
    /// Milliseconds until the running timer expires.
    pub expires: u32,
    /// Bytes received and not read; in CLOSE_WAIT the FIN counts as one.
    pub recv_queue: u32,
    /// Bytes written and not acknowledged.
    pub send_queue: u32,
    /// Inode of the socket's file, 0 when there is none.
    pub inode: u32,
    /// `inet_diag_msg` as it came: family, and the id that a request for this socket needs.
    raw: [u8; 52],
}

/// A connection to the kernel about one network namespace.
#[derive(Debug)]
pub struct Diag(Mutex<Socket>);

impl Diag {
    pub(crate) fn new(netns: &Netns) -> Self {
        let protocol = Some(Protocol::from(NETLINK_SOCK_DIAG));
        let make = || Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, protocol);
        Self(Mutex::new(
            netns.inside(make).expect("the kernel has sock_diag"),
        ))
    }

    /// Every TCP socket of the namespace, in any state.
    ///
    /// # Panics
    /// When the kernel refuses.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut request = [0_u8; 56];
            request[0] = family as u8;
            request[1] = libc::IPPROTO_TCP as u8;
            request[4..8].fill(0xff); // all states
            self.exchange(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request, &mut rows)
                .expect("a list");
        }
        rows
    }

    /// The socket with this cookie, if it exists.
    ///
    /// # Panics
    /// When the kernel refuses.
    #[must_use]
    pub fn row(&self, cookie: &str) -> Option<Row> {
        self.rows().into_iter().find(|row| row.cookie == cookie)
    }

    /// Destroys a socket as `ss -K` does.
    ///
    /// # Errors
    /// EOPNOTSUPP when the kernel is built without `CONFIG_INET_DIAG_DESTROY`.
    pub fn destroy(&self, row: &Row) -> io::Result<()> {
        let mut request = [0_u8; 56];
        request[0] = row.raw[0];
        request[1] = libc::IPPROTO_TCP as u8;
        request[4..8].fill(0xff);
        request[8..].copy_from_slice(&row.raw[4..]);
        self.exchange(SOCK_DESTROY, NLM_F_ACK, &request, &mut Vec::new())
    }

    fn exchange(&self, kind: u16, flags: u16, body: &[u8], rows: &mut Vec<Row>) -> io::Result<()> {
        let socket = self.0.lock().expect("no panic while asking");
        let mut socket = &*socket;
        let mut request = Vec::with_capacity(16 + body.len());
        request.extend((16 + body.len() as u32).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        request.extend([0; 8]);
        request.extend(body);
        socket.write_all(&request)?;
        let mut buffer = [0; 32768];
        loop {
            let length = socket.read(&mut buffer)?;
            let mut messages = &buffer[..length];
            while let Some(header) = messages.first_chunk::<16>() {
                let length = u32_at(header, 0) as usize;
                let payload = &messages[16..length];
                match u16::from_ne_bytes([header[4], header[5]]) {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match u32_at(payload, 0).cast_signed() {
                            0 => Ok(()),
                            error => Err(io::Error::from_raw_os_error(-error)),
                        };
                    }
                    _ => rows.push(Row::parse(payload)),
                }
                messages = &messages[length.next_multiple_of(4).min(messages.len())..];
            }
        }
    }
}

impl Row {
    /// Reads an `inet_diag_msg`.
    fn parse(message: &[u8]) -> Self {
        let raw = *message.first_chunk::<52>().expect("72 bytes");
        let v6 = i32::from(raw[0]) == libc::AF_INET6;
        let address = |address: usize, port: usize| {
            let bytes: [u8; 16] = raw[address..address + 16].try_into().expect("16 bytes");
            let ip = if v6 {
                Ipv6Addr::from(bytes).to_canonical()
            } else {
                IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
            };
            SocketAddr::new(ip, u16::from_be_bytes([raw[port], raw[port + 1]]))
        };
        let cookie = u64::from(u32_at(&raw, 44)) | u64::from(u32_at(&raw, 48)) << 32;
        Self {
            cookie: format!("{cookie:x}"),
            state: STATES[usize::from(raw[1])],
            timewait: raw[2] == 3,
            local: address(8, 4),
            remote: address(24, 6),
            expires: u32_at(message, 52),
            recv_queue: u32_at(message, 56),
            send_queue: u32_at(message, 60),
            inode: u32_at(message, 68),
            raw,
        }
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}
