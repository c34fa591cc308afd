//! What the facts mean. Pure.

use std::io;

use super::{Check, Status, facts::Facts};
use crate::{
    event::Probes as Kind,
    kernel::{
        btf::KERNEL_BTF,
        capabilities::{self, Capabilities, Capability},
        clock,
        probes::{
            LEAST_BUFFER, Refused, TriedProbes, Variants,
            explain::{self, OLDEST},
        },
        system::{Lockdown, System},
        unlisted,
    },
    reason::Reason,
};

/// Names of the checks without which nothing is known of any socket.
pub(super) const TRANSITIONS: &str = "transitions";
pub(super) const SOCK_DIAG: &str = "sock_diag";
const HOLDERS: &str = "holders";

impl Check {
    fn new(name: &'static str, status: Status, detail: impl Into<String>) -> Self {
        Self {
            name,
            status,
            detail: detail.into(),
            fix: None,
        }
    }

    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, detail)
    }

    fn skipped(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Skipped, detail)
    }

    /// What is not fully so, and why.
    fn bad(name: &'static str, status: Status, reason: Reason) -> Self {
        Self {
            name,
            status,
            detail: reason.what,
            fix: Some(reason.fix),
        }
    }

    /// The same of several reasons; without any, what is so.
    fn of(name: &'static str, detail: impl Into<String>, reasons: Vec<Reason>) -> Self {
        if reasons.is_empty() {
            return Self::ok(name, detail);
        }
        let (mut whats, mut fixes) = (Vec::new(), Vec::new());
        for Reason { what, fix } in reasons {
            whats.push(what);
            if !fixes.contains(&fix) {
                fixes.push(fix);
            }
        }
        Self::bad(
            name,
            Status::Degraded,
            Reason::new(whats.join("; "), fixes.join("; ")),
        )
    }
}

/// Judges everything, in the order in which things depend on each other.
#[must_use]
pub fn checks(facts: &Facts) -> Vec<Check> {
    let system = &facts.system;
    let mut checks = vec![
        kernel(facts),
        btf(facts),
        lockdown(system),
        capabilities(system),
    ];
    checks.extend(locked_memory(system));
    checks.extend([ring_buffer(facts), transitions(facts)]);
    let traced = facts.tried.probes.as_ref();
    match traced.filter(|probes| probes.transitions.is_ok()) {
        Some(probes) => {
            checks.extend(time_wait(probes, system));
            checks.extend(accept(probes, system));
            checks.push(holders(probes, facts));
        }
        None => checks.extend(
            ["time_wait", "time_wait_endings", "accept", HOLDERS]
                .map(|name| Check::skipped(name, "nothing can be traced, see transitions")),
        ),
    }
    checks.extend([
        hz(facts.hz),
        sock_diag(facts),
        namespaces(facts),
        processes(facts),
        finished(facts),
        containers(facts),
        mptcp(facts.mptcp),
    ]);
    checks
}

/// Why nothing can be traced, if so.
fn refusal(facts: &Facts) -> Option<&Refused> {
    let tried = &facts.tried;
    let probes = tried.probes.as_ref();
    tried
        .types
        .as_ref()
        .err()
        .or_else(|| tried.buffer.as_ref().err())
        .or_else(|| probes.and_then(|probes| probes.transitions.as_ref().err()))
}

fn kernel(facts: &Facts) -> Check {
    const NAME: &str = "kernel";
    let system = &facts.system;
    let (major, minor) = OLDEST;
    match refusal(facts) {
        Some(_) if system.is_before(major, minor) => {
            Check::bad(NAME, Status::No, explain::too_old(system))
        }
        _ => Check::ok(
            NAME,
            format!("{}; {major}.{minor} or later is needed", system.release),
        ),
    }
}

fn btf(facts: &Facts) -> Check {
    const NAME: &str = "btf";
    match &facts.tried.types {
        Ok(missing) => Check::of(
            NAME,
            format!("{KERNEL_BTF} describes every field that is needed"),
            explain::fields(missing),
        ),
        Err(refused) => Check::bad(
            NAME,
            Status::No,
            explain::transitions(refused, &facts.system),
        ),
    }
}

fn lockdown(system: &System) -> Check {
    const NAME: &str = "lockdown";
    match system.lockdown {
        Lockdown::Off => Check::ok(NAME, "off"),
        Lockdown::Integrity => Check::ok(NAME, "integrity, which allows tracing"),
        Lockdown::Confidentiality => Check::bad(NAME, Status::No, explain::locked_down()),
        Lockdown::Unknown => Check::skipped(NAME, "securityfs cannot be read, which needs root"),
    }
}

