//! `cargo xtask bench`: what tcptrace costs, beside its peers, in one run.

use std::{
    env, fs,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::geteuid;

use crate::{build, command, vm};

mod bare;
mod check;
mod churn;
mod growth;
mod held;
mod kernel;
mod lab;
mod output;
mod page;
mod paper;
mod profile;
mod programs;
mod results;
mod single;
mod sinks;
mod soak;
mod spread;
mod targets;
mod tracer;
mod user;

use churn::Load;
use lab::Lab;
use results::{LeftOut, Machine, Results};

/// What to measure.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// How often each tracer is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each measurement of connections is
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Write docs/performance.json and docs/performance.md, and those of growth with its pictures; parts that are
    /// not measured stay as they are there
    #[arg(long)]
    write: bool,
    /// Write the results as JSON here as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the pages anew from docs/performance.json and docs/growth.json, and measure nothing
    #[arg(long, conflicts_with_all = ["only", "check", "json", "write"])]
    page: bool,
    /// Hold instructions, memory and size against tests/costs.txt (a minute after the build; no root); with
    /// --write, put them there
    #[arg(long, conflicts_with_all = ["only", "json"])]
    check: bool,
    /// With --check: connections a second as well, which needs root and a quiet machine
    #[arg(long, requires = "check")]
    full: bool,
    /// Have each command follow as many connections as this machine makes, for so long each (90s, 10m, 1h): memory,
    /// losses, and what is healed afterwards
    #[arg(long, value_name = "TIME", value_parser = soak::parse, conflicts_with_all = ["only", "check", "json", "write", "page"])]
    soak: Option<f64>,
    #[command(subcommand)]
    inside: Option<Inside>,
}

/// This program again, as root.
#[derive(clap::Subcommand)]
enum Inside {
    /// What needs root
    #[command(hide = true)]
    Measure(Measure),
    /// A BPF program to compare with
    #[command(hide = true)]
    Bare(bare::Options),
}

#[derive(clap::Args)]
struct Measure {
    #[arg(long)]
    tcptrace: PathBuf,
    #[arg(long)]
    churn: PathBuf,
    #[arg(long)]
    workload: PathBuf,
    #[arg(long)]
    feeder: PathBuf,
    #[arg(long)]
    folder: PathBuf,
    #[arg(long)]
    rounds: usize,
    #[arg(long)]
    seconds: f64,
    /// Without peers
    #[arg(long)]
    own: bool,
    #[arg(long, value_enum, value_delimiter = ',')]
    parts: Vec<Part>,
}

/// A part of the measurements.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Connections a second, with each tracer and without
    Churn,
    /// What BPF programs take
    Kernel,
    /// Where the time of whoever connects goes
    Profile,
    /// Instructions and time of records and lines
    User,
    /// Records a second that each stage takes by itself
    Ceilings,
    /// Transitions a second that are followed without a loss (ten minutes; each rate is confirmed for five times
    /// --seconds)
    Held,
    /// Bytes for each connection
    Memory,
    /// `leaks --once` and `ss -tanp`
    Once,
    /// What commands take while nothing happens
    Idle,
    /// Time to the first event
    Start,
    /// Size of the binary
    Size,
    /// How costs grow with connections, sockets and descriptors (seven minutes)
    Growth,
}

impl Part {
    const ALL: [Self; 12] = [
        Self::Churn,
        Self::Kernel,
        Self::Profile,
        Self::User,
        Self::Ceilings,
        Self::Held,
        Self::Memory,
        Self::Once,
        Self::Idle,
        Self::Start,
        Self::Size,
        Self::Growth,
    ];

    const fn needs_root(self) -> bool {
        matches!(
            self,
            Self::Churn
                | Self::Kernel
                | Self::Profile
                | Self::Ceilings
                | Self::Held
                | Self::Once
                | Self::Idle
                | Self::Start
                | Self::Growth
        )
    }

    fn name(self) -> String {
        use clap::ValueEnum as _;
        let value = self.to_possible_value().expect("none is skipped");
        value.get_name().to_owned()
    }
}

