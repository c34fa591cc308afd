//! The command line, as it is typed.

use std::{
    ffi::{OsStr, OsString},
    net::IpAddr,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{
    ArgGroup, Args, Parser, Subcommand, ValueEnum, ValueHint,
    builder::{PossibleValue, TypedValueParser},
};
use tcptrace_ebpf::State;

use crate::{
    event::{Comm, Probes},
    kernel::netns,
    select::{Cidr, Selection, Sockets},
    states::By,
};

/// Who leaks CLOSE_WAIT, how long TIME_WAIT really lasts, and every TCP transition as it happens.
///
/// Of all network namespaces, with the process that owns the socket. What traces needs root, or some
/// capabilities, on Linux 5.12 or later; `leaks --once` and whatever is read from a recording do not.
/// `tcptrace doctor` tells what works, why not more, and what to do about it.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  tcptrace states                           how many sockets in which state; --by process, port, remote
  sudo tcptrace leaks --once                who leaks CLOSE_WAIT, why, since when
  sudo tcptrace stream                      every transition, until Ctrl-C
  sudo tcptrace stream --lport 443 -o json  of one service, as JSON lines
  sudo tcptrace timewait --duration 2m      how long TIME_WAIT lasts, who makes it, how it ends
  sudo tcptrace record trace.jsonl          keep everything for later
  tcptrace stream --from trace.jsonl        ... and look at it, without root
  sudo tcptrace doctor                      what works on this machine, and why not more

Exit status: 0 fine, 2 an error or a wrong option; 1 with `leaks --exit-code` for a leak, and if `doctor`
finds something that does not work.";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell who leaks sockets in CLOSE_WAIT, why, and since when
    #[command(after_help = LEAKS_EXAMPLES)]
    Leaks(Leaks),
    /// Count sockets by state, and by process, port, remote, container or network namespace
    #[command(after_help = STATES_EXAMPLES)]
    States(States),
    /// Print every TCP transition as it happens
    #[command(after_help = STREAM_EXAMPLES)]
    Stream(Stream),
    /// Measure how long TIME_WAIT really lasts, who makes it, and how it ends
    #[command(after_help = TIMEWAIT_EXAMPLES)]
    Timewait(Timewait),
    /// Write what comes in to a file, for later
    #[command(after_help = RECORD_EXAMPLES)]
    Record(Record),
    /// Tell what works on this machine, why not more, and what to do about it
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(Doctor),
}

const LEAKS_EXAMPLES: &str = "\
Examples:
  tcptrace leaks --once               now, from what the kernel knows; needs no BPF
  tcptrace leaks                      watch: exact ages, growth, when the limit of descriptors is reached
  tcptrace leaks --older-than 10m --comm java
  tcptrace leaks --once --exit-code -o json > leaks.json || page-somebody
  tcptrace leaks -- ./integration-tests         what do they leave open?
  tcptrace leaks --exit-code -- ./integration-tests      ... for a CI job
  tcptrace leaks --stacks             ... opened by which function, at which line?
  tcptrace leaks --state FIN_WAIT2    other states in which sockets pile up

