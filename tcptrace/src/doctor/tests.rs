use std::{io, sync::Arc};

use super::{
    facts::{Entered, Facts, Host},
    judge::checks,
    *,
};
use crate::{
    kernel::{
        capabilities::{Capabilities, Capability},
        netns,
        probes::{Cause, LEAST_BUFFER, Refused, Symbols, Tried, TriedProbes, Variants},
        procfs::{Hidden, Unseen},
        system::{Lockdown, System},
    },
    reason::Reason,
};

/// A machine on which everything works.
fn fine() -> Facts {
    let works = || Variants {
        functions: Ok(()),
        tracepoints: Ok(()),
    };
    Facts {
        host: Host {
            kernel: "6.12.1".to_owned(),
            arch: "x86_64",
            distribution: Some("Debian GNU/Linux 13 (trixie)".to_owned()),
            cpus: 2,
            container: None,
        },
        utc_ns: 0,
        system: System::permissive(),
        tried: Tried {
            types: Ok(Vec::new()),
            wanted_buffer: LEAST_BUFFER,
            buffer: Ok(LEAST_BUFFER),
            probes: Some(TriedProbes {
                transitions: Ok(()),
                time_wait: works(),
                accept: works(),
                open_sockets: Ok(()),
                symbols: Symbols::Known {
                    timer: true,
                    missing: Vec::new(),
                },
            }),
        },
        hz: 250,
        sock_diag: Ok(12),
        namespaces: Ok(Entered {
            found: 3,
            reasons: Vec::new(),
        }),
        processes: Ok(Unseen::default()),
        private_pids: false,
        cgroup2: Ok("/sys/fs/cgroup".into()),
        duplicate: Ok(()),
        mptcp: Some(0),
    }
}

fn probes(facts: &mut Facts) -> &mut TriedProbes {
    facts.tried.probes.as_mut().unwrap()
}

fn program(name: &str, errno: i32, words: &str) -> Refused {
    Refused::Program {
        name: name.to_owned(),
        cause: Cause {
            errno: Some(errno),
            words: words.to_owned(),
        },
    }
}

fn report(facts: Facts) -> Report {
    Report {
        checks: checks(&facts),
        host: facts.host,
        utc_ns: facts.utc_ns,
    }
}

fn text(report: &Report, color: bool) -> String {
    let mut bytes = Vec::new();
    text::write(report, color, &mut bytes);
    String::from_utf8(bytes).unwrap()
}

/// This check is so, and these words are in its detail and its fix.
#[track_caller]
fn assert_check(report: &Report, name: &str, status: Status, detail: &str, fix: &str) {
    let check = report.checks.iter().find(|check| check.name == name);
    let check = check.unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(check.status, status, "{check:?}");
    assert!(check.detail.contains(detail), "{check:?}");
    let found = check.fix.as_deref().unwrap_or_default();
    assert!(found.contains(fix), "{check:?}");
}

/// Names of the checks that are not well.
fn bad(report: &Report) -> Vec<&str> {
    let checks = report.checks.iter();
    checks
        .filter(|check| matches!(check.status, Status::Degraded | Status::No))
        .map(|check| check.name)
        .collect()
}

#[test]
fn a_machine_on_which_everything_works() {
    let report = report(fine());
    assert_eq!(report.verdict(), Verdict::Works);
    assert!(report.checks.iter().all(|check| check.status == Status::Ok));
    assert!(report.checks.iter().all(|check| check.fix.is_none()));
}

/// What is to be done about something is never left out, whatever it is.
#[test]
fn every_degradation_names_a_fix() {
    for (name, facts) in machines() {
        let report = report(facts);
        for check in &report.checks {
            let bad = matches!(check.status, Status::Degraded | Status::No);
            let fix = check.fix.as_deref();
            assert_eq!(
                fix.is_some_and(|fix| !fix.is_empty()),
                bad,
                "{name}: {check:?}"
            );
            assert!(!check.detail.is_empty(), "{name}: {check:?}");
        }
        assert_ne!(report.verdict(), Verdict::Works, "{name}");
    }
}

/// Machines with something wrong, by what it is.
fn machines() -> Vec<(&'static str, Facts)> {
    vec![
        ("no BTF", without_btf(Refused::NoBtf)),
        ("5.10", old()),
        ("lockdown", locked_down()),
        ("nobody", nobody()),
        ("no sock_diag either", nothing()),
        ("hidepid", hiding(Hidden::Hidepid)),
        ("a pid namespace", hiding(Hidden::PidNamespace)),
        (
            "hidden addresses",
            hidden_addresses(1, Capabilities(!(1 << 34))),
        ),
        ("little memory", little_memory()),
        ("Yama", yama()),
        ("MPTCP", {
            let mut facts = fine();
            facts.mptcp = Some(2);
            facts
        }),
        ("no cgroup2", {
            let mut facts = fine();
            facts.cgroup2 = Err(Reason::new(
                "no container: cgroup2 is not mounted",
                "mount it",
            ));
            facts
        }),
    ]
}

