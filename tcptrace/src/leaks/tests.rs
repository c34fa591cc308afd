//! From events to reports.

use tcptrace_ebpf::State;

use super::*;
use crate::{
    event::{
        Called, Comm, Detail, End, Event, Holder, Look, Probes, Process, Row, SCHEMA, Scope,
        Socket, Start, States, Task, Transition, Tuple, address_bytes,
    },
    output::Output,
    select::{Selection, Sockets},
    tracker::Via,
    view::View as _,
};

const SECOND: u64 = 1_000_000_000;
const NETNS: u32 = 4_026_531_840;
/// Processes started long before.
const BEGIN: u64 = 1_000_000 * SECOND;

/// A source, the tracker, and what both views are made of.
struct World {
    tracker: Tracker,
    watch: Watch,
    now: u64,
    traced: bool,
}

impl World {
    fn new(traced: bool, states: &[State]) -> Self {
        let states_set: States = states.iter().copied().collect();
        let mut world = Self {
            tracker: Tracker::new(Selection {
                states: states.to_vec(),
                finished: true,
                ..Selection::default()
            }),
            watch: Watch::new(Options {
                criteria: Criteria {
                    states: states_set,
                    older_than: 60 * SECOND,
                },
                once: false,
                at_end: false,
                until_exit: false,
                stacks: false,
                dwell: true,
            }),
            now: BEGIN,
            traced,
        };
        world.feed(Event::Start(Box::new(Start {
            schema: SCHEMA,
            version: "0".into(),
            time: BEGIN,
            boot_to_utc_ns: 0,
            boot_to_monotonic_ns: 0,
            boot_id: "b".into(),
            host: "h".into(),
            kernel: "6.18".into(),
            hz: 250,
            netns: NETNS,
            transitions: traced,
            private_pids: false,
            stacks: false,
            time_wait: Probes::None,
            accept: Probes::None,
            sockets: Sockets::default(),
        })));
        world
    }

    fn traced() -> Self {
        Self::new(true, &[State::CloseWait])
    }

    fn untraced() -> Self {
        Self::new(false, &[State::CloseWait])
    }

    fn feed(&mut self, event: Event) {
        let watch = &mut self.watch;
        self.tracker.feed(&event, &mut |fact| watch.fact(fact));
    }

    fn pass(&mut self, seconds: u64) {
        self.now += seconds * SECOND;
    }

    /// A look that shows these sockets and holders; what is reported then.
    fn look(&mut self, rows: &[Row], holders: &[Holder]) -> Report {
        self.news(rows, holders);
        self.watch.report.clone()
    }

    /// Whether what such a look shows is news.
    fn news(&mut self, rows: &[Row], holders: &[Holder]) -> bool {
        self.feed(Event::Look(Look {
            time: self.now,
            scope: Scope::All,
        }));
        for row in rows {
            let time = self.now;
            self.feed(Event::Socket(Row { time, ..*row }));
        }
        for holder in holders {
            self.feed(Event::Process(Box::new(process(holder.pid, holder.start))));
            self.feed(Event::Holder(*holder));
        }
        self.feed(Event::LookEnd {
            time: self.now,
            netns: vec![NETNS],
        });
        self.watch.look(&self.tracker).expect("a look has ended")
    }

    fn change(&mut self, socket: Socket, old: State, new: State, has_socket: bool) {
        self.feed(Event::Transition(Transition {
            has_socket,
            ..transition(self.now, socket, old, new)
        }));
    }

    /// Process 7 ends, which has the socket in CLOSE_WAIT.
    fn exit(&mut self, socket: Socket) {
        let mut change = transition(self.now, socket, State::CloseWait, State::LastAck);
        change.owned = true;
        change.task.exiting = true;
        self.feed(Event::Transition(change));
    }
}

/// While process 7 runs.
fn transition(time: u64, socket: Socket, old: State, new: State) -> Transition {
    Transition {
        time,
        socket,
        old,
        new,
        error: 0,
        stale_port: 0,
        no_time_wait: false,
        shutdown: 0,
        owned: false,
        has_socket: false,
        inode: 0,
        cgroup: 0,
        task: Task {
            pid: 7,
            comm: Comm::new(b"server"),
            start: SECOND,
            uid: 0,
            kthread: false,
            exiting: false,
            tree: false,
        },
    }
}