A socket is leaked when its peer has closed, its own process has not, and nothing is sent any more. Why
not: `drained` (everything was read; a missing close), `eof_unread` (the process has not read the end),
`not_accepted` (the listener's queue is not served), `write_blocked` (the peer takes nothing),
`finished` (the connection is over, the descriptor is still there: ss does not list it).

Exit status: 0 fine, 2 an error; with --exit-code 1 if the last report tells of a leak. Of a program that
is run, its own otherwise, 128 and the signal's number if one ended it, 127 or 126 if it cannot be run.";

const STATES_EXAMPLES: &str = "\
Examples:
  tcptrace states                              instead of netstat -n | awk, and ss -s
  tcptrace states --state CLOSE_WAIT --by process --top 5
  tcptrace states --by remote --top 10         who is connected most
  tcptrace states --port 8080 --fds            instead of lsof -i:8080
  tcptrace states --by port --watch            again every two seconds
  tcptrace states -o json | jq .states.TIME_WAIT

It looks at what exists now, in all network namespaces; it needs no BPF. (With 20,000 open files or more, and
the right to load BPF programs, it has the kernel walk them, which is faster.) Without privileges it counts
this namespace, names this user's processes, and says what it could not see.

Each socket is counted once, in the line of all processes that have it open; what nobody has accepted, in the
line of its listener. `no process`: TIME_WAIT, and orphaned sockets, which their process has closed and the
kernel keeps until the peer closes as well (the filters --pid and --comm leave them out). `no process found`: a
socket of the kernel, of a process that could not be read, or closed meanwhile.";

const STREAM_EXAMPLES: &str = "\
Examples:
  tcptrace stream --state CLOSE_WAIT          who is left alone by its peer, and who leaves
  tcptrace stream --comm nginx --addr 10.0.0.0/8
  tcptrace stream -o json | jq 'select(.error)'

The columns are those of tcpstates: MS is the time spent in the state that was left. A `-` is
something that is not known: no owner is ever guessed.";

const TIMEWAIT_EXAMPLES: &str = "\
Examples:
  tcptrace timewait                    a live summary; Ctrl-C for the last one
  tcptrace timewait --rport 5432       of connections to a database
  tcptrace timewait -o json            a line for each TIME_WAIT that ends, then a summary

TIME_WAIT lasts a minute: until the first has ended, those still running are shown with their age.";

const RECORD_EXAMPLES: &str = "\
Examples:
  tcptrace record --duration 10m trace.jsonl
  tcptrace record - | zstd > trace.jsonl.zst
  zstdcat trace.jsonl.zst | tcptrace timewait --from -";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  sudo tcptrace doctor                 before the first use, and for a bug report
  tcptrace doctor                      what a user without privileges gets
  sudo tcptrace doctor -o json | jq '.checks[] | select(.fix)'

It loads every probe, looks once at everything, and takes it all away again.

Exit status: 0 all works, 1 something does not or not fully, 2 neither probes nor sock_diag work.";

/// `tcptrace leaks`.
#[derive(Debug, Args)]
pub struct Leaks {
    /// Run this program, watch its processes only, and report at its end what they leaked while it ran; on
    /// standard error, so that the program's own output stays as it is
    #[arg(last = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments, conflicts_with_all = ["once", "duration", "from", "dwell"])]
    pub(crate) command: Vec<OsString>,
    /// How long a socket must have been in its state [default: 60s; 1s for a program that is run]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) older_than: Option<Duration>,
    /// Look twice, one second apart, print one report and end. Needs neither BPF nor, for one's own
    /// processes, privileges
    #[arg(long, conflicts_with_all = ["duration", "interval", "buffer", "probes", "probe_log", "dwell"])]
    pub(crate) once: bool,
    /// Exit with 1 if the last report tells of a leak
    #[arg(long)]
    pub(crate) exit_code: bool,
    /// Where the report of a program that is run goes, instead of standard error
    #[arg(long, value_name = "FILE", requires = "command")]
    pub(crate) report: Option<PathBuf>,
    /// Overwrite an older report in that file
    #[arg(long, requires = "report")]
    pub(crate) force: bool,
    /// Run the program as root, also under sudo, doas or pkexec
    ///
    /// Without this option, the program runs as the user who called sudo, doas or pkexec, which SUDO_UID, DOAS_USER or
    /// PKEXEC_UID names, also in a root shell that sudo has started. It has the groups of that user, and HOME, USER,
    /// LOGNAME, SHELL and MAIL where they were root's; PATH stays as it is. A line on standard error says so. Where root
    /// itself called, it runs as root.
    #[arg(long, requires = "command")]
    pub(crate) as_root: bool,
    /// How often to look, at most [default: 5s; 1s for a program that is run]
    #[arg(long, value_name = "TIME", value_parser = parse_interval, conflicts_with = "from")]
    pub(crate) interval: Option<Duration>,
    /// Also from where in its code the process opened the sockets: the stack at connect() and accept(), with
    /// files and lines where there is debug information
    ///
    /// A process without privileges reads the files of other programs. All of it takes 256 MiB of memory at most.
    #[arg(long)]
    pub(crate) stacks: bool,
    /// With every report, also how long sockets stay in the state, by process; whoever opens a connection is
    /// remembered for it, which costs more of every connection
    #[arg(long)]
    pub(crate) dwell: bool,
    /// State in which sockets pile up: CLOSE_WAIT, or ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING,
    /// SYN_RECV, SYN_SENT; may be given again
    #[arg(long = "state", value_name = "STATE", value_parser = StateParser(parse_pile), hide_possible_values = true, default_value = "CLOSE_WAIT", hide_default_value = true)]
    pub(crate) states: Vec<State>,
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) sockets: SocketFilters,
    #[command(flatten)]
    pub(crate) owners: OwnerFilters,
}

