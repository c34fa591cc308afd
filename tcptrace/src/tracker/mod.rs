//! Events in, connections out: the true TCP state machine of every socket, since when, and whose.
//!
//! The tracker is pure. It reads no clock and asks nobody: time comes with the events, and the same
//! events give the same [facts](Fact), live or from a file.

mod change;
mod fact;
mod finished;
mod listeners;
mod lives;
mod look;
mod owner;
mod owners;
mod table;
mod time_wait;
mod unnamed;

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, num::NonZero};

use hashbrown::{HashMap, HashSet};

use tcptrace_ebpf::State;

use crate::{
    container,
    event::{Event, Probes, Row, Socket, Start},
    select::{self, Selection, Sockets},
};

use owners::{OwnerId, Owners};
use table::{Keyed, Table};
use time_wait::{Clocks, Held, Life};

pub use fact::{Change, Fact, Needs, Running, Site, Standing, TimeWaitEnd};
pub use look::MISSES;
pub use owner::{Owner, Via};
pub use time_wait::{Ending, TIME_WAIT_SECONDS};

/// A full socket.
#[derive(Clone, Debug)]
struct Connection {
    socket: Socket,
    state: State,
    /// When it entered the state; `None` when that was not seen.
    since: Option<u64>,
    owner: OwnerId,
    site: Site,
    cgroup: u64,
    /// Its change to SYN_SENT was kept back until its local port shows whether it was asked for.
    kept_back: bool,
    /// Port and error that are left from the connection before on the same socket.
    stale: Option<(NonZero<u16>, u32)>,
    /// The last look that showed it, or could not have: see [`Looks`](look::Looks).
    seen: u32,
    /// Last event that told of it.
    last: u64,
    /// The state it was closed from, if the kernel said so but a timewait socket may have taken over.
    closed_from: Option<State>,
}

impl Keyed for Connection {
    type Key = u64;

    fn key(&self) -> u64 {
        self.socket.cookie
    }
}

// There may be millions.
const _: () = assert!(size_of::<Option<Connection>>() <= 104);

/// When so many cgroups are known, those that no socket is in are forgotten.
const MOST_CGROUPS: usize = 1 << 17;
/// So many accept records that were not believed are remembered: there is one where a descriptor was replaced.
const MOST_REFUTED: usize = 1 << 10;

/// A timewait socket's identity. The cookie alone will not do: a socket that is shut down, finishes, and
/// connects again leaves timewait sockets of one cookie behind.
type TimeWaitKey = (u64, u16, u16);

const fn key(socket: &Socket) -> TimeWaitKey {
    (
        socket.cookie,
        socket.tuple.local_port,
        socket.tuple.remote_port,
    )
}

/// See the [module](self).
pub struct Tracker {
    selection: Selection,
    /// What a recording was limited to, beyond that.
    recorded: Option<Sockets>,
    clocks: Clocks,
    time_wait_probes: Probes,
    /// Transitions are traced.
    traced: bool,
    /// Stacks are recorded.
    stacks: bool,
    /// Looks number processes otherwise than records do.
    private_pids: bool,
    /// Network namespace of whoever traces.
    home: u32,
    connections: Table<Connection>,
    owners: Owners,
    /// Children that have not shown who they are.
    unnamed: unnamed::Children,
    /// Listeners by namespace and port.
    listeners: HashMap<(u32, u16), Vec<u64>>,
    time_waits: Table<Life>,
    /// How many of them are in FIN_WAIT2.
    waiting: usize,
    /// Closed sockets of which it is not known whether a timewait socket took over.
    uncertain: usize,
    /// Ends kept back, and until when, in order. One that has come to nothing stays until it is due.
    pending: VecDeque<Held>,
    /// How many of them are without any evidence of how.
    unexplained: usize,
    /// Names of containers by cgroup id; `None`: in no container.
    containers: HashMap<u64, Option<Box<str>>>,
    /// By namespace: `TCPTimeWaitOverflow`, less what has been told of.
    overflows: HashMap<u32, u64>,
    /// Records were lost, and no look has shown since what exists.
    gap: bool,
    look: look::Looks,
    finished: finished::Finished,
    /// Sockets of accept records that were not believed, whose stacks are still to come; when those calls were.
    refuted_accepts: HashMap<u64, u64>,
}

impl Tracker {
    /// A tracker that tells of what `selection` asks for.
    #[must_use]
    pub fn new(selection: Selection) -> Self {
        Self {
            selection,
            recorded: None,
            clocks: Clocks {
                hz: 250,
                boot_to_monotonic_ns: 0,
            },
            time_wait_probes: Probes::None,
            traced: true,
            stacks: false,
            private_pids: false,
            home: 0,
            connections: Table::new(),
            owners: Owners::new(),
            unnamed: unnamed::Children::default(),
            listeners: HashMap::new(),
            time_waits: Table::new(),
            waiting: 0,
            uncertain: 0,
            pending: VecDeque::new(),
            unexplained: 0,
            containers: HashMap::new(),
            overflows: HashMap::new(),
            gap: false,
            look: look::Looks::default(),
            finished: finished::Finished::default(),
            refuted_accepts: HashMap::new(),
        }
    }

