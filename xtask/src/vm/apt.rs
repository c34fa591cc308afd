//! Kernels of the distribution, downloaded and unpacked, never installed.
//!
//! A root of apt's own, in the cache, keeps the other suites off the host: its lists, its status, nothing
//! of the host's but the configuration. The archive is the one that the host itself is updated from.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::kernels::{Kernel, Release, Series, newest_builds};
use crate::{command, packages};

/// Suites of the archive that have kernels of different series: older ones, the stable one, backports,
/// and the unstable one.
const SUITES: [&str; 6] = [
    "bullseye",
    "bookworm",
    "bookworm-backports",
    "trixie",
    "trixie-backports",
    "sid",
];

/// The distribution's own keys. Where they are missing, those that apt trusts have to do.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Packages are named `linux-image-` and the rest: kernels for virtual machines, small, and all alike.
const FLAVOUR: &str = "-cloud-amd64";

/// The modules without which there is no `sock_diag`, in the order to load them.
pub(super) const MODULES: [&str; 2] = ["inet_diag", "tcp_diag"];

/// apt with a root of its own.
pub(super) struct Apt {
    root: PathBuf,
    /// All package names of kernels that can be had.
    names: BTreeSet<String>,
}

impl Apt {
    /// Fetches the lists of what there is.
    ///
    /// # Errors
    /// When apt is missing, the host has no such archive configured, or nothing can be fetched.
    pub(super) fn fetch(cache: &Path) -> Result<Self> {
        let archive = archive()?;
        let root = cache.join("apt");
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(folder))?;
        }
        File::create(root.join("status"))?;
        let signed = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let sources: String = SUITES
            .iter()
            .map(|suite| format!("deb {signed}{archive} {suite} main\n"))
            .collect();
        fs::write(root.join("sources.list"), sources)?;
        fs::write(root.join("apt.conf"), configuration(&root))?;
        let mut apt = Self {
            root,
            names: BTreeSet::new(),
        };
        // One suite that the mirror does not have any more must not cost the others.
        let updated = command::output(apt.command("apt-get").arg("update"));
        apt.names = command::output(apt.command("apt-cache").args(["pkgnames", "linux-"]))?
            .lines()
            .map(str::to_owned)
            .collect();
        if let Err(error) = updated {
            // apt says a line for each file; the first will do.
            let error = format!("{error:#}");
            let first = error.lines().next().unwrap_or_default();
            ensure!(!apt.names.is_empty(), "{first}");
            eprintln!("vm: not every suite could be read: {first}");
        }
        Ok(apt)
    }

    /// What can be had, the newest build of each series.
    pub(super) fn releases(&self) -> Vec<Release> {
        let images = self.names.iter().filter_map(|name| {
            let release = name.strip_prefix("linux-image-")?;
            let release = Release::parse(release.strip_suffix(FLAVOUR)?, FLAVOUR)?;
            self.packages(&release).map(|_| release)
        });
        newest_builds(images.collect())
    }

    /// The packages that make up a kernel, if all of them are there. From 6.19 on, image and modules have
    /// one each.
    fn packages(&self, release: &Release) -> Option<Vec<String>> {
        let name = |part: &str| {
            let name = format!("linux-{part}-{release}");
            self.names.contains(&name).then_some(name)
        };
        if release.series() >= Series(6, 19) {
            Some(vec![name("binary")?, name("modules")?])
        } else {
            Some(vec![name("image")?])
        }
    }

    /// Downloads a kernel and keeps of it what is needed, in a folder of `kernels`.
    ///
    /// # Errors
    /// When it cannot be had, or is not built as expected.
    pub(super) fn kernel(&self, release: &Release, kernels: &Path) -> Result<Kernel> {
        let packages = self
            .packages(release)
            .with_context(|| format!("{release}: not all of its packages are there"))?;
        let downloads = self.root.join("downloads");
        let _ = fs::remove_dir_all(&downloads);
        let unpacked = downloads.join("unpacked");
        fs::create_dir_all(&unpacked)?;
        for package in packages::download(self.command("apt-get"), packages, &downloads)? {
            unpack(&package, &unpacked)?;
        }
        let kernel = Kernel::gather(release, &unpacked, kernels)?;
        fs::remove_dir_all(&downloads)?;
        Ok(kernel)
    }

    /// A program of apt's, with this root.
    fn command(&self, program: &str) -> Command {
        let mut apt = Command::new(program);
        apt.env("APT_CONFIG", self.root.join("apt.conf"));
        apt
    }
}

/// What makes a folder apt's root, in the language of `apt.conf`.
fn configuration(root: &Path) -> String {
    let root = root.display();
    // Of the lists, names and places of packages are all that is needed.
    format!(
        r#"Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State "{root}";
Dir::State::lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
"#
    )
}

/// Where the host gets its own packages from: an archive with the host's release and its main part.
fn archive() -> Result<String> {
    let about = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        let value = about.lines().find_map(|line| line.strip_prefix(name));
        value.unwrap_or_default().trim_matches('"').to_owned()
    };
    let (id, codename) = (field("ID="), field("VERSION_CODENAME="));
    ensure!(
        id == "debian",
        "this host is not Debian, whose kernels they are; give images with --kernel"
    );
    let format = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)";
    let targets = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    let wanted = [
        codename.as_str(),
        "stable",
        "oldstable",
        "testing",
        "sid",
        "unstable",
    ];
    let found = targets.lines().find_map(|line| {
        let mut fields = line.split('\t');
        let (uri, release, component) = (fields.next()?, fields.next()?, fields.next()?);
        (component == "main" && wanted.contains(&release)).then(|| uri.to_owned())
    });
    found.context("the host's apt sources have no archive of Debian; give images with --kernel")
}

/// Unpacks what is needed of a package.
fn unpack(package: &Path, to: &Path) -> Result<()> {
    let mut files = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb does not run")?;
    let stream = files.stdout.take().context("no output of dpkg-deb")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--wildcards", "--directory"])
        .arg(to)
        .arg("*/vmlinuz*")
        .args(MODULES.map(|module| format!("*/{module}.ko*")))
        .stdin(stream)
        // A package need not have all of them, which it says. What is missing in the end is told later.
        .stderr(Stdio::null());
    tar.status().context("tar does not run")?;
    if !files.wait()?.success() {
        bail!("dpkg-deb cannot read {}", package.display());
    }
    Ok(())
}
