use std::{fs, os::unix::fs::symlink, thread};

use super::*;

/// A folder that is gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tcptrace-new-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const RECORDING: &str = "{\"event\":\"start\",\"schema\":1}\n{\"event\":\"tick\",\"time\":2}\n";

#[track_caller]
fn refused(path: &Path, force: bool) -> String {
    let error = create(path, Content::Recording, force).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("cannot write the recording {}: ", path.display())),
        "{text}"
    );
    assert!(text.contains("; "), "it says what to do: {text}");
    text
}

fn write(file: &mut NewFile, text: &str) {
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn a_new_file_is_for_its_owner_alone() {
    let folder = Folder::new("mode");
    let path = folder.0.join("trace");
    let mut file = create(&path, Content::Recording, false).unwrap();
    write(&mut file, "one\n");
    write(&mut file, "two\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
}

#[test]
fn an_older_one_is_overwritten_only_if_asked_and_not_before_there_is_something() {
    let folder = Folder::new("older");
    for (name, old) in [
        ("recording", RECORDING),
        ("report", "{\"event\":\"leak\",\"state\":\"CLOSE_WAIT\"}\n"),
        ("text", "06:37:53 UTC  no CLOSE_WAIT for longer than 60 s\n"),
    ] {
        let path = folder.file(name, old);
        fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let text = refused(&path, false);
        assert!(
            text.contains("already; give another name, or --force"),
            "{text}"
        );
        let mut file = create(&path, Content::Recording, true).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            old,
            "a trace that cannot start costs nothing"
        );
        write(&mut file, "new\n");
        write(&mut file, "er\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\ner\n");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }
}

#[test]
fn nothing_else_is_ever_overwritten() {
    let folder = Folder::new("else");
    for (name, content) in [
        ("passwd", "root:x:0:0::/root:/bin/sh\n"),
        ("json", "{\"version\":1}\n"),
        ("time", "06:37:53 CET  x\n"),
        ("short", "x"),
    ] {
        let path = folder.file(name, content);
        for force in [false, true] {
            let text = refused(&path, force);
            assert!(text.contains("no recording of tcptrace"), "{text}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
    }
    // An empty one holds nothing, and its mode was chosen by somebody.
    let path = folder.file("empty", "");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let mut file = create(&path, Content::Report, false).unwrap();
    write(&mut file, "new\n");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
}

#[test]
fn links_are_not_followed() {
    let folder = Folder::new("links");
    let target = folder.file("target", RECORDING);
    for to in [
        target.as_path(),
        Path::new("/nonexistent/file"),
        Path::new("/dev/null"),
    ] {
        let link = folder.0.join("link");
        symlink(to, &link).unwrap();
        for force in [false, true] {
            assert!(refused(&link, force).contains("symbolic link"));
        }
        fs::remove_file(&link).unwrap();
    }
    assert_eq!(fs::read_to_string(&target).unwrap(), RECORDING);
}

#[test]
fn what_is_no_file_says_so() {
    let folder = Folder::new("kinds");
    assert!(refused(&folder.0, true).contains("it is a folder"));
    assert!(refused(&folder.0.join("no/such"), true).contains("No such file"));
    let socket = folder.0.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(refused(&socket, true).contains("no file, no pipe"));
    let mut null = create(Path::new("/dev/null"), Content::Report, false).unwrap();
    write(&mut null, "x");
}

#[test]
fn a_pipe_waits_for_its_reader() {
    let folder = Folder::new("pipe");
    let path = folder.0.join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .unwrap();
    let reader = {
        let path = path.clone();
        thread::spawn(move || fs::read_to_string(path).unwrap())
    };
    let mut file = create(&path, Content::Recording, false).unwrap();
    write(&mut file, "x");
    drop(file);
    assert_eq!(reader.join().unwrap(), "x");
}

#[test]
fn descriptors_that_were_given_are_used_as_they_are() {
    let folder = Folder::new("fd");
    let path = folder.file("behind", "kept\n");
    let behind = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&behind);
    for name in [
        format!("/dev/fd/{number}"),
        format!("/proc/self/fd/{number}"),
    ] {
        let mut file = create(Path::new(&name), Content::Recording, false).unwrap();
        write(&mut file, "more\n");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "kept\nmore\nmore\n");
    assert!(refused(Path::new("/dev/fd/9999"), false).contains("Bad file descriptor"));
    let own = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let own = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own));
    refused(Path::new(&own), false);
    assert_eq!(own_descriptor(Path::new("/dev/stdout")), Some(1));
    assert_eq!(own_descriptor(Path::new("/dev/fd/+1")), Some(1));
    assert_eq!(own_descriptor(Path::new("/dev/fd/../sda")), None);
}

#[test]
fn what_another_user_has_put_there_is_not_written_to() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("left out: files of other users, which need root");
        return;
    }
    let folder = Folder::new("planted");
    fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o1777)).unwrap();
    let path = folder.file("trace", "");
    std::os::unix::fs::chown(&path, Some(65_534), Some(65_534)).unwrap();
    for force in [false, true] {
        assert!(refused(&path, force).contains("another user (uid 65534)"));
    }
    // In a folder that is not for everybody, its owner decides.
    fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o755)).unwrap();
    create(&path, Content::Recording, false).unwrap();
}
