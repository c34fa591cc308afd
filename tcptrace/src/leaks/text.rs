//! Reports for people: redrawn on a terminal, appended to a pipe when something has changed.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    net::{IpAddr, SocketAddr},
};

use tcptrace_ebpf::State;

use super::{
    Cause, Options, Watch,
    dwell::Times,
    report::{Age, Holding, Leak, Leaked, Report},
    stacks::{self, Stacks, Without},
};
use crate::{
    event::{End, Frame, Printable, Process, Stack},
    human::{Count, Duration, plural},
    json::{Time, seconds},
    output::Output,
    tracker::{Fact, Tracker, Via},
    view::View,
};

/// How many leaks are shown in full; the rest is counted by name.
const LEAKS: usize = 10;
/// How many sockets, remotes, and ports of each.
const LISTED: usize = 5;
/// How many frames of a stack.
const FRAMES: usize = 16;

/// Shows the last report.
pub struct Text {
    pub(super) watch: Watch,
    out: Output,
    boot_to_utc_ns: i64,
    page: String,
}

impl Text {
    /// Writes to `out`.
    #[must_use]
    pub fn new(out: Output, options: Options) -> Self {
        Self {
            watch: Watch::new(options),
            out,
            boot_to_utc_ns: 0,
            page: String::new(),
        }
    }

    /// Whether the last report tells of a leak.
    #[must_use]
    pub fn has_leak(&self) -> bool {
        !self.watch.report.leaks.is_empty()
    }

    /// Writes the page.
    fn show(&mut self, tracker: &Tracker, last: bool) -> io::Result<()> {
        let mut page = std::mem::take(&mut self.page);
        page.clear();
        self.compose(tracker, &mut page);
        if self.watch.options.dwell || last {
            self.dwell(tracker, &mut page);
        }
        let drawn = self.out.draw(&page, last);
        self.page = page;
        drawn
    }

    pub(super) fn compose(&self, tracker: &Tracker, to: &mut String) {
        let page = Page {
            report: &self.watch.report,
            options: self.watch.options,
            traced: tracker.is_traced(),
            stacks: tracker.has_stacks(),
            lost: self.watch.lost,
            boot_to_utc_ns: self.boot_to_utc_ns,
        };
        // Writing into a string cannot fail.
        let _ = page.write(to);
    }

    fn dwell(&self, tracker: &Tracker, to: &mut String) {
        let _ = dwell(to, &self.watch, tracker, self.watch.report.time);
    }
}

impl View for Text {
    fn clock(&mut self, _: u64, boot_to_utc_ns: i64) {
        self.boot_to_utc_ns = boot_to_utc_ns;
    }

    fn fact(&mut self, fact: Fact<'_>) {
        self.watch.fact(fact);
    }

    fn flush(&mut self, tracker: &Tracker, _: u64) -> io::Result<()> {
        match self.watch.look_meanwhile(tracker) {
            Some(is_news) if !self.watch.options.once && (is_news || self.out.is_terminal) => {
                if !self.out.is_terminal && is_news {
                    self.out.separate();
                }
                self.show(tracker, false)
            }
            _ => Ok(()),
        }
    }

    fn end(&mut self, tracker: &Tracker, end: &End) -> io::Result<()> {
        let is_news = self.watch.look(tracker) == Some(true);
        if is_news || self.watch.options.once || self.out.is_terminal {
            self.out.separate();
            self.show(tracker, true)?;
        } else {
            // It has been said; only the times are new.
            let mut page = String::new();
            self.dwell(tracker, &mut page);
            self.out.draw(&page, true)?;
        }
        if end.mptcp > 0 {
            eprintln!(
                "tcptrace: {} transitions of MPTCP sockets not covered",
                end.mptcp
            );
        }
        Ok(())
    }
}

/// A report on its way to text.
struct Page<'a> {
    report: &'a Report,
    options: Options,
    traced: bool,
    stacks: bool,
    lost: u64,
    boot_to_utc_ns: i64,
}

type Written = std::fmt::Result;

