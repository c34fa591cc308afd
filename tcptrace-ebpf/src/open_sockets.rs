//! Which processes hold TCP sockets: their descriptors, one by one, as the kernel walks all open files.
//!
//! The kernel holds the file while the program runs, but nobody takes the socket's lock. Who asks for the same by
//! `TCP_INFO` takes it, and waits as long as its owner does: for ever, if that waits for a page that does not come.

use core::ptr;

use aya_ebpf::{
    helpers::{
        bpf_get_socket_cookie, bpf_jiffies64, bpf_ktime_get_boot_ns, bpf_seq_write,
        bpf_skc_to_tcp_sock, bpf_sock_from_file,
    },
    macros::map,
    maps::Array,
};
use tcptrace_ebpf::{Field, OpenSocket, OpenSocketDetail};

use crate::kernel::{
    AF_INET, AF_INET6, IPPROTO_MPTCP, IPPROTO_TCP, Read, Tuple, Typed, has, words_as_bytes,
};

/// Masks of states: in the lower half of sockets that are wanted, in the upper half of those that are wanted with all
/// that they hold. The user side sets it before each walk.
#[map]
static WALK: Array<u32> = Array::with_max_entries(1, 0);

/// What is written of a socket with all that it holds.
#[repr(C)]
struct Detailed {
    open: OpenSocket,
    detail: OpenSocketDetail,
}

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
        let state: u8 = Typed::field(sk, Field::SkcState);
        let wanted = WALK.get(0).map_or(0xffff, |wanted| *wanted);
        let state_bit = 1_u32 << (state & 15);
        // An MPTCP socket's state is its own, and not that of the subflow that tables list.
        if protocol == IPPROTO_TCP && wanted & state_bit == 0 {
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
        let mut found = OpenSocket {
            inode: number as u32,
            pid,
            tid,
            fd: ptr::read_volatile(&raw const (*ctx).fd),
            state,
            detailed: 0,
            protocol,
            reserved: 0,
        };
        let seq: *const u8 = ptr::read_volatile(meta.cast());
        if protocol == IPPROTO_TCP
            && wanted & (state_bit << 16) != 0
            && let Some(detail) = detail(sk)
        {
            found.detailed = 1;
            write(
                seq,
                &Detailed {
                    open: found,
                    detail,
                },
            );
        } else {
            write(seq, &found);
        }
    }
    0
}

/// Writes `what`. Where there is no room, the kernel comes again with the same file.
#[inline(always)]
unsafe fn write<T>(seq: *const u8, what: &T) {
    // SAFETY: the caller has `seq` from the context; the helper copies what is there.
    unsafe {
        bpf_seq_write(
            seq.cast_mut().cast(),
            (&raw const *what).cast_mut().cast(),
            size_of::<T>() as u32,
        );
    }
}

/// What `sk` holds; none where this kernel's fields are not known.
#[inline(always)]
unsafe fn detail(sk: *const u8) -> Option<OpenSocketDetail> {
    if !(has(Field::TcpSentAt)
        && has(Field::TcpAckedAt)
        && has(Field::TcpBytesAcked)
        && has(Field::TcpBytesSent)
        && has(Field::TcpBytesRetrans)
        && has(Field::TcpDataSegsOut)
        && has(Field::TcpDelivered))
    {
        return None;
    }
    // SAFETY: the caller has `sk` from an open file; chains of typed loads end in zeros at a null pointer.
    unsafe {
        // What lies past `struct sock` takes a pointer of the right type.
        let tcp: *const u8 = bpf_skc_to_tcp_sock(sk.cast_mut().cast()).cast();
        if tcp.is_null() {
            return None;
        }
        let net: *const u8 = Typed::field(tcp, Field::SkcNet);
        let netns: u32 = Typed::field(net, Field::NetInode);
        let local_port: u16 = Typed::field(tcp, Field::InetLocalPort);
        let tuple = Tuple::read(sk, local_port, netns);
        let mut cookie: u64 = Typed::field(sk, Field::SkcCookie);
        if cookie == 0 {
            cookie = bpf_get_socket_cookie(sk.cast_mut().cast());
        }
        let error: i32 = Typed::field(sk, Field::SkError);
        // `tcp_jiffies32`
        let now = bpf_jiffies64() as u32;
        let sent: u32 = Typed::field(tcp, Field::TcpSentAt);
        let acked: u32 = Typed::field(tcp, Field::TcpAckedAt);
        Some(OpenSocketDetail {
            time: bpf_ktime_get_boot_ns(),
            cookie,
            bytes_acked: Typed::field(tcp, Field::TcpBytesAcked),
            bytes_sent: Typed::field(tcp, Field::TcpBytesSent),
            bytes_retrans: Typed::field(tcp, Field::TcpBytesRetrans),
            local_addr: words_as_bytes(tuple.local),
            remote_addr: words_as_bytes(tuple.remote),
            netns,
            sent_ago: now.wrapping_sub(sent),
            acked_ago: now.wrapping_sub(acked),
            data_segs_out: Typed::field(tcp, Field::TcpDataSegsOut),
            delivered: Typed::field(tcp, Field::TcpDelivered),
            error: error as u32,
            local_port: tuple.local_port,
            remote_port: tuple.remote_port,
            reserved: 0,
        })
    }
}
