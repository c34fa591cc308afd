//! The report for people, fit for a bug report.

use std::io::Write as _;

use super::{Report, Status, Verdict};

/// Writes it all. A line each: how it is, what, why; and below what can be done about it.
pub fn write(report: &Report, color: bool, to: &mut Vec<u8>) {
    let host = &report.host;
    // Writing into a vector cannot fail.
    let _ = write!(
        to,
        "tcptrace {} on Linux {} {}",
        env!("CARGO_PKG_VERSION"),
        host.kernel,
        host.arch
    );
    if let Some(distribution) = &host.distribution {
        let _ = write!(to, ", {distribution}");
    }
    let cpus = if host.cpus == 1 { "CPU" } else { "CPUs" };
    let _ = write!(to, ", {} {cpus}", host.cpus);
    if let Some(container) = &host.container {
        let _ = write!(to, ", in a container ({container})");
    }
    let _ = writeln!(to);

    let names = report.checks.iter().map(|check| check.name.len());
    let width = names.max().unwrap_or(0);
    for check in &report.checks {
        let status = check.status.name();
        let (on, off) = if color {
            (color_of(check.status), "\x1b[0m")
        } else {
            ("", "")
        };
        let (name, detail) = (check.name, &check.detail);
        let _ = writeln!(to, "{on}{status:<8}{off}  {name:<width$}  {detail}");
        if let Some(fix) = &check.fix {
            let _ = writeln!(to, "{:indent$}-> {fix}", "", indent = 8 + 2 + width + 2);
        }
    }
    let verdict = match report.verdict() {
        Verdict::Works => "Everything works here.",
        Verdict::Degraded => "Some of it works here.",
        Verdict::Nothing => "Nothing works here: neither the probes nor sock_diag.",
    };
    let _ = writeln!(to, "{verdict}");
}

const fn color_of(status: Status) -> &'static str {
    match status {
        Status::Ok => "\x1b[32m",
        Status::Degraded => "\x1b[33m",
        Status::No => "\x1b[31m",
        Status::Skipped => "\x1b[2m",
    }
}
