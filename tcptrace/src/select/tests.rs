//! What a person asks for, and what the probes have to record for it.

use super::*;
use crate::tracker::Via;

fn socket(local: (&str, u16), remote: (&str, u16)) -> Socket {
    Socket {
        cookie: 1,
        netns: 7,
        tuple: Tuple {
            local_addr: address_bytes(local.0.parse().unwrap()),
            remote_addr: address_bytes(remote.0.parse().unwrap()),
            local_port: local.1,
            remote_port: remote.1,
        },
    }
}

fn client() -> Socket {
    socket(("10.0.0.1", 40_000), ("10.0.0.2", 80))
}

/// Before `connect()` has chosen a port.
fn connecting() -> Socket {
    socket(("10.0.0.1", 0), ("10.0.0.2", 80))
}

fn cidr(text: &str) -> Cidr {
    let (addr, len) = text.split_once('/').unwrap();
    Cidr::new(addr.parse().unwrap(), len.parse().unwrap()).unwrap()
}

#[test]
fn nothing_asked_for_is_everything() {
    let all = Sockets::default();
    for socket in [client(), connecting(), socket(("::", 80), ("::", 0))] {
        assert_eq!(all.socket(&socket), Verdict::Yes);
    }
    assert!(Selection::default().owner(None, None));
    assert!(Selection::default().states(State::Listen, State::Close));
}

#[test]
fn each_filter_of_sockets() {
    use Verdict::{No, Open, Yes};
    let filters: [(Sockets, Verdict, Verdict); 14] = [
        (
            Sockets {
                ports: vec![80],
                ..Sockets::default()
            },
            Yes,
            Yes,
        ),
        (
            Sockets {
                ports: vec![1, 40_000],
                ..Sockets::default()
            },
            Yes,
            Open,
        ),
        (
            Sockets {
                ports: vec![81],
                ..Sockets::default()
            },
            No,
            Open,
        ),
        (
            Sockets {
                local_ports: vec![1, 40_000],
                ..Sockets::default()
            },
            Yes,
            Open,
        ),
        (
            Sockets {
                local_ports: vec![80],
                ..Sockets::default()
            },
            No,
            Open,
        ),
        (
            Sockets {
                remote_ports: vec![80, 81],
                ..Sockets::default()
            },
            Yes,
            Yes,
        ),
        (
            Sockets {
                remote_ports: vec![40_000],
                ..Sockets::default()
            },
            No,
            No,
        ),
        (
            Sockets {
                networks: vec![cidr("10.0.0.2/32")],
                ..Sockets::default()
            },
            Yes,
            Yes,
        ),
        (
            Sockets {
                networks: vec![cidr("10.0.0.1/32")],
                ..Sockets::default()
            },
            Yes,
            Yes,
        ),
        (
            Sockets {
                networks: vec![cidr("10.0.0.4/30")],
                ..Sockets::default()
            },
            No,
            No,
        ),
        (
            Sockets {
                family: Some(4),
                ..Sockets::default()
            },
            Yes,
            Yes,
        ),
        (
            Sockets {
                family: Some(6),
                ..Sockets::default()
            },
            No,
            No,
        ),
        (
            Sockets {
                netns: vec![6, 7],
                ..Sockets::default()
            },
            Yes,
            Yes,
        ),
        (
            Sockets {
                netns: vec![8],
                ..Sockets::default()
            },
            No,
            No,
        ),
    ];
    for (sockets, bound, unbound) in filters {
        assert_eq!(sockets.socket(&client()), bound, "{sockets:?}");
        assert_eq!(sockets.socket(&connecting()), unbound, "{sockets:?}");
    }
}

#[test]
fn all_filters_must_fit() {
    let both = Sockets {
        remote_ports: vec![80],
        networks: vec![cidr("10.0.0.0/8")],
        ..Sockets::default()
    };
    assert_eq!(both.socket(&client()), Verdict::Yes);
    let elsewhere = socket(("192.168.0.1", 40_000), ("192.168.0.2", 80));
    assert_eq!(both.socket(&elsewhere), Verdict::No);
    // A port that is still open does not save what does not fit otherwise.
    let port_too = Sockets {
        local_ports: vec![40_000],
        remote_ports: vec![81],
        ..Sockets::default()
    };
    assert_eq!(port_too.socket(&connecting()), Verdict::No);
}

