//! The program under test.

use std::{
    collections::HashSet,
    env, fs,
    io::{self, BufRead, BufReader, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aya::programs::{ProgramInfo, loaded_programs};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::signal::Signal,
    unistd::{setgroups, setresgid, setresuid},
};

use crate::{
    Line, Lines, Netns, boottime,
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
static COPIES: AtomicUsize = AtomicUsize::new(0);
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
    /// What the schema does not describe.
    violations: Vec<String>,
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
        Self::start_limited(&[capability], None, arguments).wait_ready(arguments)
    }

    /// Starts tcptrace with JSON output as root without these capabilities, in this network namespace,
    /// whether it can trace or not.
    ///
    /// # Panics
    /// When there is no binary.
    #[must_use]
    pub fn start_limited(
        without: &[libc::c_ulong],
        netns: Option<&Netns>,
        arguments: &[&str],
    ) -> Self {
        let mut command = command(&binary(), &[arguments, &["-o", "json"]].concat());
        let without = without.to_vec();
        let netns = netns.map(|netns| netns.as_fd().as_raw_fd());
        let limit = move || {
            if let Some(netns) = netns {
                // SAFETY: the namespace outlives the start of the child.
                let netns = unsafe { BorrowedFd::borrow_raw(netns) };
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            }
            for capability in &without {
                // SAFETY: takes numbers only.
                let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, *capability, 0, 0, 0) };
                Errno::result(result)?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec there are only system calls.
        unsafe { command.pre_exec(limit) };
        Self::watch(command.spawn().expect(RUNS))
    }

    /// Waits for its end, which comes by itself.
    ///
    /// # Panics
    /// When it does not end within a minute.
    #[must_use]
    pub fn wait_end(self) -> Run {
        self.end(WHOLE)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The BPF programs that it has loaded.
    ///
    /// # Panics
    /// When the kernel cannot be asked.
    #[must_use]
    pub fn programs(&self) -> Vec<ProgramInfo> {
        let folder = format!("/proc/{}/fdinfo", self.pid());
        let files = fs::read_dir(folder).expect("it runs").flatten();
        let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        // A link to a program names it, too.
        let ids: HashSet<u32> = texts.filter_map(|text| program_id(&text)).collect();
        let all = loaded_programs().map(|program| program.expect("root may ask"));
        all.filter(|program| ids.contains(&program.id())).collect()
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
        Self::run_as_nobody_in(None, arguments)
    }

    /// The same in this network namespace.
    ///
    /// # Panics
    /// When there is no binary, or it does not end within a minute.
    #[must_use]
    pub fn run_as_nobody_in(netns: Option<&Netns>, arguments: &[&str]) -> Run {
        // A folder on the way to the binary may be closed to others.
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let name = format!("tcptrace-tests-{}-nobody-{number}", std::process::id());
        let copy = env::temp_dir().join(name);
        fs::copy(binary(), &copy).expect("room for a copy");
        let mut command = command(&copy, arguments);
        // As long as another test's new process still has the copy open for writing, it is busy.
        let soon = Duration::from_secs(5);
        let netns = netns.map(|netns| netns.as_fd().as_raw_fd());
        let enter = move || {
            if let Some(netns) = netns {
                // SAFETY: the namespace outlives the start of the child.
                let netns = unsafe { BorrowedFd::borrow_raw(netns) };
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            }
            setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
            setgroups(&[])?;
            setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
            Ok(())
        };
        // SAFETY: between fork and exec there are only system calls.
        unsafe { command.pre_exec(enter) };
        let child = wait_until("the copy can be run", soon, || command.spawn().ok());
        let _ = fs::remove_file(copy);
        Self::watch(child).end(WHOLE)
    }

    /// [`run`](Self::run) by a process that has prepared itself. `prepare` may make system calls only.
    ///
    /// # Panics
    /// When there is no binary, or it does not end within a minute.
    #[must_use]
    pub fn run_prepared(
        arguments: &[&str],
        prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> Run {
        let mut command = command(&binary(), arguments);
        // SAFETY: between fork and exec there are only system calls.
        unsafe { command.pre_exec(prepare) };
        Self::watch(command.spawn().expect(RUNS)).end(WHOLE)
    }

    /// [`start`](Self::start) by a process that has prepared itself. `prepare` may make system calls only.
    ///
    /// # Panics
    /// When there is no binary, or it does not start to trace.
    #[must_use]
    pub fn start_prepared(
        arguments: &[&str],
        prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let mut command = command(&binary(), &[arguments, &["-o", "json"]].concat());
        // SAFETY: between fork and exec there are only system calls.
        unsafe { command.pre_exec(prepare) };
        Self::watch(command.spawn().expect(RUNS)).wait_ready(arguments)
    }

    /// Watches another program in the same way.
    ///
    /// # Panics
    /// When it cannot be run.
    #[must_use]
    pub fn watching(command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::watch(command.spawn().expect(RUNS))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end, which comes by itself.
    ///
    /// # Panics
    /// When it does not come.
    #[must_use]
    pub fn ended(self) -> Run {
        self.end(END)
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
                let violation = state.lines.add(Line::parse(&line, boottime()));
                state.violations.extend(violation);
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

    /// The state once `enough`, or after `limit`. Every line in it is one that the schema describes.
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
        let now = state.clone();
        drop(state);
        assert!(now.violations.is_empty(), "{}", now.violations.join("\n"));
        now
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
pub(crate) fn binary() -> PathBuf {
    let path = env::var_os("TCPTRACE_BIN").map_or_else(|| built("tcptrace"), PathBuf::from);
    assert!(
        path.exists(),
        "{} is not built. `cargo xtask test` builds it and runs these tests; TCPTRACE_BIN names another one",
        path.display()
    );
    path
}

fn program_id(fdinfo: &str) -> Option<u32> {
    let id = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("prog_id:"))?;
    id.trim().parse().ok()
}
