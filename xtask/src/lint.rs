//! `cargo xtask lint`: formatting, lints, documentation and licence texts; no warning passes.

use anyhow::Result;

use crate::{
    command::{self, cargo},
    licenses, setup,
};

/// Sets up and checks; ends at the first of them that finds something.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    command::run(cargo("fmt").args(["--all", "--check"]))?;
    command::run(cargo("clippy").args(["--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    // The probes exist for the BPF target only, whose `core` has to be built: see tcptrace/build.rs.
    command::run(
        cargo("clippy")
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["--package", "tcptrace-ebpf"])
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
            .args(["--", "-D", "warnings"]),
    )?;
    command::run(
        cargo("doc")
            .env("RUSTDOCFLAGS", "-D warnings")
            .args(["--workspace", "--no-deps"]),
    )?;
    licenses::check()
}
