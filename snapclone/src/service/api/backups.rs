//! Repositories, backups and restores. Backups are read from the repository; whatever changes one is a task.
//!
//! A listing reads the index of every backup of the repository, and damaged ones are left out with a line in the log: the cost is one object
//! for each backup, whatever the page's length.

use super::answer::{Answer, Json};
use super::input::{Body, Filter, Parted, after, cursor, name, page_limit, volume_path};
use super::problem::{Problem, ProblemKind, ProblemView};
use super::tasks::make;
use super::views::{BackupView, PageView, RepositoriesView, TaskView};
use super::{Api, Principal};
use crate::error::RepoErrorKind;
use crate::repository::Repository;
use crate::service::failure::chain;
use crate::service::task::{BackupTask, GcTask, OneTask, RestoreTask, VerifyTask, Work};
use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use ogee_proto::mds as m;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

const LIST: &str = "backups";
/// A run that said nothing for an hour is dead; it says every half minute that it lives.
const ABANDON_AFTER_SECONDS: u64 = 3600;
/// Bytes of a backup's name: digits, or `volume@snapshot`.
const BACKUP_NAME_BYTES_MAX: usize = 2048;

/// Which backups.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct BackupQuery {
    /// Entries of the page, 1 to 256; 64 unless given.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Only those of the volume that had this path.
    volume: Option<String>,
}

/// A backup to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewBackup {
    /// The volume.
    volume: String,
    /// Its snapshot; none: one is taken for the backup and deleted with its end.
    #[serde(default)]
    snapshot: Option<String>,
    /// Bytes a second sent to the repository, at most; 0: no limit.
    #[serde(default)]
    throttle: u64,
    /// Read everything that holds data, also what did not change since the last backup.
    #[serde(default)]
    full: bool,
}

/// A restore to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewRestore {
    /// The backup: first digits of its identity, or `volume` or `volume@snapshot` for the newest of that name.
    backup: String,
    /// The new volume; missing folders are made.
    volume: String,
    /// Who may delete it; empty: anyone.
    #[serde(default)]
    owner: String,
    /// The pool of chunkservers that holds it; `default` unless given.
    #[serde(default)]
    pool: Option<String>,
    /// Bytes of a logical sector, 512 or 4096; 512 unless given.
    #[serde(default)]
    sector_bytes: Option<u32>,
    /// Bytes a second read from the repository, at most; 0: no limit.
    #[serde(default)]
    throttle: u64,
    /// Whether the volume shows before its data is there: not possible yet.
    #[serde(default)]
    lazy: bool,
}

/// How to check a backup.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewCheck {
    /// Every so many blocks one is read; all unless given.
    #[serde(default)]
    sample: Option<u64>,
}

/// How to collect garbage.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewCollection {
    /// Runs that said nothing for so long are given up; 3600 unless given.
    #[serde(default)]
    abandon_after_seconds: Option<u64>,
}

type Caller = (HeaderMap, Extension<Principal>);

fn known(api: &Api, repository: &str) -> Result<(), Problem> {
    if api.places.contains_key(repository) {
        return Ok(());
    }
    Err(Problem::new(ProblemKind::UnknownRepository, format!("there is no repository {repository:?} in the configuration")))
}

async fn open(api: &Api, repository: &str) -> Result<Repository, Problem> {
    known(api, repository)?;
    api.places[repository].open(false).await.map_err(|e| Problem::repo(&e))
}

fn backup_name(text: &str) -> Result<String, Problem> {
    let fits = (1..=BACKUP_NAME_BYTES_MAX).contains(&text.len());
    if fits { Ok(text.to_owned()) } else { Err(Problem::new(ProblemKind::InvalidArgument, "backup: give its identity or a volume's name")) }
}

