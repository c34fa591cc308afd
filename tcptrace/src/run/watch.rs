//! The one live loop: from the running kernel to what a command makes of it.

use std::{
    borrow::Cow,
    ffi::OsString,
    io,
    os::unix::ffi::OsStrExt as _,
    process::ExitStatus,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{Signals, runtime, take};
use crate::{
    cli::LiveOptions,
    command::Program,
    event::{End, Event, Printable},
    invoker::{self, User},
    output::{Queue, Unwritten},
    select::Selection,
    source::{self, Live, Sink, Wake},
    tracker::{Needs, Tracker},
    view::View,
};

/// After a signal, or when the time is up: how long the last records and the last scan may take.
const LAST_WORK: Duration = Duration::from_secs(1);
/// After a signal: how long it may take until the last output is written.
pub(super) const LAST_OUTPUT: Duration = Duration::from_millis(1500);

/// What a command makes of events.
pub(super) trait Consumer {
    /// Takes an event.
    fn event(&mut self, event: &Event);

    /// What would help to go on.
    fn needs(&self) -> Needs;

    /// Hands over the output that has gathered.
    ///
    /// # Errors
    /// Why output was not taken.
    fn flush(&mut self) -> io::Result<()>;
}

/// Where a command's output goes.
pub(super) struct Output {
    /// In front of the sink.
    pub(super) queue: Queue,
    /// The sink, as an error calls it.
    pub(super) name: Cow<'static, str>,
}

/// Shows what happens, while `program` runs if there is one. Returns how that ended.
pub(super) fn watch(
    args: &LiveOptions,
    options: source::Options,
    program: &[OsString],
    selection: Selection,
    view: &mut impl View,
    output: Output,
) -> Result<Option<ExitStatus>> {
    let mut show = Show {
        tracker: Tracker::new(selection),
        view,
        now: 0,
        end: None,
    };
    live(args, options, program, &mut show, &output)
}

/// Shows facts.
struct Show<'a, V> {
    tracker: Tracker,
    view: &'a mut V,
    now: u64,
    end: Option<End>,
}

impl<V: View> Consumer for Show<'_, V> {
    fn event(&mut self, event: &Event) {
        take(
            &mut self.tracker,
            self.view,
            event,
            &mut self.now,
            &mut self.end,
        );
    }

    fn needs(&self) -> Needs {
        self.tracker.needs()
    }

    fn flush(&mut self) -> io::Result<()> {
        match &self.end {
            Some(end) => self.view.end(&self.tracker, end),
            None => self.view.flush(&self.tracker, self.now),
        }
    }
}

/// What ends a command.
enum Until {
    /// Nothing yet: a program is going to be started, which then has the signals.
    Killed,
    Signals(Signals),
    Program(Program),
}

/// A consumer, and everything that may end it.
struct Session<'a, C> {
    consumer: &'a mut C,
    queue: &'a Queue,
    until: Until,
    /// The first failure of the output ends it all.
    failed: io::Result<()>,
}

impl<C: Consumer> Session<'_, C> {
    /// Waits for what ends it.
    async fn ends(&mut self) {
        if self.failed.is_err() {
            return;
        }
        let until = async {
            match &mut self.until {
                Until::Killed => std::future::pending().await,
                Until::Signals(signals) => signals.come().await,
                // An error is told again when it is asked how the program ended.
                Until::Program(program) => drop(program.ended().await),
            }
        };
        tokio::select! {
            () = until => {}
            () = self.queue.failed() => {}
        }
    }
}

impl<C: Consumer> Sink for Session<'_, C> {
    fn emit(&mut self, event: &Event) {
        if self.failed.is_ok() {
            self.consumer.event(event);
        }
    }

    fn flush(&mut self) {
        if self.failed.is_ok() {
            self.failed = self.consumer.flush();
        }
    }

    fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    fn wait_room(&mut self, limit: Duration) -> bool {
        self.queue.wait_room(limit)
    }

    fn is_over(&mut self) -> bool {
        self.failed.is_err()
            || match &mut self.until {
                Until::Killed => false,
                Until::Signals(signals) => signals.have_come(),
                Until::Program(program) => program.has_ended(),
            }
    }
}

/// Traces until a signal, until the time is up, or, if there is a program to run, until that has ended: then
/// it says how.
pub(super) fn live(
    args: &LiveOptions,
    options: source::Options,
    program: &[OsString],
    consumer: &mut impl Consumer,
    output: &Output,
) -> Result<Option<ExitStatus>> {
    let mut stopped = None;
    let ended: Result<_> = runtime()?.block_on(async {
        // With a program, signals are for that.
        let until = match program {
            [] => Until::Signals(Signals::new()?),
            _ => Until::Killed,
        };
        let mut live = Live::start(options)?;
        if args.probe_log
            && let Some(ebpf) = live.ebpf()
        {
            crate::probe_log::start(ebpf)?;
        }
        let mut session = Session {
            consumer,
            queue: &output.queue,
            until,
            failed: Ok(()),
        };
        let unseen = live
            .begin(&mut session)
            .context("cannot look at the sockets that exist")?;
        for reason in live.degraded().iter().chain(&unseen) {
            eprintln!("tcptrace: {reason}");
        }
        if let [name, ..] = program {
            let user = match args.as_root {
                true => None,
                false => announce(invoker::find()?, name),
            };
            session.until = Until::Program(Program::start(program, user.as_ref())?);
        }
        if live.is_traced() && program.is_empty() {
            eprintln!("tcptrace: tracing");
        }
        loop {
            let needs = session.consumer.needs();
            let wake = live.wait(needs, session.ends()).await;
            if wake == Wake::Stop {
                let is_brief = live.is_traced() && program.is_empty();
                if session.is_over() {
                    stopped = Some(Instant::now());
                }
                live.finish(needs, is_brief.then_some(LAST_WORK), &mut session)?;
                session.flush();
                break;
            }
            live.work(needs, &mut session)?;
        }
        session
            .failed
            .map_err(|error| not_written(&output.name, error))?;
        Ok(match &mut session.until {
            Until::Program(program) => Some(program.ended().await?),
            Until::Signals(_) | Until::Killed => None,
        })
    });
    // Whatever ended it: what is queued is written. A program that has ended has its status waited for by nobody.
    let deadline = stopped
        .filter(|_| program.is_empty())
        .map(|at| at + LAST_OUTPUT);
    let closed = output.queue.close(LAST_OUTPUT, deadline);
    let ended = ended?;
    closed.map_err(|error| not_written(&output.name, error))?;
    Ok(ended)
}

/// As whom a program is run, once that is said.
fn announce(user: Option<User>, program: &OsString) -> Option<User> {
    let user = user?;
    let name = Printable(program.as_bytes());
    eprintln!(
        "tcptrace: running {name} as {user}, who called {}; --as-root runs it as root",
        user.through
    );
    Some(user)
}

/// What was not written to `sink` for this reason, and what to do. A file that tcptrace made explains its errors itself.
pub(super) fn not_written(sink: &str, error: io::Error) -> io::Error {
    let fix = match error.get_ref() {
        Some(inner) if inner.is::<Unwritten>() => "let that go on reading",
        Some(_) => return error,
        None => "make room, or send it elsewhere",
    };
    let what = format!("cannot write to {sink}: {error}; {fix}");
    io::Error::new(error.kind(), what)
}
