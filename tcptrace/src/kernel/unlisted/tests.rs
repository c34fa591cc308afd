use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::*;
use crate::kernel::netns;
use crate::kernel::sock_diag::{Diag, Query};

/// What this process's own descriptor refers to.
fn mine(socket: &impl AsFd) -> Unlisted {
    of(
        std::process::id(),
        socket.as_fd(),
        socket.as_fd().as_raw_fd(),
    )
}

/// What descriptor `fd` of another process refers to, which is `socket`.
fn of(pid: u32, socket: BorrowedFd<'_>, fd: i32) -> Unlisted {
    let descriptor = Descriptor {
        inode: fstat(socket).unwrap().st_ino as u32,
        tid: pid,
        fd: fd as u32,
    };
    unlisted(&Handle::open(pid).unwrap(), descriptor).unwrap()
}

/// Asks until `wanted` is the answer, for at most five seconds.
fn wait_for(socket: &impl AsFd, wanted: impl Fn(&Unlisted) -> bool) -> Unlisted {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let answer = mine(socket);
        if wanted(&answer) {
            return answer;
        }
        assert!(Instant::now() < until, "still {answer:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn finished(socket: &impl AsFd) -> Finished {
    match wait_for(socket, |answer| matches!(answer, Unlisted::Finished(_))) {
        Unlisted::Finished(finished) => finished,
        other => panic!("{other:?}"),
    }
}

/// A connection: the connecting and the accepting end.
fn pair(ip: impl Into<IpAddr>) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((ip.into(), 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

/// Closes with a reset.
fn reset(socket: TcpStream) {
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).unwrap();
}

/// Whether this thread has these capabilities.
fn may(all: CapabilitySet) -> bool {
    capabilities(None).unwrap().effective.contains(all)
}

fn cookies() -> Vec<u64> {
    let mut cookies = Vec::new();
    let complete = Diag::open()
        .unwrap()
        .dump(Query::ALL, |entry| cookies.push(entry.cookie));
    assert!(complete.is_ok());
    cookies
}

#[test]
fn shut_down_and_finished_it_is_still_known() {
    for ip in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
    ] {
        for accepted in [false, true] {
            let (client, server) = pair(ip);
            let (mut held, mut other) = if accepted {
                (server, client)
            } else {
                (client, server)
            };
            let (local, remote) = (held.local_addr().unwrap(), held.peer_addr().unwrap());
            // With data on its way, too.
            held.write_all(b"question").unwrap();
            other.read_exact(&mut [0; 8]).unwrap();
            other.write_all(b"answer").unwrap();
            drop(other);
            held.read_to_end(&mut Vec::new()).unwrap();
            assert!(matches!(mine(&held), Unlisted::Open), "CLOSE_WAIT");
            let cookie = sockopt::socket_cookie(&held).unwrap();
            assert!(cookies().contains(&cookie));

            held.shutdown(Shutdown::Write).unwrap();

            let found = finished(&held);
            assert!(!cookies().contains(&cookie), "no table lists it");
            assert_eq!(found.cookie, cookie);
            assert_eq!(found.local, local);
            assert_eq!(found.remote, Some(remote));
            assert_eq!(found.shut_down, Some(true), "accepted: {accepted}");
            assert!(!found.error_unread);
            assert!(found.tcp_info.last_ack_recv_ms < 5000);
            let own = netns::own_inode().unwrap();
            let expected = may(CapabilitySet::NET_ADMIN).then_some(own);
            assert_eq!(found.netns, expected);
        }
    }
}

#[test]
fn its_age_is_known_by_the_last_ack() {
    let (client, server) = pair(Ipv4Addr::LOCALHOST);
    drop(client);
    thread::sleep(Duration::from_millis(300));
    server.shutdown(Shutdown::Write).unwrap();
    finished(&server);
    thread::sleep(Duration::from_millis(500));
    let age = finished(&server).tcp_info.last_ack_recv_ms;
    assert!(
        (450..800).contains(&age),
        "{age} ms, not since the peer's FIN"
    );
}

#[test]
fn ipv4_on_an_ipv6_socket_is_shown_as_ipv4() {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    let (server, _) = listener.accept().unwrap();
    let remote = client.local_addr().unwrap();
    drop(client);
    server.shutdown(Shutdown::Write).unwrap();
    let found = finished(&server);
    assert_eq!(
        found.local,
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)
    );
    assert_eq!(found.remote, Some(remote));
}

