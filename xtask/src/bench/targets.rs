//! What tcptrace is meant to cost, beside what it does.

use std::fmt::Write as _;

use super::{
    bare::{EMPTY, FLOOR, STAMPED},
    results::{Held, Kernel, OneCore, Results, Traced},
    sinks::Sink,
    spread::Spread,
};

/// One row of the table of targets.
pub(super) struct Row {
    /// What is measured.
    pub(super) what: &'static str,
    /// What it should be.
    pub(super) target: &'static str,
    /// What it is, and whether that will do; `None` if it was not measured.
    pub(super) found: Option<(String, bool)>,
}

pub(super) const STREAM: &str = "tcptrace stream -o json";
const LEAKS: &str = "tcptrace leaks -o json";
pub(super) const TCPSTATES: &str = "tcpstates (libbpf-tools)";
/// What the kernel calls the program of transitions, in ours and in theirs: names are cut to 15 characters.
const TRANSITION: &str = "inet_sock_set_s";
const TCPSTATES_PROGRAM: &str = "handle_set_stat";
const FLOOR_PROGRAM: &str = "floor";
const STAMPED_PROGRAM: &str = "stamped";
/// Names of our programs on timers begin so.
const TIMERS: [&str; 2] = ["timer_start", "timer_cancel"];

/// All of them.
pub(super) fn rows(results: &Results) -> Vec<Row> {
    let traced = |name: &str| {
        let churn = results.churn.as_ref()?;
        churn.traced.iter().find(|traced| traced.name == name)
    };
    let kept = |name: &str, least: f64| {
        let ratio = traced(name)?.ratio;
        let cpu = traced(name)?.cpu_ratio.median;
        let Spread { median, min, max } = ratio;
        let shown = format!("{median:.3} ({min:.3} to {max:.3}); {cpu:.3} for equal CPU time");
        Some((shown, median >= least))
    };
    let stream = traced(STREAM);
    // Of the rate that is left with one, the share that is left with the other.
    let share_of = |name: &str, bound: &str, least: f64| {
        let (own, bound) = (traced(name)?, traced(bound)?);
        let share = own.ratio.median / bound.ratio.median;
        let cpu = own.cpu_ratio.median / bound.cpu_ratio.median;
        let shown = format!(
            "{share:.3} ({:.3} of {:.3}); {cpu:.3} for equal CPU time",
            own.ratio.median, bound.ratio.median
        );
        Some((shown, share >= least))
    };
    let row = |what, target, found| Row {
        what,
        target,
        found,
    };
    vec![
        row(
            "connections while `stream -o json` writes every transition to a file",
            "≥ 0.95 of untraced",
            kept(STREAM, 0.95),
        ),
        row(
            "records lost meanwhile, and transitions written of those made",
            "0, and all",
            stream.map(complete),
        ),
        row(
            "connections with `stream -o json` against `tcpstates`",
            "≥ 3 ×",
            stream.zip(traced(TCPSTATES)).map(|(own, peer)| {
                let times = own.ratio.median / peer.ratio.median;
                // More than no tracer at all, nobody can.
                let most = 1.0 / peer.ratio.median;
                (
                    format!("{times:.2} ×; without any tracer it is {most:.2} ×"),
                    times >= 3.0,
                )
            }),
        ),
        row(
            "connections while `leaks` runs",
            "≥ 0.97 of untraced",
            kept(LEAKS, 0.97),
        ),
        row(
            "connections while `timewait` runs, with tracepoints",
            "≥ 0.93 of untraced",
            kept("tcptrace timewait -o json", 0.93),
        ),
        row(
            "kernel time of a transition, statistics' own cost taken off",
            "≤ 0.05 of `tcpstates`",
            results.kernel.as_ref().and_then(transition),
        ),
        row(
            "kernel time of a transition against a record of constants (the floor), statistics' own cost taken off both",
            "≤ 1.35 ×",
            results.kernel.as_ref().and_then(above_floor),
        ),
        row(
            "connections while `stream -o json` runs, of those while the floor's program does",
            "≥ 0.94",
            share_of(STREAM, FLOOR, 0.94),
        ),
        row(
            "connections while `leaks` runs, of those while an empty program does",
            "≥ 0.98",
            share_of(LEAKS, EMPTY, 0.98),
        ),
        row(
            "a timer that is not ours, each probe, statistics' own cost taken off",
            "≤ 30 ns",
            results.kernel.as_ref().and_then(timers),
        ),
        row(
            "held rate of `stream -o json` to a file in memory: transitions/s without a loss",
            "≥ what one core makes untraced",
            results.held.as_ref().and_then(held_rate),
        ),
        row(
            "CPU of `stream -o json` at the rate that one core makes",
            "≤ 0.5 of a CPU, 0 lost",
            results.held.as_ref().map(|held| {
                let OneCore { cpus, lost, .. } = held.one_core;
                (format!("{cpus:.2}, {lost} lost"), cpus <= 0.5 && lost == 0)
            }),
        ),
        row(
            "records lost of real connections on all CPUs: `leaks`, `timewait`, `record`",
            "0",
            results.held.as_ref().and_then(at_limit),
        ),
        row(
            "decode and tracker, one core",
            "≥ 3 M records/s",
            rate(results, "tracker", 3e6),
        ),
        row(
            "JSON lines, one core",
            "≥ 1.5 M/s",
            rate(results, "json", 1.5e6),
        ),
        row(
            "text lines, one core",
            "≥ 1.5 M/s",
            rate(results, "text", 1.5e6),
        ),
        row(
            "memory at 1,000,000 tracked connections",
            "≤ 128 bytes each",
            results.memory.map(|memory| {
                let each = memory.bytes as f64 / memory.connections as f64;
                let peak = memory.peak_bytes as f64 / memory.connections as f64;
                (
                    format!("{each:.0} bytes ({peak:.0} while the table grew)"),
                    each <= 128.0,
                )
            }),
        ),
        row(
            "`leaks --once`, 100,000 sockets of 1,000 processes",
            "≤ 0.5 × `ss -tanp`",
            results.once.as_ref().map(|once| {
                let wall = once.leaks_wall.median / once.ss_wall.median;
                let cpu = once.leaks_cpu.median / once.ss_cpu.median;
                (
                    format!("{wall:.2} × its time, {cpu:.2} × its CPU time"),
                    wall <= 0.5,
                )
            }),
        ),
        row(
            "idle, the worst command",
            "< 0.1 % of a core, ≤ 2 wake-ups a second",
            results.idle.as_ref().and_then(|idle| {
                let cpu = idle.iter().map(|idle| idle.cpu).reduce(f64::max)?;
                let wakeups = idle.iter().map(|idle| idle.wakeups).reduce(f64::max)?;
                Some((
                    format!("{:.3} %, {wakeups:.1}", cpu * 100.0),
                    cpu < 0.001 && wakeups <= 2.0,
                ))
            }),
        ),
        row(
            "start to first event",
            "≤ 150 ms",
            results.start_ms.map(|ms| {
                (
                    format!("{:.0} ms ({:.0} to {:.0})", ms.median, ms.min, ms.max),
                    ms.median <= 150.0,
                )
            }),
        ),
        row(
            "release binary, musl, stripped",
            "≤ 8 MB",
            results
                .binary
                .map(|bytes| (format!("{:.2} MB", bytes as f64 / 1e6), bytes <= 8_000_000)),
        ),
    ]
}

