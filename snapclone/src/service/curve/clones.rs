//! The seven actions about clones and rollbacks. Curve has a row for each of these tasks; here a clone's task is the clone itself, so nothing is kept.
//!
//! ```text
//!   Clone ──> 7 metaInstalled ── Flatten ──> 1 cloning ──> 0 done      (a clone whose volume is deleted is no task any more)
//!        Lazy=false: begins the flatten by itself
//! ```
//! Invariants: a clone can be used as soon as it is answered, whatever `Lazy` says; a request that is repeated gets the same UUID. A clone that is done is
//! found by its UUID alone: the MDS forgets what a volume stood on when it is flattened.

use super::code::Code;
use super::find::is_of;
use super::ids::CurveId;
use super::params::{Params, file_of, path_of};
use super::{Curve, Reply, snapshots};
use ogee_common::name::check_name;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use serde_json::{Value, json};

/// Curve's `TaskStatus`.
const DONE: u32 = 0;
const CLONING: u32 = 1;
const RECOVERING: u32 = 2;
const META_INSTALLED: u32 = 7;
/// Curve's `TaskType`.
const TYPE_CLONE: u32 = 0;
const TYPE_RECOVER: u32 = 1;
/// Curve's `FileType` of a source.
const FROM_FILE: u32 = 0;
const FROM_SNAPSHOT: u32 = 1;
/// Curve's `NextStep`: the data is to be copied, and nothing is.
const STEP_DATA: u32 = 4;
const STEP_END: u32 = 8;
/// Curve's progress before any data is copied.
const PROGRESS_META: u32 = 5;
const PROGRESS_DATA: u32 = 90;
/// Curve's `RefStatus`.
const NO_REF: u32 = 0;
const HAS_REF: u32 = 1;
const NEED_CHECK: u32 = 2;

/// A clone or rollback as a task.
struct Task {
    id: CurveId,
    kind: u32,
    status: u32,
    progress: u32,
    volume: m::Volume,
}

impl Task {
    /// How far a volume is from standing on nothing. `copying`: the status while it is flattened.
    fn new(id: CurveId, (kind, copying): (u32, u32), volume: m::Volume) -> Self {
        let (status, progress) = if volume.depth == 0 {
            (DONE, 100)
        } else if volume.flatten_total > 0 {
            let done = volume.flatten_done.min(volume.flatten_total);
            let share = u64::from(PROGRESS_DATA) * u64::from(done) / u64::from(volume.flatten_total);
            (copying, PROGRESS_META + u32::try_from(share).unwrap_or(PROGRESS_DATA))
        } else {
            (META_INSTALLED, PROGRESS_META)
        };
        Self { id, kind, status, progress, volume }
    }

    /// A clone's; `None`: the volume is none.
    fn of_clone(volume: m::Volume) -> Option<Self> {
        let id = CurveId::Clone { volume: volume.id };
        (!volume.parent.is_empty()).then(|| Self::new(id, (TYPE_CLONE, CLONING), volume))
    }
}

/// Where a clone comes from.
enum Source {
    Snapshot(m::Volume, m::Snapshot),
    Volume(m::Volume),
}

impl Source {
    fn volume(&self) -> &m::Volume {
        match self {
            Self::Snapshot(volume, _) | Self::Volume(volume) => volume,
        }
    }

    /// What the MDS notes of a clone of it.
    fn parent(&self) -> String {
        match self {
            Self::Snapshot(volume, snapshot) => format!("{}@{}", volume.path, snapshot.name),
            Self::Volume(volume) => volume.path.clone(),
        }
    }
}

impl Curve {
    async fn source(&self, params: &Params) -> Result<Source, Code> {
        let source = params.wanted("Source")?;
        if let Some(CurveId::Snapshot { volume, snapshot }) = CurveId::parse(source) {
            let (volume, snapshot) = self.snapshot(volume, snapshot).await?.ok_or(Code::NoFile)?;
            return Ok(Source::Snapshot(volume, snapshot));
        }
        let path = path_of(source).ok_or(Code::NoFile)?;
        Ok(Source::Volume(self.volume_at(&path).await?.ok_or(Code::NoFile)?))
    }

