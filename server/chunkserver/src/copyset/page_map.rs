//! Page maps for clients: what a chunk holds, page by page, and which of its pages may differ from an earlier moment.
//!
//! Only metadata rows are looked at, no data. Each row of the answer is as it was at one moment; the caller has taken a
//! read barrier before, so of what is written no more the answer is exact.
//!
//! # Why no change is missed
//!
//! The moment is `(layer, seq)`: of the layer that is seen, or of an ancestor at or below the seq at which that is seen. What
//! is seen now and was not seen then lies in versions that are *newer*: those of layers nearer than that layer, and those of
//! the layer itself above that seq. **INV: a page that no newer version holds reads the same at both moments**, as data or as
//! zeros. When the moment was there, and nothing was merged or flattened since, this is the rule of lookup. From then on:
//!
//! - *A merge* (`DropVersion`) moves pages up within their layer, from `(after, seq]` to a version in `(seq, next]`. What is
//!   seen now is needed, so that `next` is at most its seq: a page does not leave the newer versions. It may enter them, if
//!   the moment itself is needed no more; then it is said to have changed although it has not. That is why the snapshot
//!   of the moment may be deleted.
//! - *A flatten* puts pages into the base version (seq 0). Of the moment's own layer it is not newer than any moment, and both
//!   moments see it alike (`crate::store::flatten`). Of a nearer layer it is newer: all it holds is said to have changed. A
//!   reader with the ancestry from before the flatten finds that of an ancestor merges may have moved pages out of reach
//!   meanwhile; but then the base version holds what was seen of it, or a version above it that is newer as well.
//! - *A zero* marks pages, it never takes them out of a version.
//!
//! A moment that is no such one (of a foreign layer, or later than what is seen) has every page changed: of a later one a
//! merge could have moved pages out of what lies between.

use super::reading::{ReadChain, ReadError};
use crate::store::CopysetStore;
use crate::store::copyset_store::{Known, Loaded};
use crate::store::key::{ChunkKey, RowKey, VersionKey};
use crate::store::lookup::View;
use crate::store::pages::PageSet;
use crate::store::state::State;
use ogee_common::id::LayerId;
use ogee_common::limits::{PAGES_PER_ROW, ROWS_PER_CHUNK};
use ogee_proto::data::{Ancestor, ChunkPages, PageMapHead, PageMapReply};
use std::sync::Arc;

/// Which versions of a view are newer than a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Newer {
    /// The view has nothing in common with the moment.
    All,
    /// Those of the nearer layers, and those of the moment's layer above its seq.
    Than { nearer: Vec<LayerId>, moment: Ancestor },
}

impl Newer {
    fn than(view: &View, moment: Ancestor) -> Self {
        let mut nearer = vec![];
        for (layer, seq) in view.levels().1 {
            if layer == moment.layer {
                return if moment.seq <= seq { Self::Than { nearer, moment } } else { Self::All };
            }
            nearer.push(layer);
        }
        Self::All
    }

    fn has(&self, version: VersionKey) -> bool {
        match self {
            Self::All => true,
            Self::Than { nearer, moment } => {
                let layer = version.at.layer;
                nearer.contains(&layer) || (layer == moment.layer && version.seq > moment.seq)
            }
        }
    }
}

/// What is said of a row.
#[derive(Debug, Default)]
struct RowMap {
    data: PageSet,
    zero: PageSet,
    changed: PageSet,
}

impl CopysetStore {
    /// Answers a client's question. The caller has just taken a read barrier on this replica.
    ///
    /// # Errors
    /// [`ReadError`], never `Corrupt`.
    pub async fn page_map(self: &Arc<Self>, head: &PageMapHead) -> Result<PageMapReply, ReadError> {
        self.caught_up();
        self.admit_read(&head.at).map_err(ReadError::Refused)?;
        let at = ChunkKey { layer: head.at.layer, chunk: head.at.chunk };
        let view = self.view(at, head.at.seq, &ReadChain::of(head.at.epoch, &head.chain))?;
        self.page_map_of(&view, head.since).await
    }

