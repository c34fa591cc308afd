//! `leaks -- CMD` under sudo: the program runs as the user who called it, and not as root without a word.

use std::{env, fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process};

use nix::unistd::{Uid, User, getgroups};
use tests::{Lab, Run, Tcptrace};

/// What a program is, a word a line.
const WHO: &str = "id -u; id -g; id -G; echo ${HOME-none} ${USER-none} ${LOGNAME-none} ${SUDO_UID-none}; grep -E \
                   '^(CapEff|CapBnd|SigIgn)' /proc/self/status";

struct Who {
    run: Run,
    lines: Vec<String>,
}

fn who(lab: &Lab, options: &[&str], variables: &[(&str, &str)]) -> Who {
    let mut command = lab.leaks_of(&[&["--report", "/dev/null"], options].concat());
    command.args(["sh", "-c", WHO]);
    for name in ["HOME", "USER", "LOGNAME"] {
        command.env_remove(name);
    }
    // As sudo sets them.
    command.env("HOME", "/root").env("USER", "root");
    command.envs(variables.iter().copied());
    let run = Tcptrace::watching(&mut command).ended();
    let lines = run.lines.0.iter().map(|line| match line.value.as_str() {
        Some(text) => text.to_owned(),
        None => line.value.to_string(),
    });
    Who {
        lines: lines.collect(),
        run,
    }
}

impl Who {
    #[track_caller]
    fn assert_is(&self, uid: u32, gid: u32, variables: &str) {
        assert_eq!(self.run.code, Some(0), "{}", self.run.stderr);
        assert_eq!(
            self.lines[..2],
            [uid.to_string(), gid.to_string()],
            "{:?}",
            self.lines
        );
        assert_eq!(self.lines[3], variables, "{:?}", self.lines);
    }
}

#[test]
fn the_user_who_called_sudo() {
    let Some(lab) = Lab::new() else { return };
    let Some(nobody) = User::from_name("nobody").expect("a table of users") else {
        eprintln!("left out: there is no user nobody");
        return;
    };
    let (uid, gid) = (nobody.uid.to_string(), nobody.gid.to_string());
    let home = nobody.dir.display();
    let sudo = [
        ("SUDO_UID", uid.as_str()),
        ("SUDO_GID", &gid),
        ("SUDO_USER", "nobody"),
    ];
    let found = who(&lab, &[], &sudo);
    found.assert_is(
        nobody.uid.as_raw(),
        nobody.gid.as_raw(),
        &format!("{home} nobody nobody none"),
    );
    assert_eq!(found.lines[2], gid, "its groups, and not root's");
    // Nothing is left of root's rights, and of what tcptrace ignores.
    let capabilities = found
        .lines
        .iter()
        .find(|line| line.contains("CapEff"))
        .expect("a line");
    assert!(capabilities.ends_with("0000000000000000"), "{capabilities}");
    let ignored = found
        .lines
        .iter()
        .find(|line| line.contains("SigIgn"))
        .expect("a line");
    let ignored = u64::from_str_radix(ignored.rsplit(['\t', ' ']).next().expect("a word"), 16);
    assert_eq!(
        ignored.expect("a mask") & 1 << (libc::SIGXFSZ - 1),
        0,
        "{:?}",
        found.lines
    );
    let said = format!(
        "tcptrace: running sh as nobody (uid {uid}), who called sudo; --as-root runs it as root"
    );
    assert_eq!(
        found
            .run
            .stderr
            .lines()
            .filter(|line| **line == said)
            .count(),
        1,
        "{}",
        found.run.stderr
    );

    for variables in [&[("DOAS_USER", "nobody")][..], &[("PKEXEC_UID", &uid)]] {
        let found = who(&lab, &[], variables);
        found.assert_is(
            nobody.uid.as_raw(),
            nobody.gid.as_raw(),
            &format!("{home} nobody nobody none"),
        );
    }
    // `sudo --preserve-env`.
    let kept = [
        &sudo[..],
        &[
            ("HOME", "/srv/build"),
            ("USER", "nobody"),
            ("LOGNAME", "nobody"),
        ],
    ]
    .concat();
    who(&lab, &[], &kept).assert_is(
        nobody.uid.as_raw(),
        nobody.gid.as_raw(),
        "/srv/build nobody nobody none",
    );

    let as_root = who(&lab, &["--as-root"], &sudo);
    as_root.assert_is(0, 0, &format!("/root root none {uid}"));
    assert!(
        !as_root.run.stderr.contains("running"),
        "{}",
        as_root.run.stderr
    );
}

#[test]
fn a_user_in_no_table() {
    let Some(lab) = Lab::new() else { return };
    let found = who(
        &lab,
        &[],
        &[("SUDO_UID", "4000000"), ("SUDO_GID", "4000001")],
    );
    found.assert_is(4_000_000, 4_000_001, "/ none none none");
    assert_eq!(found.lines[2], "4000001");
}

#[test]
fn root_itself() {
    let Some(lab) = Lab::new() else { return };
    for variables in [&[][..], &[("SUDO_UID", "0"), ("SUDO_GID", "0")]] {
        let found = who(&lab, &[], variables);
        assert_eq!(found.lines[0], "0", "{}", found.run.stderr);
        assert!(
            !found.run.stderr.contains("running"),
            "{}",
            found.run.stderr
        );
        let groups = getgroups().expect("own groups").len();
        assert!(found.lines[2].split(' ').count() >= groups.min(1));
    }
}

#[test]
fn who_cannot_be_known_is_not_root() {
    let Some(lab) = Lab::new() else { return };
    for variables in [("SUDO_UID", "alice"), ("DOAS_USER", "no-such-user")] {
        let found = who(&lab, &[], &[variables]);
        assert_eq!(found.run.code, Some(2), "{}", found.run.stderr);
        assert!(
            found.run.stderr.contains("--as-root"),
            "{}",
            found.run.stderr
        );
        assert!(found.lines.is_empty(), "nothing was run: {:?}", found.lines);
    }
}

/// A program that only root may run.
#[test]
fn what_the_user_may_not_run() {
    let Some(lab) = Lab::new() else { return };
    let path = env::temp_dir().join(format!("tcptrace-tests-{}-closed", process::id()));
    let closed = Remove(path);
    fs::write(&closed.0, "#!/bin/sh\nexit 0\n").expect("a temporary file");
    fs::set_permissions(&closed.0, fs::Permissions::from_mode(0o700)).expect("its own");
    for (option, code) in [(&[][..], 126), (&["--as-root"], 0)] {
        let mut command = lab.leaks_of(&[&["--report", "/dev/null"], option].concat());
        command
            .arg(&closed.0)
            .env("SUDO_UID", "4000000")
            .env("SUDO_GID", "4000000");
        let run = Tcptrace::watching(&mut command).ended();
        assert_eq!(run.code, Some(code), "{}", run.stderr);
        if code == 126 {
            assert!(run.stderr.contains("run it --as-root"), "{}", run.stderr);
        }
    }
    assert!(Uid::effective().is_root());
}

struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
