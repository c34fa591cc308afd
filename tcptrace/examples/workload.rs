//! One kind of work on made-up records, for `cargo xtask bench`: it runs this under callgrind, which counts
//! instructions, and by itself, for time and memory.
//!
//! `workload decode|tracker|json|text|record CONNECTIONS PERCENT` prepares the records of so many connections, works
//! through the given part of them, and prints as JSON how many records or lines that were, and the CPU time
//! that they took. The difference between two parts is free of the preparation.
//!
//! `workload write null|pipe|PATH LINES` writes JSON lines through the queue in front of a sink, and prints how many there
//! were and how long that took: with `pipe`, a thread reads them.
//!
//! `workload memory CONNECTIONS` prints how much memory so many open connections take.
//!
//! `workload holders` finds out who holds which socket of this machine, by a pass over `/proc` and by the kernel's walk of
//! all open files, and prints how many sockets it found and the CPU time of each. It takes the right to trace.

use std::{
    env, fs,
    hint::black_box,
    io::{self, Read as _, Write},
    ops::ControlFlow,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use tcptrace::{
    event::{self, Comm, Event, Socket, States, Task, Transition, Tuple, address_bytes},
    kernel::{
        open_sockets,
        probes::{self, Settings},
        procfs::{self, Descriptor, Handle},
    },
    output::Queue,
    select::Selection,
    stream,
    tracker::{Change, Fact, Tracker},
    view::View,
};
use tcptrace_ebpf::{Config, State};

#[path = "../benches/traffic/mod.rs"]
mod traffic;

use traffic::Records;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let answer = match words[..] {
        ["holders"] => Some(holders()),
        ["write", sink, lines] => lines.parse().ok().map(|lines| write(sink, lines)),
        ["memory", connections] => connections.parse().ok().map(memory),
        [work, connections, percent] => match (connections.parse(), percent.parse()) {
            (Ok(connections), Ok(percent)) => run(work, connections, percent),
            _ => None,
        },
        _ => None,
    };
    let Some(answer) = answer else {
        eprintln!(
            "usage: workload decode|tracker|json|text|record CONNECTIONS PERCENT, or workload write null|pipe|PATH LINES, \
             or workload memory CONNECTIONS, or workload holders"
        );
        return ExitCode::FAILURE;
    };
    match writeln!(io::stdout(), "{answer}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Does the work; `None` if there is none of that name.
fn run(work: &str, connections: u64, percent: usize) -> Option<String> {
    let records = Records::of(connections);
    let most = records.len() * percent / 100;
    let part = |changes: &[Change<'static>]| changes.len() * percent / 100;
    Some(match work {
        "decode" => timed(|| traffic::decode(&records, most)),
        "tracker" => timed(|| {
            traffic::track(&records, most, &mut |fact| {
                black_box(&fact);
            })
        }),
        "json" => {
            let changes = traffic::changes(&records);
            let view = stream::Json::new(traffic::nowhere());
            timed(|| lines(view, &changes[..part(&changes)]))
        }
        "text" => {
            let changes = traffic::changes(&records);
            let view = stream::Text::new(traffic::nowhere());
            timed(|| lines(view, &changes[..part(&changes)]))
        }
        "record" => {
            let events: Vec<Event> = records
                .iter(most)
                .map(|record| event::decode(record).expect("a record of ours"))
                .collect();
            timed(|| recorded(&events))
        }
        _ => return None,
    })
}

/// How many lines of output come from one batch of records: as many as the reader hands over at once.
const BATCH: usize = 1024;
/// How long one wait for room is, at most.
const ROOM: Duration = Duration::from_millis(50);
/// For how long a sink may take nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes the lines of a recording.
fn recorded(events: &[Event]) -> u64 {
    let mut out = traffic::nowhere();
    for batch in events.chunks(BATCH) {
        for event in batch {
            event::line::write(&mut out.buffer, event);
        }
        out.flush().expect("/dev/null takes it");
    }
    events.len() as u64
}

/// Writes lines through a queue, as a tracer does: it waits only while there is no room.
fn write(sink: &str, lines: usize) -> String {
    let mut batch = Vec::new();
    for record in Records::of(BATCH as u64).iter(BATCH) {
        let event = event::decode(record).expect("a record of ours");
        event::line::write(&mut batch, &event);
    }
    let mut drain = None;
    let sink: Box<dyn Write + Send> = match sink {
        "null" => Box::new(fs::File::create("/dev/null").expect("every Linux has it")),
        "pipe" => {
            let (mut reader, writer) = io::pipe().expect("two descriptors");
            drain = Some(thread::spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                while reader.read(&mut buffer).expect("a pipe") > 0 {}
            }));
            Box::new(writer)
        }
        path => Box::new(fs::File::create(path).expect("a file that can be made")),
    };
    let queue = Queue::new(Box::new(move || Ok(sink)));
    let began = Instant::now();
    let batches = lines / BATCH;
    let mut buffer = Vec::new();
    for _ in 0..batches {
        while !queue.has_room() && !queue.wait_room(ROOM) {}
        buffer.extend_from_slice(&batch);
        queue.push(&mut buffer).expect("the sink takes it");
    }
    queue.close(PATIENCE, None).expect("the sink takes it");
    drop(queue);
    if let Some(drain) = drain {
        drain.join().expect("no panic");
    }
    let (items, seconds) = (batches * BATCH, began.elapsed().as_secs_f64());
    format!("{{\"items\":{items},\"seconds\":{seconds}}}")
}

/// Writes lines, as many at a time as come out of the ring buffer at once.
fn lines(mut view: impl View, changes: &[Change<'_>]) -> u64 {
    let tracker = Tracker::new(Selection::default());
    view.clock(0, traffic::BOOT_TO_UTC_NS);
    for batch in changes.chunks(4096) {
        for change in batch {
            view.fact(Fact::Change(*change));
        }
        view.flush(&tracker, 0).expect("/dev/null takes it");
    }
    changes.len() as u64
}

fn timed(work: impl FnOnce() -> u64) -> String {
    let before = cpu_seconds();
    let items = work();
    let seconds = cpu_seconds() - before;
    format!("{{\"items\":{items},\"cpu_seconds\":{seconds}}}")
}

fn holders() -> String {
    let settings = Settings {
        config: Config::ALL,
        buffer: Some(4096),
        time_wait: false,
        accept: false,
        only: None,
        log: false,
    };
    let mut probes = probes::load(&settings).expect("this machine can be traced");
    let count = |count: &mut u64, _: &Handle, _: Descriptor| *count += 1;
    let pass = timed(|| {
        let parts = procfs::sockets_by_part(1, count).expect("/proc");
        parts.into_iter().sum()
    });
    let walk = timed(|| {
        let records = probes.open_sockets(States::ALL, States::default());
        let records = records.expect("this kernel walks open files");
        let (mut count, go_on) = (0, || ControlFlow::Continue(()));
        open_sockets::sockets(records, |_| true, |_, _| count += 1, go_on).expect("a walk");
        count
    });
    format!("{{\"pass\":{pass},\"walk\":{walk}}}")
}

/// CPU time of this thread: what else runs on the machine costs it caches, but no time.
fn cpu_seconds() -> f64 {
    // By libc: rustix finds the kernel's clock by itself, in a way that ends under valgrind 3.19.
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has it");
    time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9
}

/// Open connections of a busy server: many clients, a few processes.
fn memory(connections: u64) -> String {
    let before = exact();
    let mut tracker = Tracker::new(Selection::default());
    tracker.feed(&traffic::start(), &mut |_| {});
    for index in 0..connections {
        for (old, new) in [
            (State::Listen, State::SynRecv),
            (State::SynRecv, State::Established),
        ] {
            let event = Event::Transition(opened(index, old, new));
            tracker.feed(&event, &mut |fact| {
                black_box(&fact);
            });
        }
    }
    assert_eq!(tracker.len() as u64, connections, "all of them are tracked");
    let bytes = exact() - before;
    // The mark that the kernel keeps of the most there was is not as exact.
    let peak = figure("/proc/self/status", "VmHWM:").saturating_sub(before);
    let peak = peak.max(bytes);
    drop(tracker);
    format!("{{\"connections\":{connections},\"bytes\":{bytes},\"peak_bytes\":{peak}}}")
}

fn opened(index: u64, old: State, new: State) -> Transition {
    let [_, b, c, d] = (index as u32 / 3).to_be_bytes();
    Transition {
        time: 3_600_000_000_000 + index * 1000,
        socket: Socket {
            cookie: 0x1000 + index,
            netns: 4_026_531_840,
            tuple: Tuple {
                local_addr: address_bytes([10, 0, 0, 7].into()),
                remote_addr: address_bytes([11, b, c, d].into()),
                local_port: 8080,
                remote_port: 32_768 + (index % 3) as u16,
            },
        },
        old,
        new,
        error: 0,
        stale_port: 0,
        no_time_wait: false,
        shutdown: 0,
        owned: false,
        has_socket: false,
        inode: 0,
        cgroup: 4242,
        task: Task {
            pid: 100 + (index % 8) as u32,
            comm: Comm::new(b"web"),
            start: 1_000_000_000,
            uid: 0,
            kthread: false,
            exiting: false,
            tree: false,
        },
    }
}

/// Resident memory, by a walk over all of it: what `/proc/self/status` says is as much as 64 pages for each CPU
/// behind, and a thousand connections take less than that.
fn exact() -> u64 {
    figure("/proc/self/smaps_rollup", "Rss:")
}

/// A figure of a file in `/proc`, in bytes.
fn figure(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(file).expect("Linux has it");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    1024 * number
        .and_then(|number| number.parse::<u64>().ok())
        .expect("kilobytes")
}
