//! From where in its code a connection was opened: kept for as long as it lasts, and no longer.

use super::*;
use crate::{event::Called, tracker::Site};

fn called(ms: u64, socket: Socket, stack: u32) -> Event {
    Event::Called(Called {
        time: ns(ms),
        cookie: socket.cookie,
        stack,
    })
}

/// What is known of a socket that a look shows in this state.
fn site(world: &World, socket: Socket, state: State) -> Option<Site> {
    let Event::Socket(row) = row(1000, socket, state, 7) else {
        return None;
    };
    world.tracker.standing(&row).map(|standing| standing.site)
}

#[test]
fn the_place_is_kept_through_all_changes() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    assert_eq!(site(&world, client(), SynSent), Some(Site::UNTOLD));
    world.feed(called(0, client(), 5));
    world.feed(change(1, client(), SynSent, Established));
    world.feed(change(2, client(), Established, CloseWait));
    assert_eq!(site(&world, client(), CloseWait), Some(Site::stack(5)));
    assert_eq!(Site::stack(5).id(), Some(5));
}

#[test]
fn a_connection_anew_is_from_another_place() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    world.feed(called(0, client(), 5));
    world.feed(change(1, client(), SynSent, Close).by(curl()));
    world.feed(change(2, client(), Close, SynSent).by(curl()));
    assert_eq!(site(&world, client(), SynSent), Some(Site::UNTOLD));
}

#[test]
fn an_accepted_connection_has_the_place_of_accept() {
    let mut world = World::new();
    world.feed(change(0, server(), Listen, SynRecv));
    world.feed(change(1, server(), SynRecv, Established));
    assert_eq!(site(&world, server(), Established), Some(Site::UNTOLD));
    world.feed(accept(2, server(), nginx()));
    world.feed(called(2, server(), 9));
    world.feed(change(3, server(), Established, CloseWait));
    assert_eq!(site(&world, server(), CloseWait), Some(Site::stack(9)));
}

/// Walking a stack takes a while, and a connection can be over by then.
#[test]
fn the_place_can_become_known_after_the_end() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    world.feed(change(1, client(), SynSent, Established));
    world.feed(change(2, client(), Established, CloseWait));
    world.feed(change(3, client(), CloseWait, LastAck).by(curl()));
    world.feed(change(4, client(), LastAck, Close));
    let mut told = Vec::new();
    world.tracker.feed(&called(0, client(), 5), &mut |fact| {
        if let Fact::Called(cookie, site) = fact {
            told.push((cookie, site));
        }
    });
    assert_eq!(told, [(client().cookie, Site::stack(5))]);
    // Of one that goes on it is enough that the tracker knows.
    world.feed(change(5, server(), Listen, SynRecv));
    world.feed(change(6, server(), SynRecv, Established));
    world
        .tracker
        .feed(&called(6, server(), 9), &mut |fact| panic!("{fact:?}"));
    assert_eq!(site(&world, server(), Established), Some(Site::stack(9)));
}

#[test]
fn of_a_socket_that_is_still_held_after_the_end_as_well() {
    let mut world = World::new();
    world.tracker = Tracker::new(Selection {
        finished: true,
        ..Selection::default()
    });
    world.start(Probes::Functions, Sockets::default());
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    world.feed(change(1, client(), SynSent, Established));
    world.feed(change(2, client(), Established, Close));
    assert_eq!(site(&world, client(), Close), Some(Site::UNTOLD));
    world.feed(called(0, client(), 5));
    assert_eq!(site(&world, client(), Close), Some(Site::stack(5)));
}

#[test]
fn an_accept_that_is_not_believed_has_no_place_either() {
    let mut world = World::new();
    world.feed(change(0, client(), Close, SynSent).by(curl()));
    world.feed(called(0, client(), 5));
    world.feed(change(1, client(), SynSent, Established));
    world.feed(accept(2, client(), nginx()));
    world.feed(called(2, client(), 9));
    assert_eq!(site(&world, client(), Established), Some(Site::stack(5)));
    world.feed(called(3, client(), 7));
    assert_eq!(site(&world, client(), Established), Some(Site::stack(7)));
}

#[test]
fn from_before_there_is_none() {
    let mut world = World::new();
    world.feed(look(0, Scope::All));
    world.feed(row(0, client(), Established, 7));
    world.feed(look_end(1, &[]));
    assert_eq!(site(&world, client(), Established), Some(Site::BEFORE));
    world.feed(change(2, client(), Established, CloseWait));
    assert_eq!(site(&world, client(), CloseWait), Some(Site::BEFORE));
    // A stack of a connection that nobody knows is of no use.
    world.feed(called(3, server(), 4));
    assert_eq!(site(&world, client(), CloseWait), Some(Site::BEFORE));
}
