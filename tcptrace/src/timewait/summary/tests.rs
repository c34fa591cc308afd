//! TIME_WAITs counted.

use super::*;
use crate::{
    event::{Tuple, address_bytes},
    select::Selection,
};

fn socket(remote_port: u16) -> Socket {
    Socket {
        cookie: 1,
        netns: 1,
        tuple: Tuple {
            local_addr: address_bytes("10.0.0.1".parse().unwrap()),
            remote_addr: address_bytes("10.0.0.2".parse().unwrap()),
            local_port: 40_000,
            remote_port,
        },
    }
}

fn owner(pid: u32, via: Via) -> Owner {
    Owner {
        pid,
        comm: Comm::new(b"curl"),
        start: 0,
        via,
        tree: false,
    }
}

/// One that lasted so many milliseconds and expired.
fn lasted(ms: u64) -> TimeWaitEnd<'static> {
    TimeWaitEnd {
        time: ms * 1_000_000,
        socket: socket(80),
        owner: Some(owner(7, Via::Connect)),
        container: None,
        entered: Some(0),
        dwell: Some(ms * 1_000_000),
        dwell_at_least: false,
        dwell_error: 0,
        fin_wait2: None,
        rearmed: Some(false),
        ending: Ending::Expired,
    }
}

fn summary(ends: impl IntoIterator<Item = TimeWaitEnd<'static>>) -> Summary {
    let mut summary = Summary::new();
    for end in ends {
        summary.add(&end);
    }
    summary
}

#[test]
fn nothing_has_no_distribution() {
    assert_eq!(summary([]).dwell(), None);
    assert_eq!(summary([]).count(), 0);
}

#[test]
fn one_is_its_own_distribution_exactly() {
    let dwell = summary([lasted(61_273)]).dwell().unwrap();
    let expected = Dwell {
        count: 1,
        min: 61.273,
        p50: 61.273,
        p90: 61.273,
        p99: 61.273,
        max: 61.273,
        at_least: 0,
        estimates: 0,
        estimate_error: None,
    };
    assert_eq!(dwell, expected);
}

#[test]
fn quantiles_are_right_to_three_digits_and_the_ends_exact() {
    // 1 to 100 seconds, in an order that is none.
    let dwell = summary((0..100).map(|i| lasted((i * 37 % 100 + 1) * 1000)))
        .dwell()
        .unwrap();
    assert_eq!((dwell.count, dwell.min, dwell.max), (100, 1.0, 100.0));
    for (quantile, expected) in [(dwell.p50, 50.0), (dwell.p90, 90.0), (dwell.p99, 99.0)] {
        assert!(
            (quantile / expected - 1.0_f64).abs() < 0.001,
            "{quantile} {expected}"
        );
    }
}

#[test]
fn what_was_skipped_or_is_not_known_has_no_part_in_the_distribution() {
    let skipped = TimeWaitEnd {
        dwell: Some(0),
        ending: Ending::Skipped,
        ..lasted(0)
    };
    let unseen = TimeWaitEnd {
        dwell: None,
        ending: Ending::Unknown,
        rearmed: None,
        ..lasted(0)
    };
    let summary = summary([skipped, unseen, lasted(60_000)]);
    assert_eq!(summary.count(), 3);
    let dwell = summary.dwell().unwrap();
    assert_eq!((dwell.count, dwell.min), (1, 60.0));
    let endings: Vec<_> = summary.endings().collect();
    assert_eq!(
        endings,
        [
            (Ending::Expired, 1),
            (Ending::Skipped, 1),
            (Ending::Unknown, 1)
        ]
    );
}

#[test]
fn one_that_lasted_for_days_does_no_harm() {
    let days = summary([lasted(u64::MAX / 2_000_000)]).dwell().unwrap();
    assert!(days.p50 > 86_400.0 && days.max > 86_400.0);
}

#[test]
fn bounds_and_restarts_are_counted() {
    let bound = TimeWaitEnd {
        dwell_at_least: true,
        rearmed: None,
        ..lasted(60_000)
    };
    let again = TimeWaitEnd {
        rearmed: Some(true),
        ..lasted(70_000)
    };
    let summary = summary([bound, again, again]);
    assert_eq!(summary.dwell().unwrap().at_least, 1);
    assert_eq!(summary.rearmed, 2);
}

#[test]
fn a_remote_goes_by_the_port_of_the_service() {
    let remote = |via| {
        let remote = Remote::of(&socket(80), Some(owner(7, via)));
        (remote.port, remote.local_port)
    };
    // This side connected: the service is the remote port. It accepted: the local one.
    assert_eq!(remote(Via::Connect), (Some(80), None));
    assert_eq!(remote(Via::Accept), (None, Some(40_000)));
    assert_eq!(remote(Via::Listener), (None, Some(40_000)));
    // Who knows.
    assert_eq!(remote(Via::Close), (None, None));
    assert_eq!(remote(Via::Holder), (None, None));
    assert_eq!(Remote::of(&socket(80), None).port, None);
}

#[test]
fn the_greatest_come_first_and_the_rest_is_counted() {
    let mut tally = Tally::new();
    for (key, count) in [(1, 5), (2, 9), (3, 5), (4, 1)] {
        for _ in 0..count {
            tally.add(key);
        }
    }
    assert_eq!(tally.top(3), (vec![(2, 9), (1, 5), (3, 5)], 1));
    assert_eq!(tally.top(0), (vec![], 20));
}

#[test]
fn what_is_beyond_the_bound_is_counted_together() {
    let mut tally = Tally::new();
    for key in 0..KEPT + 10 {
        tally.add(key);
        tally.add(0);
    }
    let (top, rest) = tally.top(1);
    assert_eq!(top, [(0, KEPT as u64 + 11)]);
    assert_eq!(
        top[0].1 + rest,
        2 * (KEPT as u64 + 10),
        "nothing is dropped"
    );
    assert_eq!(tally.counts.len(), KEPT);
}

#[test]
fn the_summary_as_a_line_of_json() {
    let unknown = TimeWaitEnd {
        owner: None,
        ..lasted(60_000)
    };
    let tracker = Tracker::new(Selection::default());
    let line =
        summary([lasted(60_000), lasted(60_000), unknown]).line(&tracker, 0, Time::new(0, 0));
    let line = serde_json::to_string(&line).unwrap();
    ::tests::schema::assert_described(&line);
    assert_eq!(
        line,
        concat!(
            r#"{"event":"time_wait_summary","time":"1970-01-01T00:00:00.000000000Z","count":3,"#,
            r#""dwell_seconds":{"count":3,"min":60.0,"p50":60.0,"p90":60.0,"p99":60.0,"max":60.0,"at_least":0},"#,
            r#""endings":{"expired":3},"rearmed":0,"#,
            r#""closed_first":[{"pid":7,"comm":"curl","count":2},{"pid":null,"comm":null,"count":1}],"closed_first_other":0,"#,
            r#""remotes":[{"addr":"10.0.0.2","port":80,"local_port":null,"count":2},{"addr":"10.0.0.2","port":null,"local_port":null,"count":1}],"remotes_other":0,"#,
            r#""running":{"time_wait":0,"time_wait_oldest_seconds":null,"fin_wait2":0,"fin_wait2_oldest_seconds":null},"samples":[]}"#
        )
    );
}
