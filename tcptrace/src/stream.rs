//! `tcptrace stream`: every transition, as lines.

use std::{
    io::{self, Write as _},
    net::Ipv6Addr,
};

use tcptrace_ebpf::State;

use crate::{
    event::{End, Printable},
    json::{Errno, Lines, Time},
    output::Output,
    pieces::{Pieces as _, Stamp, is_plain},
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
    stamp: Stamp,
    header_done: bool,
    widths: Widths,
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
            stamp: Stamp::new(),
            header_done: false,
            widths: Widths {
                socket: 6,
                comm: 10,
                addr: 15,
            },
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
        if !self.header_done {
            self.header();
        }
        self.changes += 1;
        let (color, plain) = match change.to {
            State::CloseWait | State::TimeWait => self.style("\x1b[33m"),
            State::Close if change.error != 0 => self.style("\x1b[31m"),
            _ => ("", ""),
        };
        let Self {
            out: Output { buffer: to, .. },
            widths,
            ..
        } = self;
        let time = self.stamp.of(Time::new(change.time, self.boot_to_utc_ns));
        // 2026-11-20T18:45:02.123456789Z: the time of day, to the millisecond.
        to.text(time.get(11..23).unwrap_or(time)).text(" ");
        right(to, &mut widths.socket, |to| to.hex(change.socket.cookie));
        match &change.owner {
            Some(owner) => {
                right(to, &mut 7, |to| to.number(owner.pid));
                left(to, &mut widths.comm, |to| {
                    printable(to, owner.comm.as_bytes())
                });
            }
            None => {
                to.text("      - ");
                left(to, &mut widths.comm, |to| to.text("-"));
            }
        }
        let tuple = &change.socket.tuple;
        for (addr, port) in [
            (&tuple.local_addr, tuple.local_port),
            (&tuple.remote_addr, tuple.remote_port),
        ] {
            left(to, &mut widths.addr, |to| endpoint(to, addr, port));
        }
        left(to, &mut 11, |to| to.text(change.from.name()));
        to.text("-> ").text(color);
        to.text(change.to.name())
            .blanks(11_usize.saturating_sub(change.to.name().len()));
        to.text(plain).text(" ");
        right(to, &mut 9, |to| match change.after {
            Some(ns) => milliseconds(to, ns),
            None => to.text("-"),
        });
        // No blank where nothing follows.
        to.pop();
        if let Some(error) = Errno::new(change.error) {
            to.text(" ").shown(&error);
            if change.error == libc::EADDRNOTAVAIL as u32 {
                to.text(" (no free local port)");
            }
        }
        if let Some(container) = change.container {
            let short = container.get(..12).unwrap_or(container);
            printable(to.text(" "), short.as_bytes());
        }
        if change.time_error != 0 {
            let error = change.time_error as f64 / 1e6;
            to.shown(&format_args!(" (late, off by up to {error:.0} ms)"));
        } else if change.late {
            to.text(" (late)");
        }
        to.push(b'\n');
    }
}

/// A field that begins its column, and a blank. The column becomes as wide as its widest field.
fn left(to: &mut Vec<u8>, width: &mut usize, write: impl FnOnce(&mut Vec<u8>) -> &mut Vec<u8>) {
    let begin = to.len();
    write(to);
    let field = characters(&to[begin..]);
    *width = field.max(*width);
    to.blanks(*width - field + 1);
}

/// The same for one that ends its column, and has no more than ASCII.
fn right(to: &mut Vec<u8>, width: &mut usize, write: impl FnOnce(&mut Vec<u8>) -> &mut Vec<u8>) {
    let begin = to.len();
    write(to);
    let end = to.len();
    *width = (*width).max(end - begin);
    let blanks = *width - (end - begin);
    to.blanks(blanks);
    to.copy_within(begin..end, begin + blanks);
    to[begin..begin + blanks].fill(b' ');
    to.push(b' ');
}

/// How many there are in UTF-8.
fn characters(text: &[u8]) -> usize {
    let begins = |byte: &&u8| **byte & 0xc0 != 0x80;
    text.iter().filter(begins).count()
}

fn printable<'a>(to: &'a mut Vec<u8>, name: &[u8]) -> &'a mut Vec<u8> {
    if name.iter().all(|byte| is_plain(*byte)) {
        to.extend_from_slice(name);
        to
    } else {
        to.shown(&Printable(name))
    }
}

fn endpoint<'a>(to: &'a mut Vec<u8>, addr: &[u8; 16], port: u16) -> &'a mut Vec<u8> {
    if Ipv6Addr::from(*addr).to_ipv4_mapped().is_some() {
        to.address(addr);
    } else {
        to.text("[").address(addr).text("]");
    }
    match port {
        0 => to.text(":*"),
        port => to.text(":").number(port),
    }
}

/// To the microsecond, rounded.
fn milliseconds(to: &mut Vec<u8>, ns: u64) -> &mut Vec<u8> {
    // A number of 64 bits is not quite what is halfway between two, and goes to one or the other.
    if ns % 1000 == 500 || ns >= 1_000_000_000_000_000 {
        return to.shown(&format_args!("{:.3}", ns as f64 / 1e6));
    }
    let us = (ns + 500) / 1000;
    to.number(us / 1000).text(".");
    let rest = us % 1000;
    to.text(if rest < 10 {
        "00"
    } else if rest < 100 {
        "0"
    } else {
        ""
    })
    .number(rest)
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
