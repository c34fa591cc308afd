//! Which processes hold TCP sockets: their descriptors, one by one, as the kernel walks all open files.

use core::ptr;

use aya_ebpf::helpers::{bpf_seq_write, bpf_sock_from_file};
use tcptrace_ebpf::{Field, OpenSocket};

use crate::kernel::{AF_INET, AF_INET6, IPPROTO_MPTCP, IPPROTO_TCP, Read, Typed};

/// `struct bpf_iter__task_file` (`kernel/bpf/task_iter.c`, 5.8 to 7.3), each member 8-aligned.
#[repr(C)]
struct TaskFile {
    /// `struct bpf_iter_meta`, which begins with the file that is written to.
    meta: *const u8,
    /// Null at the end of the walk, as is `file`.
    task: *const u8,
    fd: u32,
    file: *const u8,
}

/// One descriptor of one table. Threads that share the table of their process's first thread are passed over by
/// the kernel. (There is no macro for iterators.)
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn open_sockets(ctx: *const TaskFile) -> i32 {
    // SAFETY: the context is of this type. Task and file are held while this runs; chains of typed loads end in zeros
    // at a null pointer. Volatile, or the compiler asks in one comparison whether one of two pointers is null, which
    // the verifier does not allow.
    unsafe {
        let meta = ptr::read_volatile(&raw const (*ctx).meta);
        let task = ptr::read_volatile(&raw const (*ctx).task);
        let file = ptr::read_volatile(&raw const (*ctx).file);
        if task.is_null() || file.is_null() {
            return 0;
        }
        let socket: *const u8 = bpf_sock_from_file(file.cast_mut().cast()).cast();
        if socket.is_null() {
            return 0;
        }
        let sk: *const u8 = Typed::field(socket, Field::SocketSock);
        let family: u16 = Typed::field(sk, Field::SkcFamily);
        let protocol: u16 = Typed::field(sk, Field::SkProtocol);
        // A subflow of an MPTCP socket has the file of that.
        if !matches!(family, AF_INET | AF_INET6) || !matches!(protocol, IPPROTO_TCP | IPPROTO_MPTCP)
        {
            return 0;
        }
        let pid: u32 = Typed::field(task, Field::TaskProcess);
        let tid: u32 = Typed::field(task, Field::TaskThread);
        if pid != tid {
            // A table of its own. It counts for the process only if the first thread has none any more.
            let leader: *const u8 = Typed::field(task, Field::TaskLeader);
            let table: *const u8 = Typed::field(leader, Field::TaskFiles);
            if !table.is_null() {
                return 0;
            }
        }
        let inode: *const u8 = Typed::field(file, Field::FileInode);
        let number: u64 = Typed::field(inode, Field::InodeNumber);
        let found = OpenSocket {
            inode: number as u32,
            pid,
            tid,
            fd: ptr::read_volatile(&raw const (*ctx).fd),
        };
        let seq: *const u8 = ptr::read_volatile(meta.cast());
        // Where there is no room, the kernel comes again with the same file.
        bpf_seq_write(
            seq.cast_mut().cast(),
            (&raw const found).cast_mut().cast(),
            size_of::<OpenSocket>() as u32,
        );
    }
    0
}
