//! Whose socket it is: processes that fork, hand over, die, or connect in a thread, with a decoy on
//! their CPU.

use std::time::Duration;

use tests::{Lab, PASSIVE_OPEN, Peers, Tcptrace};

const SOON: Duration = Duration::from_secs(20);
const ACTIVE_OPEN: &str = "CLOSE SYN_SENT ESTABLISHED";

/// Waits until the socket has been closed actively and the other side knows.
fn wait_fin_wait2(tcptrace: &Tcptrace, cookie: &str) {
    tcptrace.wait_state(cookie, "FIN_WAIT2", SOON);
}

#[test]
fn forked_child_closes() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let mut child = peers.client.fork("child");
    // The parent's close is not one for TCP.
    peers.client.close(&connection.name);
    child.close(&connection.name);
    wait_fin_wait2(&tcptrace, &connection.client);
    let lines = tcptrace.finish_whole();
    let path = lines.assert_path(
        &connection.client,
        &format!("{ACTIVE_OPEN} FIN_WAIT1 FIN_WAIT2"),
    );
    for line in &path[..2] {
        line.assert_owner(&peers.client, "connect");
    }
    path[2].assert_owner(&child, "close");
    path[3].assert_process(&child);
    lines.assert_owners_among(&[&peers.client, &peers.server, &child]);
}

#[test]
fn passed_socket_is_closed_by_its_receiver() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let mut receiver = lab.fixture("receiver");
    peers.server.send(&connection.name, &mut receiver);
    // The peer's FIN arrives while the server, which accepted, no longer has the socket.
    peers.client.close(&connection.name);
    tcptrace.wait_state(&connection.server, "CLOSE_WAIT", SOON);
    receiver.close(&connection.name);
    tcptrace.wait_state(&connection.server, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    let path = lines.assert_path(
        &connection.server,
        &format!("{PASSIVE_OPEN} CLOSE_WAIT LAST_ACK CLOSE"),
    );
    let (last, opened) = (path.len() - 1, path.len() - 3);
    for line in &path[..opened] {
        line.assert_process(&peers.server);
    }
    // At the FIN in between, the one that accepted and the one that holds are both right.
    path[last - 1].assert_owner(&receiver, "close");
    path[last].assert_process(&receiver);
    lines.assert_owners_among(&[&peers.client, &peers.server, &receiver]);
}

#[test]
fn killed_process_keeps_its_sockets_ends() {
    let Some(lab) = Lab::new() else { return };
    let stream = lab.tcptrace(&["stream"]);
    let Peers {
        mut client,
        mut server,
        address,
        ..
    } = Peers::new(&lab);
    client.connect("c", address);
    server.accept("listener", "s");
    let (socket, accepted) = (client.cookie("c"), server.cookie("s"));
    let pid = client.pid;
    client.kill();
    wait_fin_wait2(&stream, &socket);
    server.close("s");
    stream.wait_state(&accepted, "CLOSE", SOON);
    let lines = stream.finish_whole();
    for line in lines.of(&socket) {
        assert_eq!(line.value["owner"]["pid"], pid, "{line}");
        assert_eq!(line.value["owner"]["comm"], "client", "{line}");
    }
    assert_eq!(
        lines.entry(&socket, "FIN_WAIT1").change(),
        "ESTABLISHED > FIN_WAIT1"
    );
    for line in lines.of(&accepted) {
        line.assert_process(&server);
    }
}

#[test]
fn process_that_exits_owns_its_time_wait() {
    let Some(lab) = Lab::new() else { return };
    let timewait = lab.tcptrace(&["timewait"]);
    let Peers {
        mut client,
        mut server,
        address,
        ..
    } = Peers::new(&lab);
    client.connect("c", address);
    server.accept("listener", "s");
    let socket = client.cookie("c");
    let pid = client.pid;
    client.exit(0);
    server.close("s");
    let diag = lab.diag();
    let row = tests::wait_until("TIME_WAIT", SOON, || {
        diag.row(&socket).filter(|row| row.state == "TIME_WAIT")
    });
    diag.destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
    timewait.wait_for("its end", SOON, |line| line.value["event"] == "time_wait");
    let lines = timewait.finish_whole();
    let owner = &lines.time_wait(&socket).value["owner"];
    assert_eq!(
        (&owner["pid"], &owner["comm"]),
        (&pid.into(), &"client".into()),
        "{lines}"
    );
}

