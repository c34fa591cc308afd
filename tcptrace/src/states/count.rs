//! Sockets counted by state.

use std::{cmp::Reverse, ops::AddAssign};

use tcptrace_ebpf::State;

use super::Seen;

/// How many sockets are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    by_state: [Count; State::ALL.len()],
}

/// How many sockets are in one state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// All of them.
    pub sockets: u64,
    /// Those of them that their process has closed.
    pub orphaned: u64,
    /// Those of them that no process has accepted.
    pub not_accepted: u64,
}

impl Counts {
    /// Counts one more.
    pub fn add(&mut self, seen: &Seen) {
        let count = &mut self.by_state[index(seen.state)];
        count.sockets += 1;
        count.orphaned += u64::from(seen.is_orphaned());
        count.not_accepted += u64::from(seen.is_not_accepted());
    }

    /// Of this state.
    #[must_use]
    pub fn of(&self, state: State) -> Count {
        self.by_state[index(state)]
    }

    /// In any state.
    #[must_use]
    pub fn sockets(&self) -> u64 {
        self.by_state.iter().map(|count| count.sockets).sum()
    }

    /// States that occur, the most frequent first.
    #[must_use]
    pub fn states(&self) -> Vec<(State, Count)> {
        let mut states: Vec<(State, Count)> = State::ALL
            .into_iter()
            .map(|state| (state, self.of(state)))
            .filter(|(_, count)| count.sockets > 0)
            .collect();
        states.sort_by_key(|(_, count)| Reverse(count.sockets));
        states
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        for (to, from) in self.by_state.iter_mut().zip(other.by_state) {
            to.sockets += from.sockets;
            to.orphaned += from.orphaned;
            to.not_accepted += from.not_accepted;
        }
    }
}

/// The kernel numbers them from 1, without gaps.
const fn index(state: State) -> usize {
    state as usize - 1
}
