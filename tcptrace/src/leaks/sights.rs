//! What looks have shown, gathered until it can be told who leaks what.

use std::{borrow::Cow, collections::BTreeMap};

use hashbrown::{HashMap, HashSet};
use tcptrace_ebpf::State;

use super::{
    cause::{self, Cause, Finding},
    clear, dwell,
    growth::Growth,
    report::{Age, Holding, Leak, Leaked, Report},
    stacks,
};
use crate::{
    event::{Activity, Detail, Holder, Process, Row, Socket, States},
    tracker::{Change, Fact, Owner, Site, Standing, Tracker, Via},
};

/// For how many leaks, the worst, it is said what would clear them: nobody reads more of them.
const CLEARED: usize = 50;

/// No jiffy is longer.
const JIFFY_NS: u64 = 10_000_000;

/// What counts as a leak.
#[derive(Clone, Copy, Debug)]
pub struct Criteria {
    /// In these states.
    pub states: States,
    /// For so long, nanoseconds.
    pub older_than: u64,
}

/// A pid and when its process started: a process for good.
type ProcessId = (u32, u64);

/// A socket that looks have shown in one of the states, or listening.
#[derive(Clone, Debug)]
struct Sight {
    row: Row,
    /// The last look that showed it.
    look: u32,
    /// It was in its state at this boot time already.
    by: u64,
    /// Whether its send queue changed between the last two looks.
    moved: Option<bool>,
    /// When it had last sent data, by the look before; boot time.
    sent: Option<u64>,
    /// Who held it, and by which descriptor.
    holders: Vec<(ProcessId, Option<u32>)>,
    /// The same when somebody was last found to hold it: a look that a process's end overtakes finds nobody.
    held: Vec<(ProcessId, Option<u32>)>,
}

/// Who holds a socket, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Who {
    holders: Vec<ProcessId>,
    via: Option<Via>,
    uid: Option<u32>,
}

/// A socket in one of the states, of whatever age.
struct Found<'a> {
    cookie: u64,
    state: State,
    standing: Standing<'a>,
    who: Who,
    age: Option<Age>,
    idle: Option<u64>,
    finding: Finding,
    detail: Detail,
    fds: Vec<(u32, u32)>,
    leaked: bool,
}

impl Sight {
    /// The row; if the look was overtaken before it showed when the socket last sent data, with what the look before
    /// showed of that.
    fn row_with_times(&self) -> Row {
        let mut row = self.row;
        if let Some(detail) = &mut row.detail
            && detail.last_data_sent_ms.is_none()
            && let Some(sent) = self.sent
        {
            let ms = row.time.saturating_sub(sent) / 1_000_000;
            detail.last_data_sent_ms = Some(u32::try_from(ms).unwrap_or(u32::MAX));
        }
        row
    }
}

/// See the [module](self).
pub(super) struct Sights {
    criteria: Criteria,
    /// Counts looks.
    look: u32,
    sights: HashMap<u64, Sight>,
    /// Of the look under way: whose file an inode is.
    by_inode: HashMap<u32, u64>,
    known: HashMap<ProcessId, Holder>,
    processes: HashMap<ProcessId, Process>,
    growth: BTreeMap<(State, Who), Growth>,
    stacks: stacks::Known,
    /// Sockets that were left open until their processes ended.
    left: Vec<(State, Owner, Leaked)>,
    /// Where in it are those by cookie of which it is not known from where they were opened: that can come later.
    left_untold: HashMap<u64, usize>,
}

impl Sights {
    pub(super) fn new(criteria: Criteria) -> Self {
        Self {
            criteria,
            look: 0,
            sights: HashMap::new(),
            by_inode: HashMap::new(),
            known: HashMap::new(),
            processes: HashMap::new(),
            growth: BTreeMap::new(),
            stacks: stacks::Known::default(),
            left: Vec::new(),
            left_untold: HashMap::new(),
        }
    }

