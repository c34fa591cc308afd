//! What tracing costs, against connections a second.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};

use super::figures::{RateCurve, RatePoint, Rates};
use crate::bench::{
    churn::{self, Load, Made, PORT, SETTLE},
    lab::Lab,
    results::LeftOut,
    single,
    spread::Spread,
    tracer::{Running, Tracer},
};

/// Connections a second; `None` is as many as the machine makes.
const RATES: [Option<u32>; 7] = [
    Some(1000),
    Some(2000),
    Some(5000),
    Some(10_000),
    Some(20_000),
    Some(50_000),
    None,
];
/// Below this, a measurement takes a second, else half of one.
const FEW: u32 = 10_000;
/// The reader looks every 20 ms at what is left.
const DRAINED: Duration = Duration::from_millis(60);
/// What is slower than this part of what it should be is the machine's limit, which has a point of its own.
const KEPT: f64 = 0.97;

/// A run at one rate: what was made, and the tracer's CPU seconds.
type Pass = Vec<(Made, f64)>;

/// Measures: without, with the first, without, with the second, and so on, `rounds` times.
pub(super) fn measure(
    lab: &Lab,
    tracers: &[Tracer],
    rounds: usize,
    left_out: &mut Vec<LeftOut>,
) -> Result<Rates> {
    let mut all: Vec<Vec<(Pass, Pass, Pass)>> = vec![Vec::new(); tracers.len()];
    let mut lost = vec![0; tracers.len()];
    let mut failed = vec![false; tracers.len()];
    // The first one pays for whatever is not in memory yet.
    churn::make(&lab.churn, 0.5)?;
    let mut before = pass(lab, None)?;
    let mut untraced = vec![before.clone()];
    for round in 1..=rounds {
        for (index, tracer) in tracers.iter().enumerate() {
            if failed[index] {
                continue;
            }
            eprintln!(
                "bench: growth: rates, round {round} of {rounds}: {}",
                tracer.name
            );
            let traced = tracer.start(&lab.folder, &[]).and_then(|running| {
                let traced = pass(lab, Some(&running))?;
                thread::sleep(SETTLE);
                Ok((traced, running.finish(PORT)?))
            });
            thread::sleep(SETTLE);
            let after = pass(lab, None)?;
            untraced.push(after.clone());
            match traced {
                Ok((traced, told)) => {
                    lost[index] += told.lost;
                    all[index].push((before, traced, after.clone()));
                }
                Err(error) => {
                    failed[index] = true;
                    left_out.push(LeftOut {
                        what: format!("rates with {}", tracer.name),
                        why: format!("{error:#}"),
                    });
                }
            }
            before = after;
        }
    }
    let curves = tracers.iter().zip(&all).zip(lost);
    let curves = curves.filter(|((_, passes), _)| !passes.is_empty());
    let curves = curves.map(|((tracer, passes), lost)| {
        Ok(RateCurve {
            name: tracer.name.to_owned(),
            points: points(passes).context("no time passed")?,
            lost,
        })
    });
    let median = |of: fn(&Made) -> f64| {
        let at_the_limit = untraced.iter().filter_map(|pass| pass.last());
        let values: Vec<f64> = at_the_limit.map(|(made, _)| of(made)).collect();
        Some(Spread::of(&values)?.median)
    };
    Ok(Rates {
        rounds,
        limit: median(|made| made.per_second).context("no rounds, no figures")?,
        untraced_us: median(|made| made.cpu_us_each).context("no rounds, no figures")?,
        curves: curves.collect::<Result<_>>()?,
    })
}

/// Every rate once.
fn pass(lab: &Lab, running: Option<&Running>) -> Result<Pass> {
    let cpu = || -> Result<f64> {
        match running {
            Some(running) => Ok(single::activity(running.pid())?.0 as f64 / 1e9),
            None => Ok(0.0),
        }
    };
    let each = RATES.map(|rate| {
        let few = rate.is_some_and(|rate| rate < FEW);
        let before = cpu()?;
        let made = churn::run(
            &lab.churn,
            Load {
                rate,
                ..Load::resets(if few { 1.0 } else { 0.5 })
            },
        )?;
        if running.is_some() {
            thread::sleep(DRAINED);
        }
        Ok((made, cpu()? - before))
    });
    each.into_iter().collect()
}

/// The curve of passes with a tracer, each between two without.
fn points(passes: &[(Pass, Pass, Pass)]) -> Option<Vec<RatePoint>> {
    let mut points = Vec::new();
    for (at, asked) in RATES.into_iter().enumerate() {
        let (mut rates, mut own, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for (before, traced, after) in passes {
            let (made, cpu) = traced[at];
            let untraced = f64::midpoint(before[at].0.cpu_us_each, after[at].0.cpu_us_each);
            rates.push(made.per_second);
            own.push(cpu * 1e6 / made.connections as f64);
            added.push(made.cpu_us_each - untraced);
        }
        let per_second = Spread::of(&rates)?.median;
        if asked.is_some_and(|asked| per_second < f64::from(asked) * KEPT) {
            continue;
        }
        points.push(RatePoint {
            asked,
            per_second,
            own_us: Spread::of(&own)?,
            added_us: Spread::of(&added)?,
        });
    }
    Some(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(rates: [f64; 7], cpu_us_each: f64, own: f64) -> Pass {
        let made = |per_second| Made {
            connections: 1000,
            per_second,
            cpu_us_each,
        };
        rates.map(|rate| (made(rate), own)).to_vec()
    }

    #[test]
    fn what_is_added_is_taken_between_two_runs_without() {
        let asked = [1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 9e4];
        // It becomes slower meanwhile. The limit with a tracer is below 20,000.
        let traced = [1e3, 2e3, 5e3, 1e4, 15e3, 15e3, 15e3];
        let round = || {
            (
                at(asked, 10.0, 0.0),
                at(traced, 14.0, 0.002),
                at(asked, 12.0, 0.0),
            )
        };
        let points = points(&[round(), round(), round()]).unwrap();
        let asked: Vec<_> = points.iter().map(|point| point.asked).collect();
        assert_eq!(
            asked,
            [Some(1000), Some(2000), Some(5000), Some(10_000), None],
            "what was not reached is the limit's"
        );
        for point in &points {
            assert_eq!(point.added_us.median, 3.0);
            assert_eq!(point.own_us.median, 2.0);
        }
        assert_eq!(points[3].own(), 0.02);
        assert_eq!(points[3].share(), 0.05);
    }
}
