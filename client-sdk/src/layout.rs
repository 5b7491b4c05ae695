//! The layout cache: which copyset holds a chunk.
//!
//! Used by the IO path. A segment's placement never changes once it exists, so it is cached for ever. That a segment
//! has **no** placement is cached too, and then a read returns zeros without asking any chunkserver. Invariant: this
//! is believed only as long as nobody else can have written. A write-attached client is the only one who can place a
//! segment of its layer, a snapshot's layer is not written below its seq, and a read-only client of a live volume
//! asks again after `live_layout_ttl`. (A client that was fenced and has not heard of it may still read zeros here:
//! that is what it could have read a moment earlier. What it zeroes is confirmed by the MDS, ADR 0014.) A segment that an ancestor has is placed in the clone as well,
//! so an unplaced segment has no ancestor's data.
//!
//! At most one question to the MDS is under way for reading and one for placing. Bounded by the volume's size: 256
//! bytes for each GiB. Absent: retries.

use crate::mds_client::{MdsCallError, MdsClient};
use ogee_common::clock::{self, Instant};
use ogee_common::geometry::{segment_of, slot_in_segment};
use ogee_common::id::{AttachEpoch, ChunkIndex, CopysetId, LayerId, SegmentIndex, VolumeId};
use ogee_common::limits::{CHUNKS_PER_SEGMENT, LAYOUT_PREFETCH_SEGMENTS};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// The copysets of a segment's chunks.
pub(crate) type Placement = Arc<[CopysetId; CHUNKS_PER_SEGMENT as usize]>;

#[derive(Debug, Clone)]
enum Known {
    Placed(Placement),
    Absent { since: Instant },
}

/// What the cache says of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// The chunk lies in this copyset.
    At(CopysetId),
    /// The segment has no placement: it reads as zeros.
    Unplaced,
    /// Ask the MDS.
    Unknown,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct LayoutCache {
    layer: LayerId,
    /// How long "no placement" is believed; `None` for ever.
    absent_ttl: Option<Duration>,
    segments: RwLock<HashMap<u32, Known>>,
    asking: tokio::sync::Mutex<()>,
    placing: tokio::sync::Mutex<()>,
}

impl LayoutCache {
    /// An empty cache of `layer`'s layout.
    pub(crate) fn new(layer: LayerId, absent_ttl: Option<Duration>) -> Self {
        let (asking, placing) = Default::default();
        Self { layer, absent_ttl, segments: RwLock::default(), asking, placing }
    }

    /// What is known of a chunk.
    pub(crate) fn lookup(&self, chunk: ChunkIndex) -> Lookup {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        match segments.get(&segment_of(chunk).0) {
            Some(Known::Placed(placement)) => Lookup::At(placement[slot_in_segment(chunk)]),
            Some(Known::Absent { since }) if self.absent_ttl.is_none_or(|ttl| since.elapsed() < ttl) => {
                Lookup::Unplaced
            }
            _ => Lookup::Unknown,
        }
    }

    /// Asks the MDS for the segment of `chunk` and its neighbours, and returns the copysets it named.
    ///
    /// # Errors
    /// Those of the call; `invalid-argument` for an answer that makes no sense.
    pub(crate) async fn fetch(&self, mds: &MdsClient, chunk: ChunkIndex) -> Result<Vec<CopysetId>, MdsCallError> {
        let _one_at_a_time = self.asking.lock().await;
        if self.lookup(chunk) != Lookup::Unknown {
            return Ok(Vec::new());
        }
        let segment = segment_of(chunk).0;
        let first = segment - segment % LAYOUT_PREFETCH_SEGMENTS;
        let request = mds::GetLayoutRequest { layer: self.layer.0, first, count: LAYOUT_PREFETCH_SEGMENTS, volume: 0, epoch: 0 };
        self.ask(mds, request).await
    }