fn socket(cookie: u64) -> Socket {
    Socket {
        cookie,
        netns: NETNS,
        tuple: Tuple {
            local_addr: address_bytes("10.0.7.2".parse().unwrap()),
            remote_addr: address_bytes("10.0.3.7".parse().unwrap()),
            local_port: 40_000 + cookie as u16,
            remote_port: 443,
        },
    }
}

/// In CLOSE_WAIT for `seconds`, as far as its last ACK tells; with everything read, and nothing sent for
/// a day.
fn row(cookie: u64, seconds: u32) -> Row {
    Row {
        time: 0,
        socket: socket(cookie),
        state: State::CloseWait,
        inode: 100 + cookie as u32,
        cgroup: 0,
        time_wait_ms: None,
        detail: Some(Detail {
            within_ms: 0,
            recv_queue: 0,
            send_queue: 0,
            retransmits: 0,
            uid: 1000,
            last_data_sent_ms: Some(86_400_000),
            last_ack_recv_ms: Some(seconds * 1000),
            orderly: None,
        }),
    }
}

fn with(row: Row, change: impl FnOnce(&mut Detail)) -> Row {
    let mut detail = row.detail.unwrap();
    change(&mut detail);
    Row {
        detail: Some(detail),
        ..row
    }
}

/// Process `pid` holds the socket of `cookie` as descriptor `fd`.
fn holder(cookie: u64, pid: u32, fd: u32) -> Holder {
    Holder {
        inode: 100 + cookie as u32,
        fd: Some(fd),
        pid,
        comm: Comm::new(b"java"),
        start: BEGIN - 3600 * SECOND,
        tree: false,
    }
}

fn process(pid: u32, start: u64) -> Process {
    Process {
        pid,
        start,
        exe: Some("/usr/bin/java".into()),
        cmdline: Some("java -jar api.jar".into()),
        uid: Some(1000),
        unit: Some("api.service".into()),
        container: None,
        fd_limit: Some(4096),
        fds: Some(96),
        ns_pids: vec![pid],
        netns: Some(NETNS),
    }
}

fn causes(report: &Report) -> Vec<(Cause, usize)> {
    report.leaks.iter().flat_map(Leak::causes).collect()
}

#[test]
fn a_socket_that_is_read_empty_and_not_closed_is_drained() {
    let report = World::untraced().look(&[row(1, 70)], &[holder(1, 7, 17)]);
    let [leak] = &report.leaks[..] else {
        panic!("{report:?}");
    };
    assert_eq!(leak.causes(), [(Cause::Drained, 1)]);
    assert_eq!(leak.holders[0].pid, 7);
    assert_eq!(leak.via, Some(Via::Holder));
    assert_eq!(leak.sockets[0].fds, [(7, 17)]);
    let age = leak.oldest().unwrap();
    assert_eq!((age.ns, age.at_least), (70 * SECOND, true));
}

#[test]
fn one_that_has_not_been_there_for_long_is_none() {
    let report = World::untraced().look(&[row(1, 59)], &[holder(1, 7, 17)]);
    assert_eq!((report.leaks.len(), report.younger), (0, 1));
}

#[test]
fn the_first_cause_that_fits_counts() {
    let unread = with(row(1, 70), |detail| detail.recv_queue = 1);
    let more = with(row(1, 70), |detail| detail.recv_queue = 900);
    let waiting = Row {
        inode: 0,
        ..with(row(1, 70), |detail| detail.recv_queue = 1)
    };
    let blocked = with(row(1, 70), |detail| {
        detail.send_queue = 5;
        detail.recv_queue = 1;
    });
    let unasked = Row {
        detail: None,
        ..row(1, 70)
    };
    for (row, expected) in [
        (unread, Some(Cause::EofUnread)),
        (more, Some(Cause::EofUnread)),
        (waiting, Some(Cause::NotAccepted)),
        (blocked, Some(Cause::WriteBlocked)),
        // Without details it is not known since when, either.
        (unasked, None),
    ] {
        let mut world = World::untraced();
        world.look(&[row], &[]);
        world.pass(1);
        let report = world.look(&[row], &[]);
        let found: Vec<Cause> = causes(&report).iter().map(|(cause, _)| *cause).collect();
        assert_eq!(found, Vec::from_iter(expected), "{row:?}");
    }
}

