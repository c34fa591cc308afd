//! Packets and descriptors between two processes.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
        sendmsg, socketpair, sockopt,
    },
};

use super::protocol::{MOST_BYTES, MOST_FILES};

/// How long a send waits for room. There always is some, unless the other side does not read at all.
const SEND_WAIT: Duration = Duration::from_secs(5);

/// One end.
pub(in super::super) struct Channel(OwnedFd);

/// A packet.
pub(in super::super) struct Packet<'a> {
    pub(in super::super) bytes: &'a [u8],
    pub(in super::super) files: Vec<OwnedFd>,
}

impl Channel {
    /// Two ends that keep packets apart.
    pub(in super::super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (own, other) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
        sockopt::set_socket_timeout(&own, sockopt::Timeout::Send, Some(SEND_WAIT))?;
        Ok((Self(own), other))
    }

    pub(in super::super) const fn new(end: OwnedFd) -> Self {
        Self(end)
    }

    /// # Errors
    /// When the other side is gone, or does not read.
    pub(in super::super) fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        let parts = [IoSlice::new(bytes)];
        retry_on_intr(|| sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// The next packet; `None` when the other side is gone.
    ///
    /// # Errors
    /// [`TimedOut`](io::ErrorKind::TimedOut) when there is none by then; and when it is larger than a packet may be.
    pub(in super::super) fn receive<'a>(
        &self,
        buffer: &'a mut [u8; MOST_BYTES],
        deadline: Option<Instant>,
    ) -> io::Result<Option<Packet<'a>>> {
        if let Some(deadline) = deadline {
            self.wait(deadline)?;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(&mut buffer[..])];
            recvmsg(&self.0, &mut parts, &mut control, flags)
        });
        let received = match received {
            Ok(received) => received,
            Err(Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                files.extend(passed);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // A packet of ours is never empty.
        Ok((received.bytes > 0).then(|| Packet {
            bytes: &buffer[..received.bytes],
            files,
        }))
    }

    fn wait(&self, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _};

    use super::*;

    #[test]
    fn a_descriptor_goes_with_its_packet() {
        let (one, other) = Channel::pair().unwrap();
        let other = Channel::new(other);
        let file = File::open("/proc/self/stat").unwrap();
        one.send(b"file", &[file.as_fd()]).unwrap();
        one.send(b"none", &[]).unwrap();
        let mut buffer = [0; MOST_BYTES];
        let packet = other.receive(&mut buffer, None).unwrap().unwrap();
        assert_eq!((packet.bytes, packet.files.len()), (&b"file"[..], 1));
        let mut text = String::new();
        let mut passed = File::from(packet.files.into_iter().next().unwrap());
        passed.read_to_string(&mut text).unwrap();
        assert!(text.starts_with(&std::process::id().to_string()));
        let packet = other.receive(&mut buffer, None).unwrap().unwrap();
        assert_eq!((packet.bytes, packet.files.len()), (&b"none"[..], 0));
    }

    #[test]
    fn an_end_is_told_from_a_delay() {
        let (one, other) = Channel::pair().unwrap();
        let mut buffer = [0; MOST_BYTES];
        let late = one.receive(&mut buffer, Some(Instant::now()));
        assert_eq!(late.err().unwrap().kind(), io::ErrorKind::TimedOut);
        drop(other);
        assert!(one.receive(&mut buffer, None).unwrap().is_none());
    }
}
