//! After lost records, or without probes for TIME_WAIT: what looks prove gone, and what a close was.

use super::*;

#[test]
fn what_two_looks_do_not_show_is_gone() {
    let mut world = World::new();
    world.feed(change(0, client(), SynSent, Established));
    world.feed(change(0, listener(), Close, Listen).by(nginx()));
    world.feed(lost(5));
    all(&mut world, 10, &[]);
    assert_eq!(world.tracker.len(), 2, "one look can miss a socket");
    all(&mut world, 20, &[]);
    world.forget_told();
    // Nothing is told of an end that nobody saw.
    world.assert_changes(&[]);
    world.assert_empty();
}

#[test]
fn a_socket_that_is_shown_again_is_not_gone() {
    let mut world = World::new();
    world.feed(change(0, client(), SynSent, Established));
    all(&mut world, 10, &[]);
    all(&mut world, 20, &[row(21, client(), Established, 0)]);
    all(&mut world, 30, &[]);
    assert_eq!(world.tracker.len(), 1);
    all(&mut world, 40, &[]);
    world.assert_empty();
}

#[test]
fn what_happened_during_a_look_is_not_judged_by_it() {
    let mut world = World::new();
    all(&mut world, 10, &[]);
    world.feed(look(20, Scope::All));
    world.feed(change(22, client(), SynSent, Established));
    world.feed(look_end(25, &[NETNS]));
    all(&mut world, 30, &[]);
    assert_eq!(world.tracker.len(), 1, "missed once");
    all(&mut world, 40, &[]);
    world.assert_empty();
}

/// A scan that was under way when records were lost may have shown what has changed unseen since.
#[test]
fn a_look_that_records_were_lost_in_makes_up_for_nothing() {
    let mut world = World::new();
    world.feed(look(10, Scope::All));
    world.feed(lost(12));
    world.feed(look_end(15, &[NETNS]));
    assert!(!world.tracker.sees_ends());
    all(&mut world, 20, &[]);
    assert!(!world.tracker.sees_ends());
    all(&mut world, 30, &[]);
    assert!(world.tracker.sees_ends());
}

#[test]
fn a_namespace_that_was_not_looked_at_is_not_judged() {
    let mut world = World::new();
    world.feed(change(0, client(), SynSent, Established));
    all_of(&mut world, 10, &[], &[NETNS + 1]);
    all_of(&mut world, 20, &[], &[]);
    all_of(&mut world, 30, &[], &[NETNS]);
    assert_eq!(
        world.tracker.len(),
        1,
        "one look saw nothing of it, the others did not look"
    );
    all_of(&mut world, 40, &[], &[NETNS]);
    world.assert_empty();
}

#[test]
fn looks_at_time_wait_judge_no_connection() {
    let mut world = World::new();
    world.feed(change(0, client(), SynSent, Established));
    for ms in [10, 20, 30] {
        time_waits(&mut world, ms, &[]);
    }
    assert_eq!(world.tracker.len(), 1);
}

