//! A report for programs: a line for each group, and one for all.

use std::net::IpAddr;

use serde::{Serialize, Serializer};
use tcptrace_ebpf::State;

use super::{Counts, Group, Key, Listed, Process, Report};
use crate::json::{Name, SocketFields, Time, line};

/// Writes the report, with the `top` largest groups and the rest in one line. `boot_to_utc_ns`: what to add to
/// boot time to get the time of day.
pub fn write(to: &mut Vec<u8>, report: &Report, top: Option<usize>, boot_to_utc_ns: i64) {
    let time = Time::new(report.time, boot_to_utc_ns);
    let (shown, rest) = report.top(top);
    let by = report.by.map(super::By::name);
    for group in shown {
        for socket in &group.sockets {
            line(to, &SocketLine::new(time, socket));
        }
        line(
            to,
            &GroupLine {
                event: "states_group",
                time,
                by,
                key: KeyFields::new(group),
                rest: None,
                counts: CountsFields::new(&group.counts),
            },
        );
    }
    if let Some(rest) = rest {
        line(
            to,
            &GroupLine {
                event: "states_group",
                time,
                by,
                key: KeyFields::Rest {},
                rest: Some(rest.groups),
                counts: CountsFields::new(&rest.counts),
            },
        );
    }
    line(
        to,
        &StatesLine {
            event: "states",
            time,
            by,
            groups: report.groups.len(),
            namespaces: report.namespaces,
            counts: CountsFields::new(&report.total),
        },
    );
}

#[derive(Serialize)]
struct StatesLine {
    event: &'static str,
    time: Time,
    by: Option<&'static str>,
    groups: usize,
    namespaces: usize,
    #[serde(flatten)]
    counts: CountsFields,
}

#[derive(Serialize)]
struct GroupLine<'a> {
    event: &'static str,
    time: Time,
    by: Option<&'static str>,
    #[serde(flatten)]
    key: KeyFields<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rest: Option<usize>,
    #[serde(flatten)]
    counts: CountsFields,
}

#[derive(Serialize)]
struct SocketLine {
    event: &'static str,
    time: Time,
    #[serde(flatten)]
    socket: SocketFields,
    state: &'static str,
    fds: Vec<FdFields>,
}

#[derive(Serialize)]
struct FdFields {
    pid: u32,
    fd: u32,
}

impl SocketLine {
    fn new(time: Time, listed: &Listed) -> Self {
        Self {
            event: "states_socket",
            time,
            socket: SocketFields::new(&listed.socket),
            state: listed.state.name(),
            fds: listed
                .fds
                .iter()
                .map(|(pid, fd)| FdFields { pid: *pid, fd: *fd })
                .collect(),
        }
    }
}

/// What the sockets of a group have in common; nothing of the rest.
#[derive(Serialize)]
#[serde(untagged)]
enum KeyFields<'a> {
    Process {
        holder: &'static str,
        pid: Option<u32>,
        comm: Option<Name>,
        #[serde(skip_serializing_if = "Option::is_none")]
        uid: Option<u32>,
        holders: Vec<HolderFields>,
    },
    Port {
        side: &'static str,
        port: u16,
    },
    Remote {
        addr: Option<IpAddr>,
    },
    Container {
        container: Option<&'a str>,
        container_known: bool,
    },
    Netns {
        netns: u32,
        name: Option<&'a str>,
    },
    Rest {},
}

#[derive(Serialize)]
struct HolderFields {
    pid: u32,
    comm: Name,
}

impl<'a> KeyFields<'a> {
    fn new(group: &'a Group) -> Self {
        let process = |holder, processes: &[Process], uid| Self::Process {
            holder,
            pid: processes.first().map(|process| process.pid),
            comm: processes.first().map(|process| Name(process.comm)),
            uid,
            holders: processes
                .iter()
                .map(|process| HolderFields {
                    pid: process.pid,
                    comm: Name(process.comm),
                })
                .collect(),
        };
        match &group.key {
            Key::Held(processes) => process("process", processes, None),
            Key::Nobody => process("none", &[], None),
            Key::Unknown { uid } => process("not_found", &[], Some(*uid)),
            Key::LocalPort(port) => Self::Port {
                side: "local",
                port: *port,
            },
            Key::RemotePort(port) => Self::Port {
                side: "remote",
                port: *port,
            },
            Key::Remote(addr) => Self::Remote { addr: Some(*addr) },
            Key::NoRemote => Self::Remote { addr: None },
            Key::Container(container) => Self::Container {
                container: Some(container),
                container_known: true,
            },
            Key::NoContainer => Self::Container {
                container: None,
                container_known: true,
            },
            Key::ContainerUnknown => Self::Container {
                container: None,
                container_known: false,
            },
            Key::Netns(netns, name) => Self::Netns {
                netns: *netns,
                name: name.as_deref(),
            },
        }
    }
}

#[derive(Serialize)]
struct CountsFields {
    sockets: u64,
    states: ByState,
    orphaned: ByState,
    not_accepted: ByState,
}

impl CountsFields {
    fn new(counts: &Counts) -> Self {
        let of = |which: fn(super::Count) -> u64| {
            let states = counts.states().into_iter();
            let states = states.map(|(state, count)| (state, which(count)));
            ByState(states.filter(|(_, count)| *count > 0).collect())
        };
        Self {
            sockets: counts.sockets(),
            states: of(|count| count.sockets),
            orphaned: of(|count| count.orphaned),
            not_accepted: of(|count| count.not_accepted),
        }
    }
}

/// An object of counts by state; those that are 0 are left out.
struct ByState(Vec<(State, u64)>);

impl Serialize for ByState {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(state, count)| (state.name(), count)))
    }
}
