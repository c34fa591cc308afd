//! What the reports of a machine amount to.

use anyhow::{Result, bail, ensure};

use super::{
    machine::{Ended, Outcome, Report},
    plan::Plan,
};

/// One line on what passed.
///
/// # Errors
/// Says what failed.
pub(super) fn verdict(outcome: &Outcome, plan: &Plan) -> Result<String> {
    let mut kernel = None;
    let mut ended: Vec<&Ended> = Vec::new();
    let mut done = false;
    for report in &outcome.reports {
        match report {
            Report::Started { kernel: started } => kernel = Some(started),
            Report::Ended(program) => ended.push(program),
            Report::Failed { what } => bail!("{what}"),
            Report::Done => done = true,
        }
    }
    let failed: Vec<String> = ended
        .iter()
        .filter(|program| program.code != Some(0))
        .map(|program| match program.code {
            Some(101) => program.name.clone(),
            Some(code) => format!("{} (exit code {code})", program.name),
            None => format!("{} (killed)", program.name),
        })
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join(", "));
    let Some(kernel) = kernel else {
        bail!("the kernel did not come up{}", after(outcome));
    };
    if !done {
        let last = ended.last().map_or("its start", |program| &program.name);
        bail!("it ended after {last}{}", after(outcome));
    }
    ensure!(
        ended.len() == plan.programs.len(),
        "{} of {} test programs have run",
        ended.len(),
        plan.programs.len()
    );
    let passed: u32 = ended
        .iter()
        .flat_map(|program| &program.results)
        .filter_map(|result| passed(result))
        .sum();
    ensure!(passed > 0, "no test has run");
    Ok(format!(
        "{passed} tests on {kernel} in {:.0} s",
        outcome.took.as_secs_f64()
    ))
}

/// What a console log says of a failure: what failed tests printed, or else its last lines.
pub(super) fn last_words(log: &str) -> Vec<&str> {
    let lines: Vec<&str> = log.lines().collect();
    let mut said = Vec::new();
    let mut from = None;
    for (at, line) in lines.iter().enumerate() {
        if *line == FAILURES && from.is_none() {
            from = Some(at);
        } else if line.starts_with("test result: ") {
            if let Some(from) = from.take() {
                said.extend(&lines[from..=at]);
            }
        } else if line.starts_with("guest: running ") {
            from = None;
        }
    }
    if said.is_empty() {
        said.extend(&lines[lines.len().saturating_sub(LAST)..]);
    }
    said
}

/// Where a test program begins to say what failed.
const FAILURES: &str = "failures:";

/// How many lines are shown of a machine that did not come to say what failed.
const LAST: usize = 40;

/// `: why`, if the machine had to be stopped.
fn after(outcome: &Outcome) -> String {
    match &outcome.stalled {
        Some(why) => format!(": {why}"),
        None => ", and turned itself off: a kernel panic, perhaps".to_owned(),
    }
}

/// The number in `ok. 8 passed; ...`.
fn passed(result: &str) -> Option<u32> {
    let (_, rest) = result.split_once(". ")?;
    let (number, _) = rest.split_once(" passed")?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of(lines: &[&str], stalled: Option<&str>) -> Result<String> {
        let reports = lines.iter().map(|line| serde_json::from_str(line));
        let outcome = Outcome {
            reports: reports.collect::<Result<_, _>>()?,
            stalled: stalled.map(str::to_owned),
            took: Duration::from_secs(90),
        };
        let plan = Plan {
            programs: vec!["ports".to_owned()],
            orders: Vec::new(),
            left_out: Vec::new(),
        };
        verdict(&outcome, &plan)
    }

    const STARTED: &str = r#"{"report":"started","kernel":"6.1.0-50"}"#;
    const ENDED: &str = r#"{"report":"ended","name":"ports","code":0,"seconds":3.5,"said":[],"results":["ok. 3 passed; 0 failed; 0 ignored"]}"#;
    const FAILED: &str = r#"{"report":"ended","name":"ports","code":101,"seconds":3.5,"said":[],"results":["FAILED. 2 passed; 1 failed"]}"#;
    const DONE: &str = r#"{"report":"done"}"#;

    #[test]
    fn all_is_well() {
        let verdict = of(&[STARTED, ENDED, DONE], None).expect("it passed");
        assert_eq!(verdict, "3 tests on 6.1.0-50 in 90 s");
    }

    #[test]
    fn a_failure_can_be_read_without_the_log() {
        let log = "guest: running ports\ntest result: ok. 3 passed\nguest: running loss\n\
                   test a ... FAILED\n\nfailures:\n\n---- a stdout ----\nleft: 1\n\nfailures:\n    a\n\n\
                   test result: FAILED. 1 passed\nguest: running tree\ntest b ... ok\ntest result: ok. 1 passed";
        let said = last_words(log).join("\n");
        assert!(
            said.starts_with("failures:\n\n---- a stdout ----\nleft: 1"),
            "{said}"
        );
        assert!(
            said.ends_with("    a\n\ntest result: FAILED. 1 passed"),
            "{said}"
        );
        // A panic of the kernel: whatever came last.
        let log: String = (0..100).map(|line| format!("line {line}\n")).collect();
        assert_eq!(last_words(&log).first(), Some(&"line 60"));
        assert_eq!(last_words("one"), ["one"]);
    }

    #[test]
    fn whatever_is_missing_is_a_failure() {
        for (lines, stalled, said) in [
            (
                vec![],
                Some("it did not end in time"),
                "did not come up: it did not end in time",
            ),
            (vec![STARTED, ENDED], None, "ended after ports"),
            (vec![STARTED, FAILED, DONE], None, "ports"),
            (vec![STARTED, DONE], None, "0 of 1"),
        ] {
            let error = of(&lines, stalled).expect_err(said).to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
