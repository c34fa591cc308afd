//! The tcptrace program: see `tcptrace --help`.

use std::process::ExitCode;

use clap::Parser as _;
use tcptrace::{cli::Cli, run};

fn main() -> ExitCode {
    match run::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has had enough: no mistake of anybody's.
        Err(error) if run::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tcptrace: {error:#}");
            ExitCode::from(2)
        }
    }
}
