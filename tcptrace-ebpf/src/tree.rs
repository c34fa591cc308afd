//! Which processes descend from the one whose tree is watched.

use tcptrace_ebpf::Field;

use crate::kernel::{Probe, Read, Typed, config, offset};

/// How many generations are followed upwards. The verifier goes through them one by one: with a root, a
/// program takes it up to 47,000 steps on 6.1 and 15,300 on 6.12 to 7.2, of the million it allows.
const GENERATIONS: u32 = 64;

/// `sizeof(struct upid)` (`include/linux/pid.h`) on every 64-bit kernel: a number and a pointer.
const UPID_SIZE: usize = 16;

/// Whether the process led by the task at `leader` descends from the root; false without one.
///
/// # Safety
/// `leader` must be a `task_struct` that the verifier knows.
#[inline(always)]
pub(crate) unsafe fn contains(leader: *const u8) -> bool {
    if config!(tree_root) == 0 {
        return false;
    }
    let mut process = leader;
    for _ in 0..GENERATIONS {
        // SAFETY: the caller's promise; a chain of typed loads ends in zeros at a null pointer.
        unsafe {
            // The parent is the thread that forked. Its process stays the parent when the thread ends.
            let thread: *const u8 = Typed::field(process, Field::TaskParent);
            let parent: *const u8 = Typed::field(thread, Field::TaskLeader);
            if is_root(parent) {
                return true;
            }
            // The idle task, which started the first process, is its own parent.
            if parent == process {
                return false;
            }
            process = parent;
        }
    }
    false
}

/// Whether this is the process that [`Config::tree_root`](tcptrace_ebpf::Config::tree_root) names.
///
/// It knows its number in its own pid namespace, and the namespace; not its number in the initial one.
#[inline(always)]
unsafe fn is_root(leader: *const u8) -> bool {
    // SAFETY: all reads are by helper, and give 0 where nothing is mapped.
    unsafe {
        let pid: *const u8 = Probe::field(leader, Field::TaskPid);
        let level: u32 = Probe::field(pid, Field::PidLevel);
        let numbers = pid.wrapping_add(offset(Field::PidNumbers) as usize);
        let own = numbers.wrapping_add(level as usize * UPID_SIZE);
        let number: u32 = Probe::field(own, Field::UpidNumber);
        if number != config!(tree_root) {
            return false;
        }
        let namespace: *const u8 = Probe::field(own, Field::UpidNamespace);
        let inode: u32 = Probe::field(namespace, Field::PidNsInode);
        inode == config!(tree_pid_ns)
    }
}
