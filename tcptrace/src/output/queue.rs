//! Output on its way to a sink that may be slow, or blocked: written by a thread of its own, behind a bounded queue.
//!
//! Whoever makes output never waits for the sink. It asks for [room](Queue::has_room) before it makes more, and may
//! [wait](Queue::wait_room) for some time.

use std::{
    collections::VecDeque,
    io::{self, Write},
    mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::Notify;

/// How many bytes may wait to be written before there is no room for more: JSON lines of 25,000 transitions. Output
/// that one batch of records makes may go beyond that.
pub const QUEUE_BYTES: usize = 8 << 20;
/// A buffer that has grown larger than this is given back to the system, and not used again.
const KEPT_CAPACITY: usize = 1 << 20;
/// How many empty buffers are kept to be used again.
const KEPT_BUFFERS: usize = 4;

/// However late it is when the queue is closed, the sink has this long to take what waits: a last scan that took too long
/// must not cost the output.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);

/// Opens the sink. It may block, as opening a FIFO does: it is called by the thread that writes.
pub type Open = Box<dyn FnOnce() -> io::Result<Sink> + Send>;

/// Where output goes in the end.
pub type Sink = Box<dyn Write + Send>;

/// A queue of output. Clones are the same queue.
#[derive(Clone)]
pub struct Queue {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Something was queued, or the queue was closed.
    queued: Condvar,
    /// Something was written, or writing has failed.
    written: Condvar,
    /// How many bytes wait, those under way to the sink included.
    bytes: AtomicUsize,
    /// Writing has failed.
    failed: Notify,
}

/// Who writes.
enum Writer {
    /// Nobody: there was no output yet.
    Nobody(Open),
    /// The thread.
    Thread,
    /// Whoever makes output, where there can be no thread, and waits for the sink.
    Maker(Sink),
}

struct State {
    writer: Writer,
    chunks: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// No more will come.
    is_closed: bool,
    /// The thread has come to its end.
    is_over: bool,
    /// Why writing failed; taken by the first that asks.
    error: Option<io::Error>,
    /// When the sink last took something.
    progress: Instant,
}

/// Output that the sink did not take in time.
#[derive(Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// How much of it there is.
    pub bytes: usize,
}

