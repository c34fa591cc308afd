//! Which TCP sockets one network namespace has: a dump through `NETLINK_SOCK_DIAG`.
//!
//! The kernel walks its tables bucket by bucket while connections come and go, and finds its place
//! in a bucket again by counting. So a socket may be in a dump twice, even with two states, and
//! **one that is not in it may exist**: in tables with 16 sockets per bucket, under 20,000
//! connections per second, 47 of 3.9 million were missed, and none in tables of the default size
//! (measured on 6.18). What is missing in two dumps is gone.
//!
//! A dump walks the whole table, which all network namespaces share by default, and skips what is
//! of another: 0.5 ms with nothing in 262144 buckets, 18 ms with 20,000 sockets, 28 ms with their
//! `tcp_info` (2 cores, both families).

mod info;
mod message;

use std::error::Error as _;
use std::io;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use tcptrace_ebpf::State;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::clock;
pub(in crate::kernel) use info::{EXACT, is_last};
pub use info::{Exact, exact};
pub(crate) use message::fuzz;
pub use message::{Entry, TcpInfo, Timer};
use message::{INET_DIAG_INFO, Malformed, Message, MessageHeader, SocketId};

use crate::exhausted;
use crate::reason::Reason;

/// The kernel fills at most 32 KiB per read (`netlink_recvmsg` caps `max_recvmsg_len`, unchanged
/// from 4.4 to 6.18); twice that leaves room.
const BUFFER: usize = 64 * 1024;

/// `TCPDIAG_GETSOCK`: the request, and each message of its answer. It is the older one, and the only one that
/// asks for both families at once (`inet_diag_dump_compat()`, 3.3 to 6.18): a walk instead of two.
const TCPDIAG_GETSOCK: u16 = 18;
/// What the messages are that answer the newer request, the same otherwise.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// Every state a mask of states can name.
pub const ALL_STATES: u16 = {
    let mut mask = 0;
    let mut i = 0;
    while i < State::ALL.len() {
        mask |= State::ALL[i].bit();
        i += 1;
    }
    mask
};

/// A `sock_diag` socket in the network namespace where it was opened, whichever thread uses it.
///
/// It keeps that namespace alive, with all its timewait sockets: hold it for a look, not for
/// longer.
#[derive(Debug)]
pub struct Diag {
    socket: Socket,
    buffer: Box<[u8]>,
    sequence: u32,
}

/// What to dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Mask of the states wanted, of [`State::bit`]. The kernel applies it: what is not wanted
    /// costs next to nothing. `FIN_WAIT2` and `TIME_WAIT` include the timewait sockets in that
    /// state, `SYN_RECV` the request sockets.
    pub states: u16,
    /// Also ask for [`Entry::tcp_info`]: 400 bytes per socket instead of 120. The kernel takes each socket's lock
    /// for it, and may wait for ever: [`Diag::times`] has a child ask.
    pub tcp_info: bool,
    /// Only sockets with this local port, 0 for any: the kernel leaves out the others, listeners as well
    /// (`inet_diag_dump_icsk()`, 5.4 to 6.18).
    pub local_port: u16,
    /// Only sockets with this remote port, 0 for any. Listeners, which have none, are left out.
    pub remote_port: u16,
}

impl Query {
    /// Every socket, without `tcp_info`.
    pub const ALL: Self = Self {
        states: ALL_STATES,
        tcp_info: false,
        local_port: 0,
        remote_port: 0,
    };
}

/// Whether a dump is one picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Completeness {
    /// The kernel answered to the end.
    Complete,
    /// The kernel says that its tables changed in a way that made the dump inconsistent
    /// (`NLM_F_DUMP_INTR`): sockets may be missing.
    Interrupted,
}

