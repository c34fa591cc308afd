//! The kernel's clocks.

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

/// `CLOCK_BOOTTIME`: what events are stamped with. It goes on while the machine is suspended.
#[must_use]
pub fn boot_ns() -> u64 {
    read(libc::CLOCK_BOOTTIME)
}

/// For how long the calling thread has run on a CPU, in nanoseconds.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// What has to be added to boot time to get the time of day (UTC, nanoseconds since 1970).
#[must_use]
pub fn boot_to_utc_ns() -> i64 {
    offset(libc::CLOCK_REALTIME)
}

/// What has to be added to boot time to get `CLOCK_MONOTONIC`, which stands still while the machine is
/// suspended: 0 until the first suspend, then below.
#[must_use]
pub fn boot_to_monotonic_ns() -> i64 {
    offset(libc::CLOCK_MONOTONIC)
}

/// Two clocks cannot be read at the same instant: of a few tries the tightest counts.
fn offset(clock: libc::clockid_t) -> i64 {
    (0..5)
        .map(|_| {
            let before = boot_ns();
            let time = read(clock);
            let after = boot_ns();
            let middle = before + (after - before) / 2;
            (after - before, time as i64 - middle as i64)
        })
        .min()
        .map_or(0, |(_, offset)| offset)
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
    fn offset_leads_to_the_time_of_day() {
        let utc = boot_ns() as i64 + boot_to_utc_ns();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as i64;
        assert!((utc - now).abs() < 1_000_000_000, "{utc} {now}");
    }
}
