//! `cargo xtask docs`: man pages and completions, which are made of the options and committed.

use anyhow::Result;

use crate::{command, setup};

/// Sets up and writes them. The test that compares them with the options is what writes them too, because
/// it has the options at hand.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    command::run(
        command::cargo("test")
            .args(["--package", "tcptrace", "--test", "manual", "same"])
            .env("UPDATE_GOLDEN", "1"),
    )
}
