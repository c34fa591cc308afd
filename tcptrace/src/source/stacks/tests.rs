//! What is kept of processes, and what is not.

use zerocopy::{FromZeros as _, IntoBytes as _};

use super::*;

/// A record of this process's stack, as the kernel would write it, with nothing copied but where it is.
fn record(instruction: usize) -> Box<kernel::Stack> {
    let mut record = Box::new(kernel::Stack::new_zeroed());
    let key = Key::of_this();
    record.header.kind = Kind::Stack as u8;
    record.header.pid = key.pid;
    record.header.start = key.start_ns();
    record.start_stack = key.start_stack;
    record.via = kernel::Via::Connect as u32;
    record.instruction = instruction as u64;
    record.stack = 0x1000;
    record.copied = 8;
    record
}

/// The ids of stacks that records have, and those told of at once.
fn ids(stacks: &mut Stacks, record: &kernel::Stack) -> (u32, Vec<(u32, StackEnd)>) {
    let (mut called, mut told) = (0, Vec::new());
    let mut each = |event: &Event| match event {
        Event::Called(of) => called = of.stack,
        Event::Stack(stack) => told.push((stack.id, stack.end)),
        _ => {}
    };
    stacks.take(record.as_bytes(), &mut each).unwrap();
    (called, told)
}

fn stacks() -> Stacks {
    let mut stacks = Stacks::new().unwrap();
    stacks.private_pids = false;
    stacks
}

#[test]
fn stacks_of_processes_that_ended_are_forgotten_and_ids_not_given_twice() {
    let mut stacks = stacks();
    let own = record(ids as *const () as usize);
    let (first, _) = ids(&mut stacks, &own);
    assert_eq!(ids(&mut stacks, &own).0, first);
    stacks.look();
    assert_eq!((stacks.ids.len(), stacks.processes.len()), (1, 1));
    // As if the process were another than the one that was there.
    stacks.processes.clear();
    stacks.look();
    assert_eq!(stacks.ids.len(), 0);
    assert_eq!(ids(&mut stacks, &own).0, first + 1);
}

#[test]
fn stacks_without_frames_are_one_for_each_reason() {
    let mut stacks = stacks();
    let mut gone = record(1);
    gone.header.start = 7;
    let (id, told) = ids(&mut stacks, &gone);
    assert_eq!(told, [(id, StackEnd::Gone)]);
    gone.header.start = 20_000_007;
    assert_eq!(ids(&mut stacks, &gone), (id, Vec::new()));
    assert_eq!(stacks.processes.len(), 2);
    stacks.look();
    assert_eq!((stacks.ids.len(), stacks.processes.len()), (0, 0));
    let (other, told) = ids(&mut stacks, &record(0));
    assert_eq!(told, [(other, StackEnd::NoUser)]);
    assert_ne!(other, id);
}

#[test]
fn of_too_many_processes_the_one_seen_longest_ago_is_forgotten() {
    let mut stacks = stacks();
    let mut gone = record(1);
    let of = |start: usize| start as u64 * 10_000_000;
    for start in 1..=MOST_PROCESSES {
        gone.header.start = of(start);
        ids(&mut stacks, &gone);
    }
    gone.header.start = of(1);
    ids(&mut stacks, &gone);
    let own = record(0);
    ids(&mut stacks, &own);
    assert_eq!(stacks.processes.len(), MOST_PROCESSES);
    assert!(stacks.processes.contains_key(&Key::of(&gone)));
    assert!(stacks.processes.contains_key(&Key::of(&own)));
    gone.header.start = of(2);
    assert!(!stacks.processes.contains_key(&Key::of(&gone)));
}

#[test]
fn of_a_stack_that_could_not_be_read_that_is_said() {
    let mut stacks = stacks();
    let mut record = record(ids as *const () as usize);
    let walked = |stacks: &mut Stacks, record: &kernel::Stack| {
        let walked = stacks.walk(&Key::of(record), record);
        (walked.addresses.len(), walked.end)
    };
    assert_ne!(walked(&mut stacks, &record).1, StackEnd::Unreadable);
    record.copied = 0;
    assert_eq!(walked(&mut stacks, &record), (1, StackEnd::Unreadable));
}