impl Page<'_> {
    fn write(&self, to: &mut String) -> Written {
        self.headline(to)?;
        for leak in self.report.leaks.iter().take(LEAKS) {
            writeln!(to)?;
            self.leak(to, leak)?;
        }
        if let Some(more) = self.report.leaks.get(LEAKS..)
            && !more.is_empty()
        {
            rest(to, more)?;
        }
        Ok(())
    }

    fn headline(&self, to: &mut String) -> Written {
        let states: Vec<&str> = State::ALL
            .into_iter()
            .filter(|state| self.options.criteria.states.contains(*state))
            .map(State::name)
            .collect();
        let states = states.join(", ");
        let limit = seconds(self.options.criteria.older_than);
        let leaks = self.report.leaks.len();
        let (processes, sockets) = (self.report.processes(), self.report.sockets());
        let time = Time::new(self.report.time, self.boot_to_utc_ns).to_string();
        let time = time.get(11..19).unwrap_or(&time);
        if leaks == 0 {
            write!(
                to,
                "{time} UTC  no {states} for longer than {}",
                Plain(limit)
            )?;
        } else {
            write!(
                to,
                "{time} UTC  {states} for longer than {}: {} {} of {} {}",
                Plain(limit),
                Count(sockets as u64),
                plural(sockets, "socket", "sockets"),
                Count(processes as u64),
                plural(processes, "process", "processes"),
            )?;
        }
        if self.report.younger > 0 {
            write!(to, "; {} for less", Count(self.report.younger as u64))?;
        }
        if self.report.half_closed > 0 {
            write!(
                to,
                "; {} half-closed and still answered, no leak",
                Count(self.report.half_closed as u64)
            )?;
        }
        writeln!(to)?;
        if self.lost > 0 {
            writeln!(
                to,
                "  {} events lost: what is shown was looked up afterwards, some ages are lower bounds",
                Count(self.lost)
            )?;
        }
        if self.options.stacks && !self.stacks {
            writeln!(to, "  no stacks: it was recorded without --stacks")?;
        }
        if !self.traced && leaks > 0 {
            writeln!(
                to,
                "  not traced, only looked up: ages are lower bounds (>=)"
            )?;
        }
        Ok(())
    }

    fn leak(&self, to: &mut String, leak: &Leak) -> Written {
        let causes = leak.causes();
        let Some(&(first, count)) = causes.first() else {
            return Ok(());
        };
        let limit = seconds(self.options.criteria.older_than);
        write!(to, "{} {}", Who(leak), did(leak, first, count, limit))?;
        match leak.oldest() {
            Some(age) => write!(to, "; oldest {}", Aged(age))?,
            None => {
                let idle = leak.sockets.iter().filter_map(|socket| socket.idle).max();
                if let Some(ns) = idle {
                    write!(to, "; nothing received for up to {}", Duration(seconds(ns)))?;
                }
            }
        }
        if let Some(rate) = leak.per_minute {
            write!(to, "; {}", Rate(rate))?;
        }
        if let Some((holding, seconds)) = leak.full_in() {
            let limit = holding
                .process
                .as_ref()
                .and_then(|process| process.fd_limit);
            write!(
                to,
                "; fd limit {} reached in {}",
                Count(limit.unwrap_or(0)),
                Duration(seconds)
            )?;
        }
        writeln!(to)?;
        for (cause, count) in &causes[1..] {
            writeln!(to, "  and it {}", did(leak, *cause, *count, limit))?;
        }
        if leak.unread() > 0 {
            writeln!(to, "  unread   {} bytes", Count(leak.unread()))?;
        }
        for holding in leak.holders.iter().take(LISTED) {
            self.process(to, holding, leak)?;
        }
        if let Some(more) = leak
            .holders
            .len()
            .checked_sub(LISTED)
            .filter(|more| *more > 0)
        {
            writeln!(
                to,
                "           ... and {} more processes",
                Count(more as u64)
            )?;
        }
        if leak.holders.is_empty() {
            let uid = leak
                .uid
                .map_or(String::new(), |uid| format!("; uid {uid} made them"));
            writeln!(
                to,
                "  holder   not known: no process that could be read holds them{uid}"
            )?;
        }
        self.peers(to, leak)?;
        if let Some(found) = leak.stacks.as_ref().filter(|_| self.options.stacks) {
            opened(to, found)?;
        }
        for (index, socket) in leak.sockets.iter().take(LISTED).enumerate() {
            let title = if index == 0 { "sockets" } else { "" };
            writeln!(to, "  {title:8} {}", Sample { socket, leak })?;
        }
        if let Some(more) = leak
            .sockets
            .len()
            .checked_sub(LISTED)
            .filter(|more| *more > 0)
        {
            writeln!(to, "           ... and {} more", Count(more as u64))?;
        }
        clear(to, leak)
    }

    fn process(&self, to: &mut String, holding: &Holding, leak: &Leak) -> Written {
        let Some(process) = &holding.process else {
            return Ok(());
        };
        let title = if leak.holders.len() > 1 {
            format!("pid {}", holding.pid)
        } else {
            "process".to_owned()
        };
        let now = self.report.time;
        let ran = Duration(seconds(now.saturating_sub(holding.start)));
        write!(to, "  {title:8} {}", process.exe.as_deref().unwrap_or("-"))?;
        write!(to, ", started {ran} ago")?;
        if let Some(pid) = holding.ns_pid() {
            write!(to, ", pid {pid} in its namespace")?;
        }
        if let Some(unit) = &process.unit {
            write!(to, ", unit {}", Printable(unit.as_bytes()))?;
        }
        if let Some(container) = &process.container {
            write!(to, ", container {}", Printable(container.as_bytes()))?;
        }
        writeln!(to)?;
        if let Some(cmdline) = &process.cmdline {
            writeln!(to, "  {:8} {}", "command", Printable(cmdline.as_bytes()))?;
        }
        match (process.fds, process.fd_limit) {
            (Some(fds), Some(limit)) => writeln!(
                to,
                "  {:8} {} of {} open",
                "fds",
                Count(fds.into()),
                Count(limit)
            ),
            (Some(fds), None) => writeln!(to, "  {:8} {} open", "fds", Count(fds.into())),
            _ => Ok(()),
        }
    }

    fn peers(&self, to: &mut String, leak: &Leak) -> Written {
        let remotes = leak.remotes();
        if !remotes.is_empty() {
            let shown = remotes.iter().take(LISTED).map(|remote| {
                let count = Count(remote.sockets as u64);
                match remote.port {
                    Some(port) => format!("{} ({count})", SocketAddr::new(remote.addr, port)),
                    None => format!("{} ({count})", remote.addr),
                }
            });
            listed(to, "remotes", shown, remotes.len())?;
        }
        let ports = leak.local_ports();
        if ports.len() <= LISTED {
            let shown = ports
                .iter()
                .map(|(port, count)| format!("port {port} ({})", Count(*count as u64)));
            listed(to, "local", shown, ports.len())?;
        }
        Ok(())
    }
}

