//! The thread between the probes' records and the process that reads other users' files.
//!
//! It takes records out of the queue, opens what they need of their processes, has the reader walk and name stacks,
//! and hands on what comes back. It waits for nobody longer than a deadline, reads no file's contents, and takes no
//! time of the thread that drains the ring buffer.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::File,
    hash::{BuildHasher as _, RandomState},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::SyncSender,
    },
    time::{Duration, Instant},
};

use super::{
    budget, frameless,
    queue::{Command, Queue, Queued},
    read,
    reader::identify,
    target::{Key, PerfMapPath},
    worker::{
        Done, Failed, Patron, Starter, Worker,
        protocol::{
            Answer, FileId, Frame, MOST_FILES, MapsAnswer, Opened, Outcome, Record, Request,
            Subject, Want,
        },
    },
};
use crate::event::{self, Called, Event, Printable, Stack, StackEnd, Unread};

/// How many records go into one message.
const BATCH: usize = 6;
/// How many processes are known. More than that, and the one seen longest ago is forgotten.
const MOST_PROCESSES: usize = 512;
/// How often, at most, it is looked again what a process has mapped, for stacks not seen before.
const MAPS_EVERY: Duration = Duration::from_millis(20);
/// How often a record is tried: the reader can end for another's sake.
const MOST_TRIES: u32 = 3;
/// How many stacks can wait to be named. Their records are kept, for a reader that has to begin anew.
const MOST_PENDING: usize = 1024;
/// How many files and processes of one user may end the reader. Of more, none is read.
const MOST_DEATHS: u32 = 8;
/// How many files that ended the reader are remembered.
const MOST_REFUSED: usize = 4096;
/// How many frames a stack has at most, and how many bytes of names.
const MOST_FRAMES: usize = 1024;
/// How many stacks are remembered of which more may become known.
const MOST_BEGUN: usize = 4096;
/// How many stacks a reader numbers. After that another one begins anew, so that nothing grows for ever.
const MOST_IDS: usize = 1 << 16;
/// How long it sleeps when there is nothing to do.
const IDLE: Duration = Duration::from_secs(60);
/// How long after a reader could not be started it is tried again.
const START_AGAIN: Duration = Duration::from_secs(5);

/// What comes back.
pub(super) enum Told {
    /// [`Event::Called`] or [`Event::Stack`].
    Event(Event),
    /// All that came in before [`Command::Finish`] has been told.
    Finished,
}

pub(super) struct Opener {
    queue: Queue,
    told: SyncSender<Told>,
    starter: Starter,
    /// `None` after it has failed.
    worker: Option<Worker>,
    start_after: Instant,
    desk: Desk,
    /// To be walked before what is in the queue.
    again: VecDeque<Work>,
    /// To be named.
    pending: VecDeque<Work>,
    /// By the reader's numbers: ours.
    ids: HashMap<u32, u32>,
    teller: Teller,
    finishing: bool,
}

/// A record, and what is known of it.
struct Work {
    record: Queued,
    /// The stack that it is, and how the reader numbers that, if it was walked before.
    stack: Option<(u32, u32)>,
    tries: u32,
}

/// What the reader's wants are answered from.
#[derive(Default)]
struct Desk {
    processes: HashMap<Key, Known>,
    /// By the numbers that the reader has.
    keys: HashMap<u32, Key>,
    last_process: u32,
    refused: HashMap<FileId, Unread>,
    /// How often files of a user's processes ended the reader.
    deaths: HashMap<u32, u32>,
    /// Frames of the stack that is being told.
    frames: Vec<Frame>,
    /// Stacks that are whole.
    whole: Vec<(u32, Vec<Frame>)>,
}

/// A process, or why its code cannot be known.
struct Known {
    state: Result<(), StackEnd>,
    /// How this reader numbers it, if it knows it.
    number: Option<u32>,
    uid: u32,
    perf_map: Option<PerfMapPath>,
    maps_read: Instant,
    seen: Instant,
    share: Share,
    /// How often the reader ended over it.
    deaths: u32,
}

/// The CPU time that a process has a claim on.
#[derive(Clone, Copy)]
struct Share {
    left_us: i64,
    since: Instant,
}