#[test]
fn a_time_wait_whose_end_was_lost_ends_unseen() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.forget_told();
    world.feed(lost(30_000));
    all(&mut world, 61_000, &[]);
    all(&mut world, 62_000, &[]);
    // It is not known when.
    world.assert_changes(&[]);
    world.assert_ends(&[
        "1 62005 unknown, entered 400, dwell ?, fin_wait2 100, rearmed ?, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn an_orphan_whose_end_was_lost_says_nothing() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    world.feed(lost(30_000));
    all(&mut world, 61_000, &[]);
    all(&mut world, 62_000, &[]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn an_end_that_is_kept_back_is_not_told_twice() {
    let mut world = World::new();
    world.reach_time_wait(client());
    world.feed(world.done_by(1000, client(), 400, &[Caller::Segment]));
    all(&mut world, 1010, &[]);
    all(&mut world, 1020, &[]);
    all(&mut world, 1030, &[]);
    world.assert_ends(&[]);
    world.feed(tick(1050));
    assert!(
        world.ends.len() == 1 && world.ends[0].contains("reset"),
        "{:?}",
        world.ends
    );
    world.assert_empty();
}

#[test]
fn after_a_loss_a_look_corrects_the_state() {
    let mut world = World::new();
    world.feed(change(0, client(), SynSent, Established));
    world.feed(lost(5));
    all(&mut world, 10, &[row(11, client(), CloseWait, 0)]);
    world.forget_told();
    world.feed(change(20, client(), CloseWait, LastAck));
    world.assert_changes(&["1 20 CLOSE_WAIT>LAST_ACK, nobody"]);
}

/// After a loss, FIN_WAIT2 is left for CLOSE: perhaps for a timewait socket.
fn uncertain() -> World {
    let mut world = World::new();
    world.feed(lost(1));
    world.reach_fin_wait2(client());
    world.forget_told();
    world.feed(change(400, client(), FinWait2, Close).no_socket());
    world.assert_changes(&[]);
    assert_eq!(world.tracker.uncertain, 1);
    world
}

#[test]
fn an_uncertain_close_was_one_if_no_timewait_socket_is_found() {
    let mut world = uncertain();
    all(&mut world, 500, &[]);
    world.assert_changes(&[]);
    all(&mut world, 600, &[]);
    world.assert_changes(&["1 400 FIN_WAIT2>CLOSE after 100, curl via connect, late"]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn an_uncertain_close_was_none_if_a_timewait_socket_is_found() {
    let mut world = uncertain();
    all(
        &mut world,
        500,
        &[time_wait_row(501, client(), TimeWaitState, 59_899)],
    );
    assert_eq!(world.tracker.uncertain, 0);
    world.assert_changes(&["1 400 FIN_WAIT2>TIME_WAIT after 100, curl via connect, late"]);
    all(
        &mut world,
        600,
        &[time_wait_row(601, client(), TimeWaitState, 59_799)],
    );
    world.assert_changes(&[]);
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.assert_ends(&[
        "1 60500 expired, entered 400, dwell 60100, fin_wait2 100, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn an_uncertain_close_of_an_unknown_socket_is_told_all_the_same() {
    let mut world = World::new();
    world.feed(lost(1));
    world.feed(change(400, client(), FinWait2, Close).no_socket());
    all(&mut world, 500, &[]);
    all(&mut world, 600, &[]);
    world.assert_changes(&["1 400 FIN_WAIT2>CLOSE, nobody, late"]);
    world.assert_empty();
}

#[test]
fn a_close_with_an_error_is_certain_even_after_a_loss() {
    let mut world = World::new();
    world.feed(lost(1));
    world.feed(change(10, client(), FinWait2, Close).error(libc::ECONNRESET));
    world.feed(change(20, server(), LastAck, Close));
    world.assert_changes(&[
        "1 10 FIN_WAIT2>CLOSE, nobody, error 104",
        "2 20 LAST_ACK>CLOSE, nobody",
    ]);
    world.assert_empty();
}

#[test]
fn a_second_loss_needs_two_more_looks() {
    let mut world = uncertain();
    world.feed(lost(450));
    all(&mut world, 500, &[]);
    world.feed(lost(550));
    all(&mut world, 600, &[]);
    world.forget_told();
    assert!(world.tracker.gap, "one look since the last loss");
    all(&mut world, 700, &[]);
    assert!(!world.tracker.gap);
    world.reach_fin_wait2(server());
    world.forget_told();
    world.feed(change(800, server(), FinWait2, Close));
    world.assert_changes(&["2 800 FIN_WAIT2>CLOSE after 500, curl via connect"]);
}

#[test]
fn every_loss_is_told() {
    let mut world = World::new();
    world.feed(lost(1));
    world.feed(lost(2));
    assert_eq!(world.lost, 2);
}

/// Neither kind of probes could be loaded.
fn without_probes() -> World {
    let mut world = World::with_probes(Probes::None);
    world.reach_fin_wait2(client());
    world.forget_told();
    world.feed(change(400, client(), FinWait2, Close).no_socket());
    world.assert_changes(&[]);
    assert!(world.tracker.needs().time_wait_look);
    world
}

#[test]
fn without_probes_looks_show_time_wait_begin_and_end() {
    let mut world = without_probes();
    time_waits(
        &mut world,
        1000,
        &[time_wait_row(1001, client(), FinWait2, 59_399)],
    );
    world.assert_changes(&[]);
    time_waits(
        &mut world,
        2000,
        &[time_wait_row(2001, client(), TimeWaitState, 59_899)],
    );
    world.assert_changes(&["1 1900 FIN_WAIT2>TIME_WAIT after 1600, curl via connect, late"]);
    time_waits(&mut world, 3000, &[]);
    world.assert_ends(&[]);
    time_waits(&mut world, 4000, &[]);
    // At 1001 it was not there yet, at 2001 it still was; two jiffies at 250 Hz for the timer.
    world.assert_changes(&[
        "1 4005 TIME_WAIT>CLOSE after 2105, curl via connect, late off by up to 2911",
    ]);
    world.assert_ends(&[
        "1 4005 unknown, entered 1900, dwell 2105 off by up to 2911, fin_wait2 1600, rearmed ?, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn without_probes_what_outlives_its_timer_has_expired() {
    let mut world = without_probes();
    let shown = |ms, left| time_wait_row(ms, client(), TimeWaitState, left);
    time_waits(&mut world, 500, &[shown(501, 59_899)]);
    time_waits(&mut world, 60_500, &[shown(60_501, 0)]);
    time_waits(&mut world, 60_750, &[]);
    time_waits(&mut world, 61_000, &[]);
    world.assert_ends(&[
        "1 61005 expired, entered 400, dwell 60605 off by up to 512, fin_wait2 100, rearmed ?, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn without_probes_a_minute_that_starts_again_is_seen_in_the_timer() {
    let mut world = without_probes();
    let shown = |ms, left| time_wait_row(ms, client(), TimeWaitState, left);
    time_waits(&mut world, 500, &[shown(501, 59_899)]);
    time_waits(&mut world, 10_500, &[shown(10_501, 59_999)]);
    time_waits(&mut world, 10_750, &[]);
    time_waits(&mut world, 11_000, &[]);
    world.assert_ends(&[
        "1 11005 unknown, entered 400, dwell 10605 off by up to 512, fin_wait2 100, rearmed yes, curl via connect",
    ]);
}

#[test]
fn without_probes_a_time_wait_from_before_is_a_bound() {
    let mut world = World::with_probes(Probes::None);
    let shown = |ms| time_wait_row(ms, client(), TimeWaitState, 30_000);
    time_waits(&mut world, 0, &[shown(1)]);
    time_waits(&mut world, 250, &[]);
    time_waits(&mut world, 500, &[]);
    world.assert_changes(&["1 505 TIME_WAIT>CLOSE, nobody, late off by up to 512"]);
    world.assert_ends(&[
        "1 505 unknown, entered -29999, dwell at least 30504 off by up to 512, rearmed ?, nobody",
    ]);
}

#[test]
fn without_probes_a_direct_entry_is_told_when_a_look_shows_it() {
    let mut world = without_probes();
    time_waits(
        &mut world,
        1000,
        &[time_wait_row(1001, client(), TimeWaitState, 59_399)],
    );
    world.assert_changes(&["1 400 FIN_WAIT2>TIME_WAIT after 100, curl via connect, late"]);
}

#[test]
fn without_probes_a_look_can_be_faster_than_the_close() {
    let mut world = World::with_probes(Probes::None);
    world.reach_fin_wait2(client());
    world.forget_told();
    world.feed(look(399, Scope::Orphans));
    world.feed(time_wait_row(401, client(), TimeWaitState, 59_999));
    world.feed(change(400, client(), FinWait2, Close).no_socket());
    world.feed(look_end(405, &[NETNS]));
    world.assert_changes(&["1 400 FIN_WAIT2>TIME_WAIT after 100, curl via connect, late"]);
    assert_eq!(world.tracker.running().count(), 1);
}

#[test]
fn without_probes_a_real_close_is_told_when_looks_do_not_find_it() {
    let mut world = without_probes();
    time_waits(&mut world, 1000, &[]);
    world.assert_changes(&[]);
    time_waits(&mut world, 2000, &[]);
    world.assert_changes(&["1 400 FIN_WAIT2>CLOSE after 100, curl via connect, late"]);
    world.assert_empty();
}

#[test]
fn without_probes_a_loss_does_not_shorten_or_stretch_the_wait() {
    for looks_before in [0, 10] {
        for loss_before_close in [true, false] {
            let mut world = World::with_probes(Probes::None);
            for ms in 0..looks_before {
                time_waits(&mut world, ms, &[]);
            }
            world.reach_fin_wait2(client());
            if loss_before_close {
                world.feed(lost(350));
            }
            world.feed(change(400, client(), FinWait2, Close).no_socket());
            world.feed(lost(450));
            time_waits(&mut world, 500, &[]);
            assert_eq!(world.tracker.len(), 1, "{looks_before} {loss_before_close}");
            all(&mut world, 600, &[]);
            world.assert_empty();
        }
    }
}