/// `tcptrace states`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("grouped").args(["by", "fds"]).multiple(true))]
pub struct States {
    /// Tell sockets apart by this
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) by: Option<By>,
    /// Only so many lines, the largest; the rest is counted in one
    #[arg(long, value_name = "N", value_parser = parse_top, requires = "grouped")]
    pub(crate) top: Option<usize>,
    /// Also every socket, and the descriptors by which processes hold it; by process unless --by says otherwise
    #[arg(long)]
    pub(crate) fds: bool,
    /// Look again, every two seconds or as often as said, until Ctrl-C: redrawn on a terminal, appended to a pipe
    #[arg(long, value_name = "TIME", value_parser = parse_interval, num_args = 0..=1, default_missing_value = "2s")]
    pub(crate) watch: Option<Duration>,
    /// End after this time: 30s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "watch")]
    pub(crate) duration: Option<Duration>,
    /// How to print: text for people, json for programs (one object a line)
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub(crate) output: Format,
    #[command(flatten)]
    pub(crate) sockets: SocketFilters,
    #[command(flatten)]
    pub(crate) owners: OwnerFilters,
    /// Only sockets in this state (CLOSE_WAIT or close-wait); may be given again
    #[arg(long = "state", value_name = "STATE", value_parser = StateParser(parse_state), hide_possible_values = true, help_heading = FILTERS)]
    pub(crate) states: Vec<State>,
}

/// `tcptrace stream`.
#[derive(Debug, Args)]
pub struct Stream {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) sockets: SocketFilters,
    #[command(flatten)]
    pub(crate) owners: OwnerFilters,
    /// Only transitions from or to this state (CLOSE_WAIT or close-wait); may be given again
    #[arg(long = "state", value_name = "STATE", value_parser = StateParser(parse_state), hide_possible_values = true, help_heading = FILTERS)]
    pub(crate) states: Vec<State>,
}

/// `tcptrace timewait`.
#[derive(Debug, Args)]
pub struct Timewait {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) sockets: SocketFilters,
    #[command(flatten)]
    pub(crate) owners: OwnerFilters,
}

/// `tcptrace record`.
#[derive(Debug, Args)]
pub struct Record {
    /// Where to: a new file, or - for standard output. It can be read by its owner alone
    pub(crate) file: PathBuf,
    /// Overwrite an older recording in that file
    #[arg(long)]
    pub(crate) force: bool,
    /// How often to look who holds sockets in CLOSE_WAIT, at most
    #[arg(long, value_name = "TIME", value_parser = parse_interval, default_value = "1m")]
    pub(crate) interval: Duration,
    /// Also from where in their code processes connect and accept, for `leaks --stacks --from`
    ///
    /// A process without privileges reads the files of other programs. All of it takes 256 MiB of memory at most.
    #[arg(long)]
    pub(crate) stacks: bool,
    #[command(flatten)]
    pub(crate) live: LiveOptions,
    #[command(flatten)]
    pub(crate) sockets: SocketFilters,
}

/// `tcptrace doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// How to print: text for people, json for programs (one object)
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub(crate) output: Format,
    /// No colours (also: set NO_COLOR). There are none anyway unless the output is a terminal
    #[arg(long)]
    pub(crate) no_color: bool,
}

/// Options of every command that shows something.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// How to print: text for people, json for programs (one object a line)
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub(crate) output: Format,
    /// Read a recording instead of the kernel; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["duration", "buffer", "probes", "probe_log"])]
    pub(crate) from: Option<PathBuf>,
    /// No colours (also: set NO_COLOR). There are none anyway unless the output is a terminal
    #[arg(long)]
    pub(crate) no_color: bool,
    #[command(flatten)]
    pub(crate) live: LiveOptions,
}

