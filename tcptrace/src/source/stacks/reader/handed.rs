//! A file that was handed over as a descriptor, read by position alone: there is no other system call for it here.

use std::{
    fs::File,
    io,
    ops::Deref,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    rc::Rc,
};

use rustix::fs::fstat;

use super::{
    super::worker::protocol::FileId,
    ledger::{Charge, Ledger},
};

/// See the [module](self).
pub(super) struct Handed {
    file: File,
    pub(super) id: FileId,
}

impl Handed {
    pub(super) fn new(descriptor: OwnedFd) -> Option<Self> {
        let id = identify(&descriptor)?;
        let file = File::from(descriptor);
        Some(Self { file, id })
    }

    /// Bytes from there on; fewer at the end of the file.
    pub(super) fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let mut read = 0;
        while read < bytes.len() {
            match self.file.read_at(&mut bytes[read..], at + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    /// A part of the file, whole or not at all. `Err(TooLarge)` before anything is read if there is no room for it.
    pub(super) fn bytes(&self, at: u64, len: u64, ledger: &Ledger) -> Result<Bytes, NoBytes> {
        if at.checked_add(len).is_none_or(|end| end > self.id.size) {
            return Err(NoBytes::Beyond);
        }
        let charge = ledger.charge(len).ok_or(NoBytes::TooLarge)?;
        let len = usize::try_from(len).map_err(|_| NoBytes::TooLarge)?;
        let mut bytes = vec![0; len];
        match self.read_at(&mut bytes, at) {
            Ok(read) if read == len => Ok(Bytes::new(bytes, charge)),
            _ => Err(NoBytes::Beyond),
        }
    }
}

/// Which file it is, and as of when.
pub(in super::super) fn identify(descriptor: &OwnedFd) -> Option<FileId> {
    let stat = fstat(descriptor).ok()?;
    let (seconds, nanoseconds) = (i128::from(stat.st_mtime), i128::from(stat.st_mtime_nsec));
    Some(FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
        size: u64::try_from(stat.st_size).ok()?,
        modified: seconds * 1_000_000_000 + nanoseconds,
    })
}

/// Why a part of a file is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoBytes {
    /// It is not in the file, or cannot be read.
    Beyond,
    /// It would take more memory than there is.
    TooLarge,
}

/// Bytes that are counted for as long as anybody has them.
#[derive(Clone)]
pub(super) struct Bytes(Rc<Counted>);

struct Counted {
    bytes: Box<[u8]>,
    _charge: Charge,
}

impl Bytes {
    pub(super) fn new(bytes: Vec<u8>, charge: Charge) -> Self {
        Self(Rc::new(Counted {
            bytes: bytes.into(),
            _charge: charge,
        }))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.bytes
    }
}
