//! The pages say what is so: every command in them runs and shows what is said of it, and what they point
//! to is there.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tests::{Diag, Fixture, Lab, Netns, Peers, wait_until};

/// Pages with commands for the program's users, the README first. Those in CONTRIBUTING.md are for its
/// developers.
const COMMANDS_IN: [&str; 6] = [
    "README.md",
    "docs/close-wait.md",
    "docs/comparison.md",
    "docs/eaddrnotavail.md",
    "docs/stacks.md",
    "docs/time-wait.md",
];
/// Commands that are not run here, and why.
const ELSEWHERE: [(&str, &str); 4] = [
    ("cargo xtask demo", "has a test of its own"),
    ("cargo xtask test", "is what runs this"),
    ("cargo xtask build", "has built what is run here"),
    (
        "sudo install target/release/tcptrace /usr/local/bin/",
        "would change this machine",
    ),
];
/// A filter that nothing here fits: these tests make no container.
const FITS_NOTHING: &str = "--container";
/// What has to be there for a minute.
const LEAKS: &str = "tcptrace leaks";
/// How long that takes.
const LEAKED: Duration = Duration::from_secs(61);
/// Programs that a recipe may use and a bare system may lack.
const OPTIONAL: [&str; 3] = ["jq", "pgrep", "ss"];
/// Time to load the probes on a busy machine, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// The ports that `connect()` may choose.
const PORTS: &str = "ipv4/ip_local_port_range";

/// A command in a page, and the output that the page shows for it, if any.
#[derive(Debug)]
struct Shown {
    page: &'static str,
    command: String,
    output: Vec<String>,
}

#[test]
fn readme_and_other_pages_commands_do_what_they_say() {
    let Some(lab) = Lab::new() else { return };
    let shown: Vec<Shown> = COMMANDS_IN.into_iter().flat_map(commands).collect();
    for (command, reason) in ELSEWHERE {
        let here = shown.iter().any(|shown| shown.command == command);
        assert!(here, "`{command}` ({reason}) is not in a page any more");
    }
    let header = shown
        .iter()
        .find(|shown| shown.command.ends_with(" stream"));
    let header = header.and_then(|shown| shown.output.first());
    let header = words(header.expect("the first screen is output"));
    let golden = ["traffic.timewait.txt", "traffic.stream.txt", "leaks.txt"];
    let golden = golden.map(|name| page(&format!("tcptrace/testdata/{name}")));
    let mut traffic = Traffic::new(&lab);
    let stage = Stage::new();
    let mut run = BTreeSet::new();
    // What leaks only after a minute comes last.
    let (late, soon): (Vec<&Shown>, Vec<&Shown>) = shown
        .iter()
        .partition(|shown| shown.command.contains(LEAKS));
    for shown in soon.into_iter().chain(late) {
        let (command, page) = (&shown.command, shown.page);
        if ELSEWHERE.iter().any(|(elsewhere, _)| elsewhere == command) {
            continue;
        }
        // A page may repeat what another has shown; an output of its own is looked at.
        if !run.insert(command) && shown.output.is_empty() {
            continue;
        }
        if let Some(missing) = missing_program(command) {
            // Not with `eprintln`, which the test harness hides when a test passes.
            let _ = writeln!(
                std::io::stderr(),
                "left out of {page}: `{command}`, because {missing} is not installed"
            );
            continue;
        }
        if command.contains(LEAKS) {
            traffic.wait_for_leaks();
        }
        // tcptrace sees all network namespaces, other programs the one that they are in.
        let netns = (!command.contains("tcptrace")).then_some(&lab.netns);
        let (stdout, stderr, code) = stage.run(command, netns, || traffic.make());
        let said = format!("{page}: `{command}`:\n{stdout}\n{stderr}");
        if command.contains(" doctor") {
            // What works is not the same everywhere.
            assert!(matches!(code, Some(0 | 1)), "{said}");
            assert!(stdout.starts_with("tcptrace "), "{said}");
            continue;
        }
        // What leaks here, leaks: that is what the option is for.
        let expected = i32::from(command.contains(" --once --exit-code "));
        assert_eq!(code, Some(expected), "{said}");
        if command.contains(" record ") {
            assert_eq!(stdout, "", "{said}");
            continue;
        }
        if command.contains(FITS_NOTHING) {
            assert!(words(&stdout).is_empty(), "{said}");
            continue;
        }
        assert!(!stdout.is_empty(), "nothing is shown by {said}");
        if command.contains('|') || !command.contains("tcptrace ") {
            continue;
        }
        if command.contains("-o json") {
            for line in stdout.lines() {
                let line: Value = serde_json::from_str(line).expect("JSON");
                assert!(line["event"].is_string(), "{said}");
            }
        } else if command.contains("./integration-tests") {
            // Nothing leaks in those; what is said of them is not in their output.
            assert_eq!(stdout, "passed\n", "{said}");
            assert!(
                stderr.contains(" UTC  no CLOSE_WAIT for longer than "),
                "{said}"
            );
        } else if command.contains(LEAKS) {
            assert_eq!(stdout.get(8..14), Some(" UTC  "), "{said}");
        } else if command.contains(" states") {
            let first = stdout.lines().next().unwrap_or_default();
            assert!(first.contains(" UTC  "), "{said}");
            assert!(first.contains(" TCP socket"), "{said}");
        } else if command.contains(" timewait") {
            assert!(stdout.starts_with("TIME_WAIT, traced for "), "{said}");
        } else {
            assert_eq!(words(stdout.lines().next().unwrap_or("")), header, "{said}");
        }
        for kind in shown.output.iter().filter_map(|line| kind(line)) {
            let has = |text: &str| text.lines().any(|line| self::kind(line) == Some(kind));
            // Not every page's traffic is made here.
            let there = has(&stdout) || page != "README.md" && golden.iter().any(|text| has(text));
            assert!(
                there,
                "it shows a line of the kind {kind:?}, and not {said}"
            );
        }
    }
    assert!(run.len() > 30, "only {} commands were found", run.len());
}

