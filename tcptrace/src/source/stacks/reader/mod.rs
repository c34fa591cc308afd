//! What runs in the process without privileges: from records and open files to stacks with names.
//!
//! Everything here reads what other users wrote, and is written as if it could fail at any line: then the process
//! ends, [the opener](super::opener) starts another, and the file is not read again. It opens nothing itself.

mod elf;
mod handed;
mod ledger;
mod module;
mod names;
mod perf_map;
mod process;
mod symbols;
mod walk;

use std::{
    collections::HashMap,
    fs::File,
    hash::{BuildHasher as _, RandomState},
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    rc::Rc,
    time::Instant,
};

use tcptrace_ebpf as kernel;
use zerocopy::{FromZeros as _, IntoBytes as _};

pub(super) use self::handed::identify;
use self::{
    handed::Handed,
    ledger::Ledger,
    module::Module,
    names::Names,
    perf_map::PerfMap,
    process::{Maps, NoMaps, Place, Process},
    walk::Walked,
};
pub(crate) use self::{perf_map::fuzz as fuzz_perf_map, process::fuzz as fuzz_maps};
use super::{
    MOST_UNNAMED, budget,
    worker::{
        channel::Channel,
        protocol::{
            Answer, Confined, FileId, Frame, MOST_BYTES, MOST_FILES, MapsAnswer, Opened, Outcome,
            Record, Reply, Request, Subject, Want, decode, encode,
        },
        renew_cpu,
    },
};
use crate::{
    event::{StackEnd, Unread},
    kernel::clock,
};

/// How many different stacks are known. Of more, those seen longest ago are forgotten, and named anew.
const MOST_STACKS: usize = 1 << 14;
/// How many stacks can wait to be named.
const MOST_UNASKED: usize = 4096;
/// How many files are open. Each has a descriptor, and may have a debug file.
const MOST_MODULES: usize = 1500;
/// How many frames a stack has with those that are inlined.
const MOST_FRAMES: usize = 1024;
/// How many bytes of frames go into one message.
const FRAMES_BYTES: usize = MOST_BYTES / 4;

/// Serves until the other side is gone. A fault of any kind ends the process.
pub(super) fn serve(channel: Channel, confined: Confined, usage: Usage) {
    let mut reader = Reader {
        limited: confined.limits,
        link: Link {
            channel,
            buffer: Box::new([0; MOST_BYTES]),
            reading: Subject::Nothing,
        },
        state: State::new(),
        usage,
    };
    if reader.link.send(&Reply::Hello(confined)).is_none() {
        return;
    }
    while reader.serve().is_some() {}
}

/// Ends the loop: the other side is gone, or not what it should be.
type Served<T = ()> = Option<T>;

struct Reader {
    link: Link,
    state: State,
    usage: Usage,
    /// Its CPU time is limited, and has to be renewed.
    limited: bool,
}

/// How much memory this process takes.
pub(super) struct Usage {
    /// `/proc/self/statm`, opened while that could be done.
    file: Option<File>,
    /// What the program itself takes.
    own: u64,
}

impl Usage {
    pub(super) fn new() -> Self {
        let mut usage = Self {
            file: File::open("/proc/self/statm").ok(),
            own: 0,
        };
        usage.own = usage.pages().unwrap_or(0);
        usage
    }

    fn pages(&self) -> Option<u64> {
        let mut text = [0; 128];
        let read = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..read]).ok()?;
        text.split_ascii_whitespace().next()?.parse().ok()
    }

    /// Whether half of what it may have is in use.
    fn is_tight(&self) -> bool {
        let pages = self.pages().unwrap_or(0).saturating_sub(self.own);
        pages * 4096 > budget::READER / 2
    }
}

/// The way to the opener.
struct Link {
    channel: Channel,
    buffer: Box<[u8; MOST_BYTES]>,
    reading: Subject,
}