    pub(super) fn add(&mut self, fact: Fact<'_>) {
        match fact {
            Fact::Look(_) => {
                self.look += 1;
                self.by_inode.clear();
            }
            Fact::Seen(row) => self.row(row),
            Fact::Activity(activity) => self.activity(activity),
            Fact::Holder(holder) => self.holder(holder),
            Fact::Process(process) => {
                let id = (process.pid, process.start);
                self.processes.insert(id, process.clone());
            }
            Fact::Stack(stack) => self.stacks.add(stack),
            Fact::Called(cookie, site) => {
                if let Some(index) = self.left_untold.remove(&cookie) {
                    let (_, _, leaked) = &mut self.left[index];
                    leaked.site = site;
                }
            }
            Fact::Change(_) | Fact::TimeWaitEnd(_) | Fact::Lost(_) | Fact::LookEnd(_) => {}
        }
    }

    fn row(&mut self, row: &Row) {
        let asked = self.criteria.states.contains(row.state);
        if !asked && !matches!(row.state, State::Listen | State::Close) {
            return;
        }
        let cookie = row.socket.cookie;
        if row.inode != 0 {
            self.by_inode.insert(row.inode, cookie);
        }
        let mut sight = Sight {
            row: *row,
            look: self.look,
            by: known_by(row),
            moved: None,
            sent: None,
            holders: Vec::new(),
            held: Vec::new(),
        };
        if let Some(before) = self.sights.get_mut(&cookie)
            && before.row.state == row.state
            && before.row.socket.tuple == row.socket.tuple
        {
            sight.by = sight.by.min(before.by);
            sight.sent = sent(&before.row).or(before.sent);
            let held = match &mut before.holders {
                none if none.is_empty() => &mut before.held,
                holders => holders,
            };
            sight.held = std::mem::take(held);
            sight.moved = match (before.row.detail, row.detail) {
                (Some(then), Some(now)) if before.look < self.look => {
                    Some(then.send_queue != now.send_queue)
                }
                // Listed twice in one look.
                _ => before.moved,
            };
        }
        self.sights.insert(cookie, sight);
    }

    fn activity(&mut self, activity: &Activity) {
        let Some(sight) = self.sights.get_mut(&activity.cookie) else {
            return;
        };
        let row = &mut sight.row;
        let Some(detail) = &mut row.detail else {
            return;
        };
        // Of what the socket has come to since, the row says nothing.
        if sight.look != self.look || row.state != activity.state {
            return;
        }
        // What has moved since the row, has moved by then.
        let before_row = |ms: u32| {
            let at = activity.time.saturating_sub(u64::from(ms) * 1_000_000);
            let ms = row.time.saturating_sub(at) / 1_000_000;
            Some(u32::try_from(ms).unwrap_or(u32::MAX))
        };
        detail.last_data_sent_ms = before_row(activity.last_data_sent_ms);
        detail.last_ack_recv_ms = before_row(activity.last_ack_recv_ms);
        sight.by = sight.by.min(known_by(row));
    }

    fn holder(&mut self, holder: &Holder) {
        let Some(cookie) = self.by_inode.get(&holder.inode) else {
            return;
        };
        if let Some(sight) = self.sights.get_mut(cookie) {
            let id = (holder.pid, holder.start);
            sight.holders.push((id, holder.fd));
            self.known.insert(id, *holder);
        }
    }

