//! The look itself: `sock_diag`, and `/proc` if it has to be known whose the sockets are.

use std::{cell::RefCell, io, iter, ops::ControlFlow, thread::available_parallelism};

use anyhow::{Context as _, Result, bail};
use tcptrace_ebpf::State;

use super::{Options, Report, Seen, Table};
use crate::{
    event::{Holder, States},
    kernel::{
        capabilities::Capabilities,
        cgroup::{self, Cgroups},
        clock,
        netns::{self, Namespace, Namespaces},
        open_sockets,
        probes::Walker,
        procfs::{self, Descriptor, Handle, Process},
        sock_diag::{ALL_STATES, Completeness, Query},
    },
    reason::Reason,
    select::Sockets,
};

/// So many threads read `/proc` at most.
const THREADS: usize = 4;

/// What a look gave.
#[derive(Debug)]
pub struct Looked {
    /// What it showed.
    pub report: Report,
    /// What it could not show.
    pub unseen: Vec<Reason>,
}

/// Looks once.
///
/// # Errors
/// When `/proc` cannot be read, or no network namespace could be looked into.
pub fn look(options: &Options) -> Result<Looked> {
    let time = clock::boot_ns();
    let mut unseen = Vec::new();
    let mut table = Table::new(options);
    let cgroups = open_cgroups(options, &mut unseen);
    let namespaces = Namespaces::discover().context("cannot find the network namespaces")?;
    let wanted = &options.selection.sockets.netns;
    let mut closed = Vec::new();
    let mut looked_into = 0;
    for namespace in namespaces.iter() {
        if !wanted.is_empty() && !wanted.contains(&namespace.inode()) {
            continue;
        }
        table.namespace(namespace.inode(), namespace.name());
        match dump(namespace, options, cgroups.as_ref(), &mut table) {
            Ok(Completeness::Complete) => {}
            Ok(Completeness::Interrupted) => unseen.push(Reason::new(
                format_args!(
                    "network namespace {}: its tables changed while they were read, sockets may be missing",
                    namespace.inode()
                ),
                "look again",
            )),
            // Its sockets are gone as well.
            Err(Missed::Closed(netns::Error::Gone { .. })) => continue,
            Err(Missed::Closed(error)) => {
                closed.push(error);
                continue;
            }
            Err(Missed::Broken(reason)) => {
                unseen.push(reason);
                continue;
            }
        }
        looked_into += 1;
    }
    unseen.extend(netns::reasons(&closed));
    let missed = namespaces.unseen().reasons(Capabilities::of_self());
    if looked_into == 0 {
        if let Some(reason) = unseen.pop() {
            bail!("no network namespace can be looked into: {reason}");
        }
        let none = "no such network namespace was found (`lsns -t net` and `ip netns` list them)";
        match missed.first() {
            Some(reason) => bail!("{none}; {reason}"),
            None => bail!(none),
        }
    }
    if options.needs_holders() {
        holders(&mut table, options).context("cannot read who holds the sockets")?;
        table.attribute();
    }
    // What could not be read may have been a namespace, or a holder; if neither is missed, never mind.
    let lost = match (wanted.is_empty(), table.has_unknown()) {
        (true, true) => {
            "sockets in their network namespaces are missing, and what they hold has no process"
        }
        (true, false) => {
            "sockets in their network namespaces are missing, unless others are in them as well"
        }
        (false, true) => "what they hold has no process",
        (false, false) => "",
    };
    if !lost.is_empty() {
        unseen.extend(missed.into_iter().map(|reason| Reason {
            what: format!("{}: {lost}", reason.what),
            ..reason
        }));
    }
    Ok(Looked {
        report: table.report(time, looked_into),
        unseen,
    })
}

/// Why the sockets of a namespace are missing, or some of them.
enum Missed {
    /// It could not be entered.
    Closed(netns::Error),
    /// The list did not come to its end.
    Broken(Reason),
}

