//! Loading the kernel side: which probes, with which settings, and why not more.

use std::{fmt, io, path::Path};

use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, FEntry, Program, ProgramError, TracePoint},
};
use tcptrace_ebpf::{Caller, Config, Counter, FIELD_COUNT, FIELDS, MISSING, TextRange};

use super::{
    btf::{self, KERNEL_BTF},
    capabilities::{self, Capability},
    clock, kallsyms, tracefs,
};
use crate::{event::Probes as Kind, tracker::TIME_WAIT_SECONDS};

/// The compiled kernel side.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tcptrace-ebpf"));

/// What the timer of every timewait socket calls (`net/ipv4/inet_timewait_sock.c`, 5.4 to 6.18).
const TW_TIMER_HANDLER: &str = "tw_timer_handler";

/// Why tracing is not possible, and what can be done about it.
#[derive(Debug)]
pub struct Error {
    what: String,
    fix: String,
}

impl Error {
    fn new(what: impl fmt::Display, fix: impl Into<String>) -> Self {
        Self {
            what: what.to_string(),
            fix: fix.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.fix)
    }
}

impl std::error::Error for Error {}

/// What to load.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the probes select; times and addresses in it are filled in here.
    pub config: Config,
    /// Size of the ring buffer, bytes: a power of two, and whole pages.
    pub buffer: u32,
    /// Whether TIME_WAIT is of interest.
    pub time_wait: bool,
    /// Let the probes log what they cannot explain.
    pub log: bool,
}

/// The probes while they are attached. Dropping it takes them away.
pub struct Probes {
    ebpf: Ebpf,
    /// Where the records come out.
    pub records: RingBuf<MapData>,
    counters: PerCpuArray<MapData, u64>,
    /// How TIME_WAIT is followed.
    pub time_wait: Kind,
    /// How `accept()` is followed.
    pub accept: Kind,
    /// What does not work on this kernel, and why.
    pub degraded: Vec<String>,
    /// Number of this process's fd of each attached program, to ask the kernel about it.
    programs: Vec<i32>,
}

/// `Config` as aya hands it over: bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct ConfigBytes(Config);

// SAFETY: `Config` is `repr(C)`, made of integers, without padding, and any bytes are one.
unsafe impl aya::Pod for ConfigBytes {}

/// Loads and attaches the probes.
///
/// # Errors
/// When transitions cannot be traced at all. What else does not work is in [`Probes::degraded`].
pub fn load(settings: &Settings) -> Result<Probes, Error> {
    let types = kernel_types()?;
    let (offsets, mut degraded) = offsets(&types)?;
    let mut config = settings.config;
    config.time_wait_jiffies = TIME_WAIT_SECONDS * u64::from(clock::hz());
    let mut names = [TW_TIMER_HANDLER; Caller::COUNT + 1];
    for (name, (_, caller)) in names.iter_mut().zip(Caller::ALL) {
        *name = caller;
    }
    let hidden = match kallsyms::find(names) {
        Ok([callers @ .., handler]) => {
            config.callers = callers;
            // Without the one, the others would take every segment for a SYN.
            if callers[Caller::Segment as usize] == TextRange::default() {
                config.callers[Caller::Receive as usize] = TextRange::default();
                config.callers[Caller::Receive6 as usize] = TextRange::default();
            }
            config.tw_timer_handler = handler.start;
            handler == TextRange::default()
        }
        Err(_) => true,
    };

    let bytes = ConfigBytes(config);
    let level: u8 = if settings.log { 5 } else { 0 };
    let mut ebpf = EbpfLoader::new()
        .override_global("OFFSETS", &offsets[..], true)
        .override_global("CONFIG", &bytes, true)
        .override_global("AYA_LOG_LEVEL", &level, false)
        .map_max_entries("RECORDS", settings.buffer)
        .load(OBJECT)
        .map_err(|error| refused_maps(&error))?;
    let btf = Btf::from_sys_fs().map_err(|error| {
        Error::new(
            format_args!("cannot read {KERNEL_BTF}: {error}"),
            "this kernel's BTF is damaged",
        )
    })?;
    // Records may come as soon as the first probe is attached; the reader is there before.
    let records = take(&mut ebpf, "RECORDS")?;
    let counters = take(&mut ebpf, "COUNTERS")?;
    let mut probes = Probes {
        ebpf,
        records,
        counters,
        time_wait: Kind::None,
        accept: Kind::None,
        degraded: Vec::new(),
        programs: Vec::new(),
    };
    let mut tried = Vec::new();
    if settings.time_wait {
        // Before the transitions: the record of a timewait socket has to come before its socket's end.
        (probes.time_wait, tried) = probes.time_wait_probes(&btf, hidden);
        if probes.time_wait == Kind::None {
            degraded.push(format!(
                "no probe for TIME_WAIT ({}); it is followed by looks at sock_diag, which do not show how it ends",
                tried.join("; ")
            ));
        }
    }
    if probes.time_wait == Kind::Functions && hidden {
        degraded.push(
            "/proc/kallsyms hides addresses: of a TIME_WAIT that ends early it is not always known how: \
             grant CAP_SYSLOG, or set kernel.kptr_restrict to 0"
                .to_owned(),
        );
    }
    probes.accept = probes.accept_probes(&btf, types.argument_count("inet_csk_accept"), &mut tried);
    if probes.accept == Kind::None {
        degraded.push(format!(
            "no probe for accept() ({}); who accepted is not known until it closes: run as root, or with \
             CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH",
            tried.join("; ")
        ));
    }
    probes
        .attach_tracepoint("inet_sock_set_state", &btf)
        .map_err(|error| refused_program(&error))?;
    probes.degraded = degraded;
    Ok(probes)
}

