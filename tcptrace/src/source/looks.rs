//! Looks at what exists: sockets from `sock_diag`, [their holders](super::holders), and the count of TIME_WAITs
//! that were skipped.

use std::{
    cell::RefCell, collections::HashSet, fs::File, io, ops::ControlFlow, rc::Rc,
    thread::available_parallelism,
};

use tcptrace_ebpf::State;

use super::{
    Piles, Sink,
    holders::{Holders, Sockets, Step, Wants, Way},
    live::Pump,
};
use crate::{
    event::{Activity, Detail, Event, Look, Row, Scope, States},
    kernel::{
        capabilities::Capabilities,
        clock,
        helper::{Failure, Helpers},
        netns::{self, Namespaces},
        probes::{Probes, Walker},
        sock_diag::{self, ALL_STATES, Completeness, Diag, Entry, Exact, Query, Timer, exact},
    },
    reason::Reason,
};

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
    namespaces: Option<Rc<Namespaces>>,
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
        }
    }

    /// The namespaces that the last look found.
    pub(super) fn namespaces(&self) -> Option<Rc<Namespaces>> {
        self.namespaces.clone()
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

    /// Emits all there is to see, from the beginning of the look on, but for its end. `probes`: those that are
    /// loaded, where they number processes as `/proc` does. Breaks off where the pump says so.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        scope: Scope,
        probes: Option<&mut Probes>,
        pump: &mut Pump<'_, impl Sink>,
    ) -> io::Result<ControlFlow<(), Looked>> {
        // The first of two is told of only as far as the second needs it.
        let silent = self.only_last && self.namespaces.is_none();
        let probes_missing = probes.is_none();
        let time = clock::boot_ns();
        pump.emit(&Event::Look(Look {
            time,
            scope: match self.piles {
                Some(piles) if self.only_last => Scope::States(piles),
                _ => scope,
            },
        }));
        let orphans = &mut pump.reader.orphans;
        orphans.forget_old(time);
        let everywhere = scope != Scope::Orphans;
        let known = self.namespaces.take_if(|known| {
            !everywhere && orphans.namespaces().all(|inode| known.get(inode).is_some())
        });
        let namespaces = match known {
            Some(known) => known,
            // Mount tables are read for it, of which anybody can have large ones.
            None => match pump.beside("namespaces", Namespaces::discover) {
                ControlFlow::Continue(namespaces) => Rc::new(namespaces?),
                ControlFlow::Break(()) => return Ok(ControlFlow::Break(())),
            },
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
        self.namespaces = Some(Rc::clone(&namespaces));
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
            if self.is_wanted(inode) && (everywhere || pump.reader.orphans.are_in(inode)) {
                let what = Dump {
                    scope,
                    only_piles,
                    times,
                };
                let each = &mut |pump: &mut Pump<'_, _>, event: &Event| {
                    if let Event::Socket(row) = event {
                        sockets.add(row, piles, all);
                        if told & row.state.bit() == 0 {
                            return;
                        }
                    }
                    pump.emit(event);
                };
                let dumped = self.dump(namespace, what, &mut looked, &mut closed, pump, each);
                if dumped.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            } else if unlisted
                && walk.is_none()
                && list(namespace, pump, &mut |inode| sockets.list(inode)).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        looked.unseen.extend(netns::reasons(&closed));
        let all_held = match scope {
            Scope::All | Scope::States(_) if !silent => {
                if pump.pause_now().is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                // Of each system call, one of the two.
                let shared = RefCell::new((&mut *pump, ControlFlow::Continue(())));
                let mut list_again = || {
                    let mut listed = hashbrown::HashSet::new();
                    let (pump, go_on) = &mut *shared.borrow_mut();
                    for namespace in namespaces.iter() {
                        if go_on.is_continue() {
                            *go_on = list(namespace, pump, &mut |inode| {
                                listed.insert(inode);
                            });
                        }
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
                    let (pump, go_on) = &mut *shared.borrow_mut();
                    match step {
                        Step::Event(event) => pump.emit(event),
                        Step::Pause if go_on.is_continue() => *go_on = pump.pause_now(),
                        Step::Pause => {}
                    }
                    *go_on
                };
                let (helpers, unseen) = (&mut self.helpers, &mut looked.unseen);
                let holders = &mut self.holders;
                let all_held =
                    holders.look(&mut sockets, wants, way, helpers, unseen, &mut step)?;
                let (pump, go_on) = shared.into_inner();
                if go_on.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                if walks && !all_held {
                    let times = self.times_of_unheld(&namespaces, &sockets.unheld(), pump);
                    if times.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
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
        if silent && probes_missing {
            // There is time for it until the second look.
            self.walker = Walker::if_it_pays();
        }
        Ok(ControlFlow::Continue(looked))
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
    fn dump<S: Sink>(
        &mut self,
        namespace: &netns::Namespace,
        what: Dump,
        looked: &mut Looked,
        closed: &mut Vec<netns::Error>,
        pump: &mut Pump<'_, S>,
        each: &mut impl FnMut(&mut Pump<'_, S>, &Event),
    ) -> ControlFlow<()> {
        let scope = what.scope;
        let inode = namespace.inode();
        let mut diag = match namespace.diag() {
            Ok(diag) => diag,
            // Its sockets are gone as well.
            Err(netns::Error::Gone { .. }) => {
                looked.netns.push(inode);
                return ControlFlow::Continue(());
            }
            Err(error) => {
                looked.failed |= matches!(error, netns::Error::Other { .. });
                closed.push(error);
                return ControlFlow::Continue(());
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
            pump.reader.orphans.begin_scan();
            let gathered = precise(&mut diag, query, scope == Scope::Orphans, pump);
            let ended = pump.reader.orphans.end_scan();
            match gathered? {
                Ok((entries, completeness)) => {
                    let lives = |entry: &&Entry| !ended.contains(&entry.cookie);
                    for entry in entries.iter().filter(lives) {
                        let news = pump.reader.orphans.see(entry, inode);
                        // Of orphans, only what is new: there may be very many sockets in TIME_WAIT.
                        if scope == Scope::TimeWait || news {
                            each(pump, &Event::Socket(row_of(entry, inode, false)));
                        }
                    }
                    if completeness == Completeness::Complete {
                        looked.netns.push(inode);
                    }
                }
                Err(error) => looked.unseen.push(error.reason(inode)),
            }
            return pump.pause();
        }
        // One walk through the kernel's table, which is dear whatever it finds.
        let query = Query {
            states,
            ..Query::ALL
        };
        let mut is_piled = false;
        let mut unheld = Vec::new();
        let mut emit = |pump: &mut Pump<'_, S>, entry: &Entry| {
            let piles_up = piles & entry.state.bit() != 0;
            is_piled |= piles_up;
            // A request, which is no socket yet, has none of what is asked for.
            if piles_up && entry.inode == 0 && entry.shutdown.is_some() {
                unheld.push(exact(entry));
            }
            pump.reader.orphans.see(entry, inode);
            each(pump, &Event::Socket(row_of(entry, inode, piles_up)));
        };
        let complete = match paced(&mut diag, query, pump, &mut emit)? {
            Ok(Completeness::Complete) => true,
            Ok(Completeness::Interrupted) => false,
            Err(error) => {
                looked.unseen.push(error.reason(inode));
                false
            }
        };
        let asked = match what.times {
            Times::All if is_piled => self.times(inode, &diag, piles, pump)?,
            Times::Unheld if !unheld.is_empty() => self.times_of(&diag, &unheld, pump)?,
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
        ControlFlow::Continue(())
    }

    /// Hands on when sockets in these states last moved.
    fn times<S: Sink>(
        &mut self,
        netns: u32,
        diag: &Diag,
        states: u16,
        pump: &mut Pump<'_, S>,
    ) -> ControlFlow<(), Result<(), Failure>> {
        // As long as one waits for the lock of a socket, so would the next.
        if self.said_locked.contains(&netns) && self.helpers.are_stuck() {
            return ControlFlow::Continue(Err(Failure::Stuck));
        }
        let asked = self.ask(pump, |helpers, pause, each| {
            diag.times(states, helpers, pause, each)
        })?;
        if asked.is_ok() {
            self.said_locked.remove(&netns);
        }
        ControlFlow::Continue(asked)
    }

    /// The same for single sockets.
    fn times_of<S: Sink>(
        &mut self,
        diag: &Diag,
        sockets: &[Exact],
        pump: &mut Pump<'_, S>,
    ) -> ControlFlow<(), Result<(), Failure>> {
        self.ask(pump, |helpers, pause, each| {
            diag.times_of(sockets, helpers, pause, each)
        })
    }

    /// Has helpers asked, and pauses meanwhile; emits what they show afterwards: no record makes that untrue.
    fn ask<S: Sink>(
        &mut self,
        pump: &mut Pump<'_, S>,
        ask: impl FnOnce(&mut Helpers, &mut dyn FnMut(), &mut dyn FnMut(&Entry)) -> Result<(), Failure>,
    ) -> ControlFlow<(), Result<(), Failure>> {
        let mut go_on = ControlFlow::Continue(());
        let mut found = Vec::new();
        let mut pause = || {
            if go_on.is_continue() {
                go_on = pump.pause_now();
            }
        };
        let asked = ask(&mut self.helpers, &mut pause, &mut |entry| {
            found.extend(activity(entry));
        });
        go_on?;
        for event in &found {
            pump.emit(event);
            if pump.is_due() {
                pump.pause_now()?;
            }
        }
        ControlFlow::Continue(asked)
    }

    /// Hands on when sockets last moved that the kernel's walk has not come by: threads have them in tables of their own,
    /// or they are on their way from one process to another.
    fn times_of_unheld<S: Sink>(
        &mut self,
        namespaces: &Namespaces,
        inodes: &hashbrown::HashSet<u32>,
        pump: &mut Pump<'_, S>,
    ) -> ControlFlow<()> {
        if inodes.is_empty() {
            return ControlFlow::Continue(());
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
            let _ = paced(&mut diag, query, pump, &mut |_, entry| {
                if inodes.contains(&entry.inode) {
                    unheld.push(exact(entry));
                }
            })?;
            if !unheld.is_empty()
                && let Err(failure) = self.times_of(&diag, &unheld, pump)?
                && self.said_locked.insert(namespace.inode())
            {
                eprintln!("tcptrace: {}", no_times(namespace.inode(), &failure));
            }
        }
        ControlFlow::Continue(())
    }

    /// Whether sockets of this namespace are asked for.
    pub(super) fn is_wanted(&self, inode: u32) -> bool {
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

/// Dumps what `query` asks for, and pauses between two messages of the kernel's.
fn paced<S: Sink>(
    diag: &mut Diag,
    query: Query,
    pump: &mut Pump<'_, S>,
    each: &mut impl FnMut(&mut Pump<'_, S>, &Entry),
) -> ControlFlow<(), Result<Completeness, sock_diag::Error>> {
    let mut dump = match diag.begin(query) {
        Ok(dump) => dump,
        Err(error) => return ControlFlow::Continue(Err(error)),
    };
    loop {
        // While the kernel hands over a message, it writes the next.
        pump.mark();
        match dump.next(|entry| each(pump, entry)) {
            Ok(true) => pump.pause()?,
            Ok(false) => return ControlFlow::Continue(dump.end()),
            Err(error) => return ControlFlow::Continue(Err(error)),
        }
    }
}

/// Which sockets of a namespace are in a table, though they were not asked for: those are not to be disturbed
/// by asking them through a duplicate. If it cannot be looked into, they will be.
fn list<S: Sink>(
    namespace: &netns::Namespace,
    pump: &mut Pump<'_, S>,
    each: &mut impl FnMut(u32),
) -> ControlFlow<()> {
    let query = Query {
        states: ALL_STATES & !State::TimeWait.bit(),
        ..Query::ALL
    };
    let Ok(mut diag) = namespace.diag() else {
        return ControlFlow::Continue(());
    };
    // What a dump that fails has shown is listed all the same.
    paced(&mut diag, query, pump, &mut |_, entry| each(entry.inode)).map_continue(|_| ())
}

/// Timewait sockets; with `only_orphans`, only those in FIN_WAIT2, and known ones that have come to TIME_WAIT since.
/// When that was is reckoned from the time of the scan; so if another process ran during it, it is repeated.
fn precise<S: Sink>(
    diag: &mut Diag,
    query: Query,
    only_orphans: bool,
    pump: &mut Pump<'_, S>,
) -> ControlFlow<(), Result<(Vec<Entry>, Completeness), sock_diag::Error>> {
    let jiffy = 1_000_000_000 / u64::from(clock::hz());
    let mut left = PRECISE_LOOKS;
    let mut best = u64::MAX;
    let mut found = (Vec::new(), Completeness::Interrupted);
    pump.mark();
    while left > 0 && best > jiffy && (left == PRECISE_LOOKS || !pump.reader.is_filling()) {
        left -= 1;
        let (mut within, mut entries) = (0, Vec::new());
        let mut dump = match diag.begin(query) {
            Ok(dump) => dump,
            Err(error) => return ControlFlow::Continue(Err(error)),
        };
        loop {
            let orphans = &pump.reader.orphans;
            let next = dump.next(|entry| {
                let is_wanted = !only_orphans || orphans.contains(entry.cookie);
                if is_wanted && entry.state == State::TimeWait {
                    within = within.max(entry.within);
                }
                if entry.is_timewait() && (is_wanted || entry.state == State::FinWait2) {
                    entries.push(*entry);
                }
            });
            match next {
                // A record of an orphan's end takes it off the list below; of others, what was gathered must come first.
                Ok(true) if only_orphans => pump.pause_now()?,
                Ok(true) => pump.pause()?,
                Ok(false) => break,
                Err(error) => return ControlFlow::Continue(Err(error)),
            }
        }
        let completeness = match dump.end() {
            Ok(completeness) => completeness,
            Err(error) => return ControlFlow::Continue(Err(error)),
        };
        if within < best {
            best = within;
            found = (entries, completeness);
        }
    }
    ControlFlow::Continue(Ok(found))
}

fn inodes(namespaces: &Option<Rc<Namespaces>>) -> impl Iterator<Item = u32> {
    namespaces
        .iter()
        .flat_map(|namespaces| namespaces.iter())
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
