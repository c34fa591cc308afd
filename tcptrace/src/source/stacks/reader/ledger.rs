//! What of the memory budget is in use.

use std::{cell::Cell, rc::Rc};

/// Counts what is made of files, before it is made.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    used: Rc<Cell<u64>>,
    most: u64,
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    bytes: u64,
    used: Rc<Cell<u64>>,
}

impl Ledger {
    pub(super) fn new(most: u64) -> Self {
        Self {
            used: Rc::default(),
            most,
        }
    }

    /// So many bytes; `None` if they are not there.
    pub(super) fn charge(&self, bytes: u64) -> Option<Charge> {
        let used = self.used.get().checked_add(bytes)?;
        (used <= self.most).then(|| {
            self.used.set(used);
            let used = Rc::clone(&self.used);
            Charge { bytes, used }
        })
    }
}

impl Charge {
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.set(self.used.get() - self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_there_is() {
        let ledger = Ledger::new(100);
        let first = ledger.charge(60).unwrap();
        assert!(ledger.charge(41).is_none());
        assert!(ledger.charge(u64::MAX).is_none());
        let second = ledger.charge(40).unwrap();
        drop(first);
        assert!(ledger.charge(61).is_none());
        let third = ledger.charge(60).unwrap();
        drop((second, third));
        assert!(ledger.charge(100).is_some());
    }
}