    /// Asks the MDS for `range` as the writer of this layer, whatever is known, and returns the copysets it named.
    ///
    /// # Errors
    /// Those of the call: `fenced` when `epoch` is not the current attach; `invalid-argument` for an answer that makes no sense.
    pub(crate) async fn confirm(
        &self,
        mds: &MdsClient,
        volume: VolumeId,
        epoch: AttachEpoch,
        range: std::ops::Range<u32>,
    ) -> Result<Vec<CopysetId>, MdsCallError> {
        let (first, count) = (range.start, range.end - range.start);
        let request = mds::GetLayoutRequest { layer: self.layer.0, first, count, volume: volume.0, epoch: epoch.0 };
        self.ask(mds, request).await
    }

    async fn ask(&self, mds: &MdsClient, request: mds::GetLayoutRequest) -> Result<Vec<CopysetId>, MdsCallError> {
        let range = request.first..request.first + request.count;
        let since = clock::now();
        let layout = mds.get_layout(request).await?;
        let placed = self.check(&layout, &range)?;
        let copysets = placed.iter().flat_map(|(_, p)| p.iter().copied()).collect();
        self.merge(range, placed, since);
        Ok(copysets)
    }

    /// Takes over the placements that another cache of the same layer knows: they never change. That a segment has none is not taken over.
    pub(crate) fn learn_from(&self, other: &Self) {
        if self.layer == other.layer {
            let known = other.segments.read().unwrap_or_else(PoisonError::into_inner);
            let placed = known.iter().filter_map(|(index, known)| match known {
                Known::Placed(placement) => Some((*index, Known::Placed(Arc::clone(placement)))),
                Known::Absent { .. } => None,
            });
            self.segments.write().unwrap_or_else(PoisonError::into_inner).extend(placed);
        }
    }

    /// The copysets of the segments that are known, each once, at most `max`.
    pub(crate) fn copysets(&self, max: usize) -> Vec<CopysetId> {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = BTreeSet::new();
        for known in segments.values() {
            if let Known::Placed(placement) = known {
                found.extend(placement.iter().map(|copyset| copyset.0));
            }
        }
        found.into_iter().take(max).map(CopysetId).collect()
    }

    /// Takes over what was asked at `since`: of the segments in `range`, those in `placed` have a placement.
    fn merge(&self, range: std::ops::Range<u32>, placed: Vec<(u32, Placement)>, since: Instant) {
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        for index in range {
            // A placement that was made while the question was under way is not forgotten.
            if !matches!(segments.get(&index), Some(Known::Placed(_))) {
                segments.insert(index, Known::Absent { since });
            }
        }
        segments.extend(placed.into_iter().map(|(index, p)| (index, Known::Placed(p))));
    }

    /// Gives the segment of `chunk` a placement, and returns its copysets.
    ///
    /// # Errors
    /// Those of the call; `invalid-argument` for an answer that makes no sense.
    pub(crate) async fn place(
        &self,
        mds: &MdsClient,
        volume: VolumeId,
        epoch: AttachEpoch,
        chunk: ChunkIndex,
    ) -> Result<Vec<CopysetId>, MdsCallError> {
        let _one_at_a_time = self.placing.lock().await;
        if matches!(self.lookup(chunk), Lookup::At(_)) {
            return Ok(Vec::new());
        }
        let SegmentIndex(index) = segment_of(chunk);
        let request =
            mds::AllocateSegmentRequest { volume: volume.0, epoch: epoch.0, layer: self.layer.0, index };
        let layout = mds.allocate_segment(request).await?;
        let placed = self.check(&layout, &(index..index + 1))?;
        let (_, placement) = placed.into_iter().next().ok_or_else(|| malformed("the segment is missing"))?;
        let copysets = placement.to_vec();
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        segments.insert(index, Known::Placed(placement));
        Ok(copysets)
    }

