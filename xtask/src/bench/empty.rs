//! A BPF program that does nothing. What the kernel's statistics say it takes is what they cost themselves:
//! the clock is read twice around each run.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

/// From `enum bpf_cmd` and `enum bpf_prog_type` of `include/uapi/linux/bpf.h`, which never change.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;

/// The members of `union bpf_attr` for `BPF_PROG_LOAD`, up to the licence: the rest is optional.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

/// Those for `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
struct Open {
    name: u64,
    prog_fd: u32,
    reserved: u32,
}

/// The program, attached where state changes are told, until this value goes.
pub(super) struct Empty {
    _program: OwnedFd,
    _link: OwnedFd,
}

impl Empty {
    /// Loads and attaches it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn attach() -> Result<Self> {
        // r0 = 0; exit: struct bpf_insn is an opcode, registers, a 16-bit offset and a 32-bit constant.
        let instructions: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
        let load = Load {
            prog_type: BPF_PROG_TYPE_RAW_TRACEPOINT,
            insn_cnt: 2,
            insns: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
        };
        // SAFETY: the attributes point to values that outlive the call.
        let program =
            unsafe { bpf(BPF_PROG_LOAD, &load) }.context("cannot load an empty program")?;
        let open = Open {
            name: c"inet_sock_set_state".as_ptr() as u64,
            prog_fd: program.as_raw_fd().cast_unsigned(),
            reserved: 0,
        };
        // SAFETY: as above.
        let link = unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &open) }
            .context("cannot attach an empty program")?;
        Ok(Self {
            _program: program,
            _link: link,
        })
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
