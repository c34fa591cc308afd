//! Connections that nobody asked for, more than can be read: where the filter is one that the probes apply, they cost
//! a trace no record, and take none from it.

use std::{process::Command, time::Duration};

use tests::{Connection, Lab, Line, Netns, Peers, Tcptrace, built};

const SOON: Duration = Duration::from_secs(20);
/// Room for 34 records: the smallest buffer there is.
const TINY: [&str; 2] = ["--buffer", "4K"];
/// Six transitions each: the tiny buffer has room for six connections.
const STORM: u32 = 2000;
const STORM_PORT: u16 = 7000;
/// Below the ports that `connect()` chooses by itself (32768 and up, unless somebody has set it).
const SERVICE: &str = "127.0.0.1:443";

/// Opens and resets connections to [`STORM_PORT`] as fast as the kernel makes them.
fn storm(netns: &Netns) {
    let output = netns.inside(|| {
        Command::new(built("churn"))
            .args(["run", "threads=1", "close=rst", "ip=4"])
            .arg(format!("connections={STORM}"))
            .arg(format!("port={STORM_PORT}"))
            .output()
    });
    let output = output.expect("`cargo test` builds it");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// Records that the trace has read.
fn records(end: &Line) -> u64 {
    end.value["records"].as_u64().expect("a number")
}

/// Runs a storm while `trace` is not given the CPU, with a connection of `peers` before and one after it. Returns
/// that connection, and how many records there were in all.
fn through(trace: Tcptrace, peers: &mut Peers, storm: impl FnOnce()) -> (Connection, u64) {
    trace.pause();
    let made = peers.connect();
    storm();
    peers.client.ask(&format!("reset {}", made.name));
    peers.server.close(&made.name);
    trace.resume();
    trace.wait_state(&made.client, "CLOSE", SOON);
    trace.wait_state(&made.server, "CLOSE", SOON);
    let lines = trace.finish_whole();
    let changes = |cookie: &str| -> Vec<String> {
        lines.of(cookie).iter().map(|line| line.change()).collect()
    };
    assert_eq!(
        changes(&made.client),
        [
            "CLOSE > SYN_SENT",
            "SYN_SENT > ESTABLISHED",
            "ESTABLISHED > CLOSE"
        ]
    );
    assert_eq!(
        changes(&made.server),
        [
            "LISTEN > SYN_RECV",
            "SYN_RECV > ESTABLISHED",
            "ESTABLISHED > CLOSE"
        ]
    );
    (made, records(lines.end()))
}

/// Both sides of a connection, and `accept()`.
const CONNECTION: u64 = 7;
/// A listener's beginning and end: it may own connections of any address, so no filter but that of the namespace
/// leaves it out.
const LISTENER: u64 = 2;

#[test]
fn a_storm_in_another_namespace_costs_no_record() {
    let (Some(lab), Some(next_door)) = (Lab::new(), Lab::new()) else {
        return;
    };
    let mut peers = Peers::new(&lab);
    let trace = lab.tcptrace(&[&["stream"], &TINY[..]].concat());
    let (_, records) = through(trace, &mut peers, || storm(&next_door.netns));
    assert_eq!(records, CONNECTION);
}

/// One of several values is as good as one alone.
#[test]
fn a_storm_outside_of_several_namespaces_costs_no_record() {
    let (Some(lab), Some(second), Some(next_door)) = (Lab::new(), Lab::new(), Lab::new()) else {
        return;
    };
    let mut peers = Peers::new(&lab);
    let second = second.netns.inode().to_string();
    let trace = lab.tcptrace(&[&["stream", "--netns", &second], &TINY[..]].concat());
    let (_, records) = through(trace, &mut peers, || storm(&next_door.netns));
    assert_eq!(records, CONNECTION);
}

/// Where a child shows its own address from its first change on (6.16 and later), nothing of the storm is recorded
/// but its listener.
#[test]
fn a_storm_on_other_ports_costs_no_record() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::over(&lab, SERVICE, "127.0.0.1".parse().expect("an address"));
    for filters in [
        &["--port", "443"][..],
        &["--port", "80", "--port", "443"],
        // Another trace of the same port: the other side is not asked for.
        &["--addr", "127.0.0.1/32", "--port", "443"],
    ] {
        let trace = lab.tcptrace(&[&["stream"], filters, &TINY].concat());
        let (_, records) = through(trace, &mut peers, || storm(&lab.netns));
        assert_eq!(records, CONNECTION + LISTENER, "{filters:?}");
    }
}

/// A port that `connect()` may choose is not known at its first change: those are recorded, and nothing is missed.
#[test]
fn a_local_port_that_connect_may_choose_is_not_missed() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/ip_local_port_range", "2400 2450");
    let mut peers = Peers::over(
        &lab,
        "127.0.0.1:2390",
        "127.0.0.1".parse().expect("an address"),
    );
    let ports: Vec<String> = (2400..=2450).map(|port: u16| port.to_string()).collect();
    // Eight values at most are compared by the probes.
    let filters: Vec<&str> = ports[..8]
        .iter()
        .flat_map(|port| ["--lport", port])
        .collect();
    let trace = lab.tcptrace(&[&["stream"], &filters[..]].concat());
    let mut wanted = Vec::new();
    for _ in 0..40 {
        let made = peers.connect();
        if ports[..8].contains(&made.pair.local.port().to_string()) {
            wanted.push(made.client.clone());
        }
        peers.client.ask(&format!("reset {}", made.name));
        peers.server.close(&made.name);
    }
    assert!(!wanted.is_empty());
    for client in &wanted {
        trace.wait_state(client, "CLOSE", SOON);
    }
    let lines = trace.finish_whole();
    for client in &wanted {
        let changes: Vec<String> = lines.of(client).iter().map(|line| line.change()).collect();
        assert_eq!(
            changes,
            [
                "CLOSE > SYN_SENT",
                "SYN_SENT > ESTABLISHED",
                "ESTABLISHED > CLOSE"
            ]
        );
    }
}
