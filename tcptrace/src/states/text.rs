//! A report for people.

use std::{
    fmt::{self, Display, Write as _},
    net::{IpAddr, SocketAddr},
};

use unicode_width::UnicodeWidthStr as _;

use super::{By, Counts, Group, Key, Listed, Process, Report};
use crate::{
    event::Printable,
    human::{Count, plural},
    json::Time,
};

/// How many processes of a group are named.
const NAMED: usize = 3;
/// How many descriptors of a socket are.
const LISTED: usize = 5;
/// Longer names push the rest of their line to the right.
const WIDEST: usize = 48;

/// The report, with the `top` largest groups and the rest in one line. `boot_to_utc_ns`: what to add to boot time
/// to get the time of day.
#[must_use]
pub fn compose(report: &Report, top: Option<usize>, boot_to_utc_ns: i64) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write(&mut page, report, top, boot_to_utc_ns);
    page
}

fn write(to: &mut String, report: &Report, top: Option<usize>, boot_to_utc_ns: i64) -> fmt::Result {
    let time = Time::new(report.time, boot_to_utc_ns).to_string();
    let sockets = report.total.sockets();
    let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    write!(
        to,
        "{} UTC  {} TCP {} in {} {}",
        time.get(11..19).unwrap_or(&time),
        Count(sockets),
        plural(count(sockets), "socket", "sockets"),
        Count(report.namespaces as u64),
        plural(report.namespaces, "network namespace", "network namespaces"),
    )?;
    let Some(by) = report.by else {
        writeln!(to)?;
        for (state, count) in report.total.states() {
            write!(to, "{:>9}  {}", Count(count.sockets), state.name())?;
            match note(count) {
                Some(note) => writeln!(to, "  ({note})")?,
                None => writeln!(to)?,
            }
        }
        return Ok(());
    };
    writeln!(to, ", by {}", by.name())?;
    if report.groups.is_empty() {
        return Ok(());
    }
    let (shown, rest) = report.top(top);
    let mut lines: Vec<(String, Counts, &[Listed])> = shown
        .iter()
        .map(|group| (name(&group.key), group.counts, group.sockets.as_slice()))
        .collect();
    if let Some(rest) = rest {
        let name = format!(
            "... {} more {}",
            Count(rest.groups as u64),
            rest_of(by, rest.groups)
        );
        lines.push((name, rest.counts, &[]));
    }
    let title = title(by);
    let names = lines.iter().map(|(name, ..)| name.width());
    let width = names
        .filter(|width| *width <= WIDEST)
        .chain([title.len()])
        .max()
        .unwrap_or(0);
    writeln!(to, "{:>9}  {title:width$}  STATES", "SOCKETS")?;
    for (index, (name, counts, sockets)) in lines.iter().enumerate() {
        let pad = width.saturating_sub(name.width());
        writeln!(
            to,
            "{:>9}  {name}{:pad$}  {}",
            Count(counts.sockets()),
            "",
            States(counts)
        )?;
        for socket in *sockets {
            writeln!(
                to,
                "{:>11}{}",
                "",
                Line {
                    socket,
                    of: shown.get(index)
                }
            )?;
        }
    }
    Ok(())
}

/// What else is to be said of sockets in one state.
fn note(count: super::Count) -> Option<String> {
    let mut notes = Vec::new();
    if count.orphaned > 0 {
        notes.push(format!("{} orphaned", Count(count.orphaned)));
    }
    if count.not_accepted > 0 {
        notes.push(format!("{} not accepted", Count(count.not_accepted)));
    }
    (!notes.is_empty()).then(|| notes.join(", "))
}

/// The states of a group, on one line.
struct States<'a>(&'a Counts);

impl Display for States<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (state, count)) in self.0.states().into_iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{} {}", state.name(), Count(count.sockets))?;
            if let Some(note) = note(count) {
                write!(f, " ({note})")?;
            }
        }
        Ok(())
    }
}

const fn title(by: By) -> &'static str {
    match by {
        By::Process => "PROCESS",
        By::Port => "PORT",
        By::Remote => "REMOTE",
        By::Container => "CONTAINER",
        By::Netns => "NETWORK NAMESPACE",
    }
}

/// What the groups that are not shown are, so many of them.
const fn rest_of(by: By, groups: usize) -> &'static str {
    match by {
        // Who holds a socket may be several.
        By::Process => plural(groups, "line", "lines"),
        By::Port => plural(groups, "port", "ports"),
        By::Remote => plural(groups, "remote", "remotes"),
        By::Container => plural(groups, "container", "containers"),
        By::Netns => plural(groups, "namespace", "namespaces"),
    }
}

/// What a group is called.
fn name(key: &Key) -> String {
    match key {
        Key::Held(processes) => Who(processes).to_string(),
        Key::Nobody => "no process".to_owned(),
        Key::Unknown { uid } => format!("no process found (made by uid {uid})"),
        Key::LocalPort(port) => format!("local {port}"),
        Key::RemotePort(port) => format!("remote {port}"),
        Key::Remote(addr) => addr.to_string(),
        Key::NoRemote => "none (listening)".to_owned(),
        Key::Container(container) => Printable(container.as_bytes()).to_string(),
        Key::NoContainer => "no container".to_owned(),
        Key::ContainerUnknown => "not known".to_owned(),
        Key::Netns(inode, None) => inode.to_string(),
        Key::Netns(inode, Some(name)) => format!("{inode} ({})", Printable(name.as_bytes())),
    }
}

/// Processes that hold the same sockets.
struct Who<'a>(&'a [Process]);

impl Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, process) in self.0.iter().take(NAMED).enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{} (pid {})", process.comm, process.pid)?;
        }
        match self.0.len().checked_sub(NAMED) {
            Some(more @ 1..) => write!(f, " and {} more", Count(more as u64)),
            _ => Ok(()),
        }
    }
}

/// A single socket.
struct Line<'a> {
    socket: &'a Listed,
    of: Option<&'a Group>,
}

impl Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { socket, of } = self;
        // Where one process is named, all are its.
        let one = matches!(of.map(|group| &group.key), Some(Key::Held(all)) if all.len() == 1);
        let fds = socket.fds.iter().take(LISTED).map(|(pid, fd)| match one {
            true => format!("fd {fd}"),
            false => format!("fd {fd} of {pid}"),
        });
        let mut fds = fds.collect::<Vec<String>>().join(", ");
        match socket.fds.len() {
            0 => fds.push_str("no fd"),
            all if all > LISTED => {
                write!(fds, " and {} more", all - LISTED)?;
            }
            _ => {}
        }
        let tuple = &socket.socket.tuple;
        let side = |addr: IpAddr, port: u16| match port {
            0 => "*".to_owned(),
            port => SocketAddr::new(addr, port).to_string(),
        };
        let local = side(tuple.local(), tuple.local_port);
        let remote = side(tuple.remote(), tuple.remote_port);
        write!(f, "{fds:8} {:11} {local} > {remote}", socket.state.name())
    }
}
