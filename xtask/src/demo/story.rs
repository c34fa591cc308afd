//! What the demo shows: the traffic, the commands, and what to look for.

use std::{
    env, fmt,
    io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum as _;
use nix::sys::signal::Signal;

use super::{
    actor::{LISTENING, Leave, SERVER, SLOW},
    process::Process,
};
use crate::command;

/// What tcptrace says once it sees everything that happens.
const TRACING: &str = "tcptrace: tracing";
/// tcptrace prints a transition within 200 ms.
const SHOWN: Duration = Duration::from_millis(400);
/// After a second a connect() may take over a port in TIME_WAIT; kernels before 6.14 count whole
/// seconds (`tcp_twsk_unique`).
const REUSABLE: Duration = Duration::from_millis(2100);
/// How often is looked whether a process has ended.
const POLL: Duration = Duration::from_millis(20);

/// The same addresses in every run, one for each process, all of them loopback.
const SHOP: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 2), 40_001);
const TILL: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 3), 40_002);
const PHONE: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 4), 40_003);
const BROWSER: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 5), 40_004);
/// Where nobody listens.
const CLOSED: (Ipv4Addr, u16) = (SERVER.0, 8081);

/// Plays it all, and cleans up.
///
/// # Errors
/// When tcptrace or the traffic fails. Ctrl-C is no error, nor is a reader that goes away.
pub(super) fn play(tcptrace: &Path) -> Result<()> {
    let (sender, stop) = mpsc::channel();
    ctrlc::set_handler(move || {
        let _ = sender.send(());
    })
    .context("cannot handle Ctrl-C")?;
    let color =
        io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let story = Story {
        tcptrace,
        stop,
        color,
    };
    let played = story.play();
    let gone =
        "The processes of the demo and their network namespace are gone; nothing else was touched.";
    match played {
        Err(error) if error.is::<Stopped>() => story.say(&format!("\nStopped. {gone}")),
        Err(error) if is_closed_pipe(&error) => Ok(()),
        Err(error) => Err(error),
        Ok(()) => story.say(&format!("\n{gone}")),
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// What it takes to tell it.
struct Story<'a> {
    tcptrace: &'a Path,
    stop: Receiver<()>,
    color: bool,
}

impl Story<'_> {
    fn play(&self) -> Result<()> {
        self.say("\nReal processes, real connections, in a network namespace made for them.")?;
        self.leaks()?;
        self.stream()?;
        self.time_wait()?;
        self.say(
            "\nNone of them has expired: left alone, TIME_WAIT lasts 60 seconds and up to a few more.\n\
             Now on your own traffic, until Ctrl-C:\n",
        )?;
        let tcptrace = self.tcptrace.strip_prefix(command::root());
        let tcptrace = tcptrace.unwrap_or(self.tcptrace).display();
        for arguments in ["leaks --once", "stream", "timewait", "--help"] {
            self.say(&format!("    sudo {tcptrace} {arguments}"))?;
        }
        Ok(())
    }

    /// First part: a leak that is older than tcptrace.
    fn leaks(&self) -> Result<()> {
        self.heading("1. CLOSE_WAIT: which process forgot to close")?;
        let cast = self.cast()?;
        self.comment(
            "phone asks warehouse six times, and closes; warehouse reads that, and forgets to",
        )?;
        let often = Repeat {
            times: 6,
            every: Duration::from_millis(200),
        };
        let phone = (PHONE.0, 0);
        self.wait(&mut cast.ask("phone", phone, SERVER, Leave::Forgotten, often)?)?;
        self.pause(Duration::from_secs(2))?;
        self.comment("only now tcptrace is started, and told that two seconds are long")?;
        let arguments = [
            "leaks",
            "--once",
            "--older-than",
            "2s",
            "--netns",
            &cast.netns,
        ];
        self.say(&self.bold(&format!("$ tcptrace {}", arguments.join(" "))))?;
        let mut command = Command::new(self.tcptrace);
        command.args(arguments);
        self.wait(&mut Process::start(
            "tcptrace",
            &mut command,
            Signal::SIGINT,
        )?)
    }

    /// Second part: every transition.
    fn stream(&self) -> Result<()> {
        self.heading("2. Every transition, with the process that owns the socket")?;
        let cast = self.cast()?;
        let trace = self.trace("stream", &cast, 5)?;

        self.comment("shop asks warehouse (port 8080), and closes first: TIME_WAIT is for shop")?;
        self.wait(&mut cast.ask("shop", SHOP, SERVER, Leave::First, Repeat::ONCE)?)?;
        self.pause(SHOWN)?;

        self.pause(REUSABLE)?;
        self.comment(
            "shop again, from the same port: connect() ends that TIME_WAIT long before its time",
        )?;
        self.wait(&mut cast.ask("shop", SHOP, SERVER, Leave::First, Repeat::ONCE)?)?;
        self.pause(SHOWN)?;

        self.comment("till asks port 8081, where nobody listens")?;
        self.wait(&mut cast.ask("till", TILL, CLOSED, Leave::First, Repeat::ONCE)?)?;
        self.end(trace)
    }

    /// Third part: TIME_WAIT.
    fn time_wait(&self) -> Result<()> {
        self.heading("3. TIME_WAIT: who makes it, how long it really lasts, how it ends")?;
        self.comment("shop closes first, four times: four TIME_WAITs, which nothing ends early")?;
        self.comment(
            "till always comes back from the same port: its connect() reuses the TIME_WAIT",
        )?;
        self.comment(
            "warehouse hangs up on phone, and phone calls back: that reopens warehouse's TIME_WAIT",
        )?;
        self.comment(&format!(
            "browser has to wait {} s for warehouse to close as well: FIN_WAIT2, then TIME_WAIT",
            SLOW.as_secs()
        ))?;
        let cast = self.cast()?;
        let trace = self.trace("timewait", &cast, 12)?;
        if !io::stdout().is_terminal() {
            self.comment("12 seconds; on a terminal the summary is drawn anew every second")?;
        }
        let any_port = (SHOP.0, 0);
        let often = |times, every| Repeat { times, every };
        let quickly = often(4, Duration::from_millis(300));
        let clients = [
            cast.ask("shop", any_port, SERVER, Leave::First, quickly)?,
            cast.ask("till", TILL, SERVER, Leave::First, often(4, REUSABLE))?,
            cast.ask("phone", PHONE, SERVER, Leave::Last, often(2, REUSABLE))?,
            cast.ask("browser", BROWSER, SERVER, Leave::Patient, Repeat::ONCE)?,
        ];
        for mut client in clients {
            self.wait(&mut client)?;
        }
        self.end(trace)
    }

    /// The server, with the network namespace.
    fn cast(&self) -> Result<Cast> {
        let name = "warehouse";
        let mut command = actor(name)?;
        command.arg("serve").stdout(Stdio::piped());
        let mut server = Process::start(name, &mut command, Signal::SIGKILL)?;
        let mut said = String::new();
        if let Some(stdout) = server.child.stdout.take() {
            BufReader::new(stdout).read_line(&mut said)?;
        }
        // Otherwise it has said why.
        ensure!(said == LISTENING, "the server of the demo did not start");
        Ok(Cast {
            netns: format!("/proc/{}/ns/net", server.child.id()),
            _server: server,
        })
    }

    /// Starts tcptrace, and waits until it traces.
    fn trace(&self, view: &str, cast: &Cast, seconds: u32) -> Result<Trace> {
        // It ends by itself, should this process be killed.
        let duration = format!("{seconds}s");
        let arguments = [view, "--netns", &cast.netns, "--duration", &duration];
        self.say(&self.bold(&format!("$ tcptrace {}", arguments.join(" "))))?;
        let mut command = Command::new(self.tcptrace);
        command.args(arguments).stderr(Stdio::piped());
        let mut process = Process::start("tcptrace", &mut command, Signal::SIGINT)?;
        let stderr = process.child.stderr.take().context("it is piped")?;
        let mut said = BufReader::new(stderr).lines();
        let mut notes = Vec::new();
        for line in said.by_ref() {
            let line = line?;
            if line == TRACING {
                // What it draws must not be written into: all else it says comes when it has ended.
                let rest = thread::spawn(move || {
                    notes
                        .into_iter()
                        .chain(said.map_while(Result::ok))
                        .collect()
                });
                return Ok(Trace {
                    process,
                    notes: Some(rest),
                });
            }
            notes.push(line);
        }
        bail!("tcptrace did not start: {}", notes.join("\n"))
    }

    /// Waits for tcptrace to end, and shows what it has to say about it.
    fn end(&self, mut trace: Trace) -> Result<()> {
        self.wait(&mut trace.process)
    }

    /// Waits for a process to end well.
    fn wait(&self, process: &mut Process) -> Result<()> {
        let status = loop {
            if let Some(status) = process.child.try_wait()? {
                break status;
            }
            self.pause(POLL)?;
        };
        ensure!(status.success(), "{} failed: {status}", process.name);
        Ok(())
    }

    /// Waits, but not longer than until Ctrl-C.
    fn pause(&self, time: Duration) -> Result<()> {
        match self.stop.recv_timeout(time) {
            Ok(()) => Err(Stopped.into()),
            Err(_) => Ok(()),
        }
    }

    fn heading(&self, text: &str) -> Result<()> {
        self.say(&format!("\n{}\n", self.bold(text)))
    }

    fn comment(&self, text: &str) -> Result<()> {
        self.say(&format!("# {text}"))
    }

    fn say(&self, text: &str) -> Result<()> {
        Ok(writeln!(io::stdout(), "{text}")?)
    }

    fn bold(&self, text: &str) -> String {
        if self.color {
            format!("\x1b[1m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// The server, and where it is.
struct Cast {
    netns: String,
    _server: Process,
}

impl Cast {
    /// A client named `name`.
    fn ask(
        &self,
        name: &str,
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
        leave: Leave,
        repeat: Repeat,
    ) -> Result<Process> {
        let leave = leave.to_possible_value().context("a way to leave")?;
        let mut command = actor(name)?;
        command
            .args(["ask", &self.netns, "--leave", leave.get_name()])
            .args(["--from", &SocketAddr::from(from).to_string()])
            .args(["--to", &SocketAddr::from(to).to_string()])
            .args(["--times", &repeat.times.to_string()])
            .args(["--every", &repeat.every.as_millis().to_string()]);
        Process::start(name, &mut command, Signal::SIGKILL)
    }
}

/// How often a client connects, and the pause between two connections.
struct Repeat {
    times: u32,
    every: Duration,
}

impl Repeat {
    const ONCE: Self = Self {
        times: 1,
        every: Duration::ZERO,
    };
}

/// A tcptrace that traces.
struct Trace {
    process: Process,
    /// What it says on stderr, until it ends.
    notes: Option<JoinHandle<Vec<String>>>,
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.process.stop();
        let notes = self.notes.take().map(JoinHandle::join);
        for note in notes.and_then(Result::ok).into_iter().flatten() {
            eprintln!("{note}");
        }
    }
}

/// This program, as one of the processes of the demo.
fn actor(name: &str) -> Result<Command> {
    let own = env::current_exe().context("the path of this program is not known")?;
    let mut command = Command::new(own);
    command.args(["demo", "actor", name]).stdin(Stdio::null());
    Ok(command)
}

/// Ctrl-C, or another request to end.
#[derive(Debug)]
struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}
