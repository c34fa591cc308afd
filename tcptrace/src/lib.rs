//! tcptrace: TCP state transitions, TIME_WAIT lifetimes and their owners, from the running kernel.
//!
//! Data goes one way: [`source`] (the kernel or a file) gives [events](event), the [`tracker`] makes
//! [facts](tracker::Fact) of them, a [view](view::View) shows those.

pub mod cli;
pub mod command;
pub mod container;
pub mod doctor;
pub mod event;
pub mod exhausted;
#[doc(hidden)]
pub mod fuzz;
mod human;
pub mod invoker;
pub mod json;
pub mod kernel;
pub mod leaks;
pub mod new_file;
pub mod output;
mod pieces;
mod probe_log;
pub mod reason;
pub mod run;
pub mod select;
pub mod source;
pub mod states;
pub mod stream;
pub mod timewait;
pub mod tracker;
pub mod view;
