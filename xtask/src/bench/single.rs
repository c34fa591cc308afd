//! Commands by themselves: one look at very many sockets, doing nothing, and starting.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    resource::{Usage, UsageWho, getrusage},
    time::TimeValLike as _,
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    lab::Lab,
    results::{Idle, Once},
    spread::Spread,
    tracer::{Tracer, dies_with_us},
    user::{self, Done},
};

/// Processes and pairs of sockets in each: a hundred thousand sockets.
const PROCESSES: u64 = 1000;
const PAIRS: u64 = 50;
const ONCE_ROUNDS: usize = 3;
/// How long nothing happens.
const IDLE: Duration = Duration::from_secs(20);
/// After the start there is still something to do.
const COME_TO_REST: Duration = Duration::from_secs(2);
const STARTS: usize = 5;
/// Nobody listens there: two transitions at once.
const NOBODY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 9);
const KNOCK_EVERY: Duration = Duration::from_millis(1);

#[derive(Deserialize)]
struct Held {
    processes: u64,
    sockets: u64,
}

/// Processes that hold sockets, half of them in CLOSE_WAIT.
pub(super) struct Holding {
    churn: Child,
    held: Held,
}

impl Holding {
    /// Starts them, until all sockets are there. Each also has so many descriptors of other files.
    ///
    /// # Errors
    /// When they cannot have so many.
    pub(super) fn start(churn: &Path, processes: u64, pairs: u64, files: u64) -> Result<Self> {
        let mut command = Command::new(churn);
        command
            .arg("hold")
            .arg(format!("processes={processes}"))
            .arg(format!("pairs={pairs}"))
            .arg(format!("files={files}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        dies_with_us(&mut command);
        let mut churn = command.spawn().context("cannot start churn")?;
        let mut said = String::new();
        let out = churn.stdout.take().context("a pipe was asked for")?;
        BufReader::new(out).read_line(&mut said)?;
        let held = serde_json::from_str(&said).context("churn did not hold the sockets")?;
        Ok(Self { churn, held })
    }

    /// Ends them, and waits until all sockets are gone.
    pub(super) fn end(mut self) -> Result<()> {
        drop(self.churn.stdin.take());
        self.churn.wait()?;
        Ok(())
    }
}

/// What `workload holders` says: of a pass over `/proc`, and of the kernel's walk of all open files.
#[derive(Deserialize)]
struct Holders {
    pass: Done,
    walk: Done,
}

/// `leaks --once` and `ss -tanp` in turn, on sockets of which half are in CLOSE_WAIT; and both ways to their holders.
pub(super) fn once(lab: &Lab, tcptrace: &Path, workload: &Path) -> Result<Once> {
    eprintln!("bench: leaks --once and ss -tanp");
    let holding = Holding::start(&lab.churn, PROCESSES, PAIRS, 0)?;
    let held = &holding.held;
    // Older than `leaks` asks for.
    thread::sleep(Duration::from_secs(2));
    let file = lab.folder.join("once");
    let (mut leaks, mut ss, mut pass, mut walk) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut leaked = 0;
    for _ in 0..ONCE_ROUNDS {
        let mut command = Command::new(tcptrace);
        command.args(["leaks", "--once", "--older-than", "1s", "-o", "json"]);
        leaks.push(timed(command.stdout(File::create(&file)?))?);
        leaked = sockets_in_report(&fs::read_to_string(&file)?)
            .context("leaks --once wrote no report")?;
        ss.push(timed(
            Command::new("ss").arg("-tanp").stdout(File::create(&file)?),
        )?);
        let lines = BufReader::new(File::open(&file)?).lines().count() as u64;
        ensure!(
            lines > held.sockets,
            "ss shows {lines} of {} sockets",
            held.sockets
        );
        let holders: Holders = user::run(workload, &["holders"])?;
        for (found, times) in [(holders.pass, &mut pass), (holders.walk, &mut walk)] {
            let sockets = found.items;
            ensure!(sockets >= held.sockets, "{sockets} sockets have holders");
            times.push(found.cpu_seconds);
        }
    }
    let (sockets, processes) = (held.sockets, held.processes);
    holding.end()?;
    let spread = |times: &[(f64, f64)], which: fn(&(f64, f64)) -> f64| {
        let times: Vec<f64> = times.iter().map(which).collect();
        Spread::of(&times).context("no time passed")
    };
    Ok(Once {
        sockets,
        processes,
        leaks_wall: spread(&leaks, |time| time.0)?,
        leaks_cpu: spread(&leaks, |time| time.1)?,
        ss_wall: spread(&ss, |time| time.0)?,
        ss_cpu: spread(&ss, |time| time.1)?,
        leaked,
        pass_cpu: Spread::of(&pass).context("no time passed")?,
        walk_cpu: Spread::of(&walk).context("no time passed")?,
    })
}

/// How many sockets the last report of `leaks -o json` tells of.
fn sockets_in_report(output: &str) -> Option<u64> {
    let lines = output.lines().rev();
    let mut values = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    values.find(|line| line["event"] == "report")?["sockets"].as_u64()
}

/// Seconds that pass while it runs, and seconds of CPU that it takes.
pub(super) fn timed(command: &mut Command) -> Result<(f64, f64)> {
    let cpu = |usage: Usage| (usage.user_time() + usage.system_time()).num_microseconds() as f64;
    let before = cpu(getrusage(UsageWho::RUSAGE_CHILDREN)?);
    let began = Instant::now();
    let status = command.stderr(Stdio::null()).status()?;
    let wall = began.elapsed().as_secs_f64();
    ensure!(
        status.success(),
        "{:?} failed: {status}",
        command.get_program()
    );
    let after = cpu(getrusage(UsageWho::RUSAGE_CHILDREN)?);
    Ok((wall, (after - before) / 1e6))
}

/// Each command where nothing happens: it is asked for this network namespace only, in which there is nothing.
pub(super) fn idle(lab: &Lab, tracers: &[Tracer]) -> Result<Vec<Idle>> {
    let netns = lab.netns.to_string();
    tracers
        .iter()
        .map(|tracer| {
            eprintln!("bench: idle: {}", tracer.name);
            let running = tracer.start(&lab.folder, &["--netns", &netns])?;
            thread::sleep(COME_TO_REST);
            let before = activity(running.pid())?;
            let began = Instant::now();
            thread::sleep(IDLE);
            let after = activity(running.pid())?;
            let seconds = began.elapsed().as_secs_f64();
            Ok(Idle {
                name: tracer.name.to_owned(),
                cpu: (after.0 - before.0) as f64 / 1e9 / seconds,
                wakeups: (after.1 - before.1) as f64 / seconds,
            })
        })
        .collect()
}

/// Nanoseconds on a CPU, and how often its threads have gone to sleep.
pub(super) fn activity(pid: u32) -> Result<(u64, u64)> {
    let mut sum = (0, 0);
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let schedstat = fs::read_to_string(task.join("schedstat"))?;
        let ran = schedstat
            .split_whitespace()
            .next()
            .and_then(|ran| ran.parse::<u64>().ok());
        let status = fs::read_to_string(task.join("status"))?;
        let slept = fields(&status)
            .get("voluntary_ctxt_switches")
            .and_then(|n| n.parse::<u64>().ok());
        sum.0 += ran.context("/proc/PID/task/TID/schedstat")?;
        sum.1 += slept.context("/proc/PID/task/TID/status")?;
    }
    Ok(sum)
}

/// `name: value` by name.
fn fields(text: &str) -> BTreeMap<&str, &str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.trim(), value.trim()))
        .collect()
}

