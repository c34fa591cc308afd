//! How long sockets stay in a state, by process: those that have left it, and those still in it.

use std::collections::{BTreeMap, HashMap};

use hdrhistogram::Histogram;
use tcptrace_ebpf::State;

use crate::{
    event::Comm,
    json::seconds,
    tracker::{Change, Owner},
};

/// How many processes are told apart. What is beyond is counted together.
const KEPT: usize = 1024;

/// A process, and the state its sockets were in. `None`: not known, or one too many.
pub(super) type Key = (State, Option<(u32, Comm)>);

/// Times in a state.
#[derive(Clone, Debug)]
pub(super) struct Times {
    /// Microseconds, to two digits: there is one for each process.
    us: Histogram<u32>,
    longest: u64,
    /// Of how many the time is not known, because they were in the state before the trace.
    pub(super) not_timed: u64,
    /// How many of the times are lower bounds.
    pub(super) at_least: u64,
}

/// A few numbers that stand for many, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Quantiles {
    pub(super) count: u64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Times {
    fn new() -> Self {
        Self {
            #[expect(clippy::expect_used, reason = "2 is a number of digits it takes")]
            us: Histogram::new(2).expect("2 digits"),
            longest: 0,
            not_timed: 0,
            at_least: 0,
        }
    }

    fn add(&mut self, ns: Option<u64>, at_least: bool) {
        match ns {
            Some(ns) => {
                // It grows as needed; there is no number too great for it.
                let recorded = self.us.record((ns / 1000).max(1));
                debug_assert!(recorded.is_ok(), "it has no bounds");
                self.longest = self.longest.max(ns);
                self.at_least += u64::from(at_least);
            }
            None => self.not_timed += 1,
        }
    }

    /// How many there are, known times or not.
    pub(super) fn count(&self) -> u64 {
        self.us.len() + self.not_timed
    }

    /// `None` if no time is known.
    pub(super) fn quantiles(&self) -> Option<Quantiles> {
        if self.us.is_empty() {
            return None;
        }
        let max = seconds(self.longest);
        // A bucket stands for its greatest value, which may be more than any was.
        let at = |quantile| (self.us.value_at_quantile(quantile) as f64 / 1e6).min(max);
        Some(Quantiles {
            count: self.us.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max,
        })
    }
}

/// Times of sockets that have left a state, by process.
#[derive(Debug, Default)]
pub(super) struct Finished {
    times: HashMap<Key, Times>,
}

impl Finished {
    /// Whether none is known.
    pub(super) fn is_empty(&self) -> bool {
        self.times.is_empty()
    }

    /// A socket left `change.from`.
    pub(super) fn add(&mut self, change: &Change<'_>) {
        let key = (change.from, process(change.owner));
        let key = if self.times.len() < KEPT || self.times.contains_key(&key) {
            key
        } else {
            (change.from, None)
        };
        self.times
            .entry(key)
            .or_insert_with(Times::new)
            .add(change.after, false);
    }

    /// Together with those that are `open`: how long so far, and whether that is a lower bound.
    pub(super) fn with_open(
        &self,
        open: impl Iterator<Item = (Key, Option<u64>, bool)>,
    ) -> Vec<Dwell> {
        let mut all: BTreeMap<Key, Dwell> = self
            .times
            .iter()
            .map(|(key, times)| (*key, Dwell::new(*key, Some(times.clone()))))
            .collect();
        for (key, ns, at_least) in open {
            all.entry(key)
                .or_insert_with(|| Dwell::new(key, None))
                .open
                .get_or_insert_with(Times::new)
                .add(ns, at_least);
        }
        let mut all: Vec<Dwell> = all.into_values().collect();
        all.sort_by_key(|dwell| std::cmp::Reverse(dwell.count()));
        all
    }
}

/// How long the sockets of one process stay in one state.
#[derive(Clone, Debug)]
pub(super) struct Dwell {
    pub(super) state: State,
    pub(super) process: Option<(u32, Comm)>,
    pub(super) finished: Option<Times>,
    pub(super) open: Option<Times>,
}

impl Dwell {
    const fn new((state, process): Key, finished: Option<Times>) -> Self {
        Self {
            state,
            process,
            finished,
            open: None,
        }
    }

    fn count(&self) -> u64 {
        let of = |times: &Option<Times>| times.as_ref().map_or(0, Times::count);
        of(&self.finished) + of(&self.open)
    }
}

/// What stands for the owner in a [`Key`].
pub(super) fn process(owner: Option<Owner>) -> Option<(u32, Comm)> {
    owner.map(|owner| (owner.pid, owner.comm))
}
