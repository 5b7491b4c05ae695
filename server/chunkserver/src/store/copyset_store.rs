//! [`CopysetStore`]: the chunks of one copyset. One task changes it (the state machine); connections read it meanwhile.
//!
//! Concurrency. `state` is a short, uncontended lock that is never held over an await or a disk operation. `gate` is an
//! async lock around every change of data files together with the rows that describe them; a reader takes it only to
//! decide whether a failed checksum was a race with a change or damage. So a read never waits for a write, and damage
//! is never reported because of a race.

use super::error::{ChunkStoreError, ChunkStoreErrorKind, blocking};
use super::key::{
    KIND_APPLIED, KIND_RECOVERY, RowKey, TABLE_COPYSET, TABLE_LAYER, TABLE_ROW, TABLE_VERSION, VersionKey, copyset_key,
    directory, layer_key,
};
use super::layers::{LayerInfo, Refusal};
use super::process::{ChunkStore, count};
use super::record::{Recovery, VersionRecord, decode_applied};
use super::row::Row;
use super::state::{RowStamp, State};
use ogee_common::id::{CopysetId, LayerId};
use ogee_disk::meta::KeyValue;
use ogee_disk::{Batch, Durability, Table};
use ogee_proto::data::LayerHead;
use ogee_raft::api::Applied;
use std::collections::HashMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Rows of the metadata store that are read at a time while loading.
const SCAN_ROWS: usize = 4096;

/// The chunks of one copyset.
#[derive(Debug)]
pub struct CopysetStore {
    pub(crate) process: Arc<ChunkStore>,
    pub(crate) id: CopysetId,
    state: Mutex<State>,
    pub(crate) gate: tokio::sync::Mutex<()>,
    /// Held while a page is repaired from another replica.
    pub(crate) repairing: tokio::sync::Mutex<()>,
    /// A flush outside of a checkpoint failed: no checkpoint may succeed any more.
    pub(crate) flush_failed: AtomicBool,
    /// The first [`Fault`] that was noted.
    fault: OnceLock<Fault>,
}

/// Why a replica must take part no more, whoever found it: the state machine, a read, a repair or the scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk failed under it.
    Disk,
    /// Its own records are damaged while the disk works: it is to be rebuilt from the others.
    Damaged,
}

/// Rows that an operation has loaded, with their stamp then; so that a small cache cannot starve it.
pub(crate) type Loaded = HashMap<RowKey, (RowStamp, Arc<Row>)>;

/// What is known of a row without reading.
pub(crate) enum Known {
    /// The version has no such row.
    Absent,
    /// The row.
    Row(Arc<Row>),
    /// It must be read.
    Unknown,
}

/// The last one out takes along what the process keeps for it: whoever opens the copyset next may be another replica, whose
/// rows and files have the same names.
impl Drop for CopysetStore {
    fn drop(&mut self) {
        let (rows, files) = self.state.get_mut().unwrap_or_else(PoisonError::into_inner).counted;
        self.process.dirty_rows.fetch_sub(rows, Ordering::Relaxed);
        self.process.dirty_files.fetch_sub(files, Ordering::Relaxed);
        let own = self.id;
        self.process.with_rows(|cache| cache.retain(|(copyset, _)| *copyset != own));
        self.process.with_files(|cache| cache.retain(|(copyset, _)| *copyset != own));
    }
}

impl CopysetStore {
    pub(crate) fn new(process: Arc<ChunkStore>, id: CopysetId) -> Arc<Self> {
        let (gate, repairing) = (tokio::sync::Mutex::new(()), tokio::sync::Mutex::new(()));
        let state = Mutex::default();
        Arc::new(Self { process, id, state, gate, repairing, flush_failed: AtomicBool::new(false), fault: OnceLock::new() })
    }

    /// The copyset.
    #[must_use]
    pub const fn id(&self) -> CopysetId {
        self.id
    }

    /// The store it is a part of.
    #[must_use]
    pub const fn process(&self) -> &Arc<ChunkStore> {
        &self.process
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the replica must end, if it must. The owner looks at it and ends it.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.fault.get().copied()
    }

    /// Remembers a failure that the replica must not survive; one of the disk or of its metadata store ends the process.
    pub(crate) fn note(&self, error: &ChunkStoreError) {
        let fault = match error.kind() {
            ChunkStoreErrorKind::Corrupt => Fault::Damaged,
            ChunkStoreErrorKind::Disk => {
                self.process.note_failure(error);
                Fault::Disk
            }
            ChunkStoreErrorKind::MetaCorrupt => {
                self.process.note_damage(error);
                Fault::Disk
            }
            // Neither the data nor the disk: it is not rebuilt, and the heartbeat says that a replica stopped.
            ChunkStoreErrorKind::UnknownEntry => {
                tracing::error!(copyset = self.id.0, error = error as &dyn std::error::Error, "a replica stops");
                return;
            }
            ChunkStoreErrorKind::NoSpace | ChunkStoreErrorKind::Busy | ChunkStoreErrorKind::Fetch | ChunkStoreErrorKind::Stopped => return,
        };
        if self.fault.set(fault).is_ok() {
            tracing::error!(copyset = self.id.0, ?fault, error = error as &dyn std::error::Error, "a replica has failed");
        }
    }

