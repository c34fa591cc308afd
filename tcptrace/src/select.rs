//! Which sockets a person asked for.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use tcptrace_ebpf::{Config, Network, Select, State};

use crate::{
    event::{Comm, Socket, Tuple, address_bytes},
    tracker::Owner,
};

/// A range of addresses, IPv4 as part of `::ffff:0:0/96`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cidr {
    /// The network's address, host bits zero.
    pub addr: [u8; 16],
    /// The mask.
    pub mask: [u8; 16],
}

impl Cidr {
    /// The network of `addr` with a prefix of `len` bits, counted in the address's own family; `None`
    /// when it has not so many.
    #[must_use]
    pub fn new(addr: IpAddr, len: u8) -> Option<Self> {
        let (bits, before) = if addr.is_ipv4() { (32, 96) } else { (128, 0) };
        if len > bits {
            return None;
        }
        let len = u32::from(len) + before;
        let mask = u128::MAX.checked_shl(128 - len).unwrap_or(0);
        let addr = u128::from_be_bytes(address_bytes(addr)) & mask;
        Some(Self {
            addr: addr.to_be_bytes(),
            mask: mask.to_be_bytes(),
        })
    }

    /// Whether the address lies in the network.
    #[must_use]
    pub fn contains(&self, addr: &[u8; 16]) -> bool {
        u128::from_ne_bytes(*addr) & u128::from_ne_bytes(self.mask)
            == u128::from_ne_bytes(self.addr)
    }
}

/// What is asked for. An empty list asks for everything; within a list any will do, and all lists
/// must agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Which sockets.
    pub sockets: Sockets,
    /// Process ids of owners.
    pub pids: Vec<u32>,
    /// Names of owners.
    pub comms: Vec<Comm>,
    /// Containers, by name or by the beginning of their id.
    pub containers: Vec<String>,
    /// States left or entered.
    pub states: Vec<State>,
    /// Only what belongs to processes of the tree that is watched.
    pub tree: bool,
    /// Also sockets whose connection is over while a process still holds them.
    pub finished: bool,
    /// What has to be known of them.
    pub knowledge: Knowledge,
}

/// What has to be known of sockets: it decides what the probes record, and so what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Knowledge {
    /// Whose they are from their beginning: who connected, listened, accepted, closed.
    #[default]
    Owners,
    /// How long they are in the states that were asked for. Who holds them is looked up.
    Dwell,
}

/// The part of a [`Selection`] that a socket itself decides. A recording says which was in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sockets {
    /// Ports, on either side.
    pub ports: Vec<u16>,
    /// Local ports.
    pub local_ports: Vec<u16>,
    /// Remote ports.
    pub remote_ports: Vec<u16>,
    /// Networks that the local or the remote address lies in.
    pub networks: Vec<Cidr>,
    /// IPv4 (4) or IPv6 (6) only; `None` for both. IPv4 in IPv6 is IPv4.
    pub family: Option<u8>,
    /// Network namespaces, by inode number.
    pub netns: Vec<u32>,
}

/// Whether a socket is one that was asked for. Of two verdicts the lower counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It is not.
    No,
    /// It depends on the local port, which it has not got yet.
    Open,
    /// It is.
    Yes,
}

impl Selection {
    /// Judges by the owner, and the container the socket was made in.
    #[must_use]
    pub fn owner(&self, owner: Option<&Owner>, container: Option<&str>) -> bool {
        (self.pids.is_empty() || owner.is_some_and(|owner| self.pids.contains(&owner.pid)))
            && (!self.tree || owner.is_some_and(|owner| owner.tree))
            && (self.comms.is_empty()
                || owner.is_some_and(|owner| self.comms.contains(&owner.comm)))
            && (self.containers.is_empty()
                || container.is_some_and(|container| {
                    self.containers
                        .iter()
                        .any(|wanted| container.starts_with(wanted.as_str()))
                }))
    }

    /// Judges a transition by its states.
    #[must_use]
    pub fn states(&self, from: State, to: State) -> bool {
        self.states.is_empty() || self.states.contains(&from) || self.states.contains(&to)
    }

    /// What the probes can decide of it. With more values of a kind than they compare with, they decide nothing of
    /// that.
    #[must_use]
    pub fn to_config(&self) -> Config {
        let mut config = self.sockets.to_config();
        for old in State::ALL {
            for new in State::ALL {
                if !self.needs(old, new) {
                    config.wanted[old as usize] &= !new.bit();
                }
            }
        }
        config
    }

