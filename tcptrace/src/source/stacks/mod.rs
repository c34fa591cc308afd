//! Where in its code a process connected or accepted: from a copy of its stack to names and lines.
//!
//! While a record is read, the stack is walked ([`walk`]): that takes microseconds, and the process's files
//! are opened the first time. What names the addresses have ([`names`]) can take seconds, and is found out
//! by a thread of its own, from the files that were opened then: it does not matter whether the process still
//! lives, nor what is installed meanwhile.

mod module;
mod names;
mod perf_map;
mod process;
mod walk;

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    time::{Duration, Instant},
};

use tcptrace_ebpf::{self as kernel, Kind};
use zerocopy::FromBytes as _;

use self::{
    module::Modules,
    names::{Job, Names},
    process::{Key, Process},
    walk::Walked,
};
use crate::{
    event::{Called, DecodeError, Event, Stack, StackEnd, Via},
    kernel::procfs,
};

/// How many different stacks are known of processes that live. Further ones have no frames.
const MOST_STACKS: usize = 1 << 14;
/// How many processes are known. More than that, and the one seen longest ago is forgotten.
const MOST_PROCESSES: usize = 512;
/// How often, at most, it is looked again what a process has mapped, for stacks not seen before.
const MAPS_EVERY: Duration = Duration::from_millis(20);
/// How long is waited at the end for names that are not found yet.
const LAST_WAIT: Duration = Duration::from_secs(3);

/// See the [module](self).
pub(super) struct Stacks {
    processes: HashMap<Key, Known>,
    modules: Modules,
    /// Those of processes that are known.
    ids: HashMap<(Key, kernel::Via, Walked), u32>,
    /// Of stacks without frames, of whatever process.
    without: HashMap<(kernel::Via, StackEnd), u32>,
    /// The last id given. None is given twice: sockets may still have it when its process is forgotten.
    last: u32,
    private_pids: bool,
    names: Names,
}

/// A process, or why its code cannot be known.
struct Known {
    process: Result<Process, StackEnd>,
    maps_read: Instant,
    seen: Instant,
}

