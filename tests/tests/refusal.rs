//! Kernels that cannot trace: refused with a sentence. They need a machine with such a kernel, which
//! `cargo xtask vm` starts.

use std::{
    env,
    net::{Shutdown, TcpListener, TcpStream},
    process, thread,
    time::Duration,
};

use serde_json::{Value, json};
use tests::Tcptrace;

/// Every command that needs probes says why they are not to be had, and since when they are.
#[test]
#[ignore = "needs a kernel before 5.12, as `cargo xtask vm` has it"]
fn tracing_is_refused_with_a_sentence() {
    let file = env::temp_dir().join(format!("tcptrace-tests-{}-refused", process::id()));
    let file = file.to_str().expect("a plain path");
    for arguments in [
        vec!["stream", "--duration", "1s"],
        vec!["timewait", "--duration", "1s"],
        vec!["record", file, "--duration", "1s"],
    ] {
        let run = Tcptrace::run(&arguments);
        assert_eq!(run.code, Some(2), "{arguments:?}: {}", run.stderr);
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
        for words in ["tcptrace: ", "too old", "5.12"] {
            assert!(run.stderr.contains(words), "{}", run.stderr);
        }
        assert!(run.lines.0.is_empty(), "{}", run.lines);
    }
    assert!(!std::path::Path::new(file).exists(), "no recording began");
}

/// Who leaks is asked of `sock_diag` and `/proc`.
#[test]
#[ignore = "needs a kernel before 5.12, as `cargo xtask vm` has it"]
fn leaks_are_found_without_probes() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("lo is up");
    let address = listener.local_addr().expect("it is bound");
    let accept = || {
        let client = TcpStream::connect(address).expect("it listens");
        (client, listener.accept().expect("a connection").0)
    };
    // One that the peer has left alone; one that is over, in no table of the kernel.
    let (client, _left) = accept();
    drop(client);
    let (client, over) = accept();
    drop(client);
    over.shutdown(Shutdown::Write).expect("it is connected");
    thread::sleep(Duration::from_millis(300));
    let run = Tcptrace::run(&["leaks", "--once", "--older-than", "200ms", "-o", "json"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let lines = run.lines.0.iter().map(|line| &line.value);
    let own = |line: &&Value| line["event"] == "leak" && line["pid"] == process::id();
    let mut found: Vec<(&Value, &Value)> = lines
        .filter(own)
        .map(|line| (&line["state"], &line["causes"]))
        .collect();
    found.sort_by_key(|(state, _)| state.to_string());
    let expected = [
        (&json!("CLOSE"), &json!({"finished": 1})),
        (&json!("CLOSE_WAIT"), &json!({"eof_unread": 1})),
    ];
    assert_eq!(found, expected, "{}", run.lines);
}

/// What works there, and what does not and why.
#[test]
#[ignore = "needs a kernel before 5.12, as `cargo xtask vm` has it"]
fn the_doctor_tells_what_is_left() {
    let run = Tcptrace::run(&["doctor", "-o", "json"]);
    assert_eq!(run.code, Some(1), "{}", run.lines);
    let checks = run.lines.0[0].value["checks"].as_array().expect("checks");
    let check = |name| checks.iter().find(|check| check["name"] == name);
    for (name, status) in [
        ("kernel", "no"),
        ("transitions", "no"),
        ("time_wait", "skipped"),
        ("sock_diag", "ok"),
        ("processes", "ok"),
    ] {
        assert_eq!(check(name).expect(name)["status"], status, "{}", run.lines);
    }
    for name in ["kernel", "transitions"] {
        let said = check(name).expect(name).to_string();
        assert!(said.contains("too old") && said.contains("5.12"), "{said}");
    }
}

/// Without `--once`, leaks are looked up now and then, and it is said that they are not traced.
#[test]
#[ignore = "needs a kernel before 5.12, as `cargo xtask vm` has it"]
fn watching_for_leaks_falls_back_to_looks() {
    let run = Tcptrace::run(&["leaks", "--duration", "1s"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for words in ["not traced, only looked up", "too old", "5.12"] {
        assert!(run.stderr.contains(words), "{}", run.stderr);
    }
}
