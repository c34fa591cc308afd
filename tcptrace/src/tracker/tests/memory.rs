//! Whatever happens, in whatever order: the tracker's books balance, and what is gone is not kept.

use std::collections::HashMap;

use super::super::{key, time_wait::Life};
use super::{
    story::{Random, Run},
    *,
};

/// The tracker's counts are what they count.
#[track_caller]
pub(super) fn assert_balance(tracker: &Tracker) {
    let lives = || tracker.time_waits.values();
    assert_eq!(
        tracker.waiting,
        lives().filter(|life| life.entered.is_none()).count(),
        "waiting"
    );
    assert_eq!(
        tracker.unexplained,
        lives()
            .filter_map(|life| life.pending.as_ref())
            .filter(|end| end.unexplained)
            .count(),
        "unexplained"
    );
    let connections = || tracker.connections.values();
    assert_eq!(
        tracker.uncertain,
        connections().filter(|it| it.closed_from.is_some()).count(),
        "uncertain"
    );
    let indexed: usize = tracker.listeners.values().map(Vec::len).sum();
    assert_eq!(
        indexed,
        connections().filter(|it| it.state == Listen).count(),
        "listeners"
    );
    let is_held = |life: &Life| {
        let mut held = tracker.pending.iter();
        held.any(|held| key(&held.record.socket) == key(&life.socket))
    };
    for life in lives() {
        assert!(
            life.pending.is_none() || is_held(life),
            "an end that is kept back for ever"
        );
    }
}

/// Runs a random story to its end.
fn run(seed: u64, probes: Probes, lose: Option<u64>) -> World {
    let mut random = Random::new(seed);
    let mut run = Run::new(&mut random, World::with_probes(probes), 25);
    if probes == Probes::None {
        run.events.retain(|(_, event)| {
            !matches!(event, Event::TimeWaitArmed(_) | Event::TimeWaitDone(_))
        });
    }
    let last = run.last();
    let mut ms = 0;
    let mut looks_due = 1;
    while ms < last {
        ms += 1 + random.below(3000);
        let mut lost = run.feed_until(ms, &mut random, lose);
        if looks_due > 0 {
            looks_due -= 1;
            let behind = random.below(500);
            lost += run.look(ms + 500, Scope::All, behind, &mut random, lose);
            ms += 500;
        } else if run.world.tracker.needs().time_wait_look {
            let behind = random.below(20);
            let scope = if probes == Probes::None {
                Scope::TimeWait
            } else {
                Scope::Orphans
            };
            lost += run.look(ms + 20, scope, behind, &mut random, lose);
            ms += 20;
        }
        if lost > 0 {
            run.world.feed(lost_event(ms, lost));
            looks_due = 2;
        }
        run.world.feed(tick(ms));
    }
    if run.feed_until(u64::MAX, &mut random, lose) > 0 {
        run.world.feed(lost(last));
        looks_due = 2;
    }
    run.world.feed(tick(last + 51));
    if lose.is_some() || probes == Probes::None || looks_due > 0 {
        for look in 1..=2 {
            run.look(last + 1000 * look, Scope::All, 0, &mut random, None);
        }
    }
    run.world
}

fn lost_event(ms: u64, records: u64) -> Event {
    Event::Lost(Lost {
        time: ns(ms),
        records,
        missed: 0,
    })
}

const SEEDS: u64 = 300;

#[test]
fn after_all_has_ended_nothing_is_kept() {
    for seed in 0..SEEDS {
        for probes in [Probes::Tracepoints, Probes::Functions] {
            run(seed, probes, None).assert_empty();
        }
    }
}

#[test]
fn after_losses_and_looks_nothing_is_kept() {
    for seed in 0..SEEDS {
        for probes in [Probes::Tracepoints, Probes::Functions, Probes::None] {
            for lose in [2, 10, 100] {
                run(seed, probes, Some(lose)).assert_empty();
            }
        }
    }
}

#[test]
fn without_probes_looks_clear_up() {
    for seed in 0..SEEDS {
        run(seed, Probes::None, None).assert_empty();
    }
}

/// Line by line, the states of each socket follow on each other.
#[track_caller]
fn assert_chains(world: &World, seed: u64) {
    let mut states: HashMap<&str, &str> = HashMap::new();
    for line in &world.changes {
        let mut words = line.split([' ', ',']);
        let socket = words.next().unwrap();
        let (from, to) = words.nth(1).unwrap().split_once('>').unwrap();
        if let Some(before) = states.insert(socket, to) {
            assert_eq!(before, from, "seed {seed}, {line}");
        }
    }
    for (socket, state) in states {
        assert_eq!(state, "CLOSE", "seed {seed}, socket {socket}");
    }
}

