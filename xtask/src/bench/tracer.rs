//! The programs that are compared, and one of them running.

use std::{
    env,
    fs::{self, File},
    io::{self, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, killpg},
    },
    unistd::Pid,
};

use super::{
    output::{self, Format, Told},
    programs,
};

/// What tcptrace says once it sees everything that happens.
const TRACING: &str = "tcptrace: tracing";
/// Compiling a program, as bpftrace and bcc do, can take as long on a busy machine.
const START: Duration = Duration::from_secs(30);
/// From when a peer has loaded its programs until they are attached.
const ATTACH: Duration = Duration::from_millis(500);
const END: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// What `tcpstates` prints, in bpftrace's language.
const BPFTRACE: &str = r#"tracepoint:sock:inet_sock_set_state {
  if (args->protocol == 6) {
    printf("%llu %d %s %d %d %d -> %d\n", nsecs, pid, comm, args->sport, args->dport, args->oldstate, args->newstate);
  }
}"#;
const SS: &str = "while :; do ss -tanpe; sleep 1; done";

/// A program to be compared.
#[derive(Clone, Debug)]
pub(super) struct Tracer {
    /// For people.
    pub(super) name: &'static str,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) format: Format,
    /// Lines that tell everything of the connections of a run; `None` if it does not tell of each.
    pub(super) lines: Option<Lines>,
    /// It loads BPF programs.
    pub(super) bpf: bool,
    /// It is ours.
    pub(super) own: bool,
}

/// Lines that tell everything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines {
    /// Of a connection that ends with a reset.
    pub(super) connection: u64,
    /// Of the listener.
    pub(super) listener: u64,
}

/// CLOSE > SYN_SENT > ESTABLISHED > CLOSE of the client, LISTEN > SYN_RECV > ESTABLISHED > CLOSE of the server;
/// CLOSE > LISTEN > CLOSE of the listener.
const EVERY: Option<Lines> = Some(Lines {
    connection: 6,
    listener: 2,
});
/// One for each end of a connection that is over.
const ENDS: Option<Lines> = Some(Lines {
    connection: 2,
    listener: 0,
});

/// Every command of tcptrace that is measured.
pub(super) fn own(tcptrace: &Path) -> Vec<Tracer> {
    [
        ("tcptrace stream -o json", Format::Json, EVERY),
        ("tcptrace stream", Format::Text, EVERY),
        ("tcptrace leaks -o json", Format::Json, None),
        ("tcptrace timewait -o json", Format::Json, None),
        ("tcptrace record", Format::Recording, EVERY),
    ]
    .into_iter()
    .map(|(name, format, lines)| Tracer {
        name,
        program: tcptrace.to_owned(),
        arguments: name.split(' ').skip(1).map(str::to_owned).collect(),
        format,
        lines,
        bpf: true,
        own: true,
    })
    .collect()
}

/// The peers that are installed, and the names of those that are not, with what was looked for.
pub(super) fn peers() -> (Vec<Tracer>, Vec<(&'static str, String)>) {
    let mut found = Vec::new();
    let mut absent = Vec::new();
    let is_elf = |path: &Path| fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"));
    let is_script = |path: &Path| fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"#!"));
    let any = |_: &Path| true;
    let mut look = |name,
                    files: &[&str],
                    fits: &dyn Fn(&Path) -> bool,
                    arguments: &[&str],
                    format,
                    lines,
                    bpf| {
        match files.iter().find_map(|file| find(file, fits)) {
            Some(program) => found.push(Tracer {
                name,
                program,
                arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
                format,
                lines,
                bpf,
                own: false,
            }),
            None => absent.push((
                name,
                format!("no program {} is installed", files.join(" or ")),
            )),
        }
    };
    let text = Format::Text;
    look(
        "tcpstates (libbpf-tools)",
        &["tcpstates"],
        &is_elf,
        &[],
        text,
        EVERY,
        true,
    );
    look(
        "tcplife (libbpf-tools)",
        &["tcplife"],
        &is_elf,
        &[],
        text,
        ENDS,
        true,
    );
    look(
        "bpftrace",
        &["bpftrace"],
        &any,
        &["-e", BPFTRACE],
        text,
        EVERY,
        true,
    );
    let bcc = ["tcpstates-bpfcc", "tcpstates"];
    look("tcpstates (bcc)", &bcc, &is_script, &[], text, EVERY, true);
    if let Some(at) = find("ss", &any) {
        drop(at);
        look(
            "ss -tanpe every second",
            &["sh"],
            &any,
            &["-c", SS],
            Format::Report,
            None,
            false,
        );
    } else {
        absent.push((
            "ss -tanpe every second",
            "no program ss is installed".to_owned(),
        ));
    }
    (found, absent)
}