/// Options of tracing itself.
#[derive(Debug, Args)]
pub(crate) struct LiveOptions {
    /// End after this time: 30s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) duration: Option<Duration>,
    /// Size of the buffer between kernel and tcptrace, a power of two from 4K to 1G [default: 4M for each CPU]
    ///
    /// The default is 4 MiB for each CPU, from 8 to 64 MiB, but at most a 128th of the memory that tcptrace may use; with
    /// --stacks eight times that, since a stack takes 9 KiB. 8 MiB hold 70,000 events: more than come in the 20 ms
    /// that tcptrace sleeps at most, at three million a second. A larger buffer loses nothing for longer when tcptrace gets no
    /// CPU, or when its output is not taken.
    #[arg(long, value_name = "SIZE", value_parser = parse_buffer)]
    pub(crate) buffer: Option<u32>,
    /// How TIME_WAIT and accept() are followed: by probes of the one kind, or of the other, or by none;
    /// auto takes what this kernel accepts, functions first. With none, TIME_WAIT comes from looks at
    /// sock_diag four times a second, and is an estimate
    #[arg(long, value_enum, value_name = "KIND", default_value_t = ProbeChoice::Auto,
        hide_short_help = true, help_heading = DIAGNOSTICS)]
    pub(crate) probes: ProbeChoice,
    /// Log what the probes themselves meet and cannot explain (for bug reports)
    #[arg(long, hide_short_help = true, help_heading = DIAGNOSTICS)]
    pub(crate) probe_log: bool,
    /// Run the program that is watched as root, whoever called.
    #[arg(skip)]
    pub(crate) as_root: bool,
}

/// Which probes are asked for, besides the one of the transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProbeChoice {
    Auto,
    Functions,
    Tracepoints,
    None,
}

impl ProbeChoice {
    /// The kind asked for; `None` for what works.
    pub(crate) const fn kind(self) -> Option<Probes> {
        match self {
            Self::Auto => None,
            Self::Functions => Some(Probes::Functions),
            Self::Tracepoints => Some(Probes::Tracepoints),
            Self::None => Some(Probes::None),
        }
    }
}

const DIAGNOSTICS: &str = "Diagnostics";
const FILTERS: &str = "Filters (all must fit; of one given several times, any)";

/// Filters by what a socket is.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = FILTERS)]
pub(crate) struct SocketFilters {
    /// Port, local or remote
    #[arg(long = "port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    ports: Vec<u16>,
    /// Local port
    #[arg(long = "lport", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    lports: Vec<u16>,
    /// Remote port
    #[arg(long = "rport", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    rports: Vec<u16>,
    /// Address, local or remote, or a network: 10.0.0.7, 10.0.0.0/8, fe80::/10
    #[arg(long = "addr", value_name = "CIDR", value_parser = parse_cidr)]
    addrs: Vec<Cidr>,
    /// Network namespace: a name of `ip netns`, a path, or an inode number
    #[arg(long, value_name = "NETNS", value_parser = parse_netns)]
    netns: Vec<u32>,
    /// IPv4 only; IPv4 on an IPv6 socket is IPv4
    #[arg(short = '4', long, conflicts_with = "ipv6")]
    ipv4: bool,
    /// IPv6 only
    #[arg(short = '6', long)]
    ipv6: bool,
}

/// Filters by whose a socket is.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = FILTERS)]
pub(crate) struct OwnerFilters {
    /// Process that owns the socket
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// Name of that process, as in /proc/PID/comm
    #[arg(long = "comm", value_name = "NAME", value_parser = parse_comm)]
    comms: Vec<Comm>,
    /// Container the socket was made in: its name, or the beginning of its id
    #[arg(long = "container", value_name = "ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    containers: Vec<String>,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs: one object a line.
    Json,
}

impl SocketFilters {
    /// As the rest of the program wants it.
    pub(crate) fn sockets(self) -> Sockets {
        Sockets {
            ports: self.ports,
            local_ports: self.lports,
            remote_ports: self.rports,
            networks: self.addrs,
            family: match (self.ipv4, self.ipv6) {
                (true, _) => Some(4),
                (_, true) => Some(6),
                _ => None,
            },
            netns: self.netns,
        }
    }
}

impl OwnerFilters {
    /// Together with the others.
    pub(crate) fn selection(self, sockets: SocketFilters, states: Vec<State>) -> Selection {
        Selection {
            sockets: sockets.sockets(),
            pids: self.pids,
            comms: self.comms,
            containers: self.containers,
            states,
            ..Selection::default()
        }
    }
}

fn parse_state(text: &str) -> Result<State, String> {
    let name = text.to_ascii_uppercase().replace('-', "_");
    State::ALL
        .into_iter()
        .find(|state| state.name() == name)
        .ok_or_else(|| {
            let names: Vec<&str> = State::ALL.iter().map(|state| state.name()).collect();
            format!("no TCP state; they are {}", names.join(", "))
        })
}

