//! The processes that come from one.

use std::io;

use hashbrown::{HashMap, HashSet};
use rustix::io::Errno;

use super::processes;

/// How often `/proc` is read again when a parent ended between its children and itself.
const READINGS: usize = 3;

/// This process's id as `/proc` numbers it: another than [`std::process::id`] in a pid namespace whose `/proc`
/// is that of one outside.
///
/// # Errors
///
/// When `/proc` is not mounted, or is that of a pid namespace that this process is not in.
pub fn own_pid() -> io::Result<u32> {
    let name = std::fs::read_link("/proc/self")?;
    let number = name.to_str().and_then(|name| name.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("/proc/self leads to {}", name.display())))
}

/// `root` and all that descend from it, as their parents' ids say now. A process whose parent has
/// ended belongs to its nearest ancestor that is a child subreaper (prctl(2)), or to process 1.
///
/// # Errors
///
/// When `/proc` cannot be read at all, or no file descriptor is left to read it with (`EMFILE`).
pub fn descendants(root: u32) -> io::Result<HashSet<u32>> {
    let mut parents = parents()?;
    for _ in 1..READINGS {
        if parents
            .values()
            .all(|ppid| *ppid == 0 || parents.contains_key(ppid))
        {
            break;
        }
        parents = self::parents()?;
    }
    Ok(below(root, &parents))
}

/// Every process's parent.
fn parents() -> io::Result<HashMap<u32, u32>> {
    let mut parents = HashMap::new();
    processes(|process| {
        let identity = process.identity().ok_or(Errno::SRCH)?;
        parents.insert(identity.pid, identity.ppid);
        Ok(())
    })?;
    Ok(parents)
}

fn below(root: u32, parents: &HashMap<u32, u32>) -> HashSet<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (&pid, &ppid) in parents {
        children.entry(ppid).or_default().push(pid);
    }
    let mut found = HashSet::from([root]);
    let mut ask = vec![root];
    while let Some(parent) = ask.pop() {
        for &child in children.get(&parent).into_iter().flatten() {
            // Parents read at different times could make a circle.
            if found.insert(child) {
                ask.push(child);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_tree_is_followed_to_its_leaves_and_no_circle_for_ever() {
        let parents = HashMap::from([
            (1, 0),
            (10, 1),
            (11, 10),
            (12, 10),
            (13, 12),
            (20, 1),
            (21, 22),
            (22, 21),
        ]);
        assert_eq!(below(10, &parents), HashSet::from([10, 11, 12, 13]));
        assert_eq!(below(13, &parents), HashSet::from([13]));
        assert_eq!(below(21, &parents), HashSet::from([21, 22]));
    }

    #[test]
    fn a_child_of_a_child_is_a_descendant() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut decoy = Command::new("sleep").arg("60").spawn().unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(shell.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let sleep = line.trim().parse().unwrap();

        let of_shell = descendants(shell.id());
        let of_me = descendants(std::process::id());
        let pid = rustix::process::Pid::from_raw(sleep as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        decoy.kill().unwrap();
        shell.wait().unwrap();
        decoy.wait().unwrap();

        assert_eq!(of_shell.unwrap(), HashSet::from([shell.id(), sleep]));
        let of_me = of_me.unwrap();
        for pid in [std::process::id(), shell.id(), sleep, decoy.id()] {
            assert!(of_me.contains(&pid), "{pid} in {of_me:?}");
        }
    }
}
