//! Kernels in the cache: which there are, and what belongs to one.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result, ensure};

use super::apt::MODULES;

/// The first two numbers of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Series(pub(super) u32, pub(super) u32);

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text
            .split_once('.')
            .and_then(|(major, minor)| Some(Self(major.parse().ok()?, minor.parse().ok()?)));
        numbers.ok_or_else(|| "a series has two numbers, such as 6.12".to_owned())
    }
}

/// A release, as `uname -r` tells it: `6.12.107+deb13-cloud-amd64`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Release {
    /// All numbers in it, which is how releases are ordered.
    numbers: Vec<u32>,
    text: String,
}

impl Release {
    /// Reads one from its beginning and the rest; `None` if it has no series.
    pub(super) fn parse(version: &str, flavour: &str) -> Option<Self> {
        let numbers: Vec<u32> = version
            .split(|char: char| !char.is_ascii_digit())
            .filter(|number| !number.is_empty())
            .map_while(|number| number.parse().ok())
            .collect();
        let begins = version.starts_with(|char: char| char.is_ascii_digit());
        (begins && numbers.len() >= 2).then(|| Self {
            numbers,
            text: format!("{version}{flavour}"),
        })
    }

    /// Its series.
    pub(super) fn series(&self) -> Series {
        Series(self.numbers[0], self.numbers[1])
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Of each series the newest build, in order.
pub(super) fn newest_builds(mut releases: Vec<Release>) -> Vec<Release> {
    releases.sort();
    releases.reverse();
    releases.dedup_by_key(|release| release.series());
    releases.reverse();
    releases
}

/// A kernel that can be started.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// What it is called here.
    pub(super) name: String,
    pub(super) image: PathBuf,
    /// Those of [`MODULES`] that it has as files. What is built in has none.
    pub(super) modules: Vec<PathBuf>,
    /// Its series, if its name tells.
    pub(super) series: Option<Series>,
}

impl Kernel {
    /// One that somebody has; its modules are looked for where they lie in packages and on hosts.
    ///
    /// # Errors
    /// When there is no such file.
    pub(super) fn at(image: &Path, modules: Option<&Path>) -> Result<Self> {
        let image = fs::canonicalize(image)
            .with_context(|| format!("there is no kernel {}", image.display()))?;
        let file = image.file_name().unwrap_or_default().to_string_lossy();
        let folder = image.parent().unwrap_or(Path::new("/"));
        // `/boot/vmlinuz-6.12`, `/usr/lib/modules/6.12/vmlinuz`.
        let name = match file.split_once('-') {
            Some((_, release)) => release.to_owned(),
            None => folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        };
        let near = [
            folder.to_owned(),
            folder.join("../lib/modules").join(&name),
            folder.join("../usr/lib/modules").join(&name),
        ];
        let found = match modules {
            Some(folder) => modules_below(folder)?,
            None => near
                .iter()
                .filter(|folder| folder.is_dir())
                .map(|folder| modules_below(folder))
                .find(|found| !matches!(found, Ok(modules) if modules.is_empty()))
                .unwrap_or_else(|| Ok(Vec::new()))?,
        };
        let series = Release::parse(&name, "").map(|release| release.series());
        Ok(Self {
            name,
            image,
            modules: found,
            series,
        })
    }

    /// Moves what was unpacked to a folder of its own in the cache.
    ///
    /// # Errors
    /// When image or modules are missing in it.
    pub(super) fn gather(release: &Release, unpacked: &Path, kernels: &Path) -> Result<Self> {
        let files = files_below(unpacked)?;
        let image = files.iter().find(|path| is_named(path, "vmlinuz"));
        let image = image.with_context(|| format!("{release}: no vmlinuz in its packages"))?;
        let modules = modules_below(unpacked)?;
        ensure!(
            modules.len() == MODULES.len(),
            "{release}: not all of {MODULES:?} in its packages"
        );
        let (folder, done) = (unpacked.join("new"), kernels.join(release.to_string()));
        fs::create_dir_all(&folder)?;
        fs::rename(image, folder.join("vmlinuz"))?;
        for module in modules {
            fs::rename(&module, folder.join(module.file_name().unwrap_or_default()))?;
        }
        fs::create_dir_all(kernels)?;
        // All of it or nothing.
        fs::rename(&folder, &done)?;
        Self::at(&done.join("vmlinuz"), None)
    }
}

/// The releases in the cache.
///
/// # Errors
/// When it cannot be read.
pub(super) fn cached(kernels: &Path) -> Result<Vec<Release>> {
    if !kernels.is_dir() {
        return Ok(Vec::new());
    }
    let mut releases = Vec::new();
    for entry in fs::read_dir(kernels)? {
        releases.extend(Release::parse(&entry?.file_name().to_string_lossy(), ""));
    }
    Ok(newest_builds(releases))
}

/// The files of [`MODULES`] below a folder, in the order to load them.
fn modules_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let files = files_below(folder)?;
    let found = MODULES.iter().filter_map(|module| {
        let begin = format!("{module}.ko");
        files.iter().find(|path| is_named(path, &begin)).cloned()
    });
    Ok(found.collect())
}

fn is_named(path: &Path, begin: &str) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with(begin)
}

/// Every file below a folder; symbolic links are not followed.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(text: &str) -> Release {
        Release::parse(text, "-cloud-amd64").expect("a release")
    }

    #[test]
    fn newest_build_of_each_series() {
        let releases = [
            "6.12.95+deb12",
            "6.12.107+deb13",
            "6.1.0-50",
            "6.1.0-9",
            "5.10.0-32",
            "6.12.107+deb12",
        ];
        let newest = newest_builds(releases.map(release).to_vec());
        let newest: Vec<String> = newest.iter().map(Release::to_string).collect();
        let expected = ["5.10.0-32", "6.1.0-50", "6.12.107+deb13"];
        assert_eq!(
            newest,
            expected.map(|version| format!("{version}-cloud-amd64"))
        );
    }

    #[test]
    fn series_compare_as_numbers() {
        assert!(release("6.9.1").series() < release("6.12.1").series());
        assert_eq!("6.12".parse(), Ok(Series(6, 12)));
        assert!("6".parse::<Series>().is_err() && "6.x".parse::<Series>().is_err());
        assert_eq!(Release::parse("cloud", ""), None);
    }
}
