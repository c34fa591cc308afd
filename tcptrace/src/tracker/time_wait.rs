//! A timewait socket's life: when TIME_WAIT began, whether its minute started again, how it ended.
//!
//! The kernel tells less than that. What it keeps in the socket (the timer, the entry stamp) and who
//! took the timer away are enough to compute the rest.

use tcptrace_ebpf::{Caller, State};

use super::{TimeWaitKey, key, owners::OwnerId, table::Keyed};
use crate::event::{Socket, TimeWait};

/// `TCP_TIMEWAIT_LEN`, in seconds. A constant of the kernel (`include/net/tcp.h`), which no setting
/// changes.
pub const TIME_WAIT_SECONDS: u64 = 60;

/// How long an early end is kept back: a timer that moves to another wheel bucket is taken away and
/// started again, 3 µs later on 6.18.
const HOLD_NS: u64 = 50_000_000;

/// Until when the end that `record` tells of is kept back, if it is.
pub(super) const fn held_until(record: &TimeWait) -> u64 {
    record.time.saturating_add(HOLD_NS)
}

/// The unit of `tw_entry_stamp`.
const STAMP_NS: u64 = 1_000_000;

/// How TIME_WAIT ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ending {
    /// The timer ran out.
    Expired,
    /// A local `connect()` took the address pair over (`tcp_tw_reuse`).
    Reused,
    /// The peer's SYN opened the pair anew.
    Reopened,
    /// A RST with exactly the expected sequence number (`tcp_rfc1337` is 0).
    Reset,
    /// Destroyed through `sock_diag`: `ss -K`.
    Aborted,
    /// Its network namespace went away.
    NamespaceGone,
    /// It never began: `tcp_max_tw_buckets` was reached.
    Skipped,
    /// It is gone, and how is not known.
    Unknown,
}

impl Ending {
    /// Every ending, in the order they are listed.
    pub const ALL: [Self; 8] = [
        Self::Expired,
        Self::Reused,
        Self::Reopened,
        Self::Reset,
        Self::Aborted,
        Self::NamespaceGone,
        Self::Skipped,
        Self::Unknown,
    ];

    /// As it is written in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Reused => "reused",
            Self::Reopened => "reopened",
            Self::Reset => "reset",
            Self::Aborted => "aborted",
            Self::NamespaceGone => "namespace_gone",
            Self::Skipped => "skipped",
            Self::Unknown => "unknown",
        }
    }
}

/// What one timewait socket has shown so far.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) socket: Socket,
    pub(super) owner: OwnerId,
    pub(super) cgroup: u64,
    /// When it was made; `None` when that was before the tracer, or lost.
    pub(super) opened: Option<u64>,
    /// The state in which it was first seen: when it was made, if `opened` is known.
    pub(super) first: State,
    /// When TIME_WAIT began, if that is known by now.
    pub(super) entered: Option<Entry>,
    /// When FIN_WAIT2 began.
    pub(super) fin_wait2: Option<u64>,
    /// The timer was seen to start again in TIME_WAIT.
    pub(super) rearmed: bool,
    /// An end that may turn out to be a new start.
    pub(super) pending: Option<Pending>,
    /// A look showed it in TIME_WAIT with a timer that may still be that of FIN_WAIT2.
    pub(super) doubted: bool,
    /// The clocks' difference when it was made, to notice a suspend.
    pub(super) boot_to_monotonic_ns: i64,
    /// The last look that showed it.
    pub(super) seen: u32,
    /// When a record or a look last told of it.
    pub(super) last: u64,
    /// What looks alone tell of it, where there are no probes.
    pub(super) shown: Option<Box<Shown>>,
}

impl Keyed for Life {
    type Key = TimeWaitKey;

    fn key(&self) -> TimeWaitKey {
        key(&self.socket)
    }
}

/// That an end is kept back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// Until when.
    pub(super) due: u64,
    /// Nothing tells yet how it ended.
    pub(super) unexplained: bool,
}

/// The record of an end that is kept back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// Until when.
    pub(super) due: u64,
    pub(super) record: TimeWait,
}

/// What the looks at a timewait socket showed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown {
    /// When the last look showed it.
    pub(super) time: u64,
    /// When its timer is due, by that look.
    pub(super) due: u64,
    /// How much earlier than [`Life::entered`] it may have begun, if its minute was started again before
    /// the first look; `None` when it may be from before the tracer.
    pub(super) earlier: Option<u64>,
}

/// When TIME_WAIT began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Boot time, nanoseconds.
    pub(super) time: u64,
    /// The minute may have started again since it really began: this is the latest it can have been.
    pub(super) at_latest: bool,
}

/// What turns jiffies and stamps into boot time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    pub(super) hz: u32,
    pub(super) boot_to_monotonic_ns: i64,
}

impl Clocks {
    pub(super) const fn jiffies_ns(self, jiffies: u64) -> u64 {
        jiffies.saturating_mul(1_000_000_000) / self.hz as u64
    }

