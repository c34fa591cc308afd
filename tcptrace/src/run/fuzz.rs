//! See [`crate::fuzz`]: a recording, through the tracker, to every view.

use std::{io, path::Path};

use anyhow::Result;
use tcptrace_ebpf::State;

use super::replay;
use crate::{
    event::Event,
    leaks::{self, Criteria},
    output::Output,
    select::{Knowledge, Selection},
    source, stream, timewait,
    view::View,
};

/// Reads a recording as it is, then shows those of its lines that are events: most changes of a byte break a line, and
/// reading ends there.
pub(crate) fn fuzz(recording: &[u8]) {
    // A recording that cannot be read ends with an error. It must not end in another way.
    let _ = stream_json(recording);
    let lines = recording.split_inclusive(|byte| *byte == b'\n');
    let events = lines.filter(|line| serde_json::from_slice::<Event>(line).is_ok());
    let events = events.collect::<Vec<_>>().concat();
    for view in [stream_json, stream_text, timewait_views, leak_views] {
        let _ = view(&events);
    }
}

fn stream_json(recording: &[u8]) -> Result<()> {
    let view = &mut stream::Json::new(nowhere()?);
    show(recording, Selection::default(), view)
}

fn stream_text(recording: &[u8]) -> Result<()> {
    let view = &mut stream::Text::new(nowhere()?);
    show(recording, Selection::default(), view)
}

fn timewait_views(recording: &[u8]) -> Result<()> {
    let view = &mut timewait::Json::new(nowhere()?);
    let _ = show(recording, Selection::default(), view);
    let view = &mut timewait::Text::new(nowhere()?);
    show(recording, Selection::default(), view)
}

fn leak_views(recording: &[u8]) -> Result<()> {
    let selection = || Selection {
        finished: true,
        knowledge: Knowledge::Dwell,
        ..Selection::default()
    };
    let options = || leaks::Options {
        criteria: Criteria {
            states: State::ALL.into_iter().collect(),
            older_than: 1_000_000_000,
        },
        once: false,
        at_end: false,
        until_exit: true,
        stacks: true,
        dwell: true,
    };
    let view = &mut leaks::Json::new(nowhere()?, options());
    let _ = show(recording, selection(), view);
    let view = &mut leaks::Text::new(nowhere()?, options());
    show(recording, selection(), view)
}

fn show(bytes: &[u8], selection: Selection, view: &mut impl View) -> Result<()> {
    let input = Box::new(io::Cursor::new(bytes.to_vec()));
    let file = source::File::of(Path::new("recording"), input);
    replay(file, selection, view)
}

fn nowhere() -> io::Result<Output> {
    Output::file(Path::new("/dev/null"), false)
}
