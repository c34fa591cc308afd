//! The JSON that other programs rely on: one object a line.
//!
//! Fields may be added, those that are there stay. Times are RFC 3339 in UTC with nanoseconds;
//! durations are seconds, in fields that end in `_seconds`.

use std::{fmt, net::IpAddr};

use serde::{Serialize, Serializer};

use crate::{
    event::{Comm, End, Lost, Socket},
    pieces::{Pieces as _, Stamp},
    tracker::{Change, Owner, TimeWaitEnd},
};

/// A time of day from boot time.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// Nanoseconds since 1970, UTC.
    pub utc_ns: i64,
}

impl Time {
    /// The time of day at a boot time, given the offset between the two.
    #[must_use]
    pub const fn new(boot_ns: u64, boot_to_utc_ns: i64) -> Self {
        Self {
            utc_ns: boot_to_utc_ns.saturating_add_unsigned(boot_ns),
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = jiff::Timestamp::from_nanosecond(i128::from(self.utc_ns));
        // 64 bits of nanoseconds end in 2262, within what a timestamp can hold.
        write!(f, "{:.9}", time.unwrap_or_default())
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// A socket cookie, as `ss -e` prints it.
#[derive(Clone, Copy, Debug)]
pub struct Cookie(pub u64);

impl Serialize for Cookie {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:x}", self.0))
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Endpoint {
    addr: IpAddr,
    port: u16,
}

/// Both ends of a socket, and where it is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SocketFields {
    socket: Cookie,
    netns: u32,
    local: Endpoint,
    remote: Endpoint,
}

impl SocketFields {
    /// What identifies `socket`.
    #[must_use]
    pub fn new(socket: &Socket) -> Self {
        Self {
            socket: Cookie(socket.cookie),
            netns: socket.netns,
            local: Endpoint {
                addr: socket.tuple.local(),
                port: socket.tuple.local_port,
            },
            remote: Endpoint {
                addr: socket.tuple.remote(),
                port: socket.tuple.remote_port,
            },
        }
    }
}

/// A process's name. What is not UTF-8 is escaped.
#[derive(Clone, Copy, Debug)]
pub struct Name(pub Comm);

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0.as_bytes()) {
            Ok(name) => to.serialize_str(name),
            Err(_) => to.collect_str(&self.0),
        }
    }
}

/// Whose socket, and how that is known.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OwnerFields {
    pid: u32,
    comm: Name,
    via: &'static str,
}

impl From<Owner> for OwnerFields {
    fn from(owner: Owner) -> Self {
        Self {
            pid: owner.pid,
            comm: Name(owner.comm),
            via: owner.via.name(),
        }
    }
}

/// Seconds from nanoseconds.
#[must_use]
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// An error in seconds; one that is 0 is not written.
fn error_seconds(ns: u64) -> Option<f64> {
    (ns != 0).then(|| seconds(ns))
}

/// A line of `timewait`.
#[derive(Debug, Serialize)]
struct TimeWaitLine<'a> {
    event: &'static str,
    time: Time,
    #[serde(flatten)]
    socket: SocketFields,
    owner: Option<OwnerFields>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<&'a str>,
    entered: Option<Time>,
    dwell_seconds: Option<f64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dwell_at_least: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    dwell_error_seconds: Option<f64>,
    fin_wait2_seconds: Option<f64>,
    rearmed: Option<bool>,
    end: &'static str,
}

#[derive(Debug, Serialize)]
struct LostLine {
    event: &'static str,
    time: Time,
    records: u64,
}

#[derive(Debug, Serialize)]
struct EndLine {
    event: &'static str,
    time: Time,
    records: u64,
    lost: u64,
    mptcp_not_covered: u64,
}

/// Writes lines into a buffer.
pub struct Lines {
    boot_to_utc_ns: i64,
    stamp: Stamp,
}