/// A dump that did not come to its end; what was handed over before is true, but not all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel, or what is loaded of it, cannot dump TCP sockets.
    #[error("the kernel has no tcp_diag")]
    NoTcpDiag,
    /// The kernel refused the request.
    #[error("the kernel refused to list TCP sockets")]
    Refused(#[source] io::Error),
    /// The netlink socket failed.
    #[error("reading the list of TCP sockets failed")]
    Socket(#[source] io::Error),
    /// So many messages of the answer made no sense and were left out.
    #[error("{0} messages in the kernel's list of TCP sockets could not be read")]
    Malformed(u32),
}

impl Error {
    /// Which sockets are not known for it, and what can be done about it.
    #[must_use]
    pub fn reason(&self, netns: u32) -> Reason {
        let ran_out = match self {
            Self::Refused(error) | Self::Socket(error) => {
                error.raw_os_error().and_then(exhausted::fix)
            }
            Self::NoTcpDiag | Self::Malformed(_) => None,
        };
        let fix = ran_out.unwrap_or(match self {
            Self::NoTcpDiag => "modprobe tcp_diag",
            Self::Refused(_) => {
                "a security module or a container runtime forbids it: run on the host"
            }
            Self::Socket(_) | Self::Malformed(_) => {
                "please report it, with the output of `tcptrace doctor`"
            }
        });
        let source = self.source().map(|source| format!(": {source}"));
        let source = source.unwrap_or_default();
        Reason::new(
            format_args!("network namespace {netns}: {self}{source}"),
            fix,
        )
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Request {
    header: MessageHeader,
    /// Nobody reads it, nor the lengths of prefixes.
    family: u8,
    prefixes: [u8; 2],
    extensions: u8,
    id: SocketId,
    states: u32,
    dbs: u32,
}

impl Diag {
    /// Opens a socket in the calling thread's network namespace. No privilege is needed.
    ///
    /// # Errors
    ///
    /// `EMFILE` and the like; a kernel without `sock_diag` says `EPROTONOSUPPORT`.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_SOCK_DIAG)?;
        Ok(Self {
            socket,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            sequence: 0,
        })
    }

    /// Hands every TCP socket that `query` wants to `each`, of IPv4 and IPv6.
    ///
    /// MPTCP connections show as the TCP subflows they are made of.
    ///
    /// # Errors
    ///
    /// See [`Error`]. After [`Error::Socket`] this `Diag` should be dropped: its answer may be
    /// half read.
    pub fn dump(
        &mut self,
        query: Query,
        mut each: impl FnMut(&Entry),
    ) -> Result<Completeness, Error> {
        let mut dump = self.begin(query)?;
        while dump.next(&mut each)? {}
        dump.end()
    }

    /// Asks for every TCP socket that `query` wants, to be read message by message.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`].
    pub fn begin(&mut self, query: Query) -> Result<Dump<'_>, Error> {
        self.ask(TCPDIAG_GETSOCK, query)
    }

    fn ask(&mut self, kind: u16, query: Query) -> Result<Dump<'_>, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(kind, query, self.sequence);
        let began = clock::boot_ns();
        self.socket
            .send(request.as_bytes(), 0)
            .map_err(Error::Socket)?;
        Ok(Dump {
            answer: Answer::new(self.sequence),
            began,
            // The kernel writes the first datagram while it is asked, and the next one while it hands one over
            // (`netlink_dump()`). What is done with the entries takes time, which is not theirs.
            written: clock::boot_ns(),
            diag: self,
        })
    }
}

/// A dump that goes on. What is left of it unread, the next one ignores.
#[derive(Debug)]
pub struct Dump<'a> {
    diag: &'a mut Diag,
    answer: Answer,
    /// When the kernel began to write the next datagram at the earliest, boot time nanoseconds.
    began: u64,
    /// When it had written it.
    written: u64,
}

