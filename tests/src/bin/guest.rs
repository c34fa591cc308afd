//! The first process of a virtual machine that `cargo xtask vm` has started.
//!
//! The machine has no other file system than the one that came with its kernel. This program mounts what
//! tests need, loads the modules it was given, runs the programs that `/orders.json` lists, one after the
//! other, and turns the machine off. What they print goes to the console (the first serial port), what
//! became of them to the second, a line of JSON each; the last says that all of it was done.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read, Write},
    os::{fd::AsRawFd as _, unix::fs::symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

/// What to do; xtask writes it.
#[derive(Deserialize)]
struct Orders {
    /// Modules to load, in this order, by path. One that the kernel has built in may be missing.
    modules: Vec<PathBuf>,
    /// Programs to run.
    programs: Vec<Order>,
}

/// One program.
#[derive(Deserialize)]
struct Order {
    name: String,
    path: PathBuf,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
}

/// What is told on the second serial port.
#[derive(Serialize)]
#[serde(rename_all = "snake_case", tag = "report")]
enum Report<'a> {
    /// The machine is up.
    Started { kernel: &'a str },
    /// A program has ended; `code` is null when a signal ended it.
    Ended {
        name: &'a str,
        code: Option<i32>,
        seconds: f64,
        /// What the program said for others to read: its lines that begin with [`MARK`].
        said: Vec<String>,
        /// The last lines of a test program: `test result: ok. 8 passed; 0 failed; ...`.
        results: Vec<String>,
    },
    /// Something went wrong outside of the programs.
    Failed { what: String },
    /// All programs have run.
    Done,
}

/// Lines that begin so are a test's figures, for xtask.
const MARK: &str = "figure: ";

/// `MODULE_INIT_COMPRESSED_FILE` (`include/uapi/linux/module.h`, 5.17 and later): the kernel unpacks.
const COMPRESSED: ModuleInitFlags = ModuleInitFlags::from_bits_retain(4);

fn main() {
    if std::process::id() != 1 {
        eprintln!("guest: this is the first process of a virtual machine: run `cargo xtask vm`");
        std::process::exit(2);
    }
    // Whatever happens, the machine must end: a first process that exits is a kernel panic.
    let done = std::panic::catch_unwind(work);
    if let Ok(Err(error)) = done {
        eprintln!("guest: {error}");
        report(&Report::Failed { what: error });
    }
    nix::unistd::sync();
    let error = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("guest: cannot power off: {error:?}");
}

fn work() -> Result<(), String> {
    mount_all()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report(&Report::Started {
        kernel: kernel.trim(),
    });
    let orders = fs::read("/orders.json").map_err(|error| format!("/orders.json: {error}"))?;
    let orders: Orders =
        serde_json::from_slice(&orders).map_err(|error| format!("/orders.json: {error}"))?;
    set_loopback_up()?;
    for module in &orders.modules {
        load(module)?;
    }
    for order in &orders.programs {
        run(order)?;
    }
    report(&Report::Done);
    Ok(())
}

/// Mounts what a running system has.
fn mount_all() -> Result<(), String> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        // Those below /sys are there once it is mounted.
        let _ = fs::create_dir_all(target);
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .map_err(|error| format!("cannot mount {kind} on {target}: {error}"))?;
    }
    // Links that a system's own first process makes.
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdout", "/proc/self/fd/1"),
    ] {
        symlink(target, link).map_err(|error| format!("cannot make {link}: {error}"))?;
    }
    Ok(())
}

/// Tests make namespaces of their own, with a loopback interface each; this is for the first one.
fn set_loopback_up() -> Result<(), String> {
    tests::Netns::set_own_loopback_up().map_err(|error| format!("cannot set lo up: {error}"))
}

fn load(module: &Path) -> Result<(), String> {
    let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", module.display());
    let file = File::open(module).map_err(|error| wrong(&error))?;
    let plain = module
        .extension()
        .is_some_and(|extension| extension == "ko");
    let flags = if plain {
        ModuleInitFlags::empty()
    } else {
        COMPRESSED
    };
    match finit_module(&file, c"", flags) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(wrong(&error)),
    }
}

/// Runs a program to its end, and takes in orphans meanwhile, as a first process must.
fn run(order: &Order) -> Result<(), String> {
    eprintln!("guest: running {}", order.name);
    let start = Instant::now();
    let child = Command::new(&order.path)
        .args(&order.arguments)
        .env_clear()
        .envs(&order.environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| format!("{}: {error}", order.path.display()))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let readers = [
        thread::spawn(|| pass_on(stdout)),
        thread::spawn(|| pass_on(stderr)),
    ];
    let pid = Pid::from_raw(child.id().cast_signed());
    let code = loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(ended, code)) if ended == pid => break Some(code),
            Ok(WaitStatus::Signaled(ended, ..)) if ended == pid => break None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("cannot wait for {}: {error}", order.name)),
        }
    };
    let lines: Vec<String> = readers
        .into_iter()
        .flat_map(|reader| reader.join().unwrap_or_default())
        .collect();
    let starting = |mark: &str| {
        let lines = lines.iter().filter_map(|line| line.strip_prefix(mark));
        lines.map(str::to_owned).collect()
    };
    report(&Report::Ended {
        name: &order.name,
        code,
        seconds: start.elapsed().as_secs_f64(),
        said: starting(MARK),
        results: starting("test result: "),
    });
    Ok(())
}

/// Shows what comes on the console, and keeps it.
fn pass_on(from: Option<impl Read>) -> Vec<String> {
    let mut lines = Vec::new();
    for line in from
        .map(BufReader::new)
        .into_iter()
        .flat_map(BufReader::lines)
    {
        let Ok(line) = line else { break };
        eprintln!("{line}");
        lines.push(line);
    }
    lines
}

fn report(report: &Report<'_>) {
    let line = serde_json::to_string(report).expect("strings and numbers");
    let port = File::options().write(true).open("/dev/ttyS1");
    let written = port.and_then(|mut port| {
        raw(&port);
        writeln!(port, "{line}")?;
        // Until it is out: the machine may be turned off next.
        // SAFETY: the descriptor is open.
        Errno::result(unsafe { libc::tcdrain(port.as_raw_fd()) })?;
        Ok(())
    });
    if let Err(error) = written {
        eprintln!("guest: cannot report: {error}: {line}");
    }
}

/// Without this, the port would turn each newline into two characters.
fn raw(port: &File) {
    // SAFETY: all zeros are a valid `termios`, and it outlives the calls.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        libc::tcgetattr(port.as_raw_fd(), &raw mut settings);
        libc::cfmakeraw(&raw mut settings);
        libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &raw const settings);
    }
}
