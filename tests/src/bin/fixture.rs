//! A process that makes TCP traffic on command.
//!
//! `fixture COMM PATH [...]` names itself COMM, connects to the UNIX socket PATH and reads commands from it,
//! one per line; each is answered by one line of JSON. It ends when the other side hangs up, so that
//! nothing is left behind by a test that dies.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write},
    mem::size_of,
    net::SocketAddr,
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    process::{Command, exit},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::{SigHandler, Signal, signal},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
        wait::waitpid,
    },
    unistd::{ForkResult, Gid, Pid, Uid, fork, setresgid, setresuid},
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};

/// Accepts so many times. Returns how many times another thread has put `held` in the place of what was accepted.
fn race(listener: &Socket, held: &Socket, times: u32) -> Result<u32, Failure> {
    let address = listener.local_addr()?;
    let held = held.as_raw_fd();
    // The lowest that is free: what the next call gets.
    let next = listener.try_clone()?.as_raw_fd();
    let (is_due, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            // This process was started on one CPU: there, it could not run while the call returns.
            let mut all = CpuSet::new();
            for cpu in 0..CpuSet::count() {
                all.set(cpu).expect("a number below the count");
            }
            sched_setaffinity(Pid::from_raw(0), &all).expect("there are CPUs among all");
            let mut replaced = 0;
            while !is_over.load(Ordering::Acquire) {
                // SAFETY: takes numbers.
                let is_open = || unsafe { libc::fcntl(next, libc::F_GETFD) } >= 0;
                if is_due.load(Ordering::Acquire) && is_open() {
                    // SAFETY: takes numbers; what it closes, the other thread only closes as well.
                    replaced += u32::from(unsafe { libc::dup2(held, next) } == next);
                    is_due.store(false, Ordering::Release);
                } else if !is_due.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
            }
            replaced
        });
        let accepted = (0..times).try_for_each(|_| {
            let client = Socket::new(address.domain(), Type::STREAM, None)?;
            client.connect(&address)?;
            client.set_linger(Some(Duration::ZERO))?;
            let client = above(client, next)?;
            is_due.store(true, Ordering::Release);
            let (server, _) = listener.accept()?;
            while is_due.load(Ordering::Acquire) {
                thread::yield_now();
            }
            drop((server, client));
            Ok(())
        });
        is_over.store(true, Ordering::Release);
        let replaced = other.join().expect("it does not panic");
        accepted.map(|()| replaced)
    })
}

/// The socket under a number above this one.
fn above(socket: Socket, number: RawFd) -> Result<Socket, Failure> {
    // SAFETY: takes numbers.
    let copy = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number + 1) };
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { Socket::from_raw_fd(Errno::result(copy)?) })
}

/// Why a command failed: the name of the errno, or a sentence about the command itself.
struct Failure(String);

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self(match error.raw_os_error() {
            Some(number) => format!("{:?}", Errno::from_raw(number)),
            None => error.to_string(),
        })
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self(format!("{error:?}"))
    }
}

type Answer = Result<Value, Failure>;

/// The sockets of this process, by the name that the test gave them.
#[derive(Default)]
struct Sockets(HashMap<String, Socket>);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(comm), Some(path)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: fixture COMM PATH");
        exit(2);
    };
    // A forked child that has ended needs no one to ask how.
    // SAFETY: no handler function is installed.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.expect("SIGCHLD can be ignored");
    let mut sockets = Sockets::default();
    // Whatever is open then, nobody closes: it goes with the process.
    exit(serve(&mut sockets, &comm, &path));
}

