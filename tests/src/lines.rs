//! What tcptrace prints with `-o json`, and what a test may say about it.

use std::{env, fmt, net::SocketAddr, sync::LazyLock};

use jiff::Timestamp;
use serde_json::Value;

use crate::{Fixture, Pair, boottime, schema};

/// The states of a socket that a listener makes, up to the first that the application can see.
pub const PASSIVE_OPEN: &str = "LISTEN SYN_RECV ESTABLISHED";

/// A line of output.
#[derive(Clone, Debug)]
pub struct Line {
    /// What it says; a plain string when it was not JSON.
    pub value: Value,
    /// When it was read here, in nanoseconds since boot.
    pub arrived: i64,
}

/// A line as another tcptrace would have written it that watched the same kernel.
///
/// Two of them stamp one event with their own probes, one after the other, and see to TIME_WAIT at
/// different moments: by a look or by a record, told late or not. So times may differ by what the kernel's
/// timers leave open (two jiffies), and everything else may not.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a>(pub &'a Value);

/// Two jiffies at 250 Hz, and a little. Where a CPU can be taken away for longer between one tracer's probe
/// and the other's, `TESTS_SAME_MS` says so.
static SAME_NS: LazyLock<i128> = LazyLock::new(|| {
    let milliseconds = env::var("TESTS_SAME_MS").map_or(10, |text| text.parse().expect("a number"));
    milliseconds * 1_000_000
});

impl PartialEq for Seen<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self.0, other.0) {
            (Value::Object(a), Value::Object(b)) => {
                let known = |(key, _): &(&String, &Value)| *key != "late";
                let (a, b): (Vec<_>, Vec<_>) = (
                    a.iter().filter(known).collect(),
                    b.iter().filter(known).collect(),
                );
                a.len() == b.len()
                    && a.iter()
                        .zip(&b)
                        .all(|(a, b)| a.0 == b.0 && Seen(a.1) == Seen(b.1))
            }
            (Value::Array(a), Value::Array(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Seen(a) == Seen(b))
            }
            (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
                let difference = a.as_f64().zip(b.as_f64()).map(|(a, b)| (a - b).abs());
                difference.is_some_and(|seconds| seconds * 1e9 <= *SAME_NS as f64)
            }
            (Value::String(a), Value::String(b)) => {
                a == b
                    || match (a.parse::<Timestamp>(), b.parse::<Timestamp>()) {
                        (Ok(a), Ok(b)) => (a.as_nanosecond() - b.as_nanosecond()).abs() <= *SAME_NS,
                        _ => false,
                    }
            }
            (a, b) => a == b,
        }
    }
}

/// All lines of output, in order.
#[derive(Clone, Debug, Default)]
pub struct Lines(pub Vec<Line>);

impl Line {
    pub(crate) fn parse(text: &str, arrived: i64) -> Self {
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
        Self { value, arrived }
    }

    /// A transition of the socket with this cookie.
    #[must_use]
    pub fn is_transition(&self, cookie: &str) -> bool {
        self.value["event"] == "transition" && self.value["socket"] == cookie
    }

    /// A time in the line, in nanoseconds since 1970.
    ///
    /// # Panics
    /// When it is missing or is not RFC 3339 in UTC with nanoseconds.
    #[must_use]
    pub fn time(&self, key: &str) -> i64 {
        let text = self.value[key]
            .as_str()
            .unwrap_or_else(|| panic!("no time {key}: {self}"));
        let digits = text.split_once('.').map_or("", |(_, digits)| digits);
        assert!(
            digits.len() == 10 && digits.ends_with('Z'),
            "{key} is not in nanoseconds, UTC: {self}"
        );
        let time: Timestamp = text
            .parse()
            .unwrap_or_else(|_| panic!("{key} is no time: {self}"));
        i64::try_from(time.as_nanosecond()).expect("before 2262")
    }

    /// A number of seconds in the line.
    ///
    /// # Panics
    /// When it is missing.
    #[must_use]
    pub fn seconds(&self, key: &str) -> f64 {
        self.value[key]
            .as_f64()
            .unwrap_or_else(|| panic!("no number {key}: {self}"))
    }