/// Lists the repositories that this instance knows.
#[utoipa::path(get, operation_id = "list_repositories", path = "/v1/repositories", tag = "backups",
    responses((status = 200, description = "their names", body = RepositoriesView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn repositories(State(api): State<Arc<Api>>) -> Answer<RepositoriesView> {
    Ok(Json::ok(RepositoriesView { items: api.places.keys().cloned().collect() }))
}

/// Lists backups, in the order of their identities.
#[utoipa::path(get, operation_id = "list_backups", path = "/v1/repositories/{repository}/backups", tag = "backups",
    params(("repository" = String, Path, description = "its name"), BackupQuery),
    responses((status = 200, description = "a page", body = PageView<BackupView>), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn list(
    State(api): State<Arc<Api>>, Parted(repository): Parted<String>, Filter(query): Filter<BackupQuery>,
) -> Answer<PageView<BackupView>> {
    let (limit, last) = (page_limit(query.limit)?, after(LIST, query.cursor.as_deref())?.unwrap_or_default());
    let volume = query.volume.as_deref().map(|v| volume_path("volume", v)).transpose()?;
    let mut all = vec![];
    for index in open(&api, &repository).await?.backups().await.map_err(|e| Problem::repo(&e))? {
        match index {
            Ok(index) => all.push(index),
            Err(error) => tracing::warn!(target: "controlpath", repository, error = chain(&error), "a backup cannot be read"),
        }
    }
    all.retain(|i| i.id > last && volume.as_ref().is_none_or(|v| *v == i.volume));
    all.sort_by(|a, b| a.id.cmp(&b.id));
    let more = all.len() > limit;
    all.truncate(limit);
    let next_cursor = all.last().filter(|_| more).map(|i| cursor(LIST, &i.id));
    Ok(Json::ok(PageView { items: all.into_iter().map(Into::into).collect(), next_cursor }))
}

/// Shows a backup.
#[utoipa::path(get, operation_id = "get_backup", path = "/v1/repositories/{repository}/backups/{backup}", tag = "backups",
    params(("repository" = String, Path, description = "its name"), ("backup" = String, Path, description = "first digits of its identity, or a name for the newest")),
    responses((status = 200, description = "the backup", body = BackupView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn get(
    State(api): State<Arc<Api>>, Parted((repository, backup)): Parted<(String, String)>,
) -> Answer<BackupView> {
    let backup = backup_name(&backup)?;
    let found = open(&api, &repository).await?.find(&backup).await;
    let found = found.map_err(|e| match e.kind {
        // Several identities begin so.
        RepoErrorKind::Unusable => Problem::new(ProblemKind::InvalidArgument, chain(&e)),
        _ => Problem::repo(&e),
    });
    Ok(Json::ok(found?.into()))
}

/// Has a backup made, as a task.
#[utoipa::path(post, operation_id = "create_backup", path = "/v1/repositories/{repository}/backups", tag = "backups", request_body = NewBackup,
    params(("repository" = String, Path, description = "its name"), ("Idempotency-Key" = Option<String>, Header, description = "the same key makes one task")),
    responses((status = 202, description = "the task", body = TaskView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn create(
    State(api): State<Arc<Api>>, Parted(repository): Parted<String>, (headers, Extension(principal)): Caller, Body(new): Body<NewBackup>,
) -> Answer<TaskView> {
    known(&api, &repository)?;
    let volume = volume_path("volume", &new.volume)?;
    let list = api.mds().list_snapshots(m::ListSnapshotsRequest { path: volume.clone() }).await;
    let list = list.map_err(|e| Problem::call("look for the volume", &e))?;
    if let Some(snapshot) = new.snapshot.as_ref().filter(|name| list.snapshots.iter().all(|s| s.name != **name)) {
        return Err(Problem::new(ProblemKind::NotFound, format!("there is no snapshot {snapshot:?} of volume {volume:?}")));
    }
    let work = Work::Backup(BackupTask { volume, snapshot: new.snapshot, throttle: new.throttle, full: new.full, keep: None });
    make(&api, &work, repository, (&headers, &principal)).await
}

/// Has a backup removed, as a task; its space comes back with a collection.
#[utoipa::path(delete, operation_id = "remove_backup", path = "/v1/repositories/{repository}/backups/{backup}", tag = "backups",
    params(("repository" = String, Path, description = "its name"), ("backup" = String, Path, description = "first digits of its identity, or a name for the newest"), ("Idempotency-Key" = Option<String>, Header, description = "the same key makes one task")),
    responses((status = 202, description = "the task", body = TaskView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn remove(
    State(api): State<Arc<Api>>, Parted((repository, backup)): Parted<(String, String)>, (headers, Extension(principal)): Caller,
) -> Answer<TaskView> {
    known(&api, &repository)?;
    let work = Work::Remove(OneTask { backup: backup_name(&backup)? });
    make(&api, &work, repository, (&headers, &principal)).await
}

/// Has a backup checked, as a task; damage is a failure of the task.
#[utoipa::path(post, operation_id = "verify_backup", path = "/v1/repositories/{repository}/backups/{backup}/verify", tag = "backups", request_body = NewCheck,
    params(("repository" = String, Path, description = "its name"), ("backup" = String, Path, description = "first digits of its identity, or a name for the newest"), ("Idempotency-Key" = Option<String>, Header, description = "the same key makes one task")),
    responses((status = 202, description = "the task", body = TaskView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn verify(
    State(api): State<Arc<Api>>, Parted((repository, backup)): Parted<(String, String)>, (headers, Extension(principal)): Caller,
    Body(new): Body<NewCheck>,
) -> Answer<TaskView> {
    known(&api, &repository)?;
    let sample = new.sample.unwrap_or(1);
    if sample == 0 {
        return Err(Problem::new(ProblemKind::InvalidArgument, "sample: 1 reads every block, 2 every second one"));
    }
    let work = Work::Verify(VerifyTask { backup: backup_name(&backup)?, sample });
    make(&api, &work, repository, (&headers, &principal)).await
}

/// Has garbage collected, as a task.
#[utoipa::path(post, operation_id = "collect_garbage", path = "/v1/repositories/{repository}/gc", tag = "backups", request_body = NewCollection,
    params(("repository" = String, Path, description = "its name"), ("Idempotency-Key" = Option<String>, Header, description = "the same key makes one task")),
    responses((status = 202, description = "the task", body = TaskView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn gc(
    State(api): State<Arc<Api>>, Parted(repository): Parted<String>, (headers, Extension(principal)): Caller, Body(new): Body<NewCollection>,
) -> Answer<TaskView> {
    known(&api, &repository)?;
    let work = Work::Gc(GcTask { abandon_after_seconds: new.abandon_after_seconds.unwrap_or(ABANDON_AFTER_SECONDS) });
    make(&api, &work, repository, (&headers, &principal)).await
}

/// Has a volume made from a backup, as a task: it shows when all its data is there.
#[utoipa::path(post, operation_id = "create_restore", path = "/v1/repositories/{repository}/restores", tag = "restores", request_body = NewRestore,
    params(("repository" = String, Path, description = "its name"), ("Idempotency-Key" = Option<String>, Header, description = "the same key makes one task")),
    responses((status = 202, description = "the task", body = TaskView), (status = 501, description = "lazy restores do not exist yet", body = ProblemView, content_type = "application/problem+json"), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn restore(
    State(api): State<Arc<Api>>, Parted(repository): Parted<String>, (headers, Extension(principal)): Caller, Body(new): Body<NewRestore>,
) -> Answer<TaskView> {
    known(&api, &repository)?;
    if new.lazy {
        return Err(Problem::new(ProblemKind::LazyRestore, "leave lazy out: the volume shows when all its data is there"));
    }
    let sector_bytes = new.sector_bytes.unwrap_or(512);
    if !matches!(sector_bytes, 512 | 4096) {
        return Err(Problem::new(ProblemKind::InvalidArgument, format!("sector_bytes {sector_bytes}: 512 or 4096 are possible")));
    }
    if !new.owner.is_empty() {
        name("owner", &new.owner)?;
    }
    let pool = new.pool.unwrap_or_else(|| "default".to_owned());
    name("pool", &pool)?;
    let (backup, volume) = (backup_name(&new.backup)?, volume_path("volume", &new.volume)?);
    let work = Work::Restore(RestoreTask { backup, volume, owner: new.owner, pool, sector_bytes, throttle: new.throttle });
    make(&api, &work, repository, (&headers, &principal)).await
}
