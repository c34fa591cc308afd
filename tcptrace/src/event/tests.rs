//! Records from the ring buffer, and events in a recording.

use kernel::{Caller, Header};
use zerocopy::IntoBytes as _;

use super::*;

fn header(kind: Kind) -> Header {
    let mut comm = [0; 16];
    comm[..4].copy_from_slice(b"curl");
    Header {
        time: 5_421_517_609_713,
        cookie: 0xff_1002,
        cgroup: 77,
        start: 239_757_177,
        local_addr: address_bytes("10.0.0.1".parse().unwrap()),
        remote_addr: address_bytes("fe80::7".parse().unwrap()),
        comm,
        netns: 4_026_531_840,
        inode: 1_774_039,
        pid: 4242,
        uid: 1000,
        local_port: 40_000,
        remote_port: 80,
        kind: kind as u8,
        family: 2,
        flags: 0,
    }
}

fn transition_record() -> kernel::Transition {
    kernel::Transition {
        header: header(Kind::Transition),
        error: 104,
        stale_port: 40_000,
        old: State::Established as u8,
        new: State::CloseWait as u8,
        shutdown: 1,
        reserved: 0,
    }
}

fn time_wait_record(kind: Kind) -> kernel::TimeWait {
    kernel::TimeWait {
        header: header(kind),
        jiffies: 4_296_248_246,
        expires: 4_296_263_246,
        entry_stamp: 5_424_040,
        substate: State::FinWait2 as u8,
        callers: Caller::Segment.bit(),
        reserved: [0; 2],
    }
}

/// A record of each kind.
fn records() -> [Vec<u8>; 4] {
    [
        transition_record().as_bytes().to_vec(),
        header(Kind::Accept).as_bytes().to_vec(),
        time_wait_record(Kind::TimeWaitArmed).as_bytes().to_vec(),
        time_wait_record(Kind::TimeWaitDone).as_bytes().to_vec(),
    ]
}

fn expected_socket() -> Socket {
    Socket {
        cookie: 0xff_1002,
        netns: 4_026_531_840,
        tuple: Tuple {
            local_addr: address_bytes("10.0.0.1".parse().unwrap()),
            remote_addr: address_bytes("fe80::7".parse().unwrap()),
            local_port: 40_000,
            remote_port: 80,
        },
    }
}

fn expected_task() -> Task {
    Task {
        pid: 4242,
        comm: Comm::new(b"curl"),
        start: 239_757_177,
        uid: 1000,
        kthread: false,
        exiting: false,
        tree: false,
    }
}

#[test]
fn every_field_of_a_transition_arrives() {
    let expected = Transition {
        time: 5_421_517_609_713,
        socket: expected_socket(),
        old: State::Established,
        new: State::CloseWait,
        error: 104,
        stale_port: 40_000,
        no_time_wait: false,
        shutdown: 1,
        owned: false,
        has_socket: false,
        inode: 1_774_039,
        cgroup: 77,
        task: expected_task(),
    };
    let mut record = transition_record();
    assert_eq!(decode(record.as_bytes()), Ok(Event::Transition(expected)));
    for flag in [
        Flags::OWNED,
        Flags::HAS_SOCKET,
        Flags::KTHREAD,
        Flags::NO_TIME_WAIT,
        Flags::EXITING,
        Flags::IN_TREE,
    ] {
        record.header.flags = flag;
        let task = Task {
            kthread: flag == Flags::KTHREAD,
            exiting: flag == Flags::EXITING,
            tree: flag == Flags::IN_TREE,
            ..expected.task
        };
        let expected = Transition {
            owned: flag == Flags::OWNED,
            has_socket: flag == Flags::HAS_SOCKET,
            no_time_wait: flag == Flags::NO_TIME_WAIT,
            task,
            ..expected
        };
        assert_eq!(decode(record.as_bytes()), Ok(Event::Transition(expected)));
    }
}

#[test]
fn every_field_of_an_accept_arrives() {
    assert_eq!(
        decode(header(Kind::Accept).as_bytes()),
        Ok(Event::Accept(Accept {
            time: 5_421_517_609_713,
            socket: expected_socket(),
            inode: 1_774_039,
            task: expected_task(),
        }))
    );
}

#[test]
fn every_field_of_a_timewait_record_arrives() {
    let expected = TimeWait {
        time: 5_421_517_609_713,
        socket: expected_socket(),
        jiffies: 4_296_248_246,
        expires: 4_296_263_246,
        entry_stamp: 5_424_040,
        substate: State::FinWait2,
        callers: Caller::Segment.bit(),
    };
    let [_, _, armed, done] = records();
    assert_eq!(decode(&armed), Ok(Event::TimeWaitArmed(expected)));
    assert_eq!(decode(&done), Ok(Event::TimeWaitDone(expected)));
}

