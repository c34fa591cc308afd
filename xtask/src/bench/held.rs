//! Held rates: how many transitions a second each command follows without losing one.
//!
//! This machine's TCP may be slower than tcptrace. So a feeder writes made-up records of whole connections into the ring
//! buffer of the tcptrace that runs, at a given rate, and counts the records that find no room. The highest rate without
//! such a record is found by doubling and then halving the distance, in short tries; a long one confirms it.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;

use super::{
    churn::{self, Load, SETTLE},
    lab::Lab,
    output, programs,
    results::{AtLimit, Ceiling, Held, HeldRate, LeftOut, OneCore},
    sinks::{Opened, Sink},
    tracer,
};
use crate::command;

/// What tcptrace says once it traces.
const TRACING: &str = "tcptrace: tracing";
const START: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
/// Two rates that differ by less are the same.
const PRECISION: f64 = 1.15;
/// A rate at which records were lost is tried again: another process may have had the CPUs.
const TRIES: u32 = 2;
/// A confirmed try is so many times as long as a short one.
const CONFIRMED: f64 = 5.0;
/// How much slower the next rate is that is to be confirmed.
const SLOWER: f64 = 0.9;
/// The search begins with so many connections a second.
const FIRST: f64 = 60_000.0;
/// No rate above so many connections a second is tried.
const MOST: f64 = 2e6;
/// A feeder that makes less than this share of a rate is itself the limit.
const PACED: f64 = 0.97;

/// A command whose held rate is measured.
#[derive(Clone, Copy)]
struct Subject {
    /// As the pages call it.
    name: &'static str,
    arguments: &'static [&'static str],
    /// How the feeder's connections end.
    close: &'static str,
    /// What the probes of the command record, as the feeder calls it.
    knowledge: &'static str,
    /// What the reader does for each record besides reading, decoding and tracking: a stage of the ceilings.
    line: Option<&'static str>,
    sinks: &'static [Sink],
}

const SUBJECTS: [Subject; 5] = [
    Subject {
        name: "stream -o json",
        arguments: &["stream", "-o", "json"],
        close: "rst",
        knowledge: "owners",
        line: Some("json"),
        sinks: &Sink::ALL,
    },
    Subject {
        name: "stream",
        arguments: &["stream"],
        close: "rst",
        knowledge: "owners",
        line: Some("text"),
        sinks: &Sink::ALL,
    },
    Subject {
        name: "leaks",
        arguments: &["leaks", "-o", "json"],
        close: "fin",
        knowledge: "dwell",
        line: None,
        sinks: &[Sink::Tmpfs],
    },
    Subject {
        name: "timewait",
        arguments: &["timewait", "-o", "json"],
        close: "fin",
        knowledge: "owners",
        line: None,
        sinks: &[Sink::Tmpfs],
    },
    Subject {
        name: "record",
        arguments: &["record", "-"],
        close: "rst",
        knowledge: "owners",
        line: Some("record"),
        sinks: &Sink::ALL,
    },
];

/// What the feeder says.
#[derive(Clone, Copy, Deserialize)]
struct Fed {
    connections: u64,
    transitions: u64,
    records: u64,
    lost: u64,
    seconds: f64,
}

/// What tcptrace says at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    /// Records that it read; `None` if it does not say.
    read: Option<u64>,
    /// Transitions that it showed; `None` if it does not say.
    shown: Option<u64>,
    /// Records that it lost; `None` if it does not say.
    lost: Option<u64>,
}

/// A try at one rate.
struct Try {
    fed: Fed,
    totals: Totals,
    /// CPUs that tcptrace used, its output included.
    cpus: f64,
}

impl Try {
    /// Whether nothing was lost.
    fn is_whole(&self) -> bool {
        self.fed.lost == 0 && self.totals.lost.unwrap_or(0) == 0
    }

    /// Whether the feeder has made this rate.
    fn is_paced(&self, rate: f64) -> bool {
        self.fed.connections as f64 / self.fed.seconds >= rate * PACED
    }
}

/// A tcptrace that runs. Killed when dropped.
struct Running {
    child: Child,
    errors: std::path::PathBuf,
    sink: Option<Opened>,
}

