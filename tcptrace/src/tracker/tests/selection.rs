//! What was asked for, and nothing else: told, and kept.

use super::*;
use crate::select::Cidr;

fn local_port(port: u16) -> Selection {
    Selection {
        sockets: Sockets {
            local_ports: vec![port],
            ..Sockets::default()
        },
        ..Selection::default()
    }
}

/// `connect()` enters SYN_SENT before it has a port.
fn connecting() -> Transition {
    let unbound = Socket {
        tuple: Tuple {
            local_port: 0,
            ..client().tuple
        },
        ..client()
    };
    change(0, unbound, Close, SynSent).by(curl())
}

#[test]
fn a_local_port_that_turns_out_right_tells_the_beginning_late() {
    let mut world = World::of(local_port(40_000));
    world.feed(connecting());
    world.assert_changes(&[]);
    world.feed(change(100, client(), SynSent, Established));
    world.assert_changes(&[
        "1 0 CLOSE>SYN_SENT, curl via connect, late",
        "1 100 SYN_SENT>ESTABLISHED after 100, curl via connect",
    ]);
    world.feed(change(200, client(), Established, CloseWait));
    world.assert_changes(&["1 200 ESTABLISHED>CLOSE_WAIT after 100, curl via connect"]);
}

#[test]
fn a_local_port_that_turns_out_wrong_leaves_nothing() {
    let mut world = World::of(local_port(40_001));
    world.feed(connecting());
    assert_eq!(world.tracker.len(), 1);
    world.feed(change(100, client(), SynSent, Established));
    world.assert_empty();
    world.feed(change(200, client(), Established, FinWait1).by(curl()));
    world.feed(world.armed(300, client(), TimeWaitState));
    world.feed(change(300, client(), FinWait2, Close));
    world.feed(world.done(60_500, client(), TimeWaitState, 300));
    world.assert_changes(&[]);
    world.assert_ends(&[]);
    world.assert_empty();
}

#[test]
fn a_connect_that_never_got_a_port_is_nobodys_port() {
    let mut world = World::of(local_port(40_000));
    world.feed(connecting());
    world.feed(Transition {
        time: ns(1),
        old: SynSent,
        new: Close,
        ..connecting()
    });
    world.assert_changes(&[]);
    world.assert_empty();
}

#[test]
fn a_refused_connect_with_the_right_port_is_told_whole() {
    let mut world = World::of(local_port(40_000));
    world.feed(connecting());
    world.feed(change(1, client(), SynSent, Close).error(libc::ECONNREFUSED));
    world.assert_changes(&[
        "1 0 CLOSE>SYN_SENT, curl via connect, late",
        "1 1 SYN_SENT>CLOSE after 1, curl via connect, error 111",
    ]);
    world.assert_empty();
}

#[test]
fn a_port_on_either_side_is_decided_by_the_remote_one_at_once() {
    let port = |port| Selection {
        sockets: Sockets {
            ports: vec![port],
            ..Sockets::default()
        },
        ..Selection::default()
    };
    let mut world = World::of(port(80));
    world.feed(connecting());
    world.assert_changes(&["1 0 CLOSE>SYN_SENT, curl via connect"]);
    let mut world = World::of(port(40_000));
    world.feed(connecting());
    world.assert_changes(&[]);
    world.feed(change(100, client(), SynSent, Established));
    assert_eq!(world.changes.len(), 2);
}

#[test]
fn what_the_recording_was_limited_to_limits_the_replay() {
    // The recording has the beginning of every connect, whatever its port: it says so.
    let mut world = World::new();
    world.start(
        Probes::Tracepoints,
        Sockets {
            local_ports: vec![40_001],
            ..Sockets::default()
        },
    );
    world.feed(connecting());
    world.feed(change(100, client(), SynSent, Established));
    world.assert_changes(&[]);
    world.assert_empty();
    let wanted = socket(3, ("10.0.0.1", 40_001), ("10.0.0.2", 80));
    world.feed(change(100, wanted, SynSent, Established));
    assert_eq!(world.changes.len(), 1);
}

