//! Every kind of story.

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use tests::{Flag, boottime, kernel_is_at_least, wheel_step};

use crate::{
    stage::{Place, Player, Window, locked},
    story::{Connection, Rest, Story},
};

/// What it is called, how often it is played, and the play.
pub(crate) type Kind = (&'static str, u64, fn(&mut Story<'_>));

/// Those whose connections are there before the trace; the first part of the play is done before it.
pub(crate) const BEFORE: Kind = ("there before the trace", 6, there_before);

/// All others.
pub(crate) const KINDS: [Kind; 39] = [
    ("client closes first", 10, client_closes_first),
    ("server closes first", 10, server_closes_first),
    ("half closed, and answered", 6, half_closed),
    ("reset", 6, reset),
    ("reset after a FIN", 4, reset_after_fin),
    ("closed with unread data", 4, closed_with_unread_data),
    ("both close at once", 4, both_close_at_once),
    ("simultaneous close", 3, simultaneous_close),
    ("refused", 4, refused),
    ("connect times out", 2, connect_times_out),
    ("never accepted, listener goes", 4, never_accepted),
    ("accepted late", 4, accepted_late),
    ("FIN_WAIT2 times out", 4, fin_wait2_times_out),
    ("no FIN_WAIT2 wanted", 2, no_fin_wait2_wanted),
    ("TIME_WAIT reused", 5, reused),
    ("TIME_WAIT reopened", 5, reopened),
    ("TIME_WAIT reset", 3, time_wait_reset),
    ("TIME_WAIT rearmed", 2, rearmed),
    ("TIME_WAIT aborted", 3, time_wait_aborted),
    ("TIME_WAIT skipped", 3, skipped),
    ("namespace goes", 1, namespace_goes),
    ("aborted", 3, aborted),
    ("killed", 4, killed),
    ("exited", 3, exited),
    ("child closes", 4, child_closes),
    ("parent exits, child closes", 2, parent_exits),
    ("passed on", 4, passed_on),
    ("child accepts", 4, child_accepts),
    ("in threads", 3, in_threads),
    ("peer is silent", 2, peer_is_silent),
    ("connects again", 3, connects_again),
    ("moves to another namespace", 3, moves),
    ("leaked by a server", 4, leaked_by_server),
    ("leaked by a client", 3, leaked_by_client),
    ("leaked by two", 2, leaked_by_two),
    ("leaked without accept", 2, leaked_without_accept),
    ("answers for long", 2, answers_for_long),
    ("both ends in one process", 2, both_ends),
    ("in a namespace that is not asked for", 2, elsewhere),
];

fn client_closes_first(story: &mut Story<'_>) {
    let connection = story.open();
    story.talk(connection);
    story.pause();
    closed_in_turn(story, connection.client, connection.server);
}

fn server_closes_first(story: &mut Story<'_>) {
    let connection = story.open();
    story.talk(connection);
    story.pause();
    closed_in_turn(story, connection.server, connection.client);
}

fn closed_in_turn(story: &mut Story<'_>, first: usize, second: usize) {
    story.close(first);
    story.pause();
    story.close(second);
}

/// First and second in either order.
fn either(story: &mut Story<'_>, connection: Connection) -> (usize, usize) {
    let Connection { client, server } = connection;
    if story.random.coin() {
        (client, server)
    } else {
        (server, client)
    }
}

fn half_closed(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.shutdown(one);
    for _ in 0..=story.random.below(3) {
        story.pause();
        story.write(other, 1000);
        story.read(one);
    }
    if story.random.coin() {
        // An orphan only now.
        story.settle();
        story.close(one);
        story.pause();
        story.close(other);
    } else {
        story.close(other);
        story.pause();
        // Its descriptor outlives the connection.
        story.close(one);
    }
}

fn reset(story: &mut Story<'_>) {
    let connection = story.open();
    story.talk(connection);
    let (one, other) = either(story, connection);
    story.reset(one);
    story.pause();
    story.close(other);
}

