//! A program that `tcptrace leaks` runs: how it starts and ends, and which signals it gets.

use std::{
    fs::{self, File},
    io::Write as _,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::Path,
    process::Command,
    time::Duration,
};

use nix::{
    errno::Errno,
    pty::openpty,
    sys::signal::{SigHandler, Signal, kill, signal},
    unistd::{Pid, setsid},
};
use serde_json::Value;
use tests::{Lab, Run, Tcptrace, built, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// tcptrace that runs these words. The report is another test's concern.
fn tcptrace(lab: &Lab, words: &[&str]) -> Command {
    let mut command = lab.leaks_of(&["--report", "/dev/null"]);
    command.args(words);
    command
}

fn start(lab: &Lab, words: &[&str]) -> Tcptrace {
    Tcptrace::watching(&mut tcptrace(lab, words))
}

fn run(lab: &Lab, words: &[&str]) -> Run {
    start(lab, words).ended()
}

fn text(run: &Run) -> Vec<&str> {
    let lines = run.lines.0.iter();
    lines.filter_map(|line| line.value.as_str()).collect()
}

/// The one number that the program prints.
fn number(leaks: &Tcptrace) -> i32 {
    let lines = leaks.wait_for("a number", SOON, |line| line.value.is_number());
    let number = lines.0.iter().find_map(|line| line.value.as_i64());
    i32::try_from(number.expect("it was waited for")).expect("a pid")
}

fn state(pid: i32) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))?;
    Some(line.trim()[..1].to_owned())
}

fn wait_state(pid: i32, wanted: &[&str]) {
    let what = format!("process {pid} is in state {wanted:?}");
    wait_until(&what, SOON, || {
        wanted.contains(&state(pid)?.as_str()).then_some(())
    });
}

#[test]
fn ends_as_the_program_ends() {
    let Some(lab) = Lab::new() else { return };
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        // One of the real-time signals, which have no names.
        ("kill -40 $$", 168),
    ] {
        assert_eq!(
            run(&lab, &["sh", "-c", script]).code,
            Some(code),
            "{script}"
        );
    }
}

#[test]
fn what_cannot_be_run_is_said_with_the_code_of_a_shell() {
    let Some(lab) = Lab::new() else { return };
    let folder =
        std::env::temp_dir().join(format!("tcptrace-tests-{}-command", std::process::id()));
    fs::create_dir(&folder).expect("a new folder");
    let plain = folder.join("plain");
    fs::write(&plain, "#!/bin/sh\n").expect("a file");
    let plain = plain.to_str().expect("a plain path");
    for (name, code, said) in [
        ("no-such-program", 127, "PATH"),
        ("/no/such/program", 127, "PATH"),
        ("no\u{1b}such", 127, "cannot run no\\u{1b}such: "),
        (plain, 126, "chmod +x"),
        ("/", 126, "chmod +x"),
        ("/etc/passwd/x", 126, "without tcptrace"),
    ] {
        let run = run(&lab, &[name, "argument"]);
        assert_eq!(run.code, Some(code), "{name:?}: {}", run.stderr);
        assert!(
            run.stderr.starts_with("tcptrace: cannot run "),
            "{}",
            run.stderr
        );
        assert!(run.stderr.contains(said), "{name:?}: {}", run.stderr);
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    }
    fs::remove_dir_all(folder).expect("ours");
}

#[test]
fn the_programs_streams_are_those_of_tcptrace() {
    let Some(lab) = Lab::new() else { return };
    let file = std::env::temp_dir().join(format!("tcptrace-tests-{}-stdin", std::process::id()));
    fs::write(&file, "from stdin\n").expect("a file");
    let mut command = tcptrace(&lab, &["sh", "-c", "cat; echo to stderr >&2"]);
    command.stdin(File::open(&file).expect("just written"));
    let run = Tcptrace::watching(&mut command).ended();
    fs::remove_file(file).expect("ours");
    assert_eq!(text(&run), ["from stdin"]);
    assert_eq!(run.stderr, "to stderr\n");
}

