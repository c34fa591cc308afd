//! `tcptrace leaks`: ages, growth, what has been cured, other states, and what it takes to run.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    process::{self, Command},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{
    Connection, Diag, Fixture, Lab, Leak, Line, Lines, Netns, Peers, Row, Seen, Tcptrace, boottime,
    realtime_of_boottime, wait_until,
};

const SOON: Duration = Duration::from_secs(20);
const OLD: &str = "500ms";
/// A moment longer.
const AGE: Duration = Duration::from_millis(600);
/// Capabilities (`linux/capability.h`) of which one is needed for BPF.
const BPF: [libc::c_ulong; 3] = [39, 38, 21];

fn watch(lab: &Lab, more: &[&str]) -> Tcptrace {
    let arguments = ["leaks", "--older-than", OLD, "--interval", "200ms"];
    lab.tcptrace(&[&arguments, more].concat())
}

fn is_leak_of(line: &Line, process: &Fixture, sockets: usize) -> bool {
    line.value["event"] == "leak"
        && line.value["pid"] == process.pid
        && line.value["sockets"] == sockets
}

fn is_empty_report(line: &Line) -> bool {
    line.value["event"] == "report" && line.value["leaks"] == 0
}

fn wait_state(diag: &Diag, cookie: &str, state: &str) -> Row {
    wait_until(state, SOON, || {
        diag.row(cookie).filter(|row| row.state == state)
    })
}

/// From before the trace, ages are lower bounds, and never more than the truth.
#[test]
fn older_than_tcptrace() {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    peers.server.ask(&format!("read {}", left.name));
    thread::sleep(Duration::from_millis(1500));
    let traced = watch(&lab, &[]);
    traced.wait_for("the leak", SOON, |line| line.value["event"] == "leak");
    let once = lab.leaks_once(&["--older-than", "1s"]);
    let seen = observer.state(&left.server, "CLOSE_WAIT").expect("seen");
    for (lines, is_traced) in [(&once.lines, false), (&traced.finish_whole(), true)] {
        let report = lines.report();
        assert_eq!(report.end.value["traced"], is_traced, "{report}");
        let leak = report.leak(&peers.server);
        assert_eq!(leak.0.value["oldest_at_least"], true, "{leak}");
        let sample = leak.sample(&left.server);
        assert_eq!(sample["age_at_least"], true, "{leak}");
        let age = leak.0.seconds("oldest_seconds");
        assert_eq!(sample["age_seconds"], age, "{leak}");
        let began = leak.0.time("time") - (age * 1e9) as i64;
        let earliest = realtime_of_boottime(seen.before);
        // An ACK came with the FIN, and none since: the bound is as good as the age, to the jiffy.
        let latest = realtime_of_boottime(seen.first) + 20_000_000;
        assert!((earliest - 1_000_000..latest).contains(&began), "{leak}");
    }
}

/// Where two looks have shown nothing, it is not looked any more, until a record tells of something.
#[test]
fn what_comes_after_nothing_is_found() {
    let Some(lab) = Lab::new() else { return };
    let leaks = watch(&lab, &[]);
    let mut peers = Peers::new(&lab);
    for sockets in [1, 2] {
        thread::sleep(Duration::from_millis(1500));
        let left: Vec<_> = (0..sockets).map(|_| peers.left_by_client()).collect();
        leaks.wait_for("the leak", SOON, |line| {
            is_leak_of(line, &peers.server, sockets)
        });
        for connection in &left {
            peers.server.close(&connection.name);
        }
    }
    let _ = leaks.finish_whole();
}

