//! The ring buffer, and the counters of what did not go into it.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
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
pub(crate) struct Room<T: 'static> {
    entry: RingBufEntry<T>,
    wake: u32,
}

/// Reserves room for a record; counts it as lost when there is none.
#[inline(always)]
pub(crate) fn reserve<T: 'static>() -> Option<Room<T>> {
    // A reader that has something to read is awake, or looks again within 20 ms. So only the record
    // that ends an empty spell wakes it. Ask before reserving: afterwards it is never empty.
    let wake = if RECORDS.query(u64::from(BPF_RB_AVAIL_DATA)) == 0 {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    };
    match RECORDS.reserve::<T>(0) {
        Some(entry) => Some(Room { entry, wake }),
        None => {
            count(Counter::Lost);
            None
        }
    }
}

impl<T> Room<T> {
    /// Where the record goes.
    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        MaybeUninit::as_mut_ptr(&mut self.entry)
    }

    /// Hands the record over. Every byte of it must have been written.
    #[inline(always)]
    pub(crate) fn submit(self) {
        self.entry.submit(u64::from(self.wake));
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