fn without_btf(refused: Refused) -> Facts {
    let mut facts = fine();
    facts.tried = Tried {
        wanted_buffer: LEAST_BUFFER,
        types: Err(refused.clone()),
        buffer: Err(refused),
        probes: None,
    };
    facts
}

#[test]
fn without_btf_nothing_is_traced() {
    let told = report(without_btf(Refused::NoBtf));
    for name in ["btf", "transitions"] {
        assert_check(
            &told,
            name,
            Status::No,
            "/sys/kernel/btf/vmlinux",
            "CONFIG_DEBUG_INFO_BTF=y",
        );
    }
    assert_eq!(bad(&told), ["btf", "transitions"]);
    assert_check(&told, "time_wait", Status::Skipped, "see transitions", "");
    assert_eq!(told.verdict(), Verdict::Degraded, "sock_diag works");

    let denied = Cause {
        errno: Some(libc::EACCES),
        words: String::new(),
    };
    let told = report(without_btf(Refused::BtfUnreadable(denied)));
    assert_check(
        &told,
        "btf",
        Status::No,
        "Permission denied (EACCES)",
        "root",
    );
}

/// 5.10: the maps are made, the program is refused for a helper that it does not know.
fn old() -> Facts {
    let mut facts = fine();
    facts.system.release = "5.10.0-32-amd64".to_owned();
    facts.system.locked_memory = Some(64 << 10);
    let words = "unknown func bpf_get_socket_cookie#46";
    probes(&mut facts).transitions = Err(program("inet_sock_set_state", libc::EINVAL, words));
    facts
}

#[test]
fn an_old_kernel_is_too_old() {
    let told = report(old());
    for name in ["kernel", "transitions"] {
        assert_check(
            &told,
            name,
            Status::No,
            "5.10.0-32-amd64 is too old",
            "5.12",
        );
    }
    assert_check(
        &told,
        "locked_memory",
        Status::Degraded,
        "64 KiB",
        "ulimit -l",
    );
    assert_eq!(told.verdict(), Verdict::Degraded);
    // It is the attempt that counts: kernels are sold with newer parts in them.
    let mut facts = old();
    probes(&mut facts).transitions = Ok(());
    assert_check(&report(facts), "kernel", Status::Ok, "5.10", "");
}

/// The program is refused for a helper that reads kernel memory.
fn locked_down() -> Facts {
    let mut facts = fine();
    facts.system.lockdown = Lockdown::Confidentiality;
    let words = "program of this type cannot use helper bpf_probe_read_kernel#113";
    probes(&mut facts).transitions = Err(program("inet_sock_set_state", libc::EINVAL, words));
    facts
}

#[test]
fn lockdown_is_named() {
    let told = report(locked_down());
    for name in ["lockdown", "transitions"] {
        assert_check(
            &told,
            name,
            Status::No,
            "confidentiality",
            "lockdown=integrity",
        );
    }
    let mut facts = fine();
    facts.system.lockdown = Lockdown::Integrity;
    assert_eq!(report(facts).verdict(), Verdict::Works);
}

/// A user without any privilege.
fn nobody() -> Facts {
    let mut facts = fine();
    facts.system.capabilities = Capabilities(0);
    facts.system.lockdown = Lockdown::Unknown;
    facts.system.security_modules = String::new();
    facts.system.bpf_jit = None;
    let refused = Refused::Map(Cause {
        errno: Some(libc::EPERM),
        words: String::new(),
    });
    facts.tried.buffer = Err(refused);
    facts.tried.probes = None;
    facts.processes = Ok(Unseen {
        unreadable: 200,
        first: Some(1),
        ..Unseen::default()
    });
    facts
}

#[test]
fn privileges_are_named_by_what_they_are_for() {
    let told = report(nobody());
    assert_check(
        &told,
        "transitions",
        Status::No,
        "CAP_BPF and CAP_PERFMON are missing",
        "root",
    );
    for capability in Capability::ALL {
        assert_check(
            &told,
            "capabilities",
            Status::Degraded,
            capability.name,
            "root",
        );
        assert_check(
            &told,
            "capabilities",
            Status::Degraded,
            capability.purpose,
            "",
        );
    }
    assert_check(
        &told,
        "processes",
        Status::Degraded,
        "200",
        "CAP_SYS_PTRACE",
    );
    assert_check(&told, "lockdown", Status::Skipped, "securityfs", "");
    assert_eq!(told.verdict().exit_code(), 1);
}