#[test]
fn traced_ages_are_exact() {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let leaks = watch(&lab, &[]);
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    let over = peers.left_by_client();
    thread::sleep(Duration::from_millis(50));
    let before = boottime();
    peers.server.ask(&format!("shutdown {}", over.name));
    let after = boottime();
    leaks.wait_for("the finished one", SOON, |line| {
        line.value["event"] == "leak" && line.value["state"] == "CLOSE"
    });
    leaks.wait_for("the other", SOON, |line| {
        line.value["event"] == "leak" && line.value["state"] == "CLOSE_WAIT"
    });
    let seen = observer.state(&left.server, "CLOSE_WAIT").expect("seen");
    let lines = leaks.finish_whole();
    for (state, cookie, before, after) in [
        ("CLOSE_WAIT", &left.server, seen.before, seen.first),
        ("CLOSE", &over.server, before, after),
    ] {
        let of = |line: &&Line| line.value["state"] == state;
        let leak = Leak(lines.events("leak").find(of).expect("waited for"));
        assert_eq!(leak.0.value["oldest_at_least"], false, "{leak}");
        let age = leak.sample(cookie)["age_seconds"].as_f64();
        let began = leak.0.time("time") - (age.expect("a number") * 1e9) as i64;
        let (before, after) = (realtime_of_boottime(before), realtime_of_boottime(after));
        assert!(
            (before - 1_000_000..=after + 1_000_000).contains(&began),
            "{before} {began} {after}: {leak}"
        );
    }
}

