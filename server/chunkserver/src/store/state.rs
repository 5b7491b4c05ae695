//! [`State`]: what a copyset keeps in memory of its chunks. Changed only by the one task that applies, and by repairs of
//! damaged pages under the gate; read by many.
//!
//! Invariants: the versions of a chunk are sorted by seq and unique; a row that differs from the metadata store is in
//! `dirty_rows`, and its version in `dirty_versions`; a file that was written since the last checkpoint is in
//! `dirty_files`, which keeps it open so that a write-back error cannot be missed; what a checkpoint must delete is in
//! `removed`. A row is unchanged between two moments when it is dirty at neither and its [`RowStamp`] is the same at both.

use super::key::{ChunkKey, RowKey, VersionKey};
use super::layers::LayerTable;
use super::lookup::View;
use super::record::{Recovery, VersionRecord};
use super::row::Row;
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_common::limits::{FOUND_ROWS_MAX, MEND_ROWS};
use ogee_disk::DataFile;
use ogee_raft::api::Applied;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

/// A chunk version in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Version {
    pub(crate) seq: VolumeSeq,
    pub(crate) record: VersionRecord,
    /// When it appeared in this process; tells a version from a later one of the same name.
    pub(crate) born: u64,
}

/// Tells whether a row that is not dirty may have been dirty in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowStamp {
    born: u64,
    cleaned: u64,
}

/// A data file with writes that are not flushed.
#[derive(Debug)]
pub(crate) struct DirtyFile {
    pub(crate) file: Arc<DataFile>,
    /// Its name is not durable yet.
    pub(crate) created: bool,
    /// Bytes written since write-back was last started.
    pub(crate) unsubmitted: u64,
}

/// What a copyset keeps in memory.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) loaded: bool,
    /// A Raft snapshot is being installed: nothing is repaired meanwhile.
    pub(crate) installing: bool,
    /// Rows with pages that were found damaged and are to be mended, at most [`FOUND_ROWS_MAX`].
    found: BTreeSet<RowKey>,
    /// The last of them that was taken, so that rows which cannot be mended do not keep the others waiting.
    taken: Option<RowKey>,
    pub(crate) applied: Applied,
    /// The position in the metadata store.
    pub(crate) checkpointed: Applied,
    pub(crate) recovery: Recovery,
    /// Entries up to this index may have been applied by an earlier process.
    pub(crate) lenient_until: u64,
    pub(crate) layers: LayerTable,
    chunks: BTreeMap<ChunkKey, SmallVec<[Version; 1]>>,
    pub(crate) dirty_rows: HashMap<RowKey, Arc<Row>>,
    pub(crate) dirty_versions: BTreeSet<VersionKey>,
    pub(crate) dirty_files: HashMap<VersionKey, DirtyFile>,
    /// Versions to delete at the next checkpoint, with the rows they had.
    pub(crate) removed: BTreeMap<VersionKey, u16>,
    /// Bytes written since write-back was last started.
    pub(crate) unsubmitted: u64,
    clock: u64,
    /// Raised whenever dirty rows become clean or clean rows are replaced.
    pub(crate) cleaned: u64,
    /// What was last added to the counts of the process: rows, files.
    pub(crate) counted: (usize, usize),
}

impl State {
    pub(crate) fn versions(&self, at: ChunkKey) -> &[Version] {
        self.chunks.get(&at).map_or(&[], |v| v.as_slice())
    }

    pub(crate) fn version(&self, key: VersionKey) -> Option<&Version> {
        let versions = self.versions(key.at);
        versions.binary_search_by_key(&key.seq, |v| v.seq).ok().map(|i| &versions[i])
    }

    fn version_mut(&mut self, key: VersionKey) -> Option<&mut Version> {
        let versions = self.chunks.get_mut(&key.at)?;
        let i = versions.binary_search_by_key(&key.seq, |v| v.seq).ok()?;
        Some(&mut versions[i])
    }

    /// The stamp of a version's rows; `None` when there is no such version.
    pub(crate) fn stamp(&self, key: VersionKey) -> Option<RowStamp> {
        Some(RowStamp { born: self.version(key)?.born, cleaned: self.cleaned })
    }

    /// Adds a version if it is missing.
    pub(crate) fn ensure_version(&mut self, key: VersionKey, record: VersionRecord) {
        self.clock += 1;
        let born = self.clock;
        let versions = self.chunks.entry(key.at).or_default();
        if let Err(i) = versions.binary_search_by_key(&key.seq, |v| v.seq) {
            versions.insert(i, Version { seq: key.seq, record, born });
        }
    }

    /// Forgets a version; the next checkpoint deletes it.
    pub(crate) fn remove_version(&mut self, key: VersionKey) {
        let Some(versions) = self.chunks.get_mut(&key.at) else { return };
        let Ok(i) = versions.binary_search_by_key(&key.seq, |v| v.seq) else { return };
        let version = versions.remove(i);
        if versions.is_empty() {
            self.chunks.remove(&key.at);
        }
        for row in rows_of(version.record.rows) {
            self.dirty_rows.remove(&key.row(row));
        }
        self.dirty_versions.remove(&key);
        self.dirty_files.remove(&key);
        *self.removed.entry(key).or_default() |= version.record.rows;
    }

