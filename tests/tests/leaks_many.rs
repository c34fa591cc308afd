//! `tcptrace leaks` with very many sockets and processes, with processes that come and go while it looks,
//! and with records lost.

use std::{collections::HashSet, thread, time::Duration};

use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;
use tests::{Lab, Leak, Line, Lines, Peers, Tcptrace, wait_until};

const SOON: Duration = Duration::from_secs(30);
const OLD: &str = "500ms";
/// A moment longer.
const AGE: Duration = Duration::from_millis(600);

fn pids(answer: &Value) -> HashSet<u64> {
    let pids = answer["pids"].as_array().expect("a list");
    pids.iter()
        .map(|pid| pid.as_u64().expect("a pid"))
        .collect()
}

#[test]
fn twenty_thousand_sockets() {
    const MOST: usize = 20_000;
    const CURED: usize = 1000;
    let Some(lab) = Lab::new() else { return };
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).expect("Linux has it");
    let leaks = lab.tcptrace(&["leaks", "--older-than", OLD, "--interval", "200ms"]);
    let mut leaking = lab.fixture("leaking");
    // More than there may be needs CAP_SYS_RESOURCE; without it there are as many as may be.
    let limit = match leaking.attempt("nofile 30000")["error"].as_str() {
        None => 30_000,
        Some(_) => {
            leaking.ask(&format!("nofile {limit}"));
            limit
        }
    };
    let many = MOST.min(limit as usize - 100);
    assert!(
        many > 15_000,
        "the hard limit of descriptors is {limit}: `ulimit -Hn` must be 20100 or more"
    );
    leaking.listen("listener", "127.0.0.1:0");
    leaking.ask(&format!("leak listener l {many}"));
    let all = |count: usize| {
        move |line: &Line| line.value["event"] == "report" && line.value["sockets"] == count
    };
    leaks.wait_for("all of them, live", SOON, all(many));
    let diag = lab.diag();
    let in_close_wait = || {
        let rows = diag.rows();
        rows.iter().filter(|row| row.state == "CLOSE_WAIT").count()
    };
    assert_eq!(in_close_wait(), many);
    let once = lab.leaks_once(&["--older-than", OLD]);
    for lines in [&once.lines, &leaks.lines()] {
        let report = lines.report();
        let leak = report.leak(&leaking);
        leak.assert_causes(&[("drained", many as u64)]);
        leak.assert_holders(&[&leaking]);
        // What is listed is bounded.
        assert_eq!(leak.samples().len(), 10, "{leak}");
        assert_eq!(leak.number("fd_limit"), limit, "{leak}");
        // The listener, standard input and output, and a few.
        let fds = leak.number("fds");
        assert!((many as u64..many as u64 + 30).contains(&fds), "{leak}");
        let remotes = &leak.0.value["remotes"];
        assert_eq!(remotes[0]["sockets"], many, "{leak}");
        assert_eq!(leak.0.value["local_ports"][0]["sockets"], many, "{leak}");
    }
    for index in 0..CURED {
        leaking.close(&format!("l{index}"));
    }
    leaks.wait_for("the rest", SOON, all(many - CURED));
    let _ = leaks.finish();
    let once = lab.leaks_once(&["--older-than", OLD]);
    assert_eq!(once.lines.report().number("sockets"), (many - CURED) as u64);
}

#[test]
fn five_hundred_processes() {
    const MANY: usize = 500;
    let Some(lab) = Lab::new() else { return };
    let leaks = lab.tcptrace(&["leaks", "--older-than", OLD, "--interval", "200ms"]);
    let mut parent = lab.fixture("brood");
    parent.listen("listener", "127.0.0.1:0");
    let children = pids(&parent.ask(&format!("brood listener {MANY}")));
    assert_eq!(children.len(), MANY);
    leaks.wait_for("all of them, live", SOON, |line| {
        line.value["event"] == "report" && line.value["leaks"] == MANY
    });
    let once = lab.leaks_once(&["--older-than", OLD]);
    // Not `finish_whole`: a probe that has interrupted itself misses a record now and then.
    let live = leaks.finish();
    assert_eq!(live.code, Some(0), "{}", live.stderr);
    for lines in [&once.lines, &live.lines] {
        let report = lines.report();
        assert_eq!(report.number("leaks"), MANY as u64);
        assert_eq!(report.number("sockets"), MANY as u64);
        let mut found = HashSet::new();
        for leak in &report.leaks {
            assert_eq!(leak.number("sockets"), 1, "{leak}");
            assert_eq!(leak.0.value["comm"], "brood", "{leak}");
            let holders = leak.holders();
            assert_eq!(holders.len(), 1, "{leak}");
            assert_eq!(leak.samples()[0]["fds"][0]["pid"], holders[0], "{leak}");
            found.extend(holders);
        }
        assert_eq!(found, children);
    }
    let inode = lab.netns.inode().to_string();
    let arguments = ["leaks", "--once", "--older-than", OLD, "--netns", &inode];
    let text = Tcptrace::run(&arguments).lines;
    // For people, most of them are a number.
    assert!(text.0.len() < 200, "{} lines", text.0.len());
    assert!(
        text.to_string().contains("500 sockets of 500 processes"),
        "{text}"
    );
    assert!(text.to_string().contains("490"), "{text}");
}