#[test]
fn every_state_arrives_as_itself() {
    for old in State::ALL {
        for new in State::ALL {
            let mut record = transition_record();
            (record.old, record.new) = (old as u8, new as u8);
            let Ok(Event::Transition(transition)) = decode(record.as_bytes()) else {
                panic!("{old:?} > {new:?}");
            };
            assert_eq!((transition.old, transition.new), (old, new));
        }
    }
}

#[test]
fn a_state_number_without_a_state_is_an_error() {
    for number in (0..=u8::MAX).filter(|number| !(1..=11).contains(number)) {
        let error = Err(DecodeError::State(number));
        let mut record = transition_record();
        record.old = number;
        assert_eq!(decode(record.as_bytes()), error);
        let mut record = transition_record();
        record.new = number;
        assert_eq!(decode(record.as_bytes()), error);
        let mut record = time_wait_record(Kind::TimeWaitDone);
        record.substate = number;
        assert_eq!(decode(record.as_bytes()), error);
    }
}

#[test]
fn a_kind_that_is_not_known_is_an_error() {
    for mut record in records() {
        let len = record.len();
        for kind in (0..=u8::MAX).filter(|kind| !(1..=4).contains(kind)) {
            record[100] = kind;
            assert_eq!(decode(&record), Err(DecodeError::Kind { kind, len }));
        }
    }
}

#[test]
fn any_other_length_is_an_error() {
    for record in records() {
        for len in 0..record.len() {
            let error = decode(&record[..len]).unwrap_err();
            match error {
                DecodeError::Short(short) => assert!(short == len && len < size_of::<Header>()),
                DecodeError::Kind { len: wrong, .. } => assert_eq!(wrong, len),
                DecodeError::State(_) => panic!("{len}: {error}"),
            }
        }
        for more in 1..=32 {
            let mut long = record.clone();
            long.resize(record.len() + more, 0);
            assert!(decode(&long).is_err(), "{} + {more}", record.len());
        }
    }
}

#[test]
fn a_record_need_not_be_aligned() {
    for record in records() {
        let expected = decode(&record);
        assert!(expected.is_ok());
        for offset in 1..8 {
            let mut shifted = vec![0xff; offset];
            shifted.extend_from_slice(&record);
            assert_eq!(decode(&shifted[offset..]), expected, "offset {offset}");
        }
    }
}

/// xorshift64*: the same numbers every time.
fn random(state: &mut u64) -> u8 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
}

#[test]
fn no_bytes_make_it_panic() {
    let mut state = 0x1234_5678_9abc_def1;
    for len in 0..=200 {
        for _ in 0..100 {
            let mut bytes: Vec<u8> = (0..len).map(|_| random(&mut state)).collect();
            let _ = decode(&bytes);
            // A kind that is known gets further.
            if let Some(kind) = bytes.get_mut(100) {
                *kind = 1 + *kind % 4;
                let _ = decode(&bytes);
            }
        }
    }
}

#[test]
fn no_flipped_byte_makes_it_panic_and_what_decodes_can_be_recorded() {
    for record in records() {
        for at in 0..record.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = record.clone();
                bytes[at] ^= flip;
                if let Ok(event) = decode(&bytes) {
                    assert_round_trip(&event);
                }
            }
        }
    }
}

#[test]
fn errors_say_what_was_there() {
    assert_eq!(DecodeError::Short(3).to_string(), "a record of 3 bytes");
    let kind = DecodeError::Kind { kind: 9, len: 104 };
    assert_eq!(kind.to_string(), "a record of kind 9 with 104 bytes");
    let state = DecodeError::State(12);
    assert_eq!(state.to_string(), "a record with TCP state number 12");
}

#[track_caller]
fn assert_round_trip(event: &Event) {
    let line = serde_json::to_string(event).unwrap();
    assert!(!line.contains('\n'), "one line: {line}");
    let back: Event = serde_json::from_str(&line).unwrap();
    assert_eq!(&back, event, "{line}");
}

