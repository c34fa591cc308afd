//! What this host needs for virtual machines.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::{machine::QEMU, programs};
use crate::{command, packages};

/// The package that has the emulator.
const PACKAGE: &str = "qemu-system-x86";

/// Checks, and provides what may be provided.
///
/// # Errors
/// Says what is missing, and how to get it.
pub(super) fn ready(install: bool) -> Result<()> {
    // The kernels, the emulator and the static target are all of one architecture.
    ensure!(
        cfg!(target_arch = "x86_64"),
        "virtual machines are set up for x86_64 only, and this host is none"
    );
    if let Err(error) = command::output(Command::new(QEMU).arg("--version")) {
        if !install {
            bail!("{error:#}; install {PACKAGE}, or let `cargo xtask vm --install` do it");
        }
        packages::install("vm", PACKAGE)
            .with_context(|| format!("{PACKAGE} cannot be installed"))?;
    }
    programs::ensure_target().context("there is no target to link statically for")
}
