//! Checkpoints: making everything applied durable. Order and reasons are in the module docs of `store`.
//!
//! Called by the state machine, never while an entry is being applied; readers go on. Only this copyset waits for the
//! flushes, which run on the blocking pool.

use super::copyset_store::CopysetStore;
use super::error::{ChunkStoreError, blocking};
use super::key::{
    KIND_APPLIED, KIND_RECOVERY, RowKey, TABLE_COPYSET, TABLE_LAYER, TABLE_ROW, TABLE_VERSION, VersionKey, copyset_key,
    directory,
};
use super::layers::LayerInfo;
use super::process::count;
use super::record::{Recovery, VersionRecord, encode_applied};
use super::row::Row;
use super::state::{State, rows_of};
use ogee_common::id::LayerId;
use ogee_common::sim::{self, Canary};
use ogee_disk::{Batch, DataFile};
use ogee_raft::api::Applied;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What one checkpoint writes.
struct Work {
    applied: Applied,
    recovery: Recovery,
    files: Vec<Arc<DataFile>>,
    created: bool,
    rows: Vec<(RowKey, Arc<Row>)>,
    versions: Vec<(VersionKey, VersionRecord)>,
    layers: Vec<(LayerId, LayerInfo)>,
    removed: Vec<(VersionKey, u16)>,
}

impl CopysetStore {
    /// Flushes the files that are dirty now, while entries go on being applied, so that the checkpoint that follows finds
    /// little to flush while they wait. It makes nothing else durable. A failure is remembered and fails that checkpoint:
    /// the kernel tells of a failed flush only once (INV).
    pub async fn flush_ahead(self: &Arc<Self>) {
        let files: Vec<Arc<DataFile>> = self.state().dirty_files.values().map(|d| Arc::clone(&d.file)).collect();
        let flushed = blocking(move || files.iter().try_for_each(|file| Ok(file.sync_data()?))).await;
        if let Err(error) = flushed {
            tracing::error!(copyset = self.id.0, error = &error as &dyn std::error::Error, "flush of data files failed");
            self.flush_failed.store(true, Ordering::SeqCst);
        }
    }

    /// Makes everything applied durable and returns its position.
    ///
    /// # Errors
    /// When the disk failed. A full disk is waited for.
    pub(crate) async fn checkpoint(self: &Arc<Self>) -> Result<Applied, ChunkStoreError> {
        let work = {
            let state = self.state();
            if !state.is_dirty() {
                return Ok(state.applied.clone());
            }
            Arc::new(self.gather(&state))
        };
        let (store, flush) = (Arc::clone(self), Arc::clone(&work));
        blocking(move || store.flush(&flush)).await?;
        let (store, write) = (Arc::clone(self), Arc::clone(&work));
        let batch = blocking(move || Ok(store.checkpoint_batch(&write))).await?;
        self.write_batch(batch).await?;
        count(&self.process.counters.checkpoints);
        let unlink = {
            // A repair that has loaded a dirty row must find it dirty when it changes it. What it changed since `gather`
            // is forgotten with the cache or found damaged once more after a crash, and repaired again.
            let _gate = self.gate.lock().await;
            let mut state = self.state();
            self.clean(&mut state, &work);
            let gone = work.removed.iter().map(|(key, _)| *key).filter(|key| state.version(*key).is_none());
            gone.collect::<Vec<_>>()
        };
        self.unlink(unlink).await?;
        Ok(work.applied.clone())
    }

    fn gather(&self, state: &State) -> Work {
        let versions = state.dirty_versions.iter().filter_map(|key| Some((*key, state.version(*key)?.record)));
        let layers = state.layers.dirty().iter().filter_map(|id| Some((*id, state.layers.get(*id)?.clone())));
        Work {
            applied: state.applied.clone(),
            recovery: self.next_recovery(state),
            files: state.dirty_files.values().map(|d| Arc::clone(&d.file)).collect(),
            created: state.dirty_files.values().any(|d| d.created),
            rows: state.dirty_rows.iter().map(|(key, row)| (*key, Arc::clone(row))).collect(),
            versions: versions.collect(),
            layers: layers.collect(),
            removed: state.removed.iter().map(|(key, rows)| (*key, *rows)).collect(),
        }
    }

