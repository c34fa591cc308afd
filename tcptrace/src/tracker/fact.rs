//! What the tracker tells.

use tcptrace_ebpf::State;

use super::{Ending, Owner};
use crate::event::{Lost, Socket};

/// Something that is true, and was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fact<'a> {
    /// A socket changed its state.
    Change(Change<'a>),
    /// A TIME_WAIT ended.
    TimeWaitEnd(TimeWaitEnd<'a>),
    /// Records were lost.
    Lost(Lost),
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
    /// Container the socket was made in.
    pub container: Option<&'a str>,
    /// It became known only after it had happened.
    pub late: bool,
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
}
