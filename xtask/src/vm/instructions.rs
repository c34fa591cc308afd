//! How many instructions the verifier walked through for each probe, held against a table in the repository:
//! a change that makes a probe dearer, or refused by some kernel next time, shows in review.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use super::kernels::Series;
use crate::command;

/// Figures may differ by so many hundredths before it is an error.
const MARGIN: u32 = 10;

/// What tests' figures about this begin with: see `tests/tests/instructions.rs`.
pub(super) const FIGURE: &str = "instructions ";

/// Instructions by program.
pub(super) type Counts = BTreeMap<String, u32>;

/// Counts by kernel series.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table(BTreeMap<Series, Counts>);

/// The counts in a test's figures.
pub(super) fn counts<'a>(figures: impl Iterator<Item = &'a str>) -> Counts {
    let count = |figure: &str| {
        let (program, count) = figure.strip_prefix(FIGURE)?.split_once(' ')?;
        Some((program.to_owned(), count.parse().ok()?))
    };
    figures.filter_map(count).collect()
}

fn path() -> PathBuf {
    command::root().join("tests/instructions.txt")
}

impl Table {
    /// The table in the repository.
    ///
    /// # Errors
    /// When it is missing or not as written here.
    pub(super) fn read() -> Result<Self> {
        let path = path();
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not a table", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rows = text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .map(str::split_whitespace);
        let mut table = Self::default();
        let head = rows.next().context("it is empty")?;
        let columns: Vec<Series> = head
            .skip(1)
            .map(|series| series.parse().map_err(anyhow::Error::msg))
            .collect::<Result<_>>()?;
        for mut row in rows {
            let program = row.next().context("a row without a name")?;
            for (series, count) in columns.iter().zip(row) {
                if count != "-" {
                    let counts = table.0.entry(*series).or_default();
                    counts.insert(program.to_owned(), count.parse()?);
                }
            }
        }
        Ok(table)
    }

    /// Takes in the counts of one series.
    pub(super) fn set(&mut self, series: Series, counts: Counts) {
        self.0.insert(series, counts);
    }

    /// Puts the table into the repository.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write(&self) -> Result<()> {
        fs::write(path(), self.text()).with_context(|| format!("cannot write {}", path().display()))
    }

    fn text(&self) -> String {
        let mut text = "\
# Instructions that the verifier walked through before it took each probe, without filters, by kernel\n\
# series. Programs have the names that the kernel keeps. Of two with the same name, the greater count.\n\
# `cargo xtask vm` compares, `cargo xtask vm --write` writes.\n"
            .to_owned();
        let _ = write!(text, "{:16}", "program");
        for series in self.0.keys() {
            let _ = write!(text, " {:>7}", series.to_string());
        }
        text.push('\n');
        let mut programs: Vec<&String> = self.0.values().flat_map(Counts::keys).collect();
        programs.sort();
        programs.dedup();
        for program in programs {
            let _ = write!(text, "{program:16}");
            for counts in self.0.values() {
                let count = counts.get(program).map_or("-".to_owned(), u32::to_string);
                let _ = write!(text, " {count:>7}");
            }
            text.push('\n');
        }
        text
    }

    /// Compares what a kernel counted with the table. A series that is not in it is compared with the one
    /// before, which only tells something. Returns what to tell.
    ///
    /// # Errors
    /// When a probe has become dearer by more than the margin, on a series that is in the table.
    pub(super) fn compare(&self, series: Series, counts: &Counts) -> Result<Vec<String>> {
        let Some((column, expected)) = self.0.range(..=series).next_back() else {
            return Ok(vec![format!(
                "no instruction counts for {series} or before"
            )]);
        };
        let (mut told, mut dearer) = (Vec::new(), Vec::new());
        for (program, count) in counts {
            let Some(expected) = expected.get(program) else {
                told.push(format!("{program}: {count} instructions, not in the table"));
                continue;
            };
            let line = format!(
                "{program}: {count} instructions, and {expected} in the table for {column}"
            );
            let hundredths = u64::from(*count) * 100;
            let expected = u64::from(*expected);
            if hundredths > expected * u64::from(100 + MARGIN) && *column == series {
                dearer.push(line);
            } else if hundredths.abs_diff(expected * 100) > expected * u64::from(MARGIN) {
                told.push(line);
            }
        }
        if !dearer.is_empty() {
            bail!(
                "probes are dearer by more than {MARGIN} %: {}; if that is meant, run it with --write",
                dearer.join("; ")
            );
        }
        Ok(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERIES: Series = Series(6, 1);

    fn of(pairs: &[(&str, u32)]) -> Counts {
        pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    fn table() -> Table {
        let mut table = Table::default();
        table.set(SERIES, of(&[("state", 1000), ("accept", 300)]));
        table.set(Series(7, 2), of(&[("state", 900)]));
        table
    }

    #[test]
    fn what_is_written_can_be_read() {
        assert_eq!(Table::parse(&table().text()).expect("a table"), table());
        assert!(Table::parse("program six\n").is_err());
    }

    #[test]
    fn figures_become_counts() {
        let figures = [
            "instructions state 1000",
            "both kinds told the same",
            "instructions x y",
        ];
        assert_eq!(counts(figures.into_iter()), of(&[("state", 1000)]));
    }

    #[test]
    fn a_probe_that_becomes_dearer_is_an_error() {
        let compare = |series, count| table().compare(series, &of(&[("state", count)]));
        assert_eq!(compare(SERIES, 1100).expect("within the margin").len(), 0);
        let error = compare(SERIES, 1101).expect_err("beyond it").to_string();
        assert!(error.contains("state: 1101"), "{error}");
        assert_eq!(compare(SERIES, 500).expect("it may be cheaper").len(), 1);
        // A series that is not in the table cannot fail, only tell.
        assert_eq!(
            compare(Series(6, 12), 2000)
                .expect("not in the table")
                .len(),
            1
        );
        assert_eq!(
            compare(Series(5, 15), 1).expect("before all of it").len(),
            1
        );
    }
}
