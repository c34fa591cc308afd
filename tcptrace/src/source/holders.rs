//! Who holds the sockets that a look showed, and which sockets are held though no look shows them.

use std::io;

use hashbrown::{HashMap, HashSet};
use tcptrace_ebpf::State;

use crate::{
    event::{self, Detail, Event, Holder, Row, Socket, States, Tuple, address_bytes},
    kernel::{
        clock, open_sockets,
        probes::Probes,
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
    /// How many threads read `/proc`.
    threads: usize,
    /// Nobody is loaded that tells who has which socket open, or the kernel has refused to.
    is_not_told: bool,
}

impl Holders {
    pub(super) fn new(tree: bool, threads: usize) -> Self {
        Self {
            tree,
            threads,
            ..Self::default()
        }
    }

    /// Whether there are sockets held whose connection is over, or it takes another look to know.
    pub(super) fn may_have_finished(&self) -> bool {
        self.finished != Some(0)
    }

    /// Hands on who holds what is wanted of `sockets`. With `unlisted`, also sockets of connections that are
    /// over, which are in no table: what was not in two looks in a row. If it is `silent`, it only finds what
    /// the next look needs to know. With `probes`, which must number processes as `/proc` does, the kernel finds the
    /// descriptors, if it can. Returns whether
    /// somebody is known for each.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        mut sockets: Sockets,
        unlisted: bool,
        silent: bool,
        probes: Option<&mut Probes>,
        unseen: &mut Vec<Reason>,
        each: &mut impl FnMut(&Event),
    ) -> io::Result<bool> {
        sockets.want_listeners();
        // If nothing is wanted, all of it is held.
        if !unlisted && sockets.are_held() {
            return Ok(true);
        }
        let tree = if self.tree {
            procfs::descendants(procfs::own_pid()?)?
        } else {
            HashSet::new()
        };
        let wants = |part: &mut Part, inode| {
            if let Some((wanted, _)) = sockets.listed.get(&inode) {
                return *wanted != Wanted::No;
            }
            if unlisted {
                part.found.insert(inode);
            }
            unlisted && self.unlisted.contains(&inode) && !self.dismissed.contains(&inode)
        };
        let tell = |part: &mut Part, process: &Handle, descriptor: Descriptor| {
            let inode = descriptor.inode;
            if let Some((wanted, _)) = sockets.listed.get(&inode) {
                let detailed = *wanted == Wanted::Details;
                if silent || part.holder(process, descriptor, detailed, &tree) {
                    part.held.push(inode);
                }
            // Another tcptrace that asks has a duplicate for that moment, and is no holder.
            } else if part.is_over(process, descriptor) && !process.runs_this_program() {
                part.holder(process, descriptor, true, &tree);
            }
        };
        let told = probes
            .filter(|_| !self.is_not_told)
            .and_then(|probes| told(probes, wants, tell));
        let is_not_told = told.is_none();
        let parts = match told {
            Some(part) => vec![part],
            None => procfs::sockets_by_part(self.threads, |part, process, descriptor| {
                if wants(part, descriptor.inode) {
                    tell(part, process, descriptor);
                }
            })?,
        };
        self.is_not_told = is_not_told;
        let mut found = HashSet::new();
        // By inode, whether its connection is over.
        let mut asked: HashMap<u32, bool> = HashMap::new();
        let mut refused = HashSet::new();
        for part in parts {
            for event in &part.events {
                // Each socket once.
                if !matches!(event, Event::Socket(row) if asked.get(&row.inode) == Some(&true)) {
                    each(event);
                }
            }
            for inode in part.held {
                if let Some((_, held)) = sockets.listed.get_mut(&inode) {
                    *held = true;
                }
            }
            for (inode, over) in part.asked {
                *asked.entry(inode).or_default() |= over;
            }
            found.extend(part.found);
            self.dismissed.extend(part.dismissed);
            refused.extend(part.refused);
        }
        if unlisted {
            self.dismissed.retain(|inode| found.contains(inode));
            let over = asked.values().filter(|over| **over).count();
            // The first look only finds what to ask the second time.
            self.finished = (over > 0 || self.looked).then_some(over);
            self.unlisted = found;
            self.looked = true;
        }
        if !refused.is_empty() {
            let system = System::read();
            unseen.push(unlisted::refusal(
                format_args!(
                    "TCP sockets in no table of the kernel that could not be asked whether their connection is \
                     over: {}",
                    refused.len()
                ),
                // Of one whose descriptors ran out, the whole scan is an error.
                None,
                &system,
            ));
        }
        Ok(sockets.are_held())
    }
}

/// What the kernel tells of who has which socket open; `None` if it does not.
fn told(
    probes: &mut Probes,
    wants: impl Fn(&mut Part, u32) -> bool,
    tell: impl Fn(&mut Part, &Handle, Descriptor),
) -> Option<Part> {
    // Why it does not take the program, `tcptrace doctor` says.
    let records = probes.open_sockets().ok()?;
    let told = open_sockets::sockets(records, wants, tell);
    told.inspect_err(|error| {
        eprintln!(
            "tcptrace: cannot walk all open files: {error}; /proc is read from now on for who has which socket \
             open, which takes longer"
        );
    })
    .ok()
}

/// What a pass over a part of the processes has found.
#[derive(Default)]
struct Part {
    /// To be handed on.
    events: Vec<Event>,
    /// Inodes of sockets that were asked for, and are held.
    held: Vec<u32>,
    /// Inodes of sockets that no look showed.
    found: HashSet<u32>,
    /// Those of them that were asked, and whether their connection is over.
    asked: HashMap<u32, bool>,
    /// Those that are of no TCP connection.
    dismissed: Vec<u32>,
    /// Those that could not be asked.
    refused: Vec<u32>,
    /// The process that was told of last: who it is, once.
    last: Option<procfs::Process>,
    /// Everything was told of it.
    detailed: bool,
}

impl Part {
    /// Whether the connection of a socket that is in no table is over. Tells of it, if so.
    fn is_over(&mut self, process: &Handle, descriptor: Descriptor) -> bool {
        let inode = descriptor.inode;
        if let Some(over) = self.asked.get(&inode) {
            return *over;
        }
        let over = match ask(process, descriptor) {
            Ok(Unlisted::Finished(finished)) => {
                self.events.push(Event::Socket(row(&finished, inode)));
                true
            }
            Ok(Unlisted::NotTcp) => {
                self.dismissed.push(inode);
                false
            }
            Ok(Unlisted::Refused(_)) => {
                self.refused.push(inode);
                false
            }
            // Closed meanwhile, or it can still come to something.
            Ok(Unlisted::Fresh | Unlisted::Open | Unlisted::Closed) | Err(_) => false,
        };
        self.asked.insert(inode, over);
        over
    }

    /// Tells who holds it. `tree`: processes of the tree that is watched. Returns false if the process is no
    /// more.
    fn holder(
        &mut self,
        process: &Handle,
        descriptor: Descriptor,
        detailed: bool,
        tree: &HashSet<u32>,
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
            self.events.push(Event::Process(Box::new(event::Process {
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
        self.events.push(Event::Holder(Holder {
            inode: descriptor.inode,
            fd: Some(descriptor.fd),
            pid: known.pid,
            comm: known.comm,
            start: known.start,
            tree: tree.contains(&known.pid),
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
