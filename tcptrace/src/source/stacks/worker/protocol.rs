//! Messages between tcptrace and the process that reads other users' files.
//!
//! A message is one packet of at most [`MOST_BYTES`]. Decoding is a function over bytes, without I/O: what comes
//! from the other side is not trusted, and takes no more memory than a small multiple of the packet.
//!
//! The opener asks one thing at a time ([`Request`]) and answers what the reader wants for it ([`Want`]) until the
//! reader is [done](Reply::Done). So neither side ever waits for a packet that cannot come.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::event::{StackEnd, Unread};

/// The largest message. A record of a stack has a little over 9 KiB.
pub const MOST_BYTES: usize = 64 << 10;
/// The most descriptors in one message; Linux takes 253 (`SCM_MAX_FD`).
pub const MOST_FILES: usize = 64;

/// A file, as long as nobody writes to it: what is remembered of one that ended the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// Device of the file system.
    pub device: u64,
    /// Inode on it.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When its contents were last changed, nanoseconds.
    pub modified: i128,
}

/// From tcptrace: what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Read what a process has mapped. Descriptors: its `maps`, and its perf map if that is opened.
    Process {
        /// A number for it, never used again.
        process: u32,
        /// Device and inode of its program.
        exe: Option<(u64, u64)>,
        /// Its perf map, if there is one already.
        map: Opened,
    },
    /// Walk these stacks.
    Walk(Vec<Record>),
    /// Find out the names of a stack.
    Name {
        /// [`Outcome::Stack`]'s number.
        stack: u32,
    },
    /// See what runtimes have written meanwhile, and forget what was not needed lately.
    Again,
    /// Forget a process.
    Forget {
        /// Which.
        process: u32,
    },
    /// What was wanted.
    Answer(Answer),
}

/// A record of a stack, as the probes wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whose.
    pub process: u32,
    /// A `tcptrace_ebpf::Stack`, cut off behind what was copied.
    pub bytes: Vec<u8>,
}

/// What became of one file of those wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opened {
    /// The next of the descriptors.
    File,
    /// There is none, or it could not be opened.
    No,
    /// It is not to be read, for this reason.
    Refused(Unread),
}

/// The answer to a [`Want`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Want::Files`] and [`Want::DebugFiles`]: one for each.
    Files(Vec<Opened>),
    /// To [`Want::Maps`].
    Maps(MapsAnswer),
    /// To [`Want::Check`]: why not, if it does not.
    Check(Option<StackEnd>),
    /// To [`Want::PerfMap`].
    PerfMap {
        /// Whether more may be written to it.
        lives: bool,
        /// The map, if it was asked for.
        opened: Opened,
    },
}

/// Whether a process's mappings can be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MapsAnswer {
    /// The descriptor.
    File,
    /// They were read a moment ago.
    TooSoon,
    /// The process has used up its share of CPU time.
    Spent,
    /// The process is no more, or must not be looked into.
    End(StackEnd),
}

/// From the reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The first: how it is confined.
    Hello(Confined),
    /// If it ends now, this is why.
    Reading(Subject),
    /// Something is missing.
    Want(Want),
    /// What a stack is; in parts, if it is large.
    Frames {
        /// Which.
        stack: u32,
        /// The next of its frames.
        frames: Vec<Frame>,
        /// More follow.
        more: bool,
    },
    /// The request is done.
    Done {
        /// CPU time that it took, microseconds.
        cpu_us: u64,
        /// For [`Request::Process`]: why its mappings are not known, if they are not.
        end: Option<StackEnd>,
        /// For [`Request::Walk`], one for each record.
        outcomes: Vec<Outcome>,
    },
}

/// How the reader is confined, as far as this can be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confined {
    /// It has a user of its own.
    pub own_user: bool,
    /// It has no capabilities.
    pub no_capabilities: bool,
    /// It can gain none.
    pub no_new_privs: bool,
    /// Its memory, CPU time and descriptors have limits.
    pub limits: bool,
    /// It can make few system calls only.
    pub seccomp: bool,
}

/// What is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Subject {
    /// Nothing that others wrote.
    Nothing,
    /// A file.
    File(FileId),
    /// A process's mappings, or its stack.
    Process(u32),
}

/// What the reader cannot open itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Want {
    /// What the process has mapped from and to these addresses.
    Files {
        /// Whose.
        process: u32,
        /// Start and end of mappings.
        ranges: Vec<(u64, u64)>,
    },
    /// Separate debug files.
    DebugFiles {
        /// Where to look first: as this process sees files.
        process: u32,
        /// Their build ids.
        build_ids: Vec<Vec<u8>>,
    },
    /// The mappings as they are now.
    Maps {
        /// Whose.
        process: u32,
        /// Even if they were read a moment ago.
        now: bool,
    },
    /// Whether the process still runs the same program.
    Check {
        /// Which.
        process: u32,
    },
    /// Whether more may be written to the process's perf map; and the map, if `open`.
    PerfMap {
        /// Whose.
        process: u32,
        /// Open it.
        open: bool,
    },
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It has no frames, for this reason.
    End(StackEnd),
    /// It is a stack known by this number, from 1.
    Stack {
        /// One more than the last if it is new.
        stack: u32,
        /// It has not been told before, and can be named.
        new: bool,
        /// How many frames were found by frame pointers.
        by_frame_pointer: u32,
        /// Why there are no more.
        end: StackEnd,
    },
    /// The process is not known here.
    Unknown,
}

/// See [`event::Frame`](crate::event::Frame).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields of the event")]
pub struct Frame {
    pub function: Option<String>,
    pub file: Option<String>,
    pub line: Option<u32>,
    pub module: Option<String>,
    pub address: u64,
    pub inlined: bool,
    pub main: bool,
    pub made: bool,
    pub unread: Option<Unread>,
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes that cannot be decoded")]
pub struct Malformed(usize);

/// The message in a packet.
///
/// # Errors
/// When it is none, or is followed by something.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) if bytes.len() <= MOST_BYTES => Ok(message),
        _ => Err(Malformed(bytes.len())),
    }
}

/// The packet of a message, of as many bytes as it takes.
///
/// # Panics
/// Never: memory is all it takes.
#[must_use]
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(message).expect("these types can be encoded")
}

/// See [`crate::fuzz`]: a message in either direction. What can be decoded is the same after it was encoded again.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(request) = decode::<Request>(bytes) {
        assert_eq!(decode(&encode(&request)), Ok(request));
    }
    if let Ok(reply) = decode::<Reply>(bytes) {
        assert_eq!(decode(&encode(&reply)), Ok(reply));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let reply = Reply::Frames {
            stack: 7,
            frames: vec![Frame {
                function: Some("f".to_owned()),
                unread: Some(Unread::TooLarge),
                address: u64::MAX,
                ..Frame::default()
            }],
            more: true,
        };
        assert_eq!(decode(&encode(&reply)), Ok(reply));
    }

    #[test]
    fn what_is_cut_off_or_too_long_is_no_message() {
        let want = Reply::Want(Want::Files {
            process: 1,
            ranges: vec![(1, 2); 20],
        });
        let bytes = encode(&want);
        for len in 0..bytes.len() {
            assert_eq!(decode::<Reply>(&bytes[..len]), Err(Malformed(len)));
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(decode::<Reply>(&longer).is_err());
    }

    #[test]
    fn a_message_that_claims_many_elements_takes_no_memory_for_them() {
        // Want::Files of process 0 with 2^60 ranges.
        let bytes = [
            2, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f,
        ];
        assert!(decode::<Reply>(&bytes).is_err());
    }
}
