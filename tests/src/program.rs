//! Where the programs are, and how they are ended.

use std::{
    env,
    path::PathBuf,
    process::{Child, ExitStatus},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait_until;

/// Where Cargo has built a program of this workspace.
///
/// # Panics
/// When this is no test that Cargo has built.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let test = env::current_exe().expect("Linux tells");
    // The folder of the profile holds the programs; test executables lie in its `deps`.
    let profile = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("target/PROFILE/deps");
    profile.join(name)
}

/// A child process that does not outlive the test.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed());
        kill(pid, signal).expect("our own child, not yet waited for");
    }

    pub(crate) fn wait(&mut self, what: &str, limit: Duration) -> ExitStatus {
        wait_until(what, limit, || self.0.try_wait().expect("our own child"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
