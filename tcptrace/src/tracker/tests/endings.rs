//! How TIME_WAIT ends: by the timer, by who took it away, by what comes next.

use super::*;

/// How a TIME_WAIT ends that is taken away at 1000 ms with these on the stack, and when that is told.
fn ending_by(callers: &[Caller]) -> (String, bool) {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.feed(world.done_by(1000, client(), 400, callers));
    let at_once = !world.ends.is_empty();
    world.feed(tick(1050));
    assert_eq!(world.ends.len(), 1);
    assert!(world.ends[0].contains("entered 400, dwell 600, fin_wait2 100, rearmed no"));
    world.assert_empty();
    let ending = world.ends[0].split([' ', ',']).nth(2).unwrap();
    (ending.to_owned(), at_once)
}

#[test]
fn whoever_took_the_timer_away_tells_the_ending() {
    use Caller::{Abort, Connect, Connect6, Purge, Receive, Receive6, Segment};
    for (callers, ending, at_once) in [
        (&[Connect][..], "reused", true),
        (&[Connect6], "reused", true),
        (&[Purge], "namespace_gone", true),
        (&[Abort], "aborted", true),
        (&[Receive], "reopened", true),
        (&[Receive6], "reopened", true),
        // A segment may only have started the minute again.
        (&[Segment], "reset", false),
        (&[Segment, Receive], "reset", false),
        (&[Segment, Receive6], "reset", false),
        // On loopback the connecting process carries its SYN all the way to the receiver.
        (&[Connect, Receive], "reused", true),
        // `ss -K` can run in softirq's shadow, and the other way round.
        (&[Abort, Receive], "aborted", true),
        (&[Purge, Abort], "namespace_gone", true),
        (&[], "unknown", false),
    ] {
        assert_eq!(
            ending_by(callers),
            (ending.to_owned(), at_once),
            "{callers:?}"
        );
    }
}

#[test]
fn an_expired_timer_is_expired_whoever_ran() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.feed(world.done_by(60_400, client(), 400, &[Caller::Connect, Caller::Receive]));
    assert!(world.ends[0].contains("expired"), "{:?}", world.ends);
    world.assert_empty();
}

#[test]
fn a_jiffy_before_its_time_is_early() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.feed(world.done(60_396, client(), TimeWaitState, 400));
    world.assert_ends(&[]);
    world.feed(tick(60_446));
    assert!(world.ends[0].contains("unknown"), "{:?}", world.ends);
}

#[test]
fn a_timer_that_starts_again_3_us_later_has_not_ended() {
    for callers in [&[Caller::Segment][..], &[]] {
        let mut world = World::new();
        world.reach_time_wait(client());
        world.forget_told();
        world.feed(world.done_by(1000, client(), 400, callers));
        let Event::TimeWaitArmed(start) = world.armed(1000, client(), TimeWaitState) else {
            unreachable!()
        };
        world.feed(Event::TimeWaitArmed(TimeWait {
            time: start.time + 3000,
            ..start
        }));
        assert_eq!(world.tracker.unexplained, 0);
        world.feed(tick(5000));
        world.assert_changes(&[]);
        world.assert_ends(&[]);
        assert_eq!(world.tracker.len(), 1);
        world.feed(world.done(61_100, client(), TimeWaitState, 1000));
        assert_eq!(world.ends.len(), 1);
        world.assert_empty();
    }
}

#[test]
fn an_early_end_is_kept_back_for_50_ms_of_event_time() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.forget_told();
    world.feed(world.done_by(1000, client(), 400, &[Caller::Segment]));
    assert_eq!(world.tracker.needs().tick_by, Some(ns(1050)));
    let other = socket(5, ("10.0.0.1", 1), ("10.0.0.9", 2));
    world.feed(change(1049, other, SynSent, Established));
    world.assert_ends(&[]);
    world.feed(change(1050, other, Established, CloseWait));
    // Told before what made time go on, with its own time.
    world.assert_changes(&[
        "5 1049 SYN_SENT>ESTABLISHED, nobody",
        "1 1000 TIME_WAIT>CLOSE after 600, curl via connect",
        "5 1050 ESTABLISHED>CLOSE_WAIT after 1, nobody",
    ]);
    world.assert_ends(&[
        "1 1000 reset, entered 400, dwell 600, fin_wait2 100, rearmed no, curl via connect",
    ]);
    assert_eq!(world.tracker.needs().tick_by, None);
}

#[test]
fn a_tick_or_the_end_of_the_trace_release_it_as_well() {
    for release in [tick(1050), end(1001)] {
        let mut world = World::new();
        world.reach_time_wait(client());
        world.feed(world.done_by(1000, client(), 400, &[Caller::Segment]));
        world.feed(tick(1049));
        assert!(world.ends.is_empty());
        world.feed(release);
        assert_eq!(world.ends.len(), 1);
        world.assert_empty();
    }
}

/// Ends without evidence, at 1000 ms.
fn unexplained() -> World {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.feed(world.done_by(1000, client(), 400, &[]));
    world.assert_ends(&[]);
    world.forget_told();
    world
}

