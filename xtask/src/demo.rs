//! `cargo xtask demo`: what tcptrace shows, on real traffic, half a minute after the build.

use std::{
    env,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

use crate::{build, command};

mod actor;
mod process;
mod story;

pub(crate) use actor::set_loopback_up;

/// What of the demo to run: all of it, or one of the parts that it starts itself.
#[derive(clap::Args)]
#[command(override_usage = "cargo xtask demo")]
pub(crate) struct Options {
    #[command(subcommand)]
    part: Option<Part>,
}

/// Both run this program again: the story as root, the actors under names of their own.
#[derive(clap::Subcommand)]
enum Part {
    /// What comes after the build
    #[command(hide = true)]
    Story { tcptrace: PathBuf },
    /// A process whose connections are shown
    #[command(hide = true)]
    Actor(actor::Options),
}

/// Runs the demo, or the part of it.
pub(crate) fn run(options: Options) -> Result<()> {
    match options.part {
        None => {
            ask_for_root()?;
            play(&build::run()?)
        }
        Some(Part::Story { tcptrace }) => play(&tcptrace),
        Some(Part::Actor(options)) => actor::run(&options),
    }
}

/// Plays the story, as root.
fn play(tcptrace: &Path) -> Result<()> {
    if geteuid().is_root() {
        return story::play(tcptrace);
    }
    // Ctrl-C reaches the story as well, which cleans up: this process waits for it.
    ctrlc::set_handler(|| {}).context("cannot handle Ctrl-C")?;
    let own = env::current_exe().context("the path of this program is not known")?;
    command::run(sudo().arg(own).args(["demo", "story"]).arg(tcptrace))
}

/// Asks for a password now, if one is needed, rather than after minutes of building.
fn ask_for_root() -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    eprintln!("demo: probes and network namespaces need root: asking sudo");
    if let Err(error) = command::run(sudo().arg("true")) {
        bail!("the demo needs root, and {error:#}. Run it as a user who may use sudo, or as root");
    }
    Ok(())
}

/// `sudo`, which can ask for a password only on a terminal.
fn sudo() -> Command {
    let mut sudo = Command::new("sudo");
    if !io::stdin().is_terminal() {
        sudo.arg("-n");
    }
    sudo
}