    /// `Clone`.
    pub(super) async fn clone_file(&self, params: &Params) -> Reply {
        let (user, destination, lazy) = (params.wanted("User")?, params.wanted("Destination")?, params.flag("Lazy")?);
        params.wanted("Source")?;
        check_name(user).map_err(|_| Code::BadRequest)?;
        let new_path = path_of(destination).ok_or(Code::BadRequest)?;
        if params.get("Poolset").is_some_and(str::is_empty) {
            return Err(Code::BadRequest);
        }
        let source = self.source(params).await?;
        if let Source::Snapshot(volume, snapshot) = &source {
            if !is_of(volume, user) {
                return Err(Code::InvalidUser);
            }
            if !snapshot.ready {
                return Err(Code::InvalidSnapshot);
            }
        }
        if let Some(pool) = params.given("Poolset") {
            self.refuse_other_pool(source.volume(), pool).await?;
        }
        let source_snapshot = match &source {
            Source::Snapshot(_, snapshot) => snapshot.name.clone(),
            Source::Volume(_) => String::new(),
        };
        let path = source.volume().path.clone();
        let request = m::CloneVolumeRequest { path, source_snapshot, new_path: new_path.clone(), owner: user.to_owned(), create_parents: true };
        let volume = match self.mds.clone_volume(request).await {
            Ok(volume) => volume,
            Err(e) if e.kind == MdsErrorKind::AlreadyExists => {
                // Perhaps it is the same request once more.
                let there = self.volume_at(&new_path).await?;
                there.filter(|v| v.parent == source.parent() && v.owner == user).ok_or(Code::FileExists)?
            }
            Err(e) => return Err(Code::of("clone", &e)),
        };
        self.paths.put(&volume);
        if !lazy && volume.depth > 0 {
            self.flatten_volume(&volume).await?;
        }
        Ok(json!({"UUID": CurveId::Clone { volume: volume.id }.to_string()}))
    }

    /// Clones lie where their source lies.
    async fn refuse_other_pool(&self, source: &m::Volume, pool: &str) -> Result<(), Code> {
        let pools = self.mds.list_pools().await.map_err(|e| Code::of("list pools", &e))?.pools;
        match pools.iter().find(|p| p.name == pool) {
            Some(found) if found.id == source.pool => Ok(()),
            Some(_) => Err(Code::NotSupported),
            None => Err(Code::NoFile),
        }
    }

    async fn flatten_volume(&self, volume: &m::Volume) -> Result<(), Code> {
        let begun = self.mds.flatten_volume(m::FlattenVolumeRequest { path: volume.path.clone(), cancel: false }).await;
        begun.map(|_| ()).map_err(|e| Code::of("flatten", &e))
    }

    /// `Recover`: a rollback, done when it is answered.
    pub(super) async fn recover(&self, params: &Params) -> Reply {
        let (user, destination, lazy) = (params.wanted("User")?, params.wanted("Destination")?, params.flag("Lazy")?);
        let path = path_of(destination).ok_or(Code::NoFile)?;
        let Source::Snapshot(volume, snapshot) = self.source(params).await? else { return Err(Code::InvalidSnapshot) };
        let there = self.volume_at(&path).await?.ok_or(Code::NoFile)?;
        if !is_of(&there, user) {
            return Err(Code::InvalidUser);
        }
        if there.id != volume.id || !snapshot.ready {
            return Err(Code::InvalidSnapshot);
        }
        let done = self.mds.rollback_volume(m::RollbackVolumeRequest { path, snapshot: snapshot.name, detach: false }).await;
        done.map_err(|e| Code::of("roll back", &e))?;
        Ok(json!({"UUID": CurveId::Recover { volume: volume.id, snapshot: snapshot.id, lazy }.to_string()}))
    }

