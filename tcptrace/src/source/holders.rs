//! Who holds the sockets that a look showed, and which sockets are held though no look shows them.

use std::{cell::RefCell, fs::File, io, ops::ControlFlow};

use hashbrown::{HashMap, HashSet};
use tcptrace_ebpf::State;

use crate::{
    event::{self, Activity, Detail, Event, Holder, Row, Socket, States, Tuple, address_bytes},
    kernel::{
        clock,
        helper::{Failure, Helpers},
        open_sockets::{self, Open},
        procfs::{self, Descriptor, Handle},
        system::System,
        unlisted::{self, Finished, Unlisted},
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

    /// Those in states in which they pile up, and listeners that are wanted, of which no holder is known.
    pub(super) fn unheld(&self) -> HashSet<u32> {
        let mut unheld = HashSet::new();
        for (inode, (wanted, held)) in &self.listed {
            if *wanted == Wanted::Details && !held {
                unheld.insert(*inode);
            }
        }
        unheld
    }

    /// Whether a holder is known of each of which one is wanted.
    fn are_held(&self) -> bool {
        let mut listed = self.listed.values();
        listed.all(|(wanted, held)| *wanted == Wanted::No || *held)
    }
}

/// What a look hands on, and when it can be interrupted.
pub(super) enum Step<'a> {
    /// This was found.
    Event(&'a Event),
    /// Between two system calls. What was found before has been handed on.
    Pause,
}

/// How a look comes to know who holds which socket.
pub(super) enum Way {
    /// The kernel walks all open files: this is to be read. What sockets hold comes with them.
    Walk(File),
    /// By `/proc`.
    Procfs,
}

/// What a look asks for.
pub(super) struct Wants<'a> {
    /// States in which sockets pile up.
    pub(super) piles: States,
    /// Also sockets of connections that are over, which are in no table.
    pub(super) unlisted: bool,
    /// If there is no look before this: inodes of all sockets that are in a table by now.
    pub(super) list_again: Option<&'a mut dyn FnMut() -> HashSet<u32>>,
}

/// A process for good: its pid, and when it started.
type ProcessId = (u32, u64);

/// What earlier looks found.
#[derive(Debug, Default)]
pub(super) struct Holders {
    /// Inodes that were held, and in no table.
    unlisted: HashSet<u32>,
    /// Those of them that are of no TCP connection.
    dismissed: HashSet<u32>,
    /// Those of them whose lock somebody holds: they are not asked again.
    locked: HashSet<u32>,
    /// Processes that held one of those, and are not asked about any of their sockets again.
    locking: HashSet<ProcessId>,
    /// How many sockets it was last said of that they could not be asked.
    said_unasked: usize,
    /// How many connections were over; `None` before it was asked.
    finished: Option<usize>,
    /// A look has asked for them.
    looked: bool,
    /// Whether holders are told apart by whether they descend from this process.
    tree: bool,
    /// How many threads read `/proc`.
    threads: usize,
    /// The kernel's walk has failed.
    no_walk: bool,
}

impl Holders {
    pub(super) fn new(tree: bool, threads: usize) -> Self {
        Self {
            tree,
            threads,
            ..Self::default()
        }
    }

    /// Whether the kernel can walk all open files, as far as is known.
    pub(super) const fn can_walk(&self) -> bool {
        !self.no_walk
    }

    /// The kernel cannot.
    pub(super) const fn cannot_walk(&mut self) {
        self.no_walk = true;
    }

    /// Whether there are sockets held whose connection is over, or it takes another look to know.
    pub(super) fn may_have_finished(&self) -> bool {
        self.finished != Some(0)
    }

