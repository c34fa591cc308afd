//! The seeds in `fuzz/seeds`, without a fuzzer: every build runs each entry point on what is committed for it, among it
//! what a fuzzer once found.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tcptrace::fuzz::TARGETS;

fn seeds(target: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = root.join("fuzz/seeds").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let seeds: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    assert!(!seeds.is_empty(), "no seed in {folder:?}");
    seeds
}

#[test]
fn every_target_takes_its_seeds() {
    for (name, target) in TARGETS {
        for seed in seeds(name) {
            eprintln!("{}", seed.display());
            target(&fs::read(&seed).unwrap());
        }
    }
}

#[test]
fn every_folder_of_seeds_has_a_target() {
    for folder in seeds("") {
        let name = folder.file_name().unwrap().to_str().unwrap();
        assert!(TARGETS.iter().any(|(target, _)| *target == name), "{name}");
    }
}

/// A seed in an older format would teach a fuzzer nothing but the error of the first line. `found-` begins the name of
/// what a fuzzer found: that need not be a recording.
#[test]
fn seeds_of_recordings_are_recordings() {
    for seed in seeds("recording") {
        let name = seed.file_name().unwrap().to_str().unwrap();
        if name.starts_with("found-") {
            continue;
        }
        let run = Command::new(env!("CARGO_BIN_EXE_tcptrace"))
            .args(["stream", "-o", "json", "--from"])
            .arg(&seed)
            .output()
            .unwrap();
        assert!(
            run.status.success(),
            "{seed:?}: {}",
            String::from_utf8_lossy(&run.stderr)
        );
        assert!(!run.stdout.is_empty(), "{seed:?}");
    }
}