#[test]
fn without_losses_every_line_begins_where_the_last_ended() {
    for seed in 0..SEEDS {
        for probes in [Probes::Tracepoints, Probes::Functions] {
            let world = run(seed, probes, None);
            assert!(world.changes.len() > 25);
            assert_chains(&world, seed);
            for end in &world.ends {
                assert!(!end.contains("entered ?"), "{end}");
            }
        }
    }
}

/// Any event at all, over few enough sockets that they meet.
fn any_event(random: &mut Random) -> Event {
    let cookie = random.below(4);
    let netns = NETNS + random.below(2) as u32;
    let port = random.of(&[0, 80, 81]);
    let mut socket = socket(
        cookie,
        (random.of(&["0.0.0.0", "10.0.0.2", "::", "::1"]), port),
        ("10.0.0.1", random.of(&[0, 40_000])),
    );
    socket.netns = netns;
    let mut task = process(random.below(3) as u32, "any");
    task.kthread = random.once_in(4);
    task.exiting = random.once_in(4);
    task.tree = random.once_in(2);
    let time = if random.once_in(200) {
        random.next()
    } else {
        ns(random.below(2000))
    };
    let any_number = |random: &mut Random| {
        let small = random.below(100_000);
        random.of(&[
            0,
            1,
            small,
            BEGIN_JIFFIES + small,
            u64::MAX,
            u64::MAX - small,
        ])
    };
    let jiffies = any_number(random);
    let expires = any_number(random);
    let time_wait = TimeWait {
        time,
        socket,
        jiffies,
        expires,
        entry_stamp: random.next() as u32 * u32::from(random.once_in(2)),
        substate: random.of(&State::ALL),
        callers: random.next() as u8 & random.next() as u8,
    };
    match random.below(14) {
        0..=3 => Event::Transition(Transition {
            time,
            old: random.of(&State::ALL),
            new: random.of(&State::ALL),
            error: random.of(&[0, 0, 104]),
            owned: random.once_in(2),
            has_socket: random.once_in(2),
            ..change(0, socket, Close, Close).by(task)
        }),
        4 => accept(random.below(2000), socket, task),
        5 => Event::TimeWaitArmed(time_wait),
        6 => Event::TimeWaitDone(time_wait),
        7 => Event::Look(Look {
            time,
            scope: random.of(&[
                Scope::All,
                Scope::TimeWait,
                Scope::Orphans,
                Scope::States(State::ALL.into_iter().collect()),
            ]),
        }),
        8 | 9 => Event::Socket(Row {
            time,
            socket,
            state: random.of(&State::ALL),
            inode: random.below(3) as u32,
            cgroup: random.below(2),
            time_wait_ms: random.of(&[None, Some(0), Some(59_000), Some(u32::MAX)]),
            detail: None,
        }),
        10 => holder(random.below(3) as u32, task),
        11 => Event::LookEnd {
            time,
            netns: random
                .of(&[&[][..], &[NETNS], &[NETNS, NETNS + 1]])
                .to_vec(),
        },
        12 => match random.below(3) {
            0 => lost(random.below(2000)),
            1 => tick(random.below(2000)),
            _ => Event::Clock {
                time,
                boot_to_utc_ns: 0,
                boot_to_monotonic_ns: random.of(&[0, -1, i64::MIN, i64::MAX]),
            },
        },
        _ => Event::Overflow {
            time,
            netns,
            count: random.below(5),
        },
    }
}

#[test]
fn no_events_in_any_order_break_the_books() {
    for seed in 0..500 {
        let mut random = Random::new(seed);
        let selection = Selection {
            sockets: Sockets {
                local_ports: random.of(&[&[][..], &[80]]).to_vec(),
                ..Sockets::default()
            },
            states: random
                .of(&[&[][..], &[Established], &[TimeWaitState]])
                .to_vec(),
            ..Selection::default()
        };
        let mut world = World::of(selection);
        let probes = random.of(&[Probes::Tracepoints, Probes::Functions, Probes::None]);
        world.start(probes, Sockets::default());
        for _ in 0..500 {
            let event = any_event(&mut random);
            world.feed(event);
            assert_balance(&world.tracker);
            world.forget_told();
        }
        // What is kept back comes free at the end, and two empty looks clear up.
        world.feed(end(0));
        assert_balance(&world.tracker);
        assert_eq!(world.tracker.pending.len(), 0);
        for _ in 0..2 {
            world.feed(Event::Look(Look {
                time: u64::MAX,
                scope: Scope::All,
            }));
            world.feed(look_end(0, &[NETNS, NETNS + 1]));
        }
        // Only a record from the end of time could be newer than those looks.
        let left = world.tracker.connections.values().map(|it| it.last);
        let left = left.chain(world.tracker.time_waits.values().map(|it| it.last));
        assert!(
            left.min().is_none_or(|last| last == u64::MAX),
            "seed {seed}"
        );
    }
}
