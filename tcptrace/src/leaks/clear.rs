//! The `ss -K` line that would end leaked connections. It is shown, never run.

use std::{fmt, net::SocketAddr};

use hashbrown::{HashMap, HashSet};
use tcptrace_ebpf::State;

use super::report::{Clear, Leak};
use crate::event::{Row, Socket};

/// More terms make a line that nobody can read.
const MOST_TERMS: usize = 8;

/// What a filter of ss picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Term {
    LocalPort(u16),
    Remote(SocketAddr),
}

impl Term {
    const fn local_port(socket: &Socket) -> Self {
        Self::LocalPort(socket.tuple.local_port)
    }

    fn remote(socket: &Socket) -> Self {
        let tuple = &socket.tuple;
        Self::Remote(SocketAddr::new(tuple.remote(), tuple.remote_port))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LocalPort(port) => write!(f, "sport = :{port}"),
            Self::Remote(remote) => write!(f, "dst {remote}"),
        }
    }
}

/// Which sockets, by cookie, a filter picks in a state and a network namespace: for each filter that would
/// pick a leaked one.
pub(super) struct Picked(HashMap<(State, u32, Term), Vec<u64>>);

impl Picked {
    /// In one pass over all sockets, for however many leaks.
    pub(super) fn by<'a>(
        leaks: impl Iterator<Item = &'a Leak>,
        all: impl Iterator<Item = &'a Row>,
    ) -> Self {
        let mut picked: HashMap<_, Vec<u64>> = HashMap::new();
        for leak in leaks {
            for socket in leak.sockets.iter().map(|one| &one.socket) {
                for term in [Term::local_port(socket), Term::remote(socket)] {
                    picked.entry((leak.state, socket.netns, term)).or_default();
                }
            }
        }
        for Row { socket, state, .. } in all {
            for term in [Term::local_port(socket), Term::remote(socket)] {
                if let Some(cookies) = picked.get_mut(&(*state, socket.netns, term)) {
                    cookies.push(socket.cookie);
                }
            }
        }
        Self(picked)
    }
}

/// Command lines that end the sockets of `leak`, one for each network namespace. `home`: the namespace of
/// whoever will read them.
pub(super) fn commands(leak: &Leak, home: u32, picked: &Picked) -> Vec<Clear> {
    // What is over is in no table that ss could look in, and what its process has left behind is gone.
    if leak.state == State::Close || leak.sockets.iter().all(|socket| socket.at_exit) {
        return Vec::new();
    }
    let cookies: HashSet<u64> = leak.sockets.iter().map(|one| one.socket.cookie).collect();
    let mut namespaces: Vec<u32> = leak.sockets.iter().map(|one| one.socket.netns).collect();
    namespaces.sort_unstable();
    namespaces.dedup();
    let mut commands = Vec::new();
    for netns in namespaces {
        let Some(prefix) = prefix(leak, netns, home) else {
            continue;
        };
        let others = |terms: &[Term]| {
            // Terms of one kind have no socket in common.
            let of = |term: &Term| picked.0.get(&(leak.state, netns, *term));
            let matched = terms.iter().filter_map(of).flatten();
            matched.filter(|cookie| !cookies.contains(*cookie)).count()
        };
        let sockets = || {
            let sockets = leak.sockets.iter().map(|one| &one.socket);
            sockets.filter(|socket| socket.netns == netns)
        };
        // A line that can be read goes before one that ends nothing else, and that before a short one.
        let [ports, remotes] = [
            terms(sockets().map(Term::local_port)),
            terms(sockets().map(Term::remote)),
        ];
        let cost = |terms: &[Term]| (terms.len() > MOST_TERMS, others(terms), terms.len());
        let terms = if cost(&ports) <= cost(&remotes) {
            ports
        } else {
            remotes
        };
        let state = leak.state.name().to_lowercase().replace('_', "-");
        for terms in terms.chunks(MOST_TERMS) {
            let filter: Vec<String> = terms.iter().map(Term::to_string).collect();
            commands.push(Clear {
                command: format!("{prefix}ss -K state {state} '{}'", filter.join(" or ")),
                others: others(terms),
            });
        }
    }
    commands
}

/// What leads into a network namespace; `None` if no process is known that is in it.
fn prefix(leak: &Leak, netns: u32, home: u32) -> Option<String> {
    if netns == home {
        return Some(String::new());
    }
    let mut processes = leak.holders.iter().filter_map(|one| one.process.as_ref());
    let inside = processes.find(|process| process.netns == Some(netns))?;
    Some(format!("nsenter --net=/proc/{}/ns/net ", inside.pid))
}

/// Each one once.
fn terms(all: impl Iterator<Item = Term>) -> Vec<Term> {
    let mut seen = HashSet::new();
    all.filter(|term| seen.insert(*term)).collect()
}
