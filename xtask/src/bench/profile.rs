//! Where the time of whoever connects goes while a tracer runs: samples of its stacks, by `perf`.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    churn::{self, Load},
    lab::Lab,
    results::{Profile, Share},
    tracer::{self, Tracer},
};
use crate::command;

const PERF: &str = "perf";
/// Samples a second: a prime number, so that it keeps step with nothing.
const FREQUENCY: &str = "4999";
/// As a symbol, a BPF program begins so.
const PROGRAM: &str = "bpf_prog_";
/// What the kernel does for somebody else who traces the states of sockets.
const ELSE: &str = "trace_event_raw_event_inet_sock_set_state";
/// What the kernel does to call programs at a tracepoint.
const CALLS: [&str; 3] = ["bpf_trace_run", "__bpf_trace_", "__traceiter_"];
/// What a system call passes through only while somebody traces one.
const SLOW_CALLS: [&str; 4] = [
    "syscall_exit_work",
    "syscall_trace_enter",
    "perf_syscall_exit",
    "trace_sys_exit",
];

/// Samples it with each tracer in turn.
///
/// # Errors
/// When `perf` is missing, or may not sample.
pub(super) fn measure(lab: &Lab, seconds: f64, tracers: &[Tracer]) -> Result<Vec<Profile>> {
    let perf =
        tracer::find(PERF, &|_| true).with_context(|| format!("no program {PERF} is installed"))?;
    tracers
        .iter()
        .filter(|tracer| tracer.own)
        .map(|tracer| {
            eprintln!("bench: profile: {}", tracer.name);
            let running = tracer.start(&lab.folder, &[])?;
            let stacks = sampled(&perf, lab, Load::resets(seconds))?;
            running.finish(churn::PORT)?;
            ensure!(
                !stacks.contains(ELSE),
                "somebody has switched the event sock:inet_sock_set_state on in tracefs, which costs every \
                 connection something, traced or not: switch it off and measure again (set_event in \
                 /sys/kernel/tracing, or in one of its instances, has it)"
            );
            let (samples, shares) = shares(&stacks);
            ensure!(samples > 0, "{PERF} took no samples");
            Ok(Profile {
                of: tracer.name.to_owned(),
                samples,
                shares,
            })
        })
        .collect()
}

/// The stacks of samples, as `perf script` prints them.
fn sampled(perf: &Path, lab: &Lab, load: Load) -> Result<String> {
    let data = lab.folder.join("perf.data");
    let mut record = Command::new(perf);
    record
        .args([
            "record",
            "-q",
            "-e",
            "cpu-clock",
            "-g",
            "-F",
            FREQUENCY,
            "-o",
        ])
        .arg(&data)
        .arg("--");
    churn::run_under(record, &lab.churn, load)?;
    let mut script = Command::new(perf);
    script
        .args(["script", "-F", "ip,sym", "-i"])
        .arg(&data)
        .stderr(Stdio::null());
    command::output(&mut script)
}

/// How many samples there are, and what share of them was spent on what, the greatest first. What is not ours
/// is left out.
fn shares(stacks: &str) -> (u64, Vec<Share>) {
    let mut samples = 0;
    let mut counts = BTreeMap::<String, u64>::new();
    for stack in stacks.split("\n\n") {
        let functions: Vec<&str> = stack.lines().filter_map(function).collect();
        if functions.is_empty() {
            continue;
        }
        samples += 1;
        if let Some(what) = what(&functions) {
            *counts.entry(what).or_default() += 1;
        }
    }
    let mut shares: Vec<Share> = counts
        .into_iter()
        .map(|(what, count)| Share {
            what,
            share: count as f64 / samples as f64,
        })
        .collect();
    shares.sort_by(|a, b| b.share.total_cmp(&a.share));
    (samples, shares)
}

/// The symbol in a line of a stack: an address and a name.
fn function(line: &str) -> Option<&str> {
    let (address, name) = line.trim().split_once(' ')?;
    let is_address = address.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_address.then_some(name)
}