fn every_event() -> Vec<Event> {
    let mut events: Vec<Event> = records()
        .iter()
        .map(|record| decode(record).unwrap())
        .collect();
    events.extend([
        Event::Start(Box::new(Start {
            schema: SCHEMA,
            version: "0.1.0".into(),
            time: u64::MAX,
            boot_to_utc_ns: i64::MIN,
            boot_to_monotonic_ns: -5,
            boot_id: "1c26c332".into(),
            host: "a \"host\"\n".into(),
            kernel: "6.18.0".into(),
            hz: 250,
            netns: 4_026_531_840,
            transitions: false,
            private_pids: true,
            stacks: false,
            time_wait: Probes::Functions,
            accept: Probes::None,
            sockets: Sockets {
                ports: vec![1],
                local_ports: vec![2, 3],
                remote_ports: vec![65_535],
                networks: vec![crate::select::Cidr::new("10.0.0.0".parse().unwrap(), 8).unwrap()],
                family: Some(6),
                netns: vec![1, 2],
            },
        })),
        Event::Look(Look {
            time: 1,
            scope: Scope::All,
        }),
        Event::Look(Look {
            time: 1,
            scope: Scope::TimeWait,
        }),
        Event::Look(Look {
            time: 1,
            scope: Scope::States([State::CloseWait, State::SynSent].into_iter().collect()),
        }),
        Event::Process(Box::default()),
        Event::Process(Box::new(Process {
            pid: 4,
            start: 5,
            exe: Some("/usr/bin/java".into()),
            cmdline: Some("java -jar \"a b\"".into()),
            uid: Some(1000),
            unit: Some("api.service".into()),
            container: Some("4f1d".into()),
            fd_limit: Some(u64::MAX),
            fds: Some(3),
            ns_pids: vec![4, 1],
            netns: Some(4_026_531_840),
        })),
        Event::Socket(Row {
            time: 2,
            socket: expected_socket(),
            state: State::Listen,
            inode: 3,
            cgroup: 0,
            time_wait_ms: None,
            detail: Some(Detail {
                within_ms: 1,
                recv_queue: 1,
                send_queue: u32::MAX,
                retransmits: 255,
                uid: 1000,
                last_data_sent_ms: Some(0),
                last_ack_recv_ms: None,
                orderly: Some(false),
            }),
        }),
        Event::Socket(Row {
            time: 2,
            socket: expected_socket(),
            state: State::TimeWait,
            inode: 0,
            cgroup: 9,
            time_wait_ms: Some(0),
            detail: None,
        }),
        Event::Holder(Holder {
            inode: 3,
            fd: Some(7),
            pid: 4,
            comm: Comm::new(b"nginx"),
            start: 5,
            tree: true,
        }),
        Event::LookEnd {
            time: 6,
            netns: vec![],
        },
        Event::LookEnd {
            time: 6,
            netns: vec![1, u32::MAX],
        },
        Event::Overflow {
            time: 7,
            netns: 1,
            count: u64::MAX,
        },
        Event::Cgroup {
            id: 8,
            path: "/a b/\u{1b}".into(),
        },
        Event::Lost(Lost {
            time: 9,
            records: 10,
            missed: 0,
        }),
        Event::Lost(Lost {
            time: 9,
            records: 0,
            missed: 11,
        }),
        Event::Clock {
            time: 12,
            boot_to_utc_ns: 13,
            boot_to_monotonic_ns: -14,
        },
        Event::Tick { time: 15 },
        Event::End(End {
            time: 16,
            records: 17,
            lost: 18,
            mptcp: 19,
        }),
    ]);
    events
}

#[test]
fn every_event_survives_a_recording() {
    let events = every_event();
    let kinds: std::collections::HashSet<_> = events.iter().map(std::mem::discriminant).collect();
    // As many as `Event` has: one that is added belongs into the list above.
    assert_eq!(kinds.len(), 16);
    for event in &events {
        assert_round_trip(event);
    }
}

#[test]
fn a_recording_tells_the_time_of_each_event_but_of_the_timeless() {
    for event in every_event() {
        let timeless = matches!(
            event,
            Event::Holder(_) | Event::Process(_) | Event::Cgroup { .. }
        );
        assert_eq!(event.time().is_none(), timeless, "{event:?}");
    }
}

#[test]
fn the_lines_of_a_recording_stay_readable() {
    // A later program must still read these.
    let line = r#"{"event":"transition","time":5423986626857,"cookie":"10fba","netns":4026532247,"local_addr":"127.0.0.1","remote_addr":"::1","local_port":48290,"remote_port":7777,"old":"SYN_SENT","new":"ESTABLISHED","shutdown":0,"owned":true,"has_socket":true,"inode":1774039,"cgroup":1,"task":{"pid":21140,"comm":"python3","start":5423879465299,"uid":0,"kthread":true,"exiting":true,"tree":true}}"#;
    let event: Event = serde_json::from_str(line).unwrap();
    assert_eq!(serde_json::to_string(&event).unwrap(), line);
    let line = r#"{"event":"time_wait_done","time":1,"cookie":"2","netns":3,"local_addr":"127.0.0.1","remote_addr":"127.0.0.1","local_port":7777,"remote_port":40000,"jiffies":4296248509,"expires":4296263484,"entry_stamp":5424992,"substate":"TIME_WAIT","callers":32}"#;
    let event: Event = serde_json::from_str(line).unwrap();
    assert_eq!(serde_json::to_string(&event).unwrap(), line);
    // Of a change in softirq nobody is told.
    let line = r#"{"event":"transition","time":1,"cookie":"2","netns":3,"local_addr":"127.0.0.1","remote_addr":"127.0.0.1","local_port":1,"remote_port":2,"old":"SYN_RECV","new":"ESTABLISHED","shutdown":0,"owned":false,"has_socket":false,"inode":0,"cgroup":1}"#;
    let event: Event = serde_json::from_str(line).unwrap();
    assert_eq!(serde_json::to_string(&event).unwrap(), line);
    // Of newer programs, additions.
    let more = line.replacen("\"time\"", "\"new_field\":[1],\"time\"", 1);
    assert_eq!(serde_json::from_str::<Event>(&more).unwrap(), event);
    // Of older ones, omissions: an older recorder knew fewer filters.
    let sockets: Sockets = serde_json::from_str("{}").unwrap();
    assert_eq!(sockets, Sockets::default());
}

