//! What an ELF file's headers say, and nothing more: not its symbols, which can be a claim of gigabytes.
//!
//! All of it is read in parts of a known size. The `object` crate gives the layout; its reader of whole files takes in
//! symbol tables at once.

use std::ops::Range;

use object::{
    LittleEndian,
    elf::{
        CompressionHeader64, ELFCLASS32, ELFCLASS64, ELFCOMPRESS_ZLIB, ELFDATA2LSB, ELFMAG,
        FileHeader64, NT_GNU_BUILD_ID, NoteHeader64, PF_X, PT_LOAD, ProgramHeader64,
        SHF_COMPRESSED, SHT_NOBITS, SHT_NOTE, SectionHeader64,
    },
    pod::{Pod, from_bytes, slice_from_all_bytes},
};

use super::handed::Handed;

/// How many segments of code a file can have; linkers make one or two.
const MOST_SEGMENTS: usize = 64;
/// How long the names of sections can be, all together.
const MOST_NAMES: u64 = 4 << 20;
/// How long notes can be. That with the build id has 36 bytes.
const MOST_NOTES: u64 = 4 << 10;
/// The longest build id; the usual ones have 20 bytes, and some 32.
const MOST_BUILD_ID: usize = 64;

/// See the [module](self).
pub(super) struct Elf {
    pub(super) is_32_bit: bool,
    /// What of it is loaded as code: offset and size in the file, and address.
    pub(super) segments: Vec<(u64, u64, u64)>,
    pub(super) build_id: Option<Vec<u8>>,
    sections: Vec<Section>,
}

/// Where a section is.
#[derive(Clone)]
pub(super) struct Section {
    name: Vec<u8>,
    address: u64,
    /// Of its bytes in the file.
    pub(super) at: u64,
    pub(super) len: u64,
    /// How many bytes it is in truth, if they are compressed.
    pub(super) inflated: Option<Inflated>,
}

/// A compressed section.
#[derive(Clone, Copy)]
pub(super) struct Inflated {
    pub(super) len: u64,
    /// It is zlib's format; others are not read.
    pub(super) is_zlib: bool,
}

impl Elf {
    /// `None` for what is no ELF file of this machine's byte order.
    pub(super) fn read(file: &Handed) -> Option<Self> {
        let bytes = part(file, 0, size_of::<FileHeader64<LittleEndian>>() as u64)?;
        let header: &FileHeader64<LittleEndian> = one(&bytes)?;
        let ident = &header.e_ident;
        if ident.magic != ELFMAG || ident.data != ELFDATA2LSB {
            return None;
        }
        let mut elf = Self {
            is_32_bit: ident.class == ELFCLASS32,
            segments: Vec::new(),
            build_id: None,
            sections: Vec::new(),
        };
        if ident.class != ELFCLASS64 {
            return Some(elf);
        }
        let e = LittleEndian;
        let (at, count) = (header.e_phoff.get(e), header.e_phnum.get(e));
        let bytes = table::<ProgramHeader64<LittleEndian>>(file, at, count)?;
        let segments: &[ProgramHeader64<LittleEndian>] = slice_from_all_bytes(&bytes).ok()?;
        // What is code, and nothing else: at the seam between two segments one page of the file is in both,
        // at different addresses (lld lays files out like that).
        let code = segments.iter().filter(|segment| {
            segment.p_type.get(e) == PT_LOAD && segment.p_flags.get(e) & PF_X != 0
        });
        elf.segments.extend(code.take(MOST_SEGMENTS).map(|segment| {
            (
                segment.p_offset.get(e),
                segment.p_filesz.get(e),
                segment.p_vaddr.get(e),
            )
        }));
        // A file that was stripped of its sections is run all the same.
        let _ = elf.read_sections(file, header);
        Some(elf)
    }

    fn read_sections(&mut self, file: &Handed, header: &FileHeader64<LittleEndian>) -> Option<()> {
        let e = LittleEndian;
        let (at, count) = (header.e_shoff.get(e), header.e_shnum.get(e));
        let bytes = table::<SectionHeader64<LittleEndian>>(file, at, count)?;
        let sections: &[SectionHeader64<LittleEndian>] = slice_from_all_bytes(&bytes).ok()?;
        let names = sections.get(usize::from(header.e_shstrndx.get(e)))?;
        let names_len = names.sh_size.get(e);
        if names_len > MOST_NAMES {
            return None;
        }
        let names = part(file, names.sh_offset.get(e), names_len)?;
        for section in sections {
            let (at, len) = (section.sh_offset.get(e), section.sh_size.get(e));
            if section.sh_type.get(e) == SHT_NOTE && len <= MOST_NOTES && self.build_id.is_none() {
                self.build_id = part(file, at, len).and_then(|notes| build_id(&notes));
            }
            let name = names.get(section.sh_name.get(e) as usize..)?;
            let name = &name[..name.iter().position(|byte| *byte == 0)?];
            if section.sh_type.get(e) == SHT_NOBITS || !name.starts_with(b".") || name.len() > 32 {
                continue;
            }
            let mut known = Section {
                name: name.to_vec(),
                address: section.sh_addr.get(e),
                at,
                len,
                inflated: None,
            };
            if section.sh_flags.get(e) & u64::from(SHF_COMPRESSED) != 0 {
                let size = size_of::<CompressionHeader64<LittleEndian>>() as u64;
                let bytes = part(file, at, size)?;
                let header: &CompressionHeader64<LittleEndian> = one(&bytes)?;
                known.at = at.checked_add(size)?;
                known.len = len.checked_sub(size)?;
                known.inflated = Some(Inflated {
                    len: header.ch_size.get(e),
                    is_zlib: header.ch_type.get(e) == ELFCOMPRESS_ZLIB,
                });
            }
            self.sections.push(known);
        }
        Some(())
    }

