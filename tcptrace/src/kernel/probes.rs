//! Loading the kernel side: which probes, with which settings, and why not more.

pub(crate) mod explain;
mod object;
mod refused;
#[cfg(test)]
mod tests;

use std::{
    cell::LazyCell, fs, fs::File, io, ops::ControlFlow, os::unix::fs::MetadataExt as _, process,
    thread,
};

use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray},
};
use tcptrace_ebpf::{Config, Counter, Field, FieldSpec};

use self::object::{OPEN_FILES, Object, Types};
pub use self::{
    object::Symbols,
    refused::{Cause, Refused},
};
use super::{
    capabilities::{Capabilities, Capability},
    memory, open_sockets, procfs,
    ring::Ring,
    system::System,
};
use crate::{
    event::{Probes as Kind, States},
    reason::Reason,
};

/// The smallest ring buffer that is chosen, if memory allows it, bytes: 70,000 transitions. That is 20 ms, the longest
/// that the reader sleeps, at 3.5 million a second.
pub const LEAST_BUFFER: u32 = 8 << 20;
/// The largest one that is chosen, bytes.
const MOST_BUFFER: u64 = 64 << 20;
/// What each CPU adds, bytes: each makes records while the reader has one CPU at most.
const BUFFER_PER_CPU: u64 = 4 << 20;
/// The part of the memory that a chosen ring buffer takes at most.
const BUFFER_SHARE: u64 = 128;
/// How many times larger the ring buffer is with stacks, each of which takes 9 KiB.
const STACKS_FACTOR: u32 = 8;

/// The size of the ring buffer where none is asked for, bytes: 4 MiB for each CPU, from 8 to 64 MiB, but no more than a
/// 128th of the memory; with stacks eight times that.
#[must_use]
pub fn default_buffer(cpus: usize, memory: u64, stacks: bool) -> u32 {
    let wanted = (cpus as u64).saturating_mul(BUFFER_PER_CPU);
    let wanted = wanted.clamp(u64::from(LEAST_BUFFER), MOST_BUFFER);
    let size = wanted.min(memory / BUFFER_SHARE).max(1 << 16);
    // A power of two, as the kernel asks for. No more than `MOST_BUFFER`, so it fits.
    let size = 1_u32 << size.ilog2();
    if stacks { size * STACKS_FACTOR } else { size }
}

/// The [default](default_buffer) on this machine.
fn own_buffer(stacks: bool) -> u32 {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    default_buffer(cpus, memory::available(), stacks)
}

/// With so many open files, a command that looks once has the kernel walk them. Below, to load the program for that
/// costs more than to read `/proc`.
pub const WALKED_FILES: u64 = 20_000;

/// What to load.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the probes select; times and addresses in it are filled in here.
    pub config: Config,
    /// Size of the ring buffer, bytes: a power of two, and whole pages. `None`: [what suits](default_buffer).
    pub buffer: Option<u32>,
    /// Whether TIME_WAIT is of interest.
    pub time_wait: bool,
    /// Whether it is of interest who accepts. Where only tracepoints tell, following `accept()` costs every
    /// system call of the machine some 50 ns: the kernel leaves its fast path for all of them.
    pub accept: bool,
    /// The only kind of probes to follow TIME_WAIT and `accept()` with; `None` takes what works.
    pub only: Option<Kind>,
    /// Let the probes log what they cannot explain.
    pub log: bool,
}

impl Settings {
    /// Has a stack recorded of every `connect()` and `accept()`.
    pub const fn take_stacks(&mut self) {
        self.config.stacks = 1;
    }

    /// Whether stacks are recorded.
    #[must_use]
    pub const fn has_stacks(&self) -> bool {
        self.config.stacks != 0
    }

