//! Records go in, events come out: through the opener, and a reader that is a thread of this test.

use super::{target::Key, *};

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

/// What is told for a record: the id of its stack, and the stacks themselves.
fn take(stacks: &mut Stacks, record: &kernel::Stack) -> (u32, Vec<Stack>) {
    let (mut called, mut told) = (Vec::new(), Vec::new());
    let mut each = |event: &Event| match event {
        Event::Called(of) => called.push(of.stack),
        Event::Stack(stack) => told.push(stack.as_ref().clone()),
        _ => {}
    };
    stacks.take(record.as_bytes(), &mut each).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while stacks.is_waiting() {
        assert!(Instant::now() < deadline, "nothing came back");
        thread::sleep(Duration::from_millis(1));
        stacks.told(&mut each);
    }
    assert_eq!(called.len(), 1);
    (called[0], told)
}

fn stacks() -> Stacks {
    let mut stacks = Stacks::new();
    stacks.private_pids = false;
    stacks
}

/// The stacks that are told, until that one has its frames: a test has much debug information to be read.
fn named(stacks: &mut Stacks, mut told: Vec<Stack>, id: u32) -> Stack {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut found = told.iter().filter(|stack| stack.id == id);
        if let Some(stack) = found.next() {
            assert!(found.next().is_none(), "{told:?}");
            return stack.clone();
        }
        assert!(Instant::now() < deadline, "{told:?}");
        thread::sleep(Duration::from_millis(1));
        stacks.told(&mut |event: &Event| {
            if let Event::Stack(stack) = event {
                told.push(stack.as_ref().clone());
            }
        });
    }
}

#[test]
fn a_stack_has_one_id_and_its_name_follows() {
    let mut stacks = stacks();
    let own = record(take as *const () as usize);
    let (first, mut told) = take(&mut stacks, &own);
    for _ in 0..2 {
        let (id, more) = take(&mut stacks, &own);
        assert_eq!(id, first);
        told.extend(more);
        stacks.look();
    }
    let stack = named(&mut stacks, told, first);
    let function = stack.frames[0].function.as_deref();
    assert!(
        function.is_some_and(|name| name.contains("take")),
        "{stack:?}"
    );
    assert_eq!(stack.pid, std::process::id());
}

#[test]
fn stacks_without_frames_are_one_for_each_reason() {
    let mut stacks = stacks();
    let mut gone = record(1);
    gone.header.start = 7;
    let (id, told) = take(&mut stacks, &gone);
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].id, told[0].end), (id, StackEnd::Gone));
    gone.header.start = 20_000_007;
    assert_eq!(take(&mut stacks, &gone), (id, Vec::new()));
    let (other, told) = take(&mut stacks, &record(0));
    assert_eq!((told[0].id, told[0].end), (other, StackEnd::NoUser));
    assert_ne!(other, id);
}

#[test]
fn of_a_stack_that_could_not_be_read_that_is_said() {
    let mut stacks = stacks();
    let mut record = record(take as *const () as usize);
    record.copied = 0;
    let (id, told) = take(&mut stacks, &record);
    let stack = named(&mut stacks, told, id);
    assert_eq!((stack.frames.len(), stack.end), (1, StackEnd::Unreadable));
}

#[test]
fn what_finds_no_room_is_given_up_at_once() {
    let mut stacks = stacks();
    // Nobody takes anything out.
    stacks.queue = Queue::default();
    let own = record(take as *const () as usize);
    let mut given_up = 0;
    let mut each = |event: &Event| {
        if let Event::Stack(stack) = event {
            assert_eq!(stack.end, StackEnd::Overload);
        }
        given_up += u32::from(matches!(event, Event::Called(_)));
    };
    let fits = budget::QUEUE / budget::SHARE / queued(&own).bytes.len();
    for _ in 0..fits + 3 {
        stacks.take(own.as_bytes(), &mut each).unwrap();
    }
    assert_eq!((given_up, stacks.outstanding), (3, fits));
}

#[test]
fn what_is_given_up_is_not_overtaken_by_what_came_before() {
    let mut stacks = stacks();
    let (tell, told) = sync_channel(8);
    (stacks.told, stacks.outstanding) = (Some(told), 2);
    let called = |time, cookie| {
        Told::Event(Event::Called(Called {
            time,
            cookie,
            stack: 1,
        }))
    };
    let mut header = kernel::Header::ZERO;
    (header.time, header.cookie) = (20, 7);
    let mut ids = Vec::new();
    let mut each = |event: &Event| {
        if let Event::Called(called) = event {
            ids.push((called.cookie, called.time));
        }
    };
    stacks.give_up(&header, Via::Connect, StackEnd::Overload, &mut each);
    tell.send(called(10, 7)).unwrap();
    tell.send(called(10, 8)).unwrap();
    stacks.told(&mut each);
    assert_eq!(ids, [(7, 20), (8, 10)]);
    assert!(stacks.given_up.is_empty());
}