fn held_rate(held: &Held) -> Option<(String, bool)> {
    let mut rates = held.rates.iter();
    let rate = rates.find(|rate| rate.command == "stream -o json" && rate.sink == Sink::Tmpfs)?;
    let times = rate.transitions / held.one_core.transitions;
    let least = if rate.is_least { "at least " } else { "" };
    let shown = format!("{least}{:.0}, {times:.1} × that", rate.transitions);
    Some((shown, times >= 1.0))
}

fn at_limit(held: &Held) -> Option<(String, bool)> {
    let lost = |command: &str| {
        let mut limits = held.limits.iter();
        Some(limits.find(|limit| limit.command == command)?.lost)
    };
    let all = ["leaks", "timewait", "record"]
        .into_iter()
        .map(lost)
        .collect::<Option<Vec<_>>>()?;
    let shown: Vec<String> = all.iter().map(u64::to_string).collect();
    Some((shown.join(", "), all.iter().all(|lost| *lost == 0)))
}

/// Whether all that was made was told.
fn complete(traced: &Traced) -> (String, bool) {
    let (told, expected) = (traced.told.unwrap_or(0), traced.expected.unwrap_or(0));
    let shown = format!("{}; {told} of {expected}", traced.lost);
    (shown, traced.lost == 0 && told == expected)
}

