//! What BPF programs take, by the kernel's own statistics.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

use super::{
    bare::EMPTY,
    churn::{self, Load},
    lab::Lab,
    programs::{self, Run},
    results::{Kernel, LeftOut, Program},
    spread::Spread,
    tracer::Tracer,
};

/// Runs of a program that are too few to say what one takes.
const FEW: u64 = 100;

/// Measures each tracer in turn, `rounds` times, while statistics are on.
pub(super) fn measure(
    lab: &Lab,
    rounds: usize,
    load: Load,
    tracers: &[Tracer],
    left_out: &mut Vec<LeftOut>,
) -> Result<Kernel> {
    let _statistics = programs::count_runs()?;
    let mut each: BTreeMap<(usize, String), Vec<(f64, f64)>> = BTreeMap::new();
    let mut failed = vec![false; tracers.len()];
    for round in 1..=rounds {
        for (index, tracer) in tracers.iter().enumerate().filter(|(_, tracer)| tracer.bpf) {
            if failed[index] {
                continue;
            }
            eprintln!(
                "bench: BPF programs, round {round} of {rounds}: {}",
                tracer.name
            );
            match traced(lab, tracer, load) {
                Ok((connections, runs)) => {
                    for (name, run) in runs {
                        if let Some(ns) = run.each().filter(|_| run.count >= FEW) {
                            let runs = run.count as f64 / connections as f64;
                            each.entry((index, name)).or_default().push((ns, runs));
                        }
                    }
                }
                Err(error) => {
                    failed[index] = true;
                    left_out.push(LeftOut {
                        what: format!("BPF programs of {}", tracer.name),
                        why: format!("{error:#}"),
                    });
                }
            }
        }
    }
    let mut programs = each.into_iter().filter_map(|((index, name), runs)| {
        let (ns, counts): (Vec<f64>, Vec<f64>) = runs.into_iter().unzip();
        Some(Program {
            of: tracers[index].name.to_owned(),
            name,
            ns: Spread::of(&ns)?,
            runs: Spread::of(&counts)?.median,
        })
    });
    let (empty, programs): (Vec<Program>, Vec<Program>) =
        programs.by_ref().partition(|program| program.of == EMPTY);
    Ok(Kernel {
        programs,
        empty: empty.first().context("the empty program did not run")?.ns,
    })
}

/// Runs of a tracer's programs, by name, and the connections that they were for.
fn traced(lab: &Lab, tracer: &Tracer, load: Load) -> Result<(u64, BTreeMap<String, Run>)> {
    let running = tracer.start(&lab.folder, &[])?;
    let runs = runs_of(lab, running.pid(), load)?;
    running.finish(churn::PORT)?;
    Ok(runs)
}

fn runs_of(lab: &Lab, pid: u32, load: Load) -> Result<(u64, BTreeMap<String, Run>)> {
    let before = programs::of(pid);
    let made = churn::run(&lab.churn, load)?;
    let after = programs::of(pid);
    let names = programs::names();
    let mut runs = BTreeMap::<String, Run>::new();
    for (id, run) in after {
        let run = run.since(before.get(&id).copied().unwrap_or_default());
        let name = names.get(&id).map_or("", String::as_str);
        let sum = runs.entry(name.to_owned()).or_default();
        *sum = *sum + run;
    }
    Ok((made.connections, runs))
}
