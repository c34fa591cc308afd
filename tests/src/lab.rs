//! What a test starts with.

use std::{
    io::Write,
    path::Path,
    sync::{
        Arc, Once,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{Capture, Decoys, Diag, Fixture, Netns, Observer, Tcptrace, decoy::cpus};

/// A network namespace, one CPU for all traffic in it, and a decoy on that CPU.
#[derive(Debug)]
pub struct Lab {
    /// Where the traffic is.
    pub netns: Netns,
    /// The decoys, among them the one on this lab's CPU.
    pub decoys: Arc<Decoys>,
    cpu: usize,
}

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

    /// A process named `comm` in the namespace.
    #[must_use]
    pub fn fixture(&self, comm: &str) -> Fixture {
        Fixture::start(&self.netns, self.cpu, comm)
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
