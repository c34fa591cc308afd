//! `cargo xtask fuzz`: everything that reads other programs' bytes, on bytes that libFuzzer makes up.
//!
//! The entry points are `tcptrace::fuzz::TARGETS`. The fuzzer is the package `fuzz`, built by the pinned compiler: the
//! counting of edges that libFuzzer steers by is a pass of LLVM that stable compilers have. There is no address
//! sanitizer, which would take a nightly compiler; what is fuzzed is safe code.

use std::{
    env,
    fs::{self, File},
    num::NonZero,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::Mutex,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build,
    command::{self, root},
    packages, setup,
};

/// Where seeds are committed, a folder a target.
const SEEDS: &str = "fuzz/seeds";

/// Words of text formats, and numbers at their limits.
const DICTIONARY: &str = "fuzz/dictionary.txt";

/// An input may take no longer than that. The slowest of the seeds takes milliseconds.
const TIMEOUT_SECONDS: u32 = 10;

/// The program may take no more than that. It starts with 30 MiB.
const MEMORY_MIB: u32 = 512;

/// The longest input that is made.
const INPUT_BYTES: u32 = 1 << 16;

/// What is fuzzed, and for how long.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which targets: folders of fuzz/seeds. All of them, if none is given
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long to fuzz each target
    #[arg(long, default_value_t = 120, value_name = "N")]
    seconds: u32,
    /// Run one input, such as one that was found, and print what happens
    #[arg(long, value_name = "FILE", conflicts_with = "seconds")]
    input: Option<PathBuf>,
    /// Install a C++ compiler with apt-get if there is none; libFuzzer is C++
    #[arg(long)]
    install: bool,
}

/// Builds the fuzzer and runs the targets, as many at a time as there are CPUs.
pub(crate) fn run(options: &Options) -> Result<()> {
    let targets = targets(&options.targets)?;
    cpp_compiler(options.install)?;
    setup::run()?;
    let fuzzer = &built()?;
    if let Some(input) = &options.input {
        let [target] = &targets[..] else {
            bail!("--input takes one TARGET: the one whose input it is");
        };
        let input = fs::canonicalize(input).with_context(|| format!("no {}", input.display()))?;
        return command::run(fuzzer_of(fuzzer, target).arg(input));
    }
    let queue = &Mutex::new(targets.iter());
    let at_once = thread::available_parallelism().map_or(1, NonZero::get);
    let failed = thread::scope(|scope| {
        let work = || {
            let mut failed = 0_usize;
            loop {
                let next = queue.lock().ok().and_then(|mut queue| queue.next());
                let Some(target) = next else {
                    return failed;
                };
                if let Err(error) = fuzz(fuzzer, target, options.seconds) {
                    eprintln!("fuzz: {target}: FAILED: {error:#}");
                    failed += 1;
                }
            }
        };
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let failures = workers.into_iter().map(|worker| worker.join().unwrap_or(1));
        failures.sum::<usize>()
    });
    ensure!(failed == 0, "{failed} of {} targets failed", targets.len());
    Ok(())
}

/// The targets that were asked for.
fn targets(wanted: &[String]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(root().join(SEEDS)).with_context(|| format!("no {SEEDS}"))? {
        all.push(entry?.file_name().to_string_lossy().into_owned());
    }
    all.sort_unstable();
    if wanted.is_empty() {
        return Ok(all);
    }
    for target in wanted {
        ensure!(
            all.contains(target),
            "no target {target}; there are: {}",
            all.join(", ")
        );
    }
    Ok(wanted.to_vec())
}

fn cpp_compiler(install: bool) -> Result<()> {
    // As the `cc` crate, which compiles libFuzzer, finds it.
    let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let check = || command::output(Command::new(&compiler).arg("--version"));
    let Err(error) = check() else {
        return Ok(());
    };
    if !install {
        bail!(
            "no working C++ compiler: {error:#}. libFuzzer is compiled with it. Install one (on Debian and \
             Ubuntu: `apt install g++`), or let `cargo xtask fuzz --install` do it"
        );
    }
    packages::install("fuzz", "g++").context("g++ cannot be installed")?;
    check().map(drop).context("after the installation of g++")
}

