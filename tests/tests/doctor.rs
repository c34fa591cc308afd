//! What works here, as `tcptrace doctor` tells it, held against what really works.

use std::{fs, io};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Gid, fork, setgroups, setresgid},
};
use serde_json::Value;
use tests::{Lab, Run, Tcptrace, kernel_is_at_least};

/// Numbers of capabilities (`linux/capability.h`).
const DAC_OVERRIDE: u8 = 1;
const DAC_READ_SEARCH: u8 = 2;
const NET_ADMIN: u8 = 12;
const SYS_PTRACE: u8 = 19;
const SYS_ADMIN: u8 = 21;
const SYSLOG: u8 = 34;
const PERFMON: u8 = 38;
const BPF: u8 = 39;

/// The group without any rights.
const NOBODY: Gid = Gid::from_raw(65534);

/// The report in JSON, and what is in it.
#[derive(Debug)]
struct Report {
    run: Run,
    value: Value,
}

impl Report {
    fn of(run: Run) -> Self {
        assert_eq!(run.lines.0.len(), 1, "{}\n{}", run.lines, run.stderr);
        assert_eq!(run.stderr, "");
        let value = run.lines.0[0].value.clone();
        assert_eq!(value["event"], "doctor");
        let report = Self { run, value };
        report.assert_sound();
        report
    }

    fn prepared(prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self::of(Tcptrace::run_prepared(&["doctor", "-o", "json"], prepare))
    }

    /// As root without these capabilities.
    fn without(capabilities: &'static [u8]) -> Self {
        Self::prepared(move || {
            capabilities
                .iter()
                .try_for_each(|number| drop_capability(*number))
        })
    }

    fn checks(&self) -> &[Value] {
        self.value["checks"].as_array().expect("checks")
    }

    #[track_caller]
    fn check(&self, name: &str) -> &Value {
        let mut checks = self.checks().iter();
        let check = checks.find(|check| check["name"] == name);
        check.unwrap_or_else(|| panic!("no {name} in {}", self.value))
    }

    #[track_caller]
    fn status(&self, name: &str) -> &str {
        self.check(name)["status"].as_str().expect("a status")
    }

    /// It is not well, `words` tell why, and `fix` is part of what can be done.
    #[track_caller]
    fn assert_told(&self, name: &str, words: &str, fix: &str) {
        let check = self.check(name);
        assert!(matches!(self.status(name), "degraded" | "no"), "{check}");
        for (key, wanted) in [("detail", words), ("fix", fix)] {
            let text = check[key].as_str().expect("text");
            assert!(
                text.contains(wanted),
                "no `{wanted}` in the {key} of {check}"
            );
        }
    }

    /// What holds of every report: whatever is not well has a fix, nothing else does, and the exit code
    /// says what the checks do.
    fn assert_sound(&self) {
        let mut worst = 0;
        for check in self.checks() {
            let name = check["name"].as_str().expect("a name");
            let bad = matches!(self.status(name), "degraded" | "no");
            assert!(
                bad || matches!(self.status(name), "ok" | "skipped"),
                "{check}"
            );
            assert_eq!(bad, check["fix"].is_string(), "{check}");
            if bad && !name.contains('.') {
                worst = 1;
            }
        }
        if ["transitions", "sock_diag"].map(|name| self.status(name)) == ["no"; 2] {
            worst = 2;
        }
        assert_eq!(self.run.code, Some(worst), "{}", self.value);
    }
}

fn drop_capability(number: u8) -> io::Result<()> {
    // SAFETY: takes numbers only.
    let result =
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A mount namespace of its own, from which nothing goes out.
fn private_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    Ok(mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?)
}

fn mount_proc(options: Option<&str>) -> io::Result<()> {
    Ok(mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        MsFlags::empty(),
        options,
    )?)
}

/// The kinds of probes that `record` says it uses, for TIME_WAIT and for `accept()`.
fn recorded(lab: &Lab) -> [String; 2] {
    let inode = lab.netns.inode().to_string();
    let run = Tcptrace::run(&["record", "-", "--duration", "200ms", "--netns", &inode]);
    let start = run
        .lines
        .events("start")
        .next()
        .expect("a recording begins")
        .clone();
    ["time_wait", "accept"].map(|key| start.value[key].as_str().expect("a kind").to_owned())
}