    /// The placements in an answer, if it is about this layer and complete.
    fn check(
        &self,
        layout: &mds::Layout,
        range: &std::ops::Range<u32>,
    ) -> Result<Vec<(u32, Placement)>, MdsCallError> {
        if layout.layer != self.layer.0 {
            return Err(malformed("another layer"));
        }
        let placements = layout.segments.iter().filter(|s| range.contains(&s.index)).map(|segment| {
            let ids: Vec<CopysetId> = segment.copysets.iter().map(|id| CopysetId(*id)).collect();
            let ids: [CopysetId; CHUNKS_PER_SEGMENT as usize] =
                ids.try_into().map_err(|_| malformed("a segment does not have 64 copysets"))?;
            if ids.iter().any(|id| id.0 == 0) {
                return Err(malformed("copyset 0"));
            }
            Ok((segment.index, Arc::new(ids)))
        });
        placements.collect()
    }
}

fn malformed(what: &str) -> MdsCallError {
    MdsCallError {
        kind: MdsErrorKind::InvalidArgument,
        rpc: "get_layout",
        message: format!("malformed layout: {what}"),
        outcome_unknown: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(layer: u64, index: u32, copysets: Vec<u32>) -> mds::Layout {
        mds::Layout { layer, segments: vec![mds::Segment { index, copysets }] }
    }

    #[test]
    fn malformed_answers_are_refused() {
        let cache = LayoutCache::new(LayerId(7), None);
        assert!(cache.check(&layout(7, 3, vec![1; 64]), &(0..64)).is_ok_and(|p| p.len() == 1));
        assert!(cache.check(&layout(7, 64, vec![1; 64]), &(0..64)).is_ok_and(|p| p.is_empty()));
        assert!(cache.check(&layout(8, 3, vec![1; 64]), &(0..64)).is_err());
        assert!(cache.check(&layout(7, 3, vec![1; 63]), &(0..64)).is_err());
        let mut with_zero = vec![1; 64];
        with_zero[9] = 0;
        assert!(cache.check(&layout(7, 3, with_zero), &(0..64)).is_err());
    }

    #[test]
    fn another_cache_of_the_layer_tells_placements_and_nothing_else() {
        let placement: Placement = Arc::new([CopysetId(9); CHUNKS_PER_SEGMENT as usize]);
        let reader = LayoutCache::new(LayerId(7), Some(Duration::ZERO));
        reader.merge(0..64, vec![(3, placement)], clock::now());
        assert_eq!((reader.copysets(8), reader.copysets(0)), (vec![CopysetId(9)], vec![]));
        let (writer, stranger) = (LayoutCache::new(LayerId(7), None), LayoutCache::new(LayerId(8), None));
        writer.learn_from(&reader);
        stranger.learn_from(&reader);
        let (chunk, other) = (ChunkIndex(3 * CHUNKS_PER_SEGMENT), ChunkIndex(4 * CHUNKS_PER_SEGMENT));
        assert_eq!((writer.lookup(chunk), writer.lookup(other)), (Lookup::At(CopysetId(9)), Lookup::Unknown));
        assert_eq!(stranger.lookup(chunk), Lookup::Unknown);
    }

    #[test]
    fn a_placement_is_never_forgotten_and_its_absence_is_by_its_time() {
        let placement: Placement = Arc::new([CopysetId(9); CHUNKS_PER_SEGMENT as usize]);
        let (chunk, other) = (ChunkIndex(3 * CHUNKS_PER_SEGMENT), ChunkIndex(4 * CHUNKS_PER_SEGMENT));
        let for_ever = LayoutCache::new(LayerId(7), None);
        assert_eq!(for_ever.lookup(chunk), Lookup::Unknown);
        for_ever.merge(0..64, vec![(3, placement)], clock::now());
        // An older answer comes late.
        for_ever.merge(0..64, Vec::new(), clock::now());
        assert_eq!((for_ever.lookup(chunk), for_ever.lookup(other)), (Lookup::At(CopysetId(9)), Lookup::Unplaced));
        let for_a_moment = LayoutCache::new(LayerId(7), Some(Duration::ZERO));
        for_a_moment.merge(0..64, Vec::new(), clock::now());
        assert_eq!(for_a_moment.lookup(other), Lookup::Unknown);
    }
}
