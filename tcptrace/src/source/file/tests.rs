//! Recordings: whole, cut short, of another version, mixed, and no recordings at all.

use super::*;

fn start(schema: u32, host: &str, boot: &str) -> String {
    format!(
        r#"{{"event":"start","schema":{schema},"version":"9.9.9","time":1,"boot_to_utc_ns":0,"boot_to_monotonic_ns":0,"boot_id":"{boot}","host":"{host}","kernel":"6.18","hz":250,"netns":1,"time_wait":"tracepoints","accept":"none","sockets":{{}}}}"#
    )
}

/// A recorder's first line.
fn begin() -> String {
    start(SCHEMA, "alpha", "boot1")
}

const TICK: &str = r#"{"event":"tick","time":2}"#;

/// Reads all of a file. Returns how many events came, and how it ended.
fn read(content: impl Into<Vec<u8>>) -> (usize, Result<(), Error>) {
    let content = Box::new(io::Cursor::new(content.into()));
    let mut file = File::of(Path::new("trace.jsonl"), content);
    let mut count = 0;
    loop {
        match file.next_event() {
            Ok(Some(_)) => count += 1,
            Ok(None) => return (count, Ok(())),
            Err(error) => return (count, Err(error)),
        }
    }
}

#[track_caller]
fn assert_fails(content: impl Into<Vec<u8>>, events: usize, message: &str) {
    let (count, result) = read(content);
    assert_eq!(result.expect_err("an error").to_string(), message);
    assert_eq!(count, events, "events before it");
}

#[test]
fn a_whole_recording_is_read_to_its_end() {
    let (count, result) = read(format!("{}\n{TICK}\n{TICK}\n", begin()));
    assert!(result.is_ok());
    assert_eq!(count, 3);
}

#[test]
fn a_missing_newline_at_the_end_is_no_mistake() {
    let (count, result) = read(format!("{}\n{TICK}", begin()));
    assert!(result.is_ok());
    assert_eq!(count, 2);
}

#[test]
fn a_last_line_that_breaks_off_is_said_after_all_before_it() {
    let whole = format!("{}\n{TICK}\n{TICK}", begin());
    let second = begin().len() + TICK.len() + 2;
    for cut in second + 1..whole.len() {
        assert_fails(
            &whole.as_bytes()[..cut],
            2,
            "trace.jsonl breaks off in its last line (3): the recording was cut short, by a crash or a full disk; everything before that line was used",
        );
    }
}

#[test]
fn a_line_without_an_end_is_not_read_to_it() {
    /// Zeros for ever, of which it is counted how many are taken.
    struct Zeros<'a>(&'a std::cell::Cell<u64>);
    impl Read for Zeros<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            into.fill(0);
            self.0.set(self.0.get() + into.len() as u64);
            Ok(into.len())
        }
    }
    let count = Box::leak(Box::new(std::cell::Cell::new(0)));
    for (head, line) in [(String::new(), 1), (format!("{}\n{TICK}\n", begin()), 3)] {
        count.set(0);
        let input = io::Cursor::new(head).chain(Zeros(count));
        let mut file = File::of(Path::new("trace.jsonl"), Box::new(input));
        let error = (0..3)
            .find_map(|_| file.next_event().err())
            .expect("an error");
        assert_eq!(
            error.to_string(),
            format!(
                "trace.jsonl, line {line}, is longer than 16 MiB, and no line of a recording is; give a file that \
                 `tcptrace record` wrote"
            )
        );
        assert!(
            count.get() < LONGEST_LINE + (1 << 20),
            "{} bytes read",
            count.get()
        );
        assert!(file.line.capacity() as u64 <= 2 * LONGEST_LINE + 2);
    }
}

#[test]
fn the_longest_line_is_read() {
    let room = LONGEST_LINE as usize - TICK.len() - 1;
    let longest = format!("{}{}\n", TICK, " ".repeat(room));
    assert_eq!(longest.len() as u64, LONGEST_LINE);
    let (count, result) = read(format!("{}\n{longest}{TICK}\n", begin()));
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(count, 3);
}

