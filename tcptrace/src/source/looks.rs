//! Looks at what exists, without BPF: sockets from `sock_diag`, their holders from `/proc`, and the
//! count of TIME_WAITs that were skipped.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
};

use tcptrace_ebpf::State;

use crate::{
    event::{Comm, Event, Holder, Look, Row, Scope, Socket, Tuple, address_bytes},
    kernel::{
        clock,
        netns::{self, Namespaces},
        procfs,
        sock_diag::{ALL_STATES, Completeness, Entry, Query},
    },
};

/// A namespace of which no orphan was heard for so long has none: every look that shows one counts.
const ORPHAN_NS: u64 = 70_000_000_000;

/// Where to look, and what earlier looks found.
pub(super) struct Looks {
    /// Namespaces asked for, by inode number; all if empty.
    wanted: Vec<u32>,
    namespaces: Option<Namespaces>,
    /// Namespaces with timewait sockets in FIN_WAIT2, and when the last was heard of: where a look at
    /// TIME_WAIT may tell something.
    orphans: HashMap<u32, u64>,
    /// Those sockets, by cookie.
    waiting: HashSet<u64>,
    /// When `TCPTimeWaitOverflow` was last read, by namespace.
    overflow_read: HashMap<u32, u64>,
    /// It was read once for every namespace that there was.
    begun: bool,
}

/// What a look is worth.
pub(super) struct Looked {
    /// Namespaces of which everything was seen, or which are no more.
    pub(super) netns: Vec<u32>,
    /// What could not be looked at, a sentence each.
    pub(super) unseen: Vec<String>,
}

impl Looks {
    pub(super) fn new(wanted: Vec<u32>) -> Self {
        Self {
            wanted,
            namespaces: None,
            orphans: HashMap::new(),
            waiting: HashSet::new(),
            overflow_read: HashMap::new(),
            begun: false,
        }
    }

    /// A timewait socket waits in FIN_WAIT2 in this namespace.
    pub(super) fn orphan(&mut self, netns: u32, cookie: u64, time: u64) {
        self.orphans.insert(netns, time);
        self.waiting.insert(cookie);
    }

    /// It does not any more.
    pub(super) fn settled(&mut self, cookie: u64) {
        self.waiting.remove(&cookie);
    }

