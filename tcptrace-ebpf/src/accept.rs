//! Who accepted a connection. Its socket tells only who ran in softirq when the handshake was done.

use aya_ebpf::{
    EbpfContext,
    helpers::bpf_get_current_task_btf,
    macros::{fexit, tracepoint},
    programs::{FExitContext, TracePointContext},
};
use tcptrace_ebpf::{Field, Header, Kind, Via};

use crate::{
    kernel::{Common, IPPROTO_TCP, Probe, Read, Typed, write_header, write_task},
    output, select, stack,
};

/// `inet_csk_accept(struct sock *sk, int flags, int *err, bool kern)`, up to 6.9.
#[fexit(function = "inet_csk_accept")]
pub(crate) fn inet_csk_accept_4(ctx: FExitContext) -> i32 {
    // SAFETY: the return value comes after the arguments; it is a socket or null.
    unsafe { accepted(&ctx, ctx.arg(4), None) };
    0
}

/// `inet_csk_accept(struct sock *sk, struct proto_accept_arg *arg)`, from 6.10.
#[fexit(function = "inet_csk_accept")]
pub(crate) fn inet_csk_accept_2(ctx: FExitContext) -> i32 {
    // SAFETY: the return value comes after the arguments; it is a socket or null.
    unsafe { accepted(&ctx, ctx.arg(2), None) };
    0
}

/// `accept()` returned. Blind to io_uring and to 32-bit programs.
#[tracepoint]
pub(crate) fn sys_exit_accept(ctx: TracePointContext) -> i32 {
    returned(&ctx);
    0
}

/// `accept4()` returned. Blind to io_uring and to 32-bit programs.
#[tracepoint]
pub(crate) fn sys_exit_accept4(ctx: TracePointContext) -> i32 {
    returned(&ctx);
    0
}

/// Finds the socket behind the file descriptor that the call returned.
///
/// Another thread may have put something else in its place since: then this is another file, perhaps no socket at all,
/// and what lies behind it anything. A file is a socket's if file, `struct socket` and `struct sock` refer to one
/// another (`sock_alloc_file()`, `sock_graft()`; 5.12 to 6.18): by accident, no other three objects do. Whether that
/// socket was accepted, and not another one, the tracker decides, which knows how each began.
#[inline(always)]
fn returned(ctx: &TracePointContext) {
    // SAFETY: `struct syscall_trace_exit` (kernel/trace/trace.h): an 8-byte head, the number, and
    // `long ret` at 16; the same on every 64-bit kernel. `current` is typed, and so is what it points to,
    // down to the table of files; the rest is read by helper.
    unsafe {
        let fd: i64 = core::ptr::read_volatile(ctx.as_ptr().cast::<u8>().add(16).cast());
        if fd < 0 {
            return;
        }
        let task: *const u8 = bpf_get_current_task_btf().cast();
        let files: *const u8 = Typed::field(task, Field::TaskFiles);
        let table: *const u8 = Typed::field(files, Field::FilesTable);
        let fds: *const u8 = Typed::field(table, Field::TableFds);
        let file: *const u8 = Probe::read(fds.add(fd as usize * size_of::<usize>()));
        let socket: *const u8 = Probe::field(file, Field::FilePrivate);
        let socket_file: *const u8 = Probe::field(socket, Field::SocketFile);
        let sk: *const u8 = Probe::field(socket, Field::SocketSock);
        let sk_socket: *const u8 = Probe::field(sk, Field::SkSocket);
        // One branch for both, and for null: a descriptor that is closed again.
        if (socket_file as u64 ^ file as u64) | (sk_socket as u64 ^ socket as u64) != 0 {
            return;
        }
        accepted(ctx, sk, Some(file));
    }
}

/// Writes that the current process got the socket at `sk`, and its `file` if it has one already.
#[inline(always)]
unsafe fn accepted<C: EbpfContext>(ctx: &C, sk: *const u8, file: Option<*const u8>) {
    if sk.is_null() {
        return;
    }
    // SAFETY: a full socket; all reads are by helper.
    unsafe {
        let protocol: u16 = Probe::field(sk, Field::SkProtocol);
        if protocol != IPPROTO_TCP {
            return;
        }
        let mut common = Common::new();
        common.copy(sk);
        let tuple = common.tuple(Probe::field(sk, Field::InetLocalPort));
        if !tuple.is_inet() || !select::socket(&tuple) {
            return;
        }
        let cookie: u64 = common.field(Field::SkcCookie);
        let Some(mut room) = output::reserve::<Header>() else {
            return;
        };
        let record = room.as_mut_ptr();
        write_header(record, Kind::Accept, cookie, &tuple);
        write_task(record);
        if let Some(file) = file {
            let inode: *const u8 = Probe::field(file, Field::FileInode);
            let number: u64 = Probe::field(inode, Field::InodeNumber);
            (*record).inode = number as u32;
        }
        let flags = (*record).flags;
        room.submit();
        stack::write(ctx, Via::Accept, cookie, flags);
    }
}