/// Takes the name `comm` and obeys what comes from the UNIX socket at `path`. Returns the exit code.
fn serve(sockets: &mut Sockets, comm: &str, path: &str) -> i32 {
    name(comm);
    let mut control = UnixStream::connect(path).expect("the test listens");
    let reader = BufReader::new(control.try_clone().expect("a second handle"));
    for line in reader.lines() {
        let Ok(line) = line else { return 1 };
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["exit", code] => return code.parse().expect("a number"),
            ["fork", comm, path] => {
                // SAFETY: this process has one thread; the child goes on like any program.
                match unsafe { fork() }.expect("fork") {
                    ForkResult::Child => exit(serve(sockets, comm, path)),
                    ForkResult::Parent { child } => {
                        let pid = child.as_raw();
                        if writeln!(control, "{}", json!({"pid": pid})).is_err() {
                            return 1;
                        }
                        continue;
                    }
                }
            }
            ["exec", comm, path, ref keep @ ..] => {
                for name in keep {
                    let kept = sockets.get(name).map(|socket| socket.set_cloexec(false));
                    assert!(matches!(kept, Ok(Ok(()))), "{name} cannot be kept");
                }
                let error = Command::new("/proc/self/exe").args([comm, path]).exec();
                panic!("exec: {error}");
            }
            // Goes on in another thread, beside an idle one, and ends this one, the first.
            ["outlive", comm, path] => {
                let mut sockets = std::mem::take(sockets);
                let (comm, path) = (comm.to_owned(), path.to_owned());
                thread::spawn(move || exit(serve(&mut sockets, &comm, &path)));
                thread::spawn(|| {
                    loop {
                        thread::park()
                    }
                });
                // SAFETY: it ends this thread, which holds nothing that another waits for.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
            }
            // The same as `fork`, and the child gets this pid.
            ["fork-as", pid, comm, path] => match fork_as(pid.parse().expect("a number")) {
                Ok(None) => exit(serve(sockets, comm, path)),
                Ok(Some(child)) => {
                    if writeln!(control, "{}", json!({"pid": child})).is_err() {
                        return 1;
                    }
                    continue;
                }
                Err(errno) => {
                    if writeln!(control, "{}", json!({"error": format!("{errno:?}")})).is_err() {
                        return 1;
                    }
                    continue;
                }
            },
            _ => {}
        }
        let answer = match sockets.obey(&words) {
            Ok(answer) => answer,
            Err(Failure(error)) => json!({"error": error}),
        };
        if writeln!(control, "{answer}").is_err() {
            return 1;
        }
    }
    0
}

/// Names the calling thread; for the first thread that is the process's `comm`.
fn name(comm: &str) {
    let comm = CString::new(comm).expect("no zero byte");
    prctl::set_name(&comm).expect("a name");
}

/// Forks. Returns the child's pid in the parent, which is the one asked for, and nothing in the child.
fn fork_as(pid: libc::pid_t) -> Result<Option<i64>, Errno> {
    let set_tid = [pid];
    // SAFETY: all zeros are valid arguments.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.set_tid = set_tid.as_ptr() as u64;
    arguments.set_tid_size = 1;
    // SAFETY: without CLONE_VM it is a fork, and this process has one thread.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of_val(&arguments),
        )
    };
    Errno::result(result).map(|child| (child != 0).then_some(child))
}

