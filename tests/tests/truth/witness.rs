//! What the kernel does while it runs a thread of process 1.
//!
//! There are machines whose kernel runs no BPF program in that context, for process 1 guards them; it does not
//! count such runs as missed either. Softirqs happen in anybody's context, so of some hundred connections one
//! or two have a change there, and no tracer by BPF can know. A plain trace event sees it, and excuses it.

use std::{
    collections::BTreeSet,
    env, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process,
    sync::mpsc::{Sender, channel},
    thread::{self, JoinHandle},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::story::{End, Step};

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Local and remote port of sockets that changed their states.
    changed: BTreeSet<(u16, u16)>,
    /// When timers of timewait sockets ran out, boot time.
    expired: Vec<i64>,
}

/// A trace of process 1 in softirq, by a thread with a mount namespace of its own.
pub(crate) struct Witness {
    stop: Sender<()>,
    thread: JoinHandle<io::Result<Seen>>,
}

impl Witness {
    /// Watches from now on. Without a trace there is nobody who excuses anything.
    pub(crate) fn start(seed: u64) -> Self {
        let (stop, stopped) = channel();
        let (begun, begins) = channel();
        let thread = thread::spawn(move || {
            let trace = Trace::begin(seed);
            // Whoever waits may be gone, which does not matter.
            let _ = begun.send(());
            let trace = trace?;
            let _ = stopped.recv();
            trace.seen()
        });
        let _ = begins.recv();
        Self { stop, thread }
    }

    /// What it has seen.
    pub(crate) fn finish(self) -> io::Result<Seen> {
        let _ = self.stop.send(());
        self.thread.join().expect("it does not panic")
    }
}

impl Seen {
    /// Whether no BPF program may have seen all of a socket's changes.
    pub(crate) fn excuses(&self, end: &End) -> bool {
        let ports =
            |one: Option<SocketAddr>, other: Option<SocketAddr>| Some((one?.port(), other?.port()));
        let changed = end.steps.iter().any(|step| {
            ports(step.local, step.remote).is_some_and(|ports| self.changed.contains(&ports))
        });
        let ends = end.rest.as_ref().and_then(|rest| rest.ended);
        let times_out = |step: &&Step| (step.from, step.to) == ("FIN_WAIT2", "CLOSE");
        let timers = end.steps.iter().filter(times_out).map(|step| step.window);
        let expired = timers.chain(ends).any(|window| {
            let around = window.from - 20_000_000..=window.to;
            self.expired.iter().any(|time| around.contains(time))
        });
        changed || expired
    }
}

/// What the name of an instance begins with, before the process id and the seed.
const INSTANCE: &str = "tcptrace-tests-";

/// An instance outlives a test that was killed, and costs every connection something until it is removed.
fn remove_left(instances: &Path) {
    for entry in fs::read_dir(instances).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(INSTANCE)?.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Unless another test does the same just now.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// An instance of the kernel's tracing, gone with this value.
struct Trace {
    mounted: PathBuf,
    instance: PathBuf,
}

impl Trace {
    fn begin(seed: u64) -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let (none, nothing) = (None::<&str>, None::<&Path>);
        mount(
            none,
            "/",
            none,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            nothing,
        )?;
        let mounted =
            env::temp_dir().join(format!("tcptrace-tests-{}-tracefs-{seed}", process::id()));
        fs::create_dir_all(&mounted)?;
        mount(
            Some("tracefs"),
            &mounted,
            Some("tracefs"),
            MsFlags::empty(),
            nothing,
        )?;
        let instances = mounted.join("instances");
        remove_left(&instances);
        let instance = instances.join(format!("{INSTANCE}{}-{seed}", process::id()));
        fs::create_dir(&instance)?;
        let trace = Self { mounted, instance };
        let threads = fs::read_dir("/proc/1/task")?;
        let threads = threads.map(|entry| {
            Ok(format!(
                "common_pid == {}",
                entry?.file_name().to_string_lossy()
            ))
        });
        let filter = threads.collect::<io::Result<Vec<_>>>()?.join(" || ");
        trace.set("trace_clock", "boot")?;
        for event in ["sock/inet_sock_set_state", "timer/timer_expire_entry"] {
            trace.set(&format!("events/{event}/filter"), &filter)?;
            trace.set(&format!("events/{event}/enable"), "1")?;
        }
        Ok(trace)
    }

    fn set(&self, name: &str, value: &str) -> io::Result<()> {
        fs::write(self.instance.join(name), value)
    }

    fn seen(&self) -> io::Result<Seen> {
        let mut seen = Seen::default();
        for line in fs::read_to_string(self.instance.join("trace"))?.lines() {
            let number = |key: &str| {
                let rest = line.split_once(key)?.1;
                rest.split(' ').next()?.parse::<u16>().ok()
            };
            if let (Some(local), Some(remote)) = (number(" sport="), number(" dport=")) {
                seen.changed.insert((local, remote));
            } else if line.contains("function=tw_timer_handler") {
                seen.expired.extend(time(line));
            }
        }
        Ok(seen)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.instance);
        // The mount goes with the thread.
        let _ = nix::mount::umount(&self.mounted);
        let _ = fs::remove_dir(&self.mounted);
    }
}

/// The time of a line, `COMM-PID [CPU] FLAGS SECONDS.MICROSECONDS: EVENT: ...`, in nanoseconds.
fn time(line: &str) -> Option<i64> {
    let stamp = line
        .split(": timer_expire_entry: ")
        .next()?
        .rsplit(' ')
        .next()?;
    let (seconds, microseconds) = stamp.split_once('.')?;
    let seconds: i64 = seconds.parse().ok()?;
    let microseconds: i64 = microseconds.parse().ok()?;
    Some(seconds * 1_000_000_000 + microseconds * 1000)
}
