//! Held rates and ceilings on the page, and the rate that follows from the ceilings on paper.

use std::fmt::Write as _;

use super::{
    page::table,
    results::{Ceiling, Held, HeldRate},
};

/// A measured rate that differs from the computed one by more than this factor is pointed out.
const AGREE: f64 = 2.0;

/// The table of held rates.
pub(super) fn held(page: &mut String, held: &Held, ceilings: Option<&[Ceiling]>) {
    let one_core = held.one_core;
    let seconds = held
        .rates
        .iter()
        .map(|rate| rate.seconds)
        .fold(0.0, f64::max);
    let _ = write!(
        page,
        "\n## Held rate\n\n\
         The highest rate at which no record is lost for {seconds:.0} s. Made-up records of whole connections are written \
         into the ring buffer of the running tcptrace, because TCP itself is slower: one core of this machine makes {} \
         transitions/s without a tracer. *Of one core* is the held rate against that. *On paper* is what the ceilings \
         below allow: one thread reads, decodes, tracks and makes lines, another writes, and the slower one is the limit. \
         *CPUs* are those of tcptrace at the held rate, both threads together. `leaks` and `timewait` have connections that \
         end with a FIN and 200,000 timewait sockets; the others have resets.\n\n",
        thousands(one_core.transitions)
    );
    let mut differing = Vec::new();
    let rows = held.rates.iter().map(|rate| {
        let computed = ceilings.and_then(|ceilings| computed(rate, ceilings));
        if let Some(computed) = computed {
            let ratio = rate.transitions / computed;
            if !rate.is_least && !(1.0 / AGREE..=AGREE).contains(&ratio) {
                differing.push(format!(
                    "`{}` to {} ({ratio:.2} of it)",
                    rate.command,
                    rate.sink.name()
                ));
            }
        }
        let least = if rate.is_least { "≥ " } else { "" };
        [
            format!("`{}`", rate.command),
            rate.sink.name().to_owned(),
            format!("{least}{}", thousands(rate.transitions)),
            format!("{:.1} ×", rate.transitions / one_core.transitions),
            thousands(rate.records),
            computed.map_or("-".to_owned(), thousands),
            format!("{:.2}", rate.cpus),
        ]
    });
    let rows: Vec<_> = rows.collect();
    let head = [
        "command",
        "output to",
        "transitions/s",
        "of one core",
        "records/s",
        "transitions/s on paper",
        "CPUs",
    ];
    table(page, head, rows);
    if !differing.is_empty() {
        let _ = writeln!(
            page,
            "\nMeasured and computed differ by more than a factor of {AGREE}: {}. Then something else is the limit: the \
             feeder and other programs on the same CPUs, or a pause of the reader that is longer than the buffer lasts.",
            differing.join(", ")
        );
    }
    page.push_str(
        "\nReal connections, as many as all CPUs make while tcptrace runs on the same CPUs. *Probes not run* is what the kernel \
         skipped, of any namespace, because a probe had interrupted itself; tcptrace counts it as lost.\n\n",
    );
    let rows = held.limits.iter().map(|limit| {
        [
            format!("`{}`", limit.command),
            limit.threads.to_string(),
            thousands(limit.transitions),
            (limit.lost.saturating_sub(limit.missed)).to_string(),
            limit.missed.to_string(),
            format!("{:.2}", limit.cpus),
        ]
    });
    table(
        page,
        [
            "command",
            "threads",
            "transitions/s",
            "records lost",
            "probes not run",
            "CPUs",
        ],
        rows,
    );
}

/// The table of ceilings.
pub(super) fn ceilings(page: &mut String, ceilings: &[Ceiling]) {
    page.push_str(
        "\n## Ceilings\n\n\
         Records (or lines) a second that each stage takes by itself. `ring` reads a full ring buffer; `tracker` includes \
         `decode`; `json`, `text` and `record` make lines; writing has a thread of its own.\n\n",
    );
    let rows = ceilings.iter().map(|ceiling| {
        let mega = ceiling.per_second / 1e6;
        [ceiling.stage.clone(), format!("{mega:.2}")]
    });
    table(page, ["stage", "million a second"], rows);
}

