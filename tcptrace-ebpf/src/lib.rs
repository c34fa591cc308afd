//! What the two sides of tcptrace share: the records that the probes write, the states in them,
//! the settings that the user side fixes at load, and the table of kernel fields.
//!
//! Everything here has the same layout on both sides: `repr(C)`, no padding, host byte order.
#![no_std]

mod config;
mod fields;
mod record;
mod state;

pub use config::{Caller, Config, Counter, Network, Select, TextRange};
pub use fields::{FIELD_COUNT, FIELDS, Field, FieldSpec, Loss, MISSING, WITHOUT_LOCK};
pub use record::{
    CHAIN, COPY, Flags, Header, Kind, OpenSocket, OpenSocketDetail, Stack, TimeWait, Transition,
    Via,
};
pub use state::State;
