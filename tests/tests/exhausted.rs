//! Where something ran out, or is not mounted, that is said, and not what it would mean otherwise.

use std::{env, fs, io, process};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, setrlimit},
    unistd::{Uid, setresuid},
};
use tests::{Lab, Run, Tcptrace};

/// What is said of a kernel, or of tcptrace, that has a fault.
const FAULTS: [&str; 5] = [
    "too old",
    "report it",
    "CONFIG_",
    "panicked",
    "RUST_BACKTRACE",
];

/// It blames nothing else; and if it failed, it says what helps.
fn assert_says(run: &Run, fix: &str, how: &str) {
    for fault in FAULTS {
        assert!(!run.stderr.contains(fault), "{how}: {}", run.stderr);
        assert!(
            !run.lines.to_string().contains(fault),
            "{how}: {}",
            run.lines
        );
    }
    assert_ne!(run.code, None, "{how}: {}", run.stderr);
    if run.code == Some(2) {
        assert!(run.stderr.contains(fix), "{how}: {}", run.stderr);
    }
}

#[test]
fn descriptors() {
    let Some(_lab) = Lab::new() else { return };
    let mut failed = 0;
    // Below, the program's own libraries cannot be opened.
    for limit in (4..12).chain((12..40).step_by(4)) {
        for arguments in [
            &["stream", "--duration", "100ms", "-o", "json"][..],
            &["leaks", "--once", "-o", "json"],
            &["states", "-o", "json"],
        ] {
            let run = Tcptrace::run_prepared(arguments, move || {
                Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)
            });
            assert_says(
                &run,
                "ulimit -n",
                &format!("{arguments:?}, {limit} descriptors"),
            );
            failed += u32::from(run.code == Some(2));
        }
    }
    assert!(failed > 10, "only {failed} runs had too few");
}

#[test]
fn doctor_blames_nothing_else_for_descriptors() {
    let Some(_lab) = Lab::new() else { return };
    for limit in [4, 6, 10, 12, 14] {
        let run = Tcptrace::run_prepared(&["doctor", "-o", "json"], move || {
            Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)
        });
        let line = run.lines.0.first();
        let line = line.unwrap_or_else(|| panic!("{limit}: no report: {}", run.stderr));
        let checks = line.value["checks"].as_array().expect("checks");
        let short = checks.iter().filter(|check| {
            // What works in another way needs no fix.
            let text = check.to_string();
            check["status"] != "ok"
                && (text.contains("EMFILE") || text.contains("Too many open files"))
        });
        for check in short {
            let fix = check["fix"].as_str().expect("something to do");
            assert!(fix.contains("ulimit -n"), "{limit}: {check}");
            assert!(
                !fix.contains("report it") && !fix.contains("mount"),
                "{limit}: {check}"
            );
        }
    }
}

#[test]
fn threads() {
    let Some(_lab) = Lab::new() else { return };
    for arguments in [
        &["leaks", "--once", "-o", "json"][..],
        &["states", "--by", "process", "-o", "json"],
    ] {
        let run = Tcptrace::run_prepared(arguments, || {
            setrlimit(Resource::RLIMIT_NPROC, 1, 1)?;
            // A user that no other test is; root has no limit.
            let user = Uid::from_raw(64_321);
            Ok(setresuid(user, user, user)?)
        });
        assert_says(&run, "ulimit -u", &format!("{arguments:?}"));
        // One thread is enough.
        assert_eq!(run.code, Some(0), "{}", run.stderr);
    }
}

/// A mount namespace of its own.
fn own_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    Ok(mount(
        none,
        "/",
        none,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        none,
    )?)
}

fn without_sys() -> io::Result<()> {
    own_mounts()?;
    Ok(umount2("/sys", MntFlags::MNT_DETACH)?)
}

fn with_empty_sys() -> io::Result<()> {
    own_mounts()?;
    let none = None::<&str>;
    Ok(mount(
        Some("tmpfs"),
        "/sys",
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )?)
}

#[test]
fn sysfs() {
    let Some(_lab) = Lab::new() else { return };
    for prepare in [without_sys, with_empty_sys] {
        let run = Tcptrace::run_prepared(&["stream", "--duration", "1s"], prepare);
        assert_eq!(run.code, Some(2), "{}", run.stderr);
        assert_says(&run, "mount -t sysfs sysfs /sys", "without /sys");
        let once = Tcptrace::run_prepared(&["states"], prepare);
        assert_eq!(once.code, Some(0), "it needs no types: {}", once.stderr);
    }
}

#[test]
fn the_size_of_a_file() {
    let Some(lab) = Lab::new() else { return };
    let file = env::temp_dir().join(format!("tcptrace-tests-{}-large", process::id()));
    let path = file.to_str().expect("a plain path");
    let netns = lab.netns.inode().to_string();
    let run = Tcptrace::run_prepared(
        &["record", path, "--duration", "1s", "--netns", &netns],
        || Ok(setrlimit(Resource::RLIMIT_FSIZE, 100, 100)?),
    );
    let _ = fs::remove_file(&file);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert_says(&run, "ulimit -f", "a small file");
    assert!(run.stderr.contains(path), "{}", run.stderr);
}