impl Dump<'_> {
    /// Hands the sockets of the next message to `each`. Returns whether there may be more. With one message, the kernel
    /// already gathers what the next will hold.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`]; [`Error`] of the whole only comes from [`end`](Self::end).
    pub fn next(&mut self, mut each: impl FnMut(&Entry)) -> Result<bool, Error> {
        let Self {
            diag,
            answer,
            began,
            written,
        } = self;
        if answer.done {
            return Ok(false);
        }
        answer.written = *written;
        answer.within = written.saturating_sub(*began);
        let length = loop {
            *began = clock::boot_ns();
            match diag.socket.recv(&mut &mut diag.buffer[..], libc::MSG_TRUNC) {
                Ok(length) => break length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Socket(error)),
            }
        };
        *written = clock::boot_ns();
        let Some(datagram) = diag.buffer.get(..length) else {
            let error = format!("a message of {length} bytes was cut at {BUFFER}");
            return Err(Error::Socket(io::Error::other(error)));
        };
        answer.read(datagram, &mut each);
        Ok(!answer.done)
    }

    /// What the dump is worth, once [`next`](Self::next) has come to its end.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn end(&self) -> Result<Completeness, Error> {
        self.answer.end()
    }
}

fn request(kind: u16, query: Query, sequence: u32) -> Request {
    Request {
        header: MessageHeader {
            length: size_of::<Request>() as u32,
            kind,
            flags: NLM_F_REQUEST | NLM_F_DUMP,
            sequence,
            port: 0,
        },
        family: 0,
        prefixes: [0; 2],
        extensions: if query.tcp_info {
            1 << (INET_DIAG_INFO - 1)
        } else {
            0
        },
        id: SocketId::of_ports(query.local_port, query.remote_port),
        states: u32::from(query.states),
        dbs: 0,
    }
}

/// What came so far in answer to one request. Pure: it only sees datagrams.
#[derive(Debug)]
struct Answer {
    sequence: u32,
    /// By when the kernel had written the datagram at hand, boot time nanoseconds.
    written: u64,
    /// How long that took at most.
    within: u64,
    done: bool,
    interrupted: bool,
    malformed: u32,
    /// A positive errno.
    refused: Option<i32>,
}

impl Answer {
    fn new(sequence: u32) -> Self {
        Self {
            sequence,
            written: 0,
            within: 0,
            done: false,
            interrupted: false,
            malformed: 0,
            refused: None,
        }
    }

    /// Reads one datagram. A message that makes no sense is counted, and the rest is read, so that
    /// the next request finds an empty socket.
    fn read(&mut self, mut datagram: &[u8], each: &mut impl FnMut(&Entry)) {
        while let Some(message) = message::next_message(&mut datagram) {
            match message {
                // Messages of a dump that was given up may still be in the socket.
                Ok(message) if message.header.sequence != self.sequence => {}
                Ok(message) => self.message(&message, each),
                Err(Malformed) => self.malformed += 1,
            }
        }
    }

    fn message(&mut self, message: &Message<'_>, each: &mut impl FnMut(&Entry)) {
        self.interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.header.kind {
            TCPDIAG_GETSOCK | SOCK_DIAG_BY_FAMILY => match message::entry(message.body) {
                Ok(entry) => each(&Entry {
                    time: self.written,
                    within: self.within,
                    ..entry
                }),
                Err(Malformed) => self.malformed += 1,
            },
            // Both begin with a negative errno or 0: the request was refused, or a dump that had
            // begun failed.
            NLMSG_ERROR | NLMSG_DONE => {
                self.done = true;
                match i32::read_from_prefix(message.body) {
                    Ok((0, _)) => {}
                    Ok((errno, _)) => self.refused = Some(errno.wrapping_neg()),
                    Err(_too_short) => self.malformed += 1,
                }
            }
            _ => {}
        }
    }

    fn end(&self) -> Result<Completeness, Error> {
        match self.refused {
            // The second without inet_diag, which the first needs as well (`sock_diag_rcv_msg()`).
            Some(libc::ENOENT | libc::EOPNOTSUPP) => return Err(Error::NoTcpDiag),
            Some(errno) => return Err(Error::Refused(io::Error::from_raw_os_error(errno))),
            None => {}
        }
        if self.malformed > 0 {
            return Err(Error::Malformed(self.malformed));
        }
        if self.interrupted {
            return Ok(Completeness::Interrupted);
        }
        Ok(Completeness::Complete)
    }
}

#[cfg(test)]
mod tests;
