//! The kernel side as one object, and attaching its probes, a family at a time.

use std::{
    fmt,
    fs::File,
    io, panic,
    thread::{self, JoinHandle},
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, MapData, MapError, PerCpuArray},
    programs::{BtfTracePoint, FEntry, Iter, Program, ProgramError, TracePoint, links::LinkError},
};
use tcptrace_ebpf::{
    Caller, Config, FIELD_COUNT, FIELDS, Field, FieldSpec, MISSING, TextRange, WITHOUT_LOCK,
};

use super::{
    Settings, own_buffer,
    refused::{Cause, Refused},
};
use crate::{
    event::{Probes as Kind, States},
    kernel::{btf, clock, kallsyms, private_mount::with_tracefs, ring::Ring},
    tracker::TIME_WAIT_SECONDS,
};

/// The compiled kernel side.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tcptrace-ebpf"));

/// The tracepoint of every transition.
const TRANSITIONS: &str = "inet_sock_set_state";
/// The functions that tell of a timewait socket, and the programs that are attached to them.
const TIME_WAIT_FUNCTIONS: [&str; 3] = [
    "inet_twsk_alloc",
    "tcp_timewait_state_process",
    "tcp_twsk_destructor",
];
/// The tracepoints that tell of its timer.
const TIME_WAIT_TIMERS: [&str; 2] = ["timer_start", "timer_cancel"];
/// The function that returns an accepted socket.
const ACCEPT_FUNCTION: &str = "inet_csk_accept";
/// The tracepoints of the system calls that do.
const ACCEPT_CALLS: [&str; 2] = ["sys_exit_accept", "sys_exit_accept4"];
/// The program that tells who has which socket open, and the kernel's walk in which it runs.
const OPEN_SOCKETS: &str = "open_sockets";
pub(super) const OPEN_FILES: &str = "task_file";
/// What the timer of every timewait socket calls (`net/ipv4/inet_timewait_sock.c`, 5.4 to 6.18).
const TW_TIMER_HANDLER: &str = "tw_timer_handler";

/// The running kernel's types, and what of them the probes need.
pub(super) struct Types {
    offsets: [u32; FIELD_COUNT],
    /// Optional fields that this kernel does not have.
    pub(super) missing: Vec<&'static FieldSpec>,
    /// How many arguments [`ACCEPT_FUNCTION`] takes.
    accept_arguments: Option<usize>,
    btf: Btf,
    /// On their way; or no thread could be made to fetch them. `None`: nobody needs them.
    ranges: Option<io::Result<JoinHandle<Ranges>>>,
}

/// Where the functions of [`looked_for`] lie.
type Ranges = io::Result<Option<[TextRange; Caller::COUNT + 1]>>;

/// What `/proc/kallsyms` tells of the functions that the probes look for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Symbols {
    /// It is not there, or cannot be read.
    Unreadable(Cause),
    /// It hides the addresses.
    Hidden,
    /// It tells.
    Known {
        /// The function of a timewait socket's timer is there.
        timer: bool,
        /// Functions that are not there and without which it is not told why a TIME_WAIT ends.
        missing: Vec<&'static str>,
    },
}

/// The kernel side: its maps made, nothing of it attached yet. Dropping it takes everything away.
pub(super) struct Object {
    pub(super) ebpf: Ebpf,
    pub(super) symbols: Symbols,
    /// Number of this process's fd of each attached program, to ask the kernel about it.
    pub(super) programs: Vec<i32>,
    btf: Btf,
    accept_arguments: Option<usize>,
    /// A field that is missing, so that the walk of all open files cannot show what sockets hold.
    without_lock: Option<&'static FieldSpec>,
}

/// What the probes write into.
pub(super) struct Output {
    pub(super) ring: Ring,
    pub(super) counters: PerCpuArray<MapData, u64>,
}

/// `Config` as aya hands it over: bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct ConfigBytes(Config);

// SAFETY: `Config` is `repr(C)`, made of integers, without padding, and any bytes are one.
unsafe impl aya::Pod for ConfigBytes {}

impl Types {
    pub(super) fn read() -> Result<Self, Refused> {
        // To read these takes as long as all the rest up to the first probe.
        let reader = thread::Builder::new().name("symbols".to_owned());
        let ranges = reader.spawn(|| kallsyms::find(looked_for()));
        Self::with(Some(ranges))
    }

    /// For programs that look for no function.
    pub(super) fn read_without_symbols() -> Result<Self, Refused> {
        Self::with(None)
    }

