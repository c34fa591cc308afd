//! The tracker, fed with events as a kernel would write them.
//!
//! A [`World`] is a tracker with what it told. Times are milliseconds since the beginning of the test;
//! facts are compared as text, so that a whole story can be read at once.

mod dwell;
mod endings;
mod looks;
mod losses;
mod machine;
mod memory;
mod owners;
mod selection;
mod sites;
mod story;

use std::fmt::Write as _;

use tcptrace_ebpf::{Caller, State};

use super::{Change, Ending, Fact, TimeWaitEnd, Tracker};
use crate::{
    event::{
        Accept, Comm, End, Event, Holder, Look, Lost, Probes, Row, SCHEMA, Scope, Socket, Start,
        Task, TimeWait, Transition, Tuple, address_bytes,
    },
    select::{Selection, Sockets},
};
use State::{
    Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent,
    TimeWait as TimeWaitState,
};
pub(super) use story::Random;

/// Boot time at which tests begin: long after boot, so that times before them exist.
const BEGIN_NS: u64 = 1_000_000_000_000;
/// Jiffies at that time: below 2^32, which the 300 s after boot make them cross on real machines.
const BEGIN_JIFFIES: u64 = 4_294_900_000;
const NETNS: u32 = 4_026_531_840;

const fn ns(ms: u64) -> u64 {
    BEGIN_NS + ms * 1_000_000
}

/// A process that may own sockets.
fn process(pid: u32, comm: &str) -> Task {
    Task {
        pid,
        comm: Comm::new(comm.as_bytes()),
        start: u64::from(pid) * 1_000_000_000,
        uid: 1000,
        kthread: false,
        exiting: false,
        tree: false,
    }
}

/// The innocent process that every softirq of these tests interrupts.
fn decoy() -> Task {
    process(666, "decoy")
}

fn curl() -> Task {
    process(7, "curl")
}

fn nginx() -> Task {
    process(8, "nginx")
}

fn socket(cookie: u64, local: (&str, u16), remote: (&str, u16)) -> Socket {
    let bytes = |addr: &str| address_bytes(addr.parse().unwrap());
    Socket {
        cookie,
        netns: NETNS,
        tuple: Tuple {
            local_addr: bytes(local.0),
            remote_addr: bytes(remote.0),
            local_port: local.1,
            remote_port: remote.1,
        },
    }
}

/// Socket 1, which connected to port 80.
fn client() -> Socket {
    socket(1, ("10.0.0.1", 40_000), ("10.0.0.2", 80))
}

/// Socket 2, which a listener on port 80 made.
fn server() -> Socket {
    socket(2, ("10.0.0.2", 80), ("10.0.0.1", 40_000))
}

/// Socket 9, a listener on every address.
fn listener() -> Socket {
    socket(9, ("0.0.0.0", 80), ("0.0.0.0", 0))
}

/// A change in softirq: nobody's call, and the decoy is stamped on it.
fn change(ms: u64, socket: Socket, old: State, new: State) -> Transition {
    Transition {
        time: ns(ms),
        socket,
        old,
        new,
        error: 0,
        stale_port: 0,
        no_time_wait: false,
        shutdown: 0,
        owned: false,
        has_socket: true,
        inode: 0,
        cgroup: 0,
        task: decoy(),
    }
}

/// What a change can have besides.
trait Details {
    /// Made by a call of this process.
    fn by(self, task: Task) -> Self;
    fn error(self, errno: i32) -> Self;
    /// It has no file: not accepted yet, or closed by its process.
    fn no_socket(self) -> Self;
    fn cgroup(self, id: u64) -> Self;
}

impl Details for Transition {
    fn by(self, task: Task) -> Self {
        Self {
            owned: true,
            task,
            ..self
        }
    }

    fn error(self, errno: i32) -> Self {
        Self {
            error: errno as u32,
            ..self
        }
    }

    fn no_socket(self) -> Self {
        Self {
            has_socket: false,
            ..self
        }
    }

    fn cgroup(self, id: u64) -> Self {
        Self { cgroup: id, ..self }
    }
}

