//! From where in their programs leaked sockets were opened.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
};

use super::{Cause, report::Leaked};
use crate::{
    event::{Frame, Stack, StackEnd, Unread, Via},
    tracker::Site,
};

/// Stacks that have been told of, by number.
#[derive(Debug, Default)]
pub(super) struct Known {
    stacks: HashMap<u32, Rc<Stack>>,
    /// Each kept once: processes that run the same program for a short time have the same ones, by other
    /// numbers.
    different: HashSet<Rc<Stack>>,
}

/// The stacks of a leak's sockets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stacks {
    /// How many sockets were opened there, the most common first.
    pub found: Vec<(usize, Rc<Stack>)>,
    /// How many have none, and why, the most common first.
    pub without: Vec<(Without, usize)>,
}

/// Why it is not known from where a socket was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Without {
    /// That was before tcptrace began, or was not seen.
    Before,
    /// Nobody has accepted it.
    NotAccepted,
    /// The record was lost, or the call is not followed on this kernel.
    Untold,
    /// The names are still being looked up.
    Pending,
}

impl Without {
    /// As it is written in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::NotAccepted => "not_accepted",
            Self::Untold => "untold",
            Self::Pending => "pending",
        }
    }
}

impl Known {
    pub(super) fn add(&mut self, stack: &Stack) {
        let id = stack.id;
        let stack = Rc::new(Stack {
            id: 0,
            pid: 0,
            ..stack.clone()
        });
        let stack = match self.different.get(&stack) {
            Some(same) => Rc::clone(same),
            None => {
                self.different.insert(Rc::clone(&stack));
                stack
            }
        };
        self.stacks.insert(id, stack);
    }

    /// Of these sockets.
    pub(super) fn of(&self, sockets: &[Leaked]) -> Stacks {
        let mut ids = BTreeMap::new();
        let mut without = HashMap::new();
        for socket in sockets {
            let why = match socket.site.id() {
                Some(id) if self.stacks.contains_key(&id) => {
                    *ids.entry(id).or_insert(0) += 1;
                    continue;
                }
                Some(_) => Without::Pending,
                None if socket.cause == Cause::NotAccepted => Without::NotAccepted,
                None if socket.site == Site::BEFORE => Without::Before,
                None => Without::Untold,
            };
            *without.entry(why).or_insert(0) += 1;
        }
        // Two processes can have been at the same place, and a compiler can have written a line out twice.
        let mut found: HashMap<_, (usize, u32, &Rc<Stack>)> = HashMap::new();
        for (id, sockets) in ids {
            let stack = &self.stacks[&id];
            let places: Vec<_> = stack.frames.iter().map(place).collect();
            let at = (stack.via, places, stack.end);
            found.entry(at).or_insert((0, id, stack)).0 += sockets;
        }
        let mut found: Vec<_> = found.into_values().collect();
        found.sort_by_key(|(sockets, first, _)| (std::cmp::Reverse(*sockets), *first));
        let found = found
            .into_iter()
            .map(|(sockets, _, stack)| (sockets, Rc::clone(stack)))
            .collect();
        let mut without: Vec<_> = without.into_iter().collect();
        without.sort_by_key(|(why, sockets)| (std::cmp::Reverse(*sockets), *why));
        Stacks { found, without }
    }
}

impl Stacks {
    /// How many sockets were opened at other places than the first ones, as many as `shown`.
    pub(super) fn others(&self, shown: usize) -> usize {
        self.found
            .iter()
            .skip(shown)
            .map(|(sockets, _)| sockets)
            .sum()
    }
}

/// What tells a frame from another, for a person: if the line is known, the address is of no interest.
type Place<'a> = (
    Option<&'a str>,
    Option<&'a str>,
    Option<&'a str>,
    Result<u32, u64>,
);

fn place(frame: &Frame) -> Place<'_> {
    (
        frame.function.as_deref(),
        frame.file.as_deref(),
        frame.module.as_deref(),
        frame.line.ok_or(frame.address),
    )
}

/// The frame that says most: the innermost of the program's own code, not of a library's. Code made at run
/// time is made from the program's.
#[must_use]
pub fn own(stack: &Stack) -> Option<&Frame> {
    let made = stack.frames.iter().find(|frame| frame.made);
    made.or_else(|| stack.frames.iter().find(|frame| frame.main))
}

/// The call, as a person knows it.
pub(super) const fn call(via: Via) -> &'static str {
    match via {
        Via::Connect => "connect()",
        Via::Accept => "accept()",
    }
}

