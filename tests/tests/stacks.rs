//! From where in their programs leaked sockets were opened: C programs, compiled here in several ways.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tests::{Lab, Lines, Tcptrace, wait_until};

const SOURCE: &str = include_str!("../programs/opens.c");
const OPTIONS: [&str; 6] = [
    "--stacks",
    "-o",
    "json",
    "--older-than",
    "200ms",
    "--interval=100ms",
];
const FRAME_POINTERS: &[&str] = &["-g", "-O1", "-fno-omit-frame-pointer"];
const NO_FRAME_POINTERS: &[&str] = &["-g", "-O2", "-fomit-frame-pointer"];
const NEITHER: &[&str] = &[
    "-O2",
    "-fomit-frame-pointer",
    "-fno-asynchronous-unwind-tables",
    "-fno-unwind-tables",
];

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("tcptrace-stacks-{}-{name}", process::id()));
        fs::create_dir_all(&path).expect("/tmp can be written to");
        Self(path)
    }

    /// The program, compiled with these options.
    fn compile(&self, name: &str, options: &[&str]) -> PathBuf {
        let (source, program) = (self.0.join("opens.c"), self.0.join(name));
        fs::write(&source, SOURCE).expect("it can be written");
        let cc = Command::new("cc")
            .args(options)
            .arg("-pthread")
            .args([Path::new("-o"), &program, &source])
            .status();
        assert!(cc.expect("there is a C compiler").success());
        program
    }

    /// The last report on this command, by lines.
    fn report(&self, lab: &Lab, options: &[&str], command: &[&str]) -> Vec<Value> {
        let file = self.0.join("report.jsonl");
        let file = file.to_str().expect("a plain path");
        let options = [&OPTIONS, options, &["--force", "--report", file]].concat();
        let run = lab
            .leaks_of(&options)
            .args(command)
            .current_dir(&self.0)
            .output();
        let run = run.expect("tcptrace can be run");
        let said = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(0), "{said}");
        lines(&fs::read_to_string(file).expect("it was written"))
    }
}

fn values(lines: &Lines) -> Vec<Value> {
    lines.0.iter().map(|line| line.value.clone()).collect()
}

/// A namespace in which nobody keeps the CPU busy.
fn lab() -> Option<Lab> {
    let mut lab = Lab::new()?;
    lab.rest();
    Some(lab)
}

