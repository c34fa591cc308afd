//! Whose socket it is: believed by evidence, inherited otherwise, never guessed.

use super::*;

/// Who owns a socket after a change, if `known` did before.
fn after(change: Transition, known: Option<super::super::Owner>) -> String {
    owner_text(super::super::owner::after(&change, known, || None))
}

fn known() -> super::super::Owner {
    super::super::Owner::caller(&curl(), super::super::Via::Connect)
}

/// What a process does by a call of its own.
const CALLS: [(State, State, &str); 10] = [
    (Close, SynSent, "connect"),
    (Close, Listen, "listen"),
    (Listen, Close, "close"),
    (Established, FinWait1, "close"),
    (SynRecv, FinWait1, "close"),
    (CloseWait, LastAck, "close"),
    (CloseWait, Close, "close"),
    (Established, Close, "close"),
    (SynSent, Close, "close"),
    (SynRecv, Close, "close"),
];

#[test]
fn a_call_tells_the_owner() {
    for (old, new, via) in CALLS {
        let expected = format!("nginx via {via}");
        let call = change(0, client(), old, new).by(nginx());
        assert_eq!(after(call, None), expected, "{old:?} > {new:?}");
        assert_eq!(after(call, Some(known())), expected, "{old:?} > {new:?}");
    }
}

#[test]
fn a_change_is_believed_only_with_the_sockets_lock_held() {
    for (old, new, _) in CALLS {
        let softirq = change(0, client(), old, new);
        assert_eq!(after(softirq, None), "nobody", "{old:?} > {new:?}");
        assert_eq!(after(softirq, Some(known())), "curl via connect");
    }
}

#[test]
fn a_kernel_thread_is_never_believed() {
    let kworker = Task {
        kthread: true,
        ..process(30, "kworker/0:1")
    };
    for (old, new, _) in CALLS {
        let call = change(0, client(), old, new).by(kworker);
        assert_eq!(after(call, None), "nobody", "{old:?} > {new:?}");
        assert_eq!(after(call, Some(known())), "curl via connect");
    }
}

#[test]
fn a_close_with_an_error_is_nobodys_call() {
    for (old, new, _) in CALLS.into_iter().filter(|(_, new, _)| *new == Close) {
        for errno in [
            libc::ECONNRESET,
            libc::ETIMEDOUT,
            libc::ECONNREFUSED,
            libc::ECONNABORTED,
        ] {
            let close = change(0, client(), old, new).by(nginx()).error(errno);
            assert_eq!(after(close, None), "nobody", "{old:?} > {new:?} {errno}");
            assert_eq!(after(close, Some(known())), "curl via connect");
        }
    }
}

#[test]
fn what_the_peer_does_is_nobodys_call_whoever_holds_the_lock() {
    for old in State::ALL {
        for new in State::ALL {
            if CALLS.iter().any(|call| (call.0, call.1) == (old, new)) {
                continue;
            }
            let backlog = change(0, client(), old, new).by(nginx());
            assert_eq!(after(backlog, None), "nobody", "{old:?} > {new:?}");
            if (old, new) != (Listen, SynRecv) {
                assert_eq!(
                    after(backlog, Some(known())),
                    "curl via connect",
                    "{old:?} > {new:?}"
                );
            }
        }
    }
}

#[test]
fn closing_what_one_owns_does_not_change_how_that_is_known() {
    for (old, new, via) in CALLS.into_iter().filter(|call| call.2 == "close") {
        let call = change(0, client(), old, new).by(curl());
        assert_eq!(after(call, Some(known())), "curl via connect", "{via}");
    }
}

#[test]
fn a_process_that_changed_its_program_goes_by_its_new_name() {
    let renamed = Task {
        comm: Comm::new(b"after-exec"),
        ..curl()
    };
    let close = change(0, client(), Established, FinWait1).by(renamed);
    assert_eq!(after(close, Some(known())), "after-exec via connect");
}

#[test]
fn another_process_of_the_same_pid_is_another_process() {
    let later = Task {
        start: curl().start + 10_000_000,
        ..curl()
    };
    let close = change(0, client(), Established, FinWait1).by(later);
    assert_eq!(after(close, Some(known())), "curl via close");
}

#[test]
fn the_coarse_start_time_of_proc_is_the_same_process() {
    let exact = Task {
        start: curl().start + 9_999_999,
        ..curl()
    };
    let close = change(0, client(), Established, FinWait1).by(exact);
    assert_eq!(after(close, Some(known())), "curl via connect");
}

