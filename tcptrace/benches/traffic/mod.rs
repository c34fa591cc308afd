//! Traffic as the probes would record it, for benchmarks: connections that the client closes first, one
//! after the other, each with a minute of TIME_WAIT.

use std::path::Path;

use tcptrace::{
    event::{self, Event, Probes, SCHEMA, Start, address_bytes},
    output::Output,
    select::{Selection, Sockets},
    tracker::{Change, Fact, Tracker},
};
use tcptrace_ebpf::{Flags, Header, Kind};

#[expect(
    dead_code,
    reason = "connections that end with a reset are for the feeder"
)]
pub(crate) mod connection;

use connection::Ends;

/// Nanoseconds from one connection to the next: 10,000 begin within the minute that TIME_WAIT lasts.
const EVERY: u64 = 6_000_000;
/// `CLOCK_BOOTTIME` of the first.
const BEGIN: u64 = 3_600_000_000_000;
const SECOND: u64 = 1_000_000_000;
const HZ: u64 = 250;
/// One jiffy, nanoseconds.
const TICK: u64 = SECOND / HZ;
const AF_INET: u8 = 2;
const NETNS: u32 = 4_026_531_840;
/// Boot time to UTC: some day in 2026.
pub(crate) const BOOT_TO_UTC_NS: i64 = 1_795_000_000_000_000_000;

/// What the tracker is told first.
pub(crate) fn start() -> Event {
    Event::Start(Box::new(Start {
        schema: SCHEMA,
        version: "bench".into(),
        time: BEGIN,
        boot_to_utc_ns: BOOT_TO_UTC_NS,
        boot_to_monotonic_ns: 0,
        boot_id: "".into(),
        host: "".into(),
        kernel: "".into(),
        hz: HZ as u32,
        netns: NETNS,
        transitions: true,
        private_pids: false,
        stacks: false,
        time_wait: Probes::Tracepoints,
        accept: Probes::Tracepoints,
        sockets: Sockets::default(),
    }))
}

/// Records one after the other, as the ring buffer hands them over.
#[derive(Default)]
pub(crate) struct Records {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Records {
    /// Those of so many connections: twelve of each, and later one of the end of its TIME_WAIT.
    pub(crate) fn of(connections: u64) -> Self {
        let minute = 60 * SECOND / EVERY;
        let mut records = Self::default();
        for index in 0..connections {
            if let Some(ended) = index.checked_sub(minute + 1) {
                records.end_of_time_wait(ended);
            }
            records.connection(index);
        }
        records
    }

    /// In order, until there are `most`.
    pub(crate) fn iter(&self, most: usize) -> impl Iterator<Item = &[u8]> {
        let mut begin = 0;
        self.ends.iter().take(most).map(move |end| {
            let record = &self.bytes[begin..*end];
            begin = *end;
            record
        })
    }

    pub(crate) const fn len(&self) -> usize {
        self.ends.len()
    }

    fn push(&mut self, record: &[u8]) {
        self.bytes.extend_from_slice(record);
        self.ends.push(self.bytes.len());
    }

    fn connection(&mut self, index: u64) {
        let mut time = BEGIN + index * EVERY;
        let clock = || {
            time += 20_000;
            time
        };
        let ends = Ends {
            client: client(index),
            server: server(index),
        };
        connection::fin(ends, due(index), TICK, clock, |record| {
            self.push(record.as_bytes());
        });
    }

    fn end_of_time_wait(&mut self, index: u64) {
        let header = Header {
            time: due(index) * TICK,
            flags: 0,
            ..client(index)
        };
        let record = connection::time_wait(Kind::TimeWaitDone, header, due(index), TICK);
        self.push(record.as_bytes());
    }
}

/// When a connection's TIME_WAIT ends, in jiffies.
const fn due(index: u64) -> u64 {
    (BEGIN + index * EVERY) / TICK + 60 * HZ + 1
}

fn client(index: u64) -> Header {
    let address = |last: u64| {
        let [.., a, b] = (last as u16).to_be_bytes();
        address_bytes([10, 0, a, b].into())
    };
    Header {
        time: 0,
        cookie: 0x10_0000 + 2 * index,
        cgroup: 4242,
        start: BEGIN - 1000 * SECOND,
        local_addr: address(7),
        remote_addr: address(256 + index % 1000),
        comm: *b"shop\0\0\0\0\0\0\0\0\0\0\0\0",
        netns: NETNS,
        inode: 77_000 + index as u32,
        pid: 14_190,
        uid: 1000,
        local_port: 32_768 + (index / 1000 % 28_000) as u16,
        remote_port: 8080,
        kind: 0,
        family: AF_INET,
        flags: Flags::OWNED | Flags::HAS_SOCKET,
    }
}

fn server(index: u64) -> Header {
    let client = client(index);
    Header {
        cookie: client.cookie + 1,
        local_addr: client.remote_addr,
        remote_addr: client.local_addr,
        comm: *b"web\0\0\0\0\0\0\0\0\0\0\0\0\0",
        inode: 0,
        pid: 14_180,
        local_port: client.remote_port,
        remote_port: client.local_port,
        flags: 0,
        ..client
    }
}

/// Decodes up to `most` records; returns how many there were.
pub(crate) fn decode(records: &Records, most: usize) -> u64 {
    let mut count = 0;
    for record in records.iter(most) {
        std::hint::black_box(event::decode(record)).expect("a record of ours");
        count += 1;
    }
    count
}

/// Decodes up to `most` records and feeds the tracker with them. `tell` gets what it tells.
pub(crate) fn track(records: &Records, most: usize, tell: &mut impl FnMut(Fact<'_>)) -> u64 {
    let mut tracker = Tracker::new(Selection::default());
    tracker.feed(&start(), tell);
    let mut count = 0;
    for record in records.iter(most) {
        let event = event::decode(record).expect("a record of ours");
        tracker.feed(&event, tell);
        count += 1;
    }
    count
}

/// The changes that the tracker tells of these records.
pub(crate) fn changes(records: &Records) -> Vec<Change<'static>> {
    let mut changes = Vec::new();
    track(records, records.len(), &mut |fact| {
        if let Fact::Change(change) = fact {
            changes.push(Change {
                container: None,
                ..change
            });
        }
    });
    changes
}

/// Where lines go that nobody reads: written all the same.
pub(crate) fn nowhere() -> Output {
    Output::file(Path::new("/dev/null"), false).expect("every Linux has it")
}
