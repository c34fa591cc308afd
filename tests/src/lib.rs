//! tcptrace against a real kernel: network namespaces, processes that make TCP traffic, an observer
//! that knows nothing of the product, and what the product printed.
//!
//! Every test works in a network namespace of its own, so all of them can run side by side. A test
//! starts with [`Lab::new`], which gives nothing (and says so, once) where there are no privileges.
//!
//! `cargo xtask test` builds tcptrace and runs them. By hand: `TCPTRACE_BIN` names another binary, and
//! `RUST_TEST_THREADS=16` keeps the tests that wait a minute for TIME_WAIT side by side; they sleep
//! mostly, so more threads than CPUs do no harm.

mod capture;
mod clock;
mod decoy;
mod figure;
mod fixture;
mod lab;
mod leaver;
mod lines;
mod netns;
mod observer;
mod peers;
mod pressed;
mod program;
mod reports;
pub mod schema;
pub mod soak;
mod sock_diag;
mod tcptrace;

pub use capture::{Capture, Flag};
pub use clock::{
    HERTZ, boottime, kernel_is_at_least, realtime_of_boottime, wait_until, wheel_step,
};
pub use decoy::Decoys;
pub use figure::figure;
pub use fixture::{Fixture, Pair};
pub use lab::Lab;
pub use leaver::Leaver;
pub use lines::{Line, Lines, PASSIVE_OPEN, Seen};
pub use netns::Netns;
pub use observer::{Observer, Sighting};
pub use peers::{Connection, Peers};
pub use pressed::{Ended, Pressed, Quota, Storm};
pub use program::built;
pub use reports::{Leak, Report};
pub use sock_diag::{Diag, Row};
pub use tcptrace::{Run, Tcptrace};
