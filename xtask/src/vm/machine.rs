//! A virtual machine: qemu, from the start to the verdict.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// The emulator.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// What the first process reports, a line each: see `tests/src/bin/guest.rs`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", tag = "report")]
pub(super) enum Report {
    /// The machine is up, with this kernel.
    Started { kernel: String },
    /// A program has ended.
    Ended(Ended),
    /// Something went wrong outside of the programs.
    Failed { what: String },
    /// All programs have run.
    Done,
}

/// A program that has ended in the machine.
#[derive(Debug, Deserialize)]
pub(super) struct Ended {
    pub(super) name: String,
    /// Its exit code; `None` when a signal ended it.
    pub(super) code: Option<i32>,
    /// Its figures.
    pub(super) said: Vec<String>,
    /// `ok. 8 passed; 0 failed; ...`
    pub(super) results: Vec<String>,
}

/// How time passes in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Time {
    /// As outside, on two CPUs.
    Real,
    /// By instructions executed, on one CPU: where nothing runs, time jumps to the next timer.
    Virtual,
}

/// What to start.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    /// Where the console log goes; its neighbours are named after it.
    pub(super) log: PathBuf,
    pub(super) time: Time,
    /// Real time after which it has stalled.
    pub(super) limit: Duration,
}

/// What came of it.
pub(super) struct Outcome {
    pub(super) reports: Vec<Report>,
    /// Why it did not come to its end by itself.
    pub(super) stalled: Option<String>,
    /// Real time.
    pub(super) took: Duration,
}

impl Machine<'_> {
    /// Runs it until it turns itself off, or the time is up.
    ///
    /// # Errors
    /// When qemu does not start, or the files cannot be written.
    pub(super) fn run(&self) -> Result<Outcome> {
        let reports = self.log.with_extension("reports");
        let _ = fs::remove_file(&reports);
        let log = File::create(&self.log)
            .with_context(|| format!("cannot write {}", self.log.display()))?;
        let start = Instant::now();
        let mut qemu = self
            .command(&reports)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{QEMU} does not start"))?;
        let stalled = wait(&mut qemu, start + self.limit)?;
        let text = fs::read_to_string(&reports).unwrap_or_default();
        Ok(Outcome {
            // A line that is cut off is none.
            reports: text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
            stalled,
            took: start.elapsed(),
        })
    }

    fn command(&self, reports: &Path) -> Command {
        let mut qemu = Command::new(QEMU);
        // Not KVM: it is not there on most machines that build, and kernels under emulation behave alike
        // everywhere.
        match self.time {
            Time::Real => qemu.args(["-accel", "tcg,thread=multi", "-smp", "2"]),
            Time::Virtual => qemu
                .args(["-accel", "tcg,thread=single", "-smp", "1"])
                .args(["-icount", "shift=0,sleep=off"]),
        };
        qemu.args([
            "-cpu",
            "max,-cx16",
            "-m",
            "1G",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args(["-monitor", "none", "-nic", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(self.kernel)
        .arg("-initrd")
        .arg(self.initramfs)
        // A panic restarts the machine at once, which `-no-reboot` makes an end.
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 oops=panic rdinit=/init",
        ])
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("file:{}", reports.display()));
        qemu
    }
}

impl Outcome {
    /// The figures that tests have told.
    pub(super) fn figures(&self) -> impl Iterator<Item = &str> {
        let ended = self.reports.iter().filter_map(|report| match report {
            Report::Ended(ended) => Some(ended),
            _ => None,
        });
        ended.flat_map(|ended| &ended.said).map(String::as_str)
    }
}

/// Waits for its end, or ends it. Returns why, if it had to.
fn wait(qemu: &mut Child, deadline: Instant) -> Result<Option<String>> {
    loop {
        if let Some(status) = qemu.try_wait()? {
            return Ok((!status.success()).then(|| format!("qemu: {status}")));
        }
        if Instant::now() >= deadline {
            qemu.kill()?;
            qemu.wait()?;
            return Ok(Some("it did not end in time".to_owned()));
        }
        thread::sleep(Duration::from_millis(50));
    }
}