fn nothing() -> Facts {
    let mut facts = nobody();
    facts.sock_diag = Err(Reason::new(
        "the kernel has no tcp_diag",
        "modprobe tcp_diag",
    ));
    facts
}

#[test]
fn nothing_works_without_probes_and_sock_diag() {
    let told = report(nothing());
    assert_check(&told, "sock_diag", Status::No, "tcp_diag", "modprobe");
    assert_eq!(told.verdict().exit_code(), 2);
    assert!(text(&told, false).ends_with("neither the probes nor sock_diag.\n"));
    // The probes alone are something.
    let mut facts = fine();
    facts.sock_diag = Err(Reason::new(
        "the kernel has no tcp_diag",
        "modprobe tcp_diag",
    ));
    assert_eq!(report(facts).verdict().exit_code(), 1);
}

#[test]
fn capabilities_of_a_user_namespace_do_not_count() {
    let mut facts = nobody();
    facts.system.capabilities = Capabilities(u64::MAX);
    facts.system.user_namespace = true;
    let told = report(facts);
    assert_check(
        &told,
        "capabilities",
        Status::Degraded,
        "user namespace",
        "host",
    );
    assert_check(&told, "transitions", Status::No, "user namespace", "host");
}

fn hiding(hidden: Hidden) -> Facts {
    let mut facts = fine();
    facts.processes = Ok(Unseen {
        hidden: Some(hidden),
        ..Unseen::default()
    });
    facts
}

#[test]
fn hidden_processes_are_told() {
    let told = report(hiding(Hidden::Hidepid));
    assert_check(
        &told,
        "processes",
        Status::Degraded,
        "hidepid",
        "CAP_SYS_PTRACE",
    );
    let told = report(hiding(Hidden::PidNamespace));
    assert_check(
        &told,
        "processes",
        Status::Degraded,
        "pid namespace",
        "on the host",
    );
}

#[test]
fn how_holders_are_found_is_told() {
    assert_check(
        &report(fine()),
        "holders",
        Status::Ok,
        "the kernel tells",
        "",
    );
    let mut facts = fine();
    facts.private_pids = true;
    assert_check(&report(facts), "holders", Status::Ok, "/proc is read", "");
    let mut facts = fine();
    probes(&mut facts).open_sockets = Err(program("task_file", libc::EINVAL, "unknown func"));
    let told = report(facts);
    assert_check(
        &told,
        "holders",
        Status::Ok,
        "task_file: Invalid argument (EINVAL), unknown func",
        "",
    );
    assert_eq!(told.verdict(), Verdict::Works);
}

/// Function probes are refused although the capabilities are there.
fn hardened() -> Facts {
    let mut facts = fine();
    facts.system.security_modules = "lockdown,capability,bpf".to_owned();
    let refused = |name| Err(program(name, libc::EPERM, ""));
    probes(&mut facts).time_wait.functions = refused("inet_twsk_alloc");
    probes(&mut facts).accept.functions = refused("inet_csk_accept");
    facts
}

#[test]
fn refused_functions_are_told_with_what_takes_their_place() {
    let told = report(hardened());
    for name in ["time_wait.functions", "accept.function"] {
        assert_check(
            &told,
            name,
            Status::No,
            "Operation not permitted (EPERM)",
            "capability,bpf",
        );
    }
    assert_check(&told, "time_wait", Status::Ok, "timers", "");
    assert_check(&told, "accept", Status::Ok, "io_uring", "");
    assert_eq!(bad(&told), ["time_wait.functions", "accept.function"]);
    // Of two ways, the one that works is enough.
    let mut facts = fine();
    probes(&mut facts).accept.tracepoints = Err(Refused::Tracefs(Cause::default()));
    assert_eq!(report(facts).verdict(), Verdict::Works);
}

#[test]
fn what_trampolines_need_is_named() {
    for (jit, fix) in [
        (Some(0), "net.core.bpf_jit_enable"),
        (Some(1), "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS"),
    ] {
        let mut facts = fine();
        facts.system.bpf_jit = jit;
        probes(&mut facts).accept.functions = Err(program("inet_csk_accept", 524, ""));
        assert_check(
            &report(facts),
            "accept.function",
            Status::No,
            "ENOTSUPP",
            fix,
        );
    }
}

fn hidden_addresses(restrict: u32, capabilities: Capabilities) -> Facts {
    let mut facts = hardened();
    facts.system.kptr_restrict = Some(restrict);
    facts.system.capabilities = capabilities;
    probes(&mut facts).symbols = Symbols::Hidden;
    probes(&mut facts).time_wait.tracepoints = Err(Refused::HiddenAddress("tw_timer_handler"));
    facts
}

