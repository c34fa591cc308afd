//! The lines that other programs rely on, letter by letter.

use super::*;
use crate::{
    event::{Tuple, address_bytes},
    leaks::Cause,
    tracker::{Ending, Via},
};
use tcptrace_ebpf::State;

/// 2026-11-20T18:45:02Z at boot time 0.
const BOOT_TO_UTC_NS: i64 = 1_795_200_302_000_000_000;

fn socket() -> Socket {
    Socket {
        cookie: 0x1002,
        netns: 4_026_531_840,
        tuple: Tuple {
            local_addr: address_bytes("127.0.0.1".parse().unwrap()),
            remote_addr: address_bytes("fe80::1".parse().unwrap()),
            local_port: 7777,
            remote_port: 55_802,
        },
    }
}

fn owner(comm: &[u8]) -> Owner {
    Owner {
        pid: 2378,
        comm: Comm::new(comm),
        start: 5,
        via: Via::Accept,
        tree: false,
    }
}

fn change() -> Change<'static> {
    Change {
        time: 123_456_789,
        socket: socket(),
        from: State::Established,
        to: State::CloseWait,
        after: Some(70_005_000),
        error: 0,
        owner: Some(owner(b"python3")),
        site: crate::tracker::Site::BEFORE,
        container: None,
        by_exit: false,
        late: false,
        time_error: 0,
    }
}

fn time_wait() -> TimeWaitEnd<'static> {
    TimeWaitEnd {
        time: 61_272_000_000,
        socket: socket(),
        owner: Some(owner(b"python3")),
        container: None,
        entered: Some(0),
        dwell: Some(61_272_000_000),
        dwell_at_least: false,
        dwell_error: 0,
        fin_wait2: Some(300_000_000),
        rearmed: Some(false),
        ending: Ending::Expired,
    }
}

/// What `write` writes, without the newline that must end it. The schema describes it.
#[track_caller]
fn line_of(write: impl FnOnce(&mut Lines, &mut Vec<u8>)) -> String {
    let mut lines = Lines::new();
    lines.clock(BOOT_TO_UTC_NS);
    let mut to = Vec::new();
    write(&mut lines, &mut to);
    let text = String::from_utf8(to).unwrap();
    let line = text.strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "one line");
    ::tests::schema::assert_described(line);
    line.to_owned()
}

#[test]
fn a_transition() {
    assert_eq!(
        line_of(|lines, to| lines.change(to, &change())),
        concat!(
            r#"{"event":"transition","time":"2026-11-20T18:45:02.123456789Z","socket":"1002","netns":4026531840,"#,
            r#""local":{"addr":"127.0.0.1","port":7777},"remote":{"addr":"fe80::1","port":55802},"#,
            r#""from":"ESTABLISHED","to":"CLOSE_WAIT","after_seconds":0.070005,"error":null,"#,
            r#""owner":{"pid":2378,"comm":"python3","via":"accept"}}"#
        )
    );
}

