//! BPF programs in the kernel: which a process has loaded, how often they ran, and how long that took.

use std::{collections::BTreeMap, fs, ops::Add, os::fd::OwnedFd};

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};

/// How often a program ran while statistics were on, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) count: u64,
    pub(super) ns: u64,
}

/// Has the kernel count what programs run: for as long as this is open.
pub(super) fn count_runs() -> Result<OwnedFd> {
    enable_stats(Stats::RunTime).context("cannot turn on BPF statistics")
}

/// The programs of a process by id, from the files that it has open.
pub(super) fn of(pid: u32) -> BTreeMap<u32, Run> {
    fdinfos(pid).filter_map(|text| parse(&text)).collect()
}

/// What `fdinfo` says of each descriptor of a process.
fn fdinfos(pid: u32) -> impl Iterator<Item = String> {
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    let files = files.into_iter().flatten().flatten();
    files.filter_map(|file| fs::read_to_string(file.path()).ok())
}

fn field(fdinfo: &str, name: &str) -> Option<u64> {
    let line = fdinfo.lines().find_map(|line| line.strip_prefix(name));
    line?.trim().parse().ok()
}

/// What `fdinfo` says of the descriptor of a program; `None` of anything else. A link names its program as
/// well, but not how often that ran.
fn parse(fdinfo: &str) -> Option<(u32, Run)> {
    let run = Run {
        count: field(fdinfo, "run_cnt:")?,
        ns: field(fdinfo, "run_time_ns:")?,
    };
    Some((field(fdinfo, "prog_id:")?.try_into().ok()?, run))
}

/// Bytes of a process's ring buffer, the largest if it has several.
pub(super) fn ring_buffer(pid: u32) -> Option<u32> {
    fdinfos(pid)
        .filter_map(|text| ring_buffer_size(&text))
        .max()
}

/// What `fdinfo` says of the descriptor of a ring buffer; `None` of anything else.
fn ring_buffer_size(fdinfo: &str) -> Option<u32> {
    /// `BPF_MAP_TYPE_RINGBUF` of `include/uapi/linux/bpf.h`.
    const RING_BUFFER: u64 = 27;
    (field(fdinfo, "map_type:")? == RING_BUFFER).then_some(())?;
    field(fdinfo, "max_entries:")?.try_into().ok()
}

/// The line of `fdinfo` that counts runs that were left out; only programs have it.
const MISSES: &str = "recursion_misses:";

/// How often the kernel has not run a program of a process because it had interrupted itself on that CPU.
pub(super) fn missed(pid: u32) -> u64 {
    fdinfos(pid).filter_map(|text| field(&text, MISSES)).sum()
}

/// The kernel's names of all programs, by id.
pub(super) fn names() -> BTreeMap<u32, String> {
    let programs = loaded_programs().filter_map(Result::ok);
    programs
        .map(|program| {
            let name = String::from_utf8_lossy(program.name()).into_owned();
            (program.id(), name)
        })
        .collect()
}

impl Add for Run {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            ns: self.ns + other.ns,
        }
    }
}

impl Run {
    /// What came since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            count: self.count.saturating_sub(before.count),
            ns: self.ns.saturating_sub(before.ns),
        }
    }

    /// Nanoseconds a run; `None` without one.
    pub(super) fn each(self) -> Option<f64> {
        (self.count > 0).then(|| self.ns as f64 / self.count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_count() {
        let program = "pos:\t0\nflags:\t02000002\nprog_type:\t26\nprog_id:\t61\nrun_time_ns:\t1200\nrun_cnt:\t4\n";
        let run = Run { count: 4, ns: 1200 };
        assert_eq!(parse(program), Some((61, run)));
        assert_eq!(run.each(), Some(300.0));
        assert_eq!(parse("pos:\t0\nlink_type:\ttracing\nprog_id:\t61\n"), None);
        assert_eq!(parse("pos:\t0\n"), None);
    }

    #[test]
    fn only_ring_buffers_count() {
        let map = |kind| format!("pos:\t0\nmap_type:\t{kind}\nkey_size:\t0\nmax_entries:\t4096\n");
        assert_eq!(ring_buffer_size(&map(27)), Some(4096));
        assert_eq!(ring_buffer_size(&map(2)), None);
        assert_eq!(ring_buffer_size("pos:\t0\n"), None);
    }

    #[test]
    fn misses_of_programs_only() {
        let program = "prog_id:\t61\nrun_cnt:\t4\nrecursion_misses:\t3\n";
        assert_eq!(field(program, MISSES), Some(3));
        assert_eq!(
            field("pos:\t0\nlink_type:\ttracing\nprog_id:\t61\n", MISSES),
            None
        );
    }

    #[test]
    fn what_ran_meanwhile() {
        let before = Run { count: 4, ns: 1200 };
        let after = Run { count: 6, ns: 1300 };
        assert_eq!(after.since(before).each(), Some(50.0));
        assert_eq!(before.since(before).each(), None);
    }
}
