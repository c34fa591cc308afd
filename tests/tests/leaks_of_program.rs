//! What a program leaks while `tcptrace leaks -- CMD` runs it, and how that is told.

use std::{
    env, fs,
    path::PathBuf,
    process, thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::{Fixture, Lab, Leaver, Lines, Report, Run, Tcptrace, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// Longer than that, and so leaked.
const OLD: Duration = Duration::from_millis(200);
const OPTIONS: &[&str] = &["--older-than", "200ms", "--interval", "100ms"];
/// Old enough, and looked at since.
const AGE: Duration = Duration::from_secs(3);

fn program(lab: &Lab, more: &[&str]) -> (Tcptrace, Fixture) {
    lab.fixture_of_leaks(&[OPTIONS, more].concat(), "program")
}

/// Has the program exit, and waits for its end. Nobody else may hold the output open. A record may be lost: a probe
/// interrupts itself now and then, the other tests' connections included.
fn exit(leaks: Tcptrace, mut program: Fixture, code: i32) -> Run {
    program.begin(&format!("exit {code}"));
    let run = leaks.ended();
    assert_eq!(run.stderr, "");
    run
}

/// The report tells of one socket, which the end of this process has closed.
fn assert_at_exit<'a>(report: &Report<'a>, cookie: &str, pid: u32, comm: &str) -> &'a Value {
    assert_eq!(report.number("sockets"), 1, "{report}");
    let leak = report.only();
    assert_eq!(leak.0.value["pid"], pid, "{leak}");
    assert_eq!(leak.0.value["comm"], comm, "{leak}");
    assert_eq!(leak.0.value["state"], "CLOSE_WAIT", "{leak}");
    let sample = leak.sample(cookie);
    assert_eq!(sample["at_exit"], true, "{leak}");
    sample
}

#[test]
fn left_open_until_exit() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &[]);
    let mut leaver = Leaver::new(&lab);
    let observer = lab.observe();
    let cookie = leaver.leave(&mut program, "left");
    // A second one, with everything read.
    let drained = leaver.leave(&mut program, "drained");
    program.ask("read drained");
    // Open at the end, but not left by anybody.
    program.connect("open", leaver.address);
    leaver.fixture.accept("listener", "open");
    thread::sleep(AGE);
    let pid = program.pid;
    let fds: Vec<String> = [&cookie, &drained]
        .map(|cookie| {
            let row = lab.diag().row(cookie).expect("it is open");
            format!("socket:[{}]", row.inode)
        })
        .to_vec();
    let links: Vec<(u64, String)> = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("it runs")
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let link = fs::read_link(entry.path()).ok()?.to_str()?.to_owned();
            Some((entry.file_name().to_str()?.parse().ok()?, link))
        })
        .collect();
    let seen = observer.state(&cookie, "CLOSE_WAIT").expect("seen");
    let before = tests::boottime();
    let run = exit(leaks, program, 0);
    let after = tests::boottime();
    assert_eq!(run.code, Some(0));
    let report = run.lines.report();
    assert_eq!(run.lines.reports().len(), 1, "{}", run.lines);
    let leak = report.only();
    leak.assert_causes(&[("eof_unread", 1), ("drained", 1)]);
    for (index, (cookie, cause)) in [(&cookie, "eof_unread"), (&drained, "drained")]
        .into_iter()
        .enumerate()
    {
        let sample = leak.sample(cookie);
        assert_eq!(leak.0.value["pid"], pid, "{leak}");
        assert_eq!(leak.0.value["comm"], "program", "{leak}");
        assert_eq!(sample["cause"], cause, "{leak}");
        assert_eq!(sample["at_exit"], true, "{leak}");
        let fd = links.iter().find(|(_, link)| *link == fds[index]);
        let fd = fd.expect("it was open").0;
        assert_eq!(sample["fds"], json!([{"pid": pid, "fd": fd}]), "{leak}");
        assert_eq!(sample["age_at_least"], false, "{leak}");
    }
    // How long it was in the state when the process ended.
    let age = leak.sample(&cookie)["age_seconds"].as_f64();
    let age = (age.expect("a number") * 1e9) as i64;
    assert!(
        (before - seen.first..=after - seen.before).contains(&age),
        "{age}: {leak}"
    );
    assert_eq!(report.number("younger"), 0, "{report}");
}

