//! Why something does not work, in a person's words. Pure: from what was refused, and what the system
//! allows.

use std::fmt::Write as _;

use tcptrace_ebpf::FieldSpec;

use super::{
    Followed, Symbols,
    refused::{ENOTSUPP, Refused},
};
use crate::{
    event::Probes as Kind,
    exhausted,
    kernel::{
        btf::KERNEL_BTF,
        capabilities::{self, Capability},
        system::{Lockdown, System},
    },
    reason::Reason,
};

/// Linux from here on can do what every probe needs: `bpf_get_socket_cookie` in tracing programs.
pub(crate) const OLDEST: (u32, u32) = (5, 12);

pub(crate) const REPORT: &str = "please report it, with the output of `tcptrace doctor`";

const UNLOCK: &str = "boot with lockdown=integrity, or without lockdown";
pub(crate) const OUTSIDE: &str = "run as root of the host, outside a user namespace";

/// Why there are no transitions, and with that no tracing at all.
pub(crate) fn transitions(refused: &Refused, system: &System) -> Reason {
    let release = &system.release;
    match refused {
        // The largest thing that takes memory, and the only one whose size is an option.
        Refused::Map(cause) if cause.errno == Some(libc::ENOMEM) => Reason::new(
            "no memory for the ring buffer",
            "choose a smaller one with --buffer",
        ),
        _ if let Some(reason) = ran_out(refused) => reason,
        Refused::NoSysfs => Reason::new(
            format_args!("cannot read {KERNEL_BTF}: sysfs is not mounted on /sys"),
            "mount it: mount -t sysfs sysfs /sys",
        ),
        Refused::NoBtf => Reason::new(
            format_args!("this kernel does not describe its types: there is no {KERNEL_BTF}"),
            "it needs one built with CONFIG_DEBUG_INFO_BTF=y, as distributions ship since about 2020",
        ),
        Refused::BtfUnreadable(cause) => Reason::new(
            format_args!("cannot read {KERNEL_BTF}: {cause}"),
            "run it as root, where /sys is mounted",
        ),
        Refused::BtfUnusable(what) => {
            Reason::new(format_args!("cannot use {KERNEL_BTF}: {what}"), REPORT)
        }
        Refused::NoField(what) => {
            Reason::new(what, format!("this kernel is not supported; {REPORT}"))
        }
        _ if is_denied(refused) && !lacks_tracing(system).is_empty() => {
            let missing = lacks_tracing(system);
            let verb = if missing.len() == 1 { "is" } else { "are" };
            Reason::new(
                format_args!(
                    "the kernel does not let this user trace: {} {verb} missing",
                    capabilities::list(&missing)
                ),
                "run it as root, with sudo, or as a service with these capabilities",
            )
        }
        _ if system.is_before(OLDEST.0, OLDEST.1) => too_old(system),
        // Without the helpers that read kernel memory a program does not load, whatever the number of
        // the error: `bpf_base_func_proto()`, kernel/bpf/helpers.c, 5.10 to 6.18.
        _ if system.lockdown == Lockdown::Confidentiality => locked_down(),
        _ if is_denied(refused) => denied("the kernel refuses BPF programs", system),
        Refused::Map(cause) => Reason::new(
            format_args!("the kernel does not take tcptrace's maps: {cause}"),
            REPORT,
        ),
        other => {
            let Reason { what, .. } = variant(other, system);
            Reason::new(
                format_args!("kernel {release} refuses the probe of {what}"),
                REPORT,
            )
        }
    }
}

/// Why, if it is no refusal at all: something ran out. Asked before everything else.
fn ran_out(refused: &Refused) -> Option<Reason> {
    let fix = refused.errno().and_then(exhausted::fix)?;
    let what = match refused {
        Refused::BtfUnreadable(cause) => format!("cannot read {KERNEL_BTF}: {cause}"),
        Refused::Map(cause) => format!("cannot make tcptrace's maps: {cause}"),
        Refused::Program { name, cause } => format!("cannot load the probe of {name}: {cause}"),
        Refused::Tracefs(cause) => format!("cannot mount or read tracefs: {cause}"),
        _ => return None,
    };
    Some(Reason::new(what, fix))
}

/// Why a kernel refuses that is older than [`OLDEST`].
pub(crate) fn too_old(system: &System) -> Reason {
    Reason::new(
        format_args!("kernel {} is too old for tracing", system.release),
        "it needs 5.12 or later (bpf_get_socket_cookie in tracing programs)",
    )
}

