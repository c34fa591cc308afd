//! `states` counts what the kernel lists: by state as `ss` does, and by what is known of each socket.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsStr,
    fs,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::{self, Command},
    thread,
    time::Duration,
};

use nix::{
    pty::{Winsize, openpty},
    sys::signal::Signal,
};
use serde_json::{Value, json};
use tests::{Fixture, Lab, Line, Lines, Peers, Run, Tcptrace, wait_until};

const SOON: Duration = Duration::from_secs(20);

type Counts = BTreeMap<String, u64>;

/// One look at the lab's namespace, in JSON.
fn states(lab: &Lab, arguments: &[&str]) -> Lines {
    let inode = lab.netns.inode().to_string();
    let run = Tcptrace::run(&[&["states", "-o", "json", "--netns", &inode], arguments].concat());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_adds_up(&run.lines);
    run.lines
}

/// The same for people.
fn text(lab: &Lab, arguments: &[&str]) -> Vec<String> {
    let inode = lab.netns.inode().to_string();
    let run = Tcptrace::run(&[&["states", "--netns", &inode], arguments].concat());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let lines = run.lines.0.iter();
    lines
        .map(|line| line.value.as_str().expect("text").to_owned())
        .collect()
}

/// The line of all sockets.
fn total(lines: &Lines) -> &Line {
    let last = lines.0.last().expect("a line");
    assert_eq!(last.value["event"], "states", "{lines}");
    last
}

/// The same without the time.
fn timeless(lines: &Lines) -> Vec<Value> {
    let mut groups: Vec<Value> = groups(lines).into_iter().cloned().collect();
    for group in &mut groups {
        group.as_object_mut().expect("an object").remove("time");
    }
    groups
}

fn groups(lines: &Lines) -> Vec<&Value> {
    let groups = lines.events("states_group");
    groups.map(|line| &line.value).collect()
}

fn counts(value: &Value) -> Counts {
    let counts = value.as_object().expect("counts").iter();
    counts
        .map(|(state, count)| (state.clone(), count.as_u64().expect("a number")))
        .collect()
}

fn sockets(value: &Value) -> u64 {
    value["sockets"].as_u64().expect("a number")
}

/// Of each report: the states are all sockets, the groups are all sockets, and each has the sockets listed
/// that it has.
fn assert_adds_up(lines: &Lines) {
    let names = ["states", "orphaned", "not_accepted"];
    let mut sums = [Counts::new(), Counts::new(), Counts::new()];
    let (mut grouped, mut listed) = (0, 0);
    for line in &lines.0 {
        let value = &line.value;
        match value["event"].as_str() {
            Some("states_socket") => listed += 1,
            Some("states_group") => {
                let of_states: u64 = counts(&value["states"]).values().sum();
                assert_eq!(of_states, sockets(value), "{line}");
                assert!(listed == 0 || listed == sockets(value), "{listed}: {line}");
                grouped += sockets(value);
                listed = 0;
                for (name, sum) in names.iter().zip(&mut sums) {
                    for (state, count) in counts(&value[name]) {
                        *sum.entry(state).or_default() += count;
                    }
                }
            }
            Some("states") => {
                let of_states: u64 = counts(&value["states"]).values().sum();
                assert_eq!(of_states, sockets(value), "{line}");
                if !value["by"].is_null() {
                    assert_eq!(grouped, sockets(value), "{lines}");
                    for (name, sum) in names.iter().zip(&mut sums) {
                        assert_eq!(*sum, counts(&value[name]), "{name}: {lines}");
                        sum.clear();
                    }
                }
                grouped = 0;
            }
            _ => panic!("{line}"),
        }
    }
}

/// What the kernel lists in the namespace, by state.
fn listed(lab: &Lab, wanted: impl Fn(&tests::Row) -> bool) -> Counts {
    let mut counts = Counts::new();
    for row in lab.diag().rows().iter().filter(|row| wanted(row)) {
        *counts.entry(row.state.to_owned()).or_default() += 1;
    }
    counts
}

