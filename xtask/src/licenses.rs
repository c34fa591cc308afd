//! `cargo xtask licenses`: the licence texts of everything that is linked into the binary, in one committed file.
//!
//! cargo-about does more than that, but takes minutes to build and wants a service to look licences up in. The
//! texts are in the crates' own sources, which the build has downloaded anyway; a crate without one is an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::command::{self, root};

/// What `cargo xtask licenses` writes, and what is to be shipped beside the binary.
const FILE: &str = "THIRD-PARTY-LICENSES";

/// What a release is built of: the program, and the kernel side, which lies in it.
const LINKED: [(&str, &str); 5] = [
    ("tcptrace", "x86_64-unknown-linux-gnu"),
    ("tcptrace", "x86_64-unknown-linux-musl"),
    ("tcptrace", "aarch64-unknown-linux-gnu"),
    ("tcptrace", "aarch64-unknown-linux-musl"),
    ("tcptrace-ebpf", "bpfel-unknown-none"),
];

const INTRODUCTION: &str = "\
The binary of tcptrace contains the crates below, the Rust standard library, and, where it is linked statically,
musl libc. Their licences are below. Where a crate offers a choice that has MIT in it, MIT is chosen.
Written by `cargo xtask licenses`; not to be edited.
";

/// The standard library and musl are linked, and no crates of the registry.
const STANDARD_LIBRARY: &str = include_str!("licenses/standard-library.txt");

/// A crate, as `cargo tree` and `cargo metadata` name it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    version: String,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    manifest_path: PathBuf,
    source: Option<String>,
    repository: Option<String>,
}

impl Package {
    fn expression(&self) -> &str {
        self.license.as_deref().unwrap_or("see its text")
    }
}

/// Writes the file.
pub(crate) fn run() -> Result<()> {
    fs::write(root().join(FILE), text()?).with_context(|| format!("cannot write {FILE}"))?;
    eprintln!("licenses: {FILE} is written");
    Ok(())
}

/// Compares the file with what it should be.
///
/// # Errors
/// When it is another.
pub(crate) fn check() -> Result<()> {
    let written = fs::read_to_string(root().join(FILE)).unwrap_or_default();
    ensure!(
        written == text()?,
        "{FILE} is not what the binary is built of: run `cargo xtask licenses` and commit the file"
    );
    Ok(())
}

/// The whole file.
fn text() -> Result<String> {
    // For these targets alone: what is for other systems need not have been downloaded.
    let targets = LINKED.map(|(_, target)| ["--filter-platform", target]);
    let metadata = command::output(
        command::cargo("metadata")
            .args(["--format-version", "1"])
            .args(targets.as_flattened()),
    )?;
    let metadata: Metadata = serde_json::from_str(&metadata).context("cargo metadata")?;
    // Crates with one and the same text share it.
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let linked = linked()?;
    let of = |package: &Package| {
        let folder = package.manifest_path.parent();
        text_of(
            folder.context("a manifest has a folder")?,
            package.expression(),
        )
    };
    for package in &metadata.packages {
        let (name, version) = (package.name.clone(), package.version.clone());
        // The workspace's own packages come from nowhere.
        if package.source.is_none() || !linked.contains(&Crate { name, version }) {
            continue;
        }
        let heading = format!(
            "{} {} ({})",
            package.name,
            package.version,
            package.expression()
        );
        // Some crates come without a text that another crate of their repository has (aya-ebpf, and aya).
        let is_sibling = |other: &&Package| {
            let same = package.repository.is_some() && package.repository == other.repository;
            same && package.license == other.license
        };
        let mut siblings = metadata.packages.iter().filter(is_sibling);
        let text =
            of(package).or_else(|error| siblings.find_map(|sibling| of(sibling).ok()).ok_or(error));
        let text = text.with_context(|| format!("the licence of {heading}"))?;
        texts.entry(text).or_default().push(heading);
    }
    let mut sections: Vec<_> = texts.into_iter().map(|(text, of)| (of, text)).collect();
    for (of, _) in &mut sections {
        of.sort_unstable();
    }
    sections.sort_unstable();
    let mut file = INTRODUCTION.to_owned();
    for (of, text) in sections {
        let line = "=".repeat(80);
        write!(file, "\n{line}\n{}\n{line}\n\n{text}", of.join("\n"))?;
    }
    file.push_str(STANDARD_LIBRARY);
    Ok(file)
}

