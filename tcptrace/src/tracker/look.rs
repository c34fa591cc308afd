//! What a look at the existing sockets adds: those from before the tracer, and, after records were
//! lost, what is still there.

use hashbrown::HashMap;
use tcptrace_ebpf::State;

use super::{
    Change, Connection, Fact, Life, Owner, OwnerId, Site, TIME_WAIT_SECONDS, TimeWaitKey, Tracker,
    Via, key,
    table::Keyed,
    time_wait::{Entry, Shown},
};
use crate::{
    event::{Holder, Look, Probes, Row, Scope, Socket},
    select,
};

/// A dump walks tables that change under it, and can miss a socket that is there all the time: 12 in a
/// million, measured on 6.18 with a small table under heavy load. What two in a row do not show is gone.
pub const MISSES: u32 = 2;

/// State of looking.
#[derive(Default)]
pub(super) struct Looks {
    /// Counts looks at everything; connections carry the number of the last that showed them, or that
    /// could not have, because it left their namespace out.
    all: u32,
    /// Counts looks of any kind, for timewait sockets and for those that may have become one.
    any: u32,
    /// How many looks at everything have begun and ended since records were lost.
    since_loss: u32,
    /// Records were lost since the look under way began: it may have shown what has changed unseen.
    lost_meanwhile: bool,
    /// The look under way.
    current: Option<Look>,
    /// Sockets it showed, by inode, whose holders are asked for.
    by_inode: HashMap<u32, u64>,
    /// Sockets it showed that nobody has accepted.
    not_accepted: Vec<u64>,
    /// Sockets it showed with a file that were their listener's as far as records told, and who holds them. Somebody
    /// has accepted them, unseen by the probes; or the record of that, and of what came before it, is still to be
    /// read.
    accepted: HashMap<u64, Option<Owner>>,
    /// Sockets it showed in another state than the records did, if no record explains that.
    corrections: Vec<(u64, State)>,
    /// `TCPTimeWaitOverflow` by namespace when last heard of.
    pub(super) overflows: HashMap<u32, u64>,
}

impl Looks {
    /// Records were lost: what is known may be wrong until looks have shown what exists.
    pub(super) const fn loss(&mut self) {
        self.since_loss = 0;
        self.lost_meanwhile = true;
    }

    /// The number that a connection carries which is seen now.
    const fn number(&self, connection: &Connection) -> u32 {
        if connection.closed_from.is_some() {
            self.any
        } else {
            self.all
        }
    }

    /// The number that a new connection carries.
    pub(super) const fn all(&self) -> u32 {
        self.all
    }

    /// The number that a timewait socket carries which is seen now.
    pub(super) const fn any(&self) -> u32 {
        self.any
    }
}

impl Tracker {
    pub(super) fn begin_look(&mut self, look: Look) {
        match look.scope {
            Scope::All => {
                self.look.all += 1;
                self.look.any += 1;
                self.finished.begin_look(look.time);
            }
            Scope::TimeWait => self.look.any += 1,
            Scope::Orphans | Scope::States(_) => {}
        }
        self.look.current = Some(look);
        self.look.lost_meanwhile = false;
        self.look.by_inode.clear();
        self.look.not_accepted.clear();
        self.look.accepted.clear();
        self.look.corrections.clear();
    }

