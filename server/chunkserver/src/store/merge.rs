//! The effects of DropVersion and DropLayer entries.
//!
//! Merging: every version with a seq in `(after, seq]` gives the pages that the oldest version in `(seq, next]` lacks to
//! that version, newest giver first, and is removed. A chunk without a version in `(seq, next]` keeps what it has: the
//! older version is then what `next` reads. Invariant: every seq up to `after` and from `next` on reads the same before,
//! after and between any two steps, because a page is copied before the giver is removed. Repeating an order that was
//! carried out finds no giver and does nothing.

use super::copyset_store::{CopysetStore, Known};
use super::error::ChunkStoreError;
use super::key::{VersionKey, first_page, row_of};
use super::lookup::{PageSource, View};
use super::page_io::offset_of;
use super::pages::PageSet;
use super::row::Row;
use super::state::rows_of;
use super::write::NewPage;
use ogee_common::checksum::PAGE;
use ogee_common::id::LayerId;
use ogee_common::limits::PAGES_PER_ROW;
use ogee_proto::data::DropVersionHead;
use std::ops::Range;
use std::sync::Arc;

impl CopysetStore {
    /// Deletes every version of a layer.
    pub(crate) async fn drop_layer(&self, layer: LayerId) {
        let _gate = self.gate.lock().await;
        let mut state = self.state();
        for at in state.chunks_of(layer) {
            let seqs: Vec<_> = state.versions(at).iter().map(|v| v.seq).collect();
            for seq in seqs {
                self.forget_version(&mut state, VersionKey { at, seq });
            }
        }
        self.recount(&mut state);
    }

    /// Carries out a DropVersion.
    ///
    /// # Errors
    /// When the disk failed.
    pub(crate) async fn drop_version(
        self: &Arc<Self>,
        index: u64,
        order: &DropVersionHead,
    ) -> Result<(), ChunkStoreError> {
        let chunks = self.state().chunks_of(order.layer);
        for at in chunks {
            let (mut givers, taker) = {
                let state = self.state();
                let versions = state.versions(at);
                let givers: Vec<_> =
                    versions.iter().map(|v| v.seq).filter(|s| *s > order.after && *s <= order.seq).collect();
                let taker = versions.iter().map(|v| v.seq).find(|s| *s > order.seq && *s <= order.next);
                (givers, taker)
            };
            let Some(taker) = taker else { continue };
            while let Some(giver) = givers.pop() {
                self.merge(index, VersionKey { at, seq: giver }, VersionKey { at, seq: taker }).await?;
            }
        }
        Ok(())
    }

    async fn merge(self: &Arc<Self>, index: u64, giver: VersionKey, taker: VersionKey) -> Result<(), ChunkStoreError> {
        let rows = self.state().version(giver).map_or(0, |v| v.record.rows);
        for row in rows_of(rows) {
            self.merge_row(index, giver, taker, row).await?;
            tokio::task::yield_now().await;
        }
        let _gate = self.gate.lock().await;
        let mut state = self.state();
        self.forget_version(&mut state, giver);
        self.recount(&mut state);
        Ok(())
    }

    async fn merge_row(
        self: &Arc<Self>,
        index: u64,
        giver: VersionKey,
        taker: VersionKey,
        row: u8,
    ) -> Result<(), ChunkStoreError> {
        let _gate = self.gate.lock().await;
        let first = first_page(row);
        let all = first..first + PAGES_PER_ROW;
        let loaded = self.rows_to_change(taker, all.clone()).await?;
        let from = self.rows_to_change(giver, all).await?;
        let (zero, data) = {
            let state = self.state();
            let get = |loaded, key: VersionKey| match self.known_row(&state, loaded, key.row(row)) {
                Known::Row(row) => row,
                _ => Arc::new(Row::default()),
            };
            let (from, to) = (get(&from, giver), get(&loaded, taker));
            let lacking = PageSet::range(0..PAGES_PER_ROW).minus(to.held());
            (from.zero().intersection(lacking), from.data().intersection(lacking))
        };
        let mut pages: Vec<(u32, NewPage)> = zero.iter().map(|p| (first + p, NewPage::Zero)).collect();
        for run in data.runs() {
            self.copy_run(giver, taker, first + run.start..first + run.end, &mut pages).await?;
        }
        if !pages.is_empty() {
            self.set_pages(index, taker, &pages, &loaded);
        }
        Ok(())
    }

    /// Copies pages that lie in `giver` into the file of `taker`, together with their checksums.
    async fn copy_run(
        self: &Arc<Self>,
        giver: VersionKey,
        taker: VersionKey,
        run: Range<u32>,
        pages: &mut Vec<(u32, NewPage)>,
    ) -> Result<(), ChunkStoreError> {
        debug_assert_eq!(row_of(run.start).0, row_of(run.end - 1).0);
        let read = self.read_pages_gated(&View::Version(giver), run.clone()).await?;
        self.write_file(taker, &[(offset_of(run.start), &read.bytes)]).await?;
        debug_assert_eq!(read.bytes.len(), run.len() * PAGE);
        for (i, page) in run.enumerate() {
            let new = match read.sources[i] {
                // Damage is passed on as damage: a fresh checksum over it would hide it.
                PageSource::Data { .. } if read.bad.contains(&i) => {
                    self.report_damage(&read.sources[i], giver.at.chunk.0, page);
                    NewPage::Damaged
                }
                PageSource::Data { crc, .. } => NewPage::Data(crc),
                _ => NewPage::Damaged,
            };
            pages.push((page, new));
        }
        Ok(())
    }
}
