//! What the figures mean for a machine that is not here: sums, nothing measured.

use std::fmt::Write as _;

use tcptrace_ebpf::{Header, TimeWait as TimeWaitRecord, Transition};

use super::{
    figures::{Against, Growth, Records},
    law::Law,
    page::{digits, look_law, memory_law, percent, table},
};
use crate::bench::{results::Kernel, targets::STREAM};

/// Connections a second, and cores, of the machine that is thought of.
const RATE: f64 = 1e6;
const CORES: f64 = 64.0;
/// What the kernel puts before each record of a ring buffer (`BPF_RINGBUF_HDR_SZ`); with it, records begin at
/// multiples of eight.
const HEADER: usize = 8;
/// The buffer's default size, and how long the reader waits at most, as in `tcptrace/src/kernel/probes.rs` and
/// `tcptrace/src/source/live/mod.rs`.
const BUFFER: f64 = 8.0 * 1024.0 * 1024.0;
const WAIT: f64 = 0.020;
/// How long TIME_WAIT lasts: `TCP_TIMEWAIT_LEN`.
const TIME_WAIT: f64 = 60.0;
/// A look-up in a per-CPU map, and an addition. Not measured.
const UPDATE_NS: f64 = 50.0;
/// One of so many connections.
const SAMPLES: [u32; 5] = [1, 4, 16, 64, 256];
/// A leak of a handful.
const HANDFUL: i32 = 5;
const TIMERS: &str = "timer_";
const TRANSITION: &str = "inet_sock_set_s";

/// What a connection takes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Each {
    /// Records in the ring buffer.
    records: f64,
    /// Bytes in it.
    bytes: f64,
    /// The reader's CPU time, seconds.
    reader: f64,
    /// Of BPF programs, the probes of timers left out, seconds.
    probes: f64,
    /// Of the probes of timers, seconds.
    timers: f64,
}

