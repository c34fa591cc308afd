//! Random numbers that are the same every time for the same seed.

use std::time::Duration;

/// xorshift64*.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        // Neighbouring seeds begin alike.
        for _ in 0..8 {
            random.next();
        }
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub(crate) fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize].clone()
    }

    /// At least `least` and less than `end` milliseconds.
    pub(crate) fn milliseconds(&mut self, least: u64, end: u64) -> Duration {
        Duration::from_millis(least + self.below(end - least))
    }

    /// How long somebody waits before the next thing that is done: often not at all, seldom long. Around
    /// 40 ms, when the kernel acknowledges a FIN that nothing else has acknowledged, it is interesting.
    pub(crate) fn pause(&mut self) -> Duration {
        match self.below(10) {
            0..3 => Duration::ZERO,
            3..5 => self.milliseconds(1, 30),
            5..7 => self.milliseconds(30, 60),
            7..9 => self.milliseconds(60, 500),
            _ => self.milliseconds(500, 2000),
        }
    }
}