#[test]
fn a_line_that_is_no_event_is_named() {
    for bad in ["hello", "{}", "", "\u{0}", r#"{"event":"tock"}"#] {
        let (count, result) = read(format!("{}\n{TICK}\n{bad}\n{TICK}\n", begin()));
        assert_eq!(count, 2, "{bad}");
        let message = result.unwrap_err().to_string();
        assert!(
            message.starts_with("trace.jsonl, line 3, is not an event: "),
            "{message}"
        );
    }
}

#[test]
fn bytes_that_are_no_text_are_no_event() {
    let mut content = format!("{}\n", begin()).into_bytes();
    content.extend_from_slice(b"\xff\xfe\x00\n");
    let (count, result) = read(content);
    assert_eq!(count, 1);
    assert!(matches!(result, Err(Error::Line { line: 2, .. })));
}

const NO_RECORDING: &str = "trace.jsonl is not a recording of tcptrace: its first line is not a start event; record one with `tcptrace record FILE`";

#[test]
fn what_is_no_recording_is_said_to_be_none() {
    for content in [
        "".to_owned(),
        "\n".to_owned(),
        "Dear reader,\n".to_owned(),
        format!("{TICK}\n"),
        "{\"event\":\"start\"}\n".to_owned(),
        "{\"event\":\"start\",\"schema\":\"1\"}\n".to_owned(),
        "{\"event\":\"start\",\"schema\":-1}\n".to_owned(),
        "[1]\n".to_owned(),
        "null".to_owned(),
        begin()[..50].to_owned(),
    ] {
        assert_fails(content, 0, NO_RECORDING);
    }
    assert_fails(&b"\x28\xb5\x2f\xfd\x00"[..], 0, NO_RECORDING);
}

#[test]
fn a_newer_schema_is_refused_before_its_lines_are_read() {
    assert_fails(
        format!(
            "{}\n{{\"event\":\"tock\"}}\n",
            start(SCHEMA + 1, "alpha", "boot1")
        ),
        0,
        &format!(
            "trace.jsonl was recorded by a newer tcptrace (9.9.9, schema {}) than this one ({}, schema {SCHEMA}); read it with that version or a later one",
            SCHEMA + 1,
            env!("CARGO_PKG_VERSION")
        ),
    );
    // Even if its start is not understood any more.
    let (_, result) = read("{\"event\":\"start\",\"schema\":99}\n");
    assert!(
        matches!(result, Err(Error::Newer { schema: 99, .. })),
        "{result:?}"
    );
}

#[test]
fn a_second_recording_in_the_file_is_refused() {
    for (host, boot, other) in [
        ("alpha", "boot1", "of the same host"),
        ("alpha", "boot2", "of another boot of alpha"),
        ("beta", "boot3", "of the host beta, not alpha"),
    ] {
        assert_fails(
            format!(
                "{}\n{TICK}\n{}\n{TICK}\n",
                begin(),
                start(SCHEMA, host, boot)
            ),
            2,
            &format!(
                "in trace.jsonl, line 3 is the start of another recording ({other}); times and sockets of two recordings do not go together: give them one by one"
            ),
        );
    }
}

#[test]
fn a_file_that_cannot_be_opened_says_why() {
    let error = File::open(Path::new("/nonexistent/trace.jsonl"))
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "cannot read the recording /nonexistent/trace.jsonl: No such file or directory (os error 2); give the path of a file that `tcptrace record` wrote, or - for standard input"
    );
}

#[test]
fn a_folder_is_no_file() {
    let mut folder = File::open(Path::new("/")).unwrap();
    let error = folder.next_event().unwrap_err();
    assert!(matches!(error, Error::Read { .. }), "{error}");
}

#[test]
fn a_recording_cannot_send_commands_to_the_terminal() {
    // What it says of itself is shown in messages.
    let hostile = "\\u001b[2J";
    for content in [
        format!("{}\n{}\n", begin(), start(SCHEMA, hostile, "boot3")),
        format!("{}\n", start(SCHEMA + 1, "alpha", "boot1")).replace("9.9.9", hostile),
    ] {
        let message = read(content).1.unwrap_err().to_string();
        assert!(message.contains("[2J"), "{message:?}");
        assert!(!message.chars().any(char::is_control), "{message:?}");
    }
}