/// All of the sums.
#[derive(Debug)]
struct Paper {
    reset: Each,
    fin: Each,
    /// How long the program of a transition takes, when one CPU writes and when two do, nanoseconds.
    transition: (f64, f64),
    /// What stands in the way, and from how many connections a second, the first first.
    limits: Vec<(&'static str, f64)>,
}

impl Paper {
    /// `None` if a figure is missing.
    fn of(growth: &Growth) -> Option<Self> {
        let mut curves = growth.rates.curves.iter();
        let stream = curves.find(|curve| curve.name == STREAM)?;
        let points = stream.points.iter();
        let points: Vec<_> = points.map(|p| (p.per_second, p.own())).collect();
        let reader = Law::of(&points)?.each;
        let reset = each(growth.reset_records, 0.0, reader, &growth.reset)?;
        // The end of a TIME_WAIT is one more, a minute later. The reader was measured with resets: as many records
        // more as there are, it is taken to need more.
        let fin_records = growth.fin_records;
        let all = |records: Records| records.transitions + records.accepts + records.time_waits;
        let ends = fin_records.time_waits;
        let more = (all(fin_records) + ends) / all(growth.reset_records);
        let fin = each(fin_records, ends, reader * more, &growth.fin)?;
        let transition = (
            program(&growth.reset, |name| name.starts_with(TRANSITION))?.0,
            program(&growth.reset_by_two, |name| name.starts_with(TRANSITION))?.0,
        );
        let busy = transition.0.max(transition.1) / 1e9;
        let mut limits = vec![
            (
                "the single reader has a whole core to do",
                1.0 / reset.reader,
            ),
            (
                "what comes while the reader waits fills the buffer",
                BUFFER / WAIT / reset.bytes,
            ),
            (
                "the one spinlock of the ring buffer is always taken",
                1.0 / (busy * reset.records),
            ),
        ];
        limits.sort_by(|a, b| a.1.total_cmp(&b.1));
        let finite = limits.iter().all(|(_, rate)| rate.is_finite());
        finite.then_some(Self {
            reset,
            fin,
            transition,
            limits,
        })
    }
}

/// What a connection takes, of which the records are counted; `ends` of timewait sockets come later.
fn each(records: Records, ends: f64, reader: f64, kernel: &Kernel) -> Option<Each> {
    let time_waits = records.time_waits + ends;
    let size = |bytes: usize| (bytes + HEADER).next_multiple_of(8) as f64;
    let count = records.transitions + records.accepts + time_waits;
    (count > 0.0).then_some(())?;
    let (_, timers) = program(kernel, |name| name.starts_with(TIMERS)).unwrap_or_default();
    let (_, probes) = program(kernel, |name| !name.starts_with(TIMERS))?;
    Some(Each {
        records: count,
        bytes: records.transitions * size(size_of::<Transition>())
            + records.accepts * size(size_of::<Header>())
            + time_waits * size(size_of::<TimeWaitRecord>()),
        reader,
        probes: probes / 1e9,
        timers: timers / 1e9,
    })
}

/// Nanoseconds of a run, and of a connection, of the programs of that name; what the statistics take is left out.
fn program(kernel: &Kernel, named: impl Fn(&str) -> bool) -> Option<(f64, f64)> {
    let programs = kernel.programs.iter();
    let programs = programs.filter(|program| program.of == STREAM && named(&program.name));
    let sums = programs.map(|program| {
        let ns = (program.ns.median - kernel.empty.median).max(0.0);
        (program.runs, program.runs * ns)
    });
    let (runs, ns) = sums.reduce(|a, b| (a.0 + b.0, a.1 + b.1))?;
    (runs > 0.0).then_some((ns / runs, ns))
}

/// The section of the page.
pub(super) fn section(page: &mut String, growth: &Growth) {
    page.push_str("\n## On paper: a million connections a second, 64 cores\n\n");
    let Some(paper) = Paper::of(growth) else {
        page.push_str("Figures that the sums need were not measured.\n");
        return;
    };
    page.push_str(
        "Sums of the figures above, which are of this small machine; nothing here was measured on a large one, and \
         nothing of what is proposed is built. Both ends of a connection are counted, as they are here: on a machine \
         that has one of them it is half.\n\n",
    );
    takes(page, growth, &paper);
    breaks(page, &paper);
    time_wait(page, growth);
    looks(page, growth);
    designs(page, &paper);
}

fn takes(page: &mut String, growth: &Growth, paper: &Paper) {
    let cores = |seconds: f64| format!("{} cores", digits(seconds * RATE));
    let row =
        |what: &str, of: &dyn Fn(Each) -> String| [what.to_owned(), of(paper.reset), of(paper.fin)];
    let rows = [
        row("records a connection", &|each| digits(each.records)),
        row("records a second", &|each| {
            format!("{} M", digits(each.records * RATE / 1e6))
        }),
        row("bytes a second through the ring buffer", &|each| {
            format!("{} GB", digits(each.bytes * RATE / 1e9))
        }),
        row("the one reader (`stream -o json`)", &|each| {
            cores(each.reader)
        }),
        row("probes, in whoever connects", &|each| {
            let share = percent(each.probes * RATE / CORES);
            format!("{}, {share} of the machine", cores(each.probes))
        }),
        row("probes of timers", &|each| cores(each.timers)),
    ];
    table(page, ["", "closed by a reset", "closed by FIN"], rows);
    let speed = |name: &str| {
        let work = growth.user.iter().find(|work| work.name == name)?;
        Some(digits(1e9 / work.per_second?.median))
    };
    let _ = write!(
        page,
        "\nRecords were counted in a recording; their sizes are those of the program, with the {HEADER} bytes that the \
         kernel puts before each. The end of a TIME_WAIT, a minute later, is one of them. The reader's time for a \
         reset is the slope of its curve above; for FIN it is taken to grow with the records."
    );
    if let (Some(tracker), Some(json)) = (speed("tracker"), speed("json")) {
        let _ = write!(
            page,
            " Of it, decoding and the tracker are {tracker} ns a record, and a line of JSON {json} ns; the rest is the \
             ring buffer's memory, and writing."
        );
    }
    let untraced = growth.rates.untraced_us;
    let _ = writeln!(
        page,
        " Without a tracer, the connections themselves take {} cores.\n",
        digits(untraced * RATE / 1e6),
    );
}

fn breaks(page: &mut String, paper: &Paper) {
    page.push_str("**Where it breaks**, with resets, the first first:\n\n");
    let rows = paper.limits.iter().map(|(what, rate)| {
        let of = percent(rate / RATE);
        [(*what).to_owned(), thousands(*rate), of]
    });
    table(
        page,
        ["what", "from connections/s on", "of a million"],
        rows,
    );
    let reader = 1.0 / paper.reset.reader;
    page.push('\n');
    if reader < RATE {
        let lost = 1.0 - reader / RATE;
        let full = BUFFER / ((RATE - reader) * paper.reset.bytes) * 1e3;
        let _ = write!(
            page,
            "With a million a second the default buffer is full after {} ms, and from then on {} of the records are \
             lost. That is counted, and said, and slows nobody down. ",
            digits(full),
            percent(lost),
        );
    }
    let (one, two) = paper.transition;
    let wanted = one.max(two) / 1e9 * paper.reset.records * RATE;
    let _ = writeln!(
        page,
        "The lock is worse, because whoever connects waits for it: each record takes it, also one that finds no room \
         (`kernel/bpf/ringbuf.c`). How long it is held is not known from outside. Here the whole program is taken \
         for it: it does less under the lock, but a lock that all want has to go from one CPU's cache to another's, \
         which costs about as much. A transition takes {} ns when one thread connects, {} ns when two do. So it \
         would be wanted {} of the time.\n",
        digits(one),
        digits(two),
        percent(wanted),
    );
}

fn time_wait(page: &mut String, growth: &Growth) {
    let resting = RATE * TIME_WAIT;
    let _ = write!(
        page,
        "**TIME_WAIT.** Closed by FIN on this machine, {} M sockets rest at any time.",
        digits(resting / 1e6)
    );
    if let Some(bytes) = growth.time_wait.bytes {
        let _ = write!(
            page,
            " They take the kernel {} GB ({bytes} bytes each)",
            digits(resting * bytes as f64 / 1e9)
        );
        match memory_law(growth) {
            Some(law) => {
                let _ = write!(
                    page,
                    ", and the tracker {} GB, if one takes as much as an open connection.",
                    digits(law.at(resting) / 1e9)
                );
            }
            None => page.push('.'),
        }
    }
    let most = growth.time_wait.most as f64;
    let ports = growth.time_wait.ports as f64;
    let to_one = ports / TIME_WAIT;
    let _ = writeln!(
        page,
        " The kernel allows fewer: with `tcp_max_tw_buckets` as it is here, {}, the table is full after {} ms, and from \
         then on TIME_WAIT is left out. And a client has {} ports, so it can open {} connections a second to one \
         address and port: a million needs {} of those. The probes of timers run for every timer of the machine; the \
         table above has those that connections start and stop, for FIN with those of TIME_WAIT.\n",
        commas(&most.to_string()),
        digits(most / RATE * 1e3),
        commas(&ports.to_string()),
        thousands(to_one),
        thousands((RATE / to_one).ceil()),
    );
}

fn looks(page: &mut String, growth: &Growth) {
    let law = |name: &str, against| look_law(growth, name, against);
    let Some(states) = law("tcptrace states", Against::Sockets) else {
        return;
    };
    let _ = write!(
        page,
        "**A look.** By its law, `states` takes {} s for ten million sockets, and {} s for the {} M that rest",
        digits(states.at(1e7)),
        digits(states.at(RATE * TIME_WAIT)),
        digits(RATE * TIME_WAIT / 1e6),
    );
    if let Some(holders) = law("tcptrace states --by process", Against::SocketDescriptors) {
        let _ = write!(
            page,
            "; with holders, {} s for ten million that are open",
            digits(holders.at(1e7))
        );
    }
    page.push_str(
        ". A lost record costs a look, and with so many lost, looks would never end. So what is below has to come \
         before the rates that it is for, not after.\n",
    );
}

fn designs(page: &mut String, paper: &Paper) {
    let readers = (paper.fin.reader * RATE).ceil();
    let _ = write!(
        page,
        "\n### What would help\n\nNone of this is built.\n\n\
         **A ring buffer for each CPU, a reader for a group of them** (an array of maps, by the number of the CPU). It \
         takes away the lock, and lets {readers:.0} readers have a core each for FIN, {:.0} for resets; together they \
         cost what one would. But a socket's changes happen on several CPUs, and the tracker needs them in order: \
         either records are merged by their time, which keeps each back for as long as the slowest reader may be \
         behind; or the buffer is chosen by a hash of the cookie instead of by CPU. Then a socket is one reader's, \
         with a tracker of its own, nothing is merged, and a lock is wanted by a share of the connections instead of \
         by all. The second is simpler, and is what we would build first.\n\n",
        (paper.reset.reader * RATE).ceil(),
    );
    let sampled = SAMPLES.map(|one_of| {
        let k = f64::from(one_of);
        let connections = RATE / k;
        let error = |share: f64| {
            // What is counted exactly has no error.
            if one_of == 1 {
                0.0
            } else {
                error(connections * share)
            }
        };
        [
            format!("1/{one_of}"),
            thousands(connections),
            digits(paper.reset.reader * connections),
            percent(error(1.0)),
            percent(error(0.01)),
            percent((1.0 - 1.0 / k).powi(HANDFUL)),
        ]
    });
    let enough = (paper.reset.reader * RATE).ceil();
    let _ = write!(
        page,
        "**Sampling, with its error stated.** A connection is followed if a hash of its cookie falls into one part of \
         k, so all of its records are, or none. From {enough:.0} on, one reader is enough. The relative standard error \
         of a count is 1/√n, n being what was counted. Rates, shares and quantiles of durations are still answered \
         well. What is rare is not: of a leak of {HANDFUL} sockets nothing may be seen. So entries into CLOSE_WAIT \
         must never be sampled: they are few where nothing leaks, or else what is looked for.\n\n"
    );
    table(
        page,
        [
            "sampled",
            "connections/s",
            "the reader's cores",
            "error of a second's count",
            "of a process with a hundredth of it",
            "a leak of a handful is missed",
        ],
        sampled,
    );
    let update = UPDATE_NS / 1e9;
    let aggregated = |each: Each| each.records * update * RATE;
    let _ = write!(
        page,
        "\n**In-kernel aggregation**, for later. Programs count instead of telling: changes for each pair of states and \
         process, and times in a state as histograms, in per-CPU maps, which are read once a second. What it would \
         give: {} bytes of records a connection become {} additions. At {UPDATE_NS:.0} ns each, which is an estimate \
         and not measured, that is {} cores of {CORES:.0} for resets and {} for FIN, in place of the {} and {} that \
         the reader would need; no buffer, no lock, no loss; and the cost to user space depends on the number of \
         processes and states, not on the rate. When a socket entered its state has to be kept with it \
         (`BPF_MAP_TYPE_SK_STORAGE`; a timewait socket has none, so those need a hash map by cookie). What it would \
         lose: the line for each connection, stacks, and whatever was not thought of before it was counted. It is for \
         `timewait` and for rates; not for `stream` and `record`; `leaks` would go on getting records of CLOSE_WAIT \
         alone.\n",
        digits(paper.reset.bytes),
        digits(paper.reset.records),
        digits(aggregated(paper.reset)),
        digits(aggregated(paper.fin)),
        digits(paper.reset.reader * RATE),
        digits(paper.fin.reader * RATE),
    );
}

/// The relative standard error of a count, when so many are counted by chance.
fn error(counted: f64) -> f64 {
    1.0 / counted.sqrt()
}

/// A large number, rounded to three digits, with commas.
fn thousands(value: f64) -> String {
    let unit = 10_f64.powf((value.abs().max(1.0).log10().floor() - 2.0).max(0.0));
    commas(&format!("{:.0}", (value / unit).round() * unit))
}

/// A comma between each three digits.
fn commas(digits: &str) -> String {
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        growth::figures::{RateCurve, RatePoint},
        results::Program,
        spread::Spread,
    };

