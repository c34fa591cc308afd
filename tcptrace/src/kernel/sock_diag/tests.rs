use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::*;

/// The answers of Linux 6.18 on x86-64 to a dump with `tcp_info`: sequence number 7, IPv4 and IPv6.
const V4: &[u8] = include_bytes!("../../../testdata/sock_diag_v4.bin");
const V6: &[u8] = include_bytes!("../../../testdata/sock_diag_v6.bin");
const SEQUENCE: u32 = 7;

fn read(datagram: &[u8]) -> (Vec<Entry>, Answer) {
    let mut entries = Vec::new();
    let mut answer = Answer::new(SEQUENCE);
    answer.read(datagram, &mut |entry| entries.push(*entry));
    (entries, answer)
}

/// As `ss -tane` shows it, more or less.
fn line(entry: &Entry) -> String {
    let Entry {
        time: _,
        cookie,
        state,
        family,
        local,
        remote,
        recv_queue,
        send_queue,
        uid,
        inode,
        timer,
        expires_ms,
        retransmits,
        ..
    } = entry;
    let state = state.name();
    let mut line = format!(
        "{state} {recv_queue} {send_queue} {local} {remote} family:{family} timer:{timer:?},{expires_ms},{retransmits} uid:{uid} ino:{inode} sk:{cookie:x}"
    );
    if let Some(shutdown) = entry.shutdown {
        line += &format!(" shutdown:{shutdown}");
    }
    if let Some(cgroup) = entry.cgroup {
        line += &format!(" cgroup:{cgroup}");
    }
    if let Some(info) = entry.tcp_info {
        let TcpInfo {
            last_data_sent_ms: sent,
            last_data_recv_ms: received,
            last_ack_recv_ms: ack,
        } = info;
        line += &format!(" lastsnd:{sent} lastrcv:{received} lastack:{ack}");
    }
    line
}

#[test]
#[cfg(target_endian = "little")]
fn a_captured_dump_reads_as_ss_showed_it() {
    for (datagram, expected) in [
        (
            V4,
            &[
                "LISTEN 0 5 10.78.0.1:82 0.0.0.0:0 family:2 timer:None,0,0 uid:0 ino:1507964 sk:1369 shutdown:0 cgroup:1 lastsnd:0 lastrcv:0 lastack:0",
                "SYN_RECV 0 0 10.78.0.1:82 10.78.0.9:5555 family:2 timer:Retransmit,300,0 uid:0 ino:0 sk:136a",
                "FIN_WAIT2 0 0 127.0.0.1:44380 127.0.0.1:37067 family:2 timer:TimeWait,59804,0 uid:0 ino:0 sk:136b",
                "ESTABLISHED 20 0 127.0.0.1:41274 127.0.0.1:48665 family:2 timer:None,0,0 uid:0 ino:1507968 sk:136c shutdown:0 cgroup:1 lastsnd:700 lastrcv:300 lastack:300",
                "TIME_WAIT 0 0 127.0.0.1:54490 127.0.0.1:57383 family:2 timer:TimeWait,59800,0 uid:0 ino:0 sk:136d",
                "CLOSE_WAIT 1 0 127.0.0.1:37067 127.0.0.1:44380 family:2 timer:None,0,0 uid:0 ino:1507984 sk:136e shutdown:1 cgroup:1 lastsnd:200 lastrcv:200 lastack:200",
                "ESTABLISHED 1000 0 127.0.0.1:48665 127.0.0.1:41274 family:2 timer:None,0,0 uid:0 ino:1507969 sk:136f shutdown:0 cgroup:1 lastsnd:300 lastrcv:700 lastack:300",
            ][..],
        ),
        (
            V6,
            &[
                "FIN_WAIT2 0 0 [::1]:48056 [::1]:59215 family:10 timer:None,0,0 uid:65534 ino:1507992 sk:1370 shutdown:2 cgroup:1 lastsnd:200 lastrcv:200 lastack:196",
                "ESTABLISHED 0 0 [::1]:44458 [::1]:54971 family:10 timer:None,0,0 uid:0 ino:1507989 sk:1371 shutdown:0 cgroup:1 lastsnd:200 lastrcv:200 lastack:200",
                "TIME_WAIT 0 0 127.0.0.1:33665 127.0.0.1:48168 family:10 timer:TimeWait,59800,0 uid:0 ino:0 sk:1372",
                "ESTABLISHED 0 0 [::1]:54971 [::1]:44458 family:10 timer:None,0,0 uid:0 ino:1507990 sk:1373 shutdown:0 cgroup:1 lastsnd:200 lastrcv:200 lastack:200",
                "CLOSE_WAIT 1 0 [::1]:59215 [::1]:48056 family:10 timer:None,0,0 uid:65534 ino:1507993 sk:1374 shutdown:1 cgroup:1 lastsnd:200 lastrcv:200 lastack:200",
            ][..],
        ),
    ] {
        let (entries, answer) = read(datagram);
        let lines: Vec<_> = entries.iter().map(line).collect();
        assert_eq!(lines, expected);
        assert!(answer.done);
        assert!(matches!(answer.end(), Ok(Completeness::Complete)));
    }
}