/// A line of some of them.
fn listed(
    to: &mut String,
    title: &str,
    shown: impl Iterator<Item = String>,
    all: usize,
) -> Written {
    let shown: Vec<String> = shown.collect();
    write!(to, "  {title:8} {}", shown.join(", "))?;
    if all > shown.len() {
        write!(to, ", ... and {} more", Count((all - shown.len()) as u64))?;
    }
    writeln!(to)
}

/// From where the sockets were opened.
fn opened(to: &mut String, stacks: &Stacks) -> Written {
    let mut title = "opened";
    for (sockets, stack) in stacks.found.iter().take(LISTED) {
        write!(
            to,
            "  {title:8} {} by {}",
            Count(*sockets as u64),
            stacks::call(stack.via)
        )?;
        title = "";
        match stacks::own(stack) {
            Some(own) => writeln!(to, " in {}", Place(own))?,
            None => writeln!(to)?,
        }
        frames(to, stack)?;
    }
    if let Some(more @ 1..) = stacks.found.len().checked_sub(LISTED) {
        writeln!(
            to,
            "           ... and {} from {} other {}",
            Count(stacks.others(LISTED) as u64),
            Count(more as u64),
            plural(more, "place", "places")
        )?;
    }
    for (why, count) in &stacks.without {
        let (count, were) = (Count(*count as u64), plural(*count, "was", "were"));
        write!(to, "  {title:8} ")?;
        title = "";
        match why {
            Without::Before => writeln!(
                to,
                "{count} {were} opened before tcptrace began, or unseen: no stack"
            ),
            Without::NotAccepted => writeln!(to, "{count} {were} never accepted: no stack"),
            Without::Untold => writeln!(
                to,
                "{count} without a stack: its record was lost, or the call is not followed here"
            ),
            Without::Pending => writeln!(to, "{count} of which the names are still looked up"),
        }?;
    }
    Ok(())
}

