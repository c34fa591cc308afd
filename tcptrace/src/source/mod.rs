//! Where events come from: the running kernel, or a recording of it.

mod cgroups;
mod file;
mod holders;
mod live;
mod looks;
mod stacks;

pub use file::{Error as FileError, File};
pub use live::{Live, Options, Piles, Tracing, Wake};
