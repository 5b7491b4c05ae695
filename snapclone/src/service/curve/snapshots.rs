//! The five actions about snapshots. A snapshot here is one of the cluster's own: exact, and made when the answer comes.

use super::code::Code;
use super::find::is_of;
use super::ids::CurveId;
use super::params::{Params, file_of, path_of};
use super::{Curve, Reply};
use ogee_common::name::check_name;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use serde_json::{Value, json};

/// Curve's `Status` of a snapshot: done.
const DONE: u32 = 0;
/// Copysets are still being shut to a client that was not reached.
const PENDING: u32 = 1;
/// Curve's progress of a snapshot of which only the beginning is made.
const PROGRESS_CREATED: u32 = 5;

/// The UUID of a snapshot.
pub(super) fn uuid(snapshot: &m::Snapshot) -> CurveId {
    CurveId::Snapshot { volume: snapshot.volume, snapshot: snapshot.id }
}

fn status(snapshot: &m::Snapshot) -> u32 {
    if snapshot.ready { DONE } else { PENDING }
}

fn shown(volume: &m::Volume, snapshot: &m::Snapshot) -> Value {
    json!({
        "UUID": uuid(snapshot).to_string(),
        "User": volume.owner,
        "File": file_of(&snapshot.volume_path),
        "SeqNum": snapshot.seq,
        "Name": snapshot.name,
        // Curve's times are microseconds.
        "Time": snapshot.created_unix_ms.saturating_mul(1000),
        "FileLength": snapshot.size_bytes,
        "Status": status(snapshot),
        "Progress": if snapshot.ready { 100 } else { PROGRESS_CREATED },
    })
}

fn listed(list: Vec<(m::Volume, m::Snapshot)>, params: &Params) -> Reply {
    let page = params.page()?;
    let total = list.len();
    let items: Vec<Value> = page.of(list).iter().map(|(volume, snapshot)| shown(volume, snapshot)).collect();
    Ok(json!({"TotalCount": total, "Snapshots": items}))
}

/// Whether a `File`, if one is given, is that of the volume.
fn is_file(params: &Params, volume: &m::Volume) -> bool {
    params.given("File").is_none_or(|file| path_of(file).as_deref() == Some(volume.path.as_str()))
}

impl Curve {
    /// The snapshot of `UUID`.
    async fn of_uuid(&self, params: &Params) -> Result<Option<(m::Volume, m::Snapshot)>, Code> {
        match CurveId::parse(params.wanted("UUID")?) {
            Some(CurveId::Snapshot { volume, snapshot }) => self.snapshot(volume, snapshot).await,
            _ => Ok(None),
        }
    }

    /// `CreateSnapshot`.
    pub(super) async fn create_snapshot(&self, params: &Params) -> Reply {
        let (user, file, name) = (params.wanted("User")?, params.wanted("File")?, params.wanted("Name")?);
        check_name(name).map_err(|_| Code::BadRequest)?;
        let path = path_of(file).ok_or(Code::NoFile)?;
        let volume = self.volume_at(&path).await?.ok_or(Code::NoFile)?;
        if !is_of(&volume, user) {
            return Err(Code::InvalidUser);
        }
        let made = self.mds.create_snapshot(m::CreateSnapshotRequest { path, name: name.to_owned() }).await;
        let snapshot = made.map_err(|e| match e.kind {
            MdsErrorKind::AlreadyExists => Code::TaskExists,
            MdsErrorKind::Limit => Code::SnapshotLimit,
            _ => Code::of("create a snapshot", &e),
        })?;
        Ok(json!({"UUID": uuid(&snapshot).to_string()}))
    }

    /// `DeleteSnapshot`. One that is not there is no error.
    pub(super) async fn delete_snapshot(&self, params: &Params) -> Reply {
        let (user, _) = (params.wanted("User")?, params.wanted("UUID")?);
        let Some((volume, snapshot)) = self.of_uuid(params).await? else { return Ok(json!({})) };
        if !is_of(&volume, user) {
            return Err(Code::InvalidUser);
        }
        if !is_file(params, &volume) {
            return Err(Code::NameMismatch);
        }
        if !snapshot.ready {
            return Err(Code::DeleteUnfinished);
        }
        self.remove(snapshot).await
    }

    async fn remove(&self, snapshot: m::Snapshot) -> Reply {
        let gone = self.mds.delete_snapshot(m::DeleteSnapshotRequest { path: snapshot.volume_path, name: snapshot.name }).await;
        match gone {
            Err(e) if e.kind != MdsErrorKind::NotFound => Err(Code::of("delete a snapshot", &e)),
            _ => Ok(json!({})),
        }
    }

    /// `CancelSnapshot`. Almost always too late, because a snapshot takes milliseconds.
    pub(super) async fn cancel_snapshot(&self, params: &Params) -> Reply {
        let (user, _, _) = (params.wanted("User")?, params.wanted("UUID")?, params.wanted("File")?);
        let (volume, snapshot) = self.of_uuid(params).await?.ok_or(Code::CancelFinished)?;
        if !is_of(&volume, user) {
            return Err(Code::InvalidUser);
        }
        if !is_file(params, &volume) {
            return Err(Code::NameMismatch);
        }
        if snapshot.ready {
            return Err(Code::CancelFinished);
        }
        self.remove(snapshot).await
    }

    /// `GetFileSnapshotInfo`.
    pub(super) async fn snapshot_info(&self, params: &Params) -> Reply {
        let user = params.wanted("User")?;
        params.page()?;
        if params.get("UUID").is_some() {
            let (volume, snapshot) = match params.given("UUID") {
                Some(_) => self.of_uuid(params).await?.ok_or(Code::NoFile)?,
                None => return Err(Code::NoFile),
            };
            if !is_of(&volume, user) {
                return Err(Code::InvalidUser);
            }
            if !is_file(params, &volume) {
                return Err(Code::NameMismatch);
            }
            return listed(vec![(volume, snapshot)], params);
        }
        let found = self.snapshots_by_file(params).await?;
        listed(found.into_iter().filter(|(volume, _)| is_of(volume, user)).collect(), params)
    }

    /// `GetFileSnapshotList`: every parameter is a filter.
    pub(super) async fn snapshot_list(&self, params: &Params) -> Reply {
        params.page()?;
        let found: Vec<(m::Volume, m::Snapshot)> = match params.given("UUID") {
            Some(_) => self.of_uuid(params).await?.into_iter().filter(|(volume, _)| is_file(params, volume)).collect(),
            None => self.snapshots_by_file(params).await?,
        };
        let suits = |(volume, snapshot): &(m::Volume, m::Snapshot)| {
            params.given("User").is_none_or(|user| is_of(volume, user)) && params.allows("Status", &status(snapshot).to_string())
        };
        listed(found.into_iter().filter(suits).collect(), params)
    }

    /// The snapshots of `File`, or of all volumes.
    async fn snapshots_by_file(&self, params: &Params) -> Result<Vec<(m::Volume, m::Snapshot)>, Code> {
        let volumes = match params.given("File") {
            Some(file) => match path_of(file) {
                Some(path) => self.volume_at(&path).await?.into_iter().collect(),
                None => vec![],
            },
            None => self.volumes(|v| v.snapshots > 0 && params.given("User").is_none_or(|user| is_of(v, user))).await?,
        };
        self.snapshots_of_all(volumes).await
    }
}
