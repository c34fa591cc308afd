//! Functions and lines of a file: from its debug information, else from its symbols.
//!
//! All that is needed is read into memory once, after it was counted: sizes in headers are claims, a file may be
//! sparse, and a few bytes can be inflated to any size.

use std::{borrow::Cow, rc::Rc, time::Instant};

use addr2line::{Context, Location, demangle_auto};
use gimli::{EndianRcSlice, LittleEndian, SectionId};
use object::elf::{STT_FUNC, STT_GNU_IFUNC};

use super::{
    elf::Elf,
    handed::{Bytes, Handed, NoBytes},
    ledger::{Charge, Ledger},
};
use crate::event::Unread;

type Reader = EndianRcSlice<LittleEndian>;

/// Of debug information of so many bytes, so many are made, as quarters of it: units, functions, lines. A program
/// of 105 MB took a third more than its sections.
const DWARF_QUARTERS: u64 = 6;
/// A symbol in a 64-bit ELF file.
const SYMBOL: usize = 24;
/// Symbols are read in blocks of so many.
const BLOCK: usize = 1024;
/// How many functions can be inlined into each other, of those that are shown.
const MOST_INLINED: usize = 64;

/// See the [module](self).
pub(super) struct Symbols {
    dwarf: Option<Context<Reader>>,
    functions: Vec<Function>,
    names: Option<Bytes>,
    /// Why there is no more of it.
    pub(super) unread: Option<Unread>,
    pub(super) needed: Instant,
    _charges: Vec<Charge>,
}

struct Function {
    start: u64,
    size: u64,
    name: u32,
}

/// What is known of an address.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) function: String,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
    pub(super) inlined: bool,
}

impl Symbols {
    pub(super) fn read(file: &Handed, ledger: &Ledger) -> Self {
        let mut symbols = Self {
            dwarf: None,
            functions: Vec::new(),
            names: None,
            unread: None,
            needed: Instant::now(),
            _charges: Vec::new(),
        };
        let Some(elf) = Elf::read(file) else {
            return symbols;
        };
        let too_large = |unread: &mut Option<Unread>, error| {
            if error == NoBytes::TooLarge {
                *unread = Some(Unread::TooLarge);
            }
        };
        // The symbols first: if there is not room for all, function names are worth more than lines.
        let tables = [(".symtab", ".strtab"), (".dynsym", ".dynstr")];
        for (table, names) in tables {
            let range = |name| elf.section(name).map(|section| (section.at, section.len));
            if let (Some(table), Some(names)) = (range(table), range(names)) {
                match symbols.functions(file, table, names, ledger) {
                    Ok(()) if symbols.functions.is_empty() => {}
                    Ok(()) => break,
                    Err(error) => too_large(&mut symbols.unread, error),
                }
            }
        }
        match symbols.dwarf(file, &elf, ledger) {
            Ok(()) => {}
            Err(error) => too_large(&mut symbols.unread, error),
        }
        symbols
    }

    fn functions(
        &mut self,
        file: &Handed,
        (at, len): (u64, u64),
        (names_at, names_len): (u64, u64),
        ledger: &Ledger,
    ) -> Result<(), NoBytes> {
        if at.checked_add(len).is_none_or(|end| end > file.id.size) {
            return Err(NoBytes::Beyond);
        }
        // As many bytes are made of each as it has, at most, and twice while the list grows.
        let charge = ledger
            .charge(len.saturating_mul(2))
            .ok_or(NoBytes::TooLarge)?;
        let names = file.bytes(names_at, names_len, ledger)?;
        let mut block = [0; BLOCK * SYMBOL];
        let mut done = 0;
        while done < len {
            let most = usize::try_from(len - done).unwrap_or(usize::MAX);
            let block = &mut block[..most.min(BLOCK * SYMBOL)];
            let read = file
                .read_at(block, at + done)
                .map_err(|_| NoBytes::Beyond)?;
            self.functions
                .extend(block[..read].chunks_exact(SYMBOL).filter_map(function));
            if read < block.len() {
                break;
            }
            done += read as u64;
        }
        // Of several at one address, the one with a size, which is found first from behind.
        self.functions
            .sort_unstable_by_key(|function| (function.start, function.size));
        self.functions.shrink_to_fit();
        self.names = Some(names);
        self._charges.push(charge);
        Ok(())
    }

