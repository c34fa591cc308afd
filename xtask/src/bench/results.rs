//! All that was measured. The page is made of this alone; as JSON it is `docs/performance.json`.

use serde::{Deserialize, Serialize};

use super::{growth::Growth, sinks::Sink, spread::Spread};

/// What a run has measured. A part that was not asked for is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Results {
    /// Where and when.
    pub(crate) machine: Machine,
    /// Connections a second, with and without.
    pub(crate) churn: Option<Churn>,
    /// What BPF programs take.
    pub(crate) kernel: Option<Kernel>,
    /// Where the time of whoever connects goes.
    pub(crate) profile: Option<Vec<Profile>>,
    /// What a record, and a line, costs in user space.
    pub(crate) user: Option<Vec<Work>>,
    /// How many records a second each stage takes by itself.
    pub(crate) ceilings: Option<Vec<Ceiling>>,
    /// How many transitions a second are followed without a loss.
    pub(crate) held: Option<Held>,
    /// Bytes for each tracked connection.
    pub(crate) memory: Option<Memory>,
    /// `leaks --once` and `ss -tanp`.
    pub(crate) once: Option<Once>,
    /// What it takes while nothing happens.
    pub(crate) idle: Option<Vec<Idle>>,
    /// From start to the first event, milliseconds.
    pub(crate) start_ms: Option<Spread>,
    /// Bytes of the stripped static binary.
    pub(crate) binary: Option<u64>,
    /// How costs grow. It has a file and a page of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) growth: Option<Growth>,
    /// What could not be measured here, and why.
    pub(crate) left_out: Vec<LeftOut>,
}

/// Where and when it was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Its processor, as the kernel names it.
    pub(crate) cpu: String,
    /// How many of them can be used.
    pub(crate) cpus: usize,
    /// Memory, GiB.
    pub(crate) memory_gib: f64,
    /// Kernel release.
    pub(crate) kernel: String,
    /// Day, UTC.
    pub(crate) date: String,
    /// Commit of tcptrace.
    pub(crate) commit: String,
    /// What else ran: processes that wanted a CPU in the minute before.
    pub(crate) load: f64,
}

/// Connections a second while each tracer runs, and while none does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Churn {
    /// How long each measurement was.
    pub(crate) seconds: f64,
    /// How often each tracer was measured.
    pub(crate) rounds: usize,
    /// Connections a second without a tracer.
    pub(crate) untraced: Spread,
    /// With each.
    pub(crate) traced: Vec<Traced>,
}

/// With one tracer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Traced {
    /// Which one.
    pub(crate) name: String,
    /// What is left of the untraced rate.
    pub(crate) ratio: Spread,
    /// The same for equal CPU time of whoever connects: what the probes take there, and nothing of what else
    /// runs on the machine, the reading tracer included.
    pub(crate) cpu_ratio: Spread,
    /// CPU time of the tracer's own processes for a connection, microseconds.
    pub(crate) cpu_us: f64,
    /// Lines of its output that tell of the traffic, all rounds together; `None` if it does not tell of each
    /// connection.
    pub(crate) told: Option<u64>,
    /// How many lines would tell of everything.
    pub(crate) expected: Option<u64>,
    /// What it says that it lost, all rounds together.
    pub(crate) lost: u64,
}

/// What BPF programs take, by the kernel's own statistics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kernel {
    /// Nanoseconds a run of a program that does nothing: what the statistics themselves cost.
    pub(crate) empty: Spread,
    /// The programs.
    pub(crate) programs: Vec<Program>,
}

/// One program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Program {
    /// Who loaded it.
    pub(crate) of: String,
    /// Its name in the kernel, cut to 15 characters.
    pub(crate) name: String,
    /// Nanoseconds a run, the statistics' own cost included.
    pub(crate) ns: Spread,
    /// Runs for a connection.
    pub(crate) runs: f64,
}

/// What whoever connects spends on being traced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Profile {
    /// By whom.
    pub(crate) of: String,
    /// How many samples there are.
    pub(crate) samples: u64,
    /// On what, the most first.
    pub(crate) shares: Vec<Share>,
}

