//! Who makes most of what happens, to be said when records are lost to it.

use std::fmt;

use crate::event::{Comm, Transition};

/// How many processes are counted at a time. One that makes more than a fifth of the transitions is always among them.
const COUNTED: usize = 4;
/// A process with a smaller share of the transitions is no storm: many busy ones are.
const STORM_PERCENT: u64 = 50;

/// Transitions by the process that made them, since the last [`reset`](Self::reset).
///
/// Which process made most of them is found as Misra and Gries do: in constant memory, without an allocation.
#[derive(Default)]
pub(super) struct Makers {
    counted: [Option<Maker>; COUNTED],
    /// Transitions that a process made.
    made: u64,
    /// All transitions.
    all: u64,
    /// When the first of them was, boot time.
    since: Option<u64>,
}

#[derive(Clone, Copy)]
struct Maker {
    pid: u32,
    comm: Comm,
    /// Less as many as were set off against those of others.
    count: u64,
    /// As counted since this process has its place.
    seen: u64,
}

/// One process that makes most of the transitions.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Storm {
    pid: u32,
    comm: Comm,
    percent: u64,
    per_second: u64,
}

impl Makers {
    /// Counts a transition.
    pub(super) fn add(&mut self, transition: &Transition) {
        self.all += 1;
        self.since.get_or_insert(transition.time);
        // In softirq, the current process is any.
        if !transition.owned {
            return;
        }
        self.made += 1;
        let pid = transition.task.pid;
        let mut free = None;
        for (at, place) in self.counted.iter_mut().enumerate() {
            match place {
                Some(maker) if maker.pid == pid => {
                    maker.count += 1;
                    maker.seen += 1;
                    return;
                }
                Some(_) => {}
                None => free = Some(at),
            }
        }
        if let Some(free) = free {
            self.counted[free] = Some(Maker {
                pid,
                comm: transition.task.comm,
                count: 1,
                seen: 1,
            });
            return;
        }
        for place in &mut self.counted {
            *place = place
                .map(|maker| Maker {
                    count: maker.count - 1,
                    ..maker
                })
                .filter(|maker| maker.count > 0);
        }
    }

    /// The process that made most of the transitions until `now`, if one did. `lost`: how many records were lost
    /// meanwhile, which counts for the rate.
    pub(super) fn storm(&self, now: u64, lost: u64) -> Option<Storm> {
        let makers = self.counted.iter().flatten();
        let most = makers.max_by_key(|maker| maker.seen)?;
        let percent = most.seen * 100 / self.made;
        let ns = now.saturating_sub(self.since?).max(1);
        let per_second = u128::from(self.all + lost) * 1_000_000_000 / u128::from(ns);
        (percent >= STORM_PERCENT).then_some(Storm {
            pid: most.pid,
            comm: most.comm,
            percent,
            per_second: u64::try_from(per_second).unwrap_or(u64::MAX),
        })
    }

    /// Begins anew.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

impl fmt::Display for Storm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            comm,
            percent,
            per_second,
        } = self;
        write!(
            f,
            "about {per_second} transitions a second; {comm} (pid {pid}) made {percent} % of those that any process made"
        )
    }
}

#[cfg(test)]
mod tests {
    use tcptrace_ebpf::{Flags, Kind, State};
    use zerocopy::{FromZeros as _, IntoBytes as _};

    use super::*;
    use crate::event::{self, Event};

    fn transition(pid: u32, time: u64, owned: bool) -> Transition {
        let mut record = tcptrace_ebpf::Transition::new_zeroed();
        record.header.pid = pid;
        record.header.time = time;
        record.header.comm[..5].copy_from_slice(b"churn");
        record.header.flags = if owned { Flags::OWNED } else { 0 };
        record.header.kind = Kind::Transition as u8;
        record.header.family = 2;
        record.old = State::Established as u8;
        record.new = State::FinWait1 as u8;
        match event::decode(record.as_bytes()) {
            Ok(Event::Transition(transition)) => transition,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_one_that_makes_most_is_named_with_its_share_and_the_rate() {
        let mut makers = Makers::default();
        for number in 0..1000_u64 {
            // Nine in ten by one process, the rest by a hundred; as many again that nobody made.
            let pid = if number % 10 == 0 {
                100 + number as u32
            } else {
                7
            };
            makers.add(&transition(pid, number * 1_000_000, true));
            makers.add(&transition(9, number * 1_000_000, false));
        }
        let storm = makers.storm(1_000_000_000, 500).unwrap();
        assert_eq!(
            (storm.pid, storm.percent, storm.per_second),
            (7, 90, 2500),
            "{storm}"
        );
        makers.reset();
        assert_eq!(makers.storm(2_000_000_000, 500), None);
    }

    #[test]
    fn many_busy_processes_are_no_storm() {
        let mut makers = Makers::default();
        for number in 0..1000 {
            makers.add(&transition(number % 50, 1, true));
        }
        assert_eq!(makers.storm(1_000_000_000, 0), None);
    }
}
