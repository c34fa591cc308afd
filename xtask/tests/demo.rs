//! The demo shows what it says it shows.

use std::{
    env, io,
    io::Write as _,
    process::{Command, Stdio},
};

use nix::unistd::geteuid;

/// Whether a line of the stream in `text` is of the process `comm`, and has these words in a row.
fn has(text: &str, comm: &str, words: &[&str]) -> bool {
    text.lines().any(|line| {
        let line: Vec<_> = line.split_whitespace().collect();
        line.contains(&comm) && line.windows(words.len()).any(|window| window == words)
    })
}

/// The line of the summary in `text` that begins with `start`.
fn row<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with(start));
    line.unwrap_or_default().split_whitespace().collect()
}

#[test]
fn owners_and_endings() {
    let sudo = || {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "true"]).stderr(Stdio::null());
        sudo.status().is_ok_and(|status| status.success())
    };
    let missing = match env::var_os("TCPTRACE_BIN") {
        None => "TCPTRACE_BIN, the binary to show: `cargo xtask test` sets it",
        Some(_) if !geteuid().is_root() && !sudo() => "root, or a sudo that asks for no password",
        Some(tcptrace) => {
            let mut demo = Command::new(env!("CARGO_BIN_EXE_xtask"));
            demo.args(["demo", "story"])
                .arg(tcptrace)
                .stdin(Stdio::null());
            let output = demo.output().expect("it was built");
            let text = String::from_utf8(output.stdout).expect("text");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}\n{errors}");
            check(&text);
            return;
        }
    };
    // Not with `eprintln`, which the test harness hides when a test passes.
    let _ = writeln!(
        io::stderr(),
        "left out: the test of the demo, which needs {missing}"
    );
}

fn check(text: &str) {
    let (leaks, rest) = text.split_once("\n2. ").expect("three parts");
    let (stream, time_wait) = rest.split_once("\n3. ").expect("three parts");
    for words in [
        "warehouse (pid ",
        " has read everything and never closed 6 sockets; oldest >= ",
        "\n  fds ",
        "  sockets  fd ",
        "  drained\n",
    ] {
        assert!(leaks.contains(words), "{words}:\n{leaks}");
    }
    for (comm, words) in [
        ("shop", &["ESTABLISHED", "->", "FIN_WAIT1"][..]),
        ("shop", &["FIN_WAIT2", "->", "TIME_WAIT"]),
        ("shop", &["TIME_WAIT", "->", "CLOSE"]),
        ("warehouse", &["ESTABLISHED", "->", "CLOSE_WAIT"]),
        ("warehouse", &["CLOSE_WAIT", "->", "LAST_ACK"]),
        ("till", &["SYN_SENT", "->", "CLOSE"]),
        ("till", &["ECONNREFUSED"]),
    ] {
        assert!(has(stream, comm, words), "{comm} {words:?}:\n{stream}");
    }
    assert!(
        time_wait.contains("3 reused by connect(), 1 reopened by the peer"),
        "{time_wait}"
    );
    // The last two columns: ended, running.
    for (name, counts) in [
        ("shop (pid", ["0", "4"]),
        ("till (pid", ["3", "1"]),
        ("warehouse (pid", ["1", "1"]),
        ("browser (pid", ["0", "1"]),
    ] {
        assert!(
            row(time_wait, name).ends_with(&counts),
            "{name} {counts:?}:\n{time_wait}"
        );
    }
    assert!(!time_wait.contains("not known"), "{time_wait}");
}
