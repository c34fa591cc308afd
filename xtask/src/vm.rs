//! `cargo xtask vm`: the tests against the real kernel, on other kernels than this machine's.
//!
//! Each kernel starts in a virtual machine of its own, whose file system holds the tests, tcptrace, and
//! `guest`, a first process that runs them. See ARCHITECTURE.md.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::command;

mod apt;
mod host;
mod initramfs;
mod instructions;
mod kernels;
mod machine;
mod plan;
mod programs;
mod verdict;
mod works;

use initramfs::Initramfs;
use instructions::Table;
use kernels::{Kernel, Release, Series};
use machine::{Machine, Time};
use programs::Programs;

/// The target whose programs need nothing else of a system, added to the toolchain if it is missing.
///
/// # Errors
/// When it cannot be added.
pub(crate) fn static_target() -> Result<&'static str> {
    programs::ensure_target()?;
    Ok(programs::TARGET)
}

/// The series to run on, if nothing else is asked for: one that cannot trace, the oldest that a
/// supported distribution has, one in the middle. The newest comes on top.
const DEFAULT: [Series; 3] = [Series(5, 10), Series(6, 1), Series(6, 12)];

/// Real time after which a machine has stalled. Two at a time on two CPUs take two to five minutes, as busy as
/// the host is besides.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// The same with every test, which take a quarter of an hour on a busy host.
const FULL_LIMIT: Duration = Duration::from_secs(60 * 60);

/// On which kernels, and what.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Series to run on, such as 6.12; without any, 5.10 (which must be refused), 6.1, 6.12 and the newest
    #[arg(value_name = "SERIES")]
    series: Vec<Series>,
    /// Run on this image (vmlinuz) instead; may be given again
    #[arg(long, value_name = "PATH", conflicts_with = "series")]
    kernel: Vec<PathBuf>,
    /// Folder with the modules tcp_diag and inet_diag of --kernel; without, they are looked for next to it
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Every series that can be had, unless some are named, and every test: those that wait a minute, too
    #[arg(long)]
    full: bool,
    /// Run on two CPUs in real time instead of on one in virtual time: for races. Tests may fail where
    /// the machine is too slow for them
    #[arg(long)]
    smp: bool,
    /// List the kernels that are in the cache, and those that can be had
    #[arg(long)]
    list: bool,
    /// Look for newer builds than those in the cache
    #[arg(long)]
    update: bool,
    /// Install what is missing on this host: qemu, with apt-get (root or sudo)
    #[arg(long)]
    install: bool,
    /// Write what works on these kernels into docs/kernels.md, and the verifier's instruction counts into
    /// tests/instructions.txt, instead of comparing them
    #[arg(long)]
    write: bool,
    /// Fail where a kernel, or the machine, cannot be had; otherwise that is said and left out
    #[arg(long)]
    strict: bool,
    /// For the test programs, after `--`: a part of the names to run, `--nocapture`, ...
    #[arg(last = true, value_name = "ARGS")]
    harness: Vec<String>,
}

/// Runs the tests on the kernels.
pub(crate) fn run(options: &Options) -> Result<()> {
    let cache = command::root().join(".tools/vm");
    let kernels = cache.join("kernels");
    fs::create_dir_all(&cache)?;
    if options.list {
        return list(&cache, &kernels);
    }
    if let Err(error) = host::ready(options.install) {
        return not_run(options, &format!("{error:#}"));
    }
    let (found, missing) = match options.kernel.as_slice() {
        [] => wanted(options, &cache, &kernels),
        images => {
            let modules = options.modules.as_deref();
            let found: Result<_> = images
                .iter()
                .map(|image| Kernel::at(image, modules))
                .collect();
            (found?, Vec::new())
        }
    };
    if !found.is_empty() {
        let programs = programs::build()?;
        on_all(options, &cache, &programs, found)?;
    }
    match missing.as_slice() {
        [] => Ok(()),
        missing => not_run(options, &missing.join("\n")),
    }
}

