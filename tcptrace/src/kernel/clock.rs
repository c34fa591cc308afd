//! The kernel's clocks, as the host has them.
//!
//! In a time namespace (time_namespaces(7), since Linux 5.6) this process's `CLOCK_BOOTTIME` and
//! `CLOCK_MONOTONIC` are those of the host plus an offset, and so are the times in its `/proc`. Records of BPF,
//! and stamps in sockets, have the host's. Everything else in tcptrace has the host's as well: what is read with
//! the offset is converted here, and nowhere else.

use std::sync::LazyLock;

use rustix::fs::CWD;

use super::procfs;

/// A clock's time in nanoseconds.
fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable. The call fails only for a clock that does not exist.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The host's `CLOCK_BOOTTIME`: what events are stamped with. It goes on while the machine is suspended.
#[must_use]
pub fn boot_ns() -> u64 {
    read(libc::CLOCK_BOOTTIME).saturating_add_signed(-OFFSETS.boot)
}

/// When a process started, boot time nanoseconds, from field 22 of `/proc/PID/stat`: clock ticks as this process's
/// time namespace counts them (`do_task_stat()`, 5.6 to 6.18). Cut to a tick.
#[must_use]
pub fn start_of_ticks(ticks: u64) -> u64 {
    OFFSETS.start_of_ticks(ticks)
}

/// Field 22 of `/proc/PID/stat` for a process that started at this boot time, nanoseconds.
#[must_use]
pub fn ticks_of_start(start: u64) -> u64 {
    OFFSETS.ticks_of_start(start)
}

/// The start of a process as a record has it, to be compared with [`start_of_ticks`] to a hundredth of a second.
/// Nothing is changed but where the offset is no whole number of ticks: there it is cut as `/proc` cuts it.
#[must_use]
pub fn comparable_start(start: u64) -> u64 {
    OFFSETS.comparable_start(start)
}

/// Nanoseconds in a clock tick of `/proc/PID/stat`: 10 ms everywhere but on alpha and ia64.
fn tick() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

/// For how long the calling thread has run on a CPU, in nanoseconds.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// What has to be added to boot time to get the time of day (UTC, nanoseconds since 1970).
#[must_use]
pub fn boot_to_utc_ns() -> i64 {
    // The time of day is the same in every time namespace.
    offset(libc::CLOCK_REALTIME, 0)
}

/// What has to be added to boot time to get `CLOCK_MONOTONIC`, which stands still while the machine is
/// suspended: 0 until the first suspend, then below.
#[must_use]
pub fn boot_to_monotonic_ns() -> i64 {
    offset(libc::CLOCK_MONOTONIC, OFFSETS.monotonic)
}

/// What to add to boot time to get `clock`, less what a time namespace `added` to that. Two clocks cannot be read at
/// the same instant: of a few tries the tightest counts.
fn offset(clock: libc::clockid_t, added: i64) -> i64 {
    (0..5)
        .map(|_| {
            let before = boot_ns();
            let time = read(clock);
            let after = boot_ns();
            let middle = before + (after - before) / 2;
            (after - before, time as i64 - added - middle as i64)
        })
        .min()
        .map_or(0, |(_, offset)| offset)
}

/// What this process's time namespace adds to the host's clocks, nanoseconds. It stays the same as long as a process
/// lives that does not move itself.
static OFFSETS: LazyLock<Offsets> = LazyLock::new(|| Offsets::of_self().unwrap_or_default());

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Offsets {
    boot: i64,
    monotonic: i64,
}

/// `PROC_TIME_INIT_INO`: the inode number of the initial time namespace, part of the kernel's interface.
const INITIAL: u32 = 0xEFFF_FFFA;
const TIME: &str = "time:[";

impl Offsets {
    fn of_self() -> Option<Self> {
        let own = procfs::link_inode(CWD, "/proc/self/ns/time", TIME).ok()??;
        if own == INITIAL {
            return Some(Self::default());
        }
        let mut found = Self::of_process(own, "self");
        if found.is_none() {
            // This process has made a namespace for its children (`unshare()`), and its own file shows that. Another
            // process in its own one shows the offsets.
            let _ = procfs::processes(|process| {
                if found.is_none() {
                    found = Self::of_process(own, &process.pid().to_string());
                }
                Ok(())
            });
        }
        found
    }