/// As root: what it says of the probes is what a trace then does.
#[test]
fn what_is_told_is_what_a_trace_does() {
    let Some(lab) = Lab::new() else { return };
    let report = Report::of(Tcptrace::run(&["doctor", "-o", "json"]));
    for name in [
        "kernel",
        "btf",
        "ring_buffer",
        "transitions",
        "sock_diag",
        "hz",
    ] {
        assert_ne!(report.status(name), "no", "{}", report.value);
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux has it");
    assert_eq!(report.value["kernel"], release.trim());
    assert!(report.value["cpus"].as_u64().is_some_and(|cpus| cpus > 0));
    for (kind, ways) in recorded(&lab).iter().zip([
        ["time_wait.functions", "time_wait.timers"],
        ["accept.function", "accept.tracepoints"],
    ]) {
        let works = ways.map(|name| report.status(name) == "ok");
        let expected = match works {
            [true, _] => "functions",
            [false, true] => "tracepoints",
            [false, false] => "none",
        };
        assert_eq!(kind, expected, "{}", report.value);
    }
}

/// The same reasons on stderr of a command that runs degraded: all that concern it, and no other.
#[test]
fn commands_give_the_same_reasons() {
    let Some(_lab) = Lab::new() else { return };
    let give_up = || {
        [SYSLOG, SYS_PTRACE]
            .into_iter()
            .try_for_each(drop_capability)
    };
    let report = Report::prepared(give_up);
    let run = Tcptrace::run_prepared(&["timewait", "--duration", "200ms"], give_up);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for name in [
        "time_wait",
        "time_wait_endings",
        "accept",
        "processes",
        "containers",
    ] {
        let check = report.check(name);
        if matches!(report.status(name), "ok" | "skipped") {
            continue;
        }
        let text = |key: &str| check[key].as_str().expect("text");
        let line = format!("tcptrace: {}; {}\n", text("detail"), text("fix"));
        // How many processes there are to be read changes all the time.
        let same = if name == "processes" {
            run.stderr.contains("processes that could not be read: ")
                && run.stderr.contains(text("fix"))
        } else {
            run.stderr.contains(&line)
        };
        assert!(same, "not told: {line}\n{}", run.stderr);
    }
    assert!(run.stderr.contains("CAP_SYSLOG"), "{}", run.stderr);
    assert!(run.stderr.contains("CAP_SYS_PTRACE"), "{}", run.stderr);
}

#[test]
fn each_capability_is_named_with_its_fix() {
    let Some(_lab) = Lab::new() else { return };
    for (dropped, name) in [
        (&[BPF, SYS_ADMIN][..], "CAP_BPF"),
        (&[PERFMON, SYS_ADMIN], "CAP_PERFMON"),
        (&[SYSLOG], "CAP_SYSLOG"),
        (&[SYS_ADMIN], "CAP_SYS_ADMIN"),
        (&[SYS_PTRACE], "CAP_SYS_PTRACE"),
        (&[DAC_READ_SEARCH, DAC_OVERRIDE], "CAP_DAC_READ_SEARCH"),
        (&[NET_ADMIN], "CAP_NET_ADMIN"),
    ] {
        let report = Report::without(dropped);
        report.assert_told("capabilities", name, "grant");
        assert_eq!(report.run.code, Some(1), "{}", report.value);
    }
    // One that another includes is not missed.
    let report = Report::without(&[BPF, PERFMON, DAC_READ_SEARCH]);
    assert_eq!(report.status("capabilities"), "ok", "{}", report.value);
    assert_eq!(report.status("transitions"), "ok", "{}", report.value);
}

#[test]
fn what_a_capability_is_for_is_told_where_it_is_missing() {
    let Some(lab) = Lab::new() else { return };
    let report = Report::without(&[BPF, SYS_ADMIN]);
    report.assert_told("transitions", "CAP_BPF is missing", "root");
    assert_eq!(report.status("time_wait"), "skipped");
    let report = Report::without(&[PERFMON, SYS_ADMIN]);
    report.assert_told("transitions", "CAP_PERFMON is missing", "root");

    // A process is in the lab's namespace, which cannot be entered.
    let fixture = lab.fixture("shop");
    let report = Report::without(&[SYS_ADMIN]);
    report.assert_told("network_namespaces", "cannot be entered", "CAP_SYS_ADMIN");
    drop(fixture);

    let report = Report::without(&[SYS_PTRACE]);
    report.assert_told("processes", "could not be read", "CAP_SYS_PTRACE");
    report.assert_told("finished_sockets", "other users", "CAP_SYS_PTRACE");

    let report = Report::without(&[SYSLOG]);
    let probes = report.status("time_wait.functions") == "ok";
    let lost = if probes {
        "time_wait_endings"
    } else {
        "time_wait"
    };
    report.assert_told(lost, "/proc/kallsyms hides", "CAP_SYSLOG");
}

#[test]
fn nobody_can_look_and_not_trace() {
    let Some(_lab) = Lab::new() else { return };
    let report = Report::of(Tcptrace::run_as_nobody(&["doctor", "-o", "json"]));
    report.assert_told("transitions", "CAP_BPF and CAP_PERFMON are missing", "root");
    assert_eq!(report.status("sock_diag"), "ok", "{}", report.value);
    assert_eq!(report.run.code, Some(1));
}

/// A seccomp filter as container runtimes have them: neither `bpf()` nor a netlink socket.
#[test]
fn nothing_works_where_both_are_forbidden() {
    let Some(_lab) = Lab::new() else { return };
    let report = Report::prepared(|| forbid(&[libc::SYS_bpf, libc::SYS_socket]));
    report.assert_told(
        "transitions",
        "although the capabilities are there",
        "container runtime",
    );
    report.assert_told("sock_diag", "Operation not permitted", "");
    assert_eq!(report.value["verdict"], "no");
    assert_eq!(report.run.code, Some(2));
}

/// These system calls fail with EPERM from now on.
fn forbid(calls: &[libc::c_long; 2]) -> io::Result<()> {
    const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (jump, ret) = (
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let mut filter = [
        // The call's number, the first field of `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(jump, calls[0] as u32, 1, 0),
        statement(jump, calls[1] as u32, 0, 1),
        statement(ret, DENY, 0, 0),
        statement(ret, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: numbers only.
    let calm = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: `program` refers to statements that live until the call has returned.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if calm == 0 && set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn a_pid_namespace_hides_what_is_outside() {
    let Some(_lab) = Lab::new() else { return };
    let report = Report::prepared(|| {
        unshare(CloneFlags::CLONE_NEWPID)?;
        // The first process of the new namespace is the child.
        // SAFETY: this process has one thread, and its child makes system calls only until it is another
        // program.
        if let ForkResult::Parent { child } = unsafe { fork() }? {
            // It will not become another program, which would close what this one has inherited: a pipe
            // that the test waits for, and perhaps a program that another test is about to start.
            for fd in 3..1024 {
                // SAFETY: nothing here uses these descriptors any more.
                unsafe { libc::close(fd) };
            }
            let code = match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => code,
                _ => 99,
            };
            // SAFETY: ends this process, without what the test program would do at its end.
            unsafe { libc::_exit(code) };
        }
        private_mounts()?;
        mount_proc(None)
    });
    report.assert_told("processes", "outside this pid namespace", "on the host");
    assert_eq!(report.run.code, Some(1));
}

#[test]
fn hidepid_hides_processes() {
    let Some(_lab) = Lab::new() else { return };
    let report = Report::prepared(|| {
        private_mounts()?;
        mount_proc(Some("hidepid=2"))?;
        // It hides nothing from the group that `gid=` names, and that is the first.
        setgroups(&[])?;
        setresgid(NOBODY, NOBODY, NOBODY)?;
        drop_capability(SYS_PTRACE)
    });
    if kernel_is_at_least(5, 8) {
        report.assert_told("processes", "hidepid", "CAP_SYS_PTRACE");
    }
}

#[test]
fn text_is_plain_and_aligned_off_a_terminal() {
    let Some(_lab) = Lab::new() else { return };
    let run = Tcptrace::run(&["doctor"]);
    let text: Vec<String> = run
        .lines
        .0
        .iter()
        .map(|line| line.value.as_str().expect("text").to_owned())
        .collect();
    assert!(text[0].starts_with("tcptrace "), "{text:?}");
    assert!(text[0].contains(" on Linux "), "{text:?}");
    let column = text[1].find("kernel").expect("the first check");
    let checks = &text[1..text.len() - 1];
    for line in checks {
        assert!(!line.contains('\x1b'), "{line}");
        let (status, rest) = line.split_at(column);
        match status.trim() {
            "ok" | "degraded" | "no" | "skipped" => assert!(!rest.starts_with(' '), "{line}"),
            "" => assert!(rest.trim_start().starts_with("-> "), "{line}"),
            other => panic!("{other}: {line}"),
        }
    }
    let fixes = checks
        .iter()
        .filter(|line| line.trim_start().starts_with("-> "));
    let bad = checks
        .iter()
        .filter(|line| line.starts_with("degraded") || line.starts_with("no "));
    assert_eq!(fixes.count(), bad.count(), "{text:#?}");
}

#[test]
fn closed_pipe_and_full_disk() {
    let Some(_lab) = Lab::new() else { return };
    let (reader, writer) = io::pipe().expect("a pipe");
    drop(reader);
    let run = Tcptrace::run_to(&["doctor"], writer);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    let full = fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("Linux has it");
    let run = Tcptrace::run_to(&["doctor"], full);
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("No space left"), "{}", run.stderr);
}
