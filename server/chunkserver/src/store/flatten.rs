//! The effect of Flatten entries, and what the leader that makes them must know.
//!
//! Flattening makes a layer independent of its ancestors. What an ancestor shows to the layer is copied, page by page with
//! its checksum, into the layer's *base version*: the version with seq [`BASE_SEQ`], 0. No write has that seq, so nothing
//! but Flatten entries ever changes it, and it lies below everything that the layer has or will have:
//!
//! - **Every seq of the layer reads the same before, between and after any two entries.** A page of the base version is seen
//!   exactly where the ancestors were seen before: where no version of the layer up to that seq holds the page. It is what the
//!   ancestors show, zero marks included. So a racing write, zero or discard of a guest wins, and snapshots need no care.
//! - **Left out is what nobody can see**: a page that a version up to `needed`, the lowest seq that is still read, holds
//!   already. Versions never lose a page but by `DropVersion`, which gives it to a version that every needed seq above reads,
//!   so a page that was left out rightly stays so. Only the leader looks at this, when it makes the entry: the entry names the pages.
//! - **Reading on with the old ancestry is right for ever**, also after the parent's snapshot is gone and its versions merged:
//!   pages that an ancestor held, as data or zero, never get that far any more; those that none held stay absent, because
//!   versions up to the ancestor's seq are written no more and merging only takes pages from them. So clients, read-only
//!   readers and children may learn the shorter ancestry whenever they attach the next time. For the same reason a late entry
//!   of an old leader, applied when the ancestors have changed, does no harm: it fills only pages that the base version
//!   lacks, and those are absent in the ancestors or masked for every seq that is read.
//!
//! # Replay and replicas
//!
//! An entry reads ancestors at or below the seqs that its chain names. They are immutable, because the entry (as OpenLayer
//! does) first raises the ancestors' minimum seqs; a merge in the log behind it takes effect behind it in each replay too,
//! and removed files are unlinked only after the checkpoint that contains the removal. It fills only what the base
//! version lacks, and writes there what any earlier run of it wrote. So replay from a checkpoint converges. After the
//! installation of a Raft snapshot rows may be ahead of the log: then a column without the ancestor's versions holds the base
//! version's pages already (`crate::copyset::install`), and the entry does nothing.
//!
//! A page whose bytes do not match its checksum *here* gets the checksum that all replicas have for it nevertheless: the
//! replicas' rows stay equal, and the copy is found bad and mended from another replica as its source would have been. The
//! leader mends its own source first.

use super::copyset_store::{CopysetStore, Known};
use super::error::ChunkStoreError;
use super::key::{ChunkKey, VersionKey, first_page};
use super::lookup::{PageSource, View};
use super::page_io::{PagesRead, offset_of};
use super::pages::PageSet;
use super::process::SpaceState;
use super::record::VersionRecord;
use super::write::NewPage;
use ogee_common::checksum::PAGE;
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_common::limits::PAGES_PER_ROW;
use ogee_proto::data::{Ancestor, FlattenHead};
use ogee_raft::api::SnapshotSource;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The seq of a layer's base version; no write has it.
pub const BASE_SEQ: VolumeSeq = VolumeSeq(0);

/// What is to be flattened in a copyset.
#[derive(Debug, Clone)]
pub struct FlattenOrder {
    /// The layer.
    pub layer: LayerId,
    /// The lowest seq of it that is still read.
    pub needed: VolumeSeq,
    /// Its ancestors, nearest first; at least one.
    pub chain: Arc<[Ancestor]>,
}

impl FlattenOrder {
    /// The entry for some pages of a row; none: it only seals the ancestors.
    #[must_use]
    pub fn head(&self, chunk: ChunkIndex, row: u8, pages: PageSet) -> FlattenHead {
        FlattenHead { layer: self.layer, chunk, row, pages: pages.encode(), chain: self.chain.to_vec() }
    }
}

/// What the ancestors alone show; `None` when there are none.
fn ancestors_view(chain: &[Ancestor], chunk: ChunkIndex) -> Option<View> {
    let (parent, rest) = chain.split_first()?;
    Some(View::Layer { at: ChunkKey { layer: parent.layer, chunk }, seq: parent.seq, chain: rest.into() })
}

fn pages_of_row(row: u8) -> Range<u32> {
    first_page(row)..first_page(row) + PAGES_PER_ROW
}

impl CopysetStore {
    /// Rows of chunks in which an ancestor has anything that it shows, in order. Complete once an entry of the order without
    /// pages was applied here.
    #[must_use]
    pub fn flatten_rows(&self, order: &FlattenOrder) -> Vec<(ChunkIndex, u8)> {
        let state = self.state();
        let mut rows: BTreeMap<ChunkIndex, u16> = BTreeMap::new();
        for ancestor in order.chain.iter() {
            for at in state.chunks_of(ancestor.layer) {
                let shown = state.versions(at).iter().filter(|v| v.seq <= ancestor.seq);
                *rows.entry(at.chunk).or_default() |= shown.fold(0, |mask, v| mask | v.record.rows);
            }
        }
        rows.into_iter().flat_map(|(chunk, mask)| super::state::rows_of(mask).map(move |row| (chunk, row))).collect()
    }

