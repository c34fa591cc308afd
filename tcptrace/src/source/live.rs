//! Events from the running kernel: records from the probes, looks at what exists, and what was lost.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tcptrace_ebpf::{Counter, State};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};

use super::{cgroups::KnownCgroups, looks::Looks, stacks::Stacks};
use crate::{
    event::{self, End, Event, Look, Lost, SCHEMA, Scope, Start, States},
    kernel::{
        clock, netns,
        probes::{self, Probes},
        procfs,
    },
    reason::Reason,
    select::Sockets,
    tracker::{MISSES, Needs},
};

/// A reader that has read something looks again after this time, and sleeps when it finds nothing.
/// The probes wake it only for the first record after an empty spell.
const DRAIN_EVERY: Duration = Duration::from_millis(20);
/// How often losses and clocks are checked where nothing else happens. Each time is two wake-ups: tokio's timers
/// wake once to move a timer from the slot of its second to that of its millisecond.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// After losses it is looked at everything more than once: so far apart, at least.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often, at most, it is looked whether orphans have come to TIME_WAIT.
const TIME_WAIT_LOOK_EVERY: Duration = Duration::from_millis(250);
/// After so many records the others have their turn: output, losses, signals.
const BATCH: usize = 16_384;
/// Clocks that differ by less have not been set.
const CLOCK_STEP_NS: i64 = 1_000_000;
/// How many of the last timewait sockets are remembered, to tell a close that made none.
const MADE: usize = 256;

/// What to trace.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether to trace.
    pub tracing: Tracing,
    /// Which sockets are asked for.
    pub sockets: Sockets,
    /// What to look at again and again.
    pub piles: Option<Piles>,
    /// End after this time.
    pub duration: Option<Duration>,
}

/// Whether to trace, and what the probes do.
#[derive(Clone, Debug)]
pub enum Tracing {
    /// Trace or fail.
    Required(probes::Settings),
    /// Trace if possible, else only look.
    Preferred(probes::Settings),
    /// Only look.
    Off,
}

impl Tracing {
    /// Has stacks recorded, or fails if that is not possible. (Only looked, there are none.)
    /// `buffer`: its size, if somebody asked for one.
    pub fn take_stacks(&mut self, buffer: Option<u32>) {
        if let Self::Required(settings) | Self::Preferred(settings) = self {
            settings.take_stacks();
            settings.buffer = buffer.unwrap_or(probes::STACKS_BUFFER);
            *self = Self::Required(settings.clone());
        }
    }
}

/// Sockets to look at again and again: those in states where they pile up.
#[derive(Clone, Copy, Debug)]
pub struct Piles {
    /// The states.
    pub states: States,
    /// How often, at most.
    pub every: Duration,
    /// Whether holders are told apart by whether they descend from this process.
    pub tree: bool,
    /// Whether nothing is of interest but these sockets as the last look shows them: then the first is told of
    /// only as far as the last needs it.
    pub only_last: bool,
}

/// The running kernel.
pub struct Live {
    /// `None` if it is only looked.
    probes: Option<Probes>,
    ready: Option<AsyncFd<OwnedFd>>,
    degraded: Vec<Reason>,
    options: Options,
    end: Option<Instant>,
    /// Records came in last time.
    busy: bool,
    next_check: Instant,
    /// No look at everything before this.
    next_look: Instant,
    /// How many looks at everything it still takes to make up for losses.
    looks_due: u32,
    /// This process; `None` where the probes number it otherwise.
    own_pid: Option<u32>,
    records: u64,
    lost: u64,
    missed: u64,
    /// When losses were last checked.
    losses_checked: u64,
    boot_to_utc_ns: i64,
    boot_to_monotonic_ns: i64,
    cgroups: KnownCgroups,
    /// If they were asked for.
    stacks: Option<Stacks>,
    looks: Looks,
    next_time_wait_look: Instant,
    next_pile_look: Instant,
    /// How many looks it takes to know that no socket is in the states where they pile up: 0 when so many have
    /// shown none, and no record has told of one since.
    pile_looks_due: u32,
    /// Cookies of the last timewait sockets made.
    made: [u64; MADE],
    made_at: usize,
    /// Records that could not be read; there should be none.
    malformed: u64,
}

