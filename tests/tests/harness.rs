//! The tools of the other tests, held against the kernel alone: what they make really happens, and
//! what they observe is so.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{Flag, HERTZ, Lab, Peers, Row, built, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// Waits until a socket is in TIME_WAIT, as `sock_diag` has it.
fn time_wait(lab: &Lab, cookie: &str) -> Row {
    let diag = lab.diag();
    wait_until("TIME_WAIT", SOON, || {
        diag.row(cookie)
            .filter(|row| row.state == "TIME_WAIT" && row.timewait)
    })
}

fn wait_gone(lab: &Lab, cookie: &str) {
    let diag = lab.diag();
    wait_until("gone from sock_diag", SOON, || {
        diag.row(cookie).is_none().then_some(())
    });
}

#[test]
fn fixtures_have_their_names_and_pids() {
    let Some(lab) = Lab::new() else { return };
    let mut parent = lab.fixture("parent");
    let child = parent.fork("child");
    for fixture in [&parent, &child] {
        let comm = fs::read_to_string(format!("/proc/{}/comm", fixture.pid)).unwrap();
        assert_eq!(comm.trim_end(), fixture.comm);
    }
    assert_ne!(parent.pid, child.pid);
    for pid in lab.decoys.pids() {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        assert_eq!(comm.trim_end(), "decoy");
    }
    child.kill();
    parent.exit(0);
}

#[test]
fn observer_sees_each_state() {
    let Some(lab) = Lab::new() else { return };
    assert!([100, 250, 300, 1000].contains(&*HERTZ), "HZ = {}", *HERTZ);
    let observer = lab.observe();
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    // Long enough to be seen on a busy machine.
    let a_while = Duration::from_millis(200);
    thread::sleep(a_while);
    peers.client.close(&connection.name);
    thread::sleep(a_while);
    peers.server.close(&connection.name);
    thread::sleep(a_while);

    // A FIN is acknowledged late at times; a close is over before the next look.
    let fleeting = ["FIN_WAIT1", "LAST_ACK"];
    let states = |cookie: &str| -> Vec<_> {
        let states = observer
            .of(cookie)
            .into_iter()
            .map(|sighting| sighting.state);
        states.filter(|state| !fleeting.contains(state)).collect()
    };
    assert_eq!(
        states(&connection.client),
        ["ESTABLISHED", "FIN_WAIT2", "TIME_WAIT"]
    );
    assert_eq!(states(&connection.server), ["ESTABLISHED", "CLOSE_WAIT"]);
    let close_wait = observer.state(&connection.server, "CLOSE_WAIT").unwrap();
    let time_wait = observer.state(&connection.client, "TIME_WAIT").unwrap();
    assert!(close_wait.gone > close_wait.last && time_wait.gone == 0);
    assert!(close_wait.before < close_wait.first && close_wait.first < time_wait.first);
    let left = (time_wait.expires - time_wait.first) as f64 / 1e9;
    assert!((59.0..=60.0).contains(&left), "{left} s left of 60");
}

#[test]
fn all_families_connect() {
    let Some(lab) = Lab::new() else { return };
    for (listen, connect) in [
        ("127.0.0.1:0", "127.0.0.1"),
        ("[::1]:0", "::1"),
        ("[::]:0", "::ffff:127.0.0.1"),
    ] {
        let mut peers = Peers::over(&lab, listen, connect.parse().unwrap());
        let connection = peers.connect();
        let row = lab.diag().row(&connection.client).expect("in the list");
        assert_eq!(row.state, "ESTABLISHED");
        assert_eq!(row.local.port(), connection.pair.local.port());
    }
}

#[test]
fn forged_reset_ends_time_wait() {
    let Some(lab) = Lab::new() else { return };
    let mut capture = lab.capture();
    let connection = Peers::new(&lab).closed_by_client();
    time_wait(&lab, &connection.client);
    capture.forge(connection.pair, Flag::Rst);
    wait_gone(&lab, &connection.client);
}

#[test]
fn forged_ack_arms_time_wait_again() {
    let Some(lab) = Lab::new() else { return };
    let mut capture = lab.capture();
    let connection = Peers::new(&lab).closed_by_client();
    time_wait(&lab, &connection.client);
    thread::sleep(Duration::from_secs(1));
    let before = time_wait(&lab, &connection.client).expires;
    capture.forge(connection.pair, Flag::Ack);
    let after = time_wait(&lab, &connection.client).expires;
    assert!(
        before < 59_200 && after > 59_800,
        "{before} ms left before, {after} ms after"
    );
}

#[test]
fn sock_destroy_ends_time_wait() {
    let Some(lab) = Lab::new() else { return };
    let connection = Peers::new(&lab).closed_by_client();
    let row = time_wait(&lab, &connection.client);
    lab.diag()
        .destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
    wait_gone(&lab, &connection.client);
}

