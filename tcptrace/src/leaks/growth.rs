//! How fast a number of sockets grows.

use std::collections::VecDeque;

/// Counts older than this are forgotten.
const WINDOW_NS: u64 = 300_000_000_000;
/// Counts that follow each other faster add nothing.
const APART_NS: u64 = 1_000_000_000;
/// Fewer counts are no trend.
const FEWEST: usize = 5;

/// Counts of the last five minutes.
#[derive(Clone, Debug, Default)]
pub(super) struct Growth {
    counts: VecDeque<(u64, u32)>,
}

impl Growth {
    /// There were `count` at `now`, boot time nanoseconds.
    pub(super) fn add(&mut self, now: u64, count: u32) {
        if let Some((last, _)) = self.counts.back()
            && now.saturating_sub(*last) < APART_NS
        {
            return;
        }
        self.counts.push_back((now, count));
        while let Some((first, _)) = self.counts.front()
            && now.saturating_sub(*first) > WINDOW_NS
        {
            self.counts.pop_front();
        }
    }

    /// How many more a minute, by least squares; `None` while too few counts are known.
    pub(super) fn per_minute(&self) -> Option<f64> {
        if self.counts.len() < FEWEST {
            return None;
        }
        let (first, _) = *self.counts.front()?;
        let points = || {
            self.counts.iter().map(|(time, count)| {
                let minutes = time.saturating_sub(first) as f64 / 60e9;
                (minutes, f64::from(*count))
            })
        };
        let n = self.counts.len() as f64;
        let mean_x = points().map(|(x, _)| x).sum::<f64>() / n;
        let mean_y = points().map(|(_, y)| y).sum::<f64>() / n;
        let covariance: f64 = points().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        let variance: f64 = points().map(|(x, _)| (x - mean_x).powi(2)).sum();
        Some(covariance / variance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn of(counts: &[(u64, u32)]) -> Growth {
        let mut growth = Growth::default();
        for (seconds, count) in counts {
            growth.add(seconds * SECOND, *count);
        }
        growth
    }

    #[test]
    fn a_steady_leak_grows_by_its_rate() {
        let counts: Vec<(u64, u32)> = (0..20).map(|i| (i * 5, i as u32 * 2)).collect();
        let rate = of(&counts).per_minute().unwrap();
        assert!((rate - 24.0).abs() < 1e-9, "{rate}");
    }

    #[test]
    fn one_that_stands_still_does_not_grow() {
        let counts: Vec<(u64, u32)> = (0..20).map(|i| (i * 5, 7)).collect();
        assert_eq!(of(&counts).per_minute(), Some(0.0));
    }

    #[test]
    fn a_few_counts_are_no_trend() {
        assert_eq!(of(&[]).per_minute(), None);
        assert_eq!(of(&[(0, 1), (5, 2), (10, 3), (15, 4)]).per_minute(), None);
    }

    #[test]
    fn what_was_before_the_last_five_minutes_does_not_count() {
        let mut counts: Vec<(u64, u32)> = (0..60).map(|i| (i * 5, 1000 - i as u32 * 10)).collect();
        counts.extend((61..140).map(|i| (i * 5, 3)));
        assert_eq!(of(&counts).per_minute(), Some(0.0));
    }

    #[test]
    fn counts_in_a_burst_are_one() {
        let mut growth = Growth::default();
        for i in 0..1000 {
            growth.add(i * 1_000_000, 1);
        }
        assert_eq!(growth.per_minute(), None);
    }
}