/// The report as text.
fn text(lab: &Lab, command: &[&str]) -> String {
    let run = lab
        .leaks_of(&["--stacks", "--older-than=200ms"])
        .args(command)
        .output();
    let run = run.expect("tcptrace can be run");
    String::from_utf8(run.stderr).expect("UTF-8")
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

fn leaks(lines: &[Value]) -> impl Iterator<Item = &Value> {
    lines.iter().filter(|line| line["event"] == "leak")
}

/// All stacks of a report.
fn stacks(lines: &[Value]) -> Vec<&Value> {
    leaks(lines)
        .flat_map(|leak| leak["stacks"].as_array().expect("stacks were asked for"))
        .collect()
}

/// Where in the source something is: the line that says so.
fn line_of(function: &str) -> usize {
    let marker = format!("// line of {function}");
    let at = SOURCE.lines().position(|line| line.ends_with(&marker));
    at.expect("there is such a line") + 1
}

/// The frames of the program itself.
fn own(stack: &Value) -> Vec<&Value> {
    let frames = stack["frames"].as_array().expect("frames");
    frames
        .iter()
        .filter(|frame| frame["main"] == true)
        .collect()
}

/// How many sockets were opened in this function at its line, by this call.
#[track_caller]
fn assert_opened(lines: &[Value], via: &str, function: &str, sockets: usize) {
    let found: Vec<_> = stacks(lines)
        .into_iter()
        .filter(|stack| {
            own(stack)
                .first()
                .is_some_and(|own| own["function"] == function)
        })
        .collect();
    assert_eq!(found.len(), 1, "{function}: {lines:#?}");
    let (stack, frame) = (found[0], own(found[0])[0]);
    assert_eq!(stack["via"], via, "{stack:#}");
    assert_eq!(stack["sockets"], sockets, "{stack:#}");
    assert_eq!(frame["line"], line_of(function), "{stack:#}");
    let file = frame["file"].as_str().expect("a file");
    assert!(file.ends_with("/opens.c"), "{stack:#}");
    // The C library's part comes first.
    let first = stack["frames"][0]["function"]
        .as_str()
        .expect("it has a name");
    assert!(first.contains(via), "{stack:#}");
}

/// Every stack is whole, and was found by unwind tables alone.
#[track_caller]
fn assert_whole(lines: &[Value]) {
    for stack in stacks(lines) {
        assert_eq!(stack["complete"], true, "{stack:#}");
        assert_eq!(stack["end"], "outermost", "{stack:#}");
        assert_eq!(stack["by_frame_pointer"], 0, "{stack:#}");
    }
    for leak in leaks(lines) {
        assert_eq!(leak["without_stack"], json!({}), "{leak:#}");
    }
}

/// With frame pointers and without: the program has ended when it is reported.
#[test]
fn functions_are_told_apart_on_both_sides() {
    let Some(lab) = lab() else { return };
    for (name, options) in [("fp", FRAME_POINTERS), ("nofp", NO_FRAME_POINTERS)] {
        let folder = Folder::new(name);
        let program = folder.compile(name, options);
        let program = program.to_str().expect("a plain path");
        let lines = folder.report(&lab, &[], &[program, "aaabbtxxxxy"]);
        assert_opened(&lines, "connect", "open_a", 3);
        assert_opened(&lines, "connect", "open_b", 2);
        // In a program with threads, the C library calls the kernel in another way.
        assert_opened(&lines, "connect", "in_thread", 1);
        assert_opened(&lines, "accept", "take_x", 4);
        assert_opened(&lines, "accept", "take_y", 1);
        assert_whole(&lines);
        let mains = stacks(&lines)
            .into_iter()
            .filter(|stack| own(stack).iter().any(|frame| frame["function"] == "main"));
        assert_eq!(mains.count(), 4, "all but the thread: {lines:#?}");
        // The most common first.
        for leak in leaks(&lines) {
            let counts: Vec<u64> = leak["stacks"]
                .as_array()
                .expect("stacks")
                .iter()
                .map(|stack| stack["sockets"].as_u64().expect("a number"))
                .collect();
            assert!(counts.is_sorted_by(|a, b| a >= b), "{leak:#}");
        }
    }
}

/// The text says the same.
#[test]
fn text_says_function_and_line() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("text");
    let program = folder.compile("text", NO_FRAME_POINTERS);
    let program = program.to_str().expect("a plain path");
    let text = text(&lab, &[program, "aaxj"]);
    let said = |function: &str| {
        format!(
            " in {function} at {}/opens.c:{}\n",
            folder.0.display(),
            line_of(function)
        )
    };
    for line in [
        format!("  opened   2 by connect(){}", said("open_a")),
        format!("  opened   1 by accept(){}", said("take_x")),
        "1 by connect() in made::at_once here\n".to_owned(),
    ] {
        assert!(text.contains(&line), "{line:?} not in\n{text}");
    }
}

/// Neither tables nor frame pointers: what was found, and why no more.
#[test]
fn without_tables_and_frame_pointers_it_says_why() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("neither");
    let program = folder.compile("neither", NEITHER);
    let program = program.to_str().expect("a plain path");
    let lines = folder.report(&lab, &[], &[program, "aab"]);
    let found = stacks(&lines);
    // The C library has tables: who called it is known.
    assert_eq!(found.len(), 2, "{lines:#?}");
    for stack in &found {
        assert_eq!(stack["complete"], false, "{stack:#}");
        let end = stack["end"].as_str().expect("a reason");
        assert!(
            ["no_code", "zero_frame_pointer"].contains(&end),
            "{stack:#}"
        );
    }
    assert_eq!([&found[0]["sockets"], &found[1]["sockets"]], [2, 1]);
    let text = text(&lab, &[program, "a"]);
    assert!(text.contains(" frames found, no more: "), "{text}");
    assert!(text.contains("without frame pointers"), "{text}");
}

