//! Each filter selects exactly its sockets, with everything that happens to them; many tcptraces at
//! once, and each has its own full truth.

use std::{fs, path::PathBuf, thread, time::Duration};

use tests::{Connection, Fixture, Lab, Lines, Peers, Seen, Tcptrace};

const SOON: Duration = Duration::from_secs(20);

/// The lines of one socket.
fn of<'a>(lines: &'a Lines, cookie: &str) -> Vec<Seen<'a>> {
    lines
        .of(cookie)
        .into_iter()
        .map(|line| Seen(&line.value))
        .collect()
}

/// Both sockets of both.
fn both<'a>(connections: &[&'a Connection]) -> Vec<&'a str> {
    connections
        .iter()
        .flat_map(|made| [made.client.as_str(), made.server.as_str()])
        .collect()
}

/// Closes a connection and ends its TIME_WAIT.
fn end(lab: &Lab, peers: &mut Peers, connection: &Connection) {
    peers.client_closes_first(connection);
    let diag = lab.diag();
    diag.destroy(&diag.row(&connection.client).expect("in TIME_WAIT"))
        .expect("INET_DIAG_DESTROY");
}

struct Traffic {
    peers: [Peers; 4],
}

impl Traffic {
    fn new(lab: &Lab) -> Self {
        let comms = ["alpha", "beta", "gamma", "delta"];
        let servers = ["first", "second", "third", "fourth"];
        let listen = ["127.0.0.1:0", "127.0.0.2:0", "[::1]:0", "[::]:0"];
        let connect = ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"];
        let peers = std::array::from_fn(|i| {
            let ip = connect[i].parse().expect("an address");
            Peers::named(lab, comms[i], servers[i], listen[i], ip)
        });
        Self { peers }
    }

    /// The port of the client's first connection is the kernel's choice among one.
    fn make(&mut self, lab: &Lab) -> [Connection; 4] {
        let [alpha, beta, gamma, delta] = &mut self.peers;
        lab.netns.set("ipv4/ip_local_port_range", "41000 41000");
        let first = alpha.connect();
        assert_eq!(first.pair.local.port(), 41000);
        lab.netns.set("ipv4/ip_local_port_range", "42000 43000");
        let second = beta.connect_from("127.0.0.3:41003".parse().expect("an address"));
        let third = gamma.connect();
        let fourth = delta.connect();
        end(lab, alpha, &first);
        end(lab, beta, &second);
        end(lab, gamma, &third);
        end(lab, delta, &fourth);
        [first, second, third, fourth]
    }
}

