//! From the copy of a stack to the addresses of its frames.
//!
//! Frame pointers alone would not do. `connect()` of glibc makes no frame: its caller's address is on top
//! of the stack, and the first frame pointer found is that of the caller's own frame, which leads to the
//! caller's caller (measured with glibc 2.36: the function that calls `connect()` is missing). And most programs
//! that distributions ship have no frame pointers at all. All of them have unwind tables, because C++
//! exceptions need those (`.eh_frame`): they are what is walked by, and frame pointers where there is no table
//! (code made at run time, Go), or where the copy ends.

use framehop::{Error, FrameAddress, Unwinder as _, x86_64::UnwindRegsX86_64};
use tcptrace_ebpf::{CHAIN, COPY, Stack};

use super::process::Process;
use crate::event::StackEnd;

/// How many frames are followed, at most.
const MOST_FRAMES: usize = 256;

/// Frames of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Walked {
    /// Where the call was, then return addresses, outwards.
    pub(super) addresses: Vec<u64>,
    /// How many of them the kernel found, by frame pointers.
    chained: usize,
    /// Why there are no more.
    pub(super) end: StackEnd,
}

impl Walked {
    pub(super) const fn nowhere(end: StackEnd) -> Self {
        Self {
            addresses: Vec::new(),
            chained: 0,
            end,
        }
    }

    /// How many frames were found by frame pointers, because there was no table of the one before.
    pub(super) fn by_frame_pointer(&self, process: &Process) -> u32 {
        let walked = self.addresses.len() - self.chained;
        let callers = self.addresses.iter().take(walked.saturating_sub(1));
        let without = callers
            .enumerate()
            .filter(|(index, address)| !process.has_table(lookup(**address, index + 1)))
            .count();
        u32::try_from(without + self.chained).unwrap_or(u32::MAX)
    }
}

pub(super) fn walk(process: &mut Process, record: &Stack) -> Walked {
    if record.instruction == 0 {
        return Walked::nowhere(StackEnd::NoUser);
    }
    if process.is_32_bit(record.instruction) {
        return Walked::nowhere(StackEnd::Bits32);
    }
    let copy = &record.copy[..(record.copied as usize).min(COPY)];
    let mut read = |address: u64| {
        let at = usize::try_from(address.checked_sub(record.stack).ok_or(())?).map_err(|_| ())?;
        let bytes = copy.get(at..at.checked_add(8).ok_or(())?).ok_or(())?;
        Ok(u64::from_ne_bytes(bytes.try_into().map_err(|_| ())?))
    };
    let mut addresses = Vec::new();
    let mut cache = std::mem::take(&mut process.cache);
    let registers = UnwindRegsX86_64::new(record.instruction, record.stack, record.frame);
    let mut frames =
        process
            .unwinder
            .iter_frames(record.instruction, registers, &mut *cache, &mut read);
    let mut beyond = false;
    let end = loop {
        match frames.next() {
            Ok(Some(frame)) if !process.has_code(frame.address_for_lookup()) => {
                break StackEnd::NoCode;
            }
            Ok(Some(_)) if addresses.len() == MOST_FRAMES => break StackEnd::TooDeep,
            Ok(Some(frame)) => addresses.push(frame.address()),
            // A zero in place of a frame pointer may be just that: a zero.
            Ok(None) => {
                break match addresses.last() {
                    Some(last) if process.has_table(lookup(*last, addresses.len())) => {
                        StackEnd::Outermost
                    }
                    _ => StackEnd::ZeroFramePointer,
                };
            }
            Err(Error::CouldNotReadStack(at)) if at >= record.stack + copy.len() as u64 => {
                beyond = true;
                // A table says where the frame is. A frame pointer may be any number, where there is none.
                break match addresses.last() {
                    _ if copy.is_empty() => StackEnd::Unreadable,
                    Some(last) if process.has_table(lookup(*last, addresses.len())) => {
                        StackEnd::BeyondCopy
                    }
                    _ => StackEnd::NoCode,
                };
            }
            Err(_) => break StackEnd::NoCode,
        }
    };
    process.cache = cache;
    let unread = addresses
        .last()
        .and_then(|last| process.unread(lookup(*last, addresses.len())));
    let mut walked = Walked {
        end: match (end, unread) {
            // Without its table it went on by frame pointers, and came to nothing.
            (StackEnd::NoCode | StackEnd::ZeroFramePointer, Some(_)) => StackEnd::Unread,
            (end, _) => end,
        },
        addresses,
        chained: 0,
    };
    if beyond {
        let chain = &record.chain[..(record.chained as usize).min(CHAIN)];
        extend(&mut walked, chain, process);
    }
    walked
}

/// What is looked up for the address of the last of so many frames.
fn lookup(address: u64, frames: usize) -> u64 {
    if frames == 1 {
        FrameAddress::from_instruction_pointer(address).address_for_lookup()
    } else {
        address.wrapping_sub(1)
    }
}

/// Goes on with what the kernel found by frame pointers: where that meets what was walked, the longer
/// the better, because a function that calls itself is there more than once.
fn extend(walked: &mut Walked, chain: &[u64], process: &Process) {
    let Some(at) = join(&walked.addresses, chain) else {
        return;
    };
    let more = &chain[at + 1..];
    let code = more
        .iter()
        .take_while(|address| process.has_code(address.wrapping_sub(1)));
    let before = walked.addresses.len();
    walked.addresses.extend(code);
    let added = walked.addresses.len() - before;
    if added > 0 {
        walked.chained = added;
        walked.end = if added < more.len() {
            StackEnd::NoCode
        } else {
            StackEnd::ChainEnd
        };
    }
}

/// Where in `chain` the last of `addresses` is, if anywhere.
fn join(addresses: &[u64], chain: &[u64]) -> Option<usize> {
    let last = addresses.last()?;
    let alike = |at: usize| {
        let back = chain[..=at].iter().rev();
        back.zip(addresses.iter().rev())
            .take_while(|(a, b)| a == b)
            .count()
    };
    let places = (0..chain.len()).filter(|at| chain[*at] == *last && *last != 0);
    places.max_by_key(|at| (alike(*at), std::cmp::Reverse(*at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_joined_where_most_of_it_is_the_same() {
        assert_eq!(join(&[1, 2, 3], &[1, 3, 4, 5]), Some(1));
        assert_eq!(join(&[1, 2, 3], &[1, 4, 5]), None);
        assert_eq!(join(&[], &[1]), None);
        // Recursion: as many as were walked, and no more.
        assert_eq!(join(&[1, 9, 7, 7], &[1, 7, 7, 7, 4]), Some(2));
        assert_eq!(join(&[1, 7, 7], &[1, 7, 7, 7, 4]), Some(2));
    }
}
