//! Where in its code a process calls `connect()` or `accept()`, if that was asked for.
//!
//! A record holds what it takes to walk the user stack later: registers, the top of the stack, and, for
//! a stack that is deeper than that, what the kernel finds by frame pointers. Walking by unwind tables is for
//! user space, which can read files.

use core::ptr;

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_USER_STACK,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_get_stack, bpf_ktime_get_boot_ns,
        bpf_task_pt_regs, generated::bpf_probe_read_user,
    },
};
use tcptrace_ebpf::{CHAIN, Field, Flags, Header, Kind, Stack, Via};

use crate::{
    kernel::{Probe, Read, Typed, config},
    output,
};

/// The smallest page of the kernels that these probes run on. What lies in one is there, or none of it is.
const PAGE: u64 = 4096;

/// Writes where the current task is in its own code, while it calls what `via` says on the socket with this
/// cookie. To be called after the record of the call itself, so that the connection is known by then; `flags`
/// are of that record.
///
/// # Safety
/// `ctx` must be the context of the running program.
#[inline(always)]
pub(crate) unsafe fn write<C: EbpfContext>(ctx: &C, via: Via, cookie: u64, flags: u16) {
    if config!(stacks) == 0 || flags & Flags::KTHREAD != 0 {
        return;
    }
    // Before there is room reserved: that would be lost to others until it is read.
    if config!(tree_root) != 0 && flags & Flags::IN_TREE == 0 {
        return;
    }
    let Some(mut room) = output::reserve::<Stack>() else {
        return;
    };
    let record = room.as_mut_ptr();
    // SAFETY: reserved memory, of which every byte is written but those of `copy` beyond `copied`, and of
    // `chain` beyond `chained`: the kernel hands over what was in the buffer before, which only a reader
    // with its privileges can see, and user space looks at none of it. `current` is typed and always valid;
    // user memory is read by helper.
    unsafe {
        let task = bpf_get_current_task_btf();
        let leader: *const u8 = Typed::field(task.cast(), Field::TaskLeader);
        // The socket is told of by the record of the call.
        (*record).header = Header::ZERO;
        (*record).header.kind = Kind::Stack as u8;
        (*record).header.time = bpf_ktime_get_boot_ns();
        (*record).header.cookie = cookie;
        (*record).header.pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*record).header.start = Typed::field(leader, Field::TaskStart);
        let registers: *const u8 = bpf_task_pt_regs(task) as *const u8;
        let stack: u64 = Probe::field(registers, Field::RegsStack);
        (*record).instruction = Probe::field(registers, Field::RegsInstruction);
        (*record).frame = Probe::field(registers, Field::RegsFrame);
        (*record).stack = stack;
        let mm: *const u8 = Typed::field(task.cast(), Field::TaskMemory);
        (*record).start_stack = Typed::field(mm, Field::MemoryStartStack);
        (*record).via = via as u32;

        let size = (CHAIN * size_of::<u64>()) as u32;
        let chain = (&raw mut (*record).chain).cast();
        let found = bpf_get_stack(ctx.as_ptr(), chain, size, u64::from(BPF_F_USER_STACK));
        (*record).chained = if found > 0 { found as u32 / 8 } else { 0 };

        // Up to the end of the page first, and then the next one: a read that meets a page which is not
        // there gives nothing at all, and beyond the outermost frame there may be none.
        let copy: *mut u8 = (&raw mut (*record).copy).cast();
        let mut copied = 0;
        let first = PAGE - (stack & (PAGE - 1));
        if bpf_probe_read_user(copy.cast(), first as u32, stack as *const _) == 0 {
            copied = first;
            // `first` is read again by way of a volatile, or the compiler would drop the bounds that the
            // verifier wants to see.
            let at = ptr::read_volatile(&raw const first) & (2 * PAGE - 1);
            if at <= PAGE {
                let next = (stack + first) as *const _;
                if bpf_probe_read_user(copy.add(at as usize).cast(), PAGE as u32, next) == 0 {
                    copied += PAGE;
                }
            }
        }
        (*record).copied = copied as u32;
        (*record).reserved = 0;
        room.submit();
    }
}