/// Every crate that is linked, as Cargo.lock has it.
fn linked() -> Result<BTreeSet<Crate>> {
    let mut all = BTreeSet::new();
    for (package, target) in LINKED {
        let tree = command::output(
            command::cargo("tree")
                .args(["--package", package, "--target", target])
                .args(["--edges", "normal", "--prefix", "none", "--format", "{p}"]),
        )?;
        all.extend(tree.lines().filter_map(crate_of));
    }
    Ok(all)
}

/// `name v1.2.3 (proc-macro) (*)`.
fn crate_of(line: &str) -> Option<Crate> {
    let mut words = line.split(' ');
    Some(Crate {
        name: words.next()?.to_owned(),
        version: words.next()?.strip_prefix('v')?.to_owned(),
    })
}

/// The licence texts in a crate's sources, with trailing blanks removed.
fn text_of(folder: &Path, expression: &str) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    let chosen = choose(names, expression);
    ensure!(!chosen.is_empty(), "no text in {}", folder.display());
    let mut texts = String::new();
    for name in chosen {
        let bytes = fs::read(folder.join(&name)).with_context(|| name.clone())?;
        let text = String::from_utf8_lossy(&bytes);
        for line in text.trim().lines() {
            texts.push_str(line.trim_end());
            texts.push('\n');
        }
        texts.push('\n');
    }
    Ok(texts.trim_end().to_owned() + "\n")
}

/// Which files are the crate's licence: that of MIT alone where it can be chosen; notices always.
fn choose(names: Vec<String>, expression: &str) -> Vec<String> {
    let begins = |name: &String, starts: &[&str]| {
        let name = name.to_ascii_lowercase();
        starts.iter().any(|start| name.starts_with(start))
    };
    let (notices, names): (Vec<_>, Vec<_>) = names
        .into_iter()
        .filter(|name| {
            begins(
                name,
                &["licen", "copying", "copyright", "notice", "unlicense"],
            )
        })
        .partition(|name| begins(name, &["notice", "copyright"]));
    let is_mit = |name: &&String| name.to_ascii_uppercase().contains("MIT");
    let mit: Vec<_> = names.iter().filter(is_mit).cloned().collect();
    // With "AND", there is something that cannot be chosen away.
    let may_choose = expression.contains("MIT") && !expression.contains("AND");
    let texts = if may_choose && !mit.is_empty() {
        mit
    } else {
        names
    };
    if texts.is_empty() {
        return texts;
    }
    texts.into_iter().chain(notices).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_file_has_every_crate_of_the_release() {
        let file = fs::read_to_string(root().join(FILE)).unwrap();
        let linked = linked().unwrap();
        assert!(linked.len() > 50, "{linked:?}");
        for Crate { name, version } in linked {
            let own = name.starts_with("tcptrace");
            let heading = format!("\n{name} {version} (");
            assert!(
                own || file.contains(&heading),
                "{name} {version}: run `cargo xtask licenses`"
            );
        }
    }

    #[test]
    fn mit_is_chosen_where_it_may_be() {
        let names =
            |list: &[&str]| -> Vec<String> { list.iter().map(|name| (*name).to_owned()).collect() };
        let both = names(&[
            "Cargo.toml",
            "LICENSE-APACHE",
            "LICENSE-MIT",
            "NOTICE",
            "src",
        ]);
        let chosen = choose(both.clone(), "MIT OR Apache-2.0");
        assert_eq!(chosen, ["LICENSE-MIT", "NOTICE"]);
        let all = choose(both, "(MIT OR Apache-2.0) AND Unicode-3.0");
        assert_eq!(all, ["LICENSE-APACHE", "LICENSE-MIT", "NOTICE"]);
        assert_eq!(choose(names(&["LICENSE"]), "MIT"), ["LICENSE"]);
        assert_eq!(choose(names(&["NOTICE", "src"]), "MIT"), [""; 0]);
    }

    #[test]
    fn crates_of_a_tree() {
        let found = crate_of("num_enum_derive v0.7.6 (proc-macro) (*)").unwrap();
        assert_eq!(
            (&*found.name, &*found.version),
            ("num_enum_derive", "0.7.6")
        );
        assert_eq!(crate_of(""), None);
    }
}
