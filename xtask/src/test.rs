//! `cargo xtask test`: every test, on this machine's kernel.

use std::{fs, os::unix::fs::MetadataExt as _, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{build, command, node};

/// The crate of tests that need root.
const KERNEL_TESTS: &str = "tests";

/// How many tests run at a time, whatever the machine: they sleep more than they work, many for the
/// minute that TIME_WAIT lasts.
const THREADS: &str = "RUST_TEST_THREADS=16";

/// How to test.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// For the test programs, after `--`: a part of the names to run, `--nocapture`, ...
    #[arg(last = true, value_name = "ARGS")]
    harness: Vec<String>,
}

/// Builds what is tested, the release binary, and runs the tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = is_root()?;
    if !root {
        // Now, rather than after minutes of building.
        if let Err(error) = command::output(Command::new("sudo").args(["-n", "true"])) {
            bail!(
                "the tests against the real kernel need root, and {error:#}. Run `sudo -v` first, or \
                 this as root; `cargo test` runs the other tests"
            );
        }
    }
    let binary = build::run()?;
    let node = node::provide();
    if let Err(error) = &node {
        eprintln!("test: LEFT OUT, the test of stacks in node: {error:#}");
    }
    let node = node.unwrap_or_else(|_| "node".into());
    let test = || {
        let mut cargo = command::cargo("test");
        cargo
            .arg("--no-fail-fast")
            .env("TCPTRACE_BIN", &binary)
            .env("TCPTRACE_NODE", &node)
            .envs(THREADS.split_once('='));
        cargo
    };
    let finish = |cargo: &mut Command| command::run(cargo.arg("--").args(&options.harness));
    if root {
        return finish(test().arg("--workspace"));
    }
    // Cargo builds as this user; only the test programs become root. `env`, because sudo drops
    // variables.
    let runner = format!(
        r#"target."cfg(all())".runner = ["sudo", "-n", "env", "{THREADS}", {:?}, {:?}]"#,
        format!("TCPTRACE_BIN={}", binary.display()),
        format!("TCPTRACE_NODE={}", node.display())
    );
    let user = finish(test().args(["--workspace", "--exclude", KERNEL_TESTS]));
    let kernel = finish(test().args(["--package", KERNEL_TESTS, "--config", &runner]));
    user.and(kernel)
}

/// Whether the effective user of this process is root.
fn is_root() -> Result<bool> {
    let own = fs::metadata("/proc/self").context("cannot read /proc/self")?;
    Ok(own.uid() == 0)
}
