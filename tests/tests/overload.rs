//! More than tcptrace can read, or than its output takes: it goes on, it ends when it is told to, and what is lost is
//! counted to the record.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
    sys::stat::Mode,
    unistd::mkfifo,
};
use serde_json::Value;
use tests::{Ended, Lab, Pressed, Quota, Storm, wait_until};

const TRACING: &str = "tcptrace: tracing";
/// What is promised, and for the machine that runs the test half a second more.
const START: Duration = Duration::from_millis(3500);
const STOP: Duration = Duration::from_millis(2500);
/// Time for what a test waits for, and that nobody has promised.
const SOON: Duration = Duration::from_secs(60);
const MEMORY: u64 = 200 << 20;
/// Transitions of a connection that its client resets: three at each end.
const EACH: u64 = 6;

/// Each of these tests takes all that the machine has.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder of this test's own. Gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tcptrace-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("room for a folder");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Every command that traces, and where its output goes.
fn commands(folder: &Folder) -> Vec<(Vec<String>, PathBuf)> {
    let recording = folder.path("recording");
    let words: [&[&str]; 5] = [
        &["stream", "-o", "json"],
        &["stream"],
        &["leaks", "-o", "json"],
        &["timewait", "-o", "json"],
        &["record", recording.to_str().expect("a plain path")],
    ];
    words
        .iter()
        .enumerate()
        .map(|(number, words)| {
            let words = words.iter().map(|word| (*word).to_owned()).collect();
            (words, folder.path(&number.to_string()))
        })
        .collect()
}

/// Lines of JSON in a file, which end in whole.
fn lines(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).expect("output");
    assert!(text.is_empty() || text.ends_with('\n'), "cut in a line");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect()
}

fn number(line: &Value, key: &str) -> u64 {
    line[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key}: {line}"))
}

fn is(line: &Value, event: &str) -> bool {
    line["event"] == event
}

/// What the last line says of records: how many were read, and how many lost.
fn end(lines: &[Value]) -> (u64, u64) {
    let last = lines.last().expect("an end");
    assert!(is(last, "end"), "{last}");
    (number(last, "records"), number(last, "lost"))
}

/// Every loss is told of when it is noticed, and all together are the sum.
fn assert_losses_add_up(lines: &[Value]) {
    let told: u64 = lines
        .iter()
        .filter(|line| is(line, "lost"))
        .map(|line| number(line, "records"))
        .sum();
    let (_, lost) = end(lines);
    assert_eq!(told, lost);
}

#[test]
fn a_quota_of_the_cpu_leaves_signals_and_memory_as_they_are() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    for (percent, threads) in [(10, 2), (10, 8), (25, 2), (25, 8)] {
        let folder = Folder::new("quota");
        let _storm = Storm::start(&lab.netns, threads, "rst");
        let quotas = [(); 5].map(|()| Quota::percent(percent));
        let started: Vec<_> = commands(&folder)
            .into_iter()
            .zip(&quotas)
            .map(|((words, file), quota)| {
                let out = File::create(&file).expect("room");
                let tracer = Pressed::start(&words, Some(quota), out);
                (words, file, tracer)
            })
            .collect();
        for (_, _, tracer) in &started {
            tracer.wait_said(TRACING, START);
        }
        thread::sleep(Duration::from_secs(1));
        for (words, file, tracer) in started {
            let memory = tracer.peak_memory();
            let ended = tracer.end(Signal::SIGTERM, STOP);
            let what = format!("{words:?}, {percent} % beside {threads} threads: {ended:?}");
            assert_eq!(ended.code, Some(0), "{what}");
            assert!(memory < MEMORY, "{memory} bytes: {what}");
            if words.contains(&"json".to_owned()) {
                assert_losses_add_up(&lines(&file));
            }
        }
    }
}

#[test]
fn the_time_is_up_in_time_under_a_quota() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("duration");
    let _storm = Storm::start(&lab.netns, 8, "rst");
    let quotas = [(); 5].map(|()| Quota::percent(10));
    let started: Vec<_> = commands(&folder)
        .into_iter()
        .zip(&quotas)
        .map(|((words, file), quota)| {
            let words = [words, vec!["--duration".to_owned(), "3s".to_owned()]].concat();
            let out = File::create(&file).expect("room");
            Pressed::start(&words, Some(quota), out)
        })
        .collect();
    for tracer in started {
        let began = tracer.wait_said(TRACING, START);
        // The time counts from the first probe on.
        let ended = tracer.wait_end(Duration::from_secs(5));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let whole = began + ended.after;
        assert!(whole > Duration::from_secs(2), "{ended:?}");
    }
}

