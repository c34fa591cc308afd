//! What runs in the machines, built to need nothing else there: statically, with musl.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::command;

/// The target that links everything into the program.
pub(super) const TARGET: &str = "x86_64-unknown-linux-musl";

/// The Cargo profile of the tests in the machines.
const PROFILE: &str = "guest";

/// The programs.
pub(super) struct Programs {
    /// The program under test.
    pub(super) tcptrace: PathBuf,
    /// What tests start, and the first process of a machine, by name.
    pub(super) helpers: Vec<(String, PathBuf)>,
    /// The test programs, by name.
    pub(super) tests: Vec<(String, PathBuf)>,
}

/// A line of Cargo's `--message-format json`, as far as it is of interest.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds all of them.
///
/// # Errors
/// When one does not build.
pub(super) fn build() -> Result<Programs> {
    let tcptrace = cargo("build", &["--release", "--package", "tcptrace"])?;
    let tcptrace = tcptrace.into_iter().find_map(|message| message.executable);
    let mut programs = Programs {
        tcptrace: tcptrace.context("cargo did not say where tcptrace is")?,
        helpers: Vec::new(),
        tests: Vec::new(),
    };
    let tests = ["--no-run", "--profile", PROFILE, "--package", "tests"];
    for message in cargo("test", &tests)? {
        let (Some(path), Some(target), Some(profile)) =
            (message.executable, message.target, message.profile)
        else {
            continue;
        };
        let kind = target.kind.first().map_or("", String::as_str);
        match (kind, profile.test) {
            ("bin", false) => programs.helpers.push((target.name, path)),
            ("test", true) => programs.tests.push((target.name, path)),
            // Unit tests need no kernel.
            _ => {}
        }
    }
    programs.tests.sort();
    Ok(programs)
}

/// Runs Cargo for the static target, and returns what it says of the artifacts.
fn cargo(subcommand: &str, arguments: &[&str]) -> Result<Vec<Message>> {
    let mut cargo = command::cargo(subcommand);
    cargo
        .args(arguments)
        .args([
            "--target",
            TARGET,
            "--message-format",
            "json-render-diagnostics",
        ])
        .stderr(Stdio::inherit());
    let output = command::output(&mut cargo)?;
    let lines = output.lines().map(serde_json::from_str);
    lines
        .collect::<Result<_, _>>()
        .context("cargo's messages are not as expected")
}

/// Adds the target to the toolchain, if it is not there.
///
/// # Errors
/// When rustup cannot.
pub(super) fn ensure_target() -> Result<()> {
    let installed =
        command::output(command::at_root("rustup").args(["target", "list", "--installed"]))?;
    if installed.lines().any(|line| line == TARGET) {
        return Ok(());
    }
    eprintln!("adding to the toolchain: {TARGET}");
    command::run(command::at_root("rustup").args(["target", "add", TARGET]))
}

impl Programs {
    /// Where the helper of this name is.
    ///
    /// # Errors
    /// When the `tests` crate has no such program.
    pub(super) fn helper(&self, name: &str) -> Result<&Path> {
        let found = self.helpers.iter().find(|(found, _)| found == name);
        match found {
            Some((_, path)) => Ok(path),
            None => bail!("the tests crate has no program {name}"),
        }
    }
}
