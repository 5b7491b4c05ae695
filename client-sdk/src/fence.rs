//! The fence: before this attach touches a copyset, OpenLayer must have succeeded there, once.
//!
//! Used by `attempt.rs`. Invariant (section 6 of ARCHITECTURE.md, "two writers never interleave"): a read or write of a
//! write-attached client is sent to a copyset only after the copyset's state machine accepted the attach's epoch, so
//! that every request of an earlier epoch is refused from then on. It is raised lazily and single-flight per copyset
//! and shared by all handles; a copyset without quorum does not hold up the others. When a copyset says that the layer
//! is not open, the fence is raised again; if another client has taken the volume meanwhile, that is refused with
//! `Fenced`, so raising it twice is never wrong. Absent: the request itself.

use ogee_common::id::CopysetId;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One copyset's fence.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    /// Number of the OpenLayer that succeeded last; 0 when the layer must be opened (again).
    round: AtomicU64,
    /// Held while opening; counts the successes.
    pub(crate) opening: tokio::sync::Mutex<u64>,
}

impl Fence {
    /// The round in which the layer was opened, if it is open.
    pub(crate) fn round(&self) -> Option<u64> {
        Some(self.round.load(Ordering::Acquire)).filter(|r| *r != 0)
    }

    /// The layer was opened; `count` is what `opening` guards.
    pub(crate) fn opened(&self, count: &mut u64) -> u64 {
        *count += 1;
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
        assert_eq!(fence.round(), None);
        let mut count = 0;
        let first = fence.opened(&mut count);
        fence.invalidate(first);
        assert_eq!(table.of(CopysetId(1)).round(), None);
        let second = fence.opened(&mut count);
        fence.invalidate(first);
        assert_eq!(fence.round(), Some(second));
    }
}
