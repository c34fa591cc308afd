//! Where in its code a process connected or accepted: from a copy of its stack to names and lines.
//!
//! What it takes is in files that other users wrote, and any of them may be made to do harm. So three do the work:
//!
//! - the thread that drains the ring buffer puts records into a [`queue`], and hands on what comes back;
//! - a thread of its own, the [`opener`], opens what is needed of the processes ([`target`]), which takes
//!   privileges, and reads none of it;
//! - a process without any, the [`reader`], is handed descriptors, walks the stacks and finds their names. It can be
//!   ended at any time, by a limit or by a fault, and another begins where it was. The [`worker`] is how it is
//!   started, confined, and spoken to.
//!
//! What all of this may take is in [`budget`].

mod budget;
mod opener;
mod queue;
mod reader;
mod target;
pub(super) mod worker;

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, SigmaskHow};
use tcptrace_ebpf::{self as kernel, Kind};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

use self::{
    opener::{Opener, Told},
    queue::{Command, Queue, Queued},
    worker::{Starter, Worker, protocol::Confined},
};
use crate::{
    event::{Called, DecodeError, Event, Stack, StackEnd, Via},
    kernel::procfs,
    reason::Reason,
};

/// How long is waited at the end for names that are not found yet.
const LAST_WAIT: Duration = Duration::from_secs(3);
/// How many events can wait to be taken. More, and the opener waits, and then the queue is full.
const MOST_TOLD: usize = 1024;
/// How many calls are remembered whose stacks were given up while others were outstanding.
const MOST_GIVEN_UP: usize = 1 << 16;
/// How many stacks with frames of code made at run time are kept in mind, of which the name may be written later.
const MOST_UNNAMED: usize = 1024;

/// See the [module](self).
pub(super) struct Stacks {
    queue: Queue,
    /// `None` if there is nobody to find anything out.
    told: Option<Receiver<Told>>,
    /// Records in the queue, or in work: for each comes one [`Called`].
    outstanding: usize,
    /// When sockets last called whose stacks were given up while others were outstanding, by cookie: what comes back
    /// of an earlier call must not pass for the last.
    given_up: HashMap<u64, u64>,
    /// Of stacks without frames, of whatever process.
    without: HashMap<(Via, StackEnd), u32>,
    /// The last id given.
    last: Arc<AtomicU32>,
    private_pids: bool,
    degraded: Vec<Reason>,
}

impl Stacks {
    /// What cannot be had is [`degraded`](Self::degraded).
    pub(super) fn new() -> Self {
        let mut stacks = Self {
            queue: Queue::default(),
            told: None,
            outstanding: 0,
            given_up: HashMap::new(),
            without: HashMap::new(),
            last: Arc::default(),
            private_pids: procfs::has_private_pids(),
            degraded: Vec::new(),
        };
        if let Err(error) = stacks.start() {
            stacks.degraded.push(Reason::new(
                format_args!(
                    "stacks have no functions: the process that reads other users' files cannot be started: {error}"
                ),
                "see whether a limit on processes or open files is reached (ulimit -a), and whether /proc is mounted",
            ));
        }
        stacks
    }

    fn start(&mut self) -> io::Result<()> {
        let starter = Starter::new()?;
        let worker = Worker::start(&starter)?;
        self.degraded.extend(unconfined(worker.confined));
        let (tell, told) = sync_channel(MOST_TOLD);
        let opener = Opener::new(
            self.queue.clone(),
            tell,
            starter,
            worker,
            Arc::clone(&self.last),
        );
        // Signals are for the thread that waits for them, also those to be passed on to a program.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = thread::Builder::new()
            .name("opener".to_owned())
            .spawn(move || opener.run());
        before.thread_set_mask()?;
        started?;
        self.told = Some(told);
        Ok(())
    }

    /// What does not work as it should.
    pub(super) fn degraded(&self) -> &[Reason] {
        &self.degraded
    }

    /// Whether the record is of a stack.
    pub(super) fn is_stack(record: &[u8]) -> bool {
        let header = kernel::Header::read_from_prefix(record);
        header.is_ok_and(|(header, _)| header.kind == Kind::Stack as u8)
    }