struct State {
    ledger: Ledger,
    hasher: [RandomState; 2],
    processes: HashMap<u32, Known>,
    modules: HashMap<FileId, Rc<Module>>,
    /// By device and inode: one file can be the map of many processes.
    perf_maps: HashMap<(u64, u64), PerfMap>,
    names: Names,
    /// Numbers of stacks, by a hash of where they are; and when they were last seen, as a count.
    stacks: HashMap<[u64; 2], (u32, u64)>,
    /// The last number given.
    last: u32,
    /// How many records were walked.
    walked: u64,
    /// Stacks whose names have not been asked for.
    unasked: HashMap<u32, Job>,
    /// Stacks with frames that have no name yet.
    unnamed: Vec<Unnamed>,
}

struct Known {
    /// `None` while it has made room for others.
    process: Option<Process>,
    exe: Option<(u64, u64)>,
    perf_map: Option<(u64, u64)>,
    /// Why its perf map was not to be read.
    map_unread: Option<Unread>,
}

struct Job {
    process: u32,
    places: Vec<Place>,
}

struct Unnamed {
    stack: u32,
    job: Job,
    frames: Vec<Frame>,
    /// How many bytes of the map had been read.
    read: u64,
}

impl Link {
    fn send(&self, reply: &Reply) -> Served {
        self.channel.send(&encode(reply), &[]).ok()
    }

    /// What is read now: it is to blame if this process ends.
    fn reading(&mut self, subject: Subject) {
        if self.reading != subject {
            self.reading = subject;
            let _ = self.send(&Reply::Reading(subject));
        }
    }

    fn receive(&mut self) -> Served<(Request, Vec<OwnedFd>)> {
        let packet = self.channel.receive(&mut self.buffer, None).ok()??;
        Some((decode(packet.bytes).ok()?, packet.files))
    }

    fn want(&mut self, want: Want) -> Served<(Answer, Vec<OwnedFd>)> {
        self.send(&Reply::Want(want))?;
        match self.receive()? {
            (Request::Answer(answer), files) => Some((answer, files)),
            _ => None,
        }
    }

    /// Files that were wanted: each, or why not.
    fn files(&mut self, want: Want) -> Served<Vec<Result<OwnedFd, Option<Unread>>>> {
        let (Answer::Files(opened), files) = self.want(want)? else {
            return None;
        };
        let mut files = files.into_iter();
        let one = |opened| {
            Some(match opened {
                Opened::File => Ok(files.next()?),
                Opened::No => Err(None),
                Opened::Refused(why) => Err(Some(why)),
            })
        };
        opened.into_iter().map(one).collect()
    }
}

impl Reader {
    /// One request.
    fn serve(&mut self) -> Served {
        let (request, files) = self.link.receive()?;
        if self.limited {
            // It fails only where it is not permitted, and then it ends sooner.
            let _ = renew_cpu();
        }
        let before = clock::thread_cpu_ns();
        let mut files = files.into_iter();
        let (mut end, mut outcomes) = (None, Vec::new());
        match request {
            Request::Process { process, exe, map } => {
                let maps = files.next()?;
                let known = Known {
                    process: None,
                    exe,
                    perf_map: None,
                    map_unread: None,
                };
                self.state.processes.insert(process, known);
                self.state.take_perf_map(process, map, &mut files)?;
                end = self.map(process, maps)?;
            }
            Request::Walk(records) => {
                for record in records {
                    outcomes.push(self.walk(&record)?);
                }
            }
            Request::Name { stack } => self.name(stack)?,
            Request::Again => self.again()?,
            Request::Forget { process } => {
                self.state.processes.remove(&process);
                self.state.forget_unused();
            }
            Request::Answer(_) => return None,
        }
        self.link.reading(Subject::Nothing);
        let cpu_us = (clock::thread_cpu_ns() - before) / 1000;
        self.link.send(&Reply::Done {
            cpu_us,
            end,
            outcomes,
        })
    }

