//! Reading the kernel's structs at offsets that are constants by the time the verifier looks.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_get_current_uid_gid,
        bpf_ktime_get_boot_ns, generated::bpf_probe_read_kernel,
    },
};
use tcptrace_ebpf::{Config, FIELD_COUNT, Field, Flags, Header, Kind, MISSING};

use crate::tree;

/// Offsets of [`Field`]s on the running kernel; the user side fills them in.
#[unsafe(no_mangle)]
static OFFSETS: [Global<u32>; FIELD_COUNT] = [const { Global::new(MISSING) }; FIELD_COUNT];

/// The settings; the user side fills them in.
#[unsafe(no_mangle)]
pub(crate) static CONFIG: Config = Config::ALL;

/// One member of the settings. It is read by itself: a copy of the whole would not fit the stack.
macro_rules! config {
    ($($member:tt)+) => { $crate::kernel::setting(&$crate::kernel::CONFIG.$($member)+) };
}
pub(crate) use config;

/// The value that the user side has put in the place of `member`, which the compiler must not guess.
#[inline(always)]
pub(crate) fn setting<T: Copy>(member: &'static T) -> T {
    // SAFETY: a reference is readable.
    unsafe { ptr::read_volatile(member) }
}

/// Offset of `field` in its struct, [`MISSING`] if this kernel does not have it.
#[inline(always)]
pub(crate) fn offset(field: Field) -> u32 {
    OFFSETS[field as usize].load()
}

/// Whether this kernel has `field`.
#[inline(always)]
pub(crate) fn has(field: Field) -> bool {
    offset(field) != MISSING
}

/// A way of reading kernel memory.
pub(crate) trait Read {
    /// What lies at `at`; zero where nothing is mapped.
    unsafe fn read<T: Copy>(at: *const u8) -> T;

    /// `field` of the struct at `base`.
    #[inline(always)]
    unsafe fn field<T: Copy>(base: *const u8, field: Field) -> T {
        // SAFETY: as for `read`.
        unsafe { Self::read(base.add(offset(field) as usize)) }
    }
}

/// Through a pointer whose type the verifier knows: an ordinary load, which the kernel makes safe.
/// It reaches the declared struct and no further.
pub(crate) struct Typed;

impl Read for Typed {
    #[inline(always)]
    unsafe fn read<T: Copy>(at: *const u8) -> T {
        // SAFETY: the verifier has checked pointer and offset. Volatile keeps two loads of two members
        // from becoming one, which the verifier would refuse.
        unsafe { ptr::read_volatile(at.cast()) }
    }
}

/// Through any kernel address, by helper.
pub(crate) struct Probe;

impl Read for Probe {
    #[inline(always)]
    unsafe fn read<T: Copy>(at: *const u8) -> T {
        let mut value = core::mem::MaybeUninit::<T>::zeroed();
        // SAFETY: the helper checks the source and zeroes the destination when it cannot read; every T
        // here is an integer, an array of them, or a pointer that is again only probed.
        unsafe {
            bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, at.cast());
            value.assume_init()
        }
    }
}

