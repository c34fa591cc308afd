//! Both kinds of probes take the stack of both calls. (What is made of it: `stacks`.)

use std::time::Duration;

use serde_json::Value;
use tests::{Lab, Tcptrace, built, kernel_is_at_least};

const SOON: Duration = Duration::from_secs(60);
const OPTIONS: [&str; 4] = [
    "leaks",
    "--stacks",
    "--older-than=100ms",
    "--interval=100ms",
];

#[test]
fn stacks_of_connect_and_accept() {
    let Some(mut lab) = Lab::new() else { return };
    if !kernel_is_at_least(5, 15) {
        let run = Tcptrace::run(&OPTIONS);
        assert_eq!(run.code, Some(2), "{}", run.stderr);
        let why =
            "does not let stacks be recorded; leave --stacks out; it needs Linux 5.15 or later";
        assert!(run.stderr.contains(why), "{}", run.stderr);
        return;
    }
    lab.rest();
    for kind in [&[][..], &["--probes=tracepoints"]] {
        let tcptrace = lab.tcptrace(&[&OPTIONS, kind].concat());
        let mut server = lab.fixture("server");
        let mut client = lab.fixture("client");
        let address = server.listen("listener", "127.0.0.1:0");
        // One is left by the server, the other by the client.
        client.connect("a", address);
        server.accept("listener", "a");
        client.connect("b", address);
        server.accept("listener", "b");
        server.close("a");
        client.close("b");
        for (process, via) in [(&client, "connect"), (&server, "accept")] {
            let has_stack = |value: &Value| {
                value["event"] == "leak"
                    && value["pid"] == process.pid
                    && value["stacks"][0]["frames"][0].is_object()
            };
            let lines =
                tcptrace.wait_for("a leak with a stack", SOON, |line| has_stack(&line.value));
            let leak = lines.0.iter().rfind(|line| has_stack(&line.value));
            let leak = &leak.expect("it was waited for").value;
            let stacks = leak["stacks"].as_array().expect("there are stacks");
            assert_eq!(stacks.len(), 1, "{leak:#}");
            let stack = &stacks[0];
            assert_eq!(stack["sockets"], 1, "{leak:#}");
            assert_eq!(stack["via"], via, "{leak:#}");
            assert_eq!(leak["without_stack"], serde_json::json!({}), "{leak:#}");
            let frames = stack["frames"].as_array().expect("frames");
            let own = frames.iter().find(|frame| frame["main"] == true);
            let own = own.unwrap_or_else(|| panic!("no frame of the program: {leak:#}"));
            // In virtual machines the program is stripped, and its C library has no unwind tables.
            if cfg!(target_env = "gnu") {
                let obeys = |frame: &Value| {
                    let [function, file] = ["function", "file"].map(|name| frame[name].as_str());
                    function == Some("fixture::Sockets::obey")
                        && file.is_some_and(|file| file.ends_with("src/bin/fixture.rs"))
                };
                assert!(frames.iter().any(obeys), "{leak:#}");
            }
            let path = built("fixture");
            assert_eq!(
                own["module"],
                path.to_str().expect("a plain path"),
                "{leak:#}"
            );
        }
        let run = tcptrace.finish();
        assert_eq!(run.lines.end().value["lost"], 0, "{}", run.lines);
    }
}