#[test]
fn left_open_until_killed() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &[]);
    let pid = program.pid;
    let mut leaver = Leaver::new(&lab);
    let cookie = leaver.leave(&mut program, "left");
    thread::sleep(AGE);
    program.kill();
    let run = leaks.ended();
    assert_eq!(run.code, Some(137));
    assert_at_exit(&run.lines.report(), &cookie, pid, "program");
}

#[test]
fn left_open_by_descendants_that_end_before_the_program() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &[]);
    let mut leaver = Leaver::new(&lab);
    let mut outside = lab.fixture("outside");
    let mut child = program.fork("child");
    let mut grandchild = child.fork("grandchild");
    let mut dying = program.fork("dying");
    let mut orphan = dying.fork("orphan");
    dying.exit(0);
    leaver.leave(&mut outside, "left");
    let all = [&mut child, &mut grandchild, &mut orphan].map(|one| {
        let cookie = leaver.leave(one, "left");
        (cookie, one.pid, one.comm.clone())
    });
    thread::sleep(AGE);
    grandchild.exit(0);
    child.kill();
    orphan.exit(1);
    outside.exit(0);
    let run = exit(leaks, program, 3);
    assert_eq!(run.code, Some(3));
    let report = run.lines.report();
    assert_eq!(report.number("sockets"), 3, "{report}");
    assert_eq!(report.number("leaks"), 3, "{report}");
    for (cookie, pid, comm) in &all {
        let leak = report.leak_with(cookie);
        assert_eq!(leak.0.value["pid"], *pid, "{leak}");
        assert_eq!(leak.0.value["comm"], *comm, "{leak}");
        leak.assert_causes(&[("eof_unread", 1)]);
        let sample = leak.sample(cookie);
        assert_eq!(sample["at_exit"], true, "{leak}");
        assert_eq!(sample["fds"][0]["pid"], *pid, "{leak}");
    }
}

#[test]
fn closed_in_the_end_is_no_leak() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let mut leaver = Leaver::new(&lab);
    leaver.leave(&mut program, "left");
    thread::sleep(AGE);
    program.close("left");
    let run = exit(leaks, program, 7);
    assert_eq!(run.code, Some(7));
    run.lines.report().assert_none();
}

#[test]
fn younger_at_exit_is_no_leak() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = lab.fixture_of_leaks(&["--older-than", "1m"], "program");
    Leaver::new(&lab).leave(&mut program, "left");
    let run = exit(leaks, program, 0);
    run.lines.report().assert_none();
}

/// The peer only shut its sending side, and gets an answer for longer than the threshold.
#[test]
fn half_closed_and_answering_is_no_leak() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let mut leaver = Leaver::new(&lab);
    leaver.shut(&mut program, "answering");
    let start = Instant::now();
    while start.elapsed() < AGE {
        program.ask("write answering 10");
        leaver.fixture.ask("read answering");
        thread::sleep(Duration::from_millis(20));
    }
    let run = exit(leaks, program, 7);
    assert_eq!(run.code, Some(7), "{}", run.lines);
    run.lines.report().assert_none();
}

/// It had stopped to answer long before.
#[test]
fn half_closed_and_silent_is_one() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let pid = program.pid;
    let mut leaver = Leaver::new(&lab);
    let cookie = leaver.shut(&mut program, "silent");
    program.ask("write silent 10");
    leaver.fixture.ask("read silent");
    thread::sleep(AGE);
    let run = exit(leaks, program, 7);
    assert_eq!(run.code, Some(1), "{}", run.lines);
    let report = run.lines.report();
    let sample = assert_at_exit(&report, &cookie, pid, "program");
    assert_eq!(sample["cause"], "eof_unread", "{report}");
}

