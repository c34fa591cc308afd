//! Who holds the sockets that a look showed, and which sockets are held though no look shows them.

use std::io;

use hashbrown::{HashMap, HashSet};
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

/// What is asked about a socket that a look showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    /// Nothing.
    No,
    /// Who holds it.
    Holders,
    /// Who holds it, and who they are.
    Details,
}

/// What a look at the tables showed.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// By inode, all that have a file: what is asked about them, and whether a holder was found.
    listed: HashMap<u32, (Wanted, bool)>,
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
        match (piles.contains(row.state), row.inode) {
            (true, 0) => {
                self.waiting.insert(at);
            }
            (true, inode) => self.want(inode, Wanted::Details),
            (false, inode) if all => self.want(inode, Wanted::Holders),
            (false, inode) => self.want(inode, Wanted::No),
        }
    }

    /// A socket with this inode is in a table.
    pub(super) fn list(&mut self, inode: u32) {
        self.want(inode, Wanted::No);
    }

    fn want(&mut self, inode: u32, wanted: Wanted) {
        if inode != 0 {
            let (known, _) = self.listed.entry(inode).or_insert((wanted, false));
            *known = wanted.max(*known);
        }
    }

    /// Everything is wanted of listeners at which connections wait.
    fn want_listeners(&mut self) {
        for (inode, netns, port) in std::mem::take(&mut self.listeners) {
            if self.waiting.contains(&(netns, port)) {
                self.want(inode, Wanted::Details);
            }
        }
    }

    /// Whether a holder is known of each of which one is wanted.
    fn are_held(&self) -> bool {
        let mut listed = self.listed.values();
        listed.all(|(wanted, held)| *wanted == Wanted::No || *held)
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
    /// over, which are in no table: what was not in two looks in a row. If it is `silent`, it only finds what
    /// the next look needs to know. Returns whether somebody is known for each.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        mut sockets: Sockets,
        unlisted: bool,
        silent: bool,
        unseen: &mut Vec<Reason>,
        each: &mut impl FnMut(&Event),
    ) -> io::Result<bool> {
        sockets.want_listeners();
        // If nothing is wanted, all of it is held.
        if !unlisted && sockets.are_held() {
            return Ok(true);
        }
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
            if let Some((wanted, held)) = sockets.listed.get_mut(&inode) {
                if *wanted != Wanted::No {
                    let detailed = *wanted == Wanted::Details;
                    *held |= silent || teller.holder(process, descriptor, detailed, each);
                }
                return;
            }
            if !unlisted {
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
        Ok(sockets.are_held())
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
