//! What works on this machine, why not more, and what to do about it.
//!
//! [`facts`] tries and reads, [`judge`] tells what that means. Reasons are those that every other command
//! gives when it runs degraded: they are made where the facts are known.

pub mod facts;
pub mod json;
pub mod judge;
#[cfg(test)]
mod tests;
pub mod text;

use facts::{Facts, Host};

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It works.
    Ok,
    /// It works, but not fully.
    Degraded,
    /// It does not.
    No,
    /// That could not be found out, or does not matter here.
    Skipped,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What. With a dot, it is one of several ways to the same thing, and does not count by itself.
    pub name: &'static str,
    /// How it is.
    pub status: Status,
    /// Why, in words.
    pub detail: String,
    /// What can be done about it.
    pub fix: Option<String>,
}

/// Everything that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Where.
    pub host: Host,
    /// When, in nanoseconds since 1970, UTC.
    pub utc_ns: i64,
    /// In the order in which things depend on each other.
    pub checks: Vec<Check>,
}

/// What it all comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything works.
    Works,
    /// Something does not.
    Degraded,
    /// Neither the probes nor `sock_diag` do, and without both nothing is known of any socket.
    Nothing,
}

/// Tries everything, and judges it.
#[must_use]
pub fn examine() -> Report {
    let facts = Facts::gather();
    Report {
        checks: judge::checks(&facts),
        host: facts.host,
        utc_ns: facts.utc_ns,
    }
}

impl Status {
    /// As it is printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::No => "no",
            Self::Skipped => "skipped",
        }
    }
}

impl Check {
    /// Whether it counts: ways to the same thing do not.
    fn counts(&self) -> bool {
        !self.name.contains('.')
    }
}

impl Report {
    /// What it all comes to.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let works = |name| {
            let mut checks = self.checks.iter();
            checks.any(|check| check.name == name && check.status != Status::No)
        };
        if !works(judge::TRANSITIONS) && !works(judge::SOCK_DIAG) {
            return Verdict::Nothing;
        }
        let is_bad = |check: &Check| matches!(check.status, Status::Degraded | Status::No);
        if self
            .checks
            .iter()
            .any(|check| check.counts() && is_bad(check))
        {
            Verdict::Degraded
        } else {
            Verdict::Works
        }
    }
}

impl Verdict {
    /// As it is printed in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Works => "ok",
            Self::Degraded => "degraded",
            Self::Nothing => "no",
        }
    }

    /// 0, 1 or 2.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Works => 0,
            Self::Degraded => 1,
            Self::Nothing => 2,
        }
    }
}