/// Why a kernel refuses that is locked down to the utmost.
pub(crate) fn locked_down() -> Reason {
    Reason::new(
        "the kernel is locked down in confidentiality mode, in which BPF may not read kernel memory",
        UNLOCK,
    )
}

/// What is told of TIME_WAIT that is not followed by any probe; `None` if it is.
pub(crate) fn time_wait(followed: &Followed, system: &System) -> Option<Reason> {
    if followed.by != Kind::None {
        return None;
    }
    let (why, fix) = refusals(followed, system);
    Some(Reason::new(
        format_args!(
            "no probe for TIME_WAIT ({why}); it is followed by looks at sock_diag, which show when it ends \
             only roughly, and seldom how"
        ),
        fix,
    ))
}

/// What is told of `accept()` that is followed by no probe.
pub(crate) fn accept(followed: &Followed, system: &System) -> Option<Reason> {
    let (why, fix) = refusals(followed, system);
    match followed.by {
        Kind::None => Some(Reason::new(
            format_args!(
                "no probe for accept() ({why}); who accepted is not known until it closes"
            ),
            fix,
        )),
        Kind::Tracepoints | Kind::Functions => None,
    }
}

/// What is told if of a TIME_WAIT that ends early it is not always known how.
pub(crate) fn endings(time_wait: Kind, symbols: &Symbols, system: &System) -> Option<Reason> {
    if time_wait == Kind::None {
        // Which is told already.
        return None;
    }
    let (why, fix) = match symbols {
        Symbols::Known { missing, .. } if missing.is_empty() => return None,
        Symbols::Known { missing, .. } => (
            format!("/proc/kallsyms does not know {}", missing.join(", ")),
            REPORT.to_owned(),
        ),
        Symbols::Hidden => ("/proc/kallsyms hides addresses".to_owned(), unhide(system)),
        Symbols::Unreadable(cause) => (
            format!("cannot read /proc/kallsyms: {cause}"),
            cause
                .errno
                .and_then(exhausted::fix)
                .unwrap_or("it needs a kernel with CONFIG_KALLSYMS=y, and /proc mounted")
                .to_owned(),
        ),
    };
    Some(Reason::new(
        format_args!("of a TIME_WAIT that ends early it is not always known how: {why}"),
        fix,
    ))
}

/// What is told of optional fields that this kernel does not have, one sentence for each loss.
pub(crate) fn fields(missing: &[&FieldSpec]) -> Vec<Reason> {
    let mut told: Vec<Reason> = Vec::new();
    for loss in missing.iter().filter_map(|field| field.without) {
        let reason = Reason::new(
            format_args!("not known on this kernel: {}", loss.what),
            loss.fix,
        );
        // Several fields may be needed for one thing.
        if !told.contains(&reason) {
            told.push(reason);
        }
    }
    told
}

/// Why a program cannot be run to be watched.
pub(super) fn no_ancestry(field: &FieldSpec) -> Reason {
    Reason::new(
        format_args!(
            "this kernel does not show whose child a process is: it has no {}",
            field.path
        ),
        format!("trace without a program to run; {REPORT}"),
    )
}

/// Why stacks cannot be recorded: without a field.
pub(super) fn no_stack_field(field: &FieldSpec) -> Reason {
    let fix = field.without.map_or(REPORT, |loss| loss.fix);
    Reason::new(
        format_args!(
            "stacks cannot be recorded here: this kernel has no {}",
            field.path
        ),
        format!("leave --stacks out; {fix}"),
    )
}

/// Why stacks cannot be recorded: without the helper that shows a task's registers.
pub(super) fn no_stacks(system: &System) -> Reason {
    Reason::new(
        format_args!("kernel {} does not let stacks be recorded", system.release),
        "leave --stacks out; it needs Linux 5.15 or later",
    )
}

/// What is told if somebody asks for one kind of probes, and it is not to be had.
pub(super) fn not_as_asked(what: &str, followed: &Followed, system: &System) -> Reason {
    let (why, fix) = refusals(followed, system);
    Reason::new(
        format_args!("the probes asked for cannot follow {what} ({why})"),
        format!("leave --probes out, to trace with what works; or {fix}"),
    )
}