/// What a process that `command` makes starts with, as bits of signals: those blocked, those ignored. `ignored`: of
/// SIGHUP and SIGCHLD, those that `command` is to ignore.
fn starts_with(mut command: Command, ignored: &'static [Signal]) -> (u64, u64) {
    let ignore = move || {
        // The test itself may be run by nohup.
        for one in [Signal::SIGHUP, Signal::SIGCHLD] {
            let handler = if ignored.contains(&one) {
                SigHandler::SigIgn
            } else {
                SigHandler::SigDfl
            };
            // SAFETY: no handler function is installed.
            unsafe { signal(one, handler) }?;
        }
        Ok(())
    };
    command.args(["grep", "^Sig", "/proc/self/status"]);
    // SAFETY: between fork and exec there are only system calls.
    unsafe { command.pre_exec(ignore) };
    let run = Tcptrace::watching(&mut command).ended();
    assert_eq!(run.code, Some(0), "also where SIGCHLD is ignored");
    let bits = |name: &str| {
        let mut lines = text(&run).into_iter();
        let bits = lines.find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(bits.expect("in status").trim(), 16).expect("hexadecimal")
    };
    (bits("SigBlk:"), bits("SigIgn:"))
}

#[test]
fn the_program_starts_with_the_signals_of_whoever_started_tcptrace() {
    let Some(lab) = Lab::new() else { return };
    // Rust ignores SIGPIPE for itself; the test may have inherited others.
    let plain = starts_with(Command::new("env"), &[]);
    assert_eq!(plain.1 & (1 << (Signal::SIGPIPE as i32 - 1)), 0);
    assert_eq!(starts_with(tcptrace(&lab, &[]), &[]), plain);
    let nohup = starts_with(Command::new("env"), &[Signal::SIGHUP]);
    assert_ne!(nohup, plain);
    let ignored = &[Signal::SIGHUP, Signal::SIGCHLD];
    assert_eq!(starts_with(tcptrace(&lab, &[]), ignored), nohup);
}

#[test]
fn signals_to_tcptrace_reach_the_program_and_end_only_the_program() {
    let Some(lab) = Lab::new() else { return };
    let signals = built("signals");
    let leaks = start(&lab, &[signals.to_str().expect("a plain path")]);
    let by = leaks.pid();
    leaks.wait_for("ready", SOON, |line| line.value == "ready");
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGCONT,
        Signal::SIGINT,
        Signal::SIGUSR2,
    ] {
        leaks.signal(signal);
        let wanted = format!("{signal} {by}");
        leaks.wait_for(&wanted, SOON, |line| line.value == wanted.as_str());
    }
    let run = leaks.ended();
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    assert_eq!(run.lines.0.len(), 9, "each once: {}", run.lines);
}

#[test]
fn a_signal_that_ends_the_program_is_in_the_exit_code() {
    let Some(lab) = Lab::new() else { return };
    let leaks = start(&lab, &["sh", "-c", "echo $$; exec sleep 100"]);
    number(&leaks);
    leaks.signal(Signal::SIGTERM);
    assert_eq!(leaks.ended().code, Some(143));
}

