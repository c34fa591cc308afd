//! A process that the demo starts, and that does not outlive it.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// It is ended, and waited for, when this value goes.
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) name: String,
    end: Signal,
}

impl Process {
    /// Starts it; `name` is for messages, `end` the signal that ends it.
    pub(super) fn start(name: &str, command: &mut Command, end: Signal) -> Result<Self> {
        // In a group of its own, Ctrl-C does not reach it: the demo decides who ends when.
        let child = command.process_group(0).spawn();
        Ok(Self {
            child: child.with_context(|| format!("cannot start {name}"))?,
            name: name.to_owned(),
            end,
        })
    }

    /// Ends it, if it has not ended.
    pub(super) fn stop(&mut self) {
        // An id that has been waited for may be another process's by now.
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), self.end);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}