    /// Whether `accept()` has to be followed.
    #[must_use]
    pub fn needs_accept(&self) -> bool {
        self.knowledge == Knowledge::Owners
    }

    /// Whether TIME_WAIT has to be followed to tell what was asked for.
    #[must_use]
    pub fn needs_time_wait(&self) -> bool {
        // Without it, a change to CLOSE from these is not known for what it is.
        let states = [
            State::TimeWait,
            State::FinWait2,
            State::Closing,
            State::Close,
        ];
        self.states.is_empty() || states.iter().any(|state| self.states.contains(state))
    }

    /// Whether a transition must be known: because it was asked for, because it begins the time in a
    /// state whose end was asked for, because it tells of an owner, or because it is an end.
    fn needs(&self, old: State, new: State) -> bool {
        if self.knowledge == Knowledge::Dwell {
            return new == State::Close || self.states(old, new);
        }
        let skippable = matches!(
            (old, new),
            (State::Established, State::CloseWait)
                | (State::FinWait1, State::FinWait2 | State::Closing)
        );
        // Each of them is left only for CLOSE, TIME_WAIT or LAST_ACK.
        let left_for = [State::Close, State::TimeWait, State::LastAck];
        !skippable
            || self.states(old, new)
            || left_for.iter().any(|state| self.states.contains(state))
    }
}

impl Sockets {
    /// Judges a socket by its addresses, ports and namespace.
    #[must_use]
    pub fn socket(&self, socket: &Socket) -> Verdict {
        let tuple = &socket.tuple;
        let any = |wanted: &[u16], port| wanted.is_empty() || wanted.contains(&port);
        if !(self.netns.is_empty() || self.netns.contains(&socket.netns))
            || !self.is_family(tuple)
            || !any(&self.remote_ports, tuple.remote_port)
            || !(self.networks.is_empty()
                || self.networks.iter().any(|network| {
                    network.contains(&tuple.local_addr) || network.contains(&tuple.remote_addr)
                }))
        {
            return Verdict::No;
        }
        let local = any(&self.local_ports, tuple.local_port);
        let either = any(&self.ports, tuple.local_port) || any(&self.ports, tuple.remote_port);
        if local && either {
            Verdict::Yes
        } else if tuple.local_port == 0 {
            Verdict::Open
        } else {
            Verdict::No
        }
    }

    fn is_family(&self, tuple: &Tuple) -> bool {
        match self.family {
            None => true,
            Some(4) => tuple.remote().is_ipv4() || tuple.local().is_ipv4(),
            Some(_) => !tuple.remote().is_ipv4(),
        }
    }

    fn to_config(&self) -> Config {
        let mut config = Config::ALL;
        let mut selects = 0;
        let mut by = |filter, in_force| selects |= if in_force { filter } else { 0 };
        by(Select::NETNS, fill(&mut config.netns, &self.netns));
        by(
            Select::LOCAL_PORT,
            fill(&mut config.local_ports, &self.local_ports),
        );
        by(
            Select::REMOTE_PORT,
            fill(&mut config.remote_ports, &self.remote_ports),
        );
        by(Select::ANY_PORT, fill(&mut config.any_ports, &self.ports));
        let networks: Vec<Network> = self.networks.iter().map(network).collect();
        by(Select::NETWORK, fill(&mut config.networks, &networks));
        by(Select::FAMILY, self.family.is_some());
        config.family = self.family.map_or(0, u32::from);
        config.selects = selects;
        config
    }
}

/// Puts the values into a list of the probes' settings, if there are any and they all fit. Where they do not, the
/// probes let everything pass.
fn fill<T: Copy, const N: usize>(list: &mut [T; N], values: &[T]) -> bool {
    let [first, ..] = values else { return false };
    if values.len() > N {
        return false;
    }
    for (index, place) in list.iter_mut().enumerate() {
        *place = *values.get(index).unwrap_or(first);
    }
    true
}

/// A network as the probes compare addresses with it.
fn network(cidr: &Cidr) -> Network {
    Network {
        addr: words(cidr.addr),
        mask: words(cidr.mask),
    }
}

/// 16 bytes as the probes compare them.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
    }
    words
}

#[cfg(test)]
mod tests;
