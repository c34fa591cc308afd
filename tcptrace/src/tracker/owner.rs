//! Whose socket it is, and how that is known.

use std::fmt;

use tcptrace_ebpf::State;

use crate::event::{Comm, Task, Transition};

/// A process that a socket belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Process id, as the initial pid namespace numbers it.
    pub pid: u32,
    /// The process's name when this became known. It is kept after the process ends.
    pub comm: Comm,
    /// When the process started, boot time nanoseconds: tells two processes of the same pid apart.
    pub start: u64,
    /// How it is known.
    pub via: Via,
}

/// How an owner is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// It called `connect()`.
    Connect,
    /// It got the connection from `accept()`.
    Accept,
    /// It called `listen()`.
    Listen,
    /// It closed the socket, or its sending side.
    Close,
    /// A look at `/proc` found the socket among its files.
    Holder,
    /// Nobody has accepted the connection; the listener is this process's.
    Listener,
}

impl Via {
    /// As it is written in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Accept => "accept",
            Self::Listen => "listen",
            Self::Close => "close",
            Self::Holder => "holder",
            Self::Listener => "listener",
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Owner {
    /// The process that ran, known to be the owner by what it did.
    #[must_use]
    pub const fn caller(task: &Task, via: Via) -> Self {
        Self {
            pid: task.pid,
            comm: task.comm,
            start: task.start,
            via,
        }
    }

    /// Whether both are the same process, not only the same pid.
    #[must_use]
    pub const fn is_same_process(&self, other: &Self) -> bool {
        // `/proc` gives the start in hundredths of a second, cut off.
        const TICK_NS: u64 = 10_000_000;
        self.pid == other.pid && self.start / TICK_NS == other.start / TICK_NS
    }
}

/// Who owns the socket after a transition, given who did before.
///
/// The task that ran counts only when it held the socket's lock for a call that makes this very
/// change. In softirq it is whoever was interrupted; in a lock owner's backlog it changes what the
/// peer sent, not what it called.
pub(super) fn after(
    transition: &Transition,
    known: Option<Owner>,
    listener: impl FnOnce() -> Option<Owner>,
) -> Option<Owner> {
    if transition.owned
        && !transition.task.kthread
        && let Some(via) = call(transition)
    {
        let caller = Owner::caller(&transition.task, via);
        return Some(match known {
            // Closed by whoever was known already: how it was known first says more.
            Some(known) if via == Via::Close && known.is_same_process(&caller) => Owner {
                via: known.via,
                ..caller
            },
            _ => caller,
        });
    }
    if (transition.old, transition.new) == (State::Listen, State::SynRecv) {
        return listener();
    }
    match known {
        // It has a file now, so somebody accepted it, unseen: not necessarily the listener's process.
        Some(owner) if owner.via == Via::Listener && transition.has_socket => None,
        known => known,
    }
}

/// The call that makes this change; `None` when the kernel makes it by itself.
const fn call(transition: &Transition) -> Option<Via> {
    use State::{Close, CloseWait, Established, FinWait1, LastAck, Listen, SynRecv, SynSent};
    match (transition.old, transition.new) {
        (Close, SynSent) => Some(Via::Connect),
        (Close, Listen) => Some(Via::Listen),
        (Established | SynRecv, FinWait1) | (CloseWait, LastAck) => Some(Via::Close),
        // With an error it was the peer (RST), the network (time-out) or `ss -K`.
        (SynSent | SynRecv | Established | CloseWait | Listen, Close) if transition.error == 0 => {
            Some(Via::Close)
        }
        _ => None,
    }
}
