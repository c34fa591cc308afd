//! Looks at what exists: sockets from before the tracer, and what is left after a loss.

use super::*;

#[test]
fn a_socket_from_before_has_its_holder_but_no_age() {
    let mut world = World::new();
    all(
        &mut world,
        10,
        &[row(11, client(), Established, 500), holder(500, curl())],
    );
    world.assert_changes(&[]);
    world.feed(change(100, client(), Established, CloseWait));
    world.feed(change(150, client(), CloseWait, LastAck).by(curl()));
    world.assert_changes(&[
        "1 100 ESTABLISHED>CLOSE_WAIT, curl via holder",
        "1 150 CLOSE_WAIT>LAST_ACK after 50, curl via holder",
    ]);
}

#[test]
fn of_several_holders_the_lowest_pid_speaks() {
    for holders in [[7, 8, 9], [9, 8, 7], [8, 9, 7]] {
        let mut world = World::new();
        let mut rows = vec![row(11, client(), Established, 500)];
        rows.extend(holders.map(|pid| holder(500, process(pid, &format!("pid{pid}")))));
        all(&mut world, 10, &rows);
        world.feed(change(100, client(), Established, CloseWait));
        world.assert_changes(&["1 100 ESTABLISHED>CLOSE_WAIT, pid7 via holder"]);
    }
}

#[test]
fn a_holder_does_not_overrule_what_records_told() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    all(
        &mut world,
        10,
        &[
            row(11, client(), SynSent, 500),
            holder(500, process(3, "init")),
        ],
    );
    world.forget_told();
    world.feed(change(20, client(), SynSent, Established));
    world.assert_changes(&["1 20 SYN_SENT>ESTABLISHED after 20, curl via connect"]);
}

#[test]
fn a_holder_of_a_file_that_was_not_asked_for_is_nobody() {
    let mut world = World::new();
    all(
        &mut world,
        10,
        &[row(11, client(), Established, 500), holder(501, curl())],
    );
    // A look's inodes are its own: they may be another file by now.
    world.feed(holder(500, curl()));
    world.feed(change(100, client(), Established, CloseWait));
    world.assert_changes(&["1 100 ESTABLISHED>CLOSE_WAIT, nobody"]);
}

#[test]
fn a_connection_nobody_has_accepted_is_its_listeners() {
    for state in [Established, CloseWait] {
        let mut world = World::new();
        // The order of rows does not matter.
        all(
            &mut world,
            10,
            &[
                row(11, server(), state, 0),
                row(11, listener(), Listen, 500),
                holder(500, nginx()),
            ],
        );
        world.feed(change(100, server(), state, Close).no_socket());
        assert!(
            world.changes[0].ends_with("nginx via listener"),
            "{:?}",
            world.changes
        );
    }
}

/// A connection to nginx that nobody has accepted.
fn waiting_for_accept() -> World {
    let mut world = World::new();
    world.feed(change(0, listener(), Close, Listen).by(nginx()));
    world.feed(change(10, server(), Listen, SynRecv).no_socket());
    world.feed(change(11, server(), SynRecv, Established).no_socket());
    world
}

#[test]
fn an_accept_that_was_not_seen_is_made_good_by_a_look() {
    // io_uring: the probes do not see it.
    let mut world = waiting_for_accept();
    all(
        &mut world,
        20,
        &[
            row(21, listener(), Listen, 500),
            row(21, server(), Established, 501),
            holder(501, process(80, "worker")),
        ],
    );
    world.forget_told();
    world.feed(change(30, server(), Established, CloseWait));
    world.assert_changes(&["2 30 ESTABLISHED>CLOSE_WAIT after 19, worker via holder"]);
}

#[test]
fn an_accepted_socket_whose_holder_cannot_be_seen_is_nobodys() {
    let mut world = waiting_for_accept();
    all(&mut world, 20, &[row(21, server(), Established, 501)]);
    world.forget_told();
    world.feed(change(30, server(), Established, CloseWait).no_socket());
    world.assert_changes(&["2 30 ESTABLISHED>CLOSE_WAIT after 19, nobody"]);
}

/// What came before the row, `accept()` too, is read after it.
#[test]
fn what_came_before_it_was_accepted_is_still_its_listeners() {
    let mut world = waiting_for_accept();
    world.forget_told();
    world.feed(look(20, Scope::All));
    world.feed(row(23, server(), CloseWait, 501));
    world.feed(holder(501, process(80, "worker")));
    world.feed(change(21, server(), Established, CloseWait).no_socket());
    world.feed(accept(22, server(), process(70, "acceptor")));
    world.feed(look_end(25, &[NETNS]));
    world.feed(change(30, server(), CloseWait, Close));
    world.assert_changes(&[
        "2 21 ESTABLISHED>CLOSE_WAIT after 10, nginx via listener",
        "2 30 CLOSE_WAIT>CLOSE after 9, acceptor via accept",
    ]);
}

#[test]
fn an_event_beats_the_row() {
    // The record lies in the buffer while the table is read.
    for (record_first, ms) in [(true, 12), (false, 12)] {
        let mut world = World::new();
        world.feed(change(0, client(), SynSent, Established));
        world.feed(look(10, Scope::All));
        let record = change(ms, client(), Established, CloseWait);
        if record_first {
            world.feed(record);
        }
        world.feed(row(11, client(), Established, 0));
        if !record_first {
            world.feed(record);
        }
        world.feed(look_end(15, &[NETNS]));
        world.forget_told();
        world.feed(change(20, client(), CloseWait, LastAck));
        world.assert_changes(&["1 20 CLOSE_WAIT>LAST_ACK after 8, nobody"]);
    }
}

