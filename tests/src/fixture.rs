//! Processes that make TCP traffic, as the test commands them.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns},
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    Netns, Tcptrace,
    program::{Process, built},
    wait_until,
};

/// No command but a connect that times out takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that obeys. Its sockets have the names that the test gives them.
#[derive(Debug)]
pub struct Fixture {
    /// Its process id, as the test's own pid namespace numbers it.
    pub pid: u32,
    /// Its name, as `/proc/PID/comm` tells it.
    pub comm: String,
    control: UnixStream,
    answers: BufReader<UnixStream>,
    /// None for a forked one, which ends when `control` does.
    process: Option<Process>,
}

/// The two ends of a connection as one of them sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The address of this end.
    pub local: SocketAddr,
    /// The address of the other end.
    pub remote: SocketAddr,
}

impl Fixture {
    pub(crate) fn start(netns: &Netns, cpu: usize, comm: &str, more: &[&OsStr]) -> Self {
        let meeting = Meeting::new();
        let mut command = Command::new(built("fixture"));
        command.arg(comm).arg(&meeting.path).args(more);
        enter(&mut command, netns, cpu);
        let process = Process(command.spawn().expect("`cargo test` builds the fixture"));
        Self {
            process: Some(process),
            ..meeting.fixture(comm)
        }
    }

    /// Has `command`, which is tcptrace, run it: its command line is added to the arguments.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn run_by(mut command: Command, comm: &str) -> (Tcptrace, Self) {
        let meeting = Meeting::new();
        command.arg(built("fixture")).arg(comm).arg(&meeting.path);
        let by = Tcptrace::watching(&mut command);
        (by, meeting.fixture(comm))
    }

    /// Sends a command (they are in `bin/fixture.rs`) and does not wait for its answer.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn begin(&mut self, command: &str) {
        writeln!(self.control, "{command}").expect("the fixture is alive");
    }

    /// The answer to the oldest command that has none. A failed one has `error`.
    ///
    /// # Panics
    /// When none comes within two minutes.
    #[must_use]
    pub fn answer(&mut self) -> Value {
        let mut line = String::new();
        let result = self.answers.read_line(&mut line);
        serde_json::from_str(&line)
            .unwrap_or_else(|_| panic!("{} did not answer: {result:?} {line:?}", self.comm))
    }

    /// Sends a command and gives its answer, which may be an `error`.
    pub fn attempt(&mut self, command: &str) -> Value {
        self.begin(command);
        self.answer()
    }

    /// Sends a command that must succeed.
    ///
    /// # Panics
    /// When it fails.
    pub fn ask(&mut self, command: &str) -> Value {
        let answer = self.attempt(command);
        assert!(
            answer.get("error").is_none(),
            "{}: {command}: {answer}",
            self.comm
        );
        answer
    }

    /// Listens as `name`, with room for many connections; gives the address.
    pub fn listen(&mut self, name: &str, address: &str) -> SocketAddr {
        address_in(&self.ask(&format!("listen {name} {address} 1024")), "local")
    }

    /// Connects as `name`.
    pub fn connect(&mut self, name: &str, address: SocketAddr) -> Pair {
        pair_in(&self.ask(&format!("connect {name} {address}")))
    }

    /// Accepts a connection as `name`.
    pub fn accept(&mut self, listener: &str, name: &str) -> Pair {
        pair_in(&self.ask(&format!("accept {listener} {name}")))
    }

    /// Closes a socket.
    pub fn close(&mut self, name: &str) {
        self.ask(&format!("close {name}"));
    }

    /// The cookie of a socket, as tcptrace prints it. The kernel makes one if there is none yet.
    ///
    /// # Panics
    /// When there is no such socket.
    pub fn cookie(&mut self, name: &str) -> String {
        let answer = self.ask(&format!("cookie {name}"));
        answer["cookie"].as_str().expect("a cookie").to_owned()
    }

    /// Forks. The child has the same sockets under the same names, and is named `comm`.
    ///
    /// # Panics
    /// When the process cannot fork.
    pub fn fork(&mut self, comm: &str) -> Self {
        let meeting = Meeting::new();
        self.ask(&format!("fork {comm} {}", meeting.path.display()));
        meeting.fixture(comm)
    }

    /// Becomes another program (`execve()`) named `comm`, which has these sockets, though not under any
    /// name. The others are close-on-exec.
    ///
    /// # Panics
    /// When it does not.
    pub fn exec(&mut self, comm: &str, keep: &[&str]) {
        let meeting = Meeting::new();
        let path = meeting.path.display();
        self.begin(&format!("exec {comm} {path} {}", keep.join(" ")));
        self.goes_on(meeting.fixture(comm));
    }

    /// The same process, which obeys by another way now.
    fn goes_on(&mut self, new: Self) {
        assert_eq!(new.pid, self.pid, "it is the same process");
        *self = Self {
            process: self.process.take(),
            ..new
        };
    }

    /// Ends the process's first thread; another one goes on.
    ///
    /// # Panics
    /// When it does not.
    pub fn outlive_first_thread(&mut self) {
        let meeting = Meeting::new();
        self.begin(&format!("outlive {} {}", self.comm, meeting.path.display()));
        self.goes_on(meeting.fixture(&self.comm));
        let stat = Path::new("/proc").join(self.pid.to_string()).join("stat");
        wait_until("the first thread has ended", PATIENCE, || {
            let stat = fs::read_to_string(&stat).expect("it lives");
            stat.rsplit(')').next()?.starts_with(" Z").then_some(())
        });
    }

    /// [`fork`](Self::fork), and the child is the first process of a pid namespace. No other can be forked
    /// after it.
    ///
    /// # Panics
    /// When the process cannot fork.
    pub fn fork_into_pid_namespace(&mut self, comm: &str) -> Self {
        self.ask("unshare-pids");
        self.fork(comm)
    }

    /// [`fork`](Self::fork), and the child gets this pid. Gives nothing when the pid is taken.
    ///
    /// # Panics
    /// When the process cannot fork.
    pub fn fork_as(&mut self, pid: u32, comm: &str) -> Option<Self> {
        let meeting = Meeting::new();
        let answer = self.attempt(&format!("fork-as {pid} {comm} {}", meeting.path.display()));
        if answer["error"] == "EEXIST" {
            return None;
        }
        assert_eq!(answer["pid"], pid, "{answer}");
        Some(meeting.fixture(comm))
    }

    /// Gives a socket to another process over a UNIX socket, and closes it here.
    ///
    /// # Panics
    /// When it does not arrive.
    pub fn send(&mut self, name: &str, to: &mut Self) {
        let path = fresh_path();
        to.begin(&format!("receive {name} {}", path.display()));
        wait_until("the other process listens", PATIENCE, || {
            path.exists().then_some(())
        });
        // The path is there a moment before the listener is.
        wait_until("the socket is sent", PATIENCE, || {
            let answer = self.attempt(&format!("send {name} {}", path.display()));
            answer.get("error").is_none().then_some(())
        });
        let answer = to.answer();
        assert!(answer.get("error").is_none(), "receive: {answer}");
        let _ = fs::remove_file(path);
    }

    /// Ends the process with SIGKILL and waits until it is gone.
    ///
    /// # Panics
    /// When it was gone already.
    pub fn kill(self) {
        let pid = Pid::from_raw(self.pid.cast_signed());
        kill(pid, Signal::SIGKILL).expect("alive");
        self.wait_gone();
    }

    /// Lets the process exit by itself and waits until it is gone.
    pub fn exit(mut self, code: i32) {
        self.begin(&format!("exit {code}"));
        self.wait_gone();
    }

    fn wait_gone(mut self) {
        if let Some(process) = &mut self.process {
            process.wait("the fixture ends", PATIENCE);
        }
        let entry = Path::new("/proc").join(self.pid.to_string());
        wait_until("the process is gone", PATIENCE, || {
            (!entry.exists()).then_some(())
        });
    }
}

