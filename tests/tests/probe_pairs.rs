//! The two kinds of probes, function and tracepoint, held against each other: the same traffic, traced by
//! both at once, must be the same connections with the same owners, lifetimes and endings.
//!
//! It needs a kernel that takes both kinds, which `cargo xtask vm` starts.

use std::{collections::BTreeMap, env, fs, path::PathBuf, process, thread, time::Duration};

use serde_json::Value;
use tests::{
    Connection, Flag, HERTZ, Lab, Lines, Peers, Seen, Tcptrace, figure, kernel_is_at_least,
    wait_until,
};

const SOON: Duration = Duration::from_secs(20);

/// A tracer with one kind of probes, which writes a recording.
struct Recorder {
    file: PathBuf,
    tcptrace: Tcptrace,
}

/// What a recording holds, as both views show it.
struct Shown {
    stream: Lines,
    timewait: Lines,
}

impl Recorder {
    fn start(probes: &str) -> Self {
        let name = format!("tcptrace-tests-{}-{probes}", process::id());
        let file = env::temp_dir().join(name);
        let path = file.to_str().expect("a plain path");
        let tcptrace = Tcptrace::start_plain(&["record", path, "--probes", probes]);
        Self { file, tcptrace }
    }

    /// Ends it, and shows what it has written.
    fn show(self, probes: &str) -> Shown {
        let run = self.tcptrace.finish();
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let text = fs::read_to_string(&self.file).expect("a recording");
        let start: Value = serde_json::from_str(text.lines().next().expect("lines")).expect("JSON");
        assert_eq!(
            (&start["time_wait"], &start["accept"]),
            (&probes.into(), &probes.into())
        );
        let path = self.file.to_str().expect("a plain path");
        let show = |view| {
            let run = Tcptrace::run(&[view, "-o", "json", "--from", path]);
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            assert_eq!(run.lines.end().value["lost"], 0, "{}", run.stderr);
            run.lines
        };
        let shown = Shown {
            stream: show("stream"),
            timewait: show("timewait"),
        };
        fs::remove_file(self.file).expect("still there");
        shown
    }
}

/// Connections of every family, closed in every order.
fn ordinary(lab: &Lab) -> Vec<Peers> {
    let mut all = Vec::new();
    for (listen, connect) in [
        ("127.0.0.1:0", "127.0.0.1"),
        ("[::1]:0", "::1"),
        ("[::]:0", "::ffff:127.0.0.1"),
    ] {
        let mut peers = Peers::over(lab, listen, connect.parse().expect("an address"));
        peers.closed_by_client();
        peers.closed_by_server();
        let direct = peers.connect();
        peers.client_shuts_first(&direct);
        // The peer's FIN comes into a FIN_WAIT2 that has lasted for a while.
        let orphan = peers.connect();
        peers.client.close(&orphan.name);
        thread::sleep(Duration::from_millis(700));
        peers.server.close(&orphan.name);
        let reset = peers.connect();
        peers.server.ask(&format!("reset {}", reset.name));
        let mut worker = peers.server.fork("worker");
        let address = peers.address;
        peers.client.connect("w", address);
        worker.accept("listener", "w");
        peers.client.close("w");
        worker.close("w");
        all.push(peers);
    }
    all
}

/// TIME_WAITs that end before their time, in every way that this kernel knows.
fn early(lab: &Lab) -> Vec<(Connection, &'static str)> {
    let mut capture = lab.capture();
    let mut peers = Peers::new(lab);
    let reused = peers.closed_by_client();
    let reopened = peers.closed_by_server();
    let reset = peers.closed_by_client();
    let aborted = peers.closed_by_client();
    // The kernel reuses after a second (`tcp_tw_reuse_delay`).
    thread::sleep(Duration::from_millis(1300));
    peers.connect_from(reused.pair.local);
    peers.connect_from(reopened.pair.local);
    capture.forge(reset.pair, Flag::Rst);
    let diag = lab.diag();
    let mut ended = vec![&reused.client, &reopened.server, &reset.client];
    let can_abort = kernel_is_at_least(6, 1);
    if can_abort {
        let row = diag.row(&aborted.client).expect("in TIME_WAIT");
        diag.destroy(&row).expect("CONFIG_INET_DIAG_DESTROY");
        ended.push(&aborted.client);
    }
    for cookie in ended {
        wait_until("the end of TIME_WAIT", SOON, || {
            diag.row(cookie).is_none().then_some(())
        });
    }
    let ends_at_server = Connection {
        client: reopened.server.clone(),
        ..reopened
    };
    vec![
        (reused, "reused"),
        (ends_at_server, "reopened"),
        (reset, "reset"),
        (aborted, if can_abort { "aborted" } else { "expired" }),
    ]
}

/// A namespace that goes, and one without room.
fn gone_and_skipped() -> Vec<(Connection, &'static str)> {
    let lab = Lab::new().expect("as the first");
    lab.netns.set("ipv4/tcp_max_tw_buckets", "1");
    let mut peers = Peers::new(&lab);
    let gone = peers.closed_by_client();
    let skipped = peers.connect();
    peers.client.ask(&format!("shutdown {}", skipped.name));
    let diag = lab.diag();
    wait_until("FIN_WAIT2", SOON, || {
        diag.row(&skipped.client)
            .filter(|row| row.state == "FIN_WAIT2")
    });
    peers.server.close(&skipped.name);
    wait_until("the overflow", SOON, || {
        (lab.netns.counter("TCPTimeWaitOverflow") == 1).then_some(())
    });
    // Time for both tracers to read the counter.
    thread::sleep(Duration::from_millis(500));
    vec![(gone, "namespace_gone"), (skipped, "skipped")]
}

