//! `tcptrace states`: how many sockets are in which state, and whose they are, at this moment.
//!
//! One look and no history: [`look()`] dumps the tables of `sock_diag`, and `/proc` only if it is asked whose the
//! sockets are. A [`Table`] counts, without I/O; what it says is a [`Report`].

mod count;
mod json;
mod look;
mod report;
mod table;
mod text;

use std::net::IpAddr;

use clap::ValueEnum;
use tcptrace_ebpf::State;

use crate::{event::Socket, select::Selection};

pub use count::{Count, Counts};
pub use json::write as write_json;
pub use look::{Looked, look};
pub use report::{Group, Key, Listed, Process, Report, Rest};
pub use table::Table;
pub use text::compose;

/// What to count.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which sockets; its states are those that a socket may be in.
    pub selection: Selection,
    /// What to tell apart.
    pub by: Option<By>,
    /// Also every single socket, and the descriptors by which it is held.
    pub fds: bool,
}

impl Options {
    /// Whether it has to be known who holds the sockets.
    #[must_use]
    pub fn needs_holders(&self) -> bool {
        let Selection { pids, comms, .. } = &self.selection;
        self.fds || self.by == Some(By::Process) || !pids.is_empty() || !comms.is_empty()
    }

    /// Whether it has to be known in which container they were made.
    #[must_use]
    pub fn needs_containers(&self) -> bool {
        self.by == Some(By::Container) || !self.selection.containers.is_empty()
    }
}

/// What sockets are told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// The processes that hold it
    Process,
    /// The local port where something listens on it, else the remote one
    Port,
    /// The remote address
    Remote,
    /// The container it was made in
    Container,
    /// The network namespace it is in
    Netns,
}

impl By {
    /// As it is typed, and written in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Port => "port",
            Self::Remote => "remote",
            Self::Container => "container",
            Self::Netns => "netns",
        }
    }
}

/// A socket, as a look shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub socket: Socket,
    /// Its state; of a timewait socket the one it stands for.
    pub state: State,
    /// Inode of its file; 0 without one.
    pub inode: u32,
    /// Id of the cgroup it was made in; 0 if the kernel does not say.
    pub cgroup: u64,
    /// User that made it.
    pub uid: u32,
}

impl Seen {
    /// Its process has closed it, and the kernel ends the connection alone. (So it is in `TIME_WAIT`, but there
    /// nobody would expect a process.)
    #[must_use]
    pub fn is_orphaned(&self) -> bool {
        use State::{Closing, FinWait1, FinWait2, LastAck};
        self.inode == 0 && matches!(self.state, FinWait1 | FinWait2 | Closing | LastAck)
    }

    /// It is complete, and no process has called `accept()` for it.
    #[must_use]
    pub fn is_not_accepted(&self) -> bool {
        self.inode == 0 && matches!(self.state, State::Established | State::CloseWait)
    }

    /// It is in a listener's queue: no process has got it yet.
    fn waits_at_listener(&self) -> bool {
        self.is_not_accepted() || self.inode == 0 && self.state == State::SynRecv
    }

    fn local(&self) -> IpAddr {
        self.socket.tuple.local()
    }

    fn local_port(&self) -> u16 {
        self.socket.tuple.local_port
    }
}

#[cfg(test)]
mod tests;
