//! [`RocksStore`]: the metadata store on RocksDB; the only file that names it.
//!
//! All tables share one column family; the table number is the first byte of the key, so that batches over tables share one log
//! and memory has one bound. Invariants: RocksDB's own log is written for every batch and its recovery tolerates a torn
//! tail only, so a crash keeps a prefix of the batches and damage elsewhere is an error, not a loss. Memory is bounded
//! by the constants below. Deliberately absent: tuning for throughput; checkpoints write about 1 KiB per MiB of data.

use crate::error::DiskErrorKind;
use crate::fault::{self, DiskOp, Faults};
use super::{Batch, Change, Durability, KeyValue, MetaStore, RowSink, StoreError, StoreErrorKind, Table};
use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, DBRecoveryMode, Direction, ErrorKind, IteratorMode, Options,
    ReadOptions, WriteBatch, WriteOptions,
};
use std::ops::Bound;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks of table files kept in memory, bytes (32 MiB).
const BLOCK_CACHE_BYTES: usize = 32 << 20;
/// One write buffer, bytes (16 MiB); two exist while one is flushed.
const WRITE_BUFFER_BYTES: usize = 16 << 20;
/// RocksDB's own log is cut at this size, bytes (64 MiB), which bounds the time of recovery.
const LOG_BYTES_MAX: u64 = 64 << 20;
/// Open table files.
const OPEN_FILES_MAX: i32 = 256;

/// What was asked of a store since it was opened. The counters only grow.
#[derive(Debug, Default)]
pub struct MetaCounters {
    /// Batches applied.
    pub batches: AtomicU64,
    /// Bytes of their changes; RocksDB writes them to its log and later to its tables.
    pub batch_bytes: AtomicU64,
    /// Batches and calls that waited until they were durable.
    pub syncs: AtomicU64,
}

/// The metadata store on RocksDB.
pub struct RocksStore {
    db: DB,
    counters: MetaCounters,
    faults: Faults,
}

impl std::fmt::Debug for RocksStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksStore").field("path", &self.db.path()).finish()
    }
}

impl RocksStore {
    /// Opens a store, creating it if missing, and recovers it.
    ///
    /// # Errors
    /// `Locked` when another process has it open; `Corrupt`, `NoSpace`, `Io`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let db = DB::open(&options(), path).map_err(|e| error("open", e))?;
        Ok(Self { db, counters: MetaCounters::default(), faults: crate::simulated::faults() })
    }

    /// Asks the plan of failures, for tests.
    fn check(&self, op: DiskOp, what: &'static str) -> Result<(), StoreError> {
        fault::check(&self.faults, op, what, self.db.path()).map_err(|e| {
            let kind = if e.kind() == DiskErrorKind::NoSpace { StoreErrorKind::NoSpace } else { StoreErrorKind::Io };
            StoreError::new(kind, what, Box::new(e))
        })
    }
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    table.set_cache_index_and_filter_blocks(true);
    table.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(LOG_BYTES_MAX);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_paranoid_checks(true);
    // A log that the list of files knows to be complete must be there, and whole.
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options
}

fn error(op: &'static str, e: rocksdb::Error) -> StoreError {
    let text = e.to_string();
    let kind = match e.kind() {
        ErrorKind::Corruption => StoreErrorKind::Corrupt,
        _ if text.contains("No space left") => StoreErrorKind::NoSpace,
        ErrorKind::IOError if text.contains("lock") => StoreErrorKind::Locked,
        _ => StoreErrorKind::Io,
    };
    StoreError::new(kind, op, Box::new(e))
}

fn read_options(to: Option<Vec<u8>>) -> ReadOptions {
    let mut read = ReadOptions::default();
    if let Some(to) = to {
        read.set_iterate_upper_bound(to);
    }
    read
}

impl MetaStore for RocksStore {
    fn counters(&self) -> Option<&MetaCounters> {
        Some(&self.counters)
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get(table.key(key)).map_err(|e| error("get", e))
    }

    fn scan(&self, table: Table, from: Bound<&[u8]>, to: Option<&[u8]>, limit: usize) -> Result<Vec<KeyValue>, StoreError> {
        let mut start = table.key(match from {
            Bound::Included(k) | Bound::Excluded(k) => k,
            Bound::Unbounded => &[],
        });
        if matches!(from, Bound::Excluded(_)) {
            // The next possible key in byte order.
            start.push(0);
        }
        let to = to.map_or_else(|| table.end(), |to| Some(table.key(to)));
        if to.as_ref().is_some_and(|to| *to <= start) {
            return Ok(vec![]);
        }
        let mode = IteratorMode::From(&start, Direction::Forward);
        let mut rows = vec![];
        for row in self.db.iterator_opt(mode, read_options(to)).take(limit) {
            let (key, value) = row.map_err(|e| error("scan", e))?;
            rows.push((key[1..].to_vec(), value.into_vec()));
        }
        Ok(rows)
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        let mut out = WriteBatch::default();
        for change in batch.changes {
            match change {
                Change::Put(key, value) => out.put(key, value),
                Change::Delete(key) => out.delete(key),
                // Keys start with a table number; none has more than 255 bytes of 0xff behind it.
                Change::DeleteRange(from, to) => {
                    let to = to.unwrap_or_else(|| vec![0xff; 256]);
                    if from < to {
                        out.delete_range(from, to);
                    }
                }
            }
        }
        let bytes = out.size_in_bytes() as u64;
        let mut write = WriteOptions::default();
        let is_synced = durability == Durability::Synced;
        self.check(if is_synced { DiskOp::Sync } else { DiskOp::Write }, "write")?;
        write.set_sync(is_synced);
        self.db.write_opt(out, &write).map_err(|e| error("write", e))?;
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        self.counters.batch_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.counters.syncs.fetch_add(u64::from(is_synced), Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.check(DiskOp::Sync, "sync")?;
        self.db.flush_wal(true).map_err(|e| error("sync", e))?;
        self.counters.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn dump(&self, tables: &[Table], row: &mut RowSink<'_>) -> Result<(), StoreError> {
        let moment = self.db.snapshot();
        let mut tables = tables.to_vec();
        tables.sort_unstable();
        for table in tables {
            let start = table.key(&[]);
            let mode = IteratorMode::From(&start, Direction::Forward);
            for item in moment.iterator_opt(mode, read_options(table.end())) {
                let (key, value) = item.map_err(|e| error("dump", e))?;
                if !row(table.number, &key[1..], &value) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
