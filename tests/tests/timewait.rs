//! How long TIME_WAIT lasts and how it ends, against what `sock_diag` shows every 10 ms.

use std::{thread, time::Duration};

use tests::{
    Connection, Flag, HERTZ, Lab, Line, Lines, Observer, Peers, Seen, Sighting, Tcptrace,
    realtime_of_boottime, wait_until, wheel_step,
};

const SOON: Duration = Duration::from_secs(20);
/// TIME_WAIT with the timer wheel's rounding at any HZ, and some time to say so.
const TIME_WAIT: Duration = Duration::from_secs(68);
const MILLISECOND: i64 = 1_000_000;

/// Waits for the line that says how the TIME_WAIT of this socket ended.
fn wait_ended(tcptrace: &Tcptrace, cookie: &str, limit: Duration) -> Lines {
    let wanted = |line: &Line| line.value["event"] == "time_wait" && line.value["socket"] == cookie;
    tcptrace.wait_for(&format!("the end of TIME_WAIT of {cookie}"), limit, wanted)
}

/// A jiffy in nanoseconds.
fn jiffy() -> i64 {
    1_000_000_000 / *HERTZ
}

/// What the onlooker saw of the socket in TIME_WAIT, once it has seen the end as well.
fn observed(observer: &Observer, cookie: &str) -> Sighting {
    wait_until("the onlooker sees the end", SOON, || {
        observer
            .state(cookie, "TIME_WAIT")
            .filter(|sighting| sighting.gone != 0)
    })
}

/// The start and the end in the line must be those that the onlooker saw.
fn assert_times(line: &Line, seen: &Sighting) {
    let entered = line.time("entered");
    let ended = entered + (line.seconds("dwell_seconds") * 1e9) as i64;
    let (before, first) = (
        realtime_of_boottime(seen.before),
        realtime_of_boottime(seen.first),
    );
    let (last, gone) = (
        realtime_of_boottime(seen.last),
        realtime_of_boottime(seen.gone),
    );
    let slack = 2 * jiffy();
    assert!(
        (before - slack..=first + slack).contains(&entered),
        "entered {} ms after the last look without it, {} ms before the first with it: {line}",
        (entered - before) / MILLISECOND,
        (first - entered) / MILLISECOND,
    );
    let slack = 20 * MILLISECOND;
    assert!(
        (last - slack..=gone + slack).contains(&ended),
        "ended {} ms after the last look with it, {} ms before the first without it: {line}",
        (ended - last) / MILLISECOND,
        (gone - ended) / MILLISECOND,
    );
    assert!(
        (line.time("time") - ended).abs() < slack,
        "time is that of the end: {line}"
    );
}

fn assert_expired(line: &Line, seen: &Sighting) {
    assert_eq!(line.value["end"], "expired", "{line}");
    let ended = line.time("entered") + (line.seconds("dwell_seconds") * 1e9) as i64;
    // `sock_diag` counts in jiffies.
    let expires = realtime_of_boottime(seen.expires) - 2 * jiffy();
    let latest = expires + wheel_step(60) + 60 * MILLISECOND;
    assert!(
        (expires..=latest).contains(&ended),
        "ended {} ms after it expired; a step is {} ms: {line}",
        (ended - expires) / MILLISECOND,
        wheel_step(60) / MILLISECOND,
    );
}

#[test]
fn lifetime_is_what_sock_diag_shows() {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let tcptrace = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let pause = Duration::from_millis(300);

    // Entered through an orphaned FIN_WAIT2, which the peer ends 0.3 s later.
    let orphaned = peers.connect();
    peers.client.close(&orphaned.name);
    thread::sleep(pause);
    peers.server.close(&orphaned.name);
    // Entered directly, from a full socket in FIN_WAIT2.
    let direct = peers.connect();
    peers.client.ask(&format!("shutdown {}", direct.name));
    thread::sleep(pause);
    peers.server.close(&direct.name);
    thread::sleep(pause);
    peers.client.close(&direct.name);
    // At the server's side.
    let passive = peers.closed_by_server();

    for cookie in [&orphaned.client, &direct.client, &passive.server] {
        wait_ended(&tcptrace, cookie, TIME_WAIT);
    }
    let lines = tcptrace.finish_whole();

    for (cookie, owner) in [
        (&orphaned.client, &peers.client),
        (&direct.client, &peers.client),
        (&passive.server, &peers.server),
    ] {
        let line = lines.time_wait(cookie);
        let seen = observed(&observer, cookie);
        assert_times(line, &seen);
        assert_expired(line, &seen);
        assert_eq!(line.value["rearmed"], false, "{line}");
        assert_eq!(line.value["netns"], lab.netns.inode(), "{line}");
        line.assert_process(owner);
    }
    for connection in [&orphaned, &direct] {
        let line = lines.time_wait(&connection.client);
        assert_eq!(line.pair(), connection.pair, "{line}");
        let fin_wait2 = line.seconds("fin_wait2_seconds");
        assert!(
            (0.27..2.0).contains(&fin_wait2),
            "{fin_wait2} s in FIN_WAIT2: {line}"
        );
    }
    assert_eq!(
        lines.time_wait(&passive.server).pair().reversed(),
        passive.pair
    );
    // The other side of a connection never is in TIME_WAIT.
    for cookie in [&orphaned.server, &direct.server, &passive.client] {
        lines.assert_silent(cookie);
    }

    let summary: Vec<_> = lines.events("time_wait_summary").collect();
    assert_eq!(summary.len(), 1, "{lines}");
    assert_eq!(summary[0].value["count"], 3, "{lines}");
    assert_eq!(summary[0].value["endings"]["expired"], 3, "{lines}");
}

