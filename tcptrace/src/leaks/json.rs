//! Reports for programs: a line for each leak, and one that ends the report.

use std::{io, net::IpAddr};

use serde::Serialize;

use super::{
    Options, Watch,
    dwell::{Dwell, Quantiles, Times},
    report::{Holding, Leak, Leaked, Report},
    stacks::{Stacks, Without},
};
use crate::{
    event::{self, End},
    json::{self, Lines, Name, SocketFields, Time, seconds},
    output::Output,
    tracker::{Fact, Tracker},
    view::View,
};

/// How many sockets of a leak, and how many of its remotes and ports, are listed.
const LISTED: usize = 10;
/// How many stacks of a leak, the most common.
const STACKS: usize = 50;

/// A line for each leak.
pub struct Json {
    watch: Watch,
    lines: Lines,
    out: Output,
}

impl Json {
    /// Writes to `out`.
    #[must_use]
    pub fn new(out: Output, options: Options) -> Self {
        Self {
            watch: Watch::new(options),
            lines: Lines::new(),
            out,
        }
    }

    /// Whether the last report tells of a leak.
    #[must_use]
    pub fn has_leak(&self) -> bool {
        !self.watch.report.leaks.is_empty()
    }

    fn report(&mut self, tracker: &Tracker) {
        let report = &self.watch.report;
        let time = self.lines.time(report.time);
        for leak in &report.leaks {
            let stacks = leak.stacks.as_ref().filter(|_| self.watch.options.stacks);
            let line = LeakLine::new(leak, stacks, report.time, &self.lines);
            json::line(&mut self.out.buffer, &line);
        }
        let line = ReportLine::new(report, time, &self.watch, tracker);
        json::line(&mut self.out.buffer, &line);
    }

    fn dwell(&mut self, tracker: &Tracker, now: u64) {
        for dwell in self.watch.dwell(tracker, now) {
            let line = DwellLine::new(&dwell, self.lines.time(now));
            json::line(&mut self.out.buffer, &line);
        }
    }
}

impl View for Json {
    fn clock(&mut self, _: u64, boot_to_utc_ns: i64) {
        self.lines.clock(boot_to_utc_ns);
    }

    fn fact(&mut self, fact: Fact<'_>) {
        if let Fact::Lost(lost) = fact {
            self.lines.lost(&mut self.out.buffer, &lost);
        }
        self.watch.fact(fact);
    }

    fn flush(&mut self, tracker: &Tracker, now: u64) -> io::Result<()> {
        if self.watch.look_meanwhile(tracker) == Some(true) && !self.watch.options.once {
            self.report(tracker);
            if self.watch.options.dwell {
                self.dwell(tracker, now);
            }
        }
        self.out.flush()
    }

    fn end(&mut self, tracker: &Tracker, end: &End) -> io::Result<()> {
        // Also if it is no news: ages, and how fast it grows, are.
        if self.watch.look(tracker).is_some() || self.watch.options.once {
            self.report(tracker);
        }
        self.dwell(tracker, end.time);
        self.lines.end(&mut self.out.buffer, end);
        self.out.flush()
    }
}

#[derive(Serialize)]
struct LeakLine<'a> {
    event: &'static str,
    time: Time,
    state: &'static str,
    pid: Option<u32>,
    comm: Option<Name>,
    exe: Option<&'a str>,
    cmdline: Option<&'a str>,
    unit: Option<&'a str>,
    container: Option<&'a str>,
    via: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    sockets: usize,
    oldest_seconds: Option<f64>,
    oldest_at_least: bool,
    per_minute: Option<f64>,
    fd_limit: Option<u64>,
    fds: Option<u32>,
    full_in_seconds: Option<f64>,
    unread_bytes: u64,
    causes: Causes,
    holders: Vec<HolderFields<'a>>,
    remotes: Vec<RemoteFields>,
    local_ports: Vec<PortFields>,
    samples: Vec<SampleFields>,
    clear: Vec<ClearFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stacks: Option<Vec<StackFields<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stacks_other: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    without_stack: Option<WithoutStack<'a>>,
}

#[derive(Serialize)]
struct StackFields<'a> {
    sockets: usize,
    via: event::Via,
    complete: bool,
    end: event::StackEnd,
    by_frame_pointer: u32,
    frames: Vec<FrameFields<'a>>,
}

