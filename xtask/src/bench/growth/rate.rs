//! What tracing costs, against connections a second.

use std::{ops::Add as _, thread, time::Duration};

use anyhow::{Context as _, Result};

use super::figures::{RateCurve, RatePoint, Rates};
use crate::bench::{
    churn::{self, Load, Made, PORT, SETTLE},
    lab::Lab,
    programs::{self, Run},
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

/// A run at one rate.
#[derive(Clone, Copy)]
struct At {
    made: Made,
    /// CPU seconds of the tracer.
    own: f64,
    /// What its programs ran.
    programs: Run,
}

/// Measures each tracer in turn, `rounds` times. `empty_ns`: what the kernel's statistics of a program take.
pub(super) fn measure(
    lab: &Lab,
    tracers: &[Tracer],
    rounds: usize,
    empty_ns: f64,
    left_out: &mut Vec<LeftOut>,
) -> Result<Rates> {
    let _statistics = programs::count_runs()?;
    let mut all: Vec<Vec<Vec<At>>> = vec![Vec::new(); tracers.len()];
    let mut lost = vec![0; tracers.len()];
    let mut failed = vec![false; tracers.len()];
    // The first one pays for whatever is not in memory yet.
    churn::make(&lab.churn, 0.5)?;
    let mut untraced = Vec::new();
    for round in 1..=rounds {
        for (index, tracer) in tracers.iter().enumerate() {
            if failed[index] {
                continue;
            }
            eprintln!(
                "bench: growth: rates, round {round} of {rounds}: {}",
                tracer.name
            );
            untraced.push(churn::run(&lab.churn, Load::resets(0.5))?);
            let traced = tracer.start(&lab.folder, &[]).and_then(|running| {
                let traced = pass(lab, &running)?;
                thread::sleep(SETTLE);
                Ok((traced, running.finish(PORT)?))
            });
            thread::sleep(SETTLE);
            match traced {
                Ok((traced, told)) => {
                    lost[index] += told.lost;
                    all[index].push(traced);
                }
                Err(error) => {
                    failed[index] = true;
                    left_out.push(LeftOut {
                        what: format!("rates with {}", tracer.name),
                        why: format!("{error:#}"),
                    });
                }
            }
        }
    }
    let curves = tracers.iter().zip(&all).zip(lost);
    let curves = curves.filter(|((_, passes), _)| !passes.is_empty());
    let curves = curves.map(|((tracer, passes), lost)| {
        Ok(RateCurve {
            name: tracer.name.to_owned(),
            points: points(passes, empty_ns).context("no time passed")?,
            lost,
        })
    });
    let median = |of: fn(&Made) -> f64| {
        let values: Vec<f64> = untraced.iter().map(of).collect();
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
fn pass(lab: &Lab, running: &Running) -> Result<Vec<At>> {
    let pid = running.pid();
    let each = RATES.map(|rate| {
        let few = rate.is_some_and(|rate| rate < FEW);
        let load = Load {
            rate,
            ..Load::resets(if few { 1.0 } else { 0.5 })
        };
        let own = single::activity(pid)?.0;
        let runs = || {
            programs::of(pid)
                .into_values()
                .fold(Run::default(), Run::add)
        };
        let before = runs();
        let made = churn::run(&lab.churn, load)?;
        let programs = runs().since(before);
        thread::sleep(DRAINED);
        Ok(At {
            made,
            own: (single::activity(pid)?.0 - own) as f64 / 1e9,
            programs,
        })
    });
    each.into_iter().collect()
}

/// The curve of passes with a tracer.
fn points(passes: &[Vec<At>], empty_ns: f64) -> Option<Vec<RatePoint>> {
    let mut points = Vec::new();
    for (index, asked) in RATES.into_iter().enumerate() {
        let (mut rates, mut own, mut kernel) = (Vec::new(), Vec::new(), Vec::new());
        for pass in passes {
            let at = pass[index];
            let connections = at.made.connections as f64;
            let net_ns = at.programs.ns as f64 - empty_ns * at.programs.count as f64;
            rates.push(at.made.per_second);
            own.push(at.own * 1e6 / connections);
            kernel.push(net_ns.max(0.0) / 1e3 / connections);
        }
        let per_second = Spread::of(&rates)?.median;
        if asked.is_some_and(|asked| per_second < f64::from(asked) * KEPT) {
            continue;
        }
        points.push(RatePoint {
            asked,
            per_second,
            own_us: Spread::of(&own)?,
            kernel_us: Spread::of(&kernel)?,
        });
    }
    Some(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_programs_are_not_their_cost() {
        // The limit with a tracer is below 20,000.
        let rates = [1e3, 2e3, 5e3, 1e4, 15e3, 15e3, 15e3];
        let pass = rates.map(|per_second| At {
            made: Made {
                connections: 1000,
                per_second,
                cpu_us_each: 10.0,
            },
            own: 0.002,
            programs: Run {
                count: 8000,
                ns: 3_600_000,
            },
        });
        let points = points(&[pass.to_vec()], 75.0).unwrap();
        let asked: Vec<_> = points.iter().map(|point| point.asked).collect();
        assert_eq!(
            asked,
            [Some(1000), Some(2000), Some(5000), Some(10_000), None],
            "what was not reached is the limit's"
        );
        for point in &points {
            assert_eq!(point.kernel_us.median, 3.0);
            assert_eq!(point.own_us.median, 2.0);
        }
        assert_eq!(points[3].own(), 0.02);
        assert_eq!(points[3].share(), 0.05);
    }
}
