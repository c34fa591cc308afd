//! Transitions as people see them.

use super::*;
use crate::{
    event::{Comm, Lost, Socket, Tuple, address_bytes},
    tracker::{Owner, Via},
};

fn text() -> Text {
    Text::new(Output::default())
}

fn change(local: &str, remote: &str) -> Change<'static> {
    let bytes = |addr: &str| address_bytes(addr.parse().unwrap());
    Change {
        time: 3_723_004_005_006,
        socket: Socket {
            cookie: 0x1002,
            netns: 1,
            tuple: Tuple {
                local_addr: bytes(local),
                remote_addr: bytes(remote),
                local_port: 7777,
                remote_port: 55_802,
            },
        },
        from: State::Established,
        to: State::CloseWait,
        after: Some(70_005_000),
        error: 0,
        owner: Some(Owner {
            pid: 2378,
            comm: Comm::new(b"python3"),
            start: 0,
            via: Via::Accept,
            tree: false,
        }),
        site: crate::tracker::Site::BEFORE,
        container: None,
        by_exit: false,
        late: false,
        time_error: 0,
    }
}

fn lines(text: &mut Text, changes: &[Change<'_>]) -> Vec<String> {
    for change in changes {
        text.fact(Fact::Change(*change));
    }
    let shown = String::from_utf8(std::mem::take(&mut text.out.buffer)).unwrap();
    shown.lines().map(str::to_owned).collect()
}

#[test]
fn columns_stand_below_their_names() {
    let shown = lines(&mut text(), &[change("10.0.0.1", "10.0.0.2")]);
    assert_eq!(
        shown,
        [
            "TIME (UTC)   SOCKET     PID COMM       LOCAL           REMOTE          OLDSTATE    -> NEWSTATE           MS NOTE",
            "01:02:03.004   1002    2378 python3    10.0.0.1:7777   10.0.0.2:55802  ESTABLISHED -> CLOSE_WAIT     70.005",
        ]
    );
}

#[test]
fn the_head_is_written_once() {
    let mut text = text();
    let change = change("10.0.0.1", "10.0.0.2");
    assert_eq!(lines(&mut text, &[change, change]).len(), 3);
    assert_eq!(lines(&mut text, &[change]).len(), 1);
}

#[test]
fn what_is_not_known_is_a_dash() {
    let unknown = Change {
        owner: None,
        after: None,
        ..change("10.0.0.1", "10.0.0.2")
    };
    let shown = lines(&mut text(), &[unknown]);
    assert_eq!(
        shown[1],
        "01:02:03.004   1002       - -          10.0.0.1:7777   10.0.0.2:55802  ESTABLISHED -> CLOSE_WAIT          -"
    );
}

#[test]
fn a_port_that_is_none_is_a_star() {
    let mut listener = change("::", "::");
    listener.socket.tuple.remote_port = 0;
    let shown = lines(&mut text(), &[listener]);
    assert!(
        shown[1].contains(" [::]:7777       [::]:*          "),
        "{}",
        shown[1]
    );
}

/// Where the arrow stands.
fn arrow(line: &str) -> usize {
    let at = line.find(" -> ").unwrap();
    line[..at].chars().count()
}

#[test]
fn after_a_long_address_columns_are_as_wide_for_good() {
    let mut text = text();
    let long = change(
        "2001:db8:1111:2222:3333:4444:5555:6666",
        "2001:db8:1111:2222:3333:4444:5555:7777",
    );
    let short = change("10.0.0.1", "10.0.0.2");
    let shown = lines(&mut text, &[short, long, short, long]);
    assert_eq!(arrow(&shown[0]), arrow(&shown[1]));
    assert!(arrow(&shown[2]) > arrow(&shown[1]));
    // Its remote address is one longer than its local one, which had been written by then.
    assert_eq!(arrow(&shown[3]), arrow(&shown[2]) + 1);
    assert_eq!(arrow(&shown[4]), arrow(&shown[3]));
    assert!(shown[2].contains(" [2001:db8:1111:2222:3333:4444:5555:6666]:7777 "));
}

#[test]
fn wide_cookies_and_names_widen_their_columns_too() {
    let mut text = text();
    let mut wide = change("10.0.0.1", "10.0.0.2");
    wide.socket.cookie = u64::MAX;
    wide.owner = wide.owner.map(|owner| Owner {
        comm: Comm::new(b"fifteen bytes .."),
        ..owner
    });
    let shown = lines(&mut text, &[wide, change("10.0.0.1", "10.0.0.2")]);
    assert_eq!(arrow(&shown[1]), arrow(&shown[2]));
    assert!(shown[1].contains(" ffffffffffffffff "));
}

#[test]
fn notes_tell_of_errors_containers_and_lateness() {
    let note = |change: Change<'_>| {
        let shown = lines(&mut text(), &[change]);
        shown[1].split_once("70.005").unwrap().1.to_owned()
    };
    let base = change("10.0.0.1", "10.0.0.2");
    let close = |errno: i32| Change {
        to: State::Close,
        error: errno as u32,
        ..base
    };
    assert_eq!(note(base), "");
    assert_eq!(note(close(libc::ECONNRESET)), " ECONNRESET");
    assert_eq!(
        note(close(libc::EADDRNOTAVAIL)),
        " EADDRNOTAVAIL (no free local port)"
    );
    assert_eq!(note(Change { late: true, ..base }), " (late)");
    let estimate = Change {
        late: true,
        time_error: 512_400_000,
        ..base
    };
    assert_eq!(note(estimate), " (late, off by up to 512 ms)");
    let container = Some("0123456789abcdef");
    assert_eq!(note(Change { container, ..base }), " 0123456789ab");
    let container = Some("web");
    assert_eq!(
        note(Change {
            container,
            late: true,
            ..close(libc::ETIMEDOUT)
        }),
        " ETIMEDOUT web (late)"
    );
}