impl Queue {
    /// A queue to the sink that `open` opens. The thread that writes is started with the first output.
    #[must_use]
    pub fn new(open: Open) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    writer: Writer::Nobody(open),
                    chunks: VecDeque::new(),
                    spare: Vec::new(),
                    is_closed: false,
                    is_over: false,
                    error: None,
                    progress: Instant::now(),
                }),
                queued: Condvar::new(),
                written: Condvar::new(),
                bytes: AtomicUsize::new(0),
                failed: Notify::new(),
            }),
        }
    }

    /// Queues what is in `buffer`, and leaves an empty one there. It never waits, unless there can be no thread.
    ///
    /// # Errors
    /// Why the sink, earlier, could not be opened or written to.
    pub fn push(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut state = self.shared.lock();
        if let Some(error) = state.error.take() {
            return Err(error);
        }
        if buffer.is_empty() {
            return Ok(());
        }
        self.start(&mut state)?;
        if let Writer::Maker(sink) = &mut state.writer {
            sink.write_all(buffer)?;
            buffer.clear();
            return Ok(());
        }
        if state.is_over {
            // Its error has been told before.
            buffer.clear();
            return Ok(());
        }
        self.shared.bytes.fetch_add(buffer.len(), Ordering::Relaxed);
        let spare = state.spare.pop().unwrap_or_default();
        state.chunks.push_back(mem::replace(buffer, spare));
        drop(state);
        self.shared.queued.notify_one();
        Ok(())
    }

    /// Starts the thread, if nobody writes yet.
    fn start(&self, state: &mut State) -> io::Result<()> {
        let open = match mem::replace(&mut state.writer, Writer::Thread) {
            Writer::Nobody(open) => Arc::new(Mutex::new(Some(open))),
            started => {
                state.writer = started;
                return Ok(());
            }
        };
        let take = |open: &Mutex<Option<Open>>| {
            let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
            open.take()
        };
        let (shared, of_thread) = (Arc::clone(&self.shared), Arc::clone(&open));
        let started = thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || take(&of_thread).map(|open| shared.write(open)));
        if started.is_err()
            && let Some(open) = take(&open)
        {
            state.is_over = true;
            state.writer = Writer::Maker(open()?);
        }
        Ok(())
    }

    /// Whether more output may be made.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.shared.bytes.load(Ordering::Relaxed) < QUEUE_BYTES
    }

    /// Waits until there is room, or the sink has failed, but no longer than `limit`. Returns whether there is room.
    #[must_use]
    pub fn wait_room(&self, limit: Duration) -> bool {
        let blocked = |state: &mut State| !self.has_room() && !state.is_over;
        let state = self.shared.lock();
        let waited = self
            .shared
            .written
            .wait_timeout_while(state, limit, blocked);
        drop(waited);
        self.has_room()
    }

    /// Comes back when writing has failed: the next [`push`](Self::push) has the error.
    pub async fn failed(&self) {
        self.shared.failed.notified().await;
    }

    /// Waits until all is written, as long as the sink takes something every `patience`, and not beyond `deadline`; but a
    /// quarter of a second at least.
    ///
    /// # Errors
    /// Why the sink failed. Of kind [`TimedOut`](io::ErrorKind::TimedOut), with [`Unwritten`] inside, if it did not
    /// take all in time.
    pub fn close(&self, patience: Duration, deadline: Option<Instant>) -> io::Result<()> {
        let deadline = deadline.map(|deadline| deadline.max(Instant::now() + LEAST_PATIENCE));
        let mut state = self.shared.lock();
        state.is_closed = true;
        state.progress = Instant::now();
        self.shared.queued.notify_one();
        // Without any output, nothing is there to be waited for.
        if matches!(state.writer, Writer::Nobody(_)) {
            return Ok(());
        }
        while !state.is_over {
            let end = state.progress + patience;
            let end = deadline.map_or(end, |deadline| deadline.min(end));
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let bytes = self.shared.bytes.load(Ordering::Relaxed);
                // Then all is written, and the thread has only not got a CPU to end.
                if bytes == 0 {
                    return Ok(());
                }
                return Err(io::Error::new(io::ErrorKind::TimedOut, Unwritten { bytes }));
            }
            let waited = self.shared.written.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.error.take().map_or(Ok(()), Err)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nobody panics while holding it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread does.
    fn write(&self, open: Open) {
        let ended = open().and_then(|mut sink| {
            while let Some(mut chunk) = self.next() {
                sink.write_all(&chunk)?;
                self.bytes.fetch_sub(chunk.len(), Ordering::Relaxed);
                let mut state = self.lock();
                state.progress = Instant::now();
                if state.spare.len() < KEPT_BUFFERS && chunk.capacity() <= KEPT_CAPACITY {
                    chunk.clear();
                    state.spare.push(chunk);
                }
                drop(state);
                self.written.notify_all();
            }
            sink.flush()
        });
        let mut state = self.lock();
        state.is_over = true;
        if let Err(error) = ended {
            state.error = Some(error);
            state.chunks.clear();
            self.bytes.store(0, Ordering::Relaxed);
            self.failed.notify_one();
        }
        drop(state);
        self.written.notify_all();
    }

    /// The next chunk to write; `None` when all is written and no more will come.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if let Some(chunk) = state.chunks.pop_front() {
                return Some(chunk);
            }
            if state.is_closed {
                return None;
            }
            let waited = self.queued.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl std::fmt::Display for Unwritten {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} bytes were not taken in time: whatever reads it is slow, stopped, or blocked",
            self.bytes
        )
    }
}