#[test]
fn a_fin_that_went_out_with_data_is_no_reset() {
    for accepted in [false, true] {
        let (client, server) = pair(Ipv4Addr::LOCALHOST);
        let (mut held, mut other) = if accepted {
            (server, client)
        } else {
            (client, server)
        };
        // More than goes out while the other side does not read: the FIN waits behind it.
        held.set_nonblocking(true).unwrap();
        while held.write(&[0; 65536]).is_ok() {}
        held.shutdown(Shutdown::Write).unwrap();
        other.read_to_end(&mut Vec::new()).unwrap();
        drop(other);
        let expected = if accepted { None } else { Some(true) };
        assert_eq!(finished(&held).shut_down, expected, "accepted: {accepted}");
    }
}

#[test]
fn a_reset_is_no_shutdown_and_its_error_stays_unread() {
    for (accepted, write, shut_down) in [
        (true, &b""[..], Some(false)),
        (true, b"answer", Some(false)),
        (false, b"", None),
        (false, b"question", None),
    ] {
        let (client, server) = pair(Ipv4Addr::LOCALHOST);
        let (mut held, mut other) = if accepted {
            (server, client)
        } else {
            (client, server)
        };
        let remote = held.peer_addr().unwrap();
        held.write_all(write).unwrap();
        other.read_exact(&mut vec![0; write.len()]).unwrap();
        reset(other);
        for _ in 0..2 {
            let found = finished(&held);
            assert!(found.error_unread);
            assert_eq!(found.shut_down, shut_down);
            assert_eq!(found.remote, Some(remote));
        }
        let error = held.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "not cleared");
        let found = finished(&held);
        assert!(!found.error_unread);
        assert_eq!(found.shut_down, shut_down);
    }
}

#[test]
fn what_never_was_connected_is_fresh() {
    let tcp = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap()
    };
    let is_fresh = |answer: &Unlisted| matches!(answer, Unlisted::Fresh);
    let here = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));

    let socket = tcp();
    assert!(is_fresh(&mine(&socket)), "new");
    rustix::net::bind(&socket, &here(0)).unwrap();
    assert!(is_fresh(&mine(&socket)), "bound");
    let nobody = SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();

    let refused = tcp();
    rustix::net::connect(&refused, &nobody).unwrap_err();
    wait_for(&refused, is_fresh);

    let listener = tcp();
    rustix::net::bind(&listener, &here(0)).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    assert!(matches!(mine(&listener), Unlisted::Open));
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
    assert!(is_fresh(&mine(&listener)), "listener, shut down");

    // connect(AF_UNSPEC) makes a connected socket new, and then it is refused.
    let (client, _server) = pair(Ipv4Addr::LOCALHOST);
    client.set_nonblocking(true).unwrap();
    rustix::net::connect_unspec(&client).unwrap();
    assert!(is_fresh(&mine(&client)), "disconnected");
    rustix::net::connect(&client, &nobody).unwrap_err();
    wait_for(&client, is_fresh);
}

#[test]
fn other_protocols_are_told_apart() {
    let (unix, _) = UnixStream::pair().unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(matches!(mine(&unix), Unlisted::NotTcp));
    assert!(matches!(mine(&udp), Unlisted::NotTcp));
}

/// A process that has `socket` as its descriptor 0, and nothing else in common with this one.
fn holder(socket: impl Into<OwnedFd>) -> Child {
    Command::new("sleep")
        .arg("60")
        .stdin(socket.into())
        .spawn()
        .unwrap()
}

#[test]
fn another_process_can_be_asked_as_long_as_it_holds_it() {
    let (client, server) = pair(Ipv4Addr::LOCALHOST);
    drop(client);
    server.shutdown(Shutdown::Write).unwrap();
    finished(&server);
    let mut child = holder(server.try_clone().unwrap());
    let handle = Handle::open(child.id()).unwrap();
    let descriptor = Descriptor {
        inode: fstat(&server).unwrap().st_ino as u32,
        tid: child.id(),
        fd: 0,
    };
    let another_inode = Descriptor {
        inode: descriptor.inode.wrapping_add(1),
        ..descriptor
    };
    let another_fd = Descriptor {
        fd: 99,
        ..descriptor
    };

    let answer = unlisted(&handle, descriptor);
    let of_another_inode = unlisted(&handle, another_inode);
    let of_another_fd = unlisted(&handle, another_fd);
    child.kill().unwrap();
    child.wait().unwrap();
    let of_the_dead = unlisted(&handle, descriptor);

    match answer.unwrap() {
        // Yama can forbid it.
        Unlisted::Refused(error) if !may(CapabilitySet::SYS_PTRACE) => {
            eprintln!("left out: another process's socket, without CAP_SYS_PTRACE: {error}");
        }
        Unlisted::Finished(found) => {
            assert_eq!(found.cookie, sockopt::socket_cookie(&server).unwrap());
        }
        other => panic!("{other:?}"),
    }
    for closed in [of_another_inode, of_another_fd, of_the_dead] {
        let closed = closed.unwrap();
        assert!(matches!(closed, Unlisted::Closed), "{closed:?}");
    }
}