impl Sockets {
    fn obey(&mut self, words: &[&str]) -> Answer {
        match *words {
            // Listens; port 0 lets the kernel choose.
            ["listen", name, address, backlog] => {
                let socket = bound(address.parse().expect("an address"))?;
                socket.listen(backlog.parse().expect("a number"))?;
                let local = address_of(&socket.local_addr()?);
                self.add(name, socket);
                Ok(json!({"local": local}))
            }
            // Listens where others of this kind do as well.
            ["listen-shared", name, address, backlog] => {
                let address: SocketAddr = address.parse().expect("an address");
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
                socket.set_reuse_port(true)?;
                socket.bind(&address.into())?;
                socket.listen(backlog.parse().expect("a number"))?;
                let local = address_of(&socket.local_addr()?);
                self.add(name, socket);
                Ok(json!({"local": local}))
            }
            // Takes a local address for a later `connect` of the same name.
            ["bind", name, address] => {
                let socket = bound(address.parse().expect("an address"))?;
                let local = address_of(&socket.local_addr()?);
                self.add(name, socket);
                Ok(json!({"local": local}))
            }
            ["connect", name, address] => {
                let address: SocketAddr = address.parse().expect("an address");
                let socket = match self.0.remove(name) {
                    Some(socket) => socket,
                    None => Socket::new(Domain::for_address(address), Type::STREAM, None)?,
                };
                // Its TIME_WAIT may then be taken over by a socket that asks for the same port.
                socket.set_reuse_address(true)?;
                socket.connect(&address.into())?;
                self.pair(name, socket)
            }
            // Takes a connection off its socket, which can then connect again: connect(AF_UNSPEC).
            ["disconnect", name] => {
                let nowhere = libc::sockaddr {
                    sa_family: libc::AF_UNSPEC as u16,
                    sa_data: [0; 14],
                };
                // SAFETY: a whole address that outlives the call.
                let result = unsafe {
                    libc::connect(
                        self.get(name)?.as_raw_fd(),
                        &raw const nowhere,
                        size_of_val(&nowhere) as u32,
                    )
                };
                Errno::result(result)?;
                Ok(json!({}))
            }
            ["accept", listener, name] => {
                let (socket, _) = self.get(listener)?.accept()?;
                self.pair(name, socket)
            }
            ["write", name, bytes] => {
                let bytes = vec![b'x'; bytes.parse().expect("a number")];
                Ok(json!({"bytes": self.get(name)?.write(&bytes)?}))
            }
            // Bytes that wait for what comes after them: more of them, or the FIN.
            ["write-more", name, bytes] => {
                let bytes = vec![b'x'; bytes.parse().expect("a number")];
                let socket = self.get(name)?;
                Ok(json!({"bytes": socket.send_with_flags(&bytes, libc::MSG_MORE)?}))
            }
            // Writes until there is no room.
            ["fill", name] => {
                let bytes = [b'x'; 65536];
                let mut all = 0;
                let mut socket = self.get(name)?;
                socket.set_nonblocking(true)?;
                let error = loop {
                    match socket.write(&bytes) {
                        Ok(written) => all += written,
                        Err(error) => break error,
                    }
                };
                socket.set_nonblocking(false)?;
                if error.kind() != std::io::ErrorKind::WouldBlock {
                    return Err(error.into());
                }
                Ok(json!({"bytes": all}))
            }
            ["rcvbuf", name, bytes] => {
                let bytes = bytes.parse().expect("a number");
                self.get(name)?.set_recv_buffer_size(bytes)?;
                Ok(json!({}))
            }
            // One read; 0 bytes are the end of file.
            ["read", name] => Ok(json!({"bytes": self.get(name)?.read(&mut [0; 65536])?})),
            ["shutdown", name] => {
                self.get(name)?.shutdown(std::net::Shutdown::Write)?;
                Ok(json!({}))
            }
            // Has a system call on it hold its lock for so long, or until this process ends.
            ["lock", name, seconds] => {
                let seconds = seconds.parse().expect("a number");
                lock(self.get(name)?, Duration::from_secs(seconds))?;
                Ok(json!({}))
            }
            ["close", name] => {
                drop(self.take(name)?);
                Ok(json!({}))
            }
            // Closes with a RST.
            ["reset", name] => {
                let socket = self.take(name)?;
                socket.set_linger(Some(Duration::ZERO))?;
                Ok(json!({}))
            }
            // The time an orphan stays in FIN_WAIT2; below 0, not at all.
            ["linger2", name, seconds] => {
                let seconds: i32 = seconds.parse().expect("a number");
                // SAFETY: the option's value is an int that outlives the call.
                let result = unsafe {
                    libc::setsockopt(
                        self.get(name)?.as_raw_fd(),
                        libc::IPPROTO_TCP,
                        libc::TCP_LINGER2,
                        (&raw const seconds).cast(),
                        size_of::<i32>() as u32,
                    )
                };
                Errno::result(result)?;
                Ok(json!({}))
            }
            // Gives up on unacknowledged data after this time.
            ["user-timeout", name, milliseconds] => {
                let timeout = Duration::from_millis(milliseconds.parse().expect("a number"));
                self.get(name)?.set_tcp_user_timeout(Some(timeout))?;
                Ok(json!({}))
            }
            // Drops every segment that arrives, as a network that loses all would.
            ["deaf", name] => {
                const BPF_RET: u16 = 6;
                let drop_all = SockFilter::new(BPF_RET, 0, 0, 0);
                self.get(name)?.attach_filter(&[drop_all])?;
                Ok(json!({}))
            }
            ["hear", name] => {
                self.get(name)?.detach_filter()?;
                Ok(json!({}))
            }
            ["cookie", name] => Ok(json!({"cookie": format!("{:x}", self.get(name)?.cookie()?)})),
            // Gives the socket away over the UNIX socket at `path`, where another fixture receives.
            ["send", name, path] => {
                let socket = self.take(name)?;
                give(&UnixStream::connect(path)?, &socket)?;
                Ok(json!({}))
            }
            ["receive", name, path] => {
                let way = UnixListener::bind(path)?.accept()?.0;
                let mut byte = [0];
                let mut data = [IoSliceMut::new(&mut byte)];
                let mut space = nix::cmsg_space!(RawFd);
                let message = recvmsg::<()>(
                    way.as_raw_fd(),
                    &mut data,
                    Some(&mut space),
                    MsgFlags::empty(),
                )?;
                for part in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(descriptors) = part {
                        // SAFETY: the kernel has just made this descriptor for us.
                        let socket = unsafe { OwnedFd::from_raw_fd(descriptors[0]) };
                        self.add(name, socket.into());
                        return Ok(json!({}));
                    }
                }
                Err(Failure("no descriptor came".into()))
            }
            // Gives the socket to nobody: it waits in a UNIX socket where nobody receives.
            ["stash", name] => {
                let socket = self.take(name)?;
                let (way, end) = UnixStream::pair()?;
                give(&way, &socket)?;
                // Both ends stay open as long as this process lives.
                let _ = (way.into_raw_fd(), end.into_raw_fd());
                Ok(json!({}))
            }
            // Leaves the socket to a thread that has descriptors of its own, and does nothing.
            ["keep", name] => {
                let (done, wait) = std::sync::mpsc::channel();
                thread::spawn(move || {
                    let result = unshare(CloneFlags::CLONE_FILES);
                    done.send(result).expect("the other waits");
                    loop {
                        thread::park();
                    }
                });
                wait.recv().expect("no panic")?;
                drop(self.take(name)?);
                Ok(json!({}))
            }
            // The next that is forked is the first process of a pid namespace.
            ["unshare-pids"] => {
                unshare(CloneFlags::CLONE_NEWPID)?;
                Ok(json!({}))
            }
            // Takes this name, given as hexadecimal bytes.
            ["rename", hex] => {
                let bytes = (0..hex.len() / 2)
                    .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("digits"));
                let comm = CString::new(bytes.collect::<Vec<u8>>()).expect("no zero byte");
                prctl::set_name(&comm)?;
                Ok(json!({}))
            }
            // Goes on as this user, and its group, and stays open to its eyes.
            ["become", id] => {
                let id = id.parse().expect("a number");
                let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
                setresgid(gid, gid, gid)?;
                setresuid(uid, uid, uid)?;
                prctl::set_dumpable(true)?;
                Ok(json!({}))
            }
            // How many descriptors it may have.
            ["nofile", limit] => {
                let limit = limit.parse().expect("a number");
                setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
                Ok(json!({}))
            }
            // Connects to a listener of this process, accepts, closes the client, reads to the end, and
            // leaves it at that; many times. They are named PREFIX0 and so on.
            ["leak", listener, prefix, times] => {
                for index in 0..times.parse().expect("a number") {
                    let socket = self.abandoned(listener)?;
                    if (&socket).read(&mut [0])? != 0 {
                        return Err(Failure("more than the end came".into()));
                    }
                    self.add(&format!("{prefix}{index}"), socket);
                }
                Ok(json!({}))
            }
            // Children, each with one leaked socket of its own, that live as long as this process.
            ["brood", listener, times] => {
                let mut pids = Vec::new();
                for _ in 0..times.parse().expect("a number") {
                    let socket = self.abandoned(listener)?;
                    // SAFETY: this process has one thread; the child only waits for its end.
                    match unsafe { fork() }? {
                        ForkResult::Child => {
                            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
                            loop {
                                thread::park();
                            }
                        }
                        ForkResult::Parent { child } => pids.push(child.as_raw()),
                    }
                    drop(socket);
                }
                Ok(json!({"pids": pids}))
            }
            // Children, one after the other, each with one leaked socket of its own that it leaves open.
            ["litter", listener, times] => {
                let mut pids = Vec::new();
                for _ in 0..times.parse().expect("a number") {
                    // SAFETY: this process has one thread; the child only connects and ends.
                    match unsafe { fork() }? {
                        ForkResult::Child => {
                            let left = self.abandoned(listener);
                            let read = left.as_ref().map(|mut left| left.read(&mut [0]));
                            exit(i32::from(!matches!(read, Ok(Ok(0)))));
                        }
                        ForkResult::Parent { child } => pids.push(child.as_raw()),
                    }
                    // As their ends are ignored, it waits for that of all.
                    let _ = waitpid(None, None);
                }
                Ok(json!({"pids": pids}))
            }
            // For so many seconds, children with one leaked socket each that live for a moment.
            ["mayflies", listener, seconds] => {
                let end = Instant::now() + Duration::from_secs(seconds.parse().expect("a number"));
                let mut pids = Vec::new();
                while Instant::now() < end {
                    let socket = self.abandoned(listener)?;
                    // SAFETY: this process has one thread; the child only sleeps and ends.
                    match unsafe { fork() }? {
                        ForkResult::Child => {
                            thread::sleep(Duration::from_millis(pids.len() as u64 % 7 * 50));
                            exit(0);
                        }
                        ForkResult::Parent { child } => pids.push(child.as_raw()),
                    }
                    drop(socket);
                    thread::sleep(Duration::from_millis(3));
                }
                Ok(json!({"pids": pids}))
            }
            // Moves to another network namespace; the sockets stay where they were made.
            ["setns", path] => {
                setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
                Ok(json!({}))
            }
            // Obeys the rest of the line in a thread of its own with this name.
            ["thread", comm, ref rest @ ..] => thread::scope(|scope| {
                let obey = || {
                    name(comm);
                    self.obey(rest)
                };
                scope.spawn(obey).join().expect("no panic")
            }),
            // A connection of MPTCP sockets, between `client` and `server`.
            ["mptcp", address] => {
                let mptcp = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
                let listener = mptcp()?;
                let address: SocketAddr = address.parse().expect("an address");
                listener.bind(&address.into())?;
                listener.listen(1)?;
                let mut client = mptcp()?;
                client.connect(&listener.local_addr()?)?;
                let (mut server, _) = listener.accept()?;
                // Only then are the two sure of each other.
                client.write_all(b"x")?;
                server.read_exact(&mut [0])?;
                self.add("client", client);
                self.add("server", server);
                Ok(json!({}))
            }
            // Connects to a listener of this process, accepts, resets, closes; many times.
            ["burst", listener, times] => {
                let listener = self.get(listener)?;
                let address = listener.local_addr()?;
                for _ in 0..times.parse().expect("a number") {
                    let client = Socket::new(address.domain(), Type::STREAM, None)?;
                    client.connect(&address)?;
                    let (server, _) = listener.accept()?;
                    client.set_linger(Some(Duration::ZERO))?;
                    drop(client);
                    drop(server);
                }
                Ok(json!({}))
            }
            // Accepts and closes, while another thread puts `held` wherever something was just accepted.
            ["race", listener, held, times] => {
                let (listener, held) = (self.get(listener)?, self.get(held)?);
                let times = times.parse().expect("a number");
                Ok(json!({ "replaced": race(listener, held, times)? }))
            }
            _ => Err(Failure(format!("no such command: {}", words.join(" ")))),
        }
    }

    fn add(&mut self, name: &str, socket: Socket) {
        let before = self.0.insert(name.to_owned(), socket);
        assert!(before.is_none(), "two sockets named {name}");
    }

    fn get(&self, name: &str) -> Result<&Socket, Failure> {
        self.0
            .get(name)
            .ok_or_else(|| Failure(format!("no socket {name}")))
    }

    fn take(&mut self, name: &str) -> Result<Socket, Failure> {
        self.0
            .remove(name)
            .ok_or_else(|| Failure(format!("no socket {name}")))
    }

    /// A connection to a listener of this process whose client has closed it.
    fn abandoned(&self, listener: &str) -> Result<Socket, Failure> {
        let listener = self.get(listener)?;
        let address = listener.local_addr()?;
        let client = Socket::new(address.domain(), Type::STREAM, None)?;
        client.connect(&address)?;
        Ok(listener.accept()?.0)
    }

    /// Keeps a connected socket and tells its addresses.
    fn pair(&mut self, name: &str, socket: Socket) -> Answer {
        let local = address_of(&socket.local_addr()?);
        let remote = address_of(&socket.peer_addr()?);
        self.add(name, socket);
        Ok(json!({"local": local, "remote": remote}))
    }
}

