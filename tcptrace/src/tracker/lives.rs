//! The lives of timewait sockets, from record to record.

use tcptrace_ebpf::State;

use super::{
    Change, Ending, Fact, Held, Owner, OwnerId, Site, TimeWaitEnd, TimeWaitKey, Tracker, key,
    time_wait::{self, Entry, Life, Pending, held_until},
};
use crate::{
    event::{Probes, TimeWait, Transition},
    select,
};

impl Life {
    /// A change of this socket, after an unknown time.
    const fn change(
        &self,
        owner: Option<Owner>,
        time: u64,
        from: State,
        to: State,
    ) -> Change<'static> {
        Change {
            time,
            socket: self.socket,
            from,
            to,
            after: None,
            error: 0,
            owner,
            site: Site::BEFORE,
            container: None,
            by_exit: false,
            late: false,
            time_error: 0,
        }
    }

    /// The end of its TIME_WAIT, after an unknown time.
    fn ended(
        &self,
        owner: Option<Owner>,
        time: u64,
        entry: Entry,
        ending: Ending,
    ) -> TimeWaitEnd<'static> {
        TimeWaitEnd {
            time,
            socket: self.socket,
            owner,
            container: None,
            entered: Some(entry.time),
            dwell: None,
            dwell_at_least: false,
            dwell_error: 0,
            fin_wait2: self.fin_wait2.map(|since| entry.time.saturating_sub(since)),
            rearmed: None,
            ending,
        }
    }
}