    /// Takes a record. Which stack it is of, and what that is, follows later.
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
        let via = via(record).ok_or(wrong)?;
        let header = &record.header;
        if self.private_pids {
            self.give_up(header, via, StackEnd::PrivatePids, each);
        } else if self.told.is_none() {
            self.give_up(header, via, StackEnd::NoNames, each);
        } else if self.queue.put(queued(record)) {
            self.outstanding += 1;
        } else {
            self.give_up(header, via, StackEnd::Overload, each);
        }
        Ok(())
    }

    /// Tells that this stack has no frames, and why.
    fn give_up(
        &mut self,
        header: &kernel::Header,
        via: Via,
        end: StackEnd,
        each: &mut impl FnMut(&Event),
    ) {
        if self.outstanding > 0 && self.given_up.len() < MOST_GIVEN_UP {
            self.given_up.insert(header.cookie, header.time);
        }
        let last = &self.last;
        let stack = *self.without.entry((via, end)).or_insert_with(|| {
            let id = last.fetch_add(1, Ordering::Relaxed) + 1;
            each(&Event::Stack(Box::new(frameless(id, via, end))));
            id
        });
        each(&Event::Called(Called {
            time: header.time,
            cookie: header.cookie,
            stack,
        }));
    }

    /// Whether it is worth asking soon what has become known.
    pub(super) const fn is_waiting(&self) -> bool {
        self.outstanding > 0
    }

    /// Hands on what has become known of the stacks.
    pub(super) fn told(&mut self, each: &mut impl FnMut(&Event)) {
        // As many as there are room for, so that this ends while others come.
        for _ in 0..MOST_TOLD {
            let told = self.told.as_ref().map(Receiver::try_recv);
            match told {
                Some(Ok(told)) => drop(self.hand_on(told, each)),
                Some(Err(TryRecvError::Disconnected)) => self.told = None,
                Some(Err(TryRecvError::Empty)) | None => return,
            }
        }
    }

    /// Returns whether this was the last.
    fn hand_on(&mut self, told: Told, each: &mut impl FnMut(&Event)) -> bool {
        match told {
            Told::Event(event) => {
                let mut is_last = true;
                if let Event::Called(called) = &event {
                    let given_up = self.given_up.get(&called.cookie);
                    is_last = given_up.is_none_or(|time| *time <= called.time);
                    self.outstanding = self.outstanding.saturating_sub(1);
                    if self.outstanding == 0 {
                        self.given_up.clear();
                    }
                }
                if is_last {
                    each(&event);
                }
                false
            }
            Told::Finished => true,
        }
    }

    /// Now and then: forgets processes that have ended, so that neither their files nor their stacks are kept, and
    /// has what runtimes have written meanwhile looked at.
    pub(super) fn look(&mut self) {
        self.queue.command(Command::Tend);
    }

    /// Hands on the rest, as far as it comes until `limit`.
    pub(super) fn finish(&mut self, limit: Option<Instant>, each: &mut impl FnMut(&Event)) {
        self.queue.command(Command::Finish);
        let deadline = Instant::now() + LAST_WAIT;
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        while let Some(told) = &self.told {
            let left = deadline.saturating_duration_since(Instant::now());
            match told.recv_timeout(left) {
                Ok(told) => {
                    if self.hand_on(told, each) {
                        self.told = None;
                    } else if left.is_zero() {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => self.told = None,
            }
        }
        // Nobody listens any more: the opener ends. What it has not come to is given up.
        self.told = None;
        for queued in self.queue.take(usize::MAX) {
            let record = read(&queued);
            if let Some(via) = via(&record) {
                self.give_up(&record.header, via, StackEnd::Overload, each);
            }
        }
    }
}

/// What of the reader's confinement is missing, in words.
fn unconfined(confined: Confined) -> Option<Reason> {
    if cfg!(test) {
        return None;
    }
    let Confined {
        own_user,
        no_capabilities,
        no_new_privs,
        limits,
        seccomp,
    } = confined;
    // Who is not root has no other user to be, and gives nothing away by that.
    let missing = [
        (
            own_user || !rustix::process::geteuid().is_root(),
            "a user of its own",
        ),
        (no_capabilities, "the loss of all capabilities"),
        (no_new_privs, "no_new_privs"),
        (limits, "limits on memory and CPU time"),
        (seccomp, "a seccomp filter"),
    ];
    let missing: Vec<_> = missing
        .iter()
        .filter(|(there, _)| !there)
        .map(|(_, what)| *what)
        .collect();
    (!missing.is_empty()).then(|| {
        Reason::new(
            format_args!(
                "the process that reads other users' files runs without {}",
                missing.join(", ")
            ),
            "run tcptrace with CAP_SETUID and CAP_SETGID on a kernel with CONFIG_SECCOMP_FILTER, or without \
             --stacks where other users' programs are not trusted",
        )
    })
}

/// By which call.
const fn via(record: &kernel::Stack) -> Option<Via> {
    match record.via {
        1 => Some(Via::Connect),
        2 => Some(Via::Accept),
        _ => None,
    }
}

/// The record as it waits: without what was not copied.
fn queued(record: &kernel::Stack) -> Queued {
    let unused = kernel::COPY - (record.copied as usize).min(kernel::COPY);
    let bytes = record.as_bytes();
    Queued {
        pid: record.header.pid,
        bytes: bytes[..bytes.len() - unused].into(),
    }
}

/// The record, with zeros where it was cut off.
fn read(record: &Queued) -> Box<kernel::Stack> {
    let mut stack = Box::new(kernel::Stack::new_zeroed());
    let len = record.bytes.len().min(size_of::<kernel::Stack>());
    stack.as_mut_bytes()[..len].copy_from_slice(&record.bytes[..len]);
    stack
}

/// A stack without frames, so far.
fn frameless(id: u32, via: Via, end: StackEnd) -> Stack {
    Stack {
        id,
        via,
        pid: 0,
        frames: Vec::new(),
        by_frame_pointer: 0,
        end,
    }
}

/// See [`crate::fuzz`].
pub(crate) mod fuzz {
    pub(crate) use super::{
        reader::{fuzz_maps as maps, fuzz_perf_map as perf_map},
        worker::protocol::fuzz as protocol,
    };
}

#[cfg(test)]
mod tests;
