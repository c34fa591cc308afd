//! The law that a curve follows: what it costs at all, and what each more of something costs.

use serde::{Deserialize, Serialize};

/// A point of a curve.
pub(super) type Point = (f64, f64);

/// `y = fixed + each * x`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Law {
    pub(super) fixed: f64,
    pub(super) each: f64,
    /// By how much of the law a measured point is off, at most.
    pub(super) deviation: f64,
    /// How much of the differences between points, each weighted as it was for the fit, the law explains: R².
    pub(super) explained: f64,
}

impl Law {
    /// The law that fits best, by least squares of relative deviations: points that are a thousand times apart
    /// count the same. `None` of fewer than two points, of points that are all at one `x`, and of a cost that is
    /// not above zero.
    pub(super) fn of(points: &[Point]) -> Option<Self> {
        if points.iter().any(|(x, y)| !x.is_finite() || *y <= 0.0) {
            return None;
        }
        let both = fit(points, false)?;
        // Less than nothing at all is not a cost: then it is `each` alone.
        let (fixed, each) = if both.0 >= 0.0 {
            both
        } else {
            fit(points, true)?
        };
        let at = |x: f64| fixed + each * x;
        let deviation = points.iter().map(|(x, y)| (y / at(*x) - 1.0).abs());
        let deviation = deviation.fold(0.0, f64::max);
        let sum = |each: &dyn Fn(f64, f64) -> f64| -> f64 {
            points.iter().map(|(x, y)| each(*x, *y) / (y * y)).sum()
        };
        let mean = sum(&|_, y| y) / sum(&|_, _| 1.0);
        let left = sum(&|x, y| (y - at(x)).powi(2));
        let all = sum(&|_, y| (y - mean).powi(2));
        Some(Self {
            fixed,
            each,
            deviation,
            explained: 1.0 - left / all,
        })
        .filter(|law| law.each.is_finite() && law.deviation.is_finite())
    }

    pub(super) fn at(self, x: f64) -> f64 {
        self.fixed + self.each * x
    }
}

/// `fixed` and `each`; with `through_zero`, `fixed` is zero.
fn fit(points: &[Point], through_zero: bool) -> Option<(f64, f64)> {
    let sum = |each: &dyn Fn(f64, f64) -> f64| -> f64 {
        points.iter().map(|(x, y)| each(*x, *y) / (y * y)).sum()
    };
    let (one, x, y) = (sum(&|_, _| 1.0), sum(&|x, _| x), sum(&|_, y| y));
    let (xx, xy) = (sum(&|x, _| x * x), sum(&|x, y| x * y));
    let (fixed, each) = if through_zero {
        (0.0, xy / xx)
    } else {
        let determinant = one * xx - x * x;
        // Nothing but rounding is left of it where all points are at one x.
        if determinant <= one * xx * 1e-12 {
            return None;
        }
        let each = (one * xy - x * y) / determinant;
        ((y - each * x) / one, each)
    };
    (fixed.is_finite() && each.is_finite()).then_some((fixed, each))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) {
        assert!(
            (found - expected).abs() <= 1e-9 * expected.abs().max(1.0),
            "{found} is not {expected}"
        );
    }

    #[test]
    fn a_line_is_found() {
        let points = [1e3, 1e4, 1e5, 1e6].map(|x| (x, 0.5 + 3e-6 * x));
        let law = Law::of(&points).unwrap();
        near(law.fixed, 0.5);
        near(law.each, 3e-6);
        near(law.deviation, 0.0);
        near(law.explained, 1.0);
        near(law.at(2e6), 6.5);
    }

    #[test]
    fn small_costs_count_as_much_as_large_ones() {
        // A tenth too much at the top: with plain least squares the bottom would be wrong by more than half.
        let law = Law::of(&[(1e3, 2.0), (1e4, 11.0), (1e5, 101.0), (1e6, 1101.0)]).unwrap();
        assert!((law.at(1e3) / 2.0 - 1.0).abs() < 0.05, "{law:?}");
        assert!(law.deviation > 0.03 && law.deviation < 0.1, "{law:?}");
        assert!(law.explained > 0.98 && law.explained < 1.0, "{law:?}");
    }

    #[test]
    fn nothing_costs_less_than_nothing() {
        let law = Law::of(&[(1.0, 0.5), (2.0, 2.0), (3.0, 4.0)]).unwrap();
        near(law.fixed, 0.0);
        assert!(law.each > 0.5, "{law:?}");
    }

    #[test]
    fn without_two_places_there_is_no_law() {
        assert_eq!(Law::of(&[]), None);
        assert_eq!(Law::of(&[(1.0, 1.0)]), None);
        assert_eq!(Law::of(&[(7.0, 1.0), (7.0, 2.0)]), None);
        assert_eq!(Law::of(&[(1.0, 0.0), (2.0, 1.0)]), None);
    }
}
