//! Where the stories are played: namespaces, processes, and the clock that they are timed with.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;
use tests::{Capture, Decoys, Diag, Fixture, Lab, boottime};

/// From the last moment when something had not been done to the first when it had, in nanoseconds since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) from: i64,
    pub(crate) to: i64,
}

impl Window {
    /// When `act` was done.
    pub(crate) fn of<T>(act: impl FnOnce() -> T) -> (Self, T) {
        let from = boottime();
        let done = act();
        let to = boottime();
        (Self { from, to }, done)
    }

    /// What happens so much later, at least and at most.
    pub(crate) fn later(self, least: Duration, most: Duration) -> Self {
        Self {
            from: self.from + least.as_nanos() as i64,
            to: self.to + most.as_nanos() as i64,
        }
    }
}

/// A process, as tcptrace should name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Who {
    pub(crate) pid: u32,
    pub(crate) comm: String,
}

/// A process of a story. Several stories may use it.
#[derive(Debug)]
pub(crate) struct Player {
    pub(crate) who: Who,
    fixture: Mutex<Option<Fixture>>,
}

impl Player {
    pub(crate) fn new(fixture: Fixture) -> Arc<Self> {
        let who = Who {
            pid: fixture.pid,
            comm: fixture.comm.clone(),
        };
        Arc::new(Self {
            who,
            fixture: Mutex::new(Some(fixture)),
        })
    }

    /// Has it act.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Fixture) -> T) -> (Window, T) {
        let mut fixture = locked(&self.fixture);
        let fixture = fixture.as_mut().expect("it has not been taken");
        Window::of(|| act(fixture))
    }

    /// Has it obey a command that must succeed.
    pub(crate) fn ask(&self, command: &str) -> (Window, Value) {
        self.with(|fixture| fixture.ask(command))
    }

    /// Nobody may use it afterwards.
    pub(crate) fn take(&self) -> Fixture {
        let fixture = locked(&self.fixture).take();
        fixture.expect("it has not been taken")
    }
}

/// A process that listens, and at which address it is reached.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) player: Arc<Player>,
    pub(crate) address: SocketAddr,
    /// Whoever connects must accept before the next one connects.
    pub(crate) turn: Mutex<()>,
}

/// Which kind of addresses a connection has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
    /// IPv4 on IPv6 sockets at both ends.
    Mapped,
    /// An IPv4 socket connects to an IPv6 one.
    Half,
}

impl Family {
    pub(crate) const ALL: [Self; 4] = [Self::V4, Self::V6, Self::Mapped, Self::Half];

    pub(crate) fn listen(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.1:0",
            Self::V6 => "[::1]:0",
            Self::Mapped | Self::Half => "[::]:0",
        }
    }

    pub(crate) fn reach(self) -> IpAddr {
        match self {
            Self::V4 | Self::Half => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
            Self::Mapped => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        }
    }
}

/// A namespace with processes in it.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) lab: Lab,
    decoys: Mutex<Option<Arc<Decoys>>>,
    pub(crate) netns: u64,
    pub(crate) clients: Vec<Arc<Player>>,
    pub(crate) servers: Vec<(Family, Server)>,
    /// None where nothing may keep the namespace.
    pub(crate) diag: Option<Diag>,
    pub(crate) capture: Option<Mutex<Capture>>,
}

impl Place {
    /// One with two clients and a server of each family.
    pub(crate) fn new(mut lab: Lab, number: usize) -> Self {
        let decoys = Mutex::new(Some(Arc::clone(&lab.decoys)));
        lab.rest();
        let servers = Family::ALL.map(|family| {
            let mut fixture = lab.fixture(&format!("server{number}-{family:?}").to_lowercase());
            let port = fixture.listen("listener", family.listen()).port();
            let server = Server {
                player: Player::new(fixture),
                address: SocketAddr::new(family.reach(), port),
                turn: Mutex::new(()),
            };
            (family, server)
        });
        let client = |name: &str| Player::new(lab.fixture(&format!("client{number}-{name}")));
        Self {
            netns: lab.netns.inode(),
            clients: vec![client("a"), client("b")],
            servers: servers.into(),
            decoys,
            diag: Some(lab.diag()),
            capture: Some(Mutex::new(lab.capture())),
            lab,
        }
    }

    /// One that nothing but its processes and this value keeps.
    pub(crate) fn bare(lab: Lab, number: usize) -> Self {
        let place = Self::new(lab, number);
        Self {
            diag: None,
            capture: None,
            ..place
        }
    }
}

/// Everything that stories use.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) places: Vec<Arc<Place>>,
    /// A place without room for TIME_WAIT.
    pub(crate) full: Arc<Place>,
    /// A place that tcptrace is not asked for.
    pub(crate) elsewhere: Arc<Place>,
    /// A place that will go.
    pub(crate) doomed: Mutex<Option<Place>>,
    /// Its number, and when it was gone, boot time: from then on it may be somebody else's.
    pub(crate) gone: Mutex<Option<(u64, i64)>>,
    pub(crate) gate: Gate,
}

impl Stage {
    /// While everybody waits, decoys need not be busy.
    pub(crate) fn rest(&self, rest: bool) {
        for place in self.places.iter().chain([&self.full, &self.elsewhere]) {
            *locked(&place.decoys) = (!rest).then(Decoys::running);
        }
    }

    /// Reads captured segments before the kernel has no room for more.
    pub(crate) fn read_segments(&self) {
        for capture in self
            .places
            .iter()
            .filter_map(|place| place.capture.as_ref())
        {
            locked(capture).read();
        }
    }
}

/// Where stories with leaked sockets wait until these have been looked at.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    arrived: usize,
    open: bool,
}

impl Gate {
    /// A story has ended, or rests.
    pub(crate) fn arrive(&self) {
        locked(&self.state).arrived += 1;
        self.changed.notify_all();
    }

    pub(crate) fn open(&self) {
        locked(&self.state).open = true;
        self.changed.notify_all();
    }

    pub(crate) fn is_open(&self) -> bool {
        locked(&self.state).open
    }

    /// How many have arrived after some time, or when all have.
    pub(crate) fn wait_arrived(&self, all: usize, limit: Duration) -> usize {
        let state = locked(&self.state);
        let waited = self
            .changed
            .wait_timeout_while(state, limit, |state| state.arrived < all);
        waited.unwrap_or_else(PoisonError::into_inner).0.arrived
    }

    pub(crate) fn wait_open(&self) {
        let state = locked(&self.state);
        drop(self.changed.wait_while(state, |state| !state.open));
    }
}

/// A story that failed must not stop the others.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