/// Builds, measures, and tells.
pub(crate) fn run(options: Options) -> Result<()> {
    match options.inside {
        Some(Inside::Measure(measure)) => return measure.run(),
        Some(Inside::Bare(bare)) => return bare::run(&bare),
        None => {}
    }
    if let Some(seconds) = options.soak {
        return soak::run(seconds);
    }
    if options.page {
        let results = serde_json::from_str(&fs::read_to_string(docs("json"))?)?;
        fs::write(docs("md"), page::page(&results))?;
        return growth::written()?.iter().try_for_each(growth::write);
    }
    let parts: Vec<Part> = match (options.check, options.full, &options.only[..]) {
        (true, false, _) => vec![Part::User, Part::Memory, Part::Size],
        (true, true, _) => vec![Part::Churn, Part::User, Part::Memory, Part::Size],
        (false, _, []) => Part::ALL.to_vec(),
        (false, _, only) => only.to_vec(),
    };
    // Read first: what cannot be read should not cost the measurements.
    let before = if options.write && !options.check {
        growth::written()?;
        written()?
    } else {
        None
    };
    let mut results = measure(&options, &parts)?;
    if options.check {
        return check::check(&results, options.write);
    }
    let growth = growth::taken(&mut results);
    if let Some(growth) = &growth {
        if options.write {
            growth::write(growth)?;
            eprintln!("bench: docs/growth.md, its figures and pictures are written");
        }
        io::stdout().write_all(growth::page(growth)?.as_bytes())?;
    }
    // The other page has nothing new then.
    if parts == [Part::Growth] {
        if let (Some(path), Some(growth)) = (&options.json, &growth) {
            json(path, growth)?;
        }
        return Ok(());
    }
    if options.write {
        results = merged(results, before);
        let json = serde_json::to_string_pretty(&results)? + "\n";
        fs::write(docs("json"), json)?;
        fs::write(docs("md"), page::page(&results))?;
        eprintln!("bench: written to {}", docs("md").display());
    }
    io::stdout().write_all(page::page(&results).as_bytes())?;
    if let Some(path) = &options.json {
        json(path, &Results { growth, ..results })?;
    }
    Ok(())
}