fn capabilities(system: &System) -> Check {
    const NAME: &str = "capabilities";
    let missing = system.capabilities.missing(&Capability::ALL);
    if system.user_namespace {
        return Check::bad(
            NAME,
            Status::Degraded,
            Reason::new(
                "they are those of a user namespace, and do not count outside it",
                explain::OUTSIDE,
            ),
        );
    }
    if missing.is_empty() {
        return Check::ok(NAME, "all that are used");
    }
    let mut lost: Vec<String> = Vec::new();
    for (index, capability) in missing.iter().enumerate() {
        let purpose = capability.purpose;
        if missing[..index]
            .iter()
            .all(|earlier| earlier.purpose != purpose)
        {
            let for_this: Vec<Capability> = missing
                .iter()
                .copied()
                .filter(|other| other.purpose == purpose)
                .collect();
            lost.push(format!("{} (for {purpose})", capabilities::list(&for_this)));
        }
    }
    let reason = Reason::new(
        format_args!("missing: {}", lost.join(", ")),
        "run as root, or grant them (to a container: --cap-add, to a service: AmbientCapabilities=)",
    );
    Check::bad(NAME, Status::Degraded, reason)
}

/// Memory of maps counts against a limit only before Linux 5.11, which accounts it to the cgroup.
fn locked_memory(system: &System) -> Option<Check> {
    const NAME: &str = "locked_memory";
    if !system.is_before(5, 11) {
        return None;
    }
    let needed = u64::from(LEAST_BUFFER) * 2;
    Some(match system.locked_memory {
        Some(limit) if limit < needed => Check::bad(
            NAME,
            Status::Degraded,
            Reason::new(
                format_args!(
                    "maps count as locked memory, of which {} KiB are allowed",
                    limit / 1024
                ),
                "ulimit -l unlimited; of a service, LimitMEMLOCK=infinity",
            ),
        ),
        _ => Check::ok(NAME, "enough for the maps"),
    })
}

fn ring_buffer(facts: &Facts) -> Check {
    const NAME: &str = "ring_buffer";
    let mebibytes = |bytes: u32| f64::from(bytes) / f64::from(1 << 20);
    match facts.tried.buffer {
        Ok(size) if size == facts.tried.wanted_buffer => Check::ok(
            NAME,
            format!("{} MiB, the default, can be had", mebibytes(size)),
        ),
        Ok(size) => Check::bad(
            NAME,
            Status::Degraded,
            Reason::new(
                format_args!(
                    "no memory for {} MiB, the default; {} MiB can be had",
                    mebibytes(facts.tried.wanted_buffer),
                    mebibytes(size)
                ),
                format!("--buffer {}K, or more memory for this cgroup", size / 1024),
            ),
        ),
        Err(_) => Check::skipped(NAME, "no map can be made, see transitions"),
    }
}

fn transitions(facts: &Facts) -> Check {
    match refusal(facts) {
        None => Check::ok(
            TRANSITIONS,
            "the tracepoint inet_sock_set_state can be attached to",
        ),
        Some(refused) => Check::bad(
            TRANSITIONS,
            Status::No,
            explain::transitions(refused, &facts.system),
        ),
    }
}

fn time_wait(probes: &TriedProbes, system: &System) -> Vec<Check> {
    const NAME: &str = "time_wait";
    let followed = probes.time_wait.followed();
    let check = match explain::time_wait(&followed, system) {
        Some(reason) => Check::bad(NAME, Status::Degraded, reason),
        None if followed.by == Kind::Functions => Check::ok(NAME, "followed by function probes"),
        None => Check::ok(
            NAME,
            "followed by its timers, to the jiffy; where an orphan comes to it from FIN_WAIT2, that may be \
             told up to a quarter of a second late",
        ),
    };
    let endings = match explain::endings(followed.by, &probes.symbols, system) {
        Some(reason) => Check::bad("time_wait_endings", Status::Degraded, reason),
        None if followed.by == Kind::None => {
            Check::skipped("time_wait_endings", "no probe for TIME_WAIT")
        }
        None => Check::ok(
            "time_wait_endings",
            "/proc/kallsyms shows the functions that end TIME_WAIT, to be found on the kernel's stack",
        ),
    };
    let [functions, timers] = variants(
        ["time_wait.functions", "time_wait.timers"],
        [
            "inet_twsk_alloc, tcp_timewait_state_process and tcp_twsk_destructor can be attached to",
            "timer_start and timer_cancel can be attached to, and tw_timer_handler is known",
        ],
        &probes.time_wait,
        system,
    );
    vec![check, functions, timers, endings]
}

fn accept(probes: &TriedProbes, system: &System) -> Vec<Check> {
    const NAME: &str = "accept";
    let followed = probes.accept.followed();
    let check = match explain::accept(&followed, system) {
        Some(reason) => Check::bad(NAME, Status::Degraded, reason),
        None if followed.by == Kind::Functions => Check::ok(NAME, "followed by a function probe"),
        None => Check::ok(
            NAME,
            "followed where the system call returns; by io_uring or a 32-bit program it is not seen",
        ),
    };
    let [function, calls] = variants(
        ["accept.function", "accept.tracepoints"],
        [
            "inet_csk_accept can be attached to",
            "sys_exit_accept and sys_exit_accept4 can be attached to",
        ],
        &probes.accept,
        system,
    );
    vec![check, function, calls]
}

