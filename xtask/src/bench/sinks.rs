//! Where a tracer writes while its held rate is measured, and what it wrote last.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

/// So much of an output's end is kept: its last lines.
const TAIL: u64 = 1 << 16;
/// A file in memory is freed up to its last bytes whenever this much has been written.
const FREE_EVERY: u64 = 64 << 20;
const POLL: Duration = Duration::from_millis(50);

/// A kind of sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Sink {
    /// `/dev/null`.
    Null,
    /// A file in a tmpfs.
    Tmpfs,
    /// A file on the disk that has the target directory.
    Disk,
    /// A pipe that a thread of the bench reads.
    Pipe,
}

impl Sink {
    pub(super) const ALL: [Self; 4] = [Self::Null, Self::Tmpfs, Self::Disk, Self::Pipe];

    /// What the pages call it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Null => "/dev/null",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
            Self::Pipe => "pipe",
        }
    }

    /// The file that is written; none for a pipe. `folder` lies in memory, its parent on a disk.
    pub(super) fn path(self, folder: &Path) -> Result<PathBuf> {
        Ok(match self {
            Self::Null | Self::Pipe => "/dev/null".into(),
            Self::Tmpfs => folder.join("held"),
            Self::Disk => folder
                .parent()
                .context("the folder has no parent")?
                .join("bench-disk"),
        })
    }
}

/// A sink that a tracer writes to. Its file is removed when this value goes.
pub(super) struct Opened {
    path: Option<PathBuf>,
    is_over: Arc<AtomicBool>,
    /// Keeps a file in memory small; or reads a pipe, and returns the last of it.
    helper: Option<JoinHandle<Vec<u8>>>,
}

impl Opened {
    /// Opens a sink. Returns what the tracer's standard output is to be as well.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(super) fn new(sink: Sink, folder: &Path) -> Result<(Self, Stdio)> {
        let is_over = Arc::new(AtomicBool::new(false));
        let path = sink.path(folder)?;
        let make =
            || File::create(&path).with_context(|| format!("cannot make {}", path.display()));
        let (path, helper, stdio): (_, _, Stdio) = match sink {
            Sink::Null => (None, None, make()?.into()),
            Sink::Disk => (Some(path.clone()), None, make()?.into()),
            Sink::Tmpfs => {
                let file = make()?;
                let (shrunk, is_over) = (file.try_clone()?, Arc::clone(&is_over));
                let helper = thread::spawn(move || {
                    free(&shrunk, &is_over);
                    Vec::new()
                });
                (Some(path.clone()), Some(helper), file.into())
            }
            Sink::Pipe => {
                let (reader, writer) = std::io::pipe()?;
                let helper = thread::spawn(move || drain(reader));
                (None, Some(helper), OwnedFd::from(writer).into())
            }
        };
        let opened = Self {
            path,
            is_over,
            helper,
        };
        Ok((opened, stdio))
    }

    /// The last of what was written, once the tracer has ended; empty for `/dev/null`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn tail(mut self) -> Result<String> {
        self.is_over.store(true, Ordering::Relaxed);
        let mut bytes = self
            .helper
            .take()
            .and_then(|helper| helper.join().ok())
            .unwrap_or_default();
        if let Some(path) = &self.path {
            let mut file = File::open(path)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(end.saturating_sub(TAIL)))?;
            file.read_to_end(&mut bytes)?;
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

/// Gives the memory of all but the last bytes of a file back, until it is over: what the tracer writes in ten seconds
/// may be more than the machine has. The tracer's position in the file stays as it is.
fn free(file: &File, is_over: &AtomicBool) {
    let mut freed = 0;
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(POLL);
        let Ok(metadata) = file.metadata() else {
            return;
        };
        let end = metadata.len().saturating_sub(TAIL) / TAIL * TAIL;
        if end >= freed + FREE_EVERY {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(file, hole, freed.cast_signed(), (end - freed).cast_signed());
            freed = end;
        }
    }
}

/// Reads a pipe to its end. Returns the last of it.
fn drain(mut pipe: std::io::PipeReader) -> Vec<u8> {
    let mut buffer = vec![0; TAIL as usize];
    let mut last = Vec::new();
    while let Ok(length @ 1..) = pipe.read(&mut buffer) {
        if length >= 4096 {
            last.clear();
        }
        last.extend_from_slice(&buffer[..length]);
        if last.len() > 2 * TAIL as usize {
            last.drain(..TAIL as usize);
        }
    }
    last
}
