//! Events as lines of a recording.

use super::{Accept, Event, Socket, Task, TimeWait, Transition};
use crate::pieces::Pieces as _;

/// Writes a line as `serde_json` would. What there are many of goes without it.
pub fn write(to: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Transition(record) => transition(to, record),
        Event::Accept(record) => accept(to, record),
        Event::TimeWaitArmed(record) => time_wait(to, "time_wait_armed", record),
        Event::TimeWaitDone(record) => time_wait(to, "time_wait_done", record),
        other => {
            let written = serde_json::to_writer(&mut *to, other);
            debug_assert!(written.is_ok(), "neither a vector nor an event can fail");
        }
    }
    to.push(b'\n');
}

fn transition(to: &mut Vec<u8>, record: &Transition) {
    begin(to, "transition", record.time, &record.socket);
    to.text(r#","old":""#).text(record.old.name());
    to.text(r#"","new":""#).text(record.new.name());
    to.text("\"");
    if record.error != 0 {
        to.text(r#","error":"#).number(record.error);
    }
    if record.stale_port != 0 {
        to.text(r#","stale_port":"#).number(record.stale_port);
    }
    if record.no_time_wait {
        to.text(r#","no_time_wait":true"#);
    }
    to.text(r#","shutdown":"#).number(record.shutdown);
    to.text(r#","owned":"#).truth(record.owned);
    to.text(r#","has_socket":"#).truth(record.has_socket);
    to.text(r#","inode":"#).number(record.inode);
    to.text(r#","cgroup":"#).number(record.cgroup);
    if !record.task.is_unknown() {
        task(to, &record.task);
    }
    to.text("}");
}

fn accept(to: &mut Vec<u8>, record: &Accept) {
    begin(to, "accept", record.time, &record.socket);
    to.text(r#","inode":"#).number(record.inode);
    task(to, &record.task);
    to.text("}");
}

fn time_wait(to: &mut Vec<u8>, event: &str, record: &TimeWait) {
    begin(to, event, record.time, &record.socket);
    to.text(r#","jiffies":"#).number(record.jiffies);
    to.text(r#","expires":"#).number(record.expires);
    if record.entry_stamp != 0 {
        to.text(r#","entry_stamp":"#).number(record.entry_stamp);
    }
    to.text(r#","substate":""#).text(record.substate.name());
    to.text("\"");
    if record.callers != 0 {
        to.text(r#","callers":"#).number(record.callers);
    }
    to.text("}");
}

fn begin(to: &mut Vec<u8>, event: &str, time: u64, socket: &Socket) {
    to.text(r#"{"event":""#).text(event);
    to.text(r#"","time":"#).number(time);
    to.text(r#","cookie":""#).hex(socket.cookie);
    to.text(r#"","netns":"#).number(socket.netns);
    let tuple = &socket.tuple;
    to.text(r#","local_addr":""#).address(&tuple.local_addr);
    to.text(r#"","remote_addr":""#).address(&tuple.remote_addr);
    to.text(r#"","local_port":"#).number(tuple.local_port);
    to.text(r#","remote_port":"#).number(tuple.remote_port);
}

fn task(to: &mut Vec<u8>, task: &Task) {
    to.text(r#","task":{"pid":"#).number(task.pid);
    to.text(r#","comm":"#).string(&task.comm.recorded());
    to.text(r#","start":"#).number(task.start);
    to.text(r#","uid":"#).number(task.uid);
    for (name, is_so) in [
        (r#","kthread":true"#, task.kthread),
        (r#","exiting":true"#, task.exiting),
        (r#","tree":true"#, task.tree),
    ] {
        if is_so {
            to.text(name);
        }
    }
    to.text("}");
}

#[cfg(test)]
mod tests {
    use tcptrace_ebpf::State;

    use super::*;
    use crate::event::{Comm, Look, Scope, Tuple, address_bytes};

    /// Of each kind, with all that can be left out and without.
    fn events() -> Vec<Event> {
        let mut events = vec![
            Event::Tick { time: 7 },
            Event::Look(Look {
                time: 8,
                scope: Scope::All,
            }),
        ];
        let names: [&[u8]; 5] = [
            b"web",
            b"",
            b"a\"b\\c\n",
            "m\u{fc}ller".as_bytes(),
            b"\xffa\x1b",
        ];
        let addresses = ["127.0.0.1", "fe80::1", "::", "255.255.255.255", "::1.2.3.4"];
        for (index, (name, address)) in names.into_iter().zip(addresses).enumerate() {
            let (number, is_so) = (index as u32, index % 2 == 0);
            let socket = Socket {
                cookie: [0, 1, 0x1002, u64::MAX, 0xabc][index],
                netns: 4_026_531_840,
                tuple: Tuple {
                    local_addr: address_bytes(address.parse().unwrap()),
                    remote_addr: address_bytes("10.0.0.1".parse().unwrap()),
                    local_port: 80 * index as u16,
                    remote_port: u16::MAX,
                },
            };
            let task = Task {
                pid: number * 1000,
                comm: Comm::new(name),
                start: u64::MAX - u64::from(number),
                uid: number,
                kthread: is_so,
                exiting: !is_so,
                tree: is_so,
            };
            let transition = Transition {
                time: 123,
                socket,
                old: State::Established,
                new: State::CloseWait,
                error: number,
                stale_port: index as u16,
                no_time_wait: is_so,
                shutdown: index as u8,
                owned: is_so,
                has_socket: !is_so,
                inode: number,
                cgroup: u64::from(number),
                task,
            };
            events.push(Event::Transition(transition));
            events.push(Event::Transition(Transition {
                task: Task::default(),
                ..transition
            }));
            events.push(Event::Accept(Accept {
                time: 124,
                socket,
                inode: number,
                task,
            }));
            let record = TimeWait {
                time: 125,
                socket,
                jiffies: 4_294_967_296,
                expires: 0,
                entry_stamp: number,
                substate: State::TimeWait,
                callers: index as u8,
            };
            events.push(Event::TimeWaitArmed(record));
            events.push(Event::TimeWaitDone(record));
        }
        events
    }

    #[test]
    fn lines_are_as_serde_json_writes_them() {
        for event in events() {
            let mut line = Vec::new();
            write(&mut line, &event);
            let expected = serde_json::to_string(&event).unwrap() + "\n";
            assert_eq!(String::from_utf8(line).unwrap(), expected);
        }
    }
}