    fn same(value: f64) -> Spread {
        Spread::of(&[value]).unwrap()
    }

    fn kernel(ns: f64, transitions: f64) -> Kernel {
        let program = |name: &str, ns, runs| Program {
            of: STREAM.to_owned(),
            name: name.to_owned(),
            ns: same(ns),
            runs,
        };
        Kernel {
            empty: same(30.0),
            programs: vec![
                program("inet_sock_set_s", 30.0 + ns, transitions),
                program("sys_exit_accept", 330.0, 1.0),
                program("timer_start", 40.0, 2.0),
            ],
        }
    }

    /// A reader of 4 µs a connection, records of 150 ns.
    fn growth() -> Growth {
        let point = |per_second| RatePoint {
            asked: None,
            per_second,
            own_us: same(4.0),
            kernel_us: same(1.0),
        };
        let mut growth = Growth {
            reset: kernel(150.0, 6.0),
            reset_by_two: kernel(250.0, 6.0),
            fin: kernel(150.0, 10.0),
            reset_records: Records {
                transitions: 6.0,
                accepts: 1.0,
                time_waits: 0.0,
            },
            fin_records: Records {
                transitions: 10.0,
                accepts: 1.0,
                time_waits: 1.0,
            },
            ..Growth::default()
        };
        growth.rates.curves.push(RateCurve {
            name: STREAM.to_owned(),
            points: [1e3, 1e4, 1e5].map(point).to_vec(),
            lost: 0,
        });
        growth
    }

