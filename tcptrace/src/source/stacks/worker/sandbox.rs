//! What the reader may do: next to nothing.
//!
//! It parses what other users wrote. A fault in a parser must neither give its finder root's rights nor take more
//! than a share of the machine.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd as _, RawFd},
};

use rustix::{
    process::{
        DumpableBehavior, Resource, Rlimit, Signal, getrlimit, set_dumpable_behavior,
        set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, Gid, Uid, set_capabilities, set_no_new_privs,
        set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::{super::budget, protocol::Confined};

/// The reader's user: of a range that systemd's UIDS-GIDS.md leaves unused, so that it shares its rights and limits
/// with nobody. Each reader's starter has its own.
const FIRST_UID: u32 = 2_000_000_000;
/// `nobody`, where a user namespace has no room for that one.
const NOBODY: u32 = 65_534;

/// Confines this process, whose only thread this is, for ever. `channel`: the only descriptor to write to.
///
/// What cannot be had is left out, and said: a tcptrace without privileges cannot change its user.
pub(super) fn enter(channel: RawFd) -> Confined {
    let own_user = change_user();
    // Leaving root took them away. Without that they have to be given up.
    let no_capabilities = set_capabilities(None, none()).is_ok();
    // These two after the change of user, which undoes them: prctl(2).
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let no_new_privs = set_no_new_privs(true).is_ok();
    let limits = limit().is_ok();
    let seccomp = filter(channel).is_some_and(|filter| seccompiler::apply_filter(&filter).is_ok());
    Confined {
        own_user,
        no_capabilities,
        no_new_privs,
        limits,
        seccomp,
    }
}

/// No capabilities.
pub(super) const fn none() -> CapabilitySets {
    CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    }
}

fn change_user() -> bool {
    let pid = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let own = FIRST_UID + pid.cast_unsigned();
    [own, NOBODY].into_iter().any(|id| {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        // This is the only thread: what a thread changes is what the process changes.
        set_thread_groups(&[]).is_ok()
            && set_thread_res_gid(gid, gid, gid).is_ok()
            && set_thread_res_uid(uid, uid, uid).is_ok()
    })
}

fn limit() -> io::Result<()> {
    let set = |resource, most: u64| {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)
    };
    // What the program itself takes is there already, and differs between builds.
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = pages
        .split_ascii_whitespace()
        .next()
        .and_then(|pages| pages.parse().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    let own = pages * rustix::param::page_size() as u64;
    set(Resource::As, own + budget::READER)?;
    set(Resource::Core, 0)?;
    set(Resource::Fsize, 0)?;
    set(Resource::Nproc, 0)?;
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    set(Resource::Nofile, most.min(budget::READER_FILES))?;
    Ok(renew_cpu()?)
}

/// From now on it may take so much CPU time again. The kernel counts whole seconds, and ends it behind them.
pub(in super::super) fn renew_cpu() -> rustix::io::Result<()> {
    let used = crate::kernel::clock::thread_cpu_ns().div_ceil(1_000_000_000);
    let limit = Rlimit {
        current: Some(used + budget::READER_CPU.as_secs()),
        maximum: None,
    };
    setrlimit(Resource::Cpu, limit)
}

/// The system calls that are left. It opens nothing: what it reads, it is handed.
fn filter(channel: RawFd) -> Option<BpfProgram> {
    let pid = u64::from(std::process::id());
    let rule = |conditions: &[(u8, SeccompCmpArgLen, u64)]| {
        let conditions = conditions.iter().map(|(argument, len, value)| {
            SeccompCondition::new(*argument, len.clone(), SeccompCmpOp::Eq, *value).ok()
        });
        SeccompRule::new(conditions.collect::<Option<_>>()?).ok()
    };
    let dword = SeccompCmpArgLen::Dword;
    let to_channel = || rule(&[(0, dword.clone(), channel.cast_unsigned().into())]);
    let own = || rule(&[(0, dword.clone(), pid)]);
    let mut rules = BTreeMap::new();
    for any in [
        // What it is there for.
        libc::SYS_pread64,
        libc::SYS_fstat,
        libc::SYS_close,
        // Memory.
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        // Time, and the seed of hash tables.
        libc::SYS_clock_gettime,
        libc::SYS_getrandom,
        // The end, also by abort().
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_restart_syscall,
        libc::SYS_futex,
    ] {
        rules.insert(any, Vec::new());
    }
    // Memory that can be run is for whoever wants to run something else.
    let prot = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    let data =
        SeccompRule::new(vec![SeccompCondition::new(2, dword.clone(), prot, 0).ok()?]).ok()?;
    rules.insert(libc::SYS_mmap, vec![data.clone()]);
    // musl's malloc makes pages usable that it has kept apart (`alloc_meta()`), and its abort() uses tkill().
    rules.insert(libc::SYS_mprotect, vec![data]);
    rules.insert(libc::SYS_tkill, vec![own()?]);
    rules.insert(libc::SYS_sendmsg, vec![to_channel()?]);
    rules.insert(libc::SYS_recvmsg, vec![to_channel()?]);
    rules.insert(libc::SYS_tgkill, vec![own()?]);
    // A build with debug assertions asks whether a descriptor is open before it closes it.
    let is_open = rule(&[(1, dword.clone(), libc::F_GETFD as u64)])?;
    rules.insert(libc::SYS_fcntl, vec![is_open]);
    // A limit of its own, for one resource: what renews it.
    let cpu = Resource::Cpu as u32;
    let renewed = rule(&[(0, dword.clone(), 0), (1, dword.clone(), cpu.into())])?;
    rules.insert(libc::SYS_prlimit64, vec![renewed]);
    let arch = std::env::consts::ARCH.try_into().ok()?;
    // Anything else is a fault that somebody makes use of, or a defect of this list: both are to be seen.
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    );
    filter.ok()?.try_into().ok()
}

/// The descriptor of a channel, for [`enter`].
pub(super) fn number(channel: &impl std::os::fd::AsFd) -> RawFd {
    channel.as_fd().as_raw_fd()
}