/// What a line of output is about, without what differs from one run to the next.
fn kind(line: &str) -> Option<&str> {
    if let Some(at) = line.find(" -> ") {
        // From the state that is left to the one that is entered.
        let from = line[..at].trim_end().rfind(' ')? + 1;
        let to = at + 4 + line[at + 4..].find(' ')?;
        return Some(&line[from..to]);
    }
    // A label of the summary, or a heading of its tables.
    let text = line.strip_prefix("  ")?;
    let label = &text[..text.find("  ")?];
    let plain = label
        .chars()
        .all(|char| char.is_lowercase() || " ,".contains(char));
    plain.then_some(label)
}

/// Connections of every kind that the README's recipes look for.
struct Traffic<'a> {
    lab: &'a Lab,
    peers: Peers,
    database: Peers,
    /// Holds the only ports there are to its listener.
    crowded: Fixture,
    diag: Diag,
    /// When a client was left alone by its server, of which it reads nothing.
    leaked: Instant,
}

impl<'a> Traffic<'a> {
    fn new(lab: &'a Lab) -> Self {
        let home = [127, 0, 0, 1].into();
        let mut crowded = lab.fixture("report");
        let full = crowded.listen("full", "127.0.0.1:8081");
        lab.netns.set(PORTS, "50000 50001");
        crowded.connect("a", full);
        crowded.connect("b", full);
        lab.netns.set(PORTS, "32768 60999");
        let mut peers = Peers::named(lab, "shop", "web", "127.0.0.1:8080", home);
        let leak = peers.connect();
        peers.server.ask(&format!("write {} 9", leak.name));
        peers.server.close(&leak.name);
        Self {
            lab,
            peers,
            leaked: Instant::now(),
            database: Peers::named(lab, "app", "database", "127.0.0.1:5432", home),
            crowded,
            diag: lab.diag(),
        }
    }

    fn wait_for_leaks(&self) {
        thread::sleep(LEAKED.saturating_sub(self.leaked.elapsed()));
    }

