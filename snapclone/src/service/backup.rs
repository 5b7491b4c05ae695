//! Makes a backup, whoever begins it and whoever comes to its end.
//!
//! | step | found by the next owner |
//! | --- | --- |
//! | a snapshot is taken, if none is named | by its name, which has the task's number |
//! | a run is opened and noted at the MDS; blocks are stored | in the note; its blocks are adopted |
//! | the lease is checked, earlier runs are buried, the index is published | at the noted run's name |
//! | of a schedule: backups that are not to stay are removed | it may be repeated, and interrupted: what stays is the same |
//! | runs are buried and forgotten, the snapshot is deleted | each may be repeated |
//!
//! Invariant: exactly one backup comes of a task that ends as done, however many owners it had (`succession.rs` has the argument).

use super::daemon::Job;
use super::failure::Failure;
use super::retention::Keep;
use super::step;
use super::task::BackupTask;
use super::upkeep::remove_unless_needed;
use crate::error::TransferError;
use crate::export::{Source, export_guarded};
use crate::index::Index;
use crate::repository::Repository;
use crate::succession::{RunGuard, RunName, bury, forget, published};
use crate::throttle::Throttle;
use ogee_client::{BlockDevice, OpenMode, Volume};
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use serde_json::{Value, json};
use std::sync::{Mutex, PoisonError};

/// What came of it.
fn result(i: &Index) -> Value {
    json!({
        "backup": i.id, "volume": i.volume, "snapshot": i.snapshot, "generation": i.generation, "size_bytes": i.size_bytes,
        "data_bytes": i.data_bytes, "new_bytes": i.new_bytes, "stored_bytes": i.stored_bytes, "root": i.root,
    })
}

/// Makes the backup, or finds that an earlier owner has.
///
/// # Errors
/// [`Failure`].
pub(super) async fn make(job: &Job<'_>, task: &BackupTask) -> Result<Value, Failure> {
    let repo = job.open(true).await?;
    let index = match published(&repo, &job.lease.noted().runs).await? {
        Some(index) => index,
        None => export(job, task, &repo).await?,
    };
    step("backup-published");
    retain(job, task, (&repo, &index)).await?;
    step("backup-retained");
    bury_and_forget(job, &repo).await?;
    step("backup-forgotten");
    delete_snapshot(job, task).await?;
    step("backup-tidied");
    Ok(result(&index))
}

/// Undoes what was begun; of a failed backup the blocks stay, for the next one.
///
/// # Errors
/// [`Failure`].
pub(super) async fn undo(job: &Job<'_>, task: &BackupTask, is_cancelled: bool) -> Result<Option<Value>, Failure> {
    let runs = job.lease.noted().runs;
    let mut index = None;
    if !runs.is_empty() {
        let repo = job.open(false).await?;
        job.lease.check().await?;
        index = if is_cancelled { bury_and_forget(job, &repo).await? } else { published(&repo, &runs).await? };
    }
    delete_snapshot(job, task).await?;
    Ok(index.as_ref().map(result))
}

async fn bury_and_forget(job: &Job<'_>, repo: &Repository) -> Result<Option<Index>, Failure> {
    let runs = job.lease.noted().runs;
    let found = bury(repo, &runs).await?;
    forget(repo, &runs).await?;
    Ok(found)
}

async fn export(job: &Job<'_>, task: &BackupTask, repo: &Repository) -> Result<Index, Failure> {
    let name = snapshot(job, task).await?;
    step("backup-snapshot");
    let mds = job.cluster.mds();
    let status = mds.cluster_status().await.map_err(|e| Failure::call("ask for the cluster", &e))?;
    let list = mds.list_snapshots(m::ListSnapshotsRequest { path: task.volume.clone() }).await;
    let list = list.map_err(|e| Failure::call(&format!("list snapshots of {}", task.volume), &e))?;
    let snapshot = name.snapshot.clone().unwrap_or_default();
    let taken = list.snapshots.iter().find(|s| s.name == snapshot).map_or(0, |s| s.created_unix_ms);
    let opened = Volume::open(job.cluster, &name, OpenMode::ReadOnly).await;
    let volume = opened.map_err(|e| Failure::open(&format!("open {name}"), e))?;
    let source = Source {
        cluster: status.cluster.iter().map(|b| format!("{b:02x}")).collect(),
        volume_id: volume.attach_info().volume.0,
        volume: task.volume.clone(),
        snapshot,
        snapshot_unix_ms: taken,
        moments: volume.moments(),
        full: task.full,
    };
    job.lease.begin(volume.info().size_bytes);
    let guard = Guard { job, repo, earlier: job.lease.noted().runs, verdict: Mutex::default() };
    let throttle = Throttle::new(task.throttle);
    let copied = export_guarded(repo, &volume, source, (&throttle, &guard), |bytes| job.lease.advance(bytes));
    let done = Box::pin(copied).await;
    // It was attached for reading: whether the MDS hears of the end is of no consequence.
    let _ = volume.detach().await;
    match (done, guard.verdict.into_inner().unwrap_or_else(PoisonError::into_inner)) {
        (Ok(report), _) => Ok(report.index),
        (Err(TransferError::Withdrawn), Some(verdict)) => verdict,
        (Err(error), _) => Err(error.into()),
    }
}