/// The stream has the same truth.
#[test]
fn stream_and_timewait_agree() {
    let Some(lab) = Lab::new() else { return };
    let stream = lab.tcptrace(&["stream"]);
    let timewait = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let connections = [peers.closed_by_client(), peers.connect()];
    peers.client_shuts_first(&connections[1]);
    thread::sleep(Duration::from_millis(200));
    for Connection { client, .. } in &connections {
        destroy(&lab, client);
        wait_ended(&timewait, client, SOON);
        stream.wait_state(client, "CLOSE", SOON);
    }
    let (stream, timewait) = (stream.finish_whole(), timewait.finish_whole());
    for Connection { client, .. } in &connections {
        let ended = timewait.time_wait(client);
        let entry = stream.entry(client, "TIME_WAIT");
        let end = stream.entry(client, "CLOSE");
        let same = [("time", "entered", entry), ("time", "time", end)];
        for (in_stream, in_timewait, line) in same {
            assert_eq!(
                Seen(&line.value[in_stream]),
                Seen(&ended.value[in_timewait]),
                "{line}\n{ended}"
            );
        }
        assert_eq!(end.change(), "TIME_WAIT > CLOSE");
        for key in ["owner", "local", "remote", "netns"] {
            assert_eq!(end.value[key], ended.value[key], "{end}\n{ended}");
        }
    }
}

fn destroy(lab: &Lab, cookie: &str) {
    let diag = lab.diag();
    let row = wait_until("TIME_WAIT", SOON, || {
        diag.row(cookie).filter(|row| row.timewait)
    });
    diag.destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
}

/// Makes one TIME_WAIT of the client's, ends it with `end`, and compares what tcptrace says of it.
fn ended_by(ending: &str, end: impl FnOnce(&Lab, &mut Peers, &Connection)) {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let tcptrace = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.closed_by_client();
    end(&lab, &mut peers, &connection);
    wait_ended(&tcptrace, &connection.client, SOON);
    let lines = tcptrace.finish_whole();
    let line = lines.time_wait(&connection.client);
    assert_eq!(line.value["end"], ending, "{lines}");
    assert_eq!(line.value["rearmed"], false, "{lines}");
    assert_times(line, &observed(&observer, &connection.client));
    line.assert_process(&peers.client);
}

#[test]
fn reused_by_connect() {
    ended_by("reused", |_, peers, first| {
        // The kernel reuses after a second (`tcp_tw_reuse_delay`).
        thread::sleep(Duration::from_millis(1300));
        let second = peers.connect_from(first.pair.local);
        assert_eq!(second.pair, first.pair);
    });
}

#[test]
fn reset_by_segment() {
    let Some(lab) = Lab::new() else { return };
    let mut capture = lab.capture();
    let observer = lab.observe();
    let tcptrace = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.closed_by_client();
    thread::sleep(Duration::from_millis(300));
    capture.forge(connection.pair, Flag::Rst);
    wait_ended(&tcptrace, &connection.client, SOON);
    let lines = tcptrace.finish_whole();
    let line = lines.time_wait(&connection.client);
    assert_eq!(line.value["end"], "reset", "{lines}");
    assert_times(line, &observed(&observer, &connection.client));
    line.assert_process(&peers.client);
}

#[test]
fn aborted_through_sock_diag() {
    ended_by("aborted", |lab, _, connection| {
        thread::sleep(Duration::from_millis(300));
        destroy(lab, &connection.client);
    });
}

#[test]
fn reopened_by_peer() {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let tcptrace = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let first = peers.closed_by_server();
    thread::sleep(Duration::from_millis(300));
    let second = peers.connect_from(first.pair.local);
    assert_eq!(second.pair, first.pair);
    wait_ended(&tcptrace, &first.server, SOON);
    let lines = tcptrace.finish_whole();
    let line = lines.time_wait(&first.server);
    assert_eq!(line.value["end"], "reopened", "{lines}");
    assert_times(line, &observed(&observer, &first.server));
    line.assert_process(&peers.server);
    lines.assert_silent(&second.client);
    lines.assert_silent(&second.server);
}

