//! What code a process has: its files, and where they are mapped.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    rc::Rc,
};

use framehop::{
    Unwinder as _,
    x86_64::{CacheX86_64, UnwinderX86_64},
};

use super::{
    handed::{Bytes, Handed},
    ledger::{Charge, Ledger},
    module::Module,
};
use crate::event::{Printable, Unread};

/// No more of `/proc/PID/maps` is read: `vm.max_map_count` is 65,530 unless somebody has raised it, and a line has
/// 73 bytes and a path.
const MOST_MAPS: u64 = 12 << 20;
/// No more different files of a process are opened.
pub(super) const MOST_FILES: usize = 512;
/// How much is read of it at once.
const BLOCK: usize = 64 << 10;
/// What a mapping takes of memory: what is kept of it here and for walking.
const MAPPING: u64 = 400;

/// What lies at an address.
#[derive(Clone)]
pub(super) enum Place {
    /// Code of a file.
    File {
        module: Rc<Module>,
        /// The address as the file counts it.
        address: u64,
        /// It is the program itself, and no library.
        main: bool,
    },
    /// Code of a file that could not be read.
    NoFile {
        name: Rc<str>,
        offset: u64,
        /// Why it was not to be read, if it was not.
        unread: Option<Unread>,
    },
    /// Code that was made at run time.
    Made { address: u64 },
}

/// A part of the address space that can be run.
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    /// Which of [`Mapped::files`].
    file: u32,
}

/// A file, or a kind of memory, that is mapped.
pub(super) struct MappedFile {
    name: Rc<str>,
    /// 0 if no file is mapped.
    inode: u64,
    pub(super) module: Option<Rc<Module>>,
    /// Why it was not to be read.
    pub(super) unread: Option<Unread>,
}

/// What `/proc/PID/maps` says.
pub(super) struct Maps {
    mappings: Vec<Mapping>,
    pub(super) files: Vec<MappedFile>,
    /// A mapping of each file that can be opened, by which to open it.
    pub(super) ranges: Vec<(usize, (u64, u64))>,
    /// Of all of it.
    pub(super) hash: u64,
    charge: Charge,
}

/// What a process has mapped, with what was read of it.
pub(super) struct Process {
    mappings: Vec<Mapping>,
    files: Vec<MappedFile>,
    /// Device and inode of its program.
    exe: Option<(u64, u64)>,
    /// Of what `/proc/PID/maps` said.
    pub(super) hash: u64,
    pub(super) unwinder: UnwinderX86_64<Bytes>,
    pub(super) cache: Box<CacheX86_64>,
    _charge: Charge,
}

/// Why mappings are not known.
pub(super) enum NoMaps {
    /// The file cannot be read: the process is gone.
    Gone,
    TooLarge,
}

impl Maps {
    /// Reads and takes apart.
    pub(super) fn read(
        file: &Handed,
        hasher: &RandomState,
        ledger: &Ledger,
    ) -> Result<Self, NoMaps> {
        let mut text = Vec::new();
        loop {
            let before = text.len();
            text.resize(before + BLOCK, 0);
            let read = file.read_at(&mut text[before..], before as u64);
            let read = read.map_err(|_| NoMaps::Gone)?;
            text.truncate(before + read);
            if read < BLOCK {
                break;
            }
            if text.len() as u64 > MOST_MAPS {
                return Err(NoMaps::TooLarge);
            }
        }
        if text.is_empty() {
            return Err(NoMaps::Gone);
        }
        let lines = || text.split(|byte| *byte == b'\n').filter_map(parse);
        let charge = ledger.charge(lines().count() as u64 * MAPPING);
        let mut maps = Self {
            mappings: Vec::new(),
            files: Vec::new(),
            ranges: Vec::new(),
            hash: hasher.hash_one(&text),
            charge: charge.ok_or(NoMaps::TooLarge)?,
        };
        let mut known = HashMap::new();
        for line in lines() {
            // `/proc/PID/maps` has the device of the file system, in which subvolumes of btrfs have the same inodes:
            // only with the name it is one file.
            let key = (line.device, line.inode, line.name);
            let file = *known.entry(key).or_insert_with(|| {
                let index = maps.files.len();
                if line.inode != 0 && maps.ranges.len() < MOST_FILES {
                    maps.ranges.push((index, (line.start, line.end)));
                }
                maps.files.push(MappedFile {
                    name: Printable(line.name).to_string().into(),
                    inode: line.inode,
                    module: None,
                    unread: (line.inode != 0).then_some(Unread::TooLarge),
                });
                index
            });
            maps.mappings.push(Mapping {
                start: line.start,
                end: line.end,
                offset: line.offset,
                file: u32::try_from(file).map_err(|_| NoMaps::TooLarge)?,
            });
        }
        Ok(maps)
    }

    /// The name of a file, as the process has it.
    pub(super) fn name(&self, file: usize) -> &str {
        &self.files[file].name
    }
}