/// What `ss -tan` lists there, by state.
fn ss(lab: &Lab) -> Counts {
    let run = || Command::new("ss").arg("-tanH").output();
    let output = lab.netns.inside(run).expect("ss, of the package iproute2");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut counts = Counts::new();
    for line in text.lines() {
        let name = match line.split_whitespace().next().expect("a state") {
            "ESTAB" => "ESTABLISHED".to_owned(),
            "FIN-WAIT-1" => "FIN_WAIT1".to_owned(),
            "FIN-WAIT-2" => "FIN_WAIT2".to_owned(),
            other => other.replace('-', "_"),
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// Sockets in every state, all of which stay.
struct Stage {
    peers: Peers,
    /// They wait in `connect()`.
    _waiting: [Fixture; 2],
}

impl Stage {
    /// The server listens here, and is reached there.
    fn new(lab: &Lab, listen: &str, connect: IpAddr) -> Self {
        let mut peers = Peers::over(lab, listen, connect);
        let ask = |fixture: &mut Fixture, command: &str, of: &tests::Connection| {
            fixture.ask(&format!("{command} {}", of.name));
        };
        let wait = |cookie: &str, state: &'static str| {
            wait_until(state, SOON, || {
                lab.diag().row(cookie).filter(|row| row.state == state)
            });
        };
        // ESTABLISHED at both ends.
        peers.connect();
        // TIME_WAIT.
        peers.closed_by_client();
        // FIN_WAIT2, orphaned, and CLOSE_WAIT.
        peers.left_by_client();
        // FIN_WAIT2, not orphaned, and CLOSE_WAIT.
        let one = peers.connect();
        ask(&mut peers.client, "shutdown", &one);
        wait(&one.client, "FIN_WAIT2");
        // FIN_WAIT1, orphaned, and ESTABLISHED.
        let one = peers.connect();
        ask(&mut peers.server, "deaf", &one);
        peers.client.close(&one.name);
        wait(&one.client, "FIN_WAIT1");
        // LAST_ACK, orphaned, and FIN_WAIT2, which hears nothing more.
        let one = peers.connect();
        ask(&mut peers.client, "shutdown", &one);
        wait(&one.client, "FIN_WAIT2");
        ask(&mut peers.client, "deaf", &one);
        peers.server.close(&one.name);
        wait(&one.server, "LAST_ACK");
        // CLOSING, and FIN_WAIT1.
        let one = peers.connect();
        ask(&mut peers.client, "deaf", &one);
        ask(&mut peers.server, "deaf", &one);
        ask(&mut peers.client, "shutdown", &one);
        ask(&mut peers.server, "shutdown", &one);
        ask(&mut peers.server, "hear", &one);
        wait(&one.server, "CLOSING");
        // SYN_SENT: nobody answers.
        let mut unheard = lab.fixture("unheard");
        let mut silent = peers.address;
        silent.set_port(peers.server.listen("silent", listen).port());
        peers.server.ask("deaf silent");
        unheard.begin(&format!("connect c {silent}"));
        // SYN_RECV at the server, a request socket, and SYN_SENT: the answer is not heard.
        let mut deaf = lab.fixture("deaf");
        let any: IpAddr = match connect {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        deaf.ask(&format!("bind c {}", std::net::SocketAddr::new(any, 0)));
        deaf.ask("deaf c");
        deaf.begin(&format!("connect c {}", peers.address));
        // ESTABLISHED and CLOSE_WAIT, not accepted.
        peers.client.connect("left", peers.address);
        peers.client.close("left");
        peers.client.connect("waits", peers.address);
        wait_until("SYN_RECV", SOON, || {
            let port = peers.address.port();
            let mut rows = lab.diag().rows().into_iter();
            rows.find(|row| row.local.port() == port && row.state.ends_with("SYN_RECV"))
        });
        Self {
            peers,
            _waiting: [unheard, deaf],
        }
    }
}

/// Of one stage.
const EACH: [(&str, u64); 10] = [
    ("CLOSE_WAIT", 3),
    ("CLOSING", 1),
    ("ESTABLISHED", 5),
    ("FIN_WAIT1", 2),
    ("FIN_WAIT2", 4),
    ("LAST_ACK", 1),
    ("LISTEN", 2),
    ("SYN_RECV", 1),
    ("SYN_SENT", 2),
    ("TIME_WAIT", 1),
];

fn times(counts: &[(&str, u64)], times: u64) -> Value {
    let counts = counts.iter();
    counts
        .map(|(state, count)| ((*state).to_owned(), Value::from(count * times)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Every state, over IPv4, IPv6, and IPv4 on IPv6 sockets; and who says so.
#[test]
fn every_state_as_ss_counts() {
    let Some(lab) = Lab::new() else { return };
    let v4: IpAddr = [127, 0, 0, 1].into();
    let v6: IpAddr = Ipv6Addr::LOCALHOST.into();
    let _stages = [
        Stage::new(&lab, "127.0.0.1:0", v4),
        Stage::new(&lab, "[::1]:0", v6),
        Stage::new(&lab, "[::]:0", v4),
    ];
    let (seen, by_ss) = wait_until("a moment in which nothing changes", SOON, || {
        let before = ss(&lab);
        let seen = states(&lab, &[]);
        (ss(&lab) == before).then_some((seen, before))
    });
    let all = &total(&seen).value;
    assert_eq!(counts(&all["states"]), by_ss, "{seen}");
    assert_eq!(all["states"], times(&EACH, 3), "{seen}");
    let orphaned = [("FIN_WAIT1", 1), ("FIN_WAIT2", 2), ("LAST_ACK", 1)];
    assert_eq!(all["orphaned"], times(&orphaned, 3), "{seen}");
    let not_accepted = [("CLOSE_WAIT", 1), ("ESTABLISHED", 1)];
    assert_eq!(all["not_accepted"], times(&not_accepted, 3), "{seen}");
    assert_eq!(all["namespaces"], 1, "{seen}");
    // The first line is the sum, then the states.
    let text = text(&lab, &[]);
    let sum: u64 = EACH.iter().map(|(_, count)| 3 * count).sum();
    assert!(
        text[0].ends_with(&format!(" UTC  {sum} TCP sockets in 1 network namespace")),
        "{text:#?}"
    );
    assert_eq!(text.len(), 1 + EACH.len(), "{text:#?}");
    assert!(
        text.contains(&"       12  FIN_WAIT2  (6 orphaned)".to_owned()),
        "{text:#?}"
    );
    for (family, v4) in [("-4", true), ("-6", false)] {
        let seen = states(&lab, &[family]);
        // A listener for both families is listed with an address of IPv6, and takes both.
        let expected = listed(&lab, |row| row.local.is_ipv4() == v4);
        let mut found = counts(&total(&seen).value["states"]);
        let recv = expected.get("NEW_SYN_RECV");
        assert_eq!(recv, None, "it is shown as SYN_RECV");
        assert_eq!(found.remove("LISTEN"), expected.get("LISTEN").copied());
        let mut expected = expected;
        expected.remove("LISTEN");
        assert_eq!(found, expected, "{family}: {seen}");
    }
    for (state, count) in EACH {
        let seen = states(&lab, &["--state", &state.to_lowercase().replace('_', "-")]);
        assert_eq!(total(&seen).value["states"], json!({state: 3 * count}));
    }
}

/// Who has what, though some of it is shared, not accepted, or nobody's.
#[test]
fn by_process() {
    let Some(lab) = Lab::new() else { return };
    let stage = Stage::new(&lab, "127.0.0.1:0", [127, 0, 0, 1].into());
    let mut peers = stage.peers;
    let second = peers.server.listen("second", "127.0.0.1:0");
    peers.client.connect("stashed", second);
    peers.server.accept("second", "stashed");
    peers.server.ask("stash stashed");
    let heir = peers.server.fork("heir");
    peers.client.connect("own", second);
    peers.server.accept("second", "own");
    let seen = states(&lab, &["--by", "process"]);
    let of = |holders: &[&Fixture]| {
        let mut pids: Vec<u32> = holders.iter().map(|one| one.pid).collect();
        pids.sort_unstable();
        let groups = groups(&seen).into_iter();
        let mut groups = groups.filter(|group| {
            let holders = group["holders"].as_array().expect("holders").iter();
            let found: Vec<u32> = holders
                .map(|one| one["pid"].as_u64().expect("a number") as u32)
                .collect();
            group["holder"] == "process" && found == pids
        });
        let group = groups.next().unwrap_or_else(|| panic!("{pids:?}: {seen}"));
        assert!(groups.next().is_none(), "{seen}");
        group
    };
    // A socket of two processes is counted once, and so is what waits at it.
    let shared = of(&[&peers.server, &heir]);
    assert_eq!(
        shared["states"],
        json!({"CLOSE_WAIT": 3, "CLOSING": 1, "ESTABLISHED": 3, "LISTEN": 3, "SYN_RECV": 1}),
        "{seen}"
    );
    assert_eq!(
        shared["not_accepted"],
        json!({"CLOSE_WAIT": 1, "ESTABLISHED": 1}),
        "{seen}"
    );
    let names = shared["holders"].as_array().expect("holders").iter();
    let names: BTreeSet<&str> = names
        .map(|one| one["comm"].as_str().expect("a name"))
        .collect();
    assert_eq!(names, BTreeSet::from(["heir", "server"]), "{seen}");
    assert_eq!(
        of(&[&peers.server])["states"],
        json!({"ESTABLISHED": 1}),
        "{seen}"
    );
    assert_eq!(
        of(&[&peers.client])["states"],
        json!({"ESTABLISHED": 4, "FIN_WAIT1": 1, "FIN_WAIT2": 2}),
        "{seen}"
    );
    let other = |kind: &str| {
        let groups = groups(&seen).into_iter();
        let mut groups = groups.filter(|group| group["holder"] == kind);
        let group = groups.next().unwrap_or_else(|| panic!("{kind}: {seen}"));
        assert!(groups.next().is_none(), "{seen}");
        assert_eq!(group["holders"], json!([]), "{seen}");
        assert_eq!(group["pid"], Value::Null, "{seen}");
        group
    };
    assert_eq!(
        other("none")["states"],
        json!({"FIN_WAIT1": 1, "FIN_WAIT2": 2, "LAST_ACK": 1, "TIME_WAIT": 1}),
        "{seen}"
    );
    // On its way between two processes it is in none.
    let unknown = other("not_found");
    assert_eq!(unknown["states"], json!({"ESTABLISHED": 1}), "{seen}");
    assert_eq!(unknown["uid"], 0, "{seen}");
    assert_eq!(
        sockets(&total(&seen).value),
        lab.diag().rows().len() as u64,
        "{seen}"
    );
    // The largest first.
    let sizes: Vec<u64> = groups(&seen).into_iter().map(sockets).collect();
    assert!(sizes.is_sorted_by(|a, b| a >= b), "{seen}");

    let pid = heir.pid.to_string();
    assert_eq!(
        sockets(&total(&states(&lab, &["--pid", &pid])).value),
        sockets(shared)
    );
    let seen = states(&lab, &["--comm", "server", "--state", "ESTABLISHED"]);
    assert_eq!(total(&seen).value["states"], json!({"ESTABLISHED": 4}));
    assert_eq!(
        sockets(&total(&states(&lab, &["--comm", "nobody"])).value),
        0
    );
}

#[test]
fn by_port_and_remote() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    peers.connect();
    peers.closed_by_client();
    let far = Peers::over(&lab, "127.0.0.2:0", [127, 0, 0, 2].into());
    let mut far = far;
    far.connect();
    let (port, far_port) = (peers.address.port(), far.address.port());
    let seen = states(&lab, &["--by", "port"]);
    let of = |side: &str, port: u16| {
        let groups = groups(&seen).into_iter();
        let mut groups = groups.filter(|group| group["side"] == side && group["port"] == port);
        groups.next().unwrap_or_else(|| panic!("{seen}"))["states"].clone()
    };
    assert_eq!(groups(&seen).len(), 4, "{seen}");
    assert_eq!(of("local", port), json!({"ESTABLISHED": 1, "LISTEN": 1}));
    assert_eq!(
        of("remote", port),
        json!({"ESTABLISHED": 1, "TIME_WAIT": 1})
    );
    assert_eq!(
        of("local", far_port),
        json!({"ESTABLISHED": 1, "LISTEN": 1})
    );
    assert_eq!(of("remote", far_port), json!({"ESTABLISHED": 1}));
    // Listeners are known when they are not asked for.
    let filtered = states(&lab, &["--by", "port", "--state", "ESTABLISHED"]);
    assert_eq!(groups(&filtered).len(), 4, "{filtered}");
    let seen = states(&lab, &["--by", "remote"]);
    // Whoever connects to 127.0.0.2 does so from 127.0.0.1.
    let found: BTreeMap<String, Value> = groups(&seen)
        .into_iter()
        .map(|group| (group["addr"].to_string(), group["states"].clone()))
        .collect();
    let expected = [
        ("null", json!({"LISTEN": 2})),
        ("\"127.0.0.1\"", json!({"ESTABLISHED": 3, "TIME_WAIT": 1})),
        ("\"127.0.0.2\"", json!({"ESTABLISHED": 1})),
    ];
    let expected = expected.map(|(addr, states)| (addr.to_owned(), states));
    assert_eq!(found, BTreeMap::from(expected), "{seen}");

    let filters: [(&[&str], u64); 6] = [
        (&["--port", &port.to_string()], 4),
        (&["--lport", &port.to_string()], 2),
        (&["--rport", &port.to_string()], 2),
        (&["--addr", "127.0.0.2"], 3),
        (&["--addr", "127.0.0.0/8"], 7),
        (&["--port", "1"], 0),
    ];
    for (filter, expected) in filters {
        let seen = states(&lab, filter);
        let found = sockets(&total(&seen).value);
        assert_eq!(found, expected, "{filter:?}: {seen}");
    }
}

/// What is not shown is counted, in one line.
#[test]
fn top_and_the_rest() {
    let Some(lab) = Lab::new() else { return };
    let mut peers: Vec<Peers> = (1..=4)
        .map(|host| {
            let listen = format!("127.0.0.{host}:0");
            Peers::over(&lab, &listen, [127, 0, 0, host].into())
        })
        .collect();
    for (index, one) in peers.iter_mut().enumerate() {
        for _ in 0..=index {
            one.connect();
        }
    }
    let all = states(&lab, &["--by", "port"]);
    assert_eq!(groups(&all).len(), 8);
    let seen = states(&lab, &["--by", "port", "--top", "3"]);
    let shown = groups(&seen);
    assert_eq!(shown.len(), 4, "{seen}");
    assert_eq!(timeless(&seen)[..3], timeless(&all)[..3], "{seen}");
    assert_eq!(shown[3]["rest"], 5, "{seen}");
    assert_eq!(total(&seen).value["groups"], 8, "{seen}");
    assert_eq!(total(&seen).value["sockets"], total(&all).value["sockets"]);
    let text = text(&lab, &["--by", "port", "--top", "3"]);
    assert_eq!(text.len(), 6, "{text:#?}");
    assert!(text[5].contains("  ... 5 more ports  "), "{text:#?}");
    let column: u64 = text[2..]
        .iter()
        .map(|line| line[..9].trim().parse::<u64>().expect("a number"))
        .sum();
    assert_eq!(column, sockets(&total(&all).value), "{text:#?}");
    let all_fit = states(&lab, &["--by", "port", "--top", "8"]);
    assert_eq!(timeless(&all_fit), timeless(&all));
}

/// What `lsof -i:PORT` answers.
#[test]
fn descriptors_of_a_port() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let shared = peers.connect();
    let heir = peers.server.fork("heir");
    let own = peers.connect();
    peers.closed_by_client();
    let mut elsewhere = Peers::new(&lab);
    elsewhere.connect();
    let port = peers.address.port();
    let seen = states(&lab, &["--port", &port.to_string(), "--fds"]);
    let rows = lab.diag().rows();
    let ours = |row: &&tests::Row| row.local.port() == port || row.remote.port() == port;
    let rows: Vec<&tests::Row> = rows.iter().filter(ours).collect();
    let lines: Vec<&Line> = seen.events("states_socket").collect();
    assert_eq!(lines.len(), rows.len(), "{seen}");
    assert_eq!(total(&seen).value["by"], "process", "{seen}");
    let mut held = 0;
    for line in lines {
        let value = &line.value;
        let row = rows
            .iter()
            .find(|row| value["socket"] == row.cookie.as_str());
        let row = row.unwrap_or_else(|| panic!("{line}"));
        assert_eq!(value["state"], row.state, "{line}");
        assert_eq!(value["local"]["port"], row.local.port(), "{line}");
        assert_eq!(value["remote"]["port"], row.remote.port(), "{line}");
        // All descriptors of all processes of this test that are this socket.
        let link = format!("socket:[{}]", row.inode);
        let mut expected = BTreeSet::new();
        for pid in [peers.client.pid, peers.server.pid, heir.pid] {
            for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("a process") {
                let path = entry.expect("an entry").path();
                if fs::read_link(&path).is_ok_and(|target| target == OsStr::new(&link)) {
                    let fd = path.file_name().and_then(OsStr::to_str).expect("a number");
                    expected.insert((u64::from(pid), fd.parse::<u64>().expect("a number")));
                }
            }
        }
        let fds = value["fds"].as_array().expect("a list").iter();
        let number = |value: &Value| value.as_u64().expect("a number");
        let found: BTreeSet<(u64, u64)> = fds
            .map(|fd| (number(&fd["pid"]), number(&fd["fd"])))
            .collect();
        assert_eq!(found, expected, "{line}");
        held += found.len();
    }
    // Both clients, two servers' and the listener; the first of these and the listener in the child, too.
    assert_eq!(held, 2 + 3 + 2, "{seen}");
    let text = text(
        &lab,
        &["--port", &port.to_string(), "--by", "process", "--fds"],
    );
    let of_client = format!("(pid {})", peers.client.pid);
    let at = text.iter().position(|line| line.contains(&of_client));
    let at = at.unwrap_or_else(|| panic!("{text:#?}"));
    assert!(text[at].contains("ESTABLISHED 2"), "{text:#?}");
    let mut locals = BTreeSet::new();
    for line in &text[at + 1..at + 3] {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!((words[0], words[2]), ("fd", "ESTABLISHED"), "{text:#?}");
        assert_eq!(words[5], peers.address.to_string(), "{text:#?}");
        locals.insert(words[3].to_owned());
    }
    let connections = [&shared, &own].map(|one| one.pair.local.to_string());
    assert_eq!(locals, BTreeSet::from(connections), "{text:#?}");
    // Where several have it, it is said whose descriptor it is.
    assert!(
        text.iter()
            .any(|line| line.contains(&format!(" of {}", heir.pid))),
        "{text:#?}"
    );
}

/// Namespaces of others are counted, also one that lives by its name alone.
#[test]
fn all_network_namespaces() {
    let (Some(one), Some(mut two)) = (Lab::new(), Lab::new()) else {
        return;
    };
    let mut peers = Peers::new(&one);
    peers.connect();
    let mut others = Peers::new(&two);
    others.closed_by_client();
    let name = format!("tcptrace-tests-{}-states", process::id());
    two.netns.mount_at(&PathBuf::from("/run/netns").join(&name));
    let inode = two.netns.inode();
    drop(others);
    let run = Tcptrace::run(&["states", "--by", "netns", "-o", "json"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_adds_up(&run.lines);
    let of = |inode: u64| {
        let groups = groups(&run.lines).into_iter();
        let mut groups = groups.filter(|group| group["netns"] == inode);
        groups.next().unwrap_or_else(|| panic!("{}", run.lines))
    };
    let first = of(one.netns.inode());
    assert_eq!(first["states"], json!({"ESTABLISHED": 2, "LISTEN": 1}));
    assert_eq!(first["name"], Value::Null);
    assert_eq!(of(inode)["states"], json!({"TIME_WAIT": 1}));
    assert_eq!(of(inode)["name"], name);
    let both = total(&run.lines).value["namespaces"].as_u64();
    assert!(both >= Some(2), "{}", run.lines);
    let run = Tcptrace::run(&["states", "--netns", &name, "-o", "json"]);
    assert_eq!(sockets(&total(&run.lines).value), 1, "{}", run.lines);
}

/// A cgroup with the path that an engine gives a container's.
struct Container(PathBuf);

impl Drop for Container {
    fn drop(&mut self) {
        let removed = || fs::remove_dir(&self.0).ok();
        wait_until("the cgroup is empty", SOON, removed);
    }
}

#[test]
fn by_container() {
    let Some(lab) = Lab::new() else { return };
    let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
    let cgroup2 = table.lines().find(|line| line.contains(" - cgroup2 "));
    let cgroup2 = cgroup2.expect("cgroup2 is mounted nowhere: mount it to run this test");
    let mount = cgroup2.split(' ').nth(4).expect("a mount point");
    let id = format!("{:08x}{}", process::id(), "5".repeat(56));
    let container = Container(PathBuf::from(mount).join(format!("docker-{id}.scope")));
    fs::create_dir(&container.0).expect("root may make cgroups");
    let mut peers = Peers::new(&lab);
    let pid = peers.client.pid.to_string();
    fs::write(container.0.join("cgroup.procs"), pid).expect("root may move processes");
    peers.connect();
    peers.connect();
    peers.closed_by_client();
    let seen = states(&lab, &["--by", "container"]);
    let of = |id: Value, known: bool| {
        let groups = groups(&seen).into_iter();
        let mut groups =
            groups.filter(|group| group["container"] == id && group["container_known"] == known);
        groups.next().unwrap_or_else(|| panic!("{seen}"))["states"].clone()
    };
    assert_eq!(groups(&seen).len(), 3, "{seen}");
    assert_eq!(of(json!(id), true), json!({"ESTABLISHED": 2}));
    assert_eq!(of(Value::Null, false), json!({"TIME_WAIT": 1}));
    assert_eq!(
        of(Value::Null, true),
        json!({"ESTABLISHED": 2, "LISTEN": 1})
    );
    let seen = states(&lab, &["--container", &id[..12]]);
    assert_eq!(sockets(&total(&seen).value), 2, "{seen}");
    drop(peers);
}

/// Without privileges it counts, and says what it could not see.
#[test]
fn without_privileges() {
    let Some(lab) = Lab::new() else { return };
    let stage = Stage::new(&lab, "127.0.0.1:0", [127, 0, 0, 1].into());
    let mut own = lab.fixture("own");
    own.ask("become 65534");
    own.connect("c", stage.peers.address);
    let in_lab = |arguments: &[&str]| {
        let run = Tcptrace::run_as_nobody_in(Some(&lab.netns), arguments);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run
    };
    let run = in_lab(&["states", "-o", "json"]);
    assert_adds_up(&run.lines);
    assert_eq!(
        counts(&total(&run.lines).value["states"]),
        listed(&lab, |_| true),
        "{}",
        run.lines
    );
    let one_reason = |run: &Run| {
        // Names of namespaces, which other tests may mount, are seen by everyone.
        let said = run.stderr.lines();
        let said: Vec<&str> = said.filter(|line| !line.contains("entered")).collect();
        let [line] = said[..] else {
            panic!("{said:#?}");
        };
        assert!(
            line.starts_with("tcptrace: processes that could not be read: ")
                && line.contains("sockets in their network namespaces are missing")
                && line.contains("run as root, or with CAP_SYS_PTRACE"),
            "{line}"
        );
        line.to_owned()
    };
    assert!(!one_reason(&run).contains("has no process"));
    let run = in_lab(&["states", "--by", "process", "-o", "json"]);
    assert_adds_up(&run.lines);
    assert!(one_reason(&run).contains("what they hold has no process"));
    let groups = groups(&run.lines);
    let of = |kind: &str, uid: Value| {
        let mut groups = groups.iter();
        let group = groups.find(|group| {
            group["holder"] == kind && *group.get("uid").unwrap_or(&Value::Null) == uid
        });
        group.unwrap_or_else(|| panic!("{kind}: {}", run.lines))
    };
    let mine = of("process", Value::Null);
    assert_eq!(mine["pid"], own.pid, "{}", run.lines);
    assert_eq!(mine["states"], json!({"ESTABLISHED": 1}), "{}", run.lines);
    assert!(sockets(of("not_found", json!(0))) > 10, "{}", run.lines);
    assert_eq!(
        of("none", Value::Null)["states"],
        json!({"FIN_WAIT1": 1, "FIN_WAIT2": 2, "LAST_ACK": 1, "TIME_WAIT": 1})
    );
    // Another namespace is not to be entered.
    let inode = lab.netns.inode().to_string();
    let run = Tcptrace::run_as_nobody(&["states", "--netns", &inode]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("run as root"), "{}", run.stderr);
}

#[test]
fn watched_in_a_pipe() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    let inode = lab.netns.inode().to_string();
    let arguments = ["states", "--netns", &inode, "--watch", "200ms"];
    let watch = Tcptrace::start_limited(&[], None, &arguments);
    let is = |line: &Line, states: Value| line.value["states"] == states;
    watch.wait_for("a listener", SOON, |line| is(line, json!({"LISTEN": 1})));
    peers.connect();
    watch.wait_for("a connection", SOON, |line| {
        is(line, json!({"ESTABLISHED": 2, "LISTEN": 1}))
    });
    watch.signal(Signal::SIGINT);
    let run = watch.ended();
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_adds_up(&run.lines);
    let times: Vec<i64> = run.lines.0.iter().map(|line| line.time("time")).collect();
    for pair in times.windows(2) {
        assert!(pair[1] - pair[0] >= 150_000_000, "{}", run.lines);
    }
    // For people: reports with an empty line between them; and it ends by itself.
    let arguments = ["states", "--netns", &inode, "--watch", "--duration", "3s"];
    let run = Tcptrace::run(&arguments);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let text: Vec<&str> = run
        .lines
        .0
        .iter()
        .filter_map(|line| line.value.as_str())
        .collect();
    let report = ["        2  ESTABLISHED", "        1  LISTEN"];
    assert_eq!(text.len(), 7, "{text:#?}");
    assert_eq!(
        (&text[1..3], text[3], &text[5..]),
        (&report[..], "", &report[..])
    );
    assert!(!run.stderr.contains("tracing"), "{}", run.stderr);
}

/// On a terminal the page is redrawn. What has no room is counted in the last line, and the last page is whole.
#[test]
fn watched_on_a_terminal() {
    let Some(lab) = Lab::new() else { return };
    let mut all: Vec<Peers> = (0..4).map(|_| Peers::new(&lab)).collect();
    for peers in &mut all {
        peers.connect();
    }
    let size = Winsize {
        ws_row: 8,
        // The first line takes two rows.
        ws_col: 56,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(&size, None).expect("a terminal");
    let mut master = fs::File::from(pty.master);
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        let mut some = [0; 4096];
        // When the other end is closed, EIO.
        while let Ok(count @ 1..) = master.read(&mut some) {
            all.extend_from_slice(&some[..count]);
        }
        String::from_utf8(all).expect("UTF-8")
    });
    let inode = lab.netns.inode().to_string();
    let watch = ["--watch", "300ms", "--duration", "1s"];
    let arguments = [&["states", "--by", "port", "--netns", &inode], &watch[..]].concat();
    let run = Tcptrace::run_to(&arguments, pty.slave);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let text = reader.join().expect("no panic").replace('\r', "");
    let mut pages: Vec<&str> = text.split("\x1b[J").collect();
    let last = pages.pop().expect("a page");
    assert!(pages.len() >= 2, "{text:?}");
    let sum = |page: &str| -> u64 {
        let counts = page
            .lines()
            .filter_map(|line| line.get(..9)?.trim().parse::<u64>().ok());
        counts.sum()
    };
    for page in pages {
        // Back to the first of as many rows as there are.
        let (page, back) = page.split_once("\x1b[").expect("it is drawn over");
        assert_eq!(back, format!("{}F", page.lines().count()), "{text:?}");
        assert!(page.lines().count() < 8, "{text:?}");
        assert!(page.contains("  ... 5 more ports  "), "{text:?}");
        assert_eq!(sum(page), 4 * 3, "{page}");
    }
    assert!(!last.contains("more ports"), "{text:?}");
    assert_eq!(sum(last), 4 * 3, "{last}");
    assert_eq!(last.lines().count(), 2 + 8, "{last}");
}

#[test]
fn closed_pipe_and_full_disk() {
    let Some(lab) = Lab::new() else { return };
    let _peers = Peers::new(&lab);
    let inode = lab.netns.inode().to_string();
    for more in [&[][..], &["--watch", "100ms"]] {
        let arguments = [&["states", "--netns", &inode], more].concat();
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        let run = Tcptrace::run_to(&arguments, writer);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        let full = fs::File::options()
            .write(true)
            .open("/dev/full")
            .expect("Linux has it");
        let run = Tcptrace::run_to(&arguments, full);
        assert_eq!(run.code, Some(2));
        assert!(run.stderr.contains("No space left"), "{}", run.stderr);
    }
}

#[test]
fn hostile_names() {
    let Some(lab) = Lab::new() else { return };
    let mut peers = Peers::new(&lab);
    // Escape sequences, a line end, bytes that are not UTF-8, a mark that turns the direction of writing.
    let hostile: String = b"\x1b[2J\n\r\xff\x9b\xe2\x80\xae\"\\"
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    peers.server.ask(&format!("rename {hostile}"));
    peers.connect();
    let inode = lab.netns.inode().to_string();
    for format in ["text", "json"] {
        let name = format!("tcptrace-tests-{}-states-{format}", process::id());
        let path = env::temp_dir().join(name);
        let file = fs::File::create(&path).expect("a file");
        let arguments = ["states", "--fds", "--netns", &inode, "-o", format];
        let run = Tcptrace::run_to(&arguments, file);
        let bytes = fs::read(&path).expect("the output");
        fs::remove_file(&path).expect("it is there");
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(
            !bytes.contains(&0x1b),
            "{}",
            String::from_utf8_lossy(&bytes)
        );
        let text = String::from_utf8(bytes).expect("UTF-8");
        let dangerous = |char: char| char != '\n' && char.is_control() || char == '\u{202e}';
        assert!(!text.contains(dangerous), "{text:?}");
        // Two processes, three sockets, and the lines of all.
        match format {
            "text" => assert_eq!(text.lines().count(), 2 + 2 + 3, "{text:?}"),
            _ => {
                assert_eq!(text.lines().count(), 3 + 2 + 1, "{text:?}");
                for line in text.lines() {
                    let value: Value = serde_json::from_str(line).expect("JSON");
                    assert!(value["event"].is_string(), "{line}");
                }
            }
        }
    }
}

#[test]
fn wrong_usage() {
    for (arguments, word) in [
        (&["--by", "colour"][..], "colour"),
        (&["--top", "3"], "--by"),
        (&["--by", "port", "--top", "0"], "at least 1"),
        (&["--watch", "1ms"], "100ms"),
        (&["--duration", "3s"], "--watch"),
        (&["--state", "OPEN"], "OPEN"),
        (&["--netns", "1"], "lsns -t net"),
    ] {
        let run = Tcptrace::run(&[&["states"], arguments].concat());
        assert_eq!(run.code, Some(2), "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{arguments:?}: {}", run.stderr);
    }
}
