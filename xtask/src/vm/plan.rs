//! Which tests run in a machine, and why not the others.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{
    Options,
    kernels::{Kernel, Series},
    programs::Programs,
};

/// Tracing begins to be possible here; kernels before must be refused with a sentence.
const FLOOR: Series = Series(5, 12);

/// Test programs that cannot run in a machine.
const ELSEWHERE: [(&str, &str); 9] = [
    (
        "readme",
        "it runs the README's commands, which need a system around them: sh, jq, ss, cargo",
    ),
    ("command", "the programs that it runs are shell scripts"),
    (
        "as_user",
        "it needs users, and the programs sh, id and grep",
    ),
    ("hostile_files", "it compiles C programs"),
    (
        "locks",
        "before 6.9 the plain dump of sock_diag waits as well (docs/reliability.md), and an emulated CPU keeps no time",
    ),
    (
        "walk",
        "it needs the generator of connections; `leak_holders` runs",
    ),
    (
        "leaks_many",
        "an emulated CPU is too slow for its thousands of sockets and hundreds of processes",
    ),
    (
        "overload",
        "an emulated CPU makes no storm, and keeps no time",
    ),
    (
        "stacks",
        "it compiles C programs, and runs node; `stack_probes` runs",
    ),
];

/// The test program that tells what works, on every kernel.
const WORKS: &str = "works";

/// The test programs for kernels that cannot trace. All of their tests are ignored elsewhere.
const REFUSAL: &str = "refusal";

/// The test programs that need both kinds of probes. Their tests are ignored elsewhere.
const BOTH_KINDS: [&str; 2] = ["instructions", "probe_pairs"];

/// Test programs that only `--full` runs, and why.
const LESS_OF_THE_KERNEL: [(&str, &str); 15] = [
    (
        "doctor",
        "it tests the answers to missing privileges; `works` asks it about the kernel",
    ),
    (
        "leaks",
        "what it tests depends little on the kernel, and it takes long",
    ),
    (
        "leaks_of_program",
        "what it tests depends little on the kernel; `tree` runs",
    ),
    (
        "before",
        "sock_diag and /proc, which it tests, change little",
    ),
    ("errors", "what it tests depends little on the kernel"),
    (
        "filters",
        "what it tests depends little on the kernel, and it takes long",
    ),
    (
        "exhausted",
        "limits of processes, which it tests, change little",
    ),
    ("harness", "it tests the tests"),
    ("new_files", "what it tests depends little on the kernel"),
    (
        "time_namespace",
        "what it tests depends little on the kernel",
    ),
    ("loss", "what it tests depends little on the kernel"),
    ("replay", "what it tests depends little on the kernel"),
    (
        "states",
        "sock_diag and /proc, which it tests, change little",
    ),
    ("storms", "it needs the generator of connections"),
    ("truth", "it plays for minutes; here it runs natively"),
];

/// Tests that only `--full` runs: they wait out the minute of a TIME_WAIT while a decoy keeps the CPU busy,
/// which takes several real ones. `probe_pairs` waits one out without.
const LONG: [&str; 4] = [
    "lifetime_is_what_sock_diag_shows",
    "rearmed_lives_longer",
    "client_closes_first",
    "time_wait_is_an_estimate",
];

/// From here on, a timewait socket can be destroyed through `sock_diag`.
const DESTROY: Series = Series(6, 1);

/// Tests that do so, by program and a part of their names.
const DESTROYS: [(&str, &str); 15] = [
    ("before", "time_wait"),
    ("before", "orphaned_fin_wait2"),
    ("errors", "hidden_kallsyms"),
    ("filters", "each_filter"),
    ("filters", "states_select"),
    ("filters", "timewait_is_filtered"),
    ("harness", "sock_destroy"),
    ("loss", "time_wait_that_ended"),
    ("no_probes", "time_wait_is_an_estimate"),
    ("owners", "process_that_exits"),
    ("replay", "replay_gives"),
    ("sequences", "server_closes_first"),
    ("sequences", "simultaneous_close"),
    ("timewait", "stream_and_timewait_agree"),
    ("timewait", "aborted_through_sock_diag"),
];

/// Tests that run programs of a system around them, by program and a part of their names.
const NEED_A_SYSTEM: [(&str, &str); 6] = [
    ("leaks", "clear_"),
    ("tree", "pid_namespace_of_its_own"),
    ("tree", "no_descriptor_of_the_tracer"),
    ("leaks_of_program", "the_text_is_on_stderr"),
    ("leaks_of_program", "the_report_goes_to_a_file"),
    ("states", "every_state_as_ss_counts"),
];

