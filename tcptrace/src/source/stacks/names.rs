//! From addresses to functions and lines, in a thread of its own: the debug information of a large program
//! takes seconds to read.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use blazesym::symbolize::{
    CodeInfo, Input, Symbolized, Symbolizer,
    source::{Elf, Source},
};

use super::{perf_map::PerfMap, process::Place};
use crate::event::{Frame, Printable, Stack};

/// What has been read of debug information is kept for so long after it was last needed: it can be large.
const KEPT: Duration = Duration::from_secs(10);
/// How many stacks with frames of code made at run time are kept in mind, of which the name may be written
/// later.
const MOST_UNNAMED: usize = 1024;

/// A stack to be named.
pub(super) struct Job {
    /// What is known of it: all but its frames.
    pub(super) stack: Stack,
    /// One for each frame.
    pub(super) places: Vec<Place>,
}

enum Ask {
    Name(Job),
    Again,
}

/// The thread.
pub(super) struct Names {
    ask: Sender<Ask>,
    told: Receiver<Answer>,
    /// How many answers are still to come.
    waiting: usize,
}

enum Answer {
    Stack(Box<Stack>),
    /// A request is done.
    Done,
}

impl Names {
    pub(super) fn start() -> io::Result<Self> {
        let (ask, asked) = channel();
        let (tell, told) = channel();
        thread::Builder::new()
            .name("names".to_owned())
            .spawn(move || work(&asked, &tell))?;
        Ok(Self {
            ask,
            told,
            waiting: 0,
        })
    }

    pub(super) fn ask(&mut self, job: Job) {
        self.send(Ask::Name(job));
    }

    /// Has a second look at what had no name.
    pub(super) fn again(&mut self) {
        self.send(Ask::Again);
    }

    fn send(&mut self, ask: Ask) {
        // It ends with this.
        if self.ask.send(ask).is_ok() {
            self.waiting += 1;
        }
    }

    /// A stack that has become known, if any has.
    pub(super) fn told(&mut self) -> Option<Box<Stack>> {
        loop {
            match self.told.try_recv().ok()? {
                Answer::Stack(stack) => return Some(stack),
                Answer::Done => self.waiting -= 1,
            }
        }
    }

    /// One more, as long as any are to come and it is not later than that.
    pub(super) fn last(&mut self, deadline: Instant) -> Option<Box<Stack>> {
        while self.waiting > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.told.recv_timeout(left).ok()? {
                Answer::Stack(stack) => return Some(stack),
                Answer::Done => self.waiting -= 1,
            }
        }
        None
    }
}

fn work(asked: &Receiver<Ask>, tell: &Sender<Answer>) {
    let mut work = Work::default();
    for ask in asked {
        let told = |stack: &Stack| {
            let _ = tell.send(Answer::Stack(Box::new(stack.clone())));
        };
        match ask {
            Ask::Name(job) => work.name(job, told),
            Ask::Again => work.again(Instant::now(), told),
        }
        if tell.send(Answer::Done).is_err() {
            return;
        }
    }
}

/// What the thread keeps.
#[derive(Default)]
struct Work {
    /// It has files open, and what was read of them; and when it was last needed.
    symbolizer: Option<(Symbolizer, Instant)>,
    unnamed: Vec<Unnamed>,
}

/// A stack with frames that have no name yet.
struct Unnamed {
    job: Job,
    map: Arc<PerfMap>,
    /// How many bytes of the map have been looked through.
    read: u64,
}

impl Work {
    fn name(&mut self, mut job: Job, told: impl FnOnce(&Stack)) {
        let map = job.map();
        let read = map.as_ref().map_or(0, |map| map.read().bytes);
        let (symbolizer, needed) = self.symbolizer.get_or_insert_with(|| {
            // Debug files were looked for where the process lives; here they would be found by names
            // that mean something else.
            let symbolizer = Symbolizer::builder().set_debug_dirs(Some([] as [PathBuf; 0]));
            (symbolizer.build(), Instant::now())
        });
        for place in &job.places {
            name(symbolizer, place, &mut job.stack.frames);
        }
        *needed = Instant::now();
        told(&job.stack);
        if let Some(map) = map
            && job.stack.frames.iter().any(is_unnamed)
        {
            if self.unnamed.len() == MOST_UNNAMED {
                self.unnamed.remove(0);
            }
            self.unnamed.push(Unnamed { job, map, read });
        }
    }