/// `stream -o json` of this lab into `file`.
fn stream(lab: &Lab, more: &[&str], quota: Option<&Quota>, file: &Path) -> Pressed {
    let netns = lab.netns.inode().to_string();
    let words = [&["stream", "-o", "json", "--netns", &netns], more].concat();
    let tracer = Pressed::start(&words, quota, File::create(file).expect("room"));
    tracer.wait_said(TRACING, SOON);
    tracer
}

#[test]
fn what_is_lost_under_a_quota_is_counted_to_the_record() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("exact");
    let quota = Quota::percent(10);
    let [large_file, small_file] = ["large", "small"].map(|name| folder.path(name));
    let large = stream(&lab, &["--buffer", "256M"], None, &large_file);
    let small = stream(&lab, &["--buffer", "64K"], Some(&quota), &small_file);
    Storm::pass(&lab.netns, 4, "rst", 4000);
    for tracer in [large, small] {
        let ended = tracer.end(Signal::SIGINT, SOON);
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    let (large, small) = (lines(&large_file), lines(&small_file));
    let (made, lost) = end(&large);
    assert_eq!(lost, 0);
    let transitions = large.iter().filter(|line| is(line, "transition")).count();
    assert!(transitions as u64 >= 16_000 * EACH, "{transitions}");
    let (read, lost) = end(&small);
    assert!(lost > 0, "the quota is no quota");
    assert_eq!(read + lost, made);
    assert_losses_add_up(&small);
}

/// A pipe that nobody reads, full.
fn blocked(lab: &Lab, words: &[&str]) -> (io::PipeReader, Pressed) {
    let (reader, writer) = io::pipe().expect("a pipe");
    let netns = lab.netns.inode().to_string();
    let tracer = Pressed::start(&[words, &["--netns", &netns]].concat(), None, writer);
    tracer.wait_said(TRACING, SOON);
    {
        let _storm = Storm::start(&lab.netns, 2, "rst");
        tracer.wait_said("the output is not taken", SOON);
    }
    (reader, tracer)
}

fn assert_ended_blocked(ended: &Ended) {
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let said = "bytes were not taken in time";
    assert!(ended.stderr.contains(said), "{ended:?}");
}

#[test]
fn a_blocked_reader_does_not_make_it_deaf() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (_reader, tracer) = blocked(&lab, &["stream", "-o", "json"]);
        let memory = tracer.peak_memory();
        assert!(memory < MEMORY, "{memory}");
        assert_ended_blocked(&tracer.end(signal, STOP));
    }
    let (_reader, tracer) = blocked(&lab, &["record", "-"]);
    assert_ended_blocked(&tracer.end(Signal::SIGTERM, STOP));
    // A second signal ends it at once, as if it had none of its own.
    let (_reader, tracer) = blocked(&lab, &["stream"]);
    tracer.signal(Signal::SIGTERM);
    thread::sleep(Duration::from_millis(100));
    let ended = tracer.end(Signal::SIGTERM, Duration::from_millis(900));
    assert_eq!(ended.code, Some(143), "{ended:?}");
}

#[test]
fn a_fifo_that_nobody_reads_does_not_make_it_deaf() {
    let _alone = alone();
    let Some(_lab) = Lab::new() else { return };
    let folder = Folder::new("fifo");
    let fifo = folder.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).expect("room for a FIFO");
    let words = ["record", fifo.to_str().expect("a plain path")];
    let tracer = Pressed::start(&words, None, Stdio::null());
    tracer.wait_said(TRACING, SOON);
    assert_ended_blocked(&tracer.end(Signal::SIGINT, STOP));
}

/// Reads a pipe with a pause after every so many bytes, to its end.
fn read_slowly(mut pipe: io::PipeReader, chunk: usize, pause: Duration) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; chunk]);
    loop {
        match pipe.read(&mut buffer).expect("a pipe") {
            0 => return all,
            length => all.extend_from_slice(&buffer[..length]),
        }
        thread::sleep(pause);
    }
}

