//! Looks at what exists: sockets from `sock_diag`, [their holders](super::holders), and the count of TIME_WAITs
//! that were skipped.

use std::{collections::HashSet, io, ops::ControlFlow, rc::Rc, thread::available_parallelism};

use tcptrace_ebpf::State;

use super::{
    Piles, Sink,
    holders::{Holders, Sockets},
    live::Pump,
};
use crate::{
    event::{Detail, Event, Look, Row, Scope, States},
    kernel::{
        capabilities::Capabilities,
        clock,
        netns::{self, Namespaces},
        probes::Probes,
        sock_diag::{self, ALL_STATES, Completeness, Diag, Entry, Query, Timer},
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
            None => match pump.beside("namespaces", |_| Namespaces::discover())? {
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
        let unlisted = scope == Scope::All && piles.contains(State::CloseWait);
        for namespace in namespaces.iter() {
            let inode = namespace.inode();
            if self.is_wanted(inode) && (everywhere || pump.reader.orphans.are_in(inode)) {
                let dumped = self.dump(
                    namespace,
                    scope,
                    &mut looked,
                    &mut closed,
                    pump,
                    &mut |pump, row| {
                        sockets.add(&row, piles, traced && scope == Scope::All);
                        if told & row.state.bit() != 0 {
                            pump.emit(&Event::Socket(row));
                        }
                    },
                );
                if dumped.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            } else if unlisted && list(namespace, &mut sockets, pump).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        looked.unseen.extend(netns::reasons(&closed));
        let all_held = match scope {
            Scope::All | Scope::States(_) => {
                if pump.pause_now().is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                let unseen = &mut looked.unseen;
                let mut go_on = ControlFlow::Continue(());
                let emit = &mut |event: &Event| {
                    pump.emit(event);
                    if pump.is_due() && go_on.is_continue() {
                        go_on = pump.pause_now();
                    }
                };
                let holders = &mut self.holders;
                let all_held = holders.look(sockets, unlisted, silent, probes, unseen, emit)?;
                if go_on.is_break() {
                    return Ok(go_on.map_continue(|()| looked));
                }
                all_held
            }
            Scope::TimeWait | Scope::Orphans => true,
        };
        // What could not be read may have been a namespace, or a holder; if neither is missed, never mind.
        let unseen = namespaces.unseen();
        if !unseen.is_empty() && (!all_held || self.wanted.is_empty()) {
            let reasons = unseen.reasons(Capabilities::of_self());
            looked.unseen.extend(reasons);
        }
        Ok(ControlFlow::Continue(looked))
    }

    /// Hands on the sockets of one namespace; one that cannot be looked into goes to `closed`.
    fn dump<S: Sink>(
        &mut self,
        namespace: &netns::Namespace,
        scope: Scope,
        looked: &mut Looked,
        closed: &mut Vec<netns::Error>,
        pump: &mut Pump<'_, S>,
        each: &mut impl FnMut(&mut Pump<'_, S>, Row),
    ) -> ControlFlow<()> {
        let inode = namespace.inode();
        let had_piled = self.piled.contains(&inode);
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
        let (others, piles) = match scope {
            Scope::All if self.traced => (ALL_STATES & !piles, piles),
            Scope::All => (ALL_STATES & !piles & !State::TimeWait.bit(), piles),
            Scope::States(states) => (State::Listen.bit(), states.mask()),
            Scope::TimeWait | Scope::Orphans => (State::TimeWait.bit() | State::FinWait2.bit(), 0),
        };
        let time_wait_only = matches!(scope, Scope::TimeWait | Scope::Orphans);
        if time_wait_only {
            let query = Query {
                states: others,
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
                            each(pump, row_of(entry, inode));
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
        // What piles up comes last: what moves there meanwhile is seen twice rather than not at all. And where
        // nothing did so far, one walk through the kernel's table, which is dear whatever it finds, tells whether
        // it takes another.
        let mut complete = true;
        let mut is_piled = had_piled;
        let first = if had_piled { others } else { others | piles };
        for (states, tcp_info) in [(first, false), (piles, true)] {
            if states == 0 || tcp_info && !is_piled {
                continue;
            }
            let query = Query {
                states,
                tcp_info,
                ..Query::ALL
            };
            is_piled &= !tcp_info;
            let mut emit = |pump: &mut Pump<'_, S>, entry: &Entry| {
                let piles_up = piles & entry.state.bit() != 0;
                is_piled |= piles_up;
                // The second walk shows more of it.
                if !piles_up || tcp_info {
                    pump.reader.orphans.see(entry, inode);
                    each(pump, row_of(entry, inode));
                }
            };
            match paced(&mut diag, query, pump, &mut emit) {
                ControlFlow::Break(()) => return ControlFlow::Break(()),
                ControlFlow::Continue(Ok(Completeness::Complete)) => {}
                ControlFlow::Continue(Ok(Completeness::Interrupted)) => complete = false,
                ControlFlow::Continue(Err(error)) => {
                    complete = false;
                    looked.unseen.push(error.reason(inode));
                    break;
                }
            }
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

    /// Whether sockets of this namespace are asked for.
    pub(super) fn is_wanted(&self, inode: u32) -> bool {
        self.wanted.is_empty() || self.wanted.contains(&inode)
    }
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
fn list(
    namespace: &netns::Namespace,
    sockets: &mut Sockets,
    pump: &mut Pump<'_, impl Sink>,
) -> ControlFlow<()> {
    let query = Query {
        states: ALL_STATES & !State::TimeWait.bit(),
        ..Query::ALL
    };
    let Ok(mut diag) = namespace.diag() else {
        return ControlFlow::Continue(());
    };
    // What a dump that fails has shown is listed all the same.
    paced(&mut diag, query, pump, &mut |_, entry| {
        sockets.list(entry.inode)
    })
    .map_continue(|_| ())
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

fn row_of(entry: &Entry, netns: u32) -> Row {
    Row {
        time: entry.time,
        socket: entry.socket(netns),
        state: entry.state,
        inode: entry.inode,
        cgroup: entry.cgroup.unwrap_or(0),
        time_wait_ms: entry.is_timewait().then_some(entry.expires_ms),
        detail: entry.tcp_info.map(|info| Detail {
            within_ms: u32::try_from(entry.within / 1_000_000).unwrap_or(u32::MAX),
            recv_queue: entry.recv_queue,
            send_queue: entry.send_queue,
            // Probes of a closed window are counted there as well, and repeat nothing.
            retransmits: match entry.timer {
                Timer::Retransmit => entry.retransmits,
                _ => 0,
            },
            uid: entry.uid,
            last_data_sent_ms: Some(info.last_data_sent_ms),
            last_ack_recv_ms: Some(info.last_ack_recv_ms),
            orderly: None,
        }),
    }
}
