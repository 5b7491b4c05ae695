//! Installing a Raft snapshot: the receiving side.
//!
//! A Raft snapshot at position S carries only the layers at S. The chunk data is fetched from the sender as it is *now*,
//! column by column (a column: all versions of all layers with one chunk index), while the sender goes on applying. Rows
//! that the receiver holds and that no entry above its own position changed are not fetched again.
//!
//! # Why replay from S converges
//!
//! A column that was fetched when the sender had applied S' >= S holds the effects of entries up to S'. The log is then
//! replayed from S. Refusals repeat exactly, because fences, minimum seqs and tombstones are those of S. For a page of a
//! version, the argument of the module docs of `store` holds word for word: the fetched page is "a file that is newer".
//! What remains is the version structure, which may be newer too:
//! - A version that S' had merged away (`DropVersion` at d, S < d <= S') is made again by replayed writes below d, with
//!   nothing right beneath it; but its taker already holds every page it ever gave, and the replayed `DropVersion` at d
//!   gives only what the taker lacks: nothing. So what it held is never seen at or above d.
//! - A layer that S' had dropped is made again and dropped again at its entry.
//! - A partial write of a child reads its parent, which may be gone at S'. Then the child is gone too, or it holds all its
//!   pages. The child's column and the parent's are the *same* column, and it is fetched as one: if a version of it went
//!   between the first and the last fetch, it is fetched again. So "the child does not hold the page yet, but the
//!   parent is gone" cannot arise. A version that came meanwhile is left to the log: all that it holds was written
//!   after the list was made, hence above S, and what it reads through to is there.
//!
//! Versions that the sender lacks are removed; if they were merged away, their pages came with the taker: if the
//! receiver's versions of a layer are not a prefix of the sender's, everything of that layer in the column is fetched,
//! whatever its last change.
//!
//! # Crashes
//!
//! Before the first byte the install is marked durably; before the data of an answer is written, the sender's position
//! is written as `install_high`. The column's rows follow in one batch after its data was flushed. The applied position
//! and the layers change only at the end. So after a crash the position is still the old one, A, and the log from A on is
//! still there (openraft purges it only after the install). The state is then one in which some columns, or some files,
//! are ahead of the rows, up to `install_high`: the log or the next install brings it forward, by the same argument.
//! The replica votes and appends as before; it answers no read until its position reached `install_high`. Whoever leads
//! has applied all that was committed, hence `install_high`, before its first lease read.

use super::fetch::{Column, FetchRequest, FetchedRow, ListAnswer, RowsAnswer, by_layer, decode_manifest};
use crate::store::CopysetStore;
use crate::store::column::ColumnDraft;
use crate::store::error::{ChunkStoreError, ChunkStoreErrorKind};
use crate::store::key::VersionKey;
use bytes::Bytes;
use ogee_common::id::ChunkIndex;
use ogee_common::limits::{COLUMN_FETCH_ATTEMPTS, ROWS_PER_CHUNK};
use ogee_raft::api::{RaftSnapshot, SnapshotSource, StateMachineError};
use std::sync::Arc;

/// Why an install ended early.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The sender could not be asked, or refused.
    #[error("fetch from the sender")]
    Source(#[source] StateMachineError),
    /// Our store failed, or what the sender sent cannot be used.
    #[error("install fetched data")]
    Store(#[from] ChunkStoreError),
}

impl InstallError {
    /// Whether this replica is out; otherwise the install can be tried again.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Source(_) => false,
            Self::Store(e) => !matches!(e.kind(), ChunkStoreErrorKind::Fetch | ChunkStoreErrorKind::Busy),
        }
    }
}

/// Replaces the state of a copyset by a Raft snapshot's. The state before must be checkpointed. Durable on return.
///
/// # Errors
/// [`InstallError`]. What was fetched stays and saves fetching it again.
pub(crate) async fn install(
    store: &Arc<CopysetStore>,
    snapshot: &RaftSnapshot,
    source: &impl SnapshotSource,
) -> Result<(), InstallError> {
    let layers = decode_manifest(&snapshot.manifest)?;
    let applied = store.applied();
    let install = Install { store, source, from_index: applied.pos.map_or(0, |p| p.index + 1) };
    store.begin_install().await?;
    let mut from = Some(ChunkIndex(0));
    while let Some(first) = from {
        let list = install.list(first, ChunkIndex(u32::MAX)).await?;
        if list.next.is_some_and(|next| next <= first) {
            return Err(ChunkStoreError::Fetch { what: "list of versions" }.into());
        }
        let last = list.next.map_or(u32::MAX, |next| next.0 - 1);
        for chunk in store.chunks_between(first, ChunkIndex(last)) {
            if !list.columns.contains_key(&chunk) {
                install.column(chunk, Column::default()).await?;
            }
        }
        from = list.next;
        for (chunk, column) in list.columns {
            install.column(chunk, column).await?;
        }
    }
    Ok(store.finish_install(&snapshot.applied, layers).await?)
}