impl Share {
    fn new(now: Instant) -> Self {
        let left_us = budget::CPU_BURST.as_micros() as i64;
        Self {
            left_us,
            since: now,
        }
    }

    /// Takes account of the time that has passed.
    fn left(&mut self, now: Instant) -> i64 {
        let earned = (now.duration_since(self.since) / budget::CPU_PART).as_micros() as i64;
        if earned > 0 {
            self.since = now;
            let most = budget::CPU_BURST.as_micros() as i64;
            self.left_us = (self.left_us + earned).min(most);
        }
        self.left_us
    }

    fn spend(&mut self, used: Duration) {
        self.left_us -= i64::try_from(used.as_micros()).unwrap_or(i64::MAX / 2);
    }
}

impl Opener {
    pub(super) fn new(
        queue: Queue,
        told: SyncSender<Told>,
        starter: Starter,
        worker: Worker,
        last: Arc<AtomicU32>,
    ) -> Self {
        Self {
            queue,
            told: told.clone(),
            starter,
            worker: Some(worker),
            start_after: Instant::now(),
            desk: Desk::default(),
            again: VecDeque::new(),
            pending: VecDeque::new(),
            ids: HashMap::new(),
            teller: Teller::new(told, last),
            finishing: false,
        }
    }

    /// Works until it is to finish, or nobody listens any more.
    pub(super) fn run(mut self) {
        loop {
            while let Some(command) = self.queue.take_command() {
                match command {
                    Command::Tend => self.tend(),
                    Command::Finish => self.finishing = true,
                }
            }
            if self.teller.nobody {
                return;
            }
            let work = self.next_work();
            if !work.is_empty() {
                self.walk(work);
            } else if let Some(work) = self.next_pending() {
                self.name(work);
            } else if self.finishing {
                self.tend();
                let _ = self.told.send(Told::Finished);
                return;
            } else {
                // Whose share is used up waits for time, and not for anything to come.
                let some = Duration::from_millis(100);
                let most = if self.pending.is_empty() { IDLE } else { some };
                self.queue.wait(most);
            }
        }
    }

    fn next_work(&mut self) -> Vec<Work> {
        // One at a time, so that it is known which one is to blame.
        if let Some(work) = self.again.pop_front() {
            return vec![work];
        }
        let records = self.queue.take(BATCH).into_iter();
        let work = |record| Work {
            record,
            stack: None,
            tries: 0,
        };
        records.map(work).collect()
    }

    /// The next stack to be named, of a process that has CPU time left.
    fn next_pending(&mut self) -> Option<Work> {
        let now = Instant::now();
        let (desk, finishing) = (&mut self.desk, self.finishing);
        let at = self.pending.iter().position(|work| {
            let known = desk.processes.get_mut(&key(&work.record));
            finishing || known.is_none_or(|known| known.share.left(now) > 0)
        })?;
        self.pending.remove(at)
    }

    /// The reader; started now if there is none.
    fn has_worker(&mut self) -> bool {
        if self.worker.is_some() {
            return true;
        }
        if Instant::now() < self.start_after {
            return false;
        }
        let mut started = Worker::start(&self.starter);
        if started.is_err() {
            // What starts it is gone, perhaps.
            started = Starter::new().and_then(|starter| {
                self.starter = starter;
                Worker::start(&self.starter)
            });
        }
        match started {
            Ok(worker) => {
                self.worker = Some(worker);
                true
            }
            Err(error) => {
                log::debug!("no reader can be started: {error}");
                self.start_after = Instant::now() + START_AGAIN;
                false
            }
        }
    }

    fn ask(&mut self, request: &Request, files: &[File]) -> Result<Done, Failed> {
        let nothing = Failed {
            subject: Subject::Nothing,
            slow: false,
        };
        let worker = self.worker.as_mut().ok_or(nothing)?;
        let wait = budget::READER_WAIT;
        let done = worker.ask(&self.starter, request, files, wait, &mut self.desk);
        self.desk.frames.clear();
        if done.is_err() {
            self.worker = None;
        }
        done
    }