    /// Hands on all there is to see, from the beginning of the look on, but for its end.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        scope: Scope,
        each: &mut impl FnMut(&Event),
    ) -> io::Result<Looked> {
        let time = clock::boot_ns();
        each(&Event::Look(Look { time, scope }));
        self.orphans
            .retain(|_, last| time.saturating_sub(*last) < ORPHAN_NS);
        let everywhere = scope != Scope::Orphans;
        let known = self.namespaces.take_if(|known| {
            !everywhere && self.orphans.keys().all(|inode| known.get(*inode).is_some())
        });
        let namespaces = match known {
            Some(known) => known,
            None => Namespaces::discover()?,
        };
        let mut looked = Looked {
            // One that was there last time and is not any more has taken its sockets with it.
            netns: inodes(&self.namespaces)
                .filter(|inode| namespaces.get(*inode).is_none())
                .collect(),
            unseen: Vec::new(),
        };
        let mut files = HashSet::new();
        for namespace in namespaces.iter() {
            let inode = namespace.inode();
            if self.is_wanted(inode) && (everywhere || self.orphans.contains_key(&inode)) {
                self.dump(namespace, scope, &mut looked, &mut |row| {
                    files.extend((row.inode != 0).then_some(row.inode));
                    each(&Event::Socket(row));
                });
            }
        }
        // In a pid namespace of its own, /proc has other numbers than the probes: no name is better than
        // one that another process has.
        let numbered_alike = namespaces.unseen().hidden != Some(procfs::Hidden::PidNamespace);
        let all_held =
            scope == Scope::All && numbered_alike && holders(&files, each)? == files.len();
        // What could not be read may have been a namespace, or a holder; if neither is missed, never mind.
        let unseen = namespaces.unseen();
        if !unseen.is_empty() && (!all_held || self.wanted.is_empty()) {
            looked.unseen.push(unseen.to_string());
        }
        self.namespaces = Some(namespaces);
        Ok(looked)
    }

    /// Hands on the sockets of one namespace.
    fn dump(
        &mut self,
        namespace: &netns::Namespace,
        scope: Scope,
        looked: &mut Looked,
        each: &mut impl FnMut(Row),
    ) {
        let inode = namespace.inode();
        let mut diag = match namespace.diag() {
            Ok(diag) => diag,
            // Its sockets are gone as well.
            Err(netns::Error::Gone { .. }) => return looked.netns.push(inode),
            Err(error) => return looked.unseen.push(error.to_string()),
        };
        let query = Query {
            states: match scope {
                Scope::All => ALL_STATES,
                Scope::TimeWait | Scope::Orphans => State::TimeWait.bit() | State::FinWait2.bit(),
            },
            tcp_info: false,
        };
        let dumped = diag.dump(query, |entry| {
            if scope != Scope::All && !entry.is_timewait() {
                return;
            }
            let row = row(entry, inode);
            let waits = entry.is_timewait() && entry.state == State::FinWait2;
            let waited = if waits {
                self.orphans.insert(inode, row.time);
                !self.waiting.insert(entry.cookie)
            } else {
                self.waiting.remove(&entry.cookie)
            };
            // Of orphans, only what is new: there may be very many sockets in TIME_WAIT.
            if scope != Scope::Orphans || waited != waits {
                each(row);
            }
        });
        match dumped {
            Ok(Completeness::Complete) => looked.netns.push(inode),
            Ok(Completeness::Interrupted) => {}
            Err(error) => looked
                .unseen
                .push(format!("network namespace {inode}: {error}")),
        }
    }

    /// Reads how many TIME_WAITs were skipped so far: what came before the tracer is not its concern.
    pub(super) fn begin_overflows(&mut self, each: &mut impl FnMut(&Event)) {
        let known: Vec<u32> = inodes(&self.namespaces)
            .filter(|inode| self.is_wanted(*inode))
            .collect();
        for inode in known {
            self.read_overflow(inode, each);
        }
        self.begun = true;
    }

    /// Makes sure that the count includes what happened at `time`.
    pub(super) fn overflow(&mut self, netns: u32, time: u64, each: &mut impl FnMut(&Event)) {
        if self
            .overflow_read
            .get(&netns)
            .is_none_or(|read| *read <= time)
        {
            self.read_overflow(netns, each);
        }
    }

    fn read_overflow(&mut self, inode: u32, each: &mut impl FnMut(&Event)) {
        if !inodes(&self.namespaces).any(|known| known == inode) {
            self.namespaces = Namespaces::discover().ok();
        }
        let time = clock::boot_ns();
        let first = self.overflow_read.insert(inode, time).is_none();
        let namespaces = self.namespaces.as_ref();
        let Some(namespace) = namespaces.and_then(|namespaces| namespaces.get(inode)) else {
            return;
        };
        let Ok(counters) = namespace.tcp_ext() else {
            return;
        };
        // One that is newer than the tracer began to count at 0.
        let zero = (self.begun && first).then_some(0);
        for count in zero.into_iter().chain([counters.time_wait_overflow]) {
            each(&Event::Overflow {
                time,
                netns: inode,
                count,
            });
        }
    }

    fn is_wanted(&self, inode: u32) -> bool {
        self.wanted.is_empty() || self.wanted.contains(&inode)
    }
}

fn inodes(namespaces: &Option<Namespaces>) -> impl Iterator<Item = u32> {
    namespaces
        .iter()
        .flat_map(Namespaces::iter)
        .map(netns::Namespace::inode)
}

/// Hands on who holds these sockets. Returns of how many that is known.
fn holders(files: &HashSet<u32>, each: &mut impl FnMut(&Event)) -> io::Result<usize> {
    let mut held = HashSet::new();
    let mut processes: HashMap<u32, Option<(Comm, u64)>> = HashMap::new();
    procfs::holders(files, |found| {
        let process = processes.entry(found.pid).or_insert_with(|| {
            procfs::process(found.pid).map(|process| (process.comm, process.start))
        });
        if let Some((comm, start)) = *process {
            held.insert(found.inode);
            each(&Event::Holder(Holder {
                inode: found.inode,
                pid: found.pid,
                comm,
                start,
            }));
        }
    })?;
    Ok(held.len())
}

fn row(entry: &Entry, netns: u32) -> Row {
    let bytes = |addr: SocketAddr| address_bytes(addr.ip());
    Row {
        time: clock::boot_ns(),
        socket: Socket {
            cookie: entry.cookie,
            netns,
            tuple: Tuple {
                local_addr: bytes(entry.local),
                remote_addr: bytes(entry.remote),
                local_port: entry.local.port(),
                remote_port: entry.remote.port(),
            },
        },
        state: entry.state,
        inode: entry.inode,
        cgroup: entry.cgroup.unwrap_or(0),
        time_wait_ms: entry.is_timewait().then_some(entry.expires_ms),
    }
}