impl From<Transition> for Event {
    fn from(transition: Transition) -> Self {
        Self::Transition(transition)
    }
}

/// A tracker, and what it told.
struct World {
    tracker: Tracker,
    hz: u64,
    boot_to_monotonic_ns: i64,
    /// The kernel keeps an entry stamp (6.14 and later).
    stamps: bool,
    changes: Vec<String>,
    ends: Vec<String>,
    lost: u64,
}

impl World {
    /// As on a recent kernel: timer probes, 250 Hz, entry stamps.
    fn new() -> Self {
        Self::of(Selection::default())
    }

    fn of(selection: Selection) -> Self {
        let mut world = Self {
            tracker: Tracker::new(selection.clone()),
            hz: 250,
            boot_to_monotonic_ns: 0,
            stamps: true,
            changes: Vec::new(),
            ends: Vec::new(),
            lost: 0,
        };
        world.start(Probes::Tracepoints, selection.sockets);
        world
    }

    fn with_probes(probes: Probes) -> Self {
        let mut world = Self::new();
        world.start(probes, Sockets::default());
        world
    }

    fn with_hz(hz: u64) -> Self {
        let mut world = Self::new();
        world.hz = hz;
        world.start(Probes::Tracepoints, Sockets::default());
        world
    }

    fn without_stamps(mut self) -> Self {
        self.stamps = false;
        self
    }

    fn start(&mut self, probes: Probes, sockets: Sockets) {
        self.feed(Event::Start(Box::new(Start {
            schema: SCHEMA,
            version: "0".into(),
            time: BEGIN_NS,
            boot_to_utc_ns: 0,
            boot_to_monotonic_ns: self.boot_to_monotonic_ns,
            boot_id: "b".into(),
            host: "h".into(),
            kernel: "6.18".into(),
            hz: self.hz as u32,
            netns: NETNS,
            transitions: true,
            private_pids: false,
            stacks: false,
            time_wait: probes,
            accept: probes,
            sockets,
        })));
    }

    fn feed(&mut self, event: impl Into<Event>) {
        let (changes, ends, lost) = (&mut self.changes, &mut self.ends, &mut self.lost);
        self.tracker.feed(&event.into(), &mut |fact| match fact {
            Fact::Change(change) => changes.push(change_text(&change)),
            Fact::TimeWaitEnd(end) => ends.push(end_text(&end)),
            Fact::Lost(it) => *lost += it.records,
            _ => {}
        });
    }

    fn feed_all<E: Into<Event>>(&mut self, events: impl IntoIterator<Item = E>) {
        for event in events {
            self.feed(event);
        }
    }

    /// What was told of changes since the last time.
    #[track_caller]
    fn assert_changes(&mut self, expected: &[&str]) {
        assert_eq!(std::mem::take(&mut self.changes), expected);
    }

    /// What was told of ends of TIME_WAIT since the last time.
    #[track_caller]
    fn assert_ends(&mut self, expected: &[&str]) {
        assert_eq!(std::mem::take(&mut self.ends), expected);
    }

    /// Nothing is kept, and nothing is waited for.
    #[track_caller]
    fn assert_empty(&self) {
        let tracker = &self.tracker;
        assert!(tracker.is_empty(), "{} sockets kept", tracker.len());
        assert_eq!(tracker.waiting, 0, "waiting");
        assert_eq!(tracker.uncertain, 0, "uncertain");
        assert_eq!(tracker.unexplained, 0, "unexplained");
        assert_eq!(tracker.pending.len(), 0, "pending");
        assert_eq!(tracker.listeners.len(), 0, "listeners");
        assert_eq!(tracker.needs().tick_by, None);
        assert!(!tracker.needs().time_wait_look);
    }

    fn jiffies(&self, ms: u64) -> u64 {
        BEGIN_JIFFIES + ms * self.hz / 1000
    }

    /// `CLOCK_MONOTONIC` in milliseconds, as the kernel cuts it.
    fn stamp(&self, ms: u64) -> u32 {
        if self.stamps {
            (ns(ms).wrapping_add_signed(self.boot_to_monotonic_ns) / 1_000_000) as u32
        } else {
            0
        }
    }

