//! `docs/growth.md`: the curves, for people.

use std::fmt::Write as _;

use anyhow::Result;

use super::{
    figures::{Against, Growth, Look, RateCurve},
    law::{Law, Point},
    paper,
    picture::{Curve, Picture},
};
use crate::bench::page::measured;
pub(super) use crate::bench::page::table;

const RATE: &str = "rate";
const MEMORY: &str = "memory";
const SOCKETS: &str = "sockets";
const DESCRIPTORS: &str = "descriptors";

/// Where a picture is, from `docs/` on.
pub(super) fn path(name: &str) -> String {
    format!("pictures/growth-{name}.svg")
}

/// Of one core, percent, by connections a second.
fn rate_points(curve: &RateCurve) -> Vec<Point> {
    let points = curve.points.iter();
    let points = points.map(|point| (point.per_second, point.share() * 100.0));
    // What is added can be less than nothing by chance.
    points.filter(|(_, share)| *share > 0.0).collect()
}

fn memory_points(growth: &Growth) -> Vec<Point> {
    let memory = growth.memory.iter();
    let points = memory.map(|memory| (memory.connections as f64, memory.bytes as f64));
    points.filter(|(_, bytes)| *bytes > 0.0).collect()
}

/// Bytes, by tracked connections.
pub(super) fn memory_law(growth: &Growth) -> Option<Law> {
    Law::of(&memory_points(growth))
}

fn look_points(look: &Look) -> Vec<Point> {
    let points = look.points.iter();
    points
        .map(|point| (point.count as f64, point.wall.median))
        .collect()
}

/// Seconds, by what there is to look at.
pub(super) fn look_law(growth: &Growth, name: &str, against: Against) -> Option<Law> {
    let mut looks = growth.looks.iter();
    let look = looks.find(|look| look.name == name && look.against == against)?;
    Law::of(&look_points(look))
}

/// A look as it is called where more than one kind of thing is counted.
fn look_name(look: &Look) -> String {
    match look.against {
        Against::Sockets => look.name.clone(),
        Against::SocketDescriptors => format!("{}, descriptors of sockets", look.name),
        Against::FileDescriptors => format!("{}, of other files", look.name),
    }
}

fn looks(growth: &Growth, of_sockets: bool) -> impl Iterator<Item = &Look> {
    let fits = move |look: &&Look| (look.against == Against::Sockets) == of_sockets;
    growth.looks.iter().filter(fits)
}

/// All that have a point, by name.
pub(super) fn pictures(growth: &Growth) -> Result<Vec<(&'static str, String)>> {
    let curve = |name: String, points: Vec<Point>| Curve {
        name,
        law: Law::of(&points),
        points,
    };
    let rates = growth.rates.curves.iter();
    let rates: Vec<Curve> = rates
        .map(|of| curve(of.name.clone(), rate_points(of)))
        .collect();
    let megabytes = |(x, bytes): Point| (x, bytes / 1e6);
    let memory = memory_points(growth).into_iter().map(megabytes).collect();
    let memory = [curve("the tracker".to_owned(), memory)];
    let of = |of_sockets| -> Vec<Curve> {
        looks(growth, of_sockets)
            .map(|look| curve(look_name(look), look_points(look)))
            .collect()
    };
    let (sockets, descriptors) = (of(true), of(false));
    let mut drawn = Vec::new();
    for (name, title, x, y, curves) in [
        (
            RATE,
            "CPU time of tracing",
            "connections a second",
            "of one core (%)",
            &rates[..],
        ),
        (
            MEMORY,
            "Memory of the tracker",
            "tracked connections",
            "memory (MB)",
            &memory[..],
        ),
        (
            SOCKETS,
            "One look at all sockets",
            "sockets",
            "time (s)",
            &sockets[..],
        ),
        (
            DESCRIPTORS,
            "Who holds them",
            "open descriptors",
            "time (s)",
            &descriptors[..],
        ),
    ] {
        let picture = Picture {
            title,
            x,
            y,
            curves,
        };
        drawn.extend(picture.svg()?.map(|svg| (name, svg)));
    }
    Ok(drawn)
}