/// Nanoseconds of a program without what the statistics cost.
fn net(kernel: &Kernel, of: &str, name: &str) -> Option<f64> {
    let mut programs = kernel.programs.iter();
    let program = programs.find(|program| program.of == of && program.name.starts_with(name))?;
    Some((program.ns.median - kernel.empty.median).max(0.0))
}

fn transition(kernel: &Kernel) -> Option<(String, bool)> {
    let own = net(kernel, STREAM, TRANSITION)?;
    let peer = net(kernel, TCPSTATES, TCPSTATES_PROGRAM)?;
    let ratio = own / peer;
    Some((
        format!("{ratio:.3} ({own:.0} ns of {peer:.0} ns)"),
        ratio <= 0.05,
    ))
}

fn above_floor(kernel: &Kernel) -> Option<(String, bool)> {
    let own = net(kernel, STREAM, TRANSITION)?;
    let floor = net(kernel, FLOOR, FLOOR_PROGRAM)?;
    let ratio = own / floor;
    let mut shown = format!("{ratio:.2} × ({own:.0} ns of {floor:.0} ns)");
    if let Some(stamped) = net(kernel, STAMPED, STAMPED_PROGRAM) {
        let ratio = own / stamped;
        let _ = write!(
            shown,
            "; {ratio:.2} × the floor and the clock ({stamped:.0} ns)"
        );
    }
    Some((shown, ratio <= 1.35))
}

fn timers(kernel: &Kernel) -> Option<(String, bool)> {
    let each: Option<Vec<f64>> = TIMERS
        .iter()
        .map(|name| net(kernel, STREAM, name))
        .collect();
    let each = each?;
    let shown: Vec<String> = each.iter().map(|ns| format!("{ns:.0} ns")).collect();
    Some((shown.join(" and "), each.iter().all(|ns| *ns <= 30.0)))
}