/// Of a stripped program there are addresses, and they are those of the one with symbols.
#[test]
fn stripped() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("stripped");
    let full = folder.compile("full", NO_FRAME_POINTERS);
    let bare = folder.compile("bare", &[NO_FRAME_POINTERS, &["-s"]].concat());
    let addresses = |program: &Path| {
        let program = program.to_str().expect("a plain path");
        let lines = folder.report(&lab, &[], &[program, "aab"]);
        assert_whole(&lines);
        let mut found: Vec<_> = stacks(&lines)
            .iter()
            .map(|stack| (own(stack)[0].clone(), stack["sockets"].clone()))
            .collect();
        found.sort_by_key(|(_, sockets)| sockets.as_u64());
        found
    };
    let (with, without) = (addresses(&full), addresses(&bare));
    assert_eq!((with.len(), without.len()), (2, 2));
    for ((with, _), (without, _)) in with.iter().zip(&without) {
        assert!(with["function"].is_string(), "{with:#}");
        assert_eq!(without["function"], Value::Null, "{without:#}");
        assert_eq!(without["address"], with["address"], "{without:#}");
        let module = without["module"].as_str().expect("a path");
        assert!(module.ends_with("/bare"), "{without:#}");
    }
}

/// A program that exists only where the process sees it.
#[test]
fn another_mount_namespace() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("mount");
    let program = folder.compile("opens", FRAME_POINTERS);
    let there = folder.0.join("there");
    fs::create_dir(&there).expect("it is new");
    let script = format!(
        "mount -t tmpfs none {there} && cp {program} {there}/hidden && umask 0 && exec {there}/hidden abbx",
        there = there.display(),
        program = program.display()
    );
    let lines = folder.report(&lab, &[], &["unshare", "--mount", "sh", "-c", &script]);
    assert!(!there.join("hidden").exists());
    assert_opened(&lines, "connect", "open_a", 1);
    assert_opened(&lines, "connect", "open_b", 2);
    assert_opened(&lines, "accept", "take_x", 1);
    let stack = stacks(&lines)[0];
    let module = own(stack)[0]["module"].as_str().expect("a path");
    assert!(module.ends_with("/there/hidden"), "{stack:#}");
}

/// Two processes of one program, which differ in what they do.
#[test]
fn two_processes_of_one_program() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("two");
    let program = folder.compile("opens", NO_FRAME_POINTERS);
    let program = program.display();
    let script = format!("{program} aaa & {program} b & wait");
    let lines = folder.report(&lab, &[], &["sh", "-c", &script]);
    let mut found: Vec<_> = leaks(&lines)
        .map(|leak| {
            let stacks = leak["stacks"].as_array().expect("stacks");
            assert_eq!(stacks.len(), 1, "{leak:#}");
            let function = own(&stacks[0])[0]["function"].clone();
            (
                leak["sockets"].clone(),
                stacks[0]["sockets"].clone(),
                function,
            )
        })
        .collect();
    found.sort_by_key(|(sockets, _, _)| sockets.as_u64());
    assert_eq!(
        found,
        [
            (json!(1), json!(1), json!("open_b")),
            (json!(3), json!(3), json!("open_a"))
        ]
    );
}

/// Code made at run time, named as runtimes name it for perf: at once, or only later.
#[test]
fn code_made_at_run_time() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("made");
    let program = folder.compile("opens", FRAME_POINTERS);
    let program = program.to_str().expect("a plain path");
    let lines = folder.report(&lab, &[], &[program, "jl"]);
    for name in ["made::at_once here", "made::later"] {
        let found = stacks(&lines)
            .into_iter()
            .find(|stack| stack["frames"][1]["function"] == name);
        let stack = found.unwrap_or_else(|| panic!("no {name}: {lines:#?}"));
        assert_eq!(stack["frames"][1]["module"], Value::Null, "{stack:#}");
        let caller = own(stack)[0];
        assert_eq!(caller["function"], "open_made", "{stack:#}");
        assert_eq!(caller["line"], line_of("open_made"), "{stack:#}");
        // From the made code on outwards there is a table again.
        assert_eq!(stack["by_frame_pointer"], 1, "{stack:#}");
        assert_eq!(stack["complete"], true, "{stack:#}");
    }
}