    /// Takes an event in, and tells what follows from it.
    pub fn feed(&mut self, event: &Event, tell: &mut impl FnMut(Fact<'_>)) {
        match event {
            Event::Start(start) => self.start(start),
            Event::Transition(transition) => {
                self.advance(transition.time, tell);
                self.transition(transition, tell);
            }
            Event::Accept(accept) => {
                let caller = Owner::caller(&accept.task, Via::Accept);
                let known = self.connections.get(accept.socket.cookie);
                let is_refuted = known.is_some_and(|known| {
                    owner::refutes_accept(self.owners.get(known.owner), known.state, &caller)
                });
                if is_refuted {
                    if self.refuted_accepts.len() >= MOST_REFUTED {
                        self.refuted_accepts.clear();
                    }
                    let socket = accept.socket.cookie;
                    self.refuted_accepts.insert(socket, accept.time);
                    return;
                }
                let owner = self.owner_id(Some(caller));
                if let Some(connection) = self.connections.get_mut(accept.socket.cookie) {
                    connection.owner = owner;
                    connection.last = accept.time;
                }
            }
            Event::Called(called) => {
                let (cookie, site) = (called.cookie, Site::stack(called.stack));
                // The stack of a call comes after the call. That of an earlier one, which was believed, may be late.
                let refuted = self.refuted_accepts.get(&cookie);
                if refuted.is_some_and(|at| called.time >= *at) {
                    self.refuted_accepts.remove(&cookie);
                    return;
                }
                // It comes when the stack was walked, and then the connection can be over.
                match self.connections.get_mut(cookie) {
                    Some(connection) => connection.site = site,
                    None => {
                        self.finished.called(cookie, site);
                        tell(Fact::Called(cookie, site));
                    }
                }
            }
            Event::Stack(stack) => tell(Fact::Stack(stack)),
            Event::TimeWaitArmed(record) => {
                self.advance(record.time, tell);
                self.armed(record, tell);
            }
            Event::TimeWaitDone(record) => {
                self.advance(record.time, tell);
                self.done(record, tell);
            }
            Event::Look(look) => {
                self.begin_look(*look);
                tell(Fact::Look(*look));
            }
            Event::Socket(row) => self.row(row, tell),
            Event::Holder(holder) => {
                self.holder(holder);
                tell(Fact::Holder(holder));
            }
            Event::Activity(activity) => tell(Fact::Activity(activity)),
            Event::Process(process) => tell(Fact::Process(process)),
            Event::LookEnd { time, netns } => {
                self.end_look(*time, netns, tell);
                tell(Fact::LookEnd(*time));
            }
            Event::Overflow { netns, count, .. } => self.overflow(*netns, *count),
            Event::Cgroup { id, path } => self.cgroup(*id, path),
            Event::Lost(lost) => {
                self.gap = true;
                self.look.loss();
                tell(Fact::Lost(*lost));
            }
            Event::Clock {
                boot_to_monotonic_ns,
                ..
            } => self.clocks.boot_to_monotonic_ns = *boot_to_monotonic_ns,
            Event::Tick { time } => self.advance(*time, tell),
            // What is kept back is as true as it will ever be.
            Event::End(_) => self.advance(u64::MAX, tell),
        }
    }

    /// What would help to go on.
    #[must_use]
    pub fn needs(&self) -> Needs {
        Needs {
            tick_by: self.pending.front().map(|held| held.due),
            time_wait_look: self.selection.needs_time_wait()
                && match self.time_wait_probes {
                    Probes::Functions => false,
                    Probes::Tracepoints => self.waiting > 0,
                    Probes::None => self.uncertain + self.time_waits.len() > 0,
                },
            finished_look: !self.finished.is_empty(),
        }
    }

    /// Timewait sockets that exist now and were asked for, in no order.
    pub fn running(&self) -> impl Iterator<Item = Running<'_>> {
        self.time_waits.values().filter_map(|life| {
            let container = self.container(life.cgroup);
            let owner = self.owners.get(life.owner);
            self.selection
                .owner(owner.as_ref(), container)
                .then(|| Running {
                    socket: life.socket,
                    owner,
                    container,
                    state: life.state(),
                    since: life
                        .entered
                        .map(|entry| entry.time)
                        .or(life.fin_wait2)
                        .or(life.opened),
                })
        })
    }