fn reset_after_fin(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    let shuts = story.random.coin();
    if shuts {
        story.shutdown(one);
    } else {
        story.close(one);
    }
    story.settle();
    story.reset(other);
    if shuts {
        story.close(one);
    }
}

fn closed_with_unread_data(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.write(one, 500);
    if story.random.coin() {
        story.shutdown(one);
        story.settle();
    }
    story.close(other);
    story.pause();
    story.close(one);
}

/// Each end may be told to close before the other's FIN comes to it, or after.
fn both_close_at_once(story: &mut Story<'_>) {
    let client = story.process("one");
    let listener = story.process("other");
    let (_, name, address) = story.listen(&listener);
    let connection = story.knock(&client, &listener, address, None);
    story.accept(connection, &listener, &name);
    let Connection {
        client: near,
        server: far,
    } = connection;
    let (window, ()) = Window::of(|| {
        thread::scope(|scope| {
            let one = scope.spawn(|| story.ask(near, "close"));
            story.ask(far, "close");
            one.join().expect("no panic");
        });
    });
    let before = story.ends.clone();
    let (near_by, far_by) = (client.who.clone(), listener.who.clone());
    // The server first.
    story.closed(far, window, &far_by);
    story.closed(near, window, &near_by);
    story
        .otherwise
        .push(std::mem::replace(&mut story.ends, before.clone()));
    // Neither first.
    for end in [near, far] {
        for state in ["FIN_WAIT1", "CLOSING", "TIME_WAIT"] {
            story.step(end, state, window, None);
        }
    }
    story
        .otherwise
        .push(std::mem::replace(&mut story.ends, before));
    // The client first.
    story.closed(near, window, &near_by);
    story.closed(far, window, &far_by);
}

/// Both FINs are lost at first, so that both ends close without knowing of the other.
fn simultaneous_close(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.ask(one, "deaf");
    story.ask(other, "deaf");
    let (window, _) = story.ask(one, "shutdown");
    story.step(one, "FIN_WAIT1", window, None);
    let (window, _) = story.ask(other, "shutdown");
    story.step(other, "FIN_WAIT1", window, None);
    let (window, _) = story.ask(other, "hear");
    let closing = story.await_row(other, window.from, "CLOSING", |row| {
        row.is_some_and(|row| row.state == "CLOSING")
    });
    story.step(other, "CLOSING", closing, None);
    story.pause();
    let (heard, _) = story.ask(one, "hear");
    let resting = |row: Option<&tests::Row>| row.is_some_and(|row| row.state == "TIME_WAIT");
    let rests = story.await_row(one, heard.from, "TIME_WAIT", resting);
    // The other end learns it from the acknowledgement of its FIN.
    let other_rests = story.await_row(other, rests.from, "TIME_WAIT", resting);
    story.step(
        one,
        "FIN_WAIT2",
        Window {
            to: rests.to,
            ..heard
        },
        None,
    );
    story.step(one, "TIME_WAIT", rests, None);
    story.step(other, "TIME_WAIT", other_rests, None);
    story.pause();
    story.ask(one, "close");
    story.ask(other, "close");
}

fn refused(story: &mut Story<'_>) {
    let client = story.client();
    // An address of this story's own.
    let number = story.number as u16;
    let address = SocketAddr::from(([127, 9, (number >> 8) as u8, number as u8], 9));
    story.connect_fails(&client, address, "ECONNREFUSED");
}

fn connect_times_out(story: &mut Story<'_>) {
    let (client, listener) = (story.process("waits"), story.process("deaf"));
    let (_, name, address) = story.listen(&listener);
    listener.ask(&format!("deaf {name}"));
    story.connect_fails(&client, address, "ETIMEDOUT");
}

fn never_accepted(story: &mut Story<'_>) {
    let listener = story.process("busy");
    let (end, name, address) = story.listen(&listener);
    let client = story.client();
    let connection = story.knock(&client, &listener, address, None);
    story.learn_cookie(connection.server);
    story.pause();
    let (window, _) = listener.ask(&format!("close {name}"));
    story.closed(end, window, &listener.who);
    story.closed_unaccepted(connection.server, window);
    story.pause();
    story.close(connection.client);
}

