//! Who holds a leaked socket: processes that fork, hand over, hide it in a thread, live in other
//! namespaces, may not be read, or die and leave their pid to another.

use std::{env, fs, net::Ipv4Addr, path::PathBuf, process, thread, time::Duration};

use serde_json::Value;
use tests::{Fixture, Lab, Leak, Lines, Peers, Run, Tcptrace, boottime, realtime_of_boottime};

const SOON: Duration = Duration::from_secs(20);
/// Longer than that, and so leaked.
const OLD: &str = "500ms";
/// A moment longer.
const AGE: Duration = Duration::from_millis(600);

/// Looks at the lab's namespace when all that leaks is old enough: once, by reading `/proc`, and traced, where the kernel
/// tells who has what open. Both must see the same.
fn looks(lab: &Lab) -> [Lines; 2] {
    looks_at(lab, "CLOSE_WAIT")
}

/// The same at sockets in this state.
fn looks_at(lab: &Lab, state: &str) -> [Lines; 2] {
    thread::sleep(AGE);
    let options = ["--state", state, "--older-than", OLD];
    let run = lab.leaks_once(&options);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let traced = lab.tcptrace(&[&["leaks", "--interval", "200ms"][..], &options].concat());
    traced.wait_for("the leak", SOON, |line| line.value["event"] == "leak");
    // Every kernel that takes the probe of transitions takes the program that finds holders.
    let programs = traced.programs();
    let names: Vec<&str> = programs
        .iter()
        .filter_map(|program| program.name_as_str())
        .collect();
    assert!(names.contains(&"open_sockets"), "{names:?}");
    let traced = traced.finish();
    assert_eq!(traced.code, Some(0), "{}", traced.stderr);
    assert!(!traced.stderr.contains("open files"), "{}", traced.stderr);
    [run.lines, traced.lines]
}

fn watch(lab: &Lab) -> Tcptrace {
    lab.tcptrace(&["leaks", "--older-than", OLD, "--interval", "200ms"])
}

fn inode_of(pid: u32, fd: &Value) -> String {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).expect("an open descriptor");
    link.to_str().expect("a plain name").to_owned()
}

fn nofile(pid: u32) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("a process");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().nth(3));
    soft.and_then(|soft| soft.parse().ok()).expect("a number")
}

/// Everything about the process that holds, as it can be looked up elsewhere.
#[test]
fn one_process() {
    let Some(lab) = Lab::new() else { return };
    let before = realtime_of_boottime(boottime());
    let mut peers = Peers::new(&lab);
    let after = realtime_of_boottime(boottime());
    peers.server.ask("nofile 1234");
    let left = peers.left_by_client();
    let other = peers.connect();
    for lines in looks(&lab) {
        let report = lines.report();
        let leak = report.only();
        leak.assert_holders(&[&peers.server]);
        let holder = &leak.0.value["holders"][0];
        let pid = peers.server.pid;
        let exe = fs::read_link(format!("/proc/{pid}/exe")).expect("a program");
        let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("a process");
        for of in [&leak.0.value, holder] {
            assert_eq!(of["exe"], exe.to_str().expect("a plain path"), "{leak}");
            assert_eq!(
                of["cmdline"],
                cmdline.trim_end_matches('\0').replace('\0', " "),
                "{leak}"
            );
            assert_eq!(of["fd_limit"], 1234, "{leak}");
            assert_eq!(of["fd_limit"], nofile(pid), "{leak}");
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
            assert_eq!(of["fds"], fds.count(), "{leak}");
        }
        assert!(holder["ns_pid"].is_null(), "{leak}");
        let started = tests::Line {
            value: holder.clone(),
            arrived: 0,
        }
        .time("started");
        // `/proc/PID/stat` has it in hundredths of a second.
        assert!(
            (before - 10_000_000..=after).contains(&started),
            "{before} {started} {after}: {leak}"
        );
        // An open connection is none.
        assert_eq!(leak.number("sockets"), 1, "{leak}");
        let fd = &leak.sample(&left.server)["fds"][0];
        assert_eq!(fd["pid"], pid, "{leak}");
        let row = lab.diag().row(&left.server).expect("it is still there");
        assert_eq!(inode_of(pid, &fd["fd"]), format!("socket:[{}]", row.inode));
    }
    drop(other);
}