    /// The boot time of a 32-bit millisecond stamp, not later than `now`.
    const fn stamp(self, now: u64, stamp: u32) -> u64 {
        let monotonic_ms = now.saturating_add_signed(self.boot_to_monotonic_ns) / STAMP_NS;
        let age_ms = match (monotonic_ms as u32).wrapping_sub(stamp) {
            // The clocks are compared to some microseconds: what has just been stamped can seem to lie
            // in the next millisecond.
            ahead if ahead > u32::MAX - 1000 => 0,
            age => age as u64,
        };
        // To the beginning of the millisecond: the true time is up to one later.
        (monotonic_ms.saturating_sub(age_ms) * STAMP_NS)
            .saturating_add_signed(self.boot_to_monotonic_ns.saturating_neg())
    }

    /// When the timer that is due at `record.expires` was started for a full TIME_WAIT.
    pub(super) const fn armed(self, record: &TimeWait) -> u64 {
        let len = TIME_WAIT_SECONDS * self.hz as u64;
        let since = record
            .jiffies
            .saturating_add(len)
            .saturating_sub(record.expires);
        record.time.saturating_sub(self.jiffies_ns(since))
    }

    /// Whether the one is later, for certain: [`armed`](Self::armed) counts in jiffies, and the clock may
    /// tick on the way.
    pub(super) const fn is_after(self, time: u64, other: u64) -> bool {
        time > other.saturating_add(self.jiffies_ns(2))
    }
}

impl Life {
    /// The state it is in, as far as is known.
    pub(super) const fn state(&self) -> State {
        if self.entered.is_some() {
            State::TimeWait
        } else {
            State::FinWait2
        }
    }

    /// When TIME_WAIT began, by a record that shows the socket in TIME_WAIT.
    pub(super) fn entry(&self, record: &TimeWait, clocks: Clocks) -> Entry {
        if let Some(entry) = self.entered
            && !entry.at_latest
        {
            return entry;
        }
        if self.first == State::TimeWait
            && let Some(opened) = self.opened
        {
            return Entry {
                time: opened,
                at_latest: false,
            };
        }
        let not_before = self.opened.unwrap_or(0);
        if record.entry_stamp != 0 {
            let stamp = clocks.stamp(record.time, record.entry_stamp);
            // The stamp is cut to milliseconds. A record from the same one is of the entry itself.
            let time = if record.time < stamp.saturating_add(STAMP_NS) {
                record.time
            } else {
                stamp.max(not_before)
            };
            return Entry {
                time,
                at_latest: false,
            };
        }
        // Armed once for certain; whether it was the first time cannot be told.
        Entry {
            time: if record.expires == 0 {
                record.time
            } else {
                clocks.armed(record).max(not_before)
            },
            at_latest: true,
        }
    }

    /// It has not ended after all. Returns whether that end was without evidence.
    pub(super) fn withdraw(&mut self) -> bool {
        self.pending.take().is_some_and(|end| end.unexplained)
    }

    /// Takes a better-founded entry in place of one that has been told already. The time told stands if
    /// the two agree as far as clocks go: two lines about one event must not contradict each other.
    pub(super) fn settle(&mut self, entry: Entry, clocks: Clocks) {
        let time = match self.entered {
            // What was told is the better bound: since then the minute has started again.
            Some(told) if entry.at_latest && clocks.is_after(entry.time, told.time) => {
                self.rearmed = true;
                told.time
            }
            Some(told)
                if !clocks.is_after(told.time, entry.time)
                    && !clocks.is_after(entry.time, told.time) =>
            {
                told.time
            }
            _ => entry.time,
        };
        self.entered = Some(Entry { time, ..entry });
    }

    /// Whether the minute was started again, at the end; `None` when that cannot be told.
    pub(super) fn was_rearmed(&self, end: &TimeWait, entry: Entry, clocks: Clocks) -> Option<bool> {
        if self.rearmed {
            return Some(true);
        }
        // The timer stands still while the machine sleeps.
        if entry.at_latest || self.slept(clocks) {
            return None;
        }
        Some(clocks.is_after(clocks.armed(end), entry.time))
    }

    /// Whether the machine was suspended since the socket became known.
    pub(super) const fn slept(&self, clocks: Clocks) -> bool {
        self.boot_to_monotonic_ns
            .abs_diff(clocks.boot_to_monotonic_ns)
            > 10_000_000
    }
}

/// What a record of an end says about how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// This way.
    Certain(Ending),
    /// A segment took the timer away. If it does not start again, this way.
    Unless(Ending),
    /// No evidence: what comes next on the same address pair may tell.
    Open,
}

/// Judges the record of an end by the timer, then by who took it away.
pub(super) fn verdict(end: &TimeWait) -> Verdict {
    if end.expires != 0 && end.jiffies >= end.expires {
        return Verdict::Certain(Ending::Expired);
    }
    let called = |callers: [Caller; 2]| end.callers & (callers[0].bit() | callers[1].bit()) != 0;
    if called([Caller::Connect, Caller::Connect6]) {
        Verdict::Certain(Ending::Reused)
    } else if called([Caller::Purge, Caller::Purge]) {
        Verdict::Certain(Ending::NamespaceGone)
    } else if called([Caller::Abort, Caller::Destroy]) {
        Verdict::Certain(Ending::Aborted)
    } else if called([Caller::Segment, Caller::Segment]) {
        Verdict::Unless(Ending::Reset)
    } else if called([Caller::Receive, Caller::Receive6]) {
        Verdict::Certain(Ending::Reopened)
    } else {
        Verdict::Open
    }
}
