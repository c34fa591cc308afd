//! Sockets that were there before tcptrace: whose they are, and what is known of their age.

use std::{
    env,
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use tests::{Connection, Lab, Lines, PASSIVE_OPEN, Peers, Tcptrace, realtime_of_boottime};

const SOON: Duration = Duration::from_secs(20);

/// Moves both processes to the namespace of the test itself. Their sockets stay.
fn leave(peers: &mut Peers) {
    let own = format!("/proc/{}/ns/net", process::id());
    peers.client.ask(&format!("setns {own}"));
    peers.server.ask(&format!("setns {own}"));
}

/// Closes both ends, the client first, and gives what tcptrace says of it.
fn close(tcptrace: Tcptrace, peers: &mut Peers, connection: &Connection) -> Lines {
    peers.client.close(&connection.name);
    tcptrace.wait_state(&connection.server, "CLOSE_WAIT", SOON);
    peers.server.close(&connection.name);
    tcptrace.wait_state(&connection.server, "CLOSE", SOON);
    tcptrace.finish_whole()
}

/// Both ends of a connection that was established before must have their owners. How long it was
/// established is not known; how long anything later lasted is.
fn assert_known(lines: &Lines, peers: &Peers, connection: &Connection) {
    let server = lines.assert_path(&connection.server, "ESTABLISHED CLOSE_WAIT LAST_ACK CLOSE");
    // No process acted here: only a look at who holds the socket can tell.
    server[0].assert_owner(&peers.server, "holder");
    for line in &server {
        line.assert_process(&peers.server);
    }
    assert!(server[0].value["after_seconds"].is_null(), "{}", server[0]);
    let client = lines.of(&connection.client);
    assert_eq!(client[0].change(), "ESTABLISHED > FIN_WAIT1", "{lines}");
    assert!(client[0].value["after_seconds"].is_null(), "{}", client[0]);
    for line in client {
        line.assert_process(&peers.client);
    }
}

#[test]
fn established() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let tcptrace = lab.tcptrace(&["stream"]);
    let lines = close(tcptrace, &mut peers, &connection);
    assert_known(&lines, &peers, &connection);
}

#[test]
fn shared_by_parent_and_child() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    let heir = peers.server.fork("heir");
    let tcptrace = lab.tcptrace(&["stream"]);
    peers.client.close(&connection.name);
    let lines = tcptrace.wait_state(&connection.server, "CLOSE_WAIT", SOON);
    // Which of the two, nobody can know; a third is wrong.
    lines.assert_owners_among(&[&peers.client, &peers.server, &heir]);
    assert_eq!(
        lines.of(&connection.server)[0].value["owner"]["via"],
        "holder",
        "{lines}"
    );
    let _ = tcptrace.finish_whole();
}

#[test]
fn close_wait() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client.close(&connection.name);
    let diag = lab.diag();
    tests::wait_until("CLOSE_WAIT", SOON, || {
        diag.row(&connection.server)
            .filter(|row| row.state == "CLOSE_WAIT")
    });
    let tcptrace = lab.tcptrace(&["stream"]);
    peers.server.close(&connection.name);
    tcptrace.wait_state(&connection.server, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    let path = lines.assert_path(&connection.server, "CLOSE_WAIT LAST_ACK CLOSE");
    assert!(path[0].value["after_seconds"].is_null(), "{}", path[0]);
    for line in path {
        line.assert_process(&peers.server);
    }
}

#[test]
fn listener() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let listener = peers.server.cookie("listener");
    let tcptrace = lab.tcptrace(&["stream"]);
    let address = peers.address;
    let pair = peers.client.connect("c", address);
    let rows = lab.diag().rows();
    let waiting = rows
        .iter()
        .find(|row| row.local == address && row.remote == pair.local);
    let waiting = waiting.expect("in the accept queue").cookie.clone();
    tcptrace.wait_state(&waiting, "ESTABLISHED", SOON);
    peers.server.close("listener");
    tcptrace.wait_state(&listener, "CLOSE", SOON);
    tcptrace.wait_state(&waiting, "CLOSE", SOON);
    let lines = tcptrace.finish_whole();
    for line in lines.assert_path(&waiting, &format!("{PASSIVE_OPEN} CLOSE")) {
        line.assert_owner(&peers.server, "listener");
    }
    for line in lines.assert_path(&listener, "LISTEN CLOSE") {
        line.assert_process(&peers.server);
    }
}

/// In the accept queue when tcptrace came, accepted later, and by another process.
#[test]
fn waiting_to_be_accepted() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let address = peers.address;
    peers.client.connect("c", address);
    let tcptrace = lab.tcptrace(&["stream"]);
    let mut worker = peers.server.fork("worker");
    worker.accept("listener", "s");
    let accepted = worker.cookie("s");
    peers.client.close("c");
    tcptrace.wait_state(&accepted, "CLOSE_WAIT", SOON);
    let lines = tcptrace.finish_whole();
    let path = lines.assert_path(&accepted, "ESTABLISHED CLOSE_WAIT");
    path[0].assert_owner(&worker, "accept");
}

