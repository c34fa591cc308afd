//! Whose socket it is, and how that is known.

use std::fmt;

use tcptrace_ebpf::State;

use crate::event::{Comm, Task, Transition};

/// A process that a socket belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Process id, as the initial pid namespace numbers it.
    pub pid: u32,
    /// The process's name when this became known. It is kept after the process ends.
    pub comm: Comm,
    /// When the process started, boot time nanoseconds: tells two processes of the same pid apart.
    pub start: u64,
    /// How it is known.
    pub via: Via,
    /// It descends from the process whose tree is watched.
    pub tree: bool,
}

/// How an owner is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// It called `connect()`.
    Connect,
    /// It got the connection from `accept()`.
    Accept,
    /// It called `listen()`.
    Listen,
    /// It closed the socket, or its sending side.
    Close,
    /// A look found the socket among its files.
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
            tree: task.tree,
        }
    }

    /// Whether both are the same process, not only the same pid.
    #[must_use]
    pub const fn is_same_process(&self, other: &Self) -> bool {
        let (own, others) = (self.process(), other.process());
        own.0 == others.0 && own.1 == others.1
    }

    /// What names a process for good: its pid, and when it started, cut to hundredths of a second as in
    /// `/proc`.
    #[must_use]
    pub const fn process(&self) -> (u32, u64) {
        const TICK_NS: u64 = 10_000_000;
        (self.pid, self.start - self.start % TICK_NS)
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
    if is_call(transition)
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

/// Whether what is known of a socket shows that an accept record is not of it. Where only tracepoints follow
/// `accept()`, the record is of the socket that its descriptor leads to when the call returns, and another thread can
/// have put another socket there (`dup2()`). A socket is accepted once, and never one that connected or listens.
pub(super) const fn refutes_accept(known: Option<Owner>, state: State, caller: &Owner) -> bool {
    if matches!(state, State::Listen) {
        return true;
    }
    let Some(known) = known else {
        return false;
    };
    match known.via {
        Via::Connect | Via::Listen => true,
        // It may have shut it down before the call had returned in another thread.
        Via::Accept | Via::Close => !known.is_same_process(caller),
        // A scan saw who held it then, and of a listener's process it was only expected.
        Via::Holder | Via::Listener => false,
    }
}

/// Whether a caller made this change, and is the task that ran.
pub(super) fn is_call(transition: &Transition) -> bool {
    transition.owned && !transition.task.kthread && call(transition).is_some()
}

/// Whether the end of the owner's process made this change, and no call of it: `do_exit()` gives up what
/// files are still open, and connections that a listener's queue still holds. `owner`: after the change.
pub(super) fn is_exit(transition: &Transition, owner: Option<Owner>) -> bool {
    let ended = Owner::caller(&transition.task, Via::Close);
    transition.task.exiting && owner.is_some_and(|owner| owner.is_same_process(&ended))
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
