//! All that touches the running kernel.

pub mod btf;
pub mod capabilities;
pub mod cgroup;
pub mod clock;
pub mod helper;
pub mod kallsyms;
pub mod memory;
mod mount_tables;
pub mod mountinfo;
pub mod netns;
pub mod netstat;
pub mod open_sockets;
mod private_mount;
pub mod probes;
pub mod procfs;
pub mod ring;
pub mod sock_diag;
pub mod system;
pub mod unlisted;
