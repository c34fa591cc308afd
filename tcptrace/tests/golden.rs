//! A recording of real traffic, shown in every way: the whole output, letter by letter.
//!
//! `testdata/traffic.jsonl` was recorded in a network namespace of its own on 6.18: clients that close
//! first (IPv4, and IPv6 with `shutdown()`), a server that closes first and whose pair is opened anew,
//! a refused and a reset connection, a process with a hostile name, an exhausted range of local ports,
//! and connections that nobody accepted.
//!
//! `testdata/leaks.jsonl` was recorded likewise: a client that closes every third of its sockets, and does
//! not read the end of file of every fourteenth, with looks 15 s apart.
//!
//! After a change that is meant to be seen:
//! `UPDATE_GOLDEN=1 cargo test -p tcptrace --test golden`, and read the difference.

use std::{path::PathBuf, process::Command};

fn testdata(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name)
}

/// Runs tcptrace on the recording of traffic. Returns standard output and standard error.
fn tcptrace(args: &[&str]) -> (String, String) {
    tcptrace_on("traffic.jsonl", args)
}

fn tcptrace_on(recording: &str, args: &[&str]) -> (String, String) {
    let run = Command::new(env!("CARGO_BIN_EXE_tcptrace"))
        .args(args)
        .arg("--from")
        .arg(testdata(recording))
        .output()
        .expect("tcptrace runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (out, err) = (text(run.stdout), text(run.stderr));
    assert!(run.status.success(), "{err}");
    if args.contains(&"json") {
        tests::schema::assert_described(&out);
    }
    (out, err)
}

#[track_caller]
fn assert_golden(name: &str, actual: &str) {
    let path = testdata(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, actual).expect("the golden file can be written");
        return;
    }
    let expected = std::fs::read_to_string(&path).expect("a golden file");
    for (number, (expected, actual)) in expected.lines().zip(actual.lines()).enumerate() {
        assert_eq!(expected, actual, "{name}, line {}", number + 1);
    }
    assert_eq!(expected, actual, "{name}");
}

#[test]
fn stream_as_text() {
    let (out, err) = tcptrace(&["stream"]);
    assert_golden("traffic.stream.txt", &out);
    let count = out.lines().count() - 1;
    assert_eq!(err, format!("tcptrace: {count} transitions shown\n"));
    // A process in it calls itself an escape sequence.
    assert!(out.contains("\\u{1b}[31mred\\n\\xff\\xfe"));
    assert!(!out.chars().any(|char| char.is_control() && char != '\n'));
}

#[test]
fn stream_as_json() {
    let (out, err) = tcptrace(&["stream", "-o", "json"]);
    assert_golden("traffic.stream.jsonl", &out);
    assert_eq!(err, "");
}

#[test]
fn timewait_as_text() {
    let (out, err) = tcptrace(&["timewait"]);
    assert_golden("traffic.timewait.txt", &out);
    assert_eq!(err, "");
}

#[test]
fn timewait_as_json() {
    let (out, err) = tcptrace(&["timewait", "-o", "json"]);
    assert_golden("traffic.timewait.jsonl", &out);
    assert_eq!(err, "");
}

#[test]
fn leaks_as_text() {
    let (out, err) = tcptrace_on("leaks.jsonl", &["leaks", "--older-than", "20s"]);
    assert_golden("leaks.txt", &out);
    assert_eq!(err, "");
    let (last, _) = tcptrace_on("leaks.jsonl", &["leaks", "--older-than", "20s", "--once"]);
    assert!(
        last.len() < out.len() && out.ends_with(&last),
        "the last of them: {last}"
    );
}

#[test]
fn leaks_as_json() {
    let json = ["leaks", "--older-than", "20s", "--once", "-o", "json"];
    let (out, err) = tcptrace_on("leaks.jsonl", &json);
    assert_golden("leaks.out.jsonl", &out);
    assert_eq!(err, "");
}

#[test]
fn a_filtered_replay_is_a_part_of_the_whole() {
    let (whole, _) = tcptrace(&["stream", "-o", "json"]);
    let (part, _) = tcptrace(&["stream", "-o", "json", "--rport", "7001"]);
    let transitions = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|line| line.contains("\"transition\""))
            .map(str::to_owned)
            .collect()
    };
    let wanted: Vec<String> = transitions(&whole)
        .into_iter()
        .filter(|line| line.contains("\"remote\":{\"addr\":\"127.0.0.1\",\"port\":7001}"))
        .collect();
    assert_eq!(wanted.len(), 6);
    assert_eq!(transitions(&part), wanted);
}