    fn walk(&mut self, work: Vec<Work>) {
        let mut ready: Vec<(Key, Work)> = Vec::new();
        for work in work {
            let key = key(&work.record);
            // A batch is of one process, so that its CPU time is its own.
            if ready.last().is_some_and(|(last, _)| *last != key) {
                self.walk_batch(std::mem::take(&mut ready));
            }
            match self.introduce(key, uid(&work.record)) {
                Ok(()) => ready.push((key, work)),
                Err(Some(end)) => self.give_up(work, end),
                Err(None) => self.try_again(work),
            }
        }
        self.walk_batch(ready);
    }

    fn walk_batch(&mut self, work: Vec<(Key, Work)>) {
        let Some((key, _)) = work.first() else {
            return;
        };
        let key = *key;
        let number = self.desk.processes.get(&key).and_then(|it| it.number);
        let Some(number) = number else {
            // The reader ended while the last of them was introduced.
            for (_, work) in work {
                self.try_again(work);
            }
            return;
        };
        let records = work.iter().map(|(_, work)| Record {
            process: number,
            bytes: work.record.bytes.to_vec(),
        });
        let request = Request::Walk(records.collect());
        match self.ask(&request, &[]) {
            Ok(done) if done.outcomes.len() == work.len() => {
                self.spend(&key, done.cpu);
                for ((_, work), outcome) in work.into_iter().zip(done.outcomes) {
                    self.walked(work, outcome);
                }
            }
            Ok(_) => {
                self.worker = None;
                self.failed(None, None);
                work.into_iter().for_each(|(_, work)| self.try_again(work));
            }
            Err(failed) => {
                self.failed(Some(failed), Some(key));
                work.into_iter().for_each(|(_, work)| self.try_again(work));
            }
        }
    }

    /// Sees to it that the reader knows the process; or says why it cannot. `None`: the reader has ended.
    fn introduce(&mut self, key: Key, uid: u32) -> Result<(), Option<StackEnd>> {
        if !self.has_worker() {
            return Err(Some(StackEnd::NoNames));
        }
        let now = Instant::now();
        if !self.desk.processes.contains_key(&key) {
            self.forget_oldest();
            self.desk.processes.insert(key, Known::new(key, uid, now));
        }
        // Not only files of this user end the reader: its processes go on doing so.
        let deaths = self.desk.deaths.get(&uid);
        let distrusted = deaths.is_some_and(|deaths| *deaths >= 2 * MOST_DEATHS);
        let Some(known) = self.desk.processes.get_mut(&key) else {
            return Err(Some(StackEnd::Overload));
        };
        known.seen = now;
        known.state.map_err(Some)?;
        if distrusted {
            return Err(Some(StackEnd::NoNames));
        }
        // What it has cost so far was more than it may.
        let burst = budget::CPU_BURST.as_micros() as i64;
        if known.share.left(now) < -burst {
            return Err(Some(StackEnd::Overload));
        }
        if known.number.is_some() {
            return Ok(());
        }
        let maps = match key.check().and_then(|()| key.maps()) {
            Ok(maps) => maps,
            Err(end) => {
                known.state = Err(end);
                return Err(Some(end));
            }
        };
        if known.perf_map.is_none() {
            known.perf_map = PerfMapPath::of(key);
        }
        let map = known.perf_map.as_ref().and_then(|map| map.open(true));
        known.maps_read = now;
        let (opened, map) = self.desk.judge(uid, map);
        self.desk.last_process += 1;
        let number = self.desk.last_process;
        self.desk.keys.insert(number, key);
        let request = Request::Process {
            process: number,
            exe: key.exe(),
            map: opened,
        };
        let files: Vec<_> = [maps].into_iter().chain(map).collect();
        match self.ask(&request, &files) {
            Ok(done) => {
                self.spend(&key, done.cpu);
                let known = self.desk.processes.get_mut(&key);
                let known = known.ok_or(Some(StackEnd::Overload))?;
                known.number = Some(number);
                match done.end {
                    None => Ok(()),
                    Some(end) => {
                        known.state = Err(end);
                        Err(Some(end))
                    }
                }
            }
            Err(failed) => {
                self.failed(Some(failed), Some(key));
                Err(None)
            }
        }
    }

