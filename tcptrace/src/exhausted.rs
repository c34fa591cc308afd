//! What is asked first of every error: whether something ran out, or is not mounted. Nothing is wrong with the kernel
//! then, and nothing is to be reported.

use std::{
    fmt, io,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::reason::Reason;

/// Where the kernel's file of processes is mounted: the fix of what cannot be read there otherwise.
pub const MOUNT_PROC: &str = "mount it: mount -t proc proc /proc";

/// How to get more of what a call ran out of, by the number of its error. `EAGAIN` counts: of the calls that are
/// explained by this, only those that make a thread or a process give it (clone(2)).
#[must_use]
pub const fn fix(errno: i32) -> Option<&'static str> {
    match errno {
        libc::EMFILE => Some("raise the limit of open files (ulimit -n)"),
        libc::ENFILE => Some("raise the system's limit of open files (sysctl fs.file-max)"),
        libc::ENOMEM => Some("free memory, or raise the memory limit of this cgroup (memory.max)"),
        libc::EAGAIN => {
            Some("raise the limit of processes (ulimit -u, or pids.max of this cgroup)")
        }
        _ => None,
    }
}

/// The same of a write to a file.
#[must_use]
pub const fn fix_of_write(errno: i32) -> Option<&'static str> {
    match errno {
        libc::ENOSPC => Some("make room on its file system, or give a path on another"),
        libc::EDQUOT => Some("raise the disk quota, or give a path on another file system"),
        // SIGXFSZ is ignored, so that the error is seen: see `ignore_file_size_signal`.
        libc::EFBIG => Some("raise the limit of a file's size (ulimit -f)"),
        _ => None,
    }
}

/// What can be done about an error of the kernel, if something ran out; `otherwise` if not.
#[must_use]
pub fn fix_or(error: &io::Error, otherwise: &'static str) -> &'static str {
    error.raw_os_error().and_then(fix).unwrap_or(otherwise)
}

/// Why something does not work, where `error` came from the kernel: with `otherwise` as its fix if nothing ran out.
#[must_use]
pub fn reason(what: impl fmt::Display, error: &io::Error, otherwise: &'static str) -> Reason {
    Reason::new(format_args!("{what}: {error}"), fix_or(error, otherwise))
}

/// What can be done about an error that ends the program, if its text does not say so already: that of an error that
/// comes from the kernel as it is.
#[must_use]
pub fn fix_of_end(error: &anyhow::Error) -> Option<&'static str> {
    let mut numbers = error.chain().filter_map(|cause| {
        let error = cause.downcast_ref::<io::Error>()?;
        error.raw_os_error()
    });
    numbers.find_map(|errno| match errno {
        libc::ENOENT if !Path::new("/proc/self/stat").exists() => {
            Some("mount /proc: mount -t proc proc /proc")
        }
        errno => fix(errno),
    })
}

/// Whether SIGXFSZ was ignored before this program did so.
static FILE_SIZE_SIGNAL_IGNORED: AtomicBool = AtomicBool::new(true);

/// Has a write beyond the limit of a file's size fail (`EFBIG`), which can be explained, instead of ending the program
/// without a word (SIGXFSZ). To be called at the start.
pub fn ignore_file_size_signal() {
    // SAFETY: no handler function is installed.
    let before = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    FILE_SIZE_SIGNAL_IGNORED.store(before == libc::SIG_IGN, Ordering::Relaxed);
}

/// Has SIGXFSZ do what it did before, for a program that this process is about to become.
pub(crate) fn default_file_size_signal() {
    if !FILE_SIZE_SIGNAL_IGNORED.load(Ordering::Relaxed) {
        // SAFETY: no handler function is installed.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_DFL) };
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn what_ran_out_is_named_by_its_number() {
        for (errno, word) in [
            (libc::EMFILE, "ulimit -n"),
            (libc::ENFILE, "fs.file-max"),
            (libc::ENOMEM, "memory.max"),
            (libc::EAGAIN, "ulimit -u"),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            let told = reason("it failed", &error, "report it");
            assert!(told.fix.contains(word), "{told}");
            assert!(!told.to_string().contains("report it"), "{told}");
            let ended = anyhow::Error::from(error).context("it failed");
            assert_eq!(fix_of_end(&ended), fix(errno));
        }
        let other = io::Error::from_raw_os_error(libc::EPERM);
        assert_eq!(reason("it failed", &other, "report it").fix, "report it");
    }

    #[test]
    fn an_error_with_words_of_its_own_has_its_fix() {
        let own = io::Error::new(io::ErrorKind::OutOfMemory, "no room; make some");
        let error = Err::<(), _>(own).context("it failed").unwrap_err();
        assert_eq!(fix_of_end(&error), None);
        let missing = anyhow::Error::from(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(fix_of_end(&missing), None, "/proc is mounted here");
    }

    #[test]
    fn a_write_runs_out_of_other_things() {
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            assert!(fix_of_write(errno).is_some());
            assert_eq!(fix(errno), None);
        }
        // A pipe that does not block, and is full.
        assert_eq!(fix_of_write(libc::EAGAIN), None);
    }
}
