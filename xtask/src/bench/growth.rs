//! How costs grow with connections, sockets and descriptors, and what that means on a larger machine.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    churn::{self, Load, PORT},
    kernel,
    lab::Lab,
    results::{LeftOut, Results},
    targets::{STREAM, TCPSTATES},
    tracer::{self, Tracer},
    user,
};
use crate::command;

mod figures;
mod law;
mod look;
mod page;
mod paper;
mod picture;
mod rate;

pub(super) use figures::Growth;
use figures::{Records, TimeWait};

/// Commands that are measured against rates.
const COMMANDS: [&str; 3] = [
    STREAM,
    "tcptrace leaks -o json",
    "tcptrace timewait -o json",
];
const RECORD: &str = "tcptrace record";
const TRACKED: [u64; 4] = [1000, 10_000, 100_000, 1_000_000];
/// Rounds of what is measured in turn, at most; each takes half a minute.
const ROUNDS: usize = 3;
/// Connections a second of those that leave a timewait socket behind for a minute: few enough for the limit that
/// a small machine has for those.
const RESTING: u32 = 10_000;

/// What needs root: all but the tracker by itself.
pub(super) fn measure(lab: &Lab, tcptrace: &Path, rounds: usize) -> Result<Growth> {
    let mut growth = Growth::default();
    let left_out = &mut growth.left_out;
    let own = tracer::own(tcptrace);
    let named = |names: &[&str]| -> Vec<Tracer> {
        let fits = |tracer: &&Tracer| names.contains(&tracer.name);
        own.iter().filter(fits).cloned().collect()
    };
    let mut compared = named(&COMMANDS);
    let (peers, absent) = tracer::peers();
    compared.extend(peers.into_iter().filter(|peer| peer.name == TCPSTATES));
    let absent = absent.into_iter().filter(|(name, _)| *name == TCPSTATES);
    left_out.extend(absent.map(|(name, why)| LeftOut {
        what: name.to_owned(),
        why,
    }));
    let stream = named(&[STREAM]);
    let resets = Load::resets(0.5);
    growth.reset = kernel::measure(lab, 3, resets, &stream, left_out)?;
    let empty_ns = growth.reset.empty.median;
    growth.rates = rate::measure(lab, &compared, rounds.min(ROUNDS), empty_ns, left_out)?;
    growth.looks = look::measure(lab, tcptrace, left_out)?;
    let resting = Load {
        close: "fin",
        rate: Some(RESTING),
        ..Load::resets(1.0)
    };
    let by_two = Load {
        threads: 2,
        ..resets
    };
    growth.reset_by_two = kernel::measure(lab, 3, by_two, &stream, left_out)?;
    growth.fin = kernel::measure(lab, 3, resting, &stream, left_out)?;
    let record = named(&[RECORD]);
    let record = record.first().context("it is one of ours")?;
    for (load, found) in [
        (
            Load {
                rate: Some(RESTING),
                ..resets
            },
            &mut growth.reset_records,
        ),
        (resting, &mut growth.fin_records),
    ] {
        eprintln!(
            "bench: growth: records of a connection, close={}",
            load.close
        );
        *found = records(lab, record, load)?;
    }
    growth.time_wait = time_wait()?;
    Ok(growth)
}

/// What needs no root.
pub(super) fn measure_tracker(growth: &mut Growth, workload: &Path) -> Result<()> {
    for connections in TRACKED {
        eprintln!("bench: growth: memory of {connections} connections");
        growth.memory.push(user::memory_of(workload, connections)?);
    }
    eprintln!("bench: growth: records and lines in user space");
    growth.user = user::speeds(workload)?;
    Ok(())
}

/// What `tcptrace record` writes for a connection.
fn records(lab: &Lab, record: &Tracer, load: Load) -> Result<Records> {
    let running = record.start(&lab.folder, &[])?;
    let made = churn::run(&lab.churn, load)?;
    std::thread::sleep(churn::SETTLE);
    running.finish(PORT)?;
    let mut counts = [0_u64; 3];
    for line in BufReader::new(File::open(lab.folder.join("output"))?).lines() {
        if let Some(kind) = kind(&line?) {
            counts[kind] += 1;
        }
    }
    let [transitions, accepts, time_waits] =
        counts.map(|count| count as f64 / made.connections as f64);
    Ok(Records {
        transitions,
        accepts,
        time_waits,
    })
}

