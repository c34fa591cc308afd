//! What code a process has: its files, and where they are mapped.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    sync::Arc,
};

use framehop::Unwinder as _;
use framehop::x86_64::{CacheX86_64, UnwinderX86_64};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;
use tcptrace_ebpf as kernel;

use super::{
    module::{Module, Modules},
    perf_map::PerfMap,
};
use crate::{
    event::{Printable, StackEnd},
    kernel::{clock, procfs},
};

/// A process, as long as it runs the same program: the kernel lays the stack out anew with each `execve()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) pid: u32,
    /// Since boot, in the ticks in which `/proc` tells it.
    start: u64,
    pub(super) start_stack: u64,
}

/// Most that is read of `/proc/PID/maps`, bytes: 65,530 mappings, the kernel's own limit (`vm.max_map_count`),
/// with paths of 190 bytes. A path can have 4 KiB, and a process chooses how many it has.
const MOST_MAPS: usize = 16 << 20;
/// Most that is read of `/proc/PID/stat` and `status`, bytes: both have less than 4 KiB.
const MOST_STAT: usize = 1 << 16;

impl Key {
    pub(super) fn of(record: &kernel::Stack) -> Self {
        Self {
            pid: record.header.pid,
            start: clock::ticks_of_start(record.header.start),
            start_stack: record.start_stack,
        }
    }

    #[cfg(test)]
    pub(super) fn of_this() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let mut fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
        let mut number = |skip| fields.nth(skip).unwrap().parse().unwrap();
        Self {
            pid: std::process::id(),
            start: number(19),
            start_stack: number(5),
        }
    }

    /// When the process started, boot time nanoseconds.
    pub(super) fn start_ns(&self) -> u64 {
        clock::start_of_ticks(self.start)
    }

    /// Whether the process is still there, and runs the same program.
    pub(super) fn check(&self) -> Result<(), StackEnd> {
        let stat = procfs::read_most(CWD, format!("/proc/{}/stat", self.pid), MOST_STAT)
            .map_err(|_| StackEnd::Gone)?;
        // The name in brackets may hold anything.
        let after = stat.iter().rposition(|byte| *byte == b')');
        let text = String::from_utf8_lossy(&stat[after.map_or(0, |at| at + 1)..]);
        // proc_pid_stat(5): 22 is the start, 28 the stack; the first here is 3.
        let mut fields = text.split_ascii_whitespace();
        let state = fields.next();
        let start: Option<u64> = fields.nth(18).and_then(|field| field.parse().ok());
        let stack: Option<u64> = fields.nth(5).and_then(|field| field.parse().ok());
        match (state, start, stack) {
            (Some(state), Some(start), Some(stack)) if start == self.start => match stack {
                stack if stack == self.start_stack => Ok(()),
                // Shown to who may trace the process; and it has none any more when it has ended.
                0 if !matches!(state, "Z" | "X") => Err(StackEnd::NotPermitted),
                _ => Err(StackEnd::Gone),
            },
            _ => Err(StackEnd::Gone),
        }
    }
}

/// What lies at an address.
#[derive(Clone)]
pub(super) enum Place {
    /// Code of a file.
    File {
        module: Arc<Module>,
        /// The address as the file counts it.
        address: u64,
        /// It is the program itself, and no library.
        main: bool,
    },
    /// Code of a file that could not be read.
    Unread { name: Box<str>, offset: u64 },
    /// Code that was made at run time.
    Made {
        /// What the runtime says of it, if anything.
        map: Option<Arc<PerfMap>>,
        address: u64,
    },
}

/// A part of the address space that can be run.
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    /// 0 if no file is mapped.
    inode: u64,
    name: Box<str>,
    module: Option<Arc<Module>>,
}

pub(super) struct Process {
    key: Key,
    /// What `/proc/PID/maps` said.
    maps: Vec<u8>,
    /// In order.
    mappings: Vec<Mapping>,
    /// Which file is the program.
    exe: Option<Arc<Module>>,
    perf_map: Option<Arc<PerfMap>>,
    pub(super) unwinder: UnwinderX86_64<Arc<[u8]>>,
    pub(super) cache: Box<CacheX86_64>,
}

