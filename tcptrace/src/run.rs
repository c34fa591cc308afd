//! Running a command: from the source through the tracker to the view.

mod leaks;
mod states;

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    process::ExitStatus,
};

use anyhow::{Context as _, Result};
use tcptrace_ebpf::State;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    cli::{Cli, Command, Common, Doctor, Format, LiveOptions, Record},
    command::Program,
    doctor,
    event::{self, End, Event},
    kernel::probes,
    output::Output,
    select::Selection,
    source::{self, Live, Piles, Tracing, Wake},
    stream, timewait,
    tracker::{Needs, Tracker},
    view::View,
};

/// A recording's facts are written when so many events have gathered.
const FILE_BATCH: u32 = 4096;

/// Does what the command line says. Returns the exit code.
///
/// # Errors
/// Anything that keeps it from doing that: one sentence with what, why, and how to fix it.
pub fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Leaks(args) => return leaks::run(args),
        Command::Stream(args) => {
            let selection = args.owners.selection(args.sockets, args.states);
            let out = Output::stdout(args.common.no_color);
            match args.common.output {
                Format::Json => trace(&args.common, selection, stream::Json::new(out)),
                Format::Text => trace(&args.common, selection, stream::Text::new(out)),
            }
        }
        Command::Timewait(args) => {
            let selection = args.owners.selection(args.sockets, Vec::new());
            let out = Output::stdout(args.common.no_color);
            match args.common.output {
                Format::Json => trace(&args.common, selection, timewait::Json::new(out)),
                Format::Text => trace(&args.common, selection, timewait::Text::new(out)),
            }
        }
        Command::States(args) => states::run(args),
        Command::Record(args) => record(args),
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

/// Traces, and shows what it finds.
fn trace(common: &Common, selection: Selection, mut view: impl View) -> Result<()> {
    let options = options(&common.live, &selection);
    show(common, options, selection, &mut view)?;
    Ok(())
}

/// Whether the error is a reader that went away.
#[must_use]
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Shows events, live or from a file.
fn show(
    common: &Common,
    options: source::Options,
    selection: Selection,
    view: &mut impl View,
) -> Result<()> {
    match &common.from {
        Some(path) => replay(path, selection, view),
        None => watch(&common.live, options, &[], selection, view).map(|_| ()),
    }
}

/// Shows what happens, while `program` runs if there is one. Returns how that ended.
fn watch(
    args: &LiveOptions,
    options: source::Options,
    program: &[OsString],
    selection: Selection,
    view: &mut impl View,
) -> Result<Option<ExitStatus>> {
    let mut tracker = Tracker::new(selection);
    let mut now = 0;
    let mut end = None;
    live(args, options, program, |step| match step {
        Step::Event(event) => {
            take(&mut tracker, view, event, &mut now, &mut end);
            Ok(())
        }
        Step::Needs(needs) => {
            *needs = tracker.needs();
            Ok(())
        }
        Step::Flush => match &end {
            Some(end) => view.end(&tracker, end),
            None => view.flush(&tracker, now),
        }
        .map_err(to_stdout),
    })
}

