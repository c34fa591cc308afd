//! How long single looks take, against how much there is to look at.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::resource::{Resource, setrlimit};

use super::figures::{Against, Look, LookPoint};
use crate::bench::{
    lab::Lab,
    results::LeftOut,
    single::{self, Holding},
    spread::Spread,
};

/// Sockets of a process: with its other descriptors, as many as a process may have by default.
const PAIRS: u64 = 500;
/// What each has beside: standard ones, a listener, and the file whose descriptors are multiplied.
const BESIDE: u64 = 5;
/// Descriptors of a process that has files instead, with a single pair of sockets.
const FILES: u64 = 1000 - 2 - BESIDE;
const THOUSANDS: [u64; 4] = [1, 10, 100, 1000];
/// Both ends of a pair, with their files; the rest of the machine needs some as well.
const BYTES_EACH: u64 = 8 << 10;
/// Older than `leaks` is asked for.
const AGE: Duration = Duration::from_secs(2);
const TIMES: usize = 3;
/// A look that takes so long together is not repeated.
const ENOUGH: f64 = 6.0;
/// CPU seconds after which the kernel ends one.
const MOST: u64 = 120;

/// Measures.
pub(super) fn measure(
    lab: &Lab,
    tcptrace: &Path,
    left_out: &mut Vec<LeftOut>,
) -> Result<Vec<Look>> {
    let netns = lab.netns.to_string();
    let own = |words: &[&str]| {
        let words = words.iter().map(|word| (*word).to_owned());
        let words = words.chain(["--netns".to_owned(), netns.clone()]);
        (tcptrace.to_owned(), words.collect::<Vec<_>>())
    };
    let states = own(&["states"]);
    let holders = own(&["states", "--by", "process"]);
    let leaks = own(&["leaks", "--once", "--older-than", "1s"]);
    let ss = (Path::new("ss").to_owned(), vec!["-tan".to_owned()]);
    let sockets = [
        ("tcptrace states", Against::Sockets, &states),
        (
            "tcptrace states --by process",
            Against::SocketDescriptors,
            &holders,
        ),
        ("tcptrace leaks --once", Against::Sockets, &leaks),
        ("ss -tan", Against::Sockets, &ss),
    ];
    let files = [(
        "tcptrace states --by process",
        Against::FileDescriptors,
        &holders,
    )];
    let mut looks = Vec::new();
    for (pairs, files, commands) in [(PAIRS, 0, &sockets[..]), (1, FILES, &files[..])] {
        let mut curves: Vec<Look> = commands
            .iter()
            .map(|(name, against, _)| Look {
                name: (*name).to_owned(),
                against: *against,
                points: Vec::new(),
            })
            .collect();
        for processes in THOUSANDS {
            let sockets = processes * pairs * 2;
            let what = format!("{sockets} sockets and {} files", processes * files);
            eprintln!("bench: growth: looks at {what} of {processes} processes");
            let held = room_for(sockets)
                .and_then(|()| Holding::start(&lab.churn, processes, pairs, files));
            let held = match held {
                Ok(held) => held,
                Err(error) => {
                    left_out.push(LeftOut {
                        what: format!("looks at {what}"),
                        why: format!("{error:#}"),
                    });
                    break;
                }
            };
            thread::sleep(AGE);
            for ((_, against, command), curve) in commands.iter().zip(&mut curves) {
                let count = match against {
                    Against::Sockets => sockets,
                    _ => processes * (pairs * 2 + files + BESIDE),
                };
                match repeated(command, &lab.folder.join("look")) {
                    Ok((wall, cpu)) => curve.points.push(LookPoint { count, wall, cpu }),
                    Err(error) => left_out.push(LeftOut {
                        what: format!("{} with {what}", curve.name),
                        why: format!("{error:#}"),
                    }),
                }
            }
            held.end()?;
        }
        looks.extend(curves);
    }
    Ok(looks)
}

/// Time and CPU time of a command. It is ended if it takes too long.
fn repeated(
    (program, words): &(std::path::PathBuf, Vec<String>),
    output: &Path,
) -> Result<(Spread, Spread)> {
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    while wall.len() < TIMES && wall.iter().sum::<f64>() < ENOUGH {
        let mut command = Command::new(program);
        command.args(words).stdout(File::create(output)?);
        let limit = || setrlimit(Resource::RLIMIT_CPU, MOST, MOST).map_err(io::Error::from);
        // SAFETY: between fork and exec there is one system call, and nothing is allocated.
        unsafe { command.pre_exec(limit) };
        let took = single::timed(&mut command)
            .with_context(|| format!("it failed, or took more than {MOST} s of CPU time"))?;
        wall.push(took.0);
        cpu.push(took.1);
    }
    let spread = |times: &[f64]| Spread::of(times).context("no time passed");
    Ok((spread(&wall)?, spread(&cpu)?))
}

/// Whether there is memory for so many sockets, and as much again for whoever looks at them.
fn room_for(sockets: u64) -> Result<()> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available = available(&meminfo).context("/proc/meminfo")?;
    let needed = sockets * BYTES_EACH + (1 << 30);
    if available < needed {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        bail!(
            "{:.1} GiB of memory are available, and it may take {:.1}",
            gib(available),
            gib(needed)
        );
    }
    Ok(())
}

/// Bytes that are available, by `/proc/meminfo`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_available() {
        let meminfo = "MemTotal:       24683000 kB\nMemAvailable:   22265856 kB\n";
        assert_eq!(available(meminfo), Some(22_265_856 * 1024));
        assert_eq!(available("MemTotal:       24683000 kB\n"), None);
    }
}