/// Nobody can know whose TIME_WAIT it is when it began before. When it began, the kernel knows.
#[test]
fn time_wait() {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client_shuts_first(&connection);
    thread::sleep(Duration::from_millis(500));
    let seen = observer
        .state(&connection.client, "TIME_WAIT")
        .expect("half a second of it");
    let timewait = lab.tcptrace(&["timewait"]);
    let stream = lab.tcptrace(&["stream"]);
    let diag = lab.diag();
    let row = diag.row(&connection.client).expect("a minute of it");
    diag.destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
    timewait.wait_for("its end", SOON, |line| line.value["event"] == "time_wait");
    stream.wait_state(&connection.client, "CLOSE", SOON);
    let lines = timewait.finish_whole();
    let line = lines.time_wait(&connection.client);
    assert_eq!(line.value["end"], "aborted", "{line}");
    assert!(line.value["owner"].is_null(), "{line}");
    let entered = line.time("entered");
    let jiffies = 2 * 1_000_000_000 / *tests::HERTZ;
    let earliest = realtime_of_boottime(seen.before) - jiffies;
    let latest = realtime_of_boottime(seen.first) + jiffies;
    assert!(
        (earliest..=latest).contains(&entered),
        "{earliest} {entered} {latest}: {line}"
    );
    stream
        .finish_whole()
        .assert_path(&connection.client, "TIME_WAIT CLOSE");
}

#[test]
fn orphaned_fin_wait2() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client.close(&connection.name);
    let diag = lab.diag();
    tests::wait_until("an orphan", SOON, || {
        diag.row(&connection.client).filter(|row| row.timewait)
    });
    let timewait = lab.tcptrace(&["timewait"]);
    let stream = lab.tcptrace(&["stream"]);
    peers.server.close(&connection.name);
    let row = tests::wait_until("TIME_WAIT", SOON, || {
        diag.row(&connection.client)
            .filter(|row| row.state == "TIME_WAIT")
    });
    thread::sleep(Duration::from_millis(100));
    diag.destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
    timewait.wait_for("its end", SOON, |line| line.value["event"] == "time_wait");
    stream.wait_state(&connection.client, "CLOSE", SOON);
    let stream = stream.finish_whole();
    stream.assert_path(&connection.client, "FIN_WAIT2 TIME_WAIT CLOSE");
    let lines = timewait.finish_whole();
    let dwell = lines.time_wait(&connection.client).seconds("dwell_seconds");
    assert!((0.09..2.0).contains(&dwell), "{lines}");
}

/// A namespace that only its mount keeps: every process has left it, the sockets are still there.
fn without_a_process(path: &Path, option: &str) {
    let Some(mut lab) = Lab::new() else { return };
    lab.netns.mount_at(path);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    leave(&mut peers);
    let tcptrace = Tcptrace::start(&["stream", "--netns", option]);
    let lines = close(tcptrace, &mut peers, &connection);
    assert_known(&lines, &peers, &connection);
    let inode = lab.netns.inode();
    assert!(
        lines
            .events("transition")
            .all(|line| line.value["netns"] == inode),
        "{lines}"
    );
}

fn mount_point(folder: &Path, name: &str) -> (PathBuf, String) {
    let name = format!("tcptrace-tests-{}-{name}", process::id());
    (folder.join(&name), name)
}

#[test]
fn named_namespace_without_a_process() {
    let (path, name) = mount_point(Path::new("/run/netns"), "named");
    without_a_process(&path, &name);
}

#[test]
fn mounted_namespace_without_a_process() {
    let (path, _) = mount_point(&env::temp_dir(), "mounted");
    without_a_process(&path, path.to_str().expect("a plain path"));
}

/// Without the option every namespace is seen, this one and its past among them.
#[test]
fn every_namespace_is_seen() {
    let (path, _) = mount_point(&env::temp_dir(), "any");
    let Some(mut lab) = Lab::new() else { return };
    lab.netns.mount_at(&path);
    let mut hidden = Peers::new(&lab);
    let left = hidden.connect();
    leave(&mut hidden);
    let other = Lab::new().expect("as the first");
    let mut plain = Peers::new(&other);
    let connection = plain.connect();

    let tcptrace = Tcptrace::start(&["stream"]);
    for (peers, connection) in [(&mut hidden, &left), (&mut plain, &connection)] {
        peers.client.close(&connection.name);
        tcptrace.wait_state(&connection.server, "CLOSE_WAIT", SOON);
        peers.server.close(&connection.name);
        tcptrace.wait_state(&connection.server, "CLOSE", SOON);
    }
    let lines = tcptrace.finish_whole();
    assert_known(&lines, &hidden, &left);
    assert_known(&lines, &plain, &connection);
    let inode = |cookie: &str| lines.of(cookie)[0].value["netns"].clone();
    assert_eq!(inode(&left.server), lab.netns.inode());
    assert_eq!(inode(&connection.server), other.netns.inode());
}
