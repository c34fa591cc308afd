//! `tcptrace leaks`: who leaves sockets open after their peers have closed, why, and since when.
//!
//! A report follows each look at what exists: what it shows together with what the tracker
//! knows of it. So nothing is reported that is gone, and of what was there before the trace as much is told
//! as the kernel knows.

mod cause;
mod clear;
mod dwell;
mod growth;
mod json;
mod report;
mod sights;
mod stacks;
mod text;

use crate::{
    event::{Lost, Scope},
    tracker::{Fact, Tracker},
};

pub use cause::Cause;
pub use json::Json;
pub use report::{Age, Clear, Holding, Leak, Leaked, Remote, Report};
pub use sights::Criteria;
pub use stacks::{Stacks, Without, own};
pub use text::Text;

use dwell::{Dwell, Finished};
use sights::Sights;

/// How to show reports.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What counts as a leak.
    pub criteria: Criteria,
    /// Only the last report.
    pub once: bool,
    /// Looks before the last are too few for it to tell how fast a leak grows: they are not reported even to
    /// measure that.
    pub at_end: bool,
    /// Sockets that were left open until their processes ended are reported as well.
    pub until_exit: bool,
    /// Also from where in their programs the sockets were opened.
    pub stacks: bool,
    /// Also how long sockets stay in the states, while it runs.
    pub dwell: bool,
}

/// What both ways of showing have in common: from facts to reports.
struct Watch {
    options: Options,
    sights: Sights,
    finished: Finished,
    lost: u64,
    /// The look under way shows all that piles up.
    looking: bool,
    /// Such a look has ended that was not reported.
    due: Option<u64>,
    report: Report,
}

impl Watch {
    fn new(options: Options) -> Self {
        Self {
            options,
            sights: Sights::new(options.criteria),
            finished: Finished::default(),
            lost: 0,
            looking: false,
            due: None,
            report: Report::default(),
        }
    }

    fn fact(&mut self, fact: Fact<'_>) {
        match fact {
            Fact::Change(change) => {
                if self.options.criteria.states.contains(change.from) {
                    self.finished.add(&change);
                    if self.options.until_exit && change.by_exit {
                        self.sights.left(&change);
                    }
                }
            }
            Fact::Lost(Lost {
                records, missed, ..
            }) => self.lost += records + missed,
            Fact::Look(look) => {
                // Others, which a recording has as well, say nothing of what piles up.
                self.looking = match look.scope {
                    Scope::All => true,
                    Scope::States(states) => states.contains_all(self.options.criteria.states),
                    Scope::TimeWait | Scope::Orphans => false,
                };
                if self.looking {
                    self.sights.add(fact);
                }
            }
            Fact::Stack(_) | Fact::Called(..) if self.options.stacks => self.sights.add(fact),
            _ if !self.looking => {}
            Fact::LookEnd(time) => self.due = Some(time),
            fact => self.sights.add(fact),
        }
    }

    /// A new report, if one is due. Returns whether it says something else than the one before.
    fn look(&mut self, tracker: &Tracker) -> Option<bool> {
        let report = self.sights.report(tracker, self.due.take()?);
        let is_news = self.report.time == 0 || report.is_news_after(&self.report);
        self.report = report;
        Some(is_news)
    }

    /// The same, while it goes on.
    fn look_meanwhile(&mut self, tracker: &Tracker) -> Option<bool> {
        if self.options.at_end {
            return None;
        }
        self.look(tracker)
    }

    /// How long sockets stay in the states; nothing, if that is neither asked for nor was measured.
    fn dwell(&self, tracker: &Tracker, now: u64) -> Vec<Dwell> {
        if self.finished.is_empty() && !self.options.dwell {
            return Vec::new();
        }
        self.finished.with_open(self.sights.open(tracker, now))
    }
}

#[cfg(test)]
mod tests;
