//! How much memory this process may count on.

use std::{fs, path::Path};

/// Bytes of memory: the machine's, or the lowest limit of the cgroups that this process is in, if that is less.
///
/// A cgroup is charged for BPF maps as well (5.11 and later), so a container's limit counts.
#[must_use]
pub fn available() -> u64 {
    let machine = rustix::system::sysinfo();
    let machine = (machine.totalram as u64).saturating_mul(u64::from(machine.mem_unit));
    let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = cgroup_v2(&cgroup).and_then(|path| limit(Path::new("/sys/fs/cgroup"), path));
    limit.map_or(machine, |limit| limit.min(machine))
}

/// The path of the cgroup v2 in a `/proc/PID/cgroup`.
fn cgroup_v2(text: &str) -> Option<&Path> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(path))
}

/// The lowest `memory.max` on the way from `root` to the cgroup at `path` below it; `None` without a limit.
fn limit(root: &Path, path: &Path) -> Option<u64> {
    path.ancestors()
        .filter_map(|path| fs::read_to_string(root.join(path).join("memory.max")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_on_the_way_counts() {
        let root = std::env::temp_dir().join(format!("tcptrace-memory-{}", std::process::id()));
        let inner = root.join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        assert_eq!(limit(&root, Path::new("outer/inner")), None);
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit(&root, Path::new("outer/inner")), None);
        fs::write(root.join("outer/memory.max"), "1000000\n").unwrap();
        assert_eq!(limit(&root, Path::new("outer/inner")), Some(1_000_000));
        fs::write(inner.join("memory.max"), "2000000\n").unwrap();
        assert_eq!(limit(&root, Path::new("outer/inner")), Some(1_000_000));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_cgroup_of_a_process() {
        let text = "12:cpu:/other\n0::/system.slice/a.service\n";
        assert_eq!(cgroup_v2(text), Some(Path::new("system.slice/a.service")));
        assert_eq!(cgroup_v2("0::/\n"), Some(Path::new("")));
        assert_eq!(cgroup_v2("1:cpu:/\n"), None);
    }

    #[test]
    fn this_machine_has_some() {
        assert!(available() > 1 << 20);
    }
}
