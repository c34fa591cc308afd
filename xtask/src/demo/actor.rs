//! The processes whose connections are shown: one server, and clients that leave it in every way.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::{prctl::set_pdeathsig, signal::Signal},
};
use socket2::{Domain, Socket, Type};

/// Where the server listens.
pub(super) const SERVER: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 8080);
/// What the server writes to its standard output once it listens.
pub(super) const LISTENING: &str = "listening\n";
/// How long the server lets a `patient` client wait for its close.
pub(super) const SLOW: Duration = Duration::from_secs(4);
/// What any work takes in this demo: enough to be seen in a column of milliseconds.
const WORK: Duration = Duration::from_millis(40);

/// Who plays what.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Name of the process
    name: String,
    #[command(subcommand)]
    role: Role,
}

#[derive(clap::Subcommand)]
enum Role {
    /// Make the network namespace, and serve in it
    Serve,
    /// Connect in that namespace, ask, and leave
    Ask(Ask),
}

#[derive(clap::Args)]
struct Ask {
    /// The namespace, as a path
    netns: PathBuf,
    /// Where to connect from; port 0: any
    #[arg(long)]
    from: SocketAddr,
    /// Where to
    #[arg(long)]
    to: SocketAddr,
    /// Who closes first
    #[arg(long, value_enum)]
    leave: Leave,
    /// How often
    #[arg(long)]
    times: u32,
    /// Pause between two connections, milliseconds
    #[arg(long)]
    every: u64,
}

/// Who closes first, and what the other does then.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Leave {
    /// The client; the server follows.
    First,
    /// The server; the client follows.
    Last,
    /// The client; the server follows after [`SLOW`].
    Patient,
    /// The client; the server forgets to.
    Forgotten,
}

impl Leave {
    /// What the client says: one byte.
    const fn request(self) -> u8 {
        match self {
            Self::First => b'1',
            Self::Last => b'2',
            Self::Patient => b'3',
            Self::Forgotten => b'4',
        }
    }
}

/// Plays the role.
///
/// # Errors
/// When a system call fails, other than a refused connect.
pub(super) fn run(options: &Options) -> Result<()> {
    // However the demo ends, this process does not outlive it.
    set_pdeathsig(Signal::SIGKILL)?;
    fs::write("/proc/self/comm", &options.name).context("cannot take the name")?;
    match &options.role {
        Role::Serve => serve(),
        Role::Ask(ask) => {
            let path = ask.netns.display();
            let netns = File::open(&ask.netns).with_context(|| format!("cannot open {path}"))?;
            setns(netns, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("cannot enter {path}"))?;
            for time in 0..ask.times {
                if time > 0 {
                    thread::sleep(Duration::from_millis(ask.every));
                }
                ask.once()?;
            }
            Ok(())
        }
    }
}

/// Serves in a network namespace of its own, which goes when this process and its sockets do.
fn serve() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context(
        "cannot make a network namespace, which needs CAP_SYS_ADMIN: run the demo as root outside of a \
         container, or in a privileged one",
    )?;
    set_loopback_up().context("cannot set the loopback interface of the namespace up")?;
    let listener = TcpListener::bind(SERVER).context("cannot listen")?;
    io::stdout().write_all(LISTENING.as_bytes())?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || answer(stream));
    }
    Ok(())
}

/// Answers a client, and leaves before or after it.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut request = [0];
    stream.read_exact(&mut request)?;
    thread::sleep(WORK);
    stream.write_all(b"done\n")?;
    if request == [Leave::Last.request()] {
        return Ok(());
    }
    stream.read_to_end(&mut Vec::new())?;
    if request == [Leave::Forgotten.request()] {
        std::mem::forget(stream);
        return Ok(());
    }
    thread::sleep(if request == [Leave::Patient.request()] {
        SLOW
    } else {
        WORK
    });
    Ok(())
}

impl Ask {
    /// One connection, from connect() to close().
    fn once(&self) -> Result<()> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // Or a port in TIME_WAIT could not be bound again.
        socket.set_reuse_address(true)?;
        socket.bind(&self.from.into())?;
        match socket.connect(&self.to.into()) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
            connected => connected.with_context(|| format!("cannot connect to {}", self.to))?,
        }
        let mut stream = BufReader::new(TcpStream::from(socket));
        stream.get_mut().write_all(&[self.leave.request()])?;
        stream.read_line(&mut String::new())?;
        if self.leave == Leave::Last {
            stream.read_to_end(&mut Vec::new())?;
        }
        thread::sleep(WORK);
        Ok(())
    }
}

/// Sets the loopback interface of this process's namespace up; its addresses come by themselves.
pub(crate) fn set_loopback_up() -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::IFF_UP as libc::c_short,
        },
    };
    // SAFETY: the request is complete and outlives the call, which only reads it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(result)?;
    Ok(())
}
