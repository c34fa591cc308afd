//! What tracers write: how much of the traffic it tells, and what they say that they lost.

use std::io::{self, BufRead};

use serde::Deserialize;

/// How a tracer's output is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// JSON lines of tcptrace.
    Json,
    /// A recording of tcptrace.
    Recording,
    /// A line of text for each transition, with ports in it.
    Text,
    /// Nothing that could be counted.
    Report,
}

/// What an output tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Lines on the traffic.
    pub(super) lines: u64,
    /// Events that it says were lost.
    pub(super) lost: u64,
}

#[derive(Deserialize)]
struct Lost {
    records: u64,
}

/// Reads an output: of the lines on transitions, those that have `port` on one side.
///
/// # Errors
/// When it cannot be read.
pub(super) fn read(format: Format, port: u16, mut output: impl BufRead) -> io::Result<Told> {
    let mut told = Told::default();
    let ports = match format {
        Format::Json => vec![format!(r#""port":{port}}}"#)],
        Format::Recording => ["local", "remote"]
            .map(|side| format!(r#""{side}_port":{port},"#))
            .to_vec(),
        Format::Text | Format::Report => Vec::new(),
    };
    let word = port.to_string();
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        match format {
            Format::Json | Format::Recording => {
                if text.contains(r#""event":"transition""#) {
                    told.lines += u64::from(ports.iter().any(|port| text.contains(port)));
                } else if text.contains(r#""event":"lost""#)
                    && let Ok(lost) = serde_json::from_str::<Lost>(&text)
                {
                    told.lost += lost.records;
                }
            }
            Format::Text => {
                // `127.0.0.1:7000` and `7000` alone are the same port.
                let has_port = |field: &str| field.rsplit(':').next() == Some(&word);
                told.lines += u64::from(text.split_whitespace().any(has_port));
                told.lost += lost_in(&text);
            }
            Format::Report => {}
        }
        line.clear();
    }
    Ok(told)
}

/// The number in sentences such as `lost 12 events on CPU #0`, `Lost 12 events`, `12 events lost`, or
/// `Possibly lost 12 samples`; 0 in others.
pub(super) fn lost_in(line: &str) -> u64 {
    let words: Vec<&str> = line
        .split(|char: char| char.is_whitespace() || matches!(char, ',' | ':'))
        .filter(|word| !word.is_empty())
        .collect();
    let is_lost = |word: &str| word.eq_ignore_ascii_case("lost");
    let number = |word: &&str| word.parse().ok();
    let Some(at) = words.iter().position(|word| is_lost(word)) else {
        return 0;
    };
    let after = words.get(at + 1).and_then(number);
    let before = || {
        let number = |back| at.checked_sub(back).and_then(|at| words[at].parse().ok());
        number(1).or_else(|| number(2))
    };
    after.or_else(before).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(format: Format, output: &str) -> (u64, u64) {
        let told = read(format, 7000, output.as_bytes()).unwrap();
        (told.lines, told.lost)
    }

    #[test]
    fn json_of_tcptrace() {
        let output = r#"{"event":"transition","local":{"addr":"127.0.0.1","port":7000},"remote":{"addr":"127.0.0.1","port":40001}}
{"event":"transition","local":{"addr":"127.0.0.1","port":40001},"remote":{"addr":"127.0.0.1","port":7000}}
{"event":"transition","local":{"addr":"127.0.0.1","port":17000},"remote":{"addr":"127.0.0.1","port":443}}
{"event":"time_wait","local":{"addr":"127.0.0.1","port":7000}}
{"event":"lost","time":"2026-01-01T00:00:00Z","records":12}
{"event":"lost","time":"2026-01-01T00:00:01Z","records":3}
"#;
        assert_eq!(told(Format::Json, output), (2, 15));
    }

    #[test]
    fn a_recording() {
        let output = r#"{"event":"transition","local_port":7000,"remote_port":9}
{"event":"transition","local_port":9,"remote_port":7000,"old":"CLOSE"}
{"event":"transition","local_port":9,"remote_port":17000,"old":"CLOSE"}
{"event":"accept","local_port":7000,"remote_port":9}
{"event":"lost","time":1,"records":4}
"#;
        assert_eq!(told(Format::Recording, output), (2, 4));
    }

    #[test]
    fn columns_of_tcpstates() {
        let output = "\
SKADDR           PID     COMM       LADDR           LPORT RADDR           RPORT OLDSTATE    -> NEWSTATE    MS
ffff9a0cc1ec3480 7000    curl       0.0.0.0         0     127.1.0.0       17000 CLOSE       -> SYN_SENT    0.000
ffff9a0cc1ec3480 311     churn      127.0.0.1       40001 127.1.0.0       7000  SYN_SENT    -> ESTABLISHED 0.021
ffff9a0cc1ec2b00 311     churn      127.1.0.0       7000  127.0.0.1       40001 SYN_RECV    -> ESTABLISHED 0.003
lost 345 events on CPU #1
";
        // The first line is a process with that number, which cannot be told from a port. It is one at most.
        assert_eq!(told(Format::Text, output), (3, 345));
    }

    #[test]
    fn lines_of_tcptrace() {
        let output = "\
19:47:02.286  124d0   14190 shop         127.0.0.1:*     127.1.0.0:7000   CLOSE       -> SYN_SENT            -
19:47:02.286  124d0   14190 shop         [::1]:7000      [::1]:40001      CLOSE       -> SYN_SENT            -
19:47:02.286  124d0   14190 shop         [::1]:17000     [::1]:40001      CLOSE       -> SYN_SENT            -
--- 7 events lost: the buffer was full (a larger --buffer, or a filter, helps)
";
        assert_eq!(told(Format::Text, output), (2, 7));
    }

    #[test]
    fn what_each_says_that_it_lost() {
        assert_eq!(lost_in("lost 345 events on CPU #1"), 345);
        assert_eq!(lost_in("Lost 12 events"), 12);
        assert_eq!(lost_in("Possibly lost 9 samples"), 9);
        assert_eq!(
            lost_in("tcptrace: 10 transitions shown, 25 events lost"),
            25
        );
        assert_eq!(
            lost_in("tcptrace: 10 records written to x.jsonl, 3 lost"),
            3
        );
        assert_eq!(lost_in("tcptrace: 10 transitions shown"), 0);
        assert_eq!(lost_in("nothing lost"), 0);
    }

    #[test]
    fn reports_are_not_counted() {
        assert_eq!(
            told(Format::Report, "127.0.0.1:7000\nlost 3 events"),
            (0, 0)
        );
    }
}
