//! Who holds very many sockets, by the kernel's walk of all open files and by `/proc`: both see the same.

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead as _, BufReader},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tests::{Lab, Run, Tcptrace};

/// `CAP_BPF`, `CAP_PERFMON`, and `CAP_SYS_ADMIN`, which includes them.
const NO_BPF: [libc::c_ulong; 3] = [39, 38, 21];
const PROCESSES: usize = 30;
/// With both ends, more open files than it takes for the walk to be loaded by a command that looks once.
const PAIRS: usize = 400;
const OLD: &str = "500ms";

/// Processes of `churn hold`. They end with it.
struct Held(Child);

impl Held {
    fn start(lab: &Lab) -> Self {
        let test = env::current_exe().expect("Linux tells");
        let profile: PathBuf = test.ancestors().nth(2).expect("target/PROFILE/deps").into();
        let mut command = Command::new(profile.join("churn"));
        let (processes, pairs) = (format!("processes={PROCESSES}"), format!("pairs={PAIRS}"));
        command.args(["hold", &processes, &pairs]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let netns = lab.netns.as_fd().as_raw_fd();
        let enter = move || {
            // SAFETY: the namespace outlives the start of the child.
            let netns = unsafe { BorrowedFd::borrow_raw(netns) };
            setns(netns, CloneFlags::CLONE_NEWNET).map_err(Into::into)
        };
        // SAFETY: between fork and exec there is one system call.
        unsafe { command.pre_exec(enter) };
        let mut child = command.spawn().expect("`cargo test` builds it");
        let mut line = String::new();
        let output = child.stdout.take().expect("it is piped");
        let read = BufReader::new(output).read_line(&mut line);
        assert!(read.is_ok_and(|length| length > 0), "churn says nothing");
        Self(child)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// What was told of each holder.
fn by_holder(run: &Run, event: &str) -> BTreeMap<u64, Value> {
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let lines = run.lines.events(event);
    let of = lines.filter_map(|line| {
        let number = &line.value["sockets"];
        Some((line.value["pid"].as_u64()?, number.clone()))
    });
    of.collect()
}

#[test]
fn both_ways_see_the_same() {
    let Some(lab) = Lab::new() else { return };
    let _held = Held::start(&lab);
    std::thread::sleep(Duration::from_millis(700));
    let inode = lab.netns.inode().to_string();
    let states = ["states", "--by", "process", "--netns", &inode];
    let leaks = ["leaks", "--once", "--older-than", OLD, "--netns", &inode];
    for (arguments, event, sockets) in [
        (&states[..], "states_group", 2 * PAIRS),
        (&leaks, "leak", PAIRS),
    ] {
        let whole = Tcptrace::start_limited(&[], Some(&lab.netns), arguments).wait_end();
        let limited = Tcptrace::start_limited(&NO_BPF, Some(&lab.netns), arguments).wait_end();
        let (walk, procfs) = (by_holder(&whole, event), by_holder(&limited, event));
        assert!(!whole.stderr.contains("walk"), "{}", whole.stderr);
        assert_eq!(walk, procfs, "{event}");
        let full = walk
            .values()
            .filter(|found| found.as_u64() >= Some(sockets as u64));
        assert_eq!(full.count(), PROCESSES, "{event}: {walk:?}");
    }
}