/// A program in `PATH`, or where distributions put what needs root.
pub(super) fn find(name: &str, fits: &dyn Fn(&Path) -> bool) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(
        ["/usr/sbin", "/sbin", "/usr/share/bcc/tools"]
            .into_iter()
            .map(PathBuf::from),
    );
    folders
        .map(|folder| folder.join(name))
        .find(|file| file.is_file() && fits(file))
}

/// A tracer that runs. Killed when dropped.
pub(super) struct Running {
    child: Child,
    output: PathBuf,
    errors: PathBuf,
    format: Format,
}

impl Tracer {
    /// Starts it, with more arguments, until it traces. What it writes goes to files in `folder`.
    ///
    /// # Errors
    /// When it does not come to trace: with what it says.
    pub(super) fn start(&self, folder: &Path, more: &[&str]) -> Result<Running> {
        let output = folder.join("output");
        let errors = folder.join("errors");
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(more);
        if self.format == Format::Recording {
            command
                .arg(&output)
                .stdout(File::create(folder.join("stdout"))?);
        } else {
            command.stdout(File::create(&output)?);
        }
        // In a group of its own, so that what it starts ends with it.
        command.stderr(File::create(&errors)?).process_group(0);
        dies_with_us(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("{} cannot be started", self.program.display()))?;
        let mut running = Running {
            child,
            output,
            errors,
            format: self.format,
        };
        let began = Instant::now();
        while !running.is_ready(self) {
            if let Some(status) = running.child.try_wait()? {
                bail!("it ended ({status}): {}", running.last_words());
            }
            if began.elapsed() > START {
                bail!(
                    "it has not loaded a program in {START:?}: {}",
                    running.last_words()
                );
            }
            thread::sleep(POLL);
        }
        if self.bpf && !self.own {
            thread::sleep(ATTACH);
            if let Some(status) = running.child.try_wait()? {
                bail!("it ended ({status}): {}", running.last_words());
            }
        }
        Ok(running)
    }
}

/// A child that is started by `command` ends when this process does, however that ends.
pub(super) fn dies_with_us(command: &mut Command) {
    let act = || set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
    // SAFETY: between fork and exec there is one system call, and nothing is allocated.
    unsafe { command.pre_exec(act) };
}

impl Running {
    fn is_ready(&self, tracer: &Tracer) -> bool {
        if tracer.own {
            let said = fs::read_to_string(&self.errors).unwrap_or_default();
            said.lines().any(|line| line == TRACING)
        } else if tracer.bpf {
            !programs::of(self.pid()).is_empty()
        } else {
            true
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said last: usually why it could not go on.
    fn last_words(&self) -> String {
        let said = fs::read(&self.errors).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().rfind(|line| !line.trim().is_empty());
        last.unwrap_or("it said nothing").trim().to_owned()
    }

    /// CPU time that it and its ended children have used.
    pub(super) fn cpu(&self) -> Result<Duration> {
        cpu(self.pid())
    }

    /// Ends it as Ctrl-C does, and reads what it has written about connections to `port`.
    pub(super) fn finish(mut self, port: u16) -> Result<Told> {
        if self.format == Format::Report {
            // Nothing of it is read, and a shell with a loop does not always end with this signal.
            return Ok(Told::default());
        }
        killpg(Pid::from_raw(self.pid().cast_signed()), Signal::SIGINT)?;
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            if began.elapsed() > END {
                bail!("it does not end with SIGINT");
            }
            thread::sleep(POLL);
        }
        let output = BufReader::with_capacity(1 << 20, File::open(&self.output)?);
        let mut told = output::read(self.format, port, output)?;
        // Those that count their losses on stderr do so for what is not told on stdout.
        if told.lost == 0 {
            let said = fs::read(&self.errors)?;
            let said = String::from_utf8_lossy(&said);
            told.lost = said.lines().map(output::lost_in).sum();
        }
        Ok(told)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Once it has been waited for, its id may be another's.
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(Pid::from_raw(self.pid().cast_signed()), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// CPU time that a process and its ended children have used.
pub(super) fn cpu(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    ticks(&stat).context("/proc/PID/stat is not as proc(5) says")
}

/// User and system time of a process and its ended children, from its `/proc/PID/stat`.
fn ticks(stat: &str) -> Option<Duration> {
    // The name, in parentheses, may have anything in it.
    let (_, rest) = stat.rsplit_once(')')?;
    // From the state on, the third field: utime, stime, cutime and cstime are 14 to 17.
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let mut ticks = 0_u32;
    for field in fields.get(11..15)? {
        ticks += field.parse::<u32>().ok()?;
    }
    // USER_HZ is 100 on every architecture that tcptrace runs on.
    Some(Duration::from_millis(10) * ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_of_a_process_with_any_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 120 30 5 1 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), Some(Duration::from_millis(1560)));
        assert_eq!(ticks("42 (a) S 1 2"), None);
    }
}