fn accepted_late(story: &mut Story<'_>) {
    let listener = story.process("late");
    let (_, name, address) = story.listen(&listener);
    let client = story.client();
    let connection = story.knock(&client, &listener, address, None);
    story.pause();
    if story.random.coin() {
        story.close(connection.client);
        story.pause();
        story.accept(connection, &listener, &name);
    } else {
        story.accept(connection, &listener, &name);
        story.pause();
        story.close(connection.client);
    }
    story.pause();
    story.close(connection.server);
}

fn fin_wait2_times_out(story: &mut Story<'_>) {
    const SECONDS: u64 = 3;
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.ask(one, &format!("linger2 {SECONDS}"));
    story.close(one);
    let waited = Duration::from_secs(SECONDS);
    let since = story.ends[one].steps.last().expect("FIN_WAIT2").window;
    let late = Duration::from_nanos(wheel_step(SECONDS as i64) as u64);
    let window = since.later(waited, waited + late);
    while boottime() < window.to + 100_000_000 {
        thread::sleep(Duration::from_millis(100));
    }
    story.step(one, "CLOSE", window, None);
    // Where the acknowledgement of the FIN was handled while close() still held the socket, no timewait socket
    // waits but the socket itself, and sends a RST in the end ("Bad case" in `tcp_rcv_state_process()`, 6.18).
    if story.find(other).is_none() {
        story.rst_at_peer(one, window);
    }
    story.close(other);
}

fn no_fin_wait2_wanted(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.ask(one, "linger2 -1");
    story.close(one);
    let window = story.ends[one].steps.last().expect("FIN_WAIT2").window;
    story.step(one, "CLOSE", window, None);
    // It answers the acknowledgement of its FIN with a RST.
    story.rst_at_peer(one, window);
    story.settle();
    story.close(other);
}

fn reused(story: &mut Story<'_>) {
    let first = story.open();
    story.talk(first);
    closed_in_turn(story, first.client, first.server);
    // The kernel reuses after a second (`tcp_tw_reuse_delay`).
    thread::sleep(story.random.milliseconds(1300, 4000));
    let second = story.open_again(first);
    let window = story.ends[second.client].steps[0].window;
    story.ends_rest(first.client, "reused", window);
    story.pause();
    closed_in_turn(story, second.server, second.client);
}

fn reopened(story: &mut Story<'_>) {
    let first = story.open();
    story.talk(first);
    closed_in_turn(story, first.server, first.client);
    thread::sleep(story.random.milliseconds(300, 3000));
    let second = story.open_again(first);
    let window = story.ends[second.client].steps[0].window;
    story.ends_rest(first.server, "reopened", window);
    story.pause();
    closed_in_turn(story, second.client, second.server);
}

/// A connection over IPv4 in TIME_WAIT, for segments made by hand. Gives the end.
fn resting_v4(story: &mut Story<'_>) -> usize {
    let place = Arc::clone(&story.place);
    let client = story.client();
    let connection = story.open_between(&client, &place.servers[0].1, None);
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
    one
}

/// Has the peer of an end send a segment once more.
fn forge(story: &Story<'_>, end: usize, flag: Flag) -> Window {
    let end = &story.ends[end];
    let (local, remote) = (
        end.local.expect("connected"),
        end.remote.expect("connected"),
    );
    let capture = story
        .place
        .capture
        .as_ref()
        .expect("a place that is captured");
    Window::of(|| locked(capture).forge(tests::Pair { local, remote }, flag)).0
}

fn time_wait_reset(story: &mut Story<'_>) {
    let one = resting_v4(story);
    thread::sleep(story.random.milliseconds(100, 3000));
    let window = forge(story, one, Flag::Rst);
    story.ends_rest(one, "reset", window);
}

fn rearmed(story: &mut Story<'_>) {
    let one = resting_v4(story);
    // Far enough that the timer moves to another bucket of the wheel.
    let step = wheel_step(60) as u64 / 1_000_000;
    thread::sleep(story.random.milliseconds(step + 500, 2 * step + 2000));
    forge(story, one, Flag::Ack);
    story.ends[one]
        .rest
        .as_mut()
        .expect("it is in TIME_WAIT")
        .rearmed = true;
}

