//! The store's part of installing a Raft snapshot: marks, fetched data, and columns that change as one. Why this is
//! right, and what a crash leaves, is in `crate::copyset::install`.

use super::copyset_store::CopysetStore;
use super::error::{ChunkStoreError, blocking};
use super::key::{RowKey, TABLE_LAYER, TABLE_ROW, TABLE_VERSION, VersionKey, directory, first_page};
use super::layers::LayerTable;
use super::page_io::offset_of;
use super::pages::PageSet;
use super::record::{Recovery, VersionRecord};
use super::row::Row;
use super::state::rows_of;
use crate::copyset::fetch::{FetchedRow, pages_sent};
use ogee_common::checksum::PAGE;
use ogee_common::id::ChunkIndex;
use ogee_common::limits::PAGES_PER_ROW;
use ogee_disk::{Batch, DataFile};
use ogee_raft::api::Applied;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A fetched column, before it replaces ours.
#[derive(Debug, Clone)]
pub(crate) struct ColumnDraft {
    chunk: ChunkIndex,
    /// Every version that the column has afterwards.
    versions: BTreeSet<VersionKey>,
    /// Versions with fetched rows; `true`: rows that were not fetched do not exist.
    fetched: BTreeMap<VersionKey, bool>,
    rows: Vec<(RowKey, Row)>,
}

/// What committing a column changes, worked out before anything is written.
struct ColumnChange {
    records: Vec<(VersionKey, VersionRecord)>,
    removed: Vec<(VersionKey, u16)>,
    /// Rows to delete of versions that stay.
    dropped_rows: Vec<RowKey>,
    files: Vec<Arc<DataFile>>,
    created: bool,
}

impl ColumnDraft {
    pub(crate) fn new(chunk: ChunkIndex, versions: BTreeSet<VersionKey>) -> Self {
        Self { chunk, versions, fetched: BTreeMap::new(), rows: vec![] }
    }

    /// Rows of a version follow; `whole`: all that it has.
    pub(crate) fn begin(&mut self, version: VersionKey, whole: bool) {
        self.fetched.insert(version, whole);
    }

    pub(crate) fn add(&mut self, key: RowKey, row: Row) {
        self.rows.push((key, row.untouched()));
    }
}

impl CopysetStore {
    /// Chunks of any layer in a range.
    pub(crate) fn chunks_between(&self, first: ChunkIndex, last: ChunkIndex) -> BTreeSet<ChunkIndex> {
        let state = self.state();
        state.all_versions().map(|(key, _)| key.at.chunk).filter(|c| (first..=last).contains(c)).collect()
    }

    /// Our versions of a chunk index, of all layers, in order.
    pub(crate) fn column_versions(&self, chunk: ChunkIndex) -> Vec<VersionKey> {
        self.state().all_versions().map(|(key, _)| key).filter(|key| key.at.chunk == chunk).collect()
    }

    /// Marks the copyset as being installed, durably. Nothing may be dirty.
    pub(crate) async fn begin_install(self: &Arc<Self>) -> Result<(), ChunkStoreError> {
        let recovery = Recovery { installing: true, ..self.state().recovery };
        self.write_recovery(recovery).await?;
        // From here on files may get ahead of rows: forget which pages this process knows to be equal.
        let mut state = self.state();
        assert!(!state.is_dirty(), "an install begins from a checkpoint");
        let keys: Vec<_> = state.all_versions().map(|(key, v)| (key, v.record.rows)).collect();
        state.cleaned += 1;
        self.process.with_rows(|cache| {
            for (key, rows) in keys {
                rows_of(rows).for_each(|row| cache.remove(&(self.id, key.row(row))));
            }
        });
        Ok(())
    }

    /// Records durably that data up to an index of the sender may be written from now on.
    pub(crate) async fn raise_install_high(self: &Arc<Self>, index: u64) -> Result<(), ChunkStoreError> {
        let recovery = {
            let state = self.state();
            if index <= state.recovery.install_high {
                return Ok(());
            }
            Recovery { install_high: index, horizon: state.recovery.horizon.max(index), ..state.recovery }
        };
        self.write_recovery(recovery).await?;
        let mut state = self.state();
        state.lenient_until = state.lenient_until.max(index);
        Ok(())
    }

    /// Writes the pages of a fetched row into the version's file. The row itself follows with the column.
    pub(crate) async fn write_fetched(&self, version: VersionKey, row: &FetchedRow) -> Result<(), ChunkStoreError> {
        let _gate = self.gate.lock().await;
        let mut data = row.data.as_ref();
        let mut pieces: Vec<(u64, &[u8])> = vec![];
        for run in pages_sent(&row.meta).runs() {
            let (now, rest) = data.split_at(run.len() * PAGE);
            pieces.push((offset_of(first_page(row.row) + run.start), now));
            data = rest;
        }
        if pieces.is_empty() { Ok(()) } else { self.write_file(version, &pieces).await }
    }

    /// Replaces a column by a fetched one: flushes its files, writes its rows in one batch, then removes what is no more.
    pub(crate) async fn commit_column(self: &Arc<Self>, draft: ColumnDraft) -> Result<(), ChunkStoreError> {
        let _gate = self.gate.lock().await;
        let work = Arc::new((self.column_change(&draft), draft));
        let (store, flush) = (Arc::clone(self), Arc::clone(&work));
        blocking(move || store.flush_column(&flush.0)).await?;
        let (change, draft) = &*work;
        self.write_batch(self.column_batch(change, draft)).await?;
        self.replace_column(change, draft);
        self.unlink(change.removed.iter().map(|(key, _)| *key).collect()).await?;
        self.punch_unused(draft).await
    }