/// Which of the three kinds of record a line of a recording is.
fn kind(line: &str) -> Option<usize> {
    let kinds = ["transition", "accept", "time_wait_armed"];
    let is = |kind: &&str| line.contains(&format!(r#""event":"{kind}""#));
    kinds.iter().position(is)
}

fn time_wait() -> Result<TimeWait> {
    let setting = |name: &str| -> Result<Vec<u64>> {
        let path = format!("/proc/sys/net/ipv4/{name}");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let numbers = text.split_whitespace().map(str::parse);
        numbers.collect::<Result<_, _>>().context(path)
    };
    let ports = setting("ip_local_port_range")?;
    let most = setting("tcp_max_tw_buckets")?;
    // Some kernels keep them together with others of their size.
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    Ok(TimeWait {
        bytes: slab_bytes(&slabs, "tw_sock_TCP"),
        most: *most.first().context("tcp_max_tw_buckets")?,
        ports: match ports[..] {
            [first, last] => last - first + 1,
            _ => anyhow::bail!("ip_local_port_range has two numbers"),
        },
    })
}

/// Bytes of an object of a slab: `name active all bytes …`.
fn slab_bytes(slabs: &str, name: &str) -> Option<u64> {
    let mut lines = slabs.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.nth(2)?.parse().ok())?)
}

/// A file of the figures or made of them.
fn docs(name: &str) -> PathBuf {
    command::root().join("docs").join(name)
}

/// The figures in the repository, if there are.
pub(super) fn written() -> Result<Option<Growth>> {
    match fs::read_to_string(docs("growth.json")) {
        Ok(text) => Ok(Some(serde_json::from_str(&text).context(
            "docs/growth.json is not as this version writes it: measure it anew",
        )?)),
        Err(_) => Ok(None),
    }
}

/// Writes the figures, the page and its pictures.
pub(super) fn write(growth: &Growth) -> Result<()> {
    let json = serde_json::to_string_pretty(growth)? + "\n";
    fs::write(docs("growth.json"), json)?;
    fs::create_dir_all(docs("pictures"))?;
    for (name, text) in files(growth)? {
        fs::write(docs(&name), text)?;
    }
    Ok(())
}

/// The page and its pictures, by their paths in `docs/`.
fn files(growth: &Growth) -> Result<Vec<(String, String)>> {
    let pictures = page::pictures(growth)?;
    let mut files = vec![("growth.md".to_owned(), page::page(growth, &pictures))];
    files.extend(
        pictures
            .into_iter()
            .map(|(name, svg)| (page::path(name), svg)),
    );
    Ok(files)
}

/// The page.
pub(super) fn page(growth: &Growth) -> Result<String> {
    Ok(page::page(growth, &page::pictures(growth)?))
}

/// Takes the figures out of all results, with the machine they are of.
pub(super) fn taken(results: &mut Results) -> Option<Growth> {
    let mut growth = results.growth.take()?;
    growth.machine = results.machine.clone();
    Some(growth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_and_its_pictures_are_made_of_the_figures() {
        let growth = written().unwrap().expect("committed");
        for (name, text) in files(&growth).unwrap() {
            let committed = fs::read_to_string(docs(&name)).unwrap_or_default();
            assert!(
                committed == text,
                "docs/{name} is not: `cargo xtask bench --page` writes it anew"
            );
        }
        for entry in fs::read_dir(docs("pictures")).unwrap() {
            let name = entry.unwrap().file_name();
            let path = format!("pictures/{}", name.to_string_lossy());
            let made = files(&growth).unwrap();
            assert!(
                made.iter().any(|(name, _)| *name == path),
                "{path} is on no page any more"
            );
        }
    }

    #[test]
    fn a_slab_by_its_name() {
        let slabs = "# name <active_objs> <num_objs> <objsize>\n\
                     tw_sock_TCPv6 0 0 264 16 1 : tunables 0 0 0\n\
                     tw_sock_TCP 32 32 256 16 1 : tunables 0 0 0\n";
        assert_eq!(slab_bytes(slabs, "tw_sock_TCP"), Some(256));
        assert_eq!(slab_bytes(slabs, "sock"), None);
    }

    #[test]
    fn kinds_of_records() {
        assert_eq!(kind(r#"{"event":"transition","time":1}"#), Some(0));
        assert_eq!(kind(r#"{"event":"accept","time":1}"#), Some(1));
        assert_eq!(kind(r#"{"event":"time_wait_armed","time":1}"#), Some(2));
        assert_eq!(kind(r#"{"event":"tick","time":1}"#), None);
    }
}
