use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::*;

/// A process that ends with this value.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn details(&self) -> Details {
        let handle = Handle::open(self.0.id()).unwrap();
        // It is started when its old memory is gone, a moment before the arguments are there.
        loop {
            let details = handle.details().unwrap();
            if details.cmdline.is_some() {
                return details;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_process_is_described() {
    let sleep = Running::start(Command::new("sleep").arg("61"));
    let details = sleep.details();
    let exe = std::fs::read_link(format!("/proc/{}/exe", sleep.0.id())).unwrap();
    assert_eq!(details.exe.as_deref(), exe.to_str());
    assert_eq!(details.cmdline.as_deref(), Some("sleep 61"));
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    assert_eq!(details.nofile, limit.current);
    assert_eq!(details.uid, Some(rustix::process::getuid().as_raw()));
    assert_eq!(details.ns_pids.first(), Some(&sleep.0.id()));
}

#[test]
fn descriptors_are_counted() {
    // When it has written something, it has opened what it needs.
    let mut shell = Command::new("sh")
        .args(["-c", "exec 7<&0 8<&0; echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    shell.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let handle = Handle::open(shell.id()).unwrap();
    let fds = std::fs::read_dir(format!("/proc/{}/fd", shell.id())).unwrap();
    let expected = fds.count() as u32;
    let details = handle.details().unwrap();
    drop(shell.stdin.take());
    shell.wait().unwrap();
    assert!(expected >= 5);
    assert_eq!(details.fds, Some(expected));
}

#[test]
fn a_command_line_cannot_break_a_line_or_a_terminal() {
    let hostile = OsStr::from_bytes(b"\x1b]0;owned\x07a\nb\xff\xe2\x80\xae");
    let sleep = Running::start(Command::new("sleep").arg0(hostile).arg("62"));
    assert_eq!(
        sleep.details().cmdline.as_deref(),
        Some(r"\u{1b}]0;owned\u{7}a\nb\xff\u{202e} 62")
    );
}

#[test]
fn a_long_command_line_is_cut() {
    let shown = |arg0: &str| {
        let sleep = Running::start(Command::new("sleep").arg0(arg0).arg("63"));
        sleep.details().cmdline.unwrap()
    };
    // Long enough for more than a page, and cut in the middle of a character.
    assert_eq!(shown(&"é".repeat(9000)), "é".repeat(255) + "…");
    assert_eq!(shown(&"x".repeat(253)), "x".repeat(253) + " 63");
    assert_eq!(shown(&"x".repeat(254)), "x".repeat(254) + " …");
    assert_eq!(
        shown(&"\u{1f980}".repeat(256)),
        "\u{1f980}".repeat(255) + "…"
    );
}

#[test]
fn nothing_is_made_up_of_a_zombie() {
    let mut child = Command::new("true").spawn().unwrap();
    let handle = Handle::open(child.id()).unwrap();
    let zombie = || handle.identity().is_some() && handle.exe().is_none();
    while !zombie() {
        std::thread::yield_now();
    }
    let details = handle.details().unwrap();
    child.wait().unwrap();
    assert_eq!(details.exe, None);
    assert_eq!(details.cmdline, None);
    assert!(matches!(details.fds, None | Some(0)), "{details:?}");
}

#[test]
fn limits_have_a_soft_one_first() {
    let limits = |soft: &str| {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max core file size        0                    unlimited            bytes     \n\
             Max open files            {soft:<20} 524288               files     \n"
        )
    };
    assert_eq!(nofile(limits("1024").as_bytes()), Some(1024));
    assert_eq!(nofile(limits("unlimited").as_bytes()), None);
    assert_eq!(nofile(b""), None);
}

#[test]
fn ids_are_numbers_on_their_own_line() {
    // A comm of `x\nUid: 7` as the kernel writes it.
    let status = b"Name:\tx\\nUid:\t7\nNStgid:\t9\nUid:\t1000\t0\t0\t0\nNSpid:\t4242\t17\n";
    assert_eq!(numbers_of(status, "Uid:").next(), Some(1000));
    let ns_pids: Vec<_> = numbers_of(status, "NSpid:").collect();
    assert_eq!(ns_pids, [4242, 17]);
    assert_eq!(numbers_of(status, "Gid:").next(), None);
}

#[test]
fn the_unit_is_the_innermost_that_is_no_container() {
    const ID: &str = "4f5ed1b8f40f2ae4e4bc4c1e4c3ba0bc2b0ad8bb9b0bd1ff4f9e1f8b4f2a7c31";
    for (file, expected_unit, expected_container) in [
        ("0::/system.slice/ssh.service", Some("ssh.service"), None),
        (
            "0::/system.slice/ssh.service (deleted)",
            Some("ssh.service"),
            None,
        ),
        // A process that made cgroups of its own below its unit.
        (
            "0::/system.slice/web.service/worker/3",
            Some("web.service"),
            None,
        ),
        (
            "0::/user.slice/user-1000.slice/session-3.scope",
            Some("session-3.scope"),
            None,
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-web.service",
            Some("app-web.service"),
            None,
        ),
        (
            r"0::/system.slice/system-my\x2dweb.slice/my\x2dweb@1.service",
            Some(r"my\x2dweb@1.service"),
            None,
        ),
        ("0::/system.slice/docker-ID.scope", None, Some(ID)),
        (
            "0::/kubepods.slice/kubepods-pod8b1a5f5e.slice/cri-containerd-ID.scope",
            None,
            Some(ID),
        ),
        (
            "0::/machine.slice/machine-web.scope/payload",
            None,
            Some("web"),
        ),
        // What starts a container is a unit, and so is what runs inside it.
        (
            "0::/system.slice/web.service/libpod-payload-ID",
            Some("web.service"),
            Some(ID),
        ),
        (
            "0::/docker/ID/system.slice/kubelet.service",
            Some("kubelet.service"),
            Some(ID),
        ),
        (
            "0::/machine.slice/libpod-conmon-ID.scope",
            Some("libpod-conmon-ID.scope"),
            None,
        ),
        // Both versions, and version 1 alone.
        (
            "5:memory:/other.service\n1:name=systemd:/system.slice/ssh.service\n0::/\n",
            Some("ssh.service"),
            None,
        ),
        (
            "1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n",
            Some("b.service"),
            None,
        ),
        (
            "4:memory:/docker/ID\n1:name=systemd:/\n0::/",
            None,
            Some(ID),
        ),
        ("4:cpu,cpuacct:/a:b.service\n", None, None),
        ("0::/a:b/c:d.service\n", Some("c:d.service"), None),
        ("0::/.service", None, None),
        ("0::/", None, None),
        ("", None, None),
        ("0::", None, None),
    ] {
        let file = file.replace("ID", ID);
        let expected_unit = expected_unit.map(|unit| unit.replace("ID", ID));
        let cgroups = Cgroups::of(file.as_bytes());
        assert_eq!(cgroups.unit(), expected_unit, "{file}");
        assert_eq!(cgroups.container().as_deref(), expected_container, "{file}");
    }
}

#[test]
fn a_hostile_cgroup_is_printable() {
    let cgroups = Cgroups::of(b"0::/lxc/\x1b[2J/\x07.service\n");
    assert_eq!(cgroups.container().as_deref(), Some(r"\u{1b}[2J"));
    assert_eq!(cgroups.unit().as_deref(), Some(r"\u{7}.service"));
}
