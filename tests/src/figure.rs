//! Figures of a test that passes.

use std::io::Write;

/// Tells a figure: `cargo xtask vm` shows what begins like this. Not with `println`, which the test harness
/// hides when a test passes.
pub fn figure(text: &str) {
    let _ = writeln!(std::io::stderr(), "figure: {text}");
}
