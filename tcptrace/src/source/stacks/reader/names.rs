//! From places in code to functions and lines.

use std::{
    collections::HashMap,
    rc::Rc,
    time::{Duration, Instant},
};

use super::{
    super::worker::protocol::{FileId, Frame, Subject},
    handed::Handed,
    ledger::Ledger,
    module::Module,
    process::Place,
    symbols::{Found, Symbols},
};
use crate::event::{Printable, Unread};

/// What has been read of debug information is kept for so long after it was last needed: it can be large.
const KEPT: Duration = Duration::from_secs(10);
/// So much of a name, a path, is kept.
const MOST_NAME: usize = 1024;

/// What has been read of files, to find names.
#[derive(Default)]
pub(super) struct Names {
    symbols: HashMap<FileId, Symbols>,
}

impl Names {
    /// Adds the frames at a place: more than one if functions were inlined, the innermost first.
    ///
    /// `made` finds names of code made at run time; `reading` is told of each file before it is touched.
    pub(super) fn add(
        &mut self,
        place: &Place,
        frames: &mut Vec<Frame>,
        ledger: &Ledger,
        made: &mut impl FnMut(u64) -> (Option<String>, Option<Unread>),
        reading: &mut impl FnMut(Subject),
    ) {
        match place {
            Place::NoFile {
                name,
                offset,
                unread,
            } => frames.push(Frame {
                module: Some(cut(name)),
                address: *offset,
                unread: *unread,
                ..Frame::default()
            }),
            Place::Made { address } => {
                let (function, unread) = made(*address);
                // What has a name needs no excuse.
                let unread = unread.filter(|_| function.is_none());
                frames.push(Frame {
                    function,
                    made: true,
                    address: *address,
                    unread,
                    ..Frame::default()
                });
            }
            Place::File {
                module,
                address,
                main,
            } => {
                let (found, unread) = self.find(module, *address, ledger, reading);
                let bare = Frame {
                    module: Some(cut(&module.name)),
                    address: *address,
                    main: *main,
                    unread: unread.or(module.unread),
                    ..Frame::default()
                };
                if found.is_empty() {
                    frames.push(bare);
                    return;
                }
                frames.extend(found.into_iter().map(|found| Frame {
                    function: Some(cut(&found.function)),
                    file: found.file.as_deref().map(cut),
                    line: found.line,
                    inlined: found.inlined,
                    ..bare.clone()
                }));
            }
        }
    }

    fn find(
        &mut self,
        module: &Rc<Module>,
        address: u64,
        ledger: &Ledger,
        reading: &mut impl FnMut(Subject),
    ) -> (Vec<Found>, Option<Unread>) {
        let mut unread = None;
        let debug = match module.debug.get() {
            Some(Ok(debug)) => Some(debug),
            Some(Err(refused)) => {
                unread = Some(*refused);
                None
            }
            None => None,
        };
        for file in debug.into_iter().chain([&module.file]) {
            reading(Subject::File(file.id));
            let symbols = self.of(file, ledger);
            let found = symbols.find(address);
            unread = unread.or(symbols.unread);
            if !found.is_empty() {
                return (found, unread);
            }
        }
        (Vec::new(), unread)
    }

    /// What is in a file, read now if it is not known; what else is known makes room for it.
    fn of(&mut self, file: &Handed, ledger: &Ledger) -> &mut Symbols {
        let known = self.symbols.contains_key(&file.id);
        if !known {
            let mut symbols = Symbols::read(file, ledger);
            if symbols.unread.is_some() && !self.symbols.is_empty() {
                drop(symbols);
                self.symbols.clear();
                symbols = Symbols::read(file, ledger);
            }
            self.symbols.insert(file.id, symbols);
        }
        let symbols = self.symbols.entry(file.id);
        let symbols = symbols.or_insert_with(|| Symbols::read(file, ledger));
        symbols.needed = Instant::now();
        symbols
    }

    /// Forgets what was not needed lately.
    pub(super) fn forget_unneeded(&mut self, now: Instant) {
        let needed = |symbols: &Symbols| now.duration_since(symbols.needed) < KEPT;
        self.symbols.retain(|_, symbols| needed(symbols));
    }

    pub(super) fn forget_all(&mut self) {
        self.symbols.clear();
    }

    /// Forgets all but what was needed last.
    pub(super) fn forget_others(&mut self) {
        let last = self.symbols.values().map(|symbols| symbols.needed).max();
        self.symbols
            .retain(|_, symbols| Some(symbols.needed) == last);
    }
}

/// So much of it as is kept, printable.
fn cut(name: &str) -> String {
    let mut end = name.len().min(MOST_NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let mut kept = Printable(&name.as_bytes()[..end]).to_string();
    if end < name.len() {
        kept.push('…');
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd};

    use super::*;

    #[test]
    fn debug_information_is_forgotten_when_it_was_not_needed_for_a_while() {
        let (mut names, ledger) = (Names::default(), Ledger::new(u64::MAX));
        let file = Handed::new(OwnedFd::from(File::open("/proc/self/exe").unwrap())).unwrap();
        let needed = names.of(&file, &ledger).needed;
        names.forget_unneeded(needed + KEPT - Duration::from_millis(1));
        assert_eq!(names.symbols.len(), 1);
        names.forget_unneeded(needed + KEPT);
        assert!(names.symbols.is_empty());
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(cut("a\nb"), "a\\nb");
        let long = "ä".repeat(1000);
        assert_eq!(cut(&long), format!("{}…", "ä".repeat(512)));
    }
}