/// One message with this kind, flags and body.
fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let header = MessageHeader {
        length: (size_of::<MessageHeader>() + body.len()) as u32,
        kind,
        flags,
        sequence,
        port: 0,
    };
    [header.as_bytes(), body].concat()
}

#[test]
fn the_end_of_a_dump_says_how_it_went() {
    let done = |errno: i32| message(NLMSG_DONE, 0, SEQUENCE, errno.as_bytes());
    let refused = |errno: i32| message(NLMSG_ERROR, 0, SEQUENCE, errno.as_bytes());
    let end = |datagram: &[u8]| {
        let (_, answer) = read(datagram);
        assert!(answer.done);
        answer.end()
    };
    assert!(matches!(end(&done(0)), Ok(Completeness::Complete)));
    // The module sock_diag or inet_diag is missing; tcp_diag is missing.
    assert!(matches!(end(&refused(-2)), Err(Error::NoTcpDiag)));
    assert!(matches!(end(&done(-2)), Err(Error::NoTcpDiag)));
    let unsupported = refused(-libc::EOPNOTSUPP);
    assert!(matches!(end(&unsupported), Err(Error::NoTcpDiag)));
    match end(&refused(-libc::EPERM)) {
        Err(Error::Refused(error)) => assert_eq!(error.raw_os_error(), Some(libc::EPERM)),
        other => panic!("{other:?}"),
    }
    let interrupted = message(NLMSG_DONE, NLM_F_DUMP_INTR, SEQUENCE, 0_i32.as_bytes());
    assert!(matches!(end(&interrupted), Ok(Completeness::Interrupted)));
}

#[test]
fn a_message_that_makes_no_sense_is_counted_and_the_rest_is_read() {
    let short = message(SOCK_DIAG_BY_FAMILY, 0, SEQUENCE, &[2; 71]);
    let datagram = [&short[..], &[0], V4].concat(); // a byte of padding
    let (entries, answer) = read(&datagram);
    assert_eq!(entries.len(), 7);
    assert!(answer.done);
    assert!(matches!(answer.end(), Err(Error::Malformed(1))));
}

#[test]
fn the_answer_to_an_earlier_request_is_not_this_one() {
    let mut answer = Answer::new(SEQUENCE + 1);
    answer.read(V4, &mut |entry| panic!("{entry:?}"));
    assert!(!answer.done);
}

/// xorshift64: the same bytes in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

#[test]
fn no_bytes_make_it_panic_or_go_on_forever() {
    let mut random = Random(0x7463_7074_7261_6365);
    // Cut anywhere.
    for length in 0..V4.len() {
        let (entries, _) = read(&V4[..length]);
        assert!(entries.len() <= 7);
    }
    // Real bytes with a few wrong ones.
    for _ in 0..20_000 {
        let mut datagram = if random.next() & 1 == 0 { V4 } else { V6 }.to_vec();
        for _ in 0..=random.below(8) {
            let at = random.below(datagram.len());
            datagram[at] = random.next() as u8;
        }
        let (entries, _) = read(&datagram);
        // A message takes 16 bytes at least.
        assert!(entries.len() <= datagram.len() / 16);
    }
    // No real bytes at all, as messages of the right kind and as they are.
    for _ in 0..20_000 {
        let length = random.below(512);
        let body: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        read(&body);
        read(&message(SOCK_DIAG_BY_FAMILY, 0, SEQUENCE, &body));
    }
}

#[test]
fn a_request_that_makes_no_sense_is_refused_and_the_next_one_is_answered() {
    let mut diag = Diag::open().unwrap();
    let mut dump = diag.ask(99, Query::ALL).unwrap();
    while dump.next(|_| {}).unwrap() {}
    let refused = dump.end();
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    assert!(diag.dump(Query::ALL, |_| {}).is_ok());
}

fn cookie(socket: &impl AsRawFd) -> u64 {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    cookie
}

fn find(states: &[State], cookie: u64) -> Option<Entry> {
    let query = Query {
        states: states.iter().fold(0, |mask, state| mask | state.bit()),
        tcp_info: true,
        ..Query::ALL
    };
    let mut found = None;
    let complete = Diag::open().unwrap().dump(query, |entry| {
        // Others may have changed their state since the kernel compared it.
        if entry.cookie == cookie {
            assert!(states.contains(&entry.state), "not asked for: {entry:?}");
            found = Some(*entry);
        }
    });
    assert!(matches!(complete, Ok(Completeness::Complete)));
    found
}