    fn walked(&mut self, work: Work, outcome: Outcome) {
        match outcome {
            Outcome::End(end) => self.give_up(work, end),
            Outcome::Unknown => {
                let known = self.desk.processes.get_mut(&key(&work.record));
                if let Some(known) = known {
                    known.number = None;
                }
                self.try_again(work);
            }
            Outcome::Stack {
                stack: number,
                new,
                by_frame_pointer,
                end,
            } => {
                let before = work.stack.map(|(id, _)| id);
                let id = match (self.ids.get(&number), before) {
                    (Some(id), _) => *id,
                    (None, Some(id)) => id,
                    (None, None) => self.teller.next_id(),
                };
                self.ids.insert(number, id);
                match before {
                    // It was told already which stack that is.
                    Some(before) if before != id => self.give_up(work, StackEnd::NoNames),
                    Some(_) if !new => {}
                    before => {
                        if before.is_none() {
                            self.teller.called(&work.record, id);
                        }
                        if new {
                            self.teller.begin(id, &work.record, by_frame_pointer, end);
                            self.expect_name(Work {
                                stack: Some((id, number)),
                                ..work
                            });
                        }
                    }
                }
            }
        }
    }

    fn expect_name(&mut self, work: Work) {
        if self.pending.len() >= MOST_PENDING {
            self.give_up(work, StackEnd::Overload);
        } else {
            self.pending.push_back(work);
        }
    }

    fn name(&mut self, work: Work) {
        let Some((_, number)) = work.stack.filter(|_| self.worker.is_some()) else {
            self.try_again(work);
            return;
        };
        let key = key(&work.record);
        match self.ask(&Request::Name { stack: number }, &[]) {
            Ok(done) => {
                self.spend(&key, done.cpu);
                self.tell_whole(Some(uid(&work.record)));
            }
            Err(failed) => {
                self.failed(Some(failed), Some(key));
                self.try_again(work);
            }
        }
    }

    /// Tells the stacks that have come in whole.
    fn tell_whole(&mut self, uid: Option<u32>) {
        for (number, frames) in std::mem::take(&mut self.desk.whole) {
            if let Some(id) = self.ids.get(&number) {
                self.teller.stack(*id, frames, uid);
            }
        }
    }

    fn spend(&mut self, key: &Key, used: Duration) {
        if let Some(known) = self.desk.processes.get_mut(key) {
            known.share.spend(used);
        }
    }

    /// The reader has ended: what it was reading is not read again, and what it knew has to be found out again.
    fn failed(&mut self, failed: Option<Failed>, key: Option<Key>) {
        self.worker = None;
        self.desk.whole.clear();
        self.ids.clear();
        for known in self.desk.processes.values_mut() {
            known.number = None;
        }
        if let Some(failed) = failed {
            self.desk.blame(failed, key);
        }
        self.desk.keys.clear();
        // In the order in which they came, so that they are what they were.
        for work in std::mem::take(&mut self.pending).into_iter().rev() {
            self.again.push_front(work);
        }
    }

    fn try_again(&mut self, work: Work) {
        let tries = work.tries + 1;
        if tries > MOST_TRIES || self.worker.is_none() && Instant::now() < self.start_after {
            self.give_up(work, StackEnd::NoNames);
        } else {
            self.again.push_back(Work { tries, ..work });
        }
    }

    /// Tells that there are no frames, and why.
    fn give_up(&mut self, work: Work, end: StackEnd) {
        match work.stack {
            // The walk may have gone well; what is told is what is left of it.
            Some((id, _)) => self.teller.nothing(id, end),
            None => {
                let id = self.teller.without(&work.record, end);
                self.teller.called(&work.record, id);
            }
        }
    }

    /// Forgets processes that have ended or could not be looked at, and has what runtimes have written meanwhile
    /// looked at.
    fn tend(&mut self) {
        if self.ids.len() > MOST_IDS {
            self.failed(None, None);
        }
        if self.worker.is_some() {
            match self.ask(&Request::Again, &[]) {
                Ok(_) => self.tell_whole(None),
                Err(failed) => self.failed(Some(failed), None),
            }
        }
        let gone: Vec<_> = self
            .desk
            .processes
            .iter()
            .filter(|(key, known)| {
                known.deaths == 0 && known.state.is_err() || key.check().is_err()
            })
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            self.forget(&key);
        }
    }

    fn forget_oldest(&mut self) {
        if self.desk.processes.len() >= MOST_PROCESSES {
            let oldest = self.desk.processes.iter();
            let oldest = oldest.min_by_key(|(_, known)| known.seen);
            if let Some(key) = oldest.map(|(key, _)| *key) {
                self.forget(&key);
            }
        }
    }

    fn forget(&mut self, key: &Key) {
        let known = self.desk.processes.remove(key);
        let number = known.and_then(|known| known.number);
        if let Some(process) = number {
            self.desk.keys.remove(&process);
            if self.worker.is_some()
                && let Err(failed) = self.ask(&Request::Forget { process }, &[])
            {
                self.failed(Some(failed), None);
            }
        }
    }
}