#[test]
fn no_name_reaches_a_terminal_as_a_command() {
    for name in ["\x1b[2J", "a\r\nb", "\u{9b}31m", "\u{202e}gpj", "\x07"] {
        let mut hostile = change("10.0.0.1", "10.0.0.2");
        hostile.owner = hostile.owner.map(|owner| Owner {
            comm: Comm::new(name.as_bytes()),
            ..owner
        });
        // Whoever may make cgroups names containers.
        hostile.container = Some(name);
        let shown = lines(&mut text(), &[hostile]);
        assert_eq!(shown.len(), 2, "{shown:?}");
        for line in shown {
            let bad = |char: char| char.is_control() || name.contains(char) && !char.is_ascii();
            assert!(!line.chars().any(bad), "{line:?}");
        }
    }
}

#[test]
fn colours_only_where_they_are_wanted() {
    let mut plain = text();
    let mut colored = text();
    colored.out.color = true;
    let reset = Change {
        to: State::Close,
        error: libc::ECONNRESET as u32,
        ..change("10.0.0.1", "10.0.0.2")
    };
    let changes = [change("10.0.0.1", "10.0.0.2"), reset];
    assert!(!lines(&mut plain, &changes).concat().contains('\x1b'));
    let shown = lines(&mut colored, &changes);
    assert!(
        shown[1].contains("\x1b[33mCLOSE_WAIT \x1b[0m"),
        "{}",
        shown[1]
    );
    assert!(
        shown[2].contains("\x1b[31mCLOSE      \x1b[0m"),
        "{}",
        shown[2]
    );
}

#[test]
fn milliseconds_are_rounded_as_the_formatter_rounds() {
    let powers = (0..20).map(|power| 10_u64.pow(power));
    let beside = powers.flat_map(|one| [one - 1, one, one + 1, one / 2]);
    let any = (0..20_000_u64).map(|step| step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (step % 64));
    let halves = (0..10_000).map(|step| step * 7_001_000 + 500);
    for ns in beside.chain(any).chain(halves).chain([u64::MAX]) {
        let mut to = Vec::new();
        milliseconds(&mut to, ns);
        let expected = format!("{:.3}", ns as f64 / 1e6);
        assert_eq!(String::from_utf8(to).unwrap(), expected, "{ns}");
    }
}

#[test]
fn losses_are_said_in_between() {
    let mut text = text();
    text.fact(Fact::Lost(Lost {
        time: 0,
        records: 10,
        missed: 2,
    }));
    let shown = String::from_utf8(text.out.buffer).unwrap();
    assert!(shown.starts_with("--- 12 events lost"), "{shown}");
}