    fn dwarf(&mut self, file: &Handed, elf: &Elf, ledger: &Ledger) -> Result<(), NoBytes> {
        let mut sections = Vec::new();
        let mut size = 0u64;
        for id in [
            SectionId::DebugAbbrev,
            SectionId::DebugAddr,
            SectionId::DebugAranges,
            SectionId::DebugInfo,
            SectionId::DebugLine,
            SectionId::DebugLineStr,
            SectionId::DebugRanges,
            SectionId::DebugRngLists,
            SectionId::DebugStr,
            SectionId::DebugStrOffsets,
            SectionId::DebugTypes,
        ] {
            let Some(section) = elf.section(id.name()) else {
                continue;
            };
            let end = section.at.checked_add(section.len);
            if end.is_none_or(|end| end > file.id.size) {
                return Err(NoBytes::Beyond);
            }
            size = size.saturating_add(section.made());
            sections.push((id, section));
        }
        if size == 0 {
            return Ok(());
        }
        let made = (size / 4).saturating_mul(DWARF_QUARTERS);
        let charge = ledger.charge(made).ok_or(NoBytes::TooLarge)?;
        let section = |id: SectionId| -> Result<Reader, NoBytes> {
            let Some((_, section)) = sections.iter().find(|(of, _)| *of == id) else {
                return Ok(Reader::new(Rc::default(), LittleEndian));
            };
            let whole = usize::try_from(section.made()).map_err(|_| NoBytes::TooLarge)?;
            // Filled where it lies: a copy would take as much again.
            let mut shared: Rc<[u8]> = std::iter::repeat_n(0, whole).collect();
            let bytes = Rc::get_mut(&mut shared).ok_or(NoBytes::Beyond)?;
            match section.inflated {
                None => {
                    file.read_at(bytes, section.at)
                        .map_err(|_| NoBytes::Beyond)?;
                }
                Some(inflated) if inflated.is_zlib => {
                    let packed = file.bytes(section.at, section.len, ledger)?;
                    inflate(&packed, bytes).ok_or(NoBytes::Beyond)?;
                }
                Some(_) => return Err(NoBytes::Beyond),
            }
            Ok(Reader::new(shared, LittleEndian))
        };
        let dwarf = gimli::Dwarf::load(section)?;
        self.dwarf = Context::from_dwarf(dwarf).ok();
        self._charges.push(charge);
        Ok(())
    }

    /// The functions at an address, the innermost first: more than one if some were inlined; none if it is not
    /// known.
    pub(super) fn find(&self, address: u64) -> Vec<Found> {
        let symbol = || self.symbol(address);
        let mut found = self.in_dwarf(address).unwrap_or_default();
        match found.last_mut() {
            // A line alone: of assembly, or of a function that debug information does not name.
            Some(outermost) if outermost.function.is_empty() => match symbol() {
                Some(name) => outermost.function = name,
                None => found.clear(),
            },
            Some(_) => {}
            None => found.extend(symbol().map(|function| Found {
                function,
                ..Found::default()
            })),
        }
        found.retain(|found| !found.function.is_empty());
        found
    }

    fn in_dwarf(&self, address: u64) -> Option<Vec<Found>> {
        let frames = self.dwarf.as_ref()?.find_frames(address).skip_all_loads();
        let mut frames = frames.ok()?;
        let mut found = Vec::new();
        while found.len() < MOST_INLINED
            && let Ok(Some(frame)) = frames.next()
        {
            let name = frame.function.as_ref();
            let name = name.and_then(|name| Some(name.demangle().ok()?.into_owned()));
            let (file, line) = place(frame.location.as_ref());
            found.push(Found {
                function: name.unwrap_or_default(),
                file,
                line,
                inlined: true,
            });
        }
        found.last_mut()?.inlined = false;
        Some(found)
    }