#[test]
fn what_is_not_known_is_null_and_what_is_seldom_is_left_out() {
    let bare = Change {
        after: None,
        owner: None,
        error: libc::ECONNRESET as u32,
        container: Some("0123"),
        late: true,
        ..change()
    };
    let line = line_of(|lines, to| lines.change(to, &bare));
    assert!(
        line.ends_with(r#""after_seconds":null,"error":"ECONNRESET","owner":null,"container":"0123","late":true}"#),
        "{line}"
    );
}

#[test]
fn a_time_wait() {
    assert_eq!(
        line_of(|lines, to| lines.time_wait(to, &time_wait())),
        concat!(
            r#"{"event":"time_wait","time":"2026-11-20T18:46:03.272000000Z","socket":"1002","netns":4026531840,"#,
            r#""local":{"addr":"127.0.0.1","port":7777},"remote":{"addr":"fe80::1","port":55802},"#,
            r#""owner":{"pid":2378,"comm":"python3","via":"accept"},"entered":"2026-11-20T18:45:02.000000000Z","#,
            r#""dwell_seconds":61.272,"fin_wait2_seconds":0.3,"rearmed":false,"end":"expired"}"#
        )
    );
}

#[test]
fn a_time_wait_of_which_little_is_known() {
    let end = TimeWaitEnd {
        owner: None,
        entered: None,
        dwell: None,
        dwell_at_least: true,
        fin_wait2: None,
        rearmed: None,
        ending: Ending::Unknown,
        ..time_wait()
    };
    let line = line_of(|lines, to| lines.time_wait(to, &end));
    assert!(
        line.ends_with(
            r#""owner":null,"entered":null,"dwell_seconds":null,"dwell_at_least":true,"fin_wait2_seconds":null,"rearmed":null,"end":"unknown"}"#
        ),
        "{line}"
    );
}

#[test]
fn estimates_tell_their_error() {
    let change = Change {
        late: true,
        time_error: 512_000_000,
        ..change()
    };
    let line = line_of(|lines, to| lines.change(to, &change));
    assert!(
        line.ends_with(r#","late":true,"time_error_seconds":0.512}"#),
        "{line}"
    );
    let end = TimeWaitEnd {
        dwell_error: 512_000_000,
        ..time_wait()
    };
    let line = line_of(|lines, to| lines.time_wait(to, &end));
    assert!(
        line.contains(r#""dwell_seconds":61.272,"dwell_error_seconds":0.512,"#),
        "{line}"
    );
}

#[test]
fn losses_count_both_kinds() {
    let lost = Lost {
        time: 0,
        records: 10,
        missed: 2,
    };
    assert_eq!(
        line_of(|lines, to| lines.lost(to, &lost)),
        r#"{"event":"lost","time":"2026-11-20T18:45:02.000000000Z","records":12}"#
    );
}

#[test]
fn the_end() {
    let end = End {
        time: 0,
        records: 96,
        lost: 1,
        mptcp: 2,
    };
    assert_eq!(
        line_of(|lines, to| lines.end(to, &end)),
        r#"{"event":"end","time":"2026-11-20T18:45:02.000000000Z","records":96,"lost":1,"mptcp_not_covered":2}"#
    );
}

#[test]
fn endings_and_ways_to_know_an_owner_have_the_promised_names() {
    let endings: Vec<&str> = Ending::ALL.iter().map(|ending| ending.name()).collect();
    assert_eq!(
        endings,
        [
            "expired",
            "reused",
            "reopened",
            "reset",
            "aborted",
            "namespace_gone",
            "skipped",
            "unknown"
        ]
    );
    let vias = [
        (Via::Connect, "connect"),
        (Via::Accept, "accept"),
        (Via::Listen, "listen"),
        (Via::Close, "close"),
        (Via::Holder, "holder"),
        (Via::Listener, "listener"),
    ];
    for (via, name) in vias {
        assert_eq!(via.name(), name);
    }
    let vias: Vec<&str> = vias.iter().map(|(_, name)| *name).collect();
    let states: Vec<&str> = State::ALL.iter().map(|state| state.name()).collect();
    let causes: Vec<&str> = Cause::ALL.iter().map(|cause| cause.name()).collect();
    for (definition, mut names) in [
        ("ending", endings),
        ("via", vias),
        ("state", states),
        ("cause", causes),
    ] {
        let mut described = ::tests::schema::values(definition);
        described.sort_unstable();
        names.sort_unstable();
        assert_eq!(described, names, "docs/events.schema.json: {definition}");
    }
}

#[test]
fn any_name_gives_one_line_of_json_that_says_it() {
    for (comm, said) in [
        (&b"a\"b\\c"[..], "a\"b\\c"),
        (b"a\nb", "a\nb"),
        (b"\x1b[2J", "\u{1b}[2J"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("m\u{fc}ller".as_bytes(), "m\u{fc}ller"),
    ] {
        let change = Change {
            owner: Some(owner(comm)),
            ..change()
        };
        let line = line_of(|lines, to| lines.change(to, &change));
        assert!(!line.chars().any(char::is_control), "{line:?}");
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["owner"]["comm"], said);
    }
}

#[test]
fn errors_go_by_their_names() {
    for (number, name) in [
        (libc::ECONNRESET, "ECONNRESET"),
        (libc::ETIMEDOUT, "ETIMEDOUT"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
        (libc::ECONNABORTED, "ECONNABORTED"),
        (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (libc::EHOSTUNREACH, "EHOSTUNREACH"),
        (12_345, "E12345"),
    ] {
        assert_eq!(Errno::new(number as u32).unwrap().to_string(), name);
    }
    assert_eq!(Errno::new(u32::MAX).unwrap().to_string(), "E4294967295");
    assert_eq!(Errno::new(0), None);
}

#[test]
fn times_are_utc_with_nine_digits_as_far_as_they_go() {
    let shown = |boot, offset| Time::new(boot, offset).to_string();
    assert_eq!(shown(0, 0), "1970-01-01T00:00:00.000000000Z");
    assert_eq!(shown(1, -2), "1969-12-31T23:59:59.999999999Z");
    assert_eq!(shown(u64::MAX, i64::MAX), "2262-04-11T23:47:16.854775807Z");
    assert_eq!(shown(0, i64::MIN), "1677-09-21T00:12:43.145224192Z");
}