/// Says what was not run: an error for those who are strict.
fn not_run(options: &Options, why: &str) -> Result<()> {
    ensure!(!options.strict, "vm: not run: {why}");
    for why in why.lines() {
        eprintln!("vm: NOT RUN: {why}");
    }
    Ok(())
}

/// The kernels asked for, and a sentence for each that cannot be had.
fn wanted(options: &Options, cache: &Path, kernels: &Path) -> (Vec<Kernel>, Vec<String>) {
    let mut missing = Vec::new();
    let mut known = kernels::cached(kernels).unwrap_or_default();
    let series = match options.series.as_slice() {
        [] => DEFAULT.to_vec(),
        series => series.to_vec(),
    };
    let newest = options.series.is_empty();
    let has =
        |known: &[Release], series: Series| known.iter().any(|release| release.series() == series);
    let last = DEFAULT[DEFAULT.len() - 1];
    let complete = series.iter().all(|series| has(&known, *series))
        && (!newest || known.iter().any(|release| release.series() > last));
    let mut apt = None;
    if !complete || options.update || options.full && newest {
        eprintln!("vm: looking for kernels in the distribution's archive");
        match apt::Apt::fetch(cache) {
            Ok(fetched) => {
                known.extend(fetched.releases());
                known = kernels::newest_builds(known);
                apt = Some(fetched);
            }
            Err(error) => missing.push(format!("no kernels from the archive: {error:#}")),
        }
    }
    let chosen: Vec<Release> = if options.full && newest {
        known.clone()
    } else {
        let mut chosen: Vec<Release> = known
            .iter()
            .filter(|release| series.contains(&release.series()))
            .cloned()
            .collect();
        if newest {
            chosen.extend(
                known
                    .last()
                    .filter(|release| release.series() > last)
                    .cloned(),
            );
        }
        for series in &series {
            if !has(&chosen, *series) {
                missing.push(format!(
                    "{series}: no such kernel in the cache or in the archive"
                ));
            }
        }
        chosen
    };
    let mut found = Vec::new();
    for release in chosen {
        let image = kernels.join(release.to_string()).join("vmlinuz");
        let kernel = match &apt {
            _ if image.exists() => Kernel::at(&image, None),
            Some(apt) => {
                eprintln!("vm: downloading {release}");
                apt.kernel(&release, kernels)
            }
            None => continue,
        };
        match kernel {
            Ok(kernel) => found.push(kernel),
            Err(error) => missing.push(format!("{release}: {error:#}")),
        }
    }
    (found, missing)
}

fn list(cache: &Path, kernels: &Path) -> Result<()> {
    for release in kernels::cached(kernels)? {
        eprintln!(
            "{:<5} {release}, in the cache",
            release.series().to_string()
        );
    }
    let apt = apt::Apt::fetch(cache).context("what can be had is not known")?;
    for release in apt.releases() {
        eprintln!("{:<5} {release}, can be had", release.series().to_string());
    }
    Ok(())
}

/// Runs the tests on all of these kernels, as many at a time as there are CPUs for.
fn on_all(
    options: &Options,
    cache: &Path,
    programs: &Programs,
    kernels: Vec<Kernel>,
) -> Result<()> {
    let logs = cache.join("logs");
    fs::create_dir_all(&logs)?;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    // In virtual time a machine is one thread.
    let at_a_time = if options.smp { cpus.div_ceil(2) } else { cpus };
    // The one that takes longest goes first.
    let queue: Mutex<VecDeque<Kernel>> = Mutex::new(kernels.into_iter().rev().collect());
    let failures = Mutex::new(Vec::new());
    let pages = Mutex::new(Pages {
        table: Table::read().or_else(|error| or_new(options, error))?,
        works: works::Page::read().or_else(|error| or_new(options, error))?,
    });
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                let next = || queue.lock().expect("nobody panics").pop_front();
                while let Some(kernel) = next() {
                    if let Err(error) = on(options, &logs, programs, &kernel, &pages) {
                        eprintln!("vm: {:<32} FAILED: {error:#}", kernel.name);
                        failures.lock().expect("nobody panics").push(kernel.name);
                    }
                }
            });
        }
    });
    if options.write {
        let pages = pages.into_inner().expect("nobody panics");
        pages.table.write()?;
        pages.works.write()?;
    }
    let failures = failures.into_inner().expect("nobody panics");
    if !failures.is_empty() {
        bail!("failed on {}", failures.join(", "));
    }
    Ok(())
}

