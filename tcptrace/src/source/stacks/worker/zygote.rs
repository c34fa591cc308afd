//! Starts the reader, as often as it takes.
//!
//! tcptrace re-executes its own file for this process, and does not just fork: it has threads, maps of the kernel's
//! ring buffer, BPF descriptors, and in its memory what it knows of other processes. A fork would hand all of it to
//! the code that parses other users' files; after `execve()` nothing of it is left.
//!
//! It stays while tcptrace runs, and forks a reader when it is asked to. For tcptrace itself could not start one
//! later: it gives up the right to change users. This process keeps three capabilities, to change the user and to
//! kill what has another, and gives up all others. It reads nothing but one byte at a time from tcptrace.

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{self, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{SigHandler, Signal, kill, signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set,
    set_capabilities,
};

use super::{super::reader, channel::Channel, protocol::MOST_BYTES, sandbox};

/// The name by which this executable knows that it is to be this, and is listed by `ps`.
const NAME: &str = "tcptrace-files";
/// Start a reader, with the descriptor that comes along.
const START: u8 = b'S';
/// End it.
const END: u8 = b'E';
/// How long an answer takes at most: what it does itself takes a millisecond.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// How long is waited for the end of a process that was killed. It can be longer in a read that cannot be
/// interrupted; then it is left behind.
const END_WAIT: Duration = Duration::from_millis(300);

/// How a reader ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Ended {
    /// By this signal.
    Signal(u8),
    /// With this code.
    Code(u8),
    /// Not yet, though it was killed.
    Not,
}

/// The process, from tcptrace's side. It ends when this is dropped.
pub(super) struct Zygote {
    channel: Channel,
}

impl Zygote {
    #[cfg_attr(test, expect(dead_code, reason = "a test cannot be run as it"))]
    pub(super) fn start() -> io::Result<Self> {
        let (channel, other) = Channel::pair()?;
        // Whatever has become of the path: the kernel knows the file.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(NAME)
            .env_clear()
            .current_dir("/")
            // The terminal's keys are for tcptrace.
            .process_group(0)
            .stdin(Stdio::from(other))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // Not waited for: it ends with us, or by a signal that shows as the end of the channel.
        command.spawn()?;
        Ok(Self { channel })
    }

    /// A new reader, which has the other end.
    pub(super) fn reader(&self) -> io::Result<Channel> {
        let (channel, other) = Channel::pair()?;
        self.channel.send(&[START], &[other.as_fd()])?;
        match self.answer()? {
            [0, _] => Ok(channel),
            [_, errno] => Err(io::Error::from_raw_os_error(errno.into())),
        }
    }

    /// Ends the reader, if it has not ended. Returns how it did.
    pub(super) fn end(&self) -> io::Result<Ended> {
        self.channel.send(&[END], &[])?;
        Ok(match self.answer()? {
            [0, code] => Ended::Code(code),
            [1, signal] => Ended::Signal(signal),
            _ => Ended::Not,
        })
    }

    fn answer(&self) -> io::Result<[u8; 2]> {
        let mut buffer = [0; MOST_BYTES];
        let deadline = Some(Instant::now() + ANSWER_WAIT);
        let packet = self.channel.receive(&mut buffer, deadline)?;
        let packet = packet.ok_or(io::ErrorKind::BrokenPipe)?;
        packet
            .bytes
            .try_into()
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

/// If this process was started to be the zygote, it is that, and this never returns.
///
/// By the name in `argv[0]`, which no option, help or completion has to leave out.
pub fn run_if_asked() {
    let name = std::env::args_os().next();
    if name.is_none_or(|name| name != NAME) {
        return;
    }
    // What whoever started tcptrace left open for it.
    close_others();
    // Otherwise it would be listed as "exe", by the path that it was started by.
    let _ = rustix::thread::set_name(c"tcptrace-files");
    let Ok(standard) = io::stdin().as_fd().try_clone_to_owned() else {
        process::exit(2);
    };
    process::exit(match serve(standard) {
        Ok(()) => 0,
        // Somebody gave another program this name.
        Err(_) => 2,
    });
}

fn serve(channel: OwnedFd) -> io::Result<()> {
    let channel = Channel::new(channel);
    // Sent to all of a group or a unit, and meant for tcptrace: it ends in order, and then this one does.
    for ignored in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
    ] {
        // SAFETY: no handler function is installed.
        unsafe { signal(ignored, SigHandler::SigIgn) }?;
    }
    keep_capabilities();
    // Known to readers from now on: before Linux 6.4 (`PR_GET_AUXV`) it is read in /proc/self/auxv, which is closed to
    // a process that has changed its user.
    let _ = rustix::param::page_size();
    let mut reader = None;
    let mut buffer = [0; MOST_BYTES];
    while let Some(packet) = channel.receive(&mut buffer, None)? {
        let answer = match (packet.bytes, packet.files.into_iter().next()) {
            ([START], Some(end)) => match start(end) {
                Ok(pid) => {
                    reader = Some(pid);
                    [0, 0]
                }
                Err(errno) => [1, errno as u8],
            },
            ([END], None) => end(reader.take()),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        channel.send(&answer, &[])?;
    }
    // tcptrace is gone.
    end(reader);
    Ok(())
}

/// Closes all descriptors but the standard ones.
fn close_others() {
    // SAFETY: nothing in this process uses or drops what owned them: it has just begun, or is just about to do
    // something else for good.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
}

/// Keeps what it takes to start and end readers, if it was there.
fn keep_capabilities() {
    let kept = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::KILL;
    for capability in CapabilitySet::all() {
        // Without CAP_SETPCAP the bounding set stays; there is no way to gain anything by it.
        let _ = remove_capability_from_bounding_set(capability);
    }
    let had = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    let kept = CapabilitySets {
        effective: kept & had,
        permitted: kept & had,
        inheritable: CapabilitySet::empty(),
    };
    let _ = set_capabilities(None, kept);
    let _ = rustix::thread::set_no_new_privs(true);
}

fn start(channel: OwnedFd) -> Result<Pid, nix::Error> {
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            // Its standard input is the channel. All else goes, the way to tcptrace's opener included.
            let _ = rustix::stdio::dup2_stdin(&channel);
            std::mem::forget(channel);
            close_others();
            let _ = rustix::thread::set_name(c"tcptrace-reader");
            let channel = match io::stdin().as_fd().try_clone_to_owned() {
                Ok(channel) => channel,
                Err(_) => process::exit(2),
            };
            // A fault ends it at once: nothing is to be unwound, and nobody reads what it would say.
            std::panic::set_hook(Box::new(|_| process::abort()));
            let usage = reader::Usage::new();
            let confined = sandbox::enter(sandbox::number(&channel));
            reader::serve(Channel::new(channel), confined, usage);
            process::exit(0);
        }
    }
}

/// Ends it. Returns how.
fn end(reader: Option<Pid>) -> [u8; 2] {
    let Some(reader) = reader else {
        return [2, 0];
    };
    // If it has ended, this changes nothing: its number is its own until its end was read.
    let _ = kill(reader, Signal::SIGKILL);
    let deadline = Instant::now() + END_WAIT;
    loop {
        match waitpid(reader, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return [0, code as u8],
            Ok(WaitStatus::Signaled(_, signal, _)) => return [1, signal as u8],
            Ok(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            _ => return [2, 0],
        }
    }
}
