//! node, for the test of stacks in code that is made at run time: the host's, or the distribution's package,
//! downloaded and unpacked into `.tools`, never installed.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command::{self, root},
    packages,
};

/// Where node is. An error tells why it cannot be had.
pub(crate) fn provide() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = env::split_paths(&path).map(|folder| folder.join("node"));
    if let Some(node) = installed.into_iter().find(|node| node.is_file()) {
        return Ok(node);
    }
    let folder = root().join(".tools/node");
    let node = folder.join("node");
    if !node.exists() {
        eprintln!("test: getting node, which is not installed, into .tools");
        download(&folder).context("the distribution's package of node cannot be had")?;
    }
    Ok(node)
}

fn download(folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    let (tree, downloads) = (folder.join("tree"), folder.join("packages"));
    for needed in [
        "lists/partial",
        "cache/archives/partial",
        "tree",
        "packages",
    ] {
        fs::create_dir_all(folder.join(needed))?;
    }
    command::output(apt(folder).arg("update"))?;
    // What this host lacks for it, told by apt and not changed by it.
    let mut install = apt(folder);
    install.args([
        "install",
        "--print-uris",
        "--yes",
        "--no-install-recommends",
        "nodejs",
    ]);
    let told = command::output(&mut install)?;
    let names: Vec<&str> = told.lines().filter_map(package).collect();
    ensure!(!names.is_empty(), "apt has no package nodejs");
    for package in packages::download(apt(folder), &names, &downloads)? {
        let mut unpack = Command::new("dpkg-deb");
        command::output(unpack.arg("--extract").arg(package).arg(&tree))?;
    }
    // Debian's node reads a part of itself from /usr/share, which it sees with its own on top. That takes root,
    // as the test does.
    let script = format!(
        r#"#!/bin/sh
exec unshare --mount sh -c '
    mount -t overlay none -o "lowerdir=$0/usr/share:/usr/share" /usr/share || exit
    LD_LIBRARY_PATH="$0/usr/lib:$0/usr/lib/x86_64-linux-gnu" exec "$0/usr/bin/node" "$@"
' '{}' "$@"
"#,
        tree.display()
    );
    let node = folder.join("node");
    // Whole, or not there: an interrupted download begins anew.
    let new = folder.join("node.new");
    fs::write(&new, script)?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&new, executable)?;
    fs::rename(new, node)?;
    for done in ["packages", "cache", "lists"] {
        fs::remove_dir_all(folder.join(done))?;
    }
    Ok(())
}

/// apt-get with the host's sources, and lists of its own.
fn apt(folder: &Path) -> Command {
    let mut apt = Command::new("apt-get");
    let folder = folder.display();
    apt.arg("-o")
        .arg(format!("Dir::State::lists={folder}/lists"));
    apt.arg("-o").arg(format!("Dir::Cache={folder}/cache"));
    apt.args(["-o", "Debug::NoLocking=1"]);
    apt
}

/// The name in a line of `--print-uris`: `'URI' NAME_VERSION_ARCH.deb SIZE HASH`.
fn package(line: &str) -> Option<&str> {
    let file = line.strip_prefix('\'')?.split_once("' ")?.1;
    let (name, _) = file.split_once('_')?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_packages() {
        let line = "'http://a.example/pool/libnode108_18.1+dfsg-2_amd64.deb' libnode108_18.1%2bdfsg-2_amd64.deb 1 SHA256:0";
        assert_eq!(package(line), Some("libnode108"));
        assert_eq!(package("Reading package lists..."), None);
    }
}
