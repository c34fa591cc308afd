//! Which sockets are wanted. What is not asked for costs nothing: the verifier removes it.
//!
//! A filter here may let through too much, never too little: the user side filters again, with all
//! that it knows by then.

use tcptrace_ebpf::{Config, Field, Select, State};

use crate::kernel::{Read as _, Tuple, Typed, config, has};

/// Whether a value is one of those in a list of the settings.
macro_rules! among {
    ($list:ident, $value:expr) => {{
        let mut found = 0;
        for i in 0..Config::VALUES {
            found |= if_zero(u32::from(config!($list[i]) ^ $value));
        }
        found >> 63 != 0
    }};
}

/// Whether one of the ports in a list of the settings is `lowest` or a higher one.
macro_rules! reaches {
    ($list:ident, $lowest:expr) => {{
        let mut found = 0;
        for i in 0..Config::VALUES {
            let below = u64::from($lowest).wrapping_sub(u64::from(config!($list[i])));
            found |= below.wrapping_sub(1);
        }
        found >> 63 != 0
    }};
}

/// A number whose highest bit is set if the difference is 0, and only then. A comparison would be a branch, and the
/// verifier follows both ways of each.
#[inline(always)]
const fn if_zero(difference: u32) -> u64 {
    (difference as u64).wrapping_sub(1)
}

/// Whether a transition between these states is wanted, of whatever socket.
#[inline(always)]
pub(crate) fn states(old: u8, new: u8) -> bool {
    config!(wanted[(old & 15) as usize]) & (1 << (new & 15)) != 0
}

/// Whether a transition between wanted states is wanted of this socket, of the namespace (`struct net`) at `net`.
///
/// # Safety
/// The verifier must know what is at `net`.
#[inline(always)]
pub(crate) unsafe fn transition(old: u8, new: u8, tuple: &Tuple, net: *const u8) -> bool {
    // A listener's address says nothing about its connections, and its process may own them all.
    let listener =
        new == State::Listen as u8 || (old == State::Listen as u8 && new == State::Close as u8);
    // A child that has just been cloned shows the listener's sides up to 6.12: its remote side is nobody, and its
    // port is another where packets are redirected (TPROXY).
    let child = old == State::Listen as u8 && new == State::SynRecv as u8 && tuple.remote_port == 0;
    if listener || child {
        return netns(tuple.netns);
    }
    // `connect()` chooses the local port after entering SYN_SENT. The transition after that tells the
    // user side whether it was one of ours.
    let connecting = new == State::SynSent as u8 || old == State::SynSent as u8;
    let lowest = if connecting {
        // SAFETY: the caller's promise.
        unsafe { lowest_chosen(net) }
    } else {
        PORTS
    };
    selected(tuple, lowest)
}

/// More than any port.
const PORTS: u32 = 1 << 16;

/// The lowest local port that `connect()` chooses by itself in the namespace at `net`; 0 where the kernel keeps it
/// elsewhere. What a socket narrows down for itself lies above (`inet_sk_get_local_port_range()`, 6.3).
#[inline(always)]
unsafe fn lowest_chosen(net: *const u8) -> u32 {
    if !has(Field::NetLocalPorts) {
        return 0;
    }
    // SAFETY: the caller's promise. Two `int` up to 6.7, then both in one `u32`, the lowest in the lower half.
    let range: u32 = unsafe { Typed::field(net, Field::NetLocalPorts) };
    range & 0xffff
}

/// Whether a network namespace is wanted, by its inode number.
#[inline(always)]
pub(crate) fn netns(inode: u32) -> bool {
    !selects(Select::NETNS) || among!(netns, inode)
}

/// Whether a socket is wanted that has its final local port.
#[inline(always)]
pub(crate) fn socket(tuple: &Tuple) -> bool {
    selected(tuple, PORTS)
}

/// Whether a socket is wanted whose local port is final, or else will be `lowest` or a higher one.
#[inline(always)]
fn selected(tuple: &Tuple, lowest: u32) -> bool {
    if !netns(tuple.netns) {
        return false;
    }
    if selects(Select::FAMILY) && config!(family) != tuple.ip_version() {
        return false;
    }
    if selects(Select::REMOTE_PORT) && !among!(remote_ports, tuple.remote_port) {
        return false;
    }
    if selects(Select::LOCAL_PORT)
        && !among!(local_ports, tuple.local_port)
        && !reaches!(local_ports, lowest)
    {
        return false;
    }
    if selects(Select::ANY_PORT)
        && !among!(any_ports, tuple.local_port)
        && !among!(any_ports, tuple.remote_port)
        && !reaches!(any_ports, lowest)
    {
        return false;
    }
    !selects(Select::NETWORK) || networks(tuple)
}

/// Whether any of these filters ([`Select`]) is in force.
#[inline(always)]
pub(crate) fn selects(filters: u32) -> bool {
    config!(selects) & filters != 0
}

/// Whether the local or the remote address lies in a network that is wanted.
#[inline(always)]
fn networks(tuple: &Tuple) -> bool {
    let mut found = 0;
    for i in 0..Config::NETWORKS {
        let (addr, mask) = (config!(networks[i].addr), config!(networks[i].mask));
        found |= if_zero(difference(tuple.local, mask, addr));
        found |= if_zero(difference(tuple.remote, mask, addr));
    }
    found >> 63 != 0
}

/// 0 if the address lies in the network.
#[inline(always)]
const fn difference(address: [u32; 4], mask: [u32; 4], network: [u32; 4]) -> u32 {
    (address[0] & mask[0]) ^ network[0]
        | (address[1] & mask[1]) ^ network[1]
        | (address[2] & mask[2]) ^ network[2]
        | (address[3] & mask[3]) ^ network[3]
}