#[test]
fn whether_a_queue_moves_only_a_second_look_tells() {
    let stuck = with(row(1, 70), |detail| detail.send_queue = 5);
    let mut world = World::untraced();
    assert_eq!(causes(&world.look(&[stuck], &[])), [(Cause::Unknown, 1)]);
    world.pass(1);
    assert_eq!(
        causes(&world.look(&[stuck], &[])),
        [(Cause::WriteBlocked, 1)]
    );
    world.pass(1);
    let moved = with(stuck, |detail| detail.send_queue = 4);
    let report = world.look(&[moved], &[]);
    assert_eq!((report.leaks.len(), report.half_closed), (0, 1));
}

#[test]
fn a_peer_that_still_gets_an_answer_has_only_half_closed() {
    let answered = with(row(1, 3600), |detail| {
        detail.last_data_sent_ms = Some(59_000)
    });
    let mut world = World::untraced();
    for _ in 0..3 {
        let report = world.look(&[answered], &[holder(1, 7, 17)]);
        assert_eq!((report.leaks.len(), report.half_closed), (0, 1));
        world.pass(1);
    }
    // A slow reader: the queue is as it was, but what is in it was sent lately.
    let slow = with(answered, |detail| detail.send_queue = 1000);
    for _ in 0..3 {
        assert_eq!(world.look(&[slow], &[]).half_closed, 1);
        world.pass(1);
    }
    // Sent again is not sent: nobody answers there.
    let vanished = with(slow, |detail| detail.retransmits = 3);
    world.look(&[vanished], &[]);
    world.pass(1);
    let report = world.look(&[vanished], &[]);
    assert_eq!(causes(&report), [(Cause::WriteBlocked, 1)]);
}

#[test]
fn sockets_of_the_same_holders_are_one_leak_and_counted_once() {
    let rows = [row(1, 70), row(2, 90), row(3, 80)];
    let shared = [
        holder(1, 8, 3),
        holder(1, 7, 3),
        holder(2, 7, 4),
        holder(2, 8, 4),
        holder(3, 8, 5),
    ];
    let report = World::untraced().look(&rows, &shared);
    assert_eq!(report.sockets(), 3);
    let pids = |leak: &Leak| -> Vec<u32> { leak.holders.iter().map(|one| one.pid).collect() };
    assert_eq!(
        report.leaks.iter().map(pids).collect::<Vec<_>>(),
        [vec![7, 8], vec![8]]
    );
    assert_eq!(
        report.leaks[0].sockets[0].socket.cookie, 2,
        "the oldest first"
    );
    assert_eq!(report.processes(), 2);
}

#[test]
fn connections_not_accepted_are_their_listeners() {
    let listener = |cookie: u64| Row {
        state: State::Listen,
        socket: Socket {
            tuple: Tuple {
                local_addr: [0; 16],
                remote_addr: [0; 16],
                local_port: 443,
                remote_port: 0,
            },
            ..socket(cookie)
        },
        detail: None,
        ..row(cookie, 0)
    };
    let mut waiting = Row {
        inode: 0,
        ..with(row(1, 70), |detail| detail.recv_queue = 1)
    };
    waiting.socket.tuple.local_port = 443;
    let rows = [listener(50), listener(51), waiting];
    let report = World::untraced().look(&rows, &[holder(50, 7, 3), holder(51, 8, 3)]);
    let [leak] = &report.leaks[..] else {
        panic!("{report:?}");
    };
    // Whose of the two queues it is in, nothing tells.
    let pids: Vec<u32> = leak.holders.iter().map(|one| one.pid).collect();
    assert_eq!(pids, [7, 8]);
    assert_eq!(leak.causes(), [(Cause::NotAccepted, 1)]);
    assert_eq!(
        leak.sockets[0].fds,
        [],
        "a listener's descriptor is not the connection's"
    );
}

#[test]
fn nobody_is_named_who_is_not_known() {
    let report = World::untraced().look(&[row(1, 70)], &[]);
    let leak = &report.leaks[0];
    assert_eq!(
        (leak.holders.len(), leak.via, leak.uid),
        (0, None, Some(1000))
    );
}

