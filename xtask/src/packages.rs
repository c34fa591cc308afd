//! Packages of the distribution: downloaded and never installed, but for what somebody asked for with `--install`.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::command;

/// Downloads packages of these names into a folder. Returns where they are, with what was there before.
///
/// # Errors
/// When `apt_get`, which knows the sources, cannot get one.
pub(crate) fn download(
    mut apt_get: Command,
    names: impl IntoIterator<Item = impl AsRef<OsStr>>,
    folder: &Path,
) -> Result<Vec<PathBuf>> {
    command::output(apt_get.arg("download").args(names).current_dir(folder))?;
    let mut packages = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            packages.push(path);
        }
    }
    Ok(packages)
}

/// Installs a package with `apt-get`, as root or through sudo. `task` is who says so.
///
/// # Errors
/// When apt-get is not there, or fails also with fresh lists.
pub(crate) fn install(task: &str, package: &str) -> Result<()> {
    eprintln!("{task}: installing {package} with apt-get");
    let apt = |arguments: &[&str]| {
        let own = nix::unistd::geteuid().is_root();
        let mut apt = Command::new(if own { "apt-get" } else { "sudo" });
        if !own {
            apt.args(["-n", "apt-get"]);
        }
        command::output(
            apt.args(["-q", "-y"])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    let package = ["install", "--no-install-recommends", package];
    // The lists may be missing, or as old as the image that this host was made from.
    if apt(&package).is_err() {
        apt(&["update"])?;
        apt(&package)?;
    }
    Ok(())
}