fn parse_pile(text: &str) -> Result<State, String> {
    match parse_state(text)? {
        State::Close | State::Listen => Err("no connection is in that state".to_owned()),
        State::TimeWait => Err("nobody holds those: see `tcptrace timewait`".to_owned()),
        state => Ok(state),
    }
}

/// States as this function takes them; a shell completes their names.
#[derive(Clone)]
struct StateParser(fn(&str) -> Result<State, String>);

impl TypedValueParser for StateParser {
    type Value = State;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<State, clap::Error> {
        self.0.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let names = State::ALL.into_iter().map(State::name);
        let taken = names.filter(|name| (self.0)(name).is_ok());
        Some(Box::new(taken.map(PossibleValue::new)))
    }
}

fn parse_comm(text: &str) -> Result<Comm, String> {
    if text.is_empty() {
        return Err("a process has a name".to_owned());
    }
    // The kernel keeps 15 bytes of a longer name.
    Ok(Comm::new(text.as_bytes()))
}

fn parse_cidr(text: &str) -> Result<Cidr, String> {
    let (addr, len) = match text.split_once('/') {
        Some((addr, len)) => (addr, Some(len)),
        None => (text, None),
    };
    let addr = IpAddr::from_str(addr)
        .map_err(|_| "no IP address; give one like 10.0.0.7, 10.0.0.0/8 or fe80::/10".to_owned())?;
    let most: u8 = if addr.is_ipv4() { 32 } else { 128 };
    let len = match len {
        None => Some(most),
        Some(len) => len.parse().ok(),
    };
    len.and_then(|len| Cidr::new(addr, len))
        .ok_or_else(|| format!("the prefix is a number from 0 to {most}"))
}

fn parse_netns(text: &str) -> Result<u32, String> {
    netns::resolve(text).map_err(|error| error.to_string())
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a number with a unit: 500ms, 30s, 5m, 1h".to_owned();
    let unit = text
        .find(|char: char| !(char.is_ascii_digit() || char == '.'))
        .ok_or_else(wrong)?;
    let number: f64 = text[..unit].parse().map_err(|_| wrong())?;
    let seconds = match &text[unit..] {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86_400.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    if interval < Duration::from_millis(100) {
        return Err("at least 100ms".to_owned());
    }
    Ok(interval)
}

fn parse_top(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a number of lines, at least 1".to_owned()),
        Ok(top) => Ok(top),
    }
}

fn parse_buffer(text: &str) -> Result<u32, String> {
    let wrong = || "a power of two from 4K to 1G: 256K, 8M, 64M".to_owned();
    let (number, unit) = match text.find(|char: char| !char.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit.to_ascii_uppercase().as_str() {
        "" => 1,
        "K" | "KIB" => 1 << 10,
        "M" | "MIB" => 1 << 20,
        "G" | "GIB" => 1 << 30,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(factor)
        .filter(|size| size.is_power_of_two() && (4096..=1 << 30).contains(size))
        .and_then(|size| u32::try_from(size).ok())
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::probes;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn states_are_taken_in_any_spelling() {
        assert_eq!(parse_state("CLOSE_WAIT"), Ok(State::CloseWait));
        assert_eq!(parse_state("close-wait"), Ok(State::CloseWait));
        assert!(parse_state("closed").unwrap_err().contains("CLOSE_WAIT"));
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "5", "s", "-1s", "1 s", "1w", "1e9h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn buffers_are_powers_of_two() {
        assert_eq!(parse_buffer("4K"), Ok(4096));
        assert_eq!(parse_buffer("8M"), Ok(probes::LEAST_BUFFER));
        assert_eq!(parse_buffer("1g"), Ok(1 << 30));
        for wrong in ["", "0", "1K", "5M", "2G", "M", "8X", "99999999999999999999"] {
            assert!(parse_buffer(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn networks() {
        let ten = parse_cidr("10.1.2.3/8").unwrap();
        assert!(ten.contains(&crate::event::address_bytes("10.200.0.1".parse().unwrap())));
        assert!(!ten.contains(&crate::event::address_bytes("11.0.0.1".parse().unwrap())));
        let six = parse_cidr("::/0").unwrap();
        assert!(six.contains(&crate::event::address_bytes("fe80::1".parse().unwrap())));
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "fe80::/129", "1.2.3.4/", "x"] {
            assert!(parse_cidr(wrong).is_err(), "{wrong}");
        }
    }
}