/// Why one way to follow something is not to be had.
pub(crate) fn variant(refused: &Refused, system: &System) -> Reason {
    if let Some(reason) = ran_out(refused) {
        return reason;
    }
    match refused {
        Refused::Program { name, cause } => {
            let fix = match cause.errno {
                Some(libc::EPERM | libc::EACCES) => {
                    return denied(&format!("{name}: {cause}"), system);
                }
                Some(ENOTSUPP | libc::EOPNOTSUPP) if system.bpf_jit == Some(0) => {
                    "set net.core.bpf_jit_enable to 1".to_owned()
                }
                Some(ENOTSUPP | libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => {
                    "it needs a kernel with CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS=y".to_owned()
                }
                _ => REPORT.to_owned(),
            };
            Reason::new(format_args!("{name}: {cause}"), fix)
        }
        Refused::Nowhere(name) => Reason::new(
            format_args!("{name} is not in this kernel as expected"),
            REPORT,
        ),
        Refused::HiddenAddress(name) => {
            Reason::new(format_args!("/proc/kallsyms hides {name}"), unhide(system))
        }
        Refused::NoSymbol(name) => {
            Reason::new(format_args!("/proc/kallsyms does not know {name}"), REPORT)
        }
        Refused::Tracefs(cause) => {
            let needs = [Capability::SYS_ADMIN, Capability::DAC_READ_SEARCH];
            let missing = system.capabilities.missing(&needs);
            let fix = if system.lockdown == Lockdown::Confidentiality {
                UNLOCK.to_owned()
            } else if missing.is_empty() {
                "mount it: mount -t tracefs tracefs /sys/kernel/tracing".to_owned()
            } else {
                format!("run as root, or with {}", capabilities::list(&missing))
            };
            Reason::new(format_args!("cannot mount or read tracefs: {cause}"), fix)
        }
        other => transitions(other, system),
    }
}

/// Why each kind that was tried is not to be had, and what can be done about that.
fn refusals(followed: &Followed, system: &System) -> (String, String) {
    if followed.refused.is_empty() {
        return (
            "as asked for".to_owned(),
            "leave --probes out, to trace with what works".to_owned(),
        );
    }
    let (mut why, mut fixes) = (String::new(), Vec::new());
    for (kind, refused) in &followed.refused {
        let Reason { what, fix } = variant(refused, system);
        let kind = match kind {
            Kind::Functions => "function probes",
            Kind::Tracepoints | Kind::None => "tracepoint probes",
        };
        let separator = if why.is_empty() { "" } else { "; " };
        // Writing into a string cannot fail.
        let _ = write!(why, "{separator}{kind}: {what}");
        // The second kind needs less, and so does its fix.
        if !fixes.contains(&fix) {
            fixes.insert(0, fix);
        }
    }
    (why, fixes.join("; or "))
}

fn is_denied(refused: &Refused) -> bool {
    matches!(refused.errno(), Some(libc::EPERM | libc::EACCES))
}

fn lacks_tracing(system: &System) -> Vec<Capability> {
    let needed = [Capability::BPF, Capability::PERFMON];
    system.capabilities.missing(&needed)
}

/// Something is forbidden: for want of a capability, or although it is there.
fn denied(what: &str, system: &System) -> Reason {
    let missing = lacks_tracing(system);
    if !missing.is_empty() {
        return Reason::new(
            what,
            format!("run as root, or with {}", capabilities::list(&missing)),
        );
    }
    if system.user_namespace {
        return Reason::new(
            format_args!(
                "{what}: the capabilities are those of a user namespace, and do not count"
            ),
            OUTSIDE,
        );
    }
    let active = match system.security_modules.as_str() {
        "" => String::new(),
        modules => format!(" (active here: {modules})"),
    };
    Reason::new(
        format_args!("{what}, although the capabilities are there"),
        format!(
            "a security module{active} or a container runtime forbids it: allow it there, or run on the host"
        ),
    )
}

/// How the addresses in `/proc/kallsyms` become visible: `kallsyms_show_value()`, kernel/ksyms_common.c
/// (kernel/kallsyms.c before 6.8).
fn unhide(system: &System) -> String {
    if system.kptr_restrict.is_some_and(|restrict| restrict > 1) {
        "set kernel.kptr_restrict to 1; with 2, nobody sees them".to_owned()
    } else if !system.capabilities.has(Capability::SYSLOG) {
        "run as root, or with CAP_SYSLOG".to_owned()
    } else if system.user_namespace {
        OUTSIDE.to_owned()
    } else {
        "it needs a kernel with CONFIG_KALLSYMS=y, and a security module may hide them".to_owned()
    }
}