#[test]
fn each_filter_selects_exactly_its_sockets() {
    let Some(lab) = Lab::new() else { return };
    let mut traffic = Traffic::new(&lab);
    let [port, second_port, ..] = traffic
        .peers
        .each_ref()
        .map(|peers| peers.address.port().to_string());
    let pid = traffic.peers[0].client.pid.to_string();
    let server_pid = traffic.peers[1].server.pid.to_string();

    type Selects = fn(&[Connection; 4]) -> Vec<&str>;
    let client_of_first: Selects = |[first, ..]| vec![&first.client];
    let server_of_first: Selects = |[first, ..]| vec![&first.server];
    let client_of_second: Selects = |[_, second, ..]| vec![&second.client];
    let server_of_second: Selects = |[_, second, ..]| vec![&second.server];
    let first: Selects = |[first, ..]| both(&[first]);
    let second: Selects = |[_, second, ..]| both(&[second]);
    let third: Selects = |[_, _, third, _]| both(&[third]);
    let ipv4: Selects = |[first, second, _, fourth]| both(&[first, second, fourth]);
    let all: Selects = |[first, second, third, fourth]| both(&[first, second, third, fourth]);
    let none: Selects = |_| Vec::new();

    let filters: Vec<(Vec<&str>, Selects)> = vec![
        (vec![], all),
        (vec!["--pid", &pid], client_of_first),
        (vec!["--pid", &server_pid], server_of_second),
        (vec!["--comm", "beta"], client_of_second),
        (vec!["--comm", "second"], server_of_second),
        (vec!["--port", &port], first),
        (vec!["--port", "41000"], first),
        (vec!["--lport", &port], server_of_first),
        (vec!["--rport", &port], client_of_first),
        // A port that the kernel chooses after SYN_SENT has begun.
        (vec!["--lport", "41000"], client_of_first),
        (vec!["--rport", "41000"], server_of_first),
        // A port that was bound before.
        (vec!["--lport", "41003"], client_of_second),
        (vec!["--addr", "127.0.0.2"], second),
        (vec!["--addr", "127.0.0.2/31"], second),
        (vec!["--addr", "127.0.0.0/8"], ipv4),
        (vec!["--addr", "::1"], third),
        (vec!["-4"], ipv4),
        (vec!["-6"], third),
        (vec!["--port", &port, "--comm", "alpha"], client_of_first),
        (
            vec!["-4", "--addr", "127.0.0.3", "--rport", &second_port],
            client_of_second,
        ),
        (vec!["--pid", &pid, "--rport", &second_port], none),
        (vec!["-6", "--addr", "127.0.0.1"], none),
    ];
    let running: Vec<(Vec<&str>, Selects, Tcptrace)> = filters
        .into_iter()
        .map(|(filter, selects)| {
            let tcptrace = lab.tcptrace(&[&["stream"], filter.as_slice()].concat());
            (filter, selects, tcptrace)
        })
        .collect();
    let made = traffic.make(&lab);
    for Connection { client, server, .. } in &made {
        running[0].2.wait_state(client, "CLOSE", SOON);
        running[0].2.wait_state(server, "CLOSE", SOON);
    }
    thread::sleep(Duration::from_millis(500));

    let mut runs = running
        .into_iter()
        .map(|(filter, selects, tcptrace)| (filter, selects(&made), tcptrace.finish_whole()));
    let (_, everything, truth) = runs.next().expect("the one without a filter");
    for cookie in &everything {
        assert!(truth.of(cookie).len() >= 5, "socket {cookie} of {truth}");
    }
    for (filter, selected, lines) in runs {
        for cookie in &everything {
            if selected.contains(cookie) {
                assert_eq!(
                    of(&lines, cookie),
                    of(&truth, cookie),
                    "{filter:?}: {lines}\n{truth}"
                );
            } else {
                assert!(
                    lines.of(cookie).is_empty(),
                    "{filter:?} selects {cookie}: {lines}"
                );
            }
        }
        let others = lines
            .events("transition")
            .find(|line| !everything.iter().any(|cookie| line.is_transition(cookie)));
        assert!(others.is_none(), "{filter:?}: {}", others.expect("some"));
    }
}

#[test]
fn states_select_the_changes_into_and_out_of_them() {
    let Some(lab) = Lab::new() else { return };
    let mut traffic = Traffic::new(&lab);
    let truth = lab.tcptrace(&["stream"]);
    // Both ways of writing a state.
    let states = ["close-wait", "CLOSE_WAIT", "TIME_WAIT", "established"];
    let filtered = states.map(|state| lab.tcptrace(&["stream", "--state", state]));
    let made = traffic.make(&lab);
    for Connection { client, server, .. } in &made {
        truth.wait_state(client, "CLOSE", SOON);
        truth.wait_state(server, "CLOSE", SOON);
    }
    thread::sleep(Duration::from_millis(500));
    let truth = truth.finish_whole();
    for (state, tcptrace) in states.into_iter().zip(filtered) {
        let state = state.to_uppercase().replace('-', "_");
        let lines = tcptrace.finish_whole();
        for cookie in both(&made.each_ref()) {
            let touches = |seen: &&Seen<'_>| seen.0["from"] == *state || seen.0["to"] == *state;
            let whole = of(&truth, cookie);
            let expected: Vec<_> = whole
                .iter()
                .filter(touches)
                .map(|seen| changes(*seen))
                .collect();
            let got: Vec<_> = of(&lines, cookie).into_iter().map(changes).collect();
            assert_eq!(got, expected, "--state {state}: {lines}\n{truth}");
        }
    }
}

/// What happened, without what a filter may leave unknown.
fn changes(seen: Seen<'_>) -> [Seen<'_>; 5] {
    ["time", "from", "to", "owner", "error"].map(|key| Seen(&seen.0[key]))
}

#[test]
fn timewait_is_filtered_as_well() {
    let Some(lab) = Lab::new() else { return };
    let mut traffic = Traffic::new(&lab);
    let port = traffic.peers[0].address.port().to_string();
    let all = lab.tcptrace(&["timewait"]);
    let by_port = lab.tcptrace(&["timewait", "--rport", &port]);
    let by_comm = lab.tcptrace(&["timewait", "--comm", "gamma"]);
    let [first, second, third, fourth] = traffic.make(&lab);
    let last = |line: &tests::Line| {
        line.value["event"] == "time_wait" && line.value["socket"] == fourth.client
    };
    all.wait_for("the last end", SOON, last);
    thread::sleep(Duration::from_millis(500));
    let truth = all.finish_whole();
    for (tcptrace, selected) in [(by_port, &first), (by_comm, &third)] {
        let lines = tcptrace.finish_whole();
        let line = lines.time_wait(&selected.client);
        let expected = truth.time_wait(&selected.client);
        assert_eq!(Seen(&line.value), Seen(&expected.value));
        assert_eq!(lines.events("time_wait").count(), 1, "{lines}");
    }
    assert_eq!(truth.events("time_wait").count(), 4, "{truth}");
    assert_eq!(truth.time_wait(&second.client).pair(), second.pair);
}

