//! Running other programs, always from the root of the workspace.

use std::{env, ffi::OsString, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.expect("xtask is a folder of the workspace")
}

/// `program`, to be run at the root of the workspace.
pub(crate) fn at_root(program: impl Into<OsString>) -> Command {
    let mut command = Command::new(program.into());
    command.current_dir(root());
    command
}

/// A subcommand of the cargo that runs this program, which must take the versions that Cargo.lock has: `--locked`. Only
/// `fmt`, which resolves nothing, has no such option.
///
/// The probes' own build, which `tcptrace/build.rs` starts, cannot be given it. It is a build of the same workspace, so
/// the outer call has checked the same file.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut cargo = at_root(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg(subcommand);
    if subcommand != "fmt" {
        cargo.arg("--locked");
    }
    cargo
}

/// Runs `command` with its output shown.
///
/// # Errors
/// When it does not start, or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let status = command
        .status()
        .with_context(|| format!("`{shown}` did not start"))?;
    ensure!(status.success(), "`{shown}` failed: {status}");
    Ok(())
}

/// Runs `command` and returns what it writes to its standard output.
///
/// # Errors
/// As for [`run`].
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command
        .output()
        .with_context(|| format!("`{shown}` did not start"))?;
    ensure!(
        output.status.success(),
        "`{shown}` failed: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it, the program without its folder.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_keeps_to_the_lock_file() {
        assert!(shown(&cargo("build")).ends_with(" build --locked"));
        assert!(shown(&cargo("fmt")).ends_with(" fmt"));
    }

    /// The alias is the first call of all: if it could change Cargo.lock, no later one would notice.
    #[test]
    fn so_does_the_alias() {
        let config = std::fs::read_to_string(root().join(".cargo/config.toml")).unwrap();
        let alias = config.lines().find(|line| line.starts_with("xtask = "));
        assert!(
            alias.is_some_and(|alias| alias.contains(" --locked ")),
            "{config}"
        );
    }
}