/// Test programs of which each test starts a tracer or two: sixteen at once are more than an emulated CPU
/// can start within the time that tests wait.
const CROWDED: [&str; 3] = ["leaks", "leaks_of_program", "leak_holders"];

/// What a kernel is expected to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Everything.
    Works,
    /// To be refused, with a sentence.
    Refused,
}

impl Expected {
    /// By the kernel's name; one without a number is taken for a new one.
    pub(super) fn of(kernel: &Kernel) -> Self {
        match kernel.series {
            Some(series) if series < FLOOR => Self::Refused,
            _ => Self::Works,
        }
    }
}

/// The orders for a machine, and what is left out of it.
pub(super) struct Plan {
    /// Test programs, by name: they have to be in the machine.
    pub(super) programs: Vec<String>,
    /// What the first process is told, but for the modules.
    pub(super) orders: Vec<Value>,
    /// A sentence each.
    pub(super) left_out: Vec<String>,
}

/// Makes the plan.
///
/// # Errors
/// When a name in this file's lists is of no test program: then the list is out of date.
pub(super) fn plan(programs: &Programs, kernel: &Kernel, options: &Options) -> Result<Plan> {
    let names: Vec<&str> = programs
        .tests
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    let listed = ELSEWHERE.iter().chain(&LESS_OF_THE_KERNEL);
    for name in listed
        .map(|(name, _)| *name)
        .chain([REFUSAL, WORKS])
        .chain(BOTH_KINDS)
        .chain(CROWDED)
    {
        ensure!(
            names.contains(&name),
            "xtask/src/vm/plan.rs: there is no test program {name}"
        );
    }
    let expected = Expected::of(kernel);
    let destroys = kernel.series.is_none_or(|series| series >= DESTROY);
    let mut plan = Plan {
        programs: Vec::new(),
        orders: Vec::new(),
        left_out: Vec::new(),
    };
    for name in names {
        let mut arguments = options.harness.clone();
        match expected {
            Expected::Refused if ![REFUSAL, WORKS].contains(&name) => continue,
            Expected::Works if name == REFUSAL => continue,
            _ => {}
        }
        if let Some((_, why)) = ELSEWHERE.iter().find(|(elsewhere, _)| *elsewhere == name) {
            plan.left_out.push(format!("{name}: {why}"));
            continue;
        }
        if !options.full {
            let less = LESS_OF_THE_KERNEL.iter().find(|(less, _)| *less == name);
            if let Some((_, why)) = less {
                plan.left_out.push(format!("{name} (--full): {why}"));
                continue;
            }
            arguments.extend(
                LONG.iter()
                    .flat_map(|test| ["--skip".to_owned(), (*test).to_owned()]),
            );
        }
        for (_, test) in NEED_A_SYSTEM.iter().filter(|(of, _)| *of == name) {
            arguments.extend(["--skip".to_owned(), (*test).to_owned()]);
            plan.left_out
                .push(format!("{name} {test}...: it runs sh, ss or unshare"));
        }
        if !destroys {
            let tests = DESTROYS.iter().filter(|(program, _)| *program == name);
            for (_, test) in tests {
                arguments.extend(["--skip".to_owned(), (*test).to_owned()]);
                plan.left_out.push(format!(
                    "{name} {test}...: sock_diag destroys timewait sockets from {DESTROY} on"
                ));
            }
        }
        if [REFUSAL, WORKS].contains(&name) || BOTH_KINDS.contains(&name) {
            arguments.push("--ignored".to_owned());
        }
        let threads = if CROWDED.contains(&name) { "3" } else { "16" };
        plan.programs.push(name.to_owned());
        plan.orders.push(json!({
            "name": name,
            "path": format!("/tests/deps/{name}"),
            "arguments": arguments,
            "environment": {
                "TCPTRACE_BIN": "/tests/tcptrace",
                "RUST_TEST_THREADS": threads,
                // `truth` has its decoys rest while it waits; more of its stories take long here.
                "TCPTRACE_STORIES": "80",
                "TESTS_SAME_MS": if options.smp { "100" } else { "10" },
            },
        }));
    }
    if !options.full && expected == Expected::Works {
        let tests = LONG.join(", ");
        plan.left_out.push(format!(
            "{tests} (--full): they wait a minute on a busy CPU"
        ));
    }
    Ok(plan)
}