    /// A socket left one of the states because its process ended.
    pub(super) fn left(&mut self, change: &Change<'_>) {
        let (Some(ns), Some(owner)) = (change.after, change.owner) else {
            return;
        };
        let sight = self.sights.get(&change.socket.cookie);
        let sight = sight.filter(|sight| sight.row.state == change.from);
        let accepted = owner.via == Via::Accept;
        let closed = change.time.saturating_sub(ns);
        let finding = sight.map_or(Finding::Left(Cause::Unknown), |sight| {
            // What was sent before the peer closed, `connect()` included, is no answer to that. When it was, the
            // kernel counts in jiffies, before the time of the row.
            let within_ms = sight.row.detail.map_or(0, |detail| detail.within_ms);
            let uncertain = JIFFY_NS + (u64::from(within_ms) + 1) * 1_000_000;
            let lately = sight.row.time.saturating_sub(self.criteria.older_than);
            let lately = lately.max(closed + uncertain);
            cause::of(&sight.row_with_times(), sight.moved, accepted, lately)
        });
        let Finding::Left(cause) = finding else {
            return;
        };
        if ns < self.criteria.older_than {
            return;
        }
        let detail = sight.and_then(|sight| sight.row.detail).unwrap_or_default();
        let holders = sight.map_or(&[][..], |sight| match &sight.holders[..] {
            [] => &sight.held,
            holders => holders,
        });
        let leaked = Leaked {
            socket: change.socket,
            age: Some(Age {
                ns,
                at_least: false,
            }),
            idle: None,
            site: change.site,
            cause,
            recv_queue: detail.recv_queue,
            send_queue: detail.send_queue,
            orderly: None,
            fds: fds(holders),
            at_exit: true,
        };
        if leaked.site == Site::UNTOLD {
            self.left_untold
                .insert(leaked.socket.cookie, self.left.len());
        }
        self.left.push((change.from, owner, leaked));
    }

    /// Who leaks what, after a look.
    pub(super) fn report(&mut self, tracker: &Tracker, now: u64) -> Report {
        self.forget_gone(tracker);
        let mut report = Report {
            time: now,
            ..Report::default()
        };
        let mut groups: BTreeMap<(State, Who), Vec<Found<'_>>> = BTreeMap::new();
        for sight in self.sights.values() {
            let Some(found) = self.find(sight, tracker, now) else {
                continue;
            };
            if found.leaked && found.finding == Finding::HalfClosed {
                report.half_closed += 1;
                continue;
            }
            report.younger += usize::from(!found.leaked && found.state != State::Close);
            let key = (found.state, found.who.clone());
            groups.entry(key).or_default().push(found);
        }
        self.growth.retain(|key, _| groups.contains_key(key));
        for (key, found) in groups {
            let growth = self.growth.entry(key.clone()).or_default();
            growth.add(now, u32::try_from(found.len()).unwrap_or(u32::MAX));
            if !found.iter().any(|found| found.leaked) {
                continue;
            }
            let per_minute = growth.per_minute();
            let (state, who) = key;
            let owner = found.iter().find_map(|found| found.standing.owner);
            report.leaks.push(Leak {
                state,
                holders: self.holding(&who, owner),
                via: who.via,
                uid: who.uid,
                sockets: found.iter().filter_map(leaked).collect(),
                per_minute,
                clear: Vec::new(),
                stacks: None,
            });
        }
        report.leaks.extend(self.leaks_until_exit());
        for leak in &mut report.leaks {
            leak.sockets.sort_by_key(|socket| {
                let age = socket.age.map(|age| age.ns).or(socket.idle);
                (std::cmp::Reverse(age), socket.socket.cookie)
            });
        }
        if tracker.has_stacks() {
            for leak in &mut report.leaks {
                leak.stacks = Some(self.stacks.of(&leak.sockets));
            }
        }
        report.leaks.sort_by_key(|leak| {
            let oldest = leak.oldest().map(|age| age.ns);
            std::cmp::Reverse((leak.sockets.len(), oldest))
        });
        let rows = self.sights.values().map(|sight| &sight.row);
        let picked = clear::Picked::by(report.leaks.iter().take(CLEARED), rows);
        for leak in report.leaks.iter_mut().take(CLEARED) {
            leak.clear = clear::commands(leak, tracker.home(), &picked);
        }
        report
    }

    /// What was left open until processes ended.
    fn leaks_until_exit(&self) -> impl Iterator<Item = Leak> {
        let mut left: BTreeMap<(State, Who), (Owner, Vec<Leaked>)> = BTreeMap::new();
        for (state, owner, leaked) in &self.left {
            let who = who(&[], Some(*owner), None);
            let (_, sockets) = left
                .entry((*state, who))
                .or_insert_with(|| (*owner, Vec::new()));
            sockets.push(leaked.clone());
        }
        left.into_iter()
            .map(|((state, who), (owner, sockets))| Leak {
                state,
                holders: self.holding(&who, Some(owner)),
                via: who.via,
                uid: None,
                sockets,
                per_minute: None,
                clear: Vec::new(),
                stacks: None,
            })
    }