    /// Hands on who holds what is wanted of `sockets`, and sockets of connections that are over, if those are wanted.
    /// Returns whether somebody is known for each.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(super) fn look(
        &mut self,
        sockets: &mut Sockets,
        wants: Wants<'_>,
        way: Way,
        helpers: &mut Helpers,
        unseen: &mut Vec<Reason>,
        step: &mut impl FnMut(Step<'_>) -> ControlFlow<()>,
    ) -> io::Result<bool> {
        sockets.want_listeners();
        // If nothing is wanted, all of it is held.
        if !wants.unlisted && sockets.are_held() {
            return Ok(true);
        }
        let tree = if self.tree {
            procfs::descendants(procfs::own_pid()?)?
        } else {
            HashSet::new()
        };
        match way {
            Way::Walk(records) => {
                let walked = self.walk(records, sockets, &wants, &tree, step);
                if let Err(error) = walked {
                    self.no_walk = true;
                    eprintln!(
                        "tcptrace: cannot walk all open files: {error}; /proc is read from now on for who has \
                         which socket open, which takes longer"
                    );
                    self.read(sockets, wants, &tree, helpers, unseen, step)?;
                }
            }
            Way::Procfs => self.read(sockets, wants, &tree, helpers, unseen, step)?,
        }
        Ok(sockets.are_held())
    }

