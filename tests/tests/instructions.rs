//! How many instructions of each probe the kernel's verifier had to walk through before it took the probe.
//! It takes at most a million; each kernel counts otherwise.
//!
//! `cargo xtask vm` compares the figures with `tests/instructions.txt`.

use std::{collections::BTreeMap, time::Duration};

use tests::{Lab, Line, Peers, figure};

#[test]
#[ignore = "needs a kernel that takes function probes, as `cargo xtask vm` has them"]
fn each_probe_is_far_from_the_verifiers_limit() {
    let Some(lab) = Lab::new() else { return };
    // What finds holders is loaded when that is asked for the first time.
    let mut peers = Peers::new(&lab);
    peers.left_by_client();
    let leaks = ["leaks", "--older-than", "1ms", "--interval", "100ms"];
    // By the names that the kernel keeps, which are cut off at 15 characters.
    let mut counts = BTreeMap::<String, u32>::new();
    for (arguments, least) in [
        (&["stream", "--probes", "functions"][..], 4),
        (&["stream", "--probes", "tracepoints"], 4),
        (&leaks, 2),
    ] {
        let tcptrace = lab.tcptrace(arguments);
        if arguments == leaks {
            let is_leak = |line: &Line| line.value["event"] == "leak";
            tcptrace.wait_for("the leak", Duration::from_secs(20), is_leak);
        }
        let programs = tcptrace.programs();
        assert!(programs.len() >= least, "{arguments:?}: {}", programs.len());
        for program in programs {
            let name = program.name_as_str().expect("ASCII").to_owned();
            let Some(instructions) = program.verified_instruction_count() else {
                figure(
                    "how many instructions were verified, this kernel does not tell (5.16 or later does)",
                );
                return;
            };
            let count = counts.entry(name).or_default();
            *count = (*count).max(instructions);
        }
        assert_eq!(tcptrace.finish().code, Some(0));
    }
    for (name, count) in counts {
        figure(&format!("instructions {name} {count}"));
        assert!(count < 500_000, "{name}: {count}");
    }
}