    /// The task of a UUID.
    async fn task(&self, uuid: &str) -> Result<Option<Task>, Code> {
        match CurveId::parse(uuid) {
            // One that stands on nothing any more does not say that it was a clone; only who made it knows its UUID, and waits for this.
            Some(id @ CurveId::Clone { volume }) => Ok(self.volume(volume).await?.map(|volume| Task::new(id, (TYPE_CLONE, CLONING), volume))),
            Some(id @ CurveId::Recover { volume, lazy, .. }) => Ok(self.volume(volume).await?.map(|volume| {
                let task = Task::new(id, (TYPE_RECOVER, RECOVERING), volume);
                // Who did not ask for laziness waits for the end, which was there at once.
                if lazy { task } else { Task { status: DONE, progress: 100, ..task } }
            })),
            Some(CurveId::Snapshot { .. }) | None => Ok(None),
        }
    }

    /// `Flatten`. What is under way or done is no error; the user is not looked at, as Curve does not.
    pub(super) async fn flatten(&self, params: &Params) -> Reply {
        let (_, uuid) = (params.wanted("User")?, params.wanted("UUID")?);
        let task = self.task(uuid).await?.ok_or(Code::NoFile)?;
        if task.status == META_INSTALLED {
            self.flatten_volume(&task.volume).await?;
        }
        Ok(json!({}))
    }

    /// `CleanCloneTask`. There is nothing to clean; only the answers are Curve's.
    pub(super) async fn clean(&self, params: &Params) -> Reply {
        let (user, uuid) = (params.wanted("User")?, params.wanted("UUID")?);
        match self.task(uuid).await? {
            None => Ok(json!({})),
            Some(task) if !is_of(&task.volume, user) => Err(Code::InvalidUser),
            Some(task) if task.status == DONE => Ok(json!({})),
            Some(_) => Err(Code::CleanUnfinished),
        }
    }

    /// `GetCloneTasks`.
    pub(super) async fn tasks(&self, params: &Params) -> Reply {
        let user = params.wanted("User")?;
        params.page()?;
        let one = match (params.get("UUID"), params.get("File")) {
            (Some(uuid), _) => Some(self.task(uuid).await?),
            (None, Some(file)) => Some(match path_of(file) {
                Some(path) => self.volume_at(&path).await?.and_then(Task::of_clone),
                None => None,
            }),
            (None, None) => None,
        };
        let tasks = match one {
            Some(None) => return Err(Code::NoFile),
            Some(Some(task)) if !is_of(&task.volume, user) => return Err(Code::InvalidUser),
            Some(Some(task)) => vec![task],
            None => self.clones(|v| is_of(v, user)).await?,
        };
        self.listed(tasks, params).await
    }

    /// `GetCloneTaskList`: every parameter is a filter.
    pub(super) async fn task_list(&self, params: &Params) -> Reply {
        params.page()?;
        let destination = params.given("Destination").map(path_of);
        let suits = |v: &m::Volume| {
            params.given("User").is_none_or(|user| is_of(v, user)) && destination.as_ref().is_none_or(|d| d.as_deref() == Some(v.path.as_str()))
        };
        let mut tasks: Vec<Task> = match params.given("UUID") {
            Some(uuid) => self.task(uuid).await?.into_iter().filter(|t| suits(&t.volume)).collect(),
            None => self.clones(suits).await?,
        };
        tasks.retain(|t| params.allows("Status", &t.status.to_string()) && params.allows("Type", &t.kind.to_string()));
        if let Some(source) = params.given("Source") {
            let mut of_source = vec![];
            for task in tasks {
                if self.src(&task).await?.0 == source {
                    of_source.push(task);
                }
            }
            tasks = of_source;
        }
        self.listed(tasks, params).await
    }

