//! All that was measured of how costs grow. The page and its pictures are made of this alone; as JSON it is
//! `docs/growth.json`.

use serde::{Deserialize, Serialize};

use crate::bench::{
    results::{Kernel, LeftOut, Machine, Memory, Work},
    spread::Spread,
};

/// What a run has measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Growth {
    /// Where and when.
    pub(crate) machine: Machine,
    /// Costs against connections a second.
    pub(crate) rates: Rates,
    /// Memory against tracked connections.
    pub(crate) memory: Vec<Memory>,
    /// Time of single looks against what there is to look at.
    pub(crate) looks: Vec<Look>,
    /// What BPF programs take: for connections that end with a reset, made by one thread,
    pub(crate) reset: Kernel,
    /// by two,
    pub(crate) reset_by_two: Kernel,
    /// and for those that end in TIME_WAIT.
    pub(crate) fin: Kernel,
    /// Records of a connection that ends with a reset, both ends here,
    pub(crate) reset_records: Records,
    /// and of one that ends in TIME_WAIT.
    pub(crate) fin_records: Records,
    /// What records and lines take in user space.
    pub(crate) user: Vec<Work>,
    /// What bounds TIME_WAIT.
    pub(crate) time_wait: TimeWait,
    /// What could not be measured here, and why.
    pub(crate) left_out: Vec<LeftOut>,
}

/// Costs against connections a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rates {
    /// How often each point was measured.
    pub(crate) rounds: usize,
    /// Connections a second without a tracer, as fast as they can be made.
    pub(crate) limit: f64,
    /// CPU time of such a connection without a tracer, microseconds.
    pub(crate) untraced_us: f64,
    /// With each tracer.
    pub(crate) curves: Vec<RateCurve>,
}

/// With one tracer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RateCurve {
    /// Which one.
    pub(crate) name: String,
    /// By rate.
    pub(crate) points: Vec<RatePoint>,
    /// Events that it says were lost, at all rates together.
    pub(crate) lost: u64,
}

/// At one rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RatePoint {
    /// Connections a second that there were to be; `None` for as many as can be.
    pub(crate) asked: Option<u32>,
    /// Connections a second that there were, with the tracer.
    pub(crate) per_second: f64,
    /// CPU time of the tracer for a connection, microseconds.
    pub(crate) own_us: Spread,
    /// What its programs in the kernel take for a connection, microseconds, without what the kernel's statistics of
    /// that take themselves.
    pub(crate) kernel_us: Spread,
}

impl RatePoint {
    /// Of one core: what the tracer takes.
    pub(crate) fn own(&self) -> f64 {
        self.own_us.median * self.per_second / 1e6
    }

    /// Of one core: what the tracer takes, and its programs.
    pub(crate) fn share(&self) -> f64 {
        (self.own_us.median + self.kernel_us.median) * self.per_second / 1e6
    }
}

/// How long a command takes that looks once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Look {
    /// Which.
    pub(crate) name: String,
    /// What it is measured against.
    pub(crate) against: Against,
    /// By how many there are.
    pub(crate) points: Vec<LookPoint>,
}

/// What there is to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Against {
    /// Sockets.
    Sockets,
    /// Descriptors of sockets.
    SocketDescriptors,
    /// Descriptors of other files.
    FileDescriptors,
}

/// With so many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LookPoint {
    /// How many.
    pub(crate) count: u64,
    /// Seconds.
    pub(crate) wall: Spread,
    /// CPU seconds.
    pub(crate) cpu: Spread,
}

/// Records that the probes write for a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Records {
    /// Changes of a full socket.
    pub(crate) transitions: f64,
    /// Results of `accept()`.
    pub(crate) accepts: f64,
    /// Of timewait sockets, without the one that tells of the end, a minute later.
    pub(crate) time_waits: f64,
}

/// What bounds TIME_WAIT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct TimeWait {
    /// Bytes that the kernel takes for a timewait socket.
    pub(crate) bytes: Option<u64>,
    /// How many a network namespace may have (`tcp_max_tw_buckets`).
    pub(crate) most: u64,
    /// Ports that `connect()` chooses from (`ip_local_port_range`).
    pub(crate) ports: u64,
}
