//! Files that tcptrace writes as root: what is in them already, and what lies in their way.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process,
};

use tests::{Lab, Run, Tcptrace};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("tcptrace-tests-{}-{name}", process::id()));
        fs::create_dir(&path).expect("a temporary folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn record(lab: &Lab, file: &Path, more: &[&str]) -> Run {
    let netns = lab.netns.inode().to_string();
    let file = file.to_str().expect("a plain path");
    let arguments = ["record", file, "--duration", "200ms", "--netns", &netns];
    Tcptrace::run(&[&arguments, more].concat())
}

fn report(lab: &Lab, file: &Path, more: &[&str]) -> Run {
    let file = file.to_str().expect("a plain path");
    let mut command = lab.leaks_of(&[&["--report", file], more].concat());
    Tcptrace::watching(command.arg("true")).ended()
}

#[test]
fn an_older_file_is_kept_unless_it_may_be_overwritten() {
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("older");
    for (name, write) in [
        ("recording", record as fn(&Lab, &Path, &[&str]) -> Run),
        ("report", report),
    ] {
        let file = folder.0.join(name);
        let first = write(&lab, &file, &[]);
        assert_eq!(first.code, Some(0), "{}", first.stderr);
        let old = fs::read_to_string(&file).expect("it was written");
        assert!(!old.is_empty());
        let metadata = file.metadata().expect("it is there");
        assert_eq!(metadata.mode() & 0o777, 0o600, "{name}");
        let second = write(&lab, &file, &[]);
        assert_eq!(second.code, Some(2), "{}", second.stderr);
        assert!(second.stderr.contains("--force"), "{}", second.stderr);
        assert_eq!(fs::read_to_string(&file).expect("it is there"), old);
        let third = write(&lab, &file, &["--force"]);
        assert_eq!(third.code, Some(0), "{}", third.stderr);
        assert_ne!(fs::read_to_string(&file).expect("it is there"), old);

        let other = folder.0.join("other");
        fs::write(&other, "root:x:0:0\n").expect("a file");
        let link = folder.0.join("link");
        symlink(&other, &link).expect("a link");
        for (path, word) in [(&other, "of tcptrace"), (&link, "symbolic link")] {
            let run = write(&lab, path, &["--force"]);
            assert_eq!(run.code, Some(2), "{}", run.stderr);
            assert!(run.stderr.contains(word), "{}", run.stderr);
        }
        assert_eq!(
            fs::read_to_string(&other).expect("it is there"),
            "root:x:0:0\n"
        );
        fs::remove_file(&link).expect("it is there");
    }
}

#[test]
fn a_trace_that_cannot_start_costs_nothing() {
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("start");
    let file = folder.0.join("recording");
    assert_eq!(record(&lab, &file, &[]).code, Some(0));
    let old = fs::read_to_string(&file).expect("it was written");
    // More memory than there is for the ring buffer.
    let path = file.to_str().expect("a plain path");
    let run = Tcptrace::run_as_nobody(&["record", path, "--force", "--duration", "1s"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert_eq!(fs::read_to_string(&file).expect("it is there"), old);
    // A report is opened before; what is in it stays until there is another.
    let file = folder.0.join("report");
    assert_eq!(report(&lab, &file, &[]).code, Some(0));
    let old = fs::read_to_string(&file).expect("it was written");
    let mut command = lab.leaks_of(&["--report", file.to_str().expect("a plain path"), "--force"]);
    let run = Tcptrace::watching(command.arg("/no/such/program")).ended();
    assert_eq!(run.code, Some(127), "{}", run.stderr);
    assert_eq!(fs::read_to_string(&file).expect("it is there"), old);
}

#[test]
fn pipes_and_standard_output() {
    let Some(lab) = Lab::new() else { return };
    let folder = Folder::new("pipes");
    for name in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        let run = record(&lab, Path::new(name), &[]);
        assert_eq!(run.code, Some(0), "{name}: {}", run.stderr);
        assert_eq!(run.lines.0[0].value["event"], "start", "{name}");
    }
    let pipe = folder.0.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let reader = {
        let pipe = pipe.clone();
        std::thread::spawn(move || fs::read_to_string(pipe).expect("text"))
    };
    assert_eq!(record(&lab, &pipe, &[]).code, Some(0));
    assert!(
        reader
            .join()
            .expect("it reads")
            .starts_with("{\"event\":\"start\"")
    );
}
