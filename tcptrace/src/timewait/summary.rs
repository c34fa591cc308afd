//! TIME_WAITs counted: how long, how ended, by whom, to where.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    net::{IpAddr, SocketAddr},
};

use hdrhistogram::Histogram;
use serde::Serialize;
use tcptrace_ebpf::State;

use crate::{
    event::{Comm, Socket},
    json::{Name, OwnerFields, SocketFields, Time, seconds},
    tracker::{self, Ending, Owner, TimeWaitEnd, Tracker, Via},
};

/// How many processes, and how many remotes, are counted one by one. What is beyond is counted
/// together.
const KEPT: usize = 4096;
/// How many of them the summary lists.
const LISTED: usize = 20;
/// Histograms count in microseconds, to three digits, up to a day.
const LONGEST_US: u64 = 86_400_000_000;

/// What has been counted.
pub(super) struct Summary {
    /// Dwell times, microseconds.
    dwell: Histogram<u64>,
    /// How many of these are lower bounds.
    pub(super) at_least: u64,
    /// How many are estimates, and the greatest error, nanoseconds.
    estimates: (u64, u64),
    shortest: u64,
    longest: u64,
    endings: [u64; Ending::ALL.len()],
    pub(super) rearmed: u64,
    processes: Tally<Process>,
    remotes: Tally<Remote>,
}

/// Who closed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Process {
    /// `None`: not known.
    pub(super) who: Option<(u32, Comm)>,
}

/// To where: an address, and the port that stands for the service, on whichever side that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Remote {
    pub(super) addr: IpAddr,
    /// The remote port, if this side connected.
    pub(super) port: Option<u16>,
    /// The local port, if this side accepted.
    pub(super) local_port: Option<u16>,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.who {
            Some((pid, comm)) => write!(f, "{comm} (pid {pid})"),
            None => f.write_str("not known"),
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.local_port) {
            (Some(port), _) => write!(f, "{}", SocketAddr::new(self.addr, port)),
            (_, Some(port)) => write!(f, "{} to local port {port}", self.addr),
            _ => write!(f, "{}", self.addr),
        }
    }
}

/// Counts by key, up to [`KEPT`] of them.
pub(super) struct Tally<K> {
    counts: HashMap<K, u64>,
    other: u64,
}

impl<K: Copy + Eq + Hash + Ord> Tally<K> {
    fn new() -> Self {
        Self {
            counts: HashMap::new(),
            other: 0,
        }
    }

    fn add(&mut self, key: K) {
        if let Some(count) = self.counts.get_mut(&key) {
            *count += 1;
        } else if self.counts.len() < KEPT {
            self.counts.insert(key, 1);
        } else {
            self.other += 1;
        }
    }

    /// The `most` greatest, greatest first, and how many are not among them.
    pub(super) fn top(&self, most: usize) -> (Vec<(K, u64)>, u64) {
        let mut all: Vec<(K, u64)> = self
            .counts
            .iter()
            .map(|(key, count)| (*key, *count))
            .collect();
        all.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let rest = all.iter().skip(most).map(|(_, count)| count).sum::<u64>();
        all.truncate(most);
        (all, rest + self.other)
    }
}

impl Process {
    pub(super) fn of(owner: Option<Owner>) -> Self {
        Self {
            who: owner.map(|owner| (owner.pid, owner.comm)),
        }
    }
}

impl Remote {
    pub(super) fn of(socket: &Socket, owner: Option<Owner>) -> Self {
        let via = owner.map(|owner| owner.via);
        let tuple = &socket.tuple;
        Self {
            addr: tuple.remote(),
            port: (via == Some(Via::Connect)).then_some(tuple.remote_port),
            local_port: matches!(via, Some(Via::Accept | Via::Listener))
                .then_some(tuple.local_port),
        }
    }
}

