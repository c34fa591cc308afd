//! What the user side decides before the probes load. It lies in read-only memory, so the verifier
//! sees constants and removes what is not used.

/// Settings of the probes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Config {
    /// `wanted[old]` has the bit of each new state whose transition is wanted.
    pub wanted: [u16; 16],
    /// [`Select`]: which of the filters below are in force.
    pub selects: u32,
    /// 4 or 6: the family of the addresses wanted (`::ffff:a.b.c.d` is IPv4).
    pub family: u32,
    /// Inode numbers of the network namespaces wanted. Here and in the lists that follow, the first value stands in
    /// all places that are not needed.
    pub netns: [u32; Self::VALUES],
    /// Local ports wanted.
    pub local_ports: [u16; Self::VALUES],
    /// Remote ports wanted.
    pub remote_ports: [u16; Self::VALUES],
    /// Ports wanted on either side.
    pub any_ports: [u16; Self::VALUES],
    /// Networks wanted: of the local or the remote address.
    pub networks: [Network; Self::NETWORKS],
    /// Process whose descendants are marked ([`Flags::IN_TREE`](crate::Flags::IN_TREE)), by the process
    /// id in its own pid namespace; 0 for none.
    pub tree_root: u32,
    /// Inode number of that pid namespace.
    pub tree_pid_ns: u32,
    /// Not 0: a [`Stack`](crate::Stack) is written of every `connect()` and `accept()`.
    pub stacks: u32,
    /// Always 0.
    pub reserved: u32,
    /// `TCP_TIMEWAIT_LEN` (60 s) in jiffies.
    pub time_wait_jiffies: u64,
    /// Address of `tw_timer_handler`, 0 when not known.
    pub tw_timer_handler: u64,
    /// Where the functions lie that tell why a timewait socket ends, by [`Caller`].
    pub callers: [TextRange; Caller::COUNT],
}

impl Config {
    /// How many values of a kind the probes compare with, at most.
    pub const VALUES: usize = 8;
    /// How many networks, at most.
    pub const NETWORKS: usize = 4;

    /// Selects every socket, in every state.
    pub const ALL: Self = Self {
        wanted: [u16::MAX; 16],
        selects: 0,
        family: 0,
        netns: [0; Self::VALUES],
        local_ports: [0; Self::VALUES],
        remote_ports: [0; Self::VALUES],
        any_ports: [0; Self::VALUES],
        networks: [Network {
            addr: [0; 4],
            mask: [0; 4],
        }; Self::NETWORKS],
        tree_root: 0,
        tree_pid_ns: 0,
        stacks: 0,
        reserved: 0,
        time_wait_jiffies: 0,
        tw_timer_handler: 0,
        callers: [TextRange { start: 0, end: 0 }; Caller::COUNT],
    };
}

/// Bits of [`Config::selects`].
#[derive(Clone, Copy, Debug)]
pub struct Select;

impl Select {
    /// By [`Config::netns`].
    pub const NETNS: u32 = 1;
    /// By [`Config::family`].
    pub const FAMILY: u32 = 2;
    /// By [`Config::local_ports`].
    pub const LOCAL_PORT: u32 = 4;
    /// By [`Config::remote_ports`].
    pub const REMOTE_PORT: u32 = 8;
    /// By [`Config::any_ports`].
    pub const ANY_PORT: u32 = 16;
    /// By [`Config::networks`].
    pub const NETWORK: u32 = 32;
}

/// A range of addresses, IPv4 as part of `::ffff:0:0/96`, in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Network {
    /// The network's address, host bits zero.
    pub addr: [u32; 4],
    /// The mask.
    pub mask: [u32; 4],
}

/// Part of the kernel's text. Both ends 0: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TextRange {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
}

impl TextRange {
    /// 1 if the kernel address `address` lies in it, else 0; 0 also for address 0.
    ///
    /// By subtraction: a comparison is a branch, the verifier follows both ways of each, and for eight
    /// ranges at sixteen addresses 6.1 does not come to an end. A difference cannot overflow, because all
    /// kernel addresses have the same highest bit.
    #[inline(always)]
    #[must_use]
    pub const fn holds(self, address: u64) -> u8 {
        let before_end = address.wrapping_sub(self.end);
        let before_start = address.wrapping_sub(self.start);
        ((before_end & !before_start) >> 63) as u8
    }
}

/// A kernel function found on the stack when a timewait socket's timer is taken away before its
/// time. It is direct evidence of why (function names checked on 6.1, 6.12, 6.18 and 7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Caller {
    /// `__inet_check_established`: a local `connect()` takes the address pair over.
    Connect = 0,
    /// `__inet6_check_established`: the same for IPv6.
    Connect6 = 1,
    /// `tcp_timewait_state_process`: a segment for this socket (a RST, unless the timer starts again).
    Segment = 2,
    /// `inet_twsk_purge`: the network namespace goes away.
    Purge = 3,
    /// `tcp_abort`: destroyed through `sock_diag` (`ss -K`).
    Abort = 4,
    /// `tcp_v4_rcv`: a segment; without [`Segment`](Self::Segment), a SYN that opens the pair anew.
    Receive = 5,
    /// `tcp_v6_rcv`: the same for IPv6.
    Receive6 = 6,
    /// `sock_diag_rcv_msg`: the same as [`Abort`](Self::Abort). Whether one or the other is still on the
    /// stack depends on the compiler: each may end in a jump to what it calls last.
    Destroy = 7,
}

impl Caller {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// All of them with the kernel's name of the function, in order.
    pub const ALL: [(Self, &'static str); Self::COUNT] = [
        (Self::Connect, "__inet_check_established"),
        (Self::Connect6, "__inet6_check_established"),
        (Self::Segment, "tcp_timewait_state_process"),
        (Self::Purge, "inet_twsk_purge"),
        (Self::Abort, "tcp_abort"),
        (Self::Receive, "tcp_v4_rcv"),
        (Self::Receive6, "tcp_v6_rcv"),
        (Self::Destroy, "sock_diag_rcv_msg"),
    ];

    /// This function's bit in [`TimeWait::callers`](crate::TimeWait::callers).
    #[must_use]
    pub const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Index into the per-CPU counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Records that found no room in the ring buffer.
    Lost = 0,
    /// Transitions of MPTCP sockets (protocol 262), which are not covered.
    Mptcp = 1,
}

impl Counter {
    /// How many there are.
    pub const COUNT: u32 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_its_first_address_and_not_its_end() {
        let (start, end) = (0xffff_ffff_8200_89f0, 0xffff_ffff_8200_8ad0);
        let range = TextRange { start, end };
        assert_eq!([start, end - 1].map(|address| range.holds(address)), [1, 1]);
        for outside in [0, start - 1, end, 0xffff_8000_0000_0000, u64::MAX] {
            assert_eq!(range.holds(outside), 0, "{outside:x}");
        }
        for address in [0, start, u64::MAX] {
            assert_eq!(TextRange::default().holds(address), 0, "{address:x}");
        }
    }
}
