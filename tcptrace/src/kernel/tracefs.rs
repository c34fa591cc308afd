//! tracefs, where the kernel shows the numbers of its tracepoints.

use std::{ffi::CStr, io, path::Path, thread};

/// Where aya looks for it.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Runs `work` where tracefs can be seen. Where it is not mounted, that is a thread with a mount
/// namespace of its own: nothing is mounted for anybody else, and it is gone with the thread.
///
/// # Errors
/// When tracefs is not mounted and cannot be.
pub(super) fn with_tracefs<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    if PLACES
        .iter()
        .any(|place| Path::new(place).join("events").is_dir())
    {
        return Ok(work());
    }
    thread::scope(|scope| {
        scope
            .spawn(|| {
                mount_for_this_thread()?;
                Ok(work())
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn mount_for_this_thread() -> io::Result<()> {
    let check = |result| {
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    let mount = |source: &CStr, target: &CStr, kind: &CStr, flags| {
        // SAFETY: three C strings; no data.
        check(unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                flags,
                std::ptr::null(),
            )
        })
    };
    // SAFETY: affects this thread alone, which has a mount namespace of its own from here on.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    // Mounts made here stay here.
    mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_SLAVE)?;
    mount(
        c"tracefs",
        c"/sys/kernel/tracing",
        c"tracefs",
        libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV,
    )
}
