//! The fence: before this attach touches a copyset, OpenLayer must have succeeded there, once.
//!
//! Used by `attempt.rs`. Invariant (section 6 of ARCHITECTURE.md, "two writers never interleave"): a read or write of a
//! write-attached client is sent to a copyset only after the copyset's state machine accepted the attach's epoch, so
//! that every request of an earlier epoch is refused from then on. It is raised lazily and single-flight per copyset
//! and shared by all handles; a copyset without quorum does not hold up the others. When a copyset says that the layer
//! is not open, the fence is raised again; if another client has taken the volume meanwhile, that is refused with
//! `Fenced`, so raising it twice is never wrong. OpenLayer carries the seq too, and below it the copyset takes no write any more: after a
//! snapshot that went round this client every copyset is opened once more (`gate.rs` says why). Absent: the request itself.

use ogee_common::id::{CopysetId, VolumeSeq};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One copyset's fence.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    /// Number of the OpenLayer that succeeded last; 0 when the layer must be opened (again).
    round: AtomicU64,
    /// A seq that this OpenLayer carried, or less.
    seq: AtomicU64,
    /// Held while opening; counts the successes.
    pub(crate) opening: tokio::sync::Mutex<u64>,
}

impl Fence {
    /// The round in which the layer was opened with a seq of at least `floor`, if it is open.
    pub(crate) fn round(&self, floor: VolumeSeq) -> Option<u64> {
        let round = self.round.load(Ordering::Acquire);
        // It only grows, and what was once opened with a seq takes nothing below it for ever, whichever round that was.
        let is_open = round != 0 && self.seq.load(Ordering::Acquire) >= floor.0;
        is_open.then_some(round)
    }

    /// The layer was opened with a seq of at least `seq`; `count` is what `opening` guards.
    pub(crate) fn opened(&self, count: &mut u64, seq: VolumeSeq) -> u64 {
        *count += 1;
        self.seq.fetch_max(seq.0, Ordering::AcqRel);
        self.round.store(*count, Ordering::Release);
        *count
    }

    /// The copyset does not know the layer that was opened in `round`. A newer round stays.
    pub(crate) fn invalidate(&self, round: u64) {
        // An error means that it was opened again meanwhile, which is what was wanted.
        let _ = self.round.compare_exchange(round, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// The fences of one attach; as many as the volume has copysets.
#[derive(Debug, Default)]
pub(crate) struct FenceTable(Mutex<HashMap<CopysetId, Arc<Fence>>>);

impl FenceTable {
    /// The fence of a copyset.
    pub(crate) fn of(&self, copyset: CopysetId) -> Arc<Fence> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.entry(copyset).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalidating_an_old_round_keeps_the_new_one() {
        let table = FenceTable::default();
        let fence = table.of(CopysetId(1));
        let (floor, seq) = (VolumeSeq(0), VolumeSeq(3));
        assert_eq!(fence.round(floor), None);
        let mut count = 0;
        let first = fence.opened(&mut count, seq);
        fence.invalidate(first);
        assert_eq!(table.of(CopysetId(1)).round(floor), None);
        let second = fence.opened(&mut count, seq);
        fence.invalidate(first);
        assert_eq!(fence.round(floor), Some(second));
        assert_eq!((fence.round(seq), fence.round(VolumeSeq(4))), (Some(second), None), "opened with a lower seq");
    }
}
