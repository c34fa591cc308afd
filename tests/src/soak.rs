//! tcptrace under as much load as this machine makes, for minutes: a soak, and its short form in the tests.
//!
//! `cargo xtask bench --soak 10m` runs all subjects for so long each. A test runs one of them for a minute.

use std::{
    env, fmt, fs,
    io::{BufRead as _, BufReader, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::signal::Signal,
};
use serde_json::Value;

use crate::{
    Diag, Netns,
    program::{Process, built},
    tcptrace::binary,
    wait_until,
};

/// The commands that are soaked, with the arguments that have them end with a line of totals.
pub const SUBJECTS: [(&str, &[&str]); 5] = [
    ("stream -o json", &["stream", "-o", "json"]),
    ("stream", &["stream"]),
    (
        "leaks",
        &[
            "leaks",
            "-o",
            "json",
            "--older-than",
            "1s",
            "--interval",
            "1s",
        ],
    ),
    ("timewait", &["timewait", "-o", "json"]),
    ("record", &["record", "-"]),
];

/// What tcptrace says once it traces.
const READY: &str = "tcptrace: tracing";
/// Time to start, or to end, on a machine that is under load.
const SOON: Duration = Duration::from_secs(30);
/// After the load, what was lost must be healed within this time.
const HEALED: Duration = Duration::from_secs(5);
/// TIME_WAIT, with what the timer wheel adds.
const TIME_WAIT: Duration = Duration::from_secs(75);
/// How many timewait sockets the kernel allows at most.
const TIME_WAITS: &str = "400000";
/// Memory is to be flat after this time.
const SETTLED: Duration = Duration::from_secs(60);
/// Memory may differ by so much, and by a tenth.
const MEMORY_SLACK: u64 = 16 << 20;
/// So much of the output's end is kept.
const TAIL: usize = 1 << 16;
/// The ring buffer of the tracer that everything is held against.
const LARGE_BUFFER: &str = "512M";

/// How a soak goes.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long there is load.
    pub length: Duration,
    /// For so long tcptrace is stopped (SIGSTOP) in the middle of it.
    pub stopped: Duration,
    /// Threads that open and reset connections as fast as they can.
    pub threads: u32,
    /// Connections a second that end with a FIN.
    pub fins: u32,
    /// Connections in CLOSE_WAIT that are held all the time.
    pub leaked: usize,
    /// Memory is measured so often.
    pub every: Duration,
    /// Whether a second tcptrace with a large buffer has to count as many records. That takes until the last TIME_WAIT
    /// has ended. It is left out for `stream`, which does not count records, and for `timewait`.
    pub has_reference: bool,
}

impl Plan {
    /// All CPUs under load for so long, with 200,000 timewait sockets after a minute.
    #[must_use]
    pub fn of(length: Duration) -> Self {
        Self {
            length,
            stopped: Duration::from_secs(5).min(length / 8),
            threads: thread::available_parallelism().map_or(1, |count| count.get() as u32),
            fins: 200_000 / 60,
            leaked: 50,
            every: Duration::from_secs(10).min(length / 12),
            has_reference: true,
        }
    }
}

/// What came of a soak.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Resident memory at times after the load began, bytes.
    pub memory: Vec<(Duration, u64)>,
    /// Connections that were reset, and that ended with a FIN.
    pub connections: [u64; 2],
    /// Records read, if the command says so.
    pub read: Option<u64>,
    /// Records lost, and probes that did not run.
    pub lost: u64,
    /// Of these, probes that did not run.
    pub missed: u64,
    /// Records that were made, as a second tcptrace has counted them.
    pub made: Option<u64>,
    /// Sockets that were to be there at the end, and those that tcptrace had: none for commands that show no sockets.
    pub sockets: Option<(String, u64)>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [resets, fins] = self.connections;
        write!(f, "{resets} resets, {fins} FINs; ")?;
        match (self.made, self.read) {
            (Some(made), Some(read)) => {
                let lost = self.lost - self.missed;
                write!(f, "{made} made = {read} read + {lost} lost")?;
            }
            (None, Some(read)) => write!(f, "{read} read, {} lost", self.lost)?,
            (_, None) => write!(f, "{} lost", self.lost)?,
        }
        if self.missed > 0 {
            write!(f, ", {} probes not run", self.missed)?;
        }
        if let Some((expected, found)) = &self.sockets {
            write!(f, "; {found} sockets of {expected}")?;
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let most = self.memory.iter().map(|(_, bytes)| *bytes).max();
        write!(f, "; at most {:.0} MiB", mib(most.unwrap_or(0)))
    }
}