impl Running {
    fn start(tcptrace: &Path, lab: &Lab, arguments: &[&str], sink: Sink) -> Result<Self> {
        let errors = lab.folder.join("errors");
        let (opened, stdout) = Opened::new(sink, &lab.folder)?;
        let mut command = Command::new(tcptrace);
        command
            .args(arguments)
            // Other namespaces of this machine are none of its business: what was made is to be known.
            .args(["--netns", &lab.netns.to_string()])
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create(&errors)?);
        tracer::dies_with_us(&mut command);
        let child = command.spawn();
        // The writing end of a pipe is open in it.
        drop(command);
        let mut running = Self {
            child: child.with_context(|| format!("{} cannot be started", tcptrace.display()))?,
            errors,
            sink: Some(opened),
        };
        let began = Instant::now();
        while !running.said().lines().any(|line| line == TRACING) {
            let ended = running.child.try_wait()?;
            let late = began.elapsed() > START;
            ensure!(
                ended.is_none() && !late,
                "tcptrace does not trace: {}",
                running.said()
            );
            thread::sleep(POLL);
        }
        Ok(running)
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn cpu(&self) -> Result<Duration> {
        tracer::cpu(self.pid())
    }

    /// How often the kernel has not run a probe of it because that had interrupted itself: this counts as lost, whether it
    /// would have been a record or not.
    fn missed(&self) -> u64 {
        programs::missed(self.pid())
    }

