//! The program under test.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{errno::Errno, sys::signal::Signal};
use serde_json::Value;

use crate::{
    Line, Lines, boottime,
    program::{Process, built},
    wait_until,
};

/// What tcptrace says on stderr once its probes are attached and it has looked at what is there.
const READY: &str = "tcptrace: tracing";
/// Time to load, to attach and to look, on a machine that is busy with other tests.
const START: Duration = Duration::from_secs(30);
const RUNS: &str = "tcptrace can be run";
/// Time for a run that ends by itself.
const WHOLE: Duration = Duration::from_secs(60);
/// The user and the group without any rights.
const NOBODY: u32 = 65534;
/// Time to write the summary after an interrupt.
const END: Duration = Duration::from_secs(15);

/// A tcptrace that runs. Killed when dropped.
#[derive(Debug)]
pub struct Tcptrace {
    process: Process,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

/// A tcptrace that has ended.
#[derive(Debug)]
pub struct Run {
    /// Everything it wrote to stdout.
    pub lines: Lines,
    /// Everything it wrote to stderr.
    pub stderr: String,
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
}

#[derive(Debug, Default)]
struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Debug, Default)]
struct State {
    lines: Lines,
    stderr: String,
    open: usize,
}

impl Tcptrace {
    /// Runs tcptrace with JSON output until it traces.
    ///
    /// # Panics
    /// When there is no binary, or it does not start to trace.
    #[must_use]
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_plain(&[arguments, &["-o", "json"]].concat())
    }

    /// The same with these arguments only.
    ///
    /// # Panics
    /// When there is no binary, or it does not start to trace.
    #[must_use]
    pub fn start_plain(arguments: &[&str]) -> Self {
        Self::spawn(arguments).wait_ready(arguments)
    }

    fn wait_ready(self, arguments: &[&str]) -> Self {
        let ready = |state: &State| state.stderr.lines().any(|line| line == READY);
        let state = self
            .output
            .wait(START, |state| state.open == 0 || ready(state));
        let said = state.stderr.as_str();
        assert!(
            ready(&state),
            "tcptrace {arguments:?} does not trace:\n{said}"
        );
        self
    }

    /// [`start`](Self::start) as root without one capability (its number in `linux/capability.h`).
    ///
    /// # Panics
    /// When there is no binary, or it does not start to trace.
    #[must_use]
    pub fn start_without(capability: libc::c_ulong, arguments: &[&str]) -> Self {
        let mut command = command(&binary(), &[arguments, &["-o", "json"]].concat());
        let give_up = move || {
            // SAFETY: takes numbers only.
            let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            Errno::result(result).map(drop).map_err(io::Error::from)
        };
        // SAFETY: between fork and exec there is only one system call.
        unsafe { command.pre_exec(give_up) };
        Self::watch(command.spawn().expect(RUNS)).wait_ready(arguments)
    }

    /// What has been said on stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.output.wait(Duration::ZERO, |_| true).stderr
    }

    /// Runs tcptrace to its end: for what ends by itself, such as a replay or a usage error.
    ///
    /// # Panics
    /// When there is no binary, or it does not end within a minute.
    #[must_use]
    pub fn run(arguments: &[&str]) -> Run {
        Self::spawn(arguments).end(WHOLE)
    }

    /// The same with its stdout to somewhere else.
    ///
    /// # Panics
    /// When there is no binary, or it does not end within a minute.
    #[must_use]
    pub fn run_to(arguments: &[&str], stdout: impl Into<Stdio>) -> Run {
        let mut command = command(&binary(), arguments);
        command.stdout(stdout);
        Self::watch(command.spawn().expect(RUNS)).end(WHOLE)
    }

    /// The same without any privilege.
    ///
    /// # Panics
    /// When there is no binary, or it does not end within a minute.
    #[must_use]
    pub fn run_as_nobody(arguments: &[&str]) -> Run {
        // A folder on the way to the binary may be closed to others.
        let copy = env::temp_dir().join(format!("tcptrace-tests-{}-nobody", std::process::id()));
        fs::copy(binary(), &copy).expect("room for a copy");
        let mut command = command(&copy, arguments);
        command.uid(NOBODY).gid(NOBODY);
        // As long as another test's new process still has the copy open for writing, it is busy.
        let soon = Duration::from_secs(5);
        let child = wait_until("the copy can be run", soon, || command.spawn().ok());
        let _ = fs::remove_file(copy);
        Self::watch(child).end(WHOLE)
    }

    fn spawn(arguments: &[&str]) -> Self {
        let child = command(&binary(), arguments).spawn();
        Self::watch(child.expect(RUNS))
    }

    fn watch(mut child: Child) -> Self {
        // Only what is piped can be read here.
        let stdout: Box<dyn Read + Send> = match child.stdout.take() {
            Some(stdout) => Box::new(stdout),
            None => Box::new(io::empty()),
        };
        let stderr = child.stderr.take().expect("piped");
        let output = Arc::new(Output::default());
        output.change(|state| state.open = 2);
        let read = |stream: Box<dyn Read + Send>, keep: fn(&mut State, String)| {
            let output = Arc::clone(&output);
            thread::spawn(move || {
                for line in BufReader::new(stream).lines() {
                    let Ok(line) = line else { break };
                    output.change(|state| keep(state, line));
                }
                output.change(|state| state.open -= 1);
            })
        };
        let readers = vec![
            read(stdout, |state, line| {
                state.lines.0.push(Line::parse(&line, boottime()));
            }),
            read(Box::new(stderr), |state, line| {
                state.stderr.push_str(&line);
                state.stderr.push('\n');
            }),
        ];
        Self {
            process: Process(child),
            output,
            readers,
        }
    }

    /// What has been printed so far.
    #[must_use]
    pub fn lines(&self) -> Lines {
        self.output.wait(Duration::ZERO, |_| true).lines
    }

    /// Waits until a line is such as `wanted` says; gives all lines so far.
    ///
    /// # Panics
    /// When none comes within `limit`: the message has all lines.
    pub fn wait_for(&self, what: &str, limit: Duration, wanted: impl Fn(&Line) -> bool) -> Lines {
        let state = self
            .output
            .wait(limit, |state| state.lines.0.iter().any(&wanted));
        assert!(
            state.lines.0.iter().any(wanted),
            "no such line within {limit:?}: {what}\n{}\n{}",
            state.lines,
            state.stderr
        );
        state.lines
    }

    /// Waits until the socket with this cookie is said to be in this state.
    pub fn wait_state(&self, cookie: &str, state: &str, limit: Duration) -> Lines {
        let wanted = |line: &Line| line.is_transition(cookie) && line.value["to"] == state;
        self.wait_for(&format!("socket {cookie} > {state}"), limit, wanted)
    }

    /// Stops the process (SIGSTOP), so that it reads nothing; the kernel goes on writing records.
    pub fn pause(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// Interrupts it (SIGINT, as Ctrl-C does) and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn finish(self) -> Run {
        self.process.signal(Signal::SIGINT);
        self.end(END)
    }

    /// [`finish`](Self::finish), where all must be well: exit code 0, nothing lost, `end` at the end.
    ///
    /// # Panics
    /// When something is not well.
    #[must_use]
    pub fn finish_whole(self) -> Lines {
        let run = self.finish();
        assert_eq!(run.code, Some(0), "{}\n{}", run.stderr, run.lines);
        let end = run.lines.end();
        assert_eq!(end.value["lost"], 0, "{}", run.lines);
        assert_eq!(run.lines.events("lost").count(), 0, "{}", run.lines);
        run.lines
    }

    fn end(mut self, limit: Duration) -> Run {
        let status = self.process.wait("tcptrace ends", limit);
        for reader in self.readers.drain(..) {
            reader.join().expect("readers do not panic");
        }
        let state = self.output.wait(Duration::ZERO, |_| true);
        Run {
            lines: state.lines,
            stderr: state.stderr,
            code: status.code(),
        }
    }
}

impl Output {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("nobody panics while writing"));
        self.changed.notify_all();
    }

    /// The state once `enough`, or after `limit`.
    fn wait(&self, limit: Duration, enough: impl Fn(&State) -> bool) -> State {
        let deadline = Instant::now() + limit;
        let mut state = self.state.lock().expect("nobody panics while writing");
        while !enough(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("nobody panics")
                .0;
        }
        state.clone()
    }
}

impl Line {
    fn parse(text: &str, arrived: i64) -> Self {
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
        Self { value, arrived }
    }
}

fn command(program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// `TCPTRACE_BIN`, else the one that Cargo built next to the tests.
fn binary() -> PathBuf {
    let path = env::var_os("TCPTRACE_BIN").map_or_else(|| built("tcptrace"), PathBuf::from);
    assert!(
        path.exists(),
        "{} is not built. `cargo xtask test` builds it and runs these tests; TCPTRACE_BIN names another one",
        path.display()
    );
    path
}