/// A piece of work after which to pause: looking must not become the work.
struct Stint {
    began: Instant,
    cpu_ns: u64,
}

impl Stint {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            cpu_ns: clock::thread_cpu_ns(),
        }
    }

    /// How long to pause: so many times the CPU time that it took. How long it waited for a CPU is no work, and must
    /// not make the next look late as well; but records wait meanwhile, so that as long is left for them.
    fn pause(&self, times: u32) -> Duration {
        let cpu = Duration::from_nanos(clock::thread_cpu_ns() - self.cpu_ns);
        (cpu * times).max(self.began.elapsed())
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

/// Why [`Live::wait`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// There may be something to read.
    Work,
    /// It is over: a signal, or the time is up.
    Stop,
}

impl Live {
    /// Attaches the probes. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When this kernel, or this user, cannot trace.
    pub fn start(options: Options) -> Result<Self, anyhow::Error> {
        let mut degraded = Vec::new();
        let mut probes = match &options.tracing {
            Tracing::Required(settings) => Some(probes::load(settings)?),
            Tracing::Preferred(settings) => match probes::load(settings) {
                Ok(probes) => Some(probes),
                Err(error) => {
                    degraded.push(Reason::new(
                        format_args!("not traced, only looked up now and then: {}", error.what),
                        error.fix,
                    ));
                    None
                }
            },
            Tracing::Off => None,
        };
        let ready = match &mut probes {
            Some(probes) => {
                let ring = probes.records().as_fd().try_clone_to_owned()?;
                // SAFETY: an owned descriptor stays open, and the same, for as long as it is registered.
                Some(unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?)
            }
            None => None,
        };
        degraded.extend(
            probes
                .iter()
                .flat_map(|probes| probes.degraded.iter().cloned()),
        );
        let (cgroups, no_containers) = KnownCgroups::open();
        degraded.extend(no_containers);
        let stacks = match &options.tracing {
            Tracing::Required(settings) if settings.has_stacks() => Some(Stacks::new()?),
            _ => None,
        };
        let now = Instant::now();
        let looks = Looks::new(
            options.sockets.netns.clone(),
            options.piles,
            probes.is_some(),
        );
        Ok(Self {
            busy: probes.is_some(),
            probes,
            ready,
            degraded,
            next_pile_look: now + options.piles.map_or(CHECK_EVERY, |piles| piles.every),
            end: options.duration.map(|duration| now + duration),
            options,
            next_check: now + CHECK_EVERY,
            next_look: now,
            looks_due: 0,
            own_pid: (!procfs::has_private_pids()).then(std::process::id),
            records: 0,
            lost: 0,
            missed: 0,
            losses_checked: 0,
            boot_to_utc_ns: clock::boot_to_utc_ns(),
            boot_to_monotonic_ns: clock::boot_to_monotonic_ns(),
            cgroups,
            stacks,
            looks,
            next_time_wait_look: now,
            pile_looks_due: MISSES,
            made: [0; MADE],
            made_at: 0,
            malformed: 0,
        })
    }

    /// Whether transitions are traced, and not only sockets looked up.
    #[must_use]
    pub const fn is_traced(&self) -> bool {
        self.probes.is_some()
    }

    /// What does not work here.
    #[must_use]
    pub fn degraded(&self) -> &[Reason] {
        &self.degraded
    }

    /// The loaded probes, to read their log; `None` if it is only looked.
    pub fn ebpf(&mut self) -> Option<&mut aya::Ebpf> {
        self.probes.as_mut().map(Probes::ebpf)
    }