    fn with(ranges: Option<io::Result<JoinHandle<Ranges>>>) -> Result<Self, Refused> {
        let types = btf::Btf::of_kernel().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if !is_sysfs("/sys/kernel") => Refused::NoSysfs,
            io::ErrorKind::NotFound => Refused::NoBtf,
            io::ErrorKind::InvalidData => Refused::BtfUnusable(error.to_string()),
            _ => Refused::BtfUnreadable(Cause::from(&error)),
        })?;
        let mut offsets = [MISSING; FIELD_COUNT];
        let mut missing = Vec::new();
        for (offset, field) in offsets.iter_mut().zip(&FIELDS) {
            match (types.offset(field.path), field.without) {
                (Ok(found), _) => *offset = found,
                (Err(_), Some(_)) => missing.push(field),
                (Err(error), None) => return Err(Refused::NoField(error.to_string())),
            }
        }
        Ok(Self {
            offsets,
            missing,
            accept_arguments: types.argument_count(ACCEPT_FUNCTION),
            btf: Btf::from_sys_fs().map_err(|error| {
                let cause = Cause::of(&error);
                match cause.errno {
                    Some(_) => Refused::BtfUnreadable(cause),
                    None => Refused::BtfUnusable(error.to_string()),
                }
            })?,
            ranges,
        })
    }

    /// The first of these that this kernel does not have.
    pub(super) fn lacks(&self, fields: &[Field]) -> Option<&'static FieldSpec> {
        let missing = |field: &&Field| self.offsets[**field as usize] == MISSING;
        fields
            .iter()
            .find(missing)
            .map(|field| &FIELDS[*field as usize])
    }
}

impl Object {
    /// Makes the maps: the first thing that needs privilege.
    pub(super) fn open(types: Types, settings: &Settings) -> Result<(Self, Output), Refused> {
        let mut config = settings.config;
        config.time_wait_jiffies = TIME_WAIT_SECONDS * u64::from(clock::hz());
        // It reads the kernel's types once more: time for the symbols to come.
        let mut loader = EbpfLoader::new();
        let ranges = match types.ranges {
            Some(Ok(reader)) => reader
                .join()
                .unwrap_or_else(|panic| panic::resume_unwind(panic)),
            Some(Err(_)) => kallsyms::find(looked_for()),
            None => Ok(None),
        };
        let symbols = take_symbols(ranges, &mut config);
        let bytes = ConfigBytes(config);
        let buffer = settings
            .buffer
            .unwrap_or_else(|| own_buffer(settings.has_stacks()));
        let without_lock = FIELDS
            .iter()
            .zip(&types.offsets)
            .find(|(field, offset)| field.without == Some(WITHOUT_LOCK) && **offset == MISSING);
        let level: u8 = if settings.log { 5 } else { 0 };
        let mut ebpf = loader
            .override_global("OFFSETS", &types.offsets[..], true)
            .override_global("CONFIG", &bytes, true)
            .override_global("AYA_LOG_LEVEL", &level, false)
            .map_max_entries("RECORDS", buffer)
            .load(OBJECT)
            .map_err(|error| Refused::map(&error))?;
        // Records may come as soon as the first probe is attached; the reader is there before.
        let ring = Ring::new(take(&mut ebpf, "RECORDS")?, buffer);
        let output = Output {
            ring: ring.map_err(|error| Refused::Map(Cause::from(&error)))?,
            counters: take(&mut ebpf, "COUNTERS")?,
        };
        let object = Self {
            ebpf,
            symbols,
            programs: Vec::new(),
            btf: types.btf,
            accept_arguments: types.accept_arguments,
            without_lock: without_lock.map(|(field, _)| field),
        };
        Ok((object, output))
    }

    /// Attaches the probe of every transition.
    pub(super) fn attach_transitions(&mut self) -> Result<(), Refused> {
        self.attach_all(&[TRANSITIONS], Self::attach_tracepoint)
    }

    pub(super) fn detach_transitions(&mut self) {
        self.detach(&[TRANSITIONS]);
    }

    /// Attaches the probes of TIME_WAIT, all or none of this kind.
    pub(super) fn attach_time_wait(&mut self, kind: Kind) -> Result<(), Refused> {
        match kind {
            Kind::None => Ok(()),
            Kind::Functions => self.attach_all(&TIME_WAIT_FUNCTIONS, |object, name| {
                object.attach_function(name, name)
            }),
            Kind::Tracepoints => match self.symbols {
                Symbols::Known { timer: true, .. } => {
                    self.attach_all(&TIME_WAIT_TIMERS, Self::attach_tracepoint)
                }
                Symbols::Hidden => Err(Refused::HiddenAddress(TW_TIMER_HANDLER)),
                Symbols::Known { .. } | Symbols::Unreadable(_) => {
                    Err(Refused::NoSymbol(TW_TIMER_HANDLER))
                }
            },
        }
    }

