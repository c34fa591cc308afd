//! From addresses to functions and lines, in a thread of its own: the debug information of a large program
//! takes seconds to read.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use blazesym::symbolize::{
    CodeInfo, Input, Symbolized, Symbolizer,
    source::{Elf, Source},
};

use super::{perf_map::PerfMap, process::Place};
use crate::event::{Frame, Printable, Stack, StackEnd};

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
    /// Stacks of which nothing has been told, without frames.
    untold: HashMap<u32, Stack>,
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
            untold: HashMap::new(),
        })
    }

    pub(super) fn ask(&mut self, job: Job) {
        self.untold.insert(job.stack.id, job.stack.clone());
        self.send(Ask::Name(job));
    }

    /// Has a second look at what had no name.
    pub(super) fn again(&mut self) {
        self.send(Ask::Again);
    }

    fn send(&mut self, ask: Ask) {
        if self.ask.send(ask).is_ok() {
            self.waiting += 1;
        }
    }

    /// A stack that has become known, if any has.
    pub(super) fn told(&mut self) -> Option<Box<Stack>> {
        loop {
            match self.told.try_recv() {
                Ok(answer) => {
                    if let Some(stack) = self.answered(answer) {
                        return Some(stack);
                    }
                }
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return self.failed(),
            }
        }
    }

    /// One more, as long as any are to come and it is not later than that.
    pub(super) fn last(&mut self, deadline: Instant) -> Option<Box<Stack>> {
        while self.waiting > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.told.recv_timeout(left) {
                Ok(answer) => {
                    if let Some(stack) = self.answered(answer) {
                        return Some(stack);
                    }
                }
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => self.waiting = 0,
            }
        }
        // What was asked of a thread that had failed before.
        self.told()
    }

    fn answered(&mut self, answer: Answer) -> Option<Box<Stack>> {
        match answer {
            Answer::Stack(stack) => {
                self.untold.remove(&stack.id);
                Some(stack)
            }
            Answer::Done => {
                self.waiting -= 1;
                None
            }
        }
    }

    /// The thread has ended before this, by a defect: what it has not told of will not come.
    fn failed(&mut self) -> Option<Box<Stack>> {
        self.waiting = 0;
        let id = *self.untold.keys().next()?;
        let stack = self.untold.remove(&id)?;
        Some(Box::new(Stack {
            by_frame_pointer: 0,
            end: StackEnd::NoNames,
            ..stack
        }))
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
    use crate::event::Via;

    #[test]
    fn debug_information_is_forgotten_though_it_is_looked_again_all_the_time() {
        let mut work = Work::default();
        work.name(job(1), |_| ());
        let named = Instant::now();
        for seconds in 1..10 {
            work.again(named + Duration::from_secs(seconds) - KEPT / 20, |_| ());
        }
        assert!(work.symbolizer.is_some());
        work.again(named + KEPT, |_| ());
        assert!(work.symbolizer.is_none());
    }

    #[test]
    fn without_the_thread_it_is_said_of_each_stack_that_it_has_no_names() {
        let (ask, asked) = channel();
        let (tell, told) = channel();
        let mut names = Names {
            ask,
            told,
            waiting: 0,
            untold: HashMap::new(),
        };
        names.ask(job(1));
        names.ask(job(2));
        tell.send(Answer::Stack(Box::new(job(1).stack))).unwrap();
        tell.send(Answer::Done).unwrap();
        drop((asked, tell));
        names.ask(job(3));
        let ends = |names: &mut Names| -> Vec<_> {
            let all = std::iter::from_fn(|| names.told());
            let mut ends: Vec<_> = all.map(|stack| (stack.id, stack.end)).collect();
            ends.sort_by_key(|(id, _)| *id);
            ends
        };
        let failed = StackEnd::NoNames;
        let all = [(1, StackEnd::Outermost), (2, failed), (3, failed)];
        assert_eq!(ends(&mut names), all);
        names.ask(job(4));
        let last = names.last(Instant::now()).unwrap();
        assert_eq!((last.id, last.end), (4, failed));
        assert!(names.last(Instant::now()).is_none());
    }

    fn job(id: u32) -> Job {
        Job {
            stack: Stack {
                id,
                via: Via::Connect,
                pid: 1,
                frames: Vec::new(),
                by_frame_pointer: 0,
                end: StackEnd::Outermost,
            },
            places: Vec::new(),
        }
    }
}