/// Why there are no more frames, for a person; `None` if there are none.
pub(super) const fn why_no_more(end: StackEnd) -> Option<&'static str> {
    Some(match end {
        StackEnd::Outermost => return None,
        StackEnd::ZeroFramePointer => {
            "the frame pointer is 0 there: the outermost frame, or code built without frame pointers and \
             unwind tables"
        }
        StackEnd::ChainEnd => {
            "the chain of frame pointers ends there: the outermost frame, or code built without them"
        }
        StackEnd::NoCode => {
            "there is no return address where one should be: code built without frame pointers and unwind \
             tables"
        }
        StackEnd::BeyondCopy => {
            "deeper than what is copied of a stack (up to 8 KiB), in code built without frame pointers"
        }
        StackEnd::Unreadable => "the stack could not be read",
        StackEnd::TooDeep => "deeper than is followed",
        StackEnd::NoUser => "no code of a program called (a worker of io_uring, for example)",
        StackEnd::Bits32 => "a 32-bit program, which is not supported",
        StackEnd::Gone => {
            "the process had ended, or run another program, before its files could be opened"
        }
        StackEnd::NotPermitted => "the process may not be looked at: CAP_SYS_PTRACE is needed",
        StackEnd::PrivatePids => {
            "tcptrace is in a pid namespace of its own and cannot tell which process it is"
        }
        StackEnd::TooMany => "there were too many different stacks",
        StackEnd::NoNames => "the process that reads files of programs has failed",
        StackEnd::Overload => {
            "more stacks than tcptrace could walk, or more of this process than is its share"
        }
        StackEnd::Unread => "the unwind table of the file was not read",
    })
}

/// Why a frame may lack its function or line, for a person.
pub(super) const fn why_unread(unread: Unread) -> &'static str {
    match unread {
        Unread::Crashed => "names not read: the file ended the process that reads files",
        Unread::TooSlow => "names not read: reading the file took too long",
        Unread::TooLarge => "not all names read: the file takes more memory than there is for it",
        Unread::Distrusted => {
            "names not read: other files of this user ended the process that reads files"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Socket, Tuple};

    fn stack(id: u32, line: Option<u32>, address: u64) -> Stack {
        Stack {
            id,
            via: Via::Connect,
            pid: 7,
            frames: vec![
                Frame {
                    function: Some("connect".into()),
                    module: Some("/lib/libc.so".into()),
                    address: 9,
                    ..Frame::default()
                },
                Frame {
                    function: Some("open".into()),
                    line,
                    address,
                    main: true,
                    ..Frame::default()
                },
            ],
            by_frame_pointer: 0,
            end: StackEnd::Outermost,
        }
    }

    fn leaked(site: Site, cause: Cause) -> Leaked {
        Leaked {
            socket: Socket {
                cookie: 1,
                netns: 1,
                tuple: Tuple {
                    local_addr: [0; 16],
                    remote_addr: [0; 16],
                    local_port: 1,
                    remote_port: 1,
                },
            },
            age: None,
            idle: None,
            site,
            cause,
            recv_queue: 0,
            send_queue: 0,
            orderly: None,
            fds: Vec::new(),
            at_exit: false,
        }
    }

    #[test]
    fn places_are_one_if_a_person_cannot_tell_them_apart() {
        let mut known = Known::default();
        // The same line twice; the same function without a line, from two places.
        for stack in [
            stack(1, Some(5), 100),
            stack(2, Some(5), 200),
            stack(3, None, 100),
            stack(4, None, 200),
            stack(5, Some(6), 300),
        ] {
            known.add(&stack);
        }
        let sockets: Vec<_> = [1, 2, 3, 4, 5, 5, 5]
            .map(|id| leaked(Site::stack(id), Cause::Drained))
            .into();
        let found = known.of(&sockets);
        let counts: Vec<_> = found.found.iter().map(|(sockets, _)| *sockets).collect();
        assert_eq!(counts, [3, 2, 1, 1]);
        assert_eq!([0, 1, 3, 9].map(|shown| found.others(shown)), [7, 4, 1, 0]);
        assert!(found.without.is_empty());
    }

    #[test]
    fn the_same_stack_is_kept_once() {
        let mut known = Known::default();
        for id in 1..=1000 {
            known.add(&Stack {
                pid: id,
                ..stack(id, Some(5), 100)
            });
        }
        assert_eq!((known.stacks.len(), known.different.len()), (1000, 1));
    }

    #[test]
    fn why_there_is_no_stack() {
        let known = Known::default();
        let sockets = [
            leaked(Site::BEFORE, Cause::Drained),
            leaked(Site::UNTOLD, Cause::Drained),
            leaked(Site::UNTOLD, Cause::NotAccepted),
            leaked(Site::BEFORE, Cause::NotAccepted),
            leaked(Site::stack(8), Cause::Drained),
        ];
        assert_eq!(
            known.of(&sockets).without,
            [
                (Without::NotAccepted, 2),
                (Without::Before, 1),
                (Without::Untold, 1),
                (Without::Pending, 1)
            ]
        );
    }

    #[test]
    fn the_own_frame_is_that_of_the_program() {
        let mut stack = stack(1, Some(5), 100);
        let function = |stack: &Stack| own(stack).and_then(|own| own.function.clone());
        assert_eq!(function(&stack).as_deref(), Some("open"));
        stack.frames.push(Frame {
            function: Some("made".into()),
            made: true,
            ..Frame::default()
        });
        assert_eq!(function(&stack).as_deref(), Some("made"));
        stack.frames.truncate(1);
        assert_eq!(function(&stack), None);
    }
}