/// Runs a command of tcptrace (one of [`SUBJECTS`]) under load. `say` gets what is measured meanwhile.
///
/// # Panics
/// When memory is not flat after the first minute, when a record is neither read nor lost, when five seconds after the load
/// a socket is missing or one is there that should not be, or when tcptrace does not obey.
#[must_use]
pub fn soak(subject: &str, plan: &Plan, say: &mut dyn FnMut(&str)) -> Outcome {
    let (_, arguments) = SUBJECTS
        .into_iter()
        .find(|(name, _)| *name == subject)
        .unwrap_or_else(|| panic!("{subject} is none of {SUBJECTS:?}"));
    let netns = Netns::new().expect("a soak needs root");
    // The kernel's own limit may be lower than the timewait sockets that are wanted.
    netns.set("ipv4/tcp_max_tw_buckets", TIME_WAITS);
    let mut holder = hold(&netns, plan.leaked);
    let tracer = Tracer::start(&netns, arguments);
    // Text has no count of records; and what `timewait` shows of sockets is to be seen before the last of them ends.
    let has_reference = plan.has_reference && !matches!(subject, "stream" | "timewait");
    let reference = has_reference
        .then(|| Tracer::start(&netns, &[arguments, &["--buffer", LARGE_BUFFER]].concat()));
    let mut outcome = Outcome::default();

    let mut loads = vec![load(&netns, plan.length, 7000, "rst", plan.threads, None)];
    if plan.fins > 0 {
        loads.push(load(&netns, plan.length, 9000, "fin", 1, Some(plan.fins)));
    }
    let began = Instant::now();
    let mut is_stopped = false;
    let mut next = plan.every;
    while began.elapsed() < plan.length {
        thread::sleep(Duration::from_millis(100).min(plan.length / 20));
        let now = began.elapsed();
        if !is_stopped && now >= plan.length / 2 {
            is_stopped = true;
            say(&format!("stopped for {:?}", plan.stopped));
            tracer.process.signal(Signal::SIGSTOP);
            thread::sleep(plan.stopped);
            tracer.process.signal(Signal::SIGCONT);
        }
        if now >= next {
            next += plan.every;
            let bytes = tracer.memory();
            say(&format!(
                "{:4.0} s: {:.1} MiB",
                now.as_secs_f64(),
                bytes as f64 / f64::from(1 << 20)
            ));
            outcome.memory.push((now, bytes));
        }
    }
    for (load, connections) in loads.into_iter().zip(&mut outcome.connections) {
        *connections = made(load);
    }
    thread::sleep(HEALED);

    let diag = Diag::new(&netns);
    if reference.is_some() && subject != "leaks" {
        // Ends of TIME_WAIT are records as well, but not for `leaks`: both are to see the same.
        wait_until("the last TIME_WAIT ends", TIME_WAIT, || {
            let is_over = count(&diag, "TIME_WAIT") == 0;
            if !is_over {
                thread::sleep(Duration::from_secs(1));
            }
            is_over.then_some(())
        });
    }
    let before = count(&diag, "TIME_WAIT");
    let totals = tracer.finish();
    let after = count(&diag, "TIME_WAIT");
    if subject != "stream" && subject != "leaks" {
        assert_eq!(totals.lost_lines, totals.lost, "{subject}: {totals:?}");
    }
    outcome.read = totals.read;
    (outcome.lost, outcome.missed) = (totals.lost, totals.missed);
    if let Some(reference) = reference {
        let reference = reference.finish();
        outcome.made = reference.made();
        assert_eq!(
            totals.made(),
            outcome.made,
            "{subject}: made is not read and lost: {totals:?}, with a large buffer {reference:?}"
        );
    }
    match subject {
        "leaks" => {
            let found = totals.line("report")["sockets"].as_u64().unwrap_or(0);
            let there = count(&diag, "CLOSE_WAIT");
            outcome.sockets = Some((format!("{there} in CLOSE_WAIT"), found));
            assert_eq!(there, plan.leaked as u64, "they are held");
            assert_eq!(found, there, "{subject}: {}", totals.tail);
        }
        "timewait" => {
            let found = totals.line("time_wait_summary")["running"]["time_wait"]
                .as_u64()
                .expect("a number");
            outcome.sockets = Some((format!("{after} to {before} in TIME_WAIT"), found));
            // The kernel's timers, and the records of them, are a moment apart.
            let slack = u64::from(plan.fins) / 5;
            assert!(
                (after.saturating_sub(slack)..=before + slack).contains(&found),
                "{subject}: {found} in TIME_WAIT, the kernel has {after} to {before}"
            );
        }
        "stream" | "stream -o json" if totals.lost == 0 => {
            let [resets, fins] = outcome.connections;
            let listeners = u64::from(plan.threads) + u64::from(plan.fins > 0);
            let least = resets * 6 + fins * 10 + listeners * 2;
            assert!(
                totals.transitions >= least,
                "{subject}: {} transitions of {least}",
                totals.transitions
            );
        }
        _ => {}
    }
    drop(holder.0.stdin.take());
    assert_flat(subject, &outcome.memory);
    outcome
}