#[test]
fn hidden_addresses_cost_time_wait_or_its_endings() {
    let without_syslog = Capabilities(!(1 << 34));
    let told = report(hidden_addresses(1, without_syslog));
    assert_check(
        &told,
        "time_wait",
        Status::Degraded,
        "no probe for TIME_WAIT",
        "CAP_SYSLOG",
    );
    assert_check(&told, "time_wait_endings", Status::Skipped, "no probe", "");
    // With 2, the capability would not help.
    let told = report(hidden_addresses(2, without_syslog));
    assert_check(
        &told,
        "time_wait.timers",
        Status::No,
        "hides",
        "kernel.kptr_restrict to 1",
    );
    let mut facts = fine();
    facts.system.kptr_restrict = Some(2);
    probes(&mut facts).symbols = Symbols::Hidden;
    let told = report(facts);
    assert_check(
        &told,
        "time_wait_endings",
        Status::Degraded,
        "not always known how",
        "kptr",
    );
    assert_eq!(bad(&told), ["time_wait_endings"]);
}

fn little_memory() -> Facts {
    let mut facts = fine();
    facts.tried.buffer = Ok(2 << 20);
    facts
}

#[test]
fn the_buffer_that_can_be_had_is_told_as_an_option() {
    assert_check(
        &report(little_memory()),
        "ring_buffer",
        Status::Degraded,
        "2 MiB can be had",
        "--buffer 2048K",
    );
}

fn yama() -> Facts {
    let mut facts = fine();
    facts.system.ptrace_scope = Some(3);
    facts
}

#[test]
fn yama_can_forbid_to_ask_sockets() {
    let told = report(yama());
    assert_check(
        &told,
        "finished_sockets",
        Status::Degraded,
        "ptrace_scope is 3",
        "ptrace_scope",
    );
    let mut facts = fine();
    facts.duplicate = Err(Arc::new(io::Error::from_raw_os_error(libc::ENOSYS)));
    facts.system.release = "5.4.0".to_owned();
    let told = report(facts);
    assert_check(
        &told,
        "finished_sockets",
        Status::Degraded,
        "not implemented",
        "5.6",
    );
}

#[test]
fn many_closed_namespaces_are_one_sentence() {
    let denied = |inode| netns::Error::Denied {
        inode,
        capability: "CAP_SYS_ADMIN",
    };
    let mut facts = fine();
    facts.namespaces = Ok(Entered {
        found: 4,
        reasons: netns::reasons(&[denied(5), denied(6), denied(7)]),
    });
    let told = report(facts);
    let (detail, fix) = ("cannot be entered: 3 (the first is 5)", "CAP_SYS_ADMIN");
    assert_check(&told, "network_namespaces", Status::Degraded, detail, fix);
}

#[test]
fn a_clock_without_ticks_is_no_hz() {
    let mut facts = fine();
    facts.hz = 1_000_000_000;
    assert_check(
        &report(facts),
        "hz",
        Status::Degraded,
        "CLOCK_MONOTONIC_COARSE",
        "report",
    );
}

#[test]
fn lines_are_aligned_and_coloured_only_on_request() {
    let told = report(hiding(Hidden::Hidepid));
    let degraded = |check: &&Check| check.status == Status::Degraded;
    let check = told.checks.iter().find(degraded).unwrap();
    let plain = text(&told, false);
    assert!(plain.starts_with("tcptrace "), "{plain}");
    assert!(plain.contains(" on Linux 6.12.1 x86_64, Debian GNU/Linux 13 (trixie), 2 CPUs\n"));
    let column = |line: &str, word: &str| line.find(word).unwrap_or_else(|| panic!("{line}"));
    let line = plain
        .lines()
        .find(|line| line.starts_with("degraded"))
        .unwrap();
    let fix = plain.lines().find(|line| line.contains("->")).unwrap();
    assert_eq!(column(line, &check.detail), column(fix, "->"), "{plain}");
    assert!(!plain.contains('\x1b'));
    let colored = text(&told, true);
    let start = format!("\x1b[33mdegraded\x1b[0m  {} ", check.name);
    assert!(colored.contains(&start), "{colored}");
}

#[test]
fn json_is_one_object() {
    let told = report(hardened());
    let mut bytes = Vec::new();
    json::write(&told, &mut bytes);
    assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
    ::tests::schema::assert_described(str::from_utf8(&bytes).unwrap());
    let line: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(line["event"], "doctor");
    assert_eq!(line["verdict"], "ok");
    assert_eq!(line["time"], "1970-01-01T00:00:00.000000000Z");
    let all = line["checks"].as_array().unwrap();
    let lockdown = all
        .iter()
        .find(|check| check["name"] == "lockdown")
        .unwrap();
    assert_eq!(
        *lockdown,
        serde_json::json!({"name": "lockdown", "status": "ok", "detail": "off", "fix": null})
    );
}