    /// What a view of a chunk holds, and what of it may have changed since a moment. Without a read barrier only of
    /// immutable versions.
    ///
    /// # Errors
    /// [`ReadError::NotReady`], [`ReadError::Store`].
    pub async fn page_map_of(
        self: &Arc<Self>,
        view: &View,
        since: Option<Ancestor>,
    ) -> Result<PageMapReply, ReadError> {
        let newer = since.map(|moment| Newer::than(view, moment));
        let (mut data, mut zero, mut changed) = (ChunkPages::none(), ChunkPages::none(), ChunkPages::none());
        for row in (0..16u8).take(ROWS_PER_CHUNK as usize) {
            let map = self.row_map(view, newer.as_ref(), row).await?;
            data.set_row(row, &map.data.encode());
            zero.set_row(row, &map.zero.encode());
            changed.set_row(row, &map.changed.encode());
            tokio::task::yield_now().await;
        }
        if !self.servable() {
            return Err(ReadError::NotReady);
        }
        let changed = newer.map(|newer| if newer == Newer::All { ChunkPages::all() } else { changed });
        Ok(PageMapReply { data, zero, changed })
    }

    async fn row_map(self: &Arc<Self>, view: &View, newer: Option<&Newer>, row: u8) -> Result<RowMap, ReadError> {
        let mut loaded = Loaded::new();
        loop {
            let missing = match self.plan_row_map(&self.state(), &loaded, (view, newer), row) {
                Ok(map) => return Ok(map),
                Err(missing) => missing,
            };
            self.load_rows(missing, &mut loaded).await.map_err(ReadError::of_store)?;
        }
    }

    /// What is said of a row, or the metadata rows to load first.
    fn plan_row_map(
        &self,
        state: &State,
        loaded: &Loaded,
        (view, newer): (&View, Option<&Newer>),
        row: u8,
    ) -> Result<RowMap, Vec<RowKey>> {
        let (mut map, mut missing) = (RowMap::default(), vec![]);
        let mut wanted = PageSet::range(0..PAGES_PER_ROW);
        // From the newest on: the newer ones come first.
        for version in state.sources(view) {
            let is_newer = newer.is_some_and(|newer| newer.has(version));
            if wanted.is_empty() && !is_newer {
                break;
            }
            match self.known_row(state, loaded, version.row(row)) {
                Known::Absent => {}
                Known::Unknown => missing.push(version.row(row)),
                Known::Row(known) => {
                    map.data = map.data.union(known.data().intersection(wanted));
                    map.zero = map.zero.union(known.zero().intersection(wanted));
                    wanted = wanted.minus(known.held());
                    if is_newer {
                        map.changed = map.changed.union(known.held());
                    }
                }
            }
        }
        if missing.is_empty() { Ok(map) } else { Err(missing) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::id::{ChunkIndex, VolumeSeq};

    fn moment(layer: u64, seq: u64) -> Ancestor {
        Ancestor { layer: LayerId(layer), seq: VolumeSeq(seq) }
    }

    #[test]
    fn newer_is_what_is_nearer_or_above_in_the_same_layer() {
        let at = ChunkKey { layer: LayerId(3), chunk: ChunkIndex(0) };
        let view = View::Layer { at, seq: VolumeSeq(8), chain: Arc::new([moment(2, 5), moment(1, 3)]) };
        let newer = |since: Ancestor| {
            let newer = Newer::than(&view, since);
            let all = [(3, 8), (3, 4), (3, 0), (2, 5), (2, 4), (2, 0), (1, 3), (1, 0)];
            let key = |(layer, seq)| VersionKey::new(LayerId(layer), ChunkIndex(0), VolumeSeq(seq));
            all.into_iter().filter(|v| newer.has(key(*v))).count()
        };
        assert_eq!(newer(moment(3, 8)), 0);
        assert_eq!(newer(moment(3, 4)), 1, "a base version is older than every moment of its layer");
        assert_eq!(newer(moment(2, 5)), 3);
        assert_eq!(newer(moment(2, 4)), 4);
        assert_eq!(newer(moment(1, 2)), 7);
        for foreign in [moment(3, 9), moment(2, 6), moment(7, 1)] {
            assert_eq!(Newer::than(&view, foreign), Newer::All, "{foreign:?}");
        }
    }
}