/// What this stack, the innermost function first, was spent on because somebody traces; `None`: nothing.
fn what(functions: &[&str]) -> Option<String> {
    let begins =
        |function: &str, names: &[&str]| names.iter().any(|name| function.starts_with(name));
    // A program may have functions of its own; the outermost is the program.
    if let Some(at) = functions
        .iter()
        .rposition(|function| function.starts_with(PROGRAM))
    {
        // `bpf_prog_` and the tag, 16 digits.
        let name = functions[at].get(PROGRAM.len() + 17..).unwrap_or("?");
        let part = match at.checked_sub(1).map(|inner| functions[inner]) {
            None => "own instructions",
            Some(called) if called.starts_with(PROGRAM) => "own instructions",
            Some(called) if called.contains("ringbuf") => "ring buffer",
            Some(called) if called.contains("ktime") => "clock",
            Some(called) if called.contains("probe_read") => "reading by helper",
            Some(called) if called.contains("get_stack") => "the kernel's stack",
            Some(called) if begins(called, &["asm_", "sysvec_", "irq_"]) => return None,
            Some(_) => "other helpers",
        };
        return Some(format!("`{name}`: {part}"));
    }
    if functions
        .iter()
        .any(|function| begins(function, &SLOW_CALLS))
    {
        return Some("system calls off their fast path".to_owned());
    }
    if functions.iter().any(|function| begins(function, &CALLS)) {
        return Some("calling programs".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const STACKS: &str = "\
        \n\tffffffff81000000 __bpf_ringbuf_reserve\n\tffffffff81000001 bpf_ringbuf_reserve\n\
        \tffffffffc0000000 bpf_prog_4a5d62e82c2e0a69_inet_sock_set_state\n\tffffffff81000002 bpf_trace_run3\n\
        \tffffffff81000003 tcp_set_state\n\n\
        \tffffffffc0000001 bpf_prog_4f9302ba65b90ccd_memset\n\
        \tffffffffc0000000 bpf_prog_4a5d62e82c2e0a69_inet_sock_set_state\n\tffffffff81000002 bpf_trace_run3\n\n\
        \tffffffff81000004 perf_syscall_exit\n\tffffffff81000005 syscall_exit_work\n\n\
        \tffffffff81000006 __rcu_read_lock\n\tffffffff81000002 bpf_trace_run3\n\n\
        \tffffffff81000007 tcp_v4_rcv\n\n\
        \tffffffff81000008 sysvec_apic_timer_interrupt\n\
        \tffffffffc0000000 bpf_prog_4a5d62e82c2e0a69_inet_sock_set_state\n\n\
        \tffffffff81000009 copy_from_kernel_nofault\n\tffffffff8100000a bpf_probe_read_kernel\n\
        \tffffffffc0000002 bpf_prog_4f9302ba65b90cce_sys_exit_accept4\n\tffffffff81000004 perf_syscall_exit\n\n\
        \tffffffffc0000000 bpf_prog_4a5d62e82c2e0a69_inet_sock_set_state\n";

    #[test]
    fn each_sample_is_of_one_thing() {
        let (samples, shares) = shares(STACKS);
        assert_eq!(samples, 8);
        let mut found: Vec<(&str, f64)> = shares
            .iter()
            .map(|share| (share.what.as_str(), share.share * 8.0))
            .collect();
        assert_eq!(found[0], ("`inet_sock_set_state`: own instructions", 2.0));
        found.sort_by_key(|(what, _)| *what);
        assert_eq!(
            found,
            [
                ("`inet_sock_set_state`: own instructions", 2.0),
                ("`inet_sock_set_state`: ring buffer", 1.0),
                ("`sys_exit_accept4`: reading by helper", 1.0),
                ("calling programs", 1.0),
                ("system calls off their fast path", 1.0),
            ]
        );
    }
}
