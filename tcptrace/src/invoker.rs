//! The user who called `sudo`, `doas` or `pkexec`, as root of which this process runs.

use std::{env, ffi::OsString, fmt, path::PathBuf};

use nix::unistd::{Gid, Uid, User as Entry, getgrouplist};

use crate::event::Printable;

/// A user, with all that a process of that user has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its user id, never 0.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// All its groups.
    pub groups: Vec<u32>,
    /// From the table of users; `None` if it is not in there.
    pub account: Option<Account>,
    /// What it called: `sudo`.
    pub through: &'static str,
}

/// What the table of users says of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Its name.
    pub name: String,
    /// Its home.
    pub home: PathBuf,
    /// Its shell.
    pub shell: PathBuf,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.account {
            Some(account) => write!(
                f,
                "{} (uid {})",
                Printable(account.name.as_bytes()),
                self.uid
            ),
            None => write!(f, "uid {}", self.uid),
        }
    }
}

/// Why it is not known who called, although somebody did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot tell as which user to run the program: {0}; --as-root runs it as root")]
pub struct Unknown(String);

/// What the programs that make root of a user say of that user, and which variable says it.
const CALLERS: [(&str, &str); 3] = [
    ("sudo", "SUDO_UID"),
    ("doas", "DOAS_USER"),
    ("pkexec", "PKEXEC_UID"),
];

/// Variables that say by whom a program was called as root, which is not so for one that runs as that user.
pub const CALLED_BY: [&str; 6] = [
    "SUDO_UID",
    "SUDO_GID",
    "SUDO_USER",
    "SUDO_COMMAND",
    "DOAS_USER",
    "PKEXEC_UID",
];

/// The user who called; `None` if this process is not root's, or nobody but root called.
///
/// # Errors
/// When somebody called who cannot be identified.
pub fn find() -> Result<Option<User>, Unknown> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    of(|name| env::var(name).ok())
}

/// The id of that user; `None` if there is none, or it is not known.
#[must_use]
pub fn uid() -> Option<u32> {
    find().ok().flatten().map(|user| user.uid)
}

fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Option<User>, Unknown> {
    let called = CALLERS.iter().find_map(|&(through, name)| {
        let value = variable(name).filter(|value| !value.is_empty())?;
        Some((through, name, value))
    });
    let Some((through, variable_name, value)) = called else {
        return Ok(None);
    };
    let entry =
        if variable_name == "DOAS_USER" {
            let found = Entry::from_name(&value).ok().flatten();
            Some(found.ok_or_else(|| {
                Unknown(format!("there is no user {}", Printable(value.as_bytes())))
            })?)
        } else {
            None
        };
    let uid = match &entry {
        Some(entry) => entry.uid.as_raw(),
        None => value.parse().map_err(|_| {
            Unknown(format!(
                "{variable_name} is {}, no user id",
                Printable(value.as_bytes())
            ))
        })?,
    };
    if uid == 0 {
        return Ok(None);
    }
    // Not every user is in a table: in a container, or where a directory service cannot be reached.
    let entry = entry.or_else(|| Entry::from_uid(Uid::from_raw(uid)).ok().flatten());
    // The group that it had: not the one in the table, after `newgrp`.
    let given = variable("SUDO_GID")
        .filter(|_| through == "sudo")
        .and_then(|gid| gid.parse().ok());
    let gid: u32 = given
        .or_else(|| entry.as_ref().map(|entry| entry.gid.as_raw()))
        .ok_or_else(|| {
            Unknown(format!(
                "user {uid} is in no table, and its group is not known"
            ))
        })?;
    let mut groups = vec![gid];
    if let Some(entry) = &entry
        && let Ok(name) = std::ffi::CString::new(entry.name.as_bytes())
        && let Ok(all) = getgrouplist(&name, Gid::from_raw(gid))
    {
        groups = all.into_iter().map(Gid::as_raw).collect();
    }
    Ok(Some(User {
        uid,
        gid,
        groups,
        account: entry.map(|entry| Account {
            name: entry.name,
            home: entry.dir,
            shell: entry.shell,
        }),
        through,
    }))
}