#[test]
fn a_process_that_got_the_socket_from_another_owns_it_when_it_closes() {
    let mut world = World::new();
    world.reach_fin_wait2(client());
    // The parent accepted; the child to which it passed the descriptor closes.
    world.feed(accept(10, server(), nginx()));
    world.feed(change(20, server(), Established, CloseWait));
    world.feed(accept(21, server(), nginx()));
    world.forget_told();
    world.feed(change(30, server(), CloseWait, LastAck).by(process(80, "worker")));
    world.feed(change(31, server(), LastAck, Close).no_socket());
    world.assert_changes(&[
        "2 30 CLOSE_WAIT>LAST_ACK after 10, worker via close",
        "2 31 LAST_ACK>CLOSE after 1, worker via close",
    ]);
}

#[test]
fn connect_in_one_process_and_close_in_another_makes_the_closer_the_maker_of_time_wait() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    world.feed(change(100, client(), SynSent, Established));
    world.feed(change(200, client(), Established, FinWait1).by(process(81, "child")));
    world.feed(change(300, client(), FinWait1, FinWait2).no_socket());
    world.feed(world.armed(400, client(), TimeWaitState));
    world.feed(change(400, client(), FinWait2, Close).no_socket());
    world.feed(world.done(60_500, client(), TimeWaitState, 400));
    assert!(
        world.ends[0].ends_with("child via close"),
        "{:?}",
        world.ends
    );
}

/// A listener on 10.0.0.2:80, or on another address of it.
fn listening(world: &mut World, cookie: u64, addr: &str, task: Task) -> Socket {
    let any = if addr.contains(':') { "::" } else { "0.0.0.0" };
    let socket = socket(cookie, (addr, 80), (any, 0));
    world.feed(change(0, socket, Close, Listen).by(task));
    socket
}

/// Who owns a new connection to 10.0.0.2:80.
fn newcomer(world: &mut World) -> String {
    world.forget_told();
    world.feed(change(10, server(), Listen, SynRecv).no_socket());
    let told = world.changes[0].rsplit_once(", ").unwrap().1.to_owned();
    world.feed(change(11, server(), SynRecv, Close).error(libc::ECONNRESET));
    told
}

#[test]
fn a_new_connection_is_its_listeners() {
    for addr in ["10.0.0.2", "0.0.0.0", "::"] {
        let mut world = World::new();
        listening(&mut world, 9, addr, nginx());
        assert_eq!(newcomer(&mut world), "nginx via listener", "{addr}");
    }
}

#[test]
fn a_listener_of_another_address_port_or_namespace_is_not_its() {
    let mut world = World::new();
    listening(&mut world, 9, "10.0.0.3", nginx());
    let port = socket(10, ("10.0.0.2", 81), ("0.0.0.0", 0));
    world.feed(change(0, port, Close, Listen).by(nginx()));
    let netns = Socket {
        netns: NETNS + 1,
        ..socket(11, ("10.0.0.2", 80), ("0.0.0.0", 0))
    };
    world.feed(change(0, netns, Close, Listen).by(nginx()));
    assert_eq!(newcomer(&mut world), "nobody");
}

#[test]
fn the_very_address_goes_before_all_of_them() {
    let mut world = World::new();
    listening(&mut world, 9, "0.0.0.0", nginx());
    listening(&mut world, 10, "10.0.0.2", curl());
    assert_eq!(newcomer(&mut world), "curl via listener");
}

#[test]
fn of_two_processes_that_share_a_port_neither_is_guessed() {
    for addr in ["10.0.0.2", "0.0.0.0"] {
        let mut world = World::new();
        listening(&mut world, 9, addr, nginx());
        let second = listening(&mut world, 10, addr, process(12, "nginx"));
        assert_eq!(newcomer(&mut world), "nobody", "{addr}");
        // When one of them has gone, it is clear again.
        world.feed(change(5, second, Listen, Close).by(process(12, "nginx")));
        assert_eq!(newcomer(&mut world), "nginx via listener", "{addr}");
    }
}

#[test]
fn two_listeners_of_one_process_are_no_doubt() {
    let mut world = World::new();
    listening(&mut world, 9, "0.0.0.0", nginx());
    listening(&mut world, 10, "0.0.0.0", nginx());
    assert_eq!(newcomer(&mut world), "nginx via listener");
}