fn json(path: &Path, results: &impl serde::Serialize) -> Result<()> {
    fs::write(path, serde_json::to_string_pretty(results)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

fn docs(extension: &str) -> PathBuf {
    command::root()
        .join("docs/performance")
        .with_extension(extension)
}

/// The results in the repository; `None` without any.
fn written() -> Result<Option<Results>> {
    let path = docs("json");
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map(Some).with_context(|| {
            format!(
                "{} is not as this version writes it: remove it, and measure everything",
                path.display()
            )
        }),
        Err(_) => Ok(None),
    }
}

/// Parts that were not measured now are as before, if the machine is the same.
fn merged(new: Results, old: Option<Results>) -> Results {
    let Some(old) = old else { return new };
    let machine = |of: &Results| (of.machine.cpu.clone(), of.machine.kernel.clone());
    let all = new.churn.is_some() && new.kernel.is_some() && new.user.is_some();
    if all || machine(&old) != machine(&new) {
        return new;
    }
    Results {
        machine: new.machine,
        churn: new.churn.or(old.churn),
        kernel: new.kernel.or(old.kernel),
        profile: new.profile.or(old.profile),
        user: new.user.or(old.user),
        ceilings: new.ceilings.or(old.ceilings),
        held: new.held.or(old.held),
        memory: new.memory.or(old.memory),
        once: new.once.or(old.once),
        idle: new.idle.or(old.idle),
        start_ms: new.start_ms.or(old.start_ms),
        binary: new.binary.or(old.binary),
        growth: None,
        // What is left out now, and what was of other parts.
        left_out: {
            let mut all = new.left_out;
            for left_out in old.left_out {
                if !all.contains(&left_out) {
                    all.push(left_out);
                }
            }
            all
        },
    }
}

fn measure(options: &Options, parts: &[Part]) -> Result<Results> {
    let wanted = |part| parts.contains(&part);
    let as_root: Vec<Part> = parts
        .iter()
        .copied()
        .filter(|part| part.needs_root())
        .collect();
    if !as_root.is_empty() && !geteuid().is_root() {
        eprintln!("bench: probes and network namespaces need root: asking sudo");
        command::run(sudo().arg("true")).context(
            "it needs root: run it as a user who may use sudo, or as root; `--only user,memory,size` needs none",
        )?;
    }
    let tcptrace = build::run()?;
    let release = tcptrace.parent().context("the binary has no folder")?;
    let build = |what: &[&str]| {
        command::run(
            command::cargo("build")
                .args(["--release", "--package"])
                .args(what),
        )
    };
    let mut results = Results::default();
    let workload = release.join("examples/workload");
    let feeder = release.join("examples/feeder");
    if [
        Part::User,
        Part::Ceilings,
        Part::Held,
        Part::Memory,
        Part::Once,
        Part::Growth,
    ]
    .into_iter()
    .any(wanted)
    {
        build(&["tcptrace", "--example", "workload", "--example", "feeder"])?;
    }
    if wanted(Part::Size) {
        match size(release) {
            Ok(bytes) => results.binary = Some(bytes),
            Err(error) => results.leave_out("size of the static binary", &error),
        }
    }
    if !as_root.is_empty() {
        build(&["tests", "--bin", "churn"])?;
        let folder = release.with_file_name("bench");
        fs::create_dir_all(&folder)?;
        let measured = Measure {
            churn: release.join("churn"),
            workload: workload.clone(),
            feeder,
            tcptrace: tcptrace.clone(),
            folder,
            rounds: options.rounds,
            seconds: options.seconds,
            own: options.check,
            parts: as_root,
        }
        .as_root()?;
        let left_out = [measured.left_out, results.left_out].concat();
        results = Results {
            left_out,
            binary: results.binary,
            ..measured
        };
    }
    if wanted(Part::User) {
        let works = user::works(&workload, !options.check)?;
        if works.iter().any(|work| work.instructions.is_none()) {
            let missing = anyhow::anyhow!("valgrind is not installed");
            ensure!(!options.check, "instructions cannot be counted: {missing}");
            results.leave_out("instructions", &missing);
        }
        results.user = Some(works);
    }
    if wanted(Part::Memory) {
        results.memory = Some(user::memory(&workload)?);
    }
    if let Some(growth) = &mut results.growth {
        growth::measure_tracker(growth, &workload)?;
    }
    results.machine = machine()?;
    Ok(results)
}

impl Results {
    fn leave_out(&mut self, what: &str, why: &anyhow::Error) {
        self.left_out.push(LeftOut {
            what: what.to_owned(),
            why: format!("{why:#}"),
        });
    }
}

/// Bytes of the static binary without symbols.
fn size(release: &Path) -> Result<u64> {
    let target = vm::static_target()?;
    let build = ["--release", "--package", "tcptrace", "--target", target];
    command::run(command::cargo("build").args(build))?;
    let target_dir = release.parent().context("the binary has no folder")?;
    let built = target_dir.join(target).join("release/tcptrace");
    let stripped = built.with_extension("stripped");
    command::run(Command::new("strip").arg("-o").arg(&stripped).arg(&built))?;
    Ok(fs::metadata(stripped)?.len())
}

/// `sudo`, which can ask for a password only on a terminal.
fn sudo() -> Command {
    let mut sudo = Command::new("sudo");
    if !io::stdin().is_terminal() {
        sudo.arg("-n");
    }
    sudo
}

fn machine() -> Result<Machine> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let kilobytes = meminfo
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse::<f64>().ok());
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load
        .split_whitespace()
        .next()
        .and_then(|load| load.parse().ok());
    let said = |program: &str, arguments: &[&str]| {
        let said = command::output(command::at_root(program).args(arguments));
        said.map_or_else(|_| "unknown".to_owned(), |said| said.trim().to_owned())
    };
    Ok(Machine {
        cpu: model
            .map_or("unknown", |name| name.trim_start_matches([' ', '\t', ':']))
            .to_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        memory_gib: kilobytes.context("/proc/meminfo")? / f64::from(1 << 20),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        date: said("date", &["-u", "+%F"]),
        commit: said("git", &["describe", "--always", "--dirty"]),
        load: load.context("/proc/loadavg")?,
    })
}