#[test]
fn rearmed_lives_longer() {
    let Some(lab) = Lab::new() else { return };
    let mut capture = lab.capture();
    let observer = lab.observe();
    let tcptrace = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client_shuts_first(&connection);
    // Far enough that the timer moves to another bucket of the wheel.
    thread::sleep(Duration::from_secs(6));
    capture.forge(connection.pair, Flag::Ack);
    // Nothing has ended by that, nor by an ACK that leaves the timer in its bucket.
    thread::sleep(Duration::from_millis(50));
    capture.forge(connection.pair, Flag::Ack);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(
        tcptrace.lines().events("time_wait").count(),
        0,
        "{}",
        tcptrace.lines()
    );

    wait_ended(&tcptrace, &connection.client, TIME_WAIT);
    let lines = tcptrace.finish_whole();
    let line = lines.time_wait(&connection.client);
    let seen = observed(&observer, &connection.client);
    assert_expired(line, &seen);
    assert_eq!(line.value["rearmed"], true, "{line}");
    assert!(line.seconds("dwell_seconds") > 65.9, "{line}");
    assert_times(line, &seen);
}

#[test]
fn skipped_when_there_is_no_room() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/tcp_max_tw_buckets", "1");
    let tcptrace = lab.tcptrace(&["timewait"]);
    let stream = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let kept = peers.closed_by_client();
    // The room is taken. One that would enter TIME_WAIT directly:
    let skipped = peers.connect();
    peers.client.ask(&format!("shutdown {}", skipped.name));
    stream.wait_state(&skipped.client, "FIN_WAIT2", SOON);
    peers.server.close(&skipped.name);
    wait_ended(&tcptrace, &skipped.client, SOON);
    assert_eq!(lab.netns.counter("TCPTimeWaitOverflow"), 1);

    let lines = tcptrace.finish_whole();
    let line = lines.time_wait(&skipped.client);
    assert_eq!(line.value["end"], "skipped", "{line}");
    assert_eq!(line.seconds("dwell_seconds"), 0.0, "{line}");
    line.assert_process(&peers.client);
    lines.assert_silent(&kept.client);

    stream.wait_state(&skipped.client, "CLOSE", SOON);
    let path = "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE";
    stream.finish_whole().assert_path(&skipped.client, path);
}

#[test]
fn namespace_gone() {
    let Some(lab) = Lab::new() else { return };
    let tcptrace = lab.tcptrace(&["timewait"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.closed_by_client();
    let (pid, comm) = (peers.client.pid, peers.client.comm.clone());
    thread::sleep(Duration::from_millis(300));
    // With them goes all that holds the namespace, unless tcptrace holds it.
    drop(peers);
    drop(lab);
    wait_ended(&tcptrace, &connection.client, SOON);
    let lines = tcptrace.finish_whole();
    let line = lines.time_wait(&connection.client);
    assert_eq!(line.value["end"], "namespace_gone", "{line}");
    assert_eq!(line.value["owner"]["pid"], pid, "{line}");
    assert_eq!(line.value["owner"]["comm"], comm, "{line}");
    let dwell = line.seconds("dwell_seconds");
    assert!((0.3..SOON.as_secs_f64()).contains(&dwell), "{line}");
}

#[test]
fn what_never_was_in_time_wait() {
    let Some(lab) = Lab::new() else { return };
    lab.netns.set("ipv4/tcp_fin_timeout", "2");
    let tcptrace = lab.tcptrace(&["timewait"]);
    let stream = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);

    // Reset while established, and in FIN_WAIT2.
    let reset = peers.connect();
    peers.server.ask(&format!("reset {}", reset.name));
    let reset_late = peers.connect();
    peers.client.ask(&format!("shutdown {}", reset_late.name));
    stream.wait_state(&reset_late.client, "FIN_WAIT2", SOON);
    peers.server.ask(&format!("reset {}", reset_late.name));
    // Not skipped for want of room, but because the application wants it so.
    let lingering = peers.connect();
    peers.client.ask(&format!("linger2 {} -1", lingering.name));
    peers.client.close(&lingering.name);
    // An orphan in FIN_WAIT2 whose peer never closes is a timewait socket, but not in TIME_WAIT.
    let orphan = peers.connect();
    peers.client.close(&orphan.name);

    for connection in [&reset, &reset_late, &lingering, &orphan] {
        stream.wait_state(&connection.client, "CLOSE", Duration::from_secs(10));
    }
    let stream = stream.finish_whole();
    let fin_wait2 = "CLOSE SYN_SENT ESTABLISHED FIN_WAIT1 FIN_WAIT2 CLOSE";
    stream.assert_path(&reset.client, "CLOSE SYN_SENT ESTABLISHED CLOSE");
    stream.assert_path(&reset_late.client, fin_wait2);
    stream.assert_path(&lingering.client, fin_wait2);
    let path = stream.assert_path(&orphan.client, fin_wait2);
    let waited = path[4].seconds("after_seconds");
    assert!(
        (1.9..4.0).contains(&waited),
        "{waited} s in FIN_WAIT2, tcp_fin_timeout is 2 s"
    );

    let lines = tcptrace.finish_whole();
    assert_eq!(lines.events("time_wait").count(), 0, "{lines}");
    let summary = lines.events("time_wait_summary").next().expect("a summary");
    assert_eq!(summary.value["count"], 0, "{lines}");
}
