//! How long TIME_WAIT lasted, from jiffies and stamps.

use super::*;

/// The peer's FIN comes at 600 ms and moves the timer within its bucket: no record. At the end the
/// timer tells.
fn an_orphan_that_ends(mut world: World) -> World {
    world.reach_orphan(client());
    world.forget_told();
    world.feed(world.done(60_700, client(), TimeWaitState, 600));
    world
}

#[test]
fn a_stamp_gives_the_entry_to_the_millisecond_at_any_hz() {
    for hz in [100, 250, 300, 1000] {
        let mut world = an_orphan_that_ends(World::with_hz(hz));
        world.assert_ends(&[
            "1 60700 expired, entered 600, dwell 60100, fin_wait2 300, rearmed no, curl via connect",
        ]);
        world.assert_empty();
    }
}

#[test]
fn without_a_stamp_the_timer_gives_a_lower_bound_at_any_hz() {
    for hz in [100, 250, 1000] {
        let mut world = an_orphan_that_ends(World::with_hz(hz).without_stamps());
        world.assert_ends(&[
            "1 60700 expired, entered 600, dwell at least 60100, fin_wait2 300, rearmed ?, curl via connect",
        ]);
        // The end of a bound is no measurement.
        world.assert_changes(&[
            "1 600 FIN_WAIT2>TIME_WAIT after 300, curl via connect, late",
            "1 60700 TIME_WAIT>CLOSE, curl via connect",
        ]);
        world.assert_empty();
    }
}

#[test]
fn the_timer_is_right_within_a_jiffy() {
    for hz in [100, 250, 1000] {
        let mut world = World::with_hz(hz).without_stamps();
        world.reach_orphan(client());
        // Armed at 607 ms and seen at 60713 ms: neither is on a tick.
        let record = world.timer(60_713, client(), TimeWaitState, (607, 60_000));
        let mut entered = None;
        world
            .tracker
            .feed(&Event::TimeWaitDone(record), &mut |fact| {
                if let Fact::TimeWaitEnd(end) = fact {
                    entered = end.entered;
                }
            });
        let off = entered.unwrap().abs_diff(ns(607));
        assert!(off <= 1_000_000_000 / hz, "{off} ns off at {hz} Hz");
    }
}

#[test]
fn a_timer_can_begin_no_earlier_than_its_socket() {
    let mut world = World::with_hz(100).without_stamps();
    world.reach_orphan(client());
    // A tick of 10 ms: computed from it, the entry would lie before the making at 300 ms.
    let record = TimeWait {
        jiffies: world.jiffies(60_310) + 1,
        ..world.timer(60_305, client(), TimeWaitState, (300, 60_000))
    };
    world.feed(Event::TimeWaitDone(record));
    world.assert_ends(&[
        "1 60305 expired, entered 300, dwell at least 60005, fin_wait2 0, rearmed ?, curl via connect",
    ]);
}

#[test]
fn a_stamp_is_understood_when_32_bits_of_milliseconds_wrap() {
    // The stamp is taken 100 ms before 2^32 ms of CLOCK_MONOTONIC, the end comes after.
    let mut world = World::new();
    world.boot_to_monotonic_ns = (1 << 32) * 1_000_000 - ns(700) as i64;
    world.start(Probes::Tracepoints, Sockets::default());
    assert_eq!(world.stamp(600), u32::MAX - 99);
    assert_eq!(world.stamp(800), 100);
    let mut world = an_orphan_that_ends(world);
    world.assert_ends(&[
        "1 60700 expired, entered 600, dwell 60100, fin_wait2 300, rearmed no, curl via connect",
    ]);
}

#[test]
fn a_stamp_a_moment_ahead_of_the_record_is_now() {
    // The two clocks are compared to a few microseconds: a stamp that was just taken may seem to lie in
    // the next millisecond.
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    let record = TimeWait {
        entry_stamp: world.stamp(601),
        ..world.timer(600, client(), TimeWaitState, (600, 60_000))
    };
    world.feed(Event::TimeWaitArmed(record));
    world.assert_changes(&["1 600 FIN_WAIT2>TIME_WAIT after 300, curl via connect"]);
}

#[test]
fn a_restart_that_was_seen_lengthens_the_dwell() {
    let mut world = World::new();
    world.reach_time_wait(client());
    // An acceptable segment 10 s later: another bucket, so the timer is taken away and started.
    let stamp = world.stamp(400);
    let cancel = TimeWait {
        entry_stamp: stamp,
        callers: Caller::Segment.bit(),
        ..world.timer(10_400, client(), TimeWaitState, (400, 60_000))
    };
    let start = TimeWait {
        entry_stamp: stamp,
        ..world.timer(10_400, client(), TimeWaitState, (10_400, 60_000))
    };
    world.feed(Event::TimeWaitDone(cancel));
    world.feed(Event::TimeWaitArmed(start));
    world.forget_told();
    world.feed(tick(20_000));
    world.assert_ends(&[]);
    world.feed(Event::TimeWaitDone(TimeWait {
        entry_stamp: stamp,
        ..world.timer(70_500, client(), TimeWaitState, (10_400, 60_000))
    }));
    world.assert_ends(&[
        "1 70500 expired, entered 400, dwell 70100, fin_wait2 100, rearmed yes, curl via connect",
    ]);
    world.assert_empty();
}