fn frames(to: &mut String, stack: &Stack) -> Written {
    for frame in stack.frames.iter().take(FRAMES) {
        writeln!(to, "             {}", Place(frame))?;
    }
    if let Some(more @ 1..) = stack.frames.len().checked_sub(FRAMES) {
        writeln!(to, "             ... and {} more", Count(more as u64))?;
    }
    if stack.by_frame_pointer > 0 {
        writeln!(
            to,
            "             {} of them found by frame pointers, which leave out code that has none",
            Count(stack.by_frame_pointer.into())
        )?;
    }
    let Some(why) = stacks::why_no_more(stack.end) else {
        return Ok(());
    };
    match stack.frames.len() {
        0 => writeln!(to, "             no frames: {why}"),
        found => writeln!(
            to,
            "             {found} {} found, no more: {why}",
            plural(found, "frame", "frames")
        ),
    }
}

/// A function and where it is, as far as that is known.
struct Place<'a>(&'a Frame);

impl<'a> std::fmt::Display for Place<'a> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        let frame = self.0;
        // A recording may say anything.
        let printable = |text: &'a str| Printable(text.as_bytes());
        let module = printable(frame.module.as_deref().unwrap_or("made at run time"));
        let address = frame.address;
        let function = frame.function.as_deref().map(printable);
        let file = frame.file.as_deref().map(printable);
        match (&function, &file) {
            (Some(function), Some(file)) => {
                write!(f, "{function} at {file}")?;
                if let Some(line) = frame.line {
                    write!(f, ":{line}")?;
                }
            }
            (Some(function), None) if frame.made => write!(f, "{function}")?,
            (Some(function), None) => write!(f, "{function} ({module} {address:#x})")?,
            (None, _) => write!(f, "? ({module} {address:#x})")?,
        }
        if frame.inlined {
            f.write_str(" (inlined)")?;
        }
        if let Some(unread) = frame.unread {
            write!(f, " [{}]", stacks::why_unread(unread))?;
        }
        Ok(())
    }
}

fn clear(to: &mut String, leak: &Leak) -> Written {
    for (index, clear) in leak.clear.iter().take(LISTED).enumerate() {
        let title = if index == 0 { "clear" } else { "" };
        write!(to, "  {title:8} {}", clear.command)?;
        if clear.others > 0 {
            write!(
                to,
                "   (would end {} other {} as well)",
                Count(clear.others as u64),
                plural(clear.others, "socket", "sockets")
            )?;
        }
        writeln!(to)?;
    }
    match leak.clear.len() {
        0 => Ok(()),
        lines if lines > LISTED => writeln!(to, "           ... and {} more lines", lines - LISTED),
        _ => writeln!(
            to,
            "           (ends the connections; a descriptor stays until its process closes it)"
        ),
    }
}

