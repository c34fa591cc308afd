//! Timewait sockets by the functions that make, move and free them: no cost for anything else.

use aya_ebpf::{
    helpers::bpf_jiffies64,
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};
use tcptrace_ebpf::{Field, Kind, State, TimeWait};

use crate::{
    kernel::{Common, Probe, Read, config, write_header},
    output, select, timewait,
};

/// `inet_twsk_alloc(const struct sock *sk, struct inet_timewait_death_row *dr, const int state)`.
///
/// The addresses come from the full socket: IPv6 ones are not in the new socket yet (6.18,
/// `tcp_time_wait`). Its timer is not armed either.
#[fexit(function = "inet_twsk_alloc")]
pub(crate) fn inet_twsk_alloc(ctx: FExitContext) -> i32 {
    let sk: *const u8 = ctx.arg(0);
    let state: i32 = ctx.arg(2);
    let made: *const u8 = ctx.arg(3);
    if made.is_null() || !timewait::is_substate(state as u8) {
        return 0;
    }
    // SAFETY: both are the function's own pointers; all reads are by helper.
    unsafe {
        let mut common = Common::new();
        common.copy(sk);
        let tuple = common.tuple(Probe::field(sk, Field::InetLocalPort));
        if !select::socket(&tuple) {
            return 0;
        }
        let cookie: u64 = Probe::field(made, Field::SkcCookie);
        let Some(mut room) = output::reserve::<TimeWait>() else {
            return 0;
        };
        let record = room.as_mut_ptr();
        write_header(
            &raw mut (*record).header,
            Kind::TimeWaitArmed,
            cookie,
            &tuple,
        );
        (*record).jiffies = bpf_jiffies64();
        (*record).expires = 0;
        (*record).entry_stamp = 0;
        (*record).substate = state as u8;
        (*record).callers = 0;
        (*record).reserved = [0; 2];
        room.submit();
    }
    0
}

/// `tcp_timewait_state_process(struct inet_timewait_sock *tw, ...)`: more arguments came in 6.14.
///
/// Written when it has just armed the timer for a full TIME_WAIT: the end of the FIN_WAIT2 part, or a
/// segment that starts the minute again.
#[fexit(function = "tcp_timewait_state_process")]
pub(crate) fn tcp_timewait_state_process(ctx: FExitContext) -> i32 {
    let tw: *const u8 = ctx.arg(0);
    // SAFETY: the function's own pointer, read by helper: it may have been freed, and then has no
    // reference left.
    unsafe {
        let references: u32 = Probe::field(tw, Field::SkcReferences);
        let substate: u8 = Probe::field(tw, Field::TwSubstate);
        let left = timewait::expires(tw).wrapping_sub(bpf_jiffies64());
        let full = config!(time_wait_jiffies);
        // The clock may have ticked once since.
        if references != 0
            && substate == State::TimeWait as u8
            && (left == full || left + 1 == full)
        {
            timewait::write(&ctx, tw, Kind::TimeWaitArmed, |_, _| 0);
        }
    }
    0
}

/// `tcp_twsk_destructor(struct sock *sk)`, which is a timewait socket: the last that is seen of it.
#[fentry(function = "tcp_twsk_destructor")]
pub(crate) fn tcp_twsk_destructor(ctx: FEntryContext) -> i32 {
    let tw: *const u8 = ctx.arg(0);
    let callers = |jiffies, expires| {
        if jiffies < expires {
            timewait::callers(&ctx)
        } else {
            0
        }
    };
    // SAFETY: the function's own pointer.
    unsafe { timewait::write(&ctx, tw, Kind::TimeWaitDone, callers) };
    0
}
