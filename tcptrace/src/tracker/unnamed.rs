//! Children of a listener whose first change tells of the listener instead.
//!
//! A child is a copy of its listener, and up to 6.12 the kernel announces `LISTEN > SYN_RECV` before it
//! has given the copy its peer and its own cookie (measured on 6.1 and 6.12; 6.16 and later do it the
//! other way round). The next change, microseconds later, has both.

use std::collections::VecDeque;

use tcptrace_ebpf::State;

use crate::event::Transition;

/// How many are kept. Each waits only until the handshake's last step, on its CPU: there are no more than
/// CPUs, but for those of TCP Fast Open, which may stay longer, and whose beginning is then forgotten.
const MOST: usize = 256;
/// The longest that is waited, nanoseconds.
const LONGEST_NS: u64 = 1_000_000_000;

/// Namespace, listener's port and time of each.
#[derive(Default)]
pub(super) struct Children(VecDeque<(u32, u16, u64)>);

impl Children {
    /// A child was made, and it is not known which.
    pub(super) fn push(&mut self, made: &Transition) {
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        let socket = &made.socket;
        self.0
            .push_back((socket.netns, socket.tuple.local_port, made.time));
    }

    /// The child that leaves SYN_RECV here, as it would have been announced: the last that was made for
    /// its port.
    pub(super) fn take(&mut self, next: &Transition) -> Option<Transition> {
        let socket = &next.socket;
        let at = self.0.iter().rposition(|(netns, port, time)| {
            (*netns, *port) == (socket.netns, socket.tuple.local_port)
                && *time <= next.time
                && next.time - *time < LONGEST_NS
        })?;
        let (_, _, time) = self.0.remove(at)?;
        Some(Transition {
            time,
            old: State::Listen,
            new: State::SynRecv,
            error: 0,
            shutdown: 0,
            owned: false,
            has_socket: false,
            inode: 0,
            ..*next
        })
    }
}
