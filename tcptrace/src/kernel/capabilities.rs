//! What this process is allowed to do.

/// A capability that tcptrace uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number (`include/uapi/linux/capability.h`).
    number: u8,
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Number of one that includes it.
    included_in: Option<u8>,
}

const CAP_DAC_OVERRIDE: u8 = 1;
const CAP_SYS_ADMIN: u8 = 21;

impl Capability {
    /// Load BPF programs; 5.8 and later.
    pub const BPF: Self = Self {
        number: 39,
        name: "CAP_BPF",
        purpose: "every transition",
        included_in: Some(CAP_SYS_ADMIN),
    };
    /// Trace with them; 5.8 and later.
    pub const PERFMON: Self = Self {
        number: 38,
        name: "CAP_PERFMON",
        purpose: "every transition",
        included_in: Some(CAP_SYS_ADMIN),
    };
    /// See the addresses in `/proc/kallsyms`.
    pub const SYSLOG: Self = Self {
        number: 34,
        name: "CAP_SYSLOG",
        purpose: "how TIME_WAIT ended, and without function probes all of it",
        included_in: None,
    };
    /// Enter namespaces, mount.
    pub const SYS_ADMIN: Self = Self {
        number: CAP_SYS_ADMIN,
        name: "CAP_SYS_ADMIN",
        purpose: "other network namespaces, and without function probes accept()",
        included_in: None,
    };
    /// Look into the processes of others.
    pub const SYS_PTRACE: Self = Self {
        number: 19,
        name: "CAP_SYS_PTRACE",
        purpose: "who holds a socket",
        included_in: None,
    };
    /// Read directories of others.
    pub const DAC_READ_SEARCH: Self = Self {
        number: 2,
        name: "CAP_DAC_READ_SEARCH",
        purpose: "who holds a socket, of other users",
        included_in: Some(CAP_DAC_OVERRIDE),
    };
    /// Ask a socket of another process for its network namespace.
    pub const NET_ADMIN: Self = Self {
        number: 12,
        name: "CAP_NET_ADMIN",
        purpose: "the network namespace of a finished socket",
        included_in: None,
    };

    /// All that are used.
    pub const ALL: [Self; 7] = [
        Self::BPF,
        Self::PERFMON,
        Self::SYSLOG,
        Self::SYS_ADMIN,
        Self::SYS_PTRACE,
        Self::DAC_READ_SEARCH,
        Self::NET_ADMIN,
    ];
}

/// The effective capabilities of a process, a bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Those of this process; none where that cannot be read.
    #[must_use]
    pub fn of_self() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self(effective(&status).unwrap_or(0))
    }

    /// Whether it is there, or one that includes it.
    #[must_use]
    pub fn has(self, capability: Capability) -> bool {
        let has = |number: u8| self.0 >> number & 1 == 1;
        has(capability.number) || capability.included_in.is_some_and(has)
    }

    /// Those of `wanted` that are not there.
    #[must_use]
    pub fn missing(self, wanted: &[Capability]) -> Vec<Capability> {
        let wanted = wanted.iter().copied();
        wanted.filter(|wanted| !self.has(*wanted)).collect()
    }
}

/// `CAP_BPF and CAP_PERFMON`.
#[must_use]
pub fn list(capabilities: &[Capability]) -> String {
    let names: Vec<&str> = capabilities
        .iter()
        .map(|capability| capability.name)
        .collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

fn effective(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_effective_set() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t000000c000000000\nCapBnd:\t1\n";
        assert_eq!(effective(status), Some(0xc0_0000_0000));
    }

    #[test]
    fn one_can_include_another() {
        let wanted = [Capability::BPF, Capability::SYSLOG];
        assert_eq!(Capabilities(0).missing(&wanted), wanted);
        let admin = Capabilities(1 << CAP_SYS_ADMIN);
        assert_eq!(admin.missing(&wanted), [Capability::SYSLOG]);
        assert!(Capabilities(1 << 39).has(Capability::BPF));
    }

    #[test]
    fn lists_read_well() {
        let [bpf, perfmon, syslog] = [Capability::BPF, Capability::PERFMON, Capability::SYSLOG];
        assert_eq!(list(&[bpf]), "CAP_BPF");
        assert_eq!(list(&[bpf, perfmon]), "CAP_BPF and CAP_PERFMON");
        assert_eq!(
            list(&[bpf, perfmon, syslog]),
            "CAP_BPF, CAP_PERFMON and CAP_SYSLOG"
        );
    }
}
