//! `cargo xtask deny`: what deny.toml allows, checked by cargo-deny.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{
    command::{self, root},
    setup,
};

/// The version to check with, which understands this deny.toml.
const VERSION: &str = "0.20.2";

/// How long the download of the advisories may take.
const PATIENCE: &str = "120";

/// Checks licences, sources and bans, which takes no database; then advisories, if their database can be had.
pub(crate) fn run() -> Result<()> {
    let lock = setup::lock()?;
    provide()?;
    drop(lock);
    // Cargo.lock decides, and everything in it has been downloaded for the build or is not needed.
    command::run(deny().args([
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))?;
    let mut fetch = Command::new("timeout");
    fetch.arg(PATIENCE).arg(path()).args(["fetch", "db"]);
    if let Err(error) = command::output(fetch.current_dir(root())) {
        eprintln!(
            "deny: LEFT OUT, the check for advisories: their database cannot be had: {error:#}"
        );
        return Ok(());
    }
    command::run(deny().args(["check", "--disable-fetch", "advisories"]))
}

fn path() -> std::path::PathBuf {
    root().join(".tools/bin/cargo-deny")
}

fn deny() -> Command {
    let mut deny = command::at_root(path());
    deny.arg("--locked");
    deny
}

/// Builds cargo-deny in `.tools`, unless it is there in the right version.
fn provide() -> Result<()> {
    let version = || command::output(Command::new(path()).arg("--version"));
    if version().is_ok_and(|found| found.trim() == format!("cargo-deny {VERSION}")) {
        return Ok(());
    }
    eprintln!("deny: building cargo-deny {VERSION} in .tools, which takes a minute or two");
    // It checks for less than a second: without optimisation, it is built in less than half the time.
    setup::install(
        "cargo-deny",
        VERSION,
        &[
            ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
            ("CARGO_PROFILE_RELEASE_LTO", "off"),
        ],
    )?;
    version()
        .map(drop)
        .context("after the installation of cargo-deny")
}
