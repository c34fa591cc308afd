//! Time as the kernel keeps it.

use std::{
    fs,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_getres, clock_gettime};

/// The kernel's HZ: jiffies per second. The coarse clocks advance once per jiffy.
pub static HERTZ: LazyLock<i64> = LazyLock::new(|| {
    let jiffy = clock_getres(ClockId::CLOCK_REALTIME_COARSE).expect("Linux has it");
    1_000_000_000 / jiffy.tv_nsec()
});

/// Whether the running kernel is this one or later.
///
/// # Panics
/// When its release does not begin with two numbers.
#[must_use]
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux has it");
    let mut numbers = release
        .split(|char: char| !char.is_ascii_digit())
        .map(|number| number.parse::<u32>().expect("a version"));
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

/// Nanoseconds since boot, with time in suspend.
///
/// # Panics
/// Never on Linux.
#[must_use]
pub fn boottime() -> i64 {
    nanoseconds(ClockId::CLOCK_BOOTTIME)
}

/// The time of day (nanoseconds since 1970) at a time since boot.
#[must_use]
pub fn realtime_of_boottime(time: i64) -> i64 {
    // Between two clocks another process may run, for milliseconds where CPUs are busy: the readings that lie
    // closest together count.
    let reading = || {
        let before = boottime();
        let realtime = nanoseconds(ClockId::CLOCK_REALTIME);
        (boottime() - before, realtime - before)
    };
    let (_, difference) = (0..10).map(|_| reading()).min().expect("ten");
    time + difference
}

fn nanoseconds(clock: ClockId) -> i64 {
    let time = clock_gettime(clock).expect("Linux has it");
    time.tv_sec() * 1_000_000_000 + time.tv_nsec()
}

/// The granularity, in nanoseconds, of the kernel's timer wheel for a timer of so many seconds: level n has
/// 64 buckets of 8^n jiffies (`kernel/time/timer.c`). A timer runs out late by up to that.
#[must_use]
pub fn wheel_step(seconds: i64) -> i64 {
    let (mut step, mut reach) = (1, 63);
    while seconds * *HERTZ >= reach {
        step *= 8;
        reach *= 8;
    }
    step * 1_000_000_000 / *HERTZ
}

/// Looks every 5 ms until `look` finds something.
///
/// # Panics
/// When there is still nothing after `limit`.
pub fn wait_until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