    /// Reads what a process has mapped. Returns why not, if not.
    fn map(&mut self, process: u32, maps: OwnedFd) -> Served<Option<StackEnd>> {
        self.link.reading(Subject::Process(process));
        let Self { link, state, .. } = self;
        let Some(maps) = Handed::new(maps) else {
            return Some(Some(StackEnd::Gone));
        };
        let mut read = Maps::read(&maps, &state.hasher[0], &state.ledger);
        if matches!(read, Err(NoMaps::TooLarge)) {
            state.make_room(process);
            read = Maps::read(&maps, &state.hasher[0], &state.ledger);
        }
        drop(maps);
        let mut maps = match read {
            Ok(maps) => maps,
            Err(NoMaps::Gone) => return Some(Some(StackEnd::Gone)),
            Err(NoMaps::TooLarge) => return Some(Some(StackEnd::Overload)),
        };
        let known = state.processes.get(&process)?;
        if known
            .process
            .as_ref()
            .is_some_and(|known| known.hash == maps.hash)
        {
            return Some(None);
        }
        let mut new = Vec::new();
        for part in std::mem::take(&mut maps.ranges).chunks(MOST_FILES) {
            let ranges = part.iter().map(|(_, range)| *range).collect();
            let files = link.files(Want::Files { process, ranges })?;
            for ((index, _), file) in part.iter().zip(files) {
                let (module, unread) = match file {
                    Ok(file) => (state.module(link, process, file, maps.name(*index)), None),
                    Err(unread) => (None, unread),
                };
                let known = &mut maps.files[*index];
                known.unread = unread;
                if let Some((id, is_new)) = module {
                    known.module = state.modules.get(&id).cloned();
                    new.extend(is_new.then_some(id));
                }
            }
        }
        self.link.reading(Subject::Process(process));
        self.debug_files(process, &new)?;
        // What was read belongs to the program that called, if that still runs now.
        let (Answer::Check(end), _) = self.link.want(Want::Check { process })? else {
            return None;
        };
        let known = self.state.processes.get_mut(&process)?;
        if end.is_none() {
            known.process = Some(Process::new(maps, known.exe));
        }
        Some(end)
    }

    /// Has the debug files of new modules opened: later their process can be gone, or its file system.
    fn debug_files(&mut self, process: u32, new: &[FileId]) -> Served {
        let Self { link, state, .. } = self;
        let with_id: Vec<_> = new
            .iter()
            .filter_map(|id| Some((*id, state.modules.get(id)?.build_id.clone()?)))
            .collect();
        for part in with_id.chunks(MOST_FILES) {
            let build_ids = part.iter().map(|(_, build_id)| build_id.clone()).collect();
            let files = link.files(Want::DebugFiles { process, build_ids })?;
            for ((id, _), file) in part.iter().zip(files) {
                let debug = match file {
                    Ok(file) => Handed::new(file).map(Ok),
                    Err(unread) => unread.map(Err),
                };
                if let (Some(module), Some(debug)) = (state.modules.get(id), debug) {
                    let _ = module.debug.set(debug);
                }
            }
        }
        Some(())
    }

    fn walk(&mut self, record: &Record) -> Served<Outcome> {
        self.state.walked += 1;
        let process = record.process;
        let Some(known) = self.state.processes.get(&process) else {
            return Some(Outcome::Unknown);
        };
        if known.process.is_none() {
            match self.remap(process, true)? {
                Remapped::End(end) => return Some(Outcome::End(end)),
                Remapped::Spent => return Some(Outcome::End(StackEnd::Overload)),
                Remapped::Changed | Remapped::Same => {}
            }
        }
        // Zeros behind what was copied.
        let mut stack = Box::new(kernel::Stack::new_zeroed());
        let len = record.bytes.len().min(size_of::<kernel::Stack>());
        stack.as_mut_bytes()[..len].copy_from_slice(&record.bytes[..len]);
        self.link.reading(Subject::Process(process));
        let Some((mut walked, mut at)) = self.state.walk(process, &stack) else {
            return Some(Outcome::Unknown);
        };
        if !walked.addresses.is_empty() && self.state.stacks.contains_key(&at) {
            return Some(self.state.known(&walked, at, process));
        }
        // New, or something was mapped that the process had not when it was looked at.
        match self.remap(process, false)? {
            Remapped::Changed => {
                if let Some(again) = self.state.walk(process, &stack) {
                    (walked, at) = again;
                }
            }
            Remapped::Spent if walked.end == StackEnd::NoCode => {
                return Some(Outcome::End(StackEnd::Overload));
            }
            Remapped::Spent | Remapped::Same | Remapped::End(_) => {}
        }
        if walked.addresses.is_empty() {
            return Some(Outcome::End(walked.end));
        }
        Some(self.state.known(&walked, at, process))
    }

