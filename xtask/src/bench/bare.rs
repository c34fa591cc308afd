//! BPF programs that bound what tracing can cost: one does nothing, one writes a record of constants, one a record of
//! constants and the time.
//!
//! The empty program shows what the kernel's statistics cost themselves: they read the clock twice around each run.
//! The floor is what any tracer pays that hands one record of our size over for each change of state: it reserves
//! room in a ring buffer, fills it, and submits it. No clock, no field of the kernel, no filter. How much of what is
//! above it is the clock depends on the machine, so there is a floor with the clock as well.
//!
//! All are raw tracepoint programs. `bpf_trace_run3()` runs those exactly as it runs `tp_btf` programs, which ours
//! are (`kernel/trace/bpf_trace.c`, 5.12 to 6.18), and they need no BTF.

use std::{
    env, io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tcptrace_ebpf::Transition;

use super::{
    output::Format,
    programs,
    tracer::{Lines, Tracer},
};

/// From `enum bpf_cmd`, `bpf_map_type`, `bpf_prog_type` and `bpf_func_id` of `include/uapi/linux/bpf.h`, which
/// never change.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const BPF_KTIME_GET_BOOT_NS: i32 = 125;
const BPF_RINGBUF_RESERVE: i32 = 131;
const BPF_RINGBUF_SUBMIT: i32 = 132;

/// The names by which results know them.
pub(super) const EMPTY: &str = "an empty program";
pub(super) const FLOOR: &str = "the floor: a record of constants";
pub(super) const STAMPED: &str = "the floor and the clock";

/// As our reader: how long it leaves between two looks while records come.
const DRAIN_EVERY: Duration = Duration::from_millis(20);

/// Which of them.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    /// Does nothing
    Empty,
    /// Writes a record of constants
    Floor,
    /// Writes a record of constants and the time
    Stamped,
}

/// One of them in a process of its own.
#[derive(clap::Args)]
pub(super) struct Options {
    /// Which
    kind: Kind,
    /// Bytes of the ring buffer
    #[arg(long, default_value_t = 8 << 20)]
    buffer: u32,
}

/// All of them, to be measured beside tracers. The floor's ring buffer is as large as that of `own`: how large it is decides
/// how much of it stays in the CPUs' caches.
///
/// # Errors
/// When `own` does not trace here.
pub(super) fn tracers(own: &Tracer, folder: &std::path::Path) -> Result<[Tracer; 3]> {
    let running = own.start(folder, &[])?;
    let buffer = programs::ring_buffer(running.pid())
        .with_context(|| format!("{} has no ring buffer", own.name))?;
    drop(running);
    let program = env::current_exe().context("the path of this program is not known")?;
    let words =
        |kind: &str| ["bench", "bare", kind, "--buffer", &buffer.to_string()].map(str::to_owned);
    let tracer = |name, kind| Tracer {
        name,
        program: program.clone(),
        arguments: words(kind).to_vec(),
        format: Format::Report,
        lines: None::<Lines>,
        bpf: true,
        own: false,
    };
    Ok([
        tracer(EMPTY, "empty"),
        tracer(FLOOR, "floor"),
        tracer(STAMPED, "stamped"),
    ])
}

/// Attaches it, and reads what it writes, until somebody ends this process.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn run(options: &Options) -> Result<()> {
    match options.kind {
        Kind::Empty => {
            let _attached = attach(c"empty", &EMPTY_PROGRAM)?;
            loop {
                thread::park();
            }
        }
        Kind::Floor | Kind::Stamped => {
            let map = ring_buffer(options.buffer)?;
            let (name, stamped) = match options.kind {
                Kind::Stamped => (c"stamped", true),
                _ => (c"floor", false),
            };
            let _attached = attach(name, &floor(map.as_raw_fd(), stamped))?;
            drain(map)
        }
    }
}

/// Reads and forgets: so fast that it never keeps the program waiting for room. If it ever did, the floor would
/// be measured as cheaper than it is, and the targets would be harder to meet.
fn drain(map: OwnedFd) -> Result<()> {
    let map = Map::RingBuf(MapData::from_fd(map)?);
    let mut records = RingBuf::try_from(map)?;
    loop {
        let fd = records.as_fd().try_clone_to_owned()?;
        poll(
            &mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        )?;
        while records.next().is_some() {
            while records.next().is_some() {}
            thread::sleep(DRAIN_EVERY);
        }
    }
}

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// The destination in the low half, the source in the high one.
    registers: u8,
    offset: i16,
    constant: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, constant: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        constant,
    }
}

const fn set(register: u8, constant: i32) -> Instruction {
    instruction(0xb7, register, 0, constant)
}