/// Another socket with the same addresses and ports.
fn successor() -> Socket {
    Socket {
        cookie: 77,
        ..client()
    }
}

#[test]
fn without_evidence_a_connect_on_the_same_pair_reused_it() {
    let mut world = unexplained();
    let unbound = Socket {
        tuple: Tuple {
            local_port: 0,
            ..client().tuple
        },
        ..successor()
    };
    world.feed(change(1000, unbound, Close, SynSent).by(curl()));
    world.assert_ends(&[]);
    world.feed(change(1001, successor(), SynSent, Established));
    world.assert_ends(&[
        "1 1000 reused, entered 400, dwell 600, fin_wait2 100, rearmed no, curl via connect",
    ]);
    assert_eq!(world.tracker.unexplained, 0);
}

#[test]
fn without_evidence_a_failed_connect_on_the_same_pair_reused_it() {
    let mut world = unexplained();
    world.feed(change(1001, successor(), SynSent, Close).error(libc::ECONNREFUSED));
    assert!(world.ends[0].contains("reused"), "{:?}", world.ends);
    world.feed(tick(1050));
    world.assert_empty();
}

#[test]
fn without_evidence_a_syn_on_the_same_pair_reopened_it() {
    let mut world = unexplained();
    world.feed(change(1001, successor(), Listen, SynRecv).no_socket());
    world.assert_ends(&[
        "1 1000 reopened, entered 400, dwell 600, fin_wait2 100, rearmed no, curl via connect",
    ]);
    assert_eq!(world.tracker.unexplained, 0);
}

#[test]
fn a_socket_of_another_pair_explains_nothing() {
    let other_port = socket(77, ("10.0.0.1", 40_001), ("10.0.0.2", 80));
    let other_netns = Socket {
        netns: NETNS + 1,
        ..successor()
    };
    for other in [other_port, other_netns, server()] {
        let mut world = unexplained();
        world.feed(change(1001, other, SynSent, Established));
        world.feed(change(1002, other, Established, Close));
        world.assert_ends(&[]);
        world.feed(tick(1050));
        assert!(world.ends[0].contains("unknown"), "{:?}", world.ends);
        world.assert_empty();
    }
}

#[test]
fn what_opens_50_ms_later_explains_nothing() {
    let mut world = unexplained();
    world.feed(change(1051, successor(), SynSent, Established));
    assert!(world.ends[0].contains("unknown"), "{:?}", world.ends);
}

#[test]
fn evidence_is_not_overruled_by_what_comes_next() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.feed(world.done_by(1000, client(), 400, &[Caller::Segment]));
    world.feed(change(1001, successor(), SynSent, Established));
    world.feed(tick(1050));
    assert!(world.ends[0].contains("reset"), "{:?}", world.ends);
}

/// An end, a start that was lost, and another end.
#[test]
fn a_second_end_replaces_the_first() {
    use Caller::{Connect, Segment};
    for first in [&[][..], &[Segment]] {
        for (second, ending) in [
            (&[][..], "unknown"),
            (&[Segment], "reset"),
            (&[Connect], "reused"),
        ] {
            let mut world = World::new();
            world.reach_time_wait(client());
            world.feed(world.done_by(1000, client(), 400, first));
            world.feed(world.done_by(1020, client(), 1000, second));
            world.feed(tick(1050));
            world.feed(tick(1070));
            assert_eq!(world.ends.len(), 1, "{first:?}, {second:?}");
            assert!(
                world.ends[0].starts_with(&format!("1 1020 {ending}")),
                "{:?}",
                world.ends
            );
            world.assert_empty();
        }
        // The second start is not lost.
        let mut world = World::new();
        world.reach_time_wait(client());
        world.feed(world.done_by(1000, client(), 400, first));
        world.feed(world.done_by(1020, client(), 1000, &[]));
        world.feed(world.armed(1020, client(), TimeWaitState));
        world.feed(world.done(61_100, client(), TimeWaitState, 1020));
        assert!(world.ends[0].contains("expired"), "{:?}", world.ends);
        world.assert_empty();
    }
}

#[test]
fn an_end_whose_beginning_was_not_seen_is_a_bound_without_a_stamp() {
    let mut world = World::new().without_stamps();
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.assert_changes(&["1 60500 TIME_WAIT>CLOSE, nobody"]);
    world.assert_ends(&["1 60500 expired, entered 400, dwell at least 60100, rearmed ?, nobody"]);
    world.assert_empty();
}

#[test]
fn an_end_whose_beginning_was_not_seen_is_exact_with_a_stamp() {
    let mut world = World::new();
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.assert_changes(&["1 60500 TIME_WAIT>CLOSE after 60100, nobody"]);
    world.assert_ends(&["1 60500 expired, entered 400, dwell 60100, rearmed no, nobody"]);
    world.assert_empty();
}