/// A record is written before the look begins, and read after the row.
#[test]
fn a_record_that_says_the_same_as_the_row_says_when() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    world.feed(change(5, client(), SynSent, Established));
    world.forget_told();
    world.feed(look(10, Scope::All));
    world.feed(row(11, client(), CloseWait, 500));
    world.feed(change(9, client(), Established, CloseWait));
    world.feed(look_end(12, &[NETNS]));
    world.feed(change(50, client(), CloseWait, LastAck).by(curl()));
    world.assert_changes(&[
        "1 9 ESTABLISHED>CLOSE_WAIT after 4, curl via connect",
        "1 50 CLOSE_WAIT>LAST_ACK after 41, curl via connect",
    ]);
}

#[test]
fn a_connection_request_is_no_socket() {
    let mut world = World::new();
    all(&mut world, 10, &[row(11, server(), SynRecv, 0)]);
    world.assert_empty();
}

#[test]
fn a_row_without_a_cookie_is_nobody() {
    let mut world = World::new();
    let none = Socket {
        cookie: 0,
        ..client()
    };
    all(
        &mut world,
        10,
        &[
            row(11, none, Established, 500),
            time_wait_row(11, none, TimeWaitState, 1000),
        ],
    );
    world.assert_empty();
}

#[test]
fn a_socket_listed_twice_is_one_timewait_socket() {
    for rows in [
        [
            row(11, client(), FinWait2, 0),
            time_wait_row(12, client(), TimeWaitState, 59_990),
        ],
        [
            time_wait_row(11, client(), TimeWaitState, 59_990),
            row(12, client(), FinWait2, 0),
        ],
    ] {
        let mut world = World::new();
        world.feed(look(10, Scope::All));
        world.feed_all(rows);
        world.feed(world.armed(11, client(), TimeWaitState));
        world.feed(change(11, client(), FinWait2, Close));
        world.feed(look_end(15, &[NETNS]));
        assert_eq!(world.tracker.len(), 1);
        world.feed(world.done(60_100, client(), TimeWaitState, 11));
        assert_eq!(world.ends.len(), 1);
        world.assert_empty();
    }
}

#[test]
fn a_time_wait_from_before_is_a_bound_until_its_stamp_is_seen() {
    for stamps in [true, false] {
        let mut world = World::new();
        world.stamps = stamps;
        all(
            &mut world,
            10_000,
            &[time_wait_row(10_001, client(), TimeWaitState, 50_399)],
        );
        let since: Vec<_> = world
            .tracker
            .running()
            .map(|it| at(it.since.unwrap()))
            .collect();
        assert_eq!(since, ["400"]);
        world.feed(world.done(60_500, client(), TimeWaitState, 400));
        world.assert_ends(&[if stamps {
            "1 60500 expired, entered 400, dwell 60100, rearmed no, nobody"
        } else {
            "1 60500 expired, entered 400, dwell at least 60100, rearmed ?, nobody"
        }]);
        world.assert_empty();
    }
}

#[test]
fn a_fin_wait2_from_before_enters_time_wait_later() {
    let mut world = World::new();
    all(
        &mut world,
        10,
        &[time_wait_row(11, client(), FinWait2, 59_000)],
    );
    assert!(world.tracker.needs().time_wait_look);
    time_waits(
        &mut world,
        1000,
        &[time_wait_row(1001, client(), TimeWaitState, 59_599)],
    );
    world.assert_changes(&["1 600 FIN_WAIT2>TIME_WAIT, nobody, late"]);
    world.feed(world.done(60_700, client(), TimeWaitState, 600));
    world.assert_empty();
}

/// A connection whose timewait socket is made while the table is read, so that the look shows it before
/// its records are read.
fn raced(substate: State, read_before: usize) -> World {
    let mut world = World::new();
    let socket = client();
    let made = world.armed(400, socket, substate);
    let records: [Event; 6] = [
        change(0, socket, Close, SynSent).by(curl()).into(),
        change(100, socket, SynSent, Established).into(),
        change(200, socket, Established, FinWait1).by(curl()).into(),
        change(300, socket, FinWait1, FinWait2).no_socket().into(),
        made,
        change(400, socket, FinWait2, Close).no_socket().into(),
    ];
    world.feed_all(records[..read_before].iter().cloned());
    world.feed(look(390, Scope::All));
    world.feed(time_wait_row(401, socket, substate, 59_999));
    world.feed_all(records[read_before..].iter().cloned());
    world.feed(look_end(405, &[NETNS]));
    world
}

#[test]
fn a_look_that_is_faster_than_the_records_changes_nothing() {
    for substate in [TimeWaitState, FinWait2] {
        let mut calm = World::new();
        if substate == TimeWaitState {
            calm.reach_time_wait(client());
        } else {
            calm.reach_fin_wait2(client());
            calm.feed(calm.armed(400, client(), FinWait2));
            calm.feed(change(400, client(), FinWait2, Close).no_socket());
        }
        calm.feed(calm.done(60_500, client(), TimeWaitState, 400));
        for read_before in 0..=6 {
            let mut world = raced(substate, read_before);
            world.feed(world.done(60_500, client(), TimeWaitState, 400));
            assert_eq!(
                world.changes, calm.changes,
                "{substate:?}, {read_before} read before"
            );
            assert_eq!(
                world.ends, calm.ends,
                "{substate:?}, {read_before} read before"
            );
            world.assert_empty();
        }
    }
}
