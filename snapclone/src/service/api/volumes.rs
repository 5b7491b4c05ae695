//! Snapshots, clones, rollback and flatten: calls of the MDS, done when they are answered. A repetition finds the name taken (`already-exists`) or
//! changes nothing.

use super::answer::{Answer, Json};
use super::input::{Body, Filter, Parted, after, cursor, name, page_limit, volume_path};
use super::problem::{Problem, ProblemKind, ProblemView};
use super::views::{PageView, SnapshotView, VolumeView};
use super::Api;
use axum::extract::State;
use axum::http::StatusCode;
use ogee_proto::mds as m;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

/// Which page of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// Entries of the page, 1 to 256; 64 unless given.
    pub(super) limit: Option<u32>,
    /// `next_cursor` of the page before.
    pub(super) cursor: Option<String>,
}

/// A snapshot to take.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewSnapshot {
    /// Its name: letters, digits, `.`, `_` and `-`.
    name: String,
}

/// A clone to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewClone {
    /// The volume to clone.
    volume: String,
    /// Its snapshot; none: the volume as it is now.
    #[serde(default)]
    snapshot: Option<String>,
    /// The clone's path; missing folders are made.
    clone: String,
    /// Who may delete the clone; empty: anyone.
    #[serde(default)]
    owner: String,
}

/// A rollback to do.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewRollback {
    /// The snapshot to go back to.
    snapshot: String,
    /// Take the volume from the client that has it attached.
    #[serde(default)]
    detach: bool,
}

const LIST: &str = "snapshots";