    /// Looks again what a process has mapped.
    fn remap(&mut self, process: u32, now: bool) -> Served<Remapped> {
        let hash = |state: &State| {
            let known = state.processes.get(&process)?;
            Some(known.process.as_ref()?.hash)
        };
        let before = hash(&self.state);
        let (Answer::Maps(answer), files) = self.link.want(Want::Maps { process, now })? else {
            return None;
        };
        Some(match answer {
            MapsAnswer::File => match self.map(process, files.into_iter().next()?)? {
                Some(end) => Remapped::End(end),
                None if hash(&self.state) == before => Remapped::Same,
                None => Remapped::Changed,
            },
            MapsAnswer::TooSoon => Remapped::Same,
            MapsAnswer::Spent => Remapped::Spent,
            MapsAnswer::End(end) => Remapped::End(end),
        })
    }

    fn name(&mut self, stack: u32) -> Served {
        let Some(job) = self.state.unasked.remove(&stack) else {
            // It was one too many.
            return self.frames(stack, &[]);
        };
        let is_over = self.read_perf_map(&job)?;
        let Self {
            link, state, usage, ..
        } = self;
        // What was not counted before must not be blamed on the next file.
        if usage.is_tight() {
            state.names.forget_others();
        }
        let mut frames = Vec::new();
        let mut names = std::mem::take(&mut state.names);
        let map = state.perf_map(job.process);
        let read = map.map_or(0, |map| map.until);
        let unread = state.map_unread(job.process);
        let mut made = |address| made(map, unread, address);
        for place in &job.places {
            names.add(
                place,
                &mut frames,
                &state.ledger,
                &mut made,
                &mut |subject| link.reading(subject),
            );
        }
        state.names = names;
        frames.truncate(MOST_FRAMES);
        self.frames(stack, &frames)?;
        let made = |frame: &Frame| frame.made && frame.function.is_none();
        if !is_over && frames.iter().any(made) {
            if self.state.unnamed.len() == MOST_UNNAMED {
                self.state.unnamed.remove(0);
            }
            self.state.unnamed.push(Unnamed {
                stack,
                job,
                frames,
                read,
            });
        }
        Some(())
    }

    /// Reads what the runtime says of code it made, if the stack has any. Returns whether no more will come.
    fn read_perf_map(&mut self, job: &Job) -> Served<bool> {
        let made = |place: &Place| matches!(place, Place::Made { .. });
        if !job.places.iter().any(made) {
            return Some(true);
        }
        self.update_perf_map(job.process)
    }

    fn update_perf_map(&mut self, process: u32) -> Served<bool> {
        let open = self.state.perf_map(process).is_none();
        let want = Want::PerfMap { process, open };
        let (Answer::PerfMap { lives, opened }, files) = self.link.want(want)? else {
            return None;
        };
        self.state
            .take_perf_map(process, opened, &mut files.into_iter())?;
        let Self { link, state, .. } = self;
        let known = state.processes.get(&process);
        let map = known
            .and_then(|known| known.perf_map)
            .and_then(|id| state.perf_maps.get_mut(&id));
        Some(match map {
            Some(map) => {
                link.reading(Subject::File(map.id()));
                map.read(&state.ledger);
                !lives || map.is_over
            }
            None => !lives,
        })
    }

