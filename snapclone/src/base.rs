//! The backup on which the next one is built: what did not change since is referred to without being read.
//!
//! Called by `export.rs`. Invariants: a base is one of the run's bases, so its blocks are protected and it was found whole; it
//! is of a moment of the same cluster that the snapshot can be compared with; what cannot be told is read. Absent: finding
//! out what changed, which is the device's.

use crate::error::{RepoError, RepoErrorKind};
use crate::index::Index;
use crate::layout::BlockRef;
use crate::repository::Repository;
use ogee_client::Moment;
use std::cmp::Reverse;

/// A backup whose references may be kept, and its moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Base<'a> {
    index: &'a Index,
    pub moment: Moment,
}

impl<'a> Base<'a> {
    /// The nearest to what is backed up: of the nearest layer that `moments` names, the newest not behind it.
    pub(crate) fn choose(bases: &'a [Index], cluster: &str, moments: &[Moment]) -> Option<Self> {
        let of_cluster = bases.iter().filter(|index| index.cluster == cluster);
        let ranked = of_cluster.filter_map(|index| {
            let moment = index.moment()?;
            let depth = moments.iter().position(|seen| seen.layer == moment.layer)?;
            (moment.seq <= moments[depth].seq).then_some(((Reverse(depth), moment.seq), Self { index, moment }))
        });
        ranked.max_by_key(|(rank, _)| *rank).map(|(_, base)| base)
    }

    /// Its blocks in a leaf, as far as they are as long as those of the new backup; none if it cannot be read.
    ///
    /// # Errors
    /// The repository does not answer.
    pub(crate) async fn leaf(&self, repo: &Repository, new: &Index, leaf: usize) -> Result<Vec<BlockRef>, RepoError> {
        let Some(place) = self.index.leaf_refs().nth(leaf).flatten() else { return Ok(Vec::new()) };
        let mut blocks = match repo.leaf(self.index, leaf, place).await {
            Err(e) if e.kind == RepoErrorKind::Corrupt => {
                tracing::warn!(target: "controlpath", error = %e, "a leaf of the base is damaged: everything is read");
                return Ok(Vec::new());
            }
            blocks => blocks?,
        };
        // The last block of a volume that has grown was shorter.
        let first = crate::export::first_block(leaf);
        let same = (first..).take(blocks.len()).take_while(|i| self.index.block_len(*i) == new.block_len(*i)).count();
        blocks.truncate(same);
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::FORMAT;
    use ogee_common::id::{LayerId, VolumeSeq};

    fn index(cluster: &str, layer: u64, seq: u64) -> Index {
        Index {
            format: FORMAT,
            id: format!("{:016x}", layer * 100 + seq),
            generation: 1,
            cluster: cluster.to_owned(),
            volume_id: 3,
            volume: "a".to_owned(),
            snapshot: "s".to_owned(),
            snapshot_unix_ms: 1,
            layer,
            seq,
            made_unix_ms: 2,
            size_bytes: 0,
            block_bytes: 256 << 10,
            data_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            root: String::new(),
            leaves: vec![],
        }
    }

    #[test]
    fn the_nearest_base_is_chosen_and_none_that_cannot_be_compared() {
        let moment = |layer, seq| Moment { layer: LayerId(layer), seq: VolumeSeq(seq) };
        let chosen = |bases: &[Index], moments: &[Moment]| {
            Base::choose(bases, "c", moments).map(|b| (b.moment.layer.0, b.moment.seq.0))
        };
        let seen = [moment(5, 7), moment(4, 3)];
        let all = [index("c", 4, 3), index("c", 5, 2), index("c", 5, 6), index("c", 5, 8), index("c", 0, 0), index("d", 5, 7)];
        assert_eq!(chosen(&all, &seen), Some((5, 6)), "not the one behind it, nor that of another cluster");
        assert_eq!(chosen(&all[..1], &seen), Some((4, 3)), "what it stands on");
        assert_eq!(chosen(&[index("c", 4, 4), index("c", 0, 0), index("c", 9, 1)], &seen), None);
        assert_eq!(chosen(&all, &[]), None, "nothing is known of the snapshot");
    }
}