#[test]
fn connect_reuses_time_wait() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let first = peers.closed_by_client();
    time_wait(&lab, &first.client);
    thread::sleep(Duration::from_millis(1200));
    let second = peers.connect_from(first.pair.local);
    assert_eq!(second.pair, first.pair);
    wait_gone(&lab, &first.client);
}

#[test]
fn peers_syn_reopens_time_wait() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let first = peers.closed_by_server();
    time_wait(&lab, &first.server);
    thread::sleep(Duration::from_millis(100));
    let second = peers.connect_from(first.pair.local);
    assert_eq!(second.pair, first.pair);
    wait_gone(&lab, &first.server);
}

#[test]
fn full_buckets_skip_time_wait() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/tcp_max_tw_buckets", "0");
    let before = lab.netns.counter("TCPTimeWaitOverflow");
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client.close(&connection.name);
    wait_gone(&lab, &connection.client);
    assert_eq!(lab.netns.counter("TCPTimeWaitOverflow"), before + 1);
}

#[test]
fn deaf_listener_makes_connect_time_out() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/tcp_syn_retries", "1");
    let mut peers = Peers::new(&lab);
    peers.server.ask("deaf listener");
    let answer = peers
        .client
        .attempt(&format!("connect c {}", peers.address));
    assert_eq!(answer["error"], "ETIMEDOUT");
}

#[test]
fn sockets_move_between_processes() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let mut other = lab.fixture("other");
    peers.client.send(&connection.name, &mut other);
    assert_eq!(other.cookie(&connection.name), connection.client);
    peers.client.exit(0);
    assert_eq!(
        lab.diag().row(&connection.client).unwrap().state,
        "ESTABLISHED"
    );
    other.close(&connection.name);
}

#[test]
fn simultaneous_close_is_possible() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let name = &connection.name;
    peers.client.ask(&format!("deaf {name}"));
    peers.server.ask(&format!("deaf {name}"));
    peers.client.ask(&format!("shutdown {name}"));
    peers.server.ask(&format!("shutdown {name}"));
    peers.server.ask(&format!("hear {name}"));
    let diag = lab.diag();
    wait_until("CLOSING", SOON, || {
        diag.row(&connection.server)
            .filter(|row| row.state == "CLOSING")
    });
    peers.client.ask(&format!("hear {name}"));
    time_wait(&lab, &connection.client);
    time_wait(&lab, &connection.server);
}

#[test]
fn orphans_end_without_time_wait() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/tcp_fin_timeout", "2");
    let observer = lab.observe();
    let mut peers = Peers::new(&lab);
    let orphan = peers.connect();
    peers.client.close(&orphan.name);
    let lingering = peers.connect();
    peers.client.ask(&format!("linger2 {} -1", lingering.name));
    peers.client.close(&lingering.name);
    wait_gone(&lab, &lingering.client);
    wait_gone(&lab, &orphan.client);
    for connection in [&orphan, &lingering] {
        assert_eq!(observer.state(&connection.client, "TIME_WAIT"), None);
    }
    thread::sleep(Duration::from_millis(200));
    let seen = observer
        .state(&orphan.client, "FIN_WAIT2")
        .expect("two seconds of it");
    assert!(
        (1.9..4.0).contains(&((seen.last - seen.first) as f64 / 1e9)),
        "{seen:?}"
    );
}

#[test]
fn unacknowledged_data_times_out() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let name = &connection.name;
    peers.server.ask(&format!("deaf {name}"));
    peers.client.ask(&format!("user-timeout {name} 500"));
    peers.client.ask(&format!("write {name} 1"));
    let answer = peers.client.attempt(&format!("read {name}"));
    assert_eq!(answer["error"], "ETIMEDOUT");
}

#[test]
fn closing_a_listener_resets_what_it_holds() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    peers.client.connect("c", address);
    peers.server.close("listener");
    assert_eq!(peers.client.attempt("read c")["error"], "ECONNRESET");
}

#[test]
fn local_ports_run_out() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/tcp_tw_reuse", "0");
    let mut peers = Peers::new(&lab);
    lab.netns.set("ipv4/ip_local_port_range", "50000 50001");
    peers.closed_by_client();
    peers.connect();
    let answer = peers
        .client
        .attempt(&format!("connect c {}", peers.address));
    assert_eq!(answer["error"], "EADDRNOTAVAIL");
}

#[test]
fn burst_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    let mut bursting = lab.fixture("bursting");
    bursting.listen("listener", "127.0.0.1:0");
    bursting.ask("burst listener 500");
    let left = lab.diag().rows();
    assert!(left.iter().all(|row| row.state == "LISTEN"), "{left:?}");
}