/// The name of what is copied; a snapshot of the task's own is taken if none is named.
async fn snapshot(job: &Job<'_>, task: &BackupTask) -> Result<VolumeRef, Failure> {
    let path = VolumePath::parse(&task.volume).map_err(|e| Failure::Final(format!("volume {:?}: {e}", task.volume)))?;
    if let Some(snapshot) = &task.snapshot {
        return Ok(VolumeRef { path, snapshot: Some(snapshot.clone()) });
    }
    let name = own_snapshot(job, task);
    job.lease.check().await?;
    let request = m::CreateSnapshotRequest { path: task.volume.clone(), name: name.clone() };
    match job.cluster.mds().create_snapshot(request).await {
        Ok(_) => {}
        // An earlier owner took it.
        Err(e) if e.kind == MdsErrorKind::AlreadyExists => {}
        Err(e) => return Err(Failure::call(&format!("create snapshot {}@{name}", task.volume), &e)),
    }
    Ok(VolumeRef { path, snapshot: Some(name) })
}

/// What names of snapshots begin with that are taken for scheduled backups.
const SCHEDULED: &str = "scheduled-";

fn own_snapshot(job: &Job<'_>, task: &BackupTask) -> String {
    let prefix = if task.keep.is_some() { SCHEDULED } else { "backup-task-" };
    format!("{prefix}{}", job.lease.task())
}

/// Removes the volume's scheduled backups that are not to stay.
async fn retain(job: &Job<'_>, task: &BackupTask, (repo, made): (&Repository, &Index)) -> Result<(), Failure> {
    let Some(keep) = task.keep.filter(Keep::keeps_any) else { return Ok(()) };
    // Damaged ones cannot be asked whose they are: they stay.
    let mut scheduled: Vec<Index> = repo.backups().await?.into_iter().filter_map(Result::ok).collect();
    let is_of_volume = |i: &Index| (&i.cluster, i.volume_id) == (&made.cluster, made.volume_id) && i.snapshot.starts_with(SCHEDULED);
    scheduled.retain(is_of_volume);
    let backups: Vec<(u64, u64)> = scheduled.iter().map(|i| (i.generation, i.snapshot_unix_ms)).collect();
    for index in keep.goes(&backups).into_iter().map(|i| &scheduled[i]).filter(|i| i.id != made.id) {
        // It goes with a later one's retention.
        match remove_unless_needed(job, repo, index.backup_id()).await {
            Ok(None) => {}
            Ok(Some(what)) => {
                tracing::warn!(target: "controlpath", task = job.lease.task(), backup = index.id, what, "a scheduled backup stays: something stands on it");
                continue;
            }
            // By hand, or by another retention.
            Err(_) if repo.is_removed(index.backup_id()).await? => {}
            Err(e) => return Err(e),
        }
        tracing::info!(target: "controlpath", task = job.lease.task(), backup = index.id, volume = index.volume, "a scheduled backup is not kept");
    }
    Ok(())
}

/// Deletes the snapshot that was taken for the task, if one was.
async fn delete_snapshot(job: &Job<'_>, task: &BackupTask) -> Result<(), Failure> {
    if task.snapshot.is_some() {
        return Ok(());
    }
    job.lease.check().await?;
    let name = own_snapshot(job, task);
    match job.cluster.mds().delete_snapshot(m::DeleteSnapshotRequest { path: task.volume.clone(), name: name.clone() }).await {
        Err(e) if e.kind != MdsErrorKind::NotFound => Err(Failure::call(&format!("delete snapshot {}@{name}", task.volume), &e)),
        _ => Ok(()),
    }
}

/// Asks the MDS before the run shows.
struct Guard<'a> {
    job: &'a Job<'a>,
    repo: &'a Repository,
    /// Runs of earlier owners.
    earlier: Vec<RunName>,
    /// What became of the backup, if the run was withdrawn.
    verdict: Mutex<Option<Result<Index, Failure>>>,
}

impl Guard<'_> {
    fn withdraw(&self, verdict: Result<Index, Failure>) -> TransferError {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(verdict);
        TransferError::Withdrawn
    }
}

impl RunGuard for Guard<'_> {
    async fn opened(&self, run: &RunName) -> Result<(), TransferError> {
        step("backup-run");
        let noted = self.job.lease.write_down(|note| note.runs.push(run.clone())).await;
        noted.map_err(|e| self.withdraw(Err(e)))?;
        step("backup-noted");
        Ok(())
    }

    async fn publishes(&self) -> Result<(), TransferError> {
        step("backup-stored");
        self.job.lease.check().await.map_err(|e| self.withdraw(Err(e)))?;
        match bury(self.repo, &self.earlier).await? {
            Some(index) => Err(self.withdraw(Ok(index))),
            None => {
                step("backup-buried");
                Ok(())
            }
        }
    }
}
