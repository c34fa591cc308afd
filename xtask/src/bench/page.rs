//! `docs/performance.md`: the results, for people.

use std::fmt::Write as _;

use super::{
    paper,
    results::{Churn, Kernel, Machine, Once, Profile, Results, Work},
    targets,
};

/// The page, as Markdown.
pub(super) fn page(results: &Results) -> String {
    let mut page = "\
# What it costs

Made by `cargo xtask bench --write` from [performance.json](performance.json), which it writes as well: nothing
here is written by hand. Figures of one machine at one time; ratios of runs that took turns say more than rates
do. To repeat it, as root or with sudo: `cargo xtask bench`. `cargo xtask bench --check` holds what no other
load changes (instructions, bytes) against [tests/costs.txt](../tests/costs.txt). [How it grows](growth.md) says
what it costs with more connections, sockets and descriptors than here.

"
    .to_owned();
    page.push_str(&measured(&results.machine));
    page.push_str("\n## Targets\n\n");
    let rows = targets::rows(results).into_iter().map(|row| {
        let (found, met) = match row.found {
            Some((found, true)) => (found, "met"),
            Some((found, false)) => (found, "**not met**"),
            None => ("not measured".to_owned(), "-"),
        };
        [
            row.what.to_owned(),
            row.target.to_owned(),
            found,
            met.to_owned(),
        ]
    });
    table(&mut page, ["what", "target", "found", ""], rows);
    if let Some(held) = &results.held {
        paper::held(&mut page, held, results.ceilings.as_deref());
    }
    if let Some(ceilings) = &results.ceilings {
        paper::ceilings(&mut page, ceilings);
    }
    if let Some(churn) = &results.churn {
        connections(&mut page, churn);
    }
    if let Some(kernel) = &results.kernel {
        programs(&mut page, kernel);
    }
    if let Some(profiles) = &results.profile {
        profile(&mut page, profiles);
    }
    if let Some(works) = &results.user {
        user(&mut page, works);
    }
    if let Some(measured) = &results.once {
        once(&mut page, measured);
    }
    if let Some(idle) = &results.idle {
        page.push_str(
            "\n## Idle\n\nIn a network namespace where nothing happens, twenty seconds each.\n\n",
        );
        let rows = idle.iter().map(|idle| {
            let cpu = format!("{:.3} %", idle.cpu * 100.0);
            [idle.name.clone(), cpu, format!("{:.1}", idle.wakeups)]
        });
        table(
            &mut page,
            ["command", "of one CPU", "wake-ups a second"],
            rows,
        );
    }
    if !results.left_out.is_empty() {
        page.push_str("\n## Left out\n\n");
        for left_out in &results.left_out {
            let _ = writeln!(page, "- {}: {}", left_out.what, left_out.why);
        }
    }
    page
}

/// Where and when.
pub(super) fn measured(machine: &Machine) -> String {
    format!(
        "Measured on {}, at {}, Linux {}, {} CPUs ({}), {:.1} GiB. Processes that wanted a CPU in the minute \
         before: {:.1}.\n",
        machine.date,
        machine.commit,
        machine.kernel,
        machine.cpus,
        machine.cpu,
        machine.memory_gib,
        machine.load,
    )
}

fn connections(page: &mut String, churn: &Churn) {
    let untraced = churn.untraced;
    let _ = write!(
        page,
        "\n## Connections a second\n\n\
         One thread opens, accepts and closes (with a reset) one connection after the other on the loopback \
         interface; tracers write to a file in memory, and may use the other CPU. {} rounds of {} s, each between \
         two without a tracer: {:.0} connections a second ({:.0} to {:.0}). What is left of it, the median and \
         the extremes; the same for equal CPU time of whoever connects, which tells what the probes take, without \
         what else keeps the CPUs busy; CPU time of the tracer itself; lines on these connections, of those that there should be; \
         events that the tracer says it lost; both of all rounds. An empty program and the floor (below) run like \
         tracers: nothing that sees every change of state can leave more than the one, nothing that records it more \
         than the other.\n\n",
        churn.rounds, churn.seconds, untraced.median, untraced.min, untraced.max
    );
    let rows = churn.traced.iter().map(|traced| {
        let ratio = traced.ratio;
        let lines = match (traced.told, traced.expected) {
            (Some(told), Some(expected)) => format!("{told} of {expected}"),
            _ => "-".to_owned(),
        };
        [
            traced.name.clone(),
            format!("{:.3}", ratio.median),
            format!("{:.3} to {:.3}", ratio.min, ratio.max),
            format!("{:.3}", traced.cpu_ratio.median),
            format!("{:.1}", traced.cpu_us),
            lines,
            traced.lost.to_string(),
        ]
    });
    let head = [
        "with",
        "left",
        "from, to",
        "for equal CPU time",
        "its CPU µs a connection",
        "lines",
        "lost",
    ];
    table(page, head, rows);
}