/// How it is found out who holds a socket. Either way it is found, so both are well.
fn holders(probes: &TriedProbes, facts: &Facts) -> Check {
    let why = match &probes.open_sockets {
        _ if facts.private_pids => "the kernel would number processes otherwise".to_owned(),
        Ok(()) => {
            return Check::ok(
                HOLDERS,
                format!(
                    "the kernel tells who has which socket open; of commands that look once (states, leaks --once) \
                     with more than {} open files",
                    crate::kernel::probes::WALKED_FILES
                ),
            );
        }
        Err(refused) => explain::variant(refused, &facts.system).what,
    };
    Check::ok(
        HOLDERS,
        format!("/proc is read for who has which socket open, which takes longer: {why}"),
    )
}

fn variants(
    names: [&'static str; 2],
    works: [&str; 2],
    variants: &Variants,
    system: &System,
) -> [Check; 2] {
    let check = |index: usize, tried: &Result<(), Refused>| match tried {
        Ok(()) => Check::ok(names[index], works[index]),
        Err(refused) => Check::bad(names[index], Status::No, explain::variant(refused, system)),
    };
    [
        check(0, &variants.functions),
        check(1, &variants.tracepoints),
    ]
}

fn hz(hz: u32) -> Check {
    const NAME: &str = "hz";
    if clock::is_plausible(hz) {
        return Check::ok(
            NAME,
            format!("{hz}: the resolution of CLOCK_MONOTONIC_COARSE is one jiffy"),
        );
    }
    Check::bad(
        NAME,
        Status::Degraded,
        Reason::new(
            format_args!(
                "CLOCK_MONOTONIC_COARSE has a resolution of 1/{hz} s, which no jiffy has: when TIME_WAIT began \
                 is computed wrongly"
            ),
            explain::REPORT,
        ),
    )
}

fn sock_diag(facts: &Facts) -> Check {
    match &facts.sock_diag {
        Ok(count) => Check::ok(
            SOCK_DIAG,
            format!("lists the TCP sockets of this network namespace: {count} now"),
        ),
        Err(reason) => Check::bad(SOCK_DIAG, Status::No, reason.clone()),
    }
}

fn namespaces(facts: &Facts) -> Check {
    const NAME: &str = "network_namespaces";
    match &facts.namespaces {
        Ok(entered) => Check::of(
            NAME,
            format!("all {} that were found can be entered", entered.found),
            entered.reasons.clone(),
        ),
        Err(reason) => Check::bad(NAME, Status::No, reason.clone()),
    }
}

fn processes(facts: &Facts) -> Check {
    const NAME: &str = "processes";
    match &facts.processes {
        Ok(unseen) => Check::of(
            NAME,
            "/proc shows all of them, and what they have open",
            unseen.reasons(facts.system.capabilities),
        ),
        Err(reason) => Check::bad(NAME, Status::No, reason.clone()),
    }
}

/// Sockets whose connection is over, which only their descriptor leads to: it takes the right to trace
/// their process.
fn finished(facts: &Facts) -> Check {
    const NAME: &str = "finished_sockets";
    let system = &facts.system;
    let reason_of = |why: &str, error: Option<&io::Error>| {
        let what =
            format!("sockets that are in no table cannot be asked whether they are leaked: {why}");
        let reason = unlisted::refusal(what, error, system);
        Check::bad(NAME, Status::Degraded, reason)
    };
    let reason = |why: &str| reason_of(why, None);
    if let Err(error) = &facts.duplicate {
        return reason_of(&format!("pidfd_getfd(): {error}"), Some(error));
    }
    match system.ptrace_scope {
        Some(scope @ 3..) => reason(&format!("kernel.yama.ptrace_scope is {scope}")),
        _ if !may_trace(system.capabilities) => {
            reason("those of other users are closed to this one")
        }
        _ => Check::ok(
            NAME,
            "pidfd_getfd() works, for processes that may be traced",
        ),
    }
}

fn may_trace(capabilities: Capabilities) -> bool {
    capabilities.has(Capability::SYS_PTRACE)
}

fn containers(facts: &Facts) -> Check {
    const NAME: &str = "containers";
    match &facts.cgroup2 {
        Ok(point) => Check::ok(
            NAME,
            format!("told by their cgroups in {}", point.display()),
        ),
        Err(reason) => Check::bad(NAME, Status::Degraded, reason.clone()),
    }
}

fn mptcp(sockets: Option<u32>) -> Check {
    const NAME: &str = "mptcp";
    match sockets {
        None => Check::skipped(NAME, "this kernel has none"),
        Some(0) => Check::ok(NAME, "no socket of it in this network namespace"),
        Some(count) => Check::bad(
            NAME,
            Status::Degraded,
            Reason::new(
                format_args!(
                    "MPTCP sockets in this network namespace: {count}; transitions of such are counted, not shown, \
                     but for those of their TCP subflows"
                ),
                "list them with `ss -M`",
            ),
        ),
    }
}