impl Probes {
    /// A counter's sum over all CPUs; 0 if it cannot be read.
    #[must_use]
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters
            .get(&(counter as u32), 0)
            .map_or(0, |values| values.iter().sum())
    }

    /// How many times a probe did not run because it had interrupted itself on the same CPU.
    ///
    /// The kernel counts them (`recursion_misses`, since 5.12) and shows them in the program's fdinfo.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.programs
            .iter()
            .filter_map(|fd| std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok())
            .filter_map(|text| recursion_misses(&text))
            .sum()
    }

    /// The log of the probes; give it to a logger to see what they cannot explain.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    fn time_wait_probes(&mut self, btf: &Btf, hidden: bool) -> (Kind, Vec<String>) {
        let mut tried = Vec::new();
        let functions = [
            "inet_twsk_alloc",
            "tcp_timewait_state_process",
            "tcp_twsk_destructor",
        ];
        match self.attach_all(&functions, |probes, name| {
            probes.attach_function(name, name, btf)
        }) {
            Ok(()) => return (Kind::Functions, tried),
            Err(error) => tried.push(format!("function probes: {error}")),
        }
        if hidden {
            tried.push(
                "tracepoint probes: /proc/kallsyms hides tw_timer_handler: grant CAP_SYSLOG, or set \
                 kernel.kptr_restrict to 0"
                    .to_owned(),
            );
            return (Kind::None, tried);
        }
        match self.attach_all(&["timer_start", "timer_cancel"], |probes, name| {
            probes.attach_tracepoint(name, btf)
        }) {
            Ok(()) => (Kind::Tracepoints, tried),
            Err(error) => {
                tried.push(format!("tracepoint probes: {error}"));
                (Kind::None, tried)
            }
        }
    }

    fn accept_probes(
        &mut self,
        btf: &Btf,
        arguments: Option<usize>,
        tried: &mut Vec<String>,
    ) -> Kind {
        tried.clear();
        let program = match arguments {
            Some(2) => Some("inet_csk_accept_2"),
            Some(4) => Some("inet_csk_accept_4"),
            _ => None,
        };
        match program.map(|program| self.attach_function(program, "inet_csk_accept", btf)) {
            Some(Ok(())) => return Kind::Functions,
            Some(Err(error)) => tried.push(format!("function probe: {}", brief(&error))),
            None => tried.push("function probe: inet_csk_accept is not as expected".to_owned()),
        }
        // Tracepoints of system calls are attached by a number that only tracefs shows.
        let attached = tracefs::with_tracefs(|| {
            self.attach_all(&["sys_exit_accept", "sys_exit_accept4"], |probes, name| {
                probes.attach_syscall(name)
            })
        });
        match attached {
            Ok(Ok(())) => Kind::Tracepoints,
            Ok(Err(error)) => {
                tried.push(format!("tracepoint probes: {error}"));
                Kind::None
            }
            Err(error) => {
                tried.push(format!("tracepoint probes: cannot mount tracefs: {error}"));
                Kind::None
            }
        }
    }

    /// All or none of them.
    fn attach_all(
        &mut self,
        names: &[&str],
        attach: impl Fn(&mut Self, &str) -> Result<(), ProgramError>,
    ) -> Result<(), String> {
        for (index, name) in names.iter().enumerate() {
            if let Err(error) = attach(self, name) {
                for name in &names[..index] {
                    self.unload(name);
                }
                return Err(format!("{name}: {}", brief(&error)));
            }
        }
        Ok(())
    }

    fn attach_tracepoint(&mut self, name: &str, btf: &Btf) -> Result<(), ProgramError> {
        let program: &mut BtfTracePoint = program(&mut self.ebpf, name)?.try_into()?;
        program.load(name, btf)?;
        program.attach()?;
        self.attached(name)
    }

    fn attach_function(
        &mut self,
        name: &str,
        function: &str,
        btf: &Btf,
    ) -> Result<(), ProgramError> {
        match program(&mut self.ebpf, name)? {
            Program::FExit(program) => {
                program.load(function, btf)?;
                program.attach()?;
            }
            other => {
                let program: &mut FEntry = other.try_into()?;
                program.load(function, btf)?;
                program.attach()?;
            }
        }
        self.attached(name)
    }

    fn attach_syscall(&mut self, name: &str) -> Result<(), ProgramError> {
        let program: &mut TracePoint = program(&mut self.ebpf, name)?.try_into()?;
        program.load()?;
        program.attach("syscalls", name)?;
        self.attached(name)
    }

    fn attached(&mut self, name: &str) -> Result<(), ProgramError> {
        use std::os::fd::{AsFd as _, AsRawFd as _};
        let fd = program(&mut self.ebpf, name)?.fd()?.as_fd().as_raw_fd();
        self.programs.push(fd);
        Ok(())
    }

    fn unload(&mut self, name: &str) {
        use std::os::fd::{AsFd as _, AsRawFd as _};
        let Ok(program) = program(&mut self.ebpf, name) else {
            return;
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

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, ProgramError> {
    ebpf.program_mut(name)
        .ok_or(ProgramError::UnexpectedProgramType)
}

fn take<M: TryFrom<aya::maps::Map, Error: fmt::Display>>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<M, Error> {
    let map = ebpf.take_map(name);
    let missing = || {
        Error::new(
            format_args!("no map {name} in the BPF object"),
            "build it again",
        )
    };
    M::try_from(map.ok_or_else(missing)?)
        .map_err(|error| Error::new(format_args!("map {name}: {error}"), "build it again"))
}

fn kernel_types() -> Result<btf::Btf, Error> {
    btf::Btf::of_kernel().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::new(
            format_args!("this kernel does not describe its types: there is no {KERNEL_BTF}"),
            "it needs one built with CONFIG_DEBUG_INFO_BTF=y, as distributions ship since about 2020",
        ),
        io::ErrorKind::InvalidData => Error::new(
            format_args!("cannot use {KERNEL_BTF}: {error}"),
            "please report it, with `uname -r`",
        ),
        _ => Error::new(
            format_args!("cannot read {KERNEL_BTF}: {error}"),
            "run it as root, where /sys is mounted",
        ),
    })
}

