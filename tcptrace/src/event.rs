//! Everything that is known from outside, as it comes in: what the probes recorded, what a look at
//! `sock_diag` and `/proc` showed, and what was lost.
//!
//! Events are all that the [tracker](crate::tracker) learns. A recording is these events, one JSON
//! object a line; times in it are `CLOCK_BOOTTIME` nanoseconds.

pub mod line;

use std::{borrow::Cow, fmt, net::IpAddr, net::Ipv6Addr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::select::Sockets;
use tcptrace_ebpf as kernel;
use tcptrace_ebpf::{Flags, Kind, State};
use zerocopy::FromBytes as _;

/// Version of the recording's schema. It rises when an old reader would misunderstand a new file.
pub const SCHEMA: u32 = 1;

/// Something that became known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The first event of every source.
    Start(Box<Start>),
    /// A full socket changed its state.
    Transition(Transition),
    /// A process got a connection from `accept()`.
    Accept(Accept),
    /// Where in its code a process connected or accepted, a while before: its stack. The socket can be gone.
    Called(Called),
    /// What a stack is. It can come after what refers to it, and again, when more has become known.
    Stack(Box<Stack>),
    /// A timewait socket was made, or its timer started (again).
    TimeWaitArmed(TimeWait),
    /// A timewait socket's timer was taken away, or the socket itself.
    TimeWaitDone(TimeWait),
    /// A look at the sockets that exist begins; [`Event::Socket`] and [`Event::Holder`] follow.
    Look(Look),
    /// A socket that exists.
    Socket(Row),
    /// When a socket that a look has shown last moved.
    Activity(Activity),
    /// A descriptor by which a process holds a socket.
    Holder(Holder),
    /// Who a process is that holds a socket in a state that was asked for.
    Process(Box<Process>),
    /// All records made before the look's end are in: what it did not show is gone.
    LookEnd {
        /// When the look ended.
        time: u64,
        /// Namespaces of which everything in its scope was seen, or which are no more. Of these, what was
        /// not shown does not exist.
        netns: Vec<u32>,
    },
    /// `TCPTimeWaitOverflow` of a network namespace.
    Overflow {
        /// When it was read.
        time: u64,
        /// Inode number of the namespace.
        netns: u32,
        /// How many timewait sockets were not made since the namespace exists, because of
        /// `tcp_max_tw_buckets`.
        count: u64,
    },
    /// The path of a cgroup whose id occurs in what follows.
    Cgroup {
        /// Its id.
        id: u64,
        /// Its path below the mount point.
        path: Box<str>,
    },
    /// Records that never arrived.
    Lost(Lost),
    /// The clocks moved against each other: the time of day was set, or the machine slept.
    Clock {
        /// When it was noticed.
        time: u64,
        /// As in [`Start`].
        boot_to_utc_ns: i64,
        /// As in [`Start`].
        boot_to_monotonic_ns: i64,
    },
    /// Time went on. Nothing else happened.
    Tick {
        /// The time now.
        time: u64,
    },
    /// The last event of a source that ended well.
    End(End),
}

impl Event {
    /// When it happened or was noticed, boot time nanoseconds; `None` for what is timeless.
    #[must_use]
    pub fn time(&self) -> Option<u64> {
        Some(match self {
            Self::Start(start) => start.time,
            Self::Transition(transition) => transition.time,
            Self::Accept(accept) => accept.time,
            Self::Called(called) => called.time,
            Self::TimeWaitArmed(record) | Self::TimeWaitDone(record) => record.time,
            Self::Look(look) => look.time,
            Self::Socket(row) => row.time,
            Self::Lost(lost) => lost.time,
            Self::End(end) => end.time,
            Self::LookEnd { time, .. }
            | Self::Overflow { time, .. }
            | Self::Clock { time, .. }
            | Self::Tick { time } => *time,
            // An answer to what a look showed, like the next: time is the look's.
            Self::Activity(_)
            | Self::Holder(_)
            | Self::Process(_)
            | Self::Cgroup { .. }
            | Self::Stack(_) => {
                return None;
            }
        })
    }
}

