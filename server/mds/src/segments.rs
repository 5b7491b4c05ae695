//! Chooses the 64 copysets of a new segment. Pure; called by the leader, which puts the choice into the Raft log.
//!
//! Invariants: a copyset is chosen `64 * weight / total` times, rounded down or up, so no copyset gets two chunks while
//! the weights allow one; copysets of weight 0 are never chosen; consecutive chunks go to different copysets as far as
//! possible. The weight is the free space of the copyset's fullest disk. Method: systematic sampling of a shuffled list
//! (equally spaced points from a random start), then dealt out in rounds.

use crate::seeded::Seeded;
use ogee_common::id::CopysetId;
use ogee_common::limits::CHUNKS_PER_SEGMENT;
use std::collections::BTreeMap;

/// A copyset that could hold chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The copyset.
    pub(crate) id: CopysetId,
    /// Its share of new chunks, in any unit; 0 is never chosen.
    pub(crate) weight: u64,
}

/// The copysets of a segment's chunks, in chunk order; `None` when no candidate has weight.
pub(crate) fn choose(candidates: &[Candidate], seed: u64) -> Option<Vec<CopysetId>> {
    let mut random = Seeded::new(seed);
    let mut list: Vec<Candidate> = candidates.iter().copied().filter(|c| c.weight > 0).collect();
    if list.is_empty() {
        return None;
    }
    random.shuffle(&mut list);
    let total: u128 = list.iter().map(|c| u128::from(c.weight)).sum();
    let chunks = u128::from(CHUNKS_PER_SEGMENT);
    // Point i stands at (start + i * total) / 64; weights are scaled by 64 to stay in integers.
    let start = random.below(total);
    let mut reached = 0;
    let mut taken = 0;
    let mut rounds: BTreeMap<usize, Vec<CopysetId>> = BTreeMap::new();
    for candidate in list {
        reached += u128::from(candidate.weight) * chunks;
        let mut round = 0;
        while taken < chunks && start + taken * total < reached {
            rounds.entry(round).or_default().push(candidate.id);
            (round, taken) = (round + 1, taken + 1);
        }
    }
    Some(rounds.into_values().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_copyset_gets_its_share(weights in prop::collection::vec(0u64..1 << 45, 1..200), seed: u64) {
            let candidates: Vec<Candidate> =
                weights.iter().zip(1..).map(|(w, id)| Candidate { id: CopysetId(id), weight: *w }).collect();
            let total: u128 = weights.iter().map(|w| u128::from(*w)).sum();
            let Some(chosen) = choose(&candidates, seed) else {
                prop_assert_eq!(total, 0);
                return Ok(());
            };
            prop_assert_eq!(chosen.len(), 64);
            for c in &candidates {
                let count = chosen.iter().filter(|id| **id == c.id).count() as u128;
                let exact = u128::from(c.weight) * 64;
                prop_assert!(count >= exact / total && count <= exact.div_ceil(total), "{} of {}/{}", count, exact, total);
            }
        }

        #[test]
        fn few_copysets_take_turns(n in 2u32..64, seed: u64) {
            let candidates: Vec<Candidate> = (1..=n).map(|id| Candidate { id: CopysetId(id), weight: 1 }).collect();
            let chosen = choose(&candidates, seed).expect("weights");
            // Two rounds may meet at the same copyset when the last round is short.
            prop_assert!(chosen.windows(2).filter(|w| w[0] == w[1]).count() <= 1);
        }
    }

    #[test]
    fn the_start_is_random() {
        let candidates: Vec<Candidate> = (1..=100).map(|id| Candidate { id: CopysetId(id), weight: 5 }).collect();
        assert_ne!(choose(&candidates, 1), choose(&candidates, 2));
        assert_eq!(choose(&candidates, 1), choose(&candidates, 1));
    }
}
