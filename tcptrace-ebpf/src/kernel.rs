//! Reading the kernel's structs at offsets that are constants by the time the verifier looks.

use core::{ffi::c_void, mem::MaybeUninit, ptr};

use aya_ebpf::{
    Global,
    helpers::{bpf_get_current_task_btf, bpf_ktime_get_boot_ns, generated::bpf_probe_read_kernel},
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
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper checks the source and zeroes the destination when it cannot read, so that it is
        // always written; every T here is an integer, or a pointer that is again only probed.
        unsafe {
            bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, at.cast());
            value.assume_init()
        }
    }
}

/// How much of a `sock_common` is copied at once. All of it that is read lies in the first 96 bytes on x86-64
/// (5.13 to 7.2); a field beyond would be refused by the verifier, not misread.
const COMMON_SIZE: usize = 128;

/// A copy of the beginning of a `sock_common` that the verifier does not know the type of: one call of a
/// helper instead of a dozen.
pub(crate) struct Common(MaybeUninit<[u64; COMMON_SIZE / 8]>);

impl Common {
    /// Room for it.
    #[inline(always)]
    pub(crate) const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// Copies the one at `sk`; zeros where nothing is mapped.
    ///
    /// # Safety
    /// `sk` must be the address of a `sock_common`.
    #[inline(always)]
    pub(crate) unsafe fn copy(&mut self, sk: *const u8) {
        // SAFETY: the helper fills the copy whatever is at `sk`. Every socket, timewait sockets as well, is
        // larger.
        unsafe {
            bpf_probe_read_kernel(
                self.0.as_mut_ptr().cast(),
                COMMON_SIZE as u32,
                sk.cast::<c_void>(),
            );
        }
    }

    /// `field` of it, once it is copied.
    #[inline(always)]
    pub(crate) fn field<T: Copy>(&self, field: Field) -> T {
        // SAFETY: the offset is of the running kernel's `sock_common`, and the verifier has checked that it
        // lies in the copy, and that there is one.
        unsafe { Typed::field(self.0.as_ptr().cast(), field) }
    }