    /// `from > to` of a transition.
    #[must_use]
    pub fn change(&self) -> String {
        format!(
            "{} > {}",
            text(&self.value["from"]),
            text(&self.value["to"])
        )
    }

    /// Local and remote address.
    ///
    /// # Panics
    /// When one is missing.
    #[must_use]
    pub fn pair(&self) -> Pair {
        let address = |key: &str| {
            let ip = self.value[key]["addr"]
                .as_str()
                .and_then(|ip| ip.parse().ok());
            let port = self.value[key]["port"].as_u64();
            match (ip, port) {
                (Some(ip), Some(port)) => SocketAddr::new(ip, port as u16),
                _ => panic!("no address {key}: {self}"),
            }
        };
        Pair {
            local: address("local"),
            remote: address("remote"),
        }
    }

    /// The owner must be this process, known in this way.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_owner(&self, fixture: &Fixture, via: &str) {
        self.assert_process(fixture);
        assert_eq!(self.value["owner"]["via"], via, "{self}");
    }

    /// The owner must be this process.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_process(&self, fixture: &Fixture) {
        let owner = &self.value["owner"];
        assert_eq!(
            owner["pid"], fixture.pid,
            "{} expected: {self}",
            fixture.comm
        );
        assert_eq!(owner["comm"], fixture.comm, "{self}");
    }
}

impl Lines {
    /// Lines of a file.
    ///
    /// # Panics
    /// When the schema does not describe one.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let now = boottime();
        let mut lines = Self::default();
        for line in text.lines() {
            if let Some(violation) = lines.add(Line::parse(line, now)) {
                panic!("{violation}");
            }
        }
        lines
    }

    /// Adds a line. Gives what is wrong with it, if it is one of those that
    /// [other programs rely on](schema): those of a recording are not.
    pub(crate) fn add(&mut self, line: Line) -> Option<String> {
        self.0.push(line);
        let is_recording = self.0[0].value["event"] == "start";
        let line = &self.0.last()?.value;
        if is_recording || !line.is_object() {
            return None;
        }
        schema::violation(line)
    }

    /// All lines about this kind of event.
    pub fn events(&self, event: &str) -> impl Iterator<Item = &Line> {
        self.0
            .iter()
            .filter(move |line| line.value["event"] == event)
    }

    /// The transitions of the socket with this cookie, in order.
    #[must_use]
    pub fn of(&self, cookie: &str) -> Vec<&Line> {
        self.0
            .iter()
            .filter(|line| line.is_transition(cookie))
            .collect()
    }

    /// The transition of a socket that ends in this state.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn entry(&self, cookie: &str, state: &str) -> &Line {
        let found: Vec<_> = self
            .of(cookie)
            .into_iter()
            .filter(|line| line.value["to"] == state)
            .collect();
        assert_eq!(found.len(), 1, "socket {cookie} > {state}, once:\n{self}");
        found[0]
    }

    /// The socket must have gone through exactly these states (`"CLOSE SYN_SENT ESTABLISHED"`), each
    /// line beginning where the one before it ended and not before it in time, with `after_seconds`
    /// the time between them. Gives the lines.
    ///
    /// # Panics
    /// When it has not.
    pub fn assert_path(&self, cookie: &str, states: &str) -> Vec<&Line> {
        let states: Vec<&str> = states.split_whitespace().collect();
        let expected: Vec<String> = states
            .windows(2)
            .map(|pair| format!("{} > {}", pair[0], pair[1]))
            .collect();
        let lines = self.of(cookie);
        let changes: Vec<String> = lines.iter().map(|line| line.change()).collect();
        assert_eq!(changes, expected, "socket {cookie} of:\n{self}");
        for pair in lines.windows(2) {
            let between = pair[1].time("time") - pair[0].time("time");
            assert!(
                between >= 0,
                "time runs backwards:\n{}\n{}",
                pair[0],
                pair[1]
            );
            let seconds = pair[1].seconds("after_seconds");
            // Times are printed in nanoseconds, durations as floating point numbers.
            let error = (seconds - between as f64 / 1e9).abs();
            assert!(
                error < 1e-5,
                "after_seconds is off:\n{}\n{}",
                pair[0],
                pair[1]
            );
        }
        lines
    }

    /// The one ended TIME_WAIT of the socket with this cookie.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn time_wait(&self, cookie: &str) -> &Line {
        let found: Vec<_> = self
            .events("time_wait")
            .filter(|line| line.value["socket"] == cookie)
            .collect();
        assert_eq!(found.len(), 1, "one time_wait of socket {cookie}:\n{self}");
        found[0]
    }

    /// No line may mention the socket with this cookie.
    ///
    /// # Panics
    /// When one does.
    pub fn assert_silent(&self, cookie: &str) {
        let mentioned = self.0.iter().find(|line| line.value["socket"] == cookie);
        assert!(
            mentioned.is_none(),
            "socket {cookie} must not appear:\n{self}"
        );
    }

    /// No owner may be a decoy or anyone else than these processes.
    ///
    /// # Panics
    /// When one is.
    pub fn assert_owners_among(&self, fixtures: &[&Fixture]) {
        for line in &self.0 {
            let owner = &line.value["owner"];
            let known = fixtures.iter().any(|fixture| owner["pid"] == fixture.pid);
            assert!(owner.is_null() || known, "a stranger owns it: {line}");
        }
    }

    /// The last line, which must be the `end`.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    pub fn end(&self) -> &Line {
        match self.0.last() {
            Some(line) if line.value["event"] == "end" => line,
            _ => panic!("the last line is not the end:\n{self}"),
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.value)
    }
}

impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} lines of tcptrace:", self.0.len())?;
        for line in &self.0 {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Line, Lines};

    /// Transitions of one socket, a second apart.
    fn path(states: &[&str]) -> Lines {
        let line = |(index, pair): (usize, &[&str])| {
            let value = json!({
                "event": "transition",
                "time": format!("2026-01-01T00:00:{:02}.250000000Z", index),
                "socket": "1f",
                "from": pair[0],
                "to": pair[1],
                "after_seconds": if index == 0 { None } else { Some(1.0) },
            });
            Line { value, arrived: 0 }
        };
        Lines(states.windows(2).enumerate().map(line).collect())
    }

    #[test]
    fn right_path_is_accepted() {
        let lines = path(&["CLOSE", "SYN_SENT", "ESTABLISHED"]);
        let found = lines.assert_path("1f", "CLOSE SYN_SENT ESTABLISHED");
        assert_eq!(found[0].time("time") % 1_000_000_000, 250_000_000);
        assert_eq!(found.len(), 2);
    }

    #[test]
    #[should_panic(expected = "socket 1f")]
    fn missing_line_is_found() {
        path(&["CLOSE", "SYN_SENT"]).assert_path("1f", "CLOSE SYN_SENT ESTABLISHED");
    }

    #[test]
    #[should_panic(expected = "socket 1f")]
    fn line_too_many_is_found() {
        path(&["CLOSE", "SYN_SENT", "CLOSE"]).assert_path("1f", "CLOSE SYN_SENT");
    }

    #[test]
    #[should_panic(expected = "after_seconds is off")]
    fn wrong_duration_is_found() {
        let mut lines = path(&["CLOSE", "SYN_SENT", "ESTABLISHED"]);
        lines.0[1].value["after_seconds"] = json!(1.001);
        lines.assert_path("1f", "CLOSE SYN_SENT ESTABLISHED");
    }

    #[test]
    #[should_panic(expected = "time runs backwards")]
    fn wrong_order_in_time_is_found() {
        let mut lines = path(&["CLOSE", "SYN_SENT", "ESTABLISHED"]);
        lines.0[1].value["time"] = json!("2026-01-01T00:00:00.000000000Z");
        lines.assert_path("1f", "CLOSE SYN_SENT ESTABLISHED");
    }

    #[test]
    #[should_panic(expected = "not in nanoseconds")]
    fn coarse_time_is_found() {
        let mut lines = path(&["CLOSE", "SYN_SENT"]);
        lines.0[0].value["time"] = json!("2026-01-01T00:00:00.250Z");
        let _ = lines.0[0].time("time");
    }
}