    /// Has records say whether who ran descends from this process
    /// ([`Task::tree`](crate::event::Task::tree)).
    ///
    /// The probes know this process by its number in its own pid namespace, so that it may be in any.
    ///
    /// # Errors
    /// When that namespace cannot be asked for.
    pub fn watch_descendants(&mut self) -> io::Result<()> {
        let path = "/proc/self/ns/pid";
        let namespace = fs::metadata(path).map_err(|error| {
            let what = format!(
                "cannot tell whose child a process is, because {path} cannot be read: {error}; mount /proc"
            );
            io::Error::new(error.kind(), what)
        })?;
        self.config.tree_root = process::id();
        // The kernel has 32 bits of it (`ns_common.inum`).
        self.config.tree_pid_ns = namespace.ino() as u32;
        Ok(())
    }
}

/// What the probes read to know a process's ancestors.
const ANCESTRY: [Field; 7] = [
    Field::TaskParent,
    Field::TaskPid,
    Field::PidLevel,
    Field::PidNumbers,
    Field::UpidNumber,
    Field::UpidNamespace,
    Field::PidNsInode,
];

/// What the probes read to record a stack.
const STACKS: [Field; 4] = [
    Field::MemoryStartStack,
    Field::RegsInstruction,
    Field::RegsStack,
    Field::RegsFrame,
];

/// The probes while they are attached. Dropping it takes them away.
pub struct Probes {
    object: Object,
    /// Where the records come out, until it is [taken](Self::take_records).
    records: Option<Records>,
    /// How TIME_WAIT is followed.
    pub time_wait: Kind,
    /// How `accept()` is followed.
    pub accept: Kind,
    /// What does not work on this kernel, and why.
    pub degraded: Vec<Reason>,
}

/// The records that the probes write, and counts of those that they could not.
pub struct Records {
    /// What was written.
    pub ring: Ring,
    counters: PerCpuArray<MapData, u64>,
    /// Number of this process's descriptor of each attached program.
    programs: Vec<i32>,
}

impl Records {
    /// A counter's sum over all CPUs; 0 if it cannot be read.
    #[must_use]
    pub fn count(&self, counter: Counter) -> u64 {
        let values = self.counters.get(&(counter as u32), 0);
        values.map_or(0, |values| values.iter().sum())
    }

    /// How many times a probe did not run because it had interrupted itself on the same CPU.
    ///
    /// The kernel counts them (`recursion_misses`, since 5.12) and shows them in the program's fdinfo.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.programs
            .iter()
            .filter_map(|fd| fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok())
            .filter_map(|text| recursion_misses(&text))
            .sum()
    }
}

/// How something is followed that can be followed in two ways, and why not in a better one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Followed {
    pub(crate) by: Kind,
    /// The kinds that were tried before, and refused.
    pub(crate) refused: Vec<(Kind, Refused)>,
}

/// Loads and attaches the probes.
///
/// # Errors
/// When transitions cannot be traced at all. What else does not work is in [`Probes::degraded`].
pub fn load(settings: &Settings) -> Result<Probes, Reason> {
    // Only a refusal has to be explained.
    let system = LazyCell::new(System::read);
    let no_transitions = |refused| explain::transitions(&refused, &system);
    let types = Types::read().map_err(no_transitions)?;
    if settings.config.tree_root != 0
        && let Some(field) = types.lacks(&ANCESTRY)
    {
        return Err(explain::no_ancestry(field));
    }
    if settings.has_stacks()
        && let Some(field) = types.lacks(&STACKS)
    {
        return Err(explain::no_stack_field(field));
    }
    let mut degraded = explain::fields(&types.missing);
    let (mut object, output) = Object::open(types, settings).map_err(no_transitions)?;
    let mut time_wait = Kind::None;
    if settings.time_wait {
        // Before the transitions: the record of a timewait socket has to come before its socket's end.
        let followed = follow(settings.only, |kind| object.attach_time_wait(kind));
        if !is_wanted(settings.only, followed.by) {
            return Err(explain::not_as_asked("TIME_WAIT", &followed, &system));
        }
        time_wait = followed.by;
        degraded.extend(explain::time_wait(&followed, &system));
        degraded.extend(explain::endings(time_wait, &object.symbols, &system));
    }
    let mut accept = Kind::None;
    if settings.accept {
        let followed = follow(settings.only, |kind| object.attach_accept(kind));
        if !is_wanted(settings.only, followed.by) {
            return Err(explain::not_as_asked("accept()", &followed, &system));
        }
        accept = followed.by;
        degraded.extend(explain::accept(&followed, &system));
    }
    object.attach_transitions().map_err(|refused| {
        if settings.has_stacks() && refused.lacks_registers() {
            explain::no_stacks(&system)
        } else {
            no_transitions(refused)
        }
    })?;
    Ok(Probes {
        records: Some(Records {
            ring: output.ring,
            counters: output.counters,
            programs: object.programs.clone(),
        }),
        object,
        time_wait,
        accept,
        degraded,
    })
}