    pub(super) fn section(&self, name: &str) -> Option<&Section> {
        let mut sections = self.sections.iter();
        sections.find(|section| section.name == name.as_bytes())
    }

    /// The addresses of a section, as the file counts them.
    pub(super) fn addresses(&self, name: &str) -> Option<Range<u64>> {
        self.section(name).and_then(Section::addresses)
    }
}

impl Section {
    pub(super) fn addresses(&self) -> Option<Range<u64>> {
        Some(self.address..self.address.checked_add(self.len)?)
    }

    /// How many bytes are made of it.
    pub(super) fn made(&self) -> u64 {
        self.inflated.map_or(self.len, |inflated| inflated.len)
    }
}

/// A part of the file, of a size that was checked.
fn part(file: &Handed, at: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    (file.read_at(&mut bytes, at).ok()? == bytes.len()).then_some(bytes)
}

/// So many headers: 4 MiB at most, by the width of their count.
fn table<T>(file: &Handed, at: u64, count: u16) -> Option<Vec<u8>> {
    part(file, at, u64::from(count) * size_of::<T>() as u64)
}

fn one<T: Pod>(bytes: &[u8]) -> Option<&T> {
    Some(from_bytes(bytes).ok()?.0)
}

/// The build id among notes.
fn build_id(mut notes: &[u8]) -> Option<Vec<u8>> {
    let e = LittleEndian;
    loop {
        let (note, rest) = from_bytes::<NoteHeader64<LittleEndian>>(notes).ok()?;
        let padded = |len: usize| len.checked_next_multiple_of(4);
        let (name, desc) = (note.n_namesz.get(e) as usize, note.n_descsz.get(e) as usize);
        let text = rest.get(..name)?;
        let rest = rest.get(padded(name)?..)?;
        let id = rest.get(..desc)?;
        if text == b"GNU\0" && note.n_type.get(e) == NT_GNU_BUILD_ID {
            return (2..=MOST_BUILD_ID).contains(&desc).then(|| id.to_vec());
        }
        notes = rest.get(padded(desc)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd};

    use super::*;

    #[test]
    fn what_a_program_says_of_itself() {
        let file = Handed::new(OwnedFd::from(File::open("/proc/self/exe").unwrap())).unwrap();
        let elf = Elf::read(&file).unwrap();
        assert!(!elf.is_32_bit && elf.segments.len() == 1);
        let own = what_a_program_says_of_itself as *const () as u64;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let base = u64::from_str_radix(maps.split('-').next().unwrap(), 16).unwrap();
        assert!(elf.addresses(".text").unwrap().contains(&(own - base)));
        assert!(elf.section(".debug_info").is_some_and(|it| it.made() > 0));
        assert!(elf.section(".bss").is_none());
        let none = Handed::new(OwnedFd::from(File::open("/proc/self/maps").unwrap())).unwrap();
        assert!(Elf::read(&none).is_none());
    }

    #[test]
    fn a_build_id_is_found_among_other_notes() {
        let note = |name: &[u8], kind: u32, desc: &[u8]| {
            let mut note = Vec::new();
            for number in [name.len() as u32, desc.len() as u32, kind] {
                note.extend(number.to_le_bytes());
            }
            for bytes in [name, desc] {
                note.extend(bytes);
                note.resize(note.len().next_multiple_of(4), 0);
            }
            note
        };
        let id = note(b"GNU\0", 3, &[7; 20]);
        assert_eq!(build_id(&id), Some(vec![7; 20]));
        let other = note(b"stapsdt\0", 3, &[1; 5]);
        assert_eq!(build_id(&[&other[..], &id].concat()), Some(vec![7; 20]));
        assert_eq!(build_id(&other), None);
        assert_eq!(build_id(&id[..30]), None);
        assert_eq!(build_id(&note(b"GNU\0", 3, &[7; 65])), None);
        let mut endless = id.clone();
        endless[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(build_id(&endless), None);
    }
}
