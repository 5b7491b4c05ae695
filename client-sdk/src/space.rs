//! The space that a volume takes: pages with data, counted by asking every copyset that has a part of it.
//!
//! Called by `volume.rs` on demand (`ogee volume info`); nothing is counted on the way of a write. Invariants: only what the cluster holds
//! counts, not what is still in a backup alone; the count is of no single moment while somebody writes; what cannot be asked is an error, not a guess.
//! Absent: what only snapshots keep, and how many replicas there are.

use crate::attempt::{DataPath, Failure};
use crate::block_device::Moment;
use crate::io::Unplaced;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_common::id::ChunkIndex;
use ogee_common::limits::{CHUNK_BYTES, CHUNKS_PER_SEGMENT, EXTENT_CHUNKS_PARALLEL, PAGE_BYTES, SEGMENT_BYTES};
use ogee_proto::data::{ChunkPages, PageMapReply};

/// What a volume or a snapshot holds in the cluster, in bytes of one replica, by whole pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VolumeSpace {
    /// Data that is seen, whoever wrote it.
    pub data_bytes: u64,
    /// Of it what was written since the volume was cloned or rolled back; all, if it stands on nothing.
    pub own_bytes: u64,
}

impl VolumeSpace {
    fn add(&mut self, map: &PageMapReply, has_parent: bool) {
        let data = map.data.count();
        let own = map.changed.as_ref().filter(|_| has_parent).map_or(data, |changed| map.data.intersection(changed).count());
        self.data_bytes += u64::from(data) * u64::from(PAGE_BYTES);
        self.own_bytes += u64::from(own) * u64::from(PAGE_BYTES);
    }
}

impl DataPath<'_> {
    /// Counts the space of a volume of `size` bytes; `told` hears after each segment how many are done, of how many.
    pub(crate) async fn space(&self, size: u64, mut told: impl FnMut(u32, u32)) -> Result<VolumeSpace, Failure> {
        let parent: Option<Moment> = self.at.moments().nth(1);
        let segments = u32::try_from(size.div_ceil(SEGMENT_BYTES)).expect("volumes are bounded");
        let mut space = VolumeSpace::default();
        for segment in 0..segments {
            let first = segment * CHUNKS_PER_SEGMENT;
            // Every chunk of it has a copyset then, each its own.
            if self.copyset(ChunkIndex(first), Unplaced::Fine).await?.is_some() {
                let chunks = u32::try_from(size.div_ceil(u64::from(CHUNK_BYTES))).expect("volumes are bounded");
                let ask = |chunk| self.stored(ChunkIndex(chunk), parent);
                let asked = stream::iter(first..chunks.min(first + CHUNKS_PER_SEGMENT)).map(ask).buffer_unordered(EXTENT_CHUNKS_PARALLEL);
                let mut asked = std::pin::pin!(asked);
                while let Some(map) = asked.try_next().await? {
                    space.add(&map, parent.is_some());
                }
            }
            told(segment + 1, segments);
        }
        Ok(space)
    }

    /// What the cluster holds of a chunk.
    async fn stored(&self, chunk: ChunkIndex, since: Option<Moment>) -> Result<PageMapReply, Failure> {
        match self.copyset(chunk, Unplaced::Fine).await? {
            Some(copyset) => self.ask_page_map(copyset, chunk, since).await,
            None => Ok(PageMapReply { data: ChunkPages::none(), zero: ChunkPages::none(), changed: None }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_with_data_are_counted_and_of_a_clone_those_that_are_its_own() {
        let pages = |set: &[u32]| {
            let mut pages = ChunkPages::none();
            set.iter().for_each(|page| pages.insert(*page));
            pages
        };
        let map = PageMapReply { data: pages(&[0, 1, 4095]), zero: pages(&[2]), changed: Some(pages(&[1, 2, 3])) };
        let (mut plain, mut clone) = (VolumeSpace::default(), VolumeSpace::default());
        plain.add(&map, false);
        clone.add(&map, true);
        assert_eq!(plain, VolumeSpace { data_bytes: 3 * 4096, own_bytes: 3 * 4096 });
        assert_eq!(clone, VolumeSpace { data_bytes: 3 * 4096, own_bytes: 4096 });
    }
}