    /// By the kernel's walk.
    fn walk(
        &mut self,
        records: File,
        sockets: &mut Sockets,
        wants: &Wants<'_>,
        tree: &HashSet<u32>,
        step: &mut impl FnMut(Step<'_>) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let hz = clock::hz();
        let mut part = Part::default();
        let mut over = HashSet::new();
        // Both hand events on, one after the other.
        let step = RefCell::new(step);
        let listed = RefCell::new(&mut sockets.listed);
        let wanted = |open: &Open| match listed.borrow().get(&open.descriptor.inode) {
            Some((wanted, _)) => *wanted != Wanted::No,
            None => wants.unlisted && open.state == Some(State::Close) && open.detail.is_some(),
        };
        let each = |process: &Handle, open: &Open| {
            let inode = open.descriptor.inode;
            if let Some((wanted, held)) = listed.borrow_mut().get_mut(&inode) {
                let detailed = *wanted == Wanted::Details;
                if let (false, Some(detail), Some(state)) = (*held, &open.detail, open.state)
                    && wants.piles.contains(state)
                {
                    part.events.push(Event::Activity(Activity {
                        time: detail.time,
                        cookie: detail.cookie,
                        state,
                        last_data_sent_ms: unlisted::jiffies_to_ms(detail.sent_ago, hz),
                        last_ack_recv_ms: unlisted::jiffies_to_ms(detail.acked_ago, hz),
                    }));
                }
                *held |= part.holder(process, open.descriptor, detailed, tree);
            } else if let Some(detail) = &open.detail
                && let Some(finished) = unlisted::over(detail, hz)
                // Another tcptrace that asks has a duplicate for that moment, and is no holder.
                && !part.is_own(process)
            {
                if over.insert(inode) {
                    let row = row(&finished, inode, detail.time);
                    part.events.push(Event::Socket(row));
                }
                part.holder(process, open.descriptor, true, tree);
            }
            for event in part.events.drain(..) {
                // It can only be broken off between two reads.
                let _ = (step.borrow_mut())(Step::Event(&event));
            }
        };
        open_sockets::sockets(records, wanted, each, || (step.borrow_mut())(Step::Pause))?;
        if wants.unlisted {
            self.finished = Some(over.len());
            self.looked = true;
        }
        Ok(())
    }

    /// By `/proc`.
    fn read(
        &mut self,
        sockets: &mut Sockets,
        wants: Wants<'_>,
        tree: &HashSet<u32>,
        helpers: &mut Helpers,
        unseen: &mut Vec<Reason>,
        step: &mut impl FnMut(Step<'_>) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let unlisted = wants.unlisted;
        let is_first = wants.list_again.is_some();
        let parts =
            procfs::sockets_by_part(self.threads, |part: &mut Part, process, descriptor| {
                let inode = descriptor.inode;
                if let Some((wanted, _)) = sockets.listed.get(&inode) {
                    let detailed = *wanted == Wanted::Details;
                    if *wanted != Wanted::No && part.holder(process, descriptor, detailed, tree) {
                        part.held.push(inode);
                    }
                    return;
                }
                if !unlisted {
                    return;
                }
                part.found.insert(inode);
                if (is_first || self.unlisted.contains(&inode)) && !self.dismissed.contains(&inode)
                {
                    part.candidate(process, descriptor);
                }
            })?;
        let _ = step(Step::Pause);
        let mut found = HashSet::new();
        let mut candidates = Vec::new();
        let mut refused = HashSet::new();
        for part in parts {
            for event in &part.events {
                let _ = step(Step::Event(event));
            }
            for inode in part.held {
                if let Some((_, held)) = sockets.listed.get_mut(&inode) {
                    *held = true;
                }
            }
            found.extend(part.found);
            candidates.extend(part.candidates);
            self.dismissed.extend(part.dismissed);
            refused.extend(part.refused);
        }
        if !unlisted {
            return Ok(());
        }
        if let Some(list_again) = wants.list_again
            && !candidates.is_empty()
        {
            let listed = list_again();
            candidates.retain(|(_, descriptor)| !listed.contains(&descriptor.inode));
        }
        for set in [&mut self.dismissed, &mut self.locked] {
            set.retain(|inode| found.contains(inode));
        }
        let over = self.ask(&candidates, helpers, &mut refused, step);
        // The first look only finds what to ask the second time.
        self.finished = (!over.is_empty() || self.looked || is_first).then_some(over.len());
        self.unlisted = found;
        self.looked = true;
        self.tell_over(&candidates, &over, tree, step);
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
        Ok(())
    }

    /// Asks sockets that are in no table whether their connection is over. Returns those of which it is.
    fn ask(
        &mut self,
        candidates: &[Candidate],
        helpers: &mut Helpers,
        refused: &mut HashSet<u32>,
        step: &mut impl FnMut(Step<'_>) -> ControlFlow<()>,
    ) -> HashMap<u32, Finished> {
        let mut over = HashMap::new();
        let mut queue: HashMap<u32, Candidate> = HashMap::new();
        let mut unasked = HashSet::new();
        let mut why = None;
        for (process, descriptor) in candidates {
            if self.locked.contains(&descriptor.inode) || self.locking.contains(process) {
                unasked.insert(descriptor.inode);
            } else {
                let inode = descriptor.inode;
                queue.entry(inode).or_insert((*process, *descriptor));
            }
        }
        // One that another process holds as well is asked through that.
        unasked.retain(|inode| !queue.contains_key(inode));
        let mut queue: Vec<Candidate> = queue.into_values().collect();
        // In the order of processes: then the child has one's folder in its cache.
        queue.sort_unstable();
        while !queue.is_empty() {
            let asked: Vec<_> = queue
                .iter()
                .map(|((pid, _), descriptor)| (*pid, *descriptor))
                .collect();
            let mut answered = 0;
            let mut pause = || {
                let _ = step(Step::Pause);
            };
            let ended = helpers.unlisted(&asked, &mut pause, |(_, descriptor), answer| {
                answered += 1;
                let inode = descriptor.inode;
                match answer.result() {
                    Ok(Unlisted::Finished(finished)) => drop(over.insert(inode, finished)),
                    Ok(Unlisted::NotTcp) => drop(self.dismissed.insert(inode)),
                    Ok(Unlisted::Refused(_)) | Err(_) => drop(refused.insert(inode)),
                    // Closed meanwhile, or it can still come to something.
                    Ok(Unlisted::Fresh | Unlisted::Open | Unlisted::Closed) => {}
                }
            });
            let mut rest = queue.split_off(answered);
            match ended {
                Ok(()) => break,
                Err(Failure::Stuck) => {
                    if let Some((process, descriptor)) = rest.first().copied() {
                        self.locked.insert(descriptor.inode);
                        self.locking.insert(process);
                        unasked.extend(
                            rest.extract_if(.., |(other, _)| *other == process)
                                .map(|(_, descriptor)| descriptor.inode),
                        );
                    }
                }
                Err(failure) => {
                    unasked.extend(rest.drain(..).map(|(_, descriptor)| descriptor.inode));
                    why = Some(failure);
                }
            }
            queue = rest;
        }
        if unasked.len() > self.said_unasked {
            let locking: HashMap<_, _> = candidates
                .iter()
                .filter(|(process, _)| self.locking.contains(process))
                .map(|((pid, _), _)| (*pid, ()))
                .collect();
            let mut pids: Vec<_> = locking.into_keys().collect();
            pids.sort_unstable();
            eprintln!("tcptrace: {}", not_asked(unasked.len(), &pids, why));
        }
        self.said_unasked = unasked.len();
        over
    }

    /// Hands on sockets whose connection is over, and who holds them.
    fn tell_over(
        &self,
        candidates: &[Candidate],
        over: &HashMap<u32, Finished>,
        tree: &HashSet<u32>,
        step: &mut impl FnMut(Step<'_>) -> ControlFlow<()>,
    ) {
        let time = clock::boot_ns();
        for (inode, finished) in over {
            let _ = step(Step::Event(&Event::Socket(row(finished, *inode, time))));
        }
        let mut part = Part::default();
        let mut last: Option<(u32, Handle)> = None;
        for ((pid, start), descriptor) in candidates {
            if !over.contains_key(&descriptor.inode) {
                continue;
            }
            if last.as_ref().is_none_or(|(last, _)| last != pid) {
                last = Handle::open(*pid).ok().map(|process| (*pid, process));
            }
            let Some((_, process)) = &last else {
                continue;
            };
            part.holder(process, *descriptor, true, tree);
            // Its number may be another's by now.
            let is_it = part.last.as_ref().is_some_and(|last| last.start == *start);
            for event in part.events.drain(..) {
                if is_it {
                    let _ = step(Step::Event(&event));
                }
            }
        }
    }
}

/// A socket in no table, and who holds it.
type Candidate = (ProcessId, Descriptor);

/// That `count` sockets were not asked. `pids`: processes that hold locks.
fn not_asked(count: usize, pids: &[u32], why: Option<Failure>) -> Reason {
    let what = format!(
        "TCP sockets in no table of the kernel that were not asked whether their connection is over: {count}"
    );
    let list = |pids: &[u32]| {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        pids.join(", ")
    };
    match (why, pids) {
        (Some(Failure::Broken(error)), _) => Reason::new(
            format_args!("{what}, because the process that asks failed: {error}"),
            "please report it, with the output of `tcptrace doctor`",
        ),
        (_, pids) => Reason::new(
            format_args!(
                "{what}, because a socket's lock is held by somebody who waits for memory (pid {})",
                list(pids)
            ),
            "see what that process waits for (userfaultfd, FUSE, NFS), or run as root on a kernel that takes BPF \
             programs: then no lock is needed",
        ),
    }
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
    /// Those of them that are TCP sockets, and to be asked.
    candidates: Vec<Candidate>,
    /// Those that are of no TCP connection.
    dismissed: HashSet<u32>,
    /// Those that could not be asked.
    refused: Vec<u32>,
    /// The process that was told of last: who it is, once.
    last: Option<procfs::Process>,
    /// Everything was told of it.
    detailed: bool,
    /// The process of which it was last found out whether it runs this program, and whether it does.
    own: Option<(u32, bool)>,
}

impl Part {
    /// Whether a process is another tcptrace, or this one's.
    fn is_own(&mut self, process: &Handle) -> bool {
        let pid = process.pid();
        match self.own {
            Some((last, is_own)) if last == pid => is_own,
            _ => {
                let is_own = process.runs_this_program();
                self.own = Some((pid, is_own));
                is_own
            }
        }
    }

    /// Takes a socket that is in no table, if it is of TCP.
    fn candidate(&mut self, process: &Handle, descriptor: Descriptor) {
        let inode = descriptor.inode;
        if self.dismissed.contains(&inode) {
            return;
        }
        match unlisted::is_tcp(process, descriptor) {
            Ok(true) => {}
            // The path may lead to another file by now.
            Ok(false) if process.has(descriptor) == Ok(false) => return,
            Ok(false) => {
                self.dismissed.insert(inode);
                return;
            }
            Err(_) if process.has(descriptor) == Ok(false) => return,
            Err(_) => return self.refused.push(inode),
        }
        // Another tcptrace that asks has a duplicate for that moment, and is no holder.
        if !self.is_own(process)
            && let Some(known) = self.identify(process)
        {
            let process = (known.pid, known.start);
            self.candidates.push((process, descriptor));
        }
    }

    /// Who a process is. None if it is no more.
    fn identify(&mut self, process: &Handle) -> Option<&procfs::Process> {
        let is_last = |last: &procfs::Process| last.pid == process.pid();
        if !self.last.as_ref().is_some_and(is_last) {
            self.last = process.identity();
            self.detailed = false;
        }
        self.last.as_ref()
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
        let Some(known) = self.identify(process).cloned() else {
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
fn row(finished: &Finished, inode: u32, time: u64) -> Row {
    Row {
        time,
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
