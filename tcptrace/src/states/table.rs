//! From what a look shows to a report. Pure.

use std::{
    borrow::Cow,
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    rc::Rc,
};

use hashbrown::{HashMap, HashSet};
use tcptrace_ebpf::State;

use super::{By, Counts, Group, Key, Listed, Options, Process, Report, Seen};
use crate::{
    container,
    event::Holder,
    select::{Selection, Verdict},
    tracker::{Owner, Via},
};

/// Counts the sockets that a look shows.
#[derive(Debug)]
pub struct Table<'a> {
    options: &'a Options,
    /// Sockets that were counted, by cookie and ports: in tables that change meanwhile, a dump can show one
    /// twice. (One socket that connects again leaves timewait sockets with its cookie and other ports.)
    known: HashSet<(u64, u16, u16)>,
    /// By network namespace and port.
    listeners: HashMap<(u32, u16), Vec<Listener>>,
    /// Names of network namespaces.
    names: HashMap<u32, Rc<str>>,
    /// Containers, by the cgroup's id.
    containers: HashMap<u64, Key>,
    /// Sockets that were asked for, as far as it has to be known who holds them to count them.
    waiting: Vec<Seen>,
    /// Inodes of which the holders are wanted.
    wanted: HashSet<u32>,
    /// By inode. Sorted when all are known.
    holders: Vec<Held>,
    /// Of some, nobody was among them.
    has_unknown: bool,
    counted: Counted,
}

/// A socket in LISTEN.
#[derive(Clone, Copy, Debug)]
struct Listener {
    addr: IpAddr,
    inode: u32,
    uid: u32,
}

/// A descriptor of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    inode: u32,
    process: Process,
    start: u64,
    fd: Option<u32>,
}

/// What has been counted.
#[derive(Debug, Default)]
struct Counted {
    total: Counts,
    groups: HashMap<Key, (Counts, Vec<Listed>)>,
    /// Each set of processes once.
    sets: HashMap<Vec<Process>, Rc<[Process]>>,
}

impl<'a> Table<'a> {
    /// An empty one.
    #[must_use]
    pub fn new(options: &'a Options) -> Self {
        Self {
            options,
            known: HashSet::new(),
            listeners: HashMap::new(),
            names: HashMap::new(),
            containers: HashMap::new(),
            waiting: Vec::new(),
            wanted: HashSet::new(),
            holders: Vec::new(),
            has_unknown: false,
            counted: Counted::default(),
        }
    }

    /// The name of a network namespace, before its sockets.
    pub fn namespace(&mut self, inode: u32, name: Option<&str>) {
        if let Some(name) = name {
            self.names.insert(inode, name.into());
        }
    }

    /// Whether the path of this cgroup is wanted.
    #[must_use]
    pub fn wants_cgroup(&self, id: u64) -> bool {
        id != 0 && self.options.needs_containers() && !self.containers.contains_key(&id)
    }

    /// The path of a cgroup, before its sockets; `None` if it is not to be had.
    pub fn cgroup(&mut self, id: u64, path: Option<&str>) {
        let key = match path.map(container::of_cgroup) {
            None => Key::ContainerUnknown,
            Some(None) => Key::NoContainer,
            Some(Some(container)) => Key::Container(container.into()),
        };
        self.containers.insert(id, key);
    }

    /// A socket. The listeners of a network namespace come before the others, asked for or not.
    pub fn add(&mut self, seen: &Seen) {
        if seen.state == State::Listen {
            let at = (seen.socket.netns, seen.local_port());
            self.listeners.entry(at).or_default().push(Listener {
                addr: seen.local(),
                inode: seen.inode,
                uid: seen.uid,
            });
            // Of what waits there, its holder is the one to name.
            if self.options.needs_holders() {
                self.wanted.insert(seen.inode);
            }
        }
        let Selection {
            sockets, states, ..
        } = &self.options.selection;
        if !(states.is_empty() || states.contains(&seen.state))
            || sockets.socket(&seen.socket) != Verdict::Yes
        {
            return;
        }
        let tuple = &seen.socket.tuple;
        let id = (seen.socket.cookie, tuple.local_port, tuple.remote_port);
        if !self.known.insert(id) {
            return;
        }
        if self.options.needs_holders() {
            if seen.inode != 0 {
                self.wanted.insert(seen.inode);
            }
            self.waiting.push(*seen);
        } else {
            self.count(seen, &[]);
        }
    }

    /// Whether it is wanted who holds the socket with this inode.
    #[must_use]
    pub fn wants(&self, inode: u32) -> bool {
        self.wanted.contains(&inode)
    }

    /// Inodes of the sockets of which it has to be known.
    pub(super) fn wanted(&self) -> &HashSet<u32> {
        &self.wanted
    }

    /// A descriptor of a socket, after all sockets.
    pub fn holder(&mut self, holder: &Holder) {
        self.holders.push(Held {
            inode: holder.inode,
            process: Process {
                pid: holder.pid,
                comm: holder.comm,
            },
            start: holder.start,
            fd: holder.fd,
        });
    }