/// The page, as Markdown, with these pictures.
pub(super) fn page(growth: &Growth, pictures: &[(&'static str, String)]) -> String {
    let mut page = "\
# How it grows

Made by `cargo xtask bench --only growth --write` from [growth.json](growth.json), which it writes as well, with the
pictures: nothing here is written by hand. What it costs at one point, beside other tools, is on
[another page](performance.md). Circles are measured; a line is the law, a + b·n, that fits them best by the least
squares of relative deviations, so that small and large points count the same. With each law: by how much of it a
measured point is off at most, and R².

"
    .to_owned();
    page.push_str(&measured(&growth.machine));
    let picture = |page: &mut String, name: &str, says: &str| {
        if pictures.iter().any(|(drawn, _)| *drawn == name) {
            let _ = write!(page, "![{says}]({})\n\n", path(name));
        }
    };
    rates(&mut page, growth, &picture);
    memory(&mut page, growth, &picture);
    sockets(&mut page, growth, &picture);
    descriptors(&mut page, growth, &picture);
    paper::section(&mut page, growth);
    if !growth.left_out.is_empty() {
        page.push_str("\n## Left out\n\n");
        for left_out in &growth.left_out {
            let _ = writeln!(page, "- {}: {}", left_out.what, left_out.why);
        }
    }
    page
}

type Embed<'a> = dyn Fn(&mut String, &str, &str) + 'a;

fn rates(page: &mut String, growth: &Growth, picture: &Embed<'_>) {
    let rates = &growth.rates;
    page.push_str("\n## Connections a second\n\n");
    picture(
        page,
        RATE,
        "CPU time of tracing against connections a second",
    );
    let _ = write!(
        page,
        "One thread opens, accepts and closes (with a reset) connections on the loopback interface, at a rate that is \
         kept by deadlines: those that are due within a millisecond come one after the other. The last point of each \
         is as fast as the machine goes. Tracers write to a file in memory. What it costs is the CPU time of the \
         tracer and that of its programs in the kernel, by the kernel's statistics and without what those take \
         themselves; medians of {} runs. (What whoever connects takes longer is more than its programs: the way to \
         them, and caches. It is a small difference of two large figures, which a noisy machine hides: [what it \
         costs](performance.md) has it, as fast as the machine goes.) Without a tracer, it is {:.0} connections a \
         second at most, of {} µs each.\n\n",
        rates.rounds,
        rates.limit,
        digits(rates.untraced_us),
    );
    let rows = rates.curves.iter().flat_map(|curve| {
        curve.points.iter().map(|point| {
            let most = if point.asked.is_none() {
                ", at most"
            } else {
                ""
            };
            [
                curve.name.clone(),
                format!("{:.0}{most}", point.per_second),
                digits(point.own_us.median),
                digits(point.kernel_us.median),
                percent(point.share()),
            ]
        })
    });
    let head = [
        "with",
        "connections/s",
        "its own µs each",
        "its programs' µs each",
        "of one core",
    ];
    table(page, head, rows);
    page.push('\n');
    let rows = rates.curves.iter().map(|curve| {
        let [law, deviation, explained] = said(&rate_points(curve), |law| {
            format!(
                "{} % + {} % for each 1,000",
                digits(law.fixed),
                digits(law.each * 1e3)
            )
        });
        [
            curve.name.clone(),
            law,
            deviation,
            explained,
            curve.lost.to_string(),
        ]
    });
    let head = ["with", "of one core", "off at most", "R²", "events lost"];
    table(page, head, rows);
}

fn memory(page: &mut String, growth: &Growth, picture: &Embed<'_>) {
    page.push_str("\n## Memory\n\n");
    picture(
        page,
        MEMORY,
        "Memory of the tracker against tracked connections",
    );
    page.push_str(
        "Resident memory of the tracker by itself, with so many open connections. Its tables double, so between two \
         points it goes in steps.\n\n",
    );
    let rows = growth.memory.iter().map(|memory| {
        [
            memory.connections.to_string(),
            format!("{} MB", digits(memory.bytes as f64 / 1e6)),
            digits(memory.bytes as f64 / memory.connections as f64),
        ]
    });
    table(page, ["connections", "memory", "bytes each"], rows);
    let [law, deviation, explained] = said(&memory_points(growth), |law| {
        format!(
            "{} kB + {} bytes for each connection",
            digits(law.fixed / 1e3),
            digits(law.each)
        )
    });
    let _ = writeln!(
        page,
        "\nThe law: {law}; off by {deviation} at most, R² {explained}."
    );
}

fn sockets(page: &mut String, growth: &Growth, picture: &Embed<'_>) {
    page.push_str("\n## One look at all sockets\n\n");
    picture(page, SOCKETS, "Time of one look against sockets");
    page.push_str(
        "Processes that hold a thousand sockets each, half of them in CLOSE_WAIT, half in FIN_WAIT2. Times are those of \
         whole commands. `states` asks the kernel for all sockets, and reads nothing else. `leaks --once` looks twice, \
         with a second between, and asks who holds what leaks, which is half of the sockets here. `ss -tan` prints \
         them.\n\n",
    );
    look_tables(page, "sockets", looks(growth, true));
}

fn descriptors(page: &mut String, growth: &Growth, picture: &Embed<'_>) {
    page.push_str("\n## Who holds them\n\n");
    picture(
        page,
        DESCRIPTORS,
        "Time of a look with holders against descriptors",
    );
    page.push_str(
        "`states --by process` reads the descriptors of all processes. Once nearly all descriptors are of sockets, the \
         same as above; once nearly all are of another file, and each process, of a thousand descriptors, has two \
         sockets.\n\n",
    );
    look_tables(page, "descriptors", looks(growth, false));
}

fn look_tables<'a>(page: &mut String, what: &str, looks: impl Iterator<Item = &'a Look>) {
    let looks: Vec<&Look> = looks.collect();
    let rows = looks.iter().flat_map(|look| {
        let name = look_name(look);
        look.points.iter().map(move |point| {
            [
                name.clone(),
                point.count.to_string(),
                format!("{} s", digits(point.wall.median)),
                format!("{} s", digits(point.cpu.median)),
            ]
        })
    });
    table(page, ["command", what, "time", "CPU time"], rows);
    page.push('\n');
    let rows = looks.iter().map(|look| {
        let [law, deviation, explained] = said(&look_points(look), |law| {
            format!(
                "{} ms + {} µs for each",
                digits(law.fixed * 1e3),
                digits(law.each * 1e6)
            )
        });
        [look_name(look), law, deviation, explained]
    });
    table(page, ["command", "time", "off at most", "R²"], rows);
}

/// More than this off, and the points are on no line.
const NO_LINE: f64 = 0.3;

/// The law of points, by how much they are off, and R².
fn said(points: &[Point], text: impl Fn(Law) -> String) -> [String; 3] {
    let Some(law) = Law::of(points) else {
        return ["-".to_owned(), "-".to_owned(), "-".to_owned()];
    };
    let mut said = text(law);
    if let [.., before, last] = points
        && law.deviation > NO_LINE
    {
        let _ = write!(
            said,
            ", but points are far off: at the end, {} times as many cost {} times as much",
            digits(last.0 / before.0),
            digits(last.1 / before.1)
        );
    }
    let deviation = percent(law.deviation);
    [said, deviation, format!("{:.3}", law.explained)]
}

/// Three digits of a number, no zeros behind.
pub(super) fn digits(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 {
        return format!("{value:.0}");
    }
    if size < 1e-9 {
        return "0".to_owned();
    }
    let places = (2.0 - size.log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.places$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// A share.
pub(super) fn percent(share: f64) -> String {
    format!("{} %", digits(share * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        growth::figures::{LookPoint, RatePoint},
        results::{LeftOut, Memory},
        spread::Spread,
    };

    fn same(value: f64) -> Spread {
        Spread::of(&[value]).unwrap()
    }

    fn growth() -> Growth {
        let memory = |connections: u64| Memory {
            connections,
            bytes: 50_000 + 100 * connections,
            peak_bytes: 0,
        };
        let look = |count: u64| LookPoint {
            count,
            wall: same(0.005 + 2e-6 * count as f64),
            cpu: same(0.001),
        };
        let mut growth = Growth {
            memory: [1000, 10_000, 100_000].map(memory).to_vec(),
            looks: vec![Look {
                name: "tcptrace states".to_owned(),
                against: Against::Sockets,
                points: [1000, 10_000, 100_000].map(look).to_vec(),
            }],
            left_out: vec![LeftOut {
                what: "looks at 1000000 sockets".to_owned(),
                why: "too little memory".to_owned(),
            }],
            ..Growth::default()
        };
        let point = |asked: Option<u32>, per_second: f64, kernel| RatePoint {
            asked,
            per_second,
            own_us: same(3.0),
            kernel_us: same(kernel),
        };
        growth.rates.curves.push(RateCurve {
            name: "one".to_owned(),
            points: vec![
                point(Some(1000), 1000.0, -4.0),
                point(Some(10_000), 10_000.0, 1.0),
                point(None, 90_000.0, 1.0),
            ],
            lost: 7,
        });
        growth
    }

    #[test]
    fn laws_are_said_with_what_they_are_worth() {
        let page = page(&growth(), &[]);
        for line in [
            // What is below zero by chance is in the table, and not in the law.
            "| one | 1000 | 3 | -4 | -0.1 % |",
            "| one | 90000, at most | 3 | 1 | 36 % |",
            "| one | 0 % + 0.4 % for each 1,000 | 0 % | 1.000 | 7 |",
            "The law: 50 kB + 100 bytes for each connection; off by 0 % at most, R² 1.000.",
            "| tcptrace states | 5 ms + 2 µs for each | 0 % | 1.000 |",
            "- looks at 1000000 sockets: too little memory",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }

    #[test]
    fn what_is_no_line_is_called_so() {
        let law = |law: Law| digits(law.each);
        let [line, ..] = said(&[(1e3, 1e3), (1e4, 1e4), (1e5, 1.2e5)], law);
        assert!(!line.contains("far off"), "{line}");
        let [square, ..] = said(&[(1e3, 1e3), (1e4, 1e4), (1e5, 1e6)], law);
        assert!(
            square.ends_with("at the end, 10 times as many cost 100 times as much"),
            "{square}"
        );
    }

    #[test]
    fn only_pictures_that_were_drawn_are_shown() {
        let growth = growth();
        let drawn = pictures(&growth).unwrap();
        let names: Vec<_> = drawn.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, [RATE, MEMORY, SOCKETS]);
        let page = page(&growth, &drawn);
        assert!(page.contains("](pictures/growth-sockets.svg)"));
        assert!(!page.contains("growth-descriptors.svg"));
    }

    #[test]
    fn three_digits() {
        assert_eq!(digits(1234.4), "1234");
        assert_eq!(digits(12.34), "12.3");
        assert_eq!(digits(3.0), "3");
        assert_eq!(digits(0.001_234), "0.00123");
        assert_eq!(digits(0.0), "0");
        assert_eq!(digits(-0.5), "-0.5");
        assert_eq!(digits(100.4), "100");
    }
}