impl Known {
    fn new(key: Key, uid: u32, now: Instant) -> Self {
        Self {
            state: key.check(),
            number: None,
            uid,
            perf_map: None,
            maps_read: now,
            seen: now,
            share: Share::new(now),
            deaths: 0,
        }
    }
}

impl Desk {
    /// Remembers what ended the reader.
    fn blame(&mut self, failed: Failed, key: Option<Key>) {
        let why = if failed.slow {
            Unread::TooSlow
        } else {
            Unread::Crashed
        };
        let process = match failed.subject {
            Subject::Nothing => return,
            Subject::File(id) => {
                if self.refused.len() >= MOST_REFUSED {
                    self.refused.clear();
                }
                self.refused.insert(id, why);
                None
            }
            Subject::Process(number) => self.keys.get(&number).copied(),
        };
        if let Some(known) = process.and_then(|key| self.processes.get_mut(&key)) {
            known.deaths += 1;
            // Once may be for want of memory.
            if known.deaths > 1 {
                known.state = Err(StackEnd::NoNames);
            }
        }
        let whose = key.and_then(|key| self.processes.get(&key));
        if let Some(known) = whose {
            *self.deaths.entry(known.uid).or_insert(0) += 1;
        }
    }

    fn known(&mut self, process: u32) -> Option<(Key, &mut Known)> {
        let key = *self.keys.get(&process)?;
        Some((key, self.processes.get_mut(&key)?))
    }

    fn is_distrusted(&self, uid: u32) -> bool {
        self.deaths.get(&uid).is_some_and(|it| *it >= MOST_DEATHS)
    }

    /// A file, unless it is not to be read.
    fn judge(&self, uid: u32, file: Option<File>) -> (Opened, Option<File>) {
        let Some(file) = file else {
            return (Opened::No, None);
        };
        let distrusted = self.is_distrusted(uid).then_some(Unread::Distrusted);
        match refusal(&self.refused, &file).or(distrusted) {
            Some(why) => (Opened::Refused(why), None),
            None => (Opened::File, Some(file)),
        }
    }

    /// Files, each with what is said of it.
    fn hand_over(
        &self,
        uid: u32,
        files: impl Iterator<Item = Option<File>>,
    ) -> (Answer, Vec<File>) {
        let (opened, files): (_, Vec<_>) = files.map(|file| self.judge(uid, file)).unzip();
        (Answer::Files(opened), files.into_iter().flatten().collect())
    }
}

impl Patron for Desk {
    fn answer(&mut self, want: Want) -> (Answer, Vec<File>) {
        match want {
            Want::Files { process, ranges } if ranges.len() <= MOST_FILES => {
                let Some((key, known)) = self.known(process) else {
                    return (Answer::Files(vec![Opened::No; ranges.len()]), Vec::new());
                };
                let (uid, files) = (known.uid, key.files(&ranges));
                self.hand_over(uid, files.into_iter())
            }
            Want::DebugFiles { process, build_ids } if build_ids.len() <= MOST_FILES => {
                let Some((key, known)) = self.known(process) else {
                    return (Answer::Files(vec![Opened::No; build_ids.len()]), Vec::new());
                };
                let uid = known.uid;
                let files: Vec<_> = build_ids.iter().map(|id| key.debug_file(id)).collect();
                self.hand_over(uid, files.into_iter())
            }
            // More than fits into an answer was never wanted by a reader of ours.
            Want::Files { .. } | Want::DebugFiles { .. } => (Answer::Files(Vec::new()), Vec::new()),
            Want::Maps { process, now } => {
                let (answer, file) = self.maps(process, now);
                (Answer::Maps(answer), file.into_iter().collect())
            }
            Want::Check { process } => {
                let end = match self.known(process) {
                    Some((key, _)) => key.check().err(),
                    None => Some(StackEnd::Gone),
                };
                (Answer::Check(end), Vec::new())
            }
            Want::PerfMap { process, open } => self.perf_map(process, open),
        }
    }

