//! `tcptrace timewait`: how long TIME_WAIT really lasts, who makes it, and how it ends.

mod summary;
mod text;

use std::io;

use crate::{
    event::End,
    json::{self, Lines},
    output::Output,
    tracker::{Fact, Tracker},
    view::View,
};

use summary::Summary;
pub use text::Text;

/// A line for each TIME_WAIT that ends, and the summary at the end.
pub struct Json {
    lines: Lines,
    summary: Summary,
    out: Output,
}

impl Json {
    /// Writes to `out`.
    #[must_use]
    pub fn new(out: Output) -> Self {
        Self {
            lines: Lines::new(),
            summary: Summary::new(),
            out,
        }
    }
}

impl View for Json {
    fn clock(&mut self, _: u64, boot_to_utc_ns: i64) {
        self.lines.clock(boot_to_utc_ns);
    }

    fn fact(&mut self, fact: Fact<'_>) {
        match fact {
            Fact::TimeWaitEnd(end) => {
                self.summary.add(&end);
                self.lines.time_wait(&mut self.out.buffer, &end);
            }
            Fact::Lost(lost) => self.lines.lost(&mut self.out.buffer, &lost),
            _ => {}
        }
    }

    fn flush(&mut self, _: &Tracker, _: u64) -> io::Result<()> {
        self.out.flush()
    }

    fn end(&mut self, tracker: &Tracker, end: &End) -> io::Result<()> {
        let line = self
            .summary
            .line(tracker, end.time, self.lines.time(end.time));
        json::line(&mut self.out.buffer, &line);
        self.lines.end(&mut self.out.buffer, end);
        self.out.flush()
    }
}
