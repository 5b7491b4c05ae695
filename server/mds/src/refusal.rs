//! [`Refusal`]: why the state machine did not do what a command asked. Part of the log's answers, so it is plain data.
//!
//! Invariants: a refused command changed nothing; every refusal has one [`MdsErrorKind`], which is what programs act
//! on; the text says what to change. Deliberately absent: failures of Raft or the network, see `service::status`.

use crate::machine::flatten::FLATTENS_MAX;
use ogee_common::id::{AttachEpoch, ChunkserverId, CopysetId, LayerId, SegmentIndex, ServiceTaskId, VolumeSeq};
use ogee_common::limits::{ANCESTRY_DEPTH_MAX, SCHEDULES_MAX, SERVICE_TASKS_OPEN_MAX};
use ogee_common::size::ByteLen;
use ogee_proto::MdsErrorKind;
use serde::{Deserialize, Serialize};

/// Snapshots one volume may have, hidden ones included: it bounds a listing and the versions a read may pass.
pub(crate) const SNAPSHOTS_PER_VOLUME_MAX: u32 = 4096;

/// Names shown when something is in use.
pub(crate) const USERS_SHOWN_MAX: usize = 8;

/// A refused command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("there is no volume {path:?}")]
    NoSuchVolume { path: String },
    #[error("the volume does not exist any more")]
    VolumeGone,
    #[error("there is no folder {path:?}")]
    NoSuchFolder { path: String },
    #[error("there is no snapshot {name:?} of volume {path:?}")]
    NoSuchSnapshot { path: String, name: String },
    #[error("the snapshot does not exist any more")]
    SnapshotGone,
    #[error("there is no {0}")]
    NoSuchLayer(LayerId),
    #[error("there is no {0}; it must register first")]
    NoSuchChunkserver(ChunkserverId),
    #[error("there is no pool {name:?}")]
    NoSuchPool { name: String },
    #[error("there is no pool yet; create one first")]
    NoPool,
    #[error("{path:?} exists already")]
    PathTaken { path: String },
    #[error("volume {path:?} has a snapshot {name:?} already")]
    SnapshotTaken { path: String, name: String },
    #[error("pool {name:?} exists already")]
    PoolTaken { name: String },
    #[error("there are several pools; name one")]
    PoolNotNamed,
    #[error("{path:?} is a volume, not a folder")]
    NotAFolder { path: String },
    #[error("{path:?} is a folder, not a volume")]
    NotAVolume { path: String },
    #[error("{}: a volume has a multiple of 4 KiB from 1 MiB to 64 TiB", ByteLen(*size_bytes))]
    BadSize { size_bytes: u64 },
    #[error("a volume cannot shrink from {} to {}", ByteLen(*from_bytes), ByteLen(*to_bytes))]
    Shrink { from_bytes: u64, to_bytes: u64 },
    #[error("{0} lies behind the end of the volume")]
    BehindEnd(SegmentIndex),
    #[error("zone and pool of {0} cannot change while it holds copysets")]
    PlaceFixed(ChunkserverId),
    #[error("attached by {by}")]
    Attached { by: String, epoch: AttachEpoch },
    #[error("attached by {by}, which was there a moment ago and may come back")]
    MaybeAttached { by: String },
    #[error("{given} is not the current attach (last: {current})")]
    Fenced { given: AttachEpoch, current: AttachEpoch },
    #[error("it has snapshots: {}", list(names, *more))]
    HasSnapshots { names: Vec<String>, more: bool },
    #[error("it has clones: {}", list(volumes, *more))]
    HasClones { volumes: Vec<String>, more: bool },
    #[error("folder {path:?} is not empty")]
    FolderNotEmpty { path: String },
    #[error("it belongs to another owner")]
    WrongOwner,
    #[error("{depth} layers would lie under it, at most {ANCESTRY_DEPTH_MAX} are allowed; flatten the source first: ogee volume flatten")]
    TooDeep { depth: u32 },
    #[error("a volume has at most {SNAPSHOTS_PER_VOLUME_MAX} snapshots")]
    TooManySnapshots,
    #[error("snapshot {name:?} is not ready: copysets are still being sealed")]
    NotReady { name: String },
    #[error("the volume changed meanwhile ({layer}, {seq}); try again")]
    Moved { layer: LayerId, seq: VolumeSeq },
    #[error("a snapshot of the volume is being made; try again")]
    SnapshotUnderWay,
    #[error("the chunkservers changed meanwhile; try again")]
    PlanOutdated,
    #[error("{0} is not in the volume's pool")]
    ForeignCopyset(CopysetId),
    #[error("the disk belongs to another cluster")]
    WrongCluster,
    #[error("the disk's identity and {0} do not belong together")]
    WrongIdentity(ChunkserverId),
    #[error("the cluster has no identity yet; try again")]
    NotFormed,
    #[error("{id} has {copysets} copysets; give it up first and wait until its replicas have moved: ogee cluster out")]
    ChunkserverInUse { id: ChunkserverId, copysets: u32 },
    #[error("{FLATTENS_MAX} volumes are being flattened; wait for one of them, or cancel it: ogee volume flatten VOLUME --cancel")]
    TooManyFlattens,
    #[error("there is no {0}; those that ended long ago are forgotten")]
    NoSuchServiceTask(ServiceTaskId),
    #[error("its key is that of {0}, which is about something else")]
    ServiceTaskKeyTaken(ServiceTaskId),
    #[error("{SERVICE_TASKS_OPEN_MAX} tasks have not ended; is a snapclone running?")]
    TooManyServiceTasks,
    #[error("{task} has ended or belongs to another instance (fence {fence})")]
    ServiceTaskFenced { task: ServiceTaskId, fence: u64 },
    #[error("{0} was taken or ended meanwhile; try again")]
    ServiceTaskTaken(ServiceTaskId),
    #[error("nobody wished {0} to be cancelled")]
    ServiceTaskNotCancelled(ServiceTaskId),
    #[error("there is no schedule {name:?}")]
    NoSuchSchedule { name: String },
    #[error("there are {SCHEDULES_MAX} schedules already")]
    TooManySchedules,
    #[error("it still stands on backup {backup:016x} of repository {repository:?}; wait until its hydrate task is done: ogee task ls")]
    Hydrating { repository: String, backup: u64 },
    #[error(
        "it stands on a backup in repository {repository:?}, and this client cannot read backups: name the repository's configuration \
         (--repo-config FILE, or OGEE_REPO_CONFIG), or use a newer ogee"
    )]
    NeedsBackup { repository: String },
}