#[test]
fn a_replay_can_be_narrower_than_its_recording() {
    let mut world = World::of(Selection {
        sockets: Sockets {
            remote_ports: vec![80],
            ..Sockets::default()
        },
        ..Selection::default()
    });
    world.start(
        Probes::Tracepoints,
        Sockets {
            networks: vec![Cidr::new("10.0.0.2".parse().unwrap(), 32).unwrap()],
            ..Sockets::default()
        },
    );
    let elsewhere = socket(3, ("10.0.0.1", 40_001), ("10.0.0.3", 80));
    let other_port = socket(4, ("10.0.0.1", 40_001), ("10.0.0.2", 81));
    for socket in [client(), elsewhere, other_port] {
        world.feed(change(0, socket, SynSent, Established));
    }
    world.assert_changes(&["1 0 SYN_SENT>ESTABLISHED, nobody"]);
}

#[test]
fn a_listener_is_known_even_if_it_was_not_asked_for() {
    // Its connections are of other addresses, and it owns them.
    let mut world = World::of(Selection {
        sockets: Sockets {
            networks: vec![Cidr::new("10.0.0.1".parse().unwrap(), 32).unwrap()],
            ..Sockets::default()
        },
        ..Selection::default()
    });
    world.feed(change(0, listener(), Close, Listen).by(nginx()));
    world.feed(change(10, server(), Listen, SynRecv).no_socket());
    world.assert_changes(&["2 10 LISTEN>SYN_RECV, nginx via listener"]);
    world.feed(change(20, listener(), Listen, Close).by(nginx()));
    world.assert_changes(&[]);
}

#[test]
fn looks_keep_what_was_asked_for_and_listeners() {
    let mut world = World::of(local_port(40_000));
    world.feed(look(0, Scope::All));
    let other = socket(3, ("10.0.0.1", 40_001), ("10.0.0.2", 80));
    world.feed_all([
        row(1, client(), Established, 0),
        row(1, other, Established, 0),
        time_wait_row(1, Socket { cookie: 4, ..other }, TimeWaitState, 1000),
        row(1, listener(), Listen, 0),
    ]);
    world.feed(look_end(2, &[NETNS]));
    assert_eq!(world.tracker.len(), 2);
}

#[test]
fn states_are_told_if_left_or_entered() {
    let mut world = World::of(Selection {
        states: vec![FinWait1, TimeWaitState],
        ..Selection::default()
    });
    world.reach_time_wait(client());
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    world.assert_changes(&[
        "1 200 ESTABLISHED>FIN_WAIT1 after 100, curl via connect",
        "1 300 FIN_WAIT1>FIN_WAIT2 after 100, curl via connect",
        "1 400 FIN_WAIT2>TIME_WAIT after 100, curl via connect",
        "1 60500 TIME_WAIT>CLOSE after 60100, curl via connect",
    ]);
}

#[test]
fn owners_select_softirq_changes_of_their_sockets_too() {
    let of = |selection| {
        let mut world = World::of(selection);
        world.reach_time_wait(client());
        world.feed(change(0, server(), Close, SynSent).by(nginx()));
        world.feed(change(1, server(), SynSent, Established));
        let running = world.tracker.running().count();
        world.feed(world.done(60_500, client(), TimeWaitState, 400));
        (world.changes.len(), world.ends.len(), running)
    };
    let comm = |comm: &str| Selection {
        comms: vec![Comm::new(comm.as_bytes())],
        ..Selection::default()
    };
    let pid = |pid| Selection {
        pids: vec![pid],
        ..Selection::default()
    };
    assert_eq!(of(comm("curl")), (6, 1, 1));
    assert_eq!(of(pid(7)), (6, 1, 1));
    assert_eq!(of(comm("nginx")), (2, 0, 0));
    assert_eq!(of(pid(8)), (2, 0, 0));
    // Nobody of these tests is the decoy, although every softirq carries its name.
    assert_eq!(of(comm("decoy")), (0, 0, 0));
    assert_eq!(of(pid(666)), (0, 0, 0));
}

#[test]
fn states_that_do_not_need_time_wait_cost_no_looks_and_keep_nothing() {
    // The probes of TIME_WAIT are not even loaded then.
    let selection = Selection {
        states: vec![CloseWait],
        ..Selection::default()
    };
    assert!(!selection.needs_time_wait());
    let mut world = World::of(selection);
    world.start(Probes::None, Sockets::default());
    world.feed(look(0, Scope::All));
    world.feed(time_wait_row(1, server(), TimeWaitState, 50_000));
    world.feed(look_end(2, &[NETNS]));
    assert!(!world.tracker.needs().time_wait_look);
    world.reach_fin_wait2(client());
    world.feed(change(400, client(), FinWait2, Close).no_socket());
    assert!(!world.tracker.needs().time_wait_look);
    world.assert_changes(&[]);
    world.assert_empty();
}
