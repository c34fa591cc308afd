//! What is said of the sockets.

use std::{net::IpAddr, rc::Rc};

use tcptrace_ebpf::State;

use super::{By, Counts};
use crate::event::{Comm, Socket};

/// How many sockets are in which state, at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// When it was looked, boot time nanoseconds.
    pub time: u64,
    /// How many network namespaces were looked into.
    pub namespaces: usize,
    /// All that were asked for.
    pub total: Counts,
    /// What they are told apart by, if by anything.
    pub by: Option<By>,
    /// The same sockets, told apart; the largest group first. Each socket is in one of them.
    pub groups: Vec<Group>,
}

/// Groups that are not shown one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// How many.
    pub groups: usize,
    /// Their sockets.
    pub counts: Counts,
}

impl Report {
    /// The `top` largest groups, and the rest in one, if there is any.
    #[must_use]
    pub fn top(&self, top: Option<usize>) -> (&[Group], Option<Rest>) {
        let shown = top.unwrap_or(usize::MAX).min(self.groups.len());
        let (shown, rest) = self.groups.split_at(shown);
        let mut counts = Counts::default();
        for group in rest {
            counts += group.counts;
        }
        let groups = rest.len();
        (shown, (groups > 0).then_some(Rest { groups, counts }))
    }
}

/// Sockets that have something in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What.
    pub key: Key,
    /// How many.
    pub counts: Counts,
    /// Each of them, if that was asked for.
    pub sockets: Vec<Listed>,
}

/// A single socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Which.
    pub socket: Socket,
    /// Its state.
    pub state: State,
    /// By which descriptors it is held: pid and number.
    pub fds: Vec<(u32, u32)>,
}

/// What the sockets of a group have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// These processes have it open, all of them, the lowest pid first; or, if nobody has accepted it, its
    /// listener.
    Held(Rc<[Process]>),
    /// No process has it: `TIME_WAIT`, an orphan.
    Nobody,
    /// It has a file, and no process was found that has that open.
    Unknown {
        /// User that made it.
        uid: u32,
    },
    /// Something listens on this local port.
    LocalPort(u16),
    /// Its remote port. Nothing listens on its local one.
    RemotePort(u16),
    /// Its remote address.
    Remote(IpAddr),
    /// It has no remote address: a listener.
    NoRemote,
    /// It was made in this container.
    Container(Rc<str>),
    /// It was made outside of any container.
    NoContainer,
    /// The kernel does not say where it was made.
    ContainerUnknown,
    /// It is in the network namespace with this inode number and, if it has one, this name.
    Netns(u32, Option<Rc<str>>),
}

/// A process that holds sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub comm: Comm,
}
