//! What an independent onlooker sees of a namespace's sockets, every 10 ms.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{Diag, boottime};

/// A socket that stayed in one state. All times are nanoseconds since boot (`CLOCK_BOOTTIME`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The state's name.
    pub state: &'static str,
    /// The last look before [`first`](Self::first); it was not in this state then.
    pub before: i64,
    /// The first look that saw it.
    pub first: i64,
    /// The last look that saw it.
    pub last: i64,
    /// The look after [`last`](Self::last), which did not; 0 while it lasts.
    pub gone: i64,
    /// When its timer expires. No look says it too early, so the earliest is best, until it is armed
    /// again.
    pub expires: i64,
}

type Sightings = HashMap<String, Vec<Sighting>>;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Observer {
    seen: Arc<Mutex<Sightings>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    pub(crate) fn start(diag: Diag) -> Self {
        let seen = Arc::new(Mutex::new(Sightings::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let watch = {
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            let mut before = boottime();
            move || {
                while !stop.load(Ordering::Relaxed) {
                    before = look(
                        &diag,
                        before,
                        &mut seen.lock().expect("no panic while looking"),
                    );
                    thread::sleep(Duration::from_millis(10));
                }
            }
        };
        Self {
            seen,
            stop,
            thread: Some(thread::spawn(watch)),
        }
    }

    /// What was seen of the socket with this cookie, in order.
    ///
    /// # Panics
    /// When the watching thread has.
    #[must_use]
    pub fn of(&self, cookie: &str) -> Vec<Sighting> {
        let seen = self.seen.lock().expect("no panic while looking");
        seen.get(cookie).cloned().unwrap_or_default()
    }

    /// When a socket was in this state, if it has been seen there.
    #[must_use]
    pub fn state(&self, cookie: &str, state: &str) -> Option<Sighting> {
        self.of(cookie)
            .into_iter()
            .find(|sighting| sighting.state == state)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One look. `before` is the time of the look before this one; gives the time of this one.
fn look(diag: &Diag, before: i64, seen: &mut Sightings) -> i64 {
    // A list takes time to make: a socket that came or went meanwhile may be in it or not. Its first
    // moment bounds what is new, its last moment what is gone.
    let start = boottime();
    let rows = diag.rows();
    let now = boottime();
    for row in rows {
        let sightings = seen.entry(row.cookie).or_default();
        let expires = now + i64::from(row.expires) * 1_000_000;
        match sightings.last_mut() {
            Some(last) if last.state == row.state && last.gone == 0 => {
                last.last = start;
                let armed_again = expires > last.expires + 500_000_000;
                last.expires = if armed_again {
                    expires
                } else {
                    last.expires.min(expires)
                };
            }
            last => {
                if let Some(last) = last {
                    last.gone = now;
                }
                sightings.push(Sighting {
                    state: row.state,
                    before,
                    first: now,
                    last: start,
                    gone: 0,
                    expires,
                });
            }
        }
    }
    for last in seen
        .values_mut()
        .filter_map(|sightings| sightings.last_mut())
    {
        if last.gone == 0 && last.last != start {
            last.gone = now;
        }
    }
    start
}
