//! The file system that a virtual machine starts with: an archive that the kernel unpacks into memory
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use anyhow::{Context as _, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

/// An archive that is being written.
pub(super) struct Initramfs<W> {
    to: W,
    inodes: u32,
}

impl Initramfs<File> {
    /// Begins one in a file, with the folders and the device that the kernel needs before anything is
    /// mounted.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut archive = Self {
            to: file,
            inodes: 0,
        };
        for folder in [
            "dev",
            "proc",
            "sys",
            "run",
            "tmp",
            "tests",
            "tests/deps",
            "modules",
        ] {
            archive.folder(folder)?;
        }
        archive.console()?;
        Ok(archive)
    }
}

impl<W: Write> Initramfs<W> {
    /// Adds a program.
    pub(super) fn program(&mut self, name: &str, from: &Path) -> Result<()> {
        self.copy(name, from, 0o755)
    }

    /// Adds a copy of a file.
    pub(super) fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        self.copy(name, from, 0o644)
    }

    /// Adds a file with this content.
    pub(super) fn content(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let entry = self.entry(name, ModeFileType::Regular, 0o644);
        Ok(self.write(entry, content)?)
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Result<()> {
        trailer(&mut self.to)?;
        Ok(self.to.flush()?)
    }

    fn copy(&mut self, name: &str, from: &Path, mode: u32) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let entry = self.entry(name, ModeFileType::Regular, mode);
        Ok(self.write(entry, &content)?)
    }

    fn folder(&mut self, name: &str) -> Result<()> {
        let entry = self.entry(name, ModeFileType::Directory, 0o755);
        Ok(self.write(entry, &[])?)
    }

    /// `/dev/console`, which the kernel opens for the first process.
    fn console(&mut self) -> Result<()> {
        let entry = self.entry("dev/console", ModeFileType::Char, 0o600);
        let entry = entry.rdev_major(5).rdev_minor(1);
        Ok(self.write(entry, &[])?)
    }

    fn entry(&mut self, name: &str, kind: ModeFileType, mode: u32) -> Builder {
        self.inodes += 1;
        let entry = Builder::new(name).ino(self.inodes).nlink(1).mode(mode);
        entry.set_mode_file_type(kind)
    }

    fn write(&mut self, entry: Builder, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut writer = entry.write(&mut self.to, length);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}
