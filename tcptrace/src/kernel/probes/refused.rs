//! How the kernel refuses something, as far as it says.

use std::{fmt, io};

use aya::{
    BtfError, EbpfError,
    programs::{ProgramError, trace_point::TracePointError},
};

use crate::json::Errno;

/// What the kernel did not take, or does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The kernel does not describe its types.
    NoBtf,
    /// Where it would describe them, sysfs is not mounted.
    NoSysfs,
    /// It does, but not to this process.
    BtfUnreadable(Cause),
    /// What it says of its types makes no sense.
    BtfUnusable(String),
    /// A field that nothing works without is not there; the sentence names it.
    NoField(String),
    /// A map, the first thing that needs privilege.
    Map(Cause),
    /// A program, at loading or attaching.
    Program {
        /// What it was to be attached to.
        name: String,
        /// Why not.
        cause: Cause,
    },
    /// There is no such tracepoint or function, or not with the arguments that are known.
    Nowhere(String),
    /// `/proc/kallsyms` hides the address of this function.
    HiddenAddress(&'static str),
    /// `/proc/kallsyms` does not know this function.
    NoSymbol(&'static str),
    /// tracefs cannot be mounted, or not be read.
    Tracefs(Cause),
}

/// Why a system call failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cause {
    /// The error's number, if it was the kernel's.
    pub errno: Option<i32>,
    /// The verifier's last word; or, without a number, the error in words.
    pub words: String,
}

/// `ENOTSUPP`, which is the kernel's own and has no name outside (`include/linux/errno.h`).
pub(super) const ENOTSUPP: i32 = 524;

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(errno) = self.errno else {
            return f.write_str(&self.words);
        };
        if errno == ENOTSUPP {
            f.write_str("Operation not supported")?;
        } else {
            let text = io::Error::from_raw_os_error(errno).to_string();
            f.write_str(text.split(" (os error").next().unwrap_or_default())?;
        }
        if let Some(name) = Errno::new(errno.unsigned_abs()) {
            write!(f, " ({name})")?;
        }
        if !self.words.is_empty() {
            write!(f, ", {}", self.words)?;
        }
        Ok(())
    }
}

impl From<&io::Error> for Cause {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self {
                errno: Some(errno),
                words: String::new(),
            },
            None => Self {
                errno: None,
                words: error.to_string(),
            },
        }
    }
}

impl Cause {
    pub(super) fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                return Self::from(io);
            }
            next = error.source();
        }
        Self {
            errno: None,
            words: chain(error),
        }
    }
}

impl Refused {
    /// Of a program that was to be attached to `name`.
    pub(super) fn program(name: &str, error: &ProgramError) -> Self {
        match error {
            ProgramError::LoadError {
                io_error,
                verifier_log,
            } => Self::Program {
                name: name.to_owned(),
                cause: Cause {
                    words: last_word(&verifier_log.to_string()).to_owned(),
                    ..Cause::from(io_error)
                },
            },
            ProgramError::TracePointError(TracePointError::FileError { io_error, .. }) => {
                Self::Tracefs(Cause::from(io_error))
            }
            ProgramError::Btf(BtfError::UnknownBtfTypeName { .. }) => {
                Self::Nowhere(name.to_owned())
            }
            error => Self::Program {
                name: name.to_owned(),
                cause: Cause::of(error),
            },
        }
    }

    pub(super) fn map(error: &EbpfError) -> Self {
        Self::Map(Cause::of(error))
    }

    /// Whether it is that this kernel lacks `bpf_task_pt_regs`: "unknown func", or "invalid func" where its table ends
    /// before it (`check_helper_call()`).
    pub(super) fn lacks_registers(&self) -> bool {
        matches!(self, Self::Program { cause, .. } if cause.words.ends_with(" func bpf_task_pt_regs#175")
            || cause.words.ends_with(" func unknown#175"))
    }

    /// The error's number, if it was the kernel's.
    pub(super) const fn errno(&self) -> Option<i32> {
        match self {
            Self::Map(cause)
            | Self::Program { cause, .. }
            | Self::Tracefs(cause)
            | Self::BtfUnreadable(cause) => cause.errno,
            _ => None,
        }
    }
}

/// What a verifier's log ends in, without its statistics (`print_verification_stats()`, 5.10 to 7.3).
fn last_word(log: &str) -> &str {
    const STATISTICS: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let is_word = |line: &&str| {
        !line.is_empty()
            && !STATISTICS
                .iter()
                .any(|statistic| line.starts_with(statistic))
    };
    let mut words = log.lines().map(str::trim).filter(is_word);
    words.next_back().unwrap_or_default()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_in_words_and_by_name() {
        let cause = |errno, words: &str| Cause {
            errno,
            words: words.to_owned(),
        };
        assert_eq!(
            cause(Some(libc::EPERM), "").to_string(),
            "Operation not permitted (EPERM)"
        );
        assert_eq!(
            cause(Some(libc::EINVAL), "unknown func bpf_get_socket_cookie#46").to_string(),
            "Invalid argument (EINVAL), unknown func bpf_get_socket_cookie#46"
        );
        assert_eq!(
            cause(Some(ENOTSUPP), "").to_string(),
            "Operation not supported (ENOTSUPP)"
        );
        assert_eq!(cause(None, "no such thing").to_string(), "no such thing");
    }

    #[test]
    fn the_verifier_ends_in_what_it_dislikes() {
        let log = "0: R1=ctx()\n5: (85) call bpf_get_socket_cookie#46\nunknown func bpf_get_socket_cookie#46\n\
                   verification time 61 usec\nstack depth 184+0\nprocessed 5 insns (limit 1000000) max_states_per_insn 0\n\n";
        assert_eq!(last_word(log), "unknown func bpf_get_socket_cookie#46");
        assert_eq!(last_word(""), "");
    }

    #[test]
    fn a_helper_may_be_missing_in_two_ways() {
        let refused = |words: &str| Refused::Program {
            name: "f".to_owned(),
            cause: Cause {
                errno: Some(libc::EINVAL),
                words: words.to_owned(),
            },
        };
        for words in [
            "unknown func bpf_task_pt_regs#175",
            "invalid func unknown#175",
        ] {
            assert!(refused(words).lacks_registers(), "{words}");
        }
        // What lockdown withholds.
        assert!(!refused("unknown func bpf_probe_read_kernel#113").lacks_registers());
    }
}