    fn make(&mut self) {
        let Self { peers, diag, .. } = self;
        let end = |cookie: &str| {
            let row = diag.row(cookie).expect("in TIME_WAIT");
            diag.destroy(&row).expect("INET_DIAG_DESTROY");
        };
        end(&peers.closed_by_client().client);
        end(&peers.closed_by_server().server);
        end(&self.database.closed_by_client().client);
        // One goes on resting.
        peers.closed_by_client();
        let reset = peers.connect();
        peers.server.ask(&format!("reset {}", reset.name));
        peers.client.close(&reset.name);
        let refused = peers.client.attempt("connect refused 127.0.0.1:9");
        assert_eq!(refused["error"], "ECONNREFUSED");
        self.lab.netns.set(PORTS, "50000 50001");
        let crowded = self.crowded.attempt("connect c 127.0.0.1:8081");
        self.lab.netns.set(PORTS, "32768 60999");
        assert_eq!(crowded["error"], "EADDRNOTAVAIL");
    }
}

/// A folder to run commands in, with programs `tcptrace` (the one under test) and `sudo` (nothing to do
/// for root, who runs this).
struct Stage(PathBuf);

impl Stage {
    fn new() -> Self {
        let root = env::temp_dir().join(format!("tcptrace-tests-{}-readme", process::id()));
        fs::create_dir_all(root.join("bin")).expect("a folder");
        let stage = Self(root);
        let (tcptrace, pids) = (binary(), stage.pids());
        assert!(tcptrace.exists(), "{} is not built", tcptrace.display());
        // The pid of the shell is that of the program after `exec`.
        let text = format!(
            "echo $$ >> '{}'\nexec '{}' \"$@\"",
            pids.display(),
            tcptrace.display()
        );
        stage.program("tcptrace", &text);
        stage.program("sudo", "exec \"$@\"");
        stage.program("../integration-tests", "echo passed");
        stage
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.0.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a file");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("our own file");
    }

    fn pids(&self) -> PathBuf {
        self.0.join("pids")
    }