#[test]
fn what_is_no_event_is_an_error() {
    for line in [
        "",
        "{}",
        "[]",
        "null",
        r#"{"event":"tick"}"#,
        r#"{"event":"tock","time":1}"#,
        r#"{"event":"tick","time":-1}"#,
        r#"{"event":"socket","time":1,"cookie":"xyz","netns":1,"local_addr":"::","remote_addr":"::","local_port":1,"remote_port":1,"state":"LISTEN","inode":1}"#,
        r#"{"event":"socket","time":1,"cookie":"1","netns":1,"local_addr":"::","remote_addr":"::","local_port":1,"remote_port":1,"state":"LISTENING","inode":1}"#,
        r#"{"event":"socket","time":1,"cookie":"1","netns":1,"local_addr":"localhost","remote_addr":"::","local_port":1,"remote_port":1,"state":"LISTEN","inode":1}"#,
        r#"{"event":"socket","time":1,"cookie":"1","netns":1,"local_addr":"::","remote_addr":"::","local_port":65536,"remote_port":1,"state":"LISTEN","inode":1}"#,
    ] {
        assert!(serde_json::from_str::<Event>(line).is_err(), "{line}");
    }
}

/// Names that a process can give itself.
const NAMES: [&[u8]; 12] = [
    b"",
    b"nginx",
    b"fifteen bytes ..",
    "m\u{fc}ller".as_bytes(),
    b"\x1b[31mred",
    b"a\nb\tc\r",
    b"quo\"te\\",
    b"\xff\xfe\x80",
    b"half \xe2\x82",
    "\u{9b}2J".as_bytes(),
    "\u{202e}txt.exe".as_bytes(),
    b"\x7f\x01\x02",
];

#[test]
fn any_name_survives_a_recording() {
    for name in NAMES {
        assert_round_trip(&Event::Holder(Holder {
            fd: None,
            inode: 1,
            pid: 2,
            comm: Comm::new(name),
            start: 3,
            tree: false,
        }));
    }
    // Every byte but zero, which ends a name.
    for bytes in (1..=u8::MAX).collect::<Vec<u8>>().chunks(15) {
        let comm = Comm::new(bytes);
        assert_eq!(comm.as_bytes(), bytes);
        let line = serde_json::to_string(&comm).unwrap();
        assert_eq!(serde_json::from_str::<Comm>(&line).unwrap(), comm, "{line}");
    }
}

#[test]
fn a_name_has_up_to_15_bytes_and_ends_at_a_zero() {
    assert_eq!(
        Comm::new(b"0123456789abcdef").as_bytes(),
        b"0123456789abcde"
    );
    assert_eq!(Comm::new(b"ab\0cd\0").as_bytes(), b"ab");
    assert_eq!(Comm::new(&[b'x'; 100]).as_bytes(), [b'x'; 15]);
    assert_eq!(Comm::new(b""), Comm::new(b"\0anything"));
}

#[test]
fn no_name_reaches_a_terminal_as_a_command() {
    for name in NAMES {
        let shown = Comm::new(name).to_string();
        assert!(
            !shown
                .chars()
                .any(|char| char.is_control() || is_format(char)),
            "{shown:?}"
        );
    }
    let shown = |name: &[u8]| Comm::new(name).to_string();
    assert_eq!(shown(b"\x1b[31mred"), "\\u{1b}[31mred");
    assert_eq!(shown(b"\xff\xfeok"), "\\xff\\xfeok");
    assert_eq!(shown("m\u{fc}ller".as_bytes()), "m\u{fc}ller");
    assert_eq!(shown(b"plain name"), "plain name");
}

#[test]
fn ipv4_is_kept_as_part_of_ipv6_and_shown_as_ipv4() {
    let socket = expected_socket();
    assert_eq!(socket.tuple.local().to_string(), "10.0.0.1");
    assert_eq!(socket.tuple.remote().to_string(), "fe80::7");
    let v4 = address_bytes("1.2.3.4".parse().unwrap());
    assert_eq!(v4, address_bytes("::ffff:1.2.3.4".parse().unwrap()));
}