fn dump(
    namespace: &Namespace,
    options: &Options,
    cgroups: Option<&Cgroups>,
    table: &mut Table<'_>,
) -> Result<Completeness, Missed> {
    let inode = namespace.inode();
    let mut diag = namespace.diag().map_err(Missed::Closed)?;
    let states = &options.selection.states;
    let wanted = match states.as_slice() {
        [] => ALL_STATES,
        states => states.iter().fold(0, |mask, state| mask | state.bit()),
    };
    let listen = State::Listen.bit();
    // The kernel has a table of its own for listeners: in two steps, it goes through each once. All of them are
    // needed, whatever was asked for.
    let listeners = Query {
        states: listen,
        ..Query::ALL
    };
    let others = ports(&options.selection.sockets).map(|(local_port, remote_port)| Query {
        states: wanted & !listen,
        local_port,
        remote_port,
        ..Query::ALL
    });
    let mut complete = Completeness::Complete;
    for query in iter::once(listeners).chain(others) {
        if query.states == 0 {
            continue;
        }
        let dumped = diag.dump(query, |entry| {
            let id = entry.cgroup.unwrap_or(0);
            if table.wants_cgroup(id) {
                let path = cgroups.and_then(|cgroups| cgroups.path(id));
                table.cgroup(id, path.as_deref());
            }
            table.add(&Seen {
                socket: entry.socket(inode),
                state: entry.state,
                inode: entry.inode,
                cgroup: id,
                uid: entry.uid,
            });
        });
        match dumped {
            Ok(Completeness::Complete) => {}
            Ok(Completeness::Interrupted) => complete = Completeness::Interrupted,
            Err(error) => return Err(Missed::Broken(error.reason(inode))),
        }
    }
    Ok(complete)
}

/// Local and remote ports to ask the kernel for, 0 for any: together at least what was asked for. What a socket is
/// in twice is counted once.
pub(super) fn ports(sockets: &Sockets) -> impl Iterator<Item = (u16, u16)> + use<> {
    let Sockets {
        ports,
        local_ports,
        remote_ports,
        ..
    } = sockets;
    let (first, second) = match (&ports[..], &local_ports[..], &remote_ports[..]) {
        (_, [local], [remote]) => ((*local, *remote), None),
        (_, [local], _) => ((*local, 0), None),
        (_, _, [remote]) => ((0, *remote), None),
        ([port], _, _) => ((*port, 0), Some((0, *port))),
        _ => ((0, 0), None),
    };
    iter::once(first).chain(second)
}

/// Who holds what is wanted: from the kernel's walk of all open files where that pays, else from `/proc`.
fn holders(table: &mut Table<'_>, options: &Options) -> io::Result<()> {
    if let Some(mut walker) = Walker::if_it_pays() {
        let states = match options.selection.states.as_slice() {
            [] => States::ALL,
            // Listeners hold what nobody has accepted.
            states => {
                let states: States = states.iter().copied().collect();
                states.with(State::Listen)
            }
        };
        match walk(table, &mut walker, states) {
            Ok(()) => return Ok(()),
            // What it has shown is true, and `/proc` shows it again.
            Err(error) => eprintln!(
                "tcptrace: cannot walk all open files: {error}; /proc is read for who has which socket open, \
                 which takes longer"
            ),
        }
    }
    // Somebody waits for it.
    let threads = available_parallelism().map_or(1, |all| all.get().min(THREADS));
    let wanted = table.wanted();
    let parts = procfs::sockets_by_part(threads, |part: &mut Part, process, descriptor| {
        if wanted.contains(&descriptor.inode) {
            part.add(process, descriptor);
        }
    })?;
    for part in parts {
        part.held.iter().for_each(|holder| table.holder(holder));
    }
    Ok(())
}

fn walk(table: &mut Table<'_>, walker: &mut Walker, states: States) -> io::Result<()> {
    let none = States::default();
    // Why the kernel does not take the program, `tcptrace doctor` says.
    let Ok(records) = walker.open_sockets(states, none) else {
        return Err(io::Error::other("the kernel refuses the program"));
    };
    let mut part = Part::default();
    let table = RefCell::new(table);
    open_sockets::sockets(
        records,
        |open| table.borrow().wants(open.descriptor.inode),
        |process, open| {
            part.add(process, open.descriptor);
            for holder in part.held.drain(..) {
                table.borrow_mut().holder(&holder);
            }
        },
        || ControlFlow::Continue(()),
    )
}

/// What a pass over a part of the processes has found.
#[derive(Default)]
struct Part {
    held: Vec<Holder>,
    /// Descriptors of a process come one after the other.
    last: Option<Process>,
}

impl Part {
    fn add(&mut self, process: &Handle, descriptor: Descriptor) {
        let is_last = |last: &Process| last.pid == process.pid();
        if !self.last.as_ref().is_some_and(is_last) {
            self.last = process.identity();
        }
        // One that has ended meanwhile holds nothing.
        if let Some(process) = &self.last {
            self.held.push(Holder {
                inode: descriptor.inode,
                fd: Some(descriptor.fd),
                pid: process.pid,
                comm: process.comm,
                start: process.start,
                tree: false,
            });
        }
    }
}

fn open_cgroups(options: &Options, unseen: &mut Vec<Reason>) -> Option<Cgroups> {
    if !options.needs_containers() {
        return None;
    }
    match Cgroups::open() {
        Ok(cgroups) => Some(cgroups),
        Err(error) => {
            unseen.push(cgroup::reason(&error));
            None
        }
    }
}
