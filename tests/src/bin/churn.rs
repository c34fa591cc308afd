//! Connections as fast as the kernel makes them, or many that stay: the load of `cargo xtask bench`.
//!
//! `churn run threads=1 seconds=2 close=rst ip=4 port=7000` opens, accepts and closes connections to itself,
//! one after the other in each thread, and prints as JSON how many there were. With `connections=1000`
//! instead of `seconds=2`, so many in each thread. With `rate=10000`, no more than so many a second, all threads
//! together: those that are due within a millisecond one after the other, and then nothing until the next. What is
//! late is not waited for, so `per_second` says whether that rate was reached. `cpu_us_each` is the CPU time of one,
//! the kernel's part of both ends included.
//!
//! `churn hold processes=1000 pairs=50` starts processes that hold both ends of so many connections each, of
//! which the first end has shut its sending side: CLOSE_WAIT and FIN_WAIT2. It prints a line when all are
//! there, and ends with its standard input.

use std::{
    env,
    error::Error,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    num::NonZero,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit},
    time::TimeValLike as _,
};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Ports that a thread listens on with IPv6, whose loopback network is a single address. A pair of ports
/// rests for a minute after each FIN; with so many there is always another.
const PORTS: u16 = 64;
/// Addresses in 127.0.0.0/8 that a thread connects to in turn, for the same reason.
const ADDRESSES: u32 = 1 << 16;
const BACKLOG: i32 = 128;
/// How often a second there are connections, if they are paced.
const BURSTS: f64 = 1000.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let done = match arguments.split_first() {
        Some((role, words)) if role == "run" => run(words),
        Some((role, words)) if role == "hold" => hold(words),
        Some((role, words)) if role == "held" => held(words),
        _ => Err("the first word is run or hold: see the beginning of its source".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("churn: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The value of `name=value` among `words`.
fn word<'a>(words: &'a [String], name: &str) -> Option<&'a str> {
    let value = |word: &'a String| word.strip_prefix(name)?.strip_prefix('=');
    words.iter().find_map(value)
}

fn number<T: std::str::FromStr>(words: &[String], name: &str) -> Result<T> {
    let value = word(words, name).ok_or_else(|| format!("{name}=NUMBER is missing"))?;
    let number = value.parse().ok();
    Ok(number.ok_or_else(|| format!("{name}={value}: not a number that fits"))?)
}

/// Who closes, and how.
#[derive(Clone, Copy)]
enum Close {
    /// The client with a reset; the server after it.
    Rst,
    /// The client with a FIN; the server after it.
    Fin,
}

/// Until when a thread goes on.
#[derive(Clone, Copy)]
enum Until {
    Time(Duration),
    Connections(u64),
}

/// How many connections a second a thread makes, at most.
#[derive(Clone, Copy)]
struct Pace {
    per_second: f64,
}

impl Pace {
    /// When connection `count` is due, after the first. Of the beginning alone, so that what is late once does not
    /// make all that follows late.
    fn due(self, count: u64) -> Duration {
        let burst = (count as f64 / self.per_second * BURSTS).floor();
        Duration::from_secs_f64(burst / BURSTS)
    }
}

fn run(words: &[String]) -> Result<()> {
    let close = match word(words, "close") {
        Some("rst") => Close::Rst,
        Some("fin") => Close::Fin,
        other => return Err(format!("close={other:?}: rst or fin").into()),
    };
    let until = match word(words, "connections") {
        Some(_) => Until::Connections(number(words, "connections")?),
        None => Until::Time(Duration::from_secs_f64(number(words, "seconds")?)),
    };
    let families: &[Family] = match word(words, "ip") {
        Some("4") => &[Family::V4],
        Some("6") => &[Family::V6],
        Some("both") => &[Family::V4, Family::V6],
        other => return Err(format!("ip={other:?}: 4, 6 or both").into()),
    };
    let port: u16 = number(words, "port")?;
    let threads: u16 = number(words, "threads")?;
    let pace = match word(words, "rate") {
        Some(_) => {
            let rate = number::<NonZero<u32>>(words, "rate")?.get();
            let per_second = f64::from(rate) / f64::from(threads);
            Some(Pace { per_second })
        }
        None => None,
    };
    let lanes: Vec<Lane> = (0..threads)
        .map(|thread| {
            let family = families[usize::from(thread) % families.len()];
            Lane::new(family, port + thread * PORTS, close)
        })
        .collect::<Result<_>>()?;
    let began = Instant::now();
    let counts: Vec<_> = thread::scope(|scope| {
        let lanes: Vec<_> = lanes
            .into_iter()
            .map(|lane| scope.spawn(move || lane.run(until, pace)))
            .collect();
        let joined = lanes.into_iter().map(|lane| lane.join());
        joined.map(|count| count.expect("no panic")).collect()
    });
    let seconds = began.elapsed().as_secs_f64();
    let mut connections = 0;
    for count in counts {
        connections += count?;
    }
    let rate = connections as f64 / seconds;
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let cpu = usage.user_time() + usage.system_time();
    let each = cpu.num_microseconds() as f64 / connections as f64;
    let answer = json!({
        "connections": connections, "seconds": seconds, "per_second": rate, "cpu_us_each": each,
    });
    writeln!(io::stdout(), "{answer}")?;
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Family {
    V4,
    V6,
}

/// What one thread connects to.
struct Lane {
    domain: Domain,
    listeners: Vec<Socket>,
    /// In turn; each belongs to the listener at its index, modulo how many those are.
    targets: Vec<SockAddr>,
    close: Close,
}

impl Lane {
    fn new(family: Family, port: u16, close: Close) -> Result<Self> {
        let (domain, any, targets): (_, Vec<SocketAddr>, Vec<SocketAddr>) = match family {
            Family::V4 => {
                let first = u32::from(Ipv4Addr::new(127, 1, 0, 0));
                let targets = (0..ADDRESSES).map(|at| (Ipv4Addr::from(first + at), port).into());
                let any = vec![(Ipv4Addr::UNSPECIFIED, port).into()];
                (Domain::IPV4, any, targets.collect())
            }
            Family::V6 => {
                let all: Vec<SocketAddr> = (port..port + PORTS)
                    .map(|port| (Ipv6Addr::LOCALHOST, port).into())
                    .collect();
                (Domain::IPV6, all.clone(), all)
            }
        };
        let listen = |at: SocketAddr| -> Result<Socket> {
            let socket = Socket::new(domain, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket
                .bind(&at.into())
                .map_err(|error| format!("cannot listen on {at}: {error}; choose another port="))?;
            socket.listen(BACKLOG)?;
            Ok(socket)
        };
        Ok(Self {
            domain,
            listeners: any.into_iter().map(listen).collect::<Result<_>>()?,
            targets: targets.into_iter().map(SockAddr::from).collect(),
            close,
        })
    }

    fn run(&self, until: Until, pace: Option<Pace>) -> Result<u64> {
        let began = Instant::now();
        let mut count = 0;
        for (at, target) in self.targets.iter().enumerate().cycle() {
            let over = match until {
                Until::Time(time) => began.elapsed() >= time,
                Until::Connections(connections) => count >= connections,
            };
            if over {
                break;
            }
            if let Some(pace) = pace {
                thread::sleep(pace.due(count).saturating_sub(began.elapsed()));
            }
            let client = Socket::new(self.domain, Type::STREAM, None)?;
            client
                .connect(target)
                .map_err(|error| format!("connection {count} to {target:?} failed: {error}"))?;
            let (server, _) = self.listeners[at % self.listeners.len()].accept()?;
            if let Close::Rst = self.close {
                client.set_linger(Some(Duration::ZERO))?;
            }
            drop(client);
            drop(server);
            count += 1;
        }
        Ok(count)
    }
}

/// Processes that each hold connections, until standard input ends.
fn hold(words: &[String]) -> Result<()> {
    let processes: usize = number(words, "processes")?;
    let pairs: usize = number(words, "pairs")?;
    let files = word(words, "files").unwrap_or("0");
    raise_descriptors()?;
    let own = env::current_exe()?;
    let start = |_| -> Result<Child> {
        let mut command = Command::new(&own);
        command
            .arg("held")
            .arg(format!("pairs={pairs}"))
            .arg(format!("files={files}"));
        Ok(command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?)
    };
    let mut children: Vec<Child> = (0..processes).map(start).collect::<Result<_>>()?;
    for child in &mut children {
        let out = child.stdout.take().ok_or("a pipe was asked for")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        if line != "held\n" {
            return Err(format!("a process that holds connections said {line:?}").into());
        }
    }
    let sockets = processes * pairs * 2;
    let answer = json!({"processes": processes, "sockets": sockets});
    writeln!(io::stdout(), "{answer}")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    for mut child in children {
        drop(child.stdin.take());
        child.wait()?;
    }
    Ok(())
}

/// As many descriptors as the process may have.
fn raise_descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// One of them.
fn held(words: &[String]) -> Result<()> {
    let pairs: usize = number(words, "pairs")?;
    let files: usize = number(words, "files")?;
    raise_descriptors()?;
    let null = File::open("/dev/null")?;
    let _files: Vec<File> = (0..files)
        .map(|_| null.try_clone())
        .collect::<io::Result<_>>()?;
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // An address of its own for each process: a port for each of 50,000 connections is not to be had on one.
    let own = u32::from(Ipv4Addr::new(127, 16, 0, 0)) + std::process::id();
    listener.bind(&SocketAddr::from((Ipv4Addr::from(own), 0)).into())?;
    listener.listen(BACKLOG)?;
    let target = listener.local_addr()?;
    let mut all = Vec::with_capacity(pairs);
    for _ in 0..pairs {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        client.connect(&target)?;
        let (server, _) = listener.accept()?;
        client.shutdown(Shutdown::Write)?;
        all.push((client, server));
    }
    writeln!(io::stdout(), "held")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    // Without a word to the peer: nobody waits for a hundred thousand of them.
    for (client, server) in &all {
        client.set_linger(Some(Duration::ZERO))?;
        server.set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}