/// Sends the socket over the other, where whoever receives gets a descriptor of it.
fn give(way: &UnixStream, socket: &impl AsRawFd) -> Result<(), Errno> {
    sendmsg::<()>(
        way.as_raw_fd(),
        &[IoSlice::new(b".")],
        &[ControlMessage::ScmRights(&[socket.as_raw_fd()])],
        MsgFlags::empty(),
        None,
    )
    .map(drop)
}

fn bound(address: SocketAddr) -> Result<Socket, Failure> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A pair that rests in TIME_WAIT may be opened again.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn address_of(address: &SockAddr) -> String {
    address
        .as_socket()
        .expect("an internet address")
        .to_string()
}

/// Has a thread set an option of the socket from memory that is not there: the kernel takes the socket's lock, and
/// copies the option with it. The memory comes after `time`. Needs root (`vm.unprivileged_userfaultfd`).
fn lock(socket: &Socket, time: Duration) -> Result<(), Failure> {
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
    const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
    const MISSING: u64 = 1;
    const PAGE: usize = 4096;

    let socket = socket.try_clone()?;
    // SAFETY: numbers, and structures of the kernel's interface (`linux/userfaultfd.h`) as arrays of their members;
    // the page is of nobody else, and stays.
    let (faults, page) = unsafe {
        let faults = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        let faults = OwnedFd::from_raw_fd(Errno::result(faults)? as RawFd);
        let mut api = [0xaa_u64, 0, 0];
        Errno::result(libc::ioctl(
            faults.as_raw_fd(),
            UFFDIO_API,
            api.as_mut_ptr(),
        ))?;
        let page = libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(page, libc::MAP_FAILED, "a page of memory");
        let mut register = [page as u64, PAGE as u64, MISSING, 0];
        let registered = libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr());
        Errno::result(registered)?;
        (faults, page as usize)
    };
    thread::spawn(move || {
        thread::sleep(time);
        let mut zero = [page as u64, PAGE as u64, 0, 0];
        // SAFETY: as above.
        unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_ZEROPAGE, zero.as_mut_ptr()) };
    });
    thread::spawn(move || {
        let page = page as *const libc::c_void;
        // SAFETY: the kernel reads eight bytes of the page, of which there are more. (`ip_options_get()` copies with
        // the lock held, 4.4 to 6.18.)
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_OPTIONS,
                page,
                8,
            )
        }
    });
    // Until the thread is in the call.
    thread::sleep(Duration::from_millis(100));
    Ok(())
}
