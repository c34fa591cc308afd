//! Connections a second, with a tracer and without, in turn.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{
    lab::Lab,
    results::{Churn, LeftOut, Traced},
    spread::{Spread, ratios},
    tracer::{self, Tracer},
};
use crate::command;

/// The port that it connects to.
pub(super) const PORT: u16 = 7000;
/// What has just been loaded or taken away may still be: RCU, and BPF programs that are freed in workers.
pub(super) const SETTLE: Duration = Duration::from_millis(200);

/// What the generator is to do.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) seconds: f64,
    pub(super) threads: u32,
    /// Who closes, and how, as the generator calls it.
    pub(super) close: &'static str,
    /// Connections a second; `None` for as many as there can be.
    pub(super) rate: Option<u32>,
}

impl Load {
    /// As many connections that end with a reset as one thread makes.
    pub(super) const fn resets(seconds: f64) -> Self {
        Self {
            seconds,
            threads: 1,
            close: "rst",
            rate: None,
        }
    }
}

/// What the generator says.
#[derive(Clone, Copy, Deserialize)]
pub(super) struct Made {
    pub(super) connections: u64,
    pub(super) per_second: f64,
    /// CPU time of one, microseconds; what probes take in it included.
    pub(super) cpu_us_each: f64,
}

/// Makes connections that end with a reset, in one thread.
pub(super) fn make(churn: &Path, seconds: f64) -> Result<Made> {
    run(churn, Load::resets(seconds))
}

/// Makes connections.
pub(super) fn run(churn: &Path, load: Load) -> Result<Made> {
    answer(Command::new(churn), load)
}

/// Has `command` run the generator, whose path and words it takes last.
pub(super) fn run_under(mut command: Command, churn: &Path, load: Load) -> Result<Made> {
    command.arg(churn);
    answer(command, load)
}

fn answer(mut command: Command, load: Load) -> Result<Made> {
    command
        .args(["run", "ip=4"])
        .arg(format!("threads={}", load.threads))
        .arg(format!("close={}", load.close))
        .arg(format!("seconds={}", load.seconds))
        .arg(format!("port={PORT}"))
        .args(load.rate.map(|rate| format!("rate={rate}")));
    tracer::dies_with_us(&mut command);
    let said = command::output(&mut command)?;
    serde_json::from_str(&said).with_context(|| format!("churn said {said:?}"))
}

/// What came of one tracer.
#[derive(Default)]
struct Sum {
    ratios: Vec<f64>,
    cpu_ratios: Vec<f64>,
    connections: u64,
    cpu: Duration,
    told: u64,
    expected: u64,
    lost: u64,
}

/// Measures: without, with the first, without, with the second, and so on, `rounds` times.
pub(super) fn measure(
    lab: &Lab,
    rounds: usize,
    seconds: f64,
    tracers: &[Tracer],
    left_out: &mut Vec<LeftOut>,
) -> Result<Churn> {
    ensure!(rounds > 0, "no rounds, no figures");
    let mut sums: Vec<Option<Sum>> = tracers.iter().map(|_| Some(Sum::default())).collect();
    let mut all_untraced = Vec::new();
    // The first one pays for whatever is not in memory yet.
    make(&lab.churn, seconds.min(1.0))?;
    let mut before = make(&lab.churn, seconds)?;
    for round in 1..=rounds {
        for (tracer, slot) in tracers.iter().zip(&mut sums) {
            let Some(sum) = slot else { continue };
            eprintln!(
                "bench: connections, round {round} of {rounds}: {}",
                tracer.name
            );
            match with(lab, tracer, seconds, sum) {
                Ok(traced) => {
                    std::thread::sleep(SETTLE);
                    let after = make(&lab.churn, seconds)?;
                    let rates = [before.per_second, after.per_second];
                    sum.ratios.extend(ratios(&rates, &[traced.per_second]));
                    // Connections for the same CPU time.
                    let per_cpu = |made: &Made| 1.0 / made.cpu_us_each;
                    let untraced = [per_cpu(&before), per_cpu(&after)];
                    sum.cpu_ratios
                        .extend(ratios(&untraced, &[per_cpu(&traced)]));
                    all_untraced.extend(rates);
                    before = after;
                }
                Err(error) => {
                    left_out.push(LeftOut {
                        what: format!("connections with {}", tracer.name),
                        why: format!("{error:#}"),
                    });
                    *slot = None;
                }
            }
        }
    }
    let traced = tracers.iter().zip(sums).filter_map(|(tracer, sum)| {
        let sum = sum?;
        Some(Traced {
            name: tracer.name.to_owned(),
            ratio: Spread::of(&sum.ratios)?,
            cpu_ratio: Spread::of(&sum.cpu_ratios)?,
            cpu_us: sum.cpu.as_secs_f64() * 1e6 / sum.connections as f64,
            told: tracer.lines.map(|_| sum.told),
            expected: tracer.lines.map(|_| sum.expected),
            lost: sum.lost,
        })
    });
    Ok(Churn {
        seconds,
        rounds,
        traced: traced.collect(),
        untraced: Spread::of(&all_untraced).context("no tracer ran")?,
    })
}

/// One run with a tracer.
fn with(lab: &Lab, tracer: &Tracer, seconds: f64, sum: &mut Sum) -> Result<Made> {
    let running = tracer.start(&lab.folder, &[])?;
    let before = running.cpu()?;
    let made = make(&lab.churn, seconds)?;
    sum.cpu += running.cpu()?.saturating_sub(before);
    // What is on its way gets there.
    std::thread::sleep(SETTLE);
    let told = running.finish(PORT)?;
    sum.connections += made.connections;
    sum.told += told.lines;
    if let Some(lines) = tracer.lines {
        sum.expected += made.connections * lines.connection + lines.listener;
    }
    sum.lost += told.lost;
    Ok(made)
}
