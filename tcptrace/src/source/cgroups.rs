//! Paths of cgroups, told before the first event that needs one.

use std::collections::HashSet;

use crate::{
    event::Event,
    kernel::cgroup::{self, Cgroups},
    reason::Reason,
};

/// How many cgroups are remembered. Ids are never used again, so on a host that starts containers all
/// the time they would go on growing: then all are told anew.
const MOST: usize = 1 << 16;

/// Which cgroups have been told.
pub(super) struct KnownCgroups {
    /// `None` where there is no cgroup v2.
    cgroups: Option<Cgroups>,
    known: HashSet<u64>,
    /// Most events are of the same one as the event before.
    last: u64,
}

impl KnownCgroups {
    /// Where there is no cgroup v2, also why nothing can be told.
    pub(super) fn open() -> (Self, Option<Reason>) {
        let (cgroups, reason) = match Cgroups::open() {
            Ok(cgroups) => (Some(cgroups), None),
            Err(error) => (None, Some(cgroup::reason(&error))),
        };
        let known = Self {
            cgroups,
            known: HashSet::new(),
            last: 0,
        };
        (known, reason)
    }

    /// Tells the path of a cgroup, once; 0 is none.
    pub(super) fn resolve(&mut self, id: u64, each: &mut impl FnMut(&Event)) {
        if id == 0 || id == self.last {
            return;
        }
        self.last = id;
        if self.known.len() >= MOST {
            self.known.clear();
        }
        if self.known.insert(id)
            && let Some(path) = self.cgroups.as_ref().and_then(|cgroups| cgroups.path(id))
        {
            each(&Event::Cgroup {
                id,
                path: path.into(),
            });
        }
    }
}
