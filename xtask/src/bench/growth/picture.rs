//! Curves as pictures: SVG, dark on white, so that they can be read on a page of either kind.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::law::{Law, Point};

const SIZE: (u32, u32) = (760, 440);
/// Told apart by those who see few colours as well (Okabe and Ito).
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 86, 86),
];
const INK: RGBColor = RGBColor(36, 41, 47);
const GRID: RGBColor = RGBColor(223, 227, 232);

/// A curve: what was measured, and the law.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<Point>,
    pub(super) law: Option<Law>,
}

/// A picture of curves, with both axes logarithmic.
pub(super) struct Picture<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) curves: &'a [Curve],
}

impl Picture<'_> {
    /// As SVG; `None` without a point.
    ///
    /// # Errors
    /// When it cannot be drawn.
    pub(super) fn svg(&self) -> Result<Option<String>> {
        let all = || self.curves.iter().flat_map(|curve| &curve.points);
        // On a logarithmic axis there is no place for anything else.
        let shown = |point: &&Point| point.0 > 0.0 && point.1 > 0.0;
        let Some(x) = decades(all().filter(shown).map(|point| point.0)) else {
            return Ok(None);
        };
        let Some(y) = decades(all().filter(shown).map(|point| point.1)) else {
            return Ok(None);
        };
        let mut svg = String::new();
        self.draw(&mut svg, x, y)
            .map_err(|error| anyhow!("{}: {error}", self.title))?;
        Ok(Some(svg))
    }

    fn draw(
        &self,
        svg: &mut String,
        x: (f64, f64),
        y: (f64, f64),
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, text(17))
            .margin(12)
            .margin_right(28)
            .x_label_area_size(46)
            .y_label_area_size(78)
            .build_cartesian_2d((x.0..x.1).log_scale(), (y.0..y.1).log_scale())?;
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .axis_desc_style(text(14))
            .label_style(text(13))
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|value| axis(*value))
            .y_label_formatter(&|value| axis(*value))
            .draw()?;
        for (curve, colour) in self.curves.iter().zip(COLOURS.iter().cycle()) {
            let points = curve.points.iter().copied();
            let points: Vec<Point> = points.filter(|(x, y)| *x > 0.0 && *y > 0.0).collect();
            let Some((from, to)) = ends(points.iter().map(|point| point.0)) else {
                continue;
            };
            if let Some(law) = curve.law {
                let steps = 48;
                let at = |step: i32| from * (to / from).powf(f64::from(step) / f64::from(steps));
                let line = (0..=steps).map(|step| (at(step), law.at(at(step))));
                // The picture ends where the decades do; a law may begin below.
                let line = line.filter(|(_, value)| *value >= y.0 && *value <= y.1);
                chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
            }
            let marks = points
                .iter()
                .map(|point| Circle::new(*point, 4, colour.filled()));
            chart
                .draw_series(marks)?
                .label(&curve.name)
                .legend(move |(x, y)| Circle::new((x + 10, y), 4, colour.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE)
            .border_style(GRID)
            .label_font(text(13))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

/// The least and the greatest.
fn ends(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |ends, value| match ends {
        None => Some((value, value)),
        Some((low, high)) => Some((value.min(low), value.max(high))),
    })
}

/// The decades that hold all values. One that is a little outside gets no decade of its own.
fn decades(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    const LITTLE: f64 = 0.05;
    /// So that the first and the last have a label, however they were rounded.
    const ROUNDING: f64 = 1e-9;
    let (low, high) = ends(values)?;
    let from = (low.log10() + LITTLE).floor();
    let to = (high.log10() - LITTLE).ceil().max(from + 1.0);
    let from = low.min(10_f64.powf(from)) * (1.0 - ROUNDING);
    let to = high.max(10_f64.powf(to)) * (1.0 + ROUNDING);
    Some((from, to))
}

/// A number at an axis.
fn axis(value: f64) -> String {
    let large = |value: f64, unit: &str| format!("{}{unit}", round(value));
    match value {
        value if value >= 1e9 => large(value / 1e9, " G"),
        value if value >= 1e6 => large(value / 1e6, " M"),
        value if value >= 1e3 => large(value / 1e3, " k"),
        value => round(value),
    }
}

/// Three digits, and no zeros behind.
fn round(value: f64) -> String {
    if value >= 1.0 {
        return format!("{}", (value * 100.0).round() / 100.0);
    }
    let digits = (2.0 - value.log10().floor()).clamp(0.0, 12.0) as usize;
    let text = format!("{value:.digits$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_is_whole_decades() {
        let near = |found: Option<(f64, f64)>, low: f64, high: f64| {
            let (a, b) = found.unwrap();
            assert!((a / low - 1.0).abs() < 1e-6 && (b / high - 1.0).abs() < 1e-6);
        };
        near(decades([990.0, 1.005e6].into_iter()), 990.0, 1.005e6);
        near(decades([1e3, 95e3].into_iter()), 1e3, 1e5);
        near(decades([0.02, 3.0].into_iter()), 0.01, 10.0);
        near(decades([1e3].into_iter()), 1e3, 1e4);
        assert_eq!(decades(std::iter::empty()), None);
    }

    #[test]
    fn numbers_at_an_axis() {
        assert_eq!(axis(0.001), "0.001");
        assert_eq!(axis(0.1), "0.1");
        assert_eq!(axis(10.0), "10");
        assert_eq!(axis(1e3), "1 k");
        assert_eq!(axis(1e6), "1 M");
        assert_eq!(axis(1e10), "10 G");
    }

    #[test]
    fn marks_and_a_line() {
        let points = vec![(1e3, 1.0), (1e4, 2.0), (1e5, 0.0)];
        let curve = |law| Curve {
            name: "a & b".to_owned(),
            points: points.clone(),
            law,
        };
        let draw = |law| {
            let curves = [curve(law)];
            let picture = Picture {
                title: "costs",
                x: "rate (1/s)",
                y: "CPU (%)",
                curves: &curves,
            };
            picture.svg().unwrap().unwrap()
        };
        let (with, without) = (draw(Law::of(&points[..2])), draw(None));
        // Two marks and one in the legend: zero has no place.
        assert_eq!(without.matches("<circle").count(), 3);
        assert_eq!(
            without.matches("<polyline").count() + 1,
            with.matches("<polyline").count()
        );
        for text in ["costs", "rate (1/s)", "CPU (%)", "a &amp; b"] {
            assert!(with.contains(text), "{text}");
        }
    }
}