#[test]
fn ipv4_in_ipv6_is_ipv4() {
    let mapped = socket(("::ffff:10.0.0.1", 1), ("::ffff:10.0.0.2", 2));
    let v6 = socket(("fe80::1", 1), ("fe80::2", 2));
    let only = |family| Sockets {
        family: Some(family),
        ..Sockets::default()
    };
    assert_eq!(only(4).socket(&mapped), Verdict::Yes);
    assert_eq!(only(6).socket(&mapped), Verdict::No);
    assert_eq!(only(4).socket(&v6), Verdict::No);
    assert_eq!(only(6).socket(&v6), Verdict::Yes);
    let v4_network = Sockets {
        networks: vec![cidr("0.0.0.0/0")],
        ..Sockets::default()
    };
    assert_eq!(v4_network.socket(&mapped), Verdict::Yes);
    assert_eq!(v4_network.socket(&v6), Verdict::No);
}

#[test]
fn of_two_verdicts_the_lower_counts() {
    assert!(Verdict::No < Verdict::Open && Verdict::Open < Verdict::Yes);
}

#[test]
fn networks_are_masked_and_bounded() {
    assert_eq!(cidr("10.1.2.3/8"), cidr("10.0.0.0/8"));
    assert_eq!(cidr("::/0").mask, [0; 16]);
    assert_eq!(cidr("::1/128").mask, [0xff; 16]);
    assert!(Cidr::new("10.0.0.0".parse().unwrap(), 33).is_none());
    assert!(Cidr::new("::".parse().unwrap(), 129).is_none());
    let bytes = |addr: &str| address_bytes(addr.parse().unwrap());
    assert!(cidr("10.0.0.128/25").contains(&bytes("10.0.0.128")));
    assert!(!cidr("10.0.0.128/25").contains(&bytes("10.0.0.127")));
}

fn owner(pid: u32, comm: &str) -> Owner {
    Owner {
        pid,
        comm: Comm::new(comm.as_bytes()),
        start: 0,
        via: Via::Connect,
        tree: false,
    }
}

#[test]
fn owners_are_selected_by_pid_name_and_container() {
    let selection = Selection {
        pids: vec![1, 2],
        comms: vec![Comm::new(b"nginx")],
        containers: vec!["0123".to_owned()],
        ..Selection::default()
    };
    let is = |owner: Option<Owner>, container| selection.owner(owner.as_ref(), container);
    assert!(is(Some(owner(2, "nginx")), Some("0123456789ab")));
    assert!(!is(Some(owner(3, "nginx")), Some("0123456789ab")));
    assert!(!is(Some(owner(2, "nginx2")), Some("0123456789ab")));
    assert!(!is(Some(owner(2, "nginx")), Some("1234")));
    assert!(!is(Some(owner(2, "nginx")), None));
    assert!(!is(None, Some("0123456789ab")));
}

/// Whether the probes record a transition.
fn recorded(config: &Config, old: State, new: State) -> bool {
    config.wanted[old as usize] & new.bit() != 0
}

fn of_states(states: &[State]) -> Selection {
    Selection {
        states: states.to_vec(),
        ..Selection::default()
    }
}

#[test]
fn what_was_asked_for_is_recorded() {
    for state in State::ALL {
        let selection = of_states(&[state]);
        let config = selection.to_config();
        for old in State::ALL {
            for new in State::ALL {
                if selection.states(old, new) {
                    assert!(recorded(&config, old, new), "{state:?}: {old:?} > {new:?}");
                }
            }
        }
    }
}

/// Every way a full socket can go.
const WAYS: [(State, State); 22] = {
    use State::{
        Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv,
        SynSent,
    };
    [
        (Close, SynSent),
        (Close, Listen),
        (Listen, Close),
        (Listen, SynRecv),
        (SynSent, Established),
        (SynSent, SynRecv),
        (SynSent, Close),
        (SynRecv, Established),
        (SynRecv, FinWait1),
        (SynRecv, Close),
        (Established, FinWait1),
        (Established, CloseWait),
        (Established, Close),
        (FinWait1, FinWait2),
        (FinWait1, Closing),
        (FinWait1, Close),
        (FinWait2, Close),
        (Closing, Close),
        (CloseWait, LastAck),
        (CloseWait, Close),
        (LastAck, Close),
        (FinWait1, State::TimeWait),
    ]
};

#[test]
fn the_beginning_of_what_was_asked_for_is_recorded() {
    // Time in a state is told when it is left: who asks for X > Y needs what leads to X.
    for state in State::ALL {
        let selection = of_states(&[state]);
        let config = selection.to_config();
        for (old, new) in WAYS
            .into_iter()
            .filter(|way| selection.states(way.0, way.1))
        {
            for (before, at) in WAYS.into_iter().filter(|way| way.1 == old) {
                assert!(
                    recorded(&config, before, at),
                    "{state:?}: {before:?} > {at:?} begins what {old:?} > {new:?} ends"
                );
            }
        }
    }
}

