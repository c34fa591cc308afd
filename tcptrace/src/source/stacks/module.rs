//! A file with code: its unwind tables, and where its symbols are.

use std::{
    collections::HashMap,
    fs::{File, Metadata},
    ops::Range,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::PathBuf,
    sync::{Arc, Weak},
};

use framehop::ExplicitModuleSectionInfo;
use gimli::{BaseAddresses, EhFrame, EhFrameHdr, LittleEndian, UnwindSection as _};
use object::{Object as _, ObjectSection as _, ObjectSegment as _, ReadCache, SegmentFlags};

use super::process::open_in;

/// Files that are open, so that each is read once for all processes: by device and inode of the open file.
/// `/proc/PID/maps` has the device of the file system, in which subvolumes of btrfs have the same inodes.
#[derive(Default)]
pub(super) struct Modules(HashMap<(u64, u64), Weak<Module>>);

impl Modules {
    /// The number of a file that is gone can be another's; but this one is still open.
    pub(super) fn get(
        &mut self,
        file: File,
        read: impl FnOnce(File) -> Option<Module>,
    ) -> Option<Arc<Module>> {
        let metadata = file.metadata().ok()?;
        let id = (metadata.dev(), metadata.ino());
        if let Some(module) = self.0.get(&id).and_then(Weak::upgrade) {
            return Some(module);
        }
        let module = Arc::new(read(file)?);
        self.0.insert(id, Arc::downgrade(&module));
        Some(module)
    }

    pub(super) fn forget_unused(&mut self) {
        self.0.retain(|_, module| module.strong_count() > 0);
    }
}

/// A section's addresses, as the file counts them, and bytes.
#[derive(Clone)]
struct Section {
    addresses: Range<u64>,
    bytes: Arc<[u8]>,
}

/// The largest unwind table that is read: some browsers have 50 MB.
const MOST_BYTES: u64 = 256 << 20;

/// See the [module](self).
pub(super) struct Module {
    file: File,
    /// Its separate debug file, if one with the same build id is installed.
    debug: Option<File>,
    /// Its path, where the process sees it.
    pub(super) name: Box<str>,
    pub(super) is_32_bit: bool,
    /// What of it is loaded as code: offset and size in the file, and address.
    segments: Vec<(u64, u64, u64)>,
    tables: Option<Section>,
    index: Option<Section>,
    text: Option<Range<u64>>,
    got: Option<Range<u64>>,
}

impl Module {
    /// `None` for what is no ELF file. `root`: the tree in which the process lives.
    pub(super) fn read(file: File, name: &str, root: Option<&OwnedFd>) -> Option<Self> {
        let cache = ReadCache::new(&file);
        let elf = object::File::parse(&cache).ok()?;
        if elf.format() != object::BinaryFormat::Elf {
            return None;
        }
        let addresses = |name| {
            let section = elf.section_by_name(name)?;
            Some(section.address()..section.address().checked_add(section.size())?)
        };
        let section = |name| {
            let section = elf.section_by_name(name)?;
            // Before it is read: a file may be sparse, and claim any size.
            if section.size() > MOST_BYTES {
                return None;
            }
            Some(Section {
                addresses: section.address()..section.address().checked_add(section.size())?,
                bytes: section.data().ok()?.into(),
            })
        };
        // What is code, and nothing else: at the seam between two segments one page of the file is in both,
        // at different addresses (lld lays files out like that).
        let executable = |flags| matches!(flags, SegmentFlags::Elf { p_flags } if p_flags & object::elf::PF_X != 0);
        let segments = elf.segments().filter(|segment| executable(segment.flags()));
        let segments = segments.map(|segment| {
            let (offset, size) = segment.file_range();
            (offset, size, segment.address())
        });
        let debug = match elf.build_id() {
            Ok(Some(id)) => separate(id, root),
            _ => None,
        };
        let (is_32_bit, segments) = (!elf.is_64(), segments.collect());
        let (tables, index) = (section(".eh_frame"), section(".eh_frame_hdr"));
        let (text, got) = (addresses(".text"), addresses(".got"));
        Some(Self {
            file,
            debug,
            name: name.into(),
            is_32_bit,
            segments,
            tables,
            index,
            text,
            got,
        })
    }

    /// What to take from an address in the process to get that in the file, of what is mapped there.
    pub(super) fn bias(&self, start: u64, offset: u64) -> Option<u64> {
        // Whole pages are mapped.
        let (at, _, address) = self
            .segments
            .iter()
            .find(|(at, size, _)| (at & !0xfff..at.saturating_add(*size)).contains(&offset))?;
        let address = address.wrapping_sub(*at).wrapping_add(offset);
        Some(start.wrapping_sub(address))
    }

    /// Whether it is this file.
    pub(super) fn is(&self, other: &Metadata) -> bool {
        let own = self.file.metadata();
        own.is_ok_and(|own| (own.dev(), own.ino()) == (other.dev(), other.ino()))
    }

    pub(super) fn unwind_info(&self) -> ExplicitModuleSectionInfo<Arc<[u8]>> {
        let part = |section: &Option<Section>| match section {
            Some(section) => (
                Some(section.addresses.clone()),
                Some(Arc::clone(&section.bytes)),
            ),
            None => (None, None),
        };
        let (eh_frame_svma, eh_frame) = part(&self.tables);
        let (eh_frame_hdr_svma, eh_frame_hdr) = part(&self.index);
        ExplicitModuleSectionInfo {
            text_svma: self.text.clone(),
            got_svma: self.got.clone(),
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
            ..Default::default()
        }
    }

    /// Whether an unwind table tells of the function at this address of the file.
    pub(super) fn has_table(&self, address: u64) -> bool {
        let (Some(tables), Some(index)) = (&self.tables, &self.index) else {
            return false;
        };
        let mut bases = BaseAddresses::default()
            .set_eh_frame(tables.addresses.start)
            .set_eh_frame_hdr(index.addresses.start);
        if let Some(text) = &self.text {
            bases = bases.set_text(text.start);
        }
        if let Some(got) = &self.got {
            bases = bases.set_got(got.start);
        }
        let frames = EhFrame::new(&tables.bytes, LittleEndian);
        let Ok(index) = EhFrameHdr::new(&index.bytes, LittleEndian).parse(&bases, 8) else {
            return false;
        };
        index.table().is_some_and(|table| {
            table
                .fde_for_address(&frames, &bases, address, EhFrame::cie_from_offset)
                .is_ok()
        })
    }

    /// Where its symbols are to be read: a path that leads to the open file.
    pub(super) fn symbols(&self) -> PathBuf {
        let file = self.debug.as_ref().unwrap_or(&self.file);
        format!("/proc/self/fd/{}", file.as_raw_fd()).into()
    }

    /// The file itself, in the same way.
    pub(super) fn own_symbols(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    pub(super) fn has_debug_file(&self) -> bool {
        self.debug.is_some()
    }
}

/// The debug file of a build, as distributions install them: where the process lives, or here.
fn separate(build_id: &[u8], root: Option<&OwnedFd>) -> Option<File> {
    let (first, rest) = build_id.split_first()?;
    let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = format!("usr/lib/debug/.build-id/{first:02x}/{rest}.debug");
    let there = root.and_then(|root| open_in(root, &path));
    there.or_else(|| File::open(format!("/{path}")).ok())
}