#[test]
fn parent_and_child_hold_one_socket() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let shared = peers.left_by_client();
    let heir = peers.server.fork("heir");
    // One that the child does not have.
    let own = peers.left_by_client();
    for lines in looks(&lab) {
        let report = lines.report();
        assert_eq!(report.number("sockets"), 2, "{report}");
        assert_eq!(report.number("leaks"), 2, "{report}");
        let leak_of = |cookie: &str| {
            let of = |leak: &&Leak<'_>| leak.samples().iter().any(|one| one["socket"] == cookie);
            *report.leaks.iter().find(of).expect("it is leaked")
        };
        let leak = leak_of(&shared.server);
        leak.assert_holders(&[&peers.server, &heir]);
        assert_eq!(leak.number("sockets"), 1, "{leak}");
        let fds = leak.sample(&shared.server)["fds"].as_array();
        let fds = fds.expect("a list");
        let pids: Vec<&Value> = fds.iter().map(|fd| &fd["pid"]).collect();
        assert_eq!(fds.len(), 2, "{leak}");
        for pid in [peers.server.pid, heir.pid] {
            assert!(pids.contains(&&Value::from(pid)), "{leak}");
        }
        let row = lab.diag().row(&shared.server).expect("it is still there");
        for fd in fds {
            let pid = fd["pid"].as_u64().expect("a number") as u32;
            assert_eq!(inode_of(pid, &fd["fd"]), format!("socket:[{}]", row.inode));
        }
        leak_of(&own.server).assert_holders(&[&peers.server]);
    }
}

/// The parent has closed what its child still holds.
#[test]
fn child_alone() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    let heir = peers.server.fork("heir");
    peers.server.close(&left.name);
    for lines in looks(&lab) {
        lines.report().only().assert_holders(&[&heir]);
    }
}

#[test]
fn passed_to_another_process() {
    let Some(lab) = Lab::new() else { return };
    let traced = watch(&lab);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let mut receiver = lab.fixture("receiver");
    peers.server.send(&connection.name, &mut receiver);
    peers.client.close(&connection.name);
    for lines in looks(&lab) {
        lines.report().only().assert_holders(&[&receiver]);
    }
    traced.wait_for("the leak", SOON, |line| line.value["event"] == "leak");
    // The server has accepted it; that is another question.
    let lines = traced.finish_whole();
    lines.report().only().assert_holders(&[&receiver]);
}

/// A thread with a table of descriptors of its own. `/proc/PID/fd` is that of the first thread, and
/// tcptrace reads no other: it must not name anybody else.
#[test]
fn thread_with_its_own_descriptors() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    peers.server.ask(&format!("keep {}", left.name));
    let row = lab.diag().row(&left.server).expect("a thread has it");
    assert_eq!(row.state, "CLOSE_WAIT");
    for lines in looks(&lab) {
        let report = lines.report();
        let leak = report.only();
        assert!(leak.0.value["pid"].is_null(), "{leak}");
        assert_eq!(leak.holders(), [] as [u64; 0], "{leak}");
        leak.assert_causes(&[("eof_unread", 1)]);
    }
}

/// Its first thread has ended. What it has open, it still has, by another.
#[test]
fn first_thread_has_ended() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    peers.server.outlive_first_thread();
    for lines in looks(&lab) {
        let report = lines.report();
        let leak = report.only();
        leak.assert_holders(&[&peers.server]);
        let fds = leak.sample(&left.server)["fds"].as_array();
        assert_eq!(fds.map(Vec::len), Some(1), "by one thread of two: {leak}");
    }
}

/// The TCP connections below an MPTCP socket have its file.
#[test]
fn of_an_mptcp_socket() {
    let Some(lab) = Lab::new() else { return };
    let mut multipath = lab.fixture("multipath");
    multipath.ask("mptcp 127.0.0.1:0");
    for lines in looks_at(&lab, "ESTABLISHED") {
        let report = lines.report();
        assert_eq!(report.number("sockets"), 2, "{report}");
        report.only().assert_holders(&[&multipath]);
    }
}

