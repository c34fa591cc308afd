//! All that touches the running kernel.

pub mod btf;
pub mod capabilities;
pub mod cgroup;
pub mod clock;
pub mod kallsyms;
pub mod mountinfo;
pub mod netns;
pub mod netstat;
pub mod probes;
pub mod procfs;
pub mod sock_diag;
mod tracefs;