/// Memory may grow for a minute, and not after that.
fn assert_flat(subject: &str, memory: &[(Duration, u64)]) {
    let most = |range: std::ops::Range<Duration>| {
        let within = memory.iter().filter(|(at, _)| range.contains(at));
        within.map(|(_, bytes)| *bytes).max()
    };
    let Some((end, _)) = memory.last() else {
        return;
    };
    let middle = SETTLED + end.saturating_sub(SETTLED) / 2;
    let (Some(first), Some(last)) = (most(SETTLED..middle), most(middle..Duration::MAX)) else {
        return;
    };
    assert!(
        last <= first + first / 10 + MEMORY_SLACK,
        "{subject}: memory grows: {memory:?}"
    );
}

/// A ring buffer that is far too small: what is read and what is lost is all that was made.
///
/// # Panics
/// When it is not, or nothing was lost.
#[must_use]
pub fn tiny_buffer(length: Duration) -> Outcome {
    let netns = Netns::new().expect("a soak needs root");
    let arguments = ["stream", "-o", "json", "--buffer"];
    let tiny = Tracer::start(&netns, &[&arguments[..], &["4K"]].concat());
    let large = Tracer::start(&netns, &[&arguments[..], &[LARGE_BUFFER]].concat());
    let connections = made(load(&netns, length, 7000, "rst", 2, None));
    thread::sleep(HEALED);
    let (tiny, large) = (tiny.finish(), large.finish());
    let made = large.made();
    assert_eq!(tiny.made(), made, "{tiny:?}\n{large:?}");
    assert_eq!(tiny.lost_lines, tiny.lost, "{tiny:?}");
    assert!(tiny.lost > 0, "nothing was lost in 4 KiB: {tiny:?}");
    Outcome {
        connections: [connections, 0],
        read: tiny.read,
        lost: tiny.lost,
        missed: tiny.missed,
        made,
        ..Outcome::default()
    }
}

