//! Connections that never were: one after the other, each with ports and cookies of its own.

use std::{collections::VecDeque, io};

use anyhow::{Result, bail};
use tcptrace::{
    event::address_bytes,
    kernel::clock,
    select::{Knowledge, Selection},
};
use tcptrace_ebpf::{Config, Flags, Header, Kind, State};

use crate::connection::{self, Ends, Record};

/// Cookies begin here: far from those that the kernel gives.
const COOKIES: u64 = 1 << 40;
/// Inodes of sockets begin here, and there are so many: far from those that the kernel gives.
const INODES: u32 = 3 << 30;
const SECOND: u64 = 1_000_000_000;
/// `TCP_TIMEWAIT_LEN`.
const TIME_WAIT_SECONDS: u64 = 60;
const AF_INET: u8 = 2;

/// Makes the records of connections.
pub(crate) struct Traffic {
    netns: u32,
    close: Close,
    config: Config,
    has_accept: bool,
    has_time_wait: bool,
    /// How many transitions the kernel makes for a connection, whether they are recorded or not.
    pub(crate) transitions: u64,
    /// Who connects.
    pid: u32,
    started: u64,
    /// One jiffy, nanoseconds.
    tick: u64,
    index: u64,
    /// Connections in TIME_WAIT, and when that ends, in jiffies; the oldest first.
    live: VecDeque<(u64, u64)>,
    most: usize,
}

/// How connections end.
#[derive(Clone, Copy)]
enum Close {
    Rst,
    Fin,
}

impl Traffic {
    /// Traffic in this namespace, with the records that tcptrace takes. `most` timewait sockets exist at a time.
    ///
    /// # Errors
    /// When a word is not known.
    pub(crate) fn new(netns: u32, close: &str, knowledge: &str, most: usize) -> Result<Self> {
        let (close, transitions) = match close {
            "rst" => (Close::Rst, 6),
            "fin" => (Close::Fin, 10),
            _ => bail!("close={close}: rst or fin"),
        };
        // As the commands of tcptrace ask for.
        let selection = match knowledge {
            "owners" => Selection::default(),
            "dwell" => Selection {
                states: vec![State::CloseWait],
                finished: true,
                knowledge: Knowledge::Dwell,
                ..Selection::default()
            },
            _ => bail!("knowledge={knowledge}: owners or dwell"),
        };
        Ok(Self {
            netns,
            close,
            config: selection.to_config(),
            has_accept: selection.needs_accept(),
            has_time_wait: selection.needs_time_wait(),
            transitions,
            pid: std::process::id(),
            started: clock::boot_ns(),
            tick: SECOND / u64::from(clock::hz()),
            index: 0,
            live: VecDeque::new(),
            most,
        })
    }

    /// Emits the records of the next connection, which opens and closes at `now`.
    ///
    /// # Errors
    /// The first error of `sink`.
    pub(crate) fn connection(
        &mut self,
        now: u64,
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let index = self.index;
        self.index += 1;
        let client = self.client(index);
        let ends = Ends {
            client,
            server: server(&client),
        };
        let mut time = now;
        let clock = || {
            time += 1;
            time
        };
        let (config, has_accept, has_time_wait) =
            (&self.config, self.has_accept, self.has_time_wait);
        let mut result = Ok(());
        let emit = |record: &Record| {
            let is_wanted = match record {
                Record::Transition(record) => {
                    config.wanted[usize::from(record.old)] & (1 << record.new) != 0
                }
                Record::Accept(_) => has_accept,
                Record::TimeWait(_) => has_time_wait,
            };
            if is_wanted && result.is_ok() {
                result = sink(record.as_bytes());
            }
        };
        match self.close {
            Close::Rst => connection::rst(ends, clock, emit),
            Close::Fin => {
                let due = now / self.tick + TIME_WAIT_SECONDS * SECOND / self.tick;
                connection::fin(ends, due, self.tick, clock, emit);
                self.live.push_back((index, due));
            }
        }
        result?;
        if self.live.len() > self.most
            && let Some((index, due)) = self.live.pop_front()
            && self.has_time_wait
        {
            let header = Header {
                time: now,
                flags: 0,
                ..self.client(index)
            };
            sink(connection::time_wait(Kind::TimeWaitDone, header, due, self.tick).as_bytes())?;
        }
        Ok(())
    }

    fn client(&self, index: u64) -> Header {
        let address = |last: u64| {
            let [.., a, b] = (last as u16).to_be_bytes();
            address_bytes([10, 0, a, b].into())
        };
        Header {
            time: 0,
            cookie: COOKIES + 2 * index,
            cgroup: 0,
            start: self.started,
            local_addr: address(7),
            remote_addr: address(256 + index % 1000),
            comm: *b"feeder\0\0\0\0\0\0\0\0\0\0",
            netns: self.netns,
            inode: INODES + (index % u64::from(u32::MAX - INODES)) as u32,
            pid: self.pid,
            uid: 0,
            local_port: 32_768 + (index / 1000 % 28_000) as u16,
            remote_port: 8080,
            kind: 0,
            family: AF_INET,
            flags: Flags::OWNED | Flags::HAS_SOCKET,
        }
    }
}

const fn server(client: &Header) -> Header {
    Header {
        cookie: client.cookie + 1,
        local_addr: client.remote_addr,
        remote_addr: client.local_addr,
        inode: 0,
        local_port: client.remote_port,
        remote_port: client.local_port,
        flags: 0,
        ..*client
    }
}