    /// Ends it as Ctrl-C does.
    fn finish(mut self) -> Result<Totals> {
        kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGINT)?;
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(began.elapsed() < END, "tcptrace does not end with SIGINT");
            thread::sleep(POLL);
        };
        ensure!(status.success(), "tcptrace failed: {}", self.said());
        let tail = self.sink.take().map_or(Ok(String::new()), Opened::tail)?;
        Ok(totals(&tail, &self.said()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What the last lines of the output, and of the messages, say.
fn totals(output: &str, said: &str) -> Totals {
    #[derive(Deserialize)]
    struct End {
        records: u64,
        lost: u64,
    }
    let end = output
        .lines()
        .rev()
        .find(|line| line.contains(r#""event":"end""#))
        .and_then(|line| serde_json::from_str::<End>(line).ok());
    if let Some(End { records, lost }) = end {
        return Totals {
            read: Some(records),
            shown: None,
            lost: Some(lost),
        };
    }
    let number = |what: &str| {
        said.lines().rev().find_map(|line| {
            let (before, _) = line.split_once(what)?;
            let number = before.split_whitespace().last()?.parse().ok()?;
            Some((number, output::lost_in(line)))
        })
    };
    let (read, shown) = (number(" records written"), number(" transitions shown"));
    Totals {
        read: read.map(|(read, _)| read),
        shown: shown.map(|(shown, _)| shown),
        lost: read.or(shown).map(|(_, lost)| lost),
    }
}

/// Everything that is needed to try a rate.
struct Bench<'a> {
    lab: &'a Lab,
    tcptrace: &'a Path,
    feeder: &'a Path,
}

impl Bench<'_> {
    /// Feeds a new tcptrace with so many connections a second, and holds what it says against what was made.
    fn attempt(&self, subject: Subject, sink: Sink, rate: f64, seconds: f64) -> Result<Try> {
        let running = Running::start(self.tcptrace, self.lab, subject.arguments, sink)?;
        let before = running.cpu()?;
        let mut feeder = Command::new(self.feeder);
        feeder
            .arg("feed")
            .arg(format!("pid={}", running.pid()))
            .arg(format!("netns={}", self.lab.netns))
            .arg(format!("rate={rate}"))
            .arg(format!("seconds={seconds}"))
            .arg(format!("close={}", subject.close))
            .arg(format!("knowledge={}", subject.knowledge));
        tracer::dies_with_us(&mut feeder);
        let said = command::output(&mut feeder)?;
        let cpu = running.cpu()?.saturating_sub(before);
        let fed: Fed =
            serde_json::from_str(&said).with_context(|| format!("the feeder said {said:?}"))?;
        thread::sleep(SETTLE);
        let totals = running.finish()?;
        let made = Try {
            fed,
            totals,
            cpus: cpu.as_secs_f64() / fed.seconds,
        };
        account(subject.name, &made)?;
        Ok(made)
    }

    /// Tries a rate, once more if something was lost.
    fn holds(&self, subject: Subject, sink: Sink, rate: f64, seconds: f64) -> Result<Try> {
        let mut tries = 0;
        loop {
            tries += 1;
            let made = self.attempt(subject, sink, rate, seconds)?;
            if (made.is_whole() && made.is_paced(rate)) || tries == TRIES {
                return Ok(made);
            }
        }
    }

    /// The highest rate of a command and sink at which nothing is lost.
    fn search(&self, subject: Subject, sink: Sink, seconds: f64) -> Result<HeldRate> {
        let (mut low, mut high) = (0.0, f64::INFINITY);
        let mut rate = FIRST;
        let mut is_feeder_slow = false;
        while high / low > PRECISION && low < MOST {
            let made = self.holds(subject, sink, rate, seconds)?;
            eprintln!(
                "bench: held rate: {} to {}: {:.0} transitions/s: {} of {} records lost",
                subject.name,
                sink.name(),
                made.fed.transitions as f64 / made.fed.seconds,
                made.fed.lost,
                made.fed.records
            );
            if made.is_whole() && made.is_paced(rate) {
                low = rate;
            } else {
                is_feeder_slow = made.is_whole();
                high = rate;
            }
            ensure!(high > 1.0, "not even a connection a second is followed");
            rate = match (low, high) {
                (0.0, _) => high / 2.0,
                (_, f64::INFINITY) => low * 2.0,
                _ => (low * high).sqrt(),
            };
        }
        let mut rate = low;
        loop {
            let made = self.holds(subject, sink, rate, seconds * CONFIRMED)?;
            if made.is_whole() && made.is_paced(rate) {
                return Ok(HeldRate {
                    command: subject.name.to_owned(),
                    sink,
                    close: subject.close.to_owned(),
                    transitions: made.fed.transitions as f64 / made.fed.seconds,
                    records: made.fed.records as f64 / made.fed.seconds,
                    seconds: made.fed.seconds,
                    cpus: made.cpus,
                    line: subject.line.map(str::to_owned),
                    is_least: is_feeder_slow || low >= MOST,
                });
            }
            rate *= SLOWER;
            ensure!(rate > 1.0, "not even a connection a second is followed");
        }
    }
}

/// Holds what tcptrace says against what the feeder made: `made = read + lost`, to the record.
fn account(name: &str, made: &Try) -> Result<()> {
    let Try { fed, totals, .. } = made;
    if let (Some(read), Some(lost)) = (totals.read, totals.lost)
        && (read + lost != fed.records || lost < fed.lost)
    {
        bail!(
            "{name}: the feeder made {} records, of which {} found no room; tcptrace read {read} and lost {lost}",
            fed.records,
            fed.lost
        );
    }
    if let Some(shown) = totals.shown
        && fed.lost == 0
        && shown != fed.transitions
    {
        bail!(
            "{name}: the feeder made {} transitions, and tcptrace showed {shown}",
            fed.transitions
        );
    }
    Ok(())
}

/// Measures all commands and sinks; what fails is left out.
pub(super) fn measure(
    lab: &Lab,
    tcptrace: &Path,
    feeder: &Path,
    seconds: f64,
    left_out: &mut Vec<LeftOut>,
) -> Result<Held> {
    let bench = Bench {
        lab,
        tcptrace,
        feeder,
    };
    let made = churn::make(&lab.churn, seconds)?;
    let [stream, ..] = SUBJECTS;
    let one_core = made.per_second;
    eprintln!("bench: one core makes {one_core:.0} connections a second without a tracer");
    let at_one_core = bench.holds(stream, Sink::Tmpfs, one_core, seconds)?;
    let mut rates = Vec::new();
    for subject in SUBJECTS {
        for sink in subject.sinks {
            match bench.search(subject, *sink, seconds) {
                Ok(rate) => rates.push(rate),
                Err(error) => left_out.push(LeftOut {
                    what: format!("held rate of `{}` to {}", subject.name, sink.name()),
                    why: format!("{error:#}"),
                }),
            }
        }
    }
    let limits = SUBJECTS
        .iter()
        .map(|subject| at_limit(&bench, *subject, seconds))
        .collect::<Result<_>>()?;
    Ok(Held {
        one_core: OneCore {
            transitions: one_core * 6.0,
            lost: at_one_core.fed.lost,
            cpus: at_one_core.cpus,
        },
        rates,
        limits,
    })
}

/// As many connections as this machine makes, on all CPUs.
fn at_limit(bench: &Bench<'_>, subject: Subject, seconds: f64) -> Result<AtLimit> {
    let running = Running::start(bench.tcptrace, bench.lab, subject.arguments, Sink::Tmpfs)?;
    let before = running.cpu()?;
    let threads = thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let load = Load {
        threads,
        ..Load::resets(seconds)
    };
    let made = churn::run(&bench.lab.churn, load)?;
    let cpu = running.cpu()?.saturating_sub(before);
    thread::sleep(SETTLE);
    let missed = running.missed();
    let totals = running.finish()?;
    eprintln!(
        "bench: at the limit: {}: {:.0} connections/s, {totals:?}, {missed} probes not run",
        subject.name, made.per_second
    );
    let transitions = made.connections * 6 + 2 * u64::from(threads);
    if let (Some(shown), Some(0)) = (totals.shown, totals.lost) {
        ensure!(
            shown == transitions,
            "{} showed {shown} of {transitions} transitions",
            subject.name
        );
    }
    Ok(AtLimit {
        command: subject.name.to_owned(),
        threads,
        transitions: made.per_second * 6.0,
        lost: totals.lost.unwrap_or(0),
        missed,
        cpus: cpu.as_secs_f64() / seconds,
    })
}

/// Seconds that a stage's ceiling is measured.
const RING_SECONDS: f64 = 1.0;
/// The default size of the ring buffer on two CPUs.
const RING_BYTES: u32 = 8 << 20;
/// Lines that are written to each sink: some 200 MB.
const LINES: u32 = 800_000;

#[derive(Deserialize)]
struct Written {
    items: u64,
    seconds: f64,
}

/// How many records a second each stage takes by itself.
pub(super) fn ceilings(lab: &Lab, feeder: &Path, workload: &Path) -> Result<Vec<Ceiling>> {
    let mut ceilings = Vec::new();
    eprintln!("bench: ceilings: ring read");
    let mut command = Command::new(feeder);
    command
        .args(["ring", &format!("bytes={RING_BYTES}")])
        .arg(format!("seconds={RING_SECONDS}"));
    let done: super::user::Done = serde_json::from_str(&command::output(&mut command)?)?;
    ceilings.push(Ceiling {
        stage: "ring".to_owned(),
        per_second: done.items as f64 / done.cpu_seconds,
    });
    for stage in ["decode", "tracker", "json", "text", "record"] {
        eprintln!("bench: ceilings: {stage}");
        ceilings.push(Ceiling {
            stage: stage.to_owned(),
            per_second: super::user::per_second(workload, stage)?.median,
        });
    }
    for sink in Sink::ALL {
        eprintln!("bench: ceilings: writing to {}", sink.name());
        let path = sink.path(&lab.folder)?;
        let path = match sink {
            Sink::Null => "null",
            Sink::Pipe => "pipe",
            Sink::Tmpfs | Sink::Disk => path.to_str().context("not a plain path")?,
        };
        let written = super::user::run(workload, &["write", path, &LINES.to_string()]);
        if matches!(sink, Sink::Tmpfs | Sink::Disk) {
            let _ = fs::remove_file(path);
        }
        let Written { items, seconds } = written?;
        ceilings.push(Ceiling {
            stage: format!("write to {}", sink.name()),
            per_second: items as f64 / seconds,
        });
    }
    Ok(ceilings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_of_each_command() {
        let json = "{\"event\":\"transition\",\"records\":9}\n{\"event\":\"end\",\"time\":\"x\",\"records\":12,\"lost\":3}\n";
        let end = Totals {
            read: Some(12),
            shown: None,
            lost: Some(3),
        };
        assert_eq!(totals(json, "tcptrace: 1 transitions shown\n"), end);
        let said = "tcptrace: tracing\ntcptrace: 600 transitions shown, 12 events lost\n";
        let shown = Totals {
            shown: Some(600),
            lost: Some(12),
            ..Totals::default()
        };
        assert_eq!(totals("", said), shown);
        let said = "tcptrace: 14 records written to -, 7 lost\n";
        let recorded = Totals {
            read: Some(14),
            lost: Some(7),
            ..Totals::default()
        };
        assert_eq!(totals("", said), recorded);
        assert_eq!(totals("", "tcptrace: tracing\n"), Totals::default());
        let whole = Totals {
            shown: Some(600),
            lost: Some(0),
            ..Totals::default()
        };
        assert_eq!(totals("", "tcptrace: 600 transitions shown\n"), whole);
    }

    #[test]
    fn what_was_made_was_read_or_lost() {
        let made = |lost, totals| {
            let fed = Fed {
                connections: 2,
                transitions: 12,
                records: 14,
                lost,
                seconds: 1.0,
            };
            account(
                "x",
                &Try {
                    fed,
                    totals,
                    cpus: 0.0,
                },
            )
            .is_ok()
        };
        let end = |read, lost| Totals {
            read: Some(read),
            shown: None,
            lost: Some(lost),
        };
        assert!(made(4, end(10, 4)));
        // One that was left in the buffer is lost as well.
        assert!(made(4, end(9, 5)));
        assert!(!made(4, end(9, 4)));
        assert!(!made(4, end(11, 4)));
        assert!(!made(4, end(11, 3)));
        let shown = |shown| Totals {
            shown: Some(shown),
            ..Totals::default()
        };
        assert!(made(0, shown(12)));
        assert!(!made(0, shown(11)));
        assert!(made(1, shown(11)));
    }
}
