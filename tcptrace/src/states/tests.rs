//! Counting, grouping and showing, without a kernel.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
};

use serde_json::Value;

use super::*;
use crate::{
    event::{Comm, Holder, Tuple, address_bytes},
    select::{Sockets, Verdict},
};

const NETNS: u32 = 4_026_531_840;
const OTHER: u32 = 4_026_532_000;

/// A socket of a namespace. Its cookie is that of no other with other addresses.
fn seen(state: State, inode: u32, local: &str, remote: &str) -> Seen {
    let [local, remote] = [local, remote].map(|one| one.parse::<SocketAddr>().unwrap());
    let mut cookie = DefaultHasher::new();
    (local, remote).hash(&mut cookie);
    Seen {
        socket: Socket {
            cookie: cookie.finish(),
            netns: NETNS,
            tuple: Tuple {
                local_addr: address_bytes(local.ip()),
                remote_addr: address_bytes(remote.ip()),
                local_port: local.port(),
                remote_port: remote.port(),
            },
        },
        state,
        inode,
        cgroup: 0,
        uid: 33,
    }
}

fn listener(inode: u32, local: &str) -> Seen {
    let local: SocketAddr = local.parse().unwrap();
    let any = if local.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    seen(State::Listen, inode, &local.to_string(), any)
}

fn holder(inode: u32, pid: u32, fd: u32) -> Holder {
    Holder {
        inode,
        fd: Some(fd),
        pid,
        comm: Comm::new(format!("p{pid}").as_bytes()),
        start: 0,
        tree: false,
    }
}

fn report(options: &Options, sockets: &[Seen], holders: &[Holder]) -> Report {
    let mut table = Table::new(options);
    table.namespace(OTHER, Some("blue"));
    table.cgroup(1, Some("/system.slice/ssh.service"));
    table.cgroup(2, Some("/lxc/web"));
    table.cgroup(3, None);
    for socket in sockets {
        table.add(socket);
    }
    for holder in holders {
        if table.wants(holder.inode) {
            table.holder(holder);
        }
    }
    if options.needs_holders() {
        table.attribute();
    }
    let report = table.report(5_000_000_000, 2);
    if report.by.is_some() {
        let groups = report.groups.iter().map(|group| group.counts.sockets());
        assert_eq!(groups.sum::<u64>(), report.total.sockets(), "{report:?}");
    }
    report
}

fn by(by: By) -> Options {
    Options {
        by: Some(by),
        ..Options::default()
    }
}

/// The lines of a page, without the first.
fn lines(report: &Report, top: Option<usize>) -> Vec<String> {
    let page = compose(report, top, 0);
    page.lines().skip(1).map(str::to_owned).collect()
}

/// One socket in each state, and what a process, nobody or a listener has of it.
fn one_of_each() -> Vec<Seen> {
    let mut all = vec![listener(10, "0.0.0.0:80")];
    for (index, state) in State::ALL.into_iter().enumerate() {
        if state == State::Listen || state == State::Close {
            continue;
        }
        // Held.
        let inode = match state {
            State::TimeWait => 0,
            _ => 100,
        };
        let remote = format!("10.0.0.9:{}", 1000 + index);
        all.push(seen(state, inode, "10.0.0.1:40000", &remote));
        if state != State::TimeWait {
            // Of nobody.
            let remote = format!("10.0.0.9:{}", 2000 + index);
            all.push(seen(state, 0, "10.0.0.1:80", &remote));
        }
    }
    all
}

#[test]
fn every_state_is_counted() {
    let report = report(&Options::default(), &one_of_each(), &[]);
    assert_eq!(report.total.sockets(), 18);
    let mut orphaned = Vec::new();
    let mut not_accepted = Vec::new();
    for state in State::ALL {
        let count = report.total.of(state);
        let expected = match state {
            State::Close => 0,
            State::Listen | State::TimeWait => 1,
            _ => 2,
        };
        assert_eq!(count.sockets, expected, "{state:?}");
        orphaned.extend((count.orphaned > 0).then_some(state));
        not_accepted.extend((count.not_accepted > 0).then_some(state));
    }
    use State::{CloseWait, Closing, Established, FinWait1, FinWait2, LastAck};
    assert_eq!(orphaned, [FinWait1, FinWait2, LastAck, Closing]);
    assert_eq!(not_accepted, [Established, CloseWait]);
    let page = compose(&report, None, 0);
    assert!(
        page.starts_with("00:00:05 UTC  18 TCP sockets in 2 network namespaces\n"),
        "{page}"
    );
    for line in [
        "        2  ESTABLISHED  (1 not accepted)\n",
        "        2  FIN_WAIT2  (1 orphaned)\n",
        "        1  TIME_WAIT\n",
        "        2  SYN_RECV\n",
    ] {
        assert!(page.contains(line), "{page}");
    }
    assert!(!page.contains("CLOSE\n"), "{page}");
}

