//! Why a socket is left open: every cause, at both ends, over IPv4, IPv6, and IPv4 on an IPv6 socket.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
    time::{Duration, Instant},
};

use tests::{Diag, Fixture, Lab, Leak, Line, Lines, Peers, Tcptrace, wait_until};

const SOON: Duration = Duration::from_secs(20);
const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Which end is left open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Forgets {
    Client,
    Server,
}

fn wait_state(diag: &Diag, cookie: &str, state: &str) {
    wait_until(state, SOON, || {
        diag.row(cookie).filter(|row| row.state == state)
    });
}

fn wait_unlisted(diag: &Diag, cookie: &str) {
    let gone = || diag.row(cookie).is_none().then_some(());
    wait_until("the kernel does not list it", SOON, gone);
}

/// The one descriptor listed must be one of this socket.
fn assert_fd(leak: Leak<'_>, cookie: &str, process: &Fixture, inode: Option<u32>) {
    let sample = leak.sample(cookie);
    let fds = sample["fds"].as_array().expect("a list");
    assert_eq!(fds.len(), 1, "{leak}");
    assert_eq!(fds[0]["pid"], process.pid, "{leak}");
    let path = format!("/proc/{}/fd/{}", process.pid, fds[0]["fd"]);
    let link = fs::read_link(&path).expect("an open descriptor");
    let link = link.to_str().expect("a plain name");
    match inode {
        Some(inode) => assert_eq!(link, format!("socket:[{inode}]"), "{leak}"),
        None => assert!(link.starts_with("socket:["), "{link}: {leak}"),
    }
}