/// Reports nothing that is not old enough, and says how many there are.
#[test]
fn younger() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    peers.left_by_client();
    let run = lab.leaks_once(&["--older-than", "30s", "--exit-code"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    run.lines.report().assert_none();
    assert_eq!(run.lines.report().number("younger"), 1, "{}", run.lines);
}

#[test]
fn exit_codes() {
    let Some(lab) = Lab::new() else { return };
    let code = |more: &[&str]| {
        lab.leaks_once(&[&["--older-than", OLD], more].concat())
            .code
    };
    assert_eq!(code(&["--exit-code"]), Some(0));
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    thread::sleep(AGE);
    assert_eq!(code(&["--exit-code"]), Some(1));
    assert_eq!(code(&[]), Some(0));
    assert_eq!(
        code(&["--exit-code", "--pid", &peers.client.pid.to_string()]),
        Some(0)
    );
    assert_eq!(
        code(&["--exit-code", "--pid", &peers.server.pid.to_string()]),
        Some(1)
    );
    assert_eq!(code(&["--exit-code", "--state", "LISTEN"]), Some(2));
    let missing = Tcptrace::run(&["leaks", "--exit-code", "--from", "/nowhere/trace.jsonl"]);
    assert_eq!(missing.code, Some(2), "{}", missing.stderr);
    // Live, it is the last report that counts.
    let live = watch(&lab, &["--exit-code"]);
    live.wait_for("the leak", SOON, |line| is_leak_of(line, &peers.server, 1));
    assert_eq!(live.finish().code, Some(1));
    let live = watch(&lab, &["--exit-code"]);
    live.wait_for("the leak", SOON, |line| is_leak_of(line, &peers.server, 1));
    peers.server.close(&left.name);
    live.wait_for("the cure", SOON, is_empty_report);
    assert_eq!(live.finish().code, Some(0));
    assert_eq!(code(&["--exit-code"]), Some(0));
}

#[test]
fn cured() {
    let Some(lab) = Lab::new() else { return };
    let live = watch(&lab, &[]);
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    let over = peers.left_by_client();
    peers.server.ask(&format!("shutdown {}", over.name));
    live.wait_for("both", SOON, |line| {
        line.value["event"] == "report" && line.value["leaks"] == 2
    });
    let old = ["--older-than", OLD];
    assert_eq!(lab.leaks_once(&old).lines.report().number("sockets"), 2);
    peers.server.close(&over.name);
    live.wait_for("one", SOON, |line| {
        line.value["event"] == "report"
            && line.value["leaks"] == 1
            && line.time("time") > realtime_of_boottime(boottime()) - 2_000_000_000
    });
    let once = lab.leaks_once(&old);
    let _ = once.lines.report().only().sample(&left.server);
    peers.server.close(&left.name);
    live.wait_for("none", SOON, is_empty_report);
    lab.leaks_once(&old).lines.report().assert_none();
    let lines = live.finish_whole();
    let report = lines.report();
    report.assert_none();
    assert_eq!(report.number("younger"), 0, "{report}");
}

/// Five sockets a second, from a process with room for few: how fast, and when it will be full.
#[test]
fn growth() {
    let Some(lab) = Lab::new() else { return };
    let live = watch(&lab, &[]);
    let mut leaking = lab.fixture("leaking");
    leaking.ask("nofile 400");
    leaking.listen("listener", "127.0.0.1:0");
    let start = Instant::now();
    for index in 0..75 {
        leaking.ask(&format!("leak listener a{index}- 1"));
        let next = Duration::from_millis(200) * (index + 1);
        thread::sleep(next.saturating_sub(start.elapsed()));
    }
    let mut other = lab.fixture("other");
    other.listen("listener", "127.0.0.1:0");
    other.ask("leak listener b 3");
    let lines = live.wait_for("the whole", SOON, |line| is_leak_of(line, &other, 3));
    drop(live);
    let leaks: Vec<Leak<'_>> = lines
        .events("leak")
        .filter(|line| line.value["pid"] == leaking.pid)
        .map(Leak)
        .collect();
    // At first it is not known.
    assert!(leaks[0].0.value["per_minute"].is_null(), "{}", leaks[0]);
    assert!(
        leaks[0].0.value["full_in_seconds"].is_null(),
        "{}",
        leaks[0]
    );
    let grown = leaks
        .iter()
        .rfind(|leak| leak.number("sockets") < 70)
        .expect("one while it grew");
    let rate = grown.0.seconds("per_minute");
    assert!((240.0..360.0).contains(&rate), "{grown}");
    assert_eq!(grown.number("fd_limit"), 400, "{grown}");
    let left = (400 - grown.number("fds")) as f64;
    let full = grown.0.seconds("full_in_seconds");
    assert!((full - left / rate * 60.0).abs() < 0.01, "{grown}");
}

/// What stands still will never be full.
#[test]
fn no_growth() {
    let Some(lab) = Lab::new() else { return };
    let mut still = lab.fixture("still");
    still.listen("listener", "127.0.0.1:0");
    still.ask("leak listener a 7");
    thread::sleep(AGE);
    let live = watch(&lab, &[]);
    let mut other = lab.fixture("other");
    other.listen("listener", "127.0.0.1:0");
    // Each leak of another process makes a report. At first there are too few looks to tell.
    let mut made = 0;
    let lines = wait_until("a rate", Duration::from_secs(60), || {
        other.ask(&format!("leak listener b{made}- 1"));
        made += 1;
        thread::sleep(Duration::from_secs(1));
        let lines = live.lines();
        let rate =
            |line: &Line| line.value["pid"] == still.pid && line.value["per_minute"].is_number();
        let known = lines
            .reports()
            .iter()
            .any(|report| report.leaks.iter().any(|leak| rate(leak.0)));
        known.then_some(lines)
    });
    let last = lines.report();
    let leak = last.leak(&still);
    assert_eq!(leak.number("sockets"), 7, "{leak}");
    assert_eq!(leak.0.seconds("per_minute"), 0.0, "{leak}");
    assert!(leak.0.value["full_in_seconds"].is_null(), "{leak}");
    assert!(leak.number("fds") > 7, "{leak}");
}

/// Connections whose sockets pile up in another state, at the process that is to blame.
fn pile(state: &str, make: impl Fn(&mut Peers, &Connection), client: bool) {
    let Some(lab) = Lab::new() else { return };
    let diag = lab.diag();
    let live = watch(&lab, &["--state", state]);
    let mut peers = Peers::new(&lab);
    let connections = [(); 3].map(|()| peers.connect());
    let mut cookies = Vec::new();
    for connection in &connections {
        make(&mut peers, connection);
        let cookie = if client {
            &connection.client
        } else {
            &connection.server
        };
        wait_state(&diag, cookie, state);
        cookies.push(cookie);
    }
    // What is in another state was not asked for.
    match state {
        "ESTABLISHED" => peers.left_by_client(),
        _ => peers.connect(),
    };
    let process = if client { &peers.client } else { &peers.server };
    live.wait_for("live", SOON, |line| is_leak_of(line, process, 3));
    let once = lab.leaks_once(&["--older-than", OLD, "--state", state]);
    for (lines, traced) in [(&once.lines, false), (&live.finish_whole(), true)] {
        let report = lines.report();
        let leak = report.leak_in(state, process);
        leak.assert_holders(&[process]);
        leak.assert_causes(&[("unknown", 3)]);
        for cookie in &cookies {
            let sample = leak.sample(cookie);
            assert_eq!(sample["age_at_least"], !traced, "{leak}");
            assert_eq!(sample["fds"][0]["pid"], process.pid, "{leak}");
        }
        for leak in &report.leaks {
            assert_eq!(leak.0.value["state"], state, "{report}");
        }
    }
}

#[test]
fn established() {
    pile("ESTABLISHED", |_, _| {}, false);
}

#[test]
fn fin_wait2() {
    let shut = |peers: &mut Peers, connection: &Connection| {
        peers.client.ask(&format!("shutdown {}", connection.name));
    };
    pile("FIN_WAIT2", shut, true);
}

#[test]
fn last_ack() {
    let deaf = |peers: &mut Peers, connection: &Connection| {
        let name = &connection.name;
        peers.client.ask(&format!("shutdown {name}"));
        let diag_wait = peers.server.ask(&format!("read {name}"));
        assert_eq!(diag_wait["bytes"], 0);
        peers.server.ask(&format!("deaf {name}"));
        peers.server.ask(&format!("shutdown {name}"));
    };
    pile("LAST_ACK", deaf, false);
}

/// A client that hears nothing stays in SYN_SENT; its requests stay in SYN_RECV, where they have no
/// socket yet, and are the listener's.
#[test]
fn syn_sent_and_syn_recv() {
    let Some(lab) = Lab::new() else { return };
    let diag = lab.diag();
    let states = ["--state", "SYN_RECV", "--state", "syn-sent"];
    let live = watch(&lab, &states);
    let mut peers = Peers::new(&lab);
    peers.client.ask("bind c 127.0.0.1:0");
    peers.client.ask("deaf c");
    let cookie = peers.client.cookie("c");
    peers.client.begin(&format!("connect c {}", peers.address));
    wait_state(&diag, &cookie, "SYN_SENT");
    live.wait_for("SYN_SENT", SOON, |line| is_leak_of(line, &peers.client, 1));
    live.wait_for("SYN_RECV", SOON, |line| is_leak_of(line, &peers.server, 1));
    let once = lab.leaks_once(&[&["--older-than", OLD], &states[..]].concat());
    for lines in [&once.lines, &live.finish_whole()] {
        let report = lines.report();
        let sent = report.leak_in("SYN_SENT", &peers.client);
        sent.assert_holders(&[&peers.client]);
        let _ = sent.sample(&cookie);
        let received = report.leak_in("SYN_RECV", &peers.server);
        received.assert_holders(&[&peers.server]);
        let remote = &received.samples()[0]["remote"];
        assert_eq!(remote, &sent.sample(&cookie)["local"], "{report}");
    }
}

/// Times in CLOSE_WAIT that the test gives them: finished ones, and those still open.
#[test]
fn dwell() {
    const TIMES: [u64; 5] = [100, 200, 300, 400, 1500];
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let live = watch(&lab, &["--dwell"]);
    let mut peers = Peers::new(&lab);
    let open = [(); 2].map(|()| peers.left_by_client());
    let mut bounds = Vec::new();
    for millis in TIMES {
        let connection = peers.left_by_client();
        thread::sleep(Duration::from_millis(millis));
        let before = boottime();
        peers.server.close(&connection.name);
        let after = boottime();
        let seen = observer
            .state(&connection.server, "CLOSE_WAIT")
            .expect("seen");
        bounds.push((before - seen.first, after - seen.before));
    }
    live.wait_for("the dwell", SOON, |line| line.value["event"] == "dwell");
    let lines = live.finish_whole();
    let last = lines
        .events("dwell")
        .filter(|line| line.value["pid"] == peers.server.pid);
    let line = last.last().expect("at the end");
    assert_eq!(line.value["state"], "CLOSE_WAIT", "{line}");
    assert_eq!(line.value["comm"], "server", "{line}");
    let finished = &line.value["finished"];
    assert_eq!(finished["count"], TIMES.len(), "{line}");
    assert_eq!(finished["not_timed"], 0, "{line}");
    // Two digits, and the observer's 10 ms.
    let is_about = |key: &str, index: usize| {
        let seconds = finished[key].as_f64().expect("a number");
        let (least, most) = bounds[index];
        let (least, most) = (least as f64 / 1e9, most as f64 / 1e9);
        assert!(
            (least * 0.99 - 0.001..most * 1.02 + 0.001).contains(&seconds),
            "{key}: {least} {seconds} {most}: {line}"
        );
    };
    is_about("p50_seconds", 2);
    is_about("p90_seconds", 4);
    is_about("p99_seconds", 4);
    is_about("max_seconds", 4);
    let still = &line.value["open"];
    assert_eq!(still["count"], open.len(), "{line}");
    assert_eq!(still["at_least"], 0, "{line}");
    let seen = observer.state(&open[0].server, "CLOSE_WAIT").expect("seen");
    let oldest = line.time("time") - realtime_of_boottime(seen.first);
    let max = still["max_seconds"].as_f64().expect("a number");
    assert!((max - oldest as f64 / 1e9).abs() < 0.25, "{oldest} {line}");
}

/// Runs in a shell what was printed.
fn run_clear(leak: Leak<'_>) {
    if Command::new("ss").arg("-V").output().is_err() {
        panic!("ss is missing, and with it what tcptrace prints cannot be tried: install iproute2");
    }
    for clear in leak.0.value["clear"].as_array().expect("a list") {
        let command = clear["command"].as_str().expect("a command");
        let output = Command::new("sh").args(["-c", command]).output();
        let output = output.expect("a shell");
        assert!(output.status.success(), "{command}: {output:?}");
    }
}

/// The commands that are printed end what they are said to end, and nothing else. At a server whose child
/// has leaked one socket more on the same port.
fn clear_at_a_server(count: usize) {
    let Some(lab) = Lab::new() else { return };
    let diag = lab.diag();
    let mut peers = Peers::new(&lab);
    let leaked: Vec<Connection> = (0..count).map(|_| peers.left_by_client()).collect();
    let open = peers.connect();
    let other = peers.left_by_client();
    let mut heir = peers.server.fork("heir");
    peers.server.close(&other.name);
    for connection in &leaked {
        heir.close(&connection.name);
    }
    thread::sleep(AGE);
    let run = lab.leaks_once(&["--older-than", OLD]);
    let report = run.lines.report();
    report.leak(&heir).assert_holders(&[&heir]);
    let leak = report.leak(&peers.server);
    assert_eq!(leak.number("sockets"), count as u64, "{leak}");
    let clear = leak.0.value["clear"].as_array().expect("a list");
    assert_eq!(clear.len(), 1, "{leak}");
    run_clear(leak);
    for connection in &leaked {
        assert_eq!(diag.row(&connection.server), None, "{leak}");
    }
    let others = u64::from(diag.row(&other.server).is_none());
    assert_eq!(clear[0]["others"], others, "{leak}");
    for cookie in [&open.server, &open.client, &peers.server.cookie("listener")] {
        assert!(diag.row(cookie).is_some(), "{leak}");
    }
    // More than a line can name go by their port, and then the other goes as well.
    assert_eq!(others, u64::from(count > 8), "{leak}");
}

#[test]
fn clear_few() {
    clear_at_a_server(3);
}

#[test]
fn clear_many() {
    clear_at_a_server(12);
}

/// At a client, by what it is connected to: here two servers, and a third that is nobody's business.
#[test]
fn clear_at_a_client() {
    let Some(lab) = Lab::new() else { return };
    let diag = lab.diag();
    let mut client = lab.fixture("client");
    let mut server = lab.fixture("server");
    let mut cookies = Vec::new();
    for index in 0..3 {
        let listener = format!("listener{index}");
        let address = server.listen(&listener, "127.0.0.1:0");
        for twin in ["a", "b"] {
            let name = format!("{twin}{index}");
            client.connect(&name, address);
            server.accept(&listener, &name);
            if index < 2 {
                server.close(&name);
            }
            cookies.push((client.cookie(&name), index < 2));
        }
    }
    thread::sleep(AGE);
    let run = lab.leaks_once(&["--older-than", OLD]);
    let report = run.lines.report();
    let leak = report.leak(&client);
    assert_eq!(leak.number("sockets"), 4, "{leak}");
    for clear in leak.0.value["clear"].as_array().expect("a list") {
        assert_eq!(clear["others"], 0, "{leak}");
    }
    run_clear(leak);
    for (cookie, is_cleared) in cookies {
        assert_eq!(diag.row(&cookie).is_none(), is_cleared, "{leak}");
    }
}

/// Without the right to load BPF: `--once` does not need it, and without `--once` it looks now and then,
/// and says so.
#[test]
fn without_bpf() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    thread::sleep(AGE);
    let inode = lab.netns.inode().to_string();
    let limited = |more: &[&str]| {
        let arguments = ["leaks", "--older-than", OLD, "--netns", &inode];
        Tcptrace::start_limited(&BPF, Some(&lab.netns), &[&arguments, more].concat())
    };
    let once = limited(&["--once"]).wait_end();
    assert_eq!(once.code, Some(0), "{}", once.stderr);
    let live = limited(&["--interval", "200ms"]);
    live.wait_for("the leak", SOON, |line| is_leak_of(line, &peers.server, 1));
    let another = peers.left_by_client();
    live.wait_for("another", SOON, |line| is_leak_of(line, &peers.server, 2));
    peers.server.close(&left.name);
    peers.server.close(&another.name);
    live.wait_for("the cure", SOON, is_empty_report);
    let live = live.finish();
    assert_eq!(live.code, Some(0), "{}", live.stderr);
    assert!(live.stderr.contains("not traced"), "{}", live.stderr);
    assert!(
        !live.stderr.contains("tcptrace: tracing"),
        "{}",
        live.stderr
    );
    for lines in [&once.lines, &live.lines] {
        for report in lines.reports() {
            assert_eq!(report.end.value["traced"], false, "{report}");
            for leak in &report.leaks {
                leak.assert_holders(&[&peers.server]);
                assert_eq!(leak.0.value["oldest_at_least"], true, "{leak}");
            }
        }
    }
    let _ = once.lines.report().leak(&peers.server).sample(&left.server);
    // Nothing to complain about: it was not asked to trace.
    assert!(!once.stderr.contains("not traced"), "{}", once.stderr);
}

