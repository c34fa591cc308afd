//! What reading other users' files may take, all in all: 256 MiB of memory, and a share of CPU time for each
//! process that is traced.
//!
//! The memory is divided here, and nowhere else: what the reader may have beyond its own program, of which the
//! [ledger](super::reader) may promise a part, and what waits for it.

use std::time::Duration;

/// All of it, as it is documented.
pub(super) const TOTAL: u64 = 256 << 20;
/// What the reader may take beyond its own program: the kernel refuses more (`RLIMIT_AS`).
pub(super) const READER: u64 = 200 << 20;
/// What it counts before it reads or makes it. The rest is for what cannot be counted before, and for gaps.
pub(super) const LEDGER: u64 = 144 << 20;
/// Records that wait for the reader.
pub(super) const QUEUE: usize = 24 << 20;
/// Stacks that were told, each once: what views keep of them.
pub(super) const TOLD: usize = 32 << 20;
/// Of these and of the queue, what is left to one user or process.
pub(super) const SHARE: usize = 2;

const _: () = assert!(READER + QUEUE as u64 + TOLD as u64 <= TOTAL);

/// Descriptors of the reader. Each file is open once, and perhaps its debug file.
pub(super) const READER_FILES: u64 = 4096;
/// CPU time for a piece of work, in whole seconds, because `RLIMIT_CPU` is. DWARF of 100 MB takes less than one.
pub(super) const READER_CPU: Duration = Duration::from_secs(6);
/// The same by the clock, for what waits: a file can be on a file system that never answers.
pub(super) const READER_WAIT: Duration = Duration::from_secs(20);

/// Of how much CPU time a traced process has a claim on at once ...
pub(super) const CPU_BURST: Duration = Duration::from_secs(2);
/// ... and which part of the time after that.
pub(super) const CPU_PART: u32 = 10;
