//! What a person would otherwise have to remember: see `cargo xtask --help`.

use std::process::ExitCode;

use clap::Parser;

mod bench;
mod build;
mod command;
mod demo;
mod deny;
mod docs;
mod fuzz;
mod licenses;
mod linker;
mod lint;
mod node;
mod packages;
mod setup;
mod test;
mod vm;

/// Sets up, builds and tests tcptrace
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true
)]
enum Task {
    /// Provide what a build needs: toolchain parts, and bpf-linker in `.tools`
    Setup,
    /// Set up, then build `target/release/tcptrace`
    Build,
    /// Set up and build, then show tcptrace on real traffic, in a network namespace made for it (half
    /// a minute; needs root or sudo)
    Demo(demo::Options),
    /// Check what the project depends on against deny.toml: licences, sources, bans, and known advisories
    Deny,
    /// Set up, then write the man pages and completions anew, from the options
    Docs,
    /// Measure tcptrace against its peers, and what a record costs (ten minutes; needs root or sudo). With
    /// --check, hold what no other load changes against tests/costs.txt
    Bench(bench::Options),
    /// Fuzz everything that reads other programs' bytes (two minutes a target; needs a C++ compiler)
    Fuzz(fuzz::Options),
    /// Write THIRD-PARTY-LICENSES: the licence texts of everything that is linked into the binary
    Licenses,
    /// Set up, then check formatting, lints and documentation, with every warning an error
    Lint,
    /// Set up, then run every test, those against the real kernel as root
    Test(test::Options),
    /// Run the tests against the real kernel on other kernels, in virtual machines (minutes; --help tells
    /// what it needs)
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Setup => setup::run(),
        Task::Build => build::run().map(drop),
        Task::Demo(options) => demo::run(options),
        Task::Deny => deny::run(),
        Task::Docs => docs::run(),
        Task::Bench(options) => bench::run(options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Licenses => licenses::run(),
        Task::Lint => lint::run(),
        Task::Test(options) => test::run(&options),
        Task::Vm(options) => vm::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
