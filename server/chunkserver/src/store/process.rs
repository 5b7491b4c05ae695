//! [`ChunkStore`]: what all copysets of one chunkserver process share: the data directory, the metadata store, the
//! caches of clean rows and open files, the count of what is dirty, and the watch over free space.
//!
//! Invariants: the caches hold only what can be had again from disk; their sizes never exceed the tuning. A copyset's
//! rows and files are reached only through its [`CopysetStore`].

use super::cache::ClockCache;
use super::copyset_store::CopysetStore;
use super::error::ChunkStoreError;
use super::key::{RowKey, TABLE_COPYSET, TABLE_LAYER, TABLE_ROW, TABLE_VERSION, VersionKey, directory};
use super::pace::Pace;
use super::row::Row;
use ogee_common::id::CopysetId;
use ogee_common::limits;
use ogee_disk::{Batch, DataDir, DataFile, Durability, MetaStore};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Sizes that a chunkserver may be given; the default is [`ogee_common::limits`]. Tests make them small.
#[derive(Debug, Clone)]
pub struct StoreTuning {
    /// Clean metadata rows kept in memory.
    pub row_cache_rows: usize,
    /// Clean data files kept open.
    pub open_files: usize,
    /// Dirty metadata rows in all, above which a copyset checkpoints by itself.
    pub dirty_rows: usize,
    /// Dirty data files in all, above which a copyset checkpoints by itself.
    pub dirty_files: usize,
    /// Bytes written between two starts of write-back of a copyset.
    pub writeback_bytes: u64,
    /// Free bytes below which nothing new is allocated.
    pub space_reserve_bytes: u64,
    /// Entries by which the recovery horizon runs ahead.
    pub horizon_entries: u64,
    /// Pause before a committed entry that met a full disk is tried again.
    pub no_space_pause: Duration,
    /// Bytes per second that all installs together fetch from other replicas; 0: no limit.
    pub install_bytes_per_second: u64,
}

impl Default for StoreTuning {
    fn default() -> Self {
        Self {
            row_cache_rows: limits::ROW_CACHE_ROWS,
            open_files: limits::OPEN_DATA_FILES_MAX,
            dirty_rows: limits::DIRTY_ROWS_MAX,
            dirty_files: limits::DIRTY_FILES_MAX,
            writeback_bytes: limits::WRITEBACK_BYTES,
            space_reserve_bytes: limits::SPACE_RESERVE_BYTES,
            horizon_entries: limits::HORIZON_ENTRIES,
            no_space_pause: limits::NO_SPACE_PAUSE,
            install_bytes_per_second: limits::INSTALL_BYTES_PER_SECOND,
        }
    }
}

/// What has happened since the process started.
#[derive(Debug, Default)]
pub struct StoreCounters {
    /// Pages that failed their checksum when read.
    pub corrupt_pages: AtomicU64,
    /// Damaged pages mended from another replica.
    pub repaired_pages: AtomicU64,
    /// Partial writes below the recovery horizon onto pages that failed their checksum, taken for newer than the
    /// checkpoint.
    pub unverified_pages: AtomicU64,
    /// Pauses because a committed entry met a full disk.
    pub no_space_pauses: AtomicU64,
    /// Checkpoints that wrote something.
    pub checkpoints: AtomicU64,
    /// Rows read from the metadata store.
    pub row_loads: AtomicU64,
    /// Pages that were copied from ancestors into their own layer.
    pub flattened_pages: AtomicU64,
    /// Pages that were pasted from backups.
    pub pasted_pages: AtomicU64,
    /// Pages that a scrub has read and verified.
    pub scrubbed_pages: AtomicU64,
    /// Bad pages that a scrub found.
    pub scrub_bad_pages: AtomicU64,
    /// Of these, those that it mended.
    pub scrub_mended_pages: AtomicU64,
}

/// Whether new data may be allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaceState {
    /// Yes.
    Roomy,
    /// Only what needs no new block: overwrites, zeros, reads, deletes.
    Full,
}

/// The chunk store of a process.
pub struct ChunkStore {
    pub(crate) dir: DataDir,
    pub(crate) meta: Arc<dyn MetaStore>,
    pub(crate) tuning: StoreTuning,
    rows: Mutex<ClockCache<(CopysetId, RowKey), Arc<Row>>>,
    files: Mutex<ClockCache<(CopysetId, VersionKey), Arc<DataFile>>>,
    pub(crate) dirty_rows: AtomicUsize,
    pub(crate) dirty_files: AtomicUsize,
    full: AtomicBool,
    /// Of what installs fetch.
    pub(crate) pace: Pace,
    /// Set once the metadata store itself was found damaged.
    damage: watch::Sender<Option<Arc<str>>>,
    /// Set once the disk has failed an operation that it may not fail.
    failure: watch::Sender<Option<Arc<str>>>,
    /// What has happened.
    pub counters: StoreCounters,
}

