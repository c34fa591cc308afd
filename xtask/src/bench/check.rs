//! What no other load on the machine changes, held against a table in the repository: instructions and bytes,
//! and, where it is asked for, ratios of runs that took turns.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use super::results::Results;
use crate::command;

/// Which way is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    Less,
    More,
}

/// A figure that is compared.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Figure {
    name: String,
    value: f64,
    better: Better,
    /// By how much of the committed figure it may be worse.
    margin: f64,
}

/// Figures by name, as committed.
pub(super) type Table = BTreeMap<String, f64>;

/// Of these results, what is compared.
pub(super) fn figures(results: &Results) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut add = |name: String, value: f64, better, margin| {
        figures.push(Figure {
            name,
            value,
            better,
            margin,
        });
    };
    for work in results.user.iter().flatten() {
        if let Some(instructions) = work.instructions {
            let name = format!("instructions.{}", work.name);
            // A hash table's keys differ from run to run: that is a hundredth at most.
            add(name, instructions, Better::Less, 0.03);
        }
    }
    if let Some(memory) = results.memory {
        let each = memory.bytes as f64 / memory.connections as f64;
        add("memory.connection".to_owned(), each, Better::Less, 0.03);
    }
    if let Some(bytes) = results.binary {
        add("binary.bytes".to_owned(), bytes as f64, Better::Less, 0.05);
    }
    for traced in results.churn.iter().flat_map(|churn| &churn.traced) {
        // The best of the rounds: load can only make it worse. Peers are not ours to check.
        if traced.name.starts_with("tcptrace ") {
            let name = format!("churn.{}", traced.name.replace(' ', "_"));
            add(name, traced.ratio.max, Better::More, 0.1);
        }
    }
    figures
}

/// What is worse than committed, a line each, and what is so much better that the table should know.
pub(super) fn compare(figures: &[Figure], table: &Table) -> (Vec<String>, Vec<String>) {
    let (mut worse, mut notes) = (Vec::new(), Vec::new());
    for Figure {
        name,
        value,
        better,
        margin,
    } in figures
    {
        let Some(committed) = table.get(name) else {
            notes.push(format!("{name} is {value:.3}, and not in the table yet"));
            continue;
        };
        let by = match better {
            Better::Less => value / committed - 1.0,
            Better::More => 1.0 - value / committed,
        };
        let line = format!(
            "{name} is {value:.3}, was {committed:.3} ({:+.1} %)",
            (value / committed - 1.0) * 100.0
        );
        if by > *margin || !by.is_finite() {
            worse.push(format!("{line}; {:.0} % is allowed", margin * 100.0));
        } else if by < -margin {
            notes.push(format!("{line}: better"));
        }
    }
    (worse, notes)
}

/// Compares, or writes the table.
///
/// # Errors
/// When a figure has become worse.
pub(super) fn check(results: &Results, write: bool) -> Result<()> {
    let figures = figures(results);
    let mut table = match fs::read_to_string(path()) {
        Ok(text) => parse(&text).with_context(|| format!("{} is not a table", path().display()))?,
        Err(_) if write => Table::new(),
        Err(error) => return Err(error).context(format!("cannot read {}", path().display())),
    };
    for figure in &figures {
        eprintln!("bench: {} {:.3}", figure.name, figure.value);
    }
    if write {
        table.extend(
            figures
                .iter()
                .map(|figure| (figure.name.clone(), figure.value)),
        );
        return fs::write(path(), text(&table))
            .with_context(|| format!("cannot write {}", path().display()));
    }
    let (worse, notes) = compare(&figures, &table);
    for note in notes {
        eprintln!("bench: {note}; `cargo xtask bench --check --write` takes it over");
    }
    for left_out in &results.left_out {
        eprintln!("bench: not checked: {}: {}", left_out.what, left_out.why);
    }
    if worse.is_empty() {
        return Ok(());
    }
    bail!(
        "it costs more than before:\n  {}\nIf that is wanted, `cargo xtask bench --check --write` takes it over",
        worse.join("\n  ")
    );
}

fn path() -> PathBuf {
    command::root().join("tests/costs.txt")
}

fn parse(text: &str) -> Result<Table> {
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| {
            let (name, value) = line
                .split_once(char::is_whitespace)
                .with_context(|| format!("{line:?} has no figure"))?;
            let value = value.trim().parse().with_context(|| format!("{line:?}"))?;
            Ok((name.to_owned(), value))
        })
        .collect()
}

fn text(table: &Table) -> String {
    let mut text = "\
# What tcptrace costs: instructions for each record or line (x86-64, made-up records), bytes of memory for each\n\
# tracked connection, bytes of the stripped static binary; what is left of the connections a second while it\n\
# traces, where that was measured. `cargo xtask bench --check` compares, with --write it writes.\n"
        .to_owned();
    for (name, value) in table {
        let _ = writeln!(text, "{name:32} {value:.3}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(better: Better, value: f64) -> [Figure; 1] {
        [Figure {
            name: "a".to_owned(),
            value,
            better,
            margin: 0.1,
        }]
    }

    fn table() -> Table {
        parse("# what\n\na 100.000\n").unwrap()
    }

    fn worse(better: Better, value: f64) -> usize {
        compare(&figure(better, value), &table()).0.len()
    }

    #[test]
    fn a_regression_is_what_is_beyond_the_margin() {
        assert_eq!(worse(Better::Less, 109.0), 0);
        assert_eq!(worse(Better::Less, 111.0), 1);
        assert_eq!(worse(Better::Less, 1.0), 0);
        assert_eq!(worse(Better::More, 91.0), 0);
        assert_eq!(worse(Better::More, 89.0), 1);
        assert_eq!(worse(Better::More, 1000.0), 0);
        assert_eq!(worse(Better::Less, f64::NAN), 1);
    }

    #[test]
    fn what_is_new_or_much_better_is_told() {
        let notes = |figures: &[Figure], table: &Table| compare(figures, table).1.len();
        assert_eq!(notes(&figure(Better::Less, 95.0), &table()), 0);
        assert_eq!(notes(&figure(Better::Less, 85.0), &table()), 1);
        assert_eq!(notes(&figure(Better::Less, 95.0), &Table::new()), 1);
        assert_eq!(
            compare(&figure(Better::Less, 95.0), &Table::new()).0.len(),
            0
        );
    }

    #[test]
    fn the_table_can_be_read_again() {
        let table: Table = [("a.b".to_owned(), 1.5), ("c".to_owned(), 6_600_000.0)].into();
        assert_eq!(parse(&text(&table)).unwrap(), table);
        assert!(parse("a\n").is_err() && parse("a b\n").is_err());
    }

    /// A figure without a committed one would never fail.
    #[test]
    fn the_committed_table_has_what_a_check_measures() {
        let table = parse(&fs::read_to_string(path()).unwrap()).unwrap();
        for name in ["decode", "tracker", "json", "text"] {
            assert!(
                table.contains_key(&format!("instructions.{name}")),
                "{name}"
            );
        }
        assert!(table.contains_key("memory.connection") && table.contains_key("binary.bytes"));
    }
}
