//! What is printed: gathered, and handed over to the sink at once, or to the queue in front of it.

mod queue;

use std::{
    fs::File,
    io::{self, IsTerminal as _, Write},
    mem,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use unicode_width::UnicodeWidthChar as _;

use crate::new_file::{self, Content, NewFile};

pub use queue::{Open, QUEUE_BYTES, Queue, Sink, Unwritten};

/// Where views write.
#[derive(Default)]
pub struct Output {
    to: To,
    /// What has gathered since the last [`flush`](Self::flush).
    pub buffer: Vec<u8>,
    /// It is a terminal.
    pub is_terminal: bool,
    /// Colours are wanted.
    pub color: bool,
    /// Something was written.
    begun: bool,
    /// Lines of the page that was [drawn](Self::draw) last.
    drawn: usize,
}

#[derive(Default)]
enum To {
    #[default]
    Stdout,
    Stderr,
    File(NewFile),
    Queue(Queue),
}

impl To {
    /// Opens the sink for a thread that writes.
    fn open(self) -> Open {
        Box::new(|| {
            // Not through the standard library's buffer: what is queued is written as it is.
            let stream: OwnedFd = match self {
                Self::Stdout => io::stdout().as_fd().try_clone_to_owned()?,
                Self::Stderr => io::stderr().as_fd().try_clone_to_owned()?,
                Self::File(file) => return Ok(Box::new(file)),
                Self::Queue(_) => unreachable!("a queue has no queue in front of it"),
            };
            Ok(Box::new(File::from(stream)))
        })
    }
}

impl Output {
    /// Standard error, for a report beside the output of another program: no page is drawn over there.
    #[must_use]
    pub fn stderr() -> Self {
        Self {
            to: To::Stderr,
            ..Self::default()
        }
    }

    /// A file for a report; an older one is overwritten with `force`: see [`new_file`].
    ///
    /// # Errors
    /// When it cannot be made: with what to do.
    pub fn file(path: &Path, force: bool) -> io::Result<Self> {
        let file = new_file::create(path, Content::Report, force)?;
        Ok(Self {
            to: To::File(file),
            ..Self::default()
        })
    }

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
            ..Self::default()
        }
    }

    /// Output through a queue to a sink that is opened with the first of it.
    #[must_use]
    pub fn to_queue(queue: Queue) -> Self {
        Self {
            to: To::Queue(queue),
            ..Self::default()
        }
    }

    /// Puts a queue in front of the sink, so that a [`flush`](Self::flush) never waits for it.
    pub fn queued(&mut self) -> Queue {
        if let To::Queue(queue) = &self.to {
            return queue.clone();
        }
        let queue = Queue::new(mem::take(&mut self.to).open());
        self.to = To::Queue(queue.clone());
        queue
    }

    /// Hands over what has gathered: to the sink, or to the queue in front of it.
    ///
    /// # Errors
    /// When it is not taken.
    pub fn flush(&mut self) -> io::Result<()> {
        self.begun |= !self.buffer.is_empty();
        match &mut self.to {
            To::Queue(queue) => return queue.push(&mut self.buffer),
            To::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(&self.buffer)?;
                out.flush()?;
            }
            To::Stderr => io::stderr().write_all(&self.buffer)?,
            To::File(file) => file.write_all(&self.buffer)?,
        }
        self.buffer.clear();
        Ok(())
    }

    /// Writes a page, on a terminal over the one before. Of one that is not the `last`, what does not fit
    /// is left out: it would scroll, and could not be drawn over.
    ///
    /// # Errors
    /// When it is not taken.
    pub fn draw(&mut self, page: &str, last: bool) -> io::Result<()> {
        if self.drawn > 0 {
            write!(self.buffer, "\x1b[{}F\x1b[J", self.drawn)?;
        }
        self.drawn = 0;
        match self.size() {
            Some((width, height)) if !last => {
                let rows = page.lines().flat_map(|line| rows(line, width));
                for row in rows.take(height.saturating_sub(1)) {
                    self.buffer.extend_from_slice(row.as_bytes());
                    self.buffer.push(b'\n');
                    self.drawn += 1;
                }
            }
            _ => self.buffer.extend_from_slice(page.as_bytes()),
        }
        self.flush()
    }

    /// Whether all of a page could be drawn over. Only a terminal is too small for one.
    #[must_use]
    pub fn fits(&self, page: &str) -> bool {
        self.size().is_none_or(|(width, height)| {
            page.lines()
                .map(|line| rows(line, width).len())
                .sum::<usize>()
                < height
        })
    }

    /// An empty line, if something was written before that stays.
    pub fn separate(&mut self) {
        if self.begun && self.drawn == 0 {
            self.buffer.push(b'\n');
        }
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

/// A line in rows of at most `width` columns, broken at spaces where there are any.
fn rows(line: &str, width: usize) -> Vec<&str> {
    let mut rows = Vec::new();
    let mut rest = line;
    loop {
        let mut columns = 0;
        let too_long = rest.char_indices().find(|(_, char)| {
            columns += char.width().unwrap_or(0);
            columns > width
        });
        let Some((end, first_beyond)) = too_long else {
            if rows.is_empty() || !rest.is_empty() {
                rows.push(rest);
            }
            return rows;
        };
        let space = rest[..end].trim_start().rfind(' ');
        let indent = end - rest[..end].trim_start().len();
        let at = match space {
            _ if first_beyond == ' ' => end,
            Some(space) => indent + space,
            // A terminal of no width, or a character wider than it.
            None if end == 0 => first_beyond.len_utf8(),
            None => end,
        };
        rows.push(&rest[..at]);
        rest = rest[at..].strip_prefix(' ').unwrap_or(&rest[at..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_broken_where_words_end() {
        assert_eq!(rows("", 4), [""]);
        assert_eq!(rows("abcd", 4), ["abcd"]);
        assert_eq!(rows("ab cd", 4), ["ab", "cd"]);
        assert_eq!(rows("abcd ef", 4), ["abcd", "ef"]);
        assert_eq!(rows("abcdefghij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(rows("  abcdefg", 4), ["  ab", "cdef", "g"]);
        assert_eq!(rows("a 日本語", 4), ["a", "日本", "語"]);
        assert_eq!(rows("日本", 1), ["日", "本"]);
        assert_eq!(rows("ab", 0), ["a", "b"]);
    }
}
