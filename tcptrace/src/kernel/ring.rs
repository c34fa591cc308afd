//! The ring buffer that the probes write into, and how full it is.

use std::{
    io,
    ops::Deref,
    os::fd::{AsFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicUsize, Ordering},
};

use aya::maps::{MapData, RingBuf, ring_buf::RingBufItem};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A position in the ring buffer: how many bytes the probes had written, since the buffer exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(usize);

impl Mark {
    /// How many bytes the probes have written from `earlier` to here.
    #[must_use]
    pub const fn bytes_since(self, earlier: Self) -> usize {
        self.0.wrapping_sub(earlier.0)
    }
}

/// The reading end of the ring buffer.
///
/// The kernel shares both positions with its reader (`kernel/bpf/ringbuf.c`, 5.8 to 7.2): the consumer's in the first
/// page of the map, the producer's in the second. So neither takes a system call to read.
pub struct Ring {
    records: RingBuf<MapData>,
    size: usize,
    consumer: Position,
    producer: Position,
}

impl Ring {
    /// The ring buffer `records` of `size` bytes.
    ///
    /// # Errors
    /// When a page of it cannot be mapped: no memory is left, or no mapping.
    pub fn new(records: RingBuf<MapData>, size: u32) -> io::Result<Self> {
        let page = rustix::param::page_size();
        Ok(Self {
            consumer: Position::map(records.as_fd(), 0)?,
            producer: Position::map(records.as_fd(), page as u64)?,
            records,
            size: size as usize,
        })
    }

    /// The next record; `None` if there is none, or the next one is still being written.
    pub fn read(&mut self) -> Option<impl Deref<Target = [u8]>> {
        self.records.next().map(|item: RingBufItem<'_>| item)
    }

    /// Where the probes have come to.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.producer.load())
    }

    /// How many bytes it holds.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Whether every record from before `mark` has been read.
    #[must_use]
    pub fn is_past(&self, mark: Mark) -> bool {
        // Positions wrap around, differences do not: neither is ahead of the other by more than the buffer's size.
        mark.0.wrapping_sub(self.consumer.load()).cast_signed() <= 0
    }

    /// Whether so much of the buffer waits to be read that the reader should not sleep: a quarter of it.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.producer.load().wrapping_sub(self.consumer.load()) >= self.size / 4
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.records.as_fd()
    }
}

/// One of the two positions.
struct Position(NonNull<AtomicUsize>);

impl Position {
    /// Maps the page at `offset` of the map.
    fn map(map: BorrowedFd<'_>, offset: u64) -> io::Result<Self> {
        let page = rustix::param::page_size();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe {
            let flags = MapFlags::SHARED;
            mmap(ptr::null_mut(), page, ProtFlags::READ, flags, map, offset)?
        };
        NonNull::new(at.cast())
            .map(Self)
            .ok_or_else(|| io::Error::other("a mapping at address 0"))
    }

    fn load(&self) -> usize {
        // SAFETY: the page is mapped until `drop`, and its first word is a position (`struct bpf_ringbuf`), which the
        // kernel and aya read and write as a whole.
        unsafe { self.0.as_ref() }.load(Ordering::Acquire)
    }
}

impl Drop for Position {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing refers to it any more. It cannot fail.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), rustix::param::page_size()) };
    }
}