    /// Sees what runtimes have written meanwhile, once in each map, and forgets what is not needed.
    fn again(&mut self) -> Served {
        self.state.names.forget_unneeded(Instant::now());
        let mut maps = HashMap::new();
        let mut kept = Vec::new();
        for mut unnamed in std::mem::take(&mut self.state.unnamed) {
            let process = unnamed.job.process;
            let is_over = match maps.get(&process) {
                Some(is_over) => *is_over,
                None => {
                    let is_over = self.update_perf_map(process)?;
                    maps.insert(process, is_over);
                    is_over
                }
            };
            let map = self.state.perf_map(process);
            let until = map.map_or(0, |map| map.until);
            if until > unnamed.read {
                unnamed.read = until;
                let mut changed = false;
                for frame in unnamed.frames.iter_mut().filter(|frame| frame.made) {
                    if frame.function.is_none() {
                        (frame.function, frame.unread) = made(map, None, frame.address);
                        changed |= frame.function.is_some();
                    }
                }
                if changed {
                    self.frames(unnamed.stack, &unnamed.frames)?;
                }
            }
            let bare = |frame: &Frame| frame.made && frame.function.is_none();
            if !is_over && unnamed.frames.iter().any(bare) {
                kept.push(unnamed);
            }
        }
        self.state.unnamed = kept;
        Some(())
    }

    /// Tells what a stack is, in as many messages as it takes.
    fn frames(&self, stack: u32, frames: &[Frame]) -> Served {
        let size = |frame: &Frame| {
            let len = |text: &Option<String>| text.as_ref().map_or(0, String::len);
            64 + len(&frame.function) + len(&frame.file) + len(&frame.module)
        };
        let mut rest = frames;
        loop {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|frame| {
                bytes += size(frame);
                bytes <= FRAMES_BYTES
            });
            let (part, after) = rest.split_at(fits.count().max(1).min(rest.len()));
            self.link.send(&Reply::Frames {
                stack,
                frames: part.to_vec(),
                more: !after.is_empty(),
            })?;
            if after.is_empty() {
                return Some(());
            }
            rest = after;
        }
    }
}

/// What became of looking again.
enum Remapped {
    Changed,
    Same,
    /// It has to do with what is known.
    Spent,
    End(StackEnd),
}

/// The name of code made at run time, or why there may be one that is not known.
fn made(
    map: Option<&PerfMap>,
    unread: Option<Unread>,
    address: u64,
) -> (Option<String>, Option<Unread>) {
    match map {
        None => (None, unread),
        Some(map) => match map.name(address) {
            None if map.is_cut => (None, Some(Unread::TooLarge)),
            name => (name, None),
        },
    }
}

impl State {
    fn new() -> Self {
        Self {
            ledger: Ledger::new(budget::LEDGER),
            hasher: [RandomState::new(), RandomState::new()],
            processes: HashMap::new(),
            modules: HashMap::new(),
            perf_maps: HashMap::new(),
            names: Names::default(),
            stacks: HashMap::new(),
            last: 0,
            walked: 0,
            unasked: HashMap::new(),
            unnamed: Vec::new(),
        }
    }

    /// The module of a file, and whether it is new; `None` if it has no code.
    fn module(
        &mut self,
        link: &mut Link,
        process: u32,
        file: OwnedFd,
        name: &str,
    ) -> Option<(FileId, bool)> {
        let file = Handed::new(file)?;
        let id = file.id;
        if let Some(known) = self.modules.get(&id) {
            // One that did not fit in may do so now.
            if known.unread.is_none() {
                return Some((id, false));
            }
        }
        link.reading(Subject::File(id));
        let mut module = Module::read(file, name, &self.ledger)?;
        if module.unread.is_some() {
            self.make_room(process);
            module = Module::read(module.file, name, &self.ledger)?;
        }
        if self.modules.len() >= MOST_MODULES {
            self.make_room(process);
        }
        self.modules.insert(id, Rc::new(module));
        Some((id, true))
    }

    /// Forgets what can be found out again: all but what this process needs.
    fn make_room(&mut self, process: u32) {
        self.names.forget_all();
        self.perf_maps.clear();
        for (id, known) in &mut self.processes {
            if *id != process {
                known.process = None;
            }
            known.perf_map = None;
        }
        self.forget_unused();
    }

