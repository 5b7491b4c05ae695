//! How much may be proposed to one group before it is applied. Used by [`crate::group`]; pure counting.
//!
//! Invariant: what was taken is given back exactly once, when the proposal is answered or abandoned.

use ogee_common::limits::{RAFT_PROPOSAL_BYTES_MAX, RAFT_PROPOSALS_MAX};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is proposed and not yet answered, bounded.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    requests: AtomicUsize,
    bytes: AtomicUsize,
}

impl Budget {
    /// Takes room for one proposal; `None` if there is none.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Option<Spent> {
        let spent = Spent { budget: self.clone(), bytes };
        let requests = self.requests.fetch_add(1, Ordering::AcqRel) + 1;
        let bytes = self.bytes.fetch_add(bytes, Ordering::AcqRel) + bytes;
        (requests <= RAFT_PROPOSALS_MAX && bytes <= RAFT_PROPOSAL_BYTES_MAX).then_some(spent)
    }
}

/// A part of a [`Budget`]; given back when dropped.
pub(crate) struct Spent {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Spent {
    fn drop(&mut self) {
        self.budget.requests.fetch_sub(1, Ordering::AcqRel);
        self.budget.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_bounded_by_number_and_by_bytes_and_comes_back() {
        let budget = Arc::new(Budget::default());
        let many: Vec<Spent> = (0..RAFT_PROPOSALS_MAX).map(|_| budget.take(0).expect("room")).collect();
        assert!(budget.take(0).is_none());
        drop(many);
        let large = budget.take(RAFT_PROPOSAL_BYTES_MAX).expect("room");
        assert!(budget.take(1).is_none());
        drop(large);
        assert!(budget.take(1).is_some());
    }
}
