//! What tcptrace says, held against what is true.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::LazyLock,
};

use serde_json::Value;
use tests::{HERTZ, Line, Lines, kernel_is_at_least, realtime_of_boottime};

use crate::{
    stage::Window,
    story::{End, Owner, Step},
};

/// By how much a time may lie outside of what the story allows: two jiffies, where the kernel's timers are
/// all that tells, and what a busy machine needs to get from the cause to the effect. `TESTS_SAME_MS` says
/// how long that is.
static SLACK: LazyLock<i64> = LazyLock::new(|| {
    let milliseconds =
        std::env::var("TESTS_SAME_MS").map_or(20, |text| text.parse::<i64>().expect("a number"));
    2_000_000_000 / *HERTZ + milliseconds * 1_000_000
});

/// The lines about each socket, by cookie.
pub(crate) struct Shown<'a> {
    transitions: BTreeMap<&'a str, Vec<&'a Line>>,
    rests: Option<BTreeMap<&'a str, Vec<&'a Line>>>,
    /// Leaked sockets with their leaks.
    leaked: BTreeMap<&'a str, (&'a Value, &'a Value)>,
}

impl<'a> Shown<'a> {
    /// Only what `stream` shows.
    pub(crate) fn of_stream(stream: &'a Lines) -> Self {
        Self {
            transitions: by_socket(stream, "transition"),
            rests: None,
            leaked: BTreeMap::new(),
        }
    }

    /// `leaks`: the lines of one report.
    pub(crate) fn new(stream: &'a Lines, timewait: &'a Lines, leaks: &[&'a Line]) -> Self {
        let mut shown = Self {
            transitions: by_socket(stream, "transition"),
            rests: Some(by_socket(timewait, "time_wait")),
            leaked: BTreeMap::new(),
        };
        for leak in leaks {
            for sample in leak.value["samples"].as_array().expect("a list") {
                shown.leaked.insert(cookie(sample), (sample, &leak.value));
            }
        }
        shown
    }

    /// Every socket, and a line about it.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&'a str, &'a Line)> {
        let all = self.transitions.iter().chain(self.rests.iter().flatten());
        all.map(|(cookie, lines)| (*cookie, lines[0]))
    }

    fn find(&self, end: &End) -> Option<&'a str> {
        if let Some(cookie) = &end.cookie {
            return self
                .transitions
                .get_key_value(cookie.as_str())
                .map(|(key, _)| *key);
        }
        // It could not connect, and nobody else has tried to connect there.
        let begins = |lines: &[&Line]| {
            lines[0].change() == "CLOSE > SYN_SENT"
                && lines[0].value["netns"] == end.netns
                && Some(lines[0].pair().remote) == end.remote
        };
        self.transitions
            .iter()
            .find(|(_, lines)| begins(lines))
            .map(|(key, _)| *key)
    }
}

/// The lines of this event, those of each socket in order.
fn by_socket<'a>(lines: &'a Lines, event: &str) -> BTreeMap<&'a str, Vec<&'a Line>> {
    let mut sockets = BTreeMap::<_, Vec<_>>::new();
    for line in lines.events(event) {
        sockets.entry(cookie(&line.value)).or_default().push(line);
    }
    sockets
}

fn cookie(value: &Value) -> &str {
    value["socket"].as_str().expect("a cookie")
}