/// What a dump shows twice is one socket; what has the cookie of another and other ports is another.
#[test]
fn a_socket_is_counted_once() {
    let one = |seen: Seen| Seen {
        socket: Socket {
            cookie: 7,
            ..seen.socket
        },
        ..seen
    };
    let now = seen(State::Established, 5, "10.0.0.1:40000", "10.0.0.2:80");
    let later = Seen {
        state: State::CloseWait,
        ..now
    };
    let before = seen(State::TimeWait, 0, "10.0.0.1:40001", "10.0.0.2:80");
    let report = report(
        &Options::default(),
        &[now, later, before, now].map(one),
        &[],
    );
    assert_eq!(report.total.sockets(), 2);
    assert_eq!(report.total.of(State::Established).sockets, 1);
    assert_eq!(report.total.of(State::TimeWait).sockets, 1);
}

#[test]
fn shared_sockets_are_in_one_line() {
    let sockets = [
        seen(State::CloseWait, 5, "10.0.0.1:1", "10.0.0.2:80"),
        seen(State::CloseWait, 6, "10.0.0.1:2", "10.0.0.2:80"),
        seen(State::Established, 7, "10.0.0.1:3", "10.0.0.2:80"),
        seen(State::TimeWait, 0, "10.0.0.1:4", "10.0.0.2:80"),
        seen(State::SynSent, 8, "10.0.0.1:5", "10.0.0.2:80"),
    ];
    let holders = [
        holder(6, 20, 4),
        holder(5, 20, 3),
        holder(5, 10, 3),
        holder(5, 10, 9),
        holder(6, 10, 4),
        holder(7, 20, 5),
        holder(999, 30, 5),
    ];
    let report = report(&by(By::Process), &sockets, &holders);
    assert_eq!(
        lines(&report, None),
        [
            "  SOCKETS  PROCESS                            STATES",
            "        2  p10 (pid 10), p20 (pid 20)         CLOSE_WAIT 2",
            "        1  p20 (pid 20)                       ESTABLISHED 1",
            "        1  no process                         TIME_WAIT 1",
            "        1  no process found (made by uid 33)  SYN_SENT 1",
        ]
    );
}

#[test]
fn what_waits_at_a_listener_is_its_holder_s() {
    let sockets = [
        listener(10, "0.0.0.0:80"),
        listener(11, "10.0.0.1:80"),
        listener(12, "[::]:80"),
        listener(13, "[::]:81"),
        // One whose holder is not found.
        listener(14, "[::]:82"),
        seen(State::Established, 0, "10.0.0.1:80", "10.0.0.2:1"),
        seen(State::CloseWait, 0, "10.0.0.3:80", "10.0.0.2:2"),
        seen(State::SynRecv, 0, "[fd00::1]:80", "[fd00::2]:3"),
        seen(State::Established, 0, "10.0.0.1:81", "10.0.0.2:4"),
        seen(State::Established, 0, "10.0.0.1:82", "10.0.0.2:5"),
        // Nothing listens there any more.
        seen(State::Established, 0, "10.0.0.1:83", "10.0.0.2:6"),
        // It is no listener's: its process has closed it.
        seen(State::FinWait2, 0, "10.0.0.1:80", "10.0.0.2:7"),
    ];
    let holders: Vec<Holder> = (10..14).map(|inode| holder(inode, inode, 3)).collect();
    let report = report(&by(By::Process), &sockets, &holders);
    let mut lines = lines(&report, None);
    lines.remove(0);
    lines.sort();
    let lines: Vec<&str> = lines.iter().map(|line| line.trim()).collect();
    assert_eq!(
        lines,
        [
            "2  no process                         ESTABLISHED 1 (1 not accepted), FIN_WAIT2 1 (1 orphaned)",
            "2  no process found (made by uid 33)  ESTABLISHED 1 (1 not accepted), LISTEN 1",
            "2  p10 (pid 10)                       CLOSE_WAIT 1 (1 not accepted), LISTEN 1",
            "2  p11 (pid 11)                       ESTABLISHED 1 (1 not accepted), LISTEN 1",
            "2  p12 (pid 12)                       SYN_RECV 1, LISTEN 1",
            "2  p13 (pid 13)                       ESTABLISHED 1 (1 not accepted), LISTEN 1",
        ]
    );
}

