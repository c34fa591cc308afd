//! Connections as a kernel could make them, at random, and the tracker's way through them.

use super::{memory::assert_balance, *};

/// Random numbers that are the same every time (xorshift64*).
pub(in crate::tracker) struct Random(u64);

impl Random {
    pub(in crate::tracker) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Below `end`.
    pub(in crate::tracker) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Once in so many times.
    pub(super) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(super) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Something that happens to a connection, and what is true from then on.
pub(super) struct Step {
    ms: u64,
    /// The record of it; `None` if the kernel makes none.
    event: Option<Event>,
    full: Option<State>,
    /// The timewait socket, and when its timer is due.
    time_wait: Option<(State, u64)>,
}

/// A connection from its beginning to its end, as the kernel could make it.
pub(super) struct Story {
    socket: Socket,
    steps: Vec<Step>,
}

impl Story {
    fn of(random: &mut Random, world: &World, cookie: u64, begin: u64) -> Self {
        let socket = socket(
            cookie,
            ("10.0.0.1", 20_000 + cookie as u16),
            ("10.0.0.2", 80),
        );
        let mut story = Self {
            socket,
            steps: Vec::new(),
        };
        if random.once_in(2) {
            story.push(begin, Close, SynSent);
            if random.once_in(8) {
                story.push(begin + 1, SynSent, Close);
                return story;
            }
            story.finish(random, world, begin, SynSent)
        } else {
            story.push(begin, Listen, SynRecv);
            story.finish(random, world, begin, SynRecv)
        }
    }

    fn push(&mut self, ms: u64, old: State, new: State) {
        let mut event = change(ms, self.socket, old, new);
        if matches!(new, SynSent | FinWait1 | LastAck) {
            event = event.by(curl());
        }
        self.steps.push(Step {
            ms,
            event: Some(event.into()),
            full: (new != Close).then_some(new),
            time_wait: None,
        });
    }

    fn finish(mut self, random: &mut Random, world: &World, from: u64, state: State) -> Self {
        let mut ms = from;
        let mut old = state;
        let mut path = vec![Established];
        path.extend(random.of(&[
            &[CloseWait, LastAck, Close][..],
            &[CloseWait, Close],
            &[Close],
            &[FinWait1, Close],
            &[FinWait1, FinWait2, Close],
            &[FinWait1, FinWait2, State::TimeWait],
            &[FinWait1, FinWait2, State::TimeWait],
            &[FinWait1, Closing, State::TimeWait],
        ]));
        for new in path {
            ms += 1 + random.below(300);
            if new == TimeWaitState {
                self.time_wait(random, world, ms, old);
            } else {
                self.push(ms, old, new);
                old = new;
            }
        }
        self
    }

    fn time_wait(&mut self, random: &mut Random, world: &World, made: u64, old: State) {
        let socket = self.socket;
        let orphan = old == FinWait2 && random.once_in(2);
        let mut substate = if orphan { FinWait2 } else { TimeWaitState };
        let mut armed = made;
        let step = |ms, event, full, substate, armed: u64| Step {
            ms,
            event,
            full,
            time_wait: Some((substate, armed + 60_000)),
        };
        // Between these two a look finds both, or either.
        self.steps.push(step(
            made,
            Some(world.armed(made, socket, substate)),
            Some(old),
            substate,
            armed,
        ));
        self.steps.push(step(
            made,
            Some(change(made, socket, old, Close).no_socket().into()),
            None,
            substate,
            armed,
        ));
        let mut ms = made;
        let mut entered = made;
        for _ in 0..random.below(3) {
            ms += 1 + random.below(20_000);
            let enters = substate == FinWait2;
            substate = TimeWaitState;
            if enters {
                entered = ms;
            }
            let stamp = world.stamp(entered);
            if random.once_in(2) {
                let cancel = TimeWait {
                    entry_stamp: stamp,
                    callers: random.of(&[0, Caller::Segment.bit()]),
                    ..world.timer(ms, socket, substate, (armed, 60_000))
                };
                self.steps.push(step(
                    ms,
                    Some(Event::TimeWaitDone(cancel)),
                    None,
                    substate,
                    ms,
                ));
                let start = TimeWait {
                    entry_stamp: stamp,
                    ..world.timer(ms, socket, substate, (ms, 60_000))
                };
                self.steps.push(step(
                    ms,
                    Some(Event::TimeWaitArmed(start)),
                    None,
                    substate,
                    ms,
                ));
            } else {
                // Within the wheel's bucket: no record.
                self.steps.push(step(ms, None, None, substate, ms));
            }
            armed = ms;
        }
        let early = random.once_in(2);
        let ms = if early {
            ms + 1 + random.below(20_000)
        } else {
            armed + 60_000 + random.below(2000)
        };
        let callers = if early {
            random.of(&[0, 1, 2, 4, 8, 16, 32, 36, 64, 127])
        } else {
            0
        };
        let done = TimeWait {
            callers,
            entry_stamp: if substate == TimeWaitState {
                world.stamp(entered)
            } else {
                0
            },
            ..world.timer(ms, socket, substate, (armed, 60_000))
        };
        self.steps.push(Step {
            ms,
            event: Some(Event::TimeWaitDone(done)),
            full: None,
            time_wait: None,
        });
    }

