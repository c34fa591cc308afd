//! A server, a client, and connections between them.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{Diag, Fixture, Lab, Pair, wait_until};

/// Two processes in a lab. The server listens as `listener`.
#[derive(Debug)]
pub struct Peers {
    /// The process that connects.
    pub client: Fixture,
    /// The process that listens and accepts.
    pub server: Fixture,
    /// Where the client reaches the server.
    pub address: SocketAddr,
    diag: Diag,
    made: usize,
}

/// An established connection, accepted.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The name of both sockets in their fixtures.
    pub name: String,
    /// The addresses as the client has them.
    pub pair: Pair,
    /// The cookie of the client's socket.
    pub client: String,
    /// The cookie of the server's socket.
    pub server: String,
}

impl Peers {
    /// Over IPv4.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        Self::over(lab, "127.0.0.1:0", [127, 0, 0, 1].into())
    }

    /// The server listens at one address, the client connects to another one of the same port.
    #[must_use]
    pub fn over(lab: &Lab, listen: &str, connect: IpAddr) -> Self {
        Self::named(lab, "client", "server", listen, connect)
    }

    /// The same with these names of the processes.
    #[must_use]
    pub fn named(lab: &Lab, client: &str, server: &str, listen: &str, connect: IpAddr) -> Self {
        let client = lab.fixture(client);
        let mut server = lab.fixture(server);
        let port = server.listen("listener", listen).port();
        Self {
            client,
            server,
            address: SocketAddr::new(connect, port),
            diag: lab.diag(),
            made: 0,
        }
    }

    /// Connects and accepts.
    pub fn connect(&mut self) -> Connection {
        self.made += 1;
        let name = format!("c{}", self.made);
        let pair = self.client.connect(&name, self.address);
        self.accept(name, pair)
    }

    /// Connects from this local address, which may be one that rests in TIME_WAIT.
    pub fn connect_from(&mut self, local: SocketAddr) -> Connection {
        self.made += 1;
        let name = format!("c{}", self.made);
        self.client.ask(&format!("bind {name} {local}"));
        let pair = self.client.connect(&name, self.address);
        self.accept(name, pair)
    }

    fn accept(&mut self, name: String, pair: Pair) -> Connection {
        let seen = self.server.accept("listener", &name);
        assert_eq!(
            seen.reversed().local.port(),
            pair.local.port(),
            "another connection came first"
        );
        let client = self.client.cookie(&name);
        let server = self.server.cookie(&name);
        Connection {
            name,
            pair,
            client,
            server,
        }
    }

    /// Closes at the client, and when its socket has become an orphan in FIN_WAIT2, at the server. Then
    /// the client's socket is in TIME_WAIT.
    ///
    /// # Panics
    /// When the kernel does otherwise.
    pub fn client_closes_first(&mut self, connection: &Connection) {
        self.client.close(&connection.name);
        self.wait("FIN_WAIT2", true, &connection.client);
        self.server.close(&connection.name);
        self.wait("TIME_WAIT", true, &connection.client);
    }

    /// The other way round: TIME_WAIT at the server.
    ///
    /// # Panics
    /// When the kernel does otherwise.
    pub fn server_closes_first(&mut self, connection: &Connection) {
        self.server.close(&connection.name);
        self.wait("FIN_WAIT2", true, &connection.server);
        self.client.close(&connection.name);
        self.wait("TIME_WAIT", true, &connection.server);
    }

    /// The client only shuts its sending side: it enters TIME_WAIT directly, with a full socket until
    /// then.
    ///
    /// # Panics
    /// When the kernel does otherwise.
    pub fn client_shuts_first(&mut self, connection: &Connection) {
        self.client.ask(&format!("shutdown {}", connection.name));
        self.wait("FIN_WAIT2", false, &connection.client);
        self.server.close(&connection.name);
        self.wait("TIME_WAIT", true, &connection.client);
        self.client.close(&connection.name);
    }

    /// A new connection that the client has closed. The server's socket is in CLOSE_WAIT, the end of file
    /// not read.
    pub fn left_by_client(&mut self) -> Connection {
        let connection = self.connect();
        self.client.close(&connection.name);
        self.wait("CLOSE_WAIT", false, &connection.server);
        connection
    }

    /// A new connection, [closed first by the client](Self::client_closes_first).
    pub fn closed_by_client(&mut self) -> Connection {
        let connection = self.connect();
        self.client_closes_first(&connection);
        connection
    }

    /// A new connection, [closed first by the server](Self::server_closes_first).
    pub fn closed_by_server(&mut self) -> Connection {
        let connection = self.connect();
        self.server_closes_first(&connection);
        connection
    }

    /// Waits until `sock_diag` has the socket in this state, as a timewait socket or a full one.
    fn wait(&self, state: &str, timewait: bool, cookie: &str) {
        wait_until(state, Duration::from_secs(5), || {
            let row = self.diag.row(cookie)?;
            (row.state == state && row.timewait == timewait).then_some(())
        });
    }
}