fn programs(page: &mut String, kernel: &Kernel) {
    let _ = write!(
        page,
        "\n## In the kernel\n\n\
         Nanoseconds that BPF programs take for a run, by the kernel's own statistics, on the same connections. \
         The statistics cost something themselves: a program that does nothing takes {:.0} ns ({:.0} to {:.0}), \
         which the last column is without. The floor is a program that only writes a record of constants, as large as \
         ours; with the clock, it also asks for the time. All timers of the machine run the timer programs; here none of them \
         is of a timewait socket.\n\n",
        kernel.empty.median, kernel.empty.min, kernel.empty.max
    );
    let rows = kernel.programs.iter().map(|program| {
        let ns = program.ns;
        [
            program.of.clone(),
            format!("`{}`", program.name),
            format!("{:.1}", program.runs),
            format!("{:.0}", ns.median),
            format!("{:.0} to {:.0}", ns.min, ns.max),
            format!("{:.0}", (ns.median - kernel.empty.median).max(0.0)),
        ]
    });
    let head = [
        "of",
        "program",
        "runs a connection",
        "ns",
        "from, to",
        "without the statistics",
    ];
    table(page, head, rows);
}

fn profile(page: &mut String, profiles: &[Profile]) {
    page.push_str(
        "\n## Where it goes\n\n\
         Samples of the thread that connects, by `perf`: the share of its time that is spent on being traced, and on \
         what. It is what cannot be had back but by recording less; what a run loses beyond it, it loses to the \
         tracer's own work on the other CPU, which shares caches and memory, and the machine's host.\n\n\
         - **A record** is the clock, the ring buffer's lock, and some fifty loads and stores. `leaks` has none \
         written of changes that it does not need; for the others, all are needed.\n\
         - **System calls off their fast path**: where function probes are refused, who accepts is seen only by a \
         tracepoint of the system call, and the kernel has one switch for all system calls of all processes. Where \
         they are not refused, this is 0.\n\
         - **Tried**: a pointer of the right type instead of reading by helper, one copy instead of thirteen, no \
         question to the ring buffer before each record, nothing of the current task where it cannot matter, and of \
         that its ids by loads instead of helpers: two fifths less for a record. Not tried: a ring buffer for each \
         CPU, which has the same lock, only less wanted; a program at every system call's exit, which would spare \
         `accept()` the copy that `perf_syscall_exit` makes, and cost all other calls of all processes more.\n\n",
    );
    let rows = profiles.iter().flat_map(|profile| {
        let sum: f64 = profile.shares.iter().map(|share| share.share).sum();
        let all = [
            profile.of.clone(),
            "all".to_owned(),
            format!("{:.2} %", sum * 100.0),
        ];
        let parts = profile.shares.iter().map(|share| {
            [
                String::new(),
                share.what.clone(),
                format!("{:.2} %", share.share * 100.0),
            ]
        });
        std::iter::once(all).chain(parts)
    });
    table(page, ["with", "on", "of the time"], rows);
}

