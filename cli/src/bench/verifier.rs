//! Verification of one volume during a run: the ledger of its blocks, and what was found wrong.
//!
//! Invariant: a block is checked against every generation that may be there and no other.

use super::ledger::{Entry, Ledger};
use super::pattern::{self, Mismatch, Place};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Shared by all jobs of a volume.
#[derive(Debug)]
pub(crate) struct Verifier {
    /// What may be in each block.
    pub(crate) ledger: Ledger,
    run: u64,
    volume: u64,
    checked: AtomicU64,
    wrong: AtomicU64,
    first: Mutex<Option<Mismatch>>,
}

impl Verifier {
    /// For volume number `volume` of run number `run`, of which nothing is known yet.
    #[must_use]
    pub(crate) fn new(run: u64, volume: u64, blocks: usize) -> Self {
        let (checked, wrong, first) = Default::default();
        Self { ledger: Ledger::new(blocks), run, volume, checked, wrong, first }
    }

    /// Puts a generation of the block at `offset` into `data`.
    pub(crate) fn fill(&self, data: &mut [u8], offset: u64, generation: u64) {
        pattern::fill(data, self.place(offset), generation);
    }

    /// Checks a block that was read at `offset`. One of which nothing is known is not checked.
    pub(crate) fn check(&self, data: &[u8], offset: u64, entry: Entry) {
        let Some(generations) = entry.readable() else { return };
        self.checked.fetch_add(1, Ordering::Relaxed);
        if let Err(mismatch) = pattern::check(data, self.place(offset), &generations) {
            self.wrong.fetch_add(1, Ordering::Relaxed);
            self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(mismatch);
        }
    }

    fn place(&self, offset: u64) -> Place {
        Place { run: self.run, volume: self.volume, offset }
    }

    /// Blocks that were checked, those of them that were wrong, and the first of these.
    #[must_use]
    pub(crate) fn found(&self) -> (u64, u64, Option<Mismatch>) {
        let first = *self.first.lock().unwrap_or_else(PoisonError::into_inner);
        (self.checked.load(Ordering::Relaxed), self.wrong.load(Ordering::Relaxed), first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_block_is_counted_and_the_first_is_kept() {
        let v = Verifier::new(7, 0, 4);
        let entry = |block| v.ledger.take(block).expect("free");
        let mut data = vec![0; 1024];
        v.fill(&mut data, 0, 1);
        v.check(&data, 0, entry(0));
        assert_eq!(v.found(), (0, 0, None), "nothing is known of it");
        let written = entry(1).written(1);
        v.check(&data, 0, written);
        assert_eq!(v.found(), (1, 0, None));
        data[700] ^= 1;
        v.check(&data, 0, written);
        v.check(&data, 0, written.written(2));
        let (checked, wrong, first) = v.found();
        assert_eq!((checked, wrong, first), (3, 2, Some(Mismatch::Damaged { at: 700 })));
    }
}