    /// The numbers that name the socket; `local_port` (network byte order) is kept elsewhere.
    #[inline(always)]
    pub(crate) fn tuple(&self, local_port: u16) -> Tuple {
        let net: *const u8 = self.field(Field::SkcNet);
        // SAFETY: the copy is read like memory of a known type; the rest by helper.
        unsafe {
            let netns = Probe::field(net, Field::NetInode);
            Tuple::read(self.0.as_ptr().cast(), local_port, netns)
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

pub(crate) const AF_INET: u16 = 2;
pub(crate) const AF_INET6: u16 = 10;
pub(crate) const IPPROTO_TCP: u16 = 6;
pub(crate) const IPPROTO_MPTCP: u16 = 262;
/// The third word of `::ffff:a.b.c.d` in network byte order.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Tuple {
    /// From the `sock_common` at `sk`, and what is kept elsewhere: the local port (network byte order), and
    /// the namespace's inode number.
    ///
    /// # Safety
    /// The verifier must know what is at `sk`.
    #[inline(always)]
    pub(crate) unsafe fn read(sk: *const u8, local_port: u16, netns: u32) -> Self {
        // SAFETY: the caller's promise; the offsets come from the running kernel's BTF.
        unsafe {
            let family: u16 = Typed::field(sk, Field::SkcFamily);
            let (local, remote) =
                if family == AF_INET6 && has(Field::SkcLocalAddr6) && has(Field::SkcRemoteAddr6) {
                    (
                        address6(sk, Field::SkcLocalAddr6),
                        address6(sk, Field::SkcRemoteAddr6),
                    )
                } else {
                    (
                        [0, 0, MAPPED, Typed::field(sk, Field::SkcLocalAddr)],
                        [0, 0, MAPPED, Typed::field(sk, Field::SkcRemoteAddr)],
                    )
                };
            Self {
                local,
                remote,
                local_port: u16::from_be(local_port),
                remote_port: u16::from_be(Typed::field(sk, Field::SkcRemotePort)),
                family,
                netns,
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
unsafe fn address6(sk: *const u8, field: Field) -> [u32; 4] {
    // SAFETY: as for `Tuple::read`.
    unsafe {
        let at = sk.add(offset(field) as usize);
        [
            Typed::read(at),
            Typed::read(at.add(4)),
            Typed::read(at.add(8)),
            Typed::read(at.add(12)),
        ]
    }
}

/// `PF_EXITING` (`include/linux/sched.h`): set before an ending process gives up its files.
const PF_EXITING: u32 = 0x0000_0004;
/// `PF_KTHREAD` (`include/linux/sched.h`).
const PF_KTHREAD: u32 = 0x0020_0000;

/// Writes the header's common part: time and socket. Of the task, zeros: see [`write_task`].
///
/// # Safety
/// `header` must point into reserved ring buffer memory.
#[inline(always)]
pub(crate) unsafe fn write_header(header: *mut Header, kind: Kind, cookie: u64, tuple: &Tuple) {
    // SAFETY: the caller's promise. Members are written one by one, in memory that the verifier knows; the
    // arrays are read back as words of the same bytes. `comm` is 8-aligned.
    unsafe {
        (*header).time = bpf_ktime_get_boot_ns();
        (*header).cookie = cookie;
        // Volatile: of zeros side by side the compiler makes a call of a loop that writes them byte by byte.
        (&raw mut (*header).cgroup).write_volatile(0);
        (*header).start = 0;
        write_words(&raw mut (*header).local_addr, tuple.local);
        write_words(&raw mut (*header).remote_addr, tuple.remote);
        let comm: *mut u64 = (&raw mut (*header).comm).cast();
        comm.write_volatile(0);
        comm.add(1).write_volatile(0);
        (*header).netns = tuple.netns;
        (*header).inode = 0;
        (*header).pid = 0;
        (*header).uid = 0;
        (*header).local_port = tuple.local_port;
        (*header).remote_port = tuple.remote_port;
        (*header).kind = kind as u8;
        (*header).family = tuple.family as u8;
        (*header).flags = 0;
    }
}

/// Writes the task on this CPU into the header.
///
/// # Safety
/// As for [`write_header`], which has written the rest.
#[inline(always)]
pub(crate) unsafe fn write_task(header: *mut Header) {
    // SAFETY: the caller's promise; `current` is typed and always valid, its group leader as well.
    unsafe {
        let task: *const u8 = bpf_get_current_task_btf().cast();
        let leader: *const u8 = Typed::field(task, Field::TaskLeader);
        let flags: u32 = Typed::field(task, Field::TaskFlags);
        (*header).start = Typed::field(leader, Field::TaskStart);
        let comm = &raw mut (*header).comm;
        // An array of bytes is out of reach of a typed load of 8.
        bpf_probe_read_kernel(
            comm.cast(),
            16,
            leader
                .add(offset(Field::TaskComm) as usize)
                .cast::<c_void>(),
        );
        (*header).pid = Typed::field(task, Field::TaskProcess);
        let cred: *const u8 = Typed::field(task, Field::TaskCred);
        (*header).uid = Typed::field(cred, Field::CredUid);
        // Without branches: the verifier follows both ways of each.
        (*header).flags |= (u16::from(flags & PF_KTHREAD != 0) * Flags::KTHREAD)
            | (u16::from(flags & PF_EXITING != 0) * Flags::EXITING)
            | (u16::from(tree::contains(leader)) * Flags::IN_TREE);
    }
}

/// An address as records have it.
#[inline(always)]
pub(crate) fn words_as_bytes(words: [u32; 4]) -> [u8; 16] {
    // SAFETY: 16 bytes either way, and any bytes are an address.
    unsafe { core::mem::transmute(words) }
}

#[inline(always)]
unsafe fn write_words(to: *mut [u8; 16], words: [u32; 4]) {
    // SAFETY: 16 bytes either way; the arrays in a header are 4-aligned.
    unsafe { to.cast::<[u32; 4]>().write(words) }
}