/// What happens in another namespace is not seen, even with the same addresses and ports.
#[test]
fn netns_selects_one_namespace() {
    let Some(lab) = Lab::new() else { return };
    let other = Lab::new().expect("as the first");
    let path = lab.netns.path();
    let by_path = Tcptrace::start(&["stream", "--netns", path.to_str().expect("a plain path")]);
    let by_inode = lab.tcptrace(&["stream"]);
    let mut here = Peers::over(&lab, "127.0.0.1:45000", [127, 0, 0, 1].into());
    let mut there = Peers::over(&other, "127.0.0.1:45000", [127, 0, 0, 1].into());
    let [seen, unseen] = [&mut here, &mut there].map(|peers| {
        let connection = peers.connect_from("127.0.0.1:45001".parse().expect("an address"));
        peers.client.ask(&format!("reset {}", connection.name));
        connection
    });
    for tcptrace in [by_path, by_inode] {
        tcptrace.wait_state(&seen.server, "CLOSE", SOON);
        thread::sleep(Duration::from_millis(300));
        let lines = tcptrace.finish_whole();
        lines.assert_silent(&unseen.client);
        lines.assert_silent(&unseen.server);
        assert!(
            lines
                .events("transition")
                .all(|line| line.value["netns"] == lab.netns.inode())
        );
    }
}

/// A cgroup (version 2) with the path that an engine gives a container's.
struct Container {
    path: PathBuf,
    id: String,
}

impl Container {
    fn new(digit: &str) -> Self {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
        let cgroup2 = table
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .expect("cgroup2 is mounted nowhere: mount it to run this test");
        let mount = cgroup2.split(' ').nth(4).expect("a mount point");
        let id = format!("{:08x}{}", std::process::id(), digit.repeat(56));
        let path = PathBuf::from(mount).join(format!("docker-{id}.scope"));
        fs::create_dir(&path).expect("root may make cgroups");
        Self { path, id }
    }

    fn take(&self, fixture: &Fixture) {
        let procs = self.path.join("cgroup.procs");
        fs::write(procs, fixture.pid.to_string()).expect("root may move processes");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Its processes are on their way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} is left behind", self.path.display());
    }
}

#[test]
fn container_selects_the_sockets_made_in_it() {
    let Some(lab) = Lab::new() else { return };
    let (inside, other) = (Container::new("a"), Container::new("b"));
    let mut peers = Peers::new(&lab);
    let mut outsider = lab.fixture("outsider");
    inside.take(&peers.client);
    other.take(&outsider);
    // As `docker ps` shows it, and one that is nobody's.
    let by_id = lab.tcptrace(&["stream", "--container", &inside.id[..12]]);
    let by_none = lab.tcptrace(&["stream", "--container", &"f".repeat(12)]);
    let everything = lab.tcptrace(&["stream"]);
    let made = peers.connect();
    outsider.connect("elsewhere", peers.address);
    let elsewhere = outsider.cookie("elsewhere");
    peers.client.ask(&format!("reset {}", made.name));
    outsider.ask("reset elsewhere");
    everything.wait_state(&made.client, "CLOSE", SOON);
    everything.wait_state(&elsewhere, "CLOSE", SOON);
    by_id.wait_state(&made.client, "CLOSE", SOON);

    let everything = everything.finish_whole();
    let lines = by_id.finish_whole();
    assert_eq!(of(&lines, &made.client), of(&everything, &made.client));
    for line in lines.events("transition") {
        assert!(line.is_transition(&made.client), "{line}");
        assert_eq!(line.value["container"], inside.id, "{line}");
    }
    for line in everything.of(&elsewhere) {
        assert_eq!(line.value["container"], other.id, "{line}");
    }
    for line in everything.of(&made.server) {
        assert!(line.value.get("container").is_none(), "{line}");
    }
    assert_eq!(by_none.finish_whole().events("transition").count(), 0);
    drop((peers, outsider));
}