    /// What is known of a socket that a look showed; `None` if it has changed since.
    #[must_use]
    pub fn standing(&self, row: &Row) -> Option<Standing<'_>> {
        let connection = self.connections.get(row.socket.cookie);
        let life = || self.time_waits.get(key(&row.socket));
        let (socket, since, owner, cgroup, site) = match (row.state, connection) {
            (State::Close, None) => match self.finished.get(row.socket.cookie) {
                Some(ended) => (
                    ended.socket,
                    Some(ended.since),
                    ended.owner,
                    ended.cgroup,
                    ended.site,
                ),
                None => (row.socket, None, None, row.cgroup, Site::BEFORE),
            },
            // A connection request: it leaves its cookie to the socket it becomes.
            (State::SynRecv, None) => {
                let owner = self.listener_owner(&row.socket);
                (row.socket, None, owner, 0, Site::UNTOLD)
            }
            (_, None) => {
                let life = life().filter(|life| life.state() == row.state)?;
                let since = match life.entered {
                    Some(entry) => Some(entry.time),
                    None => life.fin_wait2,
                };
                let owner = self.owners.get(life.owner);
                (life.socket, since, owner, life.cgroup, Site::BEFORE)
            }
            (state, Some(connection)) => {
                if connection.state != state || connection.closed_from.is_some() {
                    return None;
                }
                let Connection {
                    socket,
                    since,
                    owner,
                    cgroup,
                    site,
                    ..
                } = *connection;
                (socket, since, self.owners.get(owner), cgroup, site)
            }
        };
        Some(Standing {
            socket,
            since,
            owner,
            site,
            container: self.container(cgroup),
        })
    }

    /// Whether a socket that a look did not show is still what it was if [`standing`](Self::standing) says
    /// so: its end would have been told.
    #[must_use]
    pub const fn sees_ends(&self) -> bool {
        self.traced && !self.gap
    }

    /// Whether owners that records tell are numbered otherwise than holders that looks tell.
    #[must_use]
    pub const fn has_private_pids(&self) -> bool {
        self.traced && self.private_pids
    }

    /// Transitions are traced, so times are known, and not only looked up now and then.
    #[must_use]
    pub const fn is_traced(&self) -> bool {
        self.traced
    }

    /// Stacks are recorded of every call that connects or accepts.
    #[must_use]
    pub const fn has_stacks(&self) -> bool {
        self.stacks
    }

    /// Inode number of the network namespace of whoever traces.
    #[must_use]
    pub const fn home(&self) -> u32 {
        self.home
    }

    /// Which sockets, and whose, are asked for.
    #[must_use]
    pub const fn selection(&self) -> &Selection {
        &self.selection
    }

    /// How many sockets it keeps: connections, listeners, and timewait sockets.
    #[must_use]
    pub fn len(&self) -> usize {
        self.connections.len() + self.time_waits.len()
    }

    /// Whether it keeps none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn start(&mut self, start: &Start) {
        self.clocks = Clocks {
            hz: start.hz.max(1),
            boot_to_monotonic_ns: start.boot_to_monotonic_ns,
        };
        self.time_wait_probes = start.time_wait;
        self.traced = start.transitions;
        self.stacks = start.stacks;
        self.private_pids = start.private_pids;
        self.home = start.netns;
        if start.sockets != self.selection.sockets {
            self.recorded = Some(start.sockets.clone());
        }
    }

    pub(super) fn verdict(&self, socket: &Socket) -> select::Verdict {
        let verdict = self.selection.sockets.socket(socket);
        match &self.recorded {
            Some(recorded) => verdict.min(recorded.socket(socket)),
            None => verdict,
        }
    }

    /// The number of an owner, for an entry that is about to keep it.
    fn owner_id(&mut self, owner: Option<Owner>) -> OwnerId {
        if self.owners.is_full() {
            let connections = self.connections.values_mut().map(|it| &mut it.owner);
            let lives = self.time_waits.values_mut().map(|it| &mut it.owner);
            self.owners.keep(connections.chain(lives));
        }
        self.owners.id(owner)
    }

    fn cgroup(&mut self, id: u64, path: &str) {
        if self.containers.len() >= MOST_CGROUPS {
            let lives = self.time_waits.values().map(|life| life.cgroup);
            let used: HashSet<u64> = self
                .connections
                .values()
                .map(|connection| connection.cgroup)
                .chain(lives)
                .collect();
            self.containers.retain(|id, _| used.contains(id));
        }
        let container = container::of_cgroup(path).map(Into::into);
        self.containers.insert(id, container);
    }

    pub(super) fn container(&self, cgroup: u64) -> Option<&str> {
        self.containers.get(&cgroup)?.as_deref()
    }

    /// Time has come to `now`: ends that were kept back until then are believed.
    fn advance(&mut self, now: u64, tell: &mut impl FnMut(Fact<'_>)) {
        while let Some(held) = self.pending.pop_front_if(|held| held.due <= now) {
            self.believe(&held, tell);
        }
    }

    pub(super) fn tell_change(
        &self,
        change: Change<'_>,
        cgroup: u64,
        tell: &mut impl FnMut(Fact<'_>),
    ) {
        let container = self.container(cgroup);
        if self.selection.states(change.from, change.to)
            && self.selection.owner(change.owner.as_ref(), container)
        {
            tell(Fact::Change(Change {
                container,
                ..change
            }));
        }
    }

    pub(super) fn tell_end(
        &self,
        end: TimeWaitEnd<'_>,
        cgroup: u64,
        tell: &mut impl FnMut(Fact<'_>),
    ) {
        let container = self.container(cgroup);
        if self.selection.owner(end.owner.as_ref(), container) {
            tell(Fact::TimeWaitEnd(TimeWaitEnd { container, ..end }));
        }
    }
}