/// Leaks beyond those shown, by the names of their processes.
fn rest(to: &mut String, leaks: &[Leak]) -> Written {
    let mut names: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for leak in leaks {
        let name = leak
            .holders
            .first()
            .map_or("not known".to_owned(), |holding| holding.comm.to_string());
        let (processes, sockets) = names.entry(name).or_default();
        *processes += 1;
        *sockets += leak.sockets.len();
    }
    let mut names: Vec<_> = names.into_iter().collect();
    names.sort_by_key(|(_, (_, sockets))| std::cmp::Reverse(*sockets));
    writeln!(
        to,
        "\n... and {} more processes:",
        Count(leaks.len() as u64)
    )?;
    for (name, (processes, sockets)) in names.iter().take(LEAKS) {
        writeln!(
            to,
            "  {name}: {} {}, {} {}",
            Count(*processes as u64),
            plural(*processes, "process", "processes"),
            Count(*sockets as u64),
            plural(*sockets, "socket", "sockets"),
        )?;
    }
    match names.len().checked_sub(LEAKS) {
        Some(more @ 1..) => writeln!(to, "  ... and {} more names", Count(more as u64)),
        _ => Ok(()),
    }
}

/// A limit as it was typed, more or less: 60 s.
struct Plain(f64);

impl std::fmt::Display for Plain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        match self.0 {
            seconds if seconds <= 120.0 => write!(f, "{seconds} s"),
            seconds => Duration(seconds).fmt(f),
        }
    }
}

/// How fast.
struct Rate(f64);

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        let rate = self.0.abs();
        if rate < 0.05 {
            return f.write_str("not growing");
        }
        let word = if self.0 > 0.0 { "more" } else { "fewer" };
        if rate < 100.0 {
            write!(f, "{rate:.1} {word} a minute")
        } else {
            write!(f, "{} {word} a minute", Count(rate.round() as u64))
        }
    }
}

/// How old.
struct Aged(Age);

impl std::fmt::Display for Aged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        let before = if self.0.at_least { ">= " } else { "" };
        write!(f, "{before}{}", Duration(seconds(self.0.ns)))
    }
}

/// Whose the sockets are.
struct Who<'a>(&'a Leak);

impl std::fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        let holders = &self.0.holders;
        let Some(first) = holders.first() else {
            return f.write_str("Somebody");
        };
        write!(f, "{} (pid {}", first.comm, first.pid)?;
        for other in holders.iter().skip(1).take(2) {
            write!(f, ", {}", other.pid)?;
        }
        if let Some(more @ 1..) = holders.len().checked_sub(3) {
            write!(f, " and {more} more")?;
        }
        let container = first.process.as_ref().and_then(container);
        if let Some(container) = container {
            let short: String = container.chars().take(12).collect();
            write!(f, ", {}", Printable(short.as_bytes()))?;
        }
        match self.0.via {
            None | Some(Via::Holder) => f.write_str(")"),
            Some(via) => write!(f, ", known by {via})"),
        }
    }
}

fn container(process: &Process) -> Option<&str> {
    process.container.as_deref()
}

/// What a process did, or did not do, with how many sockets.
fn did(leak: &Leak, cause: Cause, count: usize, limit: f64) -> String {
    let sockets = plural(count, "socket", "sockets");
    let connections = plural(count, "connection", "connections");
    let count = Count(count as u64);
    match cause {
        Cause::Drained => format!("has read everything and never closed {count} {sockets}"),
        Cause::EofUnread => format!("has not read the end of file of {count} {sockets}"),
        Cause::NotAccepted => {
            format!("has not accepted {count} {connections} that the peer has closed")
        }
        Cause::WriteBlocked => {
            format!("is writing to a peer that takes nothing any more on {count} {sockets}")
        }
        Cause::Finished => format!(
            "never closed the {} of {count} finished {connections} (ss does not list them)",
            plural(leak.sockets.len(), "descriptor", "descriptors")
        ),
        Cause::Unknown => format!(
            "has {count} {sockets} in {} for longer than {}",
            leak.state.name(),
            Plain(limit)
        ),
    }
}

/// A line about one socket.
struct Sample<'a> {
    socket: &'a Leaked,
    leak: &'a Leak,
}