    fn symbol(&self, address: u64) -> Option<String> {
        let after = self
            .functions
            .partition_point(|function| function.start <= address);
        // One that begins later may be over already, if it lies within another.
        let mut before = self.functions[..after].iter().rev().take(16);
        let function = before
            .find(|function| function.size == 0 || address - function.start < function.size)?;
        let name = self.names.as_ref()?.get(function.name as usize..)?;
        let name = &name[..name.iter().position(|byte| *byte == 0)?];
        let name = String::from_utf8_lossy(name);
        (!name.is_empty()).then(|| demangle_auto(Cow::Borrowed(&name), None).into_owned())
    }
}

fn place(location: Option<&Location<'_>>) -> (Option<String>, Option<u32>) {
    location.map_or((None, None), |location| {
        // Line 0 is what no line is the cause of.
        let line = location.line.filter(|line| *line != 0);
        (location.file.map(str::to_owned), line)
    })
}

/// A function that is defined here: `Elf64_Sym`.
fn function(symbol: &[u8]) -> Option<Function> {
    let number = |at: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&symbol[at..at + len]);
        u64::from_le_bytes(bytes)
    };
    let kind = symbol[4] & 0xf;
    let (section, start) = (number(6, 2), number(8, 8));
    let is_function = kind == STT_FUNC || kind == STT_GNU_IFUNC;
    (is_function && section != 0 && start != 0).then(|| Function {
        start,
        size: number(16, 8),
        name: number(0, 4) as u32,
    })
}

/// Unpacks it to there, if it is exactly so long.
fn inflate(packed: &[u8], to: &mut [u8]) -> Option<()> {
    let parts = std::iter::once(packed);
    let done = miniz_oxide::inflate::decompress_slice_iter_to_slice(to, parts, true, true).ok()?;
    (done == to.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd};

    use super::*;

    fn read(path: &str, most: u64) -> Symbols {
        let file = Handed::new(OwnedFd::from(File::open(path).unwrap())).unwrap();
        Symbols::read(&file, &Ledger::new(most))
    }

    #[test]
    fn what_has_no_room_is_said_to_be_too_large() {
        let exe = "/proc/self/exe";
        let symbols = read(exe, 1000);
        assert_eq!(symbols.unread, Some(Unread::TooLarge));
        assert!(symbols.functions.is_empty() && symbols.dwarf.is_none());
        let symbols = read(exe, u64::MAX);
        assert_eq!(symbols.unread, None);
        assert!(!symbols.functions.is_empty());
    }

    #[test]
    fn a_function_has_its_name() {
        let symbols = read("/proc/self/exe", u64::MAX);
        let own = a_function_has_its_name as *const () as u64;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let base = maps.split('-').next().unwrap();
        let base = u64::from_str_radix(base, 16).unwrap();
        let found = symbols.find(own - base);
        let name = &found.last().unwrap().function;
        assert!(name.contains("a_function_has_its_name"), "{found:?}");
    }

    #[test]
    fn only_what_has_the_claimed_size_is_inflated() {
        let packed = miniz_oxide::deflate::compress_to_vec_zlib(&[7; 5000], 6);
        let inflated = |packed: &[u8], len| {
            let mut bytes = vec![0; len];
            inflate(packed, &mut bytes).map(|()| bytes)
        };
        assert_eq!(inflated(&packed, 5000), Some(vec![7; 5000]));
        assert_eq!(inflated(&packed, 4999), None);
        assert_eq!(inflated(&packed, 5001), None);
        assert_eq!(inflated(b"nothing", 5000), None);
    }
}