#[test]
fn ports_are_those_of_the_service() {
    let sockets = [
        listener(10, "0.0.0.0:80"),
        seen(State::Established, 5, "10.0.0.1:80", "10.0.0.2:50000"),
        seen(State::Established, 6, "10.0.0.1:80", "10.0.0.2:50001"),
        seen(State::TimeWait, 0, "10.0.0.1:50002", "10.0.0.2:80"),
        // The same port in another namespace, where nothing listens.
        Seen {
            socket: Socket {
                netns: OTHER,
                cookie: 8,
                ..seen(State::Close, 0, "10.0.0.1:80", "10.0.0.2:443").socket
            },
            ..seen(State::Established, 9, "10.0.0.1:80", "10.0.0.2:443")
        },
    ];
    let by_port = report(&by(By::Port), &sockets, &[]);
    assert_eq!(
        lines(&by_port, None),
        [
            "  SOCKETS  PORT        STATES",
            "        3  local 80    ESTABLISHED 2, LISTEN 1",
            "        1  remote 80   TIME_WAIT 1",
            "        1  remote 443  ESTABLISHED 1",
        ]
    );
    let by_netns = report(&by(By::Netns), &sockets, &[]);
    assert_eq!(
        lines(&by_netns, None),
        [
            "  SOCKETS  NETWORK NAMESPACE  STATES",
            "        4  4026531840         ESTABLISHED 2, TIME_WAIT 1, LISTEN 1",
            "        1  4026532000 (blue)  ESTABLISHED 1",
        ]
    );
    let by_remote = report(&by(By::Remote), &sockets, &[]);
    assert_eq!(
        lines(&by_remote, None),
        [
            "  SOCKETS  REMOTE            STATES",
            "        4  10.0.0.2          ESTABLISHED 3, TIME_WAIT 1",
            "        1  none (listening)  LISTEN 1",
        ]
    );
}

#[test]
fn containers_are_those_of_the_cgroup() {
    let sockets = [0, 1, 2, 2, 3]
        .iter()
        .enumerate()
        .map(|(index, cgroup)| Seen {
            cgroup: *cgroup,
            ..seen(
                State::Established,
                5,
                "10.0.0.1:80",
                &format!("10.0.0.2:{}", index + 1),
            )
        });
    let sockets: Vec<Seen> = sockets.collect();
    let all = report(&by(By::Container), &sockets, &[]);
    assert_eq!(
        lines(&all, None),
        [
            "  SOCKETS  CONTAINER     STATES",
            "        2  web           ESTABLISHED 2",
            "        2  not known     ESTABLISHED 2",
            "        1  no container  ESTABLISHED 1",
        ]
    );
    let mut options = Options::default();
    options.selection.containers = vec!["we".to_owned()];
    assert_eq!(report(&options, &sockets, &[]).total.sockets(), 2);
}

#[test]
fn the_rest_is_counted() {
    let sockets: Vec<Seen> = (1..=5_u16)
        .flat_map(|one| (0..one).map(move |other| (one, other)))
        .map(|(one, other)| {
            let remote = format!("10.0.0.{one}:{}", 1000 + other);
            let state = if one == 2 {
                State::LastAck
            } else {
                State::TimeWait
            };
            seen(state, 0, "10.0.0.9:1", &remote)
        })
        .collect();
    let report = report(&by(By::Remote), &sockets, &[]);
    assert_eq!(
        lines(&report, Some(2)),
        [
            "  SOCKETS  REMOTE              STATES",
            "        5  10.0.0.5            TIME_WAIT 5",
            "        4  10.0.0.4            TIME_WAIT 4",
            "        6  ... 3 more remotes  TIME_WAIT 4, LAST_ACK 2 (2 orphaned)",
        ]
    );
    let all = lines(&report, Some(5));
    assert_eq!(all.len(), 6, "{all:?}");
    assert_eq!(all, lines(&report, None));
    let one_more = lines(&report, Some(4));
    assert!(one_more[5].contains("  ... 1 more remote "), "{one_more:?}");
}

