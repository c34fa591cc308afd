//! tcptrace where it is pressed: little of the CPU, an output that nobody takes. It is watched from outside, and what it
//! prints need not be read.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::write};

use crate::{Netns, built, fixture, program::Process, tcptrace::binary};

static QUOTAS: AtomicUsize = AtomicUsize::new(0);

/// A cgroup whose processes get only a part of one CPU, as a container's do. Gone when dropped, after its processes.
#[derive(Debug)]
pub struct Quota {
    folder: PathBuf,
}

impl Quota {
    /// So many hundredths of one CPU.
    ///
    /// # Panics
    /// When the kernel has no CPU controller, in cgroup v1 or v2, that takes a quota.
    #[must_use]
    pub fn percent(percent: u32) -> Self {
        let number = QUOTAS.fetch_add(1, Ordering::Relaxed);
        let name = format!("tcptrace-tests-{}-{number}", std::process::id());
        let v1 = Path::new("/sys/fs/cgroup/cpu");
        let (parent, file, text) = if v1.join("cpu.cfs_quota_us").exists() {
            (v1, "cpu.cfs_quota_us", format!("{}", percent * 1000))
        } else {
            let v2 = Path::new("/sys/fs/cgroup");
            // Already so where systemd runs.
            let _ = fs::write(v2.join("cgroup.subtree_control"), "+cpu");
            (v2, "cpu.max", format!("{} 100000", percent * 1000))
        };
        let folder = parent.join(name);
        fs::create_dir(&folder).expect("a cgroup can be made");
        fs::write(folder.join(file), text).expect("the kernel has the CPU controller");
        Self { folder }
    }

    fn processes(&self) -> File {
        let path = self.folder.join("cgroup.procs");
        let file = File::options().write(true).open(path);
        file.expect("our own cgroup")
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // A process that has ended is in it for a moment longer.
        for _ in 0..100 {
            if fs::remove_dir(&self.folder).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A tcptrace that runs. Killed when dropped.
#[derive(Debug)]
pub struct Pressed {
    process: Process,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    began: Instant,
    words: String,
}

/// How a pressed tcptrace ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Everything it wrote to stderr.
    pub stderr: String,
    /// How long it took.
    pub after: Duration,
}

impl Pressed {
    /// Runs tcptrace with these arguments, under this quota, and with its output to somewhere.
    ///
    /// # Panics
    /// When there is no binary.
    #[must_use]
    pub fn start(
        arguments: &[impl AsRef<OsStr>],
        quota: Option<&Quota>,
        stdout: impl Into<Stdio>,
    ) -> Self {
        let mut command = Command::new(binary());
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(Stdio::piped());
        if let Some(quota) = quota {
            let processes = quota.processes();
            // SAFETY: between fork and exec there is only one system call.
            unsafe { command.pre_exec(move || Ok(write(&processes, b"0").map(|_| ())?)) };
        }
        let words = format!("{command:?}");
        let began = Instant::now();
        let mut child = command.spawn().expect("tcptrace can be run");
        let stderr = Arc::new(Mutex::new(String::new()));
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let keep = Arc::clone(&stderr);
        let reader = thread::spawn(move || {
            for line in lines.map_while(io::Result::ok) {
                let mut text = keep.lock().expect("nobody panics while writing");
                text.push_str(&line);
                text.push('\n');
            }
        });
        Self {
            process: Process(child),
            stderr,
            reader: Some(reader),
            began,
            words,
        }
    }

    /// What it has said so far.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr
            .lock()
            .expect("nobody panics while writing")
            .clone()
    }

    /// Waits until it has said this. Returns how long it took since it was started.
    ///
    /// # Panics
    /// When it does not say it in time.
    pub fn wait_said(&self, what: &str, limit: Duration) -> Duration {
        loop {
            let after = self.began.elapsed();
            let said = self.stderr();
            if said.contains(what) {
                return after;
            }
            assert!(
                after < limit,
                "{}: has not said {what:?} within {limit:?}:\n{said}",
                self.words
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// The most memory that it has had so far, in bytes; without what of the ring buffer it has seen.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn peak_memory(&self) -> u64 {
        memory(self.process.pid(), "VmHWM:")
    }

    /// The memory that it has now, in bytes.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn memory(&self) -> u64 {
        memory(self.process.pid(), "VmRSS:")
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not come in time.
    #[must_use]
    pub fn wait_end(mut self, limit: Duration) -> Ended {
        let began = Instant::now();
        let what = format!("{} ends", self.words);
        let status = self.process.wait(&what, limit);
        let after = began.elapsed();
        if let Some(reader) = self.reader.take() {
            reader.join().expect("readers do not panic");
        }
        Ended {
            code: status.code(),
            stderr: self.stderr(),
            after,
        }
    }

    /// Sends it a signal, and waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    #[must_use]
    pub fn end(self, signal: Signal, limit: Duration) -> Ended {
        self.signal(signal);
        self.wait_end(limit)
    }
}

fn memory(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    let kilobytes: u64 = kilobytes.expect("every process").parse().expect("a number");
    kilobytes * 1024
}

/// Connections as fast as the kernel makes them. Ended when dropped.
#[derive(Debug)]
pub struct Storm {
    process: Process,
}

impl Storm {
    /// By so many threads, in this namespace, each closed with a reset or with a FIN, until dropped.
    ///
    /// # Panics
    /// When the program is not built.
    #[must_use]
    pub fn start(netns: &Netns, threads: u32, close: &str) -> Self {
        Self {
            process: Process(churn(netns, threads, close, "seconds=600")),
        }
    }

    /// The process that makes it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// So many connections of each thread, and then none any more.
    ///
    /// # Panics
    /// When it fails.
    pub fn pass(netns: &Netns, threads: u32, close: &str, connections: u32) {
        let until = format!("connections={connections}");
        let mut process = Process(churn(netns, threads, close, &until));
        let status = process.wait("the storm passes", Duration::from_secs(120));
        assert!(status.success(), "churn fails");
    }
}

fn churn(netns: &Netns, threads: u32, close: &str, until: &str) -> Child {
    let mut command = Command::new(built("churn"));
    command
        .args(["run", "ip=4", "port=7000", until])
        .arg(format!("threads={threads}"))
        .arg(format!("close={close}"))
        .stdout(Stdio::null());
    fixture::enter_namespace(&mut command, netns);
    command.spawn().expect("churn is built")
}