#[test]
fn a_restart_without_a_record_shows_in_the_timer() {
    for stamps in [true, false] {
        let mut world = World::new();
        world.stamps = stamps;
        world.reach_time_wait(client());
        let stamp = world.stamp(400);
        world.feed(Event::TimeWaitDone(TimeWait {
            entry_stamp: stamp,
            ..world.timer(60_900, client(), TimeWaitState, (800, 60_000))
        }));
        world.assert_ends(&[
            "1 60900 expired, entered 400, dwell 60500, fin_wait2 100, rearmed yes, curl via connect",
        ]);
    }
}

#[test]
fn an_orphans_restart_without_a_record_shows_by_its_stamp() {
    let mut world = World::new();
    world.reach_orphan(client());
    world.forget_told();
    world.feed(Event::TimeWaitDone(TimeWait {
        entry_stamp: world.stamp(600),
        ..world.timer(65_700, client(), TimeWaitState, (5600, 60_000))
    }));
    world.assert_ends(&[
        "1 65700 expired, entered 600, dwell 65100, fin_wait2 300, rearmed yes, curl via connect",
    ]);
}

#[test]
fn a_tick_of_difference_is_no_restart() {
    for hz in [100, 250, 1000] {
        let mut world = World::with_hz(hz);
        world.reach_time_wait(client());
        let stamp = world.stamp(400);
        let late = 400 + 1000 / hz;
        world.feed(Event::TimeWaitDone(TimeWait {
            entry_stamp: stamp,
            ..world.timer(60_500, client(), TimeWaitState, (late, 60_000))
        }));
        world.assert_ends(&[
            "1 60500 expired, entered 400, dwell 60100, fin_wait2 100, rearmed no, curl via connect",
        ]);
    }
}

/// The story of one client whose TIME_WAIT is entered directly, and of one that waits as an orphan, as
/// the records of either kind of probes tell it.
fn told_by(probes: Probes) -> (Vec<String>, Vec<String>) {
    let mut world = World::with_probes(probes);
    let other = socket(3, ("10.0.0.1", 40_003), ("10.0.0.2", 80));
    for (socket, substate) in [(client(), TimeWaitState), (other, FinWait2)] {
        world.reach_fin_wait2(socket);
        let made = world.timer(400, socket, substate, (400, 60_000));
        world.feed(Event::TimeWaitArmed(match probes {
            // `inet_twsk_alloc` returns before the timer is set.
            Probes::Functions => TimeWait {
                expires: 0,
                entry_stamp: 0,
                ..made
            },
            _ => made,
        }));
        world.feed(change(400, socket, FinWait2, Close).no_socket());
    }
    let fin = world.timer(10_000, other, TimeWaitState, (10_000, 60_000));
    if probes == Probes::Tracepoints {
        world.feed(Event::TimeWaitDone(TimeWait {
            callers: Caller::Segment.bit(),
            ..world.timer(10_000, other, TimeWaitState, (400, 60_000))
        }));
    }
    world.feed(Event::TimeWaitArmed(fin));
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.feed(world.done(70_100, other, TimeWaitState, 10_000));
    world.assert_empty();
    (world.changes, world.ends)
}

#[test]
fn both_kinds_of_probes_tell_the_same() {
    let (changes, ends) = told_by(Probes::Functions);
    assert_eq!(changes.len(), 12, "{changes:?}");
    assert_eq!(
        ends,
        [
            "1 60500 expired, entered 400, dwell 60100, fin_wait2 100, rearmed no, curl via connect",
            "3 70100 expired, entered 10000, dwell 60100, fin_wait2 9700, rearmed no, curl via connect",
        ]
    );
    assert_eq!(told_by(Probes::Tracepoints), (changes, ends));
}

#[test]
fn a_suspend_makes_the_dwell_a_lower_bound() {
    let mut world = World::new();
    world.reach_time_wait(client());
    // The machine sleeps for an hour. Jiffies and stamps stand still, boot time does not.
    let hour = 3_600_000;
    let stamp = world.stamp(400);
    world.feed(Event::Clock {
        time: ns(1000 + hour),
        boot_to_utc_ns: 0,
        boot_to_monotonic_ns: -(hour as i64) * 1_000_000,
    });
    world.feed(Event::TimeWaitDone(TimeWait {
        time: ns(60_500 + hour),
        entry_stamp: stamp,
        ..world.timer(60_500, client(), TimeWaitState, (400, 60_000))
    }));
    world.assert_ends(&[
        "1 3660500 expired, entered 400, dwell at least 3660100, fin_wait2 100, rearmed ?, curl via connect",
    ]);
}

