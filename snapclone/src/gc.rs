//! Deletes what nothing refers to: blocks of removed backups and of runs that died.
//!
//! Safe beside running backups, other collections, and a crash or a pause anywhere; the argument, step by step, is in
//! `docs/backup-format.md`. Invariants: nothing is deleted unless all backups that show could be read; the order of
//! the steps in [`collect`].

use crate::error::RepoError;
use crate::index::{IndexKey, seal_index};
use crate::layout::{BLOCKS, BlockRef, INDEXES, RUNS, parse_run_record, profile_key, run_record};
use crate::removal;
use crate::repository::Repository;
use crate::run::{open_runs, read_record};
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_common::clock;
use ogee_common::limits::BACKUP_DELETES_PARALLEL;
use std::collections::HashSet;
use std::time::Duration;

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Runs that were given up.
    pub runs_given_up: u64,
    /// Removals that were given up.
    pub removals_given_up: u64,
    /// Backups whose index was deleted.
    pub backups: u64,
    /// Blocks deleted.
    pub blocks: u64,
    /// Blocks that stay.
    pub kept_blocks: u64,
    /// Files of dead writers deleted.
    pub temporary: u64,
}

/// Collects garbage. Runs that did not say for `abandon_after` that they live are given up: should one live after all,
/// it fails when it publishes.
///
/// # Errors
/// The repository fails, or a backup is damaged: then nothing of a live backup was deleted. It can be run again.
pub async fn collect(repo: &Repository, abandon_after: Duration) -> Result<GcReport, RepoError> {
    let mut report = GcReport::default();
    let backend = &repo.backend;
    // 0. Removals whose remover died.
    report.removals_given_up = removal::give_up(repo, abandon_after).await?;
    // 1. Marks, before runs are looked at.
    let removed: HashSet<IndexKey> = repo.removed_keys().await?.into_iter().collect();
    // 2. Runs that died can never publish afterwards.
    report.runs_given_up = give_up(repo, abandon_after).await?;
    // 3. Candidates, before open runs are looked at: a run that starts later has no block among them.
    let candidates = backend.list(BLOCKS, BlockRef::parse).await?;
    // 4. Open runs protect themselves, their bases and whom they adopted.
    let open = open_runs(repo).await?;
    let protected: HashSet<u64> = open.iter().flat_map(|(run, r)| r.adopted.iter().chain([run]).copied()).collect();
    let bases: HashSet<&IndexKey> = open.iter().flat_map(|(_, r)| &r.bases).collect();
    // 5. Indexes, after the runs: whoever is not open any more has published.
    let indexes = backend.list(INDEXES, |key| IndexKey::parse(INDEXES, key)).await?;
    let is_dead = |key: &IndexKey| removed.contains(key) && !bases.contains(key);
    let mut live = HashSet::new();
    for key in indexes.iter().filter(|key| !is_dead(key)) {
        mark(repo, key, &mut live).await?;
    }
    // 6. The indexes first, so that no index refers to a block that is gone; the marks last.
    for key in removed.iter().filter(|key| is_dead(key)) {
        backend.delete(&profile_key(key.run)).await?;
        if indexes.contains(key) {
            backend.delete(&key.key()).await?;
            report.backups += 1;
        }
    }
    backend.settle().await?;
    let is_garbage = |b: &BlockRef| !protected.contains(&b.run) && !live.contains(b);
    let garbage: Vec<BlockRef> = candidates.iter().copied().filter(is_garbage).collect();
    report.blocks = garbage.len() as u64;
    report.kept_blocks = (candidates.len() - garbage.len()) as u64;
    delete_all(repo, garbage.into_iter().map(|b| b.key())).await?;
    backend.settle().await?;
    delete_all(repo, removed.iter().filter(|key| is_dead(key)).map(IndexKey::removed_key)).await?;
    removal::forget(repo).await?;
    report.temporary = backend.sweep(abandon_after).await?;
    Ok(report)
}

async fn delete_all(repo: &Repository, keys: impl Iterator<Item = String>) -> Result<(), RepoError> {
    let delete = |key: String| async move { repo.backend.delete(&key).await };
    stream::iter(keys).map(delete).buffer_unordered(BACKUP_DELETES_PARALLEL).try_collect::<()>().await
}

/// Makes it impossible for dead runs to publish, then forgets them.
async fn give_up(repo: &Repository, abandon_after: Duration) -> Result<u64, RepoError> {
    let limit = u64::try_from(abandon_after.as_millis()).unwrap_or(u64::MAX);
    let mut given_up = 0;
    for run in repo.backend.list(RUNS, parse_run_record).await? {
        let Some(record) = read_record(repo, run).await? else { continue };
        if record.seen_unix_ms.saturating_add(limit) > clock::unix_ms() {
            continue;
        }
        let key = record.target.key();
        // If it exists, the run has published and died before it could delete its record, or was given up before.
        given_up += u64::from(repo.backend.create(&key, seal_index(&repo.sealer, &key, None)).await?);
        repo.backend.settle().await?;
        repo.backend.delete(&run_record(run)).await?;
    }
    Ok(given_up)
}

/// Notes everything that an index refers to.
async fn mark(repo: &Repository, key: &IndexKey, live: &mut HashSet<BlockRef>) -> Result<(), RepoError> {
    let Some(index) = repo.index(key).await? else { return Ok(()) };
    live.extend(index.leaf_refs().flatten().filter(|b| !b.is_zeros()));
    repo.each_leaf(&index, |blocks| live.extend(blocks.iter().filter(|b| !b.is_zeros()))).await
}

