//! What every way of showing facts has in common.

use std::io;

use crate::{
    event::End,
    tracker::{Fact, Tracker},
};

/// A way of showing facts.
pub trait View {
    /// From boot time `now` on, the time of day is boot time plus `boot_to_utc_ns`. Called first of all.
    fn clock(&mut self, now: u64, boot_to_utc_ns: i64);

    /// Something became known. Nothing is written yet.
    fn fact(&mut self, fact: Fact<'_>);

    /// Writes what has gathered. `now`: boot time, nanoseconds.
    ///
    /// # Errors
    /// When the output does not take it.
    fn flush(&mut self, tracker: &Tracker, now: u64) -> io::Result<()>;

    /// Writes the last of it.
    ///
    /// # Errors
    /// When the output does not take it.
    fn end(&mut self, tracker: &Tracker, end: &End) -> io::Result<()>;
}