/// Escape sequences, line ends, bytes that are not UTF-8, marks that turn the direction of writing.
const HOSTILE: &[u8] = b"\x1b[2J\n\r\t\xff\x9b31m\xe2\x80\xae\xc2\x9b2J\"\\";

#[test]
fn hostile_names() {
    let Some(lab) = Lab::new() else { return };
    let client = lab.fixture("client");
    let mut server = lab.fixture_with("server", &[OsStr::from_bytes(HOSTILE)]);
    let address = server.listen("listener", "127.0.0.1:0");
    // 15 bytes are a name.
    let comm: String = HOSTILE[..15]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    server.ask(&format!("rename {comm}"));
    let mut client = client;
    client.connect("c", address);
    server.accept("listener", "c");
    client.close("c");
    thread::sleep(AGE);
    let inode = lab.netns.inode().to_string();
    for format in ["text", "json"] {
        let path = temporary(&format!("hostile-{format}"));
        let file = fs::File::create(&path.0).expect("a file");
        let arguments = [
            "leaks",
            "--once",
            "--older-than",
            OLD,
            "--netns",
            &inode,
            "-o",
            format,
        ];
        let run = Tcptrace::run_to(&arguments, file);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let bytes = fs::read(&path.0).expect("the output");
        let text = String::from_utf8(bytes).expect("UTF-8");
        let dangerous = |char: char| {
            char != '\n' && char.is_control()
                || matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        };
        assert!(!text.contains(dangerous), "{format}: {text:?}");
        assert!(
            text.contains("\\x1b") || text.contains("\\u{1b}") || text.contains("\\u001b"),
            "{text}"
        );
        if format == "json" {
            for line in text.lines() {
                let value: Value = serde_json::from_str(line).expect("JSON");
                assert!(value["event"].is_string(), "{line}");
            }
            assert_eq!(text.lines().count(), 3, "{text}");
        } else {
            // Whatever it is called, it takes one line each.
            let with_pid = text
                .lines()
                .filter(|line| line.contains(&format!("(pid {})", server.pid)));
            assert_eq!(with_pid.count(), 1, "{text}");
            let command = text
                .lines()
                .filter(|line| line.trim_start().starts_with("command "));
            assert_eq!(command.count(), 1, "{text}");
        }
    }
}

