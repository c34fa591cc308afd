//! The ring buffer, and the counters of what did not go into it.

use core::mem::MaybeUninit;

use aya_ebpf::{
    macros::map,
    maps::{PerCpuArray, RingBuf, ring_buf::RingBufEntry},
};
use tcptrace_ebpf::Counter;

/// The user side sets the real size.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// One number per [`Counter`].
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);

/// Room for one record in the ring buffer.
pub(crate) struct Room<T: 'static>(RingBufEntry<T>);

/// Reserves room for a record; counts it as lost when there is none.
#[inline(always)]
pub(crate) fn reserve<T: 'static>() -> Option<Room<T>> {
    let entry = RECORDS.reserve::<T>(0);
    if entry.is_none() {
        count(Counter::Lost);
    }
    entry.map(Room)
}

impl<T> Room<T> {
    /// Where the record goes.
    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        MaybeUninit::as_mut_ptr(&mut self.0)
    }

    /// Hands the record over. Every byte of it must have been written.
    #[inline(always)]
    pub(crate) fn submit(self) {
        // Without flags the kernel wakes the reader if it has read all that came before
        // (`bpf_ringbuf_commit()`, 5.8 to 7.2). A reader that has something to read is awake, or looks again
        // within 20 ms.
        self.0.submit(0);
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the verifier has seen the bounds; the slot is this CPU's.
        unsafe { *value += 1 }
    }
}
