//! Removing and checking backups, collecting garbage. Each may be repeated and interrupted anywhere: the repository sees to it.
//!
//! Invariants: which backup a name means is noted before anything is done to it, so that the next owner does it to the same one; a removal is begun
//! before the cluster is asked what stands on the backup (`removal.rs`).

use super::daemon::Job;
use super::failure::{Failure, chain};
use super::step;
use super::task::{GcTask, OneTask, VerifyTask};
use crate::gc::collect;
use crate::index::{BackupId, Index};
use crate::removal::standing_on;
use crate::repository::Repository;
use crate::verify::verify;
use serde_json::{Value, json};
use std::time::Duration;

/// The backup that the task means.
///
/// # Errors
/// [`Failure`], also when there is none.
pub(super) async fn resolve(job: &Job<'_>, repo: &Repository, name: &str) -> Result<Index, Failure> {
    if let Some(known) = job.lease.noted().backup {
        return Ok(repo.find(&known).await?);
    }
    let index = repo.find(name).await?;
    job.lease.write_down(|note| note.backup = Some(index.id.clone())).await?;
    Ok(index)
}

/// Removes a backup unless a volume, or layer without one, of this cluster stands on it: that one.
///
/// # Errors
/// [`Failure`]; the backup stays then, but for a failure of the repository at the very end.
pub(super) async fn remove_unless_needed(job: &Job<'_>, repo: &Repository, id: BackupId) -> Result<Option<String>, Failure> {
    let removal = repo.begin_removal(id).await?;
    step("remove-begun");
    let asked = match standing_on(job.cluster.mds(), id).await {
        Ok(None) => job.lease.check().await.map(|()| None),
        asked => asked.map_err(|e| Failure::call("ask which layers stand on backups", &e)),
    };
    if let Ok(None) = asked {
        return removal.carry_out().await.map(|()| None).map_err(Failure::from);
    }
    if let Err(e) = removal.take_back().await {
        tracing::warn!(target: "controlpath", backup = %id, error = chain(&e), "a removal that was not carried out is not taken back: gc does it");
    }
    asked
}

/// Removes a backup. A damaged one is removed by its whole identity.
///
/// # Errors
/// [`Failure`].
pub(super) async fn remove(job: &Job<'_>, task: &OneTask) -> Result<Value, Failure> {
    let repo = job.open(false).await?;
    let known = job.lease.noted().backup;
    let name = known.as_deref().unwrap_or(&task.backup);
    let is_whole_id = name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let id = match u64::from_str_radix(name, 16) {
        Ok(id) if is_whole_id => BackupId(id),
        _ => repo.find(name).await?.backup_id(),
    };
    if known.is_none() {
        job.lease.write_down(|note| note.backup = Some(id.to_string())).await?;
    }
    step("remove-noted");
    match remove_unless_needed(job, &repo, id).await {
        Ok(None) => {}
        Ok(Some(what)) => return Err(Failure::Final(format!("{what} stands on backup {id}; wait until its hydrate task is done"))),
        // An earlier owner did it.
        Err(_) if known.is_some() && repo.is_removed(id).await? => {}
        Err(e) => return Err(e),
    }
    step("remove-removed");
    Ok(json!({"removed": id.to_string()}))
}

/// Checks a backup; damage is a failure.
///
/// # Errors
/// [`Failure`].
pub(super) async fn check(job: &Job<'_>, task: &VerifyTask) -> Result<Value, Failure> {
    let repo = job.open(false).await?;
    let index = resolve(job, &repo, &task.backup).await?;
    job.lease.begin(index.size_bytes);
    let report = verify(&repo, &index, task.sample.max(1), |bytes| job.lease.advance(bytes)).await?;
    if let Some(first) = report.damage.first() {
        let text = format!("backup {} is damaged: {} objects are missing or damaged: {}", index.id, report.damaged, chain(first));
        return Err(Failure::Final(text));
    }
    Ok(json!({"backup": index.id, "damaged": 0, "blocks": report.blocks, "bytes": report.bytes}))
}

/// Collects garbage.
///
/// # Errors
/// [`Failure`].
pub(super) async fn gc(job: &Job<'_>, task: &GcTask) -> Result<Value, Failure> {
    let repo = job.open(false).await?;
    job.lease.check().await?;
    let report = collect(&repo, Duration::from_secs(task.abandon_after_seconds)).await?;
    step("gc-collected");
    Ok(json!({
        "blocks_deleted": report.blocks, "blocks_kept": report.kept_blocks, "backups_deleted": report.backups,
        "runs_given_up": report.runs_given_up, "removals_given_up": report.removals_given_up, "temporary_deleted": report.temporary,
    }))
}