impl Process {
    /// With the modules of its files filled in.
    pub(super) fn new(maps: Maps, exe: Option<(u64, u64)>) -> Self {
        let mut unwinder = UnwinderX86_64::new();
        for mapping in &maps.mappings {
            let module = maps.files[mapping.file as usize].module.as_ref();
            if let Some(module) = module
                && let Some(bias) = module.bias(mapping.start, mapping.offset)
                && let Some(info) = module.unwind_info()
            {
                let range = mapping.start..mapping.end;
                unwinder.add_module(framehop::Module::new(String::new(), range, bias, info));
            }
        }
        Self {
            mappings: maps.mappings,
            files: maps.files,
            exe,
            hash: maps.hash,
            unwinder,
            cache: Box::new(CacheX86_64::new()),
            _charge: maps.charge,
        }
    }

    fn mapping(&self, address: u64) -> Option<(&Mapping, &MappedFile)> {
        let after = self
            .mappings
            .partition_point(|mapping| mapping.start <= address);
        let mapping = &self.mappings[after.checked_sub(1)?];
        (address < mapping.end).then(|| (mapping, &self.files[mapping.file as usize]))
    }

    /// Whether there is code at this address.
    pub(super) fn has_code(&self, address: u64) -> bool {
        self.mapping(address).is_some()
    }

    /// Whether the frame of the function at this address is known from unwind tables.
    pub(super) fn has_table(&self, address: u64) -> bool {
        self.mapping(address).is_some_and(|(mapping, file)| {
            file.module.as_ref().is_some_and(|module| {
                let bias = module.bias(mapping.start, mapping.offset);
                bias.is_some_and(|bias| module.has_table(address.wrapping_sub(bias)))
            })
        })
    }

    /// Why the unwind table of the code there was not read, though it may have one.
    pub(super) fn unread(&self, address: u64) -> Option<Unread> {
        let (_, file) = self.mapping(address)?;
        let table = |module: &Rc<Module>| module.unread;
        file.unread.or_else(|| file.module.as_ref().and_then(table))
    }

    /// Whether the code at this address is for 32 bits.
    pub(super) fn is_32_bit(&self, address: u64) -> bool {
        let module = self
            .mapping(address)
            .and_then(|(_, file)| file.module.as_ref());
        module.is_some_and(|module| module.is_32_bit)
    }

    /// What lies there. A return address is behind the call that it is of.
    pub(super) fn place(&self, address: u64, is_return: bool) -> Place {
        let address = address.wrapping_sub(u64::from(is_return));
        let Some((mapping, file)) = self.mapping(address) else {
            return Place::Made { address };
        };
        if let Some(module) = &file.module
            && let Some(bias) = module.bias(mapping.start, mapping.offset)
        {
            let id = &module.file.id;
            return Place::File {
                module: Rc::clone(module),
                address: address.wrapping_sub(bias),
                main: self.exe == Some((id.device, id.inode)),
            };
        }
        if file.name.is_empty()
            || file.name.starts_with("[anon")
            || file.inode != 0 && file.name.starts_with("/memfd:")
        {
            return Place::Made { address };
        }
        Place::NoFile {
            name: Rc::clone(&file.name),
            offset: (address - mapping.start).wrapping_add(mapping.offset),
            unread: file.unread,
        }
    }
}

/// A line of `/proc/PID/maps`.
struct Line<'a> {
    start: u64,
    end: u64,
    offset: u64,
    device: &'a [u8],
    inode: u64,
    name: &'a [u8],
}

/// A line of `/proc/PID/maps`, if what is mapped can be run.
fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = text()?.split_once('-')?;
    let permissions = text()?;
    let offset = text()?;
    let device = text()?;
    let inode = text()?;
    if permissions.as_bytes().get(2) != Some(&b'x') {
        return None;
    }
    let name = fields.next().unwrap_or_default().trim_ascii();
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    Some(Line {
        start: hex(start)?,
        end: hex(end)?,
        offset: hex(offset)?,
        device: device.as_bytes(),
        inode: inode.parse().ok()?,
        name,
    })
}

/// See [`crate::fuzz`]: `/proc/PID/maps`.
pub(crate) fn fuzz(maps: &[u8]) {
    for mapping in maps.split(|byte| *byte == b'\n').filter_map(parse) {
        assert!(mapping.name.len() <= maps.len());
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
        assert_eq!((mapping.device, mapping.inode), (&b"fe:01"[..], 1_703_938));
        assert_eq!(mapping.name, b"/usr/lib/x y.so");
        let deleted = b"1000-2000 r-xp 00000000 00:01 7   /tmp/a (deleted)";
        assert_eq!(parse(deleted).unwrap().name, b"/tmp/a");
        let made = b"1000-2000 rwxp 00000000 00:00 0 ";
        assert_eq!(parse(made).unwrap().name, b"");
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