#[test]
fn a_restart_of_one_whose_beginning_was_not_seen_is_no_entry() {
    let mut world = World::new();
    let stamp = world.stamp(400);
    let cancel = TimeWait {
        callers: Caller::Segment.bit(),
        ..world.timer(10_400, client(), TimeWaitState, (400, 60_000))
    };
    let start = TimeWait {
        entry_stamp: stamp,
        ..world.timer(10_400, client(), TimeWaitState, (10_400, 60_000))
    };
    world.feed(Event::TimeWaitDone(cancel));
    world.feed(Event::TimeWaitArmed(start));
    world.assert_changes(&[]);
    world.feed(Event::TimeWaitDone(TimeWait {
        entry_stamp: stamp,
        ..world.timer(70_500, client(), TimeWaitState, (10_400, 60_000))
    }));
    world.assert_ends(&["1 70500 expired, entered 400, dwell 70100, rearmed yes, nobody"]);
    world.assert_empty();
}

#[test]
fn function_probes_do_not_take_a_restart_for_a_making() {
    // Only a making has no timer yet.
    let mut world = World::with_probes(Probes::Functions).without_stamps();
    world.feed(world.armed(10_400, client(), TimeWaitState));
    world.feed(world.done(70_500, client(), TimeWaitState, 10_400));
    world.assert_ends(&["1 70500 expired, entered 10400, dwell at least 60100, rearmed ?, nobody"]);
    world.assert_empty();
}

/// FIN_WAIT2, and then a close that made no timewait socket.
fn skipped(world: &mut World, cookie: u64) {
    let socket = socket(
        cookie,
        ("10.0.0.1", 40_000 + cookie as u16),
        ("10.0.0.2", 80),
    );
    world.reach_fin_wait2(socket);
    world.forget_told();
    world.feed(change(400, socket, FinWait2, Close).no_socket());
}

#[test]
fn a_close_without_timewait_socket_was_skipped_if_the_kernel_had_too_many() {
    let mut world = World::new();
    world.feed(overflow(0, 70));
    world.feed(overflow(350, 71));
    skipped(&mut world, 1);
    world.assert_changes(&["1 400 FIN_WAIT2>CLOSE after 100, curl via connect"]);
    world.assert_ends(&[
        "1 400 skipped, entered ?, dwell 0, fin_wait2 100, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn what_overflowed_before_the_trace_explains_nothing() {
    let mut world = World::new();
    world.feed(overflow(0, 70));
    skipped(&mut world, 1);
    world.assert_ends(&[]);
}

#[test]
fn each_count_explains_one() {
    let mut world = World::new();
    world.feed(overflow(0, 0));
    world.feed(overflow(350, 2));
    for cookie in 1..=3 {
        skipped(&mut world, cookie);
        assert_eq!(
            world.ends.len(),
            usize::from(cookie <= 2),
            "socket {cookie}"
        );
        world.forget_told();
    }
    world.feed(overflow(450, 3));
    world.feed(overflow(460, 3));
    skipped(&mut world, 4);
    assert_eq!(world.ends.len(), 1);
    world.forget_told();
    skipped(&mut world, 5);
    assert_eq!(world.ends.len(), 0);
}

#[test]
fn crossing_fins_can_be_skipped_and_another_namespaces_count_does_not_matter() {
    let mut world = World::new();
    for count in [0, 1] {
        world.feed(Event::Overflow {
            time: ns(0),
            netns: NETNS + 1,
            count,
        });
    }
    skipped(&mut world, 1);
    world.assert_ends(&[]);
    world.feed(overflow(0, 0));
    world.feed(overflow(0, 1));
    world.feed(change(500, client(), FinWait1, Closing));
    world.feed(change(510, client(), Closing, Close));
    world.assert_ends(&["1 510 skipped, entered ?, dwell 0, rearmed no, nobody"]);
}

#[test]
fn a_reset_is_not_skipped() {
    let mut world = World::new();
    world.feed(overflow(0, 0));
    world.feed(overflow(1, 1));
    world.reach_fin_wait2(client());
    world.feed(change(400, client(), FinWait2, Close).error(libc::ECONNRESET));
    world.feed(change(500, server(), LastAck, Close));
    world.assert_ends(&[]);
}

#[test]
fn after_lost_records_nothing_is_skipped() {
    let mut world = World::new();
    world.feed(overflow(0, 0));
    world.feed(overflow(1, 1));
    world.feed(lost(2));
    skipped(&mut world, 1);
    world.assert_ends(&[]);
    world.assert_changes(&[]);
}

#[test]
fn a_close_that_wants_no_time_wait_was_not_skipped() {
    let mut world = World::new();
    world.feed(overflow(0, 70));
    world.feed(overflow(350, 71));
    world.reach_fin_wait2(client());
    world.forget_told();
    world.feed(Transition {
        no_time_wait: true,
        ..change(400, client(), FinWait2, Close).no_socket()
    });
    world.assert_changes(&["1 400 FIN_WAIT2>CLOSE after 100, curl via connect"]);
    world.assert_ends(&[]);
    // The one that was skipped is still to come.
    skipped(&mut world, 3);
    world.assert_ends(&[
        "3 400 skipped, entered ?, dwell 0, fin_wait2 100, rearmed no, curl via connect",
    ]);
}
