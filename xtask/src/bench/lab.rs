//! Where it is measured: a network namespace without any other traffic, with tracefs for those that need it,
//! and a file system in memory for what is written.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::demo;

/// This process, and all that it starts, are in it.
pub(super) struct Lab {
    /// The generator of connections.
    pub(super) churn: PathBuf,
    /// A folder in memory.
    pub(super) folder: PathBuf,
    /// Inode number of the network namespace.
    pub(super) netns: u64,
}

impl Lab {
    /// Enters new namespaces. Only where there is one thread. `folder` is covered by one in memory.
    ///
    /// # Errors
    /// Without the privileges of root.
    pub(super) fn enter(churn: &Path, folder: &Path) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context(
            "cannot make a network namespace, which needs CAP_SYS_ADMIN: run it as root outside of a \
             container, or in a privileged one",
        )?;
        demo::set_loopback_up().context("cannot set the loopback interface up")?;
        let none = None::<&str>;
        // What is mounted here is seen by nobody else, and goes with the last process of this namespace.
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).context("cannot keep mounts to ourselves")?;
        for (kind, at) in [
            ("debugfs", "/sys/kernel/debug"),
            ("tracefs", "/sys/kernel/tracing"),
        ] {
            // Without, peers that need it say so.
            let _ = mount(Some(kind), at, Some(kind), MsFlags::empty(), none);
        }
        fs::create_dir_all(folder)?;
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), none)
            .with_context(|| format!("cannot mount a tmpfs on {}", folder.display()))?;
        Ok(Self {
            churn: churn.to_owned(),
            folder: folder.to_owned(),
            netns: File::open("/proc/self/ns/net")?.metadata()?.ino(),
        })
    }
}
