//! `cargo xtask build`: the release binary, with the BPF object inside.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{command, setup};

/// Sets up and builds; returns where the binary is.
pub(crate) fn run() -> Result<PathBuf> {
    setup::run()?;
    command::run(command::cargo("build").args(["--release", "--package", "tcptrace"]))?;
    let binary = target_dir()?.join("release/tcptrace");
    eprintln!("built {}", binary.display());
    Ok(binary)
}

/// Cargo has put this program next to it: the target directory may be configured to be anywhere.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let own = env::current_exe().context("the path of this program is not known")?;
    let target = own.parent().and_then(|profile| profile.parent());
    let target = target.context("this program lies outside of a target directory")?;
    Ok(target.to_owned())
}