impl Lines {
    /// Until [`clock`](Self::clock) is called, times are boot times.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            boot_to_utc_ns: 0,
            stamp: Stamp::new(),
        }
    }

    /// The time of day is boot time plus this.
    pub const fn clock(&mut self, boot_to_utc_ns: i64) {
        self.boot_to_utc_ns = boot_to_utc_ns;
    }

    /// The time of day.
    #[must_use]
    pub const fn time(&self, boot_ns: u64) -> Time {
        Time::new(boot_ns, self.boot_to_utc_ns)
    }

    /// A change of state. There are so many of them that the line is put together by hand.
    pub fn change(&mut self, to: &mut Vec<u8>, change: &Change<'_>) {
        let time = self.time(change.time);
        to.text(r#"{"event":"transition","time":""#)
            .text(self.stamp.of(time));
        let Socket {
            cookie,
            netns,
            tuple,
        } = &change.socket;
        to.text(r#"","socket":""#).hex(*cookie);
        to.text(r#"","netns":"#).number(*netns);
        to.text(r#","local":{"addr":""#).address(&tuple.local_addr);
        to.text(r#"","port":"#).number(tuple.local_port);
        to.text(r#"},"remote":{"addr":""#)
            .address(&tuple.remote_addr);
        to.text(r#"","port":"#).number(tuple.remote_port);
        to.text(r#"},"from":""#).text(change.from.name());
        to.text(r#"","to":""#).text(change.to.name());
        to.text(r#"","after_seconds":"#);
        match change.after {
            Some(ns) => to.seconds(ns),
            None => to.text("null"),
        };
        match Errno::new(change.error) {
            Some(error) => to.text(r#","error":""#).shown(&error).text("\""),
            None => to.text(r#","error":null"#),
        };
        match &change.owner {
            Some(owner) => {
                to.text(r#","owner":{"pid":"#).number(owner.pid);
                to.text(r#","comm":"#).name(&owner.comm);
                to.text(r#","via":""#).text(owner.via.name()).text(r#""}"#)
            }
            None => to.text(r#","owner":null"#),
        };
        if let Some(container) = change.container {
            to.text(r#","container":"#).string(container);
        }
        if change.late {
            to.text(r#","late":true"#);
        }
        if change.time_error != 0 {
            to.text(r#","time_error_seconds":"#)
                .seconds(change.time_error);
        }
        to.text("}\n");
    }

    /// A TIME_WAIT that ended.
    pub fn time_wait(&self, to: &mut Vec<u8>, end: &TimeWaitEnd<'_>) {
        line(
            to,
            &TimeWaitLine {
                event: "time_wait",
                time: self.time(end.time),
                socket: SocketFields::new(&end.socket),
                owner: end.owner.map(OwnerFields::from),
                container: end.container,
                entered: end.entered.map(|entered| self.time(entered)),
                dwell_seconds: end.dwell.map(seconds),
                dwell_at_least: end.dwell_at_least,
                dwell_error_seconds: error_seconds(end.dwell_error),
                fin_wait2_seconds: end.fin_wait2.map(seconds),
                rearmed: end.rearmed,
                end: end.ending.name(),
            },
        );
    }

    /// Records that were lost.
    pub fn lost(&self, to: &mut Vec<u8>, lost: &Lost) {
        line(
            to,
            &LostLine {
                event: "lost",
                time: self.time(lost.time),
                records: lost.records + lost.missed,
            },
        );
    }

    /// The last line.
    pub fn end(&self, to: &mut Vec<u8>, end: &End) {
        line(
            to,
            &EndLine {
                event: "end",
                time: self.time(end.time),
                records: end.records,
                lost: end.lost,
                mptcp_not_covered: end.mptcp,
            },
        );
    }
}

impl Default for Lines {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes one object and a newline.
pub fn line(to: &mut Vec<u8>, object: &impl Serialize) {
    let written = serde_json::to_writer(&mut *to, object);
    debug_assert!(
        written.is_ok(),
        "neither a vector nor these objects can fail"
    );
    to.push(b'\n');
}

/// An errno by its name: `ECONNRESET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(u32);

impl Errno {
    /// `None` for 0, which is no error.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 {
            None
        } else {
            Some(Self(number))
        }
    }
}

/// The name; a number that has none as `E123`.
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match i32::try_from(self.0).unwrap_or(0) {
            libc::EPERM => "EPERM",
            libc::ENOENT => "ENOENT",
            libc::ESRCH => "ESRCH",
            libc::EINTR => "EINTR",
            libc::EIO => "EIO",
            libc::E2BIG => "E2BIG",
            libc::ENOMEM => "ENOMEM",
            libc::EACCES => "EACCES",
            libc::EBUSY => "EBUSY",
            libc::ENODEV => "ENODEV",
            libc::EINVAL => "EINVAL",
            libc::EMFILE => "EMFILE",
            libc::ENOSPC => "ENOSPC",
            libc::ENOSYS => "ENOSYS",
            libc::EPIPE => "EPIPE",
            libc::EPROTO => "EPROTO",
            libc::EBADMSG => "EBADMSG",
            libc::EMSGSIZE => "EMSGSIZE",
            libc::ENOPROTOOPT => "ENOPROTOOPT",
            libc::EOPNOTSUPP => "EOPNOTSUPP",
            libc::EADDRINUSE => "EADDRINUSE",
            libc::EADDRNOTAVAIL => "EADDRNOTAVAIL",
            libc::ENETDOWN => "ENETDOWN",
            libc::ENETUNREACH => "ENETUNREACH",
            libc::ECONNABORTED => "ECONNABORTED",
            libc::ECONNRESET => "ECONNRESET",
            libc::ENOBUFS => "ENOBUFS",
            libc::ENOTCONN => "ENOTCONN",
            libc::ETIMEDOUT => "ETIMEDOUT",
            libc::ECONNREFUSED => "ECONNREFUSED",
            libc::EHOSTDOWN => "EHOSTDOWN",
            libc::EHOSTUNREACH => "EHOSTUNREACH",
            // The kernel's own, for which C libraries have no name (include/linux/errno.h).
            524 => "ENOTSUPP",
            _ => return write!(f, "E{}", self.0),
        };
        f.write_str(name)
    }
}

impl Serialize for Errno {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests;