#[test]
fn never_accepted_until_exit() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let pid = program.pid;
    let address = program.listen("listener", "127.0.0.1:0");
    let mut outside = lab.fixture("outside");
    let pair = outside.connect("waiting", address);
    outside.close("waiting");
    let row = wait_until("CLOSE_WAIT", SOON, || {
        let rows = lab.diag().rows();
        let mut rows = rows.into_iter();
        rows.find(|row| row.local == pair.remote && row.state == "CLOSE_WAIT")
    });
    thread::sleep(AGE);
    let run = exit(leaks, program, 0);
    assert_eq!(run.code, Some(1), "{}", run.lines);
    let report = run.lines.report();
    let sample = assert_at_exit(&report, &row.cookie, pid, "program");
    assert_eq!(sample["cause"], "not_accepted", "{report}");
    assert_eq!(sample["fds"], json!([]), "{report}");
    assert_eq!(report.only().0.value["via"], "listener", "{report}");
}

/// A socket that goes on into the next program of the same process.
#[test]
fn kept_through_exec() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &[]);
    let pid = program.pid;
    let cookie = Leaver::new(&lab).leave(&mut program, "left");
    program.exec("successor", &["left"]);
    thread::sleep(AGE);
    let run = exit(leaks, program, 0);
    let report = run.lines.report();
    let sample = assert_at_exit(&report, &cookie, pid, "successor");
    assert_eq!(sample["cause"], "eof_unread", "{report}");
    assert_eq!(sample["fds"][0]["pid"], pid, "{report}");
}

/// The kernel closes it when the process becomes another program, as it was told to (`FD_CLOEXEC`).
#[test]
fn closed_by_exec_counts_as_closed() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let cookie = Leaver::new(&lab).leave(&mut program, "left");
    thread::sleep(AGE);
    program.exec("successor", &[]);
    wait_until("it is closed", SOON, || {
        lab.diag().row(&cookie).is_none().then_some(())
    });
    let run = exit(leaks, program, 7);
    assert_eq!(run.code, Some(7), "{}", run.lines);
    run.lines.report().assert_none();
}

/// What a daemon holds when the program has ended is told as held, once.
#[test]
fn held_by_a_daemon_that_stays() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let mut leaver = Leaver::new(&lab);
    let shared = leaver.leave(&mut program, "shared");
    let mut daemon = program.fork("daemon");
    let own = leaver.leave(&mut daemon, "own");
    thread::sleep(AGE);
    program.begin("exit 0");
    let lines = leaks.wait_for("the end", SOON, |line| line.value["event"] == "end");
    let report = lines.report();
    assert_eq!(report.number("sockets"), 2, "{report}");
    let leak = report.only();
    leak.assert_holders(&[&daemon]);
    for cookie in [&shared, &own] {
        let sample = leak.sample(cookie);
        assert_eq!(sample.get("at_exit"), None, "{leak}");
        let row = lab.diag().row(cookie).expect("it is still there");
        let fd = sample["fds"][0]["fd"].as_u64().expect("a number");
        let link = fs::read_link(format!("/proc/{}/fd/{fd}", daemon.pid)).expect("it is open");
        let inode = format!("socket:[{}]", row.inode);
        assert_eq!(link.to_str(), Some(&*inode), "{leak}");
    }
    // It holds the output open.
    drop(daemon);
    assert_eq!(leaks.ended().code, Some(1));
}