impl Stacks {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            processes: HashMap::new(),
            modules: Modules::default(),
            ids: HashMap::new(),
            without: HashMap::new(),
            last: 0,
            private_pids: procfs::has_private_pids(),
            names: Names::start()?,
        })
    }

    /// Whether the record is of a stack.
    pub(super) fn is_stack(record: &[u8]) -> bool {
        let header = kernel::Header::read_from_prefix(record);
        header.is_ok_and(|(header, _)| header.kind == Kind::Stack as u8)
    }

    /// Which stack the record is of. What that is follows later.
    ///
    /// # Errors
    /// When it is no such record.
    pub(super) fn take(
        &mut self,
        record: &[u8],
        each: &mut impl FnMut(&Event),
    ) -> Result<(), DecodeError> {
        let kind = Kind::Stack as u8;
        let len = record.len();
        let wrong = DecodeError::Kind { kind, len };
        let (record, _) = kernel::Stack::ref_from_prefix(record).map_err(|_| wrong)?;
        let via = match record.via {
            1 => kernel::Via::Connect,
            2 => kernel::Via::Accept,
            _ => return Err(wrong),
        };
        let stack = self.identify(record, via, each);
        each(&Event::Called(Called {
            time: record.header.time,
            cookie: record.header.cookie,
            stack,
        }));
        Ok(())
    }

    fn identify(
        &mut self,
        record: &kernel::Stack,
        via: kernel::Via,
        each: &mut impl FnMut(&Event),
    ) -> u32 {
        let key = Key::of(record);
        let mut at = (key, via, self.walk(&key, record));
        if let Some(id) = self.ids.get(&at) {
            return *id;
        }
        // New, or something was mapped that the process had not when it was looked at.
        if self.remap(&key) {
            at.2 = self.walk(&key, record);
        }
        if at.2.addresses.is_empty() {
            return self.without(via, at.2.end, each);
        }
        let known = self.ids.len();
        let entry = match self.ids.entry(at) {
            Entry::Occupied(found) => return *found.get(),
            Entry::Vacant(_) if known >= MOST_STACKS => {
                return self.without(via, StackEnd::TooMany, each);
            }
            Entry::Vacant(entry) => entry,
        };
        let (_, _, walked) = entry.key();
        self.last += 1;
        let mut stack = Stack {
            pid: record.header.pid,
            ..frameless(self.last, via, walked.end)
        };
        let process = self.processes.get(&key);
        let mut places = Vec::new();
        if let Some(Ok(process)) = process.map(|known| &known.process) {
            stack.by_frame_pointer = walked.by_frame_pointer(process);
            let addresses = walked.addresses.iter().enumerate();
            places.extend(addresses.map(|(index, address)| process.place(*address, index > 0)));
        }
        let id = stack.id;
        entry.insert(id);
        self.names.ask(Job { stack, places });
        id
    }

    /// The stack that stands for all without frames, for this reason.
    fn without(&mut self, via: kernel::Via, end: StackEnd, each: &mut impl FnMut(&Event)) -> u32 {
        *self.without.entry((via, end)).or_insert_with(|| {
            self.last += 1;
            each(&Event::Stack(Box::new(frameless(self.last, via, end))));
            self.last
        })
    }

    fn walk(&mut self, key: &Key, record: &kernel::Stack) -> Walked {
        if self.private_pids {
            return Walked::nowhere(StackEnd::PrivatePids);
        }
        if self.processes.len() >= MOST_PROCESSES && !self.processes.contains_key(key) {
            let oldest = self.processes.iter().min_by_key(|(_, known)| known.seen);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.processes.remove(&oldest);
            }
        }
        let modules = &mut self.modules;
        let known = self.processes.entry(*key).or_insert_with(|| Known {
            process: Process::open(*key, modules),
            maps_read: Instant::now(),
            seen: Instant::now(),
        });
        known.seen = Instant::now();
        match &mut known.process {
            Ok(process) => walk::walk(process, record),
            Err(end) => Walked::nowhere(*end),
        }
    }

    /// Looks again what a process has mapped, unless that was a moment ago. Returns whether it is something
    /// else than before.
    fn remap(&mut self, key: &Key) -> bool {
        let Some(known) = self.processes.get_mut(key) else {
            return false;
        };
        let Ok(process) = &mut known.process else {
            return false;
        };
        if known.maps_read.elapsed() < MAPS_EVERY {
            return false;
        }
        let changed = process.map(&mut self.modules).unwrap_or(false);
        known.maps_read = Instant::now();
        changed
    }

    /// Hands on what has become known of the stacks.
    pub(super) fn told(&mut self, each: &mut impl FnMut(&Event)) {
        while let Some(stack) = self.names.told() {
            each(&Event::Stack(stack));
        }
    }

    /// Now and then: forgets processes that have ended or could not be looked at, so that neither their files
    /// nor their stacks are kept, and has what runtimes have written meanwhile looked at.
    pub(super) fn look(&mut self) {
        self.processes
            .retain(|_, known| known.process.as_ref().is_ok_and(Process::lives));
        let processes = &self.processes;
        self.ids
            .retain(|(key, _, _), _| processes.contains_key(key));
        self.modules.forget_unused();
        self.names.again();
    }

    /// Hands on the rest.
    pub(super) fn finish(&mut self, each: &mut impl FnMut(&Event)) {
        self.names.again();
        let deadline = Instant::now() + LAST_WAIT;
        while let Some(stack) = self.names.last(deadline) {
            each(&Event::Stack(stack));
        }
    }
}

/// A stack without frames, so far.
fn frameless(id: u32, via: kernel::Via, end: StackEnd) -> Stack {
    Stack {
        id,
        via: match via {
            kernel::Via::Connect => Via::Connect,
            kernel::Via::Accept => Via::Accept,
        },
        pid: 0,
        frames: Vec::new(),
        by_frame_pointer: 0,
        end,
    }
}

/// See [`crate::fuzz`].
pub(crate) mod fuzz {
    pub(crate) use super::{perf_map::fuzz as perf_map, process::fuzz as maps};
}

#[cfg(test)]
mod tests;