    fn frames(&mut self, stack: u32, frames: Vec<Frame>, more: bool) {
        let room = MOST_FRAMES.saturating_sub(self.frames.len());
        self.frames.extend(frames.into_iter().take(room));
        if !more {
            self.whole.push((stack, std::mem::take(&mut self.frames)));
        }
    }
}

impl Desk {
    fn maps(&mut self, process: u32, at_once: bool) -> (MapsAnswer, Option<File>) {
        let now = Instant::now();
        let Some((key, known)) = self.known(process) else {
            return (MapsAnswer::End(StackEnd::Gone), None);
        };
        if !at_once && known.maps_read.elapsed() < MAPS_EVERY {
            return (MapsAnswer::TooSoon, None);
        }
        if known.share.left(now) <= 0 {
            return (MapsAnswer::Spent, None);
        }
        known.maps_read = now;
        match key.check().and_then(|()| key.maps()) {
            Ok(maps) => (MapsAnswer::File, Some(maps)),
            Err(end) => (MapsAnswer::End(end), None),
        }
    }

    fn perf_map(&mut self, process: u32, open: bool) -> (Answer, Vec<File>) {
        let (mut file, mut uid, mut lives) = (None, 0, false);
        if let Some((key, known)) = self.known(process) {
            // Before the file: what is not in it then will not come.
            lives = key.check().is_ok();
            uid = known.uid;
            if open {
                file = known.perf_map.as_ref().and_then(|map| map.open(lives));
            }
        }
        let (opened, file) = self.judge(uid, file);
        let answer = Answer::PerfMap { lives, opened };
        (answer, file.into_iter().collect())
    }
}

/// Why a file is not to be read.
fn refusal(refused: &HashMap<FileId, Unread>, file: &File) -> Option<Unread> {
    if refused.is_empty() {
        return None;
    }
    let file: OwnedFd = file.try_clone().ok()?.into();
    refused.get(&identify(&file)?).copied()
}

/// Tells events, but no more than views may keep of them.
struct Teller {
    told: SyncSender<Told>,
    /// The last id given. None is given twice: sockets may still have it when its process is forgotten.
    last: Arc<AtomicU32>,
    /// Stacks without frames, of whatever process.
    without: HashMap<(event::Via, StackEnd), u32>,
    /// Stacks of which nothing has been told, without frames.
    begun: HashMap<u32, Stack>,
    hasher: RandomState,
    /// What was told, each once.
    contents: HashSet<u64>,
    bytes: usize,
    by_user: HashMap<u32, usize>,
    /// Nobody listens any more.
    nobody: bool,
}

impl Teller {
    fn new(told: SyncSender<Told>, last: Arc<AtomicU32>) -> Self {
        Self {
            told,
            last,
            without: HashMap::new(),
            begun: HashMap::new(),
            hasher: RandomState::new(),
            contents: HashSet::new(),
            bytes: 0,
            by_user: HashMap::new(),
            nobody: false,
        }
    }

    fn tell(&mut self, event: Event) {
        self.nobody |= self.told.send(Told::Event(event)).is_err();
    }

    fn next_id(&self) -> u32 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn called(&mut self, record: &Queued, stack: u32) {
        let header = read(record).header;
        self.tell(Event::Called(Called {
            time: header.time,
            cookie: header.cookie,
            stack,
        }));
    }

    /// The stack that stands for all without frames, for this reason.
    fn without(&mut self, record: &Queued, end: StackEnd) -> u32 {
        let via = super::via(&read(record)).unwrap_or(event::Via::Connect);
        if let Some(id) = self.without.get(&(via, end)) {
            return *id;
        }
        let id = self.next_id();
        self.without.insert((via, end), id);
        self.tell(Event::Stack(Box::new(frameless(id, via, end))));
        id
    }