/// The distribution of dwell times, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Dwell {
    pub(super) count: u64,
    pub(super) min: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
    /// How many of them are lower bounds.
    pub(super) at_least: u64,
    /// How many of them are estimates from looks.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) estimates: u64,
    /// By how much these can be off, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) estimate_error: Option<f64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Summary {
    pub(super) fn new() -> Self {
        let dwell = Histogram::new_with_bounds(1, LONGEST_US, 3);
        Self {
            #[expect(clippy::expect_used, reason = "constant bounds that are valid")]
            dwell: dwell.expect("valid bounds"),
            at_least: 0,
            estimates: (0, 0),
            shortest: u64::MAX,
            longest: 0,
            endings: [0; Ending::ALL.len()],
            rearmed: 0,
            processes: Tally::new(),
            remotes: Tally::new(),
        }
    }

    pub(super) fn add(&mut self, end: &TimeWaitEnd<'_>) {
        self.endings[end.ending as usize] += 1;
        self.rearmed += u64::from(end.rearmed == Some(true));
        self.processes.add(Process::of(end.owner));
        self.remotes.add(Remote::of(&end.socket, end.owner));
        // One that was skipped has not lasted for any time.
        if let Some(ns) = end.dwell
            && end.ending != Ending::Skipped
        {
            self.dwell.saturating_record((ns / 1000).max(1));
            self.shortest = self.shortest.min(ns);
            self.longest = self.longest.max(ns);
            self.at_least += u64::from(end.dwell_at_least);
            if end.dwell_error != 0 {
                let (count, error) = self.estimates;
                self.estimates = (count + 1, error.max(end.dwell_error));
            }
        }
    }

    /// How many ended.
    pub(super) fn count(&self) -> u64 {
        self.endings.iter().sum()
    }

    /// The endings that occurred, with how often.
    pub(super) fn endings(&self) -> impl Iterator<Item = (Ending, u64)> {
        Ending::ALL
            .into_iter()
            .map(|ending| (ending, self.endings[ending as usize]))
            .filter(|(_, count)| *count > 0)
    }

    /// `None` while none has ended.
    pub(super) fn dwell(&self) -> Option<Dwell> {
        if self.dwell.is_empty() {
            return None;
        }
        let quantile = |quantile| {
            // The histogram rounds; the ends are known exactly.
            let ns = self.dwell.value_at_quantile(quantile) * 1000;
            seconds(ns.clamp(self.shortest, self.longest))
        };
        Some(Dwell {
            count: self.dwell.len(),
            min: seconds(self.shortest),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            max: seconds(self.longest),
            at_least: self.at_least,
            estimates: self.estimates.0,
            estimate_error: (self.estimates.0 > 0).then(|| seconds(self.estimates.1)),
        })
    }

    pub(super) fn processes(&self, most: usize) -> (Vec<(Process, u64)>, u64) {
        self.processes.top(most)
    }

    pub(super) fn remotes(&self, most: usize) -> (Vec<(Remote, u64)>, u64) {
        self.remotes.top(most)
    }

    /// The summary as a JSON line.
    pub(super) fn line(&self, tracker: &Tracker, now: u64, time: Time) -> Line {
        let (processes, other_processes) = self.processes(LISTED);
        let (remotes, other_remotes) = self.remotes(LISTED);
        Line {
            event: "time_wait_summary",
            time,
            count: self.count(),
            dwell_seconds: self.dwell(),
            endings: self
                .endings()
                .map(|(ending, count)| (ending.name(), count))
                .collect(),
            rearmed: self.rearmed,
            closed_first: processes
                .into_iter()
                .map(|(process, count)| ProcessLine {
                    pid: process.who.map(|(pid, _)| pid),
                    comm: process.who.map(|(_, comm)| Name(comm)),
                    count,
                })
                .collect(),
            closed_first_other: other_processes,
            remotes: remotes
                .into_iter()
                .map(|(remote, count)| RemoteLine {
                    addr: remote.addr,
                    port: remote.port,
                    local_port: remote.local_port,
                    count,
                })
                .collect(),
            remotes_other: other_remotes,
            running: Running::of(tracker, now),
            samples: oldest(tracker, LISTED)
                .into_iter()
                .map(|running| Sample {
                    socket: SocketFields::new(&running.socket),
                    owner: running.owner.map(OwnerFields::from),
                    state: running.state.name(),
                    age_seconds: running
                        .since
                        .map(|since| seconds(now.saturating_sub(since))),
                })
                .collect(),
        }
    }
}

/// Timewait sockets that have not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Running {
    pub(super) time_wait: u64,
    pub(super) time_wait_oldest_seconds: Option<f64>,
    pub(super) fin_wait2: u64,
    pub(super) fin_wait2_oldest_seconds: Option<f64>,
}

impl Running {
    pub(super) fn of(tracker: &Tracker, now: u64) -> Self {
        let mut all = Self::default();
        for running in tracker.running() {
            let (count, oldest) = if running.state == State::TimeWait {
                (&mut all.time_wait, &mut all.time_wait_oldest_seconds)
            } else {
                (&mut all.fin_wait2, &mut all.fin_wait2_oldest_seconds)
            };
            *count += 1;
            if let Some(since) = running.since {
                let age = seconds(now.saturating_sub(since));
                *oldest = Some(oldest.map_or(age, |oldest| oldest.max(age)));
            }
        }
        all
    }
}

/// The summary as JSON.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    event: &'static str,
    time: Time,
    count: u64,
    dwell_seconds: Option<Dwell>,
    endings: std::collections::BTreeMap<&'static str, u64>,
    rearmed: u64,
    closed_first: Vec<ProcessLine>,
    closed_first_other: u64,
    remotes: Vec<RemoteLine>,
    remotes_other: u64,
    running: Running,
    samples: Vec<Sample>,
}

/// One of those that run.
#[derive(Debug, Serialize)]
struct Sample {
    #[serde(flatten)]
    socket: SocketFields,
    owner: Option<OwnerFields>,
    state: &'static str,
    age_seconds: Option<f64>,
}

/// The timewait sockets that have run longest, oldest first.
pub(super) fn oldest(tracker: &Tracker, most: usize) -> Vec<tracker::Running<'_>> {
    let mut running: Vec<_> = tracker.running().collect();
    running.sort_unstable_by_key(|running| (running.since, running.socket.cookie));
    running.truncate(most);
    running
}

#[derive(Debug, Serialize)]
struct ProcessLine {
    pid: Option<u32>,
    comm: Option<Name>,
    count: u64,
}

#[derive(Debug, Serialize)]
struct RemoteLine {
    addr: IpAddr,
    port: Option<u16>,
    local_port: Option<u16>,
    count: u64,
}

#[cfg(test)]
mod tests;
