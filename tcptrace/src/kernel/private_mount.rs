//! File systems of the kernel that may not be mounted: seen for a moment, by nobody else.

use std::{ffi::CStr, io, path::Path, thread};

/// Where aya looks for tracefs.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
/// Where security modules show their settings.
pub(super) const SECURITYFS: &str = "/sys/kernel/security";

/// Runs `work` where tracefs can be seen, in which the kernel shows the numbers of its tracepoints.
///
/// # Errors
/// When it is not mounted and cannot be.
pub(super) fn with_tracefs<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let mounted = TRACEFS
        .iter()
        .any(|place| Path::new(place).join("events").is_dir());
    with_mounted(mounted, c"tracefs", c"/sys/kernel/tracing", work)
}

/// Runs `work` where securityfs can be seen.
///
/// # Errors
/// When it is not mounted and cannot be.
pub(super) fn with_securityfs<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    // It has `lsm` wherever there is a security module at all, and there is always one.
    let mounted = Path::new(SECURITYFS).join("lsm").exists();
    with_mounted(mounted, c"securityfs", c"/sys/kernel/security", work)
}

/// Where it is not mounted, `work` runs on a thread with a mount namespace of its own: nothing is mounted
/// for anybody else, and it is gone with the thread.
fn with_mounted<T: Send>(
    mounted: bool,
    kind: &CStr,
    at: &CStr,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    if mounted {
        return Ok(work());
    }
    thread::scope(|scope| {
        thread::Builder::new()
            .name("mount".to_owned())
            .spawn_scoped(scope, || {
                mount_for_this_thread(kind, at)?;
                Ok(work())
            })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn mount_for_this_thread(kind: &CStr, at: &CStr) -> io::Result<()> {
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
        kind,
        at,
        kind,
        libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV,
    )
}