    pub(super) fn detach_time_wait(&mut self) {
        self.detach(&TIME_WAIT_FUNCTIONS);
        self.detach(&TIME_WAIT_TIMERS);
    }

    /// Attaches the probes of `accept()`, all or none of this kind.
    pub(super) fn attach_accept(&mut self, kind: Kind) -> Result<(), Refused> {
        match kind {
            Kind::None => Ok(()),
            Kind::Functions => {
                let program = match self.accept_arguments {
                    Some(2) => "inet_csk_accept_2",
                    Some(4) => "inet_csk_accept_4",
                    _ => return Err(Refused::Nowhere(ACCEPT_FUNCTION.to_owned())),
                };
                self.attach_all(&[program], |object, program| {
                    object.attach_function(program, ACCEPT_FUNCTION)
                })
            }
            // Tracepoints of system calls are attached by a number that only tracefs shows.
            Kind::Tracepoints => {
                with_tracefs(|| self.attach_all(&ACCEPT_CALLS, Self::attach_syscall))
                    .unwrap_or_else(|error| Err(Refused::Tracefs(Cause::from(&error))))
            }
        }
    }

    pub(super) fn detach_accept(&mut self) {
        self.detach(&["inet_csk_accept_2", "inet_csk_accept_4"]);
        self.detach(&ACCEPT_CALLS);
    }

    /// Begins a walk of all open files, to be read to its end before the next one begins. The program is loaded the
    /// first time.
    pub(super) fn open_sockets(
        &mut self,
        wanted: States,
        detailed: States,
    ) -> Result<File, Refused> {
        if let Some(field) = self.without_lock {
            return Err(Refused::NoField(field.path.to_owned()));
        }
        let masks = u32::from(wanted.mask()) | u32::from(detailed.mask()) << 16;
        self.set_walk(masks)
            .map_err(|error| Refused::map(&error.into()))?;
        let open = || -> Result<File, ProgramError> {
            let program: &mut Iter = program(&mut self.ebpf, OPEN_SOCKETS)?.try_into()?;
            if program.fd().is_err() {
                program.load(OPEN_FILES, &self.btf)?;
            }
            let link = program.attach()?;
            let walk = program.take_link(link)?.into_file();
            walk.map_err(|error| match error {
                LinkError::SyscallError(error) => error.into(),
                other => io::Error::other(other).into(),
            })
        };
        attach_as(OPEN_FILES, open)
    }

    fn set_walk(&mut self, masks: u32) -> Result<(), MapError> {
        let name = "WALK";
        let map = self.ebpf.map_mut(name);
        let map = map.ok_or(MapError::InvalidName { name: name.into() })?;
        Array::try_from(map)?.set(0, masks, 0)
    }

    /// All or none of them.
    fn attach_all(
        &mut self,
        names: &[&str],
        attach: impl Fn(&mut Self, &str) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        for (index, name) in names.iter().enumerate() {
            if let Err(refused) = attach(self, name) {
                self.detach(&names[..=index]);
                return Err(refused);
            }
        }
        Ok(())
    }

    fn attach_tracepoint(&mut self, name: &str) -> Result<(), Refused> {
        let attach = || -> Result<(), ProgramError> {
            let program: &mut BtfTracePoint = program(&mut self.ebpf, name)?.try_into()?;
            program.load(name, &self.btf)?;
            program.attach()?;
            self.attached(name)
        };
        attach_as(name, attach)
    }

    fn attach_function(&mut self, name: &str, function: &str) -> Result<(), Refused> {
        let attach = || -> Result<(), ProgramError> {
            match program(&mut self.ebpf, name)? {
                Program::FExit(program) => {
                    program.load(function, &self.btf)?;
                    program.attach()?;
                }
                other => {
                    let program: &mut FEntry = other.try_into()?;
                    program.load(function, &self.btf)?;
                    program.attach()?;
                }
            }
            self.attached(name)
        };
        attach_as(function, attach)
    }

    fn attach_syscall(&mut self, name: &str) -> Result<(), Refused> {
        let attach = || -> Result<(), ProgramError> {
            let program: &mut TracePoint = program(&mut self.ebpf, name)?.try_into()?;
            program.load()?;
            program.attach("syscalls", name)?;
            self.attached(name)
        };
        attach_as(name, attach)
    }

