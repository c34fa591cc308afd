//! The fixed-size records that the probes write, into the ring buffer but for the last.

#[cfg(not(target_arch = "bpf"))]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a record tells; the byte [`Header::kind`]. It fixes the record's type and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A full socket changed its state: [`Transition`].
    Transition = 1,
    /// `accept()` handed a socket to the process in the header: [`Header`] alone.
    Accept = 2,
    /// A timewait socket was made, or its timer armed (again): [`TimeWait`].
    TimeWaitArmed = 3,
    /// A timewait socket's timer was taken away, or the socket itself: [`TimeWait`].
    TimeWaitDone = 4,
    /// Where in its code the process in the header connects or accepts: [`Stack`].
    Stack = 5,
}

/// What a process calls that a [`Stack`] is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Via {
    /// `connect()`, or a call that connects as well (`sendto()` with TCP Fast Open).
    Connect = 1,
    /// `accept()`.
    Accept = 2,
}

/// Bits of [`Header::flags`].
#[derive(Clone, Copy, Debug)]
pub struct Flags;

impl Flags {
    /// `sk_lock.owned`: a process is inside a call on this socket.
    pub const OWNED: u16 = 1;
    /// `sk_socket` is set: the socket still has (or may get) a file.
    pub const HAS_SOCKET: u16 = 2;
    /// The current task is a kernel thread (`PF_KTHREAD`).
    pub const KTHREAD: u16 = 4;
    /// `TCP_LINGER2` is below 0: FIN_WAIT2 ends without TIME_WAIT.
    pub const NO_TIME_WAIT: u16 = 8;
    /// The current task is ending (`PF_EXITING`): what it closes, the kernel closes for it.
    pub const EXITING: u16 = 16;
    /// The current task's process descends from [`Config::tree_root`](crate::Config::tree_root).
    pub const IN_TREE: u16 = 32;
}

/// What every record begins with: when, which socket, and who ran on the CPU.
///
/// Who ran is not who owns the socket: in softirq it is whoever was interrupted. The user side
/// decides when to believe it. Where it never would (a change that nobody who held the socket's lock made,
/// unless it may be the end of a process; a timewait socket) that is not written, but zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "bpf"),
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct Header {
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub time: u64,
    /// The socket cookie; 0 when the kernel never made one.
    pub cookie: u64,
    /// Id of the cgroup (v2) the socket was made in; 0 when unknown.
    pub cgroup: u64,
    /// When the current task's process started, `CLOCK_BOOTTIME` in nanoseconds.
    pub start: u64,
    /// Local address; IPv4 as `::ffff:a.b.c.d`.
    pub local_addr: [u8; 16],
    /// Remote address; IPv4 as `::ffff:a.b.c.d`.
    pub remote_addr: [u8; 16],
    /// `comm` of the current task's thread group leader, padded with zeros.
    pub comm: [u8; 16],
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Inode number of the socket's file, 0 when it has none (yet, or any more).
    pub inode: u32,
    /// Process id (thread group) of the current task, as the initial pid namespace numbers it.
    pub pid: u32,
    /// Real user id of the current task.
    pub uid: u32,
    /// Local port; 0 when not bound yet.
    pub local_port: u16,
    /// Remote port; 0 when none.
    pub remote_port: u16,
    /// A [`Kind`].
    pub kind: u8,
    /// `AF_INET` or `AF_INET6`, of the socket and not of the addresses.
    pub family: u8,
    /// [`Flags`].
    pub flags: u16,
}

/// A full socket went from one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "bpf"),
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct Transition {
    /// The common part; `kind` is [`Kind::Transition`].
    pub header: Header,
    /// `sk_err`: an errno, 0 when the socket has no error.
    pub error: u16,
    /// At `CLOSE > SYN_SENT`: the port of the socket's connection before, which `inet_sport` still
    /// shows; 0 without one.
    pub stale_port: u16,
    /// State left, as the kernel numbers it.
    pub old: u8,
    /// State entered.
    pub new: u8,
    /// `sk_shutdown`: bit 0 no more reading, bit 1 no more writing.
    pub shutdown: u8,
    /// Always 0.
    pub reserved: u8,
}

/// A timewait socket began, was armed again, or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "bpf"),
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct TimeWait {
    /// The common part; `kind` is [`Kind::TimeWaitArmed`] or [`Kind::TimeWaitDone`].
    pub header: Header,
    /// jiffies (64 bits) at `header.time`.
    pub jiffies: u64,
    /// `tw_timer.expires` in jiffies; 0 when the timer is not armed yet.
    pub expires: u64,
    /// `tw_entry_stamp` (6.14 and later): `CLOCK_MONOTONIC` in milliseconds, cut to 32 bits, when
    /// TIME_WAIT was entered; 0 when unknown.
    pub entry_stamp: u32,
    /// `tw_substate`: `FIN_WAIT2` or `TIME_WAIT`, as the kernel numbers them.
    pub substate: u8,
    /// Who took the timer away: a bit set of [`Caller`](crate::Caller), 0 when not looked at or unknown.
    pub callers: u8,
    /// Always 0.
    pub reserved: [u8; 2],
}

