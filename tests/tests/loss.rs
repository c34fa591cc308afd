//! Records that find no room in the ring buffer: counted, said, and healed.

use std::{thread, time::Duration};

use tests::{Lab, Line, Lines, Peers};

const SOON: Duration = Duration::from_secs(20);
const CONNECTIONS: usize = 500;
/// Transitions of a connection that its client resets: three at each end.
const EACH: usize = 6;

fn lost(lines: &Lines) -> u64 {
    lines
        .events("lost")
        .map(|line| line.value["records"].as_u64().expect("a number"))
        .sum()
}

fn count(line: &Line, key: &str) -> u64 {
    line.value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key}: {line}"))
}

#[test]
fn sent_is_read_and_lost() {
    let Some(lab) = Lab::new() else { return };
    let large = lab.tcptrace(&["stream", "--buffer", "16M"]);
    let small = lab.tcptrace(&["stream", "--buffer", "4K"]);
    let mut bursting = lab.fixture("bursting");
    bursting.listen("listener", "127.0.0.1:0");
    // One that is not given the CPU in time.
    small.pause();
    bursting.ask(&format!("burst listener {CONNECTIONS}"));
    small.resume();
    small.wait_for("the loss", SOON, |line| line.value["event"] == "lost");
    // What comes after it is read again.
    bursting.ask("burst listener 1");
    bursting.close("listener");
    let closed = |line: &Line| line.change() == "LISTEN > CLOSE";
    small.wait_for("the listener's end", SOON, closed);
    large.wait_for("the listener's end", SOON, closed);

    let large = large.finish_whole();
    let sent = count(large.end(), "records");
    assert_eq!(
        large.events("transition").count(),
        EACH * (CONNECTIONS + 1) + 2
    );
    assert!(
        sent >= (EACH * (CONNECTIONS + 1) + 2) as u64,
        "{sent} records"
    );

    let small = small.finish();
    assert_eq!(small.code, Some(0), "{}", small.stderr);
    let end = small.lines.end();
    assert!(count(end, "lost") > 0, "{end}");
    assert_eq!(count(end, "records") + count(end, "lost"), sent, "{end}");
    assert_eq!(lost(&small.lines), count(end, "lost"), "{}", small.lines);
}

/// What happened while nothing was read is looked up afterwards.
#[test]
fn the_table_heals() {
    let Some(lab) = Lab::new() else { return };
    let stream = lab.tcptrace(&["stream", "--buffer", "4K"]);
    let mut peers = Peers::new(&lab);
    let ended = peers.connect();
    stream.wait_state(&ended.server, "ESTABLISHED", SOON);
    let mut bursting = lab.fixture("bursting");
    bursting.listen("listener", "127.0.0.1:0");

    stream.pause();
    // The buffer is full from here on.
    bursting.ask(&format!("burst listener {CONNECTIONS}"));
    peers.client.ask(&format!("reset {}", ended.name));
    peers.server.close(&ended.name);
    let begun = peers.connect();
    let turned = peers.connect();
    peers.client.close(&turned.name);
    stream.resume();
    stream.wait_for("the loss", SOON, |line| line.value["event"] == "lost");
    // Time for two looks: one alone may have missed a socket.
    thread::sleep(Duration::from_secs(6));

    // Of a connection that began unseen, the rest is right.
    peers.server.close(&begun.name);
    stream.wait_state(&begun.client, "CLOSE_WAIT", SOON);
    peers.client.close(&begun.name);
    stream.wait_state(&begun.client, "CLOSE", SOON);
    peers.server.close(&turned.name);
    stream.wait_state(&turned.server, "CLOSE", SOON);

    let lines = stream.finish().lines;
    let rest = lines.of(&begun.client);
    let first = rest
        .iter()
        .find(|line| line.value["to"] == "CLOSE_WAIT")
        .expect("waited for");
    assert_eq!(first.change(), "ESTABLISHED > CLOSE_WAIT");
    for line in rest {
        line.assert_process(&peers.client);
    }
    let rest = lines.of(&turned.server);
    let first = rest
        .iter()
        .find(|line| line.value["to"] == "LAST_ACK")
        .expect("waited for");
    assert_eq!(first.change(), "CLOSE_WAIT > LAST_ACK");
    first.assert_process(&peers.server);
    // Nothing is made up of the one that has gone.
    let healed = lines
        .0
        .iter()
        .rposition(|line| line.value["event"] == "lost")
        .expect("waited for");
    Lines(lines.0[healed..].to_vec()).assert_silent(&ended.client);
}

#[test]
fn time_wait_that_ended_unseen_does_not_run_on() {
    let Some(lab) = Lab::new() else { return };
    let timewait = lab.tcptrace(&["timewait", "--buffer", "4K"]);
    let mut peers = Peers::new(&lab);
    let gone = peers.closed_by_client();
    let there = peers.closed_by_client();
    thread::sleep(Duration::from_millis(300));
    let mut bursting = lab.fixture("bursting");
    bursting.listen("listener", "127.0.0.1:0");

    timewait.pause();
    bursting.ask(&format!("burst listener {CONNECTIONS}"));
    let diag = lab.diag();
    diag.destroy(&diag.row(&gone.client).expect("a minute of it"))
        .expect("INET_DIAG_DESTROY");
    timewait.resume();
    timewait.wait_for("the loss", SOON, |line| line.value["event"] == "lost");
    // Time for two looks: one alone may have missed a socket.
    thread::sleep(Duration::from_secs(6));

    let lines = timewait.finish().lines;
    // How it ended, nobody can know.
    assert_eq!(lines.events("time_wait").count(), 1, "{lines}");
    for line in lines.events("time_wait") {
        assert_eq!(line.value["socket"], gone.client, "{lines}");
        assert_eq!(line.value["end"], "unknown", "{lines}");
    }
    let summary = lines.events("time_wait_summary").next().expect("a summary");
    let running = lab
        .diag()
        .rows()
        .iter()
        .filter(|row| row.state == "TIME_WAIT")
        .count();
    assert_eq!(running, 1, "only {} is left", there.client);
    assert_eq!(summary.value["running"]["time_wait"], running, "{lines}");
    assert_eq!(summary.value["running"]["fin_wait2"], 0, "{lines}");
}
