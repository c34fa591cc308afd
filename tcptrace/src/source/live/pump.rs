//! Keeps the ring buffer from running over while a scan goes on.

use std::{
    ops::ControlFlow,
    sync::{
        Mutex, PoisonError,
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::Duration,
};

use super::reader::{Limits, Reader};
use crate::{event::Event, kernel::ring::Mark, source::Sink};

/// What a scan emits goes through here, and between two system calls the scan [pauses](Self::pause): then records are
/// read, if many wait.
///
/// A record must not come before an older picture of its socket, which would then count as news. What a system call
/// shows was so when the call was made, or after it. So a scan [marks](Self::mark) where the probes had come to before the
/// call that the kernel used to gather what will be emitted *next*, and a pause reads no further than that.
pub(in crate::source) struct Pump<'a, S> {
    pub(in crate::source) reader: &'a mut Reader,
    sink: &'a mut S,
    limits: Limits,
    mark: Option<Mark>,
    emitted: u32,
}

/// After so many events, a scan pauses between system calls as well.
const PAUSE_EVERY: u32 = 1024;
/// How often a scan pauses while a thread works for it.
const BESIDE: Duration = Duration::from_millis(5);

impl<'a, S: Sink> Pump<'a, S> {
    pub(super) fn new(reader: &'a mut Reader, sink: &'a mut S, limits: Limits) -> Self {
        Self {
            mark: reader.mark(),
            reader,
            sink,
            limits,
            emitted: 0,
        }
    }

    /// Emits what the scan shows.
    pub(in crate::source) fn emit(&mut self, event: &Event) {
        if let Event::Socket(row) = event {
            self.reader
                .cgroups
                .resolve(row.cgroup, &mut |event| self.sink.emit(event));
        }
        self.sink.emit(event);
        self.emitted += 1;
    }

    /// Whether so much was emitted that it is time to pause.
    pub(in crate::source) const fn is_due(&self) -> bool {
        self.emitted >= PAUSE_EVERY
    }

    /// Everything that is emitted after the next pause is of now, or later.
    pub(in crate::source) fn mark(&mut self) {
        self.mark = self.reader.mark();
    }

    /// Hands output over, and reads records from before the mark if many wait. Breaks off the scan if it is to end.
    pub(in crate::source) fn pause(&mut self) -> ControlFlow<()> {
        if self.emitted > 0 {
            self.emitted = 0;
            self.sink.flush();
        }
        if self.limits.are_reached(self.sink) {
            return ControlFlow::Break(());
        }
        self.reader.wait_room(&self.limits, self.sink)?;
        if self.reader.is_filling() {
            self.reader.drain(self.mark, &self.limits, self.sink)?;
        }
        ControlFlow::Continue(())
    }

    /// Has a thread of its own do `work`, which makes many system calls or long ones, and pauses meanwhile. Where there can
    /// be no thread, it is done here.
    pub(in crate::source) fn beside<T: Send>(
        &mut self,
        name: &str,
        work: impl FnOnce() -> T + Send,
    ) -> ControlFlow<(), T> {
        let work = Mutex::new(Some(work));
        let take = || work.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (done, is_done) = sync_channel(1);
        let result = thread::scope(|scope| {
            let started = thread::Builder::new()
                .name(name.to_owned())
                .spawn_scoped(scope, || {
                    // Somebody waits for it until it has come.
                    let _ = done.send(take().map(|work| work()));
                });
            if started.is_err() {
                return ControlFlow::Continue(None);
            }
            let mut go_on = ControlFlow::Continue(());
            loop {
                match is_done.recv_timeout(BESIDE) {
                    Err(RecvTimeoutError::Timeout) if go_on.is_continue() => {
                        go_on = self.pause_now();
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    // A thread that panics has its panic passed on by the scope.
                    Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
                    Ok(result) => return go_on.map_continue(|()| result),
                }
            }
        })?;
        match result {
            Some(result) => ControlFlow::Continue(result),
            None => match take() {
                Some(work) => ControlFlow::Continue(work()),
                None => ControlFlow::Break(()),
            },
        }
    }

    /// Pauses where nothing that was gathered before is still to be emitted.
    pub(in crate::source) fn pause_now(&mut self) -> ControlFlow<()> {
        self.mark();
        self.pause()
    }
}
