//! `tcptrace states`: once, or again and again.

use std::{collections::HashSet, time::Duration};

use anyhow::Result;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::{Signals, runtime, to_stdout, watch::LAST_OUTPUT};
use crate::{
    cli::{Format, States},
    kernel::clock,
    output::Output,
    states::{self, By, Options, Report},
};

/// Runs it.
pub(super) fn run(args: States) -> Result<()> {
    let options = Options {
        by: args.by.or(args.fds.then_some(By::Process)),
        fds: args.fds,
        selection: args.owners.selection(args.sockets, args.states),
    };
    let mut show = Show {
        options,
        top: args.top,
        format: args.output,
        out: Output::stdout(true),
        said: HashSet::new(),
    };
    match args.watch {
        None => show.look().and_then(|report| show.write(&report, true)),
        Some(every) => watch(&mut show, every, args.duration),
    }
}

/// Looks until a signal, or until the time is up.
fn watch(show: &mut Show, every: Duration, duration: Option<Duration>) -> Result<()> {
    let queue = show.out.queued();
    let watched = runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = duration.and_then(|duration| Instant::now().checked_add(duration));
        let is_over = async {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(is_over);
        let mut report = Report::default();
        loop {
            tokio::select! {
                biased;
                () = signals.come() => break,
                () = &mut is_over => break,
                () = queue.failed() => break,
                _ = ticks.tick() => {}
            }
            // Nobody reads what there is already.
            if !queue.has_room() {
                continue;
            }
            report = show.look()?;
            show.write(&report, false)?;
        }
        show.end(&report)
    });
    let closed = queue.close(LAST_OUTPUT, Some(std::time::Instant::now() + LAST_OUTPUT));
    watched?;
    Ok(closed.map_err(to_stdout)?)
}

/// What to look for, and where to show it.
struct Show {
    options: Options,
    top: Option<usize>,
    format: Format,
    out: Output,
    /// What was said to be out of sight.
    said: HashSet<String>,
}

impl Show {
    fn look(&mut self) -> Result<Report> {
        let looked = states::look(&self.options)?;
        for reason in looked.unseen {
            let reason = reason.to_string();
            if !self.said.contains(&reason) {
                eprintln!("tcptrace: {reason}");
                self.said.insert(reason);
            }
        }
        Ok(looked.report)
    }

    /// Writes the report; on a terminal, if it is not the `last`, as much of it as there is room for.
    fn write(&mut self, report: &Report, last: bool) -> Result<()> {
        let offset = clock::boot_to_utc_ns();
        match self.format {
            Format::Json => {
                states::write_json(&mut self.out.buffer, report, self.top, offset);
                self.out.flush()
            }
            Format::Text => {
                let compose = |top| states::compose(report, top, offset);
                let page = match self.out.size() {
                    Some((_, height)) if !last && report.by.is_some() => {
                        // As many groups as fit; each takes a line at least.
                        let groups = self.top.unwrap_or(usize::MAX).min(report.groups.len());
                        let (mut fit, mut beyond) = (0, groups.min(height) + 1);
                        while fit + 1 < beyond {
                            let middle = usize::midpoint(fit, beyond);
                            if self.out.fits(&compose(Some(middle))) {
                                fit = middle;
                            } else {
                                beyond = middle;
                            }
                        }
                        compose(Some(fit))
                    }
                    _ => compose(self.top),
                };
                self.out.separate();
                self.out.draw(&page, last)
            }
        }
        .map_err(to_stdout)?;
        Ok(())
    }

    /// What was cut to the size of the terminal is shown as a whole.
    fn end(&mut self, report: &Report) -> Result<()> {
        if self.format == Format::Text && self.out.is_terminal && report.time > 0 {
            self.write(report, true)?;
        }
        Ok(())
    }
}