    /// The recovery record that goes with the applied position: the horizon ahead of it, never below what an earlier
    /// process may have applied; an install that the log has overtaken is over.
    pub(crate) fn next_recovery(&self, state: &State) -> Recovery {
        let ahead = state.applied_index().saturating_add(self.process.tuning.horizon_entries);
        let over = state.applied_index() >= state.recovery.install_high;
        Recovery {
            horizon: ahead.max(state.lenient_until),
            install_high: if over { 0 } else { state.recovery.install_high },
            installing: state.recovery.installing && !over,
        }
    }

    fn flush(&self, work: &Work) -> Result<(), ChunkStoreError> {
        if self.flush_failed.load(Ordering::SeqCst) {
            return Err(ChunkStoreError::FlushFailed);
        }
        for file in &work.files {
            file.sync_data()?;
        }
        if work.created {
            self.process.dir.sync_dir_of(&format!("{}/x", directory(self.id)))?;
        }
        Ok(())
    }

    fn checkpoint_batch(&self, work: &Work) -> Batch {
        let mut batch = Batch::new();
        for (key, rows) in &work.removed {
            batch.delete(TABLE_VERSION, &key.encode(self.id));
            rows_of(*rows).for_each(|row| batch.delete(TABLE_ROW, &key.row(row).encode(self.id)));
        }
        let forgotten = usize::from(sim::planted(Canary::ForgetRow));
        for (key, row) in work.rows.iter().skip(forgotten) {
            let key = key.encode(self.id);
            batch.put(TABLE_ROW, &key, &row.encode(&key));
        }
        for (key, record) in &work.versions {
            let key = key.encode(self.id);
            batch.put(TABLE_VERSION, &key, &record.encode(&key));
        }
        for (layer, info) in &work.layers {
            let key = self.layer_key(*layer);
            batch.put(TABLE_LAYER, &key, &info.encode(&key));
        }
        self.put_position(&mut batch, &work.applied, work.recovery);
        batch
    }

    /// Adds position and recovery record to a batch.
    pub(crate) fn put_position(&self, batch: &mut Batch, applied: &Applied, recovery: Recovery) {
        let key = copyset_key(self.id, KIND_APPLIED);
        batch.put(TABLE_COPYSET, &key, &encode_applied(&key, applied));
        let key = copyset_key(self.id, KIND_RECOVERY);
        batch.put(TABLE_COPYSET, &key, &recovery.encode(&key));
    }

    /// What was dirty is clean now.
    fn clean(&self, state: &mut State, work: &Work) {
        state.checkpointed = work.applied.clone();
        state.recovery = work.recovery;
        state.layers.clean();
        state.removed.clear();
        state.dirty_versions.clear();
        state.cleaned += 1;
        state.unsubmitted = 0;
        self.process.with_rows(|rows| {
            for (key, row) in state.dirty_rows.drain() {
                rows.insert((self.id, key), row);
            }
        });
        self.process.with_files(|files| {
            for (key, dirty) in state.dirty_files.drain() {
                files.insert((self.id, key), dirty.file);
            }
        });
        self.recount(state);
    }

    /// Unlinks the files of removed versions. What a crash leaves behind goes at the next load.
    pub(crate) async fn unlink(self: &Arc<Self>, versions: Vec<VersionKey>) -> Result<(), ChunkStoreError> {
        if versions.is_empty() {
            return Ok(());
        }
        let store = Arc::clone(self);
        blocking(move || {
            for key in versions {
                store.process.dir.unlink(&key.file_name(store.id))?;
            }
            Ok(())
        })
        .await
    }
}
