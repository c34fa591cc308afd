//! Events from a recording.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use crate::event::{Event, Printable, SCHEMA, Start};

/// Longest line that is read, bytes: a file of somebody else need not have a newline at all.
const LONGEST_LINE: u64 = 16 << 20;

/// Why a recording cannot be read, or not further.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("cannot read the recording {}: {error}; give the path of a file that `tcptrace record` wrote, or - for standard input", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It does not begin as a recording does.
    #[error("{} is not a recording of tcptrace: its first line is not a start event; record one with `tcptrace record FILE`", path.display())]
    NoRecording {
        /// Which file.
        path: PathBuf,
    },
    /// A newer program wrote it.
    #[error("{} was recorded by a newer tcptrace ({version}, schema {schema}) than this one ({}, schema {SCHEMA}); read it with that version or a later one", path.display(), env!("CARGO_PKG_VERSION"))]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its schema.
        schema: u64,
        /// The program that wrote it.
        version: String,
    },
    /// A line has no end within 16 MiB.
    #[error("{}, line {line}, is longer than {} MiB, and no line of a recording is; give a file that `tcptrace record` wrote", path.display(), LONGEST_LINE >> 20)]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
    },
    /// It breaks off in the middle of a line.
    #[error("{} breaks off in its last line ({line}): the recording was cut short, by a crash or a full disk; everything before that line was used", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
    },
    /// A line is not an event.
    #[error("{}, line {line}, is not an event: {error}; everything before that line was used", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// Why.
        error: serde_json::Error,
    },
    /// A second recording follows in the same file.
    #[error("in {}, line {line} is the start of another recording ({other}); times and sockets of two recordings do not go together: give them one by one", path.display())]
    Mixed {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// Whose.
        other: String,
    },
}

/// A recording that is being read.
pub struct File {
    path: PathBuf,
    lines: BufReader<Box<dyn Read>>,
    line: Vec<u8>,
    number: u64,
    start: Option<(Box<str>, Box<str>)>,
}

impl File {
    /// Opens a recording; `-` is standard input.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let input: Box<dyn Read> = if path == Path::new("-") {
            Box::new(io::stdin())
        } else {
            Box::new(fs::File::open(path).map_err(|error| Error::Read {
                path: path.to_owned(),
                error,
            })?)
        };
        Ok(Self::of(path, input))
    }

    /// Reads a recording from `input`. The path is for messages.
    pub(crate) fn of(path: &Path, input: Box<dyn Read>) -> Self {
        Self {
            path: path.to_owned(),
            lines: BufReader::with_capacity(1 << 16, input),
            line: Vec::new(),
            number: 0,
            start: None,
        }
    }

    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// See [`Error`]. After one, nothing more comes.
    pub fn next_event(&mut self) -> Result<Option<Event>, Error> {
        self.line.clear();
        // One byte more, to tell a line that is too long from the longest.
        (&mut self.lines)
            .take(LONGEST_LINE + 1)
            .read_until(b'\n', &mut self.line)
            .map_err(|error| Error::Read {
                path: self.path.clone(),
                error,
            })?;
        if self.line.is_empty() {
            return if self.number == 0 {
                Err(Error::NoRecording {
                    path: self.path.clone(),
                })
            } else {
                Ok(None)
            };
        }
        self.number += 1;
        if self.line.len() as u64 > LONGEST_LINE {
            return Err(Error::TooLong {
                path: self.path.clone(),
                line: self.number,
            });
        }
        if self.number == 1 {
            self.check_head()?;
        }
        let event = serde_json::from_slice(&self.line).map_err(|error| self.bad_line(error))?;
        if let Event::Start(start) = &event {
            self.check_start(start)?;
        }
        Ok(Some(event))
    }

    /// The schema comes first: a newer one may have lines that this program cannot read.
    fn check_head(&self) -> Result<(), Error> {
        let head: Option<serde_json::Value> = serde_json::from_slice(&self.line).ok();
        let head = head.filter(|head| head["event"] == "start");
        let Some(schema) = head.as_ref().and_then(|head| head["schema"].as_u64()) else {
            return Err(Error::NoRecording {
                path: self.path.clone(),
            });
        };
        if schema > u64::from(SCHEMA) {
            let version = head.as_ref().and_then(|head| head["version"].as_str());
            return Err(Error::Newer {
                path: self.path.clone(),
                schema,
                version: printable(version.unwrap_or("of an unknown version")),
            });
        }
        Ok(())
    }

    fn check_start(&mut self, start: &Start) -> Result<(), Error> {
        match &self.start {
            None => {
                self.start = Some((start.host.clone(), start.boot_id.clone()));
                Ok(())
            }
            Some((host, boot)) => Err(Error::Mixed {
                path: self.path.clone(),
                line: self.number,
                other: if *boot == start.boot_id {
                    "of the same host".to_owned()
                } else if *host == start.host {
                    format!("of another boot of {}", printable(host))
                } else {
                    format!(
                        "of the host {}, not {}",
                        printable(&start.host),
                        printable(host)
                    )
                },
            }),
        }
    }

    fn bad_line(&self, error: serde_json::Error) -> Error {
        let (path, line) = (self.path.clone(), self.number);
        if self.line.ends_with(b"\n") {
            Error::Line { path, line, error }
        } else {
            Error::Truncated { path, line }
        }
    }
}

/// What a file says of itself, for a message.
fn printable(text: &str) -> String {
    Printable(text.as_bytes()).to_string()
}

#[cfg(test)]
mod tests;
