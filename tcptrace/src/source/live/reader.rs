//! From the ring buffer to events: in bounded batches, and with a count of what was lost.

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use tcptrace_ebpf::{Counter, State};

use super::storm::Makers;
use crate::{
    event::{self, DecodeError, Event, Lost, States, Transition},
    kernel::{clock, probes::Records, ring::Mark},
    source::{Sink, cgroups::KnownCgroups, orphans::Orphans, overflows::Overflows, stacks::Stacks},
};

/// After so many records, output is handed over, and signals are heeded.
const BATCH: usize = 1024;
/// How often it is asked, while there is no room for output, whether to end.
const ROOM_POLL: Duration = Duration::from_millis(50);
/// After so long without room for output, that is said.
const BLOCKED: Duration = Duration::from_secs(2);
/// How many of the last timewait sockets are remembered, to tell a close that made none.
const MADE: usize = 256;

/// Reads what the probes write.
pub(in crate::source) struct Reader {
    /// `None` if nothing is traced.
    records: Option<Records>,
    /// This process; `None` where the probes number it otherwise.
    own_pid: Option<u32>,
    time_wait: event::Probes,
    /// States in which sockets are watched.
    watched: States,
    pub(in crate::source) cgroups: KnownCgroups,
    /// If they were asked for.
    pub(super) stacks: Option<Stacks>,
    pub(in crate::source) orphans: Orphans,
    pub(super) overflows: Overflows,
    /// Cookies of the last timewait sockets made.
    made: [u64; MADE],
    made_at: usize,
    makers: Makers,
    pub(super) tally: Tally,
    /// Records were lost since this was last taken back.
    pub(super) has_lost: bool,
    /// A socket has entered a watched state since this was last taken back.
    pub(super) has_watched: bool,
    /// When losses were last checked, boot time.
    losses_checked: u64,
    /// That nobody takes the output has been said.
    said_blocked: bool,
    /// Who made a storm has been said.
    said_storm: bool,
}

/// Counts of records.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    /// Read.
    pub(super) read: u64,
    /// Of which there was no room in the buffer.
    lost: u64,
    /// Probes that did not run.
    missed: u64,
    /// That could not be understood; there should be none.
    malformed: u64,
    /// That were left in the buffer at the end.
    pub(super) unread: u64,
}

impl Tally {
    /// Of all that happened, what is not known.
    pub(super) const fn unknown(&self) -> u64 {
        self.lost + self.missed + self.malformed + self.unread
    }
}

/// When to give up a piece of work before it is done.
#[derive(Clone, Copy, Debug)]
pub(in crate::source) struct Limits {
    /// At this time.
    pub(super) deadline: Option<Instant>,
    /// As soon as the sink says that all is over.
    pub(super) heed_stop: bool,
}

impl Limits {
    pub(super) fn are_reached(&self, sink: &mut impl Sink) -> bool {
        self.deadline.is_some_and(|at| Instant::now() >= at) || (self.heed_stop && sink.is_over())
    }
}

/// The event, but that this process, `own_pid`, called nothing: it has no connections. While it finds out whose a
/// descriptor is, the kernel holds the file for it; if its process closes it in that moment, whoever lets go of it last
/// closes the socket, and that is not who owned it.
fn not_called_by(own_pid: Option<u32>, mut event: Event) -> Event {
    if let Event::Transition(transition) = &mut event {
        transition.owned &= Some(transition.task.pid) != own_pid;
    }
    event
}

/// The event, with the start of its task as `/proc` would show it: see [`clock::comparable_start`].
fn with_comparable_start(mut event: Event) -> Event {
    let task = match &mut event {
        Event::Transition(transition) => &mut transition.task,
        Event::Accept(accept) => &mut accept.task,
        _ => return event,
    };
    task.start = clock::comparable_start(task.start);
    event
}

impl Reader {
    pub(super) fn new(
        records: Option<Records>,
        own_pid: Option<u32>,
        time_wait: event::Probes,
        watched: States,
        cgroups: KnownCgroups,
        stacks: Option<Stacks>,
    ) -> Self {
        Self {
            records,
            own_pid,
            time_wait,
            watched,
            cgroups,
            stacks,
            orphans: Orphans::default(),
            overflows: Overflows::new(),
            made: [0; MADE],
            made_at: 0,
            makers: Makers::default(),
            tally: Tally::default(),
            has_lost: false,
            has_watched: false,
            losses_checked: 0,
            said_blocked: false,
            said_storm: false,
        }
    }