/// A socket on its way between processes is held by none.
#[test]
fn nobody() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    peers.server.ask("become 4321");
    let made_by_another = peers.left_by_client();
    for connection in [&left, &made_by_another] {
        peers.server.ask(&format!("stash {}", connection.name));
    }
    for lines in looks(&lab) {
        let report = lines.report();
        assert_eq!(report.number("sockets"), 2, "{report}");
        for leak in &report.leaks {
            assert!(leak.0.value["pid"].is_null(), "{leak}");
            assert!(leak.0.value["comm"].is_null(), "{leak}");
            assert!(leak.0.value["via"].is_null(), "{leak}");
            assert_eq!(leak.holders(), [] as [u64; 0], "{leak}");
            assert_eq!(leak.samples()[0]["fds"], serde_json::json!([]), "{leak}");
            assert_eq!(leak.samples()[0]["cause"], "eof_unread", "{leak}");
        }
        // The user whose process made it: accepted sockets have that of their process.
        let mut uids: Vec<u64> = report.leaks.iter().map(|leak| leak.number("uid")).collect();
        uids.sort_unstable();
        assert_eq!(uids, [0, 4321], "{report}");
    }
}

#[test]
fn process_in_a_pid_namespace() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let mut inner = peers.server.fork_into_pid_namespace("inner");
    peers.server.close("listener");
    let address = peers.address;
    peers.client.connect("c", address);
    inner.accept("listener", "c");
    peers.client.close("c");
    for lines in looks(&lab) {
        let report = lines.report();
        let leak = report.only();
        leak.assert_holders(&[&inner]);
        assert_ne!(inner.pid, 1);
        assert_eq!(leak.0.value["holders"][0]["ns_pid"], 1, "{leak}");
    }
}

/// Moves both processes to the namespace of the test itself. Their sockets stay.
fn leave(peers: &mut Peers) {
    let own = format!("/proc/{}/ns/net", process::id());
    peers.client.ask(&format!("setns {own}"));
    peers.server.ask(&format!("setns {own}"));
}

fn mount_point(name: &str) -> PathBuf {
    env::temp_dir().join(format!("tcptrace-tests-{}-{name}", process::id()))
}

/// A namespace that only its mount keeps, found without being asked for; its sockets are held by
/// processes elsewhere, or wait at a listener of one.
#[test]
fn namespace_without_a_process() {
    let Some(mut lab) = Lab::new() else { return };
    lab.netns.mount_at(&mount_point("leaked"));
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    let address = peers.address;
    peers.client.connect("waiting", address);
    peers.client.close("waiting");
    leave(&mut peers);
    thread::sleep(AGE);
    let run = Tcptrace::run(&["leaks", "--once", "--older-than", OLD, "-o", "json"]);
    let report = run.lines.report();
    let leak = report.leak(&peers.server);
    leak.assert_holders(&[&peers.server]);
    leak.assert_causes(&[("eof_unread", 1), ("not_accepted", 1)]);
    let sample = leak.sample(&left.server);
    assert_eq!(sample["netns"], lab.netns.inode(), "{leak}");
    // No process leads there.
    assert_eq!(leak.0.value["clear"], serde_json::json!([]), "{leak}");
}

fn run_as_nobody(lab: &Lab) -> Run {
    thread::sleep(AGE);
    let arguments = ["leaks", "--once", "--older-than", OLD, "-o", "json"];
    Tcptrace::run_as_nobody_in(Some(&lab.netns), &arguments)
}

/// Unprivileged, one's own processes are named, of others is said that they cannot be.
#[test]
fn without_privileges() {
    const NOBODY: u32 = 65534;
    let Some(lab) = Lab::new() else { return };
    let mut mine = Peers::named(
        &lab,
        "client",
        "mine",
        "127.0.0.1:0",
        Ipv4Addr::LOCALHOST.into(),
    );
    mine.server.ask(&format!("become {NOBODY}"));
    let own = mine.left_by_client();
    let mut root = Peers::new(&lab);
    let foreign = root.left_by_client();
    let run = run_as_nobody(&lab);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.lines.report();
    assert_eq!(report.number("sockets"), 2, "{report}");
    let leak = report.leak(&mine.server);
    leak.assert_holders(&[&mine.server]);
    let _ = leak.sample(&own.server);
    let unknown = report
        .leaks
        .iter()
        .find(|leak| leak.0.value["pid"].is_null());
    let unknown = unknown.unwrap_or_else(|| panic!("one whose holder is not known:\n{report}"));
    let _ = unknown.sample(&foreign.server);
    assert_eq!(unknown.number("uid"), 0, "{unknown}");
    assert_eq!(unknown.holders(), [] as [u64; 0], "{unknown}");
    unknown.assert_causes(&[("eof_unread", 1)]);
    // What is missing, by its name.
    assert!(run.stderr.contains("CAP_SYS_PTRACE"), "{}", run.stderr);
}

