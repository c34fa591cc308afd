//! `tcptrace record`: events, as they come in, into a file.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result};
use tcptrace_ebpf::State;

use super::{options, watch};
use crate::{
    cli::Record,
    event::{self, End, Event},
    new_file::{self, Content},
    output::{Output, Queue, Sink},
    select::Selection,
    source::Piles,
    tracker::{Needs, Tracker},
};

/// Runs it.
pub(super) fn run(args: Record) -> Result<()> {
    let selection = Selection {
        sockets: args.sockets.sockets(),
        finished: true,
        ..Selection::default()
    };
    let name = args.file.display().to_string();
    let mut options = options(&args.live, &selection);
    if args.stacks {
        options.tracing.take_stacks();
    }
    options.piles = Some(Piles {
        states: [State::CloseWait].into_iter().collect(),
        every: args.interval,
        tree: false,
        only_last: false,
    });
    // Opened with the first event: a trace that cannot start does not cost an older recording. And by the thread that
    // writes: nobody need read a FIFO.
    let (file, force) = (args.file.clone(), args.force);
    let is_open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&is_open);
    let queue = Queue::new(Box::new(move || {
        let sink = create(&file, force)?;
        opened.store(true, Ordering::Relaxed);
        Ok(sink)
    }));
    let mut recorder = Recorder {
        tracker: Tracker::new(selection),
        out: Output::to_queue(queue.clone()),
        end: None,
    };
    let output = watch::Output {
        queue,
        name: format!("the recording {name}").into(),
    };
    let watched = watch::live(&args.live, options, &[], &mut recorder, &output);
    if is_open.load(Ordering::Relaxed) {
        watched.with_context(|| format!("the recording {name} is not complete"))?;
    } else {
        watched?;
    }
    if let Some(end) = recorder.end {
        eprintln!(
            "tcptrace: {} records written to {name}, {} lost",
            end.records, end.lost
        );
    }
    Ok(())
}

/// Writes down events.
struct Recorder {
    /// What it needs decides when is looked again, so that a replay can tell as much.
    tracker: Tracker,
    out: Output,
    end: Option<End>,
}

impl watch::Consumer for Recorder {
    fn event(&mut self, event: &Event) {
        self.tracker.feed(event, &mut |_| {});
        if let Event::End(end) = event {
            self.end = Some(*end);
        }
        event::line::write(&mut self.out.buffer, event);
    }

    fn needs(&self) -> Needs {
        self.tracker.needs()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Where a recording goes; `-` is standard output.
fn create(path: &Path, force: bool) -> io::Result<Sink> {
    if path == Path::new("-") {
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        return Ok(Box::new(File::from(stdout)));
    }
    Ok(Box::new(new_file::create(path, Content::Recording, force)?))
}