    /// From `/proc/PID/timens_offsets`, which shows those of the namespace that the process's children will be in
    /// (`proc_timens_show_offsets()`, 5.6 to 6.18).
    fn of_process(namespace: u32, pid: &str) -> Option<Self> {
        let file = format!("/proc/{pid}/ns/time_for_children");
        if procfs::link_inode(CWD, file, TIME).ok()?? != namespace {
            return None;
        }
        Self::parse(&procfs::read(CWD, format!("/proc/{pid}/timens_offsets")).ok()?)
    }

    /// Lines of `clock seconds nanoseconds`; 5.6 had numbers for the names.
    fn parse(text: &[u8]) -> Option<Self> {
        let mut offsets = Self::default();
        for line in std::str::from_utf8(text).ok()?.lines() {
            let mut fields = line.split_ascii_whitespace();
            let offset = match fields.next()? {
                "monotonic" | "1" => &mut offsets.monotonic,
                "boottime" | "7" => &mut offsets.boot,
                _ => continue,
            };
            let seconds: i64 = fields.next()?.parse().ok()?;
            let nanoseconds: i64 = fields.next()?.parse().ok()?;
            *offset = seconds
                .checked_mul(1_000_000_000)?
                .checked_add(nanoseconds)?;
        }
        Some(offsets)
    }

    fn start_of_ticks(self, ticks: u64) -> u64 {
        ticks
            .saturating_mul(tick())
            .saturating_add_signed(-self.boot)
    }

    fn ticks_of_start(self, start: u64) -> u64 {
        start.saturating_add_signed(self.boot) / tick()
    }

    fn comparable_start(self, start: u64) -> u64 {
        // Of nearly every process, and asked for each record: nothing is to be divided for it.
        if self.boot == 0 || self.boot.unsigned_abs().is_multiple_of(tick()) {
            return start;
        }
        self.start_of_ticks(self.ticks_of_start(start))
    }
}

/// Timer interrupts a second, CONFIG_HZ: the unit of jiffies.
///
/// A coarse clock's resolution is one tick (`hrtimer_resolution` apart, `posix_get_coarse_res` in
/// kernel/time/posix-timers.c gives `KTIME_LOW_RES`, which is `TICK_NSEC`; 5.4 to 6.18).
#[must_use]
pub fn hz() -> u32 {
    let mut resolution = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `resolution` is writable.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut resolution) };
    let tick = resolution.tv_nsec.max(1);
    ((1_000_000_000 + tick / 2) / tick) as u32
}

/// Whether a kernel can be built with this HZ: 24 to 1200 (`kernel/Kconfig.hz`, and those of Alpha and MIPS;
/// 6.18).
#[must_use]
pub const fn is_plausible(hz: u32) -> bool {
    matches!(hz, 24..=1200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hz_is_one_the_kernel_can_have() {
        assert!([24, 32, 48, 64, 100, 128, 250, 256, 300, 1000, 1024, 1200].contains(&hz()));
    }

    #[test]
    fn the_offsets_of_a_time_namespace_are_read() {
        let text = b"monotonic         -5         7\nboottime       98765 123456789\n";
        let offsets = Offsets {
            monotonic: -4_999_999_993,
            boot: 98_765_123_456_789,
        };
        assert_eq!(Offsets::parse(text), Some(offsets));
        assert_eq!(
            Offsets::parse(b"1 -5 7\n7 98765 123456789\n"),
            Some(offsets)
        );
        assert_eq!(Offsets::parse(b"boottime 9223372037 0\n"), None);
        assert_eq!(Offsets::parse(b"boottime x 0\n"), None);
    }

    #[test]
    fn a_start_is_the_same_from_a_record_and_from_proc() {
        const TICK: u64 = 10_000_000;
        let start = 3_141_592_653_589_u64;
        for boot in [
            0,
            98_765_000_000_000,
            98_765_123_456_789,
            -1_000_000_000_000,
            -999_999_999_999,
        ] {
            let offsets = Offsets { boot, monotonic: 0 };
            // What the kernel does.
            let ticks = start.saturating_add_signed(boot) / TICK;
            assert_eq!(offsets.ticks_of_start(start), ticks, "{boot}");
            let shown = offsets.start_of_ticks(ticks);
            assert!(shown <= start && start < shown + TICK, "{boot}: {shown}");
            let recorded = offsets.comparable_start(start);
            assert_eq!(recorded / TICK, shown / TICK, "{boot}: {recorded} {shown}");
        }
    }

    #[test]
    fn offset_leads_to_the_time_of_day() {
        let utc = boot_ns() as i64 + boot_to_utc_ns();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as i64;
        assert!((utc - now).abs() < 1_000_000_000, "{utc} {now}");
    }
}