    fn forget_unused(&mut self) {
        self.modules
            .retain(|_, module| Rc::strong_count(module) > 1);
        let used: Vec<_> = self
            .processes
            .values()
            .filter_map(|known| known.perf_map)
            .collect();
        self.perf_maps.retain(|id, _| used.contains(id));
    }

    fn take_perf_map(
        &mut self,
        process: u32,
        opened: Opened,
        files: &mut impl Iterator<Item = OwnedFd>,
    ) -> Served {
        let known = self.processes.get_mut(&process);
        match opened {
            Opened::No => {}
            Opened::Refused(why) => {
                if let Some(known) = known {
                    known.map_unread = Some(why);
                }
            }
            Opened::File => {
                if let (Some(file), Some(known)) = (Handed::new(files.next()?), known) {
                    let id = (file.id.device, file.id.inode);
                    known.perf_map = Some(id);
                    let map = self.perf_maps.entry(id);
                    map.or_insert_with(|| PerfMap::new(file));
                }
            }
        }
        Some(())
    }

    fn map_unread(&self, process: u32) -> Option<Unread> {
        self.processes.get(&process)?.map_unread
    }

    fn perf_map(&self, process: u32) -> Option<&PerfMap> {
        let known = self.processes.get(&process)?;
        self.perf_maps.get(&known.perf_map?)
    }

    /// Walks, and says by what the stack is known.
    fn walk(&mut self, process: u32, stack: &kernel::Stack) -> Option<(Walked, [u64; 2])> {
        let code = self.processes.get_mut(&process)?.process.as_mut()?;
        let walked = walk::walk(code, stack);
        // By where in which files it is, so that two processes of one program have the same; the names of code made
        // at run time are each process's own.
        let places: Vec<_> = places(code, &walked)
            .map(|place| match place {
                Place::File {
                    module,
                    address,
                    main,
                } => (Some(module.file.id), None, address, main),
                Place::NoFile { name, offset, .. } => (None, Some(name), offset, false),
                Place::Made { address } => (None, None, address, true),
            })
            .collect();
        let made = places
            .iter()
            .any(|(file, name, ..)| file.is_none() && name.is_none());
        let at = (
            stack.via,
            places,
            walked.end,
            walked.by_frame_pointer(code),
            made.then_some(process),
        );
        let at = [self.hasher[0].hash_one(&at), self.hasher[1].hash_one(&at)];
        Some((walked, at))
    }

    /// The number of a stack.
    fn known(&mut self, walked: &Walked, at: [u64; 2], process: u32) -> Outcome {
        let code = self
            .processes
            .get(&process)
            .and_then(|it| it.process.as_ref());
        let Some(code) = code else {
            return Outcome::Unknown;
        };
        let by_frame_pointer = walked.by_frame_pointer(code);
        let outcome = |stack, new| Outcome::Stack {
            stack,
            new,
            by_frame_pointer,
            end: walked.end,
        };
        if let Some((stack, seen)) = self.stacks.get_mut(&at) {
            *seen = self.walked;
            return outcome(*stack, false);
        }
        let places = places(code, walked).collect();
        if self.stacks.len() >= MOST_STACKS {
            let mut seen: Vec<_> = self.stacks.values().map(|(_, seen)| *seen).collect();
            seen.sort_unstable();
            let half = seen[seen.len() / 2];
            self.stacks.retain(|_, (_, seen)| *seen > half);
        }
        if self.unasked.len() >= MOST_UNASKED {
            return Outcome::End(StackEnd::Overload);
        }
        self.last += 1;
        self.stacks.insert(at, (self.last, self.walked));
        self.unasked.insert(self.last, Job { process, places });
        outcome(self.last, true)
    }
}

fn places<'a>(code: &'a Process, walked: &'a Walked) -> impl Iterator<Item = Place> + 'a {
    let addresses = walked.addresses.iter().enumerate();
    addresses.map(|(index, address)| code.place(*address, index > 0))
}