#[test]
fn exit_codes() {
    let Some(lab) = Lab::new() else { return };
    let mut leaver = Leaver::new(&lab);
    // Whether it leaks, whether that is asked for, how it ends, and then tcptrace.
    for (leaky, asked, code, expected) in [
        (false, false, 7, 7),
        (false, true, 0, 0),
        (false, true, 7, 7),
        (false, true, -9, 137),
        (true, false, 0, 0),
        (true, false, 7, 7),
        (true, false, -9, 137),
        (true, true, 0, 1),
        (true, true, 7, 1),
        (true, true, -9, 1),
    ] {
        // Without looks: then nothing depends on when they come.
        let options = ["--older-than", "200ms", "--interval", "1h", "--exit-code"];
        let options = &options[..if asked { 5 } else { 4 }];
        let (leaks, mut program) = lab.fixture_of_leaks(options, "program");
        if leaky {
            leaver.leave(&mut program, "left");
            thread::sleep(OLD);
        }
        if code < 0 {
            program.kill();
        } else {
            program.begin(&format!("exit {code}"));
        }
        let run = leaks.ended();
        let case = format!("{leaky} {asked} {code}: {}", run.lines);
        assert_eq!(run.code, Some(expected), "{case}");
        let leaks = run.lines.report().number("leaks");
        assert_eq!(leaks, u64::from(leaky), "{case}");
    }
}

/// Too short to be looked at: its transitions tell.
#[test]
fn shorter_than_the_interval() {
    let Some(lab) = Lab::new() else { return };
    let options = ["--older-than", "200ms", "--interval", "1h"];
    let (leaks, mut program) = lab.fixture_of_leaks(&options, "program");
    let pid = program.pid;
    let cookie = Leaver::new(&lab).leave(&mut program, "left");
    thread::sleep(OLD);
    let run = exit(leaks, program, 0);
    let report = run.lines.report();
    let sample = assert_at_exit(&report, &cookie, pid, "program");
    // Why, only a look would show, and by which descriptor.
    assert_eq!(sample["cause"], "unknown", "{report}");
    assert_eq!(sample["fds"], json!([]), "{report}");
}

/// The last look came when something had been sent lately (`connect()` counts), the end when nothing had.
#[test]
fn idle_since_the_last_look() {
    let Some(lab) = Lab::new() else { return };
    let options = ["--older-than", "3s", "--interval", "2.5s"];
    let (leaks, mut program) = lab.fixture_of_leaks(&options, "program");
    let pid = program.pid;
    let cookie = Leaver::new(&lab).leave(&mut program, "left");
    thread::sleep(Duration::from_millis(3100));
    let run = exit(leaks, program, 0);
    assert_at_exit(&run.lines.report(), &cookie, pid, "program");
}

#[test]
fn many_children_that_live_for_a_moment() {
    let Some(lab) = Lab::new() else { return };
    let options = ["--older-than", "0s"];
    let (leaks, mut program) = lab.fixture_of_leaks(&options, "program");
    let mut outside = lab.fixture("outside");
    for one in [&mut program, &mut outside] {
        one.listen("listener", "127.0.0.1:0");
        one.begin("litter listener 300");
    }
    let answers = [&mut program, &mut outside].map(Fixture::answer);
    let [mut pids, foreign] = answers.map(|answer| {
        let pids = answer["pids"].as_array().expect("a list").iter();
        pids.map(|pid| pid.as_u64().expect("a pid"))
            .collect::<Vec<_>>()
    });
    assert_eq!((pids.len(), foreign.len()), (300, 300));
    // With so many at once a probe interrupts itself now and then. Then it is told how much was missed, and no more
    // than that may be missing.
    let run = exit(leaks, program, 0);
    let lost = run.lines.end().value["lost"].as_u64().expect("a number");
    let report = run.lines.report();
    let sockets = report.number("sockets");
    assert!(
        (300_u64.saturating_sub(lost)..=300).contains(&sockets),
        "{lost} lost: {report}"
    );
    let mut told: Vec<u64> = report
        .leaks
        .iter()
        .map(|leak| {
            assert_eq!(leak.number("sockets"), 1, "{leak}");
            assert_eq!(leak.samples()[0]["at_exit"], true, "{leak}");
            leak.number("pid")
        })
        .collect();
    told.sort_unstable();
    pids.sort_unstable();
    if lost > 0 {
        pids.retain(|pid| told.binary_search(pid).is_ok());
    }
    assert_eq!(told, pids);
}

