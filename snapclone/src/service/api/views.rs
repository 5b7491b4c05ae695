//! What the REST API answers: objects as JSON. Sizes are bytes, times milliseconds since 1970 (0: not yet). Pure.

use crate::index::Index;
use crate::service::retention::Keep;
use crate::service::task::{BackupTask, Work};
use ogee_proto::mds as m;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PageView<T> {
    /// The entries, in the list's order.
    pub(super) items: Vec<T>,
    /// Give it as `cursor` to get the next page; absent: this is the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next_cursor: Option<String>,
}

/// A snapshot of a volume.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Snapshot)]
pub(super) struct SnapshotView {
    /// Its number.
    pub(super) id: u64,
    /// Its name, one of the volume's.
    pub(super) name: String,
    /// The volume's path.
    pub(super) volume: String,
    /// The volume's number.
    pub(super) volume_id: u64,
    /// The volume's size then.
    pub(super) size_bytes: u64,
    /// When it was taken.
    pub(super) created_unix_ms: u64,
    /// False while an unreachable client is being shut out of it.
    pub(super) ready: bool,
    /// Clones and rollbacks that stand on it.
    pub(super) children: u32,
}

impl From<m::Snapshot> for SnapshotView {
    fn from(s: m::Snapshot) -> Self {
        Self {
            id: s.id,
            name: s.name,
            volume: s.volume_path,
            volume_id: s.volume,
            size_bytes: s.size_bytes,
            created_unix_ms: s.created_unix_ms,
            ready: s.ready,
            children: s.children,
        }
    }
}

/// A volume.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Volume)]
pub(super) struct VolumeView {
    /// Its number.
    pub(super) id: u64,
    /// Its path.
    pub(super) path: String,
    /// Who may delete it; empty: anyone.
    pub(super) owner: String,
    /// Its size.
    pub(super) size_bytes: u64,
    /// When it was made.
    pub(super) created_unix_ms: u64,
    /// `volume@snapshot` it was cloned from, as named then; empty: none.
    pub(super) parent: String,
    /// Layers that it reads from; 0: it stands on nothing.
    pub(super) depth: u32,
    /// Its snapshots.
    pub(super) snapshots: u32,
    /// Whether a client has it attached for writing.
    pub(super) attached: bool,
    /// Parts that a flatten has done.
    pub(super) flatten_done: u32,
    /// Parts of a flatten in all; 0: none is under way.
    pub(super) flatten_total: u32,
}

impl From<m::Volume> for VolumeView {
    fn from(v: m::Volume) -> Self {
        Self {
            id: v.id,
            path: v.path,
            owner: v.owner,
            size_bytes: v.size_bytes,
            created_unix_ms: v.created_unix_ms,
            parent: v.parent,
            depth: v.depth,
            snapshots: v.snapshots,
            attached: v.attached,
            flatten_done: v.flatten_done,
            flatten_total: v.flatten_total,
        }
    }
}

/// A backup in a repository.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Backup)]
pub(super) struct BackupView {
    /// Its identity, 16 hexadecimal digits.
    pub(super) backup: String,
    /// The path that the volume had.
    pub(super) volume: String,
    /// The snapshot that was copied.
    pub(super) snapshot: String,
    /// Counts the backups of the volume.
    pub(super) generation: u64,
    /// The cluster it comes from.
    pub(super) cluster: String,
    /// The volume's number there.
    pub(super) volume_id: u64,
    /// When the snapshot was taken.
    pub(super) snapshot_unix_ms: u64,
    /// When the backup was made.
    pub(super) made_unix_ms: u64,
    /// The volume's size then.
    pub(super) size_bytes: u64,
    /// Bytes of blocks that hold data.
    pub(super) data_bytes: u64,
    /// Bytes that the repository did not have.
    pub(super) new_bytes: u64,
    /// What they take, compressed.
    pub(super) stored_bytes: u64,
    /// Merkle root of the content, hexadecimal.
    pub(super) root: String,
}

