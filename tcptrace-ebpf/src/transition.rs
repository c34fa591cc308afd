//! Every change of state of a full TCP socket.

use aya_ebpf::{
    helpers::{bpf_get_socket_cookie, bpf_skc_to_tcp_sock},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::warn;
use tcptrace_ebpf::{Counter, Field, Flags, Kind, State, Transition, Via};

use crate::{
    kernel::{IPPROTO_MPTCP, IPPROTO_TCP, Read, Tuple, Typed, has, write_header, write_task},
    output, select, stack,
};

/// `inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub(crate) fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    let sk: *const u8 = ctx.arg(0);
    let old: i32 = ctx.arg(1);
    let new: i32 = ctx.arg(2);
    // SAFETY: `sk` is the tracepoint's typed argument, alive while it runs.
    unsafe { changed(&ctx, sk, old as u8, new as u8) };
    0
}

#[inline(always)]
unsafe fn changed(ctx: &BtfTracePointContext, sk: *const u8, old: u8, new: u8) {
    // SAFETY: the caller's promise. Chains of typed loads end in zeros at a null pointer.
    unsafe {
        let protocol: u16 = Typed::field(sk, Field::SkProtocol);
        if protocol != IPPROTO_TCP {
            let net: *const u8 = Typed::field(sk, Field::SkcNet);
            let netns: u32 = Typed::field(net, Field::NetInode);
            if protocol == IPPROTO_MPTCP && select::netns(netns) {
                output::count(Counter::Mptcp);
            }
            return;
        }
        // MPTCP makes its subflows repeat themselves.
        if old == new || !select::states(old, new) {
            return;
        }
        if State::from_number(old).is_none() || State::from_number(new).is_none() {
            warn!(
                ctx,
                "TCP state {} to {}: one of them is not known", old, new
            );
            return;
        }
        // What lies past `struct sock` takes a pointer of the right type. It is null only for what is no
        // full TCP socket.
        let tcp: *const u8 = bpf_skc_to_tcp_sock(sk.cast_mut().cast()).cast();
        if tcp.is_null() {
            output::count(Counter::Lost);
            return;
        }
        // `skc_num` will not do: it is 0 already in almost every change to CLOSE.
        let local_port: u16 = Typed::field(tcp, Field::InetLocalPort);
        // Also pointers: for each that is read from `sk`, which it trusts, the verifier looks through all types of
        // the kernel, for up to 3 ms (6.18).
        let net: *const u8 = Typed::field(tcp, Field::SkcNet);
        let netns: u32 = Typed::field(net, Field::NetInode);
        let mut tuple = Tuple::read(sk, local_port, netns);
        // A socket that was connected before still shows the port it had: until `connect()` has chosen
        // another, only a port that it is bound to is its own.
        let mut stale_port = 0;
        if new == State::SynSent as u8 {
            let bound: u16 = Typed::field(sk, Field::SkcBoundPort);
            if bound == 0 {
                stale_port = tuple.local_port;
                tuple.local_port = 0;
            }
        }
        if !select::transition(old, new, &tuple, net) {
            return;
        }
        // Made even when the record is lost: what follows of this socket must carry it.
        let mut cookie: u64 = Typed::field(sk, Field::SkcCookie);
        if cookie == 0 {
            cookie = bpf_get_socket_cookie(sk.cast_mut().cast());
        }
        let Some(mut room) = output::reserve::<Transition>() else {
            return;
        };
        let record = room.as_mut_ptr();
        write_header(&raw mut (*record).header, Kind::Transition, cookie, &tuple);

        let owned: i32 = Typed::field(sk, Field::SkOwned);
        let socket: *const u8 = Typed::field(tcp, Field::SkSocket);
        // In softirq the current task is whoever was interrupted, and says nothing. What nobody has accepted
        // is closed there as well when its listener's process ends, without the lock of anybody.
        if owned != 0 || (new == State::Close as u8 && socket.is_null()) {
            write_task(&raw mut (*record).header);
        }
        if owned != 0 {
            (*record).header.flags |= Flags::OWNED;
        }
        if !socket.is_null() {
            (*record).header.flags |= Flags::HAS_SOCKET;
            let file: *const u8 = Typed::field(socket, Field::SocketFile);
            let inode: *const u8 = Typed::field(file, Field::FileInode);
            let number: u64 = Typed::field(inode, Field::InodeNumber);
            (*record).header.inode = number as u32;
        }
        if has(Field::SkCgroup) && has(Field::CgroupNode) && has(Field::NodeId) {
            let cgroup: *const u8 = Typed::field(tcp, Field::SkCgroup);
            let node: *const u8 = Typed::field(cgroup, Field::CgroupNode);
            (*record).header.cgroup = Typed::field(node, Field::NodeId);
        }
        let error: i32 = Typed::field(sk, Field::SkError);
        (*record).error = error as u16;
        (*record).stale_port = stale_port;
        if old == State::FinWait2 as u8 && new == State::Close as u8 && has(Field::TcpLinger2) {
            let linger2: i32 = Typed::field(tcp, Field::TcpLinger2);
            if linger2 < 0 {
                (*record).header.flags |= Flags::NO_TIME_WAIT;
            }
        }
        (*record).old = old;
        (*record).new = new;
        (*record).shutdown = Typed::field(sk, Field::SkShutdown);
        (*record).reserved = 0;
        let flags = (*record).header.flags;
        room.submit();
        // In softirq, and in a lock owner's backlog, nobody connects.
        if old == State::Close as u8 && new == State::SynSent as u8 && owned != 0 {
            stack::write(ctx, Via::Connect, cookie, flags);
        }
    }
}