    async fn clones(&self, suits: impl Fn(&m::Volume) -> bool) -> Result<Vec<Task>, Code> {
        let volumes = self.volumes(|v| !v.parent.is_empty() && suits(v)).await?;
        Ok(self.in_full(volumes).await?.into_iter().filter_map(Task::of_clone).collect())
    }

    async fn listed(&self, tasks: Vec<Task>, params: &Params) -> Reply {
        let total = tasks.len();
        let mut items = vec![];
        for task in params.page()?.of(tasks) {
            items.push(self.shown(&task).await?);
        }
        Ok(json!({"TotalCount": total, "TaskInfos": items}))
    }

    /// `Src` and `FileType`: the snapshot's UUID, or the volume's path; of a snapshot that is gone what it was called; nothing of a clone that
    /// was flattened.
    async fn src(&self, task: &Task) -> Result<(String, u32), Code> {
        if let CurveId::Recover { volume, snapshot, .. } = task.id {
            return Ok((CurveId::Snapshot { volume, snapshot }.to_string(), FROM_SNAPSHOT));
        }
        if task.volume.parent.is_empty() {
            return Ok((String::new(), FROM_FILE));
        }
        let Some((path, name)) = task.volume.parent.split_once('@') else { return Ok((file_of(&task.volume.parent), FROM_FILE)) };
        let found = self.snapshots_of(path).await?.into_iter().find(|s| s.name == name);
        Ok((found.map_or_else(|| file_of(&task.volume.parent), |s| snapshots::uuid(&s).to_string()), FROM_SNAPSHOT))
    }

    async fn shown(&self, task: &Task) -> Reply {
        let (src, file_type) = self.src(task).await?;
        Ok(json!({
            "UUID": task.id.to_string(),
            "User": task.volume.owner,
            "File": file_of(&task.volume.path),
            "Src": src,
            "TaskType": task.kind,
            "TaskStatus": task.status,
            "IsLazy": !matches!(task.id, CurveId::Recover { lazy: false, .. }),
            "NextStep": if task.status == DONE { STEP_END } else { STEP_DATA },
            "Time": task.volume.created_unix_ms.saturating_mul(1000),
            "FileType": file_type,
            "Progress": task.progress,
        }))
    }

    /// `GetCloneRefStatus`: which volumes stand on a snapshot or a volume.
    pub(super) async fn ref_status(&self, params: &Params) -> Reply {
        let (_, source) = (params.wanted("User")?, params.wanted("Source")?);
        let (path, snapshot) = match CurveId::parse(source) {
            Some(CurveId::Snapshot { volume, snapshot }) => match self.snapshot(volume, snapshot).await? {
                Some((volume, snapshot)) => (volume.path, Some(snapshot)),
                None => return Ok(json!({"RefStatus": NO_REF, "TotalCount": 0})),
            },
            _ => (path_of(source).ok_or(Code::NoFile)?, None),
        };
        let is_child = |v: &m::Volume| match (&snapshot, v.parent.split_once('@')) {
            (Some(s), Some((of, name))) => of == path && name == s.name,
            (Some(_), None) => false,
            (None, Some((of, _))) => of == path,
            (None, None) => v.parent == path,
        };
        let children = self.volumes(|v| v.depth > 0 && is_child(v)).await?;
        let hidden = match &snapshot {
            Some(snapshot) => snapshot.children > 0,
            None => self.snapshots_of(&path).await?.iter().any(|s| s.children > 0),
        };
        if children.is_empty() {
            // The source was renamed since, or was rolled back.
            return Ok(json!({"RefStatus": if hidden { HAS_REF } else { NO_REF }, "TotalCount": 0}));
        }
        let files: Vec<Value> = children.iter().map(|v| json!({"User": v.owner, "File": file_of(&v.path), "Inode": v.id})).collect();
        Ok(json!({"RefStatus": NEED_CHECK, "TotalCount": files.len(), "CloneFileInfo": files}))
    }
}
