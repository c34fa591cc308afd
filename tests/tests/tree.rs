//! Which processes belong to the program that `tcptrace leaks` runs, and what a record says of those that
//! end.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;
use tests::{Lab, Leak, Leaver, Lines, Tcptrace};

const SOON: Duration = Duration::from_secs(20);
/// Longer than that, and so leaked.
const OPTIONS: &[&str] = &["--older-than", "100ms", "--interval", "100ms"];
/// Old enough, and looked at since: a busy machine looks less often.
const AGE: Duration = Duration::from_secs(3);

/// The first transition of this socket to `new`.
fn transition(events: &Tcptrace, cookie: &str, new: &str) -> Value {
    let wanted = |value: &Value| {
        value["event"] == "transition" && value["cookie"] == cookie && value["new"] == new
    };
    let what = format!("{cookie} > {new}");
    let lines: Lines = events.wait_for(&what, SOON, |line| wanted(&line.value));
    let found = lines.0.into_iter().find(|line| wanted(&line.value));
    found.expect("it was waited for").value
}

fn parent(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.expect("it has a parent")
        .trim()
        .parse()
        .expect("a pid")
}

/// What the program has leaked, when it has ended and others have perhaps not.
fn end(leaks: &Tcptrace) -> Lines {
    leaks.wait_for("the end", SOON, |line| line.value["event"] == "end")
}

#[test]
fn descendants_are_watched_and_nobody_else() {
    let Some(lab) = Lab::new() else { return };
    let (leaks, mut program) = lab.fixture_of_leaks(OPTIONS, "program");
    let mut leaver = Leaver::new(&lab);
    let mut outside = lab.fixture("outside");
    let mut child = program.fork("child");
    let mut grandchild = child.fork("grandchild");
    let mut dying = program.fork("dying");
    let mut orphan = dying.fork("orphan");
    dying.exit(0);
    assert_eq!(parent(orphan.pid), leaks.pid(), "adopted");
    assert_eq!(parent(grandchild.pid), child.pid);
    let foreign = leaver.leave(&mut outside, "left");
    let own = [&mut program, &mut child, &mut grandchild, &mut orphan].map(|one| {
        let cookie = leaver.leave(one, "left");
        (cookie, one.pid, one.comm.clone())
    });
    // Nobody has connected, but accepted.
    let address = orphan.listen("own", "127.0.0.1:0");
    outside.connect("theirs", address);
    orphan.accept("own", "accepted");
    let accepted = orphan.cookie("accepted");
    outside.close("theirs");
    let diag = lab.diag();
    let seen = |cookie: &str| {
        let row = diag.row(cookie).expect("it is there");
        format!("socket:[{}]", row.inode)
    };
    let inodes: Vec<String> = own.iter().map(|(cookie, ..)| seen(cookie)).collect();
    thread::sleep(AGE);
    program.begin("exit 7");
    let lines = end(&leaks);
    let report = lines.report();
    assert_eq!(report.number("sockets"), 5, "{report}");
    for (index, (cookie, pid, comm)) in own.iter().enumerate() {
        let leak = report.leak_with(cookie);
        assert_eq!(leak.0.value["pid"], *pid, "{leak}");
        assert_eq!(leak.0.value["comm"], *comm, "{leak}");
        assert_eq!(leak.holders(), [u64::from(*pid)], "{leak}");
        let sample = leak.sample(cookie);
        assert_eq!(sample["cause"], "eof_unread", "{leak}");
        // The program has ended, the others hold on.
        let ended = *pid == program.pid;
        assert_eq!(sample["at_exit"] == true, ended, "{leak}");
        let fds = sample["fds"].as_array().expect("a list");
        assert_eq!(fds.len(), 1, "{leak}");
        assert_eq!(fds[0]["pid"], *pid, "{leak}");
        if !ended {
            let link = fs::read_link(format!("/proc/{pid}/fd/{}", fds[0]["fd"]));
            assert_eq!(link.expect("it is open").to_str(), Some(&*inodes[index]));
        }
    }
    let leak = report.leak_with(&accepted);
    leak.assert_holders(&[&orphan]);
    let told = |leak: &Leak<'_>| leak.samples().iter().any(|one| one["socket"] == foreign);
    assert!(!report.leaks.iter().any(told), "{report}");
    assert!(diag.row(&foreign).is_some(), "it leaks all the same");
    // They hold the output open.
    drop((child, grandchild, orphan));
    assert_eq!(leaks.ended().code, Some(7));
}