/// Where and how the events were taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// [`SCHEMA`] of the program that wrote it.
    pub schema: u32,
    /// Version of that program.
    pub version: Box<str>,
    /// When.
    pub time: u64,
    /// What to add to boot time to get UTC nanoseconds.
    pub boot_to_utc_ns: i64,
    /// `CLOCK_MONOTONIC` minus boot time, nanoseconds; below zero after a suspend.
    pub boot_to_monotonic_ns: i64,
    /// Id of this boot of the host: two recordings with different ones do not belong together.
    pub boot_id: Box<str>,
    /// The host's name.
    pub host: Box<str>,
    /// Kernel release.
    pub kernel: Box<str>,
    /// Jiffies a second.
    pub hz: u32,
    /// Inode number of the network namespace of the recorder.
    pub netns: u32,
    /// Transitions are traced. Without, everything is known from looks alone.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub transitions: bool,
    /// The recorder was in a pid namespace of its own: looks number processes as that does, the probes
    /// as the initial one does.
    #[serde(default, skip_serializing_if = "is_false")]
    pub private_pids: bool,
    /// Stacks were asked for.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stacks: bool,
    /// How TIME_WAIT was followed.
    pub time_wait: Probes,
    /// How `accept()` was followed.
    pub accept: Probes,
    /// Which sockets were asked for. What was not may be in it all the same, in parts.
    pub sockets: Sockets,
}

/// Which kind of probes tells of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probes {
    /// Functions: fentry and fexit.
    Functions,
    /// Tracepoints.
    Tracepoints,
    /// None: not asked for, or neither kind could be loaded.
    None,
}

/// The addresses and ports of a socket. IPv4 addresses are kept as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// Local address.
    #[serde(with = "address")]
    pub local_addr: [u8; 16],
    /// Remote address.
    #[serde(with = "address")]
    pub remote_addr: [u8; 16],
    /// Local port, 0 while unknown.
    pub local_port: u16,
    /// Remote port, 0 for a listener.
    pub remote_port: u16,
}

impl Tuple {
    /// The local address as a person knows it: IPv4 as IPv4.
    #[must_use]
    pub fn local(&self) -> IpAddr {
        Ipv6Addr::from(self.local_addr).to_canonical()
    }

    /// The remote address as a person knows it: IPv4 as IPv4.
    #[must_use]
    pub fn remote(&self) -> IpAddr {
        Ipv6Addr::from(self.remote_addr).to_canonical()
    }
}

/// An IP address as the 16 bytes that a [`Tuple`] keeps.
#[must_use]
pub const fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

mod address {
    use super::{Deserialize, Deserializer, IpAddr, Ipv6Addr, Serializer, address_bytes};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 16], to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&Ipv6Addr::from(*bytes).to_canonical())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 16], D::Error> {
        IpAddr::deserialize(from).map(address_bytes)
    }
}

/// A process's short name (`comm`), up to 15 bytes, of any kind but zero.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Comm([u8; 16]);

impl Comm {
    /// From the kernel's bytes: everything from the first zero on is dropped.
    #[must_use]
    pub fn new(name: &[u8]) -> Self {
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().zip(name).take(15) {
            if *from == 0 {
                break;
            }
            *to = *from;
        }
        Self(bytes)
    }

    /// Its bytes, which need not be UTF-8.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(15);
        &self.0[..end]
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Printable(self.as_bytes()).fmt(f)
    }
}

/// A name that others have chosen, of which is printed what is printable. A process can call itself
/// anything, and so can whoever makes a cgroup: control characters, and bytes that are not UTF-8, come
/// out escaped (`\x1b`), so that no name can reach a terminal as a command.
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(pub &'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        for chunk in self.0.utf8_chunks() {
            for char in chunk.valid().chars() {
                if char.is_control() || is_format(char) {
                    write!(f, "{}", char.escape_default())?;
                } else {
                    f.write_char(char)?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Invisible characters that change how what follows is shown: line and paragraph separators, and the
/// marks that turn the direction of writing.
const fn is_format(char: char) -> bool {
    matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Comm {
    /// Bytes that are not UTF-8 cannot go into JSON: they are written as Latin-1 characters behind a
    /// zero, which no name contains.
    fn recorded(&self) -> Cow<'_, str> {
        match std::str::from_utf8(self.as_bytes()) {
            Ok(name) => name.into(),
            Err(_) => std::iter::once('\0')
                .chain(self.as_bytes().iter().map(|byte| char::from(*byte)))
                .collect(),
        }
    }
}

impl Serialize for Comm {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.recorded())
    }
}

impl<'de> Deserialize<'de> for Comm {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = Cow::<str>::deserialize(from)?;
        Ok(match name.strip_prefix('\0') {
            Some(latin1) => Self::new(
                &latin1
                    .chars()
                    .filter_map(|char| u8::try_from(char).ok())
                    .collect::<Vec<u8>>(),
            ),
            None => Self::new(name.as_bytes()),
        })
    }
}

