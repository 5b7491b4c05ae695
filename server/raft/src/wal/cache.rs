//! Which payloads stay in memory: the most recent ones of the whole log, up to a number of bytes. Pure; owned by
//! [`super::core::Core`], the payloads themselves lie in the groups' slots.
//!
//! Invariants: the payload of an entry that is not durable is never dropped, so it can always be read; what is counted
//! is what slots hold. The order may name entries that are gone; it is swept when they are the majority.

use super::group::Group;
use std::collections::{HashMap, VecDeque};

/// Entries of the order that are not worth a sweep.
const SWEEP_MIN: usize = 1024;

/// See the module.
pub(super) struct Cache {
    limit: usize,
    bytes: usize,
    /// `(group, index, stamp)` in order of append.
    order: VecDeque<(u64, u64, u64)>,
}

impl Cache {
    /// A cache of `limit` bytes of payload.
    pub(super) const fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, order: VecDeque::new() }
    }

    /// Payload bytes held.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// An entry was appended with its payload.
    pub(super) fn added(&mut self, group: u64, index: u64, stamp: u64, bytes: usize) {
        self.bytes += bytes;
        self.order.push_back((group, index, stamp));
    }

    /// Slots with so many bytes of payload are gone.
    pub(super) fn removed(&mut self, bytes: usize) {
        self.bytes -= bytes;
    }

    /// Drops the oldest durable payloads until the limit holds.
    pub(super) fn trim(&mut self, groups: &mut HashMap<u64, Group>, durable_stamp: u64) {
        while let Some(&(group, index, stamp)) = self.order.front() {
            let slot = groups.get_mut(&group).and_then(|g| g.slot_mut(index)).filter(|s| s.stamp == stamp);
            if let Some(slot) = slot {
                if self.bytes <= self.limit || stamp > durable_stamp {
                    break;
                }
                self.bytes -= slot.cached.take().map_or(0, |b| b.len());
            }
            self.order.pop_front();
        }
        // A group that purges nothing must not make the order grow by what the others append and purge.
        let live: usize = groups.values().map(|g| g.slots.len()).sum();
        if self.order.len() > 2 * live + SWEEP_MIN {
            let is_live = |(g, i, s): &(u64, u64, u64)| {
                groups.get(g).and_then(|g| g.slot(*i)).is_some_and(|slot| slot.stamp == *s)
            };
            self.order.retain(is_live);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::{EntryKind, LogPoint};
    use super::super::group::Slot;
    use super::*;
    use bytes::Bytes;

    fn push(cache: &mut Cache, groups: &mut HashMap<u64, Group>, group: u64, index: u64, stamp: u64) {
        let cached = Some(Bytes::from_static(&[1; 100]));
        let slot = Slot { term: 1, kind: EntryKind::Command, len: 100, stamp, location: None, cached };
        groups.entry(group).or_default().push(index, slot);
        cache.added(group, index, stamp, 100);
    }

    #[test]
    fn only_durable_payloads_are_dropped_oldest_first() {
        let (mut cache, mut groups) = (Cache::new(250), HashMap::new());
        for i in 0..5 {
            push(&mut cache, &mut groups, 1, i, i + 1);
        }
        cache.trim(&mut groups, 0);
        assert_eq!(cache.bytes(), 500, "nothing is durable");
        cache.trim(&mut groups, 2);
        assert_eq!(cache.bytes(), 300);
        cache.trim(&mut groups, 5);
        assert_eq!(cache.bytes(), 200);
        let held: Vec<bool> = groups[&1].slots.iter().map(|s| s.cached.is_some()).collect();
        assert_eq!(held, [false, false, false, true, true]);
    }

    #[test]
    fn the_order_does_not_grow_behind_an_old_entry() {
        let (mut cache, mut groups) = (Cache::new(1 << 20), HashMap::new());
        push(&mut cache, &mut groups, 1, 0, 1);
        for i in 0..10_000 {
            push(&mut cache, &mut groups, 2, i, i + 2);
            let gone = groups.get_mut(&2).expect("group").purge(LogPoint { term: 1, index: i });
            cache.removed(gone.cached);
            cache.trim(&mut groups, i + 2);
        }
        assert!(cache.order.len() <= SWEEP_MIN + 3, "{}", cache.order.len());
        assert_eq!(cache.bytes(), 100);
    }
}