impl std::fmt::Display for Sample<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        let Self { socket, leak } = self;
        let fds: Vec<String> = socket
            .fds
            .iter()
            .take(LISTED)
            .map(|(pid, fd)| match leak.holders.len() {
                0 | 1 => format!("fd {fd}"),
                _ => format!("fd {fd} of {pid}"),
            })
            .collect();
        let fds = if fds.is_empty() {
            "no fd".to_owned()
        } else {
            fds.join(", ")
        };
        let tuple = &socket.socket.tuple;
        let side = |addr: IpAddr, port: u16| match port {
            0 => "*".to_owned(),
            port => SocketAddr::new(addr, port).to_string(),
        };
        let pair = format!(
            "{} > {}",
            side(tuple.local(), tuple.local_port),
            side(tuple.remote(), tuple.remote_port)
        );
        write!(f, "{fds:8} {pair:44}")?;
        match (socket.age, socket.idle) {
            (Some(age), _) => write!(f, " {:>14}", Aged(age).to_string())?,
            (None, Some(idle)) => write!(f, " idle {:>9}", Duration(seconds(idle)).to_string())?,
            (None, None) => write!(f, " {:>14}", "-")?,
        }
        write!(f, "  {}", socket.cause.name())?;
        if socket.orderly == Some(false) {
            write!(f, " (reset or timed out)")?;
        }
        if socket.at_exit {
            write!(f, ", closed only by the end of its process")?;
        }
        Ok(())
    }
}

/// How long sockets stay in the states.
fn dwell(to: &mut String, watch: &Watch, tracker: &Tracker, now: u64) -> Written {
    let all = watch.dwell(tracker, now);
    for state in State::ALL {
        let rows: Vec<_> = all.iter().filter(|dwell| dwell.state == state).collect();
        if rows.is_empty() {
            continue;
        }
        let title = format!("time in {}", state.name());
        writeln!(
            to,
            "\n{title:38} {:>8} {:>12} {:>12} {:>12} {:>12}",
            "sockets", "p50", "p90", "p99", "max"
        )?;
        for dwell in rows.iter().take(LEAKS) {
            let name = match dwell.process {
                Some((pid, comm)) => format!("{comm} (pid {pid})"),
                None => "not known".to_owned(),
            };
            for (what, times) in [("ended", &dwell.finished), ("still in it", &dwell.open)] {
                if let Some(times) = times {
                    let title = format!("  {name}, {what}");
                    writeln!(to, "{title:38} {}", Quantiles(times))?;
                }
            }
        }
        if let Some(more @ 1..) = rows.len().checked_sub(LEAKS) {
            writeln!(to, "  ... and {} more processes", Count(more as u64))?;
        }
    }
    Ok(())
}

struct Quantiles<'a>(&'a Times);

impl std::fmt::Display for Quantiles<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> Written {
        write!(f, "{:>8}", Count(self.0.count()).to_string())?;
        let Some(quantiles) = self.0.quantiles() else {
            return write!(f, "  began before the trace: not known for how long");
        };
        for seconds in [quantiles.p50, quantiles.p90, quantiles.p99, quantiles.max] {
            write!(f, " {:>12}", Duration(seconds).to_string())?;
        }
        if self.0.not_timed > 0 {
            write!(f, "  ({} not timed)", Count(self.0.not_timed))?;
        }
        if self.0.at_least > 0 {
            write!(f, "  ({} at least)", Count(self.0.at_least))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_a_hostile_recording_are_printable() {
        let name = || Some("\u{1b}[2J\n\u{202e}".into());
        let frame = |function, file| Frame {
            function,
            file,
            line: Some(1),
            module: name(),
            ..Frame::default()
        };
        let named = [
            frame(name(), name()),
            frame(name(), None),
            frame(None, None),
            Frame {
                made: true,
                ..frame(name(), None)
            },
        ];
        for frame in &named {
            let shown = Place(frame).to_string();
            assert!(shown.starts_with("\\u{1b}[2J\\n\\u{202e}") || shown.starts_with("? ("));
            assert!(
                !shown.contains(|char: char| char.is_control() || char == '\u{202e}'),
                "{shown:?}"
            );
        }
    }
}
