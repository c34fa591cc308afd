//! Which sockets are wanted. What is not asked for costs nothing: the verifier removes it.
//!
//! A filter here may let through too much, never too little: the user side filters again, with all
//! that it knows by then.

use tcptrace_ebpf::State;

use crate::kernel::{Tuple, config};

/// Whether a transition between these states is wanted, of whatever socket.
#[inline(always)]
pub(crate) fn states(old: u8, new: u8) -> bool {
    config!(wanted[(old & 15) as usize]) & (1 << (new & 15)) != 0
}

/// Whether a transition between wanted states is wanted of this socket.
#[inline(always)]
pub(crate) fn transition(old: u8, new: u8, tuple: &Tuple) -> bool {
    // A listener's address says nothing about its connections, and its process may own them all.
    let listener =
        new == State::Listen as u8 || (old == State::Listen as u8 && new == State::Close as u8);
    // A child that has just been cloned still shows the listener's remote side: nobody.
    let child = old == State::Listen as u8 && new == State::SynRecv as u8;
    // `connect()` chooses the local port after entering SYN_SENT. The transition after that tells the
    // user side whether it was one of ours.
    let connecting = new == State::SynSent as u8 || old == State::SynSent as u8;
    if listener || child {
        return netns(tuple.netns);
    }
    socket(tuple, connecting)
}

/// Whether a network namespace is wanted, by its inode number.
#[inline(always)]
pub(crate) fn netns(inode: u32) -> bool {
    let wanted = config!(netns);
    wanted == 0 || wanted == inode
}

/// Whether a socket is wanted. `port_open`: its local port may not be the final one.
#[inline(always)]
pub(crate) fn socket(tuple: &Tuple, port_open: bool) -> bool {
    let (local, remote) = (u32::from(tuple.local_port), u32::from(tuple.remote_port));
    if !netns(tuple.netns) {
        return false;
    }
    let family = config!(family);
    if family != 0 && family != tuple.ip_version() {
        return false;
    }
    let wanted = config!(remote_port);
    if wanted != 0 && wanted != remote {
        return false;
    }
    let wanted = config!(local_port);
    if wanted != 0 && wanted != local && !port_open {
        return false;
    }
    let wanted = config!(any_port);
    if wanted != 0 && wanted != local && wanted != remote && !port_open {
        return false;
    }
    let mask = config!(addr_mask);
    if mask[0] | mask[1] | mask[2] | mask[3] != 0 {
        let addr = config!(addr);
        return matches(tuple.local, mask, addr) || matches(tuple.remote, mask, addr);
    }
    true
}

#[inline(always)]
const fn matches(address: [u32; 4], mask: [u32; 4], wanted: [u32; 4]) -> bool {
    (address[0] & mask[0]) ^ wanted[0]
        | (address[1] & mask[1]) ^ wanted[1]
        | (address[2] & mask[2]) ^ wanted[2]
        | (address[3] & mask[3]) ^ wanted[3]
        == 0
}