impl From<Index> for BackupView {
    fn from(i: Index) -> Self {
        Self {
            backup: i.id,
            volume: i.volume,
            snapshot: i.snapshot,
            generation: i.generation,
            cluster: i.cluster,
            volume_id: i.volume_id,
            snapshot_unix_ms: i.snapshot_unix_ms,
            made_unix_ms: i.made_unix_ms,
            size_bytes: i.size_bytes,
            data_bytes: i.data_bytes,
            new_bytes: i.new_bytes,
            stored_bytes: i.stored_bytes,
            root: i.root,
        }
    }
}

/// A task.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Task)]
pub(super) struct TaskView {
    /// Its number.
    pub(super) task: u64,
    /// `backup`, `restore`, `remove`, `verify` or `gc`.
    pub(super) kind: String,
    /// The repository's name.
    pub(super) repository: String,
    /// An object of the kind.
    #[schema(value_type = Object)]
    pub(super) arguments: Value,
    /// `queued`, `running`, `cancelling`, `done`, `failed` or `cancelled`.
    pub(super) state: String,
    /// How often an instance took it.
    pub(super) takes: u64,
    /// How far it is.
    pub(super) done_bytes: u64,
    /// How far it will go; 0: not known.
    pub(super) total_bytes: u64,
    /// An object of what came of it, or the text why nothing did.
    #[schema(value_type = Object)]
    pub(super) result: Value,
    /// When it was made.
    pub(super) created_unix_ms: u64,
    /// When it was taken first.
    pub(super) started_unix_ms: u64,
    /// When it ended.
    pub(super) ended_unix_ms: u64,
}

/// JSON if it is, else the text as it is.
fn json_or_text(text: String) -> Value {
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

impl From<m::ServiceTask> for TaskView {
    fn from(t: m::ServiceTask) -> Self {
        Self {
            task: t.id,
            kind: t.kind,
            repository: t.repository,
            arguments: json_or_text(t.arguments),
            state: t.state,
            takes: t.fence,
            done_bytes: t.done,
            total_bytes: t.total,
            result: json_or_text(t.result),
            created_unix_ms: t.created_unix_ms,
            started_unix_ms: t.started_unix_ms,
            ended_unix_ms: t.ended_unix_ms,
        }
    }
}

/// Backups of a volume that are made every so often.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Schedule)]
pub(super) struct ScheduleView {
    /// The volume's path.
    pub(super) volume: String,
    /// The repository's name.
    pub(super) repository: String,
    /// Seconds between two backups.
    pub(super) every_seconds: u64,
    /// The newest backups that stay.
    pub(super) keep_last: u32,
    /// Hours of which the newest backup stays.
    pub(super) keep_hourly: u32,
    /// Days of which the newest backup stays.
    pub(super) keep_daily: u32,
    /// Weeks of which the newest backup stays.
    pub(super) keep_weekly: u32,
    /// Bytes a second sent to the repository, at most; 0: no limit.
    pub(super) throttle: u64,
    /// When a backup was due last.
    pub(super) last_due_unix_ms: u64,
    /// When one is due next.
    pub(super) next_due_unix_ms: u64,
    /// The task of the last one; 0: none yet.
    pub(super) last_task: u64,
}

impl From<m::Schedule> for ScheduleView {
    fn from(s: m::Schedule) -> Self {
        let (keep, throttle) = match Work::parse(&s.kind, &s.arguments) {
            Ok(Work::Backup(BackupTask { keep, throttle, .. })) => (keep.unwrap_or_default(), throttle),
            _ => (Keep::default(), 0),
        };
        Self {
            volume: s.name,
            repository: s.repository,
            every_seconds: s.every_ms / 1000,
            keep_last: keep.last,
            keep_hourly: keep.hourly,
            keep_daily: keep.daily,
            keep_weekly: keep.weekly,
            throttle,
            last_due_unix_ms: s.last_due_unix_ms,
            next_due_unix_ms: s.last_due_unix_ms.saturating_add(s.every_ms),
            last_task: s.last_task,
        }
    }
}

/// The repositories that this instance knows.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Repositories)]
pub(super) struct RepositoriesView {
    /// Their names.
    pub(super) items: Vec<String>,
}

/// How this instance is.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Health)]
pub(super) struct HealthView {
    /// `ok`
    pub(super) status: &'static str,
}