/// Every leak must be of one of these processes, with its name and no one else's descriptors, or of
/// nobody known.
fn assert_among(lines: &Lines, comm: &str, pids: &HashSet<u64>) -> usize {
    let mut named = 0;
    for leak in lines.events("leak").map(Leak) {
        for holder in leak.0.value["holders"].as_array().expect("a list") {
            let pid = holder["pid"].as_u64().expect("a pid");
            assert!(pids.contains(&pid), "a stranger: {leak}");
            assert_eq!(holder["comm"], comm, "{leak}");
            let cmdline = holder["cmdline"].as_str();
            assert!(cmdline.is_none_or(|text| text.contains(comm)), "{leak}");
            named += 1;
        }
        for sample in leak.samples() {
            for fd in sample["fds"].as_array().expect("a list") {
                let pid = fd["pid"].as_u64().expect("a pid");
                assert!(leak.holders().contains(&pid), "{leak}");
            }
        }
    }
    named
}

/// Processes that die while they are looked at. Their pids go to others soon.
#[test]
fn dying_processes() {
    const SECONDS: u32 = 12;
    let Some(lab) = Lab::new() else { return };
    let live = lab.tcptrace(&["leaks", "--older-than", "1ms", "--interval", "100ms"]);
    let mut mayfly = lab.fixture("mayfly");
    mayfly.listen("listener", "127.0.0.1:0");
    mayfly.begin(&format!("mayflies listener {SECONDS}"));
    let mut runs = Vec::new();
    for _ in 0..SECONDS / 2 {
        runs.push(lab.leaks_once(&["--older-than", "1ms"]));
    }
    let mut known = pids(&mayfly.answer());
    assert!(known.len() > 200, "{} processes", known.len());
    known.insert(mayfly.pid.into());
    mayfly.close("listener");
    wait_until("all are gone", SOON, || {
        let rows = lab.diag().rows();
        rows.iter()
            .all(|row| row.state != "CLOSE_WAIT")
            .then_some(())
    });
    // Not `finish_whole`: a probe that has interrupted itself misses a record now and then.
    let live = live.finish();
    assert_eq!(live.code, Some(0), "{}", live.stderr);
    let live = live.lines;
    assert!(assert_among(&live, "mayfly", &known) > 3, "{live}");
    live.report().assert_none();
    for run in &runs {
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert_among(&run.lines, "mayfly", &known);
        assert_eq!(run.lines.reports().len(), 1, "{}", run.lines);
    }
}

/// With a buffer that holds next to nothing, and a reader that is not given the CPU: what was cured
/// unseen is not reported, and what leaked unseen is.
///
/// Of a connection that is over, only looks at everything tell; without one, fewer are made.
fn lost_records(finished: bool) {
    let Some(lab) = Lab::new() else { return };
    let leaks = lab.tcptrace(&[
        "leaks",
        "--older-than",
        OLD,
        "--interval",
        "200ms",
        "--buffer",
        "4K",
    ]);
    let mut peers = Peers::new(&lab);
    let cured = [(); 3].map(|()| peers.left_by_client());
    let kept = peers.left_by_client();
    leaks.wait_for("what is seen", SOON, |line| {
        line.value["event"] == "report" && line.value["sockets"] == 4
    });
    let mut bursting = lab.fixture("bursting");
    bursting.listen("listener", "127.0.0.1:0");
    leaks.pause();
    bursting.ask("burst listener 500");
    for connection in &cured {
        peers.server.close(&connection.name);
    }
    let unseen = [(); 2].map(|()| peers.left_by_client());
    let over = finished.then(|| peers.left_by_client());
    if let Some(over) = &over {
        peers.server.ask(&format!("shutdown {}", over.name));
    }
    let (sockets, all) = if finished { (4, 2) } else { (3, 1) };
    leaks.resume();
    leaks.wait_for("the loss", SOON, |line| line.value["event"] == "lost");
    thread::sleep(AGE);
    leaks.wait_for("what is left", SOON, |line| {
        line.value["event"] == "report"
            && line.value["sockets"] == sockets
            && line.value["leaks"] == all
    });
    // Some more looks change nothing.
    thread::sleep(Duration::from_secs(4));
    let run = leaks.finish();
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.lines.report();
    assert!(report.number("lost") > 0, "{report}");
    let listed = lab.diag().rows();
    let mut listed: Vec<&str> = listed
        .iter()
        .filter(|row| row.state == "CLOSE_WAIT")
        .map(|row| row.cookie.as_str())
        .collect();
    listed.sort_unstable();
    let leak = report.leak(&peers.server);
    let mut found: Vec<&str> = leak
        .samples()
        .iter()
        .map(|sample| sample["socket"].as_str().expect("a cookie"))
        .collect();
    found.sort_unstable();
    assert_eq!(found, listed, "{report}");
    leak.assert_causes(&[("eof_unread", 3)]);
    // Its beginning was seen; theirs was not.
    assert_eq!(leak.sample(&kept.server)["age_at_least"], false, "{leak}");
    for connection in &unseen {
        assert_eq!(
            leak.sample(&connection.server)["age_at_least"],
            true,
            "{leak}"
        );
    }
    if let Some(over) = &over {
        let _ = report.leak_in("CLOSE", &peers.server).sample(&over.server);
    }
}

#[test]
fn records_lost() {
    lost_records(false);
}

#[test]
fn records_lost_and_a_connection_over() {
    lost_records(true);
}