/// What a slow pipe costs is records, counted; what comes out of it is whole.
#[test]
fn a_slow_reader_gets_whole_lines_and_an_exact_count() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("slow");
    let large_file = folder.path("large");
    let large = stream(&lab, &["--buffer", "256M"], None, &large_file);
    let (reader, writer) = io::pipe().expect("a pipe");
    let netns = lab.netns.inode().to_string();
    let words = ["stream", "-o", "json", "--netns", &netns, "--buffer", "1M"];
    let small = Pressed::start(&words, None, writer);
    small.wait_said(TRACING, SOON);
    // Some ten megabytes a second; the storm makes more than twenty in all.
    let slow = thread::spawn(|| read_slowly(reader, 1 << 16, Duration::from_millis(25)));
    Storm::pass(&lab.netns, 2, "rst", 15_000);
    let ended = large.end(Signal::SIGINT, SOON);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    // Its time to write the rest begins when all is in the queue, so it must not be ended by a signal before.
    thread::sleep(Duration::from_secs(8));
    let ended = small.end(Signal::SIGINT, SOON);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let text = slow.join().expect("no panic");
    let small_file = folder.path("small");
    fs::write(&small_file, text).expect("room");
    let (large, small) = (lines(&large_file), lines(&small_file));
    let ((made, none), (read, lost)) = (end(&large), end(&small));
    assert_eq!(none, 0);
    assert!(lost > 0, "the reader is not slow enough");
    assert_eq!(read + lost, made);
    assert_losses_add_up(&small);
}

/// A pager that is stopped (Ctrl-Z), and goes on.
#[test]
fn a_stopped_pager_goes_on_with_whole_lines() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("pager");
    let file = folder.path("lines");
    let mut pager = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(File::create(&file).expect("room"))
        .spawn()
        .expect("cat");
    let signal = |pager: &std::process::Child, signal| {
        let pid = nix::unistd::Pid::from_raw(pager.id().cast_signed());
        nix::sys::signal::kill(pid, signal).expect("our own child");
    };
    signal(&pager, Signal::SIGSTOP);
    let netns = lab.netns.inode().to_string();
    let words = ["stream", "-o", "json", "--netns", &netns];
    let pipe = pager.stdin.take().expect("piped");
    let tracer = Pressed::start(&words, None, pipe);
    tracer.wait_said(TRACING, SOON);
    let storm = Storm::start(&lab.netns, 2, "rst");
    tracer.wait_said("the output is not taken", SOON);
    tracer.wait_said("records are lost in a storm", SOON);
    let maker = format!("churn (pid {})", storm.pid());
    assert!(tracer.stderr().contains(&maker), "{}", tracer.stderr());
    drop(storm);
    signal(&pager, Signal::SIGCONT);
    // What has waited, and what comes now.
    thread::sleep(Duration::from_secs(3));
    Storm::pass(&lab.netns, 1, "rst", 100);
    thread::sleep(Duration::from_secs(1));
    let ended = tracer.end(Signal::SIGINT, STOP);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(pager.wait().expect("our own child").success());
    let lines = lines(&file);
    assert_losses_add_up(&lines);
    let last = lines.iter().rposition(|line| is(line, "lost"));
    let rest = &lines[last.expect("some are lost")..];
    let whole = rest.iter().filter(|line| is(line, "transition")).count();
    assert!(whole as u64 >= 100 * EACH, "{whole} after the last loss");
}

/// A small disk. Gone when dropped.
struct Disk(PathBuf);

impl Disk {
    fn new(folder: &Folder, size: &str) -> Self {
        let path = folder.path("disk");
        fs::create_dir_all(&path).expect("room");
        let size = format!("size={size}");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        )
        .expect("root may mount");
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_disk_that_fills_up_is_said_and_ends_it() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("full");
    let disk = Disk::new(&folder, "1M");
    let file = disk.0.join("file");
    let file = file.to_str().expect("a plain path");
    for words in [&["stream", "-o", "json"][..], &["record", file]] {
        let out = match words[0] {
            "record" => Stdio::null(),
            _ => File::create(file).expect("room").into(),
        };
        let tracer = Pressed::start(words, None, out);
        tracer.wait_said(TRACING, SOON);
        let _storm = Storm::start(&lab.netns, 1, "rst");
        let ended = tracer.wait_end(SOON);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains("No space left"), "{ended:?}");
        assert!(ended.stderr.contains("make room"), "{ended:?}");
        let _ = fs::remove_file(file);
    }
}