#[test]
fn filters_by_process_need_a_holder() {
    let sockets = [
        listener(10, "0.0.0.0:80"),
        seen(State::Established, 0, "10.0.0.1:80", "10.0.0.2:1"),
        seen(State::Established, 5, "10.0.0.1:80", "10.0.0.2:2"),
        seen(State::TimeWait, 0, "10.0.0.1:80", "10.0.0.2:3"),
    ];
    let holders = [holder(10, 20, 3), holder(5, 30, 4), holder(5, 20, 4)];
    let count = |change: fn(&mut Selection)| {
        let mut options = Options::default();
        change(&mut options.selection);
        report(&options, &sockets, &holders).total.sockets()
    };
    assert_eq!(count(|_| {}), 4);
    assert_eq!(count(|selection| selection.pids = vec![20]), 3);
    assert_eq!(count(|selection| selection.pids = vec![30]), 1);
    assert_eq!(count(|selection| selection.pids = vec![40]), 0);
    assert_eq!(
        count(|selection| selection.comms = vec![Comm::new(b"p20")]),
        3
    );
    assert_eq!(
        count(|selection| selection.states = vec![State::TimeWait]),
        1
    );
    // Listeners are known all the same.
    let one_state = |selection: &mut Selection| {
        selection.states = vec![State::Established];
        selection.pids = vec![20];
    };
    assert_eq!(count(one_state), 2);
    assert_eq!(
        count(|selection| selection.sockets.remote_ports = vec![2]),
        1
    );
}

#[test]
fn descriptors_are_listed() {
    let sockets = [
        seen(State::Established, 5, "10.0.0.1:80", "10.0.0.2:2"),
        seen(State::Established, 0, "10.0.0.1:80", "10.0.0.2:3"),
        seen(State::TimeWait, 0, "10.0.0.1:80", "10.0.0.2:4"),
        listener(10, "0.0.0.0:80"),
    ];
    // A report wants the listener first.
    let sockets = [sockets[3], sockets[0], sockets[1], sockets[2]];
    let holders = [holder(10, 20, 3), holder(5, 20, 4), holder(5, 20, 7)];
    let options = Options {
        fds: true,
        ..by(By::Process)
    };
    let one = report(&options, &sockets, &holders);
    assert_eq!(
        lines(&one, None),
        [
            "  SOCKETS  PROCESS       STATES",
            "        3  p20 (pid 20)  ESTABLISHED 2 (1 not accepted), LISTEN 1",
            "           fd 3     LISTEN      0.0.0.0:80 > *",
            "           fd 4, fd 7 ESTABLISHED 10.0.0.1:80 > 10.0.0.2:2",
            "           no fd    ESTABLISHED 10.0.0.1:80 > 10.0.0.2:3",
            "        1  no process    TIME_WAIT 1",
            "           no fd    TIME_WAIT   10.0.0.1:80 > 10.0.0.2:4",
        ]
    );
    // Of several processes, it is said whose descriptor it is.
    let shared = [holder(5, 20, 4), holder(5, 21, 4)];
    let two = lines(&report(&options, &sockets[1..2], &shared), None);
    assert_eq!(
        two[2],
        "           fd 4 of 20, fd 4 of 21 ESTABLISHED 10.0.0.1:80 > 10.0.0.2:2"
    );
    let many: Vec<Holder> = (1..=7).map(|fd| holder(5, 20, fd)).collect();
    let many = lines(&report(&options, &sockets[1..2], &many), None);
    assert!(many[2].contains("fd 5 and 2 more "), "{many:?}");
}

/// A name cannot reach the terminal as a command, and does not shift what is beside it.
#[test]
fn names_are_made_printable() {
    let sockets = [
        seen(State::Established, 5, "10.0.0.1:80", "10.0.0.2:2"),
        seen(State::Established, 6, "10.0.0.1:80", "10.0.0.2:3"),
    ];
    let named = |inode, pid, name: &[u8]| Holder {
        comm: Comm::new(name),
        ..holder(inode, pid, 3)
    };
    let holders = [
        named(5, 20, b"\x1b[2J\n\xff"),
        named(6, 21, "日本".as_bytes()),
    ];
    let report = report(&by(By::Process), &sockets, &holders);
    let shown = lines(&report, None);
    assert_eq!(
        shown[1..],
        [
            r"        1  \u{1b}[2J\n\xff (pid 20)  ESTABLISHED 1",
            "        1  日本 (pid 21)             ESTABLISHED 1",
        ]
    );
}