/// A file system without room: tcptrace says so and ends.
///
/// # Panics
/// When it does not, within five seconds.
pub fn full_disk() -> String {
    let netns = Netns::new().expect("a soak needs root");
    let folder = env::temp_dir().join(format!("tcptrace-soak-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("recording");
    let mut command = command(&netns, &["record", file.to_str().expect("a plain path")]);
    let at = folder.clone();
    let make = move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(
            Some("tmpfs"),
            &at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=1m"),
        )?;
        Ok(())
    };
    // SAFETY: between fork and exec there are only system calls; paths are short enough for nix's stack buffers.
    unsafe { command.pre_exec(make) };
    let mut tracer = Tracer::watch(command);
    let length = Duration::from_secs(8);
    let load = load(&netns, length, 7000, "rst", 1, None);
    let status = tracer.process.wait("tcptrace ends on a full disk", length);
    let said = tracer.said();
    drop(load);
    let _ = fs::remove_dir(&folder);
    assert!(
        !status.success() && said.contains("No space left"),
        "{status}: {said}"
    );
    said.lines().last().unwrap_or_default().to_owned()
}

/// How many sockets of the namespace are in this state.
fn count(diag: &Diag, state: &str) -> u64 {
    let rows = diag.rows();
    rows.iter().filter(|row| row.state == state).count() as u64
}

/// A tcptrace whose output is read and, but for its end, forgotten.
struct Tracer {
    process: Process,
    output: Option<JoinHandle<Totals>>,
    errors: Arc<Mutex<String>>,
}

/// What an output came to.
#[derive(Debug, Default)]
struct Totals {
    /// Lines on transitions.
    transitions: u64,
    /// Records read, if it says so.
    read: Option<u64>,
    /// Records lost, as the end says.
    lost: u64,
    /// Records lost, as all lines say that tell of losses.
    lost_lines: u64,
    /// Of these, probes that the kernel did not run because they had interrupted themselves. It has a count of its own of
    /// each program; and whether such a run would have written a record, nobody knows.
    missed: u64,
    /// The last lines.
    tail: String,
}

impl Totals {
    /// Records that were made: read, or without room.
    fn made(&self) -> Option<u64> {
        Some(self.read? + self.lost - self.missed)
    }

    /// The last line of this kind.
    fn line(&self, event: &str) -> Value {
        let lines = self.tail.lines().rev();
        lines
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|line| line["event"] == event)
            .unwrap_or_else(|| panic!("no {event} in {}", self.tail))
    }
}

fn command(netns: &Netns, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(arguments)
        .args(["--netns", &netns.inode().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

impl Tracer {
    fn start(netns: &Netns, arguments: &[&str]) -> Self {
        Self::watch(command(netns, arguments))
    }

    fn watch(mut command: Command) -> Self {
        let mut child = command.spawn().expect("tcptrace can be run");
        let stdout = child.stdout.take().expect("piped");
        let stderr = child.stderr.take().expect("piped");
        let errors = Arc::new(Mutex::new(String::new()));
        let said = Arc::clone(&errors);
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut said = said.lock().expect("no panic");
                said.push_str(&line);
                said.push('\n');
            }
        });
        let tracer = Self {
            process: Process(child),
            output: Some(thread::spawn(move || read(stdout))),
            errors,
        };
        wait_until("tcptrace traces", SOON, || {
            tracer
                .said()
                .lines()
                .any(|line| line == READY)
                .then_some(())
        });
        tracer
    }

    fn said(&self) -> String {
        self.errors.lock().expect("no panic").clone()
    }

    /// Resident memory, bytes.
    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kilobytes.expect("proc(5)") << 10
    }

    /// How often the kernel has not run a probe of this process.
    fn missed(&self) -> u64 {
        let folder = format!("/proc/{}/fdinfo", self.process.pid());
        let files = fs::read_dir(folder).expect("it runs").flatten();
        let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        let count = |text: String| -> Option<u64> {
            let mut lines = text.lines();
            let line = lines.find_map(|line| line.strip_prefix("recursion_misses:"));
            line?.trim().parse().ok()
        };
        texts.filter_map(count).sum()
    }

    /// Ends it with SIGINT.
    fn finish(mut self) -> Totals {
        let missed = self.missed();
        self.process.signal(Signal::SIGINT);
        let status = self.process.wait("tcptrace ends", SOON);
        let output = self.output.take().expect("only here");
        let mut totals = output.join().expect("no panic");
        totals.missed = missed;
        let said = self.said();
        assert!(status.success(), "{status}: {said}");
        let end = totals.tail.lines().last().unwrap_or_default();
        if let Ok(end) = serde_json::from_str::<Value>(end)
            && end["event"] == "end"
        {
            totals.read = end["records"].as_u64();
            totals.lost = end["lost"].as_u64().expect("a number");
        } else {
            totals.lost = lost_of(&said);
        }
        totals
    }
}

