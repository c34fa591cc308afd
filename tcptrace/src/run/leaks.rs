//! `tcptrace leaks`: now, for as long as wanted, or while a program runs.

use std::{process::ExitStatus, time::Duration};

use anyhow::{Result, bail};
use tcptrace_ebpf::State;

use super::{
    STDOUT, options, replay,
    watch::{self, watch},
};
use crate::{
    cli::{Format, Leaks},
    command,
    event::States,
    leaks::{Criteria, Json, Options, Text},
    output::Output,
    select::{Knowledge, Selection},
    source::{self, Piles, Tracing},
    view::View,
};

/// How far apart `--once` looks twice.
const APART: Duration = Duration::from_secs(1);
/// Longer than that.
const NEVER: Duration = Duration::from_secs(86_400);

/// Runs it. Returns the exit code.
pub(super) fn run(mut args: Leaks) -> Result<u8> {
    args.common.live.as_root = args.as_root;
    let runs = !args.command.is_empty();
    if args.once && args.stacks {
        bail!(
            "--once looks at sockets that are there already, and no stack is kept of how they were opened; \
             leave --once out, to see from where sockets are opened from now on"
        );
    }
    let states: States = args.states.iter().copied().collect();
    // What is left open by a program that runs for seconds is a leak sooner.
    let default = |seconds, when_run| Duration::from_secs(if runs { when_run } else { seconds });
    let older_than = args.older_than.unwrap_or(default(60, 1));
    let view_options = Options {
        criteria: Criteria {
            states,
            older_than: u64::try_from(older_than.as_nanos()).unwrap_or(u64::MAX),
        },
        once: args.once || runs,
        at_end: args.once && args.common.from.is_none(),
        until_exit: runs,
        stacks: args.stacks,
        dwell: args.dwell,
    };
    let mut selection = args
        .owners
        .clone()
        .selection(args.sockets.clone(), args.states.clone());
    // Descriptors of connections that are over are leaked like those that the peer has left.
    selection.finished = states.contains(State::CloseWait);
    selection.tree = runs;
    // Holders are looked up. What has come and gone between two looks has an owner only if it had one from its
    // beginning; so has what a program leaves behind, and where it was opened.
    if !(runs || args.stacks || args.dwell)
        && selection.pids.is_empty()
        && selection.comms.is_empty()
    {
        selection.knowledge = Knowledge::Dwell;
    }
    let mut options = options(&args.common.live, &selection);
    options.tracing = match options.tracing {
        _ if args.once => {
            options.duration = Some(APART);
            Tracing::Off
        }
        Tracing::Required(mut settings) if runs => {
            settings.watch_descendants()?;
            Tracing::Required(settings)
        }
        Tracing::Required(settings) => Tracing::Preferred(settings),
        tracing => tracing,
    };
    if args.stacks {
        options.tracing.take_stacks();
    }
    options.piles = Some(Piles {
        states,
        every: match args.interval {
            _ if args.once => NEVER,
            interval => interval.unwrap_or(default(5, 1)),
        },
        tree: runs,
        only_last: args.once,
    });
    let (mut out, name) = match &args.report {
        Some(path) => (
            Output::file(path, args.force)?,
            format!("the report {}", path.display()),
        ),
        None if runs => (Output::stderr(), "standard error".to_owned()),
        None => (Output::stdout(args.common.no_color), STDOUT.to_owned()),
    };
    let output = args.common.from.is_none().then(|| watch::Output {
        queue: out.queued(),
        name: name.into(),
    });
    let (status, has_leak) = match args.common.output {
        Format::Json => {
            let mut view = Json::new(out, view_options);
            let status = go(&args, options, selection, &mut view, output)?;
            (status, view.has_leak())
        }
        Format::Text => {
            let mut view = Text::new(out, view_options);
            let status = go(&args, options, selection, &mut view, output)?;
            (status, view.has_leak())
        }
    };
    Ok(match status {
        _ if args.exit_code && has_leak => 1,
        Some(status) => command::exit_code(status),
        None => 0,
    })
}

fn go(
    args: &Leaks,
    options: source::Options,
    selection: Selection,
    view: &mut impl View,
    output: Option<watch::Output>,
) -> Result<Option<ExitStatus>> {
    match (&args.common.from, output) {
        (None, Some(output)) => {
            let live = &args.common.live;
            watch(live, options, &args.command, selection, view, output)
        }
        (Some(path), _) => replay(source::File::open(path)?, selection, view).map(|()| None),
        (None, None) => unreachable!("live output has a queue"),
    }
}
