//! A file with code: its unwind tables, and where its code is.

use std::{cell::OnceCell, ops::Range};

use framehop::ExplicitModuleSectionInfo;
use gimli::{BaseAddresses, EhFrame, EhFrameHdr, LittleEndian, UnwindSection as _};

use super::{
    elf::Elf,
    handed::{Bytes, Handed, NoBytes},
    ledger::Ledger,
};
use crate::event::Unread;

/// The largest unwind table that is read: some browsers have 50 MB.
const MOST_TABLE: u64 = 64 << 20;
/// A section's addresses, as the file counts them, and bytes.
#[derive(Clone)]
struct Section {
    addresses: Range<u64>,
    bytes: Bytes,
}

/// See the [module](self).
pub(super) struct Module {
    pub(super) file: Handed,
    /// Its separate debug file, or why that is not to be read, if one with the same build id is installed.
    pub(super) debug: OnceCell<Result<Handed, Unread>>,
    /// What a debug file would have to have.
    pub(super) build_id: Option<Vec<u8>>,
    /// Its path, where the process sees it.
    pub(super) name: Box<str>,
    pub(super) is_32_bit: bool,
    /// What of it is loaded as code: offset and size in the file, and address.
    segments: Vec<(u64, u64, u64)>,
    tables: Option<Section>,
    index: Option<Section>,
    text: Option<Range<u64>>,
    got: Option<Range<u64>>,
    /// Why its unwind table is not here, though it has one.
    pub(super) unread: Option<Unread>,
}

impl Module {
    /// `None` for what is no ELF file.
    pub(super) fn read(file: Handed, name: &str, ledger: &Ledger) -> Option<Self> {
        let elf = Elf::read(&file)?;
        let mut unread = None;
        let mut section = |name| {
            let section = elf.section(name)?;
            let addresses = section.addresses()?;
            let bytes = match section.len {
                // A file may be sparse, and claim any size.
                len if len > MOST_TABLE => Err(NoBytes::TooLarge),
                len => file.bytes(section.at, len, ledger),
            };
            match bytes {
                Ok(bytes) => Some(Section { addresses, bytes }),
                Err(NoBytes::Beyond) => None,
                Err(NoBytes::TooLarge) => {
                    unread = Some(Unread::TooLarge);
                    None
                }
            }
        };
        let (tables, index) = (section(".eh_frame"), section(".eh_frame_hdr"));
        Some(Self {
            debug: OnceCell::new(),
            name: name.into(),
            is_32_bit: elf.is_32_bit,
            tables,
            index,
            text: elf.addresses(".text"),
            got: elf.addresses(".got"),
            segments: elf.segments,
            build_id: elf.build_id,
            file,
            unread,
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

    /// What it takes to walk through its frames, if there is any.
    pub(super) fn unwind_info(&self) -> Option<ExplicitModuleSectionInfo<Bytes>> {
        let part = |section: &Option<Section>| match section {
            Some(section) => (
                Some(section.addresses.clone()),
                Some(Bytes::clone(&section.bytes)),
            ),
            None => (None, None),
        };
        let (eh_frame_svma, eh_frame) = part(&self.tables);
        let (eh_frame_hdr_svma, eh_frame_hdr) = part(&self.index);
        eh_frame.as_ref()?;
        Some(ExplicitModuleSectionInfo {
            base_svma: 0,
            text: None,
            stubs_svma: None,
            stub_helper_svma: None,
            unwind_info: None,
            debug_frame: None,
            text_segment_svma: None,
            text_segment: None,
            text_svma: self.text.clone(),
            got_svma: self.got.clone(),
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
        })
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
}