    /// The sockets in the states asked for, with how long they have been in them, for the quantiles.
    pub(super) fn open(
        &self,
        tracker: &Tracker,
        now: u64,
    ) -> impl Iterator<Item = (dwell::Key, Option<u64>, bool)> {
        self.sights.values().filter_map(move |sight| {
            let found = self.find(sight, tracker, now)?;
            let holder = found.who.holders.first();
            let process = holder.and_then(|id| Some((id.0, self.known.get(id)?.comm)));
            let process = process.or_else(|| dwell::process(found.standing.owner));
            (found.state != State::Close).then_some((
                (found.state, process),
                found.age.map(|age| age.ns),
                found.age.is_some_and(|age| age.at_least),
            ))
        })
    }

    /// Forgets what is gone: what the last look did not show, unless its end would have been told.
    fn forget_gone(&mut self, tracker: &Tracker) {
        let look = self.look;
        self.sights.retain(|_, sight| {
            let told = tracker.sees_ends() && sight.row.state != State::Close;
            (sight.look == look || told) && tracker.standing(&sight.row).is_some()
        });
        let used: HashSet<ProcessId> = self
            .sights
            .values()
            .flat_map(|sight| sight.holders.iter().map(|(id, _)| *id))
            .chain(self.left.iter().map(|(_, owner, _)| owner.process()))
            .collect();
        self.known.retain(|id, _| used.contains(id));
        self.processes.retain(|id, _| used.contains(id));
    }

    /// What is known of a socket, if it is in one of the states, and was asked for.
    fn find<'a>(&self, sight: &Sight, tracker: &'a Tracker, now: u64) -> Option<Found<'a>> {
        let row = &sight.row;
        if row.state == State::Listen {
            return None;
        }
        let standing = tracker.standing(row)?;
        let owner = standing.owner.filter(|_| !tracker.has_private_pids());
        let accepted = owner.is_some_and(|owner| owner.via == Via::Accept);
        let older_than = self.criteria.older_than;
        let lately = now.saturating_sub(older_than);
        let finding = cause::of(row, sight.moved, accepted, lately);
        let holders = self.holders(sight, tracker, finding);
        let who = who(&holders, owner, row.detail);
        if !self.is_asked_for(&who, owner, &standing, tracker) {
            return None;
        }
        let age = match standing.since {
            Some(since) => Some(Age {
                ns: now.saturating_sub(since),
                at_least: false,
            }),
            // When it ended, nobody has seen.
            None if row.state == State::Close => None,
            None => Some(Age {
                ns: now.saturating_sub(sight.by),
                at_least: true,
            }),
        };
        let idle = row.detail.and_then(|detail| idle(&detail, row, now));
        let old = age.map(|age| age.ns).or(idle);
        Some(Found {
            cookie: row.socket.cookie,
            state: row.state,
            standing,
            who,
            age,
            idle,
            finding,
            detail: row.detail.unwrap_or_default(),
            fds: fds(&holders),
            leaked: old.is_some_and(|ns| ns >= older_than),
        })
    }

    /// Who holds the socket: by its descriptors, or, if nobody has accepted it, by those of the listeners it
    /// may wait at. (Those are not descriptors of the socket.)
    fn holders<'a>(
        &self,
        sight: &'a Sight,
        tracker: &Tracker,
        finding: Finding,
    ) -> Cow<'a, [(ProcessId, Option<u32>)]> {
        let waits = finding == Finding::Left(Cause::NotAccepted)
            || sight.row.inode == 0
                && matches!(sight.row.state, State::SynRecv | State::Established);
        if !waits {
            return Cow::Borrowed(&sight.holders);
        }
        tracker
            .listeners_of(&sight.row.socket)
            .filter_map(|cookie| self.sights.get(&cookie))
            .flat_map(|listener| listener.holders.iter().map(|(id, _)| (*id, None)))
            .collect()
    }

    fn is_asked_for(
        &self,
        who: &Who,
        owner: Option<Owner>,
        standing: &Standing<'_>,
        tracker: &Tracker,
    ) -> bool {
        let selection = tracker.selection();
        if who.holders.is_empty() {
            return selection.owner(owner.as_ref(), standing.container);
        }
        who.holders.iter().any(|id| {
            let process = self.processes.get(id);
            let container = process.and_then(|process| process.container.as_deref());
            let holder = self.known.get(id).map(|holder| Owner {
                pid: holder.pid,
                start: holder.start,
                comm: holder.comm,
                via: Via::Holder,
                tree: holder.tree,
            });
            let holder = holder.or(owner);
            selection.owner(holder.as_ref(), container.or(standing.container))
        })
    }

    /// `owner`: who it is by what it did, if no look showed who holds it.
    fn holding(&self, who: &Who, owner: Option<Owner>) -> Vec<Holding> {
        let holding = |id: &ProcessId| {
            let known = self.known.get(id).map(|holder| holder.comm);
            let comm = known.or_else(|| owner.map(|owner| owner.comm))?;
            Some(Holding {
                pid: id.0,
                comm,
                start: id.1,
                process: self.processes.get(id).cloned(),
            })
        };
        who.holders.iter().filter_map(holding).collect()
    }
}

