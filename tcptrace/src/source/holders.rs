//! Who holds the sockets that a look showed, and which sockets are held though no look shows them.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use tcptrace_ebpf::State;

use crate::{
    event::{self, Detail, Event, Holder, Row, Socket, States, Tuple, address_bytes},
    kernel::{
        clock,
        procfs::{self, Descriptor, Handle},
        system::System,
        unlisted::{self, Finished, Unlisted, unlisted as ask},
    },
    reason::Reason,
};

/// What a look at the tables showed.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// Inodes of all that have a file.
    listed: HashSet<u32>,
    /// Inodes of those whose holders are wanted.
    wanted: HashSet<u32>,
    /// Inodes of those of whose holders everything is wanted.
    piled: HashSet<u32>,
    /// Namespaces and ports at which connections wait that nobody has accepted.
    waiting: HashSet<(u32, u16)>,
    /// Listeners: inode, namespace and port.
    listeners: Vec<(u32, u32, u16)>,
}

impl Sockets {
    /// `piles`: states in which sockets pile up. `all`: holders are wanted of every socket.
    pub(super) fn add(&mut self, row: &Row, piles: States, all: bool) {
        let at = (row.socket.netns, row.socket.tuple.local_port);
        if row.state == State::Listen {
            self.listeners.push((row.inode, at.0, at.1));
        }
        let piled = piles.contains(row.state);
        self.list(row.inode);
        if row.inode != 0 {
            if all || piled {
                self.wanted.insert(row.inode);
            }
            if piled {
                self.piled.insert(row.inode);
            }
        } else if piled {
            self.waiting.insert(at);
        }
    }

    /// A socket with this inode is in a table.
    pub(super) fn list(&mut self, inode: u32) {
        if inode != 0 {
            self.listed.insert(inode);
        }
    }

    /// Of these listeners everything is wanted.
    fn waited_for(&self) -> HashSet<u32> {
        let listeners = self.listeners.iter();
        listeners
            .filter(|(_, netns, port)| self.waiting.contains(&(*netns, *port)))
            .map(|(inode, _, _)| *inode)
            .collect()
    }
}

/// What earlier looks found.
#[derive(Debug, Default)]
pub(super) struct Holders {
    /// Inodes that were held, and in no table.
    unlisted: HashSet<u32>,
    /// Those of them that are of no connection that is over.
    dismissed: HashSet<u32>,
    /// How many connections were over; `None` before it was asked.
    finished: Option<usize>,
    /// A look has asked for them.
    looked: bool,
    /// Whether holders are told apart by whether they descend from this process.
    tree: bool,
}

impl Holders {
    pub(super) fn new(tree: bool) -> Self {
        Self {
            tree,
            ..Self::default()
        }
    }

    /// Whether there are sockets held whose connection is over, or it takes another look to know.
    pub(super) fn may_have_finished(&self) -> bool {
        self.finished != Some(0)
    }