/// The task that ran on the CPU when a record was written. Whether it has anything to do with the
/// socket is another question.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Process id.
    pub pid: u32,
    /// Name of the process (its first thread's).
    pub comm: Comm,
    /// When the process started.
    pub start: u64,
    /// Real user id.
    pub uid: u32,
    /// A kernel thread.
    #[serde(default, skip_serializing_if = "is_false")]
    pub kthread: bool,
    /// It was ending: what it closes, the kernel closes for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub exiting: bool,
    /// Its process descends from the one whose tree is watched, if any is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tree: bool,
}

impl Task {
    fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

/// What every record says of its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Its cookie: a connection's identity. 0 when the kernel never made one.
    #[serde(with = "cookie")]
    pub cookie: u64,
    /// Inode number of its network namespace.
    pub netns: u32,
    /// Addresses and ports.
    #[serde(flatten)]
    pub tuple: Tuple,
}

/// Cookies as `ss -e` prints them: hexadecimal, without prefix.
mod cookie {
    use super::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(cookie: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{cookie:x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(from)?;
        u64::from_str_radix(&text, 16).map_err(serde::de::Error::custom)
    }
}

/// A full socket changed its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// When.
    pub time: u64,
    /// Which socket.
    #[serde(flatten)]
    pub socket: Socket,
    /// The state left.
    #[serde(with = "state")]
    pub old: State,
    /// The state entered.
    #[serde(with = "state")]
    pub new: State,
    /// `sk_err`, an errno; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub error: u32,
    /// The local port of the connection before, when one begins anew on the same socket; else 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub stale_port: u16,
    /// `TCP_LINGER2` is below 0: FIN_WAIT2 ends without TIME_WAIT.
    #[serde(default, skip_serializing_if = "is_false")]
    pub no_time_wait: bool,
    /// `sk_shutdown`.
    pub shutdown: u8,
    /// Somebody was inside a call on this socket.
    pub owned: bool,
    /// A file could still be attached.
    pub has_socket: bool,
    /// Inode of its file, 0 without one.
    pub inode: u32,
    /// Cgroup it was made in, 0 when unknown.
    pub cgroup: u64,
    /// Who ran; all zeros where nobody can have made the change by a call or by ending.
    #[serde(default, skip_serializing_if = "Task::is_unknown")]
    pub task: Task,
}

/// A process got a connection from `accept()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// When.
    pub time: u64,
    /// Which socket.
    #[serde(flatten)]
    pub socket: Socket,
    /// Inode of its file, 0 while it has none.
    pub inode: u32,
    /// Who called.
    pub task: Task,
}

/// A process connected or accepted, and it is known where in its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Called {
    /// When.
    pub time: u64,
    /// Which socket.
    #[serde(with = "cookie")]
    pub cookie: u64,
    /// [`Stack::id`].
    pub stack: u32,
}

/// A stack of a process that connected or accepted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stack {
    /// Its number in this source, from 1.
    pub id: u32,
    /// Which call it is of.
    pub via: Via,
    /// The process that was seen there; 0 if there are no frames because of `end`: then it is of all of whom
    /// nothing else is known.
    pub pid: u32,
    /// Its frames, the innermost first.
    pub frames: Vec<Frame>,
    /// How many of the outermost were found by frame pointers, inlined functions not counted. Such can leave
    /// frames of code without frame pointers out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub by_frame_pointer: u32,
    /// Why there are no more.
    pub end: StackEnd,
}

/// A call by which a process gets a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// `connect()`, or another that connects as well.
    Connect,
    /// `accept()`.
    Accept,
}

