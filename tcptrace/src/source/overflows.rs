//! How many TIME_WAITs were skipped: `TCPTimeWaitOverflow` of each network namespace.

use std::{
    collections::HashMap,
    rc::Rc,
    time::{Duration, Instant},
};

use crate::{
    event::Event,
    kernel::{
        clock,
        netns::{self, Namespaces},
        netstat::TcpExt,
    },
};

/// How often, at most, namespaces are searched for one that is not known: anybody can make and end many.
const DISCOVER_EVERY: Duration = Duration::from_secs(1);

/// See the [module](self).
pub(super) struct Overflows {
    /// When the counter was last read, by namespace.
    read: HashMap<u32, u64>,
    /// The counter was read once for every namespace that there was.
    begun: bool,
    namespaces: Option<Rc<Namespaces>>,
    discovered: Option<Instant>,
}

impl Overflows {
    pub(super) fn new() -> Self {
        Self {
            read: HashMap::new(),
            begun: false,
            namespaces: None,
            discovered: None,
        }
    }

    /// Reads how many there were so far in `namespaces`, of those that are `wanted`: what came before the tracer is not
    /// its concern.
    pub(super) fn begin(
        &mut self,
        namespaces: Option<Rc<Namespaces>>,
        wanted: impl Fn(u32) -> bool,
        emit: &mut impl FnMut(&Event),
    ) {
        self.namespaces = namespaces;
        let inodes: Vec<u32> = self
            .namespaces
            .iter()
            .flat_map(|namespaces| namespaces.iter())
            .map(netns::Namespace::inode)
            .filter(|inode| wanted(*inode))
            .collect();
        for inode in inodes {
            self.read(inode, emit);
        }
        self.begun = true;
    }

    /// Makes sure that the count includes what happened at `time`.
    pub(super) fn include(&mut self, netns: u32, time: u64, emit: &mut impl FnMut(&Event)) {
        if self.read.get(&netns).is_none_or(|read| *read <= time) {
            self.read(netns, emit);
        }
    }

    fn read(&mut self, inode: u32, emit: &mut impl FnMut(&Event)) {
        let time = clock::boot_ns();
        let first = self.read.insert(inode, time).is_none();
        let mut counters = self.counters(inode);
        if matches!(counters, Err(netns::Error::Gone { .. }))
            && self
                .discovered
                .is_none_or(|last| last.elapsed() >= DISCOVER_EVERY)
        {
            // Or it has come since, or is reached by another way now.
            self.discovered = Some(Instant::now());
            self.namespaces = Namespaces::discover().ok().map(Rc::new);
            counters = self.counters(inode);
        }
        let Ok(counters) = counters else {
            return;
        };
        // One that is newer than the tracer began to count at 0.
        let zero = (self.begun && first).then_some(0);
        for count in zero.into_iter().chain([counters.time_wait_overflow]) {
            emit(&Event::Overflow {
                time,
                netns: inode,
                count,
            });
        }
    }

    fn counters(&self, inode: u32) -> Result<TcpExt, netns::Error> {
        let namespaces = self.namespaces.as_ref();
        namespaces
            .and_then(|namespaces| namespaces.get(inode))
            .ok_or(netns::Error::Gone { inode })?
            .tcp_ext()
    }
}
