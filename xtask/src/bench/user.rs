//! What a record, and a line, cost in user space: instructions, time and memory of `workload`, which works on
//! made-up records.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{
    results::{Memory, Work},
    spread::Spread,
    tracer,
};
use crate::command;

/// Decoding alone; decoding and the tracker; lines of both kinds from what the tracker told.
const WORKS: [&str; 4] = ["decode", "tracker", "json", "text"];
/// Connections for the count of instructions, which callgrind makes fifty times as slow.
const COUNTED: &str = "4000";
/// Connections for time: several minutes of TIME_WAIT.
const TIMED: &str = "50000";
const TIMES: usize = 7;
/// Connections for memory. The target is stated for so many.
const TRACKED: u64 = 1_000_000;
const VALGRIND: &str = "valgrind";

/// Work that `workload` has done.
#[derive(Deserialize)]
pub(super) struct Done {
    pub(super) items: u64,
    pub(super) cpu_seconds: f64,
}

/// Instructions of each kind of work, and how fast it is, if `timed`.
pub(super) fn works(workload: &Path, timed: bool) -> Result<Vec<Work>> {
    let counts = tracer::find(VALGRIND, &|_| true).is_some();
    WORKS
        .into_iter()
        .map(|name| {
            eprintln!("bench: user space: {name}");
            Ok(Work {
                name: name.to_owned(),
                instructions: if counts {
                    Some(instructions(workload, name)?)
                } else {
                    None
                },
                per_second: if timed {
                    Some(per_second(workload, name)?)
                } else {
                    None
                },
            })
        })
        .collect()
}

/// Instructions for each item. Half of the work is done, then all of it: what differs is free of what comes
/// before, and of tables that begin empty.
fn instructions(workload: &Path, name: &str) -> Result<f64> {
    let (half, all) = (count(workload, name, "50")?, count(workload, name, "100")?);
    ensure!(
        all.0 > half.0 && all.1 > half.1,
        "{name}: more work has cost no more"
    );
    Ok((all.1 - half.1) as f64 / (all.0 - half.0) as f64)
}

/// Items, and instructions of the whole run.
fn count(workload: &Path, name: &str, percent: &str) -> Result<(u64, u64)> {
    let mut valgrind = Command::new(VALGRIND);
    valgrind
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(workload)
        .args([name, COUNTED, percent])
        .stdin(Stdio::null());
    let output = valgrind.output().context("cannot start valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind failed: {}", said.trim());
    let done: Done = serde_json::from_slice(&output.stdout).context("workload under valgrind")?;
    let collected = collected(&said).context("callgrind does not say how much it has counted")?;
    Ok((done.items, collected))
}

/// The number in callgrind's `Collected : 1234`.
fn collected(said: &str) -> Option<u64> {
    let (_, rest) = said.split_once("Collected :")?;
    rest.split_whitespace().next()?.parse().ok()
}

/// How fast one kind of work is.
pub(super) fn per_second(workload: &Path, name: &str) -> Result<Spread> {
    let mut rates = Vec::new();
    for _ in 0..TIMES {
        let done: Done = run(workload, &[name, TIMED, "100"])?;
        rates.push(done.items as f64 / done.cpu_seconds);
    }
    Spread::of(&rates).context("no time passed")
}

/// Memory for a million connections.
pub(super) fn memory(workload: &Path) -> Result<Memory> {
    eprintln!("bench: user space: memory");
    memory_of(workload, TRACKED)
}

/// Memory for so many.
pub(super) fn memory_of(workload: &Path, connections: u64) -> Result<Memory> {
    run(workload, &["memory", &connections.to_string()])
}

/// How fast each kind of work is; instructions are not counted.
pub(super) fn speeds(workload: &Path) -> Result<Vec<Work>> {
    let speed = |name: &str| {
        Ok(Work {
            name: name.to_owned(),
            instructions: None,
            per_second: Some(per_second(workload, name)?),
        })
    };
    WORKS.into_iter().map(speed).collect()
}

/// Runs `workload` with these arguments. Returns what it says.
///
/// # Errors
/// When it fails.
pub(super) fn run<T: for<'de> Deserialize<'de>>(workload: &Path, words: &[&str]) -> Result<T> {
    let said = command::output(Command::new(workload).args(words))?;
    serde_json::from_str(&said).with_context(|| format!("workload said {said:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_callgrind_says() {
        let said = "==7690== Events    : Ir\n==7690== Collected : 36058714\n==7690== \n==7690== I   refs:      36,058,714\n";
        assert_eq!(collected(said), Some(36_058_714));
        assert_eq!(collected("==1== Process terminating"), None);
    }
}
