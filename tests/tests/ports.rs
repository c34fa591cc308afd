//! Local ports that have run out, told apart from a connection that is refused.

use std::time::Duration;

use tests::{Lab, Line, Peers};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn exhaustion_is_recognised_and_attributed() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    // After the server's port was chosen.
    lab.netns.set("ipv4/ip_local_port_range", "50000 50003");
    let tcptrace = lab.tcptrace(&["stream"]);

    let mut connected = 0;
    let answer = loop {
        let answer = peers
            .client
            .attempt(&format!("connect c{connected} {}", peers.address));
        if answer.get("error").is_some() {
            break answer;
        }
        connected += 1;
    };
    assert_eq!(answer["error"], "EADDRNOTAVAIL");
    assert_eq!(connected, 4);
    // A refused one has had a port.
    peers.server.close("listener");
    let mut other = lab.fixture("other");
    let answer = other.attempt("connect c 127.0.0.2:1");
    assert_eq!(answer["error"], "ECONNREFUSED");
    let refused = |line: &Line| line.value["error"] == "ECONNREFUSED";
    tcptrace.wait_for("the refused connect", SOON, refused);

    let lines = tcptrace.finish_whole();
    let failed: Vec<_> = lines
        .events("transition")
        .filter(|line| line.change() == "SYN_SENT > CLOSE")
        .collect();
    assert_eq!(failed.len(), 2, "{lines}");
    assert_eq!(failed[0].value["error"], "EADDRNOTAVAIL", "{lines}");
    assert_eq!(failed[0].pair().local.port(), 0, "{lines}");
    assert_eq!(failed[0].pair().remote, peers.address, "{lines}");
    failed[0].assert_owner(&peers.client, "connect");
    assert_eq!(failed[1].value["error"], "ECONNREFUSED", "{lines}");
    assert_ne!(failed[1].pair().local.port(), 0, "{lines}");
    failed[1].assert_owner(&other, "connect");
}

/// TIME_WAIT is what usually eats the ports up.
#[test]
fn exhaustion_by_time_wait() {
    let Some(lab) = Lab::new() else { return };
    // Not even loopback reuses.
    lab.netns.set("ipv4/tcp_tw_reuse", "0");
    let mut peers = Peers::new(&lab);
    lab.netns.set("ipv4/ip_local_port_range", "50000 50001");
    let tcptrace = lab.tcptrace(&["stream"]);
    peers.closed_by_client();
    peers.closed_by_client();
    let answer = peers
        .client
        .attempt(&format!("connect c {}", peers.address));
    assert_eq!(answer["error"], "EADDRNOTAVAIL");
    let out_of_ports = |line: &Line| line.value["error"] == "EADDRNOTAVAIL";
    tcptrace.wait_for("the failed connect", SOON, out_of_ports);
    let lines = tcptrace.finish_whole();
    let failed = lines
        .0
        .iter()
        .find(|line| out_of_ports(line))
        .expect("waited for");
    failed.assert_owner(&peers.client, "connect");
    assert_eq!(
        lines.0.iter().filter(|line| out_of_ports(line)).count(),
        1,
        "{lines}"
    );
}

/// A socket that connects again still shows the port of the connection before, and its error.
#[test]
fn exhaustion_of_a_socket_that_connects_again() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let tcptrace = lab.tcptrace(&["stream"]);
    let again = peers.connect();
    peers.server.ask(&format!("reset {}", again.name));
    tcptrace.wait_state(&again.client, "CLOSE", SOON);
    peers.client.ask(&format!("disconnect {}", again.name));
    // One port, and another connection has it.
    lab.netns.set("ipv4/ip_local_port_range", "50000 50000");
    let _other = peers.connect();
    let answer = peers
        .client
        .attempt(&format!("connect {} {}", again.name, peers.address));
    assert_eq!(answer["error"], "EADDRNOTAVAIL");
    let failed =
        |line: &Line| line.is_transition(&again.client) && line.change() == "SYN_SENT > CLOSE";
    tcptrace.wait_for("the failed connect", SOON, failed);

    let lines = tcptrace.finish_whole();
    let of = lines.of(&again.client);
    let [.., first, second] = of.as_slice() else {
        panic!("{lines}")
    };
    assert_eq!(first.change(), "CLOSE > SYN_SENT", "{lines}");
    assert_eq!(second.change(), "SYN_SENT > CLOSE", "{lines}");
    assert_eq!(second.value["error"], "EADDRNOTAVAIL", "{lines}");
    for line in [first, second] {
        assert_eq!(line.pair().local.port(), 0, "{line}");
        line.assert_owner(&peers.client, "connect");
    }
}
