//! What a report says.

use std::net::IpAddr;

use tcptrace_ebpf::State;

use super::{cause::Cause, stacks::Stacks};
use crate::{
    event::{Comm, Process, Socket},
    tracker::{Site, Via},
};

/// Who leaks what, at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// When it was looked, boot time nanoseconds.
    pub time: u64,
    /// The worst first.
    pub leaks: Vec<Leak>,
    /// Sockets in the states asked for that have not been in them for long enough.
    pub younger: usize,
    /// Sockets in CLOSE_WAIT whose peer has only shut its sending side, and still gets an answer.
    pub half_closed: usize,
}

impl Report {
    /// Whether it says something else than the one `before`: who, how many, why, from where, or now also how
    /// fast.
    pub(super) fn is_news_after(&self, before: &Self) -> bool {
        let gist = |leak: &Leak| {
            let first = leak.holders.first().map(|holding| holding.pid);
            let grows = leak.per_minute.is_some();
            // Names can come late.
            let stacks = leak.stacks.as_ref().map(|stacks| stacks.found.clone());
            let gist = (leak.state, first, leak.sockets.len(), leak.causes());
            (gist, grows, stacks)
        };
        let gists = [self, before].map(|report| report.leaks.iter().map(gist));
        let [now, then] = gists;
        self.half_closed != before.half_closed || !now.eq(then)
    }

    /// How many processes hold them; who is not known counts as one.
    #[must_use]
    pub fn processes(&self) -> usize {
        let holders = |leak: &Leak| -> Vec<Option<u32>> {
            match leak.holders.len() {
                0 => vec![None],
                _ => leak.holders.iter().map(|one| Some(one.pid)).collect(),
            }
        };
        let all: std::collections::HashSet<_> = self.leaks.iter().flat_map(holders).collect();
        all.len()
    }

    /// How many sockets are leaked in all.
    #[must_use]
    pub fn sockets(&self) -> usize {
        self.leaks.iter().map(|leak| leak.sockets.len()).sum()
    }
}

/// Sockets left open by the same processes, in the same state.
#[derive(Clone, Debug, PartialEq)]
pub struct Leak {
    /// The state; CLOSE if the connections are over.
    pub state: State,
    /// Who holds them, the lowest pid first. Empty if nobody is known.
    pub holders: Vec<Holding>,
    /// How the holders are known; `None` if they are not.
    pub via: Option<Via>,
    /// User that made the sockets, if no holder is known.
    pub uid: Option<u32>,
    /// The sockets, the oldest first.
    pub sockets: Vec<Leaked>,
    /// How many more of them there are a minute; `None` while that is not known.
    pub per_minute: Option<f64>,
    /// What would clear them. Never run.
    pub clear: Vec<Clear>,
    /// From where they were opened; `None` if that is not recorded.
    pub stacks: Option<Stacks>,
}

impl Holding {
    /// Its id in its own pid namespace, if that is another than the one that `/proc` shows.
    #[must_use]
    pub fn ns_pid(&self) -> Option<u32> {
        match self.process.as_ref()?.ns_pids[..] {
            [_, .., innermost] => Some(innermost),
            _ => None,
        }
    }
}

/// A process that holds sockets.
#[derive(Clone, Debug, PartialEq)]
pub struct Holding {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub comm: Comm,
    /// When it started, boot time nanoseconds.
    pub start: u64,
    /// More of it, if a look told.
    pub process: Option<Process>,
}

/// A socket that nobody closes.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaked {
    /// Which.
    pub socket: Socket,
    /// How long it has been in its state; `None` if that is not known.
    pub age: Option<Age>,
    /// Nanoseconds since anything was sent or acknowledged, if known.
    pub idle: Option<u64>,
    /// From where it was opened.
    pub site: Site,
    /// Why nobody closes it.
    pub cause: Cause,
    /// Bytes received and not read; the peer's FIN counts as one.
    pub recv_queue: u32,
    /// Bytes written and not acknowledged.
    pub send_queue: u32,
    /// Of one whose connection is over: whether in order, not by a reset or a time-out; if known.
    pub orderly: Option<bool>,
    /// By which descriptors it is held: pid and number.
    pub fds: Vec<(u32, u32)>,
    /// Nobody closed it but the end of its process.
    pub at_exit: bool,
}

/// How long a socket has been in its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age {
    /// Nanoseconds.
    pub ns: u64,
    /// It may be more.
    pub at_least: bool,
}

/// A command that would end connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clear {
    /// The command line.
    pub command: String,
    /// How many sockets it would end beyond those of the leak.
    pub others: usize,
}