fn time_wait_aborted(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
    if can_destroy() {
        thread::sleep(story.random.milliseconds(50, 3000));
        story.destroy(one);
    }
}

/// `sock_diag` destroys timewait sockets from 6.1 on.
fn can_destroy() -> bool {
    kernel_is_at_least(6, 1)
}

fn skipped(story: &mut Story<'_>) {
    story.place = Arc::clone(&story.stage.full);
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.shutdown(one);
    story.settle();
    story.close(other);
    let end = &mut story.ends[one];
    let window = end.steps.last().expect("TIME_WAIT").window;
    // The kernel closes the socket instead.
    end.steps.last_mut().expect("TIME_WAIT").to = "CLOSE";
    end.state = "CLOSE";
    end.rest = Some(Rest {
        ending: "skipped",
        rearmed: false,
        ended: Some(window),
    });
    story.pause();
    story.ask(one, "close");
}

fn namespace_goes(story: &mut Story<'_>) {
    let Some(place) = locked(&story.stage.doomed).take() else {
        return client_closes_first(story);
    };
    let netns = place.netns;
    story.place = Arc::new(place);
    let connections = [(); 3].map(|()| story.open());
    for connection in connections {
        let (one, other) = either(story, connection);
        closed_in_turn(story, one, other);
    }
    thread::sleep(story.random.milliseconds(300, 2000));
    let listeners: Vec<_> = story
        .place
        .servers
        .iter()
        .map(|(_, server)| Arc::clone(&server.player))
        .collect();
    let listeners: Vec<_> = listeners
        .iter()
        .map(|player| story.old_listener(player))
        .collect();
    // The processes hold it until they have ended, and the descriptor of the laboratory.
    let elsewhere = Arc::clone(&story.stage.places[0]);
    let doomed = Arc::into_inner(std::mem::replace(&mut story.place, elsewhere));
    let Place {
        lab,
        clients,
        servers,
        ..
    } = doomed.expect("nobody else has it");
    let (window, ()) = Window::of(|| {
        let players = servers
            .iter()
            .map(|(_, server)| &server.player)
            .chain(&clients);
        players.for_each(|player| player.take().exit(0));
        drop(lab);
    });
    *locked(&story.stage.gone) = Some((netns, window.to));
    for end in listeners {
        let by = story.ends[end].owner.who.clone();
        story.closed(end, window, &by);
    }
    // The kernel does it when it comes to it.
    let window = window.later(Duration::ZERO, Duration::from_secs(2));
    for connection in connections {
        for end in [connection.client, connection.server] {
            if story.ends[end].rest.is_some() {
                story.ends_rest(end, "namespace_gone", window);
            }
        }
    }
}

fn aborted(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    if story.random.coin() {
        // In CLOSE_WAIT.
        story.shutdown(other);
        story.settle();
    }
    if can_destroy() {
        story.destroy(one);
        story.pause();
    }
    story.close(one);
    story.close(other);
}

fn killed(story: &mut Story<'_>) {
    let client = story.process("victim");
    let connection = story.open_from(&client);
    story.talk(connection);
    story.pause();
    let fixture = client.take();
    let window = Window::of(|| fixture.kill()).0;
    story.closed(connection.client, window, &client.who);
    story.pause();
    story.close(connection.server);
}

fn exited(story: &mut Story<'_>) {
    let client = story.process("leaver");
    let connection = story.open_from(&client);
    story.pause();
    let fixture = client.take();
    let window = Window::of(|| fixture.exit(0)).0;
    story.closed(connection.client, window, &client.who);
    story.pause();
    story.close(connection.server);
}

fn child_closes(story: &mut Story<'_>) {
    let client = story.process("parent");
    let connection = story.open_from(&client);
    let child = story.fork(&client, "child");
    // The parent's close is not one for TCP.
    story.ask(connection.client, "close");
    story.pause();
    story.hand_to(connection.client, &child);
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}