    /// A stack was walked; its frames follow.
    fn begin(&mut self, id: u32, record: &Queued, by_frame_pointer: u32, end: StackEnd) {
        let via = super::via(&read(record)).unwrap_or(event::Via::Connect);
        let stack = Stack {
            pid: record.pid,
            by_frame_pointer,
            ..frameless(id, via, end)
        };
        // Those that still have no names are the oldest, and will hardly get any.
        if self.begun.len() >= MOST_BEGUN
            && let Some(oldest) = self.begun.keys().min().copied()
        {
            self.begun.remove(&oldest);
        }
        self.begun.insert(id, stack);
    }

    /// No frames follow.
    fn nothing(&mut self, id: u32, end: StackEnd) {
        if let Some(stack) = self.begun.remove(&id) {
            self.tell(Event::Stack(Box::new(frameless(id, stack.via, end))));
        }
    }

    fn stack(&mut self, id: u32, frames: Vec<Frame>, uid: Option<u32>) {
        // When more has become known of it, the rest is what it was.
        let Some(stack) = self.begun.get(&id) else {
            return;
        };
        let frames: Vec<_> = frames.into_iter().map(event_frame).collect();
        let mut stack = Stack {
            frames,
            ..stack.clone()
        };
        let content = (stack.via, &stack.frames, stack.by_frame_pointer, stack.end);
        let content = self.hasher.hash_one(content);
        if !self.contents.contains(&content) {
            let bytes = size(&stack);
            let own = self.by_user.entry(uid.unwrap_or(0)).or_insert(0);
            if self.bytes + bytes > budget::TOLD || *own + bytes > budget::TOLD / budget::SHARE {
                stack = frameless(id, stack.via, StackEnd::TooMany);
            } else {
                self.contents.insert(content);
                self.bytes += bytes;
                *own += bytes;
            }
        }
        let unnamed = |frame: &event::Frame| frame.made && frame.function.is_none();
        if !stack.frames.iter().any(unnamed) {
            self.begun.remove(&id);
        }
        self.tell(Event::Stack(Box::new(stack)));
    }
}

/// How much memory it takes.
fn size(stack: &Stack) -> usize {
    let len = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len() + 16);
    let frames = stack.frames.iter();
    let frames = frames.map(|frame| {
        size_of::<event::Frame>() + len(&frame.function) + len(&frame.file) + len(&frame.module)
    });
    size_of::<Stack>() + frames.sum::<usize>()
}

/// What the reader says is made printable here: it is not trusted to have done so.
fn event_frame(frame: Frame) -> event::Frame {
    let text = |text: Option<String>| {
        text.map(|text| Printable(text.as_bytes()).to_string().into_boxed_str())
    };
    event::Frame {
        function: text(frame.function),
        file: text(frame.file),
        line: frame.line,
        module: text(frame.module),
        address: frame.address,
        inlined: frame.inlined,
        main: frame.main,
        made: frame.made,
        unread: frame.unread,
    }
}

fn key(record: &Queued) -> Key {
    Key::of(&read(record))
}