impl std::error::Error for Unwritten {}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, sync::mpsc};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn queue(sink: impl Write + Send + 'static) -> Queue {
        Queue::new(Box::new(move || Ok(Box::new(sink))))
    }

    /// A sink that takes a chunk whenever it is allowed to.
    struct Slow(mpsc::Receiver<()>, mpsc::Sender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            self.1.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_arrives_in_order_and_buffers_come_back() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = queue(writer);
        let mut buffer = Vec::with_capacity(64);
        for number in 0..1000 {
            buffer.extend_from_slice(format!("{number} ").as_bytes());
            queue.push(&mut buffer).unwrap();
            assert!(buffer.is_empty());
        }
        queue.close(SOON, None).unwrap();
        drop(queue);
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        let numbers: Vec<u32> = all.split_whitespace().flat_map(str::parse).collect();
        assert!(numbers.iter().copied().eq(0..1000), "{all}");
    }

    #[test]
    fn a_sink_that_takes_nothing_leaves_no_room_and_does_not_block() {
        let (allow, allowed) = mpsc::channel();
        let (taken, takes) = mpsc::channel();
        let queue = queue(Slow(allowed, taken));
        let mut pushed = 0;
        while queue.has_room() {
            queue.push(&mut vec![0; 1 << 20]).unwrap();
            pushed += 1;
        }
        assert_eq!(pushed, QUEUE_BYTES >> 20);
        assert!(!queue.wait_room(Duration::from_millis(10)));
        allow.send(()).unwrap();
        takes.recv_timeout(SOON).unwrap();
        assert!(queue.wait_room(SOON));
        // It does not end by itself, and what it has not taken is counted.
        let error = queue.close(Duration::from_millis(20), None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let unwritten = error.downcast::<Unwritten>().unwrap();
        assert_eq!(unwritten.bytes, (pushed - 1) << 20);
    }

    #[test]
    fn a_slow_sink_is_waited_for_as_long_as_it_takes_something() {
        let (allow, allowed) = mpsc::channel();
        let (taken, takes) = mpsc::channel();
        let queue = queue(Slow(allowed, taken));
        for _ in 0..10 {
            queue.push(&mut vec![0; 8]).unwrap();
        }
        let slow = thread::spawn(move || {
            for _ in 0..10 {
                thread::sleep(Duration::from_millis(150));
                allow.send(()).unwrap();
            }
            takes.iter().count()
        });
        // Longer than for one, and shorter than for all.
        queue.close(Duration::from_secs(1), None).unwrap();
        drop(queue);
        assert_eq!(slow.join().unwrap(), 10);
    }

    /// A sink that takes everything in some milliseconds, and whose end takes for ever.
    struct Endless;

    impl Write for Endless {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            thread::sleep(Duration::from_millis(5));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            thread::sleep(Duration::from_secs(3600));
            Ok(())
        }
    }

    #[test]
    fn what_a_sink_takes_after_the_deadline_is_not_given_up() {
        let queue = queue(Endless);
        for _ in 0..4 {
            queue.push(&mut vec![0; 8]).unwrap();
        }
        queue.close(SOON, Some(Instant::now())).unwrap();
    }

    #[test]
    fn what_the_sink_fails_with_is_said_once() {
        let full = std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let queue = queue(full);
        queue.push(&mut b"line\n".to_vec()).unwrap();
        let deadline = Instant::now() + SOON;
        let error = loop {
            match queue.push(&mut Vec::new()) {
                Err(error) => break error,
                Ok(()) => assert!(Instant::now() < deadline, "no error"),
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        queue.push(&mut b"line\n".to_vec()).unwrap();
        assert!(queue.has_room());
        queue.close(SOON, None).unwrap();
    }

    #[test]
    fn a_sink_is_not_opened_for_nothing() {
        let queue = Queue::new(Box::new(|| panic!("opened")));
        queue.push(&mut Vec::new()).unwrap();
        queue.close(SOON, None).unwrap();
    }

    #[test]
    fn opening_may_block_and_is_not_waited_for_beyond_the_deadline() {
        let queue = Queue::new(Box::new(|| {
            thread::sleep(Duration::from_secs(3600));
            Ok(Box::new(io::sink()))
        }));
        queue.push(&mut b"line\n".to_vec()).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = queue.close(SOON, Some(deadline)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