#[test]
fn a_transition_that_was_seen_gives_the_exact_age() {
    let mut world = World::traced();
    world.change(socket(1), State::Established, State::CloseWait, true);
    world.pass(61);
    // Keepalives have been acknowledged since.
    let report = world.look(&[row(1, 10)], &[holder(1, 7, 17)]);
    let age = report.leaks[0].oldest().unwrap();
    assert_eq!((age.ns, age.at_least), (61 * SECOND, false));
}

/// Its end can overtake the look at `/proc`, which then finds nobody.
#[test]
fn what_a_process_leaves_to_its_end_is_told_with_how_it_was_held_before() {
    let mut world = World::traced();
    world.watch.options.until_exit = true;
    world.change(socket(1), State::Established, State::CloseWait, true);
    world.pass(61);
    world.look(&[row(1, 61)], &[holder(1, 7, 17)]);
    world.pass(1);
    world.look(&[row(1, 62)], &[]);
    world.exit(socket(1));
    let report = world.look(&[], &[]);
    let leaked = &report.leaks[0].sockets[0];
    assert!(leaked.at_exit);
    assert_eq!(leaked.fds, [(7, 17)]);
    assert_eq!(leaked.cause, Cause::Drained);
}

/// A program opens a socket and ends before its stack is walked.
#[test]
fn what_was_left_has_its_place_when_that_becomes_known_at_last() {
    let mut world = World::traced();
    (world.watch.options.until_exit, world.watch.options.stacks) = (true, true);
    for cookie in [1, 2] {
        world.change(socket(cookie), State::Close, State::SynSent, true);
        world.change(socket(cookie), State::SynSent, State::Established, true);
        world.change(socket(cookie), State::Established, State::CloseWait, true);
    }
    world.pass(61);
    for cookie in [1, 2] {
        world.exit(socket(cookie));
        world.change(socket(cookie), State::LastAck, State::Close, false);
    }
    let sites = |world: &mut World| {
        let report = world.look(&[], &[]);
        let sockets = report.leaks[0].sockets.iter();
        let mut sites: Vec<_> = sockets.map(|it| (it.socket.cookie, it.site)).collect();
        sites.sort_by_key(|(cookie, _)| *cookie);
        sites
    };
    let untold = crate::tracker::Site::UNTOLD;
    assert_eq!(sites(&mut world), [(1, untold), (2, untold)]);
    world.feed(Event::Called(Called {
        time: BEGIN,
        cookie: 2,
        stack: 5,
    }));
    let known = crate::tracker::Site::stack(5);
    assert_eq!(sites(&mut world), [(1, untold), (2, known)]);
}

/// What the kernel hands over late looks as if it had been sent later.
#[test]
fn what_may_have_been_sent_before_the_peer_closed_is_no_answer() {
    for (within_ms, leaks) in [(0, 0), (30, 0), (100, 1)] {
        let mut world = World::traced();
        world.watch.options.until_exit = true;
        world.change(socket(1), State::Established, State::CloseWait, true);
        world.pass(1);
        let seen = with(row(1, 1), |detail| {
            detail.last_data_sent_ms = Some(950);
            detail.within_ms = within_ms;
        });
        world.look(&[seen], &[holder(1, 7, 17)]);
        world.pass(60);
        world.exit(socket(1));
        assert_eq!(world.look(&[], &[]).leaks.len(), leaks, "{within_ms}");
    }
}

#[test]
fn a_lower_bound_stays_one_when_a_keepalive_is_acknowledged() {
    let mut world = World::untraced();
    world.look(&[row(1, 50)], &[]);
    world.pass(20);
    let report = world.look(&[row(1, 3)], &[]);
    let age = report.leaks[0].oldest().unwrap();
    assert_eq!((age.ns, age.at_least), (70 * SECOND, true));
}

#[test]
fn what_a_look_does_not_show_is_gone_unless_its_end_would_have_been_told() {
    for (mut world, left) in [(World::untraced(), 0), (World::traced(), 1)] {
        world.look(&[row(1, 70)], &[holder(1, 7, 17)]);
        world.pass(1);
        let report = world.look(&[], &[]);
        assert_eq!(report.sockets(), left, "traced: {}", world.traced);
    }
    // A second look does not show it, either.
    let mut world = World::traced();
    world.look(&[row(1, 70)], &[holder(1, 7, 17)]);
    for left in [1, 0] {
        world.pass(1);
        assert_eq!(world.look(&[], &[]).sockets(), left);
    }
    // Records were lost: its end may have been among them.
    let mut world = World::traced();
    world.look(&[row(1, 70)], &[holder(1, 7, 17)]);
    world.feed(Event::Lost(Lost {
        time: world.now,
        records: 1,
        missed: 0,
    }));
    assert_eq!(world.look(&[], &[]).sockets(), 0);
}