    fn near(found: f64, expected: f64) {
        assert!(
            (found / expected - 1.0).abs() < 1e-9,
            "{found} is not {expected}"
        );
    }

    #[test]
    fn sums_of_a_connection() {
        let paper = Paper::of(&growth()).unwrap();
        near(paper.reset.reader, 4e-6);
        near(paper.reset.records, 7.0);
        // 112 and 104 bytes, and 8 before each.
        near(paper.reset.bytes, 6.0 * 120.0 + 112.0);
        near(paper.reset.probes, (6.0 * 150.0 + 300.0) / 1e9);
        near(paper.reset.timers, 20.0 / 1e9);
        // The end of its TIME_WAIT is one more record.
        near(paper.fin.records, 13.0);
        near(paper.fin.bytes, 10.0 * 120.0 + 112.0 + 2.0 * 136.0);
        near(paper.fin.reader, 4e-6 * 13.0 / 7.0);
    }

    #[test]
    fn what_breaks_first_comes_first() {
        let mut growth = growth();
        let limits = Paper::of(&growth).unwrap().limits;
        assert!(limits.is_sorted_by(|a, b| a.1 <= b.1), "{limits:?}");
        let first = |growth: &Growth| Paper::of(growth).unwrap().limits[0];
        assert!(first(&growth).0.contains("reader"), "{limits:?}");
        near(first(&growth).1, 250_000.0);
        // Of one writer and two, the dearer counts.
        growth.reset_by_two = kernel(2000.0, 6.0);
        assert!(first(&growth).0.contains("spinlock"));
        near(first(&growth).1, 1e9 / 2000.0 / 7.0);
    }

