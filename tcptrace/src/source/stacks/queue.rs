//! Records of stacks that wait for the opener.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::budget;

/// Both ends: the thread that drains the ring buffer puts in and never waits, the opener takes out.
#[derive(Clone, Default)]
pub(super) struct Queue(Arc<Shared>);

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

#[derive(Default)]
struct Waiting {
    records: VecDeque<Queued>,
    bytes: usize,
    /// By pid: nobody takes all of it.
    by_process: HashMap<u32, usize>,
    commands: VecDeque<Command>,
}

/// A record: a `tcptrace_ebpf::Stack`, cut off behind what was copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Queued {
    pub(super) pid: u32,
    pub(super) bytes: Box<[u8]>,
}

/// What else the opener is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Now and then: forget what is gone, see what runtimes have written.
    Tend,
    /// Nothing more comes.
    Finish,
}

impl Queue {
    /// Whether there was room.
    pub(super) fn put(&self, record: Queued) -> bool {
        let mut waiting = self.waiting();
        let len = record.bytes.len();
        let own = waiting.by_process.get(&record.pid).copied().unwrap_or(0) + len;
        if waiting.bytes + len > budget::QUEUE || own > budget::QUEUE / budget::SHARE {
            return false;
        }
        waiting.by_process.insert(record.pid, own);
        waiting.bytes += len;
        waiting.records.push_back(record);
        drop(waiting);
        self.0.came.notify_one();
        true
    }

    pub(super) fn command(&self, command: Command) {
        let mut waiting = self.waiting();
        if !waiting.commands.contains(&command) {
            waiting.commands.push_back(command);
        }
        drop(waiting);
        self.0.came.notify_one();
    }

    /// The next records, `most` of them, if there are any.
    pub(super) fn take(&self, most: usize) -> Vec<Queued> {
        let mut waiting = self.waiting();
        let count = waiting.records.len().min(most);
        let taken: Vec<_> = waiting.records.drain(..count).collect();
        for record in &taken {
            let len = record.bytes.len();
            waiting.bytes -= len;
            if let Some(own) = waiting.by_process.get_mut(&record.pid) {
                *own -= len;
                if *own == 0 {
                    waiting.by_process.remove(&record.pid);
                }
            }
        }
        taken
    }

    /// The next command. Behind all records that came before it.
    pub(super) fn take_command(&self) -> Option<Command> {
        self.waiting().commands.pop_front()
    }

    /// Waits until something comes, but not for long.
    pub(super) fn wait(&self, most: Duration) {
        let waiting = self.waiting();
        if waiting.records.is_empty() && waiting.commands.is_empty() {
            let _ = self.0.came.wait_timeout(waiting, most);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        let waiting = self.0.waiting.lock();
        waiting.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(pid: u32) -> Queued {
        Queued {
            pid,
            bytes: vec![0; 64 << 10].into(),
        }
    }

    #[test]
    fn it_is_bounded_and_one_process_has_a_share_of_it() {
        let queue = Queue::default();
        let most = budget::QUEUE / (64 << 10);
        let fill = |pid| (0..).take_while(|_| queue.put(record(pid))).count();
        assert_eq!(fill(1), most / budget::SHARE);
        assert_eq!(fill(2), most - most / budget::SHARE);
        assert_eq!(fill(3), 0);
        assert_eq!(queue.take(1), [record(1)]);
        assert_eq!((fill(2), fill(1)), (0, 1));
        assert_eq!(queue.take(usize::MAX).len(), most);
        assert!(queue.take(1).is_empty());
        assert_eq!(fill(3), most / budget::SHARE);
    }

    #[test]
    fn a_command_is_not_given_twice() {
        let queue = Queue::default();
        for _ in 0..3 {
            queue.command(Command::Tend);
        }
        queue.command(Command::Finish);
        let all: Vec<_> = std::iter::from_fn(|| queue.take_command()).collect();
        assert_eq!(all, [Command::Tend, Command::Finish]);
    }
}