impl Process {
    /// Reads what it has mapped, and opens the files.
    pub(super) fn open(key: Key, modules: &mut Modules) -> Result<Self, StackEnd> {
        key.check()?;
        let mut process = Self {
            key,
            maps: Vec::new(),
            mappings: Vec::new(),
            exe: None,
            perf_map: None,
            unwinder: UnwinderX86_64::new(),
            cache: Box::new(CacheX86_64::new()),
        };
        process.map(modules)?;
        Ok(process)
    }

    pub(super) fn lives(&self) -> bool {
        self.key.check().is_ok()
    }

    /// Reads what it has mapped now. Returns whether that is something else than before.
    pub(super) fn map(&mut self, modules: &mut Modules) -> Result<bool, StackEnd> {
        let pid = self.key.pid;
        let maps =
            procfs::read_most(CWD, format!("/proc/{pid}/maps"), MOST_MAPS).map_err(|errno| {
                match errno {
                    Errno::ACCESS | Errno::PERM => StackEnd::NotPermitted,
                    // Its code is not known, and so no address leads to any.
                    Errno::FBIG => StackEnd::NoCode,
                    _ => StackEnd::Gone,
                }
            })?;
        if maps == self.maps {
            return Ok(false);
        }
        let root = openat(
            CWD,
            format!("/proc/{pid}/root"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok();
        let exe = fs::metadata(format!("/proc/{pid}/exe"));
        let mut mappings = Vec::new();
        let mut unwinder = UnwinderX86_64::new();
        for line in maps.split(|byte| *byte == b'\n') {
            let Some(mut mapping) = parse(line) else {
                continue;
            };
            if mapping.inode != 0
                && let Some(file) = open(pid, &mapping, root.as_ref())
            {
                let read = |file| Module::read(file, &mapping.name, root.as_ref());
                mapping.module = modules.get(file, read);
            }
            if let Some(module) = &mapping.module
                && let Some(bias) = module.bias(mapping.start, mapping.offset)
            {
                unwinder.add_module(framehop::Module::new(
                    String::new(),
                    mapping.start..mapping.end,
                    bias,
                    module.unwind_info(),
                ));
            }
            mappings.push(mapping);
        }
        // What was read belongs to the program that called, if that still runs now.
        self.key.check()?;
        self.exe = exe.ok().and_then(|exe| {
            let mut modules = mappings
                .iter()
                .filter_map(|mapping| mapping.module.as_ref());
            modules.find(|module| module.is(&exe)).cloned()
        });
        if self.perf_map.is_none() {
            self.perf_map = PerfMap::of(self.key).map(Arc::new);
        }
        self.maps = maps;
        self.mappings = mappings;
        self.unwinder = unwinder;
        Ok(true)
    }

    fn mapping(&self, address: u64) -> Option<&Mapping> {
        let after = self
            .mappings
            .partition_point(|mapping| mapping.start <= address);
        let mapping = &self.mappings[after.checked_sub(1)?];
        (address < mapping.end).then_some(mapping)
    }

    /// Whether there is code at this address.
    pub(super) fn has_code(&self, address: u64) -> bool {
        self.mapping(address).is_some()
    }

    /// Whether the frame of the function at this address is known from unwind tables.
    pub(super) fn has_table(&self, address: u64) -> bool {
        self.mapping(address).is_some_and(|mapping| {
            mapping.module.as_ref().is_some_and(|module| {
                let bias = module.bias(mapping.start, mapping.offset);
                bias.is_some_and(|bias| module.has_table(address.wrapping_sub(bias)))
            })
        })
    }

    /// Whether the code at this address is for 32 bits.
    pub(super) fn is_32_bit(&self, address: u64) -> bool {
        let module = self
            .mapping(address)
            .and_then(|mapping| mapping.module.as_ref());
        module.is_some_and(|module| module.is_32_bit)
    }

    /// What lies there. A return address is behind the call that it is of.
    pub(super) fn place(&self, address: u64, is_return: bool) -> Place {
        let address = address - u64::from(is_return);
        let Some(mapping) = self.mapping(address) else {
            return Place::Made { map: None, address };
        };
        if let Some(module) = &mapping.module
            && let Some(bias) = module.bias(mapping.start, mapping.offset)
        {
            return Place::File {
                module: Arc::clone(module),
                address: address.wrapping_sub(bias),
                main: self
                    .exe
                    .as_ref()
                    .is_some_and(|exe| Arc::ptr_eq(exe, module)),
            };
        }
        if mapping.name.is_empty()
            || mapping.name.starts_with("[anon")
            || mapping.inode != 0 && mapping.name.starts_with("/memfd:")
        {
            return Place::Made {
                map: self.perf_map.clone(),
                address,
            };
        }
        Place::Unread {
            name: mapping.name.clone(),
            offset: address - mapping.start + mapping.offset,
        }
    }
}

/// A line of `/proc/PID/maps`, if what is mapped can be run.
fn parse(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = text()?.split_once('-')?;
    let permissions = text()?;
    let offset = text()?;
    let _device = text()?;
    let inode = text()?;
    if permissions.as_bytes().get(2) != Some(&b'x') {
        return None;
    }
    let name = fields.next().unwrap_or_default().trim_ascii();
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        offset: hex(offset)?,
        inode: inode.parse().ok()?,
        name: Printable(name).to_string().into(),
        module: None,
    })
}