/// Looks until `look` finds something, for at most five seconds.
fn wait_for<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if let Some(found) = look() {
            return found;
        }
    }
    panic!("this never was: {what}");
}

fn wait_for_state(state: State, cookie: u64) -> Entry {
    wait_for(state.name(), || find(&[state], cookie))
}

#[test]
fn a_connection_is_shown_in_each_of_its_states() {
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    for (listen_on, connect_to) in [
        (v4, v4),
        (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
        (Ipv6Addr::UNSPECIFIED.into(), v4), // IPv4 on an IPv6 socket
    ] {
        let listener = match TcpListener::bind((listen_on, 0)) {
            Ok(listener) => listener,
            Err(error) if listen_on.is_ipv6() => {
                eprintln!("left out: IPv6 ({error})");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let port = listener.local_addr().unwrap().port();
        let remote = SocketAddr::new(connect_to, port);
        let client = TcpStream::connect(remote).unwrap();

        let listening = find(&State::ALL, cookie(&listener)).unwrap();
        assert_eq!(listening.state, State::Listen);
        assert_eq!(listening.local, SocketAddr::new(listen_on, port));
        assert_eq!(listening.remote.port(), 0);
        assert_eq!(listening.recv_queue, 1, "one connection waits for accept");

        let (server, client_addr) = listener.accept().unwrap();
        let client_addr = SocketAddr::new(client_addr.ip().to_canonical(), client_addr.port());
        let (server_cookie, client_cookie) = (cookie(&server), cookie(&client));
        let connected = find(&[State::Established], server_cookie).unwrap();
        assert_eq!(connected.local, remote);
        assert_eq!(connected.remote, client_addr);
        let family = if listen_on.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        assert_eq!(i32::from(connected.family), family);
        assert_ne!(connected.inode, 0);
        assert!(connected.tcp_info.is_some());
        assert!(!connected.is_timewait());

        // The server closes first: its timewait socket keeps family, cookie and addresses.
        drop(server);
        let half = wait_for_state(State::FinWait2, server_cookie);
        assert!(half.is_timewait());
        assert_eq!((half.local, half.remote), (remote, client_addr));
        let waiting = wait_for_state(State::CloseWait, client_cookie);
        assert_eq!(waiting.recv_queue, 1, "the FIN was not read");
        assert_eq!(waiting.shutdown, Some(1));

        drop(client);
        let last = wait_for_state(State::TimeWait, server_cookie);
        assert!(last.is_timewait());
        assert_eq!(i32::from(last.family), family);
        assert_eq!((last.local, last.remote), (remote, client_addr));
        assert!(
            (50_000..=60_000).contains(&last.expires_ms),
            "TIME_WAIT lasts 60 s, {} ms are left",
            last.expires_ms
        );
        assert_eq!((last.inode, last.uid), (0, 0));
        wait_for("the client is closed", || {
            find(&State::ALL, client_cookie).is_none().then_some(())
        });
    }
}

/// By ports; a listener has no remote one.
#[test]
fn the_kernel_leaves_out_other_ports() {
    let [listener, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let port = listener.local_addr().unwrap().port();
    let ours = [
        cookie(&listener),
        cookie(&server),
        cookie(&client),
        cookie(&other),
    ];
    for (local_port, remote_port, expected) in [
        (0, 0, [true, true, true, true]),
        (port, 0, [true, true, false, false]),
        (0, port, [false, false, true, false]),
        (port, port, [false; 4]),
    ] {
        let query = Query {
            local_port,
            remote_port,
            ..Query::ALL
        };
        let mut found = [false; 4];
        let each = |entry: &Entry| {
            if let Some(at) = ours.iter().position(|one| *one == entry.cookie) {
                found[at] = true;
            }
        };
        let _ = Diag::open().unwrap().dump(query, each).unwrap();
        assert_eq!(found, expected, "{local_port} {remote_port}");
    }
}

#[test]
fn what_was_sent_again_is_counted() {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, listen, socket_with};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // One connection fits into the queue of a backlog of 0. To the next one nobody answers.
    listen(&listener, 0).unwrap();
    let _first = TcpStream::connect(address).unwrap();
    wait_for("the queue is full", || {
        find(&[State::Listen], cookie(&listener)).filter(|entry| entry.recv_queue == 1)
    });
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let next = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    let start = Instant::now();
    connect(&next, &address).unwrap_err();
    let next = cookie(&next);
    let begun = find(&[State::SynSent], next).unwrap();
    assert_eq!(begun.timer, Timer::Retransmit);
    // The first SYN is sent again after a second, which a busy machine can let pass.
    if start.elapsed() < Duration::from_secs(1) {
        assert_eq!(begun.retransmits, 0);
    }
    wait_for("another SYN", || {
        find(&[State::SynSent], next).filter(|entry| entry.retransmits > begun.retransmits)
    });
}