impl Tracker {
    pub(super) fn armed(&mut self, record: &TimeWait, tell: &mut impl FnMut(Fact<'_>)) {
        if record.socket.cookie == 0 {
            return;
        }
        let key = key(&record.socket);
        // Only a making has no timer yet, where functions tell; timers tell when they are set.
        let made = record.expires == 0 || self.time_wait_probes != Probes::Functions;
        if let Some(life) = self.time_waits.get_mut(key) {
            self.unexplained -= usize::from(life.withdraw());
            if made && life.opened.is_none() && record.time < life.last {
                // Made between the probes' attachment and the look that showed it already.
                self.waiting -= usize::from(life.entered.is_none());
                let life = self.new_life(record, true);
                self.waiting += usize::from(life.entered.is_none());
                self.time_waits.insert(life);
                return;
            }
            life.last = record.time;
            if record.substate == State::TimeWait {
                self.in_time_wait(record, tell);
            }
        } else if self.verdict(&record.socket) == select::Verdict::Yes {
            let life = self.new_life(record, made);
            self.waiting += usize::from(life.entered.is_none());
            self.time_waits.insert(life);
        }
    }

    /// What is known of a timewait socket from its first record. `made`: the record is of its making.
    pub(super) fn new_life(&self, record: &TimeWait, made: bool) -> Life {
        let connection = self.connections.get(record.socket.cookie);
        let fin_wait2 = connection
            .filter(|connection| connection.state == State::FinWait2)
            .and_then(|connection| connection.since);
        let mut life = Life {
            socket: record.socket,
            owner: connection.map_or(OwnerId::NONE, |connection| connection.owner),
            cgroup: connection.map_or(0, |connection| connection.cgroup),
            opened: made.then_some(record.time),
            first: record.substate,
            entered: None,
            fin_wait2: fin_wait2
                .or((made && record.substate == State::FinWait2).then_some(record.time)),
            rearmed: false,
            pending: None,
            doubted: false,
            boot_to_monotonic_ns: self.clocks.boot_to_monotonic_ns,
            seen: self.look.any(),
            last: record.time,
            shown: None,
        };
        if record.substate == State::TimeWait {
            life.entered = Some(life.entry(record, self.clocks));
        }
        life
    }

    /// A record shows the timer of a known timewait socket started, and TIME_WAIT reached.
    pub(super) fn in_time_wait(&mut self, record: &TimeWait, tell: &mut impl FnMut(Fact<'_>)) {
        let clocks = self.clocks;
        let functions = self.time_wait_probes == Probes::Functions && !self.gap;
        let key = key(&record.socket);
        let Some(life) = self.time_waits.get_mut(key) else {
            return;
        };
        if let Some(entered) = life.entered {
            // Started again. If the entry was only known from the timer, that may have been this.
            let again = clocks.is_after(clocks.armed(record), entered.time);
            life.rearmed |= again;
            // A look was faster than the record of the entry. Function probes miss no start, so that this is
            // the first.
            if entered.at_latest && life.first == State::FinWait2 && functions && !again {
                life.settle(
                    Entry {
                        time: record.time,
                        at_latest: false,
                    },
                    clocks,
                );
            }
            return;
        }
        let mut entry = life.entry(record, clocks);
        // Function probes miss no start: the first in TIME_WAIT is the entry, also of one that a look showed
        // in FIN_WAIT2.
        if entry.at_latest && functions {
            entry = Entry {
                time: record.time,
                at_latest: false,
            };
        }
        // Later than it began: an unseen entry, and this is the minute starting again.
        life.rearmed = clocks.is_after(clocks.armed(record), entry.time);
        let late = clocks.is_after(record.time, entry.time);
        self.enter(key, entry, late, tell);
    }

    /// TIME_WAIT of a socket that waited in FIN_WAIT2 is known to have begun.
    pub(super) fn enter(
        &mut self,
        key: TimeWaitKey,
        entry: Entry,
        late: bool,
        tell: &mut impl FnMut(Fact<'_>),
    ) {
        let Some(life) = self.time_waits.get_mut(key) else {
            return;
        };
        if life.entered.replace(entry).is_none() {
            self.waiting -= 1;
        }
        let after = life.fin_wait2.map(|since| entry.time.saturating_sub(since));
        let owner = self.owners.get(life.owner);
        let change = Change {
            after,
            late,
            ..life.change(owner, entry.time, State::FinWait2, State::TimeWait)
        };
        let cgroup = life.cgroup;
        self.tell_change(change, cgroup, tell);
    }

    pub(super) fn done(&mut self, record: &TimeWait, tell: &mut impl FnMut(Fact<'_>)) {
        if record.socket.cookie == 0 {
            return;
        }
        let key = key(&record.socket);
        if !self.time_waits.contains(key) {
            // Made before the tracer looked, or its record was lost.
            if self.verdict(&record.socket) != select::Verdict::Yes {
                return;
            }
            let life = self.new_life(record, false);
            self.waiting += usize::from(life.entered.is_none());
            self.time_waits.insert(life);
        }
        let Some(life) = self.time_waits.get_mut(key) else {
            return;
        };
        // Of two ends without a start between them, whose record was lost, the later is the end.
        self.unexplained -= usize::from(life.withdraw());
        life.last = record.time;
        let verdict = time_wait::verdict(record);
        if let time_wait::Verdict::Certain(ending) = verdict {
            self.end(key, record, ending, tell);
        } else {
            let due = held_until(record);
            let unexplained = verdict == time_wait::Verdict::Open;
            life.pending = Some(Pending { due, unexplained });
            self.unexplained += usize::from(unexplained);
            self.pending.push_back(Held {
                due,
                record: *record,
            });
        }
    }

    /// An end that was kept back until now is one, if no new start has followed.
    pub(super) fn believe(&mut self, held: &Held, tell: &mut impl FnMut(Fact<'_>)) {
        let key = key(&held.record.socket);
        let Some(life) = self.time_waits.get_mut(key) else {
            return;
        };
        if life.pending.take_if(|end| end.due == held.due).is_none() {
            return;
        }
        let ending = match time_wait::verdict(&held.record) {
            time_wait::Verdict::Certain(ending) | time_wait::Verdict::Unless(ending) => ending,
            time_wait::Verdict::Open => {
                self.unexplained -= 1;
                Ending::Unknown
            }
        };
        self.end(key, &held.record, ending, tell);
    }

    /// Ends without evidence are explained by what opens the same address pair next.
    pub(super) fn explain(&mut self, next: &Transition, tell: &mut impl FnMut(Fact<'_>)) {
        let ending = match (next.old, next.new) {
            (State::SynSent, _) => Ending::Reused,
            (State::Listen, State::SynRecv) => Ending::Reopened,
            _ => return,
        };
        let found = self.pending.iter().find(|held| {
            let socket = &held.record.socket;
            (socket.netns, socket.tuple) == (next.socket.netns, next.socket.tuple)
                && self.time_waits.get(key(socket)).is_some_and(|life| {
                    let end = life.pending.as_ref();
                    end.is_some_and(|end| end.unexplained && end.due == held.due)
                })
        });
        if let Some(Held { record, .. }) = found.copied() {
            self.unexplained -= 1;
            self.end(key(&record.socket), &record, ending, tell);
        }
    }

    /// A timewait socket is gone, and `record` is the last that was seen of it.
    pub(super) fn end(
        &mut self,
        key: TimeWaitKey,
        record: &TimeWait,
        ending: Ending,
        tell: &mut impl FnMut(Fact<'_>),
    ) {
        let clocks = self.clocks;
        let time = record.time;
        let Some(life) = self.time_waits.get(key) else {
            return;
        };
        if record.substate == State::TimeWait {
            let entry = life.entry(record, clocks);
            if life.entered.is_none() {
                self.enter(key, entry, true, tell);
            } else if let Some(life) = self.time_waits.get_mut(key) {
                life.settle(entry, clocks);
            }
        }
        let Some(life) = self.time_waits.remove(key) else {
            return;
        };
        self.waiting -= usize::from(life.entered.is_none());
        let owner = self.owners.get(life.owner);
        let change = life.change(owner, time, record.substate, State::Close);
        let Some(entry) = life.entered.filter(|_| record.substate == State::TimeWait) else {
            // Its peer never closed: this was FIN_WAIT2 to the end.
            let after = life.fin_wait2.map(|since| time.saturating_sub(since));
            self.tell_change(Change { after, ..change }, life.cgroup, tell);
            return;
        };
        let dwell = time.saturating_sub(entry.time);
        self.tell_change(
            Change {
                after: Some(dwell).filter(|_| !entry.at_latest),
                ..change
            },
            life.cgroup,
            tell,
        );
        self.tell_end(
            TimeWaitEnd {
                dwell: Some(dwell),
                dwell_at_least: entry.at_latest || life.slept(clocks),
                rearmed: life.was_rearmed(record, entry, clocks),
                ..life.ended(owner, time, entry, ending)
            },
            life.cgroup,
            tell,
        );
    }

    /// A timewait socket is gone, unseen.
    pub(super) fn vanished(
        &mut self,
        key: TimeWaitKey,
        time: u64,
        tell: &mut impl FnMut(Fact<'_>),
    ) {
        let Some(life) = self.time_waits.remove(key) else {
            return;
        };
        let Some(entry) = life.entered else {
            self.waiting -= 1;
            return;
        };
        let owner = self.owners.get(life.owner);
        let mut end = life.ended(owner, time, entry, Ending::Unknown);
        if let Some(shown) = &life.shown {
            let clocks = self.clocks;
            let dwell = time.saturating_sub(entry.time);
            // Gone since the last look that showed it; and the timer counts in jiffies.
            let unseen = time.saturating_sub(shown.time) + clocks.jiffies_ns(2);
            end.dwell = Some(dwell);
            end.dwell_at_least = shown.earlier.is_none() || life.slept(clocks);
            end.dwell_error = unseen + shown.earlier.unwrap_or(0);
            end.rearmed = life.rearmed.then_some(true);
            if shown.due <= shown.time {
                end.ending = Ending::Expired;
            }
            let change = Change {
                after: Some(dwell).filter(|_| !end.dwell_at_least),
                late: true,
                time_error: end.dwell_error,
                ..life.change(owner, time, State::TimeWait, State::Close)
            };
            self.tell_change(change, life.cgroup, tell);
        }
        self.tell_end(end, life.cgroup, tell);
    }
}
