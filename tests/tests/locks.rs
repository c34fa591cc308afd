//! Somebody holds the lock of a socket, and the kernel waits for memory with it: whoever asks the socket by `TCP_INFO` or
//! `INET_DIAG_INFO` waits in state D, and no signal ends that. tcptrace answers and ends all the same, and reports what
//! else there is.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use tests::{Fixture, Lab, Peers, Run, Tcptrace, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// For how long locks are held; each test is to be done before.
const HELD: &str = "40";
/// A look, and what it may wait for a lock: a second for each of a few.
const WITHIN: Duration = Duration::from_secs(15);
/// `CAP_BPF`, `CAP_PERFMON` and `CAP_SYS_ADMIN`; what remains can read everything of other processes.
const NO_BPF: [libc::c_ulong; 3] = [39, 38, 21];

/// What a lock is held of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A socket in CLOSE_WAIT.
    CloseWait,
    /// One whose connection is over, which is in no table.
    Over,
}

/// A process with two leaked sockets of each kind, of one of which the lock is held.
fn hostile(lab: &Lab, held: Held) -> (Peers, Fixture) {
    let mut peers = Peers::new(lab);
    // Another process, which has nothing to do with it.
    let mut bystander = lab.fixture("bystander");
    for name in ["one", "two"] {
        bystander.connect(name, peers.address);
        peers.server.accept("listener", name);
        peers.server.close(name);
    }
    thread::sleep(Duration::from_millis(200));
    bystander.ask("shutdown two");
    let locked = match held {
        Held::CloseWait => peers.left_by_client(),
        Held::Over => {
            let connection = peers.left_by_client();
            peers.server.ask(&format!("shutdown {}", connection.name));
            connection
        }
    };
    // The FIN is acknowledged.
    thread::sleep(Duration::from_millis(300));
    peers.server.ask(&format!("lock {} {HELD}", locked.name));
    thread::sleep(Duration::from_millis(700));
    (peers, bystander)
}

/// What is reported of the process that has nothing to do with it, and of the other if that can be known.
fn assert_reported(run: &Run, bystander: &Fixture) {
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.lines.report();
    report
        .leak_in("CLOSE_WAIT", bystander)
        .assert_holders(&[bystander]);
    report
        .leak_in("CLOSE", bystander)
        .assert_causes(&[("finished", 1)]);
}

/// It ends by itself, or by a signal, at once.
fn end(tcptrace: Tcptrace, began: Instant) -> Run {
    let run = tcptrace.finish();
    let took = began.elapsed();
    assert!(took < WITHIN, "it took {took:?}: {}", run.stderr);
    run
}

#[test]
fn once() {
    for held in [Held::CloseWait, Held::Over] {
        let Some(lab) = Lab::new() else { return };
        let (peers, bystander) = hostile(&lab, held);
        let began = Instant::now();
        let run = lab.leaks_once(&["--older-than", "500ms"]);
        let took = began.elapsed();
        assert!(took < WITHIN, "it took {took:?}: {}", run.stderr);
        assert_reported(&run, &bystander);
        match held {
            Held::CloseWait => {
                // It is there, and nothing is guessed of it.
                let report = run.lines.report();
                report.leak(&peers.server).assert_causes(&[("unknown", 1)]);
                assert!(
                    run.stderr.contains("when sockets last sent"),
                    "{}",
                    run.stderr
                );
            }
            Held::Over => {
                let said = "their connection is over: ";
                assert!(run.stderr.contains(said), "{}", run.stderr);
                assert!(run.stderr.contains("lock is held"), "{}", run.stderr);
            }
        }
    }
}

/// By BPF no lock is needed, so all of it is known.
#[test]
fn traced() {
    for held in [Held::CloseWait, Held::Over] {
        let Some(lab) = Lab::new() else { return };
        let (peers, bystander) = hostile(&lab, held);
        let leaks = lab.tcptrace(&["leaks", "--older-than", "500ms", "--interval", "200ms"]);
        leaks.wait_for("a report", SOON, |line| {
            line.value["event"] == "report" && line.value["sockets"] == 3
        });
        let run = end(leaks, Instant::now());
        assert_reported(&run, &bystander);
        let report = run.lines.report();
        match held {
            Held::CloseWait => {
                report
                    .leak(&peers.server)
                    .assert_causes(&[("eof_unread", 1)]);
            }
            Held::Over => {
                let leak = report.leak_in("CLOSE", &peers.server);
                leak.assert_causes(&[("finished", 1)]);
            }
        }
        assert!(!run.stderr.contains("lock"), "{}", run.stderr);
    }
}

/// Without BPF, it goes on looking and asks those sockets no more.
#[test]
fn looked_up() {
    for held in [Held::CloseWait, Held::Over] {
        let Some(lab) = Lab::new() else { return };
        let (peers, bystander) = hostile(&lab, held);
        // In the namespace: to enter it takes CAP_SYS_ADMIN.
        let arguments = ["leaks", "--older-than", "500ms", "--interval", "200ms"];
        let began = Instant::now();
        let leaks = Tcptrace::start_limited(&NO_BPF, Some(&lab.netns), &arguments);
        wait_until("three reports", SOON, || {
            let lines = leaks.lines();
            (lines.reports().len() > 2).then_some(())
        });
        let took = began.elapsed();
        assert!(took < WITHIN, "it took {took:?}");
        let run = end(leaks, Instant::now());
        assert_reported(&run, &bystander);
        // Other tests hold locks as well; but none is spoken of twice.
        let said = run
            .stderr
            .lines()
            .filter(|line| line.contains("lock is held"));
        let mut said: Vec<&str> = said.collect();
        let count = said.len();
        said.sort_unstable();
        said.dedup();
        assert!(count > 0 && said.len() == count, "{}", run.stderr);
        let _ = peers;
    }
}

/// Nothing of it stays: neither a probe, nor a pipe that somebody reads to its end.
#[test]
fn what_waits_for_the_lock_holds_nothing() {
    let Some(lab) = Lab::new() else { return };
    let (_peers, _bystander) = hostile(&lab, Held::Over);
    let leaks = lab.tcptrace(&["leaks", "--older-than", "500ms", "--interval", "200ms"]);
    let run = end(leaks, Instant::now());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let once = lab.leaks_once(&["--older-than", "500ms"]);
    assert_eq!(once.code, Some(0), "{}", once.stderr);
    for process in fs::read_dir("/proc").expect("/proc").flatten() {
        let path = process.path();
        let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if comm.trim_end() != "tcptrace-ask" {
            continue;
        }
        let Ok(fds) = fs::read_dir(path.join("fd")) else {
            continue;
        };
        for fd in fds.flatten() {
            let Ok(link) = fs::read_link(fd.path()) else {
                continue;
            };
            let link = link.display().to_string();
            let harmless = ["socket:", "/proc/", "/dev/null"]
                .iter()
                .any(|start| link.starts_with(start));
            assert!(harmless, "{}: {link}", fd.path().display());
        }
    }
}
