//! The summary for people: redrawn every second on a terminal, written once into a pipe.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt::{Display, Write as _},
    io,
};

use super::summary::{Process, Remote, Running, Summary, oldest};
use crate::{
    event::End,
    output::Output,
    tracker::{Ending, Fact, Tracker},
    view::View,
};

/// How often a terminal is redrawn, nanoseconds.
const REDRAW_NS: u64 = 1_000_000_000;
/// How many processes and remotes are listed, on a terminal as well as at the end.
const LISTED: usize = 8;

/// Shows the summary, live.
pub struct Text {
    summary: Summary,
    out: Output,
    began: Option<u64>,
    drawn: Option<u64>,
    lost: u64,
    page: String,
}

impl Text {
    /// Writes to `out`.
    #[must_use]
    pub fn new(out: Output) -> Self {
        Self {
            summary: Summary::new(),
            out,
            began: None,
            drawn: None,
            lost: 0,
            page: String::new(),
        }
    }

    fn draw(&mut self, tracker: &Tracker, now: u64, last: bool) -> io::Result<()> {
        self.page.clear();
        self.compose(tracker, now);
        self.out.draw(&self.page, last)
    }

    fn compose(&mut self, tracker: &Tracker, now: u64) {
        let ns = self.began.map_or(0, |began| now.saturating_sub(began));
        let seconds = (ns + 500_000_000) / 1_000_000_000;
        let page = &mut self.page;
        // Writing into a string cannot fail.
        let _ = writeln!(page, "TIME_WAIT, traced for {seconds} s");
        let running = Running::of(tracker, now);
        let _ = writeln!(
            page,
            "  running   {} in TIME_WAIT{}, {} waiting for the peer in FIN_WAIT2{}",
            running.time_wait,
            oldest_age(running.time_wait_oldest_seconds),
            running.fin_wait2,
            oldest_age(running.fin_wait2_oldest_seconds),
        );
        let _ = write!(page, "  ended     {}", self.summary.count());
        for (index, (ending, count)) in self.summary.endings().enumerate() {
            let before = if index == 0 { ": " } else { ", " };
            let _ = write!(page, "{before}{count} {}", phrase(ending));
        }
        page.push('\n');
        if let Some(dwell) = self.summary.dwell() {
            let _ = writeln!(
                page,
                "  lasted    min {:.3} s   p50 {:.3} s   p90 {:.3} s   p99 {:.3} s   max {:.3} s",
                dwell.min, dwell.p50, dwell.p90, dwell.p99, dwell.max
            );
            if dwell.at_least > 0 {
                let _ = writeln!(
                    page,
                    "            {} of {} at least that long: this kernel does not tell when they began",
                    dwell.at_least, dwell.count
                );
            }
        }
        if let Some(dwell) = self.summary.dwell()
            && let Some(error) = dwell.estimate_error
        {
            let _ = writeln!(
                page,
                "            {} of {} estimated by looks at sock_diag, off by up to {error:.3} s",
                dwell.estimates, dwell.count
            );
        }
        if self.summary.rearmed > 0 {
            let _ = writeln!(
                page,
                "            {} longer, because a late segment of the peer began the minute anew",
                self.summary.rearmed
            );
        }
        if self.lost > 0 {
            let _ = writeln!(
                page,
                "  LOST      {} events: the buffer was full",
                self.lost
            );
        }
        self.compose_tables(tracker);
        self.compose_running(tracker, now);
    }

    /// Who, and with whom. Those that run count as well, or the first minute would show nothing.
    fn compose_tables(&mut self, tracker: &Tracker) {
        let closers = tracker.running().map(|running| Process::of(running.owner));
        let processes = self.summary.processes(usize::MAX);
        table(&mut self.page, "closed first by", processes, closers);
        let remotes = tracker
            .running()
            .map(|running| Remote::of(&running.socket, running.owner));
        let ended = self.summary.remotes(usize::MAX);
        table(&mut self.page, "with", ended, remotes);
    }