#[test]
fn ends_and_owners_are_recorded_whatever_was_asked_for() {
    for state in State::ALL {
        let config = of_states(&[state]).to_config();
        for (old, new) in WAYS {
            let tells_owner = matches!(
                (old, new),
                (State::Close, State::SynSent | State::Listen)
                    | (State::Listen, State::SynRecv)
                    | (_, State::FinWait1 | State::LastAck)
            );
            if new == State::Close || tells_owner {
                assert!(recorded(&config, old, new), "{state:?}: {old:?} > {new:?}");
            }
        }
    }
}

#[test]
fn what_nobody_needs_is_not_recorded() {
    let config = of_states(&[State::SynSent]).to_config();
    assert!(!recorded(&config, State::Established, State::CloseWait));
    assert!(!recorded(&config, State::FinWait1, State::FinWait2));
    let config = Selection::default().to_config();
    assert_eq!(config.wanted, [u16::MAX; 16]);
}

#[test]
fn what_is_only_timed_has_its_beginning_and_its_end_recorded() {
    use State::CloseWait;
    let leaks = Selection {
        knowledge: Knowledge::Dwell,
        ..of_states(&[CloseWait])
    };
    for (old, new) in WAYS {
        // Whatever is over has to be known as that.
        let needed = new == State::Close || old == CloseWait || new == CloseWait;
        let is_recorded = recorded(&leaks.to_config(), old, new);
        assert_eq!(is_recorded, needed, "{old:?} > {new:?}");
    }
    assert!(Selection::default().needs_accept());
    assert!(!leaks.needs_accept() && !leaks.needs_time_wait());
}

#[test]
fn time_wait_is_followed_when_a_close_could_be_one() {
    for (state, needed) in [
        (State::TimeWait, true),
        (State::FinWait2, true),
        (State::Closing, true),
        (State::Close, true),
        (State::CloseWait, false),
        (State::Established, false),
        (State::FinWait1, false),
    ] {
        assert_eq!(of_states(&[state]).needs_time_wait(), needed, "{state:?}");
    }
    assert!(Selection::default().needs_time_wait());
}

/// A selection of so many values of each kind.
fn of_values(count: u16) -> Selection {
    let ports = |first| (first..first + count).collect();
    Selection {
        sockets: Sockets {
            ports: ports(100),
            local_ports: ports(200),
            remote_ports: ports(300),
            networks: (0..count)
                .map(|index| cidr(&format!("10.{index}.0.0/16")))
                .collect(),
            family: Some(4),
            netns: (0..count).map(u32::from).collect(),
        },
        ..Selection::default()
    }
}

#[test]
fn the_probes_decide_what_has_few_values() {
    const ALL: u32 = Select::NETNS
        | Select::FAMILY
        | Select::LOCAL_PORT
        | Select::REMOTE_PORT
        | Select::ANY_PORT
        | Select::NETWORK;
    let one = of_values(1).to_config();
    assert_eq!((one.selects, one.family), (ALL, 4));
    // A place that is not needed must not let another value pass, least of all 0: that is a port, too.
    assert_eq!(one.any_ports, [100; Config::VALUES]);
    assert_eq!(one.local_ports, [200; Config::VALUES]);
    assert_eq!(one.remote_ports, [300; Config::VALUES]);
    let bytes = |words: [u32; 4]| words.map(u32::to_ne_bytes).concat();
    for network in one.networks {
        assert_eq!(bytes(network.addr), cidr("10.0.0.0/16").addr);
        assert_eq!(bytes(network.mask), cidr("10.0.0.0/16").mask);
    }
    let few = of_values(Config::NETWORKS as u16).to_config();
    assert_eq!(few.selects, ALL);
    assert_eq!(few.netns[..5], [0, 1, 2, 3, 0]);
    assert_eq!(few.local_ports[..5], [200, 201, 202, 203, 200]);
    assert_eq!(bytes(few.networks[3].addr), cidr("10.3.0.0/16").addr);
}

#[test]
fn the_probes_let_pass_what_has_more_values_than_they_compare_with() {
    let networks = of_values(Config::NETWORKS as u16 + 1).to_config();
    assert_eq!(networks.selects & Select::NETWORK, 0);
    assert_ne!(networks.selects & Select::NETNS, 0);
    let values = of_values(Config::VALUES as u16).to_config();
    assert_ne!(values.selects & Select::ANY_PORT, 0);
    let values = of_values(Config::VALUES as u16 + 1).to_config();
    assert_eq!(values.selects, Select::FAMILY);
    assert_eq!(Selection::default().to_config().selects, 0);
}
