//! Made-up records into a ring buffer, faster than a machine's TCP makes them, for `cargo xtask bench`.
//!
//! `feeder feed pid=PID netns=INODE rate=RATE seconds=S close=rst|fin knowledge=owners|dwell` writes the records of whole
//! connections into the ring buffer of a running tcptrace, RATE connections a second, in bursts of a millisecond. With
//! `knowledge=dwell` only those records are written that the probes of `leaks` write. With `close=fin`, `time_wait=N`
//! timewait sockets exist at a time (200,000 by default). It prints as JSON how many connections, transitions and records
//! it has made, how many records found no room, and how long it took.
//!
//! `feeder ring bytes=N seconds=S` measures the reading end alone: it fills a ring buffer of its own, and reads it with
//! the reader of tcptrace. It prints how many records that were, and the CPU time that reading them took.

mod bpf;
#[path = "../../benches/traffic/connection.rs"]
mod connection;
mod traffic;

use std::{
    collections::HashMap,
    env, fs,
    hint::black_box,
    io::{self, Write as _},
    os::fd::AsFd as _,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::maps::{Map, MapData, RingBuf};
use tcptrace::kernel::{clock, ring::Ring};
use tcptrace_ebpf::Counter;

use bpf::{Fed, Feeder};
use traffic::Traffic;

/// How often a second there is a burst.
const BURSTS: f64 = 1000.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let done = match arguments.split_first() {
        Some((role, words)) if role == "feed" => feed(&Words(words)),
        Some((role, words)) if role == "ring" => ring(&Words(words)),
        _ => Err(anyhow!(
            "the first word is feed or ring: see the beginning of its source"
        )),
    };
    match done.and_then(|answer| Ok(writeln!(io::stdout(), "{answer}")?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("feeder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Arguments such as `name=value`.
struct Words<'a>(&'a [String]);

impl Words<'_> {
    fn word(&self, name: &str) -> Option<&str> {
        let value = |word: &'_ String| -> Option<usize> {
            word.strip_prefix(name)?
                .starts_with('=')
                .then_some(name.len() + 1)
        };
        self.0
            .iter()
            .find_map(|word| value(word).map(|at| &word[at..]))
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T> {
        let value = self.word(name);
        let value = value.with_context(|| format!("{name}=NUMBER is missing"))?;
        let number = value.parse().ok();
        number.with_context(|| format!("{name}={value}: not a number that fits"))
    }
}

/// Feeds a tcptrace that runs.
fn feed(words: &Words<'_>) -> Result<String> {
    let pid: u32 = words.number("pid")?;
    let rate: f64 = words.number("rate")?;
    let limit = Duration::from_secs_f64(words.number("seconds")?);
    let live = match words.word("time_wait") {
        Some(_) => words.number("time_wait")?,
        None => 200_000,
    };
    let mut traffic = Traffic::new(
        words.number("netns")?,
        words.word("close").context("close=rst|fin is missing")?,
        words
            .word("knowledge")
            .context("knowledge=owners|dwell is missing")?,
        live,
    )?;
    let mut maps = maps(pid)?;
    let mut map = |name: &str| {
        maps.remove(name).with_context(|| {
            format!("process {pid} has no map {name}: is it a tcptrace that traces?")
        })
    };
    let (records, counters) = (map("RECORDS")?, map("COUNTERS")?);
    let counters = (counters.fd().as_fd(), Counter::Lost as u32);
    let mut feeder =
        Feeder::load(records.fd().as_fd(), Some(counters)).context("cannot load the feeder")?;

    let mut sum = Fed::default();
    let mut late = Duration::ZERO;
    let began = Instant::now();
    let mut connections = 0_u64;
    loop {
        let elapsed = began.elapsed();
        if elapsed >= limit {
            break;
        }
        // Of the beginning alone, so that what is late once does not make all that follows late.
        let burst = (elapsed.as_secs_f64() * BURSTS).floor() + 1.0;
        let due = (burst / BURSTS * rate) as u64;
        // What is late by more than a burst is made at once: a machine that was away makes no less.
        let now = clock::boot_ns();
        while connections < due {
            traffic.connection(now, &mut |record| {
                sum.add(feeder.push(record)?);
                io::Result::Ok(())
            })?;
            connections += 1;
        }
        sum.add(feeder.flush()?);
        let next = Duration::from_secs_f64(burst / BURSTS);
        let elapsed = began.elapsed();
        late = late.max(elapsed.saturating_sub(next));
        thread::sleep(next.saturating_sub(elapsed));
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(format!(
        "{{\"connections\":{connections},\"transitions\":{},\"records\":{},\"lost\":{},\"seconds\":{seconds},\
         \"late_seconds\":{},\"cpu_seconds\":{}}}",
        connections * traffic.transitions,
        sum.made,
        sum.lost,
        late.as_secs_f64(),
        cpu_seconds(),
    ))
}

/// The maps of a process, by name.
fn maps(pid: u32) -> Result<HashMap<String, MapData>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let files = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    let mut maps = HashMap::new();
    for file in files {
        let text = fs::read_to_string(file?.path()).unwrap_or_default();
        let id = text.lines().find_map(|line| line.strip_prefix("map_id:"));
        let Some(id) = id.and_then(|id| id.trim().parse().ok()) else {
            continue;
        };
        let map = MapData::from_id(id).with_context(|| format!("cannot open map {id}"))?;
        let name = String::from_utf8_lossy(map.info()?.name()).into_owned();
        maps.insert(name, map);
    }
    Ok(maps)
}

/// Fills a ring buffer and reads it, again and again.
fn ring(words: &Words<'_>) -> Result<String> {
    let bytes: u32 = words.number("bytes")?;
    let limit = Duration::from_secs_f64(words.number("seconds")?);
    let ring = bpf::ring(bytes).context("cannot make a ring buffer")?;
    let mut feeder = Feeder::load(ring.as_fd(), None).context("cannot load the feeder")?;
    let map = Map::RingBuf(MapData::from_fd(ring)?);
    let mut ring = Ring::new(RingBuf::try_from(map)?, bytes)?;
    let mut traffic = Traffic::new(1, "rst", "owners", 0)?;
    let mut items = 0_u64;
    let mut cpu_ns = 0;
    let mut fed = Fed::default();
    let began = Instant::now();
    while began.elapsed() < limit {
        let lost = fed.lost;
        while fed.lost == lost {
            traffic.connection(clock::boot_ns(), &mut |record| {
                fed.add(feeder.push(record)?);
                io::Result::Ok(())
            })?;
        }
        fed.add(feeder.flush()?);
        let mark = ring.mark();
        let before = clock::thread_cpu_ns();
        while !ring.is_past(mark)
            && let Some(record) = ring.read()
        {
            // All of it is read, as decoding does.
            let mut copy = [0_u8; bpf::LONGEST];
            copy[..record.len()].copy_from_slice(&record);
            black_box(&copy);
            items += 1;
        }
        cpu_ns += clock::thread_cpu_ns() - before;
    }
    if items != fed.made - fed.lost {
        bail!("{items} records were read, of {fed:?}");
    }
    let seconds = cpu_ns as f64 / 1e9;
    Ok(format!("{{\"items\":{items},\"cpu_seconds\":{seconds}}}"))
}

fn cpu_seconds() -> f64 {
    clock::thread_cpu_ns() as f64 / 1e9
}