    /// What a dump at `ms` shows of it.
    fn rows(&self, ms: u64) -> Vec<Event> {
        let Some(now) = self.steps.iter().rev().find(|step| step.ms <= ms) else {
            return Vec::new();
        };
        let mut rows = Vec::new();
        if let Some(state) = now.full {
            rows.push(row(ms, self.socket, state, 0));
        }
        if let Some((state, due)) = now.time_wait {
            let left = due.saturating_sub(ms) as u32;
            rows.push(time_wait_row(ms, self.socket, state, left));
        }
        rows
    }
}

/// How a run went.
pub(super) struct Run {
    pub(super) world: World,
    stories: Vec<Story>,
    pub(super) events: Vec<(u64, Event)>,
    next: usize,
}

impl Run {
    pub(super) fn new(random: &mut Random, world: World, connections: u64) -> Self {
        let stories: Vec<Story> = (1..=connections)
            .map(|cookie| {
                let begin = random.below(100_000);
                Story::of(random, &world, cookie, begin)
            })
            .collect();
        let mut events: Vec<(u64, Event)> = stories
            .iter()
            .flat_map(|story| &story.steps)
            .filter_map(|step| Some((step.ms, step.event.clone()?)))
            .collect();
        // Stable: the order of each connection stays.
        events.sort_by_key(|(ms, _)| *ms);
        Self {
            world,
            stories,
            events,
            next: 0,
        }
    }

    /// Feeds the records up to `ms`. Returns how many were lost on the way.
    pub(super) fn feed_until(
        &mut self,
        ms: u64,
        random: &mut Random,
        lose_once_in: Option<u64>,
    ) -> u64 {
        let mut lost = 0;
        while let Some((_, event)) = self.events.get(self.next).filter(|(at, _)| *at <= ms) {
            self.next += 1;
            if lose_once_in.is_some_and(|times| random.once_in(times)) {
                lost += 1;
            } else {
                self.world.feed(event.clone());
                assert_balance(&self.world.tracker);
            }
        }
        lost
    }

    /// A look at `ms`, with the records of up to `behind` ms before it still unread.
    pub(super) fn look(
        &mut self,
        ms: u64,
        scope: Scope,
        behind: u64,
        random: &mut Random,
        lose: Option<u64>,
    ) -> u64 {
        let mut lost = self.feed_until(ms.saturating_sub(behind), random, lose);
        self.world.feed(look(ms, scope));
        let rows: Vec<Event> = self
            .stories
            .iter()
            .flat_map(|story| story.rows(ms))
            .collect();
        for event in rows {
            let is_time_wait = matches!(&event, Event::Socket(row) if row.time_wait_ms.is_some());
            // A dump can miss what is there.
            if (scope == Scope::All || is_time_wait) && !random.once_in(50) {
                self.world.feed(event);
                assert_balance(&self.world.tracker);
            }
        }
        lost += self.feed_until(ms, random, lose);
        self.world.feed(look_end(ms, &[NETNS]));
        assert_balance(&self.world.tracker);
        lost
    }

    /// When the last of it happens.
    pub(super) fn last(&self) -> u64 {
        let steps = self.stories.iter().flat_map(|story| &story.steps);
        steps.map(|step| step.ms).max().unwrap_or(0)
    }
}
