//! Bringing log and checkpoint of a replica together before its Raft starts.
//!
//! A snapshot is installed before openraft drops the log that it replaces ([`crate::snapshot`]). After a crash in
//! between, the log may hold entries that were never committed at or after the snapshot's position; openraft would call
//! that corruption. What the checkpoint holds was committed, so whatever contradicts it was not, and goes. Invariant:
//! nothing that may be committed is removed.

use crate::alias::LogId;
use crate::log_store::LogStore;
use openraft::storage::RaftLogStorage;
use openraft::{LogState, RaftLogReader};
use std::io;

/// What stands in the way of opening a replica.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RepairError {
    /// The log cannot be read or written.
    #[error("read the log")]
    Io(#[from] io::Error),
    /// The log begins after the checkpoint: entries are missing, so the checkpoint is not this log's.
    #[error("the log begins after index {purged}, the checkpoint ends at {applied:?}")]
    Gap {
        /// Last index that is gone from the log.
        purged: u64,
        /// Index of the checkpoint.
        applied: Option<u64>,
    },
}

/// Removes entries that contradict a checkpoint at `applied`.
pub(crate) async fn align(log: &mut LogStore, applied: Option<LogId>) -> Result<(), RepairError> {
    let LogState { last_purged_log_id, last_log_id } = log.get_log_state().await?;
    if let Some(purged) = last_purged_log_id
        && applied.is_none_or(|at| at.index < purged.index)
    {
        return Err(RepairError::Gap { purged: purged.index, applied: applied.map(|at| at.index) });
    }
    let (Some(at), Some(last)) = (applied, last_log_id) else { return Ok(()) };
    if last.index < at.index || last_purged_log_id.is_some_and(|purged| purged.index == at.index) {
        // openraft itself drops a log that ends before the checkpoint.
        return Ok(());
    }
    let mut reader = log.get_log_reader().await;
    let entries = reader.try_get_log_entries(at.index..=at.index).await?;
    if entries.first().is_some_and(|entry| entry.log_id == at) {
        return Ok(());
    }
    tracing::warn!(
        target: "controlpath",
        checkpoint = at.index,
        log_end = last.index,
        "dropping log entries that a snapshot had replaced"
    );
    log.truncate_after(last_purged_log_id).await?;
    Ok(())
}