#[test]
fn thread_is_shown_as_its_process() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    peers
        .client
        .ask(&format!("thread worker connect c {address}"));
    peers.server.ask("thread acceptor accept listener s");
    let (socket, accepted) = (peers.client.cookie("c"), peers.server.cookie("s"));
    peers.client.ask("thread closer close c");
    wait_fin_wait2(&tcptrace, &socket);
    tcptrace.wait_state(&accepted, "CLOSE_WAIT", SOON);
    peers.server.ask("thread closer close s");
    tcptrace.wait_state(&accepted, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    let client = lines.of(&socket);
    assert!(client.len() >= 4, "{lines}");
    for line in client {
        line.assert_process(&peers.client);
    }
    let path = lines.assert_path(
        &accepted,
        &format!("{PASSIVE_OPEN} CLOSE_WAIT LAST_ACK CLOSE"),
    );
    for line in path {
        line.assert_process(&peers.server);
    }
}

/// A server whose parent listens and whose children accept.
#[test]
fn forked_child_accepts() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let mut worker = peers.server.fork("worker");
    let address = peers.address;
    peers.client.connect("c", address);
    worker.accept("listener", "s");
    let accepted = worker.cookie("s");
    peers.client.close("c");
    tcptrace.wait_state(&accepted, "CLOSE_WAIT", SOON);
    worker.close("s");
    tcptrace.wait_state(&accepted, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    lines.assert_path(
        &accepted,
        &format!("{PASSIVE_OPEN} CLOSE_WAIT LAST_ACK CLOSE"),
    );
    // Until it is accepted it belongs to the listener.
    lines
        .entry(&accepted, "ESTABLISHED")
        .assert_owner(&peers.server, "listener");
    // The FIN was handled in the client's context, or the decoy's.
    lines
        .entry(&accepted, "CLOSE_WAIT")
        .assert_owner(&worker, "accept");
    lines.entry(&accepted, "LAST_ACK").assert_process(&worker);
    lines.entry(&accepted, "CLOSE").assert_process(&worker);
}

#[test]
fn never_accepted_belongs_to_the_listener() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    let pair = peers.client.connect("c", address);
    let rows = lab.diag().rows();
    let waiting = rows
        .iter()
        .find(|row| row.local == address && row.remote == pair.local);
    let waiting = &waiting.expect("in the accept queue").cookie;
    let client = peers.client.cookie("c");
    peers.server.close("listener");
    tcptrace.wait_state(&client, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    for line in lines.assert_path(waiting, &format!("{PASSIVE_OPEN} CLOSE")) {
        line.assert_process(&peers.server);
    }
    lines
        .entry(waiting, "ESTABLISHED")
        .assert_owner(&peers.server, "listener");
    assert_eq!(
        lines.entry(&client, "CLOSE").value["error"],
        "ECONNRESET",
        "{lines}"
    );
    lines.entry(&client, "CLOSE").assert_process(&peers.client);
}

/// Both ends in one process, and a connect in one process with the close in its child, at once.
#[test]
fn connect_in_one_process_and_close_in_another() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let mut heir = peers.client.fork("heir");
    let Peers {
        client, mut server, ..
    } = peers;
    let pid = client.pid;
    client.exit(0);
    // The connecting process is gone; a change in softirq still has an owner.
    server.close(&connection.name);
    tcptrace.wait_state(&connection.client, "CLOSE_WAIT", SOON);
    heir.close(&connection.name);
    tcptrace.wait_state(&connection.client, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    let path = lines.assert_path(
        &connection.client,
        &format!("{ACTIVE_OPEN} CLOSE_WAIT LAST_ACK CLOSE"),
    );
    for line in &path[..2] {
        assert_eq!(line.value["owner"]["pid"], pid, "{line}");
        assert_eq!(line.value["owner"]["comm"], "client", "{line}");
    }
    path[3].assert_owner(&heir, "close");
    path[4].assert_process(&heir);
}

/// While `accept()` returns, another thread puts a socket of another process in the place of the accepted one. Where
/// `accept()` is followed by what it returns, that one is found there.
#[test]
fn a_socket_put_in_place_of_an_accepted_one_keeps_its_owner() {
    let Some(lab) = Lab::new() else { return };
    let stream = lab.tcptrace(&["stream"]);
    let mut server = lab.fixture("server");
    let mut maker = lab.fixture("maker");
    let mut racer = lab.fixture("racer");
    let address = server.listen("listener", "127.0.0.1:0");
    maker.connect("held", address);
    server.accept("listener", "peer");
    let cookie = maker.cookie("held");
    maker.send("held", &mut racer);
    racer.listen("busy", "127.0.0.1:0");
    let answer = racer.ask("race busy held 1000");
    assert!(answer["replaced"].as_u64() > Some(900), "{answer}");
    // In softirq: nobody's call, so the owner is who it was.
    server.close("peer");
    let lines = stream.wait_state(&cookie, "CLOSE_WAIT", SOON);
    lines
        .entry(&cookie, "CLOSE_WAIT")
        .assert_owner(&maker, "connect");
    for line in lines.of(&cookie) {
        assert_ne!(line.value["owner"]["comm"], "racer", "{line}");
    }
}