#[test]
fn a_stamp_after_an_earlier_suspend_is_exact() {
    let mut world = World::new();
    world.feed(Event::Clock {
        time: ns(0),
        boot_to_utc_ns: 0,
        boot_to_monotonic_ns: -500_000_000_000,
    });
    world.boot_to_monotonic_ns = -500_000_000_000;
    let mut world = an_orphan_that_ends(world);
    world.assert_ends(&[
        "1 60700 expired, entered 600, dwell 60100, fin_wait2 300, rearmed no, curl via connect",
    ]);
}

#[test]
fn absurd_numbers_do_no_harm() {
    // From a damaged recording, say.
    for (time, jiffies, expires, stamp) in [
        (u64::MAX, u64::MAX, 1, 1),
        (u64::MAX, 0, u64::MAX, u32::MAX),
        (0, u64::MAX, u64::MAX, 1),
        (0, 0, 1, u32::MAX),
        (1, 1 << 60, 1, 0),
    ] {
        for offset in [i64::MIN, -1, i64::MAX] {
            let mut world = World::new();
            world.reach_orphan(client());
            world.feed(Event::Clock {
                time,
                boot_to_utc_ns: offset,
                boot_to_monotonic_ns: offset,
            });
            let record = TimeWait {
                time,
                jiffies,
                expires,
                entry_stamp: stamp,
                ..world.timer(600, client(), TimeWaitState, (600, 60_000))
            };
            world.feed(Event::TimeWaitArmed(record));
            world.feed(Event::TimeWaitArmed(record));
            world.feed(Event::TimeWaitDone(record));
            world.feed(end(70_000));
            world.assert_empty();
        }
    }
}

/// Before 6.14 no stamp tells when TIME_WAIT began. Function probes see it begin.
#[test]
fn without_a_stamp_function_probes_know_the_entry_all_the_same() {
    let mut world = World::with_probes(Probes::Functions).without_stamps();
    world.reach_fin_wait2(client());
    world.feed(Event::TimeWaitArmed(TimeWait {
        expires: 0,
        ..world.timer(300, client(), FinWait2, (300, 60_000))
    }));
    world.feed(change(300, client(), FinWait2, Close).no_socket());
    world.forget_told();
    world.feed(world.armed(600, client(), TimeWaitState));
    world.assert_changes(&["1 600 FIN_WAIT2>TIME_WAIT after 300, curl via connect"]);
    world.feed(world.armed(10_000, client(), TimeWaitState));
    world.feed(world.done(70_100, client(), TimeWaitState, 10_000));
    world.assert_changes(&["1 70100 TIME_WAIT>CLOSE after 69500, curl via connect"]);
    world.assert_ends(&[
        "1 70100 expired, entered 600, dwell 69500, fin_wait2 300, rearmed yes, curl via connect",
    ]);
    world.assert_empty();
}

/// The look's row gives the same start, in jiffies. What was told stays as it was told.
#[test]
fn without_a_stamp_a_look_before_the_record_of_the_entry_changes_nothing() {
    let mut world = World::with_probes(Probes::Functions).without_stamps();
    world.reach_fin_wait2(client());
    world.feed(Event::TimeWaitArmed(TimeWait {
        expires: 0,
        ..world.timer(300, client(), FinWait2, (300, 60_000))
    }));
    world.feed(change(300, client(), FinWait2, Close).no_socket());
    world.forget_told();
    let row = time_wait_row(610, client(), TimeWaitState, 59_988);
    all(&mut world, 605, &[row]);
    world.assert_changes(&["1 598 FIN_WAIT2>TIME_WAIT after 298, curl via connect, late"]);
    world.feed(world.armed(600, client(), TimeWaitState));
    world.feed(world.done(60_700, client(), TimeWaitState, 600));
    world.assert_changes(&["1 60700 TIME_WAIT>CLOSE after 60102, curl via connect"]);
    world.assert_ends(&[
        "1 60700 expired, entered 598, dwell 60102, fin_wait2 298, rearmed no, curl via connect",
    ]);
    world.assert_empty();
}

/// Also of a socket that was there before: the look showed it in FIN_WAIT2, so its first start is the entry.
#[test]
fn without_a_stamp_function_probes_know_the_entry_of_an_orphan_from_before() {
    let mut world = World::with_probes(Probes::Functions).without_stamps();
    for event in [
        look(10, Scope::All),
        time_wait_row(11, client(), FinWait2, 59_000),
        look_end(15, &[NETNS]),
    ] {
        world.feed(event);
    }
    world.feed(world.armed(600, client(), TimeWaitState));
    world.assert_changes(&["1 600 FIN_WAIT2>TIME_WAIT, nobody"]);
    world.feed(world.done(60_700, client(), TimeWaitState, 600));
    world.assert_changes(&["1 60700 TIME_WAIT>CLOSE after 60100, nobody"]);
    world.assert_ends(&["1 60700 expired, entered 600, dwell 60100, rearmed no, nobody"]);
    world.assert_empty();
}
