//! How many instructions of each probe the kernel's verifier had to walk through before it took the probe.
//! It takes at most a million; each kernel counts otherwise.
//!
//! `cargo xtask vm` compares the figures with `tests/instructions.txt`.

use std::{collections::BTreeMap, fs, path::Path};

use aya::programs::loaded_programs;
use tests::{Lab, Tcptrace, figure};

/// The ids of the BPF programs that a process has loaded, by its open files.
fn programs_of(pid: u32) -> Vec<u32> {
    let folder = Path::new("/proc").join(pid.to_string()).join("fdinfo");
    let files = fs::read_dir(folder).expect("it runs").flatten();
    let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
    let id = |text: String| {
        let id = text
            .lines()
            .find_map(|line| line.strip_prefix("prog_id:"))?;
        id.trim().parse().ok()
    };
    // A link to a program names it, too: once is enough.
    let mut ids: Vec<u32> = texts.filter_map(id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[test]
#[ignore = "needs a kernel that takes function probes, as `cargo xtask vm` has them"]
fn each_probe_is_far_from_the_verifiers_limit() {
    let Some(_lab) = Lab::new() else { return };
    // By the names that the kernel keeps, which are cut off at 15 characters.
    let mut counts = BTreeMap::<String, u32>::new();
    for probes in ["functions", "tracepoints"] {
        let tcptrace = Tcptrace::start(&["stream", "--probes", probes]);
        let ids = programs_of(tcptrace.pid());
        assert!(ids.len() >= 4, "{ids:?}");
        for program in loaded_programs() {
            let program = program.expect("root may ask");
            if !ids.contains(&program.id()) {
                continue;
            }
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