/// Deeper than what is copied: by frame pointers to the end, without them no further, and that is said.
#[test]
fn deeper_than_what_is_copied() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("deep");
    let program = folder.compile("fp", FRAME_POINTERS);
    let lines = folder.report(&lab, &[], &[program.to_str().expect("a plain path"), "d"]);
    let stack = stacks(&lines)[0];
    let calls = |stack: &Value, name: &str| {
        let own = own(stack).into_iter();
        own.filter(|frame| frame["function"] == name).count()
    };
    assert_eq!(calls(stack, "deep"), 61, "{stack:#}");
    assert_eq!(calls(stack, "main"), 1, "{stack:#}");
    assert!(stack["by_frame_pointer"].as_u64() > Some(10), "{stack:#}");
    let program = folder.compile("nofp", &["-g", "-O1", "-fomit-frame-pointer"]);
    let lines = folder.report(&lab, &[], &[program.to_str().expect("a plain path"), "d"]);
    let stack = stacks(&lines)[0];
    let found = calls(stack, "deep");
    assert!((10..61).contains(&found), "{stack:#}");
    assert_eq!(calls(stack, "main"), 0, "{stack:#}");
    assert_eq!(stack["complete"], false, "{stack:#}");
    assert_eq!(stack["end"], "beyond_copy", "{stack:#}");
}

/// A program that waits for a line before it goes on.
struct Waiting(Child);

impl Waiting {
    fn start(lab: &Lab, program: &Path, todo: &str) -> Self {
        let mut command = Command::new(program);
        command
            .arg(todo)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let child = lab.netns.inside(|| command.spawn());
        let mut waiting = Self(child.expect("it was compiled"));
        waiting.wait();
        waiting
    }

    fn wait(&mut self) {
        let mut line = String::new();
        let out = self.0.stdout.as_mut().expect("piped");
        // A byte at a time is what a buffer of one reads.
        let mut out = BufReader::with_capacity(1, out);
        out.read_line(&mut line).expect("it can be read");
        assert_eq!(line, "waits\n");
    }