/// Why a stack has no more frames than it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StackEnd {
    /// There are no more: the last is where the program or thread begins.
    Outermost,
    /// The frame pointer is zero: the outermost frame, or code without frame pointers.
    ZeroFramePointer,
    /// The chain of frame pointers ends here, at the outermost frame or at code without them.
    ChainEnd,
    /// Where a return address should be, there is none: what is there leads to no code, or cannot be read.
    NoCode,
    /// It is deeper than the part that was copied, and there is no chain of frame pointers to go on by.
    BeyondCopy,
    /// The stack could not be read: nothing of it was in memory.
    Unreadable,
    /// It is deeper than is followed.
    TooDeep,
    /// No code of a program called: io_uring's worker, or the like.
    NoUser,
    /// The program is for 32 bits, which is not supported.
    Bits32,
    /// The process had ended, or become another program, before its files could be opened.
    Gone,
    /// The process may not be looked at.
    NotPermitted,
    /// The recorder was in a pid namespace of its own, and cannot tell which process it is.
    PrivatePids,
    /// There were too many different stacks.
    TooMany,
    /// What looks up names has failed.
    NoNames,
    /// Too many stacks came at once, or the process has used up its share of CPU time: this one was given up.
    Overload,
    /// The unwind table of the last frame's file was not read; [`Frame::unread`] says why.
    Unread,
}

/// Why a file of a program was not read, or not all of it. What is in it was written by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unread {
    /// It ended the process that reads files.
    Crashed,
    /// Reading it took too long.
    TooSlow,
    /// It takes more memory than there is for reading files.
    TooLarge,
    /// Other files of this user's processes ended the process that reads files too often.
    Distrusted,
}

/// A function that is being called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Frame {
    /// Its name, made [printable](Printable); `None` if that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function: Option<Box<str>>,
    /// Its source file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<Box<str>>,
    /// The line of the call in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// The file with its code, by the path under which the process has it; `None` for code made at run time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<Box<str>>,
    /// Where its code is, as that file counts addresses; of code made at run time, the address in the
    /// process. Of a caller, the last byte of the call.
    pub address: u64,
    /// It is part of the function in the next frame: inlined.
    #[serde(skip_serializing_if = "is_false")]
    pub inlined: bool,
    /// Its code is in the program itself, and in no library.
    #[serde(skip_serializing_if = "is_false")]
    pub main: bool,
    /// Its code was made at run time.
    #[serde(skip_serializing_if = "is_false")]
    pub made: bool,
    /// Why the file, or the list of names of code made at run time, was not read, or not all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unread: Option<Unread>,
}

/// A timewait socket began, started again, or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeWait {
    /// When.
    pub time: u64,
    /// Which socket.
    #[serde(flatten)]
    pub socket: Socket,
    /// Jiffies at `time`.
    pub jiffies: u64,
    /// When its timer is due, in jiffies; 0 while it is not set.
    pub expires: u64,
    /// `CLOCK_MONOTONIC` milliseconds, cut to 32 bits, when it entered TIME_WAIT; 0 when unknown.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub entry_stamp: u32,
    /// `FIN_WAIT2` or `TIME_WAIT`.
    #[serde(with = "state")]
    pub substate: State,
    /// Bits of [`Caller`](kernel::Caller): who took the timer away before its time.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub callers: u8,
}

/// A look at the sockets that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// When it began. What happened later may or may not be in it.
    pub time: u64,
    /// What it shows.
    pub scope: Scope,
}

/// What a look shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Every socket.
    All,
    /// Timewait sockets.
    TimeWait,
    /// Sockets in TIME_WAIT that waited in FIN_WAIT2 for it. Nothing is said of others.
    Orphans,
    /// Sockets in these states, and listeners. Nothing is said of others.
    States(States),
}

/// A set of states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct States {
    mask: u16,
}

impl States {
    /// Every state.
    pub const ALL: Self = Self { mask: u16::MAX };

    /// Mask of [`State::bit`]s.
    #[must_use]
    pub const fn mask(self) -> u16 {
        self.mask
    }

    /// These and another one.
    #[must_use]
    pub const fn with(self, state: State) -> Self {
        Self {
            mask: self.mask | state.bit(),
        }
    }

    /// Whether `state` is one of them.
    #[must_use]
    pub const fn contains(self, state: State) -> bool {
        self.mask & state.bit() != 0
    }

    /// Whether all of `others` are.
    #[must_use]
    pub const fn contains_all(self, others: Self) -> bool {
        others.mask & !self.mask == 0
    }
}

