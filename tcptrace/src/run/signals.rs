//! The signals that end a command: Ctrl-C and SIGTERM.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The first of them ends the command in order: whoever waits is woken, and whoever works can ask. A second one ends the
/// program at once, whatever it waits for.
pub(super) struct Signals {
    has_come: Arc<AtomicBool>,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From now on they do not end the program by themselves. To be called inside a runtime.
    ///
    /// # Errors
    /// When the kernel takes no handler, which should not happen.
    pub(super) fn new() -> io::Result<Self> {
        let has_come = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: with the first signal, the flag is not set yet.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&has_come))?;
            flag::register(signal, Arc::clone(&has_come))?;
        }
        Ok(Self {
            has_come,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for one of them.
    pub(super) async fn come(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Whether one of them has come.
    pub(super) fn have_come(&self) -> bool {
        self.has_come.load(Ordering::Relaxed)
    }
}