    fn go(&mut self) {
        let input = self.0.stdin.as_mut().expect("piped");
        input.write_all(b"\n").expect("it waits");
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Of a process that goes on living, with sockets from before; and a recording says the same.
#[test]
fn sockets_from_before_have_none() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("before");
    let program = folder.compile("opens", NO_FRAME_POINTERS);
    let mut program = Waiting::start(&lab, &program, "bbwaaaww");
    let pid = program.0.id().to_string();
    let netns = lab.netns.inode().to_string();
    let recording = folder.0.join("recording.jsonl");
    let recording = recording.to_str().expect("a plain path");
    let options = [
        "leaks",
        "--stacks",
        "--older-than=200ms",
        "--interval=100ms",
        "--pid",
        &pid,
    ];
    let tcptrace = lab.tcptrace(&options);
    let recorder = Tcptrace::start_plain(&[
        "record",
        "--stacks",
        "--interval=100ms",
        "--netns",
        &netns,
        recording,
    ]);

    program.go();
    program.wait();
    let is_whole = |lines: &[Value]| {
        let found = leaks(lines).last()?;
        (found["sockets"] == 5 && found["stacks"][0]["sockets"] == 3).then(|| found.clone())
    };
    let live = wait_until("a leak of five", Duration::from_secs(20), || {
        let lines = values(&tcptrace.lines());
        is_whole(&lines)
    });
    drop(tcptrace.finish());
    drop(recorder.finish());
    let replay = Tcptrace::run(&[
        "leaks",
        "--stacks",
        "--older-than=200ms",
        "-o=json",
        "--pid",
        &pid,
        "--from",
        recording,
    ]);
    let lines = values(&replay.lines);
    let replayed = is_whole(&lines).unwrap_or_else(|| panic!("{lines:#?}"));
    for leak in [&live, &replayed] {
        assert_eq!(leak["without_stack"], json!({"before": 2}), "{leak:#}");
        assert_eq!(leak["stacks"].as_array().map(Vec::len), Some(1), "{leak:#}");
        let own = own(&leak["stacks"][0])[0];
        assert_eq!(own["function"], "open_a", "{leak:#}");
        assert_eq!(own["line"], line_of("open_a"), "{leak:#}");
    }
    assert_eq!(live["stacks"], replayed["stacks"]);
    // Without the option, nothing is said of them.
    let plain = Tcptrace::run(&[
        "leaks",
        "--older-than=200ms",
        "-o=json",
        "--pid",
        &pid,
        "--from",
        recording,
    ]);
    let lines = values(&plain.lines);
    let leak = leaks(&lines).last().expect("a leak");
    assert_eq!(leak.get("stacks"), None, "{leak:#}");
}

/// A buffer that no record of a stack fits in: the sockets are told of, and that their stacks were lost.
#[test]
fn lost_stacks_are_counted() {
    let Some(lab) = lab() else { return };
    let folder = Folder::new("lost");
    let program = folder.compile("opens", NO_FRAME_POINTERS);
    let program = program.to_str().expect("a plain path");
    let lines = folder.report(&lab, &["--buffer=8K"], &[program, "aab"]);
    let found: Vec<_> = leaks(&lines).collect();
    assert_eq!(found.len(), 1, "{lines:#?}");
    assert_eq!(found[0]["sockets"], 3);
    assert_eq!(found[0]["stacks"], json!([]));
    assert_eq!(found[0]["without_stack"], json!({"untold": 3}));
    let end = lines
        .iter()
        .find(|line| line["event"] == "end")
        .expect("an end");
    assert!(end["lost"].as_u64() >= Some(3), "{end}");
}

#[test]
fn once_has_no_stacks() {
    let run = Tcptrace::run(&["leaks", "--once", "--stacks"]);
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("no stack is kept"), "{}", run.stderr);
    assert!(run.stderr.contains("leave --once out"), "{}", run.stderr);
}

/// A real runtime, if there is one: `cargo xtask test` sees to it.
#[test]
fn node() {
    let Some(lab) = lab() else { return };
    let node = env::var("TCPTRACE_NODE").unwrap_or_else(|_| "node".to_owned());
    let version = Command::new(&node).arg("--version").output();
    if !version.is_ok_and(|version| version.status.success()) {
        // Not with `eprintln`, which the test harness hides when a test passes.
        let _ = writeln!(
            io::stderr(),
            "LEFT OUT: stacks in node, because {node} does not run; `cargo xtask test` gets one"
        );
        return;
    }
    let folder = Folder::new("node");
    let script = folder.0.join("app.js");
    fs::write(&script, include_str!("../programs/opens.js")).expect("it can be written");
    let script = script.to_str().expect("a plain path");
    let flags = ["--perf-basic-prof", "--interpreted-frames-native-stack"];
    let lines = folder.report(
        &lab,
        &[],
        &[&[node.as_str()], &flags[..], &[script]].concat(),
    );
    for leak in leaks(&lines) {
        let _ = fs::remove_file(format!("/tmp/perf-{}.map", leak["pid"]));
    }
    let named = |stack: &&Value, name: &str| {
        let frames = stack["frames"].as_array().expect("frames");
        frames.iter().any(|frame| {
            let function = frame["function"].as_str().unwrap_or_default();
            // `JS:~leakyPool FILE:LINE`, before version 20 `LazyCompile:~leakyPool FILE:LINE`.
            frame["module"].is_null() && function.contains(&format!(":~{name} "))
        })
    };
    for (name, sockets) in [("leakyPool", 3), ("otherPool", 2)] {
        let of: u64 = stacks(&lines)
            .iter()
            .filter(|stack| named(stack, name))
            .filter_map(|stack| stack["sockets"].as_u64())
            .sum();
        assert_eq!(of, sockets, "{name}: {lines:#?}");
    }
}