/// What the repository says of kernels.
struct Pages {
    table: Table,
    works: works::Page,
}

/// A page that is to be written may be missing.
fn or_new<T: Default>(options: &Options, error: anyhow::Error) -> Result<T> {
    if options.write {
        return Ok(T::default());
    }
    Err(error)
}

/// Runs the tests on one kernel, and prints the verdict.
fn on(
    options: &Options,
    logs: &Path,
    programs: &Programs,
    kernel: &Kernel,
    pages: &Mutex<Pages>,
) -> Result<()> {
    let plan = plan::plan(programs, kernel, options)?;
    let initramfs = logs.join(format!("{}.initramfs", kernel.name));
    write(&initramfs, programs, kernel, &plan)?;
    let log = logs.join(format!("{}.log", kernel.name));
    let machine = Machine {
        kernel: &kernel.image,
        initramfs: &initramfs,
        log: log.clone(),
        time: if options.smp {
            Time::Real
        } else {
            Time::Virtual
        },
        limit: if options.full { FULL_LIMIT } else { LIMIT },
    };
    let outcome = machine.run()?;
    fs::remove_file(&initramfs)?;
    let passed = match verdict::verdict(&outcome, &plan) {
        Ok(passed) => passed,
        Err(error) => {
            // Where only this output is kept, the log is lost.
            let text = String::from_utf8_lossy(&fs::read(&log)?).replace('\r', "");
            let said = verdict::last_words(&text).into_iter();
            let said: Vec<String> = said
                .map(|line| format!("vm: {:<32} | {line}", kernel.name))
                .collect();
            eprintln!("{}", said.join("\n"));
            return Err(error.context(format!("the console log is {}", log.display())));
        }
    };
    let counts = instructions::counts(outcome.figures());
    let statuses = works::statuses(outcome.figures());
    let mut told = Vec::new();
    if let Some(series) = kernel.series {
        let mut pages = pages.lock().expect("nobody panics");
        match (options.write, counts.is_empty()) {
            (true, false) => pages.table.set(series, counts),
            (false, false) => told = pages.table.compare(series, &counts)?,
            (_, true) => {}
        }
        match (options.write, statuses.is_empty()) {
            (true, false) => pages.works.set(series, statuses),
            (false, false) => told.extend(pages.works.compare(series, &statuses)?),
            (_, true) => {}
        }
    }
    eprintln!("vm: {:<32} passed: {passed}", kernel.name);
    let figures = outcome.figures();
    let figures = figures.filter(|figure| {
        !figure.starts_with(instructions::FIGURE) && !figure.starts_with(works::FIGURE)
    });
    for figure in figures.map(str::to_owned).chain(told) {
        eprintln!("vm: {:<32} {figure}", kernel.name);
    }
    for left_out in &plan.left_out {
        eprintln!("vm: {:<32} left out: {left_out}", kernel.name);
    }
    Ok(())
}

/// Writes what a machine starts with.
fn write(to: &Path, programs: &Programs, kernel: &Kernel, plan: &plan::Plan) -> Result<()> {
    let mut archive = Initramfs::create(to)?;
    archive.program("init", programs.helper("guest")?)?;
    archive.program("tests/tcptrace", &programs.tcptrace)?;
    for name in ["fixture", "decoy"] {
        archive.program(&format!("tests/{name}"), programs.helper(name)?)?;
    }
    for (name, path) in &programs.tests {
        if plan.programs.contains(name) {
            archive.program(&format!("tests/deps/{name}"), path)?;
        }
    }
    let mut modules = Vec::new();
    for module in &kernel.modules {
        let file = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{file}"), module)?;
        modules.push(format!("/modules/{file}"));
    }
    let orders = json!({ "modules": modules, "programs": plan.orders });
    archive.content("orders.json", orders.to_string().as_bytes())?;
    archive.finish()
}