/// Takes an exact snapshot of a volume.
#[utoipa::path(post, path = "/v1/volumes/{volume}/snapshots", tag = "snapshots",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")),
    request_body = NewSnapshot,
    responses((status = 201, description = "taken", body = SnapshotView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn create_snapshot(
    State(api): State<Arc<Api>>, Parted(volume): Parted<String>, Body(new): Body<NewSnapshot>,
) -> Answer<SnapshotView> {
    let path = volume_path("volume", &volume)?;
    name("snapshot", &new.name)?;
    let made = api.mds().create_snapshot(m::CreateSnapshotRequest { path, name: new.name }).await;
    Ok(Json::created(made.map_err(|e| Problem::call("take the snapshot", &e))?.into()))
}

/// Lists the snapshots of a volume, oldest first.
#[utoipa::path(get, path = "/v1/volumes/{volume}/snapshots", tag = "snapshots",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F"), PageQuery),
    responses((status = 200, description = "a page", body = PageView<SnapshotView>), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn list_snapshots(
    State(api): State<Arc<Api>>, Parted(volume): Parted<String>, Filter(page): Filter<PageQuery>,
) -> Answer<PageView<SnapshotView>> {
    let path = volume_path("volume", &volume)?;
    let (limit, last) = (page_limit(page.limit)?, after(LIST, page.cursor.as_deref())?);
    let last = match last.map(|id| id.parse::<u64>()) {
        None => 0,
        Some(Ok(id)) => id,
        Some(Err(_)) => return Err(Problem::new(ProblemKind::Malformed, "the cursor is not one of this list")),
    };
    let all = api.mds().list_snapshots(m::ListSnapshotsRequest { path }).await;
    let all = all.map_err(|e| Problem::call("list snapshots", &e))?;
    let mut rest = all.snapshots.into_iter().filter(|s| s.id > last);
    let items: Vec<SnapshotView> = rest.by_ref().take(limit).map(Into::into).collect();
    let next_cursor = rest.next().and(items.last()).map(|s| cursor(LIST, &s.id.to_string()));
    Ok(Json::ok(PageView { items, next_cursor }))
}

/// Deletes a snapshot.
#[utoipa::path(delete, path = "/v1/volumes/{volume}/snapshots/{snapshot}", tag = "snapshots",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F"), ("snapshot" = String, Path, description = "its name")),
    responses((status = 204, description = "deleted"), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn delete_snapshot(
    State(api): State<Arc<Api>>, Parted((volume, snapshot)): Parted<(String, String)>,
) -> Result<StatusCode, Problem> {
    let path = volume_path("volume", &volume)?;
    name("snapshot", &snapshot)?;
    let gone = api.mds().delete_snapshot(m::DeleteSnapshotRequest { path, name: snapshot }).await;
    gone.map_err(|e| Problem::call("delete the snapshot", &e))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Shows a volume, with the progress of its flatten.
#[utoipa::path(get, operation_id = "get_volume", path = "/v1/volumes/{volume}", tag = "clones",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")),
    responses((status = 200, description = "the volume", body = VolumeView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn volume(State(api): State<Arc<Api>>, Parted(volume): Parted<String>) -> Answer<VolumeView> {
    let path = volume_path("volume", &volume)?;
    let found = api.mds().stat_volume(m::StatVolumeRequest { path }).await;
    Ok(Json::ok(found.map_err(|e| Problem::call("look for the volume", &e))?.into()))
}

/// Clones a volume or a snapshot, whatever its size in one transaction; the clone may be used at once.
#[utoipa::path(post, path = "/v1/clones", tag = "clones", request_body = NewClone,
    responses((status = 201, description = "made", body = VolumeView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn create_clone(State(api): State<Arc<Api>>, Body(new): Body<NewClone>) -> Answer<VolumeView> {
    let (path, new_path) = (volume_path("volume", &new.volume)?, volume_path("clone", &new.clone)?);
    if let Some(snapshot) = &new.snapshot {
        name("snapshot", snapshot)?;
    }
    if !new.owner.is_empty() {
        name("owner", &new.owner)?;
    }
    let source_snapshot = new.snapshot.unwrap_or_default();
    let request = m::CloneVolumeRequest { path, source_snapshot, new_path, owner: new.owner, create_parents: true };
    let made = api.mds().clone_volume(request).await;
    Ok(Json::created(made.map_err(|e| Problem::call("clone", &e))?.into()))
}

/// Rolls a volume back to one of its snapshots.
#[utoipa::path(post, operation_id = "rollback_volume", path = "/v1/volumes/{volume}/rollback", tag = "clones",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")), request_body = NewRollback,
    responses((status = 200, description = "rolled back", body = VolumeView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn rollback(
    State(api): State<Arc<Api>>, Parted(volume): Parted<String>, Body(new): Body<NewRollback>,
) -> Answer<VolumeView> {
    let path = volume_path("volume", &volume)?;
    name("snapshot", &new.snapshot)?;
    let request = m::RollbackVolumeRequest { path, snapshot: new.snapshot, detach: new.detach };
    let done = api.mds().rollback_volume(request).await;
    Ok(Json::ok(done.map_err(|e| Problem::call("roll back", &e))?.into()))
}

/// Has a volume copy what it reads from others, in the background; GET of the volume tells how far it is.
#[utoipa::path(post, operation_id = "flatten_volume", path = "/v1/volumes/{volume}/flatten", tag = "clones",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")),
    responses((status = 202, description = "under way or done", body = VolumeView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn flatten(State(api): State<Arc<Api>>, Parted(volume): Parted<String>) -> Answer<VolumeView> {
    flatten_or_stop(&api, &volume, false).await
}

/// Stops a flatten; what it copied stays.
#[utoipa::path(delete, operation_id = "stop_flatten", path = "/v1/volumes/{volume}/flatten", tag = "clones",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")),
    responses((status = 202, description = "stopped, or none was under way", body = VolumeView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn stop_flatten(State(api): State<Arc<Api>>, Parted(volume): Parted<String>) -> Answer<VolumeView> {
    flatten_or_stop(&api, &volume, true).await
}

async fn flatten_or_stop(api: &Api, volume: &str, cancel: bool) -> Answer<VolumeView> {
    let path = volume_path("volume", volume)?;
    let done = api.mds().flatten_volume(m::FlattenVolumeRequest { path, cancel }).await;
    let doing = if cancel { "stop the flatten" } else { "flatten" };
    Ok(Json::accepted(done.map_err(|e| Problem::call(doing, &e))?.into()))
}
