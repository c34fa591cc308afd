//! Packages of the distribution, downloaded and never installed.

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