/// In it, tcptrace has number 1; outside that is everybody's ancestor.
#[test]
fn tcptrace_in_a_pid_namespace_of_its_own_knows_its_descendants() {
    let unshare = ["unshare", "--pid", "--fork", "--kill-child"];
    // With the /proc of outside, and with one of its own.
    for (own_proc, more) in [(false, &[][..]), (true, &["--mount-proc"])] {
        let Some(lab) = Lab::new() else { return };
        let by = [&unshare, more].concat();
        let (leaks, mut program) = lab.fixture_of_leaks_by(&by, OPTIONS, "program");
        let mut leaver = Leaver::new(&lab);
        let mut outside = lab.fixture("outside");
        let mut child = program.fork("child");
        leaver.leave(&mut outside, "left");
        let at_exit = leaver.leave(&mut program, "left");
        let held = leaver.leave(&mut child, "left");
        thread::sleep(AGE);
        program.begin("exit 7");
        let lines = end(&leaks);
        let report = lines.report();
        assert_eq!(report.number("sockets"), 2, "{own_proc} {report}");
        let leak = report.leak_with(&at_exit);
        assert_eq!(leak.0.value["comm"], "program", "{leak}");
        assert_eq!(leak.sample(&at_exit)["at_exit"], true, "{leak}");
        let leak = report.leak_with(&held);
        assert_eq!(leak.0.value["comm"], "child", "{leak}");
        assert_eq!(leak.0.value["pid"] == child.pid, !own_proc, "{leak}");
        if own_proc {
            assert!(leak.number("pid") < 10, "as its /proc numbers it: {leak}");
        }
        // Everything in the namespace ends with its first process, which tcptrace is.
        assert_eq!(leaks.ended().code, Some(7));
    }
}

#[test]
fn what_an_ending_process_leaves_open_it_has_not_closed() {
    let Some(lab) = Lab::new() else { return };
    let record = lab.record(Path::new("-"));
    let mut server = lab.fixture("server");
    let address = server.listen("listener", "127.0.0.1:0");
    let mut client = lab.fixture("client");
    let mut names = Vec::new();
    for (name, bytes) in [("closed", 0), ("left", 0), ("unread", 9), ("killed", 0)] {
        client.connect(name, address);
        server.accept("listener", name);
        if bytes > 0 {
            server.ask(&format!("write {name} {bytes}"));
        }
        server.close(name);
        let cookie = client.cookie(name);
        let entry = transition(&record, &cookie, "CLOSE_WAIT");
        assert_eq!(entry["task"].get("exiting"), None, "{entry}");
        names.push(cookie);
    }
    let [closed, left, unread, killed] = &names[..] else {
        unreachable!()
    };
    let mut heir = client.fork("heir");
    let (pid, last) = (client.pid, heir.pid);
    client.close("closed");
    for name in ["closed", "left", "unread"] {
        heir.close(name);
    }
    let end = transition(&record, closed, "LAST_ACK");
    assert_eq!(end["task"].get("exiting"), None, "{end}");
    assert_eq!(end["task"].get("tree"), None, "no tree is watched: {end}");
    client.exit(0);
    for (cookie, new) in [(left, "LAST_ACK"), (unread, "CLOSE")] {
        let end = transition(&record, cookie, new);
        assert_eq!(end["task"]["exiting"], true, "{end}");
        assert_eq!(end["task"]["pid"], pid, "{end}");
        assert_eq!(end["owned"], true, "{end}");
    }
    heir.kill();
    let end = transition(&record, killed, "LAST_ACK");
    assert_eq!(end["task"]["exiting"], true, "{end}");
    assert_eq!(end["task"]["pid"], last, "{end}");
    assert_eq!(record.finish().code, Some(0));
}

#[test]
fn the_program_gets_no_descriptor_of_the_tracer() {
    let Some(lab) = Lab::new() else { return };
    let list = [
        "sh",
        "-c",
        "for fd in /proc/$$/fd/*; do echo fd-${fd##*/}; done",
    ];
    let open = |command: &mut Command| {
        let run = Tcptrace::watching(command.args(list).stdin(Stdio::null())).ended();
        let lines = run.lines.0.into_iter().map(|line| line.value);
        let fds = lines.filter(|value| value.as_str().is_some_and(|text| text.starts_with("fd-")));
        fds.collect::<Vec<_>>()
    };
    // Without one, the same shell has what this test has inherited itself.
    let plain = open(&mut Command::new("env"));
    assert!(plain.len() >= 3, "{plain:?}");
    assert_eq!(open(&mut lab.leaks_of(&["--report", "/dev/null"])), plain);
}
