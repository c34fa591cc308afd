//! The report for programs: one object.

use serde::Serialize;

use super::{Check, Report};
use crate::json::{self, Time};

#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    time: Time,
    version: &'static str,
    kernel: &'a str,
    arch: &'static str,
    distribution: Option<&'a str>,
    cpus: usize,
    container: Option<&'a str>,
    verdict: &'static str,
    checks: Vec<CheckFields<'a>>,
}

#[derive(Serialize)]
struct CheckFields<'a> {
    name: &'static str,
    status: &'static str,
    detail: &'a str,
    fix: Option<&'a str>,
}

impl<'a> CheckFields<'a> {
    fn new(check: &'a Check) -> Self {
        Self {
            name: check.name,
            status: check.status.name(),
            detail: &check.detail,
            fix: check.fix.as_deref(),
        }
    }
}

/// Writes the object and a newline.
pub fn write(report: &Report, to: &mut Vec<u8>) {
    let host = &report.host;
    let line = Line {
        event: "doctor",
        time: Time {
            utc_ns: report.utc_ns,
        },
        version: env!("CARGO_PKG_VERSION"),
        kernel: &host.kernel,
        arch: host.arch,
        distribution: host.distribution.as_deref(),
        cpus: host.cpus,
        container: host.container.as_deref(),
        verdict: report.verdict().name(),
        checks: report.checks.iter().map(CheckFields::new).collect(),
    };
    json::line(to, &line);
}
