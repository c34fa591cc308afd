//! What the tracker tells.

use tcptrace_ebpf::State;

use super::{Ending, Owner};
use crate::event::{Activity, Holder, Look, Lost, Process, Row, Socket, Stack};

/// Something that is true, and was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fact<'a> {
    /// A socket changed its state.
    Change(Change<'a>),
    /// A TIME_WAIT ended.
    TimeWaitEnd(TimeWaitEnd<'a>),
    /// Records were lost.
    Lost(Lost),
    /// A look begins.
    Look(Look),
    /// It shows this socket, which [`Tracker::standing`](super::Tracker::standing) tells more of.
    Seen(&'a Row),
    /// When a socket that a look has shown last moved.
    Activity(&'a Activity),
    /// Somebody holds it.
    Holder(&'a Holder),
    /// Who that is.
    Process(&'a Process),
    /// The look is over; when.
    LookEnd(u64),
    /// What the stack of a [`Site`] is.
    Stack(&'a Stack),
    /// From where a connection was opened that is over, by its cookie: it has become known only now.
    Called(u64, Site),
}

/// Where in its code a process got a connection. There is one of each connection: four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site(u32);

impl Site {
    /// The connection's beginning was not seen.
    pub const BEFORE: Self = Self(0);
    /// It was, but not from where: nobody has accepted the connection, stacks are not recorded, or this one
    /// was lost.
    pub const UNTOLD: Self = Self(u32::MAX);

    /// The stack with this number.
    #[must_use]
    pub const fn stack(id: u32) -> Self {
        Self(id)
    }

    /// The number of the stack, if it is known.
    #[must_use]
    pub const fn id(self) -> Option<u32> {
        match self {
            Self::BEFORE | Self::UNTOLD => None,
            Self(id) => Some(id),
        }
    }
}

/// A socket that is still what a look showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing<'a> {
    /// Which socket; of one whose connection is over a look does not show the remote side.
    pub socket: Socket,
    /// When it entered its state, boot time nanoseconds; `None` when that was not seen.
    pub since: Option<u64>,
    /// Whose it was when last heard of.
    pub owner: Option<Owner>,
    /// From where it was connected or accepted.
    pub site: Site,
    /// Container the socket was made in.
    pub container: Option<&'a str>,
}

/// A change of state in the machine of RFC 9293, TIME_WAIT included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change<'a> {
    /// When it happened, boot time nanoseconds.
    pub time: u64,
    /// Which socket.
    pub socket: Socket,
    /// The state left.
    pub from: State,
    /// The state entered.
    pub to: State,
    /// Nanoseconds in the state left; `None` when its beginning was not seen.
    pub after: Option<u64>,
    /// Errno at a close; 0 without one.
    pub error: u32,
    /// Whose socket.
    pub owner: Option<Owner>,
    /// From where it was connected or accepted.
    pub site: Site,
    /// Container the socket was made in.
    pub container: Option<&'a str>,
    /// Nobody closed the socket: the end of its owner's process did.
    pub by_exit: bool,
    /// It became known only after it had happened.
    pub late: bool,
    /// By how much `time` and `after` can be off, nanoseconds, where only looks tell; 0 where more does.
    pub time_error: u64,
}

/// One TIME_WAIT, from its beginning to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimeWaitEnd<'a> {
    /// When it ended, boot time nanoseconds.
    pub time: u64,
    /// Which socket.
    pub socket: Socket,
    /// Whose it was: who closed first.
    pub owner: Option<Owner>,
    /// Container the socket was made in.
    pub container: Option<&'a str>,
    /// When it began; `None` when it never did, or is not known.
    pub entered: Option<u64>,
    /// How long it lasted, nanoseconds; `None` when not known.
    pub dwell: Option<u64>,
    /// The dwell is a lower bound: the minute may have started again unseen.
    pub dwell_at_least: bool,
    /// By how much the dwell can be off, nanoseconds, where only looks tell; 0 where more does.
    pub dwell_error: u64,
    /// How long FIN_WAIT2 had lasted before, nanoseconds; `None` without one, or when not known.
    pub fin_wait2: Option<u64>,
    /// Whether the minute was started again; `None` when that cannot be told.
    pub rearmed: Option<bool>,
    /// How it ended.
    pub ending: Ending,
}

/// A timewait socket that still exists.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Running<'a> {
    /// Which socket.
    pub socket: Socket,
    /// Whose: who closed first.
    pub owner: Option<Owner>,
    /// Container the socket was made in.
    pub container: Option<&'a str>,
    /// TIME_WAIT, or FIN_WAIT2 while the peer has not closed.
    pub state: State,
    /// Since when, boot time nanoseconds; `None` when not known.
    pub since: Option<u64>,
}

/// What the tracker would need next to go on. A live source sees to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// By this boot time an event, if only a tick: something is kept back until then.
    pub tick_by: Option<u64>,
    /// Now and then a look at TIME_WAIT: there are sockets that enter it without a record.
    pub time_wait_look: bool,
    /// When it is looked at what piles up, a look at everything: there are connections that are over, and
    /// their sockets perhaps still held.
    pub finished_look: bool,
}
