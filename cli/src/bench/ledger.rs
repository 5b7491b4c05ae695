//! What a verifying load knows of each block: which generations of it may be there.
//!
//! One ledger per volume, shared by all its jobs. Invariants: while somebody has a block nobody else gets it, so two
//! IOs never meet on one block and every read has a defined answer; after a write that failed both its generation and
//! the acknowledged one may be there, until a later write succeeds. Costs 8 bytes per block.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

const BUSY: u64 = 1 << 63;
const FIELD_BITS: u32 = 31;
const FIELD: u64 = (1 << FIELD_BITS) - 1;

/// A block's generations; 0 is what was there before the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    /// The newest that was acknowledged.
    acknowledged: u64,
    /// The newest that was tried.
    tried: u64,
}

impl Entry {
    /// The generation of the next write.
    ///
    /// # Panics
    /// After 2^31 writes to one block: more than six hours at 100,000 a second.
    #[must_use]
    pub(crate) fn next(self) -> u64 {
        assert!(self.tried < FIELD, "a block was written 2^31 times in one run");
        self.tried + 1
    }

    /// After a write of `generation` that succeeded.
    #[must_use]
    pub(crate) const fn written(self, generation: u64) -> Self {
        Self { acknowledged: generation, tried: generation }
    }

    /// After a write of `generation` whose outcome is unknown.
    #[must_use]
    pub(crate) const fn uncertain(self, generation: u64) -> Self {
        Self { tried: generation, ..self }
    }

    /// What may be there; `None` while nothing is known of it.
    #[must_use]
    pub(crate) fn readable(self) -> Option<RangeInclusive<u64>> {
        (self.acknowledged > 0).then_some(self.acknowledged..=self.tried)
    }
}

/// The blocks of one volume.
#[derive(Debug)]
pub(crate) struct Ledger {
    blocks: Vec<AtomicU64>,
}

impl Ledger {
    /// Nothing is known of so many blocks.
    #[must_use]
    pub(crate) fn new(blocks: usize) -> Self {
        Self { blocks: std::iter::repeat_with(AtomicU64::default).take(blocks).collect() }
    }

    /// Takes a block, unless somebody has it.
    pub(crate) fn take(&self, block: usize) -> Option<Entry> {
        // Acquire: what the last holder did is seen.
        let before = self.blocks[block].fetch_or(BUSY, Ordering::Acquire);
        (before & BUSY == 0).then_some(Entry { acknowledged: before & FIELD, tried: before >> FIELD_BITS & FIELD })
    }

    /// Gives a block back.
    pub(crate) fn give_back(&self, block: usize, entry: Entry) {
        let word = entry.acknowledged | entry.tried << FIELD_BITS;
        self.blocks[block].store(word, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_one_holder() {
        let ledger = Ledger::new(2);
        let entry = ledger.take(1).expect("free");
        assert_eq!(ledger.take(1), None);
        assert_eq!(ledger.take(0), Some(Entry::default()));
        ledger.give_back(1, entry.written(entry.next()));
        assert_eq!(ledger.take(1).expect("free").readable(), Some(1..=1));
    }

    #[test]
    fn a_failed_write_leaves_both_possible_and_the_next_success_ends_it() {
        let ledger = Ledger::new(1);
        let step = |f: fn(Entry) -> Entry| {
            let entry = ledger.take(0).expect("free");
            ledger.give_back(0, f(entry));
            let after = ledger.take(0).expect("free");
            ledger.give_back(0, after);
            after.readable()
        };
        assert_eq!(step(|e| e.uncertain(e.next())), None, "nothing was acknowledged yet");
        assert_eq!(step(|e| e.written(e.next())), Some(2..=2));
        assert_eq!(step(|e| e.uncertain(e.next())), Some(2..=3));
        assert_eq!(step(|e| e.uncertain(e.next())), Some(2..=4));
        assert_eq!(step(|e| e.written(e.next())), Some(5..=5));
        let full = Entry { acknowledged: FIELD, tried: FIELD };
        let ledger = Ledger::new(1);
        ledger.give_back(0, full);
        assert_eq!(ledger.take(0), Some(full), "the fields do not touch each other");
    }
}
