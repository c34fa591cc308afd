//! A program that is run to be watched: its start, the signals for it, its end.

use std::{
    env,
    ffi::OsString,
    fmt, io,
    os::unix::{
        ffi::OsStrExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    process::{Command, ExitStatus},
};

use nix::sys::{
    signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal},
    signalfd::{SfdFlags, SignalFd, siginfo},
};
use rustix::process::{Pid, WaitOptions, getpid, kill_process, set_child_subreaper, wait};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    event::Printable,
    exhausted::default_file_size_signal,
    invoker::{self, User},
};

/// Signals that somebody may send to tcptrace and mean the program. Others do to tcptrace what they
/// always do: SIGTTIN and SIGTTOU, because the shell sends them, and what ends them, to all of a job.
const FORWARDED: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// A program that runs, with this process's standard streams.
///
/// As long as this exists, signals to this process are for the program. Dropping it gives them back; it
/// leaves the program running.
#[derive(Debug)]
pub struct Program {
    pid: Pid,
    ended: Option<ExitStatus>,
    signals: Signals,
}

impl Program {
    /// Starts `arguments[0]`, found as a shell finds it, with the rest as arguments; as this `user` if one is given, with
    /// its groups and environment.
    ///
    /// This process adopts what the program leaves behind (`PR_SET_CHILD_SUBREAPER`): whatever descends
    /// from the program goes on descending from this process, also when its own parent has ended.
    ///
    /// Must be called inside a tokio runtime, while this is the only thread and has no other children:
    /// another thread would get the signals, and the end of every child is awaited here.
    ///
    /// # Errors
    /// When there is no such program, when it is none that can be run, or when no process can be made.
    ///
    /// # Panics
    /// Without any arguments.
    pub fn start(arguments: &[OsString], user: Option<&User>) -> Result<Self, NotStarted> {
        let (name, arguments) = arguments.split_first().expect("at least the program");
        let failed = |error: io::Error| NotStarted {
            name: name.clone(),
            error,
            as_user: user.is_some(),
        };
        set_child_subreaper(Some(getpid())).map_err(|error| failed(error.into()))?;
        // Before the program exists: nothing that is meant for it gets lost, its end included.
        let signals = Signals::take().map_err(failed)?;
        let mut command = Command::new(name);
        command.args(arguments);
        if let Some(user) = user {
            for (variable, value) in invoker::environment(user, |name| env::var_os(name)) {
                match value {
                    Some(value) => command.env(variable, value),
                    None => command.env_remove(variable),
                };
            }
        }
        let mask = signals.mask_before;
        let become_user = user.cloned();
        let prepare = move || {
            mask.thread_set_mask()?;
            default_file_size_signal();
            become_user.as_ref().map_or(Ok(()), switch_to)
        };
        // SAFETY: between fork and exec there are only system calls.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn().map_err(failed)?;
        // The handle of the standard library does nothing when dropped; the end is awaited here.
        let pid = Pid::from_child(&child);
        Ok(Self {
            pid,
            ended: None,
            signals,
        })
    }