#[test]
fn without_the_right_to_trace_it_is_refused() {
    if !may(CapabilitySet::SYS_PTRACE | CapabilitySet::SETUID | CapabilitySet::SETGID) {
        eprintln!("left out: a process that may be read, but not traced: needs root");
        return;
    }
    const NOBODY: u32 = 65534;

    let (client, server) = pair(Ipv4Addr::LOCALHOST);
    drop(client);
    server.shutdown(Shutdown::Write).unwrap();
    finished(&server);
    let mut child = Command::new("sleep")
        .arg("60")
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(OwnedFd::from(server.try_clone().unwrap()))
        .spawn()
        .unwrap();
    // Who may read /proc/PID is decided by the file system ids, who may trace by the real ones. All
    // this is of one thread.
    let ask = |with_uid: u32, descriptor| {
        let pid = child.id();
        let asking = thread::spawn(move || {
            let mut fewer = capabilities(None).unwrap();
            for set in [&mut fewer.effective, &mut fewer.permitted] {
                set.remove(CapabilitySet::SYS_PTRACE);
            }
            set_capabilities(None, fewer).unwrap();
            // SAFETY: these calls touch no memory.
            unsafe {
                libc::setfsgid(with_uid);
                libc::setfsuid(with_uid);
            }
            unlisted(&Handle::open(pid).unwrap(), descriptor).unwrap()
        });
        asking.join().unwrap()
    };
    let descriptor = Descriptor {
        inode: fstat(&server).unwrap().st_ino as u32,
        tid: child.id(),
        fd: 0,
    };
    let answers = [
        ask(NOBODY, descriptor),
        // Nor may this one look whether it is still open.
        ask(NOBODY - 1, descriptor),
    ];
    let another = Descriptor {
        inode: descriptor.inode.wrapping_add(1),
        ..descriptor
    };
    let closed = ask(NOBODY, another);
    child.kill().unwrap();
    child.wait().unwrap();

    let errors = answers.map(|answer| match answer {
        Unlisted::Refused(error) => error.raw_os_error(),
        other => panic!("{other:?}"),
    });
    assert_eq!(errors, [Some(libc::EPERM), Some(libc::EACCES)]);
    assert!(matches!(closed, Unlisted::Closed), "{closed:?}");
}

#[test]
fn an_answer_comes_back_as_it_was() {
    let finished = Finished {
        cookie: 0x1_0000_0002,
        netns: Some(4_026_531_840),
        local: "127.0.0.1:80".parse().unwrap(),
        remote: Some("[::1]:443".parse().unwrap()),
        shut_down: Some(true),
        error_unread: true,
        tcp_info: TcpInfo {
            last_data_sent_ms: 1,
            last_data_recv_ms: 2,
            last_ack_recv_ms: 3,
        },
    };
    let others = [
        Finished {
            netns: None,
            remote: None,
            shut_down: None,
            error_unread: false,
            ..finished
        },
        Finished {
            shut_down: Some(false),
            ..finished
        },
    ];
    for one in [finished].into_iter().chain(others) {
        match Answer::new(&Ok(Unlisted::Finished(one))).result() {
            Ok(Unlisted::Finished(back)) => assert_eq!(back, one),
            other => panic!("{other:?}"),
        }
    }
    let refused = || io::Error::from_raw_os_error(libc::EPERM);
    let back = |result| Answer::new(&result).result();
    assert!(matches!(back(Ok(Unlisted::NotTcp)), Ok(Unlisted::NotTcp)));
    assert!(matches!(back(Ok(Unlisted::Fresh)), Ok(Unlisted::Fresh)));
    assert!(matches!(back(Ok(Unlisted::Open)), Ok(Unlisted::Open)));
    assert!(matches!(back(Ok(Unlisted::Closed)), Ok(Unlisted::Closed)));
    match back(Ok(Unlisted::Refused(refused()))) {
        Ok(Unlisted::Refused(error)) => assert_eq!(error.raw_os_error(), Some(libc::EPERM)),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        back(Err(refused())).unwrap_err().raw_os_error(),
        Some(libc::EPERM)
    );
    let gone = io::Error::from_raw_os_error(libc::ENOENT);
    assert!(
        matches!(back(Err(gone)), Ok(Unlisted::Closed)),
        "the process"
    );
}