    /// A timer record of a timewait socket. `armed`: when the timer was started, and for how long.
    fn timer(&self, ms: u64, socket: Socket, substate: State, armed: (u64, u64)) -> TimeWait {
        TimeWait {
            time: ns(ms),
            socket,
            jiffies: self.jiffies(ms),
            expires: self.jiffies(armed.0) + armed.1 * self.hz / 1000,
            entry_stamp: if substate == TimeWaitState {
                self.stamp(armed.0)
            } else {
                0
            },
            substate,
            callers: 0,
        }
    }

    /// Its making, or another start, for a minute.
    fn armed(&self, ms: u64, socket: Socket, substate: State) -> Event {
        Event::TimeWaitArmed(self.timer(ms, socket, substate, (ms, 60_000)))
    }

    /// Its end, after a timer that was started at `armed` for a minute.
    fn done(&self, ms: u64, socket: Socket, substate: State, armed: u64) -> Event {
        Event::TimeWaitDone(self.timer(ms, socket, substate, (armed, 60_000)))
    }

    /// The same, and these were on the stack.
    fn done_by(&self, ms: u64, socket: Socket, armed: u64, callers: &[Caller]) -> Event {
        Event::TimeWaitDone(TimeWait {
            callers: callers.iter().fold(0, |bits, caller| bits | caller.bit()),
            ..self.timer(ms, socket, TimeWaitState, (armed, 60_000))
        })
    }

    /// The usual client, from `connect()` at 0 to FIN_WAIT2 at 300 ms.
    fn reach_fin_wait2(&mut self, socket: Socket) {
        let before = Socket {
            tuple: Tuple {
                local_port: 0,
                ..socket.tuple
            },
            ..socket
        };
        self.feed(change(0, before, Close, SynSent).by(curl()));
        self.feed(change(100, socket, SynSent, Established));
        self.feed(change(200, socket, Established, FinWait1).by(curl()));
        self.feed(change(300, socket, FinWait1, FinWait2).no_socket());
    }

    /// The same, and a FIN_WAIT2 timewait socket takes over.
    fn reach_orphan(&mut self, socket: Socket) {
        self.reach_fin_wait2(socket);
        self.feed(self.armed(300, socket, FinWait2));
        self.feed(change(300, socket, FinWait2, Close).no_socket());
    }

    /// The same, and TIME_WAIT is entered directly.
    fn reach_time_wait(&mut self, socket: Socket) {
        self.reach_fin_wait2(socket);
        self.feed(self.armed(400, socket, TimeWaitState));
        self.feed(change(400, socket, FinWait2, Close).no_socket());
    }

    fn forget_told(&mut self) {
        self.changes.clear();
        self.ends.clear();
    }
}

/// A full socket in a look.
fn row(ms: u64, socket: Socket, state: State, inode: u32) -> Event {
    Event::Socket(Row {
        time: ns(ms),
        socket,
        state,
        inode,
        cgroup: 0,
        time_wait_ms: None,
        detail: None,
    })
}

/// A timewait socket in a look.
fn time_wait_row(ms: u64, socket: Socket, state: State, left_ms: u32) -> Event {
    Event::Socket(Row {
        time: ns(ms),
        socket,
        state,
        inode: 0,
        cgroup: 0,
        time_wait_ms: Some(left_ms),
        detail: None,
    })
}

fn holder(inode: u32, task: Task) -> Event {
    Event::Holder(Holder {
        inode,
        fd: None,
        pid: task.pid,
        comm: task.comm,
        start: task.start,
        tree: task.tree,
    })
}

fn accept(ms: u64, socket: Socket, task: Task) -> Event {
    Event::Accept(Accept {
        time: ns(ms),
        socket,
        inode: 0,
        task,
    })
}

fn look(ms: u64, scope: Scope) -> Event {
    Event::Look(Look {
        time: ns(ms),
        scope,
    })
}