/// The process that made the connection is dead, its pid belongs to another, and its child holds the
/// socket.
#[test]
fn pid_of_a_dead_process() {
    let Some(lab) = Lab::new() else { return };
    let traced = watch(&lab);
    let Peers {
        mut client,
        mut server,
        address,
        ..
    } = Peers::new(&lab);
    let mut parent = lab.fixture("parent");
    let mut predecessor = server.fork("predecessor");
    client.connect("c", address);
    predecessor.accept("listener", "c");
    let cookie = predecessor.cookie("c");
    let holder = predecessor.fork("holder");
    let pid = predecessor.pid;
    predecessor.kill();
    let successor = tests::wait_until("the pid is free", SOON, || parent.fork_as(pid, "successor"));
    assert_eq!(successor.pid, pid);
    client.close("c");
    traced.wait_for("the leak", SOON, |line| line.value["event"] == "leak");
    let [once, late] = looks(&lab);
    for lines in [&once, &late, &traced.finish_whole()] {
        let report = lines.report();
        let leak = report.only();
        leak.assert_holders(&[&holder]);
        let _ = leak.sample(&cookie);
    }
}

/// The holder itself has died between two reports, and a process of the same pid leaks another socket.
#[test]
fn pid_of_a_holder() {
    let Some(lab) = Lab::new() else { return };
    let traced = watch(&lab);
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    let leak = |peers: &mut Peers, process: &mut Fixture, name: &str| {
        peers.client.connect(name, address);
        process.accept("listener", name);
        peers.client.close(name);
        process.cookie(name)
    };
    let mut first = peers.server.fork("first");
    let pid = first.pid;
    leak(&mut peers, &mut first, "a");
    traced.wait_for("the first leak", SOON, |line| line.value["comm"] == "first");
    first.kill();
    let mut second = tests::wait_until("the pid is free", SOON, || {
        peers.server.fork_as(pid, "second")
    });
    let cookie = leak(&mut peers, &mut second, "b");
    traced.wait_for("the second leak", SOON, |line| {
        line.value["comm"] == "second"
    });
    let lines = traced.finish_whole();
    let report = lines.report();
    let leak = report.only();
    leak.assert_holders(&[&second]);
    assert_eq!(leak.samples().len(), 1, "{leak}");
    let _ = leak.sample(&cookie);
    let started = |comm: &str| {
        let leak = lines.events("leak").find(|line| line.value["comm"] == comm);
        leak.expect("waited for").value["holders"][0]["started"].clone()
    };
    assert_ne!(started("first"), started("second"), "{lines}");
}

/// Without the option all namespaces are looked at, and both leaks found.
#[test]
fn every_namespace_is_looked_at() {
    let Some(lab) = Lab::new() else { return };
    let other = Lab::new().expect("as the first");
    let mut here = Peers::named(
        &lab,
        "client",
        "here",
        "127.0.0.1:0",
        Ipv4Addr::LOCALHOST.into(),
    );
    let mut there = Peers::named(
        &other,
        "client",
        "there",
        "127.0.0.1:0",
        Ipv4Addr::LOCALHOST.into(),
    );
    here.left_by_client();
    there.left_by_client();
    thread::sleep(AGE);
    let run = Tcptrace::run(&["leaks", "--once", "--older-than", OLD, "-o", "json"]);
    let report = run.lines.report();
    for (peers, lab) in [(&here, &lab), (&there, &other)] {
        let leak = report.leak(&peers.server);
        leak.assert_causes(&[("eof_unread", 1)]);
        assert_eq!(leak.samples()[0]["netns"], lab.netns.inode(), "{leak}");
    }
}