/// Looks every field up; what only costs something is returned as a list of what it costs.
fn offsets(types: &btf::Btf) -> Result<([u32; FIELD_COUNT], Vec<String>), Error> {
    let mut offsets = [MISSING; FIELD_COUNT];
    let mut without: Vec<String> = Vec::new();
    for (offset, field) in offsets.iter_mut().zip(&FIELDS) {
        match (types.offset(field.path), field.without) {
            (Ok(found), _) => *offset = found,
            (Err(_), Some(lost)) => {
                let line = format!("not known on this kernel: {lost}");
                // Several fields may be needed for one thing.
                if !without.contains(&line) {
                    without.push(line);
                }
            }
            (Err(error), None) => {
                return Err(Error::new(
                    error,
                    "this kernel is not supported; please report it, with `uname -r`",
                ));
            }
        }
    }
    Ok((offsets, without))
}

/// Why not even maps could be made: the first thing that needs privilege.
fn refused_maps(error: &EbpfError) -> Error {
    let source = io_error(error);
    if source.is_some_and(|error| error.raw_os_error() == Some(libc::EPERM)) {
        return refused();
    }
    if source.is_some_and(|error| error.raw_os_error() == Some(libc::ENOMEM)) {
        return Error::new(
            "no memory for the ring buffer",
            "choose a smaller one with --buffer",
        );
    }
    Error::new(
        format_args!("the kernel does not take tcptrace's maps: {}", chain(error)),
        "please report it, with `uname -r`",
    )
}