/// From the start of `stream` to its first line, while every millisecond there is something to tell.
pub(super) fn start(tcptrace: &Path) -> Result<Spread> {
    eprintln!("bench: start to first event");
    let over = AtomicBool::new(false);
    let times = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let _ = TcpStream::connect(NOBODY);
                thread::sleep(KNOCK_EVERY);
            }
        });
        let times: Result<Vec<f64>> = (0..STARTS).map(|_| first_event(tcptrace)).collect();
        over.store(true, Ordering::Relaxed);
        times
    })?;
    Spread::of(&times).context("no time passed")
}

/// Milliseconds.
fn first_event(tcptrace: &Path) -> Result<f64> {
    let mut command = Command::new(tcptrace);
    command
        .args(["stream", "-o", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    dies_with_us(&mut command);
    let began = Instant::now();
    let mut child = command.spawn().context("cannot start tcptrace")?;
    let out = child.stdout.take().context("a pipe was asked for")?;
    let read = BufReader::new(out).read_line(&mut String::new());
    let took = began.elapsed().as_secs_f64() * 1e3;
    child.kill()?;
    child.wait()?;
    ensure!(read? > 0, "tcptrace ended without a line");
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_counts() {
        let output = r#"{"event":"leak","sockets":3}
{"event":"report","sockets":4}
{"event":"leak","sockets":5}
{"event":"report","sockets":6}
"#;
        assert_eq!(sockets_in_report(output), Some(6));
        assert_eq!(sockets_in_report(r#"{"event":"leak","sockets":3}"#), None);
    }

    #[test]
    fn fields_of_proc() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t545\n";
        assert_eq!(fields(status)["voluntary_ctxt_switches"], "150");
    }
}
