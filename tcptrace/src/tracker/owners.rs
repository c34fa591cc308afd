//! Processes that own sockets: few, of many sockets. A socket keeps a number.

use hashbrown::HashMap;

use super::Owner;

/// An [`Owner`], or that there is none, as a number of four bytes. One from before [`Owners::keep`] means
/// nothing after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct OwnerId(u32);

impl OwnerId {
    pub(super) const NONE: Self = Self(u32::MAX);
}

/// When so many are known, those that no socket has any more are forgotten.
const FEW: usize = 4096;

/// See the [module](self).
pub(super) struct Owners {
    known: Vec<Owner>,
    ids: HashMap<Owner, OwnerId>,
    /// Room until it is tidied up: twice what was left the last time.
    most: usize,
}

impl Owners {
    pub(super) fn new() -> Self {
        Self {
            known: Vec::new(),
            ids: HashMap::new(),
            most: FEW,
        }
    }

    pub(super) fn get(&self, id: OwnerId) -> Option<Owner> {
        self.known.get(id.0 as usize).copied()
    }

    pub(super) fn id(&mut self, owner: Option<Owner>) -> OwnerId {
        let Some(owner) = owner else {
            return OwnerId::NONE;
        };
        *self.ids.entry(owner).or_insert_with(|| {
            self.known.push(owner);
            OwnerId(self.known.len() as u32 - 1)
        })
    }

    /// There are many, and some may not be needed any more.
    pub(super) fn is_full(&self) -> bool {
        self.known.len() >= self.most
    }

    /// Forgets all but those that are used, and numbers them anew.
    pub(super) fn keep<'a>(&mut self, used: impl Iterator<Item = &'a mut OwnerId>) {
        let mut left = Self::new();
        for id in used {
            *id = left.id(self.get(*id));
        }
        left.most = FEW.max(left.known.len() * 2);
        *self = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::Comm, tracker::Via};

    fn owner(pid: u32) -> Option<Owner> {
        Some(Owner {
            pid,
            comm: Comm::new(b"web"),
            start: 1,
            via: Via::Accept,
            tree: false,
        })
    }

    #[test]
    fn those_that_are_used_are_kept() {
        let mut owners = Owners::new();
        assert_eq!(owners.get(OwnerId::NONE), None);
        assert_eq!(owners.id(None), OwnerId::NONE);
        let mut ids: Vec<OwnerId> = (0..FEW as u32).map(|pid| owners.id(owner(pid))).collect();
        assert_eq!(owners.id(owner(7)), ids[7]);
        assert!(owners.is_full());
        let mut used = [ids[4000], OwnerId::NONE, ids[3], ids[4000]];
        owners.keep(used.iter_mut());
        assert_eq!(
            used.map(|id| owners.get(id)),
            [owner(4000), None, owner(3), owner(4000)]
        );
        assert_eq!(owners.known.len(), 2);
        assert!(!owners.is_full());
        ids.clear();
    }
}
