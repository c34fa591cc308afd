use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use super::*;

/// A process in a mount namespace of its own, with a folder in which only it sees mounts.
struct Process(Child, PathBuf);

impl Process {
    /// `None` where this user cannot make one, which is said.
    fn new(name: &str) -> Option<Self> {
        let folder =
            std::env::temp_dir().join(format!("tcptrace-mounts-{}-{name}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let script = "mount -t tmpfs none \"$0\" && echo ready && exec sleep 600";
        let mut child = Command::new("unshare");
        child.args(["-m", "sh", "-c", script]).arg(&folder);
        let child = child.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut process = Self(child.ok()?, folder);
        let mut line = String::new();
        BufReader::new(process.0.stdout.take()?)
            .read_line(&mut line)
            .ok()?;
        if line != "ready\n" {
            eprintln!("left out: mount namespaces, which need root");
            return None;
        }
        Some(process)
    }

    fn run(&self, script: &str) {
        let mut command = Command::new("nsenter");
        command
            .args(["-m", "-t", &self.0.id().to_string(), "sh", "-ec", script])
            .arg(&self.1);
        assert!(command.status().unwrap().success(), "{script}");
    }

    fn found(&self) -> Found {
        let pid = self.0.id();
        let process = Handle::open(pid).unwrap();
        let inode = procfs::link_inode(&process, "ns/mnt", MNT)
            .unwrap()
            .unwrap();
        Found {
            inode,
            pids: vec![pid],
        }
    }

    /// Bytes that are read of all room there is, and the paths that are found.
    fn scan(&self, tables: &mut MountTables, most: usize) -> (Vec<PathBuf>, LeftOut) {
        let mut paths = Vec::new();
        let pid = self.0.id();
        let left_out = tables.scan(vec![self.found()], most, |_, in_pid, path| {
            assert_eq!(in_pid, pid);
            // It began with all that others have mounted.
            if Path::new("/").join(path).starts_with(&self.1) {
                paths.push(path.to_owned());
            }
        });
        (paths, left_out)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_dir(&self.1);
    }
}

const MOUNT_NETNS: &str = "touch $0/net; mount --bind /proc/self/ns/net $0/net";

#[test]
fn a_table_is_read_again_only_when_it_has_changed() {
    let Some(process) = Process::new("changed") else {
        return;
    };
    let mut tables = MountTables::default();
    let net = process.1.join("net");
    let net = [net.strip_prefix("/").unwrap().to_owned()];
    assert_eq!(
        process.scan(&mut tables, MOST_BYTES),
        (Vec::new(), LeftOut::default())
    );
    process.run(MOUNT_NETNS);
    assert_eq!(
        process.scan(&mut tables, MOST_BYTES),
        (net.to_vec(), LeftOut::default())
    );
    if version(process.0.id(), process.found().inode).is_none() {
        eprintln!("left out: whether mounts have changed, which needs Linux 6.12");
        return;
    }
    // With no room at all, it is known all the same, until there is another mount.
    assert_eq!(
        process.scan(&mut tables, 0),
        (net.to_vec(), LeftOut::default())
    );
    process.run("mkdir $0/more; mount -t tmpfs none $0/more");
    let (paths, left_out) = process.scan(&mut tables, 0);
    assert_eq!(
        (paths, left_out.count),
        (net.to_vec(), 1),
        "what was known is kept, and that it is old is said"
    );
    assert_eq!(
        process.scan(&mut tables, MOST_BYTES),
        (net.to_vec(), LeftOut::default())
    );
    // As many mounts as before, but others.
    process.run("umount $0/net; touch $0/other; mount --bind /proc/self/ns/net $0/other");
    let (paths, _) = process.scan(&mut tables, MOST_BYTES);
    assert!(paths[0].ends_with("other"), "{paths:?}");
    process.run("umount $0/other");
    assert_eq!(
        process.scan(&mut tables, MOST_BYTES).0,
        Vec::<PathBuf>::new()
    );
}

#[test]
fn a_large_table_does_not_keep_others_from_being_read() {
    let (Some(large), Some(small)) = (Process::new("large"), Process::new("small")) else {
        return;
    };
    large.run(
        "i=0; while [ $i -lt 300 ]; do mkdir $0/$i; mount -t tmpfs none $0/$i; i=$((i+1)); done",
    );
    large.run(MOUNT_NETNS);
    small.run(MOUNT_NETNS);
    let size = |process: &Process| {
        fs::read(format!("/proc/{}/mountinfo", process.0.id()))
            .unwrap()
            .len()
    };
    let mut tables = MountTables::default();
    // Who of the two has a network namespace mounted in its own folder.
    let scan = |tables: &mut MountTables, most| {
        let mut pids = Vec::new();
        let found = vec![large.found(), small.found()];
        let left_out = tables.scan(found, most, |_, pid, path| {
            let folder = if pid == large.0.id() {
                &large.1
            } else {
                &small.1
            };
            if Path::new("/").join(path).starts_with(folder) {
                pids.push(pid);
            }
        });
        pids.sort_unstable();
        (pids, left_out)
    };
    let (large_pid, small_pid) = (large.0.id(), small.0.id());
    let mut both = vec![large_pid, small_pid];
    both.sort_unstable();
    if version(large_pid, large.found().inode).is_some() {
        // What is looked for comes last in the large table.
        let (pids, left_out) = scan(&mut tables, size(&small) + 8192);
        assert_eq!(pids, [small_pid]);
        let first = Some(large_pid);
        assert_eq!(left_out, LeftOut { count: 1, first });
    }
    let mut tables = MountTables::default();
    let room = size(&small) + size(&large) + BLOCK;
    assert_eq!(scan(&mut tables, room), (both, LeftOut::default()));
}

#[test]
fn what_is_not_found_any_more_is_forgotten() {
    let Some(process) = Process::new("gone") else {
        return;
    };
    let mut tables = MountTables::default();
    let _ = process.scan(&mut tables, MOST_BYTES);
    assert_eq!(tables.by_inode.len(), 1);
    let found = process.found();
    drop(process);
    assert_eq!(
        tables.scan(vec![found], MOST_BYTES, |_, _, _| ()),
        LeftOut::default()
    );
    assert_eq!(tables.by_inode.len(), 0);
}