impl FromIterator<State> for States {
    fn from_iter<T: IntoIterator<Item = State>>(states: T) -> Self {
        let mask = states.into_iter().fold(0, |mask, state| mask | state.bit());
        Self { mask }
    }
}

impl Serialize for States {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let states = State::ALL.into_iter().filter(|state| self.contains(*state));
        to.collect_seq(states.map(State::name))
    }
}

impl<'de> Deserialize<'de> for States {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Vec::<Cow<'_, str>>::deserialize(from)?
            .iter()
            .map(|name| state::of_name(name))
            .collect()
    }
}

/// A socket that exists, as `sock_diag` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// When it was seen.
    pub time: u64,
    /// Which socket.
    #[serde(flatten)]
    pub socket: Socket,
    /// Its state; of a timewait socket, FIN_WAIT2 or TIME_WAIT. CLOSE: the connection is over, the socket is
    /// in no table of the kernel, and a process still holds it.
    #[serde(with = "state")]
    pub state: State,
    /// Inode of its file; 0 without one: not accepted, orphaned, or a timewait socket.
    pub inode: u32,
    /// Cgroup it was made in, 0 when unknown.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cgroup: u64,
    /// Time until a timewait socket's timer is due, milliseconds; `None` for a full socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_wait_ms: Option<u32>,
    /// What it waits for; only where the look was asked for sockets in its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<Detail>,
}

/// What a full socket waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Detail {
    /// By how much it may be older than the row's `time`, in whole milliseconds: it took the kernel no longer
    /// to hand it over.
    #[serde(skip_serializing_if = "is_zero")]
    pub within_ms: u32,
    /// Bytes received and not read; the peer's FIN counts as one.
    pub recv_queue: u32,
    /// Bytes written and not acknowledged.
    pub send_queue: u32,
    /// How often what was sent last has been sent again, or a closed window was probed.
    #[serde(skip_serializing_if = "is_zero")]
    pub retransmits: u8,
    /// User that made the socket.
    pub uid: u32,
    /// Milliseconds since data was sent; `None` when not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_data_sent_ms: Option<u32>,
    /// Milliseconds since an ACK was received; a FIN carries one. `None` when not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_ack_recv_ms: Option<u32>,
    /// How a connection that is over came to its end: true if both sides closed in order, false after a
    /// reset or a time-out. `None` when that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orderly: Option<bool>,
}

/// When a full socket last moved. It comes after the socket's [`Row`] of the same look, because it is asked for in
/// another way, and not at all where the answer would take the lock of a socket that somebody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// When it was asked.
    pub time: u64,
    /// The socket's cookie.
    #[serde(with = "cookie")]
    pub cookie: u64,
    /// Its state then.
    #[serde(with = "state")]
    pub state: State,
    /// Milliseconds since data was sent.
    pub last_data_sent_ms: u32,
    /// Milliseconds since an ACK was received; a FIN carries one.
    pub last_ack_recv_ms: u32,
}

/// A descriptor by which a process holds a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Inode of the socket's file.
    pub inode: u32,
    /// The descriptor; recordings of the first version do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
    /// The process.
    pub pid: u32,
    /// Its name.
    pub comm: Comm,
    /// When it started.
    pub start: u64,
    /// It descends from the one whose tree is watched, if any is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tree: bool,
}

/// Who a process is. What could not be read is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it started: tells two processes of one pid apart.
    pub start: u64,
    /// Path of the program it runs, made [printable](Printable).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<Box<str>>,
    /// Its arguments, made printable and cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<Box<str>>,
    /// Its real user id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The systemd unit it runs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<Box<str>>,
    /// The container it runs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<Box<str>>,
    /// How many descriptors it may have (soft `RLIMIT_NOFILE`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_limit: Option<u64>,
    /// How many it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fds: Option<u32>,
    /// Its ids, from the pid namespace that `/proc` shows inwards to its own. One if that is the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ns_pids: Vec<u32>,
    /// Inode number of its network namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<u32>,
}

/// Records that never arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// When it was noticed.
    pub time: u64,
    /// How many since the last time: no room in the ring buffer.
    pub records: u64,
    /// How many times a probe could not run because it had interrupted itself.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub missed: u64,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When.
    pub time: u64,
    /// Records read from the ring buffer.
    pub records: u64,
    /// Records lost, of every kind.
    pub lost: u64,
    /// Transitions of MPTCP sockets, which are not covered.
    pub mptcp: u64,
}