/// Seven sockets of one process, left open in seven ways.
fn every_cause(listen: &str, address: IpAddr, forgets: Forgets) {
    const AGE: Duration = Duration::from_millis(1300);
    let Some(lab) = Lab::new() else { return };
    let diag = lab.diag();
    let mut peers = Peers::over(&lab, listen, address);
    let connections = [(); 7].map(|()| peers.connect());
    let [drained, behind, end, data, blocked, finished, reset] = &connections;
    let cookie = |connection: &tests::Connection| match forgets {
        Forgets::Client => connection.client.clone(),
        Forgets::Server => connection.server.clone(),
    };
    let (forgetful, other) = match forgets {
        Forgets::Client => (&mut peers.client, &mut peers.server),
        Forgets::Server => (&mut peers.server, &mut peers.client),
    };

    other.close(&drained.name);
    let read = forgetful.ask(&format!("read {}", drained.name));
    assert_eq!(read["bytes"], 0);
    // The FIN comes with the last data, and is consumed with it: the end of file was never seen.
    other.ask(&format!("write-more {} 5", behind.name));
    other.close(&behind.name);
    wait_state(&diag, &cookie(behind), "CLOSE_WAIT");
    let read = forgetful.ask(&format!("read {}", behind.name));
    assert_eq!(read["bytes"], 5);
    other.close(&end.name);
    other.ask(&format!("write {} 1000", data.name));
    other.close(&data.name);
    other.ask(&format!("shutdown {}", blocked.name));
    wait_state(&diag, &cookie(blocked), "CLOSE_WAIT");
    forgetful.ask(&format!("fill {}", blocked.name));
    other.close(&finished.name);
    wait_state(&diag, &cookie(finished), "CLOSE_WAIT");
    forgetful.ask(&format!("shutdown {}", finished.name));
    wait_unlisted(&diag, &cookie(finished));
    other.ask(&format!("reset {}", reset.name));
    wait_unlisted(&diag, &cookie(reset));
    thread::sleep(AGE);

    // The peer of the blocked one acknowledges probes: of that it is known only that it was there a second before.
    let run = lab.leaks_once(&["--older-than", "900ms"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.lines.report();
    assert_eq!(report.number("leaks"), 2, "{report}");
    assert_eq!(report.number("sockets"), 7, "{report}");
    assert_eq!(report.number("half_closed"), 0, "{report}");
    let leak = report.leak(forgetful);
    leak.assert_causes(&[("drained", 2), ("eof_unread", 2), ("write_blocked", 1)]);
    leak.assert_holders(&[forgetful]);
    assert_eq!(leak.0.value["via"], "holder", "{leak}");
    assert_eq!(leak.number("unread_bytes"), 1000, "{leak}");
    for (connection, cause, unread) in [
        (drained, "drained", 0),
        (behind, "drained", 0),
        (end, "eof_unread", 1),
        (data, "eof_unread", 1001),
        (blocked, "write_blocked", 1),
    ] {
        let cookie = cookie(connection);
        let sample = leak.sample(&cookie);
        let row = diag.row(&cookie).expect("it is still there");
        assert_eq!(sample["cause"], cause, "{leak}");
        if connection.name != blocked.name {
            assert_eq!(sample["recv_queue"], unread, "{leak}");
            assert_eq!(sample["recv_queue"], row.recv_queue, "{leak}");
        }
        assert_eq!(sample["send_queue"], row.send_queue, "{leak}");
        assert_eq!(sample["netns"], lab.netns.inode(), "{leak}");
        let pair = Line {
            value: sample.clone(),
            arrived: 0,
        }
        .pair();
        assert_eq!((pair.local, pair.remote), (row.local, row.remote), "{leak}");
        assert_eq!(pair.local.ip(), address, "{leak}");
        assert_fd(leak, &cookie, forgetful, Some(row.inode));
    }

    let over = report.leak_in("CLOSE", forgetful);
    over.assert_causes(&[("finished", 2)]);
    over.assert_holders(&[forgetful]);
    for connection in [finished, reset] {
        let cookie = cookie(connection);
        let sample = over.sample(&cookie);
        // When they ended, no look can know; how long nothing has come, it can.
        assert!(sample["age_seconds"].is_null(), "{over}");
        let idle = sample["idle_seconds"].as_f64().expect("a number");
        assert!((1.2..30.0).contains(&idle), "{over}");
        let expected = match forgets {
            Forgets::Client => connection.pair,
            Forgets::Server => connection.pair.reversed(),
        };
        let pair = Line {
            value: sample.clone(),
            arrived: 0,
        }
        .pair();
        assert_eq!(pair, expected, "{over}");
        assert_fd(over, &cookie, forgetful, None);
    }
    // Nothing is in a table that ss could clear.
    assert_eq!(over.0.value["clear"], serde_json::json!([]), "{over}");
}

#[test]
fn at_a_server() {
    every_cause("127.0.0.1:0", V4, Forgets::Server);
}

#[test]
fn at_a_client() {
    every_cause("127.0.0.1:0", V4, Forgets::Client);
}

#[test]
fn at_a_server_over_ipv6() {
    every_cause("[::1]:0", V6, Forgets::Server);
}

#[test]
fn at_a_client_over_ipv6() {
    every_cause("[::1]:0", V6, Forgets::Client);
}

/// The server has IPv6 sockets for it, the client has IPv4 ones; both are shown as IPv4.
#[test]
fn at_a_server_over_ipv4_on_ipv6() {
    every_cause("[::]:0", V4, Forgets::Server);
}

#[test]
fn not_accepted() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    for name in ["a", "b"] {
        peers.client.connect(name, address);
        peers.client.close(name);
    }
    thread::sleep(Duration::from_millis(600));
    let run = lab.leaks_once(&["--older-than", "500ms"]);
    let report = run.lines.report();
    let leak = report.only();
    leak.assert_causes(&[("not_accepted", 2)]);
    leak.assert_holders(&[&peers.server]);
    assert_eq!(leak.0.value["state"], "CLOSE_WAIT", "{leak}");
    for sample in leak.samples() {
        // The listener's descriptor is not one of the connection.
        assert_eq!(sample["fds"], serde_json::json!([]), "{leak}");
    }
}

/// At which of them a connection waits, the kernel does not tell: it may be any.
#[test]
fn not_accepted_by_two_listeners_of_one_port() {
    let Some(lab) = Lab::new() else { return };
    let mut one = lab.fixture("one");
    let mut two = lab.fixture("two");
    let mut stranger = lab.fixture("stranger");
    let mut client = lab.fixture("client");
    let answer = one.ask("listen-shared listener 127.0.0.1:0 64");
    let address: std::net::SocketAddr = answer["local"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .expect("an address");
    two.ask(&format!("listen-shared listener {address} 64"));
    stranger.listen("listener", "127.0.0.1:0");
    for name in ["a", "b", "c"] {
        client.connect(name, address);
        client.close(name);
    }
    thread::sleep(Duration::from_millis(600));
    let run = lab.leaks_once(&["--older-than", "500ms"]);
    let report = run.lines.report();
    let leak = report.only();
    leak.assert_causes(&[("not_accepted", 3)]);
    leak.assert_holders(&[&one, &two]);
}

/// Traced, it is known who accepts; as long as nobody has, it is the listener.
#[test]
fn not_accepted_yet() {
    let Some(lab) = Lab::new() else { return };
    let leaks = lab.tcptrace(&["leaks", "--older-than", "300ms", "--interval", "200ms"]);
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    peers.client.connect("c", address);
    peers.client.close("c");
    let cause = |cause: &'static str| {
        move |line: &Line| line.value["event"] == "leak" && line.value["causes"][cause] == 1
    };
    leaks.wait_for("not accepted", SOON, cause("not_accepted"));
    peers.server.accept("listener", "c");
    leaks.wait_for("accepted", SOON, cause("eof_unread"));
    let read = peers.server.ask("read c");
    assert_eq!(read["bytes"], 0);
    leaks.wait_for("read", SOON, cause("drained"));
    let lines = leaks.finish_whole();
    for line in lines.events("leak") {
        Leak(line).assert_holders(&[&peers.server]);
    }
}

fn assert_no_leak(lines: &Lines) {
    for report in lines.reports() {
        report.assert_none();
    }
}

/// One that sends all it has to say, shuts its sending side, and reads a long answer.
#[test]
fn half_closed_and_answered() {
    let Some(lab) = Lab::new() else { return };
    let live = lab.tcptrace(&["leaks", "--older-than", "1s", "--interval", "200ms"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let name = &connection.name;
    peers.client.ask(&format!("write {name} 100"));
    peers.client.ask(&format!("shutdown {name}"));
    peers.server.ask(&format!("read {name}"));
    let answer = |client: &mut Fixture,
                  server: &mut Fixture,
                  name: &str,
                  until: &mut dyn FnMut() -> bool| {
        while !until() {
            server.ask(&format!("write {name} 1000"));
            client.ask(&format!("read {name}"));
            thread::sleep(Duration::from_millis(100));
        }
    };
    let start = Instant::now();
    answer(&mut peers.client, &mut peers.server, name, &mut || {
        start.elapsed() > Duration::from_millis(1500)
    });
    let once = thread::scope(|scope| {
        let once = scope.spawn(|| lab.leaks_once(&["--older-than", "1s"]));
        answer(&mut peers.client, &mut peers.server, name, &mut || {
            once.is_finished()
        });
        once.join().expect("no panic")
    });
    assert_no_leak(&once.lines);
    assert_eq!(once.lines.reports().len(), 1, "{}", once.stderr);
    assert_no_leak(&live.lines());
    // Another socket's leak makes a report, which tells of this one as well.
    let connection_left = peers.left_by_client();
    let other = |line: &Line| line.value["event"] == "report" && line.value["leaks"] == 1;
    let lines = thread::scope(|scope| {
        let report = scope.spawn(|| live.wait_for("the other's leak", SOON, other));
        answer(&mut peers.client, &mut peers.server, name, &mut || {
            report.is_finished()
        });
        report.join().expect("no panic")
    });
    let report = lines.report();
    assert_eq!(report.number("half_closed"), 1, "{report}");
    let _ = report.only().sample(&connection_left.server);
    // It answers no more: now it is a leak.
    live.wait_for("the leak", SOON, |line| {
        line.value["event"] == "leak" && line.value["sockets"] == 2
    });
    let lines = live.finish_whole();
    let report = lines.report();
    assert_eq!(report.number("half_closed"), 0, "{report}");
    let leak = report.leak(&peers.server);
    let age = leak.sample(&connection.server)["age_seconds"]
        .as_f64()
        .expect("a number");
    // Since the peer's FIN, not since the last answer.
    assert!(age > 3.0, "{leak}");
}

/// The reader takes little now and then. Between two looks the send queue stands still, and yet
/// it is an answer.
#[test]
fn half_closed_with_a_slow_reader() {
    let Some(lab) = Lab::new() else { return };
    let diag = lab.diag();
    let live = lab.tcptrace(&["leaks", "--older-than", "3s", "--interval", "200ms"]);
    let Peers {
        mut client,
        mut server,
        address,
        ..
    } = Peers::new(&lab);
    client.ask("bind c 127.0.0.1:0");
    client.ask("rcvbuf c 4096");
    client.connect("c", address);
    server.accept("listener", "c");
    let cookie = server.cookie("c");
    client.ask("shutdown c");
    server.ask("fill c");
    let mut still = 0;
    let mut read_for = |duration: Duration| {
        let start = Instant::now();
        let mut before = None;
        let mut last_read = Instant::now();
        while start.elapsed() < duration {
            if last_read.elapsed() > Duration::from_millis(1500) {
                client.ask("read c");
                last_read = Instant::now();
            }
            thread::sleep(Duration::from_millis(500));
            let now = diag.row(&cookie).expect("open").send_queue;
            assert!(now > 0, "there is more to read");
            still += u32::from(before == Some(now));
            before = Some(now);
        }
    };
    read_for(Duration::from_secs(6));
    let once = thread::scope(|scope| {
        let once = scope.spawn(|| lab.leaks_once(&["--older-than", "3s"]));
        read_for(Duration::from_secs(3));
        once.join().expect("no panic")
    });
    assert!(still > 3, "a send queue that stands still was wanted");
    assert_no_leak(&once.lines);
    assert_no_leak(&live.lines());
    // It reads no more.
    live.wait_for("the leak", SOON, |line| {
        line.value["event"] == "leak" && line.value["causes"]["write_blocked"] == 1
    });
    let lines = live.finish_whole();
    lines.report().leak(&server).assert_holders(&[&server]);
}

/// Whether a send queue moves, one look cannot tell.
#[test]
fn one_look_does_not_tell_why_the_send_queue_is_full() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client.ask(&format!("shutdown {}", connection.name));
    peers.server.ask(&format!("fill {}", connection.name));
    // The peer acknowledges probes, 0.2, 0.6, 1.4, 3.0, 6.2 s later. From before the trace only that is known.
    thread::sleep(Duration::from_millis(4800));
    let inode = lab.netns.inode().to_string();
    let leaks = Tcptrace::start(&[
        "leaks",
        "--older-than",
        "1s",
        "--interval",
        "300ms",
        "--netns",
        &inode,
    ]);
    leaks.wait_for("the second look", SOON, |line| {
        line.value["causes"]["write_blocked"] == 1
    });
    let lines = leaks.finish_whole();
    let reports = lines.reports();
    reports[0]
        .leak(&peers.server)
        .assert_causes(&[("unknown", 1)]);
    let last = lines.report().leak(&peers.server);
    last.assert_causes(&[("write_blocked", 1)]);
}
