//! What several measurements of the same thing say.

use serde::{Deserialize, Serialize};

/// The middle of several measurements, and how far they are apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    /// Half are above, half below.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Spread {
    /// Of these; `None` of none, and if one is not a number.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        if sorted.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max })
    }
}

/// What traced runs left of the rate, each against the mean of the untraced runs just before and after it, so
/// that a machine that becomes slower meanwhile is not taken for a cost. `untraced` has one more than `traced`.
pub(crate) fn ratios(untraced: &[f64], traced: &[f64]) -> Vec<f64> {
    let around = untraced
        .windows(2)
        .map(|pair| f64::midpoint(pair[0], pair[1]));
    traced
        .iter()
        .zip(around)
        .map(|(with, without)| with / without)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_both_ends() {
        let spread = |values: &[f64]| Spread::of(values).map(|s| (s.median, s.min, s.max));
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 10.0]), Some((3.0, 1.0, 10.0)));
        assert_eq!(spread(&[7.0]), Some((7.0, 7.0, 7.0)));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[1.0, f64::NAN]), None);
        assert_eq!(spread(&[1.0, f64::INFINITY]), None);
    }

    #[test]
    fn a_machine_that_slows_down_is_no_cost() {
        // Twice as slow every time, and a tracer that takes a tenth.
        let ratios = ratios(&[120.0, 80.0, 40.0], &[90.0, 54.0]);
        assert_eq!(ratios, [0.9, 0.9]);
    }
}