    /// The oldest that run, one by one.
    fn compose_running(&mut self, tracker: &Tracker, now: u64) {
        let running = oldest(tracker, LISTED);
        if running.is_empty() {
            return;
        }
        let more = tracker.running().count() - running.len();
        let page = &mut self.page;
        let _ = writeln!(
            page,
            "\n  {:44} {:>9} {:>9}  closed first by",
            "running, oldest first", "state", "age"
        );
        for running in &running {
            let tuple = &running.socket.tuple;
            let name = format!(
                "{} > {}",
                std::net::SocketAddr::new(tuple.local(), tuple.local_port),
                std::net::SocketAddr::new(tuple.remote(), tuple.remote_port)
            );
            let age = match running.since {
                Some(since) => format!("{:.1} s", now.saturating_sub(since) as f64 / 1e9),
                None => "-".to_owned(),
            };
            let state = running.state.name();
            let owner = Process::of(running.owner);
            let _ = writeln!(page, "  {name:44} {state:>9} {age:>9}  {owner}");
        }
        rest(page, more as u64);
    }
}

impl View for Text {
    fn clock(&mut self, now: u64, _: i64) {
        self.began.get_or_insert(now);
    }

    fn fact(&mut self, fact: Fact<'_>) {
        match fact {
            Fact::TimeWaitEnd(end) => self.summary.add(&end),
            Fact::Lost(lost) => self.lost += lost.records + lost.missed,
            _ => {}
        }
    }

    fn flush(&mut self, tracker: &Tracker, now: u64) -> io::Result<()> {
        if !self.out.is_terminal
            || self
                .drawn
                .is_some_and(|drawn| now.saturating_sub(drawn) < REDRAW_NS)
        {
            return Ok(());
        }
        self.drawn = Some(now);
        self.draw(tracker, now, false)
    }

    fn end(&mut self, tracker: &Tracker, end: &End) -> io::Result<()> {
        self.draw(tracker, end.time, true)?;
        if end.mptcp > 0 {
            eprintln!(
                "tcptrace: {} transitions of MPTCP sockets not covered",
                end.mptcp
            );
        }
        Ok(())
    }
}

fn oldest_age(age: Option<f64>) -> String {
    age.map_or(String::new(), |age| format!(" (oldest {age:.1} s)"))
}

const fn phrase(ending: Ending) -> &'static str {
    match ending {
        Ending::Expired => "expired",
        Ending::Reused => "reused by connect()",
        Ending::Reopened => "reopened by the peer",
        Ending::Reset => "reset",
        Ending::Aborted => "aborted (ss -K)",
        Ending::NamespaceGone => "gone with their namespace",
        Ending::Skipped => "skipped (tcp_max_tw_buckets reached)",
        Ending::Unknown => "ended unseen",
    }
}

/// Writes how many ended and how many run, by key, the greatest first. `ended` comes with the number of
/// those that are counted under no key.
fn table<K: Ord + Display>(
    page: &mut String,
    title: &str,
    (ended, mut more): (Vec<(K, u64)>, u64),
    running: impl Iterator<Item = K>,
) {
    let mut counts: BTreeMap<K, (u64, u64)> = ended
        .into_iter()
        .map(|(key, ended)| (key, (ended, 0)))
        .collect();
    for key in running {
        counts.entry(key).or_default().1 += 1;
    }
    if counts.is_empty() {
        return;
    }
    let _ = writeln!(page, "\n  {title:44} {:>8} {:>8}", "ended", "running");
    let mut rows: Vec<_> = counts.into_iter().collect();
    rows.sort_by_key(|(_, (ended, running))| Reverse(ended + running));
    for (index, (key, (ended, running))) in rows.into_iter().enumerate() {
        if index < LISTED {
            let name = key.to_string();
            let _ = writeln!(page, "  {name:44} {ended:>8} {running:>8}");
        } else {
            more += ended + running;
        }
    }
    rest(page, more);
}

fn rest(page: &mut String, more: u64) {
    if more > 0 {
        let _ = writeln!(page, "  ... and {more} more");
    }
}