    /// What was applied last.
    #[must_use]
    pub fn applied(&self) -> Applied {
        self.state().applied.clone()
    }

    /// Whether the data may be read at all; the caller still needs a read barrier. False until loaded, and after a
    /// crash in the middle of an install until the log has caught up with what was fetched.
    #[must_use]
    pub fn servable(&self) -> bool {
        self.state().servable()
    }

    /// Whether a read is allowed by fence and tombstone.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admit_read(&self, at: &LayerHead) -> Result<(), Refusal> {
        self.state().layers.admit_read(at)
    }

    /// What is known of a layer here.
    #[must_use]
    pub fn layer(&self, layer: LayerId) -> Option<LayerInfo> {
        self.state().layers.get(layer).cloned()
    }

    /// Every chunk version, in order of layer, chunk, seq; for reports and tests.
    #[must_use]
    pub fn versions(&self) -> Vec<VersionKey> {
        self.state().all_versions().map(|(key, _)| key).collect()
    }

    /// Reads the last checkpoint, removes files that it does not know, and returns its position. Called once.
    ///
    /// # Errors
    /// [`ChunkStoreError`] when a record is damaged or the disk fails.
    pub async fn load(self: &Arc<Self>) -> Result<Applied, ChunkStoreError> {
        let store = Arc::clone(self);
        let state = blocking(move || {
            let state = store.read_checkpoint()?;
            store.sweep(&state)?;
            Ok(state)
        })
        .await?;
        let applied = state.applied.clone();
        *self.state() = state;
        Ok(applied)
    }

    fn read_checkpoint(&self) -> Result<State, ChunkStoreError> {
        let meta = &self.process.meta;
        let mut state = State::default();
        let key = copyset_key(self.id, KIND_APPLIED);
        if let Some(record) = meta.get(TABLE_COPYSET, &key)? {
            state.applied = decode_applied(&key, &record)?;
        }
        state.checkpointed = state.applied.clone();
        let key = copyset_key(self.id, KIND_RECOVERY);
        if let Some(record) = meta.get(TABLE_COPYSET, &key)? {
            state.recovery = Recovery::decode(&key, &record)?;
        }
        state.lenient_until = state.recovery.horizon.max(state.recovery.install_high);
        self.scan(TABLE_LAYER, |(key, record)| {
            let id: &[u8; 8] = key.last_chunk().ok_or(ChunkStoreError::Record { what: "layer key" })?;
            state.layers.restore(LayerId(u64::from_be_bytes(*id)), LayerInfo::decode(&key, &record)?);
            Ok(())
        })?;
        self.scan(TABLE_VERSION, |(key, record)| {
            let version = VersionKey::decode(&key).ok_or(ChunkStoreError::Record { what: "version key" })?;
            state.ensure_version(version, VersionRecord::decode(&key, &record)?);
            Ok(())
        })?;
        state.loaded = true;
        Ok(state)
    }

    fn scan(
        &self,
        table: Table,
        mut row: impl FnMut(KeyValue) -> Result<(), ChunkStoreError>,
    ) -> Result<(), ChunkStoreError> {
        let start = self.id.0.to_be_bytes().to_vec();
        let end = ogee_disk::meta::prefix_end(&start);
        let mut from = Bound::Included(start);
        loop {
            let rows = self.process.meta.scan(table, from.as_ref().map(Vec::as_slice), end.as_deref(), SCAN_ROWS)?;
            let Some((last, _)) = rows.last() else { return Ok(()) };
            from = Bound::Excluded(last.clone());
            rows.into_iter().try_for_each(&mut row)?;
        }
    }

    /// Removes files of versions that the checkpoint does not hold: they were removed by it (and the process ended
    /// before the unlink), or created after it, and then replay makes them anew.
    fn sweep(&self, state: &State) -> Result<(), ChunkStoreError> {
        let dir = &self.process.dir;
        let directory = directory(self.id);
        dir.create_dir(&directory)?;
        for name in dir.list(&directory)? {
            match VersionKey::parse_name(&name) {
                Some(key) if state.version(key).is_none() => dir.unlink(&format!("{directory}/{name}"))?,
                Some(_) => {}
                None => tracing::warn!(copyset = self.id.0, name, "foreign file in a copyset's directory"),
            }
        }
        Ok(())
    }

    /// What is known of a row without reading.
    pub(crate) fn known_row(&self, state: &State, loaded: &Loaded, key: RowKey) -> Known {
        let Some(version) = state.version(key.version) else { return Known::Absent };
        if version.record.rows >> key.row & 1 == 0 {
            return Known::Absent;
        }
        if let Some(row) = state.dirty_rows.get(&key) {
            return Known::Row(Arc::clone(row));
        }
        if let Some((stamp, row)) = loaded.get(&key)
            && Some(*stamp) == state.stamp(key.version)
        {
            return Known::Row(Arc::clone(row));
        }
        self.process.with_rows(|rows| rows.get(&(self.id, key))).map_or(Known::Unknown, Known::Row)
    }

    /// Reads rows into the cache and into `loaded`. A row that may have changed meanwhile is left out: what the metadata
    /// store gave may then be older than what is in memory.
    pub(crate) async fn load_rows(
        self: &Arc<Self>,
        wanted: Vec<RowKey>,
        loaded: &mut Loaded,
    ) -> Result<(), ChunkStoreError> {
        let stamps: Vec<(RowKey, RowStamp)> = {
            let state = self.state();
            wanted.into_iter().filter_map(|key| Some((key, state.stamp(key.version)?))).collect()
        };
        let store = Arc::clone(self);
        let rows = blocking(move || {
            stamps.into_iter().map(|(key, stamp)| Ok((key, stamp, store.read_row(key)?))).collect::<Result<Vec<_>, _>>()
        })
        .await
        .inspect_err(|e| self.note(e))?;
        let state = self.state();
        for (key, stamp, row) in rows {
            if state.stamp(key.version) != Some(stamp) || state.dirty_rows.contains_key(&key) {
                continue;
            }
            let missing = || ChunkStoreError::Record { what: "metadata row" };
            let row = Arc::new(row.ok_or_else(missing).inspect_err(|e| self.note(e))?);
            self.process.with_rows(|rows| rows.insert((self.id, key), Arc::clone(&row)));
            loaded.insert(key, (stamp, row));
        }
        Ok(())
    }

    pub(crate) fn read_row(&self, key: RowKey) -> Result<Option<Row>, ChunkStoreError> {
        count(&self.process.counters.row_loads);
        let bytes = key.encode(self.id);
        self.process.meta.get(TABLE_ROW, &bytes)?.map(|record| Row::decode(&bytes, &record)).transpose()
    }

    /// Removes a version from memory; its rows and file go with the next checkpoint.
    pub(crate) fn forget_version(&self, state: &mut State, key: VersionKey) {
        let rows = state.version(key).map_or(0, |v| v.record.rows);
        state.remove_version(key);
        self.process.with_rows(|cache| {
            for row in super::state::rows_of(rows) {
                cache.remove(&(self.id, key.row(row)));
            }
        });
        self.process.with_files(|files| files.remove(&(self.id, key)));
    }

    /// Brings the process's count of dirty rows and files up to date after a change.
    pub(crate) fn recount(&self, state: &mut State) {
        let now = (state.dirty_rows.len(), state.dirty_files.len());
        let before = std::mem::replace(&mut state.counted, now);
        for (counter, now, before) in
            [(&self.process.dirty_rows, now.0, before.0), (&self.process.dirty_files, now.1, before.1)]
        {
            if now >= before {
                counter.fetch_add(now - before, Ordering::Relaxed);
            } else {
                counter.fetch_sub(before - now, Ordering::Relaxed);
            }
        }
    }

    /// Whether the copyset should checkpoint now, because the process holds too much that is dirty and this copyset
    /// has a fair share of it.
    #[must_use]
    pub fn checkpoint_due(&self) -> bool {
        let (rows, files) = self.state().counted;
        let tuning = &self.process.tuning;
        let share = ogee_common::limits::COPYSETS_PER_CHUNKSERVER_MAX as usize;
        let over = |all: usize, own: usize, max: usize| all > max && own > max / share;
        over(self.process.dirty_rows.load(Ordering::Relaxed), rows, tuning.dirty_rows)
            || over(self.process.dirty_files.load(Ordering::Relaxed), files, tuning.dirty_files)
    }

    /// Writes the recovery record durably.
    pub(crate) async fn write_recovery(self: &Arc<Self>, recovery: Recovery) -> Result<(), ChunkStoreError> {
        let mut batch = Batch::new();
        let key = copyset_key(self.id, KIND_RECOVERY);
        batch.put(TABLE_COPYSET, &key, &recovery.encode(&key));
        self.write_batch(batch).await?;
        self.state().recovery = recovery;
        Ok(())
    }

    /// Writes a batch durably on the blocking pool, waiting for space if need be.
    pub(crate) async fn write_batch(self: &Arc<Self>, batch: Batch) -> Result<(), ChunkStoreError> {
        let mut pauses = 0;
        loop {
            let (store, batch) = (Arc::clone(self), batch.clone());
            match blocking(move || Ok(store.process.meta.write(batch, Durability::Synced)?)).await {
                Err(e) if e.kind() == ChunkStoreErrorKind::NoSpace => self.pause_for_space(&mut pauses, &e).await,
                other => return other,
            }
        }
    }

    /// Key of a layer's record.
    pub(crate) fn layer_key(&self, layer: LayerId) -> Vec<u8> {
        layer_key(self.id, layer)
    }
}
