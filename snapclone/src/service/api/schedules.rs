//! Schedules of backups, one for each volume's path. When tasks are due is the MDS's business.

use super::answer::{Answer, Json};
use super::input::{Body, Filter, Parted, after, cursor, page_limit, volume_path};
use super::problem::{Problem, ProblemKind, ProblemView};
use super::views::{PageView, ScheduleView};
use super::volumes::PageQuery;
use super::Api;
use crate::service::retention::Keep;
use crate::service::task::{BackupTask, Work};
use axum::extract::State;
use axum::http::StatusCode;
use ogee_proto::mds as m;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::ToSchema;

const LIST: &str = "schedules";

/// A schedule to put.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewSchedule {
    /// The repository's name.
    repository: String,
    /// Seconds between two backups: 10 to 366 days.
    every_seconds: u64,
    /// The newest backups that stay.
    #[serde(default)]
    keep_last: u32,
    /// Hours of which the newest backup stays.
    #[serde(default)]
    keep_hourly: u32,
    /// Days of which the newest backup stays.
    #[serde(default)]
    keep_daily: u32,
    /// Weeks of which the newest backup stays.
    #[serde(default)]
    keep_weekly: u32,
    /// Bytes a second sent to the repository, at most; 0: no limit.
    #[serde(default)]
    throttle: u64,
}

/// Has a volume backed up every so often, or changes that.
#[utoipa::path(put, operation_id = "put_schedule", path = "/v1/schedules/{volume}", tag = "schedules", request_body = NewSchedule,
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")),
    responses((status = 200, description = "as it is now", body = ScheduleView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn put(
    State(api): State<Arc<Api>>, Parted(volume): Parted<String>, Body(new): Body<NewSchedule>,
) -> Answer<ScheduleView> {
    let volume = volume_path("volume", &volume)?;
    if !api.places.contains_key(&new.repository) {
        return Err(Problem::new(ProblemKind::UnknownRepository, format!("there is no repository {:?} in the configuration", new.repository)));
    }
    let keep = Keep { last: new.keep_last, hourly: new.keep_hourly, daily: new.keep_daily, weekly: new.keep_weekly };
    if !keep.keeps_any() {
        return Err(Problem::new(ProblemKind::InvalidArgument, "at least one backup must stay: keep_last 1"));
    }
    let Some(every_ms) = new.every_seconds.checked_mul(1000) else {
        return Err(Problem::new(ProblemKind::InvalidArgument, "every_seconds: 10 seconds to 366 days are possible"));
    };
    let found = api.mds().stat_volume(m::StatVolumeRequest { path: volume.clone() }).await;
    found.map_err(|e| Problem::call("look for the volume", &e))?;
    let work = Work::Backup(BackupTask { volume: volume.clone(), snapshot: None, throttle: new.throttle, full: false, keep: Some(keep) });
    let request = m::SetScheduleRequest {
        name: volume,
        kind: work.kind().to_owned(),
        repository: new.repository,
        arguments: work.arguments(),
        every_ms,
    };
    let set = api.mds().set_schedule(request).await;
    Ok(Json::ok(set.map_err(|e| Problem::call("set the schedule", &e))?.into()))
}

/// Lists schedules, in the order of the volumes' paths.
#[utoipa::path(get, operation_id = "list_schedules", path = "/v1/schedules", tag = "schedules", params(PageQuery),
    responses((status = 200, description = "a page", body = PageView<ScheduleView>), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn list(State(api): State<Arc<Api>>, Filter(page): Filter<PageQuery>) -> Answer<PageView<ScheduleView>> {
    let (limit, last) = (page_limit(page.limit)?, after(LIST, page.cursor.as_deref())?);
    let request = m::ListSchedulesRequest { start_after: last.unwrap_or_default() };
    let found = api.mds().list_schedules(request).await.map_err(|e| Problem::call("list schedules", &e))?;
    // A page of the MDS is at least as long as the longest page here.
    let more = found.more || found.schedules.len() > limit;
    let items: Vec<ScheduleView> = found.schedules.into_iter().take(limit).map(Into::into).collect();
    let next_cursor = items.last().filter(|_| more).map(|s| cursor(LIST, &s.volume));
    Ok(Json::ok(PageView { items, next_cursor }))
}

/// Ends a schedule; backups and tasks stay.
#[utoipa::path(delete, operation_id = "delete_schedule", path = "/v1/schedules/{volume}", tag = "schedules",
    params(("volume" = String, Path, description = "the volume's path, its slashes as %2F")),
    responses((status = 204, description = "ended"), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn delete(State(api): State<Arc<Api>>, Parted(volume): Parted<String>) -> Result<StatusCode, Problem> {
    let name = volume_path("volume", &volume)?;
    let gone = api.mds().delete_schedule(m::DeleteScheduleRequest { name }).await;
    gone.map_err(|e| Problem::call("end the schedule", &e))?;
    Ok(StatusCode::NO_CONTENT)
}