    /// The program's process id, as this process's pid namespace numbers it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().cast_unsigned()
    }

    /// Waits for the end of the program, and hands signals on to it until then.
    ///
    /// It can be dropped and called again without losing anything, so it may be one branch of a
    /// `select!` in a loop. What the program has started and left running is left alone.
    ///
    /// # Errors
    /// When the kernel does not let a signal or an end be read, which should not happen.
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.attend()? {
                return Ok(status);
            }
            self.signals.ready().await?;
        }
    }

    /// Whether the program has ended; hands on signals that have come. An error counts as its end:
    /// [`ended`](Self::ended) has it again.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.attend(), Ok(None))
    }

    /// Hands on signals that have come, and takes notice of ends. Returns how the program ended, if it has.
    fn attend(&mut self) -> io::Result<Option<ExitStatus>> {
        // Before ends, so that what came while the program lived is not for us.
        while let Some(info) = self.signals.next()? {
            self.handle(&info)?;
        }
        self.reap()?;
        Ok(self.ended)
    }

    /// Passes a signal on, unless the program has got it as well.
    fn handle(&self, info: &siginfo) -> io::Result<()> {
        let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) else {
            return Ok(());
        };
        // The terminal's keys, and its end, are for all of the job in the foreground: the kernel itself
        // has sent it to the program.
        let by_terminal = info.ssi_code == libc::SI_KERNEL;
        if signal != Signal::SIGCHLD && !by_terminal {
            self.send(signal)?;
        }
        if signal == Signal::SIGTSTP {
            stop()?;
        }
        Ok(())
    }

    /// Sends a signal to the program. Its process id stays its own until its end has been read here.
    fn send(&self, signal: Signal) -> io::Result<()> {
        if self.ended.is_some() {
            return Ok(());
        }
        let Some(signal) = rustix::process::Signal::from_named_raw(signal as i32) else {
            return Ok(());
        };
        match kill_process(self.pid, signal) {
            // It changed its user, and we have not the privilege: as if it had been sent to it directly.
            Ok(()) | Err(rustix::io::Errno::PERM) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes notice of every child that has ended: the program, and what was adopted from it.
    fn reap(&mut self) -> io::Result<()> {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if pid == self.pid {
                        self.ended = Some(ExitStatus::from_raw(status.as_raw()));
                    }
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Makes this process the user's, for good: real, effective and saved ids.
fn switch_to(user: &User) -> io::Result<()> {
    let check = |result| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // Of this process, which has one thread: it was forked just now. Groups first, which only root may set.
    // SAFETY: as many groups as it says; numbers otherwise.
    check(unsafe { libc::setgroups(user.groups.len(), user.groups.as_ptr()) })?;
    // SAFETY: numbers.
    check(unsafe { libc::setresgid(user.gid, user.gid, user.gid) })?;
    // SAFETY: numbers.
    check(unsafe { libc::setresuid(user.uid, user.uid, user.uid) })
}

/// Stops this process as SIGTSTP does by itself: not at all where no shell could let it go on.
fn stop() -> io::Result<()> {
    let stop = SigSet::from(Signal::SIGTSTP);
    signal::raise(Signal::SIGTSTP)?;
    stop.thread_unblock()?;
    Ok(stop.thread_block()?)
}

/// The code with which to end in the program's place: its own, or 128 and the signal that ended it.
#[must_use]
pub fn exit_code(status: ExitStatus) -> u8 {
    // An exit code has 8 bits, and there are 64 signals.
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, signal) => 128 + signal.unwrap_or(0) as u8,
    }
}

/// The signals of this process, kept from doing what they do and read instead.
///
/// Blocked, and not caught: what this process was told to ignore (`nohup`), the program still ignores,
/// and only so is it told who sent a signal.
#[derive(Debug)]
struct Signals {
    signals: AsyncFd<SignalFd>,
    mask_before: SigSet,
}

impl Signals {
    fn take() -> io::Result<Self> {
        // Whoever started us may have ignored it, and then the kernel forgets how a child ended.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler function is installed.
        unsafe { signal::sigaction(Signal::SIGCHLD, &default) }?;
        let mut wanted = SigSet::from_iter(FORWARDED);
        wanted.add(Signal::SIGCHLD);
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&wanted, flags)?;
        // SAFETY: a `SignalFd` owns its descriptor, which stays open, and the same, while registered.
        let signals = unsafe { AsyncFd::register_with_interest(signals, Interest::READABLE) }?;
        // At the end: from here on, what fails gives them back.
        let mask_before = wanted.thread_swap_mask(signal::SigmaskHow::SIG_BLOCK)?;
        Ok(Self {
            signals,
            mask_before,
        })
    }

    /// The next that has come.
    fn next(&self) -> io::Result<Option<siginfo>> {
        Ok(self.signals.get_ref().read_signal()?)
    }

    /// Waits until there may be one.
    async fn ready(&self) -> io::Result<()> {
        self.signals.readable().await?.clear_ready();
        Ok(())
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // What is left was for the program, which it found ended; it must not end us now.
        while matches!(self.next(), Ok(Some(_))) {}
        // Cannot fail: the mask is one that was in force.
        let _ = self.mask_before.thread_set_mask();
    }
}

/// Why a program was not started.
#[derive(Debug)]
pub struct NotStarted {
    name: OsString,
    error: io::Error,
    /// As somebody else than root, who may do less.
    as_user: bool,
}

impl NotStarted {
    /// The code with which to end, as shells do: 127 when there is no such program, 126 when it cannot
    /// be run, and 2, an error of our own, when no process could be made.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.error.raw_os_error() {
            Some(libc::ENOENT) => 127,
            None
            | Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSYS) => 2,
            Some(_) => 126,
        }
    }
}

impl fmt::Display for NotStarted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fix = match (self.exit_code(), self.error.raw_os_error()) {
            (127, _) => {
                "check its name and PATH, and if it is a script, the interpreter in its first line"
            }
            (_, Some(libc::EACCES)) if self.as_user => {
                "make it, and every folder on the way to it, accessible to the user who called, or run it --as-root"
            }
            (_, Some(libc::EPERM | libc::EINVAL)) if self.as_user => {
                "a process of the user who called cannot be made here: --as-root runs it as root"
            }
            (_, Some(libc::EACCES)) => {
                "make it executable (chmod +x), and every folder on the way to it accessible"
            }
            (_, Some(libc::ENOEXEC)) => {
                "it has to be built for this machine, or to be a script that begins with #! and its interpreter"
            }
            (126, _) => "see whether it runs without tcptrace",
            _ => "see whether a limit on processes, memory or open files is reached (ulimit -a)",
        };
        let name = Printable(self.name.as_bytes());
        write!(f, "cannot run {name}: {}; {fix}", self.error)
    }
}

impl std::error::Error for NotStarted {}