struct Install<'a, S> {
    store: &'a Arc<CopysetStore>,
    source: &'a S,
    /// Rows changed below this index are already here.
    from_index: u64,
}

impl<S: SnapshotSource> Install<'_, S> {
    async fn ask(&self, request: FetchRequest) -> Result<Bytes, InstallError> {
        let answer = self.source.fetch(request.encode()).await.map_err(InstallError::Source)?;
        self.store.process().pace.pass(answer.len()).await;
        Ok(answer)
    }

    async fn list(&self, from: ChunkIndex, to: ChunkIndex) -> Result<ListAnswer, InstallError> {
        Ok(ListAnswer::decode(&self.ask(FetchRequest::List { from, to }).await?)?)
    }

    /// Fetches a column as one and makes it durable.
    async fn column(&self, chunk: ChunkIndex, mut column: Column) -> Result<(), InstallError> {
        for _ in 0..COLUMN_FETCH_ATTEMPTS {
            let draft = self.fetch_column(chunk, &column).await?;
            let now = self.list(chunk, chunk).await?;
            // What the check saw may be newer than the rows that were fetched, but no row fetched is newer than it.
            self.store.raise_install_high(now.applied).await?;
            let now = now.columns.get(&chunk).cloned().unwrap_or_default();
            let remains = |v: &VersionKey| now.versions.binary_search_by_key(v, |n| n.0).is_ok();
            if let Some(draft) = draft
                && column.versions.iter().all(|(version, _)| remains(version))
            {
                return Ok(self.store.commit_column(draft).await?);
            }
            column = now;
        }
        Err(ChunkStoreError::Fetch { what: "column (its versions keep going)" }.into())
    }

    /// The column's rows, with their data written to the files; `None` when a version vanished meanwhile.
    async fn fetch_column(&self, chunk: ChunkIndex, column: &Column) -> Result<Option<ColumnDraft>, InstallError> {
        let ours = by_layer(self.store.column_versions(chunk).into_iter());
        let theirs = by_layer(column.versions.iter().map(|v| v.0));
        let mut draft = ColumnDraft::new(chunk, column.versions.iter().map(|v| v.0).collect());
        for (version, last_index) in &column.versions {
            let have = ours.get(&version.at).map_or(&[][..], Vec::as_slice);
            let is_prefix = theirs.get(&version.at).is_some_and(|t| t.starts_with(have));
            let incremental = is_prefix && have.contains(&version.seq);
            if incremental && *last_index < self.from_index {
                continue;
            }
            let from_index = if incremental { self.from_index } else { 0 };
            draft.begin(*version, !incremental);
            if !self.fetch_version(*version, from_index, &mut draft).await? {
                return Ok(None);
            }
        }
        Ok(Some(draft))
    }

    async fn fetch_version(
        &self,
        version: VersionKey,
        from_index: u64,
        draft: &mut ColumnDraft,
    ) -> Result<bool, InstallError> {
        let mut from_row = 0;
        while u32::from(from_row) < ROWS_PER_CHUNK {
            let request = FetchRequest::Rows { version, from_index, from_row };
            let answer = RowsAnswer::decode(&self.ask(request).await?)?;
            if answer.gone {
                return Ok(false);
            }
            let asked_for = |row: &FetchedRow| row.row >= from_row && row.row < answer.next_row;
            if answer.next_row <= from_row || !answer.rows.iter().all(asked_for) {
                return Err(ChunkStoreError::Fetch { what: "rows of a version" }.into());
            }
            self.store.raise_install_high(answer.applied).await?;
            for row in answer.rows {
                self.store.write_fetched(version, &row).await?;
                draft.add(version.row(row.row), row.meta);
            }
            from_row = answer.next_row;
        }
        Ok(true)
    }
}