    #[test]
    fn the_errors_of_samples() {
        near(error(10_000.0), 0.01);
        let mut page = String::new();
        section(&mut page, &growth());
        // A quarter of a million a second: 1/√250,000, and of a hundredth 1/√2,500. (3/4)⁵ of five are missed.
        let row = page
            .lines()
            .find(|line| line.starts_with("| 1/4 "))
            .unwrap();
        assert_eq!(row, "| 1/4 | 250,000 | 1 | 0.2 % | 2 % | 23.7 % |");
        let row = page
            .lines()
            .find(|line| line.starts_with("| 1/1 "))
            .unwrap();
        assert_eq!(row, "| 1/1 | 1,000,000 | 4 | 0 % | 0 % | 0 % |");
        assert!(page.contains("From 4 on, one reader is enough."), "{page}");
        assert!(page.contains("75 % of the records are lost"), "{page}");
    }

    #[test]
    fn without_figures_there_are_no_sums() {
        let mut page = String::new();
        section(&mut page, &Growth::default());
        assert!(page.ends_with("were not measured.\n"), "{page}");
    }

    /// What is taken from the program's sources, as it is there.
    #[test]
    fn constants_are_those_of_the_program() {
        let source = |path| std::fs::read_to_string(crate::command::root().join(path)).unwrap();
        let probes = source("tcptrace/src/kernel/probes.rs");
        assert!(probes.contains("LEAST_BUFFER: u32 = 8 << 20;"));
        near(BUFFER, f64::from(8 << 20));
        let live = source("tcptrace/src/source/live/mod.rs");
        assert!(live.contains("DRAIN_EVERY: Duration = Duration::from_millis(20);"));
        near(WAIT, 0.020);
    }

    #[test]
    fn large_numbers() {
        assert_eq!(thousands(999.4), "999");
        assert_eq!(thousands(250_000.0), "250,000");
        assert_eq!(thousands(1_234_567.0), "1,230,000");
        assert_eq!(thousands(7.0), "7");
    }
}
