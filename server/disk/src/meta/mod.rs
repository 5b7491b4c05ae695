//! The metadata-store seam: an ordered map of bytes with atomic batches. Used by the MDS and for chunk checkpoints.
//!
//! Two implementations agree by a property test: [`RocksStore`], the only place that names RocksDB, and [`MemStore`],
//! which can simulate a power cut. Invariants: a [`Batch`] is applied whole or not at all, also by a crash; batches
//! become durable in the order they were written, so a crash keeps a prefix of them; what was written with
//! [`Durability::Synced`], or before a [`MetaStore::sync`], survives. Deliberately absent: transactions that read.

mod mem;
mod rocks;
#[cfg(test)]
mod tests;

pub use mem::MemStore;
pub use rocks::{MetaCounters, RocksStore};

use std::error::Error;
use std::ops::Bound;

/// A key space of its own. The number is part of every key on disk and is never reused for another meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// First byte of every key.
    pub number: u8,
    /// For people.
    pub name: &'static str,
}

impl Table {
    /// A table; meant for constants.
    #[must_use]
    pub const fn new(number: u8, name: &'static str) -> Self {
        Self { number, name }
    }

    fn key(self, key: &[u8]) -> Vec<u8> {
        let mut full = Vec::with_capacity(key.len() + 1);
        full.push(self.number);
        full.extend_from_slice(key);
        full
    }

    /// The first key behind the table, `None` when it is the last possible one.
    fn end(self) -> Option<Vec<u8>> {
        self.number.checked_add(1).map(|n| vec![n])
    }
}

/// One row of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// [`Table::number`].
    pub table: u8,
    /// The key, without the table.
    pub key: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Change {
    Put(Vec<u8>, Vec<u8>),
    Delete(Vec<u8>),
    /// From inclusive, to exclusive; `None` is the end of the key space.
    DeleteRange(Vec<u8>, Option<Vec<u8>>),
}

/// Changes that are applied together, in order.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    changes: Vec<Change>,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub const fn new() -> Self {
        Self { changes: vec![] }
    }

    /// Sets a key.
    pub fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.changes.push(Change::Put(table.key(key), value.to_vec()));
    }

    /// Removes a key; a missing one is no error.
    pub fn delete(&mut self, table: Table, key: &[u8]) {
        self.changes.push(Change::Delete(table.key(key)));
    }

    /// Removes every key from `from` up to, not including, `to`; `None` is the end of the table.
    pub fn delete_range(&mut self, table: Table, from: &[u8], to: Option<&[u8]>) {
        let to = to.map_or_else(|| table.end(), |to| Some(table.key(to)));
        self.changes.push(Change::DeleteRange(table.key(from), to));
    }

    /// Removes every key that starts with `prefix`.
    pub fn delete_prefix(&mut self, table: Table, prefix: &[u8]) {
        self.delete_range(table, prefix, prefix_end(prefix).as_deref());
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Number of changes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.changes.len()
    }
}

/// The first key that is greater than all that start with `prefix`; `None` when there is none.
#[must_use]
pub fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return Some(end);
        }
    }
    None
}

/// When a batch must be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Before the call returns. Costs a flush.
    Synced,
    /// Some time later, at the latest with the next synced batch or [`MetaStore::sync`].
    Deferred,
}

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// The disk is full; nothing of the batch was applied.
    NoSpace,
    /// The store found damage in its files.
    Corrupt,
    /// Another process has it open.
    Locked,
    /// The device or the store failed; what is durable is unknown and the owner stops.
    Io,
}

/// A failed operation of a metadata store. `Display` says the operation; the source says why.
#[derive(Debug, thiserror::Error)]
#[error("{op} in metadata store: {kind:?}")]
pub struct StoreError {
    kind: StoreErrorKind,
    op: &'static str,
    #[source]
    source: Box<dyn Error + Send + Sync>,
}

impl StoreError {
    /// Wraps an error of the implementation.
    #[must_use]
    pub fn new(kind: StoreErrorKind, op: &'static str, source: Box<dyn Error + Send + Sync>) -> Self {
        Self { kind, op, source }
    }

    /// What a caller can act on.
    #[must_use]
    pub const fn kind(&self) -> StoreErrorKind {
        self.kind
    }
}

/// Takes a row of a dump: table number, key, value; `false` stops the dump.
pub type RowSink<'a> = dyn FnMut(u8, &[u8], &[u8]) -> bool + 'a;

/// One key and its value.
pub type KeyValue = (Vec<u8>, Vec<u8>);

/// An ordered map of bytes, by table. Every function blocks its thread: reads for a cache miss, writes for the log of
/// the store, [`Durability::Synced`] for a flush.
pub trait MetaStore: Send + Sync + 'static {
    /// The value of a key.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Up to `limit` rows from `from` inclusive to `to`, in order. To go on, call again with `Bound::Excluded` of the
    /// last key.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    fn scan(&self, table: Table, from: Bound<&[u8]>, to: Option<&[u8]>, limit: usize) -> Result<Vec<KeyValue>, StoreError>;

    /// Up to `limit` rows whose key starts with `prefix`, in order.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    fn scan_prefix(&self, table: Table, prefix: &[u8], limit: usize) -> Result<Vec<KeyValue>, StoreError> {
        self.scan(table, Bound::Included(prefix), prefix_end(prefix).as_deref(), limit)
    }

    /// Applies a batch.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Corrupt`.
    fn write(&self, batch: Batch, durability: Durability) -> Result<(), StoreError>;

    /// What was asked of it, for metrics, if it counts.
    fn counters(&self) -> Option<&MetaCounters> {
        None
    }

    /// Makes every earlier batch durable.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    fn sync(&self) -> Result<(), StoreError>;

    /// Gives every row of the tables, in order of table and key, as they were at one moment; batches written
    /// meanwhile do not show. Stops at the first `false`.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    fn dump(&self, tables: &[Table], row: &mut RowSink<'_>) -> Result<(), StoreError>;

    /// Replaces the whole content of the tables by `rows` in one durable batch; rows of other tables are refused by a
    /// panic, because the caller has filtered them.
    ///
    /// # Errors
    /// `NoSpace`, `Io`. The old content is then still there.
    fn replace_all(&self, tables: &[Table], rows: Vec<Row>) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        for table in tables {
            batch.delete_range(*table, &[], None);
        }
        for row in rows {
            let table = tables.iter().find(|t| t.number == row.table).expect("rows belong to the replaced tables");
            batch.put(*table, &row.key, &row.value);
        }
        self.write(batch, Durability::Synced)
    }
}