#[test]
fn the_terminals_keys_reach_the_program_once() {
    let Some(lab) = Lab::new() else { return };
    let pty = openpty(None, None).expect("a terminal");
    let terminal = pty.slave.as_raw_fd();
    let signals = built("signals");
    let mut command = tcptrace(&lab, &[signals.to_str().expect("a plain path")]);
    let control = move || {
        setsid()?;
        // SAFETY: takes numbers only.
        Errno::result(unsafe { libc::ioctl(terminal, libc::TIOCSCTTY, 0) })?;
        Ok(())
    };
    // SAFETY: between fork and exec there are only two system calls.
    unsafe { command.pre_exec(control) };
    command.stdin(pty.slave.try_clone().expect("a second handle"));
    let leaks = Tcptrace::watching(&mut command);
    leaks.wait_for("ready", SOON, |line| line.value == "ready");
    let mut keys = File::from(pty.master);
    let count = |lines: &tests::Lines, wanted: &str| {
        lines.0.iter().filter(|line| line.value == wanted).count()
    };
    for (key, name) in [(b"\x03", "SIGINT"), (b"\x1c", "SIGQUIT")] {
        // Signals of a kind that wait together become one: many times, that one of them may show.
        for times in 1..=20 {
            keys.write_all(key).expect("typed");
            let wanted = format!("{name} kernel");
            wait_until(&wanted, SOON, || {
                (count(&leaks.lines(), &wanted) == times).then_some(())
            });
        }
    }
    // What somebody else sends is passed on all the same.
    leaks.signal(Signal::SIGINT);
    let passed = format!("SIGINT {}", leaks.pid());
    leaks.wait_for(&passed, SOON, |line| line.value == passed.as_str());
    leaks.signal(Signal::SIGUSR2);
    let run = leaks.ended();
    assert_eq!(run.code, Some(3), "{}", run.lines);
    assert_eq!(run.lines.0.len(), 1 + 20 + 20 + 1 + 1, "{}", run.lines);
    // Read to here, so that the terminal was there all the time.
    drop((keys, pty.slave));
}

#[test]
fn both_stop_and_both_go_on() {
    let Some(lab) = Lab::new() else { return };
    let mut command = tcptrace(&lab, &["sh", "-c", "echo $$; exec sleep 100"]);
    // A job, as a shell makes it: processes without one are not stopped by SIGTSTP.
    command.process_group(0);
    let leaks = Tcptrace::watching(&mut command);
    let program = number(&leaks);
    let own = leaks.pid().cast_signed();
    for _ in 0..3 {
        leaks.signal(Signal::SIGTSTP);
        for pid in [program, own] {
            wait_state(pid, &["T"]);
        }
        leaks.signal(Signal::SIGCONT);
        for pid in [program, own] {
            wait_state(pid, &["S", "R"]);
        }
    }
    leaks.signal(Signal::SIGTERM);
    assert_eq!(leaks.ended().code, Some(143));
}

#[test]
fn orphans_of_the_program_are_adopted_and_waited_for() {
    let Some(lab) = Lab::new() else { return };
    let script = "sh -c 'sleep 100 >/dev/null 2>&1 & echo $!'; exec sleep 100";
    let leaks = start(&lab, &["sh", "-c", script]);
    let orphan = number(&leaks);
    let parent = || {
        let status = fs::read_to_string(format!("/proc/{orphan}/status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        line.expect("a parent").trim().to_owned()
    };
    wait_until("it is adopted", SOON, || {
        (parent() == leaks.pid().to_string()).then_some(())
    });
    kill(Pid::from_raw(orphan), Signal::SIGKILL).expect("it runs");
    wait_until("no zombie is left", SOON, || {
        (!Path::new(&format!("/proc/{orphan}")).exists()).then_some(())
    });
    leaks.signal(Signal::SIGTERM);
    assert_eq!(leaks.ended().code, Some(143));
}

#[test]
fn what_the_program_leaves_running_is_left_alone() {
    let Some(lab) = Lab::new() else { return };
    let script = "setsid sleep 100 </dev/null >/dev/null 2>&1 & echo $!";
    let run = run(&lab, &["sh", "-c", script]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let left = run
        .lines
        .0
        .iter()
        .find_map(|line| Value::as_i64(&line.value));
    let left = i32::try_from(left.expect("a pid")).expect("a pid");
    let state = state(left).expect("it is there");
    let _ = kill(Pid::from_raw(left), Signal::SIGKILL);
    assert!(["R", "S"].contains(&state.as_str()), "it runs: {state}");
}

#[test]
fn a_program_that_ends_at_once_is_not_missed() {
    let Some(lab) = Lab::new() else { return };
    for _ in 0..10 {
        assert_eq!(run(&lab, &["true"]).code, Some(0));
    }
}
