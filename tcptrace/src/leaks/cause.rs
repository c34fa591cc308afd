//! Why a socket stays in CLOSE_WAIT.

use tcptrace_ebpf::State;

use crate::event::{Detail, Row};

/// Why nobody closes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// It has read everything, or could have read no more than it did, and did not close.
    Drained,
    /// It has not read the end of file, nor perhaps data before it.
    EofUnread,
    /// Nobody has accepted the connection.
    NotAccepted,
    /// It is writing to a peer that takes nothing any more.
    WriteBlocked,
    /// The connection is over, and the descriptor was never closed.
    Finished,
    /// Not known: the look did not show enough, or the socket is in another state.
    Unknown,
}

impl Cause {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 6] = [
        Self::Drained,
        Self::EofUnread,
        Self::NotAccepted,
        Self::WriteBlocked,
        Self::Finished,
        Self::Unknown,
    ];

    /// As it is written in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drained => "drained",
            Self::EofUnread => "eof_unread",
            Self::NotAccepted => "not_accepted",
            Self::WriteBlocked => "write_blocked",
            Self::Finished => "finished",
            Self::Unknown => "unknown",
        }
    }
}

/// What a look, or two, say of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// The peer has only shut its sending side, and still gets an answer: no leak.
    HalfClosed,
    /// It is not used any more.
    Left(Cause),
}

/// Why the socket of `row` is in its state; the first that fits.
///
/// `moved`: whether its send queue has changed since the look before, `None` without one.
/// `accepted`: somebody has accepted it since. `lately`: what was sent after this boot time was sent
/// lately.
pub(super) fn of(row: &Row, moved: Option<bool>, accepted: bool, lately: u64) -> Finding {
    let left = match (row.state, row.detail) {
        (State::Close, _) => Cause::Finished,
        (State::CloseWait, _) if row.inode == 0 && !accepted => Cause::NotAccepted,
        (State::CloseWait, Some(detail)) => return close_wait(row.time, &detail, moved, lately),
        _ => Cause::Unknown,
    };
    Finding::Left(left)
}

fn close_wait(seen: u64, detail: &Detail, moved: Option<bool>, lately: u64) -> Finding {
    // What is sent again says nothing of the application.
    let sent_lately = detail.retransmits == 0
        && detail
            .last_data_sent_ms
            .is_some_and(|ms| seen.saturating_sub(u64::from(ms) * 1_000_000) > lately);
    if sent_lately || detail.send_queue > 0 && moved == Some(true) {
        return Finding::HalfClosed;
    }
    // Whether it still answers its peer, is not known.
    if detail.last_data_sent_ms.is_none() {
        return Finding::Left(Cause::Unknown);
    }
    Finding::Left(match (detail.send_queue, detail.recv_queue) {
        (0, 0) => Cause::Drained,
        (0, _) => Cause::EofUnread,
        _ if moved.is_some() => Cause::WriteBlocked,
        // Whether it moves, a second look will show.
        _ => Cause::Unknown,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Socket, Tuple};

    #[test]
    fn without_a_time_nothing_is_guessed() {
        let mut row = Row {
            time: 1_000_000_000_000,
            socket: Socket {
                cookie: 1,
                netns: 1,
                tuple: Tuple {
                    local_addr: [0; 16],
                    remote_addr: [0; 16],
                    local_port: 1,
                    remote_port: 2,
                },
            },
            state: State::CloseWait,
            inode: 7,
            cgroup: 0,
            time_wait_ms: None,
            detail: Some(Detail::default()),
        };
        let lately = row.time - 60_000_000_000;
        let unknown = Finding::Left(Cause::Unknown);
        assert_eq!(of(&row, None, false, lately), unknown);
        for (ms, finding) in [
            (59_000, Finding::HalfClosed),
            (61_000, Finding::Left(Cause::Drained)),
        ] {
            let detail = row.detail.get_or_insert_default();
            detail.last_data_sent_ms = Some(ms);
            assert_eq!(of(&row, None, false, lately), finding, "{ms}");
        }
        // A queue that moves tells without, and so does nobody having accepted it.
        let detail = row.detail.insert(Detail::default());
        detail.send_queue = 1;
        assert_eq!(of(&row, Some(true), false, lately), Finding::HalfClosed);
        assert_eq!(of(&row, Some(false), false, lately), unknown);
        row.inode = 0;
        let not_accepted = Finding::Left(Cause::NotAccepted);
        assert_eq!(of(&row, None, false, lately), not_accepted);
    }
}
