//! What `tcptrace leaks -o json` reports.

use std::fmt;

use serde_json::Value;

use crate::{Fixture, Line, Lines};

/// A report: its leaks, and the line that ends it.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// The worst first.
    pub leaks: Vec<Leak<'a>>,
    /// The line that ends it.
    pub end: &'a Line,
}

/// Sockets left open by the same processes.
#[derive(Clone, Copy, Debug)]
pub struct Leak<'a>(pub &'a Line);

impl Lines {
    /// The reports, in order.
    #[must_use]
    pub fn reports(&self) -> Vec<Report<'_>> {
        let mut reports = Vec::new();
        let mut leaks = Vec::new();
        for line in &self.0 {
            match line.value["event"].as_str() {
                Some("leak") => leaks.push(Leak(line)),
                Some("report") => reports.push(Report {
                    leaks: std::mem::take(&mut leaks),
                    end: line,
                }),
                _ => {}
            }
        }
        reports
    }

    /// The last report.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn report(&self) -> Report<'_> {
        let last = self.reports().pop();
        last.unwrap_or_else(|| panic!("no report in:\n{self}"))
    }
}

impl<'a> Report<'a> {
    /// The one leak in CLOSE_WAIT whose first holder this process is.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn leak(&self, process: &Fixture) -> Leak<'a> {
        self.leak_in("CLOSE_WAIT", process)
    }

    /// The one leak in this state whose first holder this process is.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn leak_in(&self, state: &str, process: &Fixture) -> Leak<'a> {
        let mut of = self.of(process.pid);
        of.retain(|leak| leak.0.value["state"] == state);
        assert_eq!(
            of.len(),
            1,
            "one leak of {} in {state}:\n{self}",
            process.comm
        );
        assert_eq!(of[0].0.value["comm"], process.comm, "{self}");
        of[0]
    }

    /// The leaks whose first holder has this pid.
    #[must_use]
    pub fn of(&self, pid: u32) -> Vec<Leak<'a>> {
        let leaks = self.leaks.iter().copied();
        leaks.filter(|leak| leak.0.value["pid"] == pid).collect()
    }

    /// The leak that lists the socket with this cookie.
    ///
    /// # Panics
    /// When none does.
    #[must_use]
    pub fn leak_with(&self, cookie: &str) -> Leak<'a> {
        let lists = |leak: &&Leak<'_>| leak.samples().iter().any(|one| one["socket"] == cookie);
        let found = self.leaks.iter().find(lists);
        *found.unwrap_or_else(|| panic!("no leak lists {cookie}:\n{self}"))
    }

    /// The one leak that it tells of.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn only(&self) -> Leak<'a> {
        assert_eq!(self.leaks.len(), 1, "one leak:\n{self}");
        self.leaks[0]
    }

    /// It must tell of no leak.
    ///
    /// # Panics
    /// When it does.
    pub fn assert_none(&self) {
        assert!(self.leaks.is_empty(), "no leak:\n{self}");
        assert_eq!(self.end.value["leaks"], 0, "{self}");
        assert_eq!(self.end.value["sockets"], 0, "{self}");
    }

    /// A number of the line that ends it.
    #[must_use]
    pub fn number(&self, key: &str) -> u64 {
        number(&self.end.value, key)
    }
}

impl<'a> Leak<'a> {
    /// A number.
    #[must_use]
    pub fn number(&self, key: &str) -> u64 {
        number(&self.0.value, key)
    }

    /// The sockets listed, the oldest first.
    ///
    /// # Panics
    /// When they are missing.
    #[must_use]
    pub fn samples(&self) -> &'a [Value] {
        array(&self.0.value, "samples")
    }

    /// The listed socket with this cookie.
    ///
    /// # Panics
    /// When it is not listed.
    #[must_use]
    pub fn sample(&self, cookie: &str) -> &'a Value {
        let found = self.samples().iter().find(|one| one["socket"] == cookie);
        found.unwrap_or_else(|| panic!("no sample {cookie}: {self}"))
    }

    /// Pids of all holders, in order.
    #[must_use]
    pub fn holders(&self) -> Vec<u64> {
        let holders = array(&self.0.value, "holders").iter();
        holders.map(|one| number(one, "pid")).collect()
    }

    /// These processes and no others must be the holders.
    ///
    /// # Panics
    /// When they are not.
    pub fn assert_holders(&self, processes: &[&Fixture]) {
        let mut expected: Vec<(u32, &str)> = processes
            .iter()
            .map(|process| (process.pid, process.comm.as_str()))
            .collect();
        expected.sort_unstable();
        let found: Vec<(u32, &str)> = array(&self.0.value, "holders")
            .iter()
            .map(|one| {
                let comm = one["comm"].as_str().expect("a name");
                (number(one, "pid") as u32, comm)
            })
            .collect();
        assert_eq!(found, expected, "{self}");
    }

    /// The causes must be these, with these counts.
    ///
    /// # Panics
    /// When they are not.
    pub fn assert_causes(&self, causes: &[(&str, u64)]) {
        let found = self.0.value["causes"].as_object().expect("an object");
        let mut found: Vec<(&str, u64)> = found
            .iter()
            .map(|(cause, count)| (cause.as_str(), count.as_u64().expect("a number")))
            .collect();
        let mut expected = causes.to_vec();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "{self}");
        let all: u64 = found.iter().map(|(_, count)| count).sum();
        assert_eq!(self.number("sockets"), all, "{self}");
    }
}

fn number(value: &Value, key: &str) -> u64 {
    let number = value[key].as_u64();
    number.unwrap_or_else(|| panic!("no number {key}: {value}"))
}

fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    let array = value[key].as_array();
    array.unwrap_or_else(|| panic!("no list {key}: {value}"))
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for leak in &self.leaks {
            writeln!(f, "  {leak}")?;
        }
        writeln!(f, "  {}", self.end)
    }
}

impl fmt::Display for Leak<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
