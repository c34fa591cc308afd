//! A process that leaves those who connect to it.

use std::{net::SocketAddr, time::Duration};

use crate::{Diag, Fixture, Lab, wait_until};

/// Time for a FIN to arrive.
const SOON: Duration = Duration::from_secs(20);

/// A server that closes first, so that whoever has connected is in CLOSE_WAIT.
#[derive(Debug)]
pub struct Leaver {
    /// Its process.
    pub fixture: Fixture,
    /// Where it listens.
    pub address: SocketAddr,
    diag: Diag,
}

impl Leaver {
    /// One in this lab.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        let mut fixture = lab.fixture("leaver");
        let address = fixture.listen("listener", "127.0.0.1:0");
        let diag = lab.diag();
        Self {
            fixture,
            address,
            diag,
        }
    }

    /// Has `process` connect as `name`, and closes. Returns the cookie of the process's socket, which is then
    /// in CLOSE_WAIT, the end of file not read.
    pub fn leave(&mut self, process: &mut Fixture, name: &str) -> String {
        process.connect(name, self.address);
        self.fixture.accept("listener", "it");
        self.fixture.close("it");
        self.wait_left(process, name)
    }

    /// The same, but it only shuts its sending side, and its socket stays as `name`.
    pub fn shut(&mut self, process: &mut Fixture, name: &str) -> String {
        process.connect(name, self.address);
        self.fixture.accept("listener", name);
        self.fixture.ask(&format!("shutdown {name}"));
        self.wait_left(process, name)
    }

    fn wait_left(&self, process: &mut Fixture, name: &str) -> String {
        let cookie = process.cookie(name);
        wait_until("CLOSE_WAIT", SOON, || {
            let row = self.diag.row(&cookie)?;
            (row.state == "CLOSE_WAIT").then_some(())
        });
        cookie
    }
}