/// Shows a recording.
fn replay(path: &Path, selection: Selection, view: &mut impl View) -> Result<()> {
    let mut file = source::File::open(path)?;
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
    let what = format!("cannot write to standard output: {error}; make room, or send it elsewhere");
    io::Error::new(error.kind(), what)
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

/// Writes events to a file.
fn record(args: Record) -> Result<()> {
    let selection = Selection {
        sockets: args.sockets.sockets(),
        finished: true,
        ..Selection::default()
    };
    let name = args.file.display().to_string();
    let mut options = options(&args.live, &selection);
    if args.stacks {
        options.tracing.take_stacks(args.live.buffer);
    }
    options.piles = Some(Piles {
        states: [State::CloseWait].into_iter().collect(),
        every: args.interval,
        tree: false,
        only_last: false,
    });
    // What the tracker needs decides when is looked again, so that a replay can tell as much.
    let mut tracker = Tracker::new(selection);
    // Made with the first event: a trace that cannot start does not cost an older recording.
    let mut sink: Option<BufWriter<Box<dyn Write>>> = None;
    let mut line = Vec::new();
    let mut end = None;
    let traced = live(&args.live, options, &[], |step| match step {
        Step::Event(event) => {
            tracker.feed(event, &mut |_| {});
            if let Event::End(ended) = event {
                end = Some(*ended);
            }
            let sink = match &mut sink {
                Some(sink) => sink,
                None => sink.insert(create(&args.file)?),
            };
            line.clear();
            event::line::write(&mut line, event);
            sink.write_all(&line)
        }
        Step::Needs(needs) => {
            *needs = tracker.needs();
            Ok(())
        }
        Step::Flush => sink.as_mut().map_or(Ok(()), Write::flush),
    });
    match traced {
        Err(error) if sink.is_some() => {
            return Err(error.context(format!("the recording {name} is not complete")));
        }
        traced => drop(traced?),
    }
    if let Some(end) = end {
        eprintln!(
            "tcptrace: {} records written to {name}, {} lost",
            end.records, end.lost
        );
    }
    Ok(())
}

/// Where a recording goes; `-` is standard output.
fn create(path: &Path) -> io::Result<BufWriter<Box<dyn Write>>> {
    let sink: Box<dyn Write> = if path == Path::new("-") {
        Box::new(io::stdout())
    } else {
        let file = File::create(path).map_err(|error| {
            let what = format!(
                "cannot write the recording {}: {error}; give the path of a file that can be made",
                path.display()
            );
            io::Error::new(error.kind(), what)
        })?;
        Box::new(file)
    };
    Ok(BufWriter::with_capacity(1 << 16, sink))
}

fn options(live: &LiveOptions, selection: &Selection) -> source::Options {
    source::Options {
        tracing: Tracing::Required(probes::Settings {
            config: selection.to_config(),
            buffer: live.buffer.unwrap_or(probes::DEFAULT_BUFFER),
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
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("cannot start the runtime")
}

/// The signals that end a command in order: Ctrl-C and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From now on they do not end the program by themselves. To be called inside a runtime.
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for one of them.
    async fn come(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// What the live loop asks of a command.
enum Step<'a> {
    /// Take this.
    Event(&'a Event),
    /// Say what is needed next.
    Needs(&'a mut Needs),
    /// Write what has gathered.
    Flush,
}

/// Traces until a signal, until the time is up, or, if there is a program to run, until that has ended: then
/// it says how.
fn live(
    args: &LiveOptions,
    options: source::Options,
    program: &[OsString],
    mut step: impl FnMut(Step<'_>) -> io::Result<()>,
) -> Result<Option<ExitStatus>> {
    runtime()?.block_on(async {
        // With a program, signals are for that.
        let mut signals = match program {
            [] => Some(Signals::new()?),
            _ => None,
        };
        let mut live = Live::start(options)?;
        if args.probe_log
            && let Some(ebpf) = live.ebpf()
        {
            crate::probe_log::start(ebpf)?;
        }
        // The first error of the command ends it all; what it was is told at the end.
        let mut failed = Ok(());
        let mut each = |event: &Event| {
            if failed.is_ok() {
                failed = step(Step::Event(event));
            }
        };
        let unseen = live
            .begin(&mut each)
            .context("cannot look at the sockets that exist")?;
        for reason in live.degraded().iter().chain(&unseen) {
            eprintln!("tcptrace: {reason}");
        }
        let mut program = match program {
            [] => None,
            program => Some(Program::start(program)?),
        };
        // Not before: the program would have it, too.
        live.raise_file_limit();
        if live.is_traced() && program.is_none() {
            eprintln!("tcptrace: tracing");
        }
        loop {
            failed?;
            step(Step::Flush)?;
            let mut needs = Needs::default();
            step(Step::Needs(&mut needs))?;
            let stop = async {
                match (&mut program, &mut signals) {
                    // An error is told again when it is asked how the program ended.
                    (Some(program), _) => drop(program.ended().await),
                    (None, Some(signals)) => signals.come().await,
                    (None, None) => std::future::pending().await,
                }
            };
            let wake = live.wait(needs, stop).await;
            failed = Ok(());
            let mut each = |event: &Event| {
                if failed.is_ok() {
                    failed = step(Step::Event(event));
                }
            };
            if wake == Wake::Stop {
                live.finish(needs, &mut each)?;
                break;
            }
            live.work(needs, &mut each)?;
        }
        failed?;
        step(Step::Flush)?;
        Ok(match &mut program {
            Some(program) => Some(program.ended().await?),
            None => None,
        })
    })
}