/// A recording holds looks for every view.
#[test]
fn looks_for_something_else_say_nothing_of_leaks() {
    let fin_wait2 = [State::FinWait2].into_iter().collect();
    for scope in [Scope::Orphans, Scope::TimeWait, Scope::States(fin_wait2)] {
        let mut world = World::traced();
        assert_eq!(world.look(&[row(1, 70)], &[]).sockets(), 1);
        world.pass(1);
        world.feed(Event::Look(Look {
            time: world.now,
            scope,
        }));
        world.feed(Event::LookEnd {
            time: world.now,
            netns: vec![NETNS],
        });
        assert_eq!(world.watch.look(&world.tracker), None, "{scope:?}");
        // The next look at everything is compared with the last such one.
        world.pass(1);
        assert_eq!(world.look(&[row(1, 72)], &[]).sockets(), 1);
    }
}

#[test]
fn an_end_after_the_row_beats_it() {
    let mut world = World::traced();
    world.look(&[row(1, 70)], &[]);
    world.pass(1);
    world.feed(Event::Look(Look {
        time: world.now,
        scope: Scope::All,
    }));
    world.feed(Event::Socket(row(1, 71)));
    world.change(socket(1), State::CloseWait, State::LastAck, false);
    world.feed(Event::LookEnd {
        time: world.now,
        netns: vec![NETNS],
    });
    world.watch.look(&world.tracker);
    assert_eq!(world.watch.report.sockets(), 0);
}

#[test]
fn a_descriptor_of_a_connection_that_is_over_is_leaked_too() {
    let over = |seconds| Row {
        state: State::Close,
        socket: Socket {
            netns: 0,
            tuple: Tuple {
                remote_port: 0,
                ..socket(1).tuple
            },
            ..socket(1)
        },
        ..row(1, seconds)
    };
    // Unseen: how long it has been over is not known, but how long nothing came.
    let report = World::untraced().look(&[over(70)], &[holder(1, 7, 17)]);
    let leak = &report.leaks[0];
    assert_eq!(
        (leak.state, leak.causes()),
        (State::Close, vec![(Cause::Finished, 1)])
    );
    assert_eq!(
        (leak.oldest(), leak.sockets[0].idle),
        (None, Some(70 * SECOND))
    );
    assert_eq!(leak.remotes(), []);
    assert_eq!(leak.clear, []);
    // Seen: since then, and to whom.
    let mut world = World::traced();
    world.change(socket(1), State::LastAck, State::Close, true);
    assert!(world.tracker.needs().finished_look);
    world.pass(61);
    let report = world.look(&[over(3600)], &[holder(1, 7, 17)]);
    let leak = &report.leaks[0];
    assert_eq!(leak.oldest().unwrap().ns, 61 * SECOND);
    assert_eq!(leak.remotes()[0].port, Some(443));
    assert_eq!(leak.sockets[0].socket.netns, NETNS);
    // Closed: nothing tells, but that looks do not show it any more.
    for _ in 0..=crate::tracker::MISSES {
        world.pass(1);
        assert_eq!(world.look(&[], &[]).sockets(), 0);
    }
    assert!(!world.tracker.needs().finished_look);
}

#[test]
fn an_ordinary_close_leaves_nothing_to_look_for() {
    let mut world = World::traced();
    world.change(socket(1), State::CloseWait, State::LastAck, false);
    world.change(socket(1), State::LastAck, State::Close, false);
    assert!(!world.tracker.needs().finished_look);
}