/// One side of connections, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Its address.
    pub addr: IpAddr,
    /// Its port; `None` where those of one address differ, because it is the side that connected.
    pub port: Option<u16>,
    /// How many.
    pub sockets: usize,
}

impl Leak {
    /// Age of the oldest socket; `None` if none is known.
    #[must_use]
    pub fn oldest(&self) -> Option<Age> {
        self.sockets
            .iter()
            .filter_map(|socket| socket.age)
            .max_by_key(|age| age.ns)
    }

    /// Causes with their counts, the most frequent first.
    #[must_use]
    pub fn causes(&self) -> Vec<(Cause, usize)> {
        let mut causes: Vec<(Cause, usize)> = Cause::ALL
            .into_iter()
            .map(|cause| {
                let sockets = self.sockets.iter();
                (
                    cause,
                    sockets.filter(|socket| socket.cause == cause).count(),
                )
            })
            .filter(|(_, count)| *count > 0)
            .collect();
        causes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        causes
    }

    /// Bytes received and not read, of all sockets, ends of file not counted.
    #[must_use]
    pub fn unread(&self) -> u64 {
        let fin = u32::from(self.state == State::CloseWait);
        let sockets = self.sockets.iter();
        sockets
            .map(|socket| u64::from(socket.recv_queue.saturating_sub(fin)))
            .sum()
    }

    /// The holder that will run out of descriptors first at this rate, and after how many seconds.
    #[must_use]
    pub fn full_in(&self) -> Option<(&Holding, f64)> {
        let rate = self.per_minute.filter(|rate| *rate > 0.0)? / 60.0;
        self.holders
            .iter()
            .filter_map(|holding| {
                let process = holding.process.as_ref()?;
                let left = process.fd_limit?.saturating_sub(process.fds?.into());
                Some((holding, left as f64 / rate))
            })
            .min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Whether this side is the one that was connected to: then its ports are few, the other's are many.
    #[must_use]
    pub fn is_server(&self) -> bool {
        let count = |port: fn(&Leaked) -> u16| {
            let ports = self.sockets.iter().map(port);
            ports.collect::<std::collections::HashSet<_>>().len()
        };
        let accepted = self
            .sockets
            .iter()
            .any(|socket| socket.cause == Cause::NotAccepted);
        accepted
            || count(|socket| socket.socket.tuple.local_port)
                < count(|socket| socket.socket.tuple.remote_port)
    }

    /// Who is at the other ends, the most frequent first. Those that are not known are left out.
    #[must_use]
    pub fn remotes(&self) -> Vec<Remote> {
        let server = self.is_server();
        let tuples = self.sockets.iter().map(|socket| &socket.socket.tuple);
        let counts = count(
            tuples
                .filter(|tuple| tuple.remote_port != 0)
                .map(|tuple| (tuple.remote(), (!server).then_some(tuple.remote_port))),
        );
        counts
            .into_iter()
            .map(|((addr, port), sockets)| Remote {
                addr,
                port,
                sockets,
            })
            .collect()
    }

    /// Local ports, the most frequent first.
    #[must_use]
    pub fn local_ports(&self) -> Vec<(u16, usize)> {
        let tuples = self.sockets.iter().map(|socket| &socket.socket.tuple);
        count(tuples.map(|tuple| tuple.local_port))
    }
}

/// Equal ones counted, the most frequent first.
fn count<T: Ord + Copy>(of: impl Iterator<Item = T>) -> Vec<(T, usize)> {
    let mut counts = std::collections::BTreeMap::new();
    for one in of {
        *counts.entry(one).or_insert(0) += 1;
    }
    let mut counts: Vec<(T, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::event::{Frame, Stack, StackEnd};

    #[test]
    fn a_name_that_comes_late_is_news() {
        let report = |sockets, function: Option<&str>| Report {
            leaks: vec![Leak {
                state: State::CloseWait,
                holders: Vec::new(),
                via: None,
                uid: None,
                sockets: Vec::new(),
                per_minute: None,
                clear: Vec::new(),
                stacks: Some(Stacks {
                    found: vec![(
                        sockets,
                        Rc::new(Stack {
                            id: 0,
                            via: crate::event::Via::Connect,
                            pid: 0,
                            frames: vec![Frame {
                                function: function.map(Into::into),
                                ..Frame::default()
                            }],
                            by_frame_pointer: 0,
                            end: StackEnd::Outermost,
                        }),
                    )],
                    without: Vec::new(),
                }),
            }],
            ..Report::default()
        };
        let before = report(1, None);
        assert!(!report(1, None).is_news_after(&before));
        assert!(report(1, Some("a")).is_news_after(&before));
        assert!(report(2, None).is_news_after(&before));
    }
}