/// What was found about one socket.
#[derive(Default)]
pub(crate) struct Findings {
    /// By aspect: what is wrong, if it is.
    pub(crate) aspects: Vec<(&'static str, Option<String>)>,
    /// How TIME_WAIT ended, and by how many seconds its dwell may be wrong at most.
    pub(crate) dwell: Option<(&'static str, f64)>,
    /// The socket that was found.
    pub(crate) cookie: Option<String>,
}

impl Findings {
    pub(crate) fn wrong(&self) -> usize {
        self.aspects
            .iter()
            .filter(|(_, wrong)| wrong.is_some())
            .count()
    }

    fn add(&mut self, aspect: &'static str, wrong: Option<String>) {
        self.aspects.push((aspect, wrong));
    }
}

/// All that is true of an end, and what is said of it.
pub(crate) fn judge(end: &End, shown: &Shown<'_>) -> Findings {
    let mut findings = Findings::default();
    let found = shown.find(end);
    let none = Vec::new();
    let lines = found.map_or(&none, |cookie| &shown.transitions[cookie]);
    findings.cookie = found.map(str::to_owned);
    if end.elsewhere {
        let wrong = (!lines.is_empty()).then(|| "it was not asked for".to_owned());
        findings.add("silence", wrong);
        return findings;
    }
    let steps = steps(end);
    if let Some(wrong) = sequence(&steps, lines) {
        findings.add("sequence", Some(wrong));
    } else {
        findings.add("sequence", None);
        let first = |judge: fn(&Step, &Line) -> Option<String>| {
            let mut pairs = steps.iter().zip(lines);
            pairs.find_map(|(step, line)| judge(step, line).map(|wrong| format!("{wrong}: {line}")))
        };
        findings.add("time", first(time).or_else(|| durations(lines)));
        findings.add("owner", first(|step, line| owner(&step.owner, &line.value)));
        findings.add("address", first(|step, line| addresses(step, &line.value)));
        findings.add("error", first(error));
        let strays = lines.iter().find(|line| line.value["netns"] != end.netns);
        findings.add(
            "namespace",
            strays.map(|line| format!("{} expected: {line}", end.netns)),
        );
    }
    if let Some(rests) = &shown.rests {
        let rests = end.cookie.as_deref().and_then(|cookie| rests.get(cookie));
        rest(end, rests.map_or(&[], Vec::as_slice), &mut findings);
        leak(end, shown, &mut findings);
    }
    findings
}

/// What a story says, and the end of TIME_WAIT.
fn steps(end: &End) -> Vec<Step> {
    let mut steps = end.steps.clone();
    if let (Some(rest), Some(last)) = (&end.rest, end.steps.last())
        && last.to == "TIME_WAIT"
    {
        steps.push(Step {
            from: "TIME_WAIT",
            to: "CLOSE",
            window: rest.ended.unwrap_or(last.window),
            ..last.clone()
        });
    }
    steps
}

fn sequence(steps: &[Step], lines: &[&Line]) -> Option<String> {
    let expected: Vec<_> = steps
        .iter()
        .map(|step| format!("{} > {}", step.from, step.to))
        .collect();
    let changes: Vec<_> = lines.iter().map(|line| line.change()).collect();
    (expected != changes).then(|| {
        format!(
            "expected {}\n      got      {}",
            expected.join(", "),
            changes.join(", ")
        )
    })
}

/// How many nanoseconds a time of day is outside of the window.
fn outside(time: i64, window: Window) -> Option<String> {
    let (from, to) = (
        realtime_of_boottime(window.from),
        realtime_of_boottime(window.to),
    );
    let milliseconds = |ns: i64| ns as f64 / 1e6;
    if time < from - *SLACK {
        Some(format!("{:.1} ms too early", milliseconds(from - time)))
    } else if time > to + *SLACK {
        Some(format!("{:.1} ms too late", milliseconds(time - to)))
    } else {
        None
    }
}

fn time(step: &Step, line: &Line) -> Option<String> {
    outside(line.time("time"), step.window)
}

/// Each duration must be the time since the line before.
fn durations(lines: &[&Line]) -> Option<String> {
    let first = lines.first()?;
    if !first.value["after_seconds"].is_null() {
        return Some(format!("nobody knows when that began: {first}"));
    }
    lines.windows(2).find_map(|pair| {
        // How long a socket was unused nobody asks.
        if pair[1].value["from"] == "CLOSE" {
            return None;
        }
        let between = (pair[1].time("time") - pair[0].time("time")) as f64 / 1e9;
        let told = pair[1].value["after_seconds"].as_f64();
        // A look told when TIME_WAIT began, and its end knows better.
        let late = pair[0].value["late"] == true && pair[1].value["from"] == "TIME_WAIT";
        let off = if late { *SLACK as f64 / 1e9 } else { 1e-5 };
        let right = told.is_some_and(|told| between >= 0.0 && (told - between).abs() < off);
        (!right).then(|| format!("{between} s after the line before: {}", pair[1]))
    })
}

fn owner(owner: &Owner, line: &Value) -> Option<String> {
    let told = &line["owner"];
    // A look can be faster than a record: then it shows who has accepted the connection since.
    let via = told["via"] == owner.via || owner.via == "listener" && told["via"] == "holder";
    let right = told["pid"] == owner.who.pid && told["comm"] == owner.who.comm && via;
    let Owner { who, via } = owner;
    (!right).then(|| format!("{} {} via {via} expected", who.pid, who.comm))
}

fn addresses(step: &Step, line: &Value) -> Option<String> {
    let wrong = |key: &str, expected: Option<std::net::SocketAddr>| {
        let expected = expected?;
        let told = &line[key];
        let right = told["addr"] == expected.ip().to_string() && told["port"] == expected.port();
        (!right).then(|| format!("{key} {expected} expected"))
    };
    wrong("local", step.local).or_else(|| wrong("remote", step.remote))
}

fn error(step: &Step, line: &Line) -> Option<String> {
    let right = line.value["error"].as_str() == step.error;
    (!right).then(|| format!("error {:?} expected", step.error))
}

/// TIME_WAIT of an end.
fn rest(end: &End, lines: &[&Line], findings: &mut Findings) {
    let Some(rest) = &end.rest else {
        findings.add(
            "ending",
            lines
                .first()
                .map(|line| format!("it was never in TIME_WAIT: {line}")),
        );
        return;
    };
    let [line] = lines else {
        findings.add(
            "ending",
            Some(format!("{} lines of its TIME_WAIT", lines.len())),
        );
        return;
    };
    let value = &line.value;
    let with = |wrong: Option<String>| wrong.map(|wrong| format!("{wrong}: {line}"));
    let ending = (value["end"] != rest.ending).then(|| format!("{} expected", rest.ending));
    findings.add("ending", with(ending));
    let last = end.steps.last().expect("the step to TIME_WAIT");
    findings.add("owner", with(owner(&last.owner, value)));
    findings.add("address", with(addresses(last, value)));
    if rest.ending == "skipped" {
        let right = value["dwell_seconds"] == 0.0 && value["entered"].is_null();
        findings.add("dwell", with((!right).then(|| "it never was".to_owned())));
        return;
    }
    let Some(ended) = rest.ended else {
        findings.add("dwell", Some("nobody saw its end".to_owned()));
        return;
    };
    // Without a stamp (before 6.14), timers alone do not tell a minute that began from one that began again.
    let at_least = value["dwell_at_least"] == true && !kernel_is_at_least(6, 14);
    let rearmed = value["rearmed"] == rest.rearmed || at_least && value["rearmed"].is_null();
    findings.add(
        "rearmed",
        with((!rearmed).then(|| format!("rearmed: {} expected", rest.rearmed))),
    );
    let entered = last.window;
    let wrong = if at_least {
        None
    } else {
        outside(line.time("entered"), entered).map(|wrong| format!("entered {wrong}"))
    };
    let wrong =
        wrong.or_else(|| outside(line.time("time"), ended).map(|wrong| format!("ended {wrong}")));
    let (least, most) = (
        (ended.from - entered.to) as f64 / 1e9,
        (ended.to - entered.from) as f64 / 1e9,
    );
    let dwell = value["dwell_seconds"].as_f64().unwrap_or(f64::NAN);
    let slack = *SLACK as f64 / 1e9;
    let right = (at_least || dwell >= least - slack) && dwell <= most + slack;
    let wrong = wrong
        .or_else(|| (!right).then(|| format!("dwell from {least:.3} to {most:.3} s expected")));
    let wrong = wrong.or_else(|| fin_wait2(end, value));
    findings.add("dwell", with(wrong));
    if !at_least {
        findings.dwell = Some((rest.ending, (dwell - least).abs().max((most - dwell).abs())));
    }
}

/// How long it was in FIN_WAIT2 before.
fn fin_wait2(end: &End, value: &Value) -> Option<String> {
    let [.., before, last] = &end.steps[..] else {
        return None;
    };
    let told = value["fin_wait2_seconds"].as_f64();
    if last.from != "FIN_WAIT2" {
        return told.map(|_| "it was not in FIN_WAIT2".to_owned());
    }
    let (least, most) = (
        last.window.from - before.window.to,
        last.window.to - before.window.from,
    );
    let right = told.is_some_and(|told| {
        let told = (told * 1e9) as i64;
        (least - 2 * *SLACK..=most + 2 * *SLACK).contains(&told)
    });
    (!right).then(|| format!("from {least} to {most} ns in FIN_WAIT2 expected"))
}

/// Whether an end was left open, and why.
fn leak(end: &End, shown: &Shown<'_>, findings: &mut Findings) {
    let told = end
        .cookie
        .as_deref()
        .and_then(|cookie| shown.leaked.get(cookie));
    let left = end
        .leak
        .as_ref()
        .and_then(|left| left.cause.map(|cause| (cause, &left.holders)));
    let (Some((cause, holders)), Some((sample, leak))) = (left, told) else {
        match (left, told) {
            (Some((cause, _)), None) => {
                findings.add("cause", Some(format!("{cause} expected, not reported")))
            }
            (None, Some((sample, _))) => {
                findings.add("cause", Some(format!("it is not leaked: {sample}")))
            }
            _ if end.leak.is_some() => findings.add("cause", None),
            _ => {}
        }
        return;
    };
    let wrong = (sample["cause"] != cause).then(|| format!("{cause} expected: {sample}"));
    findings.add("cause", wrong);
    let mut expected: Vec<_> = holders
        .iter()
        .map(|who| (who.pid, who.comm.as_str()))
        .collect();
    expected.sort_unstable();
    let holders = leak["holders"].as_array().expect("a list").iter();
    let told: Vec<_> = holders
        .map(|one| {
            (
                one["pid"].as_u64().unwrap_or(0) as u32,
                one["comm"].as_str().unwrap_or("?"),
            )
        })
        .collect();
    let wrong = (told != expected).then(|| format!("{expected:?} expected: {leak}"));
    findings.add("holders", wrong);
    // Since its peer closed; one that is over, since it is.
    let state = if cause == "finished" {
        "CLOSE"
    } else {
        "CLOSE_WAIT"
    };
    let since = end
        .steps
        .iter()
        .find(|step| step.to == state)
        .expect("it was left")
        .window;
    let time = leak["time"]
        .as_str()
        .and_then(|time| time.parse::<jiff::Timestamp>().ok());
    let time = time.expect("a time").as_nanosecond() as i64;
    let age = sample["age_seconds"]
        .as_f64()
        .map_or(i64::MIN, |age| (age * 1e9) as i64);
    let wrong = outside(time.saturating_sub(age), since)
        .or_else(|| (sample["age_at_least"] == true).then(|| "its age is known".to_owned()));
    findings.add("age", wrong.map(|wrong| format!("{wrong}: {sample}")));
}

/// Right and all, by aspect.
#[derive(Default)]
pub(crate) struct Tally {
    aspects: BTreeMap<&'static str, (usize, usize)>,
    /// By ending, by how many seconds each dwell may be wrong at most, and whose it is.
    dwells: BTreeMap<&'static str, Vec<(f64, String)>>,
    /// Sockets of which tcptrace could not know.
    pub(crate) excused: BTreeSet<String>,
    /// A story for each that is wrong.
    pub(crate) wrong: Vec<String>,
}

impl Tally {
    fn count(&mut self, aspect: &'static str, right: bool) {
        let (rights, all) = self.aspects.entry(aspect).or_default();
        *rights += usize::from(right);
        *all += 1;
    }

    /// Something must be so.
    pub(crate) fn check(
        &mut self,
        aspect: &'static str,
        right: bool,
        wrong: impl FnOnce() -> String,
    ) {
        self.count(aspect, right);
        if !right {
            self.wrong.push(format!("  {}", wrong()));
        }
    }

    pub(crate) fn add(&mut self, title: &str, end: &End, findings: &Findings) {
        for (aspect, wrong) in &findings.aspects {
            self.count(aspect, wrong.is_none());
        }
        if let Some((ending, error)) = findings.dwell {
            let errors = self.dwells.entry(ending).or_default();
            errors.push((error, title.to_owned()));
        }
        if findings.wrong() > 0 {
            let cookie = findings
                .cookie
                .as_deref()
                .or(end.cookie.as_deref())
                .unwrap_or("?");
            let mut text = format!(
                "  {title}, its {} (socket {cookie}, {})",
                end.side, end.owner.who.comm
            );
            for (aspect, wrong) in &findings.aspects {
                if let Some(wrong) = wrong {
                    let _ = write!(text, "\n    {aspect}: {wrong}");
                }
            }
            self.wrong.push(text);
        }
    }

    /// By aspect, `right/all`.
    pub(crate) fn aspects(&self) -> String {
        let aspects = self.aspects.iter();
        let texts: Vec<_> = aspects
            .map(|(aspect, (right, all))| format!("{aspect} {right}/{all}"))
            .collect();
        texts.join(", ")
    }

    /// By ending, how many there were and by how much a dwell may be wrong at most.
    pub(crate) fn dwells(&self) -> String {
        let dwells = self.dwells.iter();
        let texts: Vec<_> = dwells
            .filter_map(|(ending, errors)| {
                let largest = errors.iter().max_by(|(a, _), (b, _)| a.total_cmp(b));
                let (error, of) = largest?;
                let count = errors.len();
                Some(format!("{ending} {:.1} ms ({count}; {of})", error * 1000.0))
            })
            .collect();
        texts.join(", ")
    }

    /// Whether it was known of nine in ten of those that ran out how long they lasted, to a step of the timer wheel,
    /// in seconds. What a busy machine keeps from being seen in time, nobody can judge.
    pub(crate) fn is_sharp(&self, step: f64) -> bool {
        self.dwells.get("expired").is_none_or(|errors| {
            let vague = errors.iter().filter(|(error, _)| *error >= step);
            vague.count() * 10 <= errors.len()
        })
    }
}
