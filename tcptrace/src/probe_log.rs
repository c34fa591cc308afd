//! What the probes say for themselves: only what they meet and cannot explain.

use std::io;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

/// Prints to stderr.
struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("tcptrace: probe: {}", record.args());
    }

    fn flush(&self) {}
}

/// Prints the probes' log until the runtime ends.
///
/// # Errors
/// When the log cannot be read.
pub(crate) fn start(ebpf: &mut Ebpf) -> Result<()> {
    let logger =
        EbpfLogger::init_with_logger(ebpf, Stderr).context("cannot read the log of the probes")?;
    // SAFETY: the logger keeps its map, and with it the descriptor, until it is dropped.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?;
    tokio::task::spawn(async move {
        loop {
            let mut guard = logger.readable_mut().await?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
        #[expect(unreachable_code, reason = "gives the task its type")]
        io::Result::Ok(())
    });
    Ok(())
}