mod state {
    use super::{Deserialize, Deserializer, Serializer, State};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(state: &State, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(state.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<State, D::Error> {
        of_name(&std::borrow::Cow::<str>::deserialize(from)?)
    }

    pub(super) fn of_name<E: serde::de::Error>(name: &str) -> Result<State, E> {
        State::ALL
            .into_iter()
            .find(|state| state.name() == name)
            .ok_or_else(|| E::custom(format_args!("no TCP state {name:?}")))
    }
}

const fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_true(value: &bool) -> bool {
    *value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Why a record could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No record is that short.
    #[error("a record of {0} bytes")]
    Short(usize),
    /// The kind is not known, or its length is another.
    #[error("a record of kind {kind} with {len} bytes")]
    Kind {
        /// The byte that tells the kind.
        kind: u8,
        /// Length in bytes.
        len: usize,
    },
    /// A state number that names no state.
    #[error("a record with TCP state number {0}")]
    State(u8),
}

/// Reads a record from the ring buffer. Any bytes will do: what is no record is an error.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(bytes: &[u8]) -> Result<Event, DecodeError> {
    let (header, _) =
        kernel::Header::read_from_prefix(bytes).map_err(|_| DecodeError::Short(bytes.len()))?;
    let kind = header.kind;
    let wrong = DecodeError::Kind {
        kind,
        len: bytes.len(),
    };
    if kind == Kind::Transition as u8 {
        let record = kernel::Transition::read_from_bytes(bytes).map_err(|_| wrong)?;
        transition(&record).map(Event::Transition)
    } else if kind == Kind::Accept as u8 {
        let header = kernel::Header::read_from_bytes(bytes).map_err(|_| wrong)?;
        Ok(Event::Accept(Accept {
            time: header.time,
            socket: socket(&header),
            inode: header.inode,
            task: task(&header),
        }))
    } else if kind == Kind::TimeWaitArmed as u8 {
        let record = kernel::TimeWait::read_from_bytes(bytes).map_err(|_| wrong)?;
        time_wait(&record).map(Event::TimeWaitArmed)
    } else if kind == Kind::TimeWaitDone as u8 {
        let record = kernel::TimeWait::read_from_bytes(bytes).map_err(|_| wrong)?;
        time_wait(&record).map(Event::TimeWaitDone)
    } else {
        Err(wrong)
    }
}

fn transition(record: &kernel::Transition) -> Result<Transition, DecodeError> {
    let header = &record.header;
    Ok(Transition {
        time: header.time,
        socket: socket(header),
        old: state_of(record.old)?,
        new: state_of(record.new)?,
        error: record.error.into(),
        stale_port: record.stale_port,
        no_time_wait: header.flags & Flags::NO_TIME_WAIT != 0,
        shutdown: record.shutdown,
        owned: header.flags & Flags::OWNED != 0,
        has_socket: header.flags & Flags::HAS_SOCKET != 0,
        inode: header.inode,
        cgroup: header.cgroup,
        task: task(header),
    })
}

fn time_wait(record: &kernel::TimeWait) -> Result<TimeWait, DecodeError> {
    Ok(TimeWait {
        time: record.header.time,
        socket: socket(&record.header),
        jiffies: record.jiffies,
        expires: record.expires,
        entry_stamp: record.entry_stamp,
        substate: state_of(record.substate)?,
        callers: record.callers,
    })
}

fn state_of(number: u8) -> Result<State, DecodeError> {
    State::from_number(number).ok_or(DecodeError::State(number))
}

const fn socket(header: &kernel::Header) -> Socket {
    Socket {
        cookie: header.cookie,
        netns: header.netns,
        tuple: Tuple {
            local_addr: header.local_addr,
            remote_addr: header.remote_addr,
            local_port: header.local_port,
            remote_port: header.remote_port,
        },
    }
}

fn task(header: &kernel::Header) -> Task {
    Task {
        pid: header.pid,
        comm: Comm::new(&header.comm),
        start: header.start,
        uid: header.uid,
        kthread: header.flags & Flags::KTHREAD != 0,
        exiting: header.flags & Flags::EXITING != 0,
        tree: header.flags & Flags::IN_TREE != 0,
    }
}

#[cfg(test)]
mod tests;