    fn column_change(&self, draft: &ColumnDraft) -> ColumnChange {
        let ours = self.column_versions(draft.chunk);
        let state = self.state();
        let record = |key: &VersionKey| state.version(*key).map(|v| v.record);
        let gone = ours.iter().filter(|key| !draft.versions.contains(key));
        let removed = gone.map(|key| (*key, record(key).map_or(0, |r| r.rows))).collect();
        let mut dropped_rows = vec![];
        let mut records: BTreeMap<VersionKey, VersionRecord> = BTreeMap::new();
        for (key, whole) in &draft.fetched {
            let old = record(key).unwrap_or_default();
            if *whole {
                dropped_rows.extend(rows_of(old.rows).map(|row| key.row(row)));
            }
            records.insert(*key, if *whole { VersionRecord::default() } else { old });
        }
        for (key, row) in &draft.rows {
            let record = records.entry(key.version).or_default();
            record.rows |= 1 << key.row;
            record.last_index = record.last_index.max(row.last_index);
        }
        let dirty: Vec<_> = draft.fetched.keys().filter_map(|key| state.dirty_files.get(key)).collect();
        ColumnChange {
            records: records.into_iter().collect(),
            removed,
            dropped_rows,
            files: dirty.iter().map(|d| Arc::clone(&d.file)).collect(),
            created: dirty.iter().any(|d| d.created),
        }
    }

    fn flush_column(&self, change: &ColumnChange) -> Result<(), ChunkStoreError> {
        if self.flush_failed.load(Ordering::SeqCst) {
            return Err(ChunkStoreError::FlushFailed);
        }
        for file in &change.files {
            file.sync_data()?;
        }
        if change.created {
            self.process.dir.sync_dir_of(&format!("{}/x", directory(self.id)))?;
        }
        Ok(())
    }

    fn column_batch(&self, change: &ColumnChange, draft: &ColumnDraft) -> Batch {
        let mut batch = Batch::new();
        for (key, rows) in &change.removed {
            batch.delete(TABLE_VERSION, &key.encode(self.id));
            rows_of(*rows).for_each(|row| batch.delete(TABLE_ROW, &key.row(row).encode(self.id)));
        }
        change.dropped_rows.iter().for_each(|key| batch.delete(TABLE_ROW, &key.encode(self.id)));
        for (key, row) in &draft.rows {
            let key = key.encode(self.id);
            batch.put(TABLE_ROW, &key, &row.encode(&key));
        }
        for (key, record) in &change.records {
            let key = key.encode(self.id);
            batch.put(TABLE_VERSION, &key, &record.encode(&key));
        }
        batch
    }

    /// Makes memory equal to what was written.
    fn replace_column(&self, change: &ColumnChange, draft: &ColumnDraft) {
        let mut state = self.state();
        for (key, _) in &change.removed {
            self.forget_version(&mut state, *key);
            state.removed.remove(key);
        }
        for (key, record) in &change.records {
            state.set_record(*key, *record);
            let file = state.dirty_files.remove(key);
            self.process.with_files(|files| {
                if let Some(dirty) = file {
                    files.insert((self.id, *key), dirty.file);
                }
            });
        }
        state.cleaned += 1;
        self.process.with_rows(|cache| {
            change.dropped_rows.iter().chain(draft.rows.iter().map(|(key, _)| key)).for_each(|key| {
                cache.remove(&(self.id, *key));
            });
        });
        self.recount(&mut state);
    }

    /// Frees blocks of pages that fetched rows do not hold. A crash before it leaks the blocks until they are written.
    async fn punch_unused(self: &Arc<Self>, draft: &ColumnDraft) -> Result<(), ChunkStoreError> {
        for (key, row) in &draft.rows {
            if row.data().is_empty() {
                continue;
            }
            let unused = PageSet::range(0..PAGES_PER_ROW).minus(row.data());
            for run in unused.runs() {
                let first = first_page(key.row);
                self.punch(key.version, first + run.start..first + run.end).await?;
            }
        }
        // The holes need not be durable: nothing reads there.
        let mut state = self.state();
        for key in draft.fetched.keys() {
            if let Some(dirty) = state.dirty_files.remove(key) {
                self.process.with_files(|files| files.insert((self.id, *key), dirty.file));
            }
        }
        self.recount(&mut state);
        Ok(())
    }

    /// Ends an install: position and layers of the Raft snapshot, durably, in one batch.
    pub(crate) async fn finish_install(
        self: &Arc<Self>,
        applied: &Applied,
        layers: LayerTable,
    ) -> Result<(), ChunkStoreError> {
        let index = applied.pos.map_or(0, |p| p.index);
        let recovery = {
            let state = self.state();
            let ahead = index.saturating_add(self.process.tuning.horizon_entries);
            Recovery { horizon: ahead.max(state.lenient_until), install_high: 0, installing: false }
        };
        let mut batch = Batch::new();
        batch.delete_prefix(TABLE_LAYER, &self.id.0.to_be_bytes());
        for (layer, info) in layers.iter() {
            let key = self.layer_key(layer);
            batch.put(TABLE_LAYER, &key, &info.encode(&key));
        }
        self.put_position(&mut batch, applied, recovery);
        self.write_batch(batch).await?;
        let mut state = self.state();
        state.layers = layers;
        state.applied = applied.clone();
        state.checkpointed = applied.clone();
        state.recovery = recovery;
        Ok(())
    }
}