const fn call(helper: i32) -> Instruction {
    instruction(0x85, 0, 0, helper)
}

const EXIT: Instruction = instruction(0x95, 0, 0, 0);
const EMPTY_PROGRAM: [Instruction; 2] = [set(0, 0), EXIT];

/// Reserves a record as large as ours of a transition in the ring buffer `map`, fills it and submits it. `stamped`: with
/// the time.
fn floor(map: i32, stamped: bool) -> Vec<Instruction> {
    const SIZE: i32 = size_of::<Transition>() as i32;
    const { assert!(SIZE % 8 == 0) };
    /// `BPF_PSEUDO_MAP_FD`, in the half of the source.
    const OF_MAP: u8 = 1 << 4;
    let words = SIZE / 8;
    let mut program = vec![
        // r1 = the map, a constant of 64 bits in two instructions; r2 = the size; r3 = no flags.
        instruction(0x18, 1 | OF_MAP, 0, map),
        instruction(0, 0, 0, 0),
        set(2, SIZE),
        set(3, 0),
        call(BPF_RINGBUF_RESERVE),
    ];
    let mut record = vec![
        // r6 = r0
        instruction(0xbf, 6, 0, 0),
    ];
    // *(u64 *)(r6 + offset) = constant
    record.extend((0..words).map(|word| instruction(0x7a, 6, word as i16 * 8, word)));
    if stamped {
        // *(u64 *)(r6 + 0) = r0
        record.extend([call(BPF_KTIME_GET_BOOT_NS), instruction(0x7b, 6, 0, 0)]);
    }
    record.extend([
        // r1 = r6; r2 = no flags.
        instruction(0xbf, 1 | 6 << 4, 0, 0),
        set(2, 0),
        call(BPF_RINGBUF_SUBMIT),
    ]);
    // if r0 == 0, past the record.
    program.push(instruction(0x15, 0, record.len() as i16, 0));
    program.extend(record);
    program.extend([set(0, 0), EXIT]);
    program
}

/// The members of `union bpf_attr` for `BPF_MAP_CREATE` that are not optional.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// Those for `BPF_PROG_LOAD`, up to the program's name.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u32; 4],
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// Those for `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
struct Open {
    name: u64,
    prog_fd: u32,
    reserved: u32,
}

fn ring_buffer(size: u32) -> Result<OwnedFd> {
    let create = Create {
        map_type: BPF_MAP_TYPE_RINGBUF,
        key_size: 0,
        value_size: 0,
        max_entries: size,
    };
    // SAFETY: the attributes of this command.
    unsafe { bpf(BPF_MAP_CREATE, &create) }
        .with_context(|| format!("cannot make a ring buffer of {size} bytes"))
}

/// Loads the program and attaches it where changes of state are traced, until both descriptors are closed.
fn attach(name: &std::ffi::CStr, program: &[Instruction]) -> Result<[OwnedFd; 2]> {
    let mut prog_name = [0; 16];
    let bytes = name.to_bytes();
    ensure!(bytes.len() < prog_name.len(), "{name:?} is too long");
    prog_name[..bytes.len()].copy_from_slice(bytes);
    let load = Load {
        prog_type: BPF_PROG_TYPE_RAW_TRACEPOINT,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 4],
        kern_version: 0,
        prog_flags: 0,
        prog_name,
    };
    // SAFETY: the attributes point to values that outlive the call.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &load) }
        .with_context(|| format!("cannot load the program {name:?}"))?;
    let open = Open {
        name: c"inet_sock_set_state".as_ptr() as u64,
        prog_fd: loaded.as_raw_fd().cast_unsigned(),
        reserved: 0,
    };
    // SAFETY: as above.
    let link = unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &open) }
        .with_context(|| format!("cannot attach the program {name:?}"))?;
    Ok([loaded, link])
}

/// # Safety
/// `attributes` must be what the command wants, and all that it points to must live.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as the call says there are.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, for us alone. Descriptors fit 32 bits.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_fills_a_record_of_ours() {
        for stamped in [false, true] {
            let program = floor(3, stamped);
            let stores = program
                .iter()
                .filter(|instruction| instruction.code == 0x7a);
            assert_eq!(stores.count() * 8, size_of::<Transition>());
            // Without room for a record it goes on where r0 becomes 0.
            let branch = program
                .iter()
                .position(|instruction| instruction.code == 0x15);
            let branch = branch.expect("a comparison");
            let target = branch + 1 + program[branch].offset as usize;
            assert_eq!((program[target].code, program.len() - target), (0xb7, 2));
        }
    }
}
