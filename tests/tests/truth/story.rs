//! A story: what is done to some connections, and what is true of them because of it.
//!
//! Each action does something to real sockets, and then the same to a machine of its own: the one of RFC 9293,
//! with what Linux makes of it. The machine knows nothing of tcptrace.

use std::{
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{Pair, Row, boottime};

use crate::{
    random::Random,
    stage::{Place, Player, Server, Stage, Who, Window, locked},
};

/// A FIN is acknowledged at once or, if the application has nothing to say, later: after 40 ms as a rule, at
/// most after 200 (`TCP_DELACK_MAX`, `include/net/tcp.h`).
const ACKNOWLEDGED: Duration = Duration::from_millis(210);

/// A socket that a story uses, and what is true of it.
#[derive(Clone, Debug)]
pub(crate) struct End {
    /// Which end of what, for people.
    pub(crate) side: &'static str,
    /// Its cookie; none of one that could not connect.
    pub(crate) cookie: Option<String>,
    pub(crate) netns: u64,
    pub(crate) local: Option<SocketAddr>,
    /// None for a listener.
    pub(crate) remote: Option<SocketAddr>,
    /// The local port was chosen before `connect()`.
    bound: bool,
    /// tcptrace is not asked for it.
    pub(crate) elsewhere: bool,
    pub(crate) steps: Vec<Step>,
    pub(crate) rest: Option<Rest>,
    pub(crate) leak: Option<Left>,
    pub(crate) state: &'static str,
    pub(crate) owner: Owner,
    player: Arc<Player>,
    name: String,
    peer: Option<usize>,
    /// A process has it open.
    open: bool,
    unread: bool,
}

/// Whose a socket is, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) who: Who,
    pub(crate) via: &'static str,
}

/// A change of state.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
    pub(crate) window: Window,
    pub(crate) owner: Owner,
    pub(crate) error: Option<&'static str>,
    /// None: not known to the story.
    pub(crate) local: Option<SocketAddr>,
    pub(crate) remote: Option<SocketAddr>,
}

/// A TIME_WAIT.
#[derive(Clone, Debug)]
pub(crate) struct Rest {
    pub(crate) ending: &'static str,
    pub(crate) rearmed: bool,
    /// None until somebody knows.
    pub(crate) ended: Option<Window>,
}

/// How a socket is left open when tcptrace looks for those.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    /// None: it is not leaked.
    pub(crate) cause: Option<&'static str>,
    /// Who has it open, or its listener.
    pub(crate) holders: Vec<Who>,
}

/// A connection: both of its ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) client: usize,
    pub(crate) server: usize,
}

/// What is played by one thread.
pub(crate) struct Story<'a> {
    pub(crate) kind: &'static str,
    pub(crate) number: usize,
    pub(crate) stage: &'a Stage,
    pub(crate) place: Arc<Place>,
    pub(crate) random: Random,
    pub(crate) ends: Vec<End>,
    /// Where the kernel may do one thing or another: what is true then.
    pub(crate) otherwise: Vec<Vec<End>>,
    arrived: bool,
    names: usize,
}