/// Builds the fuzzer; returns where it is.
fn built() -> Result<PathBuf> {
    command::run(
        command::cargo("build")
            .args(["--package", "fuzz"])
            .args(["--features", "libfuzzer"])
            .env("RUSTC_WORKSPACE_WRAPPER", root().join("fuzz/rustc.sh")),
    )?;
    Ok(build::target_dir()?.join("debug/fuzz"))
}

fn fuzzer_of(fuzzer: &Path, target: &str) -> Command {
    let mut command = command::at_root(fuzzer);
    command
        .env("FUZZ_TARGET", target)
        .arg(format!("-timeout={TIMEOUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-max_len={INPUT_BYTES}"))
        .arg(format!("-dict={DICTIONARY}"));
    command
}

/// Fuzzes one target, and says how that went.
fn fuzz(fuzzer: &Path, target: &str, seconds: u32) -> Result<()> {
    let folder = build::target_dir()?.join("fuzz").join(target);
    // What was found earlier is where it begins, so that each run goes further.
    let corpus = folder.join("corpus");
    fs::create_dir_all(&corpus)?;
    let log = folder.join("log");
    let output = File::create(&log)?;
    let mut command = fuzzer_of(fuzzer, target);
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", folder.display()))
        .arg(&corpus)
        .arg(root().join(SEEDS).join(target))
        .stdout(output.try_clone()?)
        .stderr(output);
    let begin = Instant::now();
    let status = command.status().context("the fuzzer did not start")?;
    let log_text = fs::read(&log)?;
    let log_text = String::from_utf8_lossy(&log_text);
    if !status.success() {
        bail!("{}", failure(target, status, &log, &log_text));
    }
    let executions = statistic(&log_text, "stat::number_of_executed_units:")
        .context("the fuzzer did not say how much it executed")?;
    let inputs = fs::read_dir(&corpus)?.count();
    eprintln!(
        "fuzz: {target}: {executions} executions in {:.0} s, nothing found; {inputs} inputs that differ in coverage",
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}

/// What was found, and how to see it again.
fn failure(target: &str, status: ExitStatus, log: &Path, text: &str) -> String {
    let why = text
        .lines()
        .find(|line| line.contains("panicked at") || line.contains("ERROR: libFuzzer"))
        .unwrap_or("no reason in the log");
    let again = text
        .lines()
        .find_map(|line| line.split_once("Test unit written to "))
        .map_or_else(String::new, |(_, input)| {
            format!("; again: cargo xtask fuzz {target} --input {input}")
        });
    format!("{status}: {why}; the whole log: {}{again}", log.display())
}

fn statistic(log: &str, name: &str) -> Option<u64> {
    let value = log.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_known_and_no_other() {
        let all = targets(&[]).unwrap();
        assert!(all.contains(&"btf".to_owned()), "{all:?}");
        let error = targets(&["btf".to_owned(), "none".to_owned()]).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("no target none; there are: btf, ")
        );
    }

    #[test]
    fn a_failure_says_how_to_see_it_again() {
        let log = "INFO: Seed: 1\n\nthread '<unnamed>' panicked at src/a.rs:1:1:\n\
            ==7== ERROR: libFuzzer: deadly signal\n\
            artifact_prefix='/x/'; Test unit written to /x/crash-1\n";
        let said = failure("btf", ExitStatus::default(), Path::new("/x/log"), log);
        assert!(said.contains("panicked at src/a.rs:1:1"), "{said}");
        assert!(
            said.ends_with("again: cargo xtask fuzz btf --input /x/crash-1"),
            "{said}"
        );
    }

    #[test]
    fn statistics_are_read() {
        let log = "#1 DONE\nstat::number_of_executed_units: 417152\n";
        assert_eq!(
            statistic(log, "stat::number_of_executed_units:"),
            Some(417_152)
        );
        assert_eq!(statistic(log, "stat::peak_rss_mb:"), None);
    }
}
