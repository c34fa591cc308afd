//! The TCP states, numbered as the kernel numbers them.

/// A TCP state. The numbers are the kernel's (`include/net/tcp_states.h`, unchanged since 4.4), the
/// names are those of RFC 9293.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum State {
    /// Data flows both ways.
    Established = 1,
    /// `connect()` was called, the peer has not answered.
    SynSent = 2,
    /// The peer's SYN was answered, its ACK has made a socket.
    SynRecv = 3,
    /// We closed first; the peer has not acknowledged our FIN.
    FinWait1 = 4,
    /// Our FIN is acknowledged; the peer has not closed.
    FinWait2 = 5,
    /// Both sides have closed, we first; the address pair rests for a minute.
    TimeWait = 6,
    /// No connection.
    Close = 7,
    /// The peer has closed; this side's application has not.
    CloseWait = 8,
    /// Both have closed, the peer first; our FIN is not acknowledged.
    LastAck = 9,
    /// A listener.
    Listen = 10,
    /// Both closed at the same time; our FIN is not acknowledged.
    Closing = 11,
}

impl State {
    /// Every state, in the kernel's order.
    pub const ALL: [Self; 11] = [
        Self::Established,
        Self::SynSent,
        Self::SynRecv,
        Self::FinWait1,
        Self::FinWait2,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::Closing,
    ];

    /// The state with the kernel's number `number`; `None` for a number that names no state of a
    /// full socket (12 and 13 are internal to the kernel).
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Established),
            2 => Some(Self::SynSent),
            3 => Some(Self::SynRecv),
            4 => Some(Self::FinWait1),
            5 => Some(Self::FinWait2),
            6 => Some(Self::TimeWait),
            7 => Some(Self::Close),
            8 => Some(Self::CloseWait),
            9 => Some(Self::LastAck),
            10 => Some(Self::Listen),
            11 => Some(Self::Closing),
            _ => None,
        }
    }

    /// The name in RFC 9293, with underscores: `CLOSE_WAIT`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Established => "ESTABLISHED",
            Self::SynSent => "SYN_SENT",
            Self::SynRecv => "SYN_RECV",
            Self::FinWait1 => "FIN_WAIT1",
            Self::FinWait2 => "FIN_WAIT2",
            Self::TimeWait => "TIME_WAIT",
            Self::Close => "CLOSE",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::Listen => "LISTEN",
            Self::Closing => "CLOSING",
        }
    }

    /// This state's bit in a mask of states.
    #[must_use]
    pub const fn bit(self) -> u16 {
        1 << self as u16
    }
}