#[test]
#[ignore = "needs a kernel that takes function probes, as `cargo xtask vm` has them"]
fn both_kinds_of_probes_tell_the_same() {
    let Some(mut lab) = Lab::new() else { return };
    let functions = Recorder::start("functions");
    let tracepoints = Recorder::start("tracepoints");

    let mut kept = ordinary(&lab);
    let mut ended = early(&lab);
    ended.extend(gone_and_skipped());
    let mut capture = lab.capture();
    let mut peers = Peers::new(&lab);
    let rearmed = peers.connect();
    peers.client_shuts_first(&rearmed);
    // Far enough that the timer moves to another bucket of the wheel.
    thread::sleep(Duration::from_secs(6));
    capture.forge(rearmed.pair, Flag::Ack);
    kept.push(peers);
    drop(capture);

    // All others expire, which takes a minute: no need to be busy meanwhile.
    lab.rest();
    let diag = lab.diag();
    wait_until(
        "the last end of a TIME_WAIT",
        Duration::from_secs(80),
        || {
            thread::sleep(Duration::from_millis(500));
            diag.rows().iter().all(|row| !row.timewait).then_some(())
        },
    );
    // Time to tell of an end that was kept back.
    thread::sleep(Duration::from_millis(500));
    let functions = functions.show("functions");
    let tracepoints = tracepoints.show("tracepoints");

    for (connection, ending) in ended {
        let line = functions.timewait.time_wait(&connection.client);
        assert_eq!(line.value["end"], ending, "{line}");
    }
    let line = functions.timewait.time_wait(&rearmed.client);
    assert_eq!(line.value["rearmed"], true, "{line}");

    let sockets = compare(&functions.stream, &tracepoints.stream, "transition");
    let time_waits = compare(&functions.timewait, &tracepoints.timewait, "time_wait");
    assert!(sockets > 40 && time_waits > 18, "{sockets} {time_waits}");
    let furthest = furthest(&functions.timewait, &tracepoints.timewait);
    figure(&format!(
        "both kinds of probes told the same of {sockets} sockets and {time_waits} TIME_WAITs; of a dwell \
         they differed by at most {:.3} ms",
        furthest * 1000.0
    ));
    assert!(furthest <= 2.0 / *HERTZ as f64, "{furthest} s");
}

/// The lines of each socket, in order.
fn by_socket<'a>(lines: &'a Lines, event: &str) -> BTreeMap<&'a str, Vec<&'a Value>> {
    let mut sockets = BTreeMap::<_, Vec<_>>::new();
    for line in lines.events(event) {
        let cookie = line.value["socket"].as_str().expect("a cookie");
        sockets.entry(cookie).or_default().push(&line.value);
    }
    sockets
}

/// Both must have the same lines of the same sockets. Gives how many sockets.
fn compare(functions: &Lines, tracepoints: &Lines, event: &str) -> usize {
    let (functions, tracepoints) = (by_socket(functions, event), by_socket(tracepoints, event));
    let cookies: Vec<_> = functions.keys().collect();
    assert_eq!(cookies, tracepoints.keys().collect::<Vec<_>>(), "{event}");
    for (cookie, functions) in &functions {
        let tracepoints = &tracepoints[cookie];
        assert_eq!(
            functions.len(),
            tracepoints.len(),
            "{functions:#?}\n{tracepoints:#?}"
        );
        for (function, tracepoint) in functions.iter().zip(tracepoints) {
            let mut function = (*function).clone();
            if is_less_known(tracepoint) {
                forget(&mut function);
            }
            assert_eq!(Seen(&function), Seen(tracepoint));
        }
    }
    functions.len()
}

/// Before 6.14 no stamp tells when TIME_WAIT began. With timers alone, a minute that began in an orphaned
/// FIN_WAIT2 then cannot be told from one that was started again, and the line says so.
fn is_less_known(line: &Value) -> bool {
    !kernel_is_at_least(6, 14)
        && (line["dwell_at_least"] == true
            || line["from"] == "TIME_WAIT" && line["after_seconds"].is_null())
}

/// Takes out of a line what the other one says that it does not know.
fn forget(line: &mut Value) {
    if line["event"] == "time_wait" && line["rearmed"] == false {
        line["dwell_at_least"] = true.into();
        line["rearmed"] = Value::Null;
    } else if line["event"] == "transition" {
        line["after_seconds"] = Value::Null;
    }
}

/// The greatest difference between two dwells of one TIME_WAIT, in seconds.
fn furthest(functions: &Lines, tracepoints: &Lines) -> f64 {
    let dwell = |value: &Value| value["dwell_seconds"].as_f64().expect("a dwell");
    let (functions, tracepoints) = (
        by_socket(functions, "time_wait"),
        by_socket(tracepoints, "time_wait"),
    );
    functions
        .iter()
        .map(|(cookie, lines)| (dwell(lines[0]) - dwell(tracepoints[cookie][0])).abs())
        .fold(0.0, f64::max)
}