impl Measure {
    /// Runs this program again, as root, in a process of its own.
    fn as_root(&self) -> Result<Results> {
        let own = env::current_exe().context("the path of this program is not known")?;
        let mut command = if geteuid().is_root() {
            Command::new(own)
        } else {
            let mut sudo = sudo();
            sudo.arg(own);
            sudo
        };
        let parts: Vec<String> = self.parts.iter().map(|part| part.name()).collect();
        command.args(["bench", "measure"]);
        for (name, path) in [
            ("--tcptrace", &self.tcptrace),
            ("--churn", &self.churn),
            ("--workload", &self.workload),
            ("--feeder", &self.feeder),
            ("--folder", &self.folder),
        ] {
            command.arg(name).arg(path);
        }
        command
            .args(["--rounds", &self.rounds.to_string()])
            .args(["--seconds", &self.seconds.to_string()])
            .args(["--parts", &parts.join(",")])
            .args(self.own.then_some("--own"))
            .stderr(Stdio::inherit());
        let output = command.output().context("cannot start the measurements")?;
        ensure!(
            output.status.success(),
            "the measurements failed: {}",
            output.status
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Measures, and prints the results.
    fn run(&self) -> Result<()> {
        let wanted = |part| self.parts.contains(&part);
        let lab = Lab::enter(&self.churn, &self.folder)?;
        let mut results = Results::default();
        let own = tracer::own(&self.tcptrace);
        let mut all = own.clone();
        if !self.own {
            if wanted(Part::Churn) || wanted(Part::Kernel) {
                all.extend(bare::tracers(&own[0], &lab.folder)?);
            }
            let (peers, absent) = tracer::peers();
            all.extend(peers);
            for (name, why) in absent {
                results.left_out.push(LeftOut {
                    what: name.to_owned(),
                    why,
                });
            }
        }
        if wanted(Part::Churn) {
            let churn =
                churn::measure(&lab, self.rounds, self.seconds, &all, &mut results.left_out)?;
            results.churn = Some(churn);
        }
        if wanted(Part::Kernel) {
            let kernel = kernel::measure(
                &lab,
                self.rounds.min(3),
                Load::resets(self.seconds.min(1.0)),
                &all,
                &mut results.left_out,
            )?;
            results.kernel = Some(kernel);
        }
        if wanted(Part::Profile) {
            match profile::measure(&lab, self.seconds, &own) {
                Ok(profile) => results.profile = Some(profile),
                Err(error) => results.leave_out("the profile of whoever connects", &error),
            }
        }
        if wanted(Part::Ceilings) {
            match held::ceilings(&lab, &self.feeder, &self.workload) {
                Ok(ceilings) => results.ceilings = Some(ceilings),
                Err(error) => results.leave_out("ceilings of the stages", &error),
            }
        }
        if wanted(Part::Held) {
            let left_out = &mut results.left_out;
            let held = held::measure(&lab, &self.tcptrace, &self.feeder, self.seconds, left_out);
            match held {
                Ok(held) => results.held = Some(held),
                Err(error) => results.leave_out("held rates", &error),
            }
        }
        if wanted(Part::Once) {
            results.once = Some(single::once(&lab, &self.tcptrace, &self.workload)?);
        }
        if wanted(Part::Idle) {
            results.idle = Some(single::idle(&lab, &own)?);
        }
        if wanted(Part::Start) {
            results.start_ms = Some(single::start(&self.tcptrace)?);
        }
        if wanted(Part::Growth) {
            results.growth = Some(growth::measure(&lab, &self.tcptrace, self.rounds)?);
        }
        writeln!(io::stdout(), "{}", serde_json::to_string(&results)?)?;
        Ok(())
    }
}