#[derive(Serialize)]
struct FrameFields<'a> {
    function: Option<&'a str>,
    file: Option<&'a str>,
    line: Option<u32>,
    module: Option<&'a str>,
    address: String,
    inlined: bool,
    main: bool,
    unread: Option<event::Unread>,
}

/// An object of counts by reason.
struct WithoutStack<'a>(&'a [(Without, usize)]);

impl Serialize for WithoutStack<'_> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(why, count)| (why.name(), count)))
    }
}

impl<'a> StackFields<'a> {
    fn new(sockets: usize, stack: &'a event::Stack) -> Self {
        Self {
            sockets,
            via: stack.via,
            complete: stack.end == event::StackEnd::Outermost,
            end: stack.end,
            by_frame_pointer: stack.by_frame_pointer,
            frames: stack.frames.iter().map(FrameFields::new).collect(),
        }
    }
}

impl<'a> FrameFields<'a> {
    fn new(frame: &'a event::Frame) -> Self {
        Self {
            function: frame.function.as_deref(),
            file: frame.file.as_deref(),
            line: frame.line,
            module: frame.module.as_deref(),
            address: format!("{:#x}", frame.address),
            inlined: frame.inlined,
            main: frame.main,
            unread: frame.unread,
        }
    }
}

#[derive(Serialize)]
struct HolderFields<'a> {
    pid: u32,
    comm: Name,
    sockets: usize,
    exe: Option<&'a str>,
    cmdline: Option<&'a str>,
    uid: Option<u32>,
    unit: Option<&'a str>,
    container: Option<&'a str>,
    started: Time,
    ns_pid: Option<u32>,
    fds: Option<u32>,
    fd_limit: Option<u64>,
}

#[derive(Serialize)]
struct RemoteFields {
    addr: IpAddr,
    port: Option<u16>,
    sockets: usize,
}

#[derive(Serialize)]
struct PortFields {
    port: u16,
    sockets: usize,
}

#[derive(Serialize)]
struct ClearFields<'a> {
    command: &'a str,
    others: usize,
}

#[derive(Serialize)]
struct SampleFields {
    #[serde(flatten)]
    socket: SocketFields,
    age_seconds: Option<f64>,
    age_at_least: bool,
    idle_seconds: Option<f64>,
    cause: &'static str,
    recv_queue: u32,
    send_queue: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    orderly: Option<bool>,
    fds: Vec<FdFields>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    at_exit: bool,
}

#[derive(Serialize)]
struct FdFields {
    pid: u32,
    fd: u32,
}

/// An object of counts by cause.
struct Causes(Vec<(super::Cause, usize)>);

impl Serialize for Causes {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(cause, count)| (cause.name(), count)))
    }
}

impl<'a> LeakLine<'a> {
    fn new(leak: &'a Leak, stacks: Option<&'a Stacks>, time: u64, lines: &Lines) -> Self {
        let first = leak.holders.first();
        let process = first.and_then(|holding| holding.process.as_ref());
        let oldest = leak.oldest();
        Self {
            event: "leak",
            time: lines.time(time),
            state: leak.state.name(),
            pid: first.map(|holding| holding.pid),
            comm: first.map(|holding| Name(holding.comm)),
            exe: process.and_then(|process| process.exe.as_deref()),
            cmdline: process.and_then(|process| process.cmdline.as_deref()),
            unit: process.and_then(|process| process.unit.as_deref()),
            container: process.and_then(|process| process.container.as_deref()),
            via: leak.via.map(crate::tracker::Via::name),
            uid: leak.uid,
            sockets: leak.sockets.len(),
            oldest_seconds: oldest.map(|age| seconds(age.ns)),
            oldest_at_least: oldest.is_some_and(|age| age.at_least),
            per_minute: leak.per_minute,
            fd_limit: process.and_then(|process| process.fd_limit),
            fds: process.and_then(|process| process.fds),
            full_in_seconds: leak.full_in().map(|(_, seconds)| seconds),
            unread_bytes: leak.unread(),
            causes: Causes(leak.causes()),
            holders: leak
                .holders
                .iter()
                .map(|holding| HolderFields::new(holding, leak.sockets.len(), lines))
                .collect(),
            remotes: leak
                .remotes()
                .into_iter()
                .take(LISTED)
                .map(|remote| RemoteFields {
                    addr: remote.addr,
                    port: remote.port,
                    sockets: remote.sockets,
                })
                .collect(),
            local_ports: leak
                .local_ports()
                .into_iter()
                .take(LISTED)
                .map(|(port, sockets)| PortFields { port, sockets })
                .collect(),
            samples: leak
                .sockets
                .iter()
                .take(LISTED)
                .map(SampleFields::new)
                .collect(),
            clear: leak
                .clear
                .iter()
                .map(|clear| ClearFields {
                    command: &clear.command,
                    others: clear.others,
                })
                .collect(),
            stacks: stacks.map(|stacks| {
                let found = stacks.found.iter().take(STACKS);
                found
                    .map(|(sockets, stack)| StackFields::new(*sockets, stack))
                    .collect()
            }),
            stacks_other: stacks.map(|stacks| stacks.others(STACKS)),
            without_stack: stacks.map(|stacks| WithoutStack(&stacks.without)),
        }
    }
}

