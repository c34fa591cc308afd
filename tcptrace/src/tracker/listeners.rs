//! Listeners, to whom connections belong that nobody has accepted.

use tcptrace_ebpf::State;

use super::{Connection, Owner, Tracker, Via};
use crate::event::Socket;

impl Tracker {
    /// The listeners that a connection may wait at which nobody has accepted: several, where processes share
    /// an address (`SO_REUSEPORT`).
    pub fn listeners_of(&self, socket: &Socket) -> impl Iterator<Item = u64> {
        self.fitting(*socket).map(|listener| listener.socket.cookie)
    }

    fn fitting(&self, socket: Socket) -> impl Iterator<Item = &Connection> {
        let cookies = self
            .listeners
            .get(&(socket.netns, socket.tuple.local_port))
            .map_or(&[][..], Vec::as_slice);
        let listeners = move || {
            cookies
                .iter()
                .filter_map(|cookie| self.connections.get(*cookie))
        };
        let bound =
            move |listener: &Connection| listener.socket.tuple.local() == socket.tuple.local();
        // A listener bound to the very address goes before one for all of them.
        let exact = listeners().any(bound);
        listeners().filter(move |listener| {
            if exact {
                bound(listener)
            } else {
                listener.socket.tuple.local().is_unspecified()
            }
        })
    }

    /// The process that listens for a connection nobody has accepted yet; `None` when several may.
    pub(super) fn listener_owner(&self, socket: &Socket) -> Option<Owner> {
        let mut found: Option<Owner> = None;
        for listener in self.fitting(*socket) {
            let owner = self.owners.get(listener.owner)?;
            match found {
                Some(found) if !found.is_same_process(&owner) => return None,
                _ => found = Some(owner),
            }
        }
        found.map(|owner| Owner {
            via: Via::Listener,
            ..owner
        })
    }

    pub(super) fn index_listener(&mut self, socket: &Socket, new: State) {
        let key = (socket.netns, socket.tuple.local_port);
        if new == State::Listen {
            let cookies = self.listeners.entry(key).or_default();
            if !cookies.contains(&socket.cookie) {
                cookies.push(socket.cookie);
            }
        } else if let Some(cookies) = self.listeners.get_mut(&key) {
            cookies.retain(|cookie| *cookie != socket.cookie);
            if cookies.is_empty() {
                self.listeners.remove(&key);
            }
        }
    }
}
