//! Makes a volume from a backup, whoever begins it and whoever comes to its end.
//!
//! | step | found by the next owner |
//! | --- | --- |
//! | the backup is looked up and noted | in the note: a newer one of the same name changes nothing |
//! | a volume `NAME.restoring-TASK` is made and its number noted | by its name, then in the note |
//! | it is attached with its attach taken from an earlier owner, and written | the same content again |
//! | it is flushed, detached and gets its name | the volume of that name has the noted number |
//!
//! Invariants: a volume of the wanted name shows only when its data is complete; an earlier owner that still writes is fenced by
//! the attach epoch, and would write the same content anyway, for a backup does not change.

use super::daemon::Job;
use super::failure::Failure;
use super::step;
use super::task::RestoreTask;
use super::upkeep::resolve;
use crate::index::Index;
use crate::repository::Repository;
use crate::restore::restore;
use crate::throttle::Throttle;
use ogee_client::{OpenMode, Volume};
use ogee_common::limits::{PAGE_BYTES, VOLUME_BYTES_MIN};
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use serde_json::{Value, json};

/// Makes the volume, or finds that an earlier owner has.
///
/// # Errors
/// [`Failure`].
pub(super) async fn make(job: &Job<'_>, task: &RestoreTask) -> Result<Value, Failure> {
    let path = wanted(task)?;
    match stat(job, &path).await? {
        Some(volume) if is_ours(job, &volume) => return Ok(result(job, &volume)),
        // A name that is taken later is told by the rename.
        Some(_) if job.lease.noted().volume.is_none() => return Err(Failure::Final(format!("volume {path} exists"))),
        _ => {}
    }
    let repo = job.open(false).await?;
    let index = resolve(job, &repo, &task.backup).await?;
    step("restore-resolved");
    let size_bytes = index.size_bytes.next_multiple_of(u64::from(PAGE_BYTES)).max(VOLUME_BYTES_MIN);
    let temporary = temporary(job, task)?;
    create(job, task, &temporary, size_bytes).await?;
    step("restore-noted");
    fill(job, &temporary, (&repo, &index), &Throttle::new(task.throttle)).await?;
    step("restore-filled");
    job.lease.check().await?;
    let request = m::RenameVolumeRequest { path: temporary.to_string(), new_path: task.volume.clone(), create_parents: false };
    let renamed = job.cluster.mds().rename_volume(request).await;
    if let Err(e) = renamed {
        // An earlier owner may have been faster.
        return complete(job, task).await?.ok_or_else(|| Failure::call(&format!("rename {temporary} to {}", task.volume), &e));
    }
    step("restore-renamed");
    let done = complete(job, task).await?;
    done.ok_or_else(|| Failure::Final(format!("volume {} was taken away right after it was restored", task.volume)))
}

/// Deletes the volume that is not complete.
///
/// # Errors
/// [`Failure`].
pub(super) async fn undo(job: &Job<'_>, task: &RestoreTask) -> Result<Option<Value>, Failure> {
    if let Some(done) = complete(job, task).await? {
        return Ok(Some(done));
    }
    let Ok(temporary) = temporary(job, task) else { return Ok(None) };
    if stat(job, &temporary).await?.is_none() {
        return Ok(None);
    }
    job.lease.check().await?;
    // The copy that was dropped, or an earlier owner's, still holds the attach; attaching again takes it over and ends it.
    let volume = attach(job, &temporary).await?;
    if let Err(e) = volume.detach().await {
        return Err(Failure::call(&format!("detach {temporary}"), &e.0));
    }
    let request = m::DeleteVolumeRequest { path: temporary.to_string(), owner: task.owner.clone() };
    match job.cluster.mds().delete_volume(request).await {
        Err(e) if e.kind != MdsErrorKind::NotFound => Err(Failure::call(&format!("delete {temporary}"), &e)),
        _ => Ok(None),
    }
}

fn temporary(job: &Job<'_>, task: &RestoreTask) -> Result<VolumePath, Failure> {
    let name = format!("{}.restoring-{}", task.volume, job.lease.task());
    VolumePath::parse(&name).map_err(|e| Failure::Final(format!("volume {name:?}: {e}")))
}

async fn stat(job: &Job<'_>, path: &VolumePath) -> Result<Option<m::Volume>, Failure> {
    match job.cluster.mds().stat_volume(m::StatVolumeRequest { path: path.to_string() }).await {
        Ok(volume) => Ok(Some(volume)),
        Err(e) if e.kind == MdsErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::call(&format!("look for volume {path}"), &e)),
    }
}

fn wanted(task: &RestoreTask) -> Result<VolumePath, Failure> {
    VolumePath::parse(&task.volume).map_err(|e| Failure::Final(format!("volume {:?}: {e}", task.volume)))
}

/// Whether the volume was made by this task.
fn is_ours(job: &Job<'_>, volume: &m::Volume) -> bool {
    job.lease.noted().volume == Some(volume.id)
}

fn result(job: &Job<'_>, volume: &m::Volume) -> Value {
    json!({"volume": volume.path, "backup": job.lease.noted().backup.unwrap_or_default(), "size_bytes": volume.size_bytes})
}

/// What came of the task, if the task's volume has its name already.
async fn complete(job: &Job<'_>, task: &RestoreTask) -> Result<Option<Value>, Failure> {
    let Ok(path) = wanted(task) else { return Ok(None) };
    let found = stat(job, &path).await?.filter(|volume| is_ours(job, volume));
    Ok(found.map(|volume| result(job, &volume)))
}

async fn create(job: &Job<'_>, task: &RestoreTask, temporary: &VolumePath, size_bytes: u64) -> Result<(), Failure> {
    let id = match stat(job, temporary).await? {
        Some(volume) => volume.id,
        None => {
            job.lease.check().await?;
            let request = m::CreateVolumeRequest {
                path: temporary.to_string(),
                size_bytes,
                owner: task.owner.clone(),
                create_parents: true,
                pool: task.pool.clone(),
                sector_bytes: task.sector_bytes,
                limits: None,
            };
            match job.cluster.mds().create_volume(request).await {
                Ok(volume) => volume.id,
                // An earlier owner did it a moment ago: it is found when the task is tried again.
                Err(e) if e.kind == MdsErrorKind::AlreadyExists => return Err(Failure::Passing(e.message)),
                Err(e) => return Err(Failure::call(&format!("create volume {temporary}"), &e)),
            }
        }
    };
    step("restore-created");
    if job.lease.noted().volume == Some(id) {
        return Ok(());
    }
    job.lease.write_down(|note| note.volume = Some(id)).await
}

async fn attach(job: &Job<'_>, path: &VolumePath) -> Result<Volume, Failure> {
    let name = VolumeRef { path: path.clone(), snapshot: None };
    let opened = Volume::open(job.cluster, &name, OpenMode::ReadWrite { steal: true }).await;
    opened.map_err(|e| Failure::open(&format!("open {path}"), e))
}

/// Attaches, copies, flushes and detaches.
async fn fill(job: &Job<'_>, path: &VolumePath, (repo, index): (&Repository, &Index), throttle: &Throttle) -> Result<(), Failure> {
    job.lease.check().await?;
    let volume = attach(job, path).await?;
    job.lease.begin(index.size_bytes);
    let copied = Box::pin(restore(repo, index, &volume, throttle, |bytes| job.lease.advance(bytes))).await;
    let closed = volume.detach().await;
    copied?;
    closed.map_err(|e| Failure::call(&format!("detach {path}"), &e.0))
}