/// Somebody else writes all that the disk takes, and waits for it.
#[test]
fn a_disk_under_writeback_does_not_stall_the_reader() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("writeback");
    let mut other = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "count=400", "conv=fsync"])
        .arg(format!("of={}", folder.path("other").display()))
        .stderr(Stdio::null())
        .spawn()
        .expect("dd");
    let file = folder.path("lines");
    let tracer = stream(&lab, &[], None, &file);
    Storm::pass(&lab.netns, 1, "rst", 10_000);
    let ended = tracer.end(Signal::SIGINT, SOON);
    let _ = other.kill();
    let _ = other.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let lines = lines(&file);
    let transitions = lines.iter().filter(|line| is(line, "transition")).count();
    assert!(transitions as u64 >= 10_000 * EACH, "{transitions}");
    assert_eq!(end(&lines).1, 0);
}

/// Half a minute at the limit, with FINs, so that TIME_WAITs gather, and stopped for a while: memory does not grow, and
/// afterwards nothing is shown that is not, nor missed that is.
#[test]
fn after_half_a_minute_at_the_limit_it_is_right_again() {
    /// `net.ipv4.tcp_max_tw_buckets`: so many TIME_WAITs are there at most.
    const BUCKETS: usize = 20_000;
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    lab.netns
        .set("ipv4/tcp_max_tw_buckets", &BUCKETS.to_string());
    let folder = Folder::new("soak");
    let netns = lab.netns.inode().to_string();
    let start = |command: &str, buffer: &str| {
        let file = folder.path(command);
        let words = [command, "-o", "json", "--netns", &netns, "--buffer", buffer];
        let tracer = Pressed::start(&words, None, File::create(&file).expect("room"));
        tracer.wait_said(TRACING, SOON);
        (file, tracer)
    };
    let all = [
        start("timewait", "64K"),
        start("stream", "64K"),
        start("leaks", "64K"),
    ];
    let storm = Storm::start(&lab.netns, 2, "fin");
    let rows = || lab.diag().rows();
    wait_until("the table is full", SOON, || {
        (rows().len() >= BUCKETS).then_some(())
    });
    thread::sleep(Duration::from_secs(5));
    let before = all.each_ref().map(|(_, tracer)| tracer.memory());
    for (_, tracer) in &all {
        tracer.signal(Signal::SIGSTOP);
    }
    thread::sleep(Duration::from_secs(5));
    for (_, tracer) in &all {
        tracer.signal(Signal::SIGCONT);
    }
    thread::sleep(Duration::from_secs(10));
    let after = all.each_ref().map(|(_, tracer)| tracer.memory());
    drop(storm);
    thread::sleep(Duration::from_secs(5));
    for (before, after) in before.into_iter().zip(after) {
        assert!(after < before + (16 << 20), "{before} bytes, then {after}");
        assert!(after < MEMORY, "{after}");
    }
    let is_time_wait = |state: &str| state == "TIME_WAIT";
    let (mut least, mut most) = (usize::MAX, 0);
    let mut count = || {
        let now = rows().iter().filter(|row| is_time_wait(row.state)).count();
        least = least.min(now);
        most = most.max(now);
    };
    count();
    let all = all.map(|(file, tracer)| {
        let ended = tracer.end(Signal::SIGINT, Duration::from_secs(4));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        lines(&file)
    });
    count();
    for lines in &all {
        assert_losses_add_up(lines);
        assert!(end(lines).1 > 0, "it was stopped");
    }
    let summary = all[0]
        .iter()
        .find(|line| is(line, "time_wait_summary"))
        .expect("a summary");
    let running = number(&summary["running"], "time_wait") as usize;
    assert!(
        (least..=most).contains(&running),
        "{running} running, but {least} to {most} in the kernel"
    );
    let report = all[2]
        .iter()
        .rfind(|line| is(line, "leak_report") || is(line, "report"));
    let leaks = all[2].iter().filter(|line| is(line, "leak")).count();
    assert_eq!(leaks, 0, "{report:?}");
}

/// A pipe that was closed by its reader is noticed although nothing more is to be written.
#[test]
fn a_reader_that_has_gone_ends_it_at_once() {
    let _alone = alone();
    let Some(lab) = Lab::new() else { return };
    let (reader, writer) = io::pipe().expect("a pipe");
    let netns = lab.netns.inode().to_string();
    let words = ["stream", "-o", "json", "--netns", &netns];
    let tracer = Pressed::start(&words, None, writer);
    tracer.wait_said(TRACING, SOON);
    Storm::pass(&lab.netns, 1, "rst", 1);
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).expect("a line");
    let began = Instant::now();
    // The next output fails.
    Storm::pass(&lab.netns, 1, "rst", 1);
    let ended = tracer.wait_end(Duration::from_secs(10));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
}
