//! `cargo xtask setup`: provides what a build needs. Builds and tests start here.
//!
//! It adds the parts of the toolchain that `rust-toolchain.toml` names, through rustup, and puts
//! bpf-linker into `.tools`. Nothing else on the machine is touched.

use std::{
    env,
    fs::{self, File, TryLockError},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{self, root},
    linker,
};

/// Rustup adds what this file names by itself, but not where its automatic installation is off.
const TOOLCHAIN: &str = include_str!("../../rust-toolchain.toml");

/// Checks, and provides what is missing.
pub(crate) fn run() -> Result<()> {
    // Until this process ends, however it ends.
    let _lock = lock()?;
    c_compiler()?;
    linker::check_compiler(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))?;
    toolchain_parts()?;
    bpf_linker()?;
    eprintln!(
        "setup: toolchain parts and bpf-linker {} are in place",
        linker::VERSION
    );
    Ok(())
}

/// Waits until no other process sets up the same workspace.
///
/// # Errors
/// When `.tools` cannot be made or locked.
pub(crate) fn lock() -> Result<File> {
    let tools = root().join(".tools");
    lock_in(&tools).with_context(|| format!("cannot use {}", tools.display()))
}

fn lock_in(tools: &Path) -> Result<File> {
    fs::create_dir_all(tools)?;
    let file = File::create(tools.join("lock"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("setup: waiting for another setup of this workspace to end");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    Ok(file)
}

/// Every Rust program is linked through the C compiler, bpf-linker too.
fn c_compiler() -> Result<()> {
    if let Err(error) = command::output(Command::new("cc").arg("--version")) {
        bail!(
            "no working C compiler: {error:#}. Rust links programs with it. \
             Install one; on Debian and Ubuntu: `apt install gcc libc6-dev`"
        );
    }
    Ok(())
}

/// The components of the toolchain: the sources of `core` for the BPF build, clippy, rustfmt.
fn toolchain_parts() -> Result<()> {
    let list = ["component", "list", "--installed"];
    let installed = match command::output(command::at_root("rustup").args(list)) {
        Ok(installed) => installed,
        Err(error) => bail!(
            "{error:#}. Rustup is needed, to add parts to the toolchain: install it as the package of \
             your distribution, or from https://rustup.rs"
        ),
    };
    let missing: Vec<_> = components(TOOLCHAIN)
        .filter(|part| !installed.lines().any(|line| line.starts_with(part)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: adding to the toolchain: {}", missing.join(", "));
    command::run(
        command::at_root("rustup")
            .args(["component", "add"])
            .args(missing),
    )
}

/// What a `rust-toolchain.toml` lists under `components`, which must stand on one line.
fn components(toolchain: &str) -> impl Iterator<Item = &str> {
    let list = toolchain
        .lines()
        .find_map(|line| line.strip_prefix("components = "));
    list.unwrap_or_default().split('"').skip(1).step_by(2)
}

/// Builds the linker, unless it is there in the right version.
fn bpf_linker() -> Result<()> {
    let Err(reason) = linker::check(root()) else {
        return Ok(());
    };
    eprintln!("setup: {reason:#}: building it in .tools, which takes about a minute");
    // A third of the time otherwise, and fifteen times the size.
    install(
        "bpf-linker",
        linker::VERSION,
        &[("CARGO_PROFILE_RELEASE_DEBUG", "0")],
    )?;
    linker::check(root()).context("after installation")
}

/// Builds a program of the registry in `.tools`. `profile` are settings of its build.
pub(crate) fn install(program: &str, version: &str, profile: &[(&str, &str)]) -> Result<()> {
    let tools = root().join(".tools");
    // Cargo warns when what it installs is not on PATH, which nobody needs here.
    let bin = tools.join("bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(env::split_paths(&path).chain([bin]))?;
    // A build directory of its own: an interrupted build leaves nothing in /tmp, and the next one
    // goes on from there. Cargo moves the finished program into place in one step.
    let build = tools.join("build");
    command::run(
        command::cargo("install")
            .args([program, "--force", "--no-track", "--version", version])
            .arg("--root")
            .arg(&tools)
            .arg("--target-dir")
            .arg(&build)
            .env("PATH", path)
            .envs(profile.iter().copied()),
    )?;
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_of_the_pinned_toolchain() {
        let found: Vec<_> = components(TOOLCHAIN).collect();
        assert!(found.contains(&"rust-src"), "{found:?}");
        assert!(found.iter().all(|name| !name.is_empty()), "{found:?}");
    }
}