/// Takes the first kind that works: functions, then tracepoints, or only the one asked for.
fn follow(only: Option<Kind>, mut attach: impl FnMut(Kind) -> Result<(), Refused>) -> Followed {
    let mut refused = Vec::new();
    for kind in [Kind::Functions, Kind::Tracepoints] {
        if is_wanted(only, kind) {
            match attach(kind) {
                Ok(()) => return Followed { by: kind, refused },
                Err(error) => refused.push((kind, error)),
            }
        }
    }
    Followed {
        by: Kind::None,
        refused,
    }
}

fn is_wanted(only: Option<Kind>, kind: Kind) -> bool {
    only.is_none_or(|only| only == kind)
}

impl Probes {
    /// The records, for whoever reads them: once.
    ///
    /// # Panics
    /// The second time.
    pub fn take_records(&mut self) -> Records {
        self.records.take().expect("taken once")
    }

    /// Begins a walk of all open files, for [`open_sockets::sockets`] to read: of sockets in the states `wanted`, and
    /// what they hold of those in `detailed`. It numbers processes as the initial pid namespace does.
    ///
    /// # Errors
    /// When the kernel does not take the program, or the walk.
    pub fn open_sockets(&mut self, wanted: States, detailed: States) -> Result<File, Refused> {
        self.object.open_sockets(wanted, detailed)
    }

    /// The log of the probes; give it to a logger to see what they cannot explain.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.object.ebpf
    }
}

/// The walk of all open files alone, for a command that looks once: it traces nothing.
pub struct Walker {
    object: Object,
}

impl Walker {
    /// Loads it, if it may be loaded and that pays: if more than [`WALKED_FILES`] are open on this host. Where it does
    /// not work, `/proc` tells the same.
    #[must_use]
    pub fn if_it_pays() -> Option<Self> {
        let open_files = fs::read_to_string("/proc/sys/fs/file-nr").ok()?;
        let open_files: u64 = open_files.split_whitespace().next()?.parse().ok()?;
        let needed = [Capability::BPF, Capability::PERFMON];
        let pays = open_files > WALKED_FILES
            && Capabilities::of_self().missing(&needed).is_empty()
            && !procfs::has_private_pids();
        pays.then(|| Self::load().ok()).flatten()
    }

    fn load() -> Result<Self, Refused> {
        let settings = Settings {
            config: Config::ALL,
            // Nothing is written into it. The kernel has none that is smaller.
            buffer: Some(rustix::param::page_size() as u32),
            time_wait: false,
            accept: false,
            only: None,
            log: false,
        };
        let (object, _) = Object::open(Types::read_without_symbols()?, &settings)?;
        Ok(Self { object })
    }

    /// As [`Probes::open_sockets`].
    ///
    /// # Errors
    /// When the kernel does not take the program, or the walk.
    pub fn open_sockets(&mut self, wanted: States, detailed: States) -> Result<File, Refused> {
        self.object.open_sockets(wanted, detailed)
    }
}

