//! What goes wrong is said in one clear sentence, with exit code 2.

use std::{env, fs, path::PathBuf, process, time::Duration};

use tests::{Lab, Peers, Run, Tcptrace};

/// A file of a recording that may be wrong in some way.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = env::temp_dir().join(format!("tcptrace-tests-{}-{name}", process::id()));
        fs::write(&path, text).expect("a temporary file");
        Self(path)
    }

    fn stream(&self) -> Run {
        let path = self.0.to_str().expect("a plain path");
        Tcptrace::run(&["stream", "-o", "json", "--from", path])
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// It failed, said why on stderr in few lines, and each of these words is there.
fn assert_fails(run: &Run, words: &[&str]) {
    assert_eq!(run.code, Some(2), "{}\n{}", run.stderr, run.lines);
    let said = run.stderr.lines().next().unwrap_or_default();
    assert!(
        said.starts_with("tcptrace: ") || said.starts_with("error: "),
        "{}",
        run.stderr
    );
    assert!(!run.stderr.contains("panicked") && !run.stderr.contains("RUST_BACKTRACE"));
    for word in words {
        assert!(
            run.stderr.contains(word),
            "`{word}` is not said:\n{}",
            run.stderr
        );
    }
}

#[test]
fn bad_usage() {
    for (arguments, word) in [
        (vec!["nonsense"], "nonsense"),
        (vec!["stream", "--nonsense"], "--nonsense"),
        (vec!["stream", "-o", "xml"], "xml"),
        (vec!["stream", "--addr", "127.0.0.1/33"], "127.0.0.1/33"),
        (vec!["stream", "--addr", "localhost"], "localhost"),
        (vec!["stream", "--lport", "65536"], "65536"),
        (vec!["stream", "--state", "CLOSED_WAIT"], "CLOSED_WAIT"),
        (vec!["stream", "--pid", "x"], "x"),
        (vec!["stream", "--duration", "soon"], "soon"),
        (vec!["stream", "--buffer", "many"], "many"),
        (
            vec!["stream", "--netns", "/nonexistent/netns"],
            "/nonexistent/netns",
        ),
        (vec!["stream", "-4", "-6"], "--ipv6"),
        (vec!["record"], "FILE"),
    ] {
        assert_fails(&Tcptrace::run(&arguments), &[word]);
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [vec!["--help"], vec!["--version"], vec!["stream", "--help"]] {
        let run = Tcptrace::run(&arguments);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(!run.lines.0.is_empty());
    }
}

#[test]
fn recording_that_is_not_there() {
    let run = Tcptrace::run(&["stream", "--from", "/nonexistent/recording"]);
    assert_fails(&run, &["/nonexistent/recording"]);
}

#[test]
fn recording_that_is_none() {
    for (name, text) in [
        ("empty", ""),
        ("prose", "Dear reader,\n"),
        ("binary", "\u{0}\u{1}\n"),
    ] {
        let file = File::new(name, text);
        assert_fails(&file.stream(), &[file.0.to_str().expect("a plain path")]);
    }
}

/// A real recording, for breaking.
fn recording(lab: &Lab, name: &str) -> (File, String) {
    let file = File::new(name, "");
    fs::remove_file(&file.0).expect("just made");
    let record = lab.record(&file.0);
    let mut bursting = lab.fixture("bursting");
    bursting.listen("listener", "127.0.0.1:0");
    bursting.ask("burst listener 5");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(record.finish().code, Some(0));
    let text = fs::read_to_string(&file.0).expect("a recording");
    (file, text)
}

#[test]
fn recording_cut_off_in_its_last_line() {
    let Some(lab) = Lab::new() else { return };
    let (_whole, text) = recording(&lab, "whole");
    let cut = File::new("cut", &text[..text.len() - 5]);
    let run = cut.stream();
    assert_fails(&run, &["last line"]);
    // All before it has been shown.
    assert!(
        run.lines.events("transition").count() >= 30,
        "{}",
        run.lines
    );
}

#[test]
fn recording_of_a_newer_tcptrace() {
    let Some(lab) = Lab::new() else { return };
    let (_whole, text) = recording(&lab, "newer");
    let (start, rest) = text.split_once('\n').expect("lines");
    let mut start: serde_json::Value = serde_json::from_str(start).expect("a line of JSON");
    assert!(
        start["schema"].is_u64(),
        "the start tells its schema: {start}"
    );
    start["schema"] = 1000.into();
    let newer = File::new("newest", &format!("{start}\n{rest}"));
    assert_fails(&newer.stream(), &["1000", "newer"]);
}

/// Two recordings in one file: the second begins with a start of its own.
#[test]
fn recordings_mixed() {
    let Some(lab) = Lab::new() else { return };
    let (_whole, text) = recording(&lab, "mixed");
    let mixed = File::new("mixture", &format!("{text}{text}"));
    assert_fails(&mixed.stream(), &["start"]);
}

#[test]
fn without_privilege() {
    let Some(_lab) = Lab::new() else { return };
    let run = Tcptrace::run_as_nobody(&["stream", "-o", "json"]);
    assert_fails(&run, &["root"]);
}

/// Where the kernel's addresses are hidden, TIME_WAIT is followed in another way or its limits are
/// told. It is never silently missing.
#[test]
fn hidden_kallsyms() {
    const CAP_SYSLOG: u64 = 34;
    let Some(lab) = Lab::new() else { return };
    let inode = lab.netns.inode().to_string();
    let tcptrace = Tcptrace::start_without(CAP_SYSLOG, &["timewait", "--netns", &inode]);
    let mut peers = Peers::new(&lab);
    let connection = peers.closed_by_client();
    let diag = lab.diag();
    let row = diag.row(&connection.client).expect("in TIME_WAIT");
    diag.destroy(&row)
        .expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
    std::thread::sleep(Duration::from_secs(2));
    let told = tcptrace.stderr().contains("CAP_SYSLOG");
    let run = tcptrace.finish();
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let followed = run
        .lines
        .events("time_wait")
        .any(|line| line.value["end"] == "aborted");
    assert!(told || followed, "{}\n{}", run.stderr, run.lines);
}

#[test]
fn full_disk_on_stdout() {
    let Some(lab) = Lab::new() else { return };
    let (whole, _) = recording(&lab, "full");
    let path = whole.0.to_str().expect("a plain path");
    let full = fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("Linux has it");
    let run = Tcptrace::run_to(&["stream", "--from", path], full);
    assert_fails(&run, &["No space left"]);
}

#[test]
fn closed_pipe_is_no_error() {
    let Some(lab) = Lab::new() else { return };
    let (whole, _) = recording(&lab, "pipe");
    let path = whole.0.to_str().expect("a plain path");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let run = Tcptrace::run_to(&["stream", "--from", path], writer);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(run.stderr, "");
}

#[test]
fn duration_ends_a_run() {
    let Some(lab) = Lab::new() else { return };
    let inode = lab.netns.inode().to_string();
    let arguments = [
        "stream",
        "-o",
        "json",
        "--netns",
        &inode,
        "--duration",
        "1s",
    ];
    let run = Tcptrace::run(&arguments);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let _ = run.lines.end();
}