#[test]
fn a_listener_whose_process_is_unknown_leaves_it_open() {
    let mut world = World::new();
    listening(&mut world, 9, "0.0.0.0", nginx());
    world.feed(change(
        0,
        socket(10, ("0.0.0.0", 80), ("0.0.0.0", 0)),
        Close,
        Listen,
    ));
    assert_eq!(newcomer(&mut world), "nobody");
}

#[test]
fn accept_tells_more_than_the_listener() {
    let mut world = World::new();
    listening(&mut world, 9, "0.0.0.0", nginx());
    world.feed(change(10, server(), Listen, SynRecv).no_socket());
    world.feed(change(11, server(), SynRecv, Established).no_socket());
    world.feed(accept(12, server(), process(80, "worker")));
    world.forget_told();
    world.feed(change(20, server(), Established, CloseWait));
    world.assert_changes(&["2 20 ESTABLISHED>CLOSE_WAIT after 9, worker via accept"]);
}

#[test]
fn an_accept_that_was_not_seen_leaves_nobody() {
    // io_uring, or a 32-bit program: it has a file, so somebody has accepted it.
    let mut world = World::new();
    listening(&mut world, 9, "0.0.0.0", nginx());
    world.feed(change(10, server(), Listen, SynRecv).no_socket());
    world.feed(change(11, server(), SynRecv, Established).no_socket());
    world.forget_told();
    world.feed(change(20, server(), Established, CloseWait));
    world.assert_changes(&["2 20 ESTABLISHED>CLOSE_WAIT after 9, nobody"]);
}

#[test]
fn never_accepted_and_closed_with_its_listener() {
    let mut world = World::new();
    let nine = listening(&mut world, 9, "0.0.0.0", nginx());
    world.feed(change(10, server(), Listen, SynRecv).no_socket());
    world.feed(change(11, server(), SynRecv, Established).no_socket());
    world.feed(change(12, server(), Established, CloseWait).no_socket());
    world.forget_told();
    world.feed(change(20, nine, Listen, Close).by(nginx()));
    world.feed(change(21, server(), CloseWait, Close).no_socket());
    world.assert_changes(&[
        "9 20 LISTEN>CLOSE after 20, nginx via listen",
        "2 21 CLOSE_WAIT>CLOSE after 9, nginx via listener",
    ]);
    world.assert_empty();
}

#[test]
fn a_listener_that_was_lost_sight_of_explains_no_owner() {
    // Its end was lost; the socket listens no more, it connects.
    let mut world = World::new();
    listening(&mut world, 9, "0.0.0.0", nginx());
    let reused = socket(9, ("10.0.0.1", 40_000), ("10.0.0.2", 80));
    world.feed(change(5, reused, SynSent, Established));
    assert_eq!(newcomer(&mut world), "nobody");
    world.feed(change(20, reused, Established, Close));
    world.assert_empty();
}

#[test]
fn a_socket_is_accepted_once_and_not_if_it_connected_or_listens() {
    use super::super::{Owner, Via, owner::refutes_accept};
    let accepts = Owner::caller(&nginx(), Via::Accept);
    let refutes = |known: Option<(Task, Via)>, state| {
        let known = known.map(|(task, via)| Owner::caller(&task, via));
        refutes_accept(known, state, &accepts)
    };
    for state in [Established, CloseWait] {
        assert!(!refutes(None, state));
        for via in [Via::Listener, Via::Holder] {
            assert!(!refutes(Some((curl(), via)), state), "{via}");
        }
        for via in [Via::Accept, Via::Close] {
            assert!(refutes(Some((curl(), via)), state), "{via}");
            assert!(!refutes(Some((nginx(), via)), state), "{via}");
        }
        for via in [Via::Connect, Via::Listen] {
            assert!(refutes(Some((curl(), via)), state), "{via}");
            assert!(refutes(Some((nginx(), via)), state), "{via}");
        }
    }
    assert!(refutes(None, Listen));
}

#[test]
fn a_socket_in_place_of_the_accepted_one_keeps_its_owner() {
    let mut world = World::new();
    world.feed(change(10, client(), Close, SynSent).by(curl()));
    world.feed(change(11, client(), SynSent, Established));
    // Another thread of nginx, to which it was passed, has put it where accept() had put another.
    world.feed(accept(20, client(), nginx()));
    world.forget_told();
    world.feed(change(40, client(), Established, CloseWait));
    world.assert_changes(&["1 40 ESTABLISHED>CLOSE_WAIT after 29, curl via connect"]);
}
