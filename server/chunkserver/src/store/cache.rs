//! [`ClockCache`]: a bounded map that evicts what was not used for one round of its hand (second chance). Holds clean
//! metadata rows and open data files; what is dirty lives elsewhere and is never evicted.
//!
//! Invariant: never more than `capacity` entries, and an entry is found until it is evicted, replaced or removed.

use std::collections::HashMap;
use std::hash::Hash;

#[derive(Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    used: bool,
}

/// A map of at most `capacity` entries.
#[derive(Debug)]
pub(crate) struct ClockCache<K, V> {
    capacity: usize,
    places: HashMap<K, usize>,
    entries: Vec<Option<Entry<K, V>>>,
    free: Vec<usize>,
    hand: usize,
}

impl<K: Hash + Eq + Copy, V: Clone> ClockCache<K, V> {
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self { capacity, places: HashMap::new(), entries: vec![], free: vec![], hand: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        let entry = self.entries[*self.places.get(key)?].as_mut()?;
        entry.used = true;
        Some(entry.value.clone())
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        let entry = Some(Entry { key, value, used: true });
        if let Some(place) = self.places.get(&key) {
            self.entries[*place] = entry;
            return;
        }
        let place = match self.free.pop() {
            Some(place) => place,
            None if self.entries.len() < self.capacity => {
                self.entries.push(None);
                self.entries.len() - 1
            }
            None => self.evict(),
        };
        self.entries[place] = entry;
        self.places.insert(key, place);
    }

    pub(crate) fn remove(&mut self, key: &K) {
        if let Some(place) = self.places.remove(key) {
            self.entries[place] = None;
            self.free.push(place);
        }
    }

    /// Removes every entry whose key does not hold.
    pub(crate) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        let gone: Vec<K> = self.places.keys().filter(|key| !keep(key)).copied().collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// Frees the first place whose entry was not used since the hand last passed; ends within two rounds.
    fn evict(&mut self) -> usize {
        loop {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.entries.len();
            if let Some(entry) = self.entries[place].as_mut() {
                if std::mem::take(&mut entry.used) {
                    continue;
                }
                self.places.remove(&entry.key);
            }
            return place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn is_bounded_and_never_stale(capacity in 1usize..8, ops in prop::collection::vec((0u8..3, 0u32..16, 0u32..100), 0..200)) {
            let mut cache = ClockCache::new(capacity);
            let mut model = HashMap::new();
            for (op, key, value) in ops {
                match op {
                    0 => { cache.insert(key, value); model.insert(key, value); prop_assert_eq!(cache.get(&key), Some(value)); }
                    1 => { cache.remove(&key); model.remove(&key); prop_assert_eq!(cache.get(&key), None); }
                    _ => if let Some(v) = cache.get(&key) { prop_assert_eq!(Some(&v), model.get(&key)); },
                }
                prop_assert!(cache.len() <= capacity && cache.entries.len() <= capacity);
            }
        }
    }

    #[test]
    fn what_is_used_stays() {
        let mut cache = ClockCache::new(3);
        for k in 0..3 {
            cache.insert(k, k);
        }
        cache.insert(3, 3); // clears every mark and evicts 0
        assert_eq!(cache.get(&1), Some(1));
        cache.insert(4, 4);
        assert_eq!(cache.get(&1), Some(1), "used since the hand passed");
        assert_eq!(cache.get(&2), None);
    }
}