    /// A descriptor that is readable when records have come after all had been read; `None` if nothing is traced.
    pub(super) fn descriptor(&self) -> Option<io::Result<OwnedFd>> {
        let records = self.records.as_ref()?;
        Some(records.ring.as_fd().try_clone_to_owned())
    }

    /// Where the probes have come to; `None` if nothing is traced.
    pub(super) fn mark(&self) -> Option<Mark> {
        Some(self.records.as_ref()?.ring.mark())
    }

    /// A quarter of the ring buffer, in bytes.
    pub(super) fn quarter(&self) -> usize {
        self.records
            .as_ref()
            .map_or(0, |records| records.ring.size() / 4)
    }

    /// Whether so many records wait that the reader should not sleep.
    pub(in crate::source) fn is_filling(&self) -> bool {
        self.records
            .as_ref()
            .is_some_and(|records| records.ring.is_filling())
    }

    /// A count of the probes; 0 if nothing is traced.
    pub(super) fn count(&self, counter: Counter) -> u64 {
        self.records
            .as_ref()
            .map_or(0, |records| records.count(counter))
    }

    /// Emits the records from before `mark`: not those that come meanwhile, so that it comes to an end. Breaks off where
    /// a limit is reached.
    pub(in crate::source) fn drain(
        &mut self,
        mark: Option<Mark>,
        limits: &Limits,
        sink: &mut impl Sink,
    ) -> ControlFlow<()> {
        let Some(mark) = mark else {
            return ControlFlow::Continue(());
        };
        loop {
            self.wait_room(limits, sink)?;
            let is_full = self.batch(mark, sink) == BATCH;
            sink.flush();
            if !is_full {
                return ControlFlow::Continue(());
            }
            if limits.are_reached(sink) {
                return ControlFlow::Break(());
            }
        }
    }

    /// Waits until the sink has room for the output of another batch. Meanwhile the ring buffer fills up, and then the
    /// probes count what finds no room in it.
    pub(in crate::source) fn wait_room(
        &mut self,
        limits: &Limits,
        sink: &mut impl Sink,
    ) -> ControlFlow<()> {
        if sink.has_room() {
            return ControlFlow::Continue(());
        }
        let mut began = Instant::now();
        while !sink.wait_room(ROOM_POLL) {
            if limits.are_reached(sink) {
                return ControlFlow::Break(());
            }
            if began.elapsed() >= BLOCKED {
                began = Instant::now();
                if !std::mem::replace(&mut self.said_blocked, true) {
                    eprintln!(
                        "tcptrace: the output is not taken, so events are being lost: whatever reads it is slow, \
                         stopped or blocked"
                    );
                }
                // A line of output every now and then, also where there is no room.
                self.check_losses(&mut |event| sink.emit(event));
            }
        }
        self.said_blocked = false;
        ControlFlow::Continue(())
    }

    /// Leaves the records from before `mark` unread, and counts them as lost.
    pub(super) fn skip(&mut self, mark: Option<Mark>) {
        if let (Some(records), Some(mark)) = (&mut self.records, mark) {
            while !records.ring.is_past(mark) && records.ring.read().is_some() {
                self.tally.unread += 1;
            }
        }
    }

