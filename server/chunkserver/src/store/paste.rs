//! The effect of Paste entries: pages of the backup that a layer stands on (ADR 0016).
//!
//! They go into the layer's *base version* (seq [`BASE_SEQ`], see [`super::flatten`]), which no write has and no merge takes, and only where that
//! lacks them. The backup is immutable and was proved by whoever pastes, so there is one content that a page can get. Hence:
//!
//! - **No reader sees a difference.** A page of the base version is seen exactly where no version of the layer up to the reader's
//!   seq, and nothing nearer, holds the page: there a reader that asks for missing pages was told "missing", and took the page from the backup.
//!   A write, a zero or a discard, before or after, lies above it and wins; a snapshot sees it as if it had always been there.
//! - **It needs no fence, no seq and no term.** Whoever sends it, however late and how often, its effect is none or the same one.
//!   A retry fills what is there already: nothing. Two hydrators and a guest's client may paste side by side.
//! - **Nothing comes back.** A layer that was deleted has a tombstone in each of its copysets, and layer ids are never reused: a late
//!   paste is refused ([`super::Refusal::LayerGone`]).
//! - **A page that is present stays present** for every seq that is read: no version loses a page but by `DropVersion`, which gives it to a
//!   version that every needed seq above reads. That is what a client rests on which makes sure of a page and then writes a part of it.
//!
//! # Replay and replicas
//!
//! The entry carries the data. It fills what the base version's rows lack at that point of the log, with what an earlier run of it
//! wrote. After the installation of a Raft snapshot rows may be ahead of the log; then the base version has the page already, from this entry
//! or one with the same content. A *partial* write before this entry in the log reads the page as absent or, with rows ahead, as what is
//! pasted: its client has made sure that these are the same, for it writes a part of a page only after that page was present (then this
//! entry changes nothing) or if the backup has zeros there.

use super::copyset_store::{CopysetStore, Known};
use super::error::ChunkStoreError;
use super::flatten::BASE_SEQ;
use super::key::{VersionKey, first_page};
use super::page_io::offset_of;
use super::pages::PageSet;
use super::record::VersionRecord;
use super::write::NewPage;
use ogee_common::checksum::PAGE;
use ogee_common::limits::PAGES_PER_ROW;
use ogee_proto::data::PasteHead;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl CopysetStore {
    /// Carries out a Paste entry that the rules admitted.
    ///
    /// # Errors
    /// [`ChunkStoreError::Entry`] when data and checksums differ; otherwise the disk failed.
    pub(crate) async fn paste(self: &Arc<Self>, index: u64, head: &PasteHead, data: &[u8]) -> Result<(), ChunkStoreError> {
        if !head.pages.matches(data) {
            return Err(ChunkStoreError::Entry { index });
        }
        let _gate = self.gate.lock().await;
        let target = VersionKey::new(head.layer, head.chunk, BASE_SEQ);
        let (row, first) = (head.pages.row, first_page(head.pages.row));
        let loaded = self.rows_to_change(target, first..first + PAGES_PER_ROW).await?;
        let held = match self.known_row(&self.state(), &loaded, target.row(row)) {
            Known::Row(row) => row.held(),
            Known::Absent | Known::Unknown => PageSet::EMPTY,
        };
        let carried = PageSet::decode(&head.pages.data).iter().zip(data.chunks_exact(PAGE)).zip(&head.pages.crcs);
        let (mut pages, mut pieces) = (vec![], vec![]);
        for ((page, bytes), crc) in carried.filter(|((page, _), _)| !held.contains(*page)) {
            pages.push((first + page, NewPage::Data(*crc)));
            pieces.push((offset_of(first + page), bytes));
        }
        let zero = PageSet::decode(&head.pages.zero).minus(held);
        pages.extend(zero.iter().map(|page| (first + page, NewPage::Zero)));
        if pages.is_empty() {
            return Ok(());
        }
        self.state().ensure_version(target, VersionRecord::default());
        if !pieces.is_empty() {
            self.write_file(target, &pieces).await?;
        }
        self.set_pages(index, target, &pages, &loaded);
        self.process.counters.pasted_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}
