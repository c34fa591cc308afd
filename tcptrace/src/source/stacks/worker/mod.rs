//! The process without privileges that reads other users' files, from tcptrace's side.

pub(super) mod channel;
pub mod protocol;
mod sandbox;
mod zygote;

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use self::{
    channel::Channel,
    protocol::{
        Answer, Confined, Frame, MOST_BYTES, Outcome, Reply, Request, Subject, Want, decode, encode,
    },
    zygote::Zygote,
};
pub(super) use sandbox::renew_cpu;
pub(super) use zygote::Ended;
pub use zygote::run_if_asked;

use crate::event::StackEnd;

/// How often the reader may want something for one request. The largest process has files for eight times.
const MOST_WANTS: usize = 64;
/// How long a new reader takes to say that it is there.
const START_WAIT: Duration = Duration::from_secs(5);

/// What starts readers.
pub(super) enum Starter {
    /// A process of its own.
    #[cfg_attr(test, expect(dead_code, reason = "a test cannot be run as it"))]
    Process(ZygoteProcess),
    /// A thread, where this executable is a test: it cannot be run as anything else, and nothing confines it.
    #[cfg(test)]
    Thread,
}

/// See [`zygote`].
pub(super) struct ZygoteProcess(Zygote);

impl Starter {
    pub(super) fn new() -> io::Result<Self> {
        #[cfg(test)]
        return Ok(Self::Thread);
        #[cfg(not(test))]
        Ok(Self::Process(ZygoteProcess(Zygote::start()?)))
    }

    fn reader(&self) -> io::Result<Channel> {
        match self {
            Self::Process(ZygoteProcess(zygote)) => zygote.reader(),
            #[cfg(test)]
            Self::Thread => {
                let (channel, other) = Channel::pair()?;
                std::thread::spawn(move || {
                    let usage = super::reader::Usage::new();
                    super::reader::serve(Channel::new(other), Confined::default(), usage);
                });
                Ok(channel)
            }
        }
    }

    /// Ends the reader, if it has not ended.
    fn end(&self) -> Ended {
        match self {
            Self::Process(ZygoteProcess(zygote)) => zygote.end().unwrap_or(Ended::Not),
            #[cfg(test)]
            Self::Thread => Ended::Not,
        }
    }
}

/// A reader.
pub(super) struct Worker {
    channel: Channel,
    buffer: Box<[u8; MOST_BYTES]>,
    pub(super) confined: Confined,
    reading: Subject,
}

/// What became of a request.
pub(super) struct Done {
    pub(super) cpu: Duration,
    pub(super) end: Option<StackEnd>,
    pub(super) outcomes: Vec<Outcome>,
}

/// The reader is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// What it was reading.
    pub(super) subject: Subject,
    /// It took too long.
    pub(super) slow: bool,
}

/// Who answers what a reader wants, and takes what it finds out.
pub(super) trait Patron {
    /// The answer, and its files.
    fn answer(&mut self, want: Want) -> (Answer, Vec<File>);
    /// A part of a stack.
    fn frames(&mut self, stack: u32, frames: Vec<Frame>, more: bool);
}

impl Worker {
    pub(super) fn start(starter: &Starter) -> io::Result<Self> {
        let channel = starter.reader()?;
        let mut buffer = Box::new([0; MOST_BYTES]);
        let deadline = Some(Instant::now() + START_WAIT);
        let hello = channel.receive(&mut buffer, deadline)?;
        let hello = hello.and_then(|packet| decode(packet.bytes).ok());
        let Some(Reply::Hello(confined)) = hello else {
            return Err(io::Error::other(match starter.end() {
                Ended::Signal(signal) => format!("signal {signal} ended it"),
                Ended::Code(code) => format!("it ended with status {code}"),
                Ended::Not => "it did not say that it is there".to_owned(),
            }));
        };
        Ok(Self {
            channel,
            buffer,
            confined,
            reading: Subject::Nothing,
        })
    }

    /// Has the reader do something.
    ///
    /// # Errors
    /// When it ended, took longer than it may, or did not keep to the protocol: it is ended then.
    pub(super) fn ask(
        &mut self,
        starter: &Starter,
        request: &Request,
        files: &[File],
        wait: Duration,
        patron: &mut impl Patron,
    ) -> Result<Done, Failed> {
        let deadline = Instant::now() + wait;
        self.reading = Subject::Nothing;
        match self.exchange(request, files, deadline, patron) {
            Ok(done) => Ok(done),
            Err(error) => {
                let ended = starter.end();
                // SIGXCPU is 24 wherever tcptrace runs: x86-64 and arm64.
                let by_clock = error.kind() == io::ErrorKind::TimedOut;
                log::debug!(
                    "the reader has failed: {error}, {ended:?}, {:?}",
                    self.reading
                );
                Err(Failed {
                    subject: self.reading,
                    slow: by_clock || ended == Ended::Signal(libc::SIGXCPU as u8),
                })
            }
        }
    }

    fn exchange(
        &mut self,
        request: &Request,
        files: &[File],
        deadline: Instant,
        patron: &mut impl Patron,
    ) -> io::Result<Done> {
        send(&self.channel, request, files)?;
        let mut wants = 0;
        loop {
            let packet = self.channel.receive(&mut self.buffer, Some(deadline))?;
            let packet = packet.ok_or(io::ErrorKind::BrokenPipe)?;
            let reply = decode(packet.bytes).map_err(io::Error::other)?;
            match reply {
                Reply::Reading(subject) => self.reading = subject,
                Reply::Want(want) if wants < MOST_WANTS + super::MOST_UNNAMED => {
                    wants += 1;
                    let (answer, files) = patron.answer(want);
                    send(&self.channel, &Request::Answer(answer), &files)?;
                }
                Reply::Frames {
                    stack,
                    frames,
                    more,
                } => patron.frames(stack, frames, more),
                Reply::Done {
                    cpu_us,
                    end,
                    outcomes,
                } => {
                    return Ok(Done {
                        cpu: Duration::from_micros(cpu_us),
                        end,
                        outcomes,
                    });
                }
                Reply::Hello(_) | Reply::Want(_) => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }
}

fn send(channel: &Channel, request: &Request, files: &[File]) -> io::Result<()> {
    let files: Vec<_> = files.iter().map(File::as_fd).collect();
    channel.send(&encode(request), &files)
}
