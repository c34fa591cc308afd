//! What a test starts with.

use std::{
    ffi::{OsStr, OsString},
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, Once,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    Capture, Decoys, Diag, Fixture, Netns, Observer, Run, Tcptrace, decoy::cpus, fixture, tcptrace,
};

/// A network namespace, one CPU for all traffic in it, and a decoy on that CPU.
#[derive(Debug)]
pub struct Lab {
    /// Where the traffic is.
    pub netns: Netns,
    /// The decoys, among them the one on this lab's CPU.
    pub decoys: Arc<Decoys>,
    cpu: usize,
}

/// The report as JSON on standard output.
const REPORT: &[&str] = &["-o", "json", "--report", "/dev/stdout"];
static LABS: AtomicUsize = AtomicUsize::new(0);
static LEFT_OUT: Once = Once::new();

impl Lab {
    /// A new one; none without the privilege to make network namespaces, which is said once.
    ///
    /// # Panics
    /// When there are privileges and it still fails.
    #[must_use]
    pub fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            // Not with `eprintln`, which the test harness hides when a test passes.
            LEFT_OUT.call_once(|| {
                let _ = writeln!(
                    std::io::stderr(),
                    "left out: the tests against the real kernel, which need root; `sudo` or a root shell runs them"
                );
            });
            return None;
        }
        let netns = Netns::new().expect("root can make a network namespace");
        let cpu = LABS.fetch_add(1, Ordering::Relaxed) % cpus();
        Some(Self {
            netns,
            decoys: Decoys::running(),
            cpu,
        })
    }

    /// Lets the decoys go, for a test that only waits from now on.
    pub fn rest(&mut self) {
        self.decoys = Decoys::none();
    }

    /// A process named `comm` in the namespace.
    #[must_use]
    pub fn fixture(&self, comm: &str) -> Fixture {
        Fixture::start(&self.netns, self.cpu, comm, &[])
    }

    /// The same with more arguments on its command line, which mean nothing.
    #[must_use]
    pub fn fixture_with(&self, comm: &str, arguments: &[&OsStr]) -> Fixture {
        Fixture::start(&self.netns, self.cpu, comm, arguments)
    }

    /// Runs `tcptrace leaks --once` with these arguments on this namespace.
    #[must_use]
    pub fn leaks_once(&self, arguments: &[&str]) -> Run {
        let inode = self.netns.inode().to_string();
        let first = ["leaks", "--once", "-o", "json", "--netns", &inode];
        Tcptrace::run(&[&first, arguments].concat())
    }

    /// tcptrace with these arguments on this namespace, tracing already. `arguments` begins with the
    /// command.
    #[must_use]
    pub fn tcptrace(&self, arguments: &[&str]) -> Tcptrace {
        let inode = self.netns.inode().to_string();
        Tcptrace::start(&[arguments, &["--netns", &inode]].concat())
    }

    /// Runs `tcptrace record` into `file`.
    #[must_use]
    pub fn record(&self, file: &Path) -> Tcptrace {
        let inode = self.netns.inode().to_string();
        let file = file.to_str().expect("a plain path");
        Tcptrace::start_plain(&["record", file, "--netns", &inode])
    }

    /// `tcptrace leaks` with these options, inside the namespace and on it; the words that are still to be added
    /// are the program that it runs. tcptrace itself is run by `before`, if that is not empty.
    ///
    /// # Panics
    /// When there is no binary.
    #[must_use]
    pub fn leaks_by(&self, before: &[&str], options: &[&str]) -> Command {
        let binary = tcptrace::binary().into_os_string();
        let mut words = before.iter().map(OsString::from).chain([binary]);
        let mut command = Command::new(words.next().expect("at least tcptrace"));
        let inode = self.netns.inode().to_string();
        command.args(words).args(["leaks", "--netns", &inode]);
        command.args(options).arg("--").stdin(Stdio::null());
        // The program runs as the test does, also where somebody has called `sudo cargo test`.
        for variable in ["SUDO_UID", "DOAS_USER", "PKEXEC_UID"] {
            command.env_remove(variable);
        }
        fixture::enter(&mut command, &self.netns, self.cpu);
        command
    }

    /// The same, not run by anybody else.
    #[must_use]
    pub fn leaks_of(&self, options: &[&str]) -> Command {
        self.leaks_by(&[], options)
    }

    /// A process named `comm`, run by `tcptrace leaks` with these options, whose report in JSON comes on its
    /// standard output: a fixture writes nothing there.
    #[must_use]
    pub fn fixture_of_leaks(&self, options: &[&str], comm: &str) -> (Tcptrace, Fixture) {
        Fixture::run_by(self.leaks_of(&[REPORT, options].concat()), comm)
    }

    /// The same with tcptrace run by `before`.
    #[must_use]
    pub fn fixture_of_leaks_by(
        &self,
        before: &[&str],
        options: &[&str],
        comm: &str,
    ) -> (Tcptrace, Fixture) {
        Fixture::run_by(self.leaks_by(before, &[REPORT, options].concat()), comm)
    }

    /// Watches the namespace's sockets from now on.
    #[must_use]
    pub fn observe(&self) -> Observer {
        Observer::start(Diag::new(&self.netns))
    }

    /// Looks at the namespace's sockets when asked.
    #[must_use]
    pub fn diag(&self) -> Diag {
        Diag::new(&self.netns)
    }

    /// Reads every IPv4 segment of the namespace from now on.
    #[must_use]
    pub fn capture(&self) -> Capture {
        Capture::start(&self.netns)
    }
}
