//! A process that keeps one CPU busy for others to be mistaken for it.
//!
//! `decoy CPU` burns about 40 % of that CPU at the lowest priority and sends datagrams to itself, so
//! that softirq work of the CPU, timers and other processes' segments, often runs in its context. It
//! ends when its standard input does.

use std::{
    io::Read,
    net::UdpSocket,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

fn main() {
    let cpu = std::env::args()
        .nth(1)
        .expect("usage: decoy CPU")
        .parse()
        .expect("a CPU's number");
    let mut cpus = CpuSet::new();
    cpus.set(cpu).expect("a CPU's number");
    sched_setaffinity(Pid::from_raw(0), &cpus).expect("the CPU exists");
    // SAFETY: takes and returns numbers only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket
        .connect(socket.local_addr().expect("an address"))
        .expect("a peer");
    loop {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(4) {
            let _ = socket.send(b"x");
            let _ = socket.recv(&mut [0]);
        }
        thread::sleep(Duration::from_millis(6));
    }
}
