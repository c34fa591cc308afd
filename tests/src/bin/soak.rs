//! tcptrace under load for minutes: `cargo xtask bench --soak 10m` runs it.
//!
//! `soak seconds=600 [COMMAND...]` soaks each command of tcptrace (all of them without one), and prints what came of it.
//! `TCPTRACE_BIN` names the binary. It fails at the first promise that is broken.

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use tests::soak::{Plan, SUBJECTS, full_disk, soak, tiny_buffer};

/// How long there is load for the tiny buffer.
const TINY: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let seconds = words
        .first()
        .and_then(|word| word.strip_prefix("seconds=")?.parse().ok())
        .filter(|seconds: &f64| *seconds >= 1.0);
    let Some(seconds) = seconds else {
        eprintln!("usage: soak seconds=NUMBER [COMMAND...]");
        return ExitCode::FAILURE;
    };
    let plan = Plan::of(Duration::from_secs_f64(seconds));
    for (subject, _) in SUBJECTS {
        if words.len() > 1 && !words[1..].iter().any(|word| word == subject) {
            continue;
        }
        let outcome = soak(subject, &plan, &mut |said| {
            eprintln!("soak: {subject}: {said}");
        });
        say(&format!("{subject}: {outcome}"));
    }
    say(&format!("a buffer of 4 KiB: {}", tiny_buffer(TINY)));
    say(&format!("a full disk: {}", full_disk()));
    ExitCode::SUCCESS
}

fn say(line: &str) {
    writeln!(io::stdout(), "{line}").expect("somebody reads this");
}