/// The addresses and numbers that name a socket, wherever they were read from.
#[derive(Clone, Copy)]
pub(crate) struct Tuple {
    /// Local address, IPv4 as `::ffff:a.b.c.d`, in network byte order.
    pub(crate) local: [u32; 4],
    /// Remote address, likewise.
    pub(crate) remote: [u32; 4],
    pub(crate) local_port: u16,
    pub(crate) remote_port: u16,
    pub(crate) family: u16,
    pub(crate) netns: u32,
}

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
/// The third word of `::ffff:a.b.c.d` in network byte order.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Tuple {
    /// From the `sock_common` at `sk` and the local port (network byte order) that is kept elsewhere.
    ///
    /// # Safety
    /// `sk` must be readable through `R`.
    #[inline(always)]
    pub(crate) unsafe fn read<R: Read>(sk: *const u8, local_port: u16) -> Self {
        // SAFETY: the caller's promise; the offsets come from the running kernel's BTF.
        unsafe {
            let family: u16 = R::field(sk, Field::SkcFamily);
            let net: *const u8 = R::field(sk, Field::SkcNet);
            let (local, remote) =
                if family == AF_INET6 && has(Field::SkcLocalAddr6) && has(Field::SkcRemoteAddr6) {
                    (
                        address6::<R>(sk, Field::SkcLocalAddr6),
                        address6::<R>(sk, Field::SkcRemoteAddr6),
                    )
                } else {
                    (
                        [0, 0, MAPPED, R::field(sk, Field::SkcLocalAddr)],
                        [0, 0, MAPPED, R::field(sk, Field::SkcRemoteAddr)],
                    )
                };
            Self {
                local,
                remote,
                local_port: u16::from_be(local_port),
                remote_port: u16::from_be(R::field(sk, Field::SkcRemotePort)),
                family,
                netns: R::field(net, Field::NetInode),
            }
        }
    }

    /// Whether the family is one that TCP runs over.
    #[inline(always)]
    pub(crate) const fn is_inet(&self) -> bool {
        self.family == AF_INET || self.family == AF_INET6
    }

    /// 4 or 6, by the addresses: an IPv6 socket may carry IPv4.
    #[inline(always)]
    pub(crate) const fn ip_version(&self) -> u32 {
        if self.family == AF_INET
            || (self.remote[0] | self.remote[1] == 0 && self.remote[2] == MAPPED)
        {
            4
        } else {
            6
        }
    }
}

/// An IPv6 address, word by word: `in6_addr` has no member of 8 bytes, so the verifier allows none.
#[inline(always)]
unsafe fn address6<R: Read>(sk: *const u8, field: Field) -> [u32; 4] {
    // SAFETY: as for `Tuple::read`.
    unsafe {
        let at = sk.add(offset(field) as usize);
        [
            R::read(at),
            R::read(at.add(4)),
            R::read(at.add(8)),
            R::read(at.add(12)),
        ]
    }
}

/// `PF_EXITING` (`include/linux/sched.h`): set before an ending process gives up its files.
const PF_EXITING: u32 = 0x0000_0004;
/// `PF_KTHREAD` (`include/linux/sched.h`).
const PF_KTHREAD: u32 = 0x0020_0000;

/// Writes the header's common part: time, socket, and the task on this CPU.
///
/// # Safety
/// `header` must point into reserved ring buffer memory.
#[inline(always)]
pub(crate) unsafe fn write_header(header: *mut Header, kind: Kind, cookie: u64, tuple: &Tuple) {
    // SAFETY: the caller's promise; `current` is typed and always valid, its group leader as well.
    // Members are written one by one, in memory that the verifier knows; the two address arrays are
    // read back as words of the same bytes.
    unsafe {
        let task: *const u8 = bpf_get_current_task_btf().cast();
        let leader: *const u8 = Typed::field(task, Field::TaskLeader);
        let flags: u32 = Typed::field(task, Field::TaskFlags);
        (*header).time = bpf_ktime_get_boot_ns();
        (*header).cookie = cookie;
        (*header).cgroup = 0;
        (*header).start = Typed::field(leader, Field::TaskStart);
        write_words(&raw mut (*header).local_addr, tuple.local);
        write_words(&raw mut (*header).remote_addr, tuple.remote);
        let comm = &raw mut (*header).comm;
        // An array of bytes is out of reach of a typed load of 8.
        bpf_probe_read_kernel(
            comm.cast(),
            16,
            leader
                .add(offset(Field::TaskComm) as usize)
                .cast::<c_void>(),
        );
        (*header).netns = tuple.netns;
        (*header).inode = 0;
        (*header).pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*header).uid = bpf_get_current_uid_gid() as u32;
        (*header).local_port = tuple.local_port;
        (*header).remote_port = tuple.remote_port;
        (*header).kind = kind as u8;
        (*header).family = tuple.family as u8;
        // Without branches: the verifier follows both ways of each.
        (*header).flags = (u16::from(flags & PF_KTHREAD != 0) * Flags::KTHREAD)
            | (u16::from(flags & PF_EXITING != 0) * Flags::EXITING)
            | (u16::from(tree::contains(leader)) * Flags::IN_TREE);
    }
}

#[inline(always)]
unsafe fn write_words(to: *mut [u8; 16], words: [u32; 4]) {
    // SAFETY: 16 bytes either way; the arrays in a header are 4-aligned.
    unsafe { to.cast::<[u32; 4]>().write(words) }
}