/// How many addresses are kept of those that the kernel finds by frame pointers; it looks for 127 at most,
/// unless told otherwise (`kernel.perf_event_max_stack`).
pub const CHAIN: usize = 128;
/// How many bytes are copied from the top of a user stack, at most; as many as `perf record
/// --call-graph dwarf` takes.
pub const COPY: usize = 8192;

/// What it takes to walk a user stack: x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "bpf"),
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct Stack {
    /// The common part; `kind` is [`Kind::Stack`].
    pub header: Header,
    /// `ip`: behind the instruction that entered the kernel.
    pub instruction: u64,
    /// `sp`: where the stack's top is, and the copy begins.
    pub stack: u64,
    /// `bp`: the frame pointer, in code that has one.
    pub frame: u64,
    /// `mm->start_stack`, which a program gets with `execve()`: the same as in `/proc/PID/stat`, as long as
    /// the process runs the same program.
    pub start_stack: u64,
    /// A [`Via`].
    pub via: u32,
    /// How many addresses [`chain`](Self::chain) holds.
    pub chained: u32,
    /// How many bytes [`copy`](Self::copy) holds.
    pub copied: u32,
    /// Always 0.
    pub reserved: u32,
    /// What the kernel found by frame pointers, the innermost first: `instruction`, then return addresses.
    pub chain: [u64; CHAIN],
    /// The top of the stack. It ends where a page is not there, if not before.
    pub copy: [u8; COPY],
}

/// A descriptor of a TCP socket: not in the ring buffer, but read from the iterator over all open files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "bpf"),
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct OpenSocket {
    /// Inode of the socket's file.
    pub inode: u32,
    /// The process, as the initial pid namespace numbers it.
    pub pid: u32,
    /// The thread whose table of descriptors it is in: the first one, unless that has ended.
    pub tid: u32,
    /// Its number in that table.
    pub fd: u32,
    /// Number of the socket's state.
    pub state: u8,
    /// 1 if an [`OpenSocketDetail`] follows, else 0.
    pub detailed: u8,
    /// `IPPROTO_TCP` or `IPPROTO_MPTCP`.
    pub protocol: u16,
    /// Always 0.
    pub reserved: u32,
}

/// What the socket itself holds, read without its lock: members that belong together may be of different moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "bpf"),
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct OpenSocketDetail {
    /// When it was read, boot time nanoseconds.
    pub time: u64,
    /// The socket cookie; made if it had none.
    pub cookie: u64,
    /// Sequence numbers that the peer acknowledged (`tcpi_bytes_acked`).
    pub bytes_acked: u64,
    /// Payload sent, with what was sent again.
    pub bytes_sent: u64,
    /// Payload sent again.
    pub bytes_retrans: u64,
    /// Local address, IPv4 as `::ffff:a.b.c.d`.
    pub local_addr: [u8; 16],
    /// Remote address, likewise.
    pub remote_addr: [u8; 16],
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Jiffies since data was sent (`tp->lsndtime`).
    pub sent_ago: u32,
    /// Jiffies since an ACK was received (`tp->rcv_tstamp`).
    pub acked_ago: u32,
    /// Segments sent with payload.
    pub data_segs_out: u32,
    /// Segments that arrived at the peer: SYN or SYN-ACK, payload, a FIN without.
    pub delivered: u32,
    /// `sk_err`, 0 for none.
    pub error: u32,
    /// Local port.
    pub local_port: u16,
    /// Remote port.
    pub remote_port: u16,
    /// Always 0.
    pub reserved: u32,
}

impl Header {
    /// Every byte zero.
    pub const ZERO: Self = Self {
        time: 0,
        cookie: 0,
        cgroup: 0,
        start: 0,
        local_addr: [0; 16],
        remote_addr: [0; 16],
        comm: [0; 16],
        netns: 0,
        inode: 0,
        pid: 0,
        uid: 0,
        local_port: 0,
        remote_port: 0,
        kind: 0,
        family: 0,
        flags: 0,
    };
}

const _: () = {
    assert!(size_of::<Header>() == 104);
    assert!(size_of::<Transition>() == 112);
    assert!(size_of::<TimeWait>() == 128);
    assert!(size_of::<Stack>() == 152 + CHAIN * 8 + COPY);
    assert!(size_of::<OpenSocket>() == 24);
    assert!(size_of::<OpenSocketDetail>() == 104);
};
