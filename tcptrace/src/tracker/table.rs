//! Millions of entries by key, in little more than their own size.
//!
//! A `HashMap` keeps entries in its buckets, of which between an eighth and more than half are empty, and
//! copies all of them when it grows. Here the buckets hold numbers of four bytes; the entries lie in chunks
//! that stay where they are.

use std::hash::{BuildHasher as _, Hash};

use hashbrown::{DefaultHashBuilder, HashTable, hash_table};

/// Entries in a chunk.
const CHUNK: usize = 1024;

/// What knows its own key.
pub(super) trait Keyed {
    type Key: Hash + Eq + Copy;

    /// It must stay the same while the entry is in a table.
    fn key(&self) -> Self::Key;
}

/// See the [module](self).
pub(super) struct Table<T> {
    /// By key: the numbers of entries.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Each as long as [`CHUNK`], but for the last.
    chunks: Vec<Vec<Option<T>>>,
    /// Numbers that were given up.
    free: Vec<u32>,
}

const fn place(number: u32) -> (usize, usize) {
    (number as usize / CHUNK, number as usize % CHUNK)
}

impl<T: Keyed> Table<T> {
    pub(super) fn new() -> Self {
        Self {
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            chunks: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    fn at(chunks: &[Vec<Option<T>>], number: u32) -> Option<&T> {
        let (chunk, at) = place(number);
        chunks.get(chunk)?.get(at)?.as_ref()
    }

    fn number(&self, key: T::Key) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        self.index
            .find(hash, |number| {
                Self::at(&self.chunks, *number).is_some_and(|entry| entry.key() == key)
            })
            .copied()
    }

    pub(super) fn contains(&self, key: T::Key) -> bool {
        self.number(key).is_some()
    }

    pub(super) fn get(&self, key: T::Key) -> Option<&T> {
        Self::at(&self.chunks, self.number(key)?)
    }

    pub(super) fn get_mut(&mut self, key: T::Key) -> Option<&mut T> {
        let (chunk, at) = place(self.number(key)?);
        self.chunks.get_mut(chunk)?.get_mut(at)?.as_mut()
    }

    /// Puts an entry in. Returns the one that had its key.
    pub(super) fn insert(&mut self, entry: T) -> Option<T> {
        let key = entry.key();
        let chunks = &self.chunks;
        let slot = self.index.entry(
            self.hasher.hash_one(key),
            |number| Self::at(chunks, *number).is_some_and(|entry| entry.key() == key),
            |number| Self::at(chunks, *number).map_or(0, |entry| self.hasher.hash_one(entry.key())),
        );
        let vacant = match slot {
            hash_table::Entry::Occupied(number) => {
                let (chunk, at) = place(*number.get());
                return self.chunks[chunk][at].replace(entry);
            }
            hash_table::Entry::Vacant(vacant) => vacant,
        };
        if let Some(number) = self.free.pop() {
            vacant.insert(number);
            let (chunk, at) = place(number);
            self.chunks[chunk][at] = Some(entry);
            return None;
        }
        let (full, last) = match self.chunks.last() {
            Some(last) if last.len() < CHUNK => (self.chunks.len() - 1, last.len()),
            _ => (self.chunks.len(), 0),
        };
        // Four thousand million connections do not fit into any memory.
        vacant.insert((full * CHUNK + last) as u32);
        if last == 0 {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        self.chunks[full].push(Some(entry));
        None
    }

    pub(super) fn remove(&mut self, key: T::Key) -> Option<T> {
        let chunks = &self.chunks;
        let found = self.index.find_entry(self.hasher.hash_one(key), |number| {
            Self::at(chunks, *number).is_some_and(|entry| entry.key() == key)
        });
        let (number, _) = found.ok()?.remove();
        self.free.push(number);
        let (chunk, at) = place(number);
        self.chunks[chunk][at].take()
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flatten().flatten()
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.chunks.iter_mut().flatten().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::tracker::tests::Random;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Entry(u64, usize);

    impl Keyed for Entry {
        type Key = u64;

        fn key(&self) -> u64 {
            self.0
        }
    }

    /// Whatever is done to it, in whatever order, it holds what a map would hold.
    #[test]
    fn it_is_a_map() {
        let mut table = Table::new();
        let mut map = HashMap::new();
        let mut random = Random::new(1);
        for step in 0..200_000 {
            let key = random.below(5000);
            match random.below(3) {
                0 => assert_eq!(
                    table.remove(key).map(|entry: Entry| entry.1),
                    map.remove(&key)
                ),
                1 if let Some(entry) = table.get_mut(key) => {
                    entry.1 = step;
                    assert!(map.insert(key, step).is_some());
                }
                _ => {
                    let before = table.insert(Entry(key, step)).map(|entry| entry.1);
                    assert_eq!(before, map.insert(key, step));
                }
            }
            assert_eq!(table.get(key).map(|entry| entry.1), map.get(&key).copied());
            assert_eq!(table.contains(key), map.contains_key(&key));
            assert_eq!(table.len(), map.len());
        }
        let mut values: Vec<(u64, usize)> =
            table.values().map(|entry| (entry.0, entry.1)).collect();
        let mut expected: Vec<(u64, usize)> = map.into_iter().collect();
        values.sort_unstable();
        expected.sort_unstable();
        assert_eq!(values, expected);
        table.values_mut().for_each(|entry| entry.1 = 0);
        assert!(table.values().all(|entry| entry.1 == 0));
        // What was given up is used again.
        assert!(table.chunks.len() <= 5, "{}", table.chunks.len());
    }
}