/// Who holds a socket, given who holds its descriptors, and who it belonged to when last heard of.
fn who(holders: &[(ProcessId, Option<u32>)], owner: Option<Owner>, detail: Option<Detail>) -> Who {
    let mut ids: Vec<ProcessId> = holders.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    match owner {
        _ if !ids.is_empty() => Who {
            holders: ids,
            via: Some(Via::Holder),
            uid: None,
        },
        Some(owner) => Who {
            holders: vec![owner.process()],
            via: Some(owner.via),
            uid: None,
        },
        None => Who {
            holders: ids,
            via: None,
            uid: detail.map(|detail| detail.uid),
        },
    }
}

fn fds(holders: &[(ProcessId, Option<u32>)]) -> Vec<(u32, u32)> {
    let fds = holders.iter();
    fds.filter_map(|(id, fd)| Some((id.0, (*fd)?))).collect()
}

fn leaked(found: &Found<'_>) -> Option<Leaked> {
    let Finding::Left(cause) = found.finding else {
        return None;
    };
    found.leaked.then(|| Leaked {
        socket: Socket {
            cookie: found.cookie,
            ..found.standing.socket
        },
        age: found.age,
        idle: found.idle,
        site: found.standing.site,
        cause,
        recv_queue: found.detail.recv_queue,
        send_queue: found.detail.send_queue,
        orderly: found.detail.orderly,
        fds: found.fds.clone(),
        at_exit: false,
    })
}

/// By when a socket was in the state that a look shows, boot time. An ACK led it there, or came later: a FIN
/// carries one (`tcp_ack()` stamps `rcv_tstamp`, 4.4 to 6.18).
fn known_by(row: &Row) -> u64 {
    let by_ack = matches!(
        row.state,
        State::CloseWait | State::Established | State::FinWait2
    );
    let ms = row.detail.and_then(|detail| detail.last_ack_recv_ms);
    match ms {
        Some(ms) if by_ack => row.time.saturating_sub(u64::from(ms) * 1_000_000),
        _ => row.time,
    }
}

/// When data was last sent, boot time.
fn sent(row: &Row) -> Option<u64> {
    let ms = row.detail?.last_data_sent_ms?;
    Some(row.time.saturating_sub(u64::from(ms) * 1_000_000))
}

/// Nanoseconds since anything was sent or acknowledged.
fn idle(detail: &Detail, row: &Row, now: u64) -> Option<u64> {
    let ms = match (detail.last_data_sent_ms, detail.last_ack_recv_ms) {
        (Some(sent), Some(acked)) => Some(sent.min(acked)),
        (sent, acked) => sent.or(acked),
    }?;
    let at = row.time.saturating_sub(u64::from(ms) * 1_000_000);
    Some(now.saturating_sub(at))
}