/// Whether a process is in the namespace with this inode number.
fn is_entered(inode: u64) -> bool {
    let name = format!("net:[{inode}]");
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let link = fs::read_link(entry.path().join("ns/net"));
        link.is_ok_and(|link| link.to_str() == Some(&name))
    })
}

#[test]
fn namespace_lasts_without_a_process() {
    let Some(mut lab) = Lab::new() else { return };
    let path = std::env::temp_dir().join(format!("tcptrace-tests-{}-lasts", std::process::id()));
    lab.netns.mount_at(&path);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    assert!(is_entered(lab.netns.inode()));
    for fixture in [&mut peers.client, &mut peers.server] {
        fixture.ask(&format!("setns /proc/{}/ns/net", std::process::id()));
    }
    assert!(!is_entered(lab.netns.inode()));
    assert_eq!(
        lab.diag().row(&connection.client).unwrap().state,
        "ESTABLISHED"
    );
    drop(lab);
    assert!(!path.exists());
}

#[test]
fn everyone_leaves_with_the_lab() {
    let Some(lab) = Lab::new() else { return };
    let inode = lab.netns.inode();
    let peers = Peers::new(&lab);
    assert!(is_entered(inode));
    drop(peers);
    drop(lab);
    assert!(!is_entered(inode));
}

/// What the generator of connections says of a run, and what the kernel has counted meanwhile: connections
/// opened and accepted.
fn churn(lab: &Lab, words: &str) -> (u64, [u64; 2]) {
    lab.netns.inside(|| {
        let opens = || {
            let text = fs::read_to_string("/proc/thread-self/net/snmp").expect("Linux has it");
            let tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
            let lines: Vec<Vec<&str>> = tcp.map(|line| line.split(' ').collect()).collect();
            ["ActiveOpens", "PassiveOpens"].map(|name| -> u64 {
                let column = lines[0].iter().position(|title| *title == name);
                lines[1][column.expect("a counter")]
                    .parse()
                    .expect("a number")
            })
        };
        let before = opens();
        let mut churn = Command::new(built("churn"));
        let output = churn.arg("run").args(words.split(' ')).output();
        let output = output.expect("`cargo test` builds it");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "churn {words}: {said}");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let after = opens();
        let connections = answer["connections"].as_u64().expect("a number");
        assert!(answer["per_second"].as_f64() > Some(0.0), "{answer}");
        (connections, [after[0] - before[0], after[1] - before[1]])
    })
}

#[test]
fn churn_makes_the_connections_it_counts() {
    let Some(lab) = Lab::new() else { return };
    let resting = || {
        lab.diag()
            .rows()
            .into_iter()
            .filter(|row| row.timewait)
            .count()
    };
    for (words, count, rest) in [
        ("threads=1 connections=300 close=rst ip=4 port=7000", 300, 0),
        (
            "threads=2 connections=200 close=rst ip=both port=7000",
            400,
            0,
        ),
        (
            "threads=1 connections=100 close=fin ip=4 port=7000",
            100,
            100,
        ),
        (
            "threads=1 connections=100 close=fin ip=6 port=7000",
            100,
            200,
        ),
    ] {
        assert_eq!(churn(&lab, words), (count, [count, count]), "{words}");
        wait_until(words, SOON, || (resting() == rest).then_some(()));
    }
    let (connections, counted) = churn(&lab, "threads=1 seconds=0.2 close=rst ip=4 port=7000");
    assert!(connections > 10, "{connections}");
    assert_eq!(counted, [connections, connections]);
    // Never before they are due; how much later is up to the machine.
    let paced = "threads=2 connections=200 rate=1000 close=rst ip=4 port=7000";
    let began = Instant::now();
    assert_eq!(churn(&lab, paced), (400, [400, 400]));
    assert!(began.elapsed() >= Duration::from_millis(398), "{paced}");
}

#[test]
fn churn_holds_sockets() {
    let Some(lab) = Lab::new() else { return };
    let mut held = lab.netns.inside(|| {
        let mut churn = Command::new(built("churn"));
        churn.args(["hold", "processes=3", "pairs=4"]);
        churn.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    });
    let held = held.as_mut().expect("`cargo test` builds it");
    let mut said = String::new();
    let out = held.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut said).expect("a line");
    let answer: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(answer, serde_json::json!({"processes": 3, "sockets": 24}));
    let of = |state: &str| {
        lab.diag()
            .rows()
            .iter()
            .filter(|row| row.state == state)
            .count()
    };
    wait_until("both ends of each", SOON, || {
        (of("CLOSE_WAIT") == 12 && of("FIN_WAIT2") == 12).then_some(())
    });
    drop(held.stdin.take());
    assert!(held.wait().expect("our own child").success());
    wait_until("none of them", SOON, || {
        (of("CLOSE_WAIT") == 0).then_some(())
    });
}
