//! Why something does not work here. Every sentence about that is made once, and both who runs into it
//! (a line on stderr) and `tcptrace doctor` tell it.

use std::fmt;

/// Something that does not work, or not fully.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// What, and why.
    pub what: String,
    /// What can be done about it.
    pub fix: String,
}

impl Reason {
    /// Without a full stop, both.
    pub fn new(what: impl fmt::Display, fix: impl Into<String>) -> Self {
        Self {
            what: what.to_string(),
            fix: fix.into(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.fix)
    }
}

impl std::error::Error for Reason {}