fn parent_exits(story: &mut Story<'_>) {
    let client = story.process("parent");
    let connection = story.open_from(&client);
    let heir = story.fork(&client, "heir");
    client.take().exit(0);
    story.hand_to(connection.client, &heir);
    story.pause();
    // What comes while the process that connected is gone still has an owner.
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}

fn passed_on(story: &mut Story<'_>) {
    let (client, receiver) = (story.process("giver"), story.process("taker"));
    let connection = story.open_from(&client);
    let name = story.name_of(connection.client);
    client.with(|from| receiver.with(|to| from.send(&name, to)));
    story.hand_to(connection.client, &receiver);
    story.pause();
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}

fn child_accepts(story: &mut Story<'_>) {
    let listener = story.process("master");
    let (_, name, address) = story.listen(&listener);
    let worker = story.fork(&listener, "worker");
    let client = story.client();
    let connection = story.knock(&client, &listener, address, None);
    story.pause();
    story.accept(connection, &worker, &name);
    story.pause();
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}

/// Threads have other names than their process, which owns the sockets.
fn in_threads(story: &mut Story<'_>) {
    let client = story.process("threads");
    let connection = story.open_from(&client);
    story.pause();
    let (one, other) = either(story, connection);
    for end in [one, other] {
        let player = story.player_of(end);
        let name = story.name_of(end);
        let (window, _) = player.ask(&format!("thread closer close {name}"));
        story.closed(end, window, &player.who);
        story.pause();
    }
}

fn peer_is_silent(story: &mut Story<'_>) {
    let Connection { client, server } = story.open();
    story.ask(server, "deaf");
    story.ask(client, "user-timeout 500");
    let (window, _) = story.ask(client, "write 1");
    let ended = story.await_row(client, window.from, "the time-out", |row| row.is_none());
    story.step(client, "CLOSE", ended, Some("ETIMEDOUT"));
    story.close(client);
    story.ask(server, "hear");
    story.pause();
    story.close(server);
}

fn connects_again(story: &mut Story<'_>) {
    let listener = story.process("twice");
    let (_, listening, address) = story.listen(&listener);
    let client = story.process("again");
    let first = story.knock(&client, &listener, address, None);
    story.accept(first, &listener, &listening);
    story.pause();
    story.disconnect(first.client);
    story.close(first.server);
    story.pause();
    let name = story.name_of(first.client);
    let (window, pair) = client.with(|fixture| fixture.connect(&name, address));
    let second = story.connected(first.client, &listener, window, pair);
    story.accept(second, &listener, &listening);
    story.pause();
    closed_in_turn(story, second.server, second.client);
}

fn moves(story: &mut Story<'_>) {
    let client = story.process("mover");
    let connection = story.open_from(&client);
    let stage = story.stage;
    let elsewhere = stage
        .places
        .iter()
        .find(|place| place.netns != story.place.netns);
    let path = elsewhere.expect("two places").lab.netns.path();
    client.ask(&format!("setns {}", path.display()));
    story.pause();
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}

fn both_ends(story: &mut Story<'_>) {
    let alone = story.process("alone");
    let (_, name, address) = story.listen(&alone);
    let connection = story.knock(&alone, &alone, address, None);
    story.accept(connection, &alone, &name);
    story.pause();
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}

fn elsewhere(story: &mut Story<'_>) {
    story.place = Arc::clone(&story.stage.elsewhere);
    client_closes_first(story);
}

/// The other end closes, or shuts its sending side, and this one is left open in some way.
fn left(story: &mut Story<'_>, end: usize, other: usize, holders: &[&Player]) {
    let arrived = |story: &Story<'_>| {
        story.await_row(end, 0, "CLOSE_WAIT", |row| {
            row.is_some_and(|row| row.state == "CLOSE_WAIT")
        });
    };
    let cause = match story.random.below(5) {
        0 => {
            story.close(other);
            arrived(story);
            story.read(end);
            "drained"
        }
        1 => {
            story.close(other);
            "eof_unread"
        }
        2 => {
            story.write(other, 300);
            story.shutdown(other);
            "eof_unread"
        }
        3 => {
            story.shutdown(other);
            arrived(story);
            story.ask(end, "fill");
            story.unread_at(other);
            "write_blocked"
        }
        _ => {
            story.close(other);
            arrived(story);
            story.settle();
            story.shutdown(end);
            "finished"
        }
    };
    story.leave(end, Some(cause), holders);
}

