//! Timewait sockets in FIN_WAIT2, of which no probe need show that they come to TIME_WAIT: a scan may have to.

use std::collections::{HashMap, HashSet};

use tcptrace_ebpf::State;

use crate::kernel::sock_diag::Entry;

/// A namespace of which no orphan was heard for so long has none: every scan that shows one counts.
const ORPHAN_NS: u64 = 70_000_000_000;

/// Orphans, as records and scans show them.
#[derive(Default)]
pub(super) struct Orphans {
    /// Namespaces with timewait sockets in FIN_WAIT2, and when the last was heard of: where a scan of TIME_WAIT may
    /// show something.
    namespaces: HashMap<u32, u64>,
    /// Those sockets, by cookie; whether a scan has shown them in TIME_WAIT. The tracker may want to see that twice.
    waiting: HashMap<u64, bool>,
    /// While a scan gathers orphans: those that have ended meanwhile.
    ended: Option<HashSet<u64>>,
}

impl Orphans {
    /// A timewait socket waits in FIN_WAIT2 in this namespace.
    pub(super) fn add(&mut self, netns: u32, cookie: u64, time: u64) {
        self.namespaces.insert(netns, time);
        self.waiting.insert(cookie, false);
    }

    /// It does not any more.
    pub(super) fn remove(&mut self, cookie: u64) {
        self.waiting.remove(&cookie);
        if let Some(ended) = &mut self.ended {
            ended.insert(cookie);
        }
    }

    /// A scan gathers orphans, while records are read.
    pub(super) fn begin_scan(&mut self) {
        self.ended = Some(HashSet::new());
    }

    /// The scan has gathered them. Returns those that have ended since it began: what it shows of them is no more.
    pub(super) fn end_scan(&mut self) -> HashSet<u64> {
        self.ended.take().unwrap_or_default()
    }

    /// Forgets namespaces that have had none for long.
    pub(super) fn forget_old(&mut self, now: u64) {
        self.namespaces
            .retain(|_, last| now.saturating_sub(*last) < ORPHAN_NS);
    }

    /// Namespaces that may have orphans, by inode number.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = u32> {
        self.namespaces.keys().copied()
    }

    /// Whether a namespace may have orphans.
    pub(super) fn are_in(&self, netns: u32) -> bool {
        self.namespaces.contains_key(&netns)
    }

    /// Whether this is one of them.
    pub(super) fn contains(&self, cookie: u64) -> bool {
        self.waiting.contains_key(&cookie)
    }

    /// Takes in what a scan shows. Returns whether that is new of an orphan.
    pub(super) fn see(&mut self, entry: &Entry, netns: u32) -> bool {
        if entry.is_timewait() && entry.state == State::FinWait2 {
            self.namespaces.insert(netns, entry.time);
            return self.waiting.insert(entry.cookie, false).is_none();
        }
        match self.waiting.get_mut(&entry.cookie) {
            Some(shown @ false) => {
                *shown = true;
                true
            }
            Some(true) => self.waiting.remove(&entry.cookie).is_some(),
            None => false,
        }
    }
}