    /// The pages of a row that are still to be copied. What is bad of them here is mended from `others` first, if any has
    /// it.
    ///
    /// # Errors
    /// When a metadata row cannot be read or the disk fails; [`ChunkStoreError::Busy`].
    pub async fn flatten_pages(
        self: &Arc<Self>,
        order: &FlattenOrder,
        (chunk, row): (ChunkIndex, u8),
        others: &[impl SnapshotSource],
    ) -> Result<PageSet, ChunkStoreError> {
        let Some(above) = ancestors_view(&order.chain, chunk) else { return Ok(PageSet::EMPTY) };
        let at = ChunkKey { layer: order.layer, chunk };
        let own = View::Layer { at, seq: order.needed, chain: Arc::new([]) };
        let own = self.sources_of(&own, pages_of_row(row)).await?;
        let shown = self.sources_of(&above, pages_of_row(row)).await?;
        let mut wanted = PageSet::EMPTY;
        for (page, (own, shown)) in (0..).zip(own.iter().zip(&shown)) {
            if *own == PageSource::Absent && *shown != PageSource::Absent {
                wanted.insert(page);
            }
        }
        for run in wanted.runs() {
            let first = first_page(row) + run.start;
            let read = self.read_pages(&above, first..first + (run.end - run.start)).await?;
            for bad in &read.bad {
                let page = first + u32::try_from(*bad).expect("a row has 256 pages");
                self.report_damage(&read.sources[*bad], chunk.0, page);
                if let Some(version) = read.sources[*bad].version() {
                    self.repair(version, page, others).await?;
                }
            }
        }
        Ok(wanted)
    }

    /// Whether there is room for copies now.
    #[must_use]
    pub fn may_flatten(&self) -> bool {
        self.process.space_state() == SpaceState::Roomy
    }

    /// Carries out a Flatten entry that the rules admitted.
    ///
    /// # Errors
    /// When the disk failed.
    pub(crate) async fn flatten(self: &Arc<Self>, index: u64, head: &FlattenHead) -> Result<(), ChunkStoreError> {
        let Some(above) = ancestors_view(&head.chain, head.chunk) else { return Ok(()) };
        let _gate = self.gate.lock().await;
        let target = VersionKey { at: ChunkKey { layer: head.layer, chunk: head.chunk }, seq: BASE_SEQ };
        let loaded = self.rows_to_change(target, pages_of_row(head.row)).await?;
        let held = match self.known_row(&self.state(), &loaded, target.row(head.row)) {
            Known::Row(row) => row.held(),
            Known::Absent | Known::Unknown => PageSet::EMPTY,
        };
        let mut pages = vec![];
        for run in PageSet::decode(&head.pages).minus(held).runs() {
            let run = first_page(head.row) + run.start..first_page(head.row) + run.end;
            let read = self.read_pages_gated(&above, run.clone()).await?;
            for bad in &read.bad {
                self.report_damage(&read.sources[*bad], head.chunk.0, run.start + u32::try_from(*bad).unwrap_or(0));
            }
            let pieces = data_pieces(&read, run.start);
            if !pieces.is_empty() {
                self.state().ensure_version(target, VersionRecord::default());
                self.write_file(target, &pieces).await?;
            }
            pages.extend(run.zip(&read.sources).filter_map(|(page, source)| Some((page, copy_of(source)?))));
        }
        if !pages.is_empty() {
            self.state().ensure_version(target, VersionRecord::default());
            self.set_pages(index, target, &pages, &loaded);
            self.process.counters.flattened_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// What the copy of a page is; `None`: there is nothing to copy.
const fn copy_of(source: &PageSource) -> Option<NewPage> {
    match source {
        PageSource::Absent => None,
        PageSource::Zero => Some(NewPage::Zero),
        PageSource::Data { crc, .. } => Some(NewPage::Data(*crc)),
        PageSource::Damaged { .. } => Some(NewPage::Damaged),
    }
}

/// The bytes to write, in as few pieces as they lie.
fn data_pieces(read: &PagesRead, first: u32) -> Vec<(u64, &[u8])> {
    let mut pieces = vec![];
    let mut at = 0;
    for run in read.sources.chunk_by(|a, b| a.version().is_some() == b.version().is_some()) {
        if run[0].version().is_some() {
            let page = first + u32::try_from(at).expect("a row has 256 pages");
            pieces.push((offset_of(page), &read.bytes[at * PAGE..(at + run.len()) * PAGE]));
        }
        at += run.len();
    }
    pieces
}