#[test]
fn growth_tells_when_the_limit_is_reached() {
    let mut world = World::untraced();
    let mut report = Report::default();
    for look in 1..=6 {
        let rows: Vec<Row> = (0..look * 2).map(|cookie| row(cookie, 70)).collect();
        let holders: Vec<Holder> = (0..look * 2).map(|cookie| holder(cookie, 7, 3)).collect();
        report = world.look(&rows, &holders);
        world.pass(5);
    }
    let leak = &report.leaks[0];
    assert!((leak.per_minute.unwrap() - 24.0).abs() < 1e-6);
    // 4096 less 96, at 24 a minute.
    let (holding, seconds) = leak.full_in().unwrap();
    assert_eq!(holding.pid, 7);
    assert!((seconds - 10_000.0).abs() < 1e-3, "{seconds}");
}

#[test]
fn the_worst_comes_first() {
    let rows = [row(1, 90), row(2, 70), row(3, 70), row(4, 80)];
    let holders = [
        holder(1, 7, 3),
        holder(2, 8, 3),
        holder(3, 8, 4),
        holder(4, 9, 3),
    ];
    let report = World::untraced().look(&rows, &holders);
    let pids: Vec<u32> = report
        .leaks
        .iter()
        .map(|leak| leak.holders[0].pid)
        .collect();
    assert_eq!(pids, [8, 7, 9]);
}

#[test]
fn a_report_is_news_when_who_or_how_many_or_why_changes() {
    let mut world = World::untraced();
    assert!(world.news(&[], &[]), "the first is");
    assert!(!world.news(&[], &[]));
    let held = [holder(1, 7, 17), holder(2, 7, 18)];
    assert!(world.news(&[row(1, 70)], &held));
    assert!(!world.news(&[row(1, 80)], &held));
    assert!(world.news(&[row(1, 80), row(2, 70)], &held));
    let unread = with(row(2, 70), |detail| detail.recv_queue = 1);
    assert!(world.news(&[row(1, 80), unread], &held));
    assert!(world.news(&[], &[]));
}

#[test]
fn what_would_clear_a_leak_ends_as_little_else_as_can_be() {
    let commands = |report: &Report| -> Vec<(String, usize)> {
        let clear = report.leaks[0].clear.iter();
        clear.map(|one| (one.command.clone(), one.others)).collect()
    };
    // A client: one of two processes with sockets to the same place.
    let rows = [row(1, 70), row(2, 70), row(3, 70)];
    let holders = [holder(1, 7, 3), holder(2, 7, 4), holder(3, 8, 3)];
    let report = World::untraced().look(&rows, &holders);
    let line = "ss -K state close-wait 'sport = :40001 or sport = :40002'";
    assert_eq!(commands(&report), [(line.to_owned(), 0)]);
    // Too many ports for a line.
    let rows: Vec<Row> = (0..20).map(|cookie| row(cookie, 70)).collect();
    let mut holders: Vec<Holder> = (0..19).map(|cookie| holder(cookie, 7, 3)).collect();
    holders.push(holder(19, 8, 3));
    let report = World::untraced().look(&rows, &holders);
    let line = "ss -K state close-wait 'dst 10.0.3.7:443'";
    assert_eq!(commands(&report), [(line.to_owned(), 1)]);
    // Another network namespace, which a holder is in.
    let away = |one: Row| Row {
        socket: Socket {
            netns: 5,
            ..one.socket
        },
        ..one
    };
    let mut world = World::untraced();
    world.news(&[away(row(1, 70))], &[holder(1, 7, 3)]);
    world.feed(Event::Process(Box::new(Process {
        netns: Some(5),
        ..process(7, holder(1, 7, 3).start)
    })));
    let report = world.watch.sights.report(&world.tracker, world.now);
    let line = "nsenter --net=/proc/7/ns/net ss -K state close-wait 'sport = :40001'";
    assert_eq!(commands(&report), [(line.to_owned(), 0)]);
}

#[test]
fn other_states_pile_up_too() {
    let mut world = World::new(false, &[State::Established, State::SynSent]);
    let established = Row {
        state: State::Established,
        ..row(1, 70)
    };
    let connecting = Row {
        state: State::SynSent,
        ..row(2, 0)
    };
    let rows = [established, connecting, row(3, 70)];
    let holders = [holder(1, 7, 3), holder(2, 7, 4), holder(3, 7, 5)];
    let report = world.look(&rows, &holders);
    assert_eq!(causes(&report), [(Cause::Unknown, 1)]);
    assert_eq!(report.leaks[0].state, State::Established);
    // Nothing but being seen tells how long it has been connecting.
    world.pass(60);
    let report = world.look(&rows, &holders);
    assert_eq!(report.leaks.len(), 2);
}