/// The file that is mapped there, wherever it is, and even if it has been deleted; else the file of this
/// name in the process's own tree, if it is the same.
fn open(pid: u32, mapping: &Mapping, root: Option<&OwnedFd>) -> Option<File> {
    let (start, end) = (mapping.start, mapping.end);
    // Memory that was only given a name is no file to be read.
    let direct = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    if let Ok(file) = File::open(direct) {
        return Some(file);
    }
    let path = mapping.name.strip_prefix('/')?;
    let file = open_in(root?, path)?;
    let same = std::os::unix::fs::MetadataExt::ino(&file.metadata().ok()?) == mapping.inode;
    same.then_some(file)
}

/// A regular file in somebody else's tree, in which no link leads out of it.
pub(super) fn open_in(root: &OwnedFd, path: &str) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(openat2(root, path, flags, Mode::empty(), resolve).ok()?);
    file.metadata().ok()?.is_file().then_some(file)
}

/// The number that a process has in its own pid namespace, and the user as whom it makes files.
pub(super) fn number_and_user(pid: u32) -> Option<(u32, u32)> {
    let status = procfs::read_most(CWD, format!("/proc/{pid}/status"), MOST_STAT).ok()?;
    let status = String::from_utf8(status).ok()?;
    // The last of pids is that in the innermost namespace; of users, that of the file system.
    let last = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next_back()?.parse().ok()
    };
    Some((last("NSpid:")?, last("Uid:")?))
}

/// See [`crate::fuzz`]: `/proc/PID/maps`.
pub(crate) fn fuzz(maps: &[u8]) {
    for mapping in maps.split(|byte| *byte == b'\n').filter_map(parse) {
        assert!(!mapping.name.contains(char::is_control), "{}", mapping.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = b"7f0c0a228000-7f0c0a37d000 r-xp 00026000 fe:01 1703938                    /usr/lib/x y.so";
        let mapping = parse(line).unwrap();
        assert_eq!(
            (mapping.start, mapping.end, mapping.offset),
            (0x7f0c_0a22_8000, 0x7f0c_0a37_d000, 0x26000)
        );
        assert_eq!(mapping.inode, 1_703_938);
        assert_eq!(&*mapping.name, "/usr/lib/x y.so");
        let deleted = b"1000-2000 r-xp 00000000 00:01 7   /tmp/a (deleted)";
        assert_eq!(&*parse(deleted).unwrap().name, "/tmp/a");
        let made = b"1000-2000 rwxp 00000000 00:00 0 ";
        assert_eq!(&*parse(made).unwrap().name, "");
        for other in [
            &b""[..],
            b"1000-2000 rw-p 00000000 00:00 0",
            b"x-y r-xp 0 0:0 0",
            b"1000",
        ] {
            assert!(parse(other).is_none());
        }
    }
}