    /// Hands on who holds what is wanted of `sockets`. With `unlisted`, also sockets of connections that are
    /// over, which are in no table: what was not in two looks in a row. Returns whether somebody is known
    /// for each.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        sockets: &Sockets,
        unlisted: bool,
        unseen: &mut Vec<Reason>,
        each: &mut impl FnMut(&Event),
    ) -> io::Result<bool> {
        let waited_for = sockets.waited_for();
        let wanted = |inode| sockets.wanted.contains(&inode) || waited_for.contains(&inode);
        if sockets.wanted.is_empty() && waited_for.is_empty() && !unlisted {
            return Ok(true);
        }
        let mut held = HashSet::new();
        let mut teller = Teller {
            tree: if self.tree {
                procfs::descendants(procfs::own_pid()?)?
            } else {
                HashSet::new()
            },
            ..Teller::default()
        };
        let mut found = HashSet::new();
        // By inode, whether its connection is over.
        let mut asked: HashMap<u32, bool> = HashMap::new();
        let mut refused = 0;
        procfs::sockets(|process, descriptor| {
            let inode = descriptor.inode;
            if wanted(inode) {
                let detailed = sockets.piled.contains(&inode) || waited_for.contains(&inode);
                if teller.holder(process, descriptor, detailed, each) {
                    held.insert(inode);
                }
                return;
            }
            if !unlisted || sockets.listed.contains(&inode) {
                return;
            }
            found.insert(inode);
            if !self.unlisted.contains(&inode) || self.dismissed.contains(&inode) {
                return;
            }
            let over = match asked.get(&inode) {
                Some(over) => *over,
                None => match ask(process, descriptor) {
                    Ok(Unlisted::Finished(finished)) => {
                        each(&Event::Socket(row(&finished, inode)));
                        true
                    }
                    Ok(Unlisted::NotTcp) => {
                        self.dismissed.insert(inode);
                        false
                    }
                    Ok(Unlisted::Refused(_)) => {
                        refused += 1;
                        false
                    }
                    // Closed meanwhile, or it can still come to something.
                    Ok(Unlisted::Fresh | Unlisted::Open | Unlisted::Closed) | Err(_) => false,
                },
            };
            asked.insert(inode, over);
            // Another tcptrace that asks has a duplicate for that moment, and is no holder.
            if over && !process.runs_this_program() {
                teller.holder(process, descriptor, true, each);
            }
        })?;
        if unlisted {
            self.dismissed.retain(|inode| found.contains(inode));
            let over = asked.values().filter(|over| **over).count();
            // The first look only finds what to ask the second time.
            self.finished = (over > 0 || self.looked).then_some(over);
            self.unlisted = found;
            self.looked = true;
        }
        if refused > 0 {
            let system = System::read();
            unseen.push(unlisted::refusal(
                format_args!(
                    "TCP sockets in no table of the kernel that could not be asked whether their connection is \
                     over: {refused}"
                ),
                &system,
            ));
        }
        Ok(held.len() == sockets.wanted.union(&waited_for).count())
    }
}

/// Tells who holds what; who a process is, once.
#[derive(Default)]
struct Teller {
    /// The process that was told of last.
    last: Option<procfs::Process>,
    /// Everything was told of it.
    detailed: bool,
    /// Processes of the tree that is watched.
    tree: HashSet<u32>,
}

impl Teller {
    /// Returns false if the process is no more.
    fn holder(
        &mut self,
        process: &Handle,
        descriptor: Descriptor,
        detailed: bool,
        each: &mut impl FnMut(&Event),
    ) -> bool {
        if self
            .last
            .as_ref()
            .is_none_or(|last| last.pid != process.pid())
        {
            self.last = process.identity();
            self.detailed = false;
        }
        let Some(known) = &self.last else {
            return false;
        };
        if detailed && !self.detailed {
            self.detailed = true;
            let details = process.details().unwrap_or_default();
            each(&Event::Process(Box::new(event::Process {
                pid: known.pid,
                start: known.start,
                exe: details.exe.map(Into::into),
                cmdline: details.cmdline.map(Into::into),
                uid: details.uid,
                unit: details.unit.map(Into::into),
                container: details.container.map(Into::into),
                fd_limit: details.nofile,
                fds: details.fds,
                ns_pids: details.ns_pids,
                netns: details.netns,
            })));
        }
        each(&Event::Holder(Holder {
            inode: descriptor.inode,
            fd: Some(descriptor.fd),
            pid: known.pid,
            comm: known.comm,
            start: known.start,
            tree: self.tree.contains(&known.pid),
        }));
        true
    }
}

/// A socket whose connection is over.
fn row(finished: &Finished, inode: u32) -> Row {
    Row {
        time: clock::boot_ns(),
        socket: Socket {
            cookie: finished.cookie,
            netns: finished.netns.unwrap_or(0),
            tuple: Tuple {
                local_addr: address_bytes(finished.local.ip()),
                remote_addr: address_bytes(
                    finished
                        .remote
                        .map_or(finished.local.ip(), |remote| remote.ip()),
                ),
                local_port: finished.local.port(),
                remote_port: finished.remote.map_or(0, |remote| remote.port()),
            },
        },
        state: State::Close,
        inode,
        cgroup: 0,
        time_wait_ms: None,
        detail: Some(Detail {
            last_data_sent_ms: Some(finished.tcp_info.last_data_sent_ms),
            last_ack_recv_ms: Some(finished.tcp_info.last_ack_recv_ms),
            orderly: if finished.error_unread {
                Some(false)
            } else {
                finished.shut_down
            },
            ..Detail::default()
        }),
    }
}
