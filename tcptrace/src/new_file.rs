//! Files that tcptrace writes: recordings and reports. It mostly runs as root, and somebody else may have put something
//! in the way.
//!
//! - A new file can be read by its owner alone (mode 0600).
//! - No symbolic link is followed, and nothing is written to a block device.
//! - An older recording or report is overwritten only if asked to (`--force`), and any other file never.
//! - A file or pipe of another user in a folder where anybody may put one, such as `/tmp`, is not written to, whatever
//!   `fs.protected_regular` and `fs.protected_fifos` say.
//!
//! `/dev/stdout`, `/dev/stderr` and `/dev/fd/N` are the descriptors that this process was given. Pipes and character
//! devices are opened as they are; opening a pipe waits for its reader.

use std::{
    fmt,
    fs::File,
    io::{self, Seek as _, Write},
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, Stat, fstat, lstat, open},
    io::Errno,
};

use crate::{exhausted, invoker};

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// `tcptrace record FILE`.
    Recording,
    /// `tcptrace leaks --report FILE`.
    Report,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recording => "recording",
            Self::Report => "report",
        })
    }
}

/// A file that can be written to. What was in it before is there until the first write.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    /// It holds an older recording or report.
    is_old: bool,
    path: PathBuf,
    content: Content,
}

/// Opens a file to be written. Blocks where `path` is a pipe, until somebody reads it.
///
/// # Errors
/// When it may not or cannot be written: what, why, and what to do. Nothing has been changed then.
pub fn create(path: &Path, content: Content, force: bool) -> io::Result<NewFile> {
    let (file, is_old) = open_new(path, content, force).map_err(|refusal| {
        let path = path.display();
        let text = match &refusal {
            Refusal::Failed(error) => {
                let fix = error.raw_os_error().and_then(exhausted::fix);
                let fix = fix.unwrap_or("give the path of a file that can be made");
                format!("cannot write the {content} {path}: {error}; {fix}")
            }
            Refusal::Because(why, fix) => {
                format!("cannot write the {content} {path}: {why}; {fix}")
            }
        };
        let kind = match refusal {
            Refusal::Failed(error) => error.kind(),
            Refusal::Because(..) => io::ErrorKind::AlreadyExists,
        };
        io::Error::new(kind, text)
    })?;
    Ok(NewFile {
        file,
        is_old,
        path: path.to_owned(),
        content,
    })
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.empty()
            .and_then(|()| self.file.write(bytes))
            .map_err(|error| self.explain(&error))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl NewFile {
    /// Throws away what was in the file before.
    fn empty(&mut self) -> io::Result<()> {
        if self.is_old {
            self.file.set_len(0)?;
            self.file.rewind()?;
            // Older versions left it for everybody to read. Fails for a file of another user, who knows the mode.
            let _ = self.file.set_permissions(PermissionsExt::from_mode(0o600));
            self.is_old = false;
        }
        Ok(())
    }

    fn explain(&self, error: &io::Error) -> io::Error {
        let Some(fix) = error.raw_os_error().and_then(exhausted::fix_of_write) else {
            return io::Error::new(
                error.kind(),
                format!(
                    "cannot write the {} {}: {error}",
                    self.content,
                    self.path.display()
                ),
            );
        };
        let text = format!(
            "cannot write the {} {}: {error}; {fix}",
            self.content,
            self.path.display()
        );
        io::Error::new(error.kind(), text)
    }
}

/// Why a file is not written.
enum Refusal {
    /// The kernel says why.
    Failed(io::Error),
    /// Why, and what to do.
    Because(String, &'static str),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno.into())
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

const OTHER_NAME: &str = "give another name, or remove it yourself";

/// The file, and whether something of ours is in it.
fn open_new(path: &Path, content: Content, force: bool) -> Result<(File, bool), Refusal> {
    if let Some(number) = own_descriptor(path) {
        return Ok((duplicate(number)?, false));
    }
    let always = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    let found = match lstat(path) {
        Ok(found) => found,
        Err(Errno::NOENT) => {
            let flags = always | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            return Ok((open(path, flags, Mode::RUSR | Mode::WUSR)?.into(), false));
        }
        Err(error) => return Err(error.into()),
    };
    let refuse = |why: &str, fix| Err(Refusal::Because(why.to_owned(), fix));
    let kind = FileType::from_raw_mode(found.st_mode);
    let access = match kind {
        FileType::RegularFile => OFlags::RDWR,
        FileType::Fifo | FileType::CharacterDevice => OFlags::WRONLY,
        FileType::Symlink => {
            return refuse(
                "it is a symbolic link, and links are not followed",
                "give the path of the file itself",
            );
        }
        FileType::Directory => return refuse("it is a folder", "give the path of a file in it"),
        _ => return refuse("it is no file, no pipe and no terminal", OTHER_NAME),
    };
    if kind != FileType::CharacterDevice && is_planted(path, &found) {
        return refuse(
            &format!("it belongs to another user (uid {})", found.st_uid),
            "give a path in a folder of your own",
        );
    }
    let file = File::from(open(path, always | access, Mode::empty())?);
    let opened = fstat(&file)?;
    if (opened.st_dev, opened.st_ino) != (found.st_dev, found.st_ino) {
        return refuse("another file has just taken its place", OTHER_NAME);
    }
    if kind != FileType::RegularFile || opened.st_size == 0 {
        return Ok((file, false));
    }
    match (what_is_in(&file)?, force) {
        (Some(_), true) => Ok((file, true)),
        (Some(old), false) => Err(Refusal::Because(
            format!("there is a {old} in it already"),
            "give another name, or --force to overwrite it",
        )),
        (None, _) => Err(Refusal::Because(
            format!("there is something in it that is no {content} of tcptrace"),
            OTHER_NAME,
        )),
    }
}

/// The number in `/dev/fd/7`.
fn own_descriptor(path: &Path) -> Option<i32> {
    match path.to_str()? {
        "/dev/stdout" => Some(1),
        "/dev/stderr" => Some(2),
        path => {
            let number = path
                .strip_prefix("/dev/fd/")
                .or_else(|| path.strip_prefix("/proc/self/fd/"))?;
            let number: u16 = number.parse().ok()?;
            Some(number.into())
        }
    }
}

fn duplicate(number: i32) -> io::Result<File> {
    // SAFETY: takes numbers; a descriptor that is not open is an error.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    // What this process has opened itself, a BPF map for instance, has no type of a file.
    let kind = FileType::from_raw_mode(fstat(&copy)?.st_mode);
    if matches!(kind, FileType::Unknown | FileType::Directory) {
        return Err(Errno::BADF.into());
    }
    Ok(File::from(copy))
}

/// Whether somebody else has put this file in a folder where anybody can, and only the owner of a file can remove it:
/// neither this user, nor the one who called `sudo`, nor the owner of the folder.
fn is_planted(path: &Path, found: &Stat) -> bool {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let Ok(folder) = folder.metadata() else {
        return false;
    };
    const STICKY_FOR_ALL: u32 = 0o1002;
    let own = rustix::process::geteuid().as_raw();
    folder.mode() & STICKY_FOR_ALL == STICKY_FOR_ALL
        && ![Some(own), Some(folder.uid()), invoker::uid()].contains(&Some(found.st_uid))
}

/// What of ours a file holds, by its beginning.
fn what_is_in(file: &File) -> io::Result<Option<Content>> {
    let mut head = [0; 64];
    let length = file.read_at(&mut head, 0)?;
    let head = &head[..length];
    Ok(
        if head.starts_with(br#"{"event":"start","#) || head.starts_with(br#"{"record":"#) {
            Some(Content::Recording)
        } else if head.starts_with(br#"{"event":""#) || is_text_report(head) {
            Some(Content::Report)
        } else {
            None
        },
    )
}

/// `12:34:56 UTC  ...`.
fn is_text_report(head: &[u8]) -> bool {
    const FORM: &[u8] = b"00:00:00 UTC  ";
    head.len() >= FORM.len()
        && head.iter().zip(FORM).all(|(found, form)| match form {
            b'0' => found.is_ascii_digit(),
            _ => found == form,
        })
}

#[cfg(test)]
mod tests;
