//! A recording, read back, is the same computation as the live run.

use std::{env, fs, path::PathBuf, process, time::Duration};

use serde_json::Value;
use tests::{Lab, Line, Lines, Peers, Seen, Tcptrace};

const SOON: Duration = Duration::from_secs(20);

/// A file that goes with the test.
struct Recording(PathBuf);

impl Recording {
    fn new(name: &str) -> Self {
        Self(env::temp_dir().join(format!("tcptrace-tests-{}-{name}.jsonl", process::id())))
    }

    fn replay(&self, arguments: &[&str]) -> Lines {
        let from = [
            "-o",
            "json",
            "--from",
            self.0.to_str().expect("a plain path"),
        ];
        let run = Tcptrace::run(&[arguments, &from].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.lines
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The lines about sockets, those of each socket in order. Between sockets the order may differ: two
/// runs read two buffers.
fn by_socket(lines: &Lines) -> Vec<Seen<'_>> {
    let about = |line: &&Line| line.value.get("socket").is_some();
    let mut values: Vec<_> = lines
        .0
        .iter()
        .filter(about)
        .map(|line| &line.value)
        .collect();
    values.sort_by_key(|value| value["socket"].as_str().expect("a cookie"));
    values.into_iter().map(Seen).collect()
}

#[test]
fn replay_gives_the_lines_of_the_live_run() {
    let Some(lab) = Lab::new() else { return };
    let recording = Recording::new("same");
    let mut peers = Peers::new(&lab);
    let before = peers.connect();
    let record = lab.record(&recording.0);
    let stream = lab.tcptrace(&["stream"]);
    let timewait = lab.tcptrace(&["timewait"]);

    peers.client_closes_first(&before);
    let direct = peers.connect();
    peers.client_shuts_first(&direct);
    let passive = peers.closed_by_server();
    let reset = peers.connect();
    peers.server.ask(&format!("reset {}", reset.name));
    let diag = lab.diag();
    let rested = [&before.client, &direct.client, &passive.server];
    for cookie in rested {
        diag.destroy(&diag.row(cookie).expect("in TIME_WAIT"))
            .expect("INET_DIAG_DESTROY");
    }
    for cookie in rested.into_iter().chain([&reset.client]) {
        stream.wait_state(cookie, "CLOSE", SOON);
    }
    let last = passive.server.as_str();
    let ended = |line: &Line| line.value["event"] == "time_wait" && line.value["socket"] == last;
    timewait.wait_for("the last end", SOON, ended);
    let (stream, timewait) = (stream.finish_whole(), timewait.finish_whole());
    let run = record.finish();
    assert_eq!(run.code, Some(0), "{}", run.stderr);

    let replayed = recording.replay(&["stream"]);
    assert_eq!(
        by_socket(&replayed),
        by_socket(&stream),
        "{replayed}\n{stream}"
    );
    assert!(replayed.events("transition").count() > 25, "{replayed}");
    assert_eq!(replayed.end().value["lost"], 0, "{replayed}");

    let replayed = recording.replay(&["timewait"]);
    assert_eq!(
        by_socket(&replayed),
        by_socket(&timewait),
        "{replayed}\n{timewait}"
    );
    assert_eq!(replayed.events("time_wait").count(), 3, "{replayed}");
    let summary = |lines: &Lines| {
        let summary = lines.events("time_wait_summary").next().expect("a summary");
        let mut value = summary.value.clone();
        // The time of the end of each run is its own.
        value.as_object_mut().expect("an object").remove("time");
        value
    };
    assert_eq!(Seen(&summary(&replayed)), Seen(&summary(&timewait)));

    // Twice the same, byte for byte.
    let texts = |lines: Lines| {
        lines
            .0
            .into_iter()
            .map(|line| line.value)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        texts(recording.replay(&["stream"])),
        texts(recording.replay(&["stream"]))
    );
}

#[test]
fn filters_apply_to_a_replay() {
    let Some(lab) = Lab::new() else { return };
    let recording = Recording::new("filtered");
    let record = lab.record(&recording.0);
    let stream = lab.tcptrace(&["stream"]);
    let mut peers = Peers::new(&lab);
    let connection = peers.connect();
    peers.client.ask(&format!("reset {}", connection.name));
    stream.wait_state(&connection.server, "CLOSE", SOON);
    let live = stream.finish_whole();
    assert_eq!(record.finish().code, Some(0));

    let port = peers.address.port().to_string();
    let server = recording.replay(&["stream", "--lport", &port]);
    server.assert_silent(&connection.client);
    fn of<'a>(lines: &'a Lines, cookie: &str) -> Vec<Seen<'a>> {
        let of = lines.of(cookie).into_iter();
        of.map(|line| Seen(&line.value)).collect()
    }
    assert_eq!(
        of(&server, &connection.server),
        of(&live, &connection.server),
        "{server}"
    );
    let client = recording.replay(&["stream", "--comm", "client"]);
    client.assert_silent(&connection.server);
    assert_eq!(
        of(&client, &connection.client),
        of(&live, &connection.client),
        "{client}"
    );
}

#[test]
fn recording_starts_with_what_it_is() {
    let Some(lab) = Lab::new() else { return };
    let recording = Recording::new("start");
    let record = lab.record(&recording.0);
    assert_eq!(record.finish().code, Some(0));
    let text = fs::read_to_string(&recording.0).expect("a recording");
    let mut lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"));
    let start: Value = lines.next().expect("a line");
    assert_eq!(start["event"], "start", "{text}");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux has it");
    assert!(
        start.to_string().contains(release.trim_end()),
        "the kernel is named: {start}"
    );
    assert!(text.ends_with('\n'));
}