    /// Whether there are sockets that have a file, and nobody was found who has it open.
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        self.has_unknown
    }

    /// All holders are known.
    pub fn attribute(&mut self) {
        let mut holders = std::mem::take(&mut self.holders);
        // Stable, because it makes use of order that is there: a process's sockets are mostly in the order of inodes.
        holders.sort();
        // One can be shown twice.
        holders.dedup();
        for seen in std::mem::take(&mut self.waiting) {
            self.has_unknown |= seen.inode != 0 && held(&holders, seen.inode).is_empty();
            self.count(&seen, &holders);
        }
    }

    /// What has been counted: at `time`, boot time nanoseconds, in so many namespaces.
    #[must_use]
    pub fn report(self, time: u64, namespaces: usize) -> Report {
        let groups = self.counted.groups.into_iter();
        let mut groups: Vec<Group> = groups
            .map(|(key, (counts, sockets))| Group {
                key,
                counts,
                sockets,
            })
            .collect();
        groups.sort_by(|a, b| {
            let by = |group: &Group| Reverse(group.counts.sockets());
            by(a).cmp(&by(b)).then_with(|| a.key.cmp(&b.key))
        });
        for group in &mut groups {
            group.sockets.sort_by_key(|one| {
                let tuple = &one.socket.tuple;
                let there = (tuple.remote(), tuple.remote_port);
                let listens = one.state == State::Listen;
                (!listens, tuple.local(), tuple.local_port, there)
            });
        }
        Report {
            time,
            namespaces,
            total: self.counted.total,
            by: self.options.by,
            groups,
        }
    }

    fn count(&mut self, seen: &Seen, holders: &[Held]) {
        let options = self.options;
        let container = match self.containers.get(&seen.cgroup) {
            Some(Key::Container(container)) => Some(&**container),
            _ => None,
        };
        let own = held(holders, seen.inode);
        let held = if seen.waits_at_listener() {
            let listeners = self.listeners_of(seen);
            let held = listeners.flat_map(|listener| held(holders, listener.inode));
            Cow::Owned(held.copied().collect())
        } else {
            Cow::Borrowed(own)
        };
        let fits = |owner: Option<&Owner>| options.selection.owner(owner, container);
        let fits = if held.is_empty() {
            fits(None)
        } else {
            held.iter().any(|held| fits(Some(&held.owner())))
        };
        if !fits {
            return;
        }
        self.counted.total.add(seen);
        let Some(by) = options.by else { return };
        let key = match by {
            By::Process => self.whose(seen, &held),
            By::Port => self.port(seen),
            By::Remote if seen.state == State::Listen => Key::NoRemote,
            By::Remote => Key::Remote(seen.socket.tuple.remote()),
            By::Container => self
                .containers
                .get(&seen.cgroup)
                .map_or(Key::ContainerUnknown, Clone::clone),
            By::Netns => {
                let netns = seen.socket.netns;
                Key::Netns(netns, self.names.get(&netns).cloned())
            }
        };
        let (counts, sockets) = self.counted.groups.entry(key).or_default();
        counts.add(seen);
        if options.fds {
            sockets.push(Listed {
                socket: seen.socket,
                state: seen.state,
                fds: own
                    .iter()
                    .filter_map(|held| Some((held.process.pid, held.fd?)))
                    .collect(),
            });
        }
    }

    /// By process. `held`: the descriptors of the socket, or of its listener.
    fn whose(&mut self, seen: &Seen, held: &[Held]) -> Key {
        if held.is_empty() {
            let listener = || self.listeners_of(seen).next();
            return match listener().filter(|_| seen.waits_at_listener()) {
                Some(listener) => Key::Unknown { uid: listener.uid },
                None if seen.inode == 0 => Key::Nobody,
                None => Key::Unknown { uid: seen.uid },
            };
        }
        let mut processes: Vec<Process> = held.iter().map(|held| held.process).collect();
        processes.sort_unstable();
        processes.dedup();
        let sets = &mut self.counted.sets;
        if let Some(known) = sets.get(&processes) {
            return Key::Held(Rc::clone(known));
        }
        let set: Rc<[Process]> = processes.as_slice().into();
        sets.insert(processes, Rc::clone(&set));
        Key::Held(set)
    }

    fn port(&self, seen: &Seen) -> Key {
        let tuple = &seen.socket.tuple;
        let at = (seen.socket.netns, tuple.local_port);
        if self.listeners.contains_key(&at) {
            Key::LocalPort(tuple.local_port)
        } else {
            Key::RemotePort(tuple.remote_port)
        }
    }

    /// The listeners that a connection may wait at: several, where processes share an address
    /// (`SO_REUSEPORT`).
    fn listeners_of(&self, seen: &Seen) -> impl Iterator<Item = &Listener> {
        let at = (seen.socket.netns, seen.local_port());
        let listeners = self.listeners.get(&at).map_or(&[][..], Vec::as_slice);
        let local = seen.local();
        // One bound to the very address goes before one for all of its family, and that before one for all.
        let any: IpAddr = match local {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let bound = [local, any, Ipv6Addr::UNSPECIFIED.into()]
            .into_iter()
            .find(|addr| listeners.iter().any(|listener| listener.addr == *addr));
        listeners
            .iter()
            .filter(move |listener| Some(listener.addr) == bound)
    }
}

impl Held {
    fn owner(&self) -> Owner {
        Owner {
            pid: self.process.pid,
            comm: self.process.comm,
            start: self.start,
            via: Via::Holder,
            tree: false,
        }
    }
}

/// The descriptors of the socket with this inode.
fn held(holders: &[Held], inode: u32) -> &[Held] {
    let from = holders.partition_point(|held| held.inode < inode);
    let rest = &holders[from..];
    let held = rest.iter().take_while(|held| held.inode == inode);
    &rest[..held.count()]
}
