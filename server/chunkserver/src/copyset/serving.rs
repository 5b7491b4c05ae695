//! The side that answers a replica which installs a Raft snapshot of ours.
//!
//! It works while entries are applied. Invariants: an answer never holds a page whose bytes do not match its checksum
//! (such a page is told as damaged, or the request is refused while files may be newer than rows); an answer tells the
//! index that was applied *after* it was gathered: nothing in it is newer.

use super::fetch::{Column, FetchRequest, FetchedRow, ListAnswer, RowsAnswer, encode_manifest};
use crate::store::CopysetStore;
use crate::store::copyset_store::Known;
use crate::store::error::ChunkStoreError;
use crate::store::key::{VersionKey, first_page};
use crate::store::lookup::{PageSource, View};
use crate::store::row::Row;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use ogee_common::checksum::PAGE;
use ogee_common::id::ChunkIndex;
use ogee_common::limits::{FETCH_BYTES_MAX, PAGES_PER_ROW, ROWS_PER_CHUNK};
use ogee_raft::api::{FetchHandler, MANIFEST_BYTES_MAX, RaftSnapshot, StateMachineError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes that one row may add to an answer.
const ROW_ANSWER_BYTES_MAX: usize = PAGES_PER_ROW as usize * (PAGE + 4) + 128;

/// Answers other replicas for a copyset's store.
#[derive(Debug)]
pub struct CopysetFetch {
    store: Arc<CopysetStore>,
}

impl CopysetFetch {
    /// Answers for a store.
    #[must_use]
    pub const fn new(store: Arc<CopysetStore>) -> Self {
        Self { store }
    }
}

impl FetchHandler for CopysetFetch {
    fn fetch(&self, request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>> {
        Box::pin(async move {
            let answer = self.store.serve_fetch(&request).await;
            answer.map_err(|e| StateMachineError { verb: "answer a fetch", source: Box::new(e) })
        })
    }
}

impl CopysetStore {
    /// The state as of the last checkpoint, as a Raft snapshot.
    ///
    /// # Errors
    /// [`ChunkStoreError::Record`] when there are more layers than a manifest holds.
    pub(crate) fn raft_snapshot(&self) -> Result<RaftSnapshot, ChunkStoreError> {
        let state = self.state();
        let manifest = encode_manifest(&state.layers);
        if manifest.len() > MANIFEST_BYTES_MAX {
            return Err(ChunkStoreError::Record { what: "manifest (too many layers)" });
        }
        Ok(RaftSnapshot { applied: state.checkpointed.clone(), manifest })
    }

    /// The log has been applied up to everything that was ever committed before this process started: say so after
    /// a successful read barrier. It ends the leniency of the recovery horizon. Costs a lock and a comparison.
    pub fn caught_up(&self) {
        let mut state = self.state();
        state.lenient_until = state.lenient_until.min(state.applied_index());
    }

    /// Answers a request of a replica that installs a Raft snapshot of ours. May be called while entries are applied.
    ///
    /// # Errors
    /// [`ChunkStoreError::Fetch`] for a malformed request; [`ChunkStoreError::Busy`] while this replica is itself not in
    /// order; otherwise the disk failed.
    pub async fn serve_fetch(self: &Arc<Self>, request: &[u8]) -> Result<Bytes, ChunkStoreError> {
        let request = FetchRequest::decode(request)?;
        if !self.servable() {
            return Err(ChunkStoreError::Busy);
        }
        match request {
            FetchRequest::List { from, to } => Ok(self.list(from, to).encode()),
            FetchRequest::Rows { version, from_index, from_row } => {
                Ok(self.rows_since(version, from_index, from_row).await?.encode())
            }
            FetchRequest::Row { version, row } => Ok(self.row_now(version, row).await?.encode()),
            FetchRequest::Digests { after, to } => Ok(self.digests(after, to).await?.encode()),
        }
    }

    fn list(&self, from: ChunkIndex, to: ChunkIndex) -> ListAnswer {
        let state = self.state();
        let mut columns: BTreeMap<ChunkIndex, Column> = BTreeMap::new();
        for (key, version) in state.all_versions().filter(|(key, _)| (from..=to).contains(&key.at.chunk)) {
            columns.entry(key.at.chunk).or_default().versions.push((key, version.record.last_index));
        }
        let mut next = None;
        let mut bytes = 0;
        for (chunk, column) in &columns {
            bytes += 8 + column.versions.len() * 24;
            // The first column always travels; it is far below the limit of a frame.
            if bytes > FETCH_BYTES_MAX && Some(chunk) != columns.keys().next() {
                next = Some(*chunk);
                break;
            }
        }
        if let Some(next) = next {
            columns.split_off(&next);
        }
        ListAnswer { applied: state.applied_index(), next, columns }
    }

    async fn rows_since(
        self: &Arc<Self>,
        version: VersionKey,
        from_index: u64,
        from_row: u8,
    ) -> Result<RowsAnswer, ChunkStoreError> {
        let last = u8::try_from(ROWS_PER_CHUNK).expect("a chunk has few rows");
        let mut answer = RowsAnswer { next_row: last, ..RowsAnswer::default() };
        let mut bytes = 0;
        for row in from_row..last {
            if bytes + ROW_ANSWER_BYTES_MAX > FETCH_BYTES_MAX {
                answer.next_row = row;
                break;
            }
            if let Some(fetched) = self.fetched_row(version, row, from_index).await? {
                bytes += ROW_ANSWER_BYTES_MAX.min(fetched.data.len() + 2048);
                answer.rows.push(fetched);
            }
        }
        let state = self.state();
        answer.gone = state.version(version).is_none();
        answer.applied = state.applied_index();
        Ok(answer)
    }

    /// One row, for a repair. It holds the effects of all entries up to `applied` and of none above its `last_index`.
    async fn row_now(self: &Arc<Self>, version: VersionKey, row: u8) -> Result<RowsAnswer, ChunkStoreError> {
        if u32::from(row) >= ROWS_PER_CHUNK {
            return Err(ChunkStoreError::Fetch { what: "request for a row" });
        }
        let applied = self.state().applied_index();
        let rows = self.fetched_row(version, row, 0).await?.into_iter().collect();
        let gone = self.state().version(version).is_none();
        Ok(RowsAnswer { applied, gone, next_row: row + 1, rows })
    }

    /// A row as it is at one moment, with its verified pages; `None` when it does not exist or is older.
    async fn fetched_row(
        self: &Arc<Self>,
        version: VersionKey,
        row: u8,
        from_index: u64,
    ) -> Result<Option<FetchedRow>, ChunkStoreError> {
        let pages = first_page(row)..first_page(row) + PAGES_PER_ROW;
        let Some(before) = self.last_index(version, row).await? else { return Ok(None) };
        if before < from_index {
            return Ok(None);
        }
        let read = self.read_pages(&View::Version(version), pages).await?;
        let mut meta = Row::default();
        // The row may have been changed between the two looks; an index that is too high does no harm.
        meta.changed_by(before.max(self.last_index(version, row).await?.unwrap_or(0)));
        let mut data = Vec::with_capacity(read.bytes.len());
        for (i, (source, bytes)) in read.sources.iter().zip(read.bytes.chunks_exact(PAGE)).enumerate() {
            let page = u32::try_from(i).expect("a row has 256 pages");
            match source {
                PageSource::Absent => {}
                PageSource::Zero => meta.set_zero(page),
                PageSource::Data { crc, .. } if !read.bad.contains(&i) => {
                    meta.set_data(page, *crc);
                    data.extend_from_slice(bytes);
                }
                PageSource::Data { touched: false, .. } if self.may_be_ahead() => return Err(ChunkStoreError::Busy),
                PageSource::Data { .. } | PageSource::Damaged { .. } => {
                    self.report_damage(source, version.at.chunk.0, first_page(row) + page);
                    meta.set_damaged(page);
                }
            }
        }
        Ok(Some(FetchedRow { row, meta, data: data.into() }))
    }

    /// Whether files may be newer than rows, because the log of an earlier process is still being replayed.
    fn may_be_ahead(&self) -> bool {
        let state = self.state();
        state.applied_index() < state.lenient_until
    }

    async fn last_index(self: &Arc<Self>, version: VersionKey, row: u8) -> Result<Option<u64>, ChunkStoreError> {
        let first = first_page(row);
        let loaded = self.rows_to_change(version, first..first + 1).await?;
        let state = self.state();
        match self.known_row(&state, &loaded, version.row(row)) {
            Known::Row(row) => Ok(Some(row.last_index)),
            _ => Ok(None),
        }
    }
}