/// A file that goes with the test.
struct Temporary(PathBuf);

fn temporary(name: &str) -> Temporary {
    Temporary(env::temp_dir().join(format!("tcptrace-tests-{}-{name}", process::id())))
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The parts that two looks of one trace have in common, whenever they were made.
fn essence(lines: &Lines) -> Value {
    let mut leaks: Vec<Value> = lines
        .report()
        .leaks
        .iter()
        .map(|leak| {
            let mut value = leak.0.value.clone();
            let object = value.as_object_mut().expect("an object");
            for key in ["time", "oldest_seconds", "per_minute", "full_in_seconds"] {
                object.remove(key);
            }
            for sample in value["samples"].as_array_mut().expect("a list") {
                let sample = sample.as_object_mut().expect("an object");
                sample.remove("age_seconds");
                sample.remove("idle_seconds");
            }
            value
        })
        .collect();
    leaks.sort_by_key(|leak| (leak["pid"].as_u64(), leak["state"].to_string()));
    leaks.into()
}

/// When each listed socket came into its state, nanoseconds since 1970.
fn beginnings(lines: &Lines) -> Vec<(String, i64)> {
    let mut all = Vec::new();
    for leak in &lines.report().leaks {
        for sample in leak.samples() {
            let age = sample["age_seconds"].as_f64().unwrap_or(0.0);
            let cookie = sample["socket"].as_str().expect("a cookie").to_owned();
            all.push((cookie, leak.0.time("time") - (age * 1e9) as i64));
        }
    }
    all.sort_unstable();
    all
}

fn record(netns: &Netns, to: &str) -> Tcptrace {
    let inode = netns.inode().to_string();
    Tcptrace::start_plain(&["record", "--interval", "1s", to, "--netns", &inode])
}

/// The same leaks from two recordings, one of them through a pipe, as live.
#[test]
fn recordings() {
    let Some(lab) = Lab::new() else { return };
    let recording = temporary("recording");
    let before = {
        let mut peers = Peers::named(
            &lab,
            "before",
            "earlier",
            "127.0.0.1:0",
            [127, 0, 0, 1].into(),
        );
        peers.left_by_client();
        peers
    };
    let file = record(&lab.netns, recording.0.to_str().expect("a plain path"));
    let pipe = record(&lab.netns, "-");
    let live = watch(&lab, &[]);
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    peers.server.ask(&format!("read {}", left.name));
    let over = peers.left_by_client();
    peers.server.ask(&format!("shutdown {}", over.name));
    let shared = peers.left_by_client();
    let heir = peers.server.fork("heir");
    let cured = peers.left_by_client();
    let address = peers.address;
    peers.client.connect("waiting", address);
    peers.client.close("waiting");
    thread::sleep(Duration::from_secs(3));
    peers.server.close(&cured.name);
    live.wait_for("the leaks", SOON, |line| {
        line.value["event"] == "report" && line.value["sockets"] == 5
    });
    thread::sleep(Duration::from_secs(3));
    let live = live.finish_whole();
    let (file, pipe) = (file.finish(), pipe.finish());
    assert_eq!(
        (file.code, pipe.code),
        (Some(0), Some(0)),
        "{}",
        file.stderr
    );
    let piped = temporary("piped");
    let text: String = pipe
        .lines
        .0
        .iter()
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(&piped.0, text).expect("room");
    drop((before, heir, shared));

    for path in [&recording.0, &piped.0] {
        let path = path.to_str().expect("a plain path");
        let run = Tcptrace::run(&["leaks", "--older-than", OLD, "-o", "json", "--from", path]);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let (replayed, seen) = (essence(&run.lines), essence(&live));
        assert_eq!(Seen(&replayed), Seen(&seen), "{}\n{live}", run.lines);
        let (replayed, seen) = (beginnings(&run.lines), beginnings(&live));
        assert_eq!(replayed.len(), 5, "{}", run.lines);
        for (replayed, seen) in replayed.iter().zip(&seen) {
            assert_eq!(replayed.0, seen.0);
            assert!(
                (replayed.1 - seen.1).abs() < 20_000_000,
                "{}\n{live}",
                run.lines
            );
        }
        let found = run.lines.report().number("sockets");
        assert_eq!(found, 5, "{}", run.lines);
        let code =
            Tcptrace::run(&["leaks", "--exit-code", "--older-than", OLD, "--from", path]).code;
        assert_eq!(code, Some(1));
    }
    let input = Tcptrace::run(&["leaks", "--from", "/nowhere"]);
    assert_eq!(input.code, Some(2), "{}", input.stderr);
}

/// As a person reads it.
#[test]
fn text() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let left = peers.left_by_client();
    peers.server.ask(&format!("read {}", left.name));
    let unread = peers.connect();
    peers.client.ask(&format!("write {} 1234", unread.name));
    peers.client.close(&unread.name);
    thread::sleep(AGE);
    let inode = lab.netns.inode().to_string();
    let run = Tcptrace::run(&["leaks", "--once", "--older-than", OLD, "--netns", &inode]);
    let text: Vec<&str> = run
        .lines
        .0
        .iter()
        .map(|line| line.value.as_str().unwrap_or("?"))
        .collect();
    let text = text.join("\n");
    let pid = peers.server.pid;
    for part in [
        "UTC  CLOSE_WAIT for longer than 0.5 s: 2 sockets of 1 process".to_owned(),
        format!("server (pid {pid}) has read everything and never closed 1 socket; oldest >= "),
        "has not read the end of file of 1 socket".to_owned(),
        "1,234 bytes".to_owned(),
        format!("port {} (2)", peers.address.port()),
        "127.0.0.1 (2)".to_owned(),
        format!("{} > {}", left.pair.remote, left.pair.local),
        "ss -K state close-wait".to_owned(),
    ] {
        assert!(text.contains(&part), "{part:?} in:\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "{text:?}");
}
