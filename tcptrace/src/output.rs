//! Standard output: gathered, written at once.

use std::io::{self, IsTerminal as _, Write as _};

/// Standard output.
pub struct Output {
    /// What has gathered since the last [`flush`](Self::flush).
    pub buffer: Vec<u8>,
    /// It is a terminal.
    pub is_terminal: bool,
    /// Colours are wanted.
    pub color: bool,
}

impl Output {
    /// Standard output. Colours only on a terminal, and only if nobody objects
    /// (`--no-color`, or a `NO_COLOR` that is not empty).
    #[must_use]
    pub fn stdout(no_color: bool) -> Self {
        let is_terminal = io::stdout().is_terminal();
        let objected = no_color || std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
        Self {
            buffer: Vec::with_capacity(1 << 16),
            is_terminal,
            color: is_terminal && !objected,
        }
    }

    /// Writes what has gathered.
    ///
    /// # Errors
    /// When it is not taken.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(&self.buffer)?;
        self.buffer.clear();
        out.flush()
    }

    /// Width and height of the terminal in characters; `None` if it is none.
    #[must_use]
    pub fn size(&self) -> Option<(usize, usize)> {
        if !self.is_terminal {
            return None;
        }
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        (size.ws_col > 0 && size.ws_row > 0)
            .then_some((usize::from(size.ws_col), usize::from(size.ws_row)))
    }
}