/// The rate of transitions that the ceilings allow: a record costs the reader the sum of its stages, and it does not
/// sleep while more than a quarter of the buffer waits. So records/s = batch ÷ (batch × work + 0) = 1 ÷ work.
fn computed(rate: &HeldRate, ceilings: &[Ceiling]) -> Option<f64> {
    let ceiling = |stage: &str| {
        let mut all = ceilings.iter();
        Some(all.find(|ceiling| ceiling.stage == stage)?.per_second)
    };
    let mut work = 1.0 / ceiling("ring")? + 1.0 / ceiling("tracker")?;
    let mut most = f64::INFINITY;
    if let Some(line) = &rate.line {
        work += 1.0 / ceiling(line)?;
        most = ceiling(&format!("write to {}", rate.sink.name()))?;
    }
    Some(most.min(1.0 / work) * rate.transitions / rate.records)
}

/// A rate to three digits' worth of thousands, as a person reads it: `1,250,000`.
fn thousands(rate: f64) -> String {
    let thousands = (rate / 1e3).round() as u64;
    match (thousands / 1000, thousands % 1000) {
        (0, 0) => "0".to_owned(),
        (0, thousands) => format!("{thousands},000"),
        (millions, thousands) => format!("{millions},{thousands:03},000"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        results::{AtLimit, OneCore},
        sinks::Sink,
    };

    fn rate(transitions: f64) -> HeldRate {
        HeldRate {
            command: "stream -o json".to_owned(),
            sink: Sink::Tmpfs,
            close: "rst".to_owned(),
            transitions,
            records: transitions * 2.0,
            seconds: 10.0,
            cpus: 0.5,
            line: Some("json".to_owned()),
            is_least: false,
        }
    }

    fn ceilings(write: f64) -> Vec<Ceiling> {
        [
            ("ring", 8e6),
            ("tracker", 4e6),
            ("json", 8e6),
            ("write to tmpfs", write),
        ]
        .map(|(stage, per_second)| Ceiling {
            stage: stage.to_owned(),
            per_second,
        })
        .to_vec()
    }

    #[test]
    fn the_slower_thread_is_the_limit() {
        // Half a microsecond a record, and two records a transition.
        assert_eq!(computed(&rate(1.0), &ceilings(3e6)), Some(1e6));
        assert_eq!(computed(&rate(1.0), &ceilings(1e6)), Some(5e5));
        let lineless = HeldRate {
            line: None,
            ..rate(1.0)
        };
        let allowed = computed(&lineless, &ceilings(1e3)).unwrap();
        assert!((allowed - 4e6 / 3.0).abs() < 1.0, "{allowed}");
        assert_eq!(computed(&rate(1.0), &[]), None);
    }

    #[test]
    fn the_page_says_where_paper_and_measurement_differ() {
        let said = |transitions: f64| {
            let mut page = String::new();
            let all = Held {
                one_core: OneCore {
                    transitions: 5e5,
                    lost: 0,
                    cpus: 0.2,
                },
                rates: vec![rate(transitions)],
                limits: vec![AtLimit {
                    command: "leaks".to_owned(),
                    threads: 2,
                    transitions: 4e5,
                    lost: 0,
                    missed: 0,
                    cpus: 0.1,
                }],
            };
            held(&mut page, &all, Some(&ceilings(3e6)));
            page
        };
        let agreeing = said(6e5);
        assert!(
            agreeing.contains(
                "| `stream -o json` | tmpfs | 600,000 | 1.2 × | 1,200,000 | 1,000,000 | 0.50 |"
            ),
            "{agreeing}"
        );
        assert!(!agreeing.contains("differ by more"), "{agreeing}");
        assert!(said(4e5).contains("`stream -o json` to tmpfs (0.40 of it)"));
    }
}
