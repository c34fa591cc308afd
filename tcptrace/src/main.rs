//! The tcptrace program: see `tcptrace --help`.

use std::process::ExitCode;

use clap::Parser as _;
use tcptrace::{cli::Cli, command::NotStarted, exhausted, kernel::helper, run, source};

fn main() -> ExitCode {
    exhausted::ignore_file_size_signal();
    // Before the command line: it is none that anybody has written.
    source::run_if_asked();
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
            match exhausted::fix_of_end(&error) {
                Some(fix) => eprintln!("tcptrace: {error:#}; {fix}"),
                None => eprintln!("tcptrace: {error:#}"),
            }
            let not_started = error.downcast_ref::<NotStarted>();
            ExitCode::from(not_started.map_or(2, NotStarted::exit_code))
        }
    }
}
