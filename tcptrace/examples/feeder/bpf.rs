//! The BPF program of the feeder: it puts records that user space has made into a ring buffer.
//!
//! The program is written as instructions, so that no compiler for BPF is needed. User space writes up to [`MOST`] records
//! into an array map that it has mapped, and runs the program with `BPF_PROG_TEST_RUN`. The program copies each record into
//! the ring buffer with `bpf_ringbuf_output`, counts the records that find no room, and adds those to the counter of lost
//! records, as the probes of tcptrace do.
//!
//! A program of type `BPF_PROG_TYPE_SYSCALL` is used because it can be run on demand, and needs no tracepoint
//! (Linux 5.14 and later; works under lockdown=integrity on 6.18).

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr::{self, NonNull},
    slice,
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// How many records one run of the program writes at most.
pub(crate) const MOST: usize = 1024;
/// The longest record, bytes.
pub(crate) const LONGEST: usize = 128;
/// Where one record of the array begins after the one before: its length, then its bytes.
const SLOT: usize = 8 + LONGEST;

// From `enum bpf_cmd`, `enum bpf_map_type` and `enum bpf_prog_type` of `include/uapi/linux/bpf.h`, which never change.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_SYSCALL: u32 = 31;
/// The only way in which a program of this type can be loaded.
const BPF_F_SLEEPABLE: u32 = 1 << 4;
// Numbers of helpers.
const MAP_LOOKUP_ELEM: i32 = 1;
const RINGBUF_OUTPUT: i32 = 130;

/// The members of `union bpf_attr` for `BPF_MAP_CREATE` that are needed.
#[repr(C)]
struct CreateMap {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// Those for `BPF_PROG_LOAD`, up to the flags.
#[repr(C)]
struct LoadProgram {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// Those for `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

/// The program, and the array that it reads from.
pub(crate) struct Feeder {
    program: OwnedFd,
    slots: Slots,
    filled: usize,
}

/// What one run has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fed {
    /// Records that were to be written.
    pub(crate) made: u64,
    /// Of those, records that found no room.
    pub(crate) lost: u64,
}

impl Feeder {
    /// Loads the program for this ring buffer. Lost records are added to slot `lost` of the per-CPU array `counters`, if
    /// there is one.
    ///
    /// # Errors
    /// When the kernel refuses, with the verifier's last words.
    pub(crate) fn load(
        ring: BorrowedFd<'_>,
        counters: Option<(BorrowedFd<'_>, u32)>,
    ) -> io::Result<Self> {
        let array = CreateMap {
            map_type: BPF_MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: (MOST * SLOT) as u32,
            max_entries: 1,
            map_flags: BPF_F_MMAPABLE,
        };
        // SAFETY: the attributes point to nothing.
        let array = unsafe { bpf(BPF_MAP_CREATE, &array) }?;
        let code = code(array.as_fd(), ring, counters);
        let mut log = vec![0_u8; 1 << 16];
        let mut load = LoadProgram {
            prog_type: BPF_PROG_TYPE_SYSCALL,
            insn_cnt: code.len() as u32,
            insns: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: BPF_F_SLEEPABLE,
        };
        // SAFETY: the attributes point to values that outlive the call.
        let program = unsafe { bpf(BPF_PROG_LOAD, &load) }.or_else(|error| {
            (load.log_level, load.log_size) = (1, log.len() as u32);
            load.log_buf = log.as_mut_ptr() as u64;
            // SAFETY: as above.
            unsafe { bpf(BPF_PROG_LOAD, &load) }.map_err(|_| {
                let said = String::from_utf8_lossy(&log);
                let last: Vec<&str> = said.trim_end_matches('\0').lines().rev().take(4).collect();
                io::Error::new(error.kind(), format!("{error}: {}", last.join(" / ")))
            })
        })?;
        Ok(Self {
            program,
            slots: Slots::map(array.as_fd())?,
            filled: 0,
        })
    }

    /// Puts a record into the next slot, and runs the program if that was the last one. Returns what that run has done.
    ///
    /// # Errors
    /// When the program does not run.
    pub(crate) fn push(&mut self, record: &[u8]) -> io::Result<Fed> {
        self.slots.set(self.filled, record);
        self.filled += 1;
        if self.filled < MOST {
            return Ok(Fed::default());
        }
        self.flush()
    }

    /// Runs the program for the slots that are filled.
    ///
    /// # Errors
    /// When the program does not run.
    pub(crate) fn flush(&mut self) -> io::Result<Fed> {
        let count = std::mem::take(&mut self.filled) as u64;
        if count == 0 {
            return Ok(Fed::default());
        }
        let run = TestRun {
            prog_fd: self.program.as_raw_fd().cast_unsigned(),
            ctx_size_in: size_of_val(&count) as u32,
            ctx_in: ptr::from_ref(&count) as u64,
            ..TestRun::default()
        };
        // SAFETY: the kernel reads as many bytes as it is told there are, and writes the result into `retval`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_TEST_RUN,
                ptr::from_ref(&run).cast_mut(),
                size_of::<TestRun>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a plain integer that the kernel has written behind the compiler's back.
        let lost = unsafe { ptr::read_volatile(&raw const run.retval) };
        Ok(Fed {
            made: count,
            lost: lost.into(),
        })
    }
}

/// A ring buffer of so many bytes.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn ring(bytes: u32) -> io::Result<OwnedFd> {
    let ring = CreateMap {
        map_type: BPF_MAP_TYPE_RINGBUF,
        key_size: 0,
        value_size: 0,
        max_entries: bytes,
        map_flags: 0,
    };
    // SAFETY: the attributes point to nothing.
    unsafe { bpf(BPF_MAP_CREATE, &ring) }
}

/// `struct bpf_insn`: an opcode, registers, a 16-bit offset and a 32-bit constant.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    opcode: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    constant: i32,
}