fn look_end(ms: u64, netns: &[u32]) -> Event {
    Event::LookEnd {
        time: ns(ms),
        netns: netns.to_vec(),
    }
}

/// A look at everything, in [`NETNS`], that shows these rows.
fn all(world: &mut World, ms: u64, rows: &[Event]) {
    all_of(world, ms, rows, &[NETNS]);
}

fn all_of(world: &mut World, ms: u64, rows: &[Event], netns: &[u32]) {
    world.feed(look(ms, Scope::All));
    world.feed_all(rows.iter().cloned());
    world.feed(look_end(ms + 5, netns));
}

fn time_waits(world: &mut World, ms: u64, rows: &[Event]) {
    world.feed(look(ms, Scope::TimeWait));
    world.feed_all(rows.iter().cloned());
    world.feed(look_end(ms + 5, &[NETNS]));
}

fn lost(ms: u64) -> Event {
    Event::Lost(Lost {
        time: ns(ms),
        records: 1,
        missed: 0,
    })
}

fn tick(ms: u64) -> Event {
    Event::Tick { time: ns(ms) }
}

fn overflow(ms: u64, count: u64) -> Event {
    Event::Overflow {
        time: ns(ms),
        netns: NETNS,
        count,
    }
}

fn end(ms: u64) -> Event {
    Event::End(End {
        time: ns(ms),
        records: 0,
        lost: 0,
        mptcp: 0,
    })
}

/// Milliseconds since the beginning.
fn at(time: u64) -> String {
    format!("{}", (time as f64 - BEGIN_NS as f64) / 1e6)
}

fn owner_text(owner: Option<super::Owner>) -> String {
    owner.map_or("nobody".to_owned(), |owner| {
        format!("{} via {}", owner.comm, owner.via.name())
    })
}

/// `1 300 FIN_WAIT1>FIN_WAIT2 after 100, curl via connect`: socket, when, what, whose.
fn change_text(change: &Change<'_>) -> String {
    let mut text = format!(
        "{:x} {} {}>{}",
        change.socket.cookie,
        at(change.time),
        change.from.name(),
        change.to.name()
    );
    if let Some(after) = change.after {
        let _ = write!(text, " after {}", after as f64 / 1e6);
    }
    let _ = write!(text, ", {}", owner_text(change.owner));
    if change.error != 0 {
        let _ = write!(text, ", error {}", change.error);
    }
    if let Some(container) = change.container {
        let _ = write!(text, ", in {container}");
    }
    if change.late {
        text.push_str(", late");
    }
    if change.time_error != 0 {
        let _ = write!(text, " off by up to {}", change.time_error / 1_000_000);
    }
    text
}

/// `1 60400 expired, entered 400, dwell 60000, fin_wait2 100, rearmed no, curl via connect`.
fn end_text(end: &TimeWaitEnd<'_>) -> String {
    let ms = |ns: Option<u64>| ns.map_or("?".to_owned(), |ns| (ns as f64 / 1e6).to_string());
    let mut text = format!(
        "{:x} {} {}, entered {}, dwell {}{}",
        end.socket.cookie,
        at(end.time),
        end.ending.name(),
        end.entered.map_or("?".to_owned(), at),
        if end.dwell_at_least { "at least " } else { "" },
        ms(end.dwell),
    );
    if end.dwell_error != 0 {
        let _ = write!(text, " off by up to {}", end.dwell_error / 1_000_000);
    }
    if end.fin_wait2.is_some() {
        let _ = write!(text, ", fin_wait2 {}", ms(end.fin_wait2));
    }
    let rearmed = match end.rearmed {
        Some(true) => "yes",
        Some(false) => "no",
        None => "?",
    };
    let _ = write!(text, ", rearmed {rearmed}, {}", owner_text(end.owner));
    if let Some(container) = end.container {
        let _ = write!(text, ", in {container}");
    }
    text
}

#[test]
fn every_ending_has_its_own_name() {
    let names: std::collections::BTreeSet<_> =
        Ending::ALL.iter().map(|ending| ending.name()).collect();
    assert_eq!(names.len(), Ending::ALL.len());
}