fn uid(record: &Queued) -> u32 {
    read(record).header.uid
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    /// This process, as one of this user.
    fn known(desk: &mut Desk, uid: u32) -> Key {
        let key = Key::of_this();
        let known = Known::new(key, uid, Instant::now());
        desk.processes.insert(key, known);
        desk.keys.insert(1, key);
        key
    }

    fn exe() -> File {
        File::open("/proc/self/exe").unwrap()
    }

    #[test]
    fn a_file_that_ended_the_reader_is_not_handed_over_again_until_it_is_another() {
        let mut desk = Desk::default();
        let key = known(&mut desk, 1000);
        assert_eq!(desk.judge(1000, Some(exe())).0, Opened::File);
        let id = identify(&exe().into()).unwrap();
        for slow in [false, true] {
            let subject = Subject::File(id);
            desk.blame(Failed { subject, slow }, Some(key));
            let why = if slow {
                Unread::TooSlow
            } else {
                Unread::Crashed
            };
            assert_eq!(desk.judge(1000, Some(exe())).0, Opened::Refused(why));
        }
        assert_eq!(id.inode, exe().metadata().unwrap().ino());
        let other = FileId {
            modified: id.modified + 1,
            ..id
        };
        desk.refused = HashMap::from([(other, Unread::Crashed)]);
        assert_eq!(desk.judge(1000, Some(exe())).0, Opened::File);
        assert_eq!(desk.judge(1000, None).0, Opened::No);
    }

    #[test]
    fn a_user_whose_files_end_the_reader_again_and_again_is_not_believed_any_more() {
        let mut desk = Desk::default();
        let key = known(&mut desk, 1000);
        for inode in 0..MOST_DEATHS {
            assert_eq!(desk.judge(1000, Some(exe())).0, Opened::File);
            let id = FileId {
                device: 0,
                inode: inode.into(),
                size: 0,
                modified: 0,
            };
            let subject = Subject::File(id);
            desk.blame(
                Failed {
                    subject,
                    slow: false,
                },
                Some(key),
            );
        }
        let distrusted = Opened::Refused(Unread::Distrusted);
        assert_eq!(desk.judge(1000, Some(exe())).0, distrusted);
        assert_eq!(desk.judge(1001, Some(exe())).0, Opened::File);
    }

    #[test]
    fn a_process_that_ends_the_reader_twice_is_left_alone() {
        let mut desk = Desk::default();
        let key = known(&mut desk, 1000);
        let failed = Failed {
            subject: Subject::Process(1),
            slow: false,
        };
        desk.blame(failed, Some(key));
        assert_eq!(desk.processes[&key].state, Ok(()));
        desk.blame(failed, Some(key));
        assert_eq!(desk.processes[&key].state, Err(StackEnd::NoNames));
    }

    #[test]
    fn cpu_time_is_a_part_of_the_time_that_passes() {
        let now = Instant::now();
        let mut share = Share::new(now);
        let burst = budget::CPU_BURST.as_micros() as i64;
        share.spend(budget::CPU_BURST * 2);
        assert_eq!(share.left(now), -burst);
        let later = now + budget::CPU_BURST * budget::CPU_PART;
        assert_eq!(share.left(later), 0);
        assert_eq!(share.left(later + Duration::from_secs(3600)), burst);
    }

    #[test]
    fn a_process_without_cpu_time_left_has_its_mappings_not_read_again() {
        let mut desk = Desk::default();
        let key = known(&mut desk, 1000);
        assert_eq!(desk.maps(1, true).0, MapsAnswer::File);
        assert_eq!(desk.maps(1, false).0, MapsAnswer::TooSoon);
        let known = desk.processes.get_mut(&key).unwrap();
        known.share.spend(budget::CPU_BURST * 2);
        assert_eq!(desk.maps(1, true).0, MapsAnswer::Spent);
        assert_eq!(desk.maps(2, true).0, MapsAnswer::End(StackEnd::Gone));
    }

    #[test]
    fn what_is_told_is_limited_for_each_user_and_for_all() {
        let (tell, told) = std::sync::mpsc::sync_channel(1 << 16);
        let mut teller = Teller::new(tell, Arc::default());
        let name = "n".repeat(1 << 20);
        let mut stack = |address: u64, uid: u32| {
            let id = teller.next_id();
            let record = Queued {
                pid: 7,
                bytes: vec![0; 400].into(),
            };
            teller.begin(id, &record, 0, StackEnd::Outermost);
            let frame = Frame {
                function: Some(name.clone()),
                address,
                ..Frame::default()
            };
            teller.stack(id, vec![frame], Some(uid));
            match told.recv() {
                Ok(Told::Event(Event::Stack(stack))) => stack.end,
                _ => panic!("a stack is told"),
            }
        };
        let fits = (budget::TOLD >> 20) as u64 / budget::SHARE as u64 - 1;
        for address in 0..fits {
            assert_eq!(stack(address, 1000), StackEnd::Outermost);
        }
        assert_eq!(stack(fits, 1000), StackEnd::TooMany);
        // The same again costs nothing, and others have their share.
        assert_eq!(stack(0, 1000), StackEnd::Outermost);
        let mut others = 0..1000;
        let full =
            others.find(|other| stack(100 + other, 2000 + *other as u32) != StackEnd::Outermost);
        assert!(full.is_some_and(|full| full < 2 * fits));
    }
}
