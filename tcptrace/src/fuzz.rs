//! Everything that reads bytes that other programs wrote, for the fuzzers in the crate `fuzz`. It is not part of the
//! library's interface.
//!
//! An entry point takes any bytes. It fails by a panic, or by exceeding the fuzzer's limits of time and memory. Most
//! entry points are beside the private functions that they call.

use std::hint::black_box;

use crate::{container, event, kernel, run, source};

/// An entry point.
pub type Target = fn(&[u8]);

/// Every entry point, by the name of its folder in `fuzz/seeds`.
pub const TARGETS: &[(&str, Target)] = &[
    ("btf", btf),
    ("cgroup_path", cgroup_path),
    ("kallsyms", kernel::kallsyms::fuzz),
    ("mountinfo", mountinfo),
    ("names_protocol", source::fuzz_stacks::protocol),
    ("netstat", netstat),
    ("perf_map", source::fuzz_stacks::perf_map),
    ("proc_details", kernel::procfs::fuzz::details),
    ("proc_link", kernel::procfs::fuzz::link),
    ("proc_maps", source::fuzz_stacks::maps),
    ("proc_stat", kernel::procfs::fuzz::stat),
    ("record", record),
    ("recording", run::fuzz),
    ("sock_diag", kernel::sock_diag::fuzz),
];

fn btf(bytes: &[u8]) {
    let Ok(btf) = kernel::btf::Btf::parse(bytes.to_vec()) else {
        return;
    };
    for path in [
        "sock.__sk_common.skc_family",
        "sock.sk_err",
        "sock.sk_socket.file",
    ] {
        let _ = black_box(btf.offset(path));
    }
    black_box(btf.argument_count("tcp_abort"));
}

fn cgroup_path(path: &[u8]) {
    if let Some(container) = container::of_cgroup(&String::from_utf8_lossy(path)) {
        assert!(!container.is_empty());
    }
}

fn mountinfo(table: &[u8]) {
    for mount in kernel::mountinfo::mounts(table) {
        assert!(mount.root.len() <= table.len());
    }
}

fn netstat(text: &[u8]) {
    black_box(kernel::netstat::TcpExt::parse(&String::from_utf8_lossy(
        text,
    )));
}

/// A record of the ring buffer: what it decodes to is the same after it was recorded and read again.
fn record(bytes: &[u8]) {
    let Ok(event) = event::decode(bytes) else {
        return;
    };
    let mut line = Vec::new();
    event::line::write(&mut line, &event);
    let read: event::Event = serde_json::from_slice(&line).expect("a recorded line can be read");
    assert_eq!(read, event);
}