    /// Looks at what runtimes have written meanwhile, once in each map, and forgets what is not needed.
    fn again(&mut self, now: Instant, mut told: impl FnMut(&Stack)) {
        let unneeded = |(_, needed): &mut (_, Instant)| now.duration_since(*needed) >= KEPT;
        self.symbolizer.take_if(unneeded);
        let mut maps = HashMap::new();
        self.unnamed.retain_mut(|unnamed| {
            let map = &unnamed.map;
            let now = *maps.entry(Arc::as_ptr(map)).or_insert_with(|| map.read());
            if now.bytes > unnamed.read {
                unnamed.read = now.bytes;
                if rename(&mut unnamed.job) {
                    told(&unnamed.job.stack);
                }
            }
            !now.is_over && unnamed.job.stack.frames.iter().any(is_unnamed)
        });
    }
}

impl Job {
    /// What the runtime says of code it made. All frames are of one process, which has one map.
    fn map(&self) -> Option<Arc<PerfMap>> {
        self.places.iter().find_map(|place| match place {
            Place::Made { map, .. } => map.clone(),
            _ => None,
        })
    }
}

/// Whether it is of code made at run time, and has no name.
fn is_unnamed(frame: &Frame) -> bool {
    frame.made && frame.function.is_none()
}

/// Looks up again what had no name. Returns whether that has changed anything.
fn rename(job: &mut Job) -> bool {
    let mut changed = false;
    let Job { stack, places } = job;
    let made = places.iter().filter_map(|place| match place {
        Place::Made { map, address } => Some((map, *address)),
        _ => None,
    });
    // Code made at run time has no inlined frames: there are as many frames of it as places.
    for (frame, (map, address)) in stack.frames.iter_mut().filter(|frame| frame.made).zip(made) {
        if frame.function.is_none() {
            frame.function = map.as_ref().and_then(|map| map.name(address));
            changed |= frame.function.is_some();
        }
    }
    changed
}

/// Adds the frames at a place: more than one if functions were inlined, the innermost first.
fn name(symbolizer: &Symbolizer, place: &Place, frames: &mut Vec<Frame>) {
    match place {
        Place::Unread { name, offset } => frames.push(Frame {
            module: Some(name.clone()),
            address: *offset,
            ..Frame::default()
        }),
        Place::Made { map, address } => frames.push(Frame {
            function: map.as_ref().and_then(|map| map.name(*address)),
            made: true,
            address: *address,
            ..Frame::default()
        }),
        Place::File {
            module,
            address,
            main,
        } => {
            let bare = Frame {
                module: Some(module.name.clone()),
                address: *address,
                main: *main,
                ..Frame::default()
            };
            let mut found = symbolize(symbolizer, module.symbols(), *address, &bare);
            if found.is_empty() && module.has_debug_file() {
                found = symbolize(symbolizer, module.own_symbols(), *address, &bare);
            }
            if found.is_empty() {
                found.push(bare);
            }
            frames.append(&mut found);
        }
    }
}

fn symbolize(symbolizer: &Symbolizer, path: PathBuf, address: u64, bare: &Frame) -> Vec<Frame> {
    let source = Source::Elf(Elf::new(path));
    let Ok(Symbolized::Sym(symbol)) =
        symbolizer.symbolize_single(&source, Input::VirtOffset(address))
    else {
        return Vec::new();
    };
    let frame = |name: &str, code: Option<&CodeInfo<'_>>, inlined| {
        use std::os::unix::ffi::OsStrExt as _;
        let file = code.map(|code| {
            let path = code.to_path();
            Printable(path.as_os_str().as_bytes()).to_string().into()
        });
        Frame {
            function: Some(Printable(name.as_bytes()).to_string().into()),
            file,
            line: code.and_then(|code| code.line),
            inlined,
            ..bare.clone()
        }
    };
    let inlined = symbol.inlined.iter().rev();
    let mut frames: Vec<Frame> = inlined
        .map(|function| frame(&function.name, function.code_info.as_ref(), true))
        .collect();
    frames.push(frame(&symbol.name, symbol.code_info.as_deref(), false));
    frames
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{StackEnd, Via};

    #[test]
    fn debug_information_is_forgotten_though_it_is_looked_again_all_the_time() {
        let mut work = Work::default();
        let stack = Stack {
            id: 1,
            via: Via::Connect,
            pid: 1,
            frames: Vec::new(),
            by_frame_pointer: 0,
            end: StackEnd::Outermost,
        };
        let places = Vec::new();
        work.name(Job { stack, places }, |_| ());
        let named = Instant::now();
        for seconds in 1..10 {
            work.again(named + Duration::from_secs(seconds) - KEPT / 20, |_| ());
        }
        assert!(work.symbolizer.is_some());
        work.again(named + KEPT, |_| ());
        assert!(work.symbolizer.is_none());
    }
}