fn rate(results: &Results, name: &str, least: f64) -> Option<(String, bool)> {
    let work = results
        .user
        .as_ref()?
        .iter()
        .find(|work| work.name == name)?;
    let rate = work.per_second?;
    let mega = |rate: f64| rate / 1e6;
    let shown = format!(
        "{:.2} M/s ({:.2} to {:.2})",
        mega(rate.median),
        mega(rate.min),
        mega(rate.max)
    );
    Some((shown, rate.median >= least))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::{AtLimit, Churn, HeldRate, Program};

    fn same(value: f64) -> Spread {
        Spread::of(&[value]).unwrap()
    }

    fn traced(name: &str, ratio: f64, told: u64, lost: u64) -> Traced {
        Traced {
            name: name.to_owned(),
            ratio: same(ratio),
            cpu_ratio: same(1.0),
            cpu_us: 1.0,
            told: Some(told),
            expected: Some(600),
            lost,
        }
    }

    fn with(traced: Vec<Traced>) -> Results {
        let untraced = same(50_000.0);
        Results {
            churn: Some(Churn {
                seconds: 1.0,
                rounds: 1,
                untraced,
                traced,
            }),
            ..Results::default()
        }
    }

    fn met(results: &Results, what: &str) -> Option<bool> {
        let rows = rows(results);
        let row = rows
            .iter()
            .find(|row| row.what.contains(what))
            .expect("a row");
        row.found.as_ref().map(|(_, met)| *met)
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed() {
        assert!(
            rows(&Results::default())
                .iter()
                .all(|row| row.found.is_none())
        );
    }

    #[test]
    fn everything_must_be_told() {
        let lost = |told, lost| met(&with(vec![traced(STREAM, 1.0, told, lost)]), "records lost");
        assert_eq!(lost(600, 0), Some(true));
        assert_eq!(lost(600, 1), Some(false));
        assert_eq!(lost(599, 0), Some(false));
        // Twice is as wrong as never.
        assert_eq!(lost(601, 0), Some(false));
    }

    #[test]
    fn held_rates_are_compared_with_one_core() {
        let results = |transitions, cpus, lost| Results {
            held: Some(Held {
                one_core: OneCore {
                    transitions: 100.0,
                    lost: 0,
                    cpus,
                },
                rates: vec![HeldRate {
                    command: "stream -o json".to_owned(),
                    sink: Sink::Tmpfs,
                    close: "rst".to_owned(),
                    transitions,
                    records: transitions,
                    seconds: 10.0,
                    cpus: 0.9,
                    line: None,
                    is_least: false,
                }],
                limits: ["leaks", "timewait", "record"]
                    .map(|command| AtLimit {
                        command: command.to_owned(),
                        threads: 2,
                        transitions: 50.0,
                        lost,
                        missed: 0,
                        cpus: 0.1,
                    })
                    .to_vec(),
            }),
            ..Results::default()
        };
        assert_eq!(met(&results(100.0, 0.5, 0), "held rate"), Some(true));
        assert_eq!(met(&results(99.0, 0.5, 0), "held rate"), Some(false));
        assert_eq!(met(&results(100.0, 0.5, 0), "CPU of"), Some(true));
        assert_eq!(met(&results(100.0, 0.51, 0), "CPU of"), Some(false));
        assert_eq!(met(&results(100.0, 0.5, 0), "real connections"), Some(true));
        assert_eq!(
            met(&results(100.0, 0.5, 1), "real connections"),
            Some(false)
        );
    }

    #[test]
    fn ratios_are_held_against_tcpstates_of_the_same_run() {
        let both = |own| {
            with(vec![
                traced(STREAM, own, 600, 0),
                traced(TCPSTATES, 0.3, 600, 0),
            ])
        };
        assert_eq!(met(&both(0.95), "`stream"), Some(true));
        assert_eq!(met(&both(0.949), "`stream"), Some(false));
        assert_eq!(met(&both(0.91), "against"), Some(true));
        assert_eq!(met(&both(0.89), "against"), Some(false));
    }

    #[test]
    fn ratios_are_held_against_bare_programs_of_the_same_run() {
        let bounded = |name: &str, own, bound| {
            with(vec![
                traced(name, own, 600, 0),
                traced(if name == STREAM { FLOOR } else { EMPTY }, bound, 0, 0),
            ])
        };
        let stream = |own| met(&bounded(STREAM, own, 0.9), "the floor's program");
        assert_eq!(stream(0.9 * 0.941), Some(true));
        assert_eq!(stream(0.9 * 0.939), Some(false));
        let leaks = |own| met(&bounded(LEAKS, own, 0.9), "an empty program");
        assert_eq!(leaks(0.9 * 0.981), Some(true));
        assert_eq!(leaks(0.9 * 0.979), Some(false));
    }

    #[test]
    fn the_statistics_own_cost_is_taken_off() {
        let program = |of: &str, name: &str, ns| Program {
            of: of.to_owned(),
            name: name.to_owned(),
            ns: same(ns),
            runs: 6.0,
        };
        let kernel = |own, timer| Results {
            kernel: Some(Kernel {
                empty: same(40.0),
                programs: vec![
                    program(STREAM, TRANSITION, own),
                    program(TCPSTATES, TCPSTATES_PROGRAM, 4040.0),
                    program(FLOOR, FLOOR_PROGRAM, 40.0 + 200.0 / 1.35),
                    program(STREAM, "timer_start", timer),
                    program(STREAM, "timer_cancel", 45.0),
                ],
            }),
            ..Results::default()
        };
        assert_eq!(met(&kernel(240.0, 70.0), "kernel time"), Some(true));
        assert_eq!(met(&kernel(241.0, 70.0), "kernel time"), Some(false));
        assert_eq!(met(&kernel(239.0, 70.0), "the floor"), Some(true));
        assert_eq!(met(&kernel(241.0, 70.0), "the floor"), Some(false));
        assert_eq!(met(&kernel(240.0, 70.0), "a timer"), Some(true));
        assert_eq!(met(&kernel(240.0, 71.0), "a timer"), Some(false));
    }
}