    /// Replaces the summary of a version that a fetch brought, without marking it dirty.
    pub(crate) fn set_record(&mut self, key: VersionKey, record: VersionRecord) {
        self.ensure_version(key, record);
        if let Some(version) = self.version_mut(key) {
            version.record = record;
        }
    }

    /// A row for change by the entry at `index`: the dirty one, or `clean` made dirty.
    pub(crate) fn row_mut(&mut self, key: RowKey, index: u64, clean: impl FnOnce() -> Arc<Row>) -> &mut Row {
        self.dirty_versions.insert(key.version);
        if let Some(version) = self.version_mut(key.version) {
            version.record.rows |= 1 << key.row;
            version.record.last_index = version.record.last_index.max(index);
        }
        let row = Arc::make_mut(self.dirty_rows.entry(key).or_insert_with(clean));
        row.changed_by(index);
        row
    }

    /// Chunks of a layer, in order.
    pub(crate) fn chunks_of(&self, layer: LayerId) -> Vec<ChunkKey> {
        let from = ChunkKey { layer, chunk: ChunkIndex(0) };
        self.chunks.range(from..).map(|(at, _)| *at).take_while(|at| at.layer == layer).collect()
    }

    /// Every version, in order of layer, chunk, seq.
    pub(crate) fn all_versions(&self) -> impl Iterator<Item = (VersionKey, &Version)> {
        self.chunks.iter().flat_map(|(at, versions)| versions.iter().map(|v| (VersionKey { at: *at, seq: v.seq }, v)))
    }

    /// The first `limit` rows behind `after`, in order of layer, chunk, seq, row.
    pub(crate) fn rows_after(&self, after: Option<RowKey>, limit: usize) -> Vec<RowKey> {
        let from = after.map_or(ChunkKey { layer: LayerId(0), chunk: ChunkIndex(0) }, |key| key.version.at);
        let versions = self.chunks.range(from..).flat_map(|(at, all)| all.iter().map(|v| (*at, v)));
        let rows = versions.flat_map(|(at, v)| {
            let version = VersionKey { at, seq: v.seq };
            rows_of(v.record.rows).map(move |row| version.row(row))
        });
        rows.filter(|key| after.is_none_or(|after| *key > after)).take(limit).collect()
    }

    /// How many rows of such layers there are.
    pub(crate) fn row_count(&self, meant: impl Fn(LayerId) -> bool) -> u64 {
        self.all_versions().filter(|(key, _)| meant(key.at.layer)).map(|(_, v)| u64::from(v.record.rows.count_ones())).sum()
    }

    /// Versions to look through for a view, in order.
    pub(crate) fn sources(&self, view: &View) -> SmallVec<[VersionKey; 8]> {
        if let View::Version(key) = view {
            return SmallVec::from_slice(&[*key]);
        }
        let (chunk, levels) = view.levels();
        let mut out = SmallVec::new();
        for (layer, seq) in levels {
            let at = ChunkKey { layer, chunk };
            let versions = self.versions(at);
            let visible = versions.partition_point(|v| v.seq <= seq);
            out.extend(versions[..visible].iter().rev().map(|v| VersionKey { at, seq: v.seq }));
        }
        out
    }

    /// Notes that a page of this row is damaged.
    pub(crate) fn find(&mut self, key: RowKey) {
        if self.found.len() < FOUND_ROWS_MAX {
            self.found.insert(key);
        }
    }

    /// Whether damage was noted that nobody took.
    pub(crate) fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// The next rows with damage, at most [`MEND_ROWS`], which are then forgotten; after the last comes the first.
    pub(crate) fn take_found(&mut self) -> Vec<RowKey> {
        let behind = self.taken.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rows: Vec<RowKey> = self.found.range((behind, Bound::Unbounded)).take(MEND_ROWS).copied().collect();
        if rows.is_empty() {
            rows = self.found.iter().take(MEND_ROWS).copied().collect();
        }
        self.found.retain(|key| !rows.contains(key));
        self.taken = rows.last().copied();
        rows
    }

    /// Index of the last entry applied; 0 for none.
    pub(crate) fn applied_index(&self) -> u64 {
        self.applied.pos.map_or(0, |p| p.index)
    }

    /// Whether reads may be answered: loaded, and no half-fetched state ahead of the log.
    pub(crate) fn servable(&self) -> bool {
        self.loaded && (!self.recovery.installing || self.applied_index() >= self.recovery.install_high)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.applied != self.checkpointed
            || !self.removed.is_empty()
            || !self.dirty_files.is_empty()
            || !self.dirty_versions.is_empty()
            || !self.layers.dirty().is_empty()
    }
}

/// Numbers of the rows in a mask.
pub(crate) fn rows_of(mask: u16) -> impl Iterator<Item = u8> {
    (0..16u8).filter(move |r| mask >> r & 1 == 1)
}