    /// Emits records from before `mark`, but no more than a batch. Returns how many there were.
    fn batch(&mut self, mark: Mark, sink: &mut impl Sink) -> usize {
        let mut count = 0;
        let mut malformed = 0;
        let emit = &mut |event: &Event| sink.emit(event);
        while count < BATCH
            && let Some(decoded) = self.next(mark, emit)
        {
            count += 1;
            match decoded {
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.before(&event, emit);
                    emit(&event);
                }
                Err(error) => {
                    malformed += 1;
                    if self.tally.malformed + malformed == 1 {
                        eprintln!(
                            "tcptrace: the probes wrote {error}: such records are left out and count as \
                             lost; please report it"
                        );
                    }
                }
            }
        }
        self.tally.read += count as u64 - malformed;
        self.tally.malformed += malformed;
        count
    }

    /// The next event from before `mark`; none, if it has been emitted.
    fn next(
        &mut self,
        mark: Mark,
        emit: &mut impl FnMut(&Event),
    ) -> Option<Result<Option<Event>, DecodeError>> {
        let ring = &mut self.records.as_mut()?.ring;
        if ring.is_past(mark) {
            return None;
        }
        let record = ring.read()?;
        if let Some(stacks) = &mut self.stacks
            && Stacks::is_stack(&record)
        {
            return Some(stacks.take(&record, emit).map(|()| None));
        }
        Some(event::decode(&record).map(|event| {
            let event = with_comparable_start(event);
            Some(not_called_by(self.own_pid, event))
        }))
    }

    /// What has to be known before an event can be understood.
    fn before(&mut self, event: &Event, emit: &mut impl FnMut(&Event)) {
        match event {
            Event::Transition(transition) => {
                self.makers.add(transition);
                self.cgroups.resolve(transition.cgroup, emit);
                self.has_watched |= self.watched.contains(transition.new);
                // A close that ought to have made a timewait socket and did not: were there too many?
                if self.should_have_made(transition) {
                    // Or was the record of it lost? A check after this record was made knows.
                    if self.losses_checked <= transition.time {
                        self.check_losses(emit);
                    }
                    let netns = transition.socket.netns;
                    self.overflows.include(netns, transition.time, emit);
                }
            }
            Event::TimeWaitArmed(record) => {
                self.made[self.made_at % MADE] = record.socket.cookie;
                self.made_at += 1;
                let socket = &record.socket;
                if record.substate == State::FinWait2 {
                    self.orphans.add(socket.netns, socket.cookie, record.time);
                } else {
                    self.orphans.remove(socket.cookie);
                }
            }
            Event::TimeWaitDone(record) => self.orphans.remove(record.socket.cookie),
            _ => {}
        }
    }

    /// Whether this close should have left a timewait socket behind, and has not.
    fn should_have_made(&self, transition: &Transition) -> bool {
        self.time_wait != event::Probes::None
            && transition.new == State::Close
            && matches!(transition.old, State::FinWait2 | State::Closing)
            && transition.error == 0
            && !self.made.contains(&transition.socket.cookie)
    }

    /// Emits how many records were lost since the last check, if any were.
    pub(super) fn check_losses(&mut self, emit: &mut impl FnMut(&Event)) {
        let now = clock::boot_ns();
        self.losses_checked = now;
        let Some(records) = &self.records else {
            return;
        };
        let (lost, missed) = (records.count(Counter::Lost), records.missed());
        let tally = &mut self.tally;
        if lost > tally.lost || missed > tally.missed {
            let loss = Lost {
                time: now,
                records: lost - tally.lost,
                missed: missed - tally.missed,
            };
            (tally.lost, tally.missed) = (lost, missed);
            self.has_lost = true;
            emit(&Event::Lost(loss));
            self.say_storm(now, loss.records);
        }
    }

    /// Says once who made what records were lost to.
    fn say_storm(&mut self, now: u64, lost: u64) {
        if !self.said_storm
            && lost > 0
            && let Some(storm) = self.makers.storm(now, lost)
        {
            self.said_storm = true;
            eprintln!("tcptrace: records are lost in a storm: {storm}");
        }
    }

    /// Counts who makes transitions anew, as is done now and then: what was long ago is no part of a storm.
    pub(super) fn forget_makers(&mut self) {
        self.makers.reset();
    }
}

#[cfg(test)]
mod tests {
    use tcptrace_ebpf::{Flags, Kind};
    use zerocopy::{FromZeros as _, IntoBytes as _};

    use super::*;

    #[test]
    fn tcptrace_itself_calls_nothing() {
        let mut record = tcptrace_ebpf::Transition::new_zeroed();
        record.header.pid = 7;
        record.header.flags = Flags::OWNED;
        record.header.kind = Kind::Transition as u8;
        record.header.family = 2;
        record.old = State::Established as u8;
        record.new = State::FinWait1 as u8;
        let event = event::decode(record.as_bytes()).unwrap();
        for (own_pid, called) in [(Some(7), false), (Some(8), true), (None, true)] {
            let Event::Transition(Transition { owned, .. }) = not_called_by(own_pid, event.clone())
            else {
                panic!("{event:?}");
            };
            assert_eq!(owned, called, "{own_pid:?}");
        }
    }
}
