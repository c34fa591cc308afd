//! `cargo xtask bench --soak 10m`: every command under load, for so long each.

use std::process::Command;

use anyhow::{Context as _, Result};
use nix::unistd::geteuid;

use super::sudo;
use crate::{build, command};

/// Builds, and runs the soak of the tests as root.
pub(super) fn run(seconds: f64) -> Result<()> {
    let tcptrace = build::run()?;
    let bins = ["--bin", "churn", "--bin", "soak"];
    command::run(
        command::cargo("build")
            .args(["--release", "--package", "tests"])
            .args(bins),
    )?;
    let soak = tcptrace.with_file_name("soak");
    let mut env = if geteuid().is_root() {
        Command::new("env")
    } else {
        let mut sudo = sudo();
        sudo.arg("env");
        sudo
    };
    env.arg(format!("TCPTRACE_BIN={}", tcptrace.display()))
        .arg(soak)
        .arg(format!("seconds={seconds}"));
    command::run(&mut env).context("a promise is broken under load")
}

/// A time such as `90s`, `10m` or `1h`, in seconds.
pub(super) fn parse(text: &str) -> Result<f64, String> {
    let units = [('s', 1.0), ('m', 60.0), ('h', 3600.0)];
    let parsed = units.into_iter().find_map(|(unit, seconds)| {
        let number: u32 = text.strip_suffix(unit)?.parse().ok()?;
        (number > 0).then_some(f64::from(number) * seconds)
    });
    parsed.ok_or_else(|| format!("{text}: not a time such as 90s, 10m or 1h"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(parse("90s"), Ok(90.0));
        assert_eq!(parse("10m"), Ok(600.0));
        assert_eq!(parse("1h"), Ok(3600.0));
        for wrong in ["", "10", "m", "0s", "-1m", "1.5m", "10 m"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