impl std::fmt::Debug for ChunkStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkStore").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl ChunkStore {
    /// A store in a directory. Reads nothing yet; each copyset is read by [`CopysetStore::load`].
    #[must_use]
    pub fn new(dir: DataDir, meta: Arc<dyn MetaStore>, tuning: StoreTuning) -> Arc<Self> {
        let rows = Mutex::new(ClockCache::new(tuning.row_cache_rows));
        let files = Mutex::new(ClockCache::new(tuning.open_files));
        let pace = Pace::new(tuning.install_bytes_per_second);
        Arc::new(Self {
            dir,
            meta,
            tuning,
            rows,
            files,
            dirty_rows: AtomicUsize::new(0),
            dirty_files: AtomicUsize::new(0),
            full: AtomicBool::new(false),
            pace,
            damage: watch::Sender::new(None),
            failure: watch::Sender::new(None),
            counters: StoreCounters::default(),
        })
    }

    /// The copyset's part of the store. At most one may live at a time per copyset.
    #[must_use]
    pub fn copyset(self: &Arc<Self>, copyset: CopysetId) -> Arc<CopysetStore> {
        CopysetStore::new(Arc::clone(self), copyset)
    }

    /// Deletes everything of a copyset whose replica was removed from this chunkserver: first the rows, durably, then
    /// the files. Blocks for several flushes. May be called again after a crash.
    ///
    /// # Errors
    /// [`ChunkStoreError::Disk`], [`ChunkStoreError::Meta`].
    pub fn remove_copyset(&self, copyset: CopysetId) -> Result<(), ChunkStoreError> {
        let prefix = copyset.0.to_be_bytes();
        let mut batch = Batch::new();
        for table in [TABLE_COPYSET, TABLE_LAYER, TABLE_VERSION, TABLE_ROW] {
            batch.delete_prefix(table, &prefix);
        }
        self.meta.write(batch, Durability::Synced)?;
        let directory = directory(copyset);
        if !self.dir.path(&directory).is_dir() {
            return Ok(());
        }
        for name in self.dir.list(&directory)? {
            self.dir.unlink(&format!("{directory}/{name}"))?;
        }
        Ok(())
    }

    /// Becomes `Some`, with what was found, when the metadata store is damaged: the whole disk must end (its owner does).
    #[must_use]
    pub fn damage(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.damage.subscribe()
    }

    /// Becomes `Some`, with what it failed at, when the disk has failed: the process must end (its owner does).
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.failure.subscribe()
    }

    /// Says that the metadata store is damaged. The first finding counts.
    pub(crate) fn note_damage(&self, error: &ChunkStoreError) {
        note_first(&self.damage, error);
    }

    /// Says that the disk has failed. The first failure counts.
    pub(crate) fn note_failure(&self, error: &ChunkStoreError) {
        note_first(&self.failure, error);
    }

    /// Looks at the free space of the file system and decides whether new data may be allocated, with a quarter of the
    /// reserve as hysteresis. Call it every second or so; costs one system call.
    ///
    /// # Errors
    /// [`ChunkStoreError::Disk`].
    pub fn refresh_space(&self) -> Result<SpaceState, ChunkStoreError> {
        let free = self.dir.usage()?.free_bytes;
        let reserve = self.tuning.space_reserve_bytes;
        let threshold = if self.full.load(Ordering::Relaxed) { reserve.saturating_add(reserve / 4) } else { reserve };
        self.full.store(free < threshold, Ordering::Relaxed);
        Ok(self.space_state())
    }

    /// What [`ChunkStore::refresh_space`] last found.
    #[must_use]
    pub fn space_state(&self) -> SpaceState {
        if self.full.load(Ordering::Relaxed) { SpaceState::Full } else { SpaceState::Roomy }
    }

    /// Clean rows in memory.
    #[must_use]
    pub fn cached_rows(&self) -> usize {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Clean files open.
    #[must_use]
    pub fn cached_files(&self) -> usize {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) fn with_rows<T>(&self, f: impl FnOnce(&mut ClockCache<(CopysetId, RowKey), Arc<Row>>) -> T) -> T {
        f(&mut self.rows.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn with_files<T>(
        &self,
        f: impl FnOnce(&mut ClockCache<(CopysetId, VersionKey), Arc<DataFile>>) -> T,
    ) -> T {
        f(&mut self.files.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn note_first(place: &watch::Sender<Option<Arc<str>>>, error: &ChunkStoreError) {
    place.send_if_modified(|known| {
        let first = known.is_none();
        if first {
            let chain = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
            *known = Some(chain.map(ToString::to_string).collect::<Vec<_>>().join(": ").into());
        }
        first
    });
}

/// Adds one to a counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
