//! Without probes for TIME_WAIT and accept(): what looks at `sock_diag` make of it, and that they say so.

use std::{thread, time::Duration};

use tests::{Lab, Line, Peers, figure, realtime_of_boottime, wait_until};

const SOON: Duration = Duration::from_secs(20);
const TIME_WAIT: Duration = Duration::from_secs(70);

/// Each estimate must hold what really was, and not by being vague.
fn assert_estimate(line: &Line, key: &str, truth: f64) {
    let error = line.seconds(key.replace("seconds", "error_seconds").as_str());
    let told = line.seconds(key);
    assert!(
        (truth - told).abs() <= error,
        "{told} s told, off by up to {error} s, and it was {truth} s: {line}"
    );
    // Two looks, four times a second or a little less often.
    assert!(error < 2.0, "{line}");
}

#[test]
fn time_wait_is_an_estimate() {
    let Some(lab) = Lab::new() else { return };
    let observer = lab.observe();
    let timewait = lab.tcptrace(&["timewait", "--probes", "none"]);
    let stream = lab.tcptrace(&["stream", "--probes", "none"]);
    for said in ["no probe for TIME_WAIT", "no probe for accept()"] {
        assert!(timewait.stderr().contains(said), "{}", timewait.stderr());
    }
    let mut peers = Peers::new(&lab);
    let direct = peers.connect();
    peers.client_shuts_first(&direct);
    let orphan = peers.connect();
    peers.client.close(&orphan.name);
    thread::sleep(Duration::from_millis(1500));
    peers.server.close(&orphan.name);
    let aborted = peers.closed_by_server();
    thread::sleep(Duration::from_millis(1500));
    let diag = lab.diag();
    let row = diag.row(&aborted.server).expect("a minute of it");
    diag.destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");

    let sockets = [&direct.client, &orphan.client, &aborted.server];
    for cookie in sockets {
        timewait.wait_for("the end", TIME_WAIT, |line| {
            line.value["event"] == "time_wait" && line.value["socket"] == *cookie
        });
        stream.wait_state(cookie, "CLOSE", SOON);
    }
    let (stream, timewait) = (stream.finish_whole(), timewait.finish_whole());
    for cookie in sockets {
        let seen = wait_until("the onlooker sees the end", SOON, || {
            observer
                .state(cookie, "TIME_WAIT")
                .filter(|sighting| sighting.gone != 0)
        });
        let line = timewait.time_wait(cookie);
        assert_estimate(line, "dwell_seconds", (seen.gone - seen.first) as f64 / 1e9);
        assert!(line.value["dwell_at_least"].is_null(), "{line}");
        assert!(line.value["rearmed"].is_null(), "{line}");
        let entered = line.time("entered");
        let jiffies = 2 * 1_000_000_000 / *tests::HERTZ;
        assert!(
            (realtime_of_boottime(seen.before) - jiffies
                ..=realtime_of_boottime(seen.first) + jiffies)
                .contains(&entered),
            "{line}"
        );
        let end = stream.entry(cookie, "CLOSE");
        assert_eq!(end.change(), "TIME_WAIT > CLOSE");
        assert_eq!(end.value["late"], true, "{end}");
        let off = (end.time("time") - realtime_of_boottime(seen.gone)) as f64 / 1e9;
        assert!(
            off.abs() <= end.seconds("time_error_seconds"),
            "{off} s: {end}"
        );
        let entry = stream.entry(cookie, "TIME_WAIT");
        assert_eq!(entry.value["late"], true, "{entry}");
    }
    let errors = sockets.map(|cookie| timewait.time_wait(cookie).seconds("dwell_error_seconds"));
    figure(&format!(
        "without probes, dwells are right within {errors:.3?} s"
    ));
    // What outlived its timer has expired; of one that went early, nobody can know why.
    let line = timewait.time_wait(&aborted.server);
    assert_eq!(line.value["end"], "unknown", "{line}");
    for cookie in [&direct.client, &orphan.client] {
        let line = timewait.time_wait(cookie);
        let ends = ["expired", "unknown"].map(serde_json::Value::from);
        assert!(ends.contains(&line.value["end"]), "{line}");
        line.assert_process(&peers.client);
    }
    let summary = timewait.events("time_wait_summary").next();
    let dwell = &summary.expect("a summary").value["dwell_seconds"];
    assert_eq!(
        (&dwell["count"], &dwell["estimates"]),
        (&3.into(), &3.into())
    );
    assert!(
        dwell["estimate_error"]
            .as_f64()
            .is_some_and(|error| error < 2.0)
    );
}
