//! `tcptrace stream`: every transition, as lines.

use std::io::{self, Write as _};

use tcptrace_ebpf::State;

use crate::{
    event::{End, Printable},
    json::{Errno, Lines, Time},
    output::Output,
    tracker::{Change, Fact, Tracker},
    view::View,
};

/// Transitions as JSON.
pub struct Json {
    lines: Lines,
    out: Output,
}

impl Json {
    /// Writes to `out`.
    #[must_use]
    pub const fn new(out: Output) -> Self {
        Self {
            lines: Lines::new(),
            out,
        }
    }
}

impl View for Json {
    fn clock(&mut self, _: u64, boot_to_utc_ns: i64) {
        self.lines.clock(boot_to_utc_ns);
    }

    fn fact(&mut self, fact: Fact<'_>) {
        match fact {
            Fact::Change(change) => self.lines.change(&mut self.out.buffer, &change),
            Fact::Lost(lost) => self.lines.lost(&mut self.out.buffer, &lost),
            _ => {}
        }
    }

    fn flush(&mut self, _: &Tracker, _: u64) -> io::Result<()> {
        self.out.flush()
    }

    fn end(&mut self, _: &Tracker, end: &End) -> io::Result<()> {
        self.lines.end(&mut self.out.buffer, end);
        self.out.flush()
    }
}

/// Transitions as aligned text, with the columns of `tcpstates`.
pub struct Text {
    out: Output,
    boot_to_utc_ns: i64,
    header_done: bool,
    widths: Widths,
    /// One field, before it is padded.
    field: String,
    changes: u64,
}

/// Widths of the columns that grow with the longest field so far. They begin such that most lines fit
/// 120 characters.
struct Widths {
    socket: usize,
    comm: usize,
    addr: usize,
}

impl Text {
    /// Writes to `out`.
    #[must_use]
    pub const fn new(out: Output) -> Self {
        Self {
            out,
            boot_to_utc_ns: 0,
            header_done: false,
            widths: Widths {
                socket: 6,
                comm: 10,
                addr: 15,
            },
            field: String::new(),
            changes: 0,
        }
    }

    fn header(&mut self) {
        let Widths { socket, comm, addr } = self.widths;
        let (bold, plain) = self.style("\x1b[1m");
        let _ = writeln!(
            self.out.buffer,
            "{bold}{:12} {:>socket$} {:>7} {:comm$} {:addr$} {:addr$} {:11} -> {:11} {:>9} NOTE{plain}",
            "TIME (UTC)", "SOCKET", "PID", "COMM", "LOCAL", "REMOTE", "OLDSTATE", "NEWSTATE", "MS",
        );
        self.header_done = true;
    }

    fn style(&self, on: &'static str) -> (&'static str, &'static str) {
        if self.out.color {
            (on, "\x1b[0m")
        } else {
            ("", "")
        }
    }

    fn line(&mut self, change: &Change<'_>) {
        use std::fmt::Write as _;
        if !self.header_done {
            self.header();
        }
        self.changes += 1;
        let time = Time::new(change.time, self.boot_to_utc_ns).to_string();
        // 2026-11-20T18:45:02.123456789Z: the time of day, to the millisecond.
        let time = time.get(11..23).unwrap_or(&time);
        let _ = write!(self.out.buffer, "{time} ");
        self.field.clear();
        let _ = write!(self.field, "{:x}", change.socket.cookie);
        let width = grow(&mut self.widths.socket, &self.field);
        let _ = write!(self.out.buffer, "{:>width$} ", self.field);
        self.field.clear();
        let _ = match change.owner {
            Some(owner) => {
                let _ = write!(self.field, "{}", owner.comm);
                write!(self.out.buffer, "{:>7} ", owner.pid)
            }
            None => {
                self.field.push('-');
                write!(self.out.buffer, "{:>7} ", "-")
            }
        };
        let width = grow(&mut self.widths.comm, &self.field);
        let _ = write!(self.out.buffer, "{:width$} ", self.field);
        let tuple = &change.socket.tuple;
        for (addr, port) in [
            (tuple.local(), tuple.local_port),
            (tuple.remote(), tuple.remote_port),
        ] {
            self.field.clear();
            let _ = if addr.is_ipv6() {
                write!(self.field, "[{addr}]")
            } else {
                write!(self.field, "{addr}")
            };
            let _ = match port {
                0 => write!(self.field, ":*"),
                port => write!(self.field, ":{port}"),
            };
            let width = grow(&mut self.widths.addr, &self.field);
            let _ = write!(self.out.buffer, "{:width$} ", self.field);
        }
        let (color, plain) = match change.to {
            State::CloseWait | State::TimeWait => self.style("\x1b[33m"),
            State::Close if change.error != 0 => self.style("\x1b[31m"),
            _ => ("", ""),
        };
        let _ = write!(
            self.out.buffer,
            "{:11} -> {color}{:11}{plain} ",
            change.from.name(),
            change.to.name()
        );
        let _ = match change.after {
            Some(ns) => write!(self.out.buffer, "{:>9.3}", ns as f64 / 1e6),
            None => write!(self.out.buffer, "{:>9}", "-"),
        };
        if let Some(error) = Errno::new(change.error) {
            let _ = write!(self.out.buffer, " {error}");
            if change.error == libc::EADDRNOTAVAIL as u32 {
                let _ = write!(self.out.buffer, " (no free local port)");
            }
        }
        if let Some(container) = change.container {
            let short = container.get(..12).unwrap_or(container);
            let _ = write!(self.out.buffer, " {}", Printable(short.as_bytes()));
        }
        if change.time_error != 0 {
            let error = change.time_error as f64 / 1e6;
            let _ = write!(self.out.buffer, " (late, off by up to {error:.0} ms)");
        } else if change.late {
            let _ = write!(self.out.buffer, " (late)");
        }
        self.out.buffer.push(b'\n');
    }
}

/// Makes a column wide enough for `field`, and says how wide it is.
fn grow(width: &mut usize, field: &str) -> usize {
    *width = (*width).max(field.chars().count());
    *width
}

impl View for Text {
    fn clock(&mut self, _: u64, boot_to_utc_ns: i64) {
        self.boot_to_utc_ns = boot_to_utc_ns;
    }

    fn fact(&mut self, fact: Fact<'_>) {
        match fact {
            Fact::Change(change) => self.line(&change),
            Fact::Lost(lost) => {
                let _ = writeln!(
                    self.out.buffer,
                    "--- {} events lost: the buffer was full (a larger --buffer, or a filter, helps)",
                    lost.records + lost.missed
                );
            }
            _ => {}
        }
    }

    fn flush(&mut self, _: &Tracker, _: u64) -> io::Result<()> {
        if !self.header_done && self.out.is_terminal {
            self.header();
        }
        self.out.flush()
    }

    fn end(&mut self, _: &Tracker, end: &End) -> io::Result<()> {
        self.out.flush()?;
        // On stderr, so that a pipe gets nothing but transitions.
        eprint!("tcptrace: {} transitions shown", self.changes);
        if end.lost > 0 {
            eprint!(", {} events lost", end.lost);
        }
        if end.mptcp > 0 {
            eprint!(", {} of MPTCP sockets not covered", end.mptcp);
        }
        eprintln!();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
