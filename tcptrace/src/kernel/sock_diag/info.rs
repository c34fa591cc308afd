//! When sockets last moved, from `sock_diag`: what [`INET_DIAG_INFO`] adds to a dump.
//!
//! For it the kernel takes each socket's lock (`tcp_diag_get_info()` calls `tcp_get_info()`, 4.4 to 6.18), and waits as
//! long as the lock's owner does. `ss -i` waits in the same way. So it is asked for by a [child](Helpers). A dump without
//! it takes no lock but those of the tables, which nobody holds while waiting for memory.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use zerocopy::{Immutable, IntoBytes};

use super::{
    Diag, Entry, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, Query, SOCK_DIAG_BY_FAMILY,
    TCPDIAG_GETSOCK,
    message::{self, INET_DIAG_INFO, Message, MessageHeader, SocketId},
    request,
};
use crate::kernel::helper::{Failure, Helpers};

/// `struct nlmsghdr` and `struct inet_diag_req_v2`: a request for one socket.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ExactRequest {
    header: MessageHeader,
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: SocketId,
}

/// Length of a request for one socket.
pub(in crate::kernel) const EXACT: usize = size_of::<ExactRequest>();

/// A request for one socket, as the kernel reads it.
pub type Exact = [u8; EXACT];

/// Asks for what a dump has shown, with its times.
#[must_use]
pub fn exact(entry: &Entry) -> Exact {
    let request = ExactRequest {
        header: MessageHeader {
            length: EXACT as u32,
            kind: SOCK_DIAG_BY_FAMILY,
            flags: NLM_F_REQUEST,
            sequence: 0,
            port: 0,
        },
        // By the addresses: the table of connections finds IPv4 on an IPv6 socket by them.
        family: match entry.local.is_ipv4() {
            true => libc::AF_INET as u8,
            false => libc::AF_INET6 as u8,
        },
        protocol: libc::IPPROTO_TCP as u8,
        extensions: 1 << (INET_DIAG_INFO - 1),
        pad: 0,
        states: u32::MAX,
        id: SocketId::of(entry),
    };
    let mut bytes = [0; EXACT];
    bytes.copy_from_slice(request.as_bytes());
    bytes
}

impl Diag {
    /// Hands the sockets in these states to `each`, with their [times](Entry::tcp_info). A child asks, and `pause` is
    /// called while it is waited for. After a failure this socket is to be dropped, and what was handed over is true,
    /// but not all.
    ///
    /// # Errors
    /// When somebody holds the lock of one of them, or no child can be started.
    pub fn times(
        &self,
        states: u16,
        helpers: &mut Helpers,
        pause: &mut dyn FnMut(),
        mut each: impl FnMut(&Entry),
    ) -> Result<(), Failure> {
        let query = Query {
            states,
            tcp_info: true,
            ..Query::ALL
        };
        let request = request(TCPDIAG_GETSOCK, query, 1);
        helpers.dump(self.fd(), request.as_bytes(), pause, |time, datagram| {
            entries(time, datagram, &mut each)
        })
    }

    /// The same for single sockets. One that is not there any more is passed over.
    ///
    /// # Errors
    /// As above.
    pub fn times_of(
        &self,
        sockets: &[Exact],
        helpers: &mut Helpers,
        pause: &mut dyn FnMut(),
        mut each: impl FnMut(&Entry),
    ) -> Result<(), Failure> {
        helpers.exact(self.fd(), sockets, pause, |time, datagram| {
            entries(time, datagram, &mut each);
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it stays open for as long as this is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

/// Hands the sockets of a datagram to `each`. Returns whether the answer ends with it.
fn entries(time: u64, mut datagram: &[u8], each: &mut impl FnMut(&Entry)) -> bool {
    let mut last = false;
    // What makes no sense is left out: then it is not known when that socket moved.
    while let Some(Ok(Message { header, body })) = message::next_message(&mut datagram) {
        match header.kind {
            TCPDIAG_GETSOCK | SOCK_DIAG_BY_FAMILY => {
                if let Ok(entry) = message::entry(body) {
                    each(&Entry { time, ..entry });
                }
            }
            NLMSG_DONE | NLMSG_ERROR => last = true,
            _ => {}
        }
    }
    last
}

/// Whether the answer to a request ends with this datagram.
pub(in crate::kernel) fn is_last(mut datagram: &[u8]) -> bool {
    while let Some(message) = message::next_message(&mut datagram) {
        match message {
            Ok(message) if matches!(message.header.kind, NLMSG_DONE | NLMSG_ERROR) => return true,
            Ok(_) => {}
            // Nothing better will come.
            Err(_malformed) => return true,
        }
    }
    false
}
