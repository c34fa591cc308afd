//! The records that the probes write for one connection, from its beginning to its end.

use tcptrace_ebpf::{Flags, Header, Kind, State, TimeWait, Transition};
use zerocopy::IntoBytes as _;

use State::{
    Close as Closed, CloseWait, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent,
};

/// A record of the probes.
pub(crate) enum Record {
    Transition(Transition),
    Accept(Header),
    TimeWait(TimeWait),
}

impl Record {
    /// The record as the ring buffer has it.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Transition(record) => record.as_bytes(),
            Self::Accept(record) => record.as_bytes(),
            Self::TimeWait(record) => record.as_bytes(),
        }
    }
}

/// The two ends of a connection, as the probes describe them while it is established.
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    /// The end that connects, and closes first.
    pub(crate) client: Header,
    /// The end that accepts.
    pub(crate) server: Header,
}

/// Sends the records of a connection to `sink`, each with the time that `clock` has then.
struct Writer<C, S> {
    clock: C,
    sink: S,
}

impl<C: FnMut() -> u64, S: FnMut(&Record)> Writer<C, S> {
    fn at(&mut self, header: Header) -> Header {
        Header {
            time: (self.clock)(),
            ..header
        }
    }

    fn transition(&mut self, header: Header, old: State, new: State) {
        let record = Transition {
            header: Header {
                kind: Kind::Transition as u8,
                ..self.at(header)
            },
            error: 0,
            stale_port: 0,
            old: old as u8,
            new: new as u8,
            shutdown: 0,
            reserved: 0,
        };
        (self.sink)(&Record::Transition(record));
    }

    /// Both ends up to ESTABLISHED, and `accept()`.
    fn open(&mut self, ends: Ends) {
        let Ends { client, server } = ends;
        let portless = Header {
            local_port: 0,
            inode: 0,
            ..client
        };
        self.transition(portless, Closed, SynSent);
        self.transition(softirq(client), SynSent, Established);
        self.transition(server, Listen, SynRecv);
        self.transition(server, SynRecv, Established);
        let accept = Header {
            kind: Kind::Accept as u8,
            ..self.at(server)
        };
        (self.sink)(&Record::Accept(accept));
    }
}

/// In softirq, and so of no process in particular.
const fn softirq(header: Header) -> Header {
    Header { flags: 0, ..header }
}

/// The records of a connection whose client closes first with a FIN: twelve. `due` is when TIME_WAIT ends, and `tick`
/// one jiffy in nanoseconds.
pub(crate) fn fin(
    ends: Ends,
    due: u64,
    tick: u64,
    clock: impl FnMut() -> u64,
    sink: impl FnMut(&Record),
) {
    let Ends { client, server } = ends;
    let mut writer = Writer { clock, sink };
    writer.open(ends);
    writer.transition(client, Established, FinWait1);
    writer.transition(server, Established, CloseWait);
    writer.transition(softirq(client), FinWait1, FinWait2);
    let armed = writer.at(softirq(client));
    (writer.sink)(&time_wait(Kind::TimeWaitArmed, armed, due, tick));
    writer.transition(softirq(client), FinWait2, Closed);
    let closing = Header {
        flags: Flags::OWNED | Flags::HAS_SOCKET,
        ..server
    };
    writer.transition(closing, CloseWait, LastAck);
    writer.transition(server, LastAck, Closed);
}

/// The records of a connection that its client ends with a reset: seven.
pub(crate) fn rst(ends: Ends, clock: impl FnMut() -> u64, sink: impl FnMut(&Record)) {
    let mut writer = Writer { clock, sink };
    writer.open(ends);
    writer.transition(ends.client, Established, Closed);
    writer.transition(softirq(ends.server), Established, Closed);
}

/// A record about the timewait socket of the client in `header`, which has a time already.
pub(crate) fn time_wait(kind: Kind, header: Header, due: u64, tick: u64) -> Record {
    Record::TimeWait(TimeWait {
        header: Header {
            kind: kind as u8,
            ..header
        },
        jiffies: header.time / tick,
        expires: due,
        entry_stamp: 0,
        substate: State::TimeWait as u8,
        callers: 0,
        reserved: [0; 2],
    })
}
