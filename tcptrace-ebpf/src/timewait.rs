//! The record of a timewait socket, whichever probe saw it.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_stack, bpf_jiffies64},
    macros::map,
    maps::PerCpuArray,
};
use aya_log_ebpf::warn;
use tcptrace_ebpf::{Caller, Field, Kind, State, TextRange, TimeWait};

use crate::{
    kernel::{CONFIG, Common, Probe, Read, has, write_header},
    output, select,
};

/// How many return addresses are looked at, this program's own the first. The farthest that matters,
/// `sock_diag_rcv_msg` seen from `timer_cancel`, is the tenth on 6.1, 6.12 and 7.2.
const FRAME_COUNT: usize = 16;

/// Writes a record of the timewait socket at `tw`. `callers`: who takes it away, if that was asked.
///
/// # Safety
/// `tw` must be the address of an `inet_timewait_sock`.
#[inline(always)]
pub(crate) unsafe fn write(
    ctx: &impl EbpfContext,
    tw: *const u8,
    kind: Kind,
    callers: impl FnOnce(u64, u64) -> u8,
) {
    // SAFETY: the caller's promise; every read is by helper.
    unsafe {
        let mut common = Common::new();
        common.copy(tw);
        let tuple = common.tuple(Probe::field(tw, Field::TwLocalPort));
        if !tuple.is_inet() || !select::socket(&tuple) {
            return;
        }
        let cookie: u64 = common.field(Field::SkcCookie);
        if cookie == 0 {
            // Every socket that changed its state since the probes are attached, or was shown by
            // sock_diag, has one.
            warn!(
                ctx,
                "a timewait socket without a cookie, port {}", tuple.local_port
            );
            return;
        }
        let jiffies = bpf_jiffies64();
        let expires = expires(tw);
        let substate: u8 = Probe::field(tw, Field::TwSubstate);
        if !is_substate(substate) {
            warn!(ctx, "a timewait socket in state {}", substate);
            return;
        }
        let entry_stamp = entry_stamp(tw);
        let callers = callers(jiffies, expires);
        let Some(mut room) = output::reserve::<TimeWait>() else {
            return;
        };
        let record = room.as_mut_ptr();
        write_header(&raw mut (*record).header, kind, cookie, &tuple);
        (*record).jiffies = jiffies;
        (*record).expires = expires;
        (*record).entry_stamp = entry_stamp;
        (*record).substate = substate;
        (*record).callers = callers;
        (*record).reserved = [0; 2];
        room.submit();
    }
}

/// `tw_timer.expires` of the timewait socket at `tw`, in jiffies.
///
/// # Safety
/// As for [`write`].
#[inline(always)]
pub(crate) unsafe fn expires(tw: *const u8) -> u64 {
    use crate::kernel::offset;
    // SAFETY: the caller's promise.
    unsafe { Probe::field(tw.add(offset(Field::TwTimer) as usize), Field::TimerExpires) }
}

/// When it entered TIME_WAIT, as the kernel keeps it; 0 when it does not.
///
/// The stamp is set when the socket is made, and again when the FIN that ends FIN_WAIT2 has a timestamp
/// (6.14, `tcp_timewait_state_process`). Without timestamps it stays at the making.
#[inline(always)]
unsafe fn entry_stamp(tw: *const u8) -> u32 {
    if !has(Field::TwEntryStamp) || !has(Field::TwTimestamps) {
        return 0;
    }
    // SAFETY: the caller's promise; read by helper.
    unsafe {
        let last: i32 = Probe::field(tw, Field::TwTimestamps);
        if last == 0 {
            0
        } else {
            Probe::field(tw, Field::TwEntryStamp)
        }
    }
}

/// Whether the state number is one that a timewait socket can have.
#[inline(always)]
pub(crate) const fn is_substate(number: u8) -> bool {
    number == State::FinWait2 as u8 || number == State::TimeWait as u8
}

/// Return addresses: too many for the 512 bytes of BPF stack. A program never interrupts itself
/// (the kernel skips and counts that), so one per CPU will do.
#[map]
static FRAMES: PerCpuArray<[u64; FRAME_COUNT]> = PerCpuArray::with_max_entries(1, 0);

/// Which of the functions in [`Caller`] are on this CPU's stack: bits.
#[inline(always)]
pub(crate) fn callers(ctx: &impl EbpfContext) -> u8 {
    let Some(frames) = FRAMES.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the helper writes at most the given number of bytes, and zeroes what it leaves.
    let filled = unsafe {
        bpf_get_stack(
            ctx.as_ptr(),
            frames.cast(),
            size_of::<[u64; FRAME_COUNT]>() as u32,
            0,
        )
    };
    if filled <= 0 {
        return 0;
    }
    let ranges: *const TextRange = (&raw const CONFIG.callers).cast();
    let mut found = 0;
    for i in 0..FRAME_COUNT {
        // SAFETY: inside the array; volatile, or the compiler turns the loops inside out.
        let address = unsafe { core::ptr::read_volatile(frames.cast::<u64>().add(i)) };
        for caller in 0..Caller::COUNT {
            // SAFETY: inside the array; volatile, because the user side puts the values in. By
            // pointer, because the verifier refuses the call that a failed bounds check would be.
            let range = unsafe { core::ptr::read_volatile(ranges.add(caller)) };
            found |= range.holds(address) << caller;
        }
    }
    found
}
