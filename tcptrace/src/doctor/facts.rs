//! What is so on this machine. Only gathered here: what it means is for [`judge`](super::judge).

use std::{env, fs, io, path::PathBuf, sync::Arc, thread};

use crate::{
    container, exhausted,
    kernel::{
        cgroup::{self, Cgroups},
        clock,
        netns::{self, Namespaces},
        probes::{self, Tried},
        procfs::{self, Unseen},
        sock_diag::Query,
        system::System,
        unlisted,
    },
    reason::Reason,
};

/// The machine, for who reads a report of it elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The kernel's release.
    pub kernel: String,
    /// The processor's architecture.
    pub arch: &'static str,
    /// `PRETTY_NAME` of `/etc/os-release`.
    pub distribution: Option<String>,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// What tells that this is a container: a file, or its id.
    pub container: Option<String>,
}

/// Everything that a judgement needs.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The machine.
    pub host: Host,
    /// When this was gathered, in nanoseconds since 1970, UTC.
    pub utc_ns: i64,
    /// What the system allows.
    pub system: System,
    /// What the kernel takes.
    pub tried: Tried,
    /// Jiffies in a second.
    pub hz: u32,
    /// How many TCP sockets `sock_diag` lists in this network namespace.
    pub sock_diag: Result<usize, Reason>,
    /// The network namespaces.
    pub namespaces: Result<Entered, Reason>,
    /// What `/proc` does not show of processes.
    pub processes: Result<Unseen, Reason>,
    /// Its processes have other numbers than in the initial pid namespace.
    pub private_pids: bool,
    /// Where cgroup2 is mounted.
    pub cgroup2: Result<PathBuf, Reason>,
    /// Whether descriptors of processes can be duplicated, tried on one of this process.
    pub duplicate: Result<(), Arc<io::Error>>,
    /// How many MPTCP sockets this network namespace has; `None` if the kernel has no MPTCP.
    pub mptcp: Option<u32>,
}

/// Which network namespaces could be entered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entered {
    /// How many there are, this one included.
    pub found: usize,
    /// Why not those of them that could not.
    pub reasons: Vec<Reason>,
}

impl Facts {
    /// Reads and tries it all. Everything that was loaded for it is gone afterwards.
    #[must_use]
    pub fn gather() -> Self {
        let system = System::read();
        let namespaces = Namespaces::discover();
        Self {
            host: Host::read(&system),
            utc_ns: clock::boot_to_utc_ns().saturating_add_unsigned(clock::boot_ns()),
            tried: probes::try_all(),
            hz: clock::hz(),
            sock_diag: count_sockets(namespaces.as_ref()),
            namespaces: match &namespaces {
                Ok(namespaces) => Ok(enter(namespaces)),
                Err(error) => Err(no_proc(error)),
            },
            processes: procfs::sockets(|_, _| {}).map_err(|error| no_proc(&error)),
            private_pids: procfs::has_private_pids(),
            cgroup2: match Cgroups::open() {
                Ok(cgroups) => Ok(cgroups.point().to_owned()),
                Err(error) => Err(cgroup::reason(&error)),
            },
            duplicate: unlisted::try_duplicate().map_err(Arc::new),
            mptcp: fs::read_to_string("/proc/thread-self/net/protocols")
                .ok()
                .and_then(|table| mptcp_sockets(&table)),
            system,
        }
    }
}

impl Host {
    fn read(system: &System) -> Self {
        Self {
            kernel: system.release.clone(),
            arch: env::consts::ARCH,
            distribution: ["/etc/os-release", "/usr/lib/os-release"]
                .iter()
                .find_map(|path| fs::read_to_string(path).ok())
                .and_then(|text| pretty_name(&text)),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            container: marker(),
        }
    }
}

/// What tells that this is a container, if something does. That nothing does is no proof of the contrary.
fn marker() -> Option<String> {
    let files = [
        "/run/.containerenv",
        "/.dockerenv",
        "/run/systemd/container",
    ];
    let file = files.iter().find(|file| fs::exists(file).unwrap_or(false));
    file.map(|file| (*file).to_owned()).or_else(|| {
        let cgroups = fs::read_to_string("/proc/self/cgroup").ok()?;
        cgroups
            .lines()
            .find_map(|line| container::of_cgroup(line.rsplit(':').next()?))
    })
}

/// `PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"`.
fn pretty_name(os_release: &str) -> Option<String> {
    let mut lines = os_release.lines();
    let name = lines.find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches(['"', '\'']).to_owned())
}

fn count_sockets(namespaces: Result<&Namespaces, &io::Error>) -> Result<usize, Reason> {
    let namespaces = namespaces.map_err(no_proc)?;
    let own = netns::own_inode().map_err(|error| no_proc(&error))?;
    // The own one is always there.
    let Some(namespace) = namespaces.get(own) else {
        return Ok(0);
    };
    let mut diag = namespace.diag().map_err(|error| {
        let mut reasons = netns::reasons(&[error]);
        reasons
            .pop()
            .unwrap_or_else(|| Reason::new("this network namespace is gone", "try again"))
    })?;
    let mut count = 0;
    // One that moved meanwhile may be missing, or be counted twice: it is that there are any.
    let _ = diag
        .dump(Query::ALL, |_| count += 1)
        .map_err(|error| error.reason(own))?;
    Ok(count)
}

/// Why nothing can be read of `/proc`.
fn no_proc(error: &io::Error) -> Reason {
    exhausted::reason("cannot read /proc", error, exhausted::MOUNT_PROC)
}

fn enter(namespaces: &Namespaces) -> Entered {
    let errors: Vec<netns::Error> = namespaces
        .iter()
        .filter_map(|namespace| namespace.diag().err())
        .collect();
    Entered {
        found: namespaces.iter().count(),
        reasons: netns::reasons(&errors),
    }
}

/// How many MPTCP sockets a namespace has: the third column of `/proc/net/protocols`.
fn mptcp_sockets(table: &str) -> Option<u32> {
    table
        .lines()
        .filter_map(|line| {
            let mut row = line.split_ascii_whitespace();
            let is_mptcp = matches!(row.next()?, "MPTCP" | "MPTCPv6");
            is_mptcp.then(|| row.nth(1)?.parse::<u32>().ok()).flatten()
        })
        .reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distribution_names_itself() {
        let text = "NAME=\"Debian GNU/Linux\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n";
        assert_eq!(
            pretty_name(text).as_deref(),
            Some("Debian GNU/Linux 12 (bookworm)")
        );
        assert_eq!(pretty_name("ID=x\n"), None);
    }

    #[test]
    fn mptcp_is_counted_in_both_families() {
        let table = "protocol  size sockets  memory press maxhdr  slab module\n\
                     MPTCPv6   2144      1       0   no       0   yes  kernel\n\
                     MPTCP     1968      7       0   no       0   yes  kernel\n\
                     TCP       2368     12       1   no     320   yes  kernel\n";
        assert_eq!(mptcp_sockets(table), Some(8));
        let without = table.replace("MPTCP", "OTHER");
        assert_eq!(mptcp_sockets(&without), None);
    }
}
