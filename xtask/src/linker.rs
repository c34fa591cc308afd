//! bpf-linker: which version, where it is, and whether the one there will do.
//!
//! `tcptrace/build.rs` includes this file, so that setup and build agree.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// The version to build with. It brings no LLVM but loads the compiler's own, so it has to be made
/// for that one; from 0.11 on it wants an LLVM of the system instead.
pub(crate) const VERSION: &str = "0.10.3";

/// The LLVM that this version is made for: the one of Rust 1.95.
const LLVM: &str = "22";

/// Where it is, under the `root` of the workspace.
pub(crate) fn path(root: &Path) -> PathBuf {
    root.join(".tools/bin/bpf-linker")
}

/// Checks that the linker under `root` is there, and is the right one.
///
/// # Errors
/// Says what is wrong with it.
pub(crate) fn check(root: &Path) -> Result<()> {
    let path = path(root);
    ensure!(path.exists(), "bpf-linker {VERSION} is missing");
    let found = first_line(Command::new(&path).arg("--version"))
        .context("the bpf-linker in .tools does not run")?;
    let version = found.strip_prefix("bpf-linker ").unwrap_or(&found);
    ensure!(
        version == VERSION,
        "bpf-linker is {version}, and {VERSION} is needed"
    );
    Ok(())
}

/// Checks that `rustc` has the LLVM that the linker is made for.
///
/// # Errors
/// When it has another one, or does not run.
pub(crate) fn check_compiler(rustc: impl AsRef<Path>) -> Result<()> {
    let output = Command::new(rustc.as_ref()).arg("-vV").output();
    let output = output.context("rustc does not run")?;
    let about = String::from_utf8_lossy(&output.stdout);
    match llvm_of(&about) {
        Some(LLVM) => Ok(()),
        other => bail!(
            "{} has LLVM {}, and bpf-linker {VERSION} can only work with LLVM {LLVM}: \
             use the toolchain that rust-toolchain.toml names (no `cargo +toolchain`, no RUSTUP_TOOLCHAIN)",
            about.lines().next().unwrap_or("rustc"),
            other.unwrap_or("of unknown version"),
        ),
    }
}

/// The major version of LLVM in the output of `rustc -vV`.
fn llvm_of(about: &str) -> Option<&str> {
    let version = about
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()
}

/// The first line that `command` writes.
fn first_line(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}", output.status);
    let output = String::from_utf8(output.stdout)?;
    Ok(output.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_of_rustc() {
        let about = "rustc 1.95.0 (59807616e 2026-04-14)\nrelease: 1.95.0\nLLVM version: 22.1.2\n";
        assert_eq!(llvm_of(about), Some("22"));
        assert_eq!(llvm_of("rustc 1.95.0\n"), None);
    }
}
