//! Timewait sockets by their timer: for kernels that refuse function probes.
//!
//! Costs one comparison for every timer operation of the machine.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use tcptrace_ebpf::{Field, Kind};

use crate::{
    kernel::{Read, Typed, config, offset},
    timewait,
};

/// `timer_start(struct timer_list *timer, ...)`: what follows differs between kernels and is not read.
#[btf_tracepoint(function = "timer_start")]
pub(crate) fn timer_start(ctx: BtfTracePointContext) -> i32 {
    if let Some(tw) = timewait_of(&ctx) {
        // SAFETY: the timer is one inside an `inet_timewait_sock`.
        unsafe { timewait::write(&ctx, tw, Kind::TimeWaitArmed, |_, _| 0) }
    }
    0
}

/// `timer_cancel(struct timer_list *timer)`: fires on expiry as well.
#[btf_tracepoint(function = "timer_cancel")]
pub(crate) fn timer_cancel(ctx: BtfTracePointContext) -> i32 {
    if let Some(tw) = timewait_of(&ctx) {
        let callers = |jiffies, expires| {
            if jiffies < expires {
                timewait::callers(&ctx)
            } else {
                0
            }
        };
        // SAFETY: the timer is one inside an `inet_timewait_sock`.
        unsafe { timewait::write(&ctx, tw, Kind::TimeWaitDone, callers) }
    }
    0
}

/// The timewait socket that the timer is inside of, if it is one's.
#[inline(always)]
fn timewait_of(ctx: &BtfTracePointContext) -> Option<*const u8> {
    let timer: *const u8 = ctx.arg(0);
    // SAFETY: the tracepoint's typed argument.
    let function: u64 = unsafe { Typed::field(timer, Field::TimerFunction) };
    let handler = config!(tw_timer_handler);
    if handler == 0 || function != handler {
        return None;
    }
    Some(timer.wrapping_sub(offset(Field::TwTimer) as usize))
}
