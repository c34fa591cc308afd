//! Looks at what exists: sockets from `sock_diag`, [their holders](super::holders), and the count of TIME_WAITs
//! that were skipped.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    ops::ControlFlow,
    thread::available_parallelism,
};

use tcptrace_ebpf::State;

use super::{
    Piles,
    holders::{Holders, Sockets, Step, Wants, Way},
};
use crate::{
    event::{Activity, Detail, Event, Look, Row, Scope, States},
    kernel::{
        capabilities::Capabilities,
        clock,
        helper::{Failure, Helpers},
        netns::{self, Namespaces},
        netstat::TcpExt,
        probes::{Probes, Walker},
        sock_diag::{self, ALL_STATES, Completeness, Diag, Entry, Exact, Query, Timer, exact},
    },
    reason::Reason,
};

/// A namespace of which no orphan was heard for so long has none: every look that shows one counts.
const ORPHAN_NS: u64 = 70_000_000_000;
/// How often, at most, a look is repeated because another process ran during it.
const PRECISE_LOOKS: u32 = 5;

/// Where to look, and what earlier looks found.
pub(super) struct Looks {
    /// Namespaces asked for, by inode number; all if empty.
    wanted: Vec<u32>,
    /// States in which sockets pile up, if they are to be looked at.
    piles: Option<States>,
    /// Transitions are traced: then owners are wanted of all sockets, and timewait sockets.
    traced: bool,
    /// Only what piles up is of interest, and only as the last look shows it.
    only_last: bool,
    /// Namespaces in which the last look showed that something has piled up.
    piled: HashSet<u32>,
    holders: Holders,
    /// Walks all open files where nothing is traced, if that pays.
    walker: Option<Walker>,
    /// They ask what would wait for the locks of sockets.
    helpers: Helpers,
    /// Namespaces of which it was said that it is not known when sockets last moved.
    said_locked: HashSet<u32>,
    namespaces: Option<Namespaces>,
    /// Namespaces with timewait sockets in FIN_WAIT2, and when the last was heard of: where a look at
    /// TIME_WAIT may tell something.
    orphans: HashMap<u32, u64>,
    /// Those sockets, by cookie; whether a look has shown them in TIME_WAIT. The tracker may want to see that
    /// twice.
    waiting: HashMap<u64, bool>,
    /// When `TCPTimeWaitOverflow` was last read, by namespace.
    overflow_read: HashMap<u32, u64>,
    /// It was read once for every namespace that there was.
    begun: bool,
}

/// What a look is worth.
pub(super) struct Looked {
    /// Namespaces of which everything was seen, or which are no more.
    pub(super) netns: Vec<u32>,
    /// What could not be looked at.
    pub(super) unseen: Vec<Reason>,
    /// Sockets were not shown that another look may show.
    pub(super) failed: bool,
}

impl Looks {
    pub(super) fn new(wanted: Vec<u32>, piles: Option<Piles>, traced: bool) -> Self {
        // Whoever waits for two looks waits for the second. What goes on looking leaves CPUs to others.
        let threads = match piles {
            Some(piles) if piles.only_last => {
                available_parallelism().map_or(1, |all| all.get().min(2))
            }
            _ => 1,
        };
        Self {
            wanted,
            piles: piles.map(|piles| piles.states),
            traced,
            only_last: piles.is_some_and(|piles| piles.only_last),
            holders: Holders::new(piles.is_some_and(|piles| piles.tree), threads),
            walker: None,
            helpers: Helpers::default(),
            said_locked: HashSet::new(),
            piled: HashSet::new(),
            namespaces: None,
            orphans: HashMap::new(),
            waiting: HashMap::new(),
            overflow_read: HashMap::new(),
            begun: false,
        }
    }

    /// A timewait socket waits in FIN_WAIT2 in this namespace.
    pub(super) fn orphan(&mut self, netns: u32, cookie: u64, time: u64) {
        self.orphans.insert(netns, time);
        self.waiting.insert(cookie, false);
    }

    /// It does not any more.
    pub(super) fn settled(&mut self, cookie: u64) {
        self.waiting.remove(&cookie);
    }

    /// Whether the last look showed that something has piled up.
    pub(super) fn have_piled(&self) -> bool {
        !self.piled.is_empty()
    }

