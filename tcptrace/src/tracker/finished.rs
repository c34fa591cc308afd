//! Connections that are over while a process still holds their socket. Such a socket is in no table of
//! the kernel, and nothing tells when it is closed at last: only a look can.

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::{MISSES, Owner, Site};
use crate::event::{Socket, Transition};

/// How many are remembered. Of one that was forgotten the age is not known, nothing else.
const MOST: usize = 1 << 16;

/// A connection that is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) socket: Socket,
    /// When it ended.
    pub(super) since: u64,
    pub(super) owner: Option<Owner>,
    pub(super) site: Site,
    pub(super) cgroup: u64,
    /// How many looks in a row did not show it.
    missed: u32,
}

/// Those that may still be held.
#[derive(Debug, Default)]
pub(super) struct Finished {
    by_cookie: HashMap<u64, Ended>,
    /// Cookies in the order of their ends, some of which are not kept any more.
    order: VecDeque<u64>,
}

impl Finished {
    pub(super) fn add(
        &mut self,
        transition: &Transition,
        owner: Option<Owner>,
        site: Site,
        cgroup: u64,
    ) {
        while self.order.len() >= MOST {
            let oldest = self.order.pop_front();
            oldest.map(|cookie| self.by_cookie.remove(&cookie));
        }
        let ended = Ended {
            socket: transition.socket,
            since: transition.time,
            owner,
            site,
            cgroup,
            missed: 0,
        };
        if self
            .by_cookie
            .insert(transition.socket.cookie, ended)
            .is_none()
        {
            self.order.push_back(transition.socket.cookie);
        }
    }

    /// The socket is used again.
    pub(super) fn remove(&mut self, cookie: u64) {
        // The order keeps it until it is its turn: connecting anew is rare.
        self.by_cookie.remove(&cookie);
    }

    pub(super) fn get(&self, cookie: u64) -> Option<&Ended> {
        self.by_cookie.get(&cookie)
    }

    /// It has become known from where it was opened.
    pub(super) fn called(&mut self, cookie: u64, site: Site) {
        if let Some(ended) = self.by_cookie.get_mut(&cookie) {
            ended.site = site;
        }
    }

    /// A look showed it.
    pub(super) fn seen(&mut self, cookie: u64) {
        if let Some(ended) = self.by_cookie.get_mut(&cookie) {
            ended.missed = 0;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_cookie.is_empty()
    }

    /// A look at everything that began at `time` begins; what it does not show is missed.
    pub(super) fn begin_look(&mut self, time: u64) {
        for ended in self.by_cookie.values_mut() {
            ended.missed += u32::from(ended.since < time);
        }
    }

    /// The look is over: what was missed too often has been closed. (A socket is looked for when it has
    /// been missing from the tables in two looks, so it can be shown only by the second.)
    pub(super) fn end_look(&mut self) {
        self.by_cookie.retain(|_, ended| ended.missed <= MISSES);
        self.order
            .retain(|cookie| self.by_cookie.contains_key(cookie));
    }
}
