//! Where events come from: the running kernel, or a recording of it.

mod cgroups;
mod file;
mod holders;
mod live;
mod looks;
mod orphans;
mod overflows;
mod stacks;

pub use file::{Error as FileError, File};
pub use live::{Live, Options, Piles, Tracing, Wake};
pub(crate) use stacks::fuzz as fuzz_stacks;
/// What it says, and is told: bytes that are not trusted.
pub use stacks::worker::protocol;
/// For the program's `main`: whether this process is to read other users' files.
pub use stacks::worker::run_if_asked;

use std::time::Duration;

use crate::event::Event;

/// Takes what a source emits.
pub trait Sink {
    /// Takes an event.
    fn emit(&mut self, event: &Event);

    /// Hands over the output that has gathered. It does not wait for whoever reads it.
    fn flush(&mut self);

    /// Whether there is room for the output of more events.
    fn has_room(&self) -> bool;

    /// Waits for room, but no longer than `limit`. Returns whether there is.
    fn wait_room(&mut self, limit: Duration) -> bool;

    /// Whether to come to an end: a signal has come, a program has ended, the output has failed.
    fn is_over(&mut self) -> bool;
}
