//! `cargo xtask lint`: formatting, lints and documentation; no warning passes.

use anyhow::Result;

use crate::{
    command::{self, cargo},
    setup,
};

/// Sets up and checks; ends at the first of them that finds something.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    command::run(cargo().args(["fmt", "--all", "--check"]))?;
    command::run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    // The probes exist for the BPF target only, whose `core` has to be built: see tcptrace/build.rs.
    command::run(
        cargo()
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["clippy", "--package", "tcptrace-ebpf"])
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
            .args(["--", "-D", "warnings"]),
    )?;
    command::run(cargo().env("RUSTDOCFLAGS", "-D warnings").args([
        "doc",
        "--workspace",
        "--no-deps",
    ]))
}