    fn attached(&mut self, name: &str) -> Result<(), ProgramError> {
        use std::os::fd::{AsFd as _, AsRawFd as _};
        let fd = program(&mut self.ebpf, name)?.fd()?.as_fd().as_raw_fd();
        self.programs.push(fd);
        Ok(())
    }

    /// Takes away those that are attached, or loaded.
    fn detach(&mut self, names: &[&str]) {
        use std::os::fd::{AsFd as _, AsRawFd as _};
        for name in names {
            let Ok(program) = program(&mut self.ebpf, name) else {
                continue;
            };
            if let Ok(fd) = program.fd() {
                let fd = fd.as_fd().as_raw_fd();
                self.programs.retain(|attached| *attached != fd);
            }
            // Fails only for what is not loaded.
            let _ = match program {
                Program::BtfTracePoint(program) => program.unload(),
                Program::FEntry(program) => program.unload(),
                Program::FExit(program) => program.unload(),
                Program::TracePoint(program) => program.unload(),
                _ => Ok(()),
            };
        }
    }
}

/// Whether this is a folder of sysfs (`SYSFS_MAGIC`, `include/uapi/linux/magic.h`).
fn is_sysfs(folder: &str) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|found| found.f_type as u64 == 0x6265_6572)
}

/// Where an error came from what was to be attached to `name`.
fn attach_as<T>(
    name: &str,
    attach: impl FnOnce() -> Result<T, ProgramError>,
) -> Result<T, Refused> {
    attach().map_err(|error| Refused::program(name, &error))
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, ProgramError> {
    ebpf.program_mut(name)
        .ok_or(ProgramError::UnexpectedProgramType)
}

fn take<M: TryFrom<aya::maps::Map, Error: fmt::Display>>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<M, Refused> {
    let broken = |what: &dyn fmt::Display| {
        Refused::Map(Cause {
            errno: None,
            words: format!("map {name}: {what}"),
        })
    };
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| broken(&"not in the BPF object"))?;
    M::try_from(map).map_err(|error| broken(&error))
}

/// The functions that are looked for on stacks, and last that in timers.
fn looked_for() -> [&'static str; Caller::COUNT + 1] {
    let mut names = [TW_TIMER_HANDLER; Caller::COUNT + 1];
    for (name, (_, caller)) in names.iter_mut().zip(Caller::ALL) {
        *name = caller;
    }
    names
}

/// Tells the probes where the functions of [`looked_for`] lie.
fn take_symbols(ranges: Ranges, config: &mut Config) -> Symbols {
    let [callers @ .., handler] = match ranges {
        Ok(Some(found)) => found,
        Ok(None) => return Symbols::Hidden,
        Err(error) => return Symbols::Unreadable(Cause::from(&error)),
    };
    config.callers = callers;
    // Without the one, the others would take every segment for a SYN.
    if callers[Caller::Segment as usize] == TextRange::default() {
        config.callers[Caller::Receive as usize] = TextRange::default();
        config.callers[Caller::Receive6 as usize] = TextRange::default();
    }
    config.tw_timer_handler = handler.start;
    Symbols::Known {
        timer: handler != TextRange::default(),
        missing: missing(|caller| callers[caller as usize] != TextRange::default()),
    }
}

/// What is missing so that not every ending is told. A kernel need not have IPv6, and either of two tells
/// of what was destroyed.
fn missing(has: impl Fn(Caller) -> bool) -> Vec<&'static str> {
    let needed = |caller: Caller| match caller {
        Caller::Connect | Caller::Segment | Caller::Purge | Caller::Receive => true,
        Caller::Connect6 | Caller::Receive6 => false,
        Caller::Abort | Caller::Destroy => !has(Caller::Abort) && !has(Caller::Destroy),
    };
    let missing = Caller::ALL.iter();
    missing
        .filter(|(caller, _)| !has(*caller) && needed(*caller))
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_costs_something_is_missing() {
        let without = |gone: &[Caller]| missing(|caller| !gone.contains(&caller));
        assert!(without(&[]).is_empty());
        assert!(without(&[Caller::Connect6, Caller::Receive6]).is_empty());
        assert!(without(&[Caller::Destroy]).is_empty());
        assert!(without(&[Caller::Abort]).is_empty());
        assert_eq!(
            without(&[Caller::Abort, Caller::Destroy, Caller::Purge]),
            ["inet_twsk_purge", "tcp_abort", "sock_diag_rcv_msg"]
        );
    }
}