fn refused_program(error: &ProgramError) -> Error {
    if io_error(error).is_some_and(|error| error.raw_os_error() == Some(libc::EPERM)) {
        return refused();
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if is_before(release, 5, 12) {
        return Error::new(
            format_args!("kernel {release} is too old for tracing"),
            "it needs 5.12 or later (bpf_get_socket_cookie in tracing programs)",
        );
    }
    Error::new(
        format_args!(
            "kernel {release} refuses the probe of inet_sock_set_state: {}",
            chain(error)
        ),
        "please report it",
    )
}

/// The kernel said EPERM: for want of a capability, or by lockdown.
fn refused() -> Error {
    let missing = capabilities::missing(&[Capability::BPF, Capability::PERFMON]);
    if !missing.is_empty() {
        return Error::new(
            format_args!(
                "the kernel does not let this user trace: {} missing",
                missing
            ),
            "run it as root, with sudo, or as a service with these capabilities",
        );
    }
    let lockdown = Path::new("/sys/kernel/security/lockdown");
    match std::fs::read_to_string(lockdown) {
        Ok(mode) if mode.contains("[confidentiality]") => Error::new(
            "the kernel is locked down in confidentiality mode, in which BPF may not read kernel memory",
            "boot with lockdown=integrity, or without lockdown",
        ),
        _ => Error::new(
            "the kernel refuses BPF programs although the capabilities are there",
            "a security module or a container runtime forbids bpf(): allow it, or run on the host",
        ),
    }
}

fn is_before(release: &str, major: u32, minor: u32) -> bool {
    let mut numbers = release
        .split(|char: char| !char.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    found < (major, minor)
}

/// One line for a reason that is given in passing: no verifier log.
fn brief(error: &ProgramError) -> String {
    match io_error(error) {
        Some(io) => io.to_string(),
        None => chain(error),
    }
}

fn io_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        next = error.source();
    }
    None
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text
}

fn recursion_misses(fdinfo: &str) -> Option<u64> {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("recursion_misses:"))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(is_before("5.10.0-28-amd64", 5, 12));
        assert!(!is_before("5.12.0", 5, 12));
        assert!(!is_before("6.1.0", 5, 12));
        assert!(!is_before("6.18.44-fc", 5, 12));
    }

    #[test]
    fn misses_are_read_from_fdinfo() {
        let fdinfo = "pos:\t0\nprog_type:\t26\nrun_cnt:\t0\nrecursion_misses:\t7\n";
        assert_eq!(recursion_misses(fdinfo), Some(7));
        assert_eq!(recursion_misses("pos:\t0\n"), None);
    }
}
