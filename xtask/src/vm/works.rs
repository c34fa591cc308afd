//! docs/kernels.md: what works on which kernel, as `tcptrace doctor` told there. The page is written from that,
//! and held against it in every run.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use super::kernels::Series;
use crate::command;

/// What tests' figures about this begin with: see `tests/tests/works.rs`.
pub(super) const FIGURE: &str = "works ";

/// What stands above the table, and below.
const HEAD: &str = "\
# Which kernels

Made by `cargo xtask vm --write`, from what `tcptrace doctor` says in virtual machines with the kernels of
Debian, as root. `cargo xtask vm` fails where a kernel does something else than is said here.

From 5.12 on it can trace, if the kernel has BTF; before, `leaks --once` works, and `leaks` looks now and then.
The same tests pass on every kernel in this table that can trace; `cargo xtask vm --kernel PATH` runs them on any
other: in November 2026 on Ubuntu's 5.13.0-52, 5.15.0-25 and 5.19.0-50, and they passed. `tcptrace doctor` says
what works on the kernel at hand, why not more, and what to do about it.

";
const FOOT: &str = "
- `time_wait` and `accept` take the first of their two ways that works; either is enough.
- `skipped`: not tried, because nothing can be traced.
- Empty: does not matter there, or has not been tried there since it is asked.
";

/// By name of the check: its status.
pub(super) type Statuses = Vec<(String, String)>;

/// The table of the page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    /// Names of checks, in the doctor's order.
    checks: Vec<String>,
    columns: BTreeMap<Series, BTreeMap<String, String>>,
}

/// The statuses in a test's figures.
pub(super) fn statuses<'a>(figures: impl Iterator<Item = &'a str>) -> Statuses {
    let status = |figure: &str| {
        let (check, status) = figure.strip_prefix(FIGURE)?.split_once(' ')?;
        Some((check.to_owned(), status.to_owned()))
    };
    figures.filter_map(status).collect()
}

fn path() -> PathBuf {
    command::root().join("docs/kernels.md")
}

impl Page {
    /// The page in the repository.
    ///
    /// # Errors
    /// When it is missing or not as written here.
    pub(super) fn read() -> Result<Self> {
        let path = path();
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} has no table", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rows = text
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| {
                let cells = line.trim_matches('|').split('|');
                cells.map(|cell| cell.trim().trim_matches('`')).collect()
            });
        let head: Vec<&str> = rows.next().context("no row")?;
        let series: Vec<Series> = head[1..]
            .iter()
            .map(|series| series.parse().map_err(anyhow::Error::msg))
            .collect::<Result<_>>()?;
        let mut page = Self::default();
        for row in rows.skip(1) {
            let [check, statuses @ ..] = &row[..] else {
                bail!("an empty row");
            };
            page.checks.push((*check).to_owned());
            let told = series.iter().zip(statuses);
            // An empty cell is a check that this kernel's doctor does not tell.
            for (series, status) in told.filter(|(_, status)| !status.is_empty()) {
                let column = page.columns.entry(*series).or_default();
                column.insert((*check).to_owned(), (*status).to_owned());
            }
        }
        Ok(page)
    }

    /// Takes in what a kernel of the series told.
    pub(super) fn set(&mut self, series: Series, statuses: Statuses) {
        for (check, _) in &statuses {
            if !self.checks.contains(check) {
                self.checks.push(check.clone());
            }
        }
        self.columns.insert(series, statuses.into_iter().collect());
    }

    /// Puts the page into the repository.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write(&self) -> Result<()> {
        let text = format!("{HEAD}{}{FOOT}", self.table());
        fs::write(path(), text).with_context(|| format!("cannot write {}", path().display()))
    }

    fn table(&self) -> String {
        let mut text = format!("| {:22} |", "");
        for series in self.columns.keys() {
            let _ = write!(text, " {:8} |", series.to_string());
        }
        let _ = write!(text, "\n|{}|", "-".repeat(24));
        for _ in &self.columns {
            let _ = write!(text, "{}|", "-".repeat(10));
        }
        text.push('\n');
        for check in &self.checks {
            let _ = write!(text, "| {:22} |", format!("`{check}`"));
            for column in self.columns.values() {
                let status = column.get(check).map_or("", String::as_str);
                let _ = write!(text, " {status:8} |");
            }
            text.push('\n');
        }
        text
    }

    /// Holds what a kernel told against the page. Returns a remark if the page has no such series.
    ///
    /// # Errors
    /// When they differ.
    pub(super) fn compare(&self, series: Series, statuses: &Statuses) -> Result<Option<String>> {
        let Some(expected) = self.columns.get(&series) else {
            return Ok(Some(format!("docs/kernels.md does not tell of {series}")));
        };
        let told: BTreeMap<String, String> = statuses.iter().cloned().collect();
        let differing: Vec<String> = self
            .checks
            .iter()
            .chain(told.keys().filter(|check| !self.checks.contains(check)))
            .filter(|check| expected.get(*check) != told.get(*check))
            .map(|check| {
                let said = |of: &BTreeMap<String, String>| {
                    of.get(check).map_or("nothing", String::as_str).to_owned()
                };
                format!("{check} is {}, not {}", said(&told), said(expected))
            })
            .collect();
        if !differing.is_empty() {
            bail!(
                "docs/kernels.md is out of date: {}; if that is meant, run it with --write",
                differing.join("; ")
            );
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERIES: Series = Series(6, 1);

    fn of(pairs: &[(&str, &str)]) -> Statuses {
        let own = |(check, status): &(&str, &str)| ((*check).to_owned(), (*status).to_owned());
        pairs.iter().map(own).collect()
    }

    fn page() -> Page {
        let mut page = Page::default();
        page.set(Series(5, 10), of(&[("kernel", "no"), ("memory", "ok")]));
        page.set(SERIES, of(&[("kernel", "ok"), ("btf", "ok")]));
        page
    }

    #[test]
    fn what_is_written_can_be_read() {
        let text = format!("{HEAD}{}{FOOT}", page().table());
        assert_eq!(Page::parse(&text).expect("a table"), page());
        assert!(Page::parse("no table").is_err());
    }

    #[test]
    fn figures_become_statuses() {
        let figures = ["works kernel ok", "instructions state 5", "works btf no"];
        let expected = of(&[("kernel", "ok"), ("btf", "no")]);
        assert_eq!(statuses(figures.into_iter()), expected);
    }

    #[test]
    fn a_difference_is_an_error() {
        let same = of(&[("btf", "ok"), ("kernel", "ok")]);
        assert!(page().compare(SERIES, &same).expect("the same").is_none());
        for other in [
            of(&[("btf", "ok"), ("kernel", "no")]),
            of(&[("btf", "ok")]),
            of(&[("btf", "ok"), ("kernel", "ok"), ("accept", "ok")]),
        ] {
            assert!(page().compare(SERIES, &other).is_err(), "{other:?}");
        }
        let new = page().compare(Series(7, 9), &same).expect("no claim");
        assert!(new.expect("a remark").contains("7.9"));
    }
}
