//! Changes of full sockets: from the kernel's machine to the true one.

use std::num::NonZero;

use tcptrace_ebpf::State;

use super::{
    Change, Connection, Ending, Fact, Site, TimeWaitEnd, Tracker, key, owner, time_wait::Entry,
};
use crate::{
    event::{Probes, Socket, Transition, Tuple},
    select,
};

impl Tracker {
    pub(super) fn transition(&mut self, transition: &Transition, tell: &mut impl FnMut(Fact<'_>)) {
        let own = self.without_leftovers(transition);
        let transition = own.as_ref().unwrap_or(transition);
        let Transition {
            time,
            socket,
            old,
            new,
            ..
        } = *transition;
        if (old, new) == (State::Listen, State::SynRecv) && socket.tuple.remote_port == 0 {
            self.unnamed.push(transition);
            return;
        }
        // A look can have shown it before its records were read.
        if old == State::SynRecv
            && self
                .connections
                .get(socket.cookie)
                .is_none_or(|known| known.last == 0)
            && let Some(born) = self.unnamed.take(transition)
        {
            self.transition(&born, tell);
        }
        if self.unexplained > 0 {
            self.explain(transition, tell);
        }
        if new == State::Close && self.handed_over(transition, tell) {
            return;
        }
        let known = self.connections.get(socket.cookie);
        let before = known.and_then(|known| self.owners.get(known.owner));
        let owner = owner::after(transition, before, || self.listener_owner(&socket));
        let site = match (old, new) {
            (State::Close, State::SynSent) | (State::Listen, State::SynRecv) => Site::UNTOLD,
            // A child whose first change was not told apart.
            (State::SynRecv, _) if known.is_none() => Site::UNTOLD,
            _ => known.map_or(Site::BEFORE, |known| known.site),
        };
        let kept_back = known.is_some_and(|known| known.kept_back);
        let since = known
            .filter(|known| known.state == old)
            .and_then(|known| known.since);
        let cgroup = match transition.cgroup {
            0 => known.map_or(0, |known| known.cgroup),
            id => id,
        };
        let is_listener = new == State::Listen || (old, new) == (State::Listen, State::Close);

        let verdict = self.verdict(&socket);
        if verdict == select::Verdict::No && !is_listener
            || verdict == select::Verdict::Open && new == State::Close
        {
            self.forget(socket.cookie);
            return;
        }
        let change = Change {
            time,
            socket,
            from: old,
            to: new,
            after: since.map(|since| time.saturating_sub(since)),
            error: error_of(transition),
            owner,
            site,
            container: None,
            by_exit: owner::is_exit(transition, owner),
            late: false,
            time_error: 0,
        };
        if verdict == select::Verdict::Yes {
            if kept_back && let Some(connecting) = since {
                self.tell_change(
                    Change {
                        time: connecting,
                        socket: Socket {
                            tuple: Tuple {
                                local_port: 0,
                                ..socket.tuple
                            },
                            ..socket
                        },
                        from: State::Close,
                        to: State::SynSent,
                        after: None,
                        error: 0,
                        by_exit: false,
                        late: true,
                        ..change
                    },
                    cgroup,
                    tell,
                );
            }
            if self.is_open_ended(transition) {
                // Perhaps a timewait socket took over, and its record was lost. A look will tell.
                let owner = self.owner_id(owner);
                self.keep(Connection {
                    socket,
                    state: old,
                    since,
                    owner,
                    site,
                    cgroup,
                    kept_back: false,
                    seen: self.look.any(),
                    last: time,
                    closed_from: Some(old),
                    stale: None,
                });
                return;
            }
            self.tell_change(change, cgroup, tell);
            if new == State::Close && self.was_skipped(transition) {
                self.tell_end(
                    TimeWaitEnd {
                        time,
                        socket,
                        owner,
                        container: None,
                        entered: None,
                        dwell: Some(0),
                        dwell_at_least: false,
                        dwell_error: 0,
                        fin_wait2: change.after.filter(|_| old == State::FinWait2),
                        rearmed: Some(false),
                        ending: Ending::Skipped,
                    },
                    cgroup,
                    tell,
                );
            }
        }
        if self.selection.finished {
            if new != State::Close {
                self.finished.remove(socket.cookie);
            } else if verdict == select::Verdict::Yes
                && transition.has_socket
                && !owner::is_call(transition)
            {
                self.finished.add(transition, owner, site, cgroup);
            }
        }
        if new == State::Close {
            self.forget(socket.cookie);
            return;
        }
        let owner = self.owner_id(owner);
        self.keep(Connection {
            socket,
            state: new,
            since: Some(time),
            owner,
            site,
            cgroup,
            kept_back: verdict == select::Verdict::Open,
            seen: self.look.all(),
            last: time,
            closed_from: None,
            stale: NonZero::new(transition.stale_port).map(|port| (port, transition.error)),
        });
    }

    /// The change without what a connection before it has left on the socket, if it shows that. `connect()`
    /// that finds no free port fails before it replaces the port, or an error.
    fn without_leftovers(&self, transition: &Transition) -> Option<Transition> {
        if (transition.old, transition.new) != (State::SynSent, State::Close) {
            return None;
        }
        let known = self.connections.get(transition.socket.cookie)?;
        let (port, error) = known.stale?;
        let shown = (transition.socket.tuple.local_port, transition.error);
        ((port.get(), error) == shown).then(|| {
            let mut own = *transition;
            own.socket.tuple.local_port = 0;
            own.error = 0;
            own
        })
    }

    pub(super) fn forget(&mut self, cookie: u64) -> Option<Connection> {
        let connection = self.connections.remove(cookie)?;
        self.uncount(&connection);
        Some(connection)
    }

    /// Keeps what is known of a socket from now on.
    pub(super) fn keep(&mut self, connection: Connection) {
        let (socket, state) = (connection.socket, connection.state);
        self.uncertain += usize::from(connection.closed_from.is_some());
        if let Some(before) = self.connections.insert(connection) {
            self.uncount(&before);
        }
        if state == State::Listen {
            self.index_listener(&socket, state);
        }
    }

    fn uncount(&mut self, connection: &Connection) {
        self.uncertain -= usize::from(connection.closed_from.is_some());
        if connection.state == State::Listen {
            self.index_listener(&connection.socket, State::Close);
        }
    }

    /// Whether this change to CLOSE is a timewait socket taking over. The kernel shows no other sign
    /// of it: `tcp_time_wait()` makes one, then closes the full socket.
    pub(super) fn handed_over(
        &mut self,
        transition: &Transition,
        tell: &mut impl FnMut(Fact<'_>),
    ) -> bool {
        // `tcp_time_wait()` is called from these two only. The socket itself may live on, and fail to
        // connect again.
        if !matches!(transition.old, State::FinWait2 | State::Closing) {
            return false;
        }
        let Some(life) = self.time_waits.get(key(&transition.socket)) else {
            return false;
        };
        let (first, entered, cgroup) = (life.first, life.entered, life.cgroup);
        let owner = self.owners.get(life.owner);
        // A look can be faster than the records.
        let late = life.opened.is_none();
        let known = self.forget(transition.socket.cookie);
        if first == State::TimeWait
            && let Some(Entry { time, .. }) = entered
        {
            let since = known
                .as_ref()
                .filter(|known| known.state == transition.old)
                .and_then(|known| known.since);
            self.tell_change(
                Change {
                    time,
                    socket: transition.socket,
                    from: transition.old,
                    to: State::TimeWait,
                    after: since.map(|since| time.saturating_sub(since)),
                    error: 0,
                    owner,
                    site: known.map_or(Site::BEFORE, |known| known.site),
                    container: None,
                    by_exit: false,
                    late,
                    time_error: 0,
                },
                cgroup,
                tell,
            );
        }
        true
    }

    /// Whether a change to CLOSE may hide a timewait socket, because records were lost or are not to
    /// be had.
    pub(super) fn is_open_ended(&self, transition: &Transition) -> bool {
        (self.gap || self.time_wait_probes == Probes::None)
            && self.selection.needs_time_wait()
            && transition.new == State::Close
            && matches!(transition.old, State::FinWait2 | State::Closing)
            && transition.error == 0
            && !transition.no_time_wait
    }

    /// Whether the kernel made no timewait socket because it had too many.
    pub(super) fn was_skipped(&mut self, transition: &Transition) -> bool {
        if !matches!(transition.old, State::FinWait2 | State::Closing)
            || transition.error != 0
            || transition.no_time_wait
        {
            return false;
        }
        match self.overflows.get_mut(&transition.socket.netns) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }

    pub(super) fn overflow(&mut self, netns: u32, count: u64) {
        let told = self.look.overflows.entry(netns).or_insert(count);
        // The number of a namespace that is gone is given to another, which counts from 0.
        let new = count.checked_sub(*told).unwrap_or(count);
        *told = count;
        *self.overflows.entry(netns).or_insert(0) += new;
    }
}

/// The error of a close. `connect()` that found no free local port leaves none behind, but no port
/// either.
fn error_of(transition: &Transition) -> u32 {
    if (transition.old, transition.new) == (State::SynSent, State::Close)
        && transition.socket.tuple.local_port == 0
        && transition.error == 0
    {
        return libc::EADDRNOTAVAIL as u32;
    }
    if transition.new == State::Close {
        transition.error
    } else {
        0
    }
}
