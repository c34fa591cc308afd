//! What this process is allowed to do.

use std::fmt;

/// A capability's number (`include/uapi/linux/capability.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    number: u8,
    name: &'static str,
}

impl Capability {
    /// Load BPF programs; 5.8 and later.
    pub const BPF: Self = Self {
        number: 39,
        name: "CAP_BPF",
    };
    /// Trace with them; 5.8 and later.
    pub const PERFMON: Self = Self {
        number: 38,
        name: "CAP_PERFMON",
    };
    /// Everything else of old, the two above included.
    pub const SYS_ADMIN: Self = Self {
        number: 21,
        name: "CAP_SYS_ADMIN",
    };
}

/// Capabilities as a list to read: `CAP_BPF and CAP_PERFMON`.
pub struct List(Vec<Capability>);

impl List {
    /// Whether there is none in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, capability) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(" and ")?;
            }
            f.write_str(capability.name)?;
        }
        f.write_str(if self.0.len() == 1 { " is" } else { " are" })
    }
}

/// Which of these this process does not have. `CAP_SYS_ADMIN` stands for all of them.
#[must_use]
pub fn missing(wanted: &[Capability]) -> List {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = effective(&status).unwrap_or(0);
    let has = |capability: &Capability| effective >> capability.number & 1 == 1;
    List(if has(&Capability::SYS_ADMIN) {
        Vec::new()
    } else {
        wanted
            .iter()
            .copied()
            .filter(|capability| !has(capability))
            .collect()
    })
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
    fn lists_read_well() {
        let list = List(vec![Capability::BPF, Capability::PERFMON]);
        assert_eq!(list.to_string(), "CAP_BPF and CAP_PERFMON are");
        assert_eq!(List(vec![Capability::BPF]).to_string(), "CAP_BPF is");
    }
}
