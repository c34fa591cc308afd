//! What the running system allows: what is needed to explain a refusal.

use std::{fs, io, path::Path};

use rustix::process::{Resource, getrlimit};

use super::{
    capabilities::Capabilities,
    private_mount::{SECURITYFS, with_securityfs},
    procfs,
};

/// Settings of this system, and rights of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// As `uname -r` prints it.
    pub release: String,
    /// What this process may do.
    pub capabilities: Capabilities,
    /// This process is in a user namespace of its own, where capabilities do not count for BPF.
    pub user_namespace: bool,
    /// How far the kernel is locked down.
    pub lockdown: Lockdown,
    /// The security modules, with commas between; empty if that cannot be read.
    pub security_modules: String,
    /// `kernel.kptr_restrict`: with 2, nobody sees the addresses in `/proc/kallsyms`.
    pub kptr_restrict: Option<u32>,
    /// `net.core.bpf_jit_enable`; function probes need it. None without root.
    pub bpf_jit: Option<u32>,
    /// `kernel.yama.ptrace_scope`; None without Yama.
    pub ptrace_scope: Option<u32>,
    /// Limit of locked memory in bytes, which maps count against before Linux 5.11; None: no limit.
    pub locked_memory: Option<u64>,
}

/// The mode of kernel lockdown (`security/lockdown/lockdown.c`, since Linux 5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lockdown {
    /// Not at all.
    Off,
    /// Nobody may change the kernel; tracing is possible.
    Integrity,
    /// Nobody may read its memory either; tracing is not possible.
    Confidentiality,
    /// That cannot be read.
    Unknown,
}

impl System {
    /// Reads it all.
    #[must_use]
    pub fn read() -> Self {
        let read = |name: &str| -> io::Result<String> {
            Ok(fs::read_to_string(Path::new(SECURITYFS).join(name))?
                .trim()
                .to_owned())
        };
        let (lockdown, security_modules) = with_securityfs(|| (read("lockdown"), read("lsm")))
            .unwrap_or_else(|error| (Err(error.kind().into()), Err(error)));
        let security_modules = security_modules.unwrap_or_default();
        Self {
            // Not from /proc: that takes a descriptor, and there may be none left.
            release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            capabilities: Capabilities::of_self(),
            user_namespace: procfs::has_own_user_namespace(),
            lockdown: match lockdown {
                Ok(text) => Lockdown::parse(&text),
                // The others are there, this one is not.
                Err(_) if !security_modules.is_empty() => Lockdown::Off,
                Err(_) => Lockdown::Unknown,
            },
            security_modules,
            kptr_restrict: number("kernel/kptr_restrict"),
            bpf_jit: number("net/core/bpf_jit_enable"),
            ptrace_scope: number("kernel/yama/ptrace_scope"),
            locked_memory: getrlimit(Resource::Memlock).current,
        }
    }

    /// Whether the release is before `major.minor`; no, if that is not known.
    #[must_use]
    pub fn is_before(&self, major: u32, minor: u32) -> bool {
        let mut numbers = self
            .release
            .split(|char: char| !char.is_ascii_digit())
            .map_while(|number| number.parse::<u32>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(found_major), Some(found_minor)) => (found_major, found_minor) < (major, minor),
            _ => false,
        }
    }
}

impl Lockdown {
    /// Of `none [integrity] confidentiality`, the one in brackets.
    fn parse(text: &str) -> Self {
        let (_, rest) = text.split_once('[').unwrap_or_default();
        match rest.split_once(']').unwrap_or_default().0 {
            "none" => Self::Off,
            "integrity" => Self::Integrity,
            "confidentiality" => Self::Confidentiality,
            _ => Self::Unknown,
        }
    }
}

/// A setting below `/proc/sys`.
fn sysctl(name: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    Some(text.trim().to_owned())
}

fn number(name: &str) -> Option<u32> {
    sysctl(name)?.parse().ok()
}

#[cfg(test)]
impl System {
    /// One that allows everything to root.
    pub(crate) fn permissive() -> Self {
        Self {
            release: "6.12.1".to_owned(),
            capabilities: Capabilities(u64::MAX),
            user_namespace: false,
            lockdown: Lockdown::Off,
            security_modules: "capability,apparmor".to_owned(),
            kptr_restrict: Some(1),
            bpf_jit: Some(1),
            ptrace_scope: Some(1),
            locked_memory: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        let of = |release: &str| System {
            release: release.to_owned(),
            ..System::permissive()
        };
        assert!(of("5.10.0-28-amd64").is_before(5, 12));
        assert!(!of("5.12.0").is_before(5, 12));
        assert!(!of("6.1.0").is_before(5, 12));
        assert!(!of("6.18.44-fc").is_before(5, 12));
        // Which it says of no kernel whose release it could not read.
        assert!(!of("").is_before(5, 12));
    }

    #[test]
    fn the_mode_of_lockdown_is_the_one_in_brackets() {
        for (text, mode) in [
            ("[none] integrity confidentiality", Lockdown::Off),
            ("none [integrity] confidentiality", Lockdown::Integrity),
            (
                "none integrity [confidentiality]",
                Lockdown::Confidentiality,
            ),
            ("", Lockdown::Unknown),
        ] {
            assert_eq!(Lockdown::parse(text), mode, "{text}");
        }
    }

    /// Whatever it is, the release is that of this kernel, and this is no kernel without security modules.
    #[test]
    fn this_system_can_be_read() {
        let system = System::read();
        assert_eq!(
            system.release,
            rustix::system::uname().release().to_string_lossy()
        );
        assert_eq!(
            system.lockdown == Lockdown::Unknown,
            system.security_modules.is_empty(),
            "{system:?}"
        );
    }
}