/// A file of this test.
fn file(name: &str) -> PathBuf {
    env::temp_dir().join(format!("tcptrace-tests-{}-{name}", process::id()))
}

/// The fixture, run by a shell that says something on both of its streams; `options` are those of tcptrace.
fn talkative(lab: &Lab, options: &[&str]) -> Run {
    let script = "echo to stdout; echo to stderr >&2; exec \"$@\"";
    let mut command = lab.leaks_of(&[OPTIONS, options].concat());
    command.args(["sh", "-c", script, "sh"]);
    let (leaks, mut program) = Fixture::run_by(command, "program");
    Leaver::new(lab).leave(&mut program, "left");
    thread::sleep(AGE);
    program.begin("exit 5");
    leaks.ended()
}

#[test]
fn the_text_is_on_stderr() {
    let Some(lab) = Lab::new() else { return };
    let run = talkative(&lab, &[]);
    assert_eq!(run.code, Some(5));
    let stdout: Vec<_> = run.lines.0.iter().map(|line| &line.value).collect();
    assert_eq!(stdout, ["to stdout"]);
    let said = run.stderr.strip_prefix("to stderr\n");
    let said = said.unwrap_or_else(|| panic!("the program speaks first:\n{}", run.stderr));
    for words in [
        "CLOSE_WAIT for longer than 0.2 s: 1 socket of 1 process\n",
        "program (pid ",
        "closed only by the end of its process",
    ] {
        assert!(said.contains(words), "{words}:\n{said}");
    }
    assert!(!said.contains('\x1b'), "{said}");
}

#[test]
fn the_report_goes_to_a_file() {
    let Some(lab) = Lab::new() else { return };
    let path = file("report");
    let before = "12:34:56 UTC  no CLOSE_WAIT for longer than 60 s\n".repeat(1000);
    fs::write(&path, before).expect("a file");
    let name = path.to_str().expect("a plain path");
    let run = talkative(&lab, &["-o", "json", "--report", name, "--force"]);
    assert_eq!(run.code, Some(5));
    let stdout: Vec<_> = run.lines.0.iter().map(|line| &line.value).collect();
    assert_eq!(stdout, ["to stdout"]);
    assert_eq!(run.stderr, "to stderr\n");
    let text = fs::read_to_string(&path).expect("it is there");
    fs::remove_file(path).expect("ours");
    let lines = Lines::parse(&text);
    let _ = lines.end();
    assert_eq!(lines.report().only().0.value["comm"], "program", "{lines}");
}

#[test]
fn a_report_that_cannot_be_written_is_said_before_the_program_runs() {
    let Some(lab) = Lab::new() else { return };
    let mut command = lab.leaks_of(&["--report", "/no/such/report"]);
    let run = Tcptrace::watching(command.args(["echo", "it runs"])).ended();
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("/no/such/report"), "{}", run.stderr);
    assert_eq!(run.lines.0.len(), 0, "{}", run.lines);
}

#[test]
fn without_privileges_the_program_does_not_run() {
    let run = Tcptrace::run_as_nobody(&["leaks", "--", "echo", "it runs"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert_eq!(run.lines.0.len(), 0, "{}", run.lines);
    assert!(run.stderr.starts_with("tcptrace: "), "{}", run.stderr);
    for words in ["CAP_BPF", "sudo"] {
        assert!(run.stderr.contains(words), "{words}:\n{}", run.stderr);
    }
}

#[test]
fn a_signal_for_the_program_ends_it_and_the_report_comes() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = program(&lab, &["--exit-code"]);
    let pid = program.pid;
    let cookie = Leaver::new(&lab).leave(&mut program, "left");
    thread::sleep(AGE);
    leaks.signal(Signal::SIGTERM);
    let run = leaks.ended();
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert_at_exit(&run.lines.report(), &cookie, pid, "program");
}