/// What was left open is closed in the end.
fn tidy(story: &mut Story<'_>, end: usize, other: usize) {
    story.pause();
    let cause = story.ends[end].leak.as_ref().and_then(|left| left.cause);
    if story.ends[end].state == "CLOSE" {
        story.ask(end, "close");
    } else if cause == Some("write_blocked") || story.random.coin() || !can_destroy() {
        // A FIN would not get through.
        story.reset(end);
    } else {
        story.close(end);
        if story.ends[other].state == "TIME_WAIT" {
            thread::sleep(Duration::from_millis(200));
            story.destroy(other);
        }
    }
}

fn leaked_by_server(story: &mut Story<'_>) {
    let leaker = story.process("leaker");
    let (_, name, address) = story.listen(&leaker);
    let client = story.client();
    let mut all = Vec::new();
    for _ in 0..=story.random.below(4) {
        let connection = story.knock(&client, &leaker, address, None);
        story.accept(connection, &leaker, &name);
        story.pause();
        left(story, connection.server, connection.client, &[&leaker]);
        all.push(connection);
    }
    story.rest();
    for connection in all {
        tidy(story, connection.server, connection.client);
    }
}

fn leaked_by_client(story: &mut Story<'_>) {
    let leaker = story.process("leaker");
    let mut all = Vec::new();
    for _ in 0..=story.random.below(4) {
        let connection = story.open_from(&leaker);
        story.pause();
        left(story, connection.client, connection.server, &[&leaker]);
        all.push(connection);
    }
    story.rest();
    for connection in all {
        tidy(story, connection.client, connection.server);
    }
}

fn leaked_by_two(story: &mut Story<'_>) {
    let leaker = story.process("leaker");
    let connection = story.open_from(&leaker);
    let Connection { client, server } = connection;
    left(story, client, server, &[]);
    let child = story.fork(&leaker, "heir");
    let cause = story.ends[client].leak.as_ref().and_then(|left| left.cause);
    story.leave(client, cause, &[&leaker, &child]);
    story.rest();
    // The parent's is not the last descriptor.
    story.ask(client, "close");
    story.hand_to(client, &child);
    tidy(story, client, server);
}

fn leaked_without_accept(story: &mut Story<'_>) {
    let leaker = story.process("leaker");
    let (end, name, address) = story.listen(&leaker);
    let client = story.client();
    let mut all = Vec::new();
    for _ in 0..=story.random.below(3) {
        let connection = story.knock(&client, &leaker, address, None);
        story.learn_cookie(connection.server);
        story.pause();
        story.close(connection.client);
        story.leave(connection.server, Some("not_accepted"), &[&leaker]);
        all.push(connection);
    }
    story.rest();
    let (window, _) = leaker.ask(&format!("close {name}"));
    story.closed(end, window, &leaker.who);
    for connection in all {
        story.closed_unaccepted(connection.server, window);
    }
}

/// The peer has only shut its sending side, and is answered.
fn answers_for_long(story: &mut Story<'_>) {
    let connection = story.open();
    let (one, other) = either(story, connection);
    story.shutdown(one);
    story.leave(other, None, &[]);
    story.arrive();
    while !story.stage.gate.is_open() {
        story.write(other, 100);
        story.read(one);
        thread::sleep(Duration::from_millis(200));
    }
    story.reset(other);
    story.ask(one, "close");
}

/// The connections of [`BEFORE`].
pub(crate) fn begin_before(story: &mut Story<'_>) {
    let connection = story.open();
    story.talk(connection);
    story.forget_the_past();
}

fn there_before(story: &mut Story<'_>) {
    let connection = Connection {
        client: 0,
        server: 1,
    };
    story.pause();
    let (one, other) = either(story, connection);
    closed_in_turn(story, one, other);
}