/// What to change in the environment for a program of this user: variables with their new values, `None` to remove
/// them. What is not root's was chosen by the user (`sudo --preserve-env`), and stays.
#[must_use]
pub fn environment(
    user: &User,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Vec<(&'static str, Option<OsString>)> {
    let root = Entry::from_uid(Uid::from_raw(0)).ok().flatten();
    let (name, home, shell): (OsString, OsString, OsString) = match &root {
        Some(root) => (
            root.name.clone().into(),
            root.dir.clone().into(),
            root.shell.clone().into(),
        ),
        None => ("root".into(), "/root".into(), "/bin/sh".into()),
    };
    let account = user.account.as_ref();
    let of_account = |value: fn(&Account) -> OsString| account.map(value);
    let own_name = of_account(|account| account.name.clone().into());
    let of_root: [(&str, OsString, Option<OsString>); 6] = [
        // Who is in no table has no home: `/`, as login(1) has it.
        (
            "HOME",
            home,
            Some(account.map_or_else(|| "/".into(), |account| account.home.clone().into())),
        ),
        (
            "SHELL",
            shell,
            of_account(|account| account.shell.clone().into()),
        ),
        ("USER", name.clone(), own_name.clone()),
        ("LOGNAME", name.clone(), own_name.clone()),
        ("USERNAME", name, own_name),
        (
            "MAIL",
            "/var/mail/root".into(),
            of_account(|account| format!("/var/mail/{}", account.name).into()),
        ),
    ];
    let mut changes: Vec<_> = of_root
        .into_iter()
        .filter(|(name, of_root, _)| match variable(name) {
            Some(value) => value == *of_root,
            // Some variables are not everywhere.
            None => matches!(*name, "HOME" | "USER" | "LOGNAME"),
        })
        .map(|(name, _, value)| (name, value))
        .collect();
    changes.extend(CALLED_BY.map(|name| (name, None)));
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(variables: &[(&str, &str)]) -> Result<Option<User>, Unknown> {
        of(|name| {
            let mut all = variables.iter();
            all.find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nobody_called() {
        assert_eq!(found(&[]), Ok(None));
        assert_eq!(found(&[("SUDO_UID", "")]), Ok(None));
        // Root did.
        assert_eq!(found(&[("SUDO_UID", "0"), ("SUDO_GID", "0")]), Ok(None));
        assert_eq!(found(&[("DOAS_USER", "root")]), Ok(None));
        assert_eq!(found(&[("PKEXEC_UID", "0")]), Ok(None));
    }

    #[test]
    fn who_called_has_its_own_groups_and_home() {
        let Some(nobody) = Entry::from_name("nobody").ok().flatten() else {
            eprintln!("left out: there is no user nobody");
            return;
        };
        let (uid, gid) = (nobody.uid.to_string(), nobody.gid.to_string());
        for (variables, through) in [
            (
                vec![("SUDO_UID", uid.as_str()), ("SUDO_GID", gid.as_str())],
                "sudo",
            ),
            (vec![("DOAS_USER", "nobody")], "doas"),
            (vec![("PKEXEC_UID", uid.as_str())], "pkexec"),
        ] {
            let user = found(&variables).unwrap().unwrap();
            assert_eq!(
                (user.uid, user.gid),
                (nobody.uid.as_raw(), nobody.gid.as_raw())
            );
            assert!(user.groups.contains(&user.gid));
            assert_eq!(user.account.as_ref().unwrap().name, "nobody");
            assert_eq!(user.to_string(), format!("nobody (uid {uid})"));
            assert_eq!(user.through, through);
        }
        // After `newgrp`.
        let other = found(&[("SUDO_UID", uid.as_str()), ("SUDO_GID", "12345")])
            .unwrap()
            .unwrap();
        assert_eq!(other.gid, 12_345);
        assert!(other.groups.contains(&12_345));
    }

    #[test]
    fn a_user_in_no_table_has_what_is_known() {
        let user = found(&[("SUDO_UID", "4000000"), ("SUDO_GID", "4000001")])
            .unwrap()
            .unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups.as_slice()),
            (4_000_000, 4_000_001, &[4_000_001][..])
        );
        assert_eq!(user.account, None);
        let changes = environment(&user, |name| (name == "USER").then(|| "root".into()));
        assert!(changes.contains(&("HOME", Some("/".into()))), "{changes:?}");
        assert!(changes.contains(&("USER", None)), "{changes:?}");
    }

    #[test]
    fn who_cannot_be_known_is_not_taken_for_root() {
        for (variables, word) in [
            (&[("SUDO_UID", "alice")][..], "SUDO_UID is alice"),
            (&[("SUDO_UID", "-1")], "no user id"),
            (&[("PKEXEC_UID", "4000000")], "group is not known"),
            (
                &[("DOAS_USER", "no such\u{1b} user")],
                "no user no such\\u{1b} user",
            ),
        ] {
            let error = found(variables).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("--as-root"),
                "{error}"
            );
        }
    }

    #[test]
    fn only_what_is_roots_is_changed() {
        let user = User {
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            account: Some(Account {
                name: "alice".to_owned(),
                home: "/home/alice".into(),
                shell: "/bin/zsh".into(),
            }),
            through: "sudo",
        };
        let with = |set: &'static [(&str, &str)]| {
            let changes = environment(&user, |name| {
                let mut all = set.iter();
                all.find(|(known, _)| *known == name)
                    .map(|(_, value)| value.into())
            });
            move |name: &str| {
                let found = changes.iter().find(|(changed, _)| *changed == name);
                found.map(|(_, value)| value.clone())
            }
        };
        let sudo = with(&[
            ("HOME", "/root"),
            ("USER", "root"),
            ("MAIL", "/var/mail/root"),
        ]);
        assert_eq!(sudo("HOME"), Some(Some("/home/alice".into())));
        assert_eq!(sudo("USER"), Some(Some("alice".into())));
        assert_eq!(sudo("LOGNAME"), Some(Some("alice".into())));
        assert_eq!(sudo("MAIL"), Some(Some("/var/mail/alice".into())));
        assert_eq!(sudo("SUDO_UID"), Some(None));
        let preserved = with(&[
            ("HOME", "/srv/build"),
            ("USER", "alice"),
            ("LOGNAME", "alice"),
        ]);
        assert_eq!(preserved("HOME"), None);
        assert_eq!(preserved("USER"), None);
        assert_eq!(preserved("SHELL"), None);
        assert_eq!(preserved("SUDO_COMMAND"), Some(None));
    }
}
