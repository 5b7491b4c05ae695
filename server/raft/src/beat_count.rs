//! [`BeatCount`]: how many heartbeats of one leader a follower has accepted since its process started. Pure.
//!
//! A beat carries what its leader knew to be committed a beat before. From the third one on, that moment lies after the
//! first one was accepted, hence after the start of this process: so it covers everything that an earlier process of this
//! replica can have applied, provided that the leader has committed an entry of its own term.

use std::sync::{Mutex, PoisonError};

/// Beats that settle the question.
const ENOUGH: u64 = 3;

/// Beats of the newest term.
#[derive(Debug, Default)]
pub(crate) struct BeatCount(Mutex<(u64, u64)>);

impl BeatCount {
    /// A beat of a leader of `term` was accepted.
    pub(crate) fn heard(&self, term: u64) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = if seen.0 == term { (term, seen.1.saturating_add(1)) } else { (term, 1) };
    }

    /// Whether what the leader of `term` says to be committed covers everything before this process.
    pub(crate) fn is_enough(&self, term: u64) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 == term && seen.1 >= ENOUGH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_beats_of_one_term_are_enough() {
        let count = BeatCount::default();
        for _ in 0..2 {
            count.heard(5);
        }
        assert!(!count.is_enough(5));
        count.heard(6);
        count.heard(6);
        assert!(!count.is_enough(6) && !count.is_enough(5));
        count.heard(6);
        assert!(count.is_enough(6) && !count.is_enough(5));
    }
}
