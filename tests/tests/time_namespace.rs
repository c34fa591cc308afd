//! In a time namespace, whose clocks are not the host's: ages and times are as outside.

use std::{fs, io, ops::Range, os::unix::fs::MetadataExt as _, thread, time::Duration};

use jiff::Timestamp;
use nix::sched::{CloneFlags, setns, unshare};
use tests::{Fixture, Lab, Lines, Peers, Run, Tcptrace, boottime, realtime_of_boottime};

const SOON: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(90);
/// Between two clocks, another process may run.
const SLACK: i64 = 50_000_000;
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
/// A day and some hours, and no whole number of clock ticks.
const OFFSETS: &str = "boottime 98765 123456789\nmonotonic 4321 987654321\n";

/// Moves this process into a time namespace, before it becomes tcptrace.
fn enter() -> io::Result<()> {
    unshare(CLONE_NEWTIME)?;
    fs::write("/proc/self/timens_offsets", OFFSETS)?;
    // Not only its children; before 6.3, not with execve() either.
    Ok(setns(
        fs::File::open("/proc/self/ns/time_for_children")?,
        CLONE_NEWTIME,
    )?)
}

/// Gives nothing where the kernel has no time namespaces.
fn lab() -> Option<Lab> {
    if fs::metadata("/proc/self/ns/time").is_err() {
        eprintln!("left out: this kernel has no time namespaces");
        return None;
    }
    Lab::new()
}

/// Traces the lab from a time namespace.
fn start(lab: &Lab, arguments: &[&str]) -> Tcptrace {
    let netns = lab.netns.inode().to_string();
    Tcptrace::start_prepared(&[arguments, &["--netns", &netns]].concat(), enter)
}

fn run(lab: &Lab, arguments: &[&str]) -> Run {
    let netns = lab.netns.inode().to_string();
    let more = ["--netns", &netns, "-o", "json"];
    Tcptrace::run_prepared(&[arguments, &more].concat(), enter)
}

/// In the first report that shows it, the socket is as old as that, and its process has started when it did.
fn assert_age(lines: &Lines, server: &Fixture, cookie: &str, range: Range<f64>) {
    let reports = lines.reports();
    let leak = reports
        .iter()
        .flat_map(|report| &report.leaks)
        .find(|leak| leak.samples().iter().any(|one| one["socket"] == cookie))
        .unwrap_or_else(|| panic!("{cookie} is not reported:\n{lines}"));
    let samples = leak.samples();
    let sample = samples.iter().find(|one| one["socket"] == cookie);
    let age = sample.and_then(|sample| sample["age_seconds"].as_f64());
    assert!(
        age.is_some_and(|age| range.contains(&age)),
        "{age:?} s, not in {range:?}: {}",
        leak.0
    );
    let holder = leak.0.value["holders"][0].clone();
    let started: Timestamp = holder["started"]
        .as_str()
        .and_then(|time| time.parse().ok())
        .expect("a time");
    let started = started.as_nanosecond() as i64;
    let directory = fs::metadata(format!("/proc/{}", server.pid)).expect("it lives");
    // When /proc made the directory, at the first access; not earlier than the process.
    let made = directory.mtime() * 1_000_000_000 + directory.mtime_nsec();
    assert!((made - started).abs() < 20_000_000_000, "{}", leak.0);
}

#[test]
fn a_leak_is_as_old_as_it_is() {
    let Some(lab) = lab() else { return };
    let mut peers = Peers::new(&lab);
    let before = peers.left_by_client();
    thread::sleep(Duration::from_millis(2500));
    let once = run(&lab, &["leaks", "--once", "--older-than", "1s"]);
    assert_eq!(once.code, Some(0), "{}", once.stderr);
    assert_age(&once.lines, &peers.server, &before.server, 2.5..20.0);

    let leaks = start(&lab, &["leaks", "--older-than", "1s", "--interval", "1s"]);
    let since = boottime();
    let fresh = peers.left_by_client();
    leaks.wait_for("the leak", SOON, |line| {
        line.value["event"] == "leak" && line.value.to_string().contains(&fresh.server)
    });
    let age = (boottime() - since) as f64 / 1e9;
    let lines = leaks.finish_whole();
    assert_age(&lines, &peers.server, &fresh.server, 1.0..age);
}

#[test]
fn what_is_known_from_a_scan_and_from_a_record_is_one_process() {
    let Some(lab) = lab() else { return };
    let mut peers = Peers::new(&lab);
    // Held already: the owner comes from /proc, with its start as /proc shows it.
    let held = peers.connect();
    let stream = start(&lab, &["stream"]);
    peers.client.close(&held.name);
    peers.server.close(&held.name);
    let lines = stream.wait_state(&held.client, "CLOSE", LONG);
    // The close confirms the holder, and does not make another owner of it.
    lines
        .entry(&held.client, "FIN_WAIT1")
        .assert_owner(&peers.client, "holder");
}

#[test]
fn transitions_and_time_wait_have_their_true_times() {
    let Some(lab) = lab() else { return };
    let stream = start(&lab, &["stream"]);
    let timewait = start(&lab, &["timewait"]);
    let mut peers = Peers::new(&lab);
    let began = boottime();
    let connection = peers.connect();
    thread::sleep(Duration::from_millis(700));
    let closing = boottime();
    peers.client.close(&connection.name);
    peers.server.close(&connection.name);
    let closed = boottime();
    timewait.wait_for("the end", LONG, |line| {
        line.value["event"] == "time_wait" && line.value["socket"] == *connection.client
    });
    let (timewait, lines) = (timewait.finish_whole(), stream.finish_whole());

    let leaving = lines.entry(&connection.client, "FIN_WAIT1");
    let time = leaving.time("time");
    let range = realtime_of_boottime(closing) - SLACK..realtime_of_boottime(closed) + SLACK;
    assert!(range.contains(&time), "{leaving}");
    let established = leaving.seconds("after_seconds");
    let most = (closed - began) as f64 / 1e9;
    assert!((0.7..most).contains(&established), "{leaving}");

    let ended = timewait.time_wait(&connection.client);
    let entered = ended.time("entered");
    assert!(range.contains(&entered), "{ended}");
    let dwell = ended.seconds("dwell_seconds");
    assert!((60.0..66.0).contains(&dwell), "{ended}");
}

#[test]
fn states_have_the_time_of_day() {
    let Some(lab) = lab() else { return };
    let before = realtime_of_boottime(boottime());
    let _inside = lab.fixture("inside");
    let states = run(&lab, &["states"]);
    let after = realtime_of_boottime(boottime());
    assert_eq!(states.code, Some(0), "{}", states.stderr);
    let line = states.lines.0.first().expect("a line");
    assert!(
        (before - SLACK..after + SLACK).contains(&line.time("time")),
        "{line}"
    );
}
