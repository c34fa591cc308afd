//! The kernel fields that the probes read. Their offsets differ from kernel to kernel; the user side
//! looks them up in the running kernel's BTF and hands them over as constants.

/// Offset of a field that the running kernel does not have.
pub const MISSING: u32 = u32::MAX;

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldSpec {
    /// Where it is: a struct, then its members, as C writes them. A dot goes into a nested struct,
    /// never through a pointer.
    pub path: &'static str,
    /// What is lost without it; `None`: nothing works without it.
    pub without: Option<Loss>,
}

/// What a kernel without some field cannot tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// What.
    pub what: &'static str,
    /// Which kernel can.
    pub fix: &'static str,
}

const IPV6: Loss = Loss {
    what: "IPv6 addresses",
    fix: "it needs a kernel with CONFIG_IPV6",
};
const CONTAINER: Loss = Loss {
    what: "the container of a socket",
    fix: "it needs a kernel with CONFIG_SOCK_CGROUP_DATA=y, of 5.15 or later",
};
const LINGER2: Loss = Loss {
    what: "TCP_LINGER2 below 0, which avoids TIME_WAIT",
    fix: "please report it, with the output of `tcptrace doctor`",
};
const ANCESTRY: Loss = Loss {
    what: "which processes a program has started",
    fix: "please report it, with the output of `tcptrace doctor`",
};
const ENTRY: Loss = Loss {
    what: "when TIME_WAIT began, where only its timer tells",
    fix: "it needs a kernel of 6.14 or later, which keeps it",
};

/// What is lost without the fields that show what a socket holds, without its lock.
pub const WITHOUT_LOCK: Loss = Loss {
    what: "counters and times of sockets, read without their locks",
    fix: "please report it, with the output of `tcptrace doctor`",
};
const LOCAL_PORTS: Loss = Loss {
    what: "which port a connect() cannot get, so that with --lport or --port every connect() is recorded",
    fix: "please report it, with the output of `tcptrace doctor`",
};
const STACKS: Loss = Loss {
    what: "where in its code a program connects or accepts (--stacks)",
    fix: "it needs a kernel for x86-64",
};

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $path:literal $(, without: $without:expr)?;)*) => {
        /// A field of a kernel struct; its number is its place in [`FIELDS`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Field { $(#[doc = concat!("`", $path, "`")] $(#[$doc])* $name),* }

        /// The table, in the order of [`Field`].
        pub const FIELDS: [FieldSpec; FIELD_COUNT] = [$(FieldSpec {
            path: $path,
            without: fields!(@without $($without)?),
        }),*];

        /// How many fields there are.
        pub const FIELD_COUNT: usize = [$($path),*].len();
    };
    (@without) => { None };
    (@without $without:expr) => { Some($without) };
}

fields! {
    SkcFamily = "sock_common.skc_family";
    SkcRemotePort = "sock_common.skc_dport";
    SkcBoundPort = "sock_common.skc_num";
    SkcRemoteAddr = "sock_common.skc_daddr";
    SkcLocalAddr = "sock_common.skc_rcv_saddr";
    SkcRemoteAddr6 = "sock_common.skc_v6_daddr", without: IPV6;
    SkcLocalAddr6 = "sock_common.skc_v6_rcv_saddr", without: IPV6;
    SkcNet = "sock_common.skc_net.net";
    SkcCookie = "sock_common.skc_cookie";
    SkcState = "sock_common.skc_state";
    SkcReferences = "sock_common.skc_refcnt";
    NetInode = "net.ns.inum";
    NetLocalPorts = "net.ipv4.ip_local_ports.range", without: LOCAL_PORTS;
    SkProtocol = "sock.sk_protocol";
    SkError = "sock.sk_err";
    SkShutdown = "sock.sk_shutdown";
    SkOwned = "sock.sk_lock.owned";
    SkSocket = "sock.sk_socket";
    SkCgroup = "sock.sk_cgrp_data.cgroup", without: CONTAINER;
    CgroupNode = "cgroup.kn", without: CONTAINER;
    NodeId = "kernfs_node.id", without: CONTAINER;
    InetLocalPort = "inet_sock.inet_sport";
    TcpLinger2 = "tcp_sock.linger2", without: LINGER2;
    TcpSentAt = "tcp_sock.lsndtime", without: WITHOUT_LOCK;
    TcpAckedAt = "tcp_sock.rcv_tstamp", without: WITHOUT_LOCK;
    TcpBytesAcked = "tcp_sock.bytes_acked", without: WITHOUT_LOCK;
    TcpBytesSent = "tcp_sock.bytes_sent", without: WITHOUT_LOCK;
    TcpBytesRetrans = "tcp_sock.bytes_retrans", without: WITHOUT_LOCK;
    TcpDataSegsOut = "tcp_sock.data_segs_out", without: WITHOUT_LOCK;
    TcpDelivered = "tcp_sock.delivered", without: WITHOUT_LOCK;
    SocketFile = "socket.file";
    SocketSock = "socket.sk";
    FileInode = "file.f_inode";
    FilePrivate = "file.private_data";
    InodeNumber = "inode.i_ino";
    TaskLeader = "task_struct.group_leader";
    TaskComm = "task_struct.comm";
    TaskFlags = "task_struct.flags";
    TaskStart = "task_struct.start_boottime";
    TaskProcess = "task_struct.tgid";
    TaskThread = "task_struct.pid";
    TaskCred = "task_struct.cred";
    CredUid = "cred.uid";
    TaskParent = "task_struct.real_parent", without: ANCESTRY;
    TaskPid = "task_struct.thread_pid", without: ANCESTRY;
    PidLevel = "pid.level", without: ANCESTRY;
    PidNumbers = "pid.numbers", without: ANCESTRY;
    UpidNumber = "upid.nr", without: ANCESTRY;
    UpidNamespace = "upid.ns", without: ANCESTRY;
    PidNsInode = "pid_namespace.ns.inum", without: ANCESTRY;
    TaskMemory = "task_struct.mm";
    MemoryStartStack = "mm_struct.start_stack", without: STACKS;
    RegsInstruction = "pt_regs.ip", without: STACKS;
    RegsStack = "pt_regs.sp", without: STACKS;
    RegsFrame = "pt_regs.bp", without: STACKS;
    TaskFiles = "task_struct.files";
    FilesTable = "files_struct.fdt";
    TableFds = "fdtable.fd";
    TwSubstate = "inet_timewait_sock.tw_substate";
    TwLocalPort = "inet_timewait_sock.tw_sport";
    TwTimer = "inet_timewait_sock.tw_timer";
    TwEntryStamp = "inet_timewait_sock.tw_entry_stamp", without: ENTRY;
    TwTimestamps = "tcp_timewait_sock.tw_ts_recent_stamp", without: ENTRY;
    TimerExpires = "timer_list.expires";
    TimerFunction = "timer_list.function";
}