/// Has the command begin in the namespace, on this CPU.
pub(crate) fn enter(command: &mut Command, netns: &Netns, cpu: usize) {
    enter_namespace(command, netns);
    let mut cpus = CpuSet::new();
    cpus.set(cpu).expect("a CPU's number");
    let stay = move || Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?);
    // SAFETY: between fork and exec there is only one more system call.
    unsafe { command.pre_exec(stay) };
}

/// The same on any CPU.
pub(crate) fn enter_namespace(command: &mut Command, netns: &Netns) {
    let netns = netns.as_fd().as_raw_fd();
    let enter = move || {
        // SAFETY: the namespace outlives this function, and so the start of the child.
        let netns = unsafe { std::os::fd::BorrowedFd::borrow_raw(netns) };
        Ok(setns(netns, CloneFlags::CLONE_NEWNET)?)
    };
    // SAFETY: between fork and exec there is only one system call.
    unsafe { command.pre_exec(enter) };
}

impl Pair {
    /// The same connection seen from the other end.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            local: self.remote,
            remote: self.local,
        }
    }
}

/// A UNIX socket in the file system where one new fixture reports. (Abstract names would not do: they
/// belong to a network namespace.)
struct Meeting {
    path: PathBuf,
    listener: UnixListener,
}

impl Meeting {
    fn new() -> Self {
        let path = fresh_path();
        let listener = UnixListener::bind(&path).expect("a UNIX socket");
        listener.set_nonblocking(true).expect("a socket can be");
        Self { path, listener }
    }

    fn fixture(self, comm: &str) -> Fixture {
        let control = wait_until("the fixture reports", PATIENCE, || {
            self.listener.accept().ok().map(|(stream, _)| stream)
        });
        control.set_nonblocking(false).expect("a socket can be");
        control
            .set_read_timeout(Some(PATIENCE))
            .expect("a socket can wait");
        let answers = BufReader::new(control.try_clone().expect("a second handle"));
        // It may know its own number in another pid namespace only.
        let peer = getsockopt(&control, PeerCredentials).expect("a UNIX socket has them");
        Fixture {
            pid: peer.pid().cast_unsigned(),
            comm: comm.to_owned(),
            control,
            answers,
            process: None,
        }
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

static PATHS: AtomicUsize = AtomicUsize::new(0);

fn fresh_path() -> PathBuf {
    let number = PATHS.fetch_add(1, Ordering::Relaxed);
    env::temp_dir().join(format!("tcptrace-tests-{}-{number}", process::id()))
}

fn address_in(answer: &Value, key: &str) -> SocketAddr {
    answer[key]
        .as_str()
        .and_then(|text| text.parse().ok())
        .expect("an address")
}

fn pair_in(answer: &Value) -> Pair {
    Pair {
        local: address_in(answer, "local"),
        remote: address_in(answer, "remote"),
    }
}
