//! Events from the running kernel: records from the probes, scans of what exists, and what was lost.
//!
//! One loop: first the records that have come are read ([`Reader`]), then whatever is due is done (losses, clocks,
//! scans), and then it sleeps, unless the ring buffer fills up. Nothing in it goes on until something is *empty*: records
//! are read up to where the probes had come to when the reading began, so that no load keeps it from what is due, from a
//! signal, or from its end.

mod pump;
mod reader;
mod storm;

use std::{io, ops::ControlFlow, os::fd::OwnedFd, time::Duration};

use tcptrace_ebpf::{Counter, State};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::yield_now,
    time::{Instant, sleep_until},
};

pub(super) use self::pump::Pump;
use self::reader::{Limits, Reader};
use super::{Sink, cgroups::KnownCgroups, looks::Looks, stacks::Stacks};
use crate::{
    event::{self, End, Event, Look, Lost, SCHEMA, Scope, Start, States},
    kernel::{
        clock, netns,
        probes::{self, Probes},
        procfs,
        ring::Mark,
    },
    reason::Reason,
    select::Sockets,
    tracker::{MISSES, Needs},
};

/// A reader that has read something reads again after this time at the latest, and sleeps when it finds nothing.
/// The probes wake it only for the first record after an empty spell.
const DRAIN_EVERY: Duration = Duration::from_millis(20);
/// The shortest sleep: tokio's timers count milliseconds.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);
/// How often losses and clocks are checked where nothing else happens. Each time is two wake-ups: tokio's timers
/// wake once to move a timer from the slot of its second to that of its millisecond.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// How often, at most, losses are checked while records come: that takes a few system calls.
const LOSSES_EVERY: Duration = Duration::from_millis(20);
/// After losses everything is scanned more than once: so far apart, at least.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often, at most, it is looked whether orphans have come to TIME_WAIT.
const TIME_WAIT_LOOK_EVERY: Duration = Duration::from_millis(250);
/// Clocks that differ by less have not been set.
const CLOCK_STEP_NS: i64 = 1_000_000;

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
    pub fn take_stacks(&mut self) {
        if let Self::Required(settings) | Self::Preferred(settings) = self {
            settings.take_stacks();
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
    /// `None` if it is only looked. Before the reader, so that they are taken away first.
    probes: Option<Probes>,
    reader: Reader,
    ready: Option<AsyncFd<OwnedFd>>,
    degraded: Vec<Reason>,
    options: Options,
    end: Option<Instant>,
    /// How long to sleep before records are read again; `None` until the probes wake it.
    sleep: Option<Duration>,
    /// When records were last read, and up to where.
    drained: (Instant, Option<Mark>),
    next_check: Instant,
    /// No check of losses before this.
    next_losses: Instant,
    /// No look at everything before this.
    next_look: Instant,
    /// How many looks at everything it still takes to make up for losses.
    looks_due: u32,
    /// This process; `None` where the probes number it otherwise.
    own_pid: Option<u32>,
    boot_to_utc_ns: i64,
    boot_to_monotonic_ns: i64,
    looks: Looks,
    next_time_wait_look: Instant,
    next_pile_look: Instant,
    /// How many looks it takes to know that no socket is in the states where they pile up: 0 when so many have
    /// shown none, and no record has told of one since.
    pile_looks_due: u32,
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
        degraded.extend(
            probes
                .iter()
                .flat_map(|probes| probes.degraded.iter().cloned()),
        );
        let (cgroups, no_containers) = KnownCgroups::open();
        degraded.extend(no_containers);
        let stacks = match &options.tracing {
            Tracing::Required(settings) if settings.has_stacks() => Some(Stacks::new()),
            _ => None,
        };
        degraded.extend(stacks.iter().flat_map(|stacks| stacks.degraded().to_vec()));
        let own_pid = (!procfs::has_private_pids()).then(std::process::id);
        let reader = Reader::new(
            probes.as_mut().map(Probes::take_records),
            own_pid,
            probes
                .as_ref()
                .map_or(event::Probes::None, |probes| probes.time_wait),
            options.piles.map(|piles| piles.states).unwrap_or_default(),
            cgroups,
            stacks,
        );
        let ready = match reader.descriptor().transpose()? {
            Some(ring) => {
                // SAFETY: an owned descriptor stays open, and the same, for as long as it is registered.
                let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?;
                Some(ring)
            }
            None => None,
        };
        let now = Instant::now();
        let looks = Looks::new(
            options.sockets.netns.clone(),
            options.piles,
            probes.is_some(),
        );
        Ok(Self {
            sleep: probes.is_some().then_some(Duration::ZERO),
            drained: (now, reader.mark()),
            probes,
            reader,
            ready,
            degraded,
            next_pile_look: now + options.piles.map_or(CHECK_EVERY, |piles| piles.every),
            end: options.duration.map(|duration| now + duration),
            options,
            next_check: now + CHECK_EVERY,
            next_losses: now,
            next_look: now,
            looks_due: 0,
            own_pid,
            boot_to_utc_ns: clock::boot_to_utc_ns(),
            boot_to_monotonic_ns: clock::boot_to_monotonic_ns(),
            looks,
            next_time_wait_look: now,
            pile_looks_due: MISSES,
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

    /// The first events: how it is traced, and what exists already. Returns what could not be seen.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn begin(&mut self, sink: &mut impl Sink) -> io::Result<Vec<Reason>> {
        let read = |path| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .into()
        };
        sink.emit(&Event::Start(Box::new(Start {
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
            stacks: self.reader.stacks.is_some(),
            time_wait: self.time_wait_probes(),
            accept: self
                .probes
                .as_ref()
                .map_or(event::Probes::None, |probes| probes.accept),
            sockets: self.options.sockets.clone(),
        })));
        let limits = self.limits();
        let unseen = match self.look(Scope::All, limits, sink)? {
            ControlFlow::Continue(unseen) => unseen,
            ControlFlow::Break(()) => Vec::new(),
        };
        if self.probes.is_some() {
            let (looks, overflows) = (&self.looks, &mut self.reader.overflows);
            overflows.begin(
                looks.namespaces(),
                |inode| looks.is_wanted(inode),
                &mut |event| sink.emit(event),
            );
        }
        sink.flush();
        Ok(unseen)
    }

    /// What work breaks off for while it goes on: what is looked once is looked to the end, unless a signal comes.
    fn limits(&self) -> Limits {
        Limits {
            deadline: self.end.filter(|_| self.is_traced()).map(Instant::into_std),
            heed_stop: true,
        }
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
        if let Some(sleep) = self.sleep {
            until = until.min(now + sleep);
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
        let asleep = self.sleep.is_none();
        let readable = async {
            match &self.ready {
                Some(ready) if asleep => match ready.readable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    // The runtime is shutting down.
                    Err(_) => std::future::pending().await,
                },
                _ => std::future::pending().await,
            }
        };
        let due = async {
            if self.reader.is_filling() || until <= now {
                // Signals, and the end of a program, still have their turn.
                yield_now().await;
            } else {
                sleep_until(until).await;
            }
        };
        tokio::select! {
            biased;
            () = stop => return Wake::Stop,
            () = due => {}
            () = readable => {}
        }
        if self.end.is_some_and(|end| Instant::now() >= end) {
            Wake::Stop
        } else {
            Wake::Work
        }
    }

    /// Reads what has come, and sees to what is due.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn work(&mut self, needs: Needs, sink: &mut impl Sink) -> io::Result<()> {
        let limits = self.limits();
        let now = clock::boot_ns();
        if self.drain(&limits, sink).is_break() {
            return Ok(());
        }
        if let Some(stacks) = &mut self.reader.stacks {
            stacks.told(&mut |event| sink.emit(event));
            // Of a call it is to be known soon from where it came, and nothing else would wake this up for it.
            if stacks.is_waiting() {
                self.sleep.get_or_insert(DRAIN_EVERY);
            }
        }
        let check = Instant::now() >= self.next_check;
        if check || (self.sleep.is_some() && Instant::now() >= self.next_losses) {
            self.next_losses = Instant::now() + LOSSES_EVERY;
            self.check_losses(sink);
        }
        if check {
            self.next_check = Instant::now() + CHECK_EVERY;
            self.reader.forget_makers();
            if let Some(stacks) = &mut self.reader.stacks {
                stacks.look();
            }
            self.check_clocks(sink);
        }
        if self.looks_due > 0 && Instant::now() >= self.next_look {
            self.looks_due -= 1;
            let stint = Stint::begin();
            let _ = self.look(Scope::All, limits, sink)?;
            self.next_look = Instant::now() + stint.pause(10).max(LOOK_EVERY);
        } else if needs.time_wait_look && Instant::now() >= self.next_time_wait_look {
            let probed = self.time_wait_probes() != event::Probes::None;
            let scope = if probed {
                Scope::Orphans
            } else {
                Scope::TimeWait
            };
            let stint = Stint::begin();
            let _ = self.look(scope, limits, sink)?;
            self.next_time_wait_look = Instant::now() + stint.pause(20).max(TIME_WAIT_LOOK_EVERY);
        }
        if let Some(piles) = self.options.piles
            && Instant::now() >= self.next_pile_look
        {
            let stint = Stint::begin();
            let _ = self.look_at_piles(piles, needs, limits, sink)?;
            // Where a program is watched, looking is a good part of the work.
            let times = if piles.tree { 4 } else { 20 };
            self.next_pile_look = Instant::now() + stint.pause(times).max(piles.every);
        }
        if check || needs.tick_by.is_some_and(|tick| tick <= now) {
            sink.emit(&Event::Tick { time: now });
        }
        sink.flush();
        Ok(())
    }

    /// Reads what has come, and decides how long to sleep after it: not until more than a quarter of the buffer is full,
    /// at the rate at which records come.
    fn drain(&mut self, limits: &Limits, sink: &mut impl Sink) -> ControlFlow<()> {
        let mark = self.reader.mark();
        let now = Instant::now();
        let (before, until) = std::mem::replace(&mut self.drained, (now, mark));
        let bytes = match (mark, until) {
            (Some(mark), Some(until)) => mark.bytes_since(until),
            _ => 0,
        };
        self.sleep = (bytes > 0).then(|| {
            let quarters = bytes as f64 / self.reader.quarter().max(1) as f64;
            let quarter = now.duration_since(before).as_secs_f64() / quarters;
            let sleep =
                DRAIN_EVERY.min(Duration::try_from_secs_f64(quarter).unwrap_or(DRAIN_EVERY));
            if sleep < SHORTEST_SLEEP {
                Duration::ZERO
            } else {
                sleep
            }
        });
        self.reader.drain(mark, limits, sink)?;
        if std::mem::take(&mut self.reader.has_watched) {
            self.pile_looks_due = MISSES;
        }
        ControlFlow::Continue(())
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
        limits: Limits,
        sink: &mut impl Sink,
    ) -> io::Result<ControlFlow<()>> {
        // What has come, or was lost, may be what has piled up.
        if self.drain(&limits, sink).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        self.check_losses(sink);
        let scope = self.pile_scope(piles, needs);
        if scope == Scope::All || self.pile_looks_due > 0 {
            return Ok(self.look(scope, limits, sink)?.map_continue(|_| ()));
        }
        // There is nothing, as a look would have found.
        let time = clock::boot_ns();
        sink.emit(&Event::Look(Look { time, scope }));
        let netns = Vec::new();
        sink.emit(&Event::LookEnd { time, netns });
        Ok(ControlFlow::Continue(()))
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

    /// The last events. What cannot be read or scanned within `patience` is left out, and that is said; without, a scan
    /// is made to its end.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn finish(
        &mut self,
        needs: Needs,
        patience: Option<Duration>,
        sink: &mut impl Sink,
    ) -> io::Result<()> {
        let limits = Limits {
            deadline: patience.map(|patience| (Instant::now() + patience).into_std()),
            heed_stop: false,
        };
        let mark = self.reader.mark();
        if self.drain(&limits, sink).is_break() {
            self.reader.skip(mark);
        }
        if let Some(stacks) = &mut self.reader.stacks {
            stacks.finish(limits.deadline, &mut |event| sink.emit(event));
        }
        if let Some(piles) = self.options.piles
            && self.look_at_piles(piles, needs, limits, sink)?.is_break()
        {
            eprintln!(
                "tcptrace: the last scan would have taken too long and was broken off; the report before stands"
            );
        }
        self.check_losses(sink);
        let unread = self.reader.tally.unread;
        if unread > 0 {
            let time = clock::boot_ns();
            sink.emit(&Event::Lost(Lost {
                time,
                records: unread,
                missed: 0,
            }));
        }
        sink.emit(&Event::End(End {
            time: clock::boot_ns(),
            records: self.reader.tally.read,
            lost: self.reader.tally.unknown(),
            mptcp: self.reader.count(Counter::Mptcp),
        }));
        Ok(())
    }

    /// Looks at what exists. Returns what could not be looked at; nothing, if it was broken off.
    fn look(
        &mut self,
        scope: Scope,
        limits: Limits,
        sink: &mut impl Sink,
    ) -> io::Result<ControlFlow<(), Vec<Reason>>> {
        let probes = self.probes.as_mut().filter(|_| self.own_pid.is_some());
        let mut pump = Pump::new(&mut self.reader, sink, limits);
        let ControlFlow::Continue(looked) = self.looks.look(scope, probes, &mut pump)? else {
            return Ok(ControlFlow::Break(()));
        };
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
        if self.drain(&limits, sink).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        sink.emit(&Event::LookEnd {
            time: clock::boot_ns(),
            netns: looked.netns,
        });
        sink.flush();
        Ok(ControlFlow::Continue(looked.unseen))
    }

    /// Has losses counted, and what exists looked at anew if there are any.
    fn check_losses(&mut self, sink: &mut impl Sink) {
        self.reader.check_losses(&mut |event| sink.emit(event));
        if std::mem::take(&mut self.reader.has_lost) {
            self.looks_due = MISSES;
            self.pile_looks_due = MISSES;
        }
    }

    fn check_clocks(&mut self, sink: &mut impl Sink) {
        let utc = clock::boot_to_utc_ns();
        let monotonic = clock::boot_to_monotonic_ns();
        if (utc - self.boot_to_utc_ns).abs() > CLOCK_STEP_NS
            || (monotonic - self.boot_to_monotonic_ns).abs() > CLOCK_STEP_NS
        {
            (self.boot_to_utc_ns, self.boot_to_monotonic_ns) = (utc, monotonic);
            sink.emit(&Event::Clock {
                time: clock::boot_ns(),
                boot_to_utc_ns: utc,
                boot_to_monotonic_ns: monotonic,
            });
        }
    }
}