    /// A socket that exists. Events beat it: a record tells when, a row only that.
    pub(super) fn row(&mut self, row: &Row, tell: &mut impl FnMut(Fact<'_>)) {
        if row.socket.cookie == 0 {
            return;
        }
        let known = self.finished.get(row.socket.cookie);
        let socket = known.map_or(&row.socket, |ended| &ended.socket);
        if row.state != State::Listen && self.verdict(socket) != select::Verdict::Yes {
            return;
        }
        tell(Fact::Seen(row));
        match row.state {
            State::Close => return self.finished.seen(row.socket.cookie),
            // A connection request, not a socket yet. It shares its cookie with the socket it may become,
            // and no record tells when it does not.
            State::SynRecv => return,
            _ => {}
        }
        if let Some(left_ms) = row.time_wait_ms {
            if self.selection.needs_time_wait() {
                self.time_wait_row(row, left_ms, tell);
            }
            return;
        }
        // The kernel lists a socket twice that becomes a timewait socket while it is being listed.
        if self.time_waits.contains(key(&row.socket)) {
            return;
        }
        let cookie = row.socket.cookie;
        if let Some(connection) = self.connections.get_mut(cookie) {
            connection.seen = self.look.number(connection);
            if connection.state != row.state {
                self.look.corrections.push((cookie, row.state));
            }
            match self.owners.get(connection.owner) {
                Some(owner) if owner.via == Via::Listener && row.inode != 0 => {
                    self.look.accepted.insert(cookie, None);
                }
                Some(_) => return,
                None => {}
            }
        } else {
            self.keep(Connection {
                socket: row.socket,
                state: row.state,
                since: None,
                owner: OwnerId::NONE,
                site: Site::BEFORE,
                cgroup: row.cgroup,
                kept_back: false,
                seen: self.look.all,
                last: 0,
                closed_from: None,
                stale: None,
            });
        }
        if row.inode != 0 {
            self.look.by_inode.insert(row.inode, cookie);
        } else if matches!(row.state, State::Established | State::CloseWait) {
            self.look.not_accepted.push(cookie);
        }
    }

    fn time_wait_row(&mut self, row: &Row, left_ms: u32, tell: &mut impl FnMut(Fact<'_>)) {
        let number = self.look.any;
        let key = key(&row.socket);
        // From the timer: when the minute started, if it is one.
        let entry = (row.state == State::TimeWait).then(|| {
            let passed_ms = (TIME_WAIT_SECONDS * 1000).saturating_sub(u64::from(left_ms));
            Entry {
                time: row.time.saturating_sub(passed_ms * 1_000_000),
                at_latest: true,
            }
        });
        let mut shown = (self.time_wait_probes == Probes::None).then(|| Shown {
            time: row.time,
            due: row.time + u64::from(left_ms) * 1_000_000,
            earlier: None,
        });
        if let Some(life) = self.time_waits.get_mut(key) {
            life.seen = number;
            if let Some(shown) = &mut shown {
                shown.earlier = match (entry, life.entered) {
                    // At the look before, it still was in FIN_WAIT2.
                    (Some(entry), None) => life
                        .shown
                        .as_ref()
                        .map(|before| entry.time.saturating_sub(before.time)),
                    _ => life.shown.as_ref().and_then(|before| before.earlier),
                };
                // A timer that is overdue does not say for how long.
                if let (Some(now), Some(then)) = (entry.filter(|_| left_ms > 0), life.entered) {
                    life.rearmed |= self.clocks.is_after(now.time, then.time);
                }
            }
            life.shown = shown.map(Box::new);
            if let Some(mut entry) = entry
                && life.entered.is_none()
            {
                // The kernel says TIME_WAIT before it starts the timer anew (`tcp_timewait_state_process()`).
                // A row of that moment shows the timer of FIN_WAIT2: as if TIME_WAIT had begun with that, or
                // before. Where it is so, the next look shows the same.
                let stale = !self.clocks.is_after(entry.time, life.last);
                if stale && !std::mem::replace(&mut life.doubted, true) {
                    return;
                }
                entry.time = entry.time.max(life.opened.unwrap_or(0));
                self.enter(key, entry, true, tell);
            }
            return;
        }
        // From before the tracer, or its making was lost, or is still to be read: then the full socket is
        // still needed.
        let cookie = row.socket.cookie;
        let connection = self.connections.get(cookie).cloned();
        let closed_from = connection
            .as_ref()
            .and_then(|connection| connection.closed_from);
        if closed_from.is_some() {
            self.forget(cookie);
        }
        if let (Some(shown), Some(entry), Some(closed)) = (&mut shown, entry, &connection) {
            // Not before the full socket was closed.
            shown.earlier = Some(entry.time.saturating_sub(closed.last));
        }
        let life = Life {
            socket: row.socket,
            owner: connection
                .as_ref()
                .map_or(OwnerId::NONE, |connection| connection.owner),
            cgroup: connection
                .as_ref()
                .map_or(0, |connection| connection.cgroup),
            opened: None,
            first: row.state,
            entered: entry,
            fin_wait2: connection
                .filter(|connection| connection.state == State::FinWait2)
                .and_then(|connection| connection.since),
            rearmed: false,
            pending: None,
            doubted: false,
            boot_to_monotonic_ns: self.clocks.boot_to_monotonic_ns,
            seen: number,
            last: row.time,
            shown: shown.map(Box::new),
        };
        self.waiting += usize::from(entry.is_none());
        let (cgroup, fin_wait2) = (life.cgroup, life.fin_wait2);
        let owner = self.owners.get(life.owner);
        self.time_waits.insert(life);
        if let Some(Entry { time, .. }) = entry
            && let Some(from) = closed_from
        {
            self.tell_change(
                Change {
                    time,
                    socket: row.socket,
                    from,
                    to: State::TimeWait,
                    after: fin_wait2.map(|since| time.saturating_sub(since)),
                    error: 0,
                    owner,
                    site: Site::BEFORE,
                    container: None,
                    by_exit: false,
                    late: true,
                    time_error: 0,
                },
                cgroup,
                tell,
            );
        }
    }

    /// A process holds a socket that the look showed. Of several, the lowest pid speaks for them.
    pub(super) fn holder(&mut self, holder: &Holder) {
        if self.traced && self.private_pids {
            return;
        }
        let Some(cookie) = self.look.by_inode.get(&holder.inode).copied() else {
            return;
        };
        let Some(connection) = self.connections.get(cookie) else {
            return;
        };
        let accepted = self.look.accepted.get_mut(&cookie);
        let known = match &accepted {
            Some(found) => **found,
            None => self.owners.get(connection.owner),
        };
        if known.is_some_and(|owner| owner.via != Via::Holder || holder.pid >= owner.pid) {
            return;
        }
        let owner = Some(Owner {
            pid: holder.pid,
            comm: holder.comm,
            start: holder.start,
            via: Via::Holder,
            tree: holder.tree,
        });
        match accepted {
            Some(found) => *found = owner,
            None => self.give(cookie, owner),
        }
    }

    fn give(&mut self, cookie: u64, owner: Option<Owner>) {
        let owner = self.owner_id(owner);
        if let Some(connection) = self.connections.get_mut(cookie) {
            connection.owner = owner;
        }
    }

    /// A look that left a namespace out has missed nothing there.
    fn excuse(&mut self, scope: Scope, netns: &[u32]) {
        let left_out = |socket: &Socket| !netns.contains(&socket.netns);
        if scope == Scope::All || self.uncertain > 0 {
            for connection in self.connections.values_mut() {
                let shown = scope == Scope::All || connection.closed_from.is_some();
                if shown && left_out(&connection.socket) {
                    connection.seen = self.look.number(connection);
                }
            }
        }
        for life in self.time_waits.values_mut() {
            if left_out(&life.socket) {
                life.seen = self.look.any;
            }
        }
    }

    /// Every record from before the end of the look is in.
    pub(super) fn end_look(&mut self, time: u64, netns: &[u32], tell: &mut impl FnMut(Fact<'_>)) {
        let Some(look) = self.look.current.take() else {
            return;
        };
        for cookie in std::mem::take(&mut self.look.not_accepted) {
            let Some(connection) = self.connections.get(cookie) else {
                continue;
            };
            if connection.owner == OwnerId::NONE {
                let owner = self.listener_owner(&connection.socket);
                self.give(cookie, owner);
            }
        }
        for (cookie, holder) in std::mem::take(&mut self.look.accepted) {
            let connection = self.connections.get(cookie);
            let owner = connection.and_then(|connection| self.owners.get(connection.owner));
            // Not necessarily the listener's process.
            if owner.is_some_and(|owner| owner.via == Via::Listener) {
                self.give(cookie, holder);
            }
        }
        for (cookie, state) in std::mem::take(&mut self.look.corrections) {
            // A record from just before the look may have been read since, and say the same and when.
            if let Some(connection) = self.connections.get_mut(cookie)
                && connection.last < look.time
                && connection.state != state
            {
                let listened = connection.state == State::Listen;
                connection.state = state;
                connection.since = None;
                if listened != (state == State::Listen) {
                    let socket = connection.socket;
                    self.index_listener(&socket, state);
                }
            }
        }
        self.look.by_inode.clear();
        if matches!(look.scope, Scope::Orphans | Scope::States(_)) {
            return;
        }
        self.excuse(look.scope, netns);
        let everything = look.scope == Scope::All;
        if everything {
            self.finished.end_look();
            self.look.since_loss += u32::from(!self.look.lost_meanwhile);
            self.gap &= self.look.since_loss < MISSES;
        }
        let any = self.look.any;
        let gone = |socket: &Socket, looks: u32, seen: u32, last: u64| {
            looks.saturating_sub(seen) >= MISSES
                && last < look.time
                && netns.contains(&socket.netns)
        };
        let mut connections: Vec<u64> = self
            .connections
            .values()
            .filter(|connection| {
                let looks = self.look.number(connection);
                (everything || connection.closed_from.is_some())
                    && gone(&connection.socket, looks, connection.seen, connection.last)
            })
            .map(Keyed::key)
            .collect();
        connections.sort_unstable();
        for cookie in connections {
            let Some(connection) = self.forget(cookie) else {
                continue;
            };
            // No timewait socket took over: the close was one.
            if let Some(from) = connection.closed_from {
                self.tell_change(
                    Change {
                        time: connection.last,
                        socket: connection.socket,
                        from,
                        to: State::Close,
                        after: connection
                            .since
                            .map(|since| connection.last.saturating_sub(since)),
                        error: 0,
                        owner: self.owners.get(connection.owner),
                        site: connection.site,
                        container: None,
                        by_exit: false,
                        late: true,
                        time_error: 0,
                    },
                    connection.cgroup,
                    tell,
                );
            }
        }
        let mut time_waits: Vec<TimeWaitKey> = self
            .time_waits
            .values()
            // One whose end is kept back is gone for a reason that will be told.
            .filter(|life| gone(&life.socket, any, life.seen, life.last) && life.pending.is_none())
            .map(Keyed::key)
            .collect();
        time_waits.sort_unstable();
        for key in time_waits {
            self.vanished(key, time, tell);
        }
    }
}