/// The number in `600 transitions shown, 12 events lost`.
fn lost_of(said: &str) -> u64 {
    let line = said
        .lines()
        .rfind(|line| line.contains(" transitions shown"));
    let (before, _) = line
        .and_then(|line| line.split_once(" events lost"))
        .unwrap_or_default();
    let number = before.split_whitespace().last();
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Reads an output to its end.
fn read(output: impl std::io::Read) -> Totals {
    let mut output = BufReader::with_capacity(1 << 20, output);
    let mut totals = Totals::default();
    let mut tail = Vec::new();
    let mut line = Vec::new();
    while output
        .read_until(b'\n', &mut line)
        .is_ok_and(|length| length > 0)
    {
        let begin = &line[..line.len().min(40)];
        let has = |word: &[u8]| begin.windows(word.len()).any(|part| part == word);
        if has(b"\"event\":\"lost\"") {
            let lost = serde_json::from_slice::<Value>(&line).unwrap_or_default();
            // A recording counts probes that did not run by themselves.
            let count = |key: &str| lost[key].as_u64().unwrap_or(0);
            totals.lost_lines += count("records") + count("missed");
        } else if has(b"\"event\":\"transition\"") || line.windows(4).any(|part| part == b" -> ") {
            totals.transitions += 1;
        }
        tail.append(&mut line);
        if tail.len() > 2 * TAIL {
            tail.drain(..TAIL);
        }
    }
    totals.tail = String::from_utf8_lossy(&tail).into_owned();
    totals
}

/// The generator of connections: beside this program, or where Cargo builds the programs of the tests.
fn churn() -> PathBuf {
    let own = env::current_exe().expect("Linux tells");
    let beside = own.with_file_name("churn");
    if beside.exists() {
        beside
    } else {
        built("churn")
    }
}

fn churn_in(netns: &Netns, words: &[String]) -> Process {
    let mut command = Command::new(churn());
    command
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let netns = netns.as_fd().as_raw_fd();
    let enter = move || {
        // SAFETY: the namespace outlives the start of the child.
        let netns = unsafe { BorrowedFd::borrow_raw(netns) };
        Ok(setns(netns, CloneFlags::CLONE_NEWNET)?)
    };
    // SAFETY: between fork and exec there is one system call.
    unsafe { command.pre_exec(enter) };
    let child: Child = command
        .spawn()
        .expect("churn is built: `cargo build --package tests --bins`");
    Process(child)
}

/// Connections for so long.
fn load(
    netns: &Netns,
    length: Duration,
    port: u16,
    close: &str,
    threads: u32,
    rate: Option<u32>,
) -> Process {
    let mut words = vec![
        "run".to_owned(),
        "ip=4".to_owned(),
        format!("threads={threads}"),
        format!("close={close}"),
        format!("seconds={}", length.as_secs_f64()),
        format!("port={port}"),
    ];
    words.extend(rate.map(|rate| format!("rate={rate}")));
    churn_in(netns, &words)
}

/// How many connections a load has made, once it has ended.
fn made(mut load: Process) -> u64 {
    let status = load.wait("the load ends", SOON);
    assert!(status.success(), "churn failed: {status}");
    let mut said = String::new();
    let mut stdout = load.0.stdout.take().expect("piped");
    stdout.read_to_string(&mut said).expect("a pipe");
    let said: Value = serde_json::from_str(&said).expect("JSON");
    said["connections"].as_u64().expect("a number")
}

/// A process that holds so many sockets in CLOSE_WAIT, until its standard input ends.
fn hold(netns: &Netns, pairs: usize) -> Process {
    let words = ["hold", "processes=1", &format!("pairs={pairs}")].map(str::to_owned);
    let mut holder = churn_in(netns, &words);
    let stdout = holder.0.stdout.take().expect("piped");
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).expect("a pipe");
    assert!(line.contains("sockets"), "{line:?}");
    holder
}
