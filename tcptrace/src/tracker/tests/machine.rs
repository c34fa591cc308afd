//! The true machine: what the kernel says, and what it keeps silent about.

use super::*;

#[test]
fn a_whole_connection_seen_from_both_sides() {
    let mut world = World::new();
    world.feed(change(0, listener(), Close, Listen).by(nginx()));
    world.reach_orphan(client());
    world.feed_all([
        change(301, server(), Listen, SynRecv).no_socket(),
        change(302, server(), SynRecv, Established).no_socket(),
    ]);
    world.feed(accept(303, server(), nginx()));
    world.feed_all([
        change(304, server(), Established, CloseWait),
        change(310, server(), CloseWait, LastAck).by(nginx()),
        change(312, server(), LastAck, Close).no_socket(),
    ]);
    world.assert_changes(&[
        "9 0 CLOSE>LISTEN, nginx via listen",
        "1 0 CLOSE>SYN_SENT, curl via connect",
        "1 100 SYN_SENT>ESTABLISHED after 100, curl via connect",
        "1 200 ESTABLISHED>FIN_WAIT1 after 100, curl via connect",
        "1 300 FIN_WAIT1>FIN_WAIT2 after 100, curl via connect",
        "2 301 LISTEN>SYN_RECV, nginx via listener",
        "2 302 SYN_RECV>ESTABLISHED after 1, nginx via listener",
        "2 304 ESTABLISHED>CLOSE_WAIT after 2, nginx via accept",
        "2 310 CLOSE_WAIT>LAST_ACK after 6, nginx via accept",
        "2 312 LAST_ACK>CLOSE after 2, nginx via accept",
    ]);
}