impl<'a> HolderFields<'a> {
    fn new(holding: &'a Holding, sockets: usize, lines: &Lines) -> Self {
        let process = holding.process.as_ref();
        Self {
            pid: holding.pid,
            comm: Name(holding.comm),
            sockets,
            exe: process.and_then(|process| process.exe.as_deref()),
            cmdline: process.and_then(|process| process.cmdline.as_deref()),
            uid: process.and_then(|process| process.uid),
            unit: process.and_then(|process| process.unit.as_deref()),
            container: process.and_then(|process| process.container.as_deref()),
            started: lines.time(holding.start),
            ns_pid: holding.ns_pid(),
            fds: process.and_then(|process| process.fds),
            fd_limit: process.and_then(|process| process.fd_limit),
        }
    }
}

impl SampleFields {
    fn new(leaked: &Leaked) -> Self {
        Self {
            socket: SocketFields::new(&leaked.socket),
            age_seconds: leaked.age.map(|age| seconds(age.ns)),
            age_at_least: leaked.age.is_some_and(|age| age.at_least),
            idle_seconds: leaked.idle.map(seconds),
            cause: leaked.cause.name(),
            recv_queue: leaked.recv_queue,
            send_queue: leaked.send_queue,
            orderly: leaked.orderly,
            fds: leaked
                .fds
                .iter()
                .map(|(pid, fd)| FdFields { pid: *pid, fd: *fd })
                .collect(),
            at_exit: leaked.at_exit,
        }
    }
}

/// The last line of a report.
#[derive(Serialize)]
struct ReportLine {
    event: &'static str,
    time: Time,
    older_than_seconds: f64,
    leaks: usize,
    sockets: usize,
    younger: usize,
    half_closed: usize,
    traced: bool,
    lost: u64,
}

impl ReportLine {
    fn new(report: &Report, time: Time, watch: &Watch, tracker: &Tracker) -> Self {
        Self {
            event: "report",
            time,
            older_than_seconds: seconds(watch.options.criteria.older_than),
            leaks: report.leaks.len(),
            sockets: report.sockets(),
            younger: report.younger,
            half_closed: report.half_closed,
            traced: tracker.is_traced(),
            lost: watch.lost,
        }
    }
}

#[derive(Serialize)]
struct DwellLine {
    event: &'static str,
    time: Time,
    state: &'static str,
    pid: Option<u32>,
    comm: Option<Name>,
    finished: Option<TimesFields>,
    open: Option<TimesFields>,
}

#[derive(Serialize)]
struct TimesFields {
    count: u64,
    not_timed: u64,
    at_least: u64,
    p50_seconds: Option<f64>,
    p90_seconds: Option<f64>,
    p99_seconds: Option<f64>,
    max_seconds: Option<f64>,
}

impl DwellLine {
    fn new(dwell: &Dwell, time: Time) -> Self {
        Self {
            event: "dwell",
            time,
            state: dwell.state.name(),
            pid: dwell.process.map(|(pid, _)| pid),
            comm: dwell.process.map(|(_, comm)| Name(comm)),
            finished: dwell.finished.as_ref().map(TimesFields::new),
            open: dwell.open.as_ref().map(TimesFields::new),
        }
    }
}

impl TimesFields {
    fn new(times: &Times) -> Self {
        let quantiles = times.quantiles();
        let of = |which: fn(&Quantiles) -> f64| quantiles.as_ref().map(which);
        Self {
            count: times.count(),
            not_timed: times.not_timed,
            at_least: times.at_least,
            p50_seconds: of(|q| q.p50),
            p90_seconds: of(|q| q.p90),
            p99_seconds: of(|q| q.p99),
            max_seconds: of(|q| q.max),
        }
    }
}