const fn instruction(
    opcode: u8,
    target: u8,
    source: u8,
    offset: i16,
    constant: i32,
) -> Instruction {
    Instruction {
        opcode,
        registers: target | source << 4,
        offset,
        constant,
    }
}

/// Loads an address: `kind` 1 is a map, 2 is the value of an array map.
const fn address(target: u8, kind: u8, map: i32) -> [Instruction; 2] {
    [
        instruction(0x18, target, kind, 0, map),
        instruction(0, 0, 0, 0, 0),
    ]
}

/// The program. r6 is how many records there are, r8 which one is next, r9 how many found no room.
fn code(
    array: BorrowedFd<'_>,
    ring: BorrowedFd<'_>,
    counters: Option<(BorrowedFd<'_>, u32)>,
) -> Vec<Instruction> {
    let mut code = vec![
        instruction(0x79, 6, 1, 0, 0), // r6 = *(u64 *)(r1 + 0)
        instruction(0xb7, 8, 0, 0, 0), // r8 = 0
        instruction(0xb7, 9, 0, 0, 0), // r9 = 0
    ];
    let head = code.len();
    code.extend([
        instruction(0x3d, 8, 6, 0, 0),           // if r8 >= r6 goto end
        instruction(0x35, 8, 0, 0, MOST as i32), // if r8 >= MOST goto end
    ]);
    code.extend(address(2, 2, array.as_raw_fd()));
    code.extend([
        instruction(0xbf, 3, 8, 0, 0),                  // r3 = r8
        instruction(0x27, 3, 0, 0, SLOT as i32),        // r3 *= SLOT
        instruction(0x0f, 2, 3, 0, 0),                  // r2 += r3
        instruction(0x79, 3, 2, 0, 0), // r3 = *(u64 *)(r2 + 0): the length less one,
        instruction(0x57, 3, 0, 0, LONGEST as i32 - 1), // so that the verifier needs no branch:
        instruction(0x07, 3, 0, 0, 1), // r3 = (r3 & 127) + 1
        instruction(0x07, 2, 0, 0, 8), // r2 += 8
    ]);
    code.extend(address(1, 1, ring.as_raw_fd()));
    code.extend([
        instruction(0xb7, 4, 0, 0, 0), // r4 = 0: the kernel's own rule of wake-ups
        instruction(0x85, 0, 0, 0, RINGBUF_OUTPUT), // call
        instruction(0x77, 0, 0, 0, 63), // r0 >>= 63: 1 for an error
        instruction(0x0f, 9, 0, 0, 0), // r9 += r0
        instruction(0x07, 8, 0, 0, 1), // r8 += 1
    ]);
    let back = head as i16 - (code.len() as i16 + 1);
    code.push(instruction(0x05, 0, 0, back, 0)); // goto head
    let end = code.len();
    for at in [head, head + 1] {
        code[at].offset = (end - at - 1) as i16;
    }
    if let Some((counters, lost)) = counters {
        code.push(instruction(0x15, 9, 0, 9, 0)); // if r9 == 0 goto out
        code.push(instruction(0x62, 10, 0, -4, lost.cast_signed())); // *(u32 *)(r10 - 4) = lost
        code.extend(address(1, 1, counters.as_raw_fd()));
        code.extend([
            instruction(0xbf, 2, 10, 0, 0),              // r2 = r10
            instruction(0x07, 2, 0, 0, -4),              // r2 += -4
            instruction(0x85, 0, 0, 0, MAP_LOOKUP_ELEM), // call
            instruction(0x15, 0, 0, 2, 0),               // if r0 == 0 goto out
            // Atomic, because a probe that interrupts this program adds to it as well.
            instruction(0xdb, 0, 9, 0, 0), // *(u64 *)r0 += r9
            instruction(0xb7, 0, 0, 0, 0), // r0 = 0
        ]);
    }
    code.extend([
        instruction(0xbf, 0, 9, 0, 0), // out: r0 = r9
        instruction(0x95, 0, 0, 0, 0), // exit
    ]);
    code
}

/// The array's value, mapped.
struct Slots(NonNull<c_void>);

impl Slots {
    fn map(array: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap(
                ptr::null_mut(),
                MOST * SLOT,
                access,
                MapFlags::SHARED,
                array,
                0,
            )?
        };
        NonNull::new(at)
            .map(Self)
            .ok_or_else(|| io::Error::other("a mapping at address 0"))
    }

    fn set(&mut self, index: usize, record: &[u8]) {
        assert!(index < MOST && (1..=LONGEST).contains(&record.len()));
        // SAFETY: the mapping has MOST slots, nothing else refers to it, and no run of the program is under way.
        let slot = unsafe {
            let at = self.0.as_ptr().cast::<u8>().add(index * SLOT);
            slice::from_raw_parts_mut(at, SLOT)
        };
        slot[..8].copy_from_slice(&(record.len() as u64 - 1).to_ne_bytes());
        slot[8..8 + record.len()].copy_from_slice(record);
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing refers to it any more. It cannot fail.
        let _ = unsafe { munmap(self.0.as_ptr(), MOST * SLOT) };
    }
}

/// # Safety
/// `attributes` must be what the command wants, and all that it points to must live.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as it is told there are.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, for us alone. Descriptors fit 32 bits.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

impl Fed {
    pub(crate) fn add(&mut self, other: Self) {
        self.made += other.made;
        self.lost += other.lost;
    }
}
