//! One decoy process per CPU, shared by all tests of an executable.

use std::{
    process::{Command, Stdio},
    sync::{Arc, Mutex, Weak},
    thread,
};

use crate::program::{Process, built};

/// Busy processes named `decoy`, one per CPU. In softirq they are `current` as often as the process
/// that a segment belongs to, so whoever trusts `current` there blames them.
#[derive(Debug)]
pub struct Decoys(Vec<Process>);

static RUNNING: Mutex<Weak<Decoys>> = Mutex::new(Weak::new());

impl Decoys {
    /// Those that run, or new ones. They end with the last test that needs them.
    ///
    /// # Panics
    /// When they cannot be started.
    #[must_use]
    pub fn running() -> Arc<Self> {
        let mut running = RUNNING
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(decoys) = running.upgrade() {
            return decoys;
        }
        let decoys = Arc::new(Self((0..cpus()).map(start).collect()));
        *running = Arc::downgrade(&decoys);
        decoys
    }

    /// No decoys.
    pub(crate) fn none() -> Arc<Self> {
        Arc::new(Self(Vec::new()))
    }

    /// Their process ids.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.0.iter().map(Process::pid).collect()
    }
}

/// How many CPUs there are for tests.
pub(crate) fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn start(cpu: usize) -> Process {
    let mut command = Command::new(built("decoy"));
    command.arg(cpu.to_string()).stdin(Stdio::piped());
    Process(command.spawn().expect("`cargo test` builds the decoy"))
}