impl<'a> Story<'a> {
    pub(crate) fn new(kind: &'static str, number: usize, stage: &'a Stage, seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            kind,
            number,
            stage,
            place: random.of(&stage.places),
            random,
            ends: Vec::new(),
            otherwise: Vec::new(),
            arrived: false,
            names: 0,
        }
    }

    pub(crate) fn name_of(&self, end: usize) -> String {
        self.ends[end].name.clone()
    }

    pub(crate) fn player_of(&self, end: usize) -> Arc<Player> {
        Arc::clone(&self.ends[end].player)
    }

    /// An end has something to read.
    pub(crate) fn unread_at(&mut self, end: usize) {
        self.ends[end].unread = true;
    }

    // Time.

    /// A while.
    pub(crate) fn pause(&mut self) {
        thread::sleep(self.random.pause());
    }

    /// Long enough that all acknowledgements have come.
    pub(crate) fn settle(&mut self) {
        thread::sleep(ACKNOWLEDGED + self.random.milliseconds(40, 400));
    }

    /// Waits, if it has not waited before, until tcptrace has looked at what is left open.
    pub(crate) fn rest(&mut self) {
        self.arrive();
        self.stage.gate.wait_open();
    }

    /// From now on nobody waits for this story before sockets that are left open are looked at.
    pub(crate) fn arrive(&mut self) {
        if !self.arrived {
            self.arrived = true;
            self.stage.gate.arrive();
        }
    }

    // Processes.

    /// A new process of this story's own.
    pub(crate) fn process(&mut self, comm: &str) -> Arc<Player> {
        let comm = format!("{comm}{}", self.number);
        Player::new(self.place.lab.fixture(&comm))
    }

    /// A child of that one, with the same sockets.
    pub(crate) fn fork(&mut self, parent: &Player, comm: &str) -> Arc<Player> {
        let comm = format!("{comm}{}", self.number);
        Player::new(parent.with(|fixture| fixture.fork(&comm)).1)
    }

    /// A client that others use as well.
    pub(crate) fn client(&mut self) -> Arc<Player> {
        self.random.of(&self.place.clients)
    }

    /// Has a process do something with the socket of an end.
    pub(crate) fn ask_by(&self, player: &Player, end: usize, command: &str) -> (Window, Value) {
        let name = &self.ends[end].name;
        match command.split_once(' ') {
            Some((verb, rest)) => player.ask(&format!("{verb} {name} {rest}")),
            None => player.ask(&format!("{command} {name}")),
        }
    }

    /// Has the process that has an end do something with it.
    pub(crate) fn ask(&self, end: usize, command: &str) -> (Window, Value) {
        self.ask_by(&self.ends[end].player.clone(), end, command)
    }

    /// From now on this process acts for an end.
    pub(crate) fn hand_to(&mut self, end: usize, player: &Arc<Player>) {
        self.ends[end].player = Arc::clone(player);
    }

    // Opening.

    fn name(&mut self) -> String {
        self.names += 1;
        format!("s{}.{}", self.number, self.names)
    }

    fn end(
        &mut self,
        side: &'static str,
        player: &Arc<Player>,
        name: &str,
        via: &'static str,
    ) -> usize {
        self.ends.push(End {
            side,
            cookie: None,
            netns: self.place.netns,
            local: None,
            remote: None,
            bound: false,
            elsewhere: Arc::ptr_eq(&self.place, &self.stage.elsewhere),
            steps: Vec::new(),
            rest: None,
            leak: None,
            state: "CLOSE",
            owner: Owner {
                who: player.who.clone(),
                via,
            },
            player: Arc::clone(player),
            name: name.to_owned(),
            peer: None,
            open: true,
            unread: false,
        });
        self.ends.len() - 1
    }

    fn pair(&mut self, end: usize, pair: Pair) {
        let plain =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let end = &mut self.ends[end];
        end.local = Some(plain(pair.local));
        end.remote = Some(plain(pair.remote));
    }

    /// A connection between processes that others use as well.
    pub(crate) fn open(&mut self) -> Connection {
        let client = self.client();
        self.open_from(&client)
    }

    /// A connection of this process to a server that others use as well.
    pub(crate) fn open_from(&mut self, client: &Arc<Player>) -> Connection {
        let place = Arc::clone(&self.place);
        let which = self.random.below(place.servers.len() as u64) as usize;
        self.open_between(client, &place.servers[which].1, None)
    }

    /// The same pair of addresses once more.
    pub(crate) fn open_again(&mut self, old: Connection) -> Connection {
        let place = Arc::clone(&self.place);
        let client = Arc::clone(&self.ends[old.client].player);
        let server = &self.ends[old.server].player.who;
        let mut servers = place.servers.iter().map(|(_, server)| server);
        let server = servers.find(|one| one.player.who == *server);
        let from = self.ends[old.client].local.expect("it was connected");
        self.open_between(&client, server.expect("a shared one"), Some(from.port()))
    }

    /// An accepted connection; nobody else may be accepting at this server.
    pub(crate) fn open_between(
        &mut self,
        client: &Arc<Player>,
        server: &Server,
        port: Option<u16>,
    ) -> Connection {
        let turn = locked(&server.turn);
        let connection = self.knock(client, &server.player, server.address, port);
        self.accept(connection, &server.player, "listener");
        drop(turn);
        connection
    }

    /// A connection that nobody has accepted yet.
    pub(crate) fn knock(
        &mut self,
        client: &Arc<Player>,
        listener: &Arc<Player>,
        address: SocketAddr,
        port: Option<u16>,
    ) -> Connection {
        let name = self.name();
        if let Some(port) = port {
            let local = SocketAddr::new(address.ip(), port);
            client.ask(&format!("bind {name} {local}"));
        }
        let (window, pair) = client.with(|fixture| fixture.connect(&name, address));
        let near = self.end("client", client, &name, "connect");
        self.ends[near].cookie = Some(client.with(|fixture| fixture.cookie(&name)).1);
        self.ends[near].bound = port.is_some();
        self.connected(near, listener, window, pair)
    }

    /// `near` has connected to this listener.
    pub(crate) fn connected(
        &mut self,
        near: usize,
        listener: &Arc<Player>,
        window: Window,
        pair: Pair,
    ) -> Connection {
        let name = self.name();
        self.pair(near, pair);
        self.step(near, "SYN_SENT", window, None);
        self.step(near, "ESTABLISHED", window, None);
        let far = self.end("server", listener, &name, "listener");
        self.pair(far, pair.reversed());
        self.ends[far].open = false;
        self.ends[far].state = "LISTEN";
        self.step(far, "SYN_RECV", window, None);
        self.step(far, "ESTABLISHED", window, None);
        self.ends[near].peer = Some(far);
        self.ends[far].peer = Some(near);
        Connection {
            client: near,
            server: far,
        }
    }

    /// Learns the cookie of a socket that no process has yet.
    pub(crate) fn learn_cookie(&mut self, end: usize) {
        self.ends[end].cookie = Some(self.row(end).cookie);
    }

    /// The oldest connection that waits at a listener is this one.
    pub(crate) fn accept(&mut self, connection: Connection, player: &Arc<Player>, listener: &str) {
        let far = connection.server;
        let name = self.ends[far].name.clone();
        let pair = player.with(|fixture| fixture.accept(listener, &name)).1;
        let remote = SocketAddr::new(pair.remote.ip().to_canonical(), pair.remote.port());
        assert_eq!(
            Some(remote),
            self.ends[far].remote,
            "another one came first"
        );
        self.ends[far].cookie = Some(player.with(|fixture| fixture.cookie(&name)).1);
        self.ends[far].owner = Owner {
            who: player.who.clone(),
            via: "accept",
        };
        self.ends[far].open = true;
        self.hand_to(far, player);
    }

    /// A listener of a process of this story's own, and its address.
    pub(crate) fn listen(&mut self, player: &Arc<Player>) -> (usize, String, SocketAddr) {
        let family = self.random.of(&crate::stage::Family::ALL);
        let name = self.name();
        let (window, local) = player.with(|fixture| fixture.listen(&name, family.listen()));
        let end = self.end("listener", player, &name, "listen");
        self.ends[end].cookie = Some(player.with(|fixture| fixture.cookie(&name)).1);
        self.ends[end].local = Some(local);
        self.step(end, "LISTEN", window, None);
        (end, name, SocketAddr::new(family.reach(), local.port()))
    }

    /// The listener of a server that was there before the trace.
    pub(crate) fn old_listener(&mut self, player: &Arc<Player>) -> usize {
        let end = self.end("listener", player, "listener", "holder");
        self.ends[end].cookie = Some(player.with(|fixture| fixture.cookie("listener")).1);
        self.ends[end].state = "LISTEN";
        end
    }

    /// A connect that fails with this error.
    pub(crate) fn connect_fails(
        &mut self,
        client: &Arc<Player>,
        to: SocketAddr,
        error: &'static str,
    ) {
        let name = self.name();
        let command = format!("connect {name} {to}");
        let (window, answer) = client.with(|fixture| fixture.attempt(&command));
        assert_eq!(answer["error"], error, "{command}");
        let end = self.end("client", client, &name, "connect");
        self.ends[end].remote = Some(SocketAddr::new(to.ip().to_canonical(), to.port()));
        let start = Window {
            to: window.from + 50_000_000,
            ..window
        };
        self.step(end, "SYN_SENT", start, None);
        let waits = if error == "ETIMEDOUT" { 2500 } else { 0 };
        let end_of_it = Window {
            from: window.from + waits * 1_000_000,
            ..window
        };
        self.step(end, "CLOSE", end_of_it, Some(error));
        self.ends[end].open = false;
    }

    // The machine.

    /// The kernel changes the state.
    pub(crate) fn step(
        &mut self,
        end: usize,
        to: &'static str,
        window: Window,
        error: Option<&'static str>,
    ) {
        let end = &mut self.ends[end];
        if end.state == "TIME_WAIT" {
            return;
        }
        // `connect()` chooses a port after this.
        let portless = to == "SYN_SENT" && !end.bound;
        end.steps.push(Step {
            from: end.state,
            to,
            window,
            owner: end.owner.clone(),
            error,
            local: end
                .local
                .map(|local| SocketAddr::new(local.ip(), if portless { 0 } else { local.port() })),
            remote: end.remote,
        });
        end.state = to;
        if to == "TIME_WAIT" {
            end.rest = Some(Rest {
                ending: "expired",
                rearmed: false,
                ended: None,
            });
        }
    }

    /// A process changes the state by a call of its own.
    fn step_by(&mut self, end: usize, to: &'static str, window: Window, by: &Who) {
        let owner = &mut self.ends[end].owner;
        if owner.who.pid != by.pid {
            *owner = Owner {
                who: by.clone(),
                via: "close",
            };
        }
        self.step(end, to, window, None);
    }

    /// This end sends its FIN.
    fn fin(&mut self, end: usize, window: Window, by: &Who) {
        let peer = self.ends[end].peer.expect("a connection");
        match self.ends[end].state {
            "ESTABLISHED" => {
                self.step_by(end, "FIN_WAIT1", window, by);
                if self.ends[peer].state == "CLOSE" {
                    // Nobody is there any more.
                    self.step(end, "CLOSE", window, Some("ECONNRESET"));
                    return;
                }
                self.step(peer, "CLOSE_WAIT", window, None);
                self.step(
                    end,
                    "FIN_WAIT2",
                    window.later(Duration::ZERO, ACKNOWLEDGED),
                    None,
                );
            }
            "CLOSE_WAIT" => {
                self.step_by(end, "LAST_ACK", window, by);
                let error = match self.ends[peer].state {
                    "FIN_WAIT2" => {
                        self.step(peer, "TIME_WAIT", window, None);
                        None
                    }
                    _ => Some("ECONNRESET"),
                };
                self.step(end, "CLOSE", window, error);
            }
            _ => {}
        }
    }

    /// This end sends a RST.
    fn rst(&mut self, end: usize, window: Window, by: &Who) {
        self.step_by(end, "CLOSE", window, by);
        self.rst_at_peer(end, window);
    }

    /// What a RST of this end does to its peer.
    pub(crate) fn rst_at_peer(&mut self, end: usize, window: Window) {
        let peer = self.ends[end].peer.expect("a connection");
        let error = match self.ends[peer].state {
            "CLOSE" => return,
            // A timewait socket, which has no place for an error.
            "FIN_WAIT2" if !self.ends[peer].open => None,
            "CLOSE_WAIT" => Some("EPIPE"),
            _ => Some("ECONNRESET"),
        };
        self.step(peer, "CLOSE", window, error);
    }

    /// What the last close of an end's descriptors does.
    pub(crate) fn closed(&mut self, end: usize, window: Window, by: &Who) {
        self.ends[end].open = false;
        match self.ends[end].state {
            "ESTABLISHED" | "CLOSE_WAIT" | "FIN_WAIT2" if self.ends[end].unread => {
                self.rst(end, window, by)
            }
            "LISTEN" => self.step_by(end, "CLOSE", window, by),
            _ => self.fin(end, window, by),
        }
    }

    /// A connection that nobody has accepted goes with its listener.
    pub(crate) fn closed_unaccepted(&mut self, end: usize, window: Window) {
        self.step(end, "CLOSE", window, None);
        self.rst_at_peer(end, window);
    }

    // Acting.

    /// Closes an end.
    pub(crate) fn close(&mut self, end: usize) {
        let by = self.ends[end].player.who.clone();
        let window = self.ask(end, "close").0;
        self.closed(end, window, &by);
    }

    /// Shuts the sending side.
    pub(crate) fn shutdown(&mut self, end: usize) {
        let by = self.ends[end].player.who.clone();
        let window = self.ask(end, "shutdown").0;
        self.fin(end, window, &by);
    }

    /// Closes with a RST.
    pub(crate) fn reset(&mut self, end: usize) {
        let by = self.ends[end].player.who.clone();
        let window = self.ask(end, "reset").0;
        self.ends[end].open = false;
        self.rst(end, window, &by);
    }

    /// Takes a connection off its socket.
    pub(crate) fn disconnect(&mut self, end: usize) {
        let by = self.ends[end].player.who.clone();
        let window = self.ask(end, "disconnect").0;
        self.rst(end, window, &by);
    }

    /// Sends some bytes.
    pub(crate) fn write(&mut self, end: usize, bytes: usize) {
        self.ask(end, &format!("write {bytes}"));
        let peer = self.ends[end].peer.expect("a connection");
        self.ends[peer].unread = true;
    }

    /// Reads what there is.
    pub(crate) fn read(&mut self, end: usize) {
        self.ask(end, "read");
        self.ends[end].unread = false;
    }

    /// A question and its answer, or nothing, or a few.
    pub(crate) fn talk(&mut self, connection: Connection) {
        for _ in 0..self.random.below(3) {
            let Connection { client, server } = connection;
            for (from, to) in [(client, server), (server, client)] {
                let bytes = 1 + self.random.below(2000) as usize;
                self.write(from, bytes);
                self.read(to);
            }
            self.pause();
        }
    }

    // Looking, without tcptrace.

    /// The kernel's row of an end.
    ///
    /// # Panics
    /// When there is none.
    pub(crate) fn row(&self, end: usize) -> Row {
        let row = self.find(end);
        row.unwrap_or_else(|| {
            panic!(
                "sock_diag has no {} in {}",
                self.ends[end].side, self.ends[end].state
            )
        })
    }

    pub(crate) fn find(&self, end: usize) -> Option<Row> {
        let end = &self.ends[end];
        let diag = self
            .place
            .diag
            .as_ref()
            .expect("a place that may be looked at");
        let plain = |address: SocketAddr| {
            Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
        };
        diag.rows().into_iter().find(|row| match &end.cookie {
            Some(cookie) => row.cookie == *cookie,
            None => plain(row.local) == end.local && plain(row.remote) == end.remote,
        })
    }

    /// Waits for something to be so in the kernel's list, which it was not at `before`; gives when it became so.
    pub(crate) fn await_row(
        &self,
        end: usize,
        before: i64,
        what: &str,
        so: impl Fn(Option<&Row>) -> bool,
    ) -> Window {
        let start = Instant::now();
        let mut from = before;
        loop {
            let look = boottime();
            let row = self.find(end);
            if so(row.as_ref()) {
                let to = boottime();
                return Window { from, to };
            }
            from = look;
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{what} did not come: {row:?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Destroys the socket of an end as `ss -K` does.
    pub(crate) fn destroy(&mut self, end: usize) {
        let row = self.row(end);
        let diag = self
            .place
            .diag
            .as_ref()
            .expect("a place that may be looked at");
        let (window, result) = Window::of(|| diag.destroy(&row));
        result.expect("CONFIG_INET_DIAG_DESTROY, 6.1 or later");
        if self.ends[end].state == "TIME_WAIT" {
            self.ends_rest(end, "aborted", window);
        } else {
            self.step(end, "CLOSE", window, Some("ECONNABORTED"));
            self.rst_at_peer(end, window);
        }
    }

    /// TIME_WAIT of an end was ended.
    pub(crate) fn ends_rest(&mut self, end: usize, ending: &'static str, window: Window) {
        let rest = self.ends[end].rest.as_mut().expect("it is in TIME_WAIT");
        rest.ending = ending;
        rest.ended = Some(window);
    }

    /// An end is left open, for this cause (none: it is not leaked), held by these.
    pub(crate) fn leave(&mut self, end: usize, cause: Option<&'static str>, holders: &[&Player]) {
        let holders = holders.iter().map(|player| player.who.clone()).collect();
        self.ends[end].leak = Some(Left { cause, holders });
    }

    /// What has been done so far was before the trace.
    pub(crate) fn forget_the_past(&mut self) {
        for end in &mut self.ends {
            end.steps.clear();
            end.owner.via = "holder";
        }
    }
}

impl Drop for Story<'_> {
    fn drop(&mut self) {
        self.arrive();
    }
}