    /// Whether there are sockets held whose connection is over, or it takes another look at everything to
    /// know.
    pub(super) fn may_have_finished(&self) -> bool {
        self.holders.may_have_finished()
    }

    /// Hands on all there is to see, from the beginning of the look on, but for its end. `probes`: those that are
    /// loaded, where they number processes as `/proc` does.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        scope: Scope,
        probes: Option<&mut Probes>,
        each: &mut impl FnMut(&Event),
    ) -> io::Result<Looked> {
        // The first of two is told of only as far as the second needs it.
        let silent = self.only_last && self.namespaces.is_none();
        let probes_missing = probes.is_none();
        let time = clock::boot_ns();
        each(&Event::Look(Look {
            time,
            scope: match self.piles {
                Some(piles) if self.only_last => Scope::States(piles),
                _ => scope,
            },
        }));
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
        self.piled.retain(|inode| namespaces.get(*inode).is_some());
        let mut looked = Looked {
            // One that was there last time and is not any more has taken its sockets with it.
            netns: inodes(&self.namespaces)
                .filter(|inode| namespaces.get(*inode).is_none())
                .collect(),
            unseen: Vec::new(),
            failed: false,
        };
        let mut closed = Vec::new();
        let mut sockets = Sockets::default();
        let (piles, traced) = (self.piles.unwrap_or_default(), self.traced);
        let told = match scope {
            Scope::All if self.only_last => piles.mask() | State::Listen.bit(),
            _ => ALL_STATES,
        };
        // Descriptors of connections that are over are leaked like those that the peer has left.
        let unlisted = scope == Scope::All && piles.contains(State::CloseWait) && !silent;
        let all = traced && scope == Scope::All;
        let walk = match scope {
            Scope::All | Scope::States(_) if !silent => self.walk(probes, unlisted, all),
            _ => None,
        };
        // What has no descriptor has to be asked for by itself; by the walk, the rest is known.
        let times = match (silent, walk.is_some()) {
            (true, _) => Times::None,
            (false, true) => Times::Unheld,
            (false, false) => Times::All,
        };
        // Without the walk, a socket whose connection is over is known by no dump listing it.
        let only_piles = self.only_last && (silent || walk.is_some());
        for namespace in namespaces.iter() {
            let inode = namespace.inode();
            if self.is_wanted(inode) && (everywhere || self.orphans.contains_key(&inode)) {
                let what = Dump {
                    scope,
                    only_piles,
                    times,
                };
                self.dump(namespace, what, &mut looked, &mut closed, &mut |event| {
                    if let Event::Socket(row) = event {
                        sockets.add(row, piles, all);
                        if told & row.state.bit() == 0 {
                            return;
                        }
                    }
                    each(event);
                });
            } else if unlisted && walk.is_none() {
                list(namespace, &mut |inode| sockets.list(inode));
            }
        }
        looked.unseen.extend(netns::reasons(&closed));
        let all_held = match scope {
            Scope::All | Scope::States(_) if !silent => {
                let mut list_again = || {
                    let mut listed = hashbrown::HashSet::new();
                    for namespace in namespaces.iter() {
                        list(namespace, &mut |inode| {
                            listed.insert(inode);
                        });
                    }
                    listed
                };
                let wants = Wants {
                    piles,
                    unlisted,
                    list_again: if self.only_last {
                        Some(&mut list_again)
                    } else {
                        None
                    },
                };
                let walks = walk.is_some();
                let way = walk.map_or(Way::Procfs, Way::Walk);
                let mut step = |step: Step<'_>| {
                    match step {
                        Step::Event(event) => each(event),
                        Step::Pause => {}
                    }
                    ControlFlow::Continue(())
                };
                let (helpers, unseen) = (&mut self.helpers, &mut looked.unseen);
                let holders = &mut self.holders;
                let all_held =
                    holders.look(&mut sockets, wants, way, helpers, unseen, &mut step)?;
                if walks && !all_held {
                    self.times_of_unheld(&namespaces, &sockets.unheld(), each);
                }
                all_held
            }
            _ => true,
        };
        // What could not be read may have been a namespace, or a holder; if neither is missed, never mind.
        let unseen = namespaces.unseen();
        if !unseen.is_empty() && (!all_held || self.wanted.is_empty()) {
            let reasons = unseen.reasons(Capabilities::of_self());
            looked.unseen.extend(reasons);
        }
        self.namespaces = Some(namespaces);
        if silent && probes_missing {
            // There is time for it until the second look.
            self.walker = Walker::if_it_pays();
        }
        Ok(looked)
    }

    /// Has the kernel walk all open files, if it can: for sockets of connections that are over, if `unlisted`; for `all`
    /// sockets, or those in states in which they pile up.
    fn walk(&mut self, probes: Option<&mut Probes>, unlisted: bool, all: bool) -> Option<File> {
        if !self.holders.can_walk() {
            return None;
        }
        let mut detailed = self.piles.unwrap_or_default();
        if unlisted {
            detailed = detailed.with(State::Close);
        }
        let wanted = match all {
            true => States::ALL,
            // Listeners hold what nobody has accepted.
            false => detailed.with(State::Listen),
        };
        // Why it does not take the program, `tcptrace doctor` says.
        let walk = match (probes, &mut self.walker) {
            (Some(probes), _) => probes.open_sockets(wanted, detailed),
            (None, Some(walker)) => walker.open_sockets(wanted, detailed),
            (None, None) => return None,
        };
        if walk.is_err() {
            self.holders.cannot_walk();
        }
        walk.ok()
    }

    /// Hands on the sockets of one namespace; one that cannot be looked into goes to `closed`.
    fn dump(
        &mut self,
        namespace: &netns::Namespace,
        what: Dump,
        looked: &mut Looked,
        closed: &mut Vec<netns::Error>,
        each: &mut impl FnMut(&Event),
    ) {
        let scope = what.scope;
        let inode = namespace.inode();
        let mut diag = match namespace.diag() {
            Ok(diag) => diag,
            // Its sockets are gone as well.
            Err(netns::Error::Gone { .. }) => return looked.netns.push(inode),
            Err(error) => {
                looked.failed |= matches!(error, netns::Error::Other { .. });
                return closed.push(error);
            }
        };
        let piles = self.piles.map_or(0, States::mask);
        let (states, piles) = match scope {
            Scope::All if what.only_piles => (piles | State::Listen.bit(), piles),
            Scope::All if self.traced => (ALL_STATES, piles),
            Scope::All => (ALL_STATES & !State::TimeWait.bit() | piles, piles),
            Scope::States(states) => (State::Listen.bit() | states.mask(), states.mask()),
            Scope::TimeWait | Scope::Orphans => (State::TimeWait.bit() | State::FinWait2.bit(), 0),
        };
        let time_wait_only = matches!(scope, Scope::TimeWait | Scope::Orphans);
        if time_wait_only {
            let query = Query {
                states,
                ..Query::ALL
            };
            let waiting = (scope == Scope::Orphans).then_some(&self.waiting);
            match precise(&mut diag, query, waiting) {
                Ok((entries, completeness)) => {
                    for entry in &entries {
                        let news = self.remember(entry, inode);
                        // Of orphans, only what is new: there may be very many sockets in TIME_WAIT.
                        if scope == Scope::TimeWait || news {
                            each(&Event::Socket(row_of(entry, inode, false)));
                        }
                    }
                    if completeness == Completeness::Complete {
                        looked.netns.push(inode);
                    }
                }
                Err(error) => looked.unseen.push(error.reason(inode)),
            }
            return;
        }
        // One walk through the kernel's table, which is dear whatever it finds.
        let query = Query {
            states,
            ..Query::ALL
        };
        let mut is_piled = false;
        let mut unheld = Vec::new();
        let dumped = diag.dump(query, |entry| {
            let piles_up = piles & entry.state.bit() != 0;
            is_piled |= piles_up;
            // A request, which is no socket yet, has none of what is asked for.
            if piles_up && entry.inode == 0 && entry.shutdown.is_some() {
                unheld.push(exact(entry));
            }
            self.remember(entry, inode);
            each(&Event::Socket(row_of(entry, inode, piles_up)));
        });
        let complete = match dumped {
            Ok(Completeness::Complete) => true,
            Ok(Completeness::Interrupted) => false,
            Err(error) => {
                looked.unseen.push(error.reason(inode));
                false
            }
        };
        let asked = match what.times {
            Times::All if is_piled => self.times(inode, &diag, piles, each),
            Times::Unheld if !unheld.is_empty() => self.times_of(&diag, &unheld, each),
            _ => Ok(()),
        };
        if let Err(failure) = asked
            && self.said_locked.insert(inode)
        {
            eprintln!("tcptrace: {}", no_times(inode, &failure));
        }
        if piles != 0 {
            if is_piled {
                self.piled.insert(inode);
            } else {
                self.piled.remove(&inode);
            }
        }
        if complete {
            looked.netns.push(inode);
        } else {
            looked.failed = true;
        }
    }

    /// Hands on when sockets in these states last moved.
    fn times(
        &mut self,
        netns: u32,
        diag: &Diag,
        states: u16,
        each: &mut impl FnMut(&Event),
    ) -> Result<(), Failure> {
        // As long as one waits for the lock of a socket, so would the next.
        if self.said_locked.contains(&netns) && self.helpers.are_stuck() {
            return Err(Failure::Stuck);
        }
        let asked = diag.times(states, &mut self.helpers, &mut || {}, |entry| {
            if let Some(event) = activity(entry) {
                each(&event);
            }
        });
        if asked.is_ok() {
            self.said_locked.remove(&netns);
        }
        asked
    }

    /// The same for single sockets.
    fn times_of(
        &mut self,
        diag: &Diag,
        sockets: &[Exact],
        each: &mut impl FnMut(&Event),
    ) -> Result<(), Failure> {
        diag.times_of(sockets, &mut self.helpers, &mut || {}, |entry| {
            if let Some(event) = activity(entry) {
                each(&event);
            }
        })
    }

    /// Hands on when sockets last moved that the kernel's walk has not come by: threads have them in tables of their own,
    /// or they are on their way from one process to another.
    fn times_of_unheld(
        &mut self,
        namespaces: &Namespaces,
        inodes: &hashbrown::HashSet<u32>,
        each: &mut impl FnMut(&Event),
    ) {
        if inodes.is_empty() {
            return;
        }
        let query = Query {
            states: self.piles.map_or(0, States::mask),
            ..Query::ALL
        };
        for namespace in namespaces.iter() {
            if !self.piled.contains(&namespace.inode()) {
                continue;
            }
            let Ok(mut diag) = namespace.diag() else {
                continue;
            };
            let mut unheld = Vec::new();
            // What a dump that fails has shown is true all the same.
            let _ = diag.dump(query, |entry| {
                if inodes.contains(&entry.inode) {
                    unheld.push(exact(entry));
                }
            });
            if !unheld.is_empty()
                && let Err(failure) = self.times_of(&diag, &unheld, each)
                && self.said_locked.insert(namespace.inode())
            {
                eprintln!("tcptrace: {}", no_times(namespace.inode(), &failure));
            }
        }
    }

    /// Remembers orphans. Returns whether the entry tells something new of one.
    fn remember(&mut self, entry: &Entry, netns: u32) -> bool {
        if entry.is_timewait() && entry.state == State::FinWait2 {
            self.orphans.insert(netns, entry.time);
            return self.waiting.insert(entry.cookie, false).is_none();
        }
        match self.waiting.get_mut(&entry.cookie) {
            Some(shown @ false) => {
                *shown = true;
                true
            }
            Some(true) => self.waiting.remove(&entry.cookie).is_some(),
            None => false,
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
        let time = clock::boot_ns();
        let first = self.overflow_read.insert(inode, time).is_none();
        let mut counters = self.tcp_ext(inode);
        if matches!(counters, Err(netns::Error::Gone { .. })) {
            // Or it has come since, or is reached by another way now.
            self.namespaces = Namespaces::discover().ok();
            counters = self.tcp_ext(inode);
        }
        let Ok(counters) = counters else {
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

    fn tcp_ext(&self, inode: u32) -> Result<TcpExt, netns::Error> {
        let namespaces = self.namespaces.as_ref();
        namespaces
            .and_then(|namespaces| namespaces.get(inode))
            .ok_or(netns::Error::Gone { inode })?
            .tcp_ext()
    }

    fn is_wanted(&self, inode: u32) -> bool {
        self.wanted.is_empty() || self.wanted.contains(&inode)
    }
}

/// What a dump is to show.
#[derive(Clone, Copy)]
struct Dump {
    scope: Scope,
    /// Only sockets in states in which they pile up, and listeners.
    only_piles: bool,
    times: Times,
}

/// Of which sockets, in states in which they pile up, it is asked when they last moved.
#[derive(Clone, Copy)]
enum Times {
    /// Of none.
    None,
    /// Of those without a descriptor.
    Unheld,
    /// Of all.
    All,
}

/// That it is not known when sockets of a namespace last moved.
fn no_times(netns: u32, failure: &Failure) -> Reason {
    let what = format!(
        "network namespace {netns}: when sockets last sent or received anything is not known, and so not why they are \
         held, nor of those from before tcptrace since when"
    );
    match failure {
        Failure::Stuck | Failure::TooManyStuck => Reason::new(
            format_args!(
                "{what}, because a socket's lock is held by somebody who waits for memory, and the kernel waits for it"
            ),
            "find a process in a system call on a socket that does not return (userfaultfd, FUSE, NFS), or run as root \
             on a kernel that takes BPF programs: then no lock is needed",
        ),
        Failure::Broken(error) => Reason::new(
            format_args!("{what}, because the process that asks failed: {error}"),
            "please report it, with the output of `tcptrace doctor`",
        ),
    }
}

/// None for what is no full socket.
fn activity(entry: &Entry) -> Option<Event> {
    let info = entry.tcp_info?;
    Some(Event::Activity(Activity {
        time: entry.time,
        cookie: entry.cookie,
        state: entry.state,
        last_data_sent_ms: info.last_data_sent_ms,
        last_ack_recv_ms: info.last_ack_recv_ms,
    }))
}

/// Which sockets of a namespace are in a table, though they were not asked for: those are not to be disturbed
/// by asking them through a duplicate. If it cannot be looked into, they will be.
fn list(namespace: &netns::Namespace, each: &mut impl FnMut(u32)) {
    let query = Query {
        states: ALL_STATES & !State::TimeWait.bit(),
        ..Query::ALL
    };
    let Ok(mut diag) = namespace.diag() else {
        return;
    };
    // What a dump that fails has shown is listed all the same.
    let _ = diag.dump(query, |entry| each(entry.inode));
}

/// Timewait sockets; with `waiting`, only those in FIN_WAIT2, and those of `waiting` that have come to TIME_WAIT since.
/// When that was is reckoned from the time of the look; so if another process ran during it, it is repeated.
fn precise(
    diag: &mut Diag,
    query: Query,
    waiting: Option<&HashMap<u64, bool>>,
) -> Result<(Vec<Entry>, Completeness), sock_diag::Error> {
    let jiffy = 1_000_000_000 / u64::from(clock::hz());
    let mut left = PRECISE_LOOKS;
    let mut best = u64::MAX;
    let mut found = (Vec::new(), Completeness::Interrupted);
    while left > 0 && best > jiffy {
        left -= 1;
        let (mut within, mut entries) = (0, Vec::new());
        let completeness = diag.dump(query, |entry| {
            let is_wanted = waiting.is_none_or(|waiting| waiting.contains_key(&entry.cookie));
            if is_wanted && entry.state == State::TimeWait {
                within = within.max(entry.within);
            }
            if entry.is_timewait() && (is_wanted || entry.state == State::FinWait2) {
                entries.push(*entry);
            }
        })?;
        if within < best {
            best = within;
            found = (entries, completeness);
        }
    }
    Ok(found)
}

fn inodes(namespaces: &Option<Namespaces>) -> impl Iterator<Item = u32> {
    namespaces
        .iter()
        .flat_map(Namespaces::iter)
        .map(netns::Namespace::inode)
}

fn row_of(entry: &Entry, netns: u32, detailed: bool) -> Row {
    Row {
        time: entry.time,
        socket: entry.socket(netns),
        state: entry.state,
        inode: entry.inode,
        cgroup: entry.cgroup.unwrap_or(0),
        time_wait_ms: entry.is_timewait().then_some(entry.expires_ms),
        // Neither a timewait socket has any, nor a request.
        detail: (detailed && entry.shutdown.is_some()).then(|| Detail {
            within_ms: u32::try_from(entry.within / 1_000_000).unwrap_or(u32::MAX),
            recv_queue: entry.recv_queue,
            send_queue: entry.send_queue,
            // Probes of a closed window are counted there as well, and repeat nothing.
            retransmits: match entry.timer {
                Timer::Retransmit => entry.retransmits,
                _ => 0,
            },
            uid: entry.uid,
            // An `Activity` follows, if it can be asked for.
            last_data_sent_ms: None,
            last_ack_recv_ms: None,
            orderly: None,
        }),
    }
}