#[test]
fn only_what_was_asked_for_is_reported() {
    let mut world = World::untraced();
    world.tracker = Tracker::new(Selection {
        pids: vec![8],
        states: vec![State::CloseWait],
        ..Selection::default()
    });
    let rows = [row(1, 70), row(2, 70), row(3, 70)];
    let holders = [holder(1, 7, 3), holder(2, 8, 3), holder(2, 9, 3)];
    let report = world.look(&rows, &holders);
    let [leak] = &report.leaks[..] else {
        panic!("{report:?}");
    };
    assert_eq!(leak.sockets[0].socket.cookie, 2);
}

/// What a pipe gets of a leak.
fn text(world: &World) -> String {
    let mut text = Text::new(Output::default(), world.watch.options);
    text.clock(0, 0);
    let mut page = String::new();
    text.watch.report = world.watch.report.clone();
    text.compose(&world.tracker, &mut page);
    page
}

#[test]
fn people_read_who_why_since_when_and_what_to_do() {
    let mut world = World::untraced();
    for look in 0..6 {
        let rows = [
            row(1, 7981),
            row(2, 7000),
            with(row(3, 100), |detail| detail.recv_queue = 1205),
            row(4, 10),
        ];
        let held = [holder(1, 7, 17), holder(2, 7, 18), holder(3, 7, 19)];
        let rows = &rows[..rows.len().min(1 + look)];
        world.look(rows, &held);
        world.pass(1);
    }
    let page = text(&world);
    let expected = "\
13:46:45 UTC  CLOSE_WAIT for longer than 60 s: 3 sockets of 1 process; 1 for less
  not traced, only looked up: ages are lower bounds (>=)

java (pid 7) has read everything and never closed 2 sockets; oldest >= 2 h 13 min; 22.3 more a minute; fd limit 4,096 reached in 2 h 59 min
  and it has not read the end of file of 1 socket
  unread   1,204 bytes
  process  /usr/bin/java, started 1 h 0 min ago, unit api.service
  command  java -jar api.jar
  fds      96 of 4,096 open
  remotes  10.0.3.7:443 (3)
  local    port 40001 (1), port 40002 (1), port 40003 (1)
  sockets  fd 17    10.0.7.2:40001 > 10.0.3.7:443                 >= 2 h 13 min  drained
           fd 18    10.0.7.2:40002 > 10.0.3.7:443                 >= 1 h 56 min  drained
           fd 19    10.0.7.2:40003 > 10.0.3.7:443                 >= 1 min 43 s  eof_unread
  clear    ss -K state close-wait 'sport = :40001 or sport = :40002 or sport = :40003'
           (ends the connections; a descriptor stays until its process closes it)
";
    assert!(page.starts_with(expected), "{page}");
}

#[test]
fn no_name_can_break_a_line() {
    let mut world = World::untraced();
    let mut held = holder(1, 7, 17);
    held.comm = Comm::new(b"\x1b[2J\n\xff");
    world.look(&[row(1, 70)], &[held]);
    let mut process = process(7, held.start);
    process.cmdline = Some("a\nb\u{202e}\u{1b}[31m".into());
    process.unit = Some("\r.service".into());
    world.feed(Event::Process(Box::new(process)));
    let report = world.watch.sights.report(&world.tracker, world.now);
    world.watch.report = report;
    let page = text(&world);
    assert!(!page.contains(['\u{1b}', '\r', '\u{202e}']), "{page}");
    let starts = page
        .lines()
        .filter(|line| !line.starts_with("  ") && !line.is_empty());
    assert_eq!(starts.count(), 2, "a headline and a leak: {page}");
}

#[test]
fn the_end_is_told_even_of_nothing() {
    let mut world = World::untraced();
    world.look(&[], &[]);
    assert_eq!(
        text(&world),
        "13:46:40 UTC  no CLOSE_WAIT for longer than 60 s\n"
    );
    let end = End {
        time: world.now,
        records: 0,
        lost: 0,
        mptcp: 0,
    };
    world.feed(Event::End(end));
    assert!(
        world.watch.look(&world.tracker).is_none(),
        "no look, no report"
    );
}