#[test]
fn an_orphan_enters_time_wait_when_its_timer_starts_again() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    // The peer's FIN: the timer moves to another bucket, the substate is TIME_WAIT already.
    world.feed(Event::TimeWaitDone(TimeWait {
        entry_stamp: world.stamp(600),
        callers: Caller::Segment.bit(),
        ..world.timer(600, client(), TimeWaitState, (300, 60_000))
    }));
    world.feed(world.armed(600, client(), TimeWaitState));
    world.assert_changes(&["1 600 FIN_WAIT2>TIME_WAIT after 300, curl via connect"]);
    world.feed(world.done(60_700, client(), TimeWaitState, 600));
    world.assert_changes(&["1 60700 TIME_WAIT>CLOSE after 60100, curl via connect"]);
    world.assert_ends(&[
        "1 60700 expired, entered 600, dwell 60100, fin_wait2 300, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn an_orphans_entry_is_told_late_by_a_look() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    assert!(world.tracker.needs().time_wait_look);
    world.feed(look(1000, Scope::Orphans));
    world.feed(time_wait_row(1001, client(), TimeWaitState, 59_599));
    world.feed(look_end(1002, &[NETNS]));
    world.assert_changes(&["1 600 FIN_WAIT2>TIME_WAIT after 300, curl via connect, late"]);
    assert!(
        !world.tracker.needs().time_wait_look,
        "nothing left to look for"
    );
    world.feed(look(2000, Scope::Orphans));
    world.feed(time_wait_row(2001, client(), TimeWaitState, 58_599));
    world.feed(look_end(2002, &[NETNS]));
    world.assert_changes(&[]);
    world.feed(world.done(60_700, client(), TimeWaitState, 600));
    world.assert_changes(&["1 60700 TIME_WAIT>CLOSE after 60100, curl via connect"]);
    world.assert_ends(&[
        "1 60700 expired, entered 600, dwell 60100, fin_wait2 300, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

/// The kernel says TIME_WAIT before it starts the timer anew.
#[test]
fn a_look_between_a_fin_and_its_timer_tells_nothing() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    // The FIN comes at 1800 ms. FIN_WAIT2 would have timed out at 60,300.
    let rows = [time_wait_row(1800, client(), TimeWaitState, 58_500)];
    all(&mut world, 1795, &rows);
    world.assert_changes(&[]);
    world.feed(world.done_by(1800, client(), 300, &[Caller::Segment]));
    world.feed(world.armed(1800, client(), TimeWaitState));
    world.assert_changes(&["1 1800 FIN_WAIT2>TIME_WAIT after 1500, curl via connect"]);
    world.feed(world.done(61_900, client(), TimeWaitState, 1800));
    world.assert_ends(&[
        "1 61900 expired, entered 1800, dwell 60100, fin_wait2 1500, rearmed no, curl via connect",
    ]);
}

/// One that began with the timer of FIN_WAIT2, as it seems, and really did.
#[test]
fn a_second_look_confirms_an_entry_right_after_fin_wait2() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    all(
        &mut world,
        400,
        &[time_wait_row(401, client(), TimeWaitState, 59_900)],
    );
    world.assert_changes(&[]);
    all(
        &mut world,
        650,
        &[time_wait_row(651, client(), TimeWaitState, 59_650)],
    );
    world.assert_changes(&["1 301 FIN_WAIT2>TIME_WAIT after 1, curl via connect, late"]);
}

#[test]
fn an_orphans_entry_is_told_late_by_the_stamp_at_its_end() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    world.feed(world.done(60_700, client(), TimeWaitState, 650));
    world.assert_changes(&[
        "1 650 FIN_WAIT2>TIME_WAIT after 350, curl via connect, late",
        "1 60700 TIME_WAIT>CLOSE after 60050, curl via connect",
    ]);
    world.assert_ends(&[
        "1 60700 expired, entered 650, dwell 60050, fin_wait2 350, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn an_orphan_whose_peer_never_closes_was_never_in_time_wait() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    world.feed(world.done(60_400, client(), FinWait2, 300));
    world.assert_changes(&["1 60400 FIN_WAIT2>CLOSE after 60100, curl via connect"]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn an_orphan_that_is_destroyed_was_never_in_time_wait() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    world.feed(world.done(1000, client(), FinWait2, 300));
    world.assert_changes(&[]);
    world.feed(tick(1050));
    world.assert_changes(&["1 1000 FIN_WAIT2>CLOSE after 700, curl via connect"]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn direct_entry_is_told_in_place_of_the_kernels_close() {
    let mut world = World::new();
    world.reach_time_wait(client());
    assert_eq!(
        world.changes.last().unwrap(),
        "1 400 FIN_WAIT2>TIME_WAIT after 100, curl via connect"
    );
    assert!(!world.changes.iter().any(|line| line.contains(">CLOSE,")));
    world.forget_told();
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.assert_changes(&["1 60500 TIME_WAIT>CLOSE after 60100, curl via connect"]);
    world.assert_ends(&[
        "1 60500 expired, entered 400, dwell 60100, fin_wait2 100, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn crossing_fins_lead_from_closing_to_time_wait() {
    let mut world = World::new();
    world.feed_all([
        change(200, client(), Established, FinWait1).by(curl()),
        change(210, client(), FinWait1, Closing).no_socket(),
    ]);
    world.feed(world.armed(220, client(), TimeWaitState));
    world.feed(change(220, client(), Closing, Close).no_socket());
    world.assert_changes(&[
        "1 200 ESTABLISHED>FIN_WAIT1, curl via close",
        "1 210 FIN_WAIT1>CLOSING after 10, curl via close",
        "1 220 CLOSING>TIME_WAIT after 10, curl via close",
    ]);
    world.feed(world.done(60_300, client(), TimeWaitState, 220));
    // No FIN_WAIT2 part: it was never in that state.
    world.assert_ends(&["1 60300 expired, entered 220, dwell 60080, rearmed no, curl via close"]);
    world.assert_empty();
}

#[test]
fn a_reset_in_fin_wait2_is_a_real_close() {
    let mut world = World::new();
    world.reach_fin_wait2(client());
    world.forget_told();
    world.feed(change(350, client(), FinWait2, Close).error(libc::ECONNRESET));
    world.assert_changes(&["1 350 FIN_WAIT2>CLOSE after 50, curl via connect, error 104"]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn a_close_without_a_timewait_socket_is_a_real_close() {
    // TCP_LINGER2 below 0.
    let mut world = World::new();
    world.reach_fin_wait2(client());
    world.forget_told();
    world.feed(change(350, client(), FinWait2, Close));
    world.assert_changes(&["1 350 FIN_WAIT2>CLOSE after 50, curl via connect"]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn time_in_a_state_is_unknown_when_its_beginning_was_not_seen() {
    let mut world = World::new();
    world.feed(change(10, client(), Established, CloseWait));
    // A record in between is missing: CLOSE_WAIT is not what was left.
    world.feed(change(30, client(), LastAck, Close));
    world.assert_changes(&[
        "1 10 ESTABLISHED>CLOSE_WAIT, nobody",
        "1 30 LAST_ACK>CLOSE, nobody",
    ]);
    world.assert_empty();
}

#[test]
fn an_exhausted_port_range_is_an_error_of_its_own() {
    let mut world = World::new();
    let unbound = socket(1, ("10.0.0.1", 0), ("10.0.0.2", 80));
    world.feed(change(0, unbound, Close, SynSent).by(curl()));
    world.feed(change(1, unbound, SynSent, Close).by(curl()));
    world.feed(change(10, client(), Close, SynSent).by(curl()));
    world.feed(change(11, client(), SynSent, Close).error(libc::ECONNREFUSED));
    world.assert_changes(&[
        "1 0 CLOSE>SYN_SENT, curl via connect",
        "1 1 SYN_SENT>CLOSE after 1, curl via connect, error 99",
        "1 10 CLOSE>SYN_SENT, curl via connect",
        "1 11 SYN_SENT>CLOSE after 1, curl via connect, error 111",
    ]);
    world.assert_empty();
}

#[test]
fn only_a_close_has_an_error() {
    let mut world = World::new();
    world.feed(change(0, client(), SynSent, Established).error(libc::ECONNRESET));
    world.assert_changes(&["1 0 SYN_SENT>ESTABLISHED, nobody"]);
}

#[test]
fn one_cookie_can_leave_several_timewait_sockets_behind() {
    // shutdown(), and connect() again on the same socket: the cookie stays, the port does not.
    let mut world = World::new();
    let again = socket(1, ("10.0.0.1", 40_001), ("10.0.0.2", 80));
    world.reach_time_wait(client());
    world.feed(change(1000, again, SynSent, Established));
    world.feed(change(1100, again, Established, FinWait1).by(curl()));
    world.feed(change(1200, again, FinWait1, FinWait2));
    world.feed(world.armed(1300, again, TimeWaitState));
    world.feed(change(1300, again, FinWait2, Close));
    assert_eq!(world.tracker.running().count(), 2);
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.feed(world.done(61_400, again, TimeWaitState, 1300));
    let entered: Vec<_> = world
        .ends
        .iter()
        .map(|end| end.contains("dwell 60100"))
        .collect();
    assert_eq!(entered, [true, true], "{:?}", world.ends);
    world.assert_empty();
}

#[test]
fn what_runs_is_shown_with_its_state_and_age() {
    let mut world = World::new();
    world.reach_orphan(client());
    let other = socket(3, ("10.0.0.1", 40_003), ("10.0.0.2", 80));
    world.reach_time_wait(other);
    let mut running: Vec<_> = world
        .tracker
        .running()
        .map(|it| {
            let since = it.since.map(at).unwrap();
            (it.socket.cookie, it.state, since, owner_text(it.owner))
        })
        .collect();
    running.sort_unstable_by_key(|it| it.0);
    let curl = "curl via connect".to_owned();
    assert_eq!(
        running,
        [
            (1, FinWait2, "300".to_owned(), curl.clone()),
            (3, TimeWaitState, "400".to_owned(), curl),
        ]
    );
}

#[test]
fn changes_carry_the_container_of_the_sockets_cgroup() {
    let id = "0123456789abcdef".repeat(4);
    let mut world = World::new();
    world.feed(Event::Cgroup {
        id: 5,
        path: format!("/system.slice/docker-{id}.scope").into(),
    });
    world.feed(change(0, client(), SynSent, Established).cgroup(5));
    // Softirq records may lack it: once known, it stays.
    world.feed(change(1, client(), Established, CloseWait).cgroup(0));
    world.assert_changes(&[
        &format!("1 0 SYN_SENT>ESTABLISHED, nobody, in {id}"),
        &format!("1 1 ESTABLISHED>CLOSE_WAIT after 1, nobody, in {id}"),
    ]);
}

/// Up to 6.12 a child is announced with its listener's cookie and without its peer.
#[test]
fn a_child_announced_as_its_listener_is_told_when_it_shows_who_it_is() {
    let mut world = World::new();
    world.feed(change(0, listener(), Close, Listen).by(nginx()));
    world.forget_told();
    world.feed(change(100, listener(), Listen, SynRecv).no_socket());
    world.assert_changes(&[]);
    world.feed(change(101, server(), SynRecv, Established).no_socket());
    world.assert_changes(&[
        "2 100 LISTEN>SYN_RECV, nginx via listener",
        "2 101 SYN_RECV>ESTABLISHED after 1, nginx via listener",
    ]);
    // The listener is what it was.
    world.feed(change(200, listener(), Listen, Close).by(nginx()));
    world.assert_changes(&["9 200 LISTEN>CLOSE after 200, nginx via listen"]);
    world.feed(change(300, server(), Established, Close));
    world.assert_empty();
}

#[test]
fn a_look_that_is_faster_than_the_records_of_a_child_takes_nothing_from_them() {
    let mut world = World::new();
    world.feed(look(100, Scope::All));
    world.feed(row(110, server(), Established, 5));
    world.feed(change(105, listener(), Listen, SynRecv).no_socket());
    world.feed(change(106, server(), SynRecv, Established).no_socket());
    world.assert_changes(&[
        "2 105 LISTEN>SYN_RECV, nobody",
        "2 106 SYN_RECV>ESTABLISHED after 1, nobody",
    ]);
}

#[test]
fn of_two_children_the_last_made_shows_itself_first() {
    let mut world = World::new();
    let late = socket(3, ("10.0.0.2", 80), ("10.0.0.1", 40_001));
    world.feed(change(100, listener(), Listen, SynRecv).no_socket());
    world.feed(change(150, listener(), Listen, SynRecv).no_socket());
    world.feed(change(151, server(), SynRecv, Established).no_socket());
    world.feed(change(160, late, SynRecv, Established).no_socket());
    world.assert_changes(&[
        "2 150 LISTEN>SYN_RECV, nobody",
        "2 151 SYN_RECV>ESTABLISHED after 1, nobody",
        "3 100 LISTEN>SYN_RECV, nobody",
        "3 160 SYN_RECV>ESTABLISHED after 60, nobody",
    ]);
    // One of another port, and one from long ago, are not theirs.
    let other = socket(4, ("10.0.0.2", 81), ("10.0.0.1", 40_002));
    world.feed(change(200, listener(), Listen, SynRecv).no_socket());
    world.feed(change(201, other, SynRecv, Established).no_socket());
    let much_later = socket(5, ("10.0.0.2", 80), ("10.0.0.1", 40_003));
    world.feed(change(1300, much_later, SynRecv, Established).no_socket());
    world.assert_changes(&[
        "4 201 SYN_RECV>ESTABLISHED, nobody",
        "5 1300 SYN_RECV>ESTABLISHED, nobody",
    ]);
}

/// The socket of a TIME_WAIT, told to connect once more, fails for want of a port.
#[test]
fn a_socket_that_fails_to_connect_again_does_not_end_its_time_wait() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.forget_told();
    world.feed(change(500, client(), Close, SynSent).by(curl()));
    world.feed(change(501, client(), SynSent, Close).by(curl()));
    world.assert_changes(&[
        "1 500 CLOSE>SYN_SENT, curl via connect",
        "1 501 SYN_SENT>CLOSE after 1, curl via connect",
    ]);
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.assert_changes(&["1 60500 TIME_WAIT>CLOSE after 60100, curl via connect"]);
    world.assert_empty();
}

/// `connect()` without a free port leaves the port and the error of the connection before as they were.
#[test]
fn what_a_connection_before_left_is_not_taken_for_the_new_ones() {
    let mut world = World::new();
    let reconnecting = Transition {
        stale_port: 40_000,
        ..change(
            500,
            socket(1, ("10.0.0.1", 0), ("10.0.0.2", 80)),
            Close,
            SynSent,
        )
        .by(curl())
        .error(libc::ECONNRESET)
    };
    let failing = change(501, client(), SynSent, Close).by(curl());
    world.feed(reconnecting);
    world.feed(failing.error(libc::ECONNRESET));
    world.assert_changes(&[
        "1 500 CLOSE>SYN_SENT, curl via connect",
        "1 501 SYN_SENT>CLOSE after 1, curl via connect, error 99",
    ]);
    // With another error, or another port, it is this connection's own.
    world.feed(reconnecting);
    world.feed(failing.error(libc::ECONNREFUSED));
    let other = socket(1, ("10.0.0.1", 40_001), ("10.0.0.2", 80));
    world.feed(reconnecting);
    world.feed(change(501, other, SynSent, Close).error(libc::ECONNRESET));
    world.assert_changes(&[
        "1 500 CLOSE>SYN_SENT, curl via connect",
        "1 501 SYN_SENT>CLOSE after 1, curl via connect, error 111",
        "1 500 CLOSE>SYN_SENT, curl via connect",
        "1 501 SYN_SENT>CLOSE after 1, curl via connect, error 104",
    ]);
    world.assert_empty();
}
