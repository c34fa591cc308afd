//! The tcptrace program: see `tcptrace --help`.

use std::process::ExitCode;

use clap::Parser as _;
use tcptrace::{cli::Cli, command::NotStarted, kernel::helper, run};

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == helper::ROLE)
    {
        return helper::serve();
    }
    match run::run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        // Whoever read our output has had enough: no mistake of anybody's.
        Err(error) if run::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tcptrace: {error:#}");
            let not_started = error.downcast_ref::<NotStarted>();
            ExitCode::from(not_started.map_or(2, NotStarted::exit_code))
        }
    }
}