fn user(page: &mut String, works: &[Work]) {
    page.push_str(
        "\n## In user space\n\n\
         Made-up records of connections that end in TIME_WAIT: instructions counted by callgrind, and how many a \
         second of CPU time (`cargo bench --package tcptrace` has the same with more statistics). `tracker` \
         includes `decode`; `json` and `text` are lines alone.\n\n",
    );
    let rows = works.iter().map(|work| {
        let instructions = work
            .instructions
            .map_or("-".to_owned(), |count| format!("{count:.0}"));
        let rate = work.per_second.map_or("-".to_owned(), |rate| {
            let mega = |rate: f64| rate / 1e6;
            format!(
                "{:.2} ({:.2} to {:.2})",
                mega(rate.median),
                mega(rate.min),
                mega(rate.max)
            )
        });
        [format!("`{}`", work.name), instructions, rate]
    });
    table(
        page,
        ["work", "instructions each", "million a second"],
        rows,
    );
}

fn once(page: &mut String, once: &Once) {
    let _ = write!(
        page,
        "\n## One look at very many sockets\n\n\
         {} sockets of {} processes, half of them in CLOSE_WAIT, half in FIN_WAIT2. `leaks --once` looks twice, \
         with a second between. It reported {} leaked sockets. Seconds, median and extremes of three.\n\n",
        once.sockets, once.processes, once.leaked
    );
    let rows = [
        ("`leaks --once`", once.leaks_wall, once.leaks_cpu),
        ("`ss -tanp`", once.ss_wall, once.ss_cpu),
    ]
    .map(|(name, wall, cpu)| {
        let shown =
            |s: super::spread::Spread| format!("{:.2} ({:.2} to {:.2})", s.median, s.min, s.max);
        [name.to_owned(), shown(wall), shown(cpu)]
    });
    table(page, ["command", "time", "CPU time"], rows);
    let shown = |s: super::spread::Spread| {
        let [median, min, max] = [s.median, s.min, s.max].map(|seconds| seconds * 1e3);
        format!("{median:.0} ms ({min:.0} to {max:.0})")
    };
    let _ = write!(
        page,
        "\nWho holds them, found out by itself: by a pass over `/proc`, as `leaks --once` does, {} of CPU time; by the \
         kernel's walk of all open files, as `leaks` does with BPF, {}.\n",
        shown(once.pass_cpu),
        shown(once.walk_cpu)
    );
}

pub(super) fn table<const N: usize>(
    page: &mut String,
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) {
    let _ = writeln!(page, "| {} |", head.join(" | "));
    let _ = writeln!(page, "|{}", "---|".repeat(N));
    for row in rows {
        let _ = writeln!(
            page,
            "| {} |",
            row.map(|cell| cell.replace('|', "\\|")).join(" | ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::{LeftOut, Memory};

    #[test]
    fn a_page_says_what_is_met_and_what_is_not() {
        let memory = |bytes| Results {
            memory: Some(Memory {
                connections: 1,
                bytes,
                peak_bytes: 300,
            }),
            left_out: vec![LeftOut {
                what: "bcc".into(),
                why: "no kernel headers".into(),
            }],
            ..Results::default()
        };
        let line = |results: &Results| {
            let page = page(results);
            let mut lines = page.lines().map(str::to_owned);
            lines
                .find(|line| line.contains("memory at"))
                .expect("a row")
        };
        assert!(line(&memory(128)).ends_with("| 128 bytes (300 while the table grew) | met |"));
        assert!(
            line(&memory(129)).ends_with("| 129 bytes (300 while the table grew) | **not met** |")
        );
        assert!(line(&Results::default()).ends_with("| not measured | - |"));
        assert!(page(&memory(1)).ends_with("## Left out\n\n- bcc: no kernel headers\n"));
    }

    /// The committed page is what the committed figures make.
    #[test]
    fn the_page_is_made_of_the_figures() {
        let docs = crate::command::root().join("docs");
        let figures = std::fs::read_to_string(docs.join("performance.json")).unwrap();
        let results: Results = serde_json::from_str(&figures).unwrap();
        let written = std::fs::read_to_string(docs.join("performance.md")).unwrap();
        assert!(
            page(&results) == written,
            "docs/performance.md is not: `cargo xtask bench --page` writes it anew"
        );
    }
}
