//! The kernel side of tcptrace: probes that write fixed-size records into a ring buffer, and decide
//! nothing but what was asked for at load.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod accept;
#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod open_sockets;
#[cfg(target_arch = "bpf")]
mod output;
#[cfg(target_arch = "bpf")]
mod select;
#[cfg(target_arch = "bpf")]
mod stack;
#[cfg(target_arch = "bpf")]
mod timewait;
#[cfg(target_arch = "bpf")]
mod timewait_functions;
#[cfg(target_arch = "bpf")]
mod timewait_timers;
#[cfg(target_arch = "bpf")]
mod transition;
#[cfg(target_arch = "bpf")]
mod tree;

/// Nothing here panics; the language wants a handler all the same.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// `bpf_get_stack`, `bpf_ringbuf_*` and others are for programs under a GPL-compatible licence.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// On any other target there is nothing to run; this lets the workspace be checked as a whole.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