    /// The first events: how it is traced, and what exists already.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn begin(&mut self, each: &mut impl FnMut(&Event)) -> io::Result<Vec<Reason>> {
        let read = |path| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .into()
        };
        each(&Event::Start(Box::new(Start {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            time: clock::boot_ns(),
            boot_to_utc_ns: self.boot_to_utc_ns,
            boot_to_monotonic_ns: self.boot_to_monotonic_ns,
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            host: read("/proc/sys/kernel/hostname"),
            kernel: read("/proc/sys/kernel/osrelease"),
            hz: clock::hz(),
            netns: netns::own_inode().unwrap_or(0),
            transitions: self.probes.is_some(),
            private_pids: self.own_pid.is_none(),
            stacks: self.stacks.is_some(),
            time_wait: self.time_wait_probes(),
            accept: self
                .probes
                .as_ref()
                .map_or(event::Probes::None, |probes| probes.accept),
            sockets: self.options.sockets.clone(),
        })));
        let unseen = self.look(Scope::All, each)?;
        if self.probes.is_some() {
            self.looks.begin_overflows(each);
        }
        Ok(unseen)
    }

    fn time_wait_probes(&self) -> event::Probes {
        let probes = self.probes.as_ref();
        probes.map_or(event::Probes::None, |probes| probes.time_wait)
    }

    /// Waits until there may be something to do. `stop` ends it all.
    pub async fn wait(&mut self, needs: Needs, stop: impl Future<Output = ()>) -> Wake {
        let now = Instant::now();
        let mut until = self.next_check;
        if let Some(tick) = needs.tick_by {
            let left = tick.saturating_sub(clock::boot_ns());
            until = until.min(now + Duration::from_nanos(left));
        }
        if self.busy {
            until = until.min(now + DRAIN_EVERY);
        }
        if let Some(end) = self.end {
            until = until.min(end);
        }
        if self.looks_due > 0 {
            until = until.min(self.next_look);
        }
        if needs.time_wait_look {
            until = until.min(self.next_time_wait_look);
        }
        if self.options.piles.is_some() {
            until = until.min(self.next_pile_look);
        }
        let busy = self.busy;
        let readable = async {
            match &self.ready {
                Some(ready) if !busy => match ready.readable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    // The runtime is shutting down.
                    Err(_) => std::future::pending().await,
                },
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop => return Wake::Stop,
            () = sleep_until(until) => {}
            () = readable => {}
        }
        if self.end.is_some_and(|end| Instant::now() >= end) {
            Wake::Stop
        } else {
            Wake::Work
        }
    }

    /// For stacks, the files of many processes are kept open: takes as many descriptors as this process may.
    pub fn raise_file_limit(&self) {
        if self.stacks.is_some() {
            let limit = getrlimit(Resource::Nofile);
            // Without, frames of files that cannot be opened have no names.
            let _ = setrlimit(
                Resource::Nofile,
                Rlimit {
                    current: limit.maximum,
                    ..limit
                },
            );
        }
    }

    /// Reads what has come, and sees to what is due.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn work(&mut self, needs: Needs, each: &mut impl FnMut(&Event)) -> io::Result<()> {
        let now = clock::boot_ns();
        let drained = self.drain(each);
        self.busy = drained > 0;
        if let Some(stacks) = &mut self.stacks {
            stacks.told(each);
        }
        let check = Instant::now() >= self.next_check;
        if check || self.busy {
            self.check_losses(each);
        }
        if check {
            self.next_check = Instant::now() + CHECK_EVERY;
            if let Some(stacks) = &mut self.stacks {
                stacks.look();
            }
            self.check_clocks(each);
        }
        if self.looks_due > 0 && Instant::now() >= self.next_look {
            self.looks_due -= 1;
            let stint = Stint::begin();
            self.look(Scope::All, each)?;
            self.next_look = Instant::now() + stint.pause(10).max(LOOK_EVERY);
        } else if needs.time_wait_look && Instant::now() >= self.next_time_wait_look {
            let probed = self.time_wait_probes() != event::Probes::None;
            let scope = if probed {
                Scope::Orphans
            } else {
                Scope::TimeWait
            };
            let stint = Stint::begin();
            self.look(scope, each)?;
            self.next_time_wait_look = Instant::now() + stint.pause(20).max(TIME_WAIT_LOOK_EVERY);
        }
        if let Some(piles) = self.options.piles
            && Instant::now() >= self.next_pile_look
        {
            let stint = Stint::begin();
            self.look_at_piles(piles, needs, each)?;
            // Where a program is watched, looking is a good part of the work.
            let times = if piles.tree { 4 } else { 20 };
            self.next_pile_look = Instant::now() + stint.pause(times).max(piles.every);
        }
        // With records left in the buffer, time has not come to now.
        if drained < BATCH && (check || needs.tick_by.is_some_and(|tick| tick <= now)) {
            each(&Event::Tick { time: now });
        }
        Ok(())
    }

    /// The states in which sockets pile up.
    fn pile_states(&self) -> States {
        self.options
            .piles
            .map(|piles| piles.states)
            .unwrap_or_default()
    }

    /// Looks at what piles up, if there may be anything: a look walks the kernel's whole table.
    fn look_at_piles(
        &mut self,
        piles: Piles,
        needs: Needs,
        each: &mut impl FnMut(&Event),
    ) -> io::Result<()> {
        // What has come, or was lost, may be what has piled up.
        while self.drain(each) == BATCH {}
        self.check_losses(each);
        let scope = self.pile_scope(piles, needs);
        if scope == Scope::All || self.pile_looks_due > 0 {
            self.look(scope, each)?;
            return Ok(());
        }
        // There is nothing, as a look would have found.
        let time = clock::boot_ns();
        each(&Event::Look(Look { time, scope }));
        let netns = Vec::new();
        each(&Event::LookEnd { time, netns });
        Ok(())
    }

    /// What to look at for what piles up: everything, if connections may be over whose sockets are still
    /// held, or if nothing tells what goes.
    fn pile_scope(&self, piles: Piles, needs: Needs) -> Scope {
        let finished = piles.states.contains(State::CloseWait)
            && (needs.finished_look || self.looks.may_have_finished());
        if self.probes.is_none() || finished {
            Scope::All
        } else {
            Scope::States(piles.states)
        }
    }

    /// The last events.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn finish(&mut self, needs: Needs, each: &mut impl FnMut(&Event)) -> io::Result<()> {
        while self.drain(each) == BATCH {}
        if let Some(stacks) = &mut self.stacks {
            stacks.finish(each);
        }
        if let Some(piles) = self.options.piles {
            self.look_at_piles(piles, needs, each)?;
        }
        self.check_losses(each);
        each(&Event::End(End {
            time: clock::boot_ns(),
            records: self.records,
            lost: self.lost + self.missed + self.malformed,
            mptcp: self
                .probes
                .as_ref()
                .map_or(0, |probes| probes.count(Counter::Mptcp)),
        }));
        Ok(())
    }

    /// Hands on what is in the ring buffer, but no more than a batch. Returns how many records.
    fn drain(&mut self, each: &mut impl FnMut(&Event)) -> usize {
        let mut count = 0;
        let mut malformed = 0;
        while count < BATCH
            && let Some(decoded) = self.next_record(each)
        {
            count += 1;
            match decoded {
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.before(&event, each);
                    each(&event);
                }
                Err(error) => {
                    malformed += 1;
                    if self.malformed + malformed == 1 {
                        eprintln!(
                            "tcptrace: the probes wrote {error}: such records are left out and count as \
                             lost; please report it"
                        );
                    }
                }
            }
        }
        self.records += count as u64 - malformed;
        self.malformed += malformed;
        count
    }

    /// The next event; none, if it has been handed on.
    fn next_record(
        &mut self,
        each: &mut impl FnMut(&Event),
    ) -> Option<Result<Option<Event>, event::DecodeError>> {
        let record = self.probes.as_mut()?.records().next()?;
        if let Some(stacks) = &mut self.stacks
            && Stacks::is_stack(&record)
        {
            return Some(stacks.take(&record, each).map(|()| None));
        }
        Some(event::decode(&record).map(|event| Some(not_called_by(self.own_pid, event))))
    }

    /// What has to be known before an event can be understood.
    fn before(&mut self, event: &Event, each: &mut impl FnMut(&Event)) {
        match event {
            Event::Transition(transition) => {
                self.cgroups.resolve(transition.cgroup, each);
                if self.pile_states().contains(transition.new) {
                    self.pile_looks_due = MISSES;
                }
                // A close that ought to have made a timewait socket and did not: were there too many?
                if self.time_wait_probes() != event::Probes::None
                    && transition.new == State::Close
                    && matches!(transition.old, State::FinWait2 | State::Closing)
                    && transition.error == 0
                    && !self.made.contains(&transition.socket.cookie)
                {
                    // Or was the record of it lost? A check after this record was made knows.
                    if self.losses_checked <= transition.time {
                        self.check_losses(each);
                    }
                    self.looks
                        .overflow(transition.socket.netns, transition.time, each);
                }
            }
            Event::TimeWaitArmed(record) => {
                self.made[self.made_at % MADE] = record.socket.cookie;
                self.made_at += 1;
                let socket = &record.socket;
                if record.substate == State::FinWait2 {
                    self.looks.orphan(socket.netns, socket.cookie, record.time);
                } else {
                    self.looks.settled(socket.cookie);
                }
            }
            Event::TimeWaitDone(record) => self.looks.settled(record.socket.cookie),
            _ => {}
        }
    }

    /// Looks at what exists. Returns what could not be looked at.
    fn look(&mut self, scope: Scope, each: &mut impl FnMut(&Event)) -> io::Result<Vec<Reason>> {
        let probes = self.probes.as_mut().filter(|_| self.own_pid.is_some());
        let looked = self.looks.look(scope, probes, &mut |event| {
            if let Event::Socket(row) = event {
                self.cgroups.resolve(row.cgroup, each);
            }
            each(event);
        })?;
        if matches!(scope, Scope::All | Scope::States(_)) {
            // A connection request is no socket yet, and no record tells of it.
            let untold = self.pile_states().contains(State::SynRecv);
            self.pile_looks_due = if untold || looked.failed || self.looks.have_piled() {
                MISSES
            } else {
                self.pile_looks_due.saturating_sub(1)
            };
        }
        // Records from before the look's end must come before its conclusions.
        while self.drain(each) == BATCH {}
        each(&Event::LookEnd {
            time: clock::boot_ns(),
            netns: looked.netns,
        });
        Ok(looked.unseen)
    }

    fn check_losses(&mut self, each: &mut impl FnMut(&Event)) {
        self.losses_checked = clock::boot_ns();
        let Some(probes) = &self.probes else {
            return;
        };
        let (lost, missed) = (probes.count(Counter::Lost), probes.missed());
        if lost > self.lost || missed > self.missed {
            each(&Event::Lost(Lost {
                time: clock::boot_ns(),
                records: lost - self.lost,
                missed: missed - self.missed,
            }));
            (self.lost, self.missed) = (lost, missed);
            self.looks_due = MISSES;
            self.pile_looks_due = MISSES;
        }
    }

    fn check_clocks(&mut self, each: &mut impl FnMut(&Event)) {
        let utc = clock::boot_to_utc_ns();
        let monotonic = clock::boot_to_monotonic_ns();
        if (utc - self.boot_to_utc_ns).abs() > CLOCK_STEP_NS
            || (monotonic - self.boot_to_monotonic_ns).abs() > CLOCK_STEP_NS
        {
            (self.boot_to_utc_ns, self.boot_to_monotonic_ns) = (utc, monotonic);
            each(&Event::Clock {
                time: clock::boot_ns(),
                boot_to_utc_ns: utc,
                boot_to_monotonic_ns: monotonic,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use tcptrace_ebpf::{Flags, Kind};
    use zerocopy::{FromZeros as _, IntoBytes as _};

    use super::*;
    use crate::event::Transition;

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