fn json(report: &Report, top: Option<usize>) -> Vec<Value> {
    let mut lines = Vec::new();
    write_json(&mut lines, report, top, 0);
    let lines = String::from_utf8(lines).unwrap();
    let lines = lines.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn json_lines() {
    let options = Options {
        fds: true,
        ..by(By::Process)
    };
    let sockets = [
        seen(State::CloseWait, 5, "10.0.0.1:1", "10.0.0.2:80"),
        seen(State::CloseWait, 6, "10.0.0.1:2", "10.0.0.2:80"),
        seen(State::FinWait2, 0, "10.0.0.1:3", "10.0.0.2:80"),
        seen(State::Established, 7, "10.0.0.1:4", "10.0.0.2:80"),
    ];
    let holders = [holder(5, 20, 3), holder(6, 20, 4)];
    let report = report(&options, &sockets, &holders);
    let lines = json(&report, None);
    let events: Vec<&str> = lines
        .iter()
        .map(|line| line["event"].as_str().unwrap())
        .collect();
    let (one, group) = ("states_socket", "states_group");
    assert_eq!(events, [one, one, group, one, group, one, group, "states"]);
    let cookie = format!("{:x}", sockets[0].socket.cookie);
    assert_eq!(
        lines[0],
        serde_json::json!({
            "event": "states_socket", "time": "1970-01-01T00:00:05.000000000Z", "socket": cookie, "netns": NETNS,
            "local": {"addr": "10.0.0.1", "port": 1}, "remote": {"addr": "10.0.0.2", "port": 80},
            "state": "CLOSE_WAIT", "fds": [{"pid": 20, "fd": 3}],
        })
    );
    assert_eq!(
        lines[2],
        serde_json::json!({
            "event": "states_group", "time": "1970-01-01T00:00:05.000000000Z", "by": "process",
            "holder": "process", "pid": 20, "comm": "p20", "holders": [{"pid": 20, "comm": "p20"}],
            "sockets": 2, "states": {"CLOSE_WAIT": 2}, "orphaned": {}, "not_accepted": {},
        })
    );
    assert_eq!(lines[4]["holder"], "none");
    assert_eq!(lines[4]["orphaned"], serde_json::json!({"FIN_WAIT2": 1}));
    assert_eq!(lines[6]["holder"], "not_found");
    assert_eq!(lines[6]["uid"], 33);
    assert_eq!(lines[6]["pid"], Value::Null);
    assert_eq!(
        lines[7],
        serde_json::json!({
            "event": "states", "time": "1970-01-01T00:00:05.000000000Z", "by": "process", "groups": 3,
            "namespaces": 2, "sockets": 4, "states": {"CLOSE_WAIT": 2, "FIN_WAIT2": 1, "ESTABLISHED": 1},
            "orphaned": {"FIN_WAIT2": 1}, "not_accepted": {},
        })
    );
    let top = json(&report, Some(1));
    assert_eq!(top[3]["rest"], 2);
    assert_eq!(top[3]["sockets"], 2);
    assert!(top[3].get("pid").is_none(), "{}", top[3]);
    assert_eq!(top[4], lines[7], "all is counted");
}

/// The kernel is asked for all that a filter lets through.
#[test]
fn no_port_is_left_out() {
    let lists: [&[u16]; 4] = [&[], &[1], &[2], &[1, 2]];
    for (ports, local_ports, remote_ports) in lists.iter().flat_map(|ports| {
        let pairs = lists
            .iter()
            .flat_map(|local| lists.iter().map(move |remote| (local, remote)));
        pairs.map(move |(local, remote)| (ports, local, remote))
    }) {
        let sockets = Sockets {
            ports: ports.to_vec(),
            local_ports: local_ports.to_vec(),
            remote_ports: remote_ports.to_vec(),
            ..Sockets::default()
        };
        for (local, remote) in (1..=3).flat_map(|local| (1..=3).map(move |remote| (local, remote)))
        {
            let (here, there) = (format!("10.0.0.1:{local}"), format!("10.0.0.2:{remote}"));
            let one = seen(State::Established, 5, &here, &there);
            let is_asked_for = look::ports(&sockets).any(|(wanted_local, wanted_remote)| {
                [0, local].contains(&wanted_local) && [0, remote].contains(&wanted_remote)
            });
            let is_wanted = sockets.socket(&one.socket) == Verdict::Yes;
            assert!(is_asked_for || !is_wanted, "{sockets:?}: {here} {there}");
        }
    }
}