fn list(names: &[String], more: bool) -> String {
    let dots = if more { ", ..." } else { "" };
    format!("{}{dots}", names.join(", "))
}

impl Refusal {
    /// What a program can act on.
    pub(crate) const fn kind(&self) -> MdsErrorKind {
        use MdsErrorKind as Kind;
        match self {
            Self::NoSuchVolume { .. }
            | Self::VolumeGone
            | Self::NoSuchFolder { .. }
            | Self::NoSuchSnapshot { .. }
            | Self::SnapshotGone
            | Self::NoSuchLayer(_)
            | Self::NoSuchChunkserver(_)
            | Self::NoSuchPool { .. }
            | Self::NoSuchServiceTask(_)
            | Self::NoSuchSchedule { .. }
            | Self::NoPool => Kind::NotFound,
            Self::PathTaken { .. }
            | Self::SnapshotTaken { .. }
            | Self::PoolTaken { .. }
            | Self::ServiceTaskKeyTaken(_) => Kind::AlreadyExists,
            Self::PoolNotNamed
            | Self::NotAFolder { .. }
            | Self::NotAVolume { .. }
            | Self::BadSize { .. }
            | Self::Shrink { .. }
            | Self::BehindEnd(_)
            | Self::PlaceFixed(_)
            | Self::ServiceTaskNotCancelled(_)
            | Self::NeedsBackup { .. }
            | Self::ForeignCopyset(_) => Kind::InvalidArgument,
            Self::Attached { .. } => Kind::Attached,
            Self::Fenced { .. } | Self::ServiceTaskFenced { .. } => Kind::Fenced,
            Self::HasSnapshots { .. }
            | Self::HasClones { .. }
            | Self::FolderNotEmpty { .. }
            | Self::Hydrating { .. }
            | Self::ChunkserverInUse { .. } => Kind::InUse,
            Self::WrongOwner => Kind::WrongOwner,
            Self::TooDeep { .. } | Self::TooManySnapshots | Self::TooManyFlattens | Self::TooManyServiceTasks | Self::TooManySchedules => {
                Kind::Limit
            },
            Self::WrongCluster | Self::WrongIdentity(_) => Kind::WrongCluster,
            Self::MaybeAttached { .. }
            | Self::NotReady { .. }
            | Self::Moved { .. }
            | Self::SnapshotUnderWay
            | Self::PlanOutdated
            | Self::ServiceTaskTaken(_)
            | Self::NotFormed => Kind::Unavailable,
        }
    }
}
