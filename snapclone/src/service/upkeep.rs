//! Removing and checking backups, collecting garbage. Each may be repeated and interrupted anywhere: the repository sees to it.
//!
//! Invariant: which backup a name means is noted before anything is done to it, so that the next owner does it to the same one.

use super::daemon::Job;
use super::failure::{Failure, chain};
use super::step;
use super::task::{GcTask, OneTask, VerifyTask};
use crate::error::RepoErrorKind;
use crate::gc::collect;
use crate::index::{BackupId, Index};
use crate::repository::Repository;
use crate::verify::verify;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
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

/// The first volume, or layer without one, of this cluster that stands on a backup.
///
/// # Errors
/// [`Failure`].
pub(super) async fn stands_on(job: &Job<'_>, backup: BackupId) -> Result<Option<String>, Failure> {
    let mut after = 0;
    loop {
        let list = job.cluster.mds().list_backup_parents(m::ListBackupParentsRequest { after }).await;
        let list = match list {
            // An MDS of an older build does not know the call, and has no such layers.
            Err(e) if e.kind == MdsErrorKind::InvalidArgument => return Ok(None),
            list => list.map_err(|e| Failure::call("ask which layers stand on backups", &e))?,
        };
        let found = list.parents.iter().find(|parent| parent.backup == backup.0);
        if let Some(parent) = found {
            let path = &parent.volume;
            return Ok(Some(if path.is_empty() { format!("layer {}", parent.layer) } else { format!("volume {path}") }));
        }
        match list.parents.last() {
            Some(last) if list.more => after = last.layer,
            _ => return Ok(None),
        }
    }
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
    if let Some(what) = stands_on(job, id).await? {
        return Err(Failure::Final(format!("{what} stands on backup {id}; wait until its hydrate task is done")));
    }
    job.lease.check().await?;
    match repo.remove(id).await {
        // An earlier owner did it.
        Err(e) if e.kind == RepoErrorKind::NotFound && known.is_some() => {}
        removed => removed?,
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
        "runs_given_up": report.runs_given_up, "temporary_deleted": report.temporary,
    }))
}