/// A share of the samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Share {
    /// What they were spent on.
    pub(crate) what: String,
    /// From 0 to 1.
    pub(crate) share: f64,
}

/// One kind of work in user space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Work {
    /// Which: `decode`, `tracker` (with decode), `json`, `text`.
    pub(crate) name: String,
    /// Instructions for each record or line; `None` without callgrind.
    pub(crate) instructions: Option<f64>,
    /// Records or lines a second of CPU time; `None` if only instructions were asked for.
    pub(crate) per_second: Option<Spread>,
}

/// What one stage on the way of a record takes by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ceiling {
    /// `ring`, a kind of [`Work`], or `write to` a sink.
    pub(crate) stage: String,
    /// Records, or lines, a second.
    pub(crate) per_second: f64,
}

/// How many transitions a second are followed without a loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// `stream -o json` to a file in memory, at the rate that one core can make without a tracer.
    pub(crate) one_core: OneCore,
    /// The highest rates.
    pub(crate) rates: Vec<HeldRate>,
    /// Real connections, as many as all CPUs make.
    pub(crate) limits: Vec<AtLimit>,
}

/// At the rate that one core can make.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OneCore {
    /// Transitions a second.
    pub(crate) transitions: f64,
    /// Records lost.
    pub(crate) lost: u64,
    /// CPUs that tcptrace used.
    pub(crate) cpus: f64,
}

/// The highest rate at which nothing is lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeldRate {
    /// Which command.
    pub(crate) command: String,
    /// Where its output went.
    pub(crate) sink: Sink,
    /// How connections ended: `rst` or `fin`.
    pub(crate) close: String,
    /// Transitions a second, recorded or not.
    pub(crate) transitions: f64,
    /// Records a second.
    pub(crate) records: f64,
    /// For so long.
    pub(crate) seconds: f64,
    /// CPUs that tcptrace used.
    pub(crate) cpus: f64,
    /// The stage that makes lines; none if there is no line for each transition.
    pub(crate) line: Option<String>,
    /// The feeder can make no more: the rate may be higher.
    pub(crate) is_least: bool,
}

/// Real connections, as many as all CPUs make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AtLimit {
    /// Which command.
    pub(crate) command: String,
    /// Threads that connect.
    pub(crate) threads: u32,
    /// Transitions a second.
    pub(crate) transitions: f64,
    /// Records lost, and probes that did not run.
    pub(crate) lost: u64,
    /// Of these, probes that the kernel did not run: for a socket of any namespace.
    pub(crate) missed: u64,
    /// CPUs that tcptrace used.
    pub(crate) cpus: f64,
}

/// Memory of the tracker.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// How many connections it tracked.
    pub(crate) connections: u64,
    /// Resident bytes that they took.
    pub(crate) bytes: u64,
    /// At most, while its table grew.
    pub(crate) peak_bytes: u64,
}

/// One look at very many sockets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Once {
    /// How many sockets there were.
    pub(crate) sockets: u64,
    /// Of how many processes.
    pub(crate) processes: u64,
    /// Seconds of `leaks --once`, with the second it waits between its two looks.
    pub(crate) leaks_wall: Spread,
    /// CPU seconds of it.
    pub(crate) leaks_cpu: Spread,
    /// Seconds of `ss -tanp`.
    pub(crate) ss_wall: Spread,
    /// CPU seconds of it.
    pub(crate) ss_cpu: Spread,
    /// How many sockets `leaks` called leaked; half of them are.
    pub(crate) leaked: u64,
    /// CPU seconds of a pass over `/proc` for who holds which socket.
    pub(crate) pass_cpu: Spread,
    /// CPU seconds of the kernel's walk of all open files for the same.
    pub(crate) walk_cpu: Spread,
}

/// A command while nothing happens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Idle {
    /// Which.
    pub(crate) name: String,
    /// Share of one CPU.
    pub(crate) cpu: f64,
    /// Times a second that it was woken.
    pub(crate) wakeups: f64,
}

/// Something that could not be measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LeftOut {
    /// What.
    pub(crate) what: String,
    /// Why.
    pub(crate) why: String,
}