fn recursion_misses(fdinfo: &str) -> Option<u64> {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("recursion_misses:"))?
        .trim()
        .parse()
        .ok()
}

/// What came of trying everything, each by itself. Nothing of it is attached any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Optional fields that this kernel does not have; or why its types cannot be used.
    pub types: Result<Vec<&'static FieldSpec>, Refused>,
    /// The size of the ring buffer that [suits](default_buffer), bytes.
    pub wanted_buffer: u32,
    /// The largest one up to that for which there was room, bytes; or why there is none.
    pub buffer: Result<u32, Refused>,
    /// What of the rest was tried: all, if there was a ring buffer.
    pub probes: Option<TriedProbes>,
}

/// What came of trying to attach the probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TriedProbes {
    /// The probe of every transition.
    pub transitions: Result<(), Refused>,
    /// Those of TIME_WAIT.
    pub time_wait: Variants,
    /// Those of `accept()`.
    pub accept: Variants,
    /// The walk of all open files.
    pub open_sockets: Result<(), Refused>,
    /// What `/proc/kallsyms` tells.
    pub symbols: Symbols,
}

/// Two ways to follow the same thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variants {
    /// By function probes.
    pub functions: Result<(), Refused>,
    /// By tracepoints.
    pub tracepoints: Result<(), Refused>,
}

impl Variants {
    fn try_each(
        object: &mut Object,
        attach: fn(&mut Object, Kind) -> Result<(), Refused>,
        detach: fn(&mut Object),
    ) -> Self {
        let mut attempt = |kind| {
            let attached = attach(object, kind);
            detach(object);
            attached
        };
        Self {
            functions: attempt(Kind::Functions),
            tracepoints: attempt(Kind::Tracepoints),
        }
    }

    /// Which way [`load`] takes.
    pub(crate) fn followed(&self) -> Followed {
        follow(None, |kind| match kind {
            Kind::Functions => self.functions.clone(),
            Kind::Tracepoints | Kind::None => self.tracepoints.clone(),
        })
    }
}

/// Tries everything that [`load`] might use.
#[must_use]
pub fn try_all() -> Tried {
    let types = Types::read();
    let missing = match &types {
        Ok(types) => Ok(types.missing.clone()),
        Err(refused) => Err(refused.clone()),
    };
    let wanted_buffer = own_buffer(false);
    let mut settings = Settings {
        config: Config::ALL,
        buffer: Some(wanted_buffer),
        time_wait: true,
        accept: true,
        only: None,
        log: false,
    };
    let mut buffer = wanted_buffer;
    let mut object = types.and_then(|types| Object::open(types, &settings));
    while let Err(Refused::Map(cause)) = &object
        && cause.errno == Some(libc::ENOMEM)
        && buffer > 4096
    {
        buffer /= 2;
        settings.buffer = Some(buffer);
        object = Types::read().and_then(|types| Object::open(types, &settings));
    }
    let all = States::ALL;
    let probes = object.as_mut().ok().map(|(object, _)| {
        let transitions = object.attach_transitions();
        object.detach_transitions();
        let time_wait =
            Variants::try_each(object, Object::attach_time_wait, Object::detach_time_wait);
        let accept = Variants::try_each(object, Object::attach_accept, Object::detach_accept);
        TriedProbes {
            transitions,
            time_wait,
            accept,
            open_sockets: object.open_sockets(all, all).and_then(|records| {
                let go_on = || ControlFlow::Continue(());
                open_sockets::sockets(records, |_| false, |_, _| (), go_on).map_err(|error| {
                    Refused::Program {
                        name: OPEN_FILES.to_owned(),
                        cause: Cause::from(&error),
                    }
                })
            }),
            symbols: object.symbols.clone(),
        }
    });
    Tried {
        types: missing,
        wanted_buffer,
        buffer: object.map(|_| buffer),
        probes,
    }
}