    /// Runs a command, in another network namespace if one is given. Once it traces, `meanwhile` is done, and tcptrace is interrupted as by Ctrl-C.
    /// Gives stdout, stderr and the exit code.
    fn run(
        &self,
        command: &str,
        netns: Option<&Netns>,
        meanwhile: impl FnOnce(),
    ) -> (String, String, Option<i32>) {
        let _ = fs::remove_file(self.pids());
        let path = env::var("PATH").unwrap_or_default();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", command])
            .current_dir(&self.0)
            .env("PATH", format!("{}:{path}", self.0.join("bin").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let netns = netns.map(|netns| netns.as_fd().as_raw_fd());
        let enter = move || {
            if let Some(netns) = netns {
                // SAFETY: the namespace outlives the start of the child.
                let netns = unsafe { BorrowedFd::borrow_raw(netns) };
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec there is only a system call.
        unsafe { shell.pre_exec(enter) };
        let mut shell = Group(shell.spawn().expect("a shell"));
        let (stdout, stdout_reader) = collect(shell.0.stdout.take().expect("piped"));
        let (stderr, stderr_reader) = collect(shell.0.stderr.take().expect("piped"));
        let traces = wait_until(&format!("`{command}` traces or ends"), PATIENCE, || {
            if text(&stderr)
                .lines()
                .any(|line| line == "tcptrace: tracing")
            {
                return Some(true);
            }
            shell.0.try_wait().expect("our own child").map(|_| false)
        });
        if traces {
            meanwhile();
            let pids = fs::read_to_string(self.pids()).expect("tcptrace has been run");
            for pid in pids.lines() {
                let pid = Pid::from_raw(pid.parse().expect("a pid"));
                kill(pid, Signal::SIGINT).expect("it runs until it is interrupted");
            }
        }
        let status = wait_until(&format!("`{command}` ends"), PATIENCE, || {
            shell.0.try_wait().expect("our own child")
        });
        for reader in [stdout_reader, stderr_reader] {
            reader.join().expect("readers do not panic");
        }
        (text(&stdout), text(&stderr), status.code())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A shell with all that it has started, none of which outlives the test.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // Once it has been waited for, its number may be anybody's.
        if let Ok(None) = self.0.try_wait() {
            let _ = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
            let _ = self.0.wait();
        }
    }
}

type Bytes = Arc<Mutex<Vec<u8>>>;

/// Gathers what comes out of a pipe.
fn collect(mut pipe: impl Read + Send + 'static) -> (Bytes, JoinHandle<()>) {
    let all = Bytes::default();
    let to = Arc::clone(&all);
    let reader = thread::spawn(move || {
        let mut some = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut some) {
            to.lock()
                .expect("nobody panics")
                .extend_from_slice(&some[..count]);
        }
    });
    (all, reader)
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(&bytes.lock().expect("nobody panics")).into_owned()
}

/// `TCPTRACE_BIN`, else the one that Cargo built next to the tests.
fn binary() -> PathBuf {
    env::var_os("TCPTRACE_BIN").map_or_else(
        || {
            let test = env::current_exe().expect("Linux tells");
            let profile = test.ancestors().nth(2).expect("target/PROFILE/deps");
            profile.join("tcptrace")
        },
        PathBuf::from,
    )
}

fn missing_program(command: &str) -> Option<&'static str> {
    OPTIONAL.into_iter().find(|program| {
        command.split([' ', '(']).any(|word| word == *program) && {
            let path = env::var_os("PATH").unwrap_or_default();
            !env::split_paths(&path).any(|folder| folder.join(program).is_file())
        }
    })
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// The commands in blocks of `sh` (each line is one) and `console` (they follow a `$`).
fn commands(name: &'static str) -> Vec<Shown> {
    let page = page(name);
    let mut found: Vec<Shown> = Vec::new();
    let mut language = None;
    for line in page.lines() {
        if let Some(fence) = line.strip_prefix("```") {
            language = language.is_none().then_some(fence);
            continue;
        }
        let command = match language {
            Some("sh") => Some(line),
            Some("console") => line.strip_prefix("$ "),
            _ => continue,
        };
        match command {
            Some(command) => found.push(Shown {
                page: name,
                command: command.to_owned(),
                output: Vec::new(),
            }),
            None => {
                let shown = found.last_mut().expect("a command before its output");
                shown.output.push(line.to_owned());
            }
        }
    }
    found
}

const PAGES: [&str; 16] = [
    "README.md",
    "README.zh-CN.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/close-wait.md",
    "docs/comparison.md",
    "docs/eaddrnotavail.md",
    "docs/events.md",
    "docs/growth.md",
    "docs/kernels.md",
    "docs/limitations.md",
    "docs/performance.md",
    "docs/reliability.md",
    "docs/stacks.md",
    "docs/time-wait.md",
];

/// The list above is of all pages there are.
#[test]
fn readme_and_other_pages_are_all_listed() {
    for folder in ["", "docs"] {
        for entry in fs::read_dir(root().join(folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name();
            let name = Path::new(folder).join(name);
            if name.extension().is_some_and(|extension| extension == "md") {
                let listed = PAGES.iter().any(|page| Path::new(page) == name);
                assert!(listed, "{} is not in PAGES", name.display());
            }
        }
    }
    for page in COMMANDS_IN {
        assert!(PAGES.contains(&page), "{page}");
    }
}

/// The Chinese README is the same page: what can be compared without knowing Chinese is equal, the blocks
/// (commands and their output), the tables' shape, the headings' number and the links.
#[test]
fn readme_in_chinese_is_the_same() {
    let (english, chinese) = (page("README.md"), page("README.zh-CN.md"));
    assert_eq!(blocks(&english), blocks(&chinese), "blocks of code");
    let shape = |page: &str| -> Vec<String> {
        let lines = page.lines().filter(|line| line.starts_with(['#', '|']));
        let shape = lines.map(|line| match line.split_once(' ') {
            Some((level, _)) if level.starts_with('#') => level.to_owned(),
            // Cells, and what is in backticks in them.
            _ => {
                let code: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
                format!("{} cells with {code:?}", line.matches('|').count())
            }
        });
        shape.collect()
    };
    assert_eq!(shape(&english), shape(&chinese), "headings and tables");
    let links = |page: &str| -> BTreeSet<String> {
        let targets = page.split("](").skip(1);
        let targets = targets.filter_map(|after| after.split(')').next());
        // Each leads to the other.
        let targets = targets.filter(|target| !target.starts_with("README"));
        targets.map(str::to_owned).collect()
    };
    assert_eq!(links(&english), links(&chinese), "links");
    assert!(english.contains("](README.zh-CN.md)"));
    assert!(chinese.contains("](README.md)"));
}

/// Everything between fences.
fn blocks(page: &str) -> Vec<&str> {
    page.split("\n```").skip(1).step_by(2).collect()
}

fn root() -> &'static Path {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.expect("a folder of the workspace")
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn readme_and_other_pages_name_tasks_that_exist() {
    let source = page("xtask/src/main.rs");
    let (_, tasks) = source.split_once("enum Task {").expect("the tasks");
    let (tasks, _) = tasks.split_once("\n}").expect("the end of the tasks");
    let tasks: BTreeSet<String> = tasks
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with(char::is_uppercase))
        .map(|line| line.split(['(', ',', ' ']).next().unwrap_or(line))
        .map(str::to_lowercase)
        .collect();
    for name in PAGES {
        let page = page(name);
        for after in page.split("cargo xtask ").skip(1) {
            let end = after.find(|char: char| !char.is_ascii_alphanumeric());
            let task = &after[..end.unwrap_or(after.len())];
            assert!(
                task.is_empty() || tasks.contains(task),
                "{name}: `cargo xtask {task}` is none of {tasks:?}"
            );
        }
    }
}

#[test]
fn readme_and_other_pages_have_no_dead_links() {
    let mut links = 0;
    for name in PAGES {
        let page_text = page(name);
        let folder = root().join(name);
        let folder = folder.parent().expect("a folder");
        for after in page_text.split("](").skip(1) {
            let target = after.split(')').next().unwrap_or(after);
            if target.starts_with("https://") {
                continue;
            }
            links += 1;
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if path.is_empty() {
                root().join(name)
            } else {
                folder.join(path)
            };
            assert!(file.exists(), "{name}: nothing is at {target}");
            if !anchor.is_empty() {
                let text = fs::read_to_string(&file).expect("a page");
                let there = text.lines().filter(|line| line.starts_with('#'));
                assert!(
                    there.map(slug).any(|slug| slug == anchor),
                    "{name}: no heading for {target}"
                );
            }
        }
    }
    assert!(links > 10, "only {links} links were found");
}

/// What a heading is linked by.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim();
    text.chars()
        .filter(|char| char.is_alphanumeric() || " -_".contains(*char))
        .map(|char| {
            if char == ' ' {
                '-'
            } else {
                char.to_ascii_lowercase()
            }
        })
        .collect()
}

/// The table of files in ARCHITECTURE.md: a row in bold names a folder, the others what is in it.
#[test]
fn readme_and_other_pages_know_where_what_is() {
    let mut files = 0;
    let mut folder = PathBuf::new();
    for row in page("ARCHITECTURE.md")
        .lines()
        .filter(|line| line.starts_with("| "))
    {
        let cell = row.split('|').nth(1).unwrap_or_default().trim();
        if let Some(bold) = cell.strip_prefix("**") {
            folder = root().join(bold.trim_end_matches("**"));
            assert!(folder.is_dir(), "ARCHITECTURE.md: no folder {bold}");
        }
        for file in cell.split('`').skip(1).step_by(2) {
            files += 1;
            assert!(
                folder.join(file).exists(),
                "ARCHITECTURE.md: no {file} in {}",
                folder.display()
            );
        }
    }
    assert!(files > 20, "only {files} files were found");
}
