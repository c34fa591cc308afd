//! Running a command: from the source through the tracker to the view.

mod fuzz;
mod leaks;
mod record;
mod signals;
mod states;
mod watch;

use std::{fs::File, io};

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;

pub(crate) use fuzz::fuzz;

use crate::{
    cli::{Cli, Command, Common, Doctor, Format, LiveOptions},
    doctor,
    event::{End, Event},
    kernel::probes,
    output::Output,
    select::Selection,
    source::{self, Tracing},
    stream, timewait,
    tracker::Tracker,
    view::View,
};

use signals::Signals;
use watch::watch;

/// A recording's facts are written when so many events have gathered.
const FILE_BATCH: u32 = 4096;
/// What the sink of most commands is called in an error.
const STDOUT: &str = "standard output";

/// Does what the command line says. Returns the exit code.
///
/// # Errors
/// Anything that keeps it from doing that: one sentence with what, why, and how to fix it.
pub fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Leaks(args) => return leaks::run(args),
        Command::Stream(args) => {
            let selection = args.owners.selection(args.sockets, args.states);
            match args.common.output {
                Format::Json => trace(&args.common, selection, stream::Json::new),
                Format::Text => trace(&args.common, selection, stream::Text::new),
            }
        }
        Command::Timewait(args) => {
            let selection = args.owners.selection(args.sockets, Vec::new());
            match args.common.output {
                Format::Json => trace(&args.common, selection, timewait::Json::new),
                Format::Text => trace(&args.common, selection, timewait::Text::new),
            }
        }
        Command::States(args) => states::run(args),
        Command::Record(args) => record::run(args),
        Command::Doctor(args) => return doctor(&args),
    }
    .map(|()| 0)
}

/// `tcptrace doctor`.
fn doctor(args: &Doctor) -> Result<u8> {
    let report = doctor::examine();
    let mut out = Output::stdout(args.no_color);
    match args.output {
        Format::Json => doctor::json::write(&report, &mut out.buffer),
        Format::Text => doctor::text::write(&report, out.color, &mut out.buffer),
    }
    out.flush().map_err(to_stdout)?;
    Ok(report.verdict().exit_code())
}

/// Traces, or replays, and shows what it finds in the view that `new` makes.
fn trace<V: View>(
    common: &Common,
    selection: Selection,
    new: impl FnOnce(Output) -> V,
) -> Result<()> {
    let mut out = Output::stdout(common.no_color);
    if let Some(path) = &common.from {
        let file = source::File::open(path)?;
        return replay(file, selection, &mut new(out));
    }
    let options = options(&common.live, &selection);
    let queue = out.queued();
    let output = watch::Output {
        queue,
        name: STDOUT.into(),
    };
    watch(&common.live, options, &[], selection, &mut new(out), output).map(|_| ())
}

/// Whether the error is a reader that went away.
#[must_use]
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Shows a recording.
fn replay(mut file: source::File, selection: Selection, view: &mut impl View) -> Result<()> {
    let mut tracker = Tracker::new(selection);
    let mut now = 0;
    let mut end = None;
    let mut count = 0_u32;
    let ended = loop {
        let looked = match file.next_event() {
            Ok(Some(event)) => {
                take(&mut tracker, view, &event, &mut now, &mut end);
                matches!(event, Event::LookEnd { .. })
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        count = count.wrapping_add(1);
        // What a look shows is true now, and perhaps not any more with the next event.
        if looked || count.is_multiple_of(FILE_BATCH) {
            view.flush(&tracker, now).map_err(to_stdout)?;
        }
    };
    // A recording that was cut off ends where it was cut off.
    let end = end.unwrap_or(End {
        time: now,
        records: 0,
        lost: 0,
        mptcp: 0,
    });
    if ended.is_ok() || count > 0 {
        view.end(&tracker, &end).map_err(to_stdout)?;
    }
    Ok(ended?)
}

/// What a write to standard output failed for, and what to do.
fn to_stdout(error: io::Error) -> io::Error {
    watch::not_written(STDOUT, error)
}

/// An event, through the tracker, to the view.
fn take(
    tracker: &mut Tracker,
    view: &mut impl View,
    event: &Event,
    now: &mut u64,
    end: &mut Option<End>,
) {
    match event {
        Event::Start(start) => view.clock(start.time, start.boot_to_utc_ns),
        Event::Clock {
            time,
            boot_to_utc_ns,
            ..
        } => view.clock(*time, *boot_to_utc_ns),
        Event::End(ended) => *end = Some(*ended),
        _ => {}
    }
    *now = event.time().unwrap_or(0).max(*now);
    tracker.feed(event, &mut |fact| view.fact(fact));
}

fn options(live: &LiveOptions, selection: &Selection) -> source::Options {
    source::Options {
        tracing: Tracing::Required(probes::Settings {
            config: selection.to_config(),
            buffer: live.buffer,
            time_wait: selection.needs_time_wait(),
            accept: selection.needs_accept(),
            only: live.probes.kind(),
            log: live.probe_log,
        }),
        sockets: selection.sockets.clone(),
        piles: None,
        duration: live.duration,
    }
}

fn runtime() -> Result<Runtime> {
    // tokio panics where it has no descriptors left for what wakes it of signals: it makes five in all.
    let room: io::Result<Vec<File>> = (0..8).map(|_| File::open("/dev/null")).collect();
    drop(room.context("cannot start the runtime")?);
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("cannot start the runtime")
}
