//! What a person wants to know of a process.

use std::fs::File;
use std::io::Read as _;

use rustix::fs::{Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;

use super::{Handle, read};
use crate::container;
use crate::event::Printable;

/// Most characters of a name that a process or its starter has chosen.
const LONGEST: usize = 256;

/// What a person wants to know of a process. Names are [`Printable`], and cut with an ellipsis after
/// 256 characters. What this user may not read is None.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Path of its program, with ` (deleted)` behind it when that file is gone, which the kernel
    /// says in this way. None for a kernel thread.
    pub exe: Option<String>,
    /// Its command line, with blanks between the arguments. A process can change what is read here.
    /// None when it is empty.
    pub cmdline: Option<String>,
    /// The systemd unit it belongs to: the innermost service or scope in its cgroup's path, but for
    /// scopes that are containers.
    pub unit: Option<String>,
    /// Its container, by its cgroup's path.
    pub container: Option<String>,
    /// Most descriptors that it may have: its soft `RLIMIT_NOFILE`. None for no limit, too.
    pub nofile: Option<u64>,
    /// How many descriptors it has.
    pub fds: Option<u32>,
    /// Its real user id.
    pub uid: Option<u32>,
    /// Inode number of its network namespace.
    pub netns: Option<u32>,
    /// Its ids in the pid namespaces it is in, outermost first, which is this program's. One number
    /// if it is in no other namespace; empty before Linux 4.1.
    pub ns_pids: Vec<u32>,
}

impl Handle {
    /// What there is to know of it. None when it has ended, or `/proc` hides it.
    #[must_use]
    pub fn details(&self) -> Option<Details> {
        let status = match read(self, "status") {
            Err(Errno::NOENT | Errno::SRCH) => return None,
            status => status.unwrap_or_default(),
        };
        let limits = read(self, "limits").unwrap_or_default();
        let cgroups = read(self, "cgroup").unwrap_or_default();
        let cgroups = Cgroups::of(&cgroups);
        Some(Details {
            exe: self.exe(),
            cmdline: self.cmdline(),
            unit: cgroups.unit(),
            container: cgroups.container(),
            nofile: nofile(&limits),
            fds: self.descriptor_count(),
            uid: numbers_of(&status, "Uid:").next(),
            netns: super::link_inode(self, "ns/net", "net:[").ok().flatten(),
            ns_pids: numbers_of(&status, "NSpid:").collect(),
        })
    }

    fn exe(&self) -> Option<String> {
        let path = readlinkat(self, "exe", Vec::new()).ok()?;
        Some(bounded(path.as_bytes()))
    }

    fn cmdline(&self) -> Option<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(self, "cmdline", flags, Mode::empty()).ok()?;
        let mut bytes = Vec::new();
        // It may have megabytes. No character has more than four bytes.
        let most = 4 * (LONGEST as u64 + 1);
        File::from(file).take(most).read_to_end(&mut bytes).ok()?;
        for byte in &mut bytes {
            if *byte == 0 {
                *byte = b' ';
            }
        }
        let shown = bytes.trim_ascii();
        (!shown.is_empty()).then(|| bounded(shown))
    }
}

/// What is printable of a name, cut to [`LONGEST`] characters.
fn bounded(name: &[u8]) -> String {
    let mut text = Printable(name).to_string();
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        let (last, _) = text[..end].char_indices().next_back().unwrap_or_default();
        text.truncate(last);
        text.push('…');
    }
    text
}

/// Numbers behind a name in `/proc/PID/status`. No process can write a line there: the kernel escapes
/// the newlines in its comm.
fn numbers_of(status: &[u8], name: &str) -> impl Iterator<Item = u32> {
    let line = status
        .split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(name.as_bytes()))
        .and_then(|numbers| std::str::from_utf8(numbers).ok());
    line.into_iter()
        .flat_map(str::split_ascii_whitespace)
        .map_while(|number| number.parse().ok())
}

/// The soft limit of `/proc/PID/limits`; None for `unlimited`.
fn nofile(limits: &[u8]) -> Option<u64> {
    let limits = std::str::from_utf8(limits).ok()?;
    let soft_and_hard = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files "))?;
    soft_and_hard.split_ascii_whitespace().next()?.parse().ok()
}

/// The paths in `/proc/PID/cgroup`, each with what it is good for.
struct Cgroups<'a>(Vec<(Hierarchy, &'a str)>);

/// In the order in which they are asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hierarchy {
    /// cgroup2.
    Unified,
    /// `name=systemd` of version 1, where systemd keeps its units if not in cgroup2.
    Systemd,
    /// A controller of version 1.
    Controller,
}

impl<'a> Cgroups<'a> {
    fn of(file: &'a [u8]) -> Self {
        // Lines of `number:controllers:path`. No path has a newline in it: the kernel refuses it.
        let lines = file.split(|&byte| byte == b'\n');
        let mut paths: Vec<_> = lines
            .filter_map(|line| {
                let mut fields = std::str::from_utf8(line).ok()?.splitn(3, ':').skip(1);
                let hierarchy = match fields.next()? {
                    "" => Hierarchy::Unified,
                    "name=systemd" => Hierarchy::Systemd,
                    _ => Hierarchy::Controller,
                };
                let path = fields.next()?;
                // As the kernel says that the cgroup was removed.
                Some((hierarchy, path.strip_suffix(" (deleted)").unwrap_or(path)))
            })
            .collect();
        paths.sort_by_key(|(hierarchy, _)| *hierarchy);
        Self(paths)
    }

    fn container(&self) -> Option<String> {
        let mut paths = self.0.iter();
        let name = paths.find_map(|(_, path)| container::of_cgroup(path))?;
        Some(bounded(name.as_bytes()))
    }

    fn unit(&self) -> Option<String> {
        let mut paths = self.0.iter();
        let name = paths.find_map(|(hierarchy, path)| match hierarchy {
            Hierarchy::Unified | Hierarchy::Systemd => unit(path),
            Hierarchy::Controller => None,
        })?;
        Some(bounded(name.as_bytes()))
    }
}

fn unit(path: &str) -> Option<&str> {
    path.rsplit('/').find(|name| {
        let stem = name
            .strip_suffix(".service")
            .or_else(|| name.strip_suffix(".scope"));
        stem.is_some_and(|stem| !stem.is_empty()) && !container::is_container(name)
    })
}

/// See [`crate::fuzz`]: the files of a process that its owner has a say in.
pub(crate) fn fuzz(bytes: &[u8]) {
    let cgroups = Cgroups::of(bytes);
    let names = [cgroups.unit(), cgroups.container(), Some(bounded(bytes))];
    for name in names.iter().flatten() {
        assert!(name.chars().count() <= LONGEST, "{name}");
        assert!(!name.contains(char::is_control), "{name:?}");
    }
    let numbers = ["Uid:", "NSpid:"].map(|name| numbers_of(bytes, name).count());
    assert!(numbers.iter().all(|count| *count <= bytes.len()));
    std::hint::black_box(nofile(bytes));
}

#[cfg(test)]
mod tests;
