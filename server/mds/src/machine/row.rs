//! The rows of the metadata store: one type per table. The byte formats are in `docs/formats/mds.md`.
//!
//! Used by every file of the state machine through [`super::tx::Tx`]. Invariants: a value is one version byte and then
//! postcard; a field is only ever added together with a new version; table numbers are never reused; golden bytes in
//! `tests/golden/rows.txt` pin every row. Deliberately absent: what the rows mean together, which is said where they change.

use super::key::KeyPart;
use ogee_common::id::{
    AttachEpoch, ChunkserverId, CopysetId, DirectoryId, LayerId, PoolId, SegmentIndex, ServiceTaskId, SnapshotGroupId, VolumeId,
    VolumeSeq, VolumeSnapshotId,
};
use ogee_disk::meta::Table;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

mod backups;
mod groups;
mod options;
mod service_tasks;
mod topology;

pub(crate) use backups::BackupRow;
pub(crate) use groups::{GroupMember, GroupedRow, SnapshotGroupRow};
pub(crate) use options::VolumeOptionsRow;
pub(crate) use service_tasks::{
    EndedServiceTaskRow, OpenServiceTaskRow, ScheduleRow, ServiceTaskKeyRow, ServiceTaskRow, ServiceTaskState,
};
pub(crate) use topology::{
    ChunkserverRow, ChunkserverUuidRow, CopysetRow, HostedRow, MoveRow, MoveState, OutReason, OutRow, PoolNameRow,
    PoolRow, ReplicaRow,
};

/// A row of a table.
pub(crate) trait Row: Serialize + DeserializeOwned {
    /// The key of the row.
    type Key: KeyPart;
    /// Where rows of this type lie.
    const TABLE: Table;
    /// First byte of the value.
    const VERSION: u8 = 1;
}

macro_rules! tables {
    ($($row:ident = $number:literal $name:literal key $key:ty),+ $(,)?) => {
        $(impl Row for $row {
            type Key = $key;
            const TABLE: Table = Table::new($number, $name);
        })+

        /// Every table of the MDS, in order of its number.
        pub(crate) const TABLES: &[Table] = &[$(Table::new($number, $name)),+];
    };
}

tables! {
    AppliedRow = 1 "applied" key (),
    ClusterRow = 2 "cluster" key (),
    CounterRow = 3 "counters" key u8,
    EntryRow = 4 "entries" key (DirectoryId, String),
    DirectoryRow = 5 "directories" key DirectoryId,
    VolumeRow = 6 "volumes" key VolumeId,
    LayerRow = 7 "layers" key LayerId,
    SegmentRow = 8 "segments" key (LayerId, SegmentIndex),
    SnapshotRow = 9 "snapshots" key VolumeSnapshotId,
    SnapshotNameRow = 10 "snapshot names" key (VolumeId, String),
    LayerSnapshotRow = 11 "snapshots of layers" key (LayerId, VolumeSeq),
    ChildRow = 12 "children" key (LayerId, VolumeSeq, LayerId),
    UnsettledRow = 13 "unsettled snapshots" key VolumeSnapshotId,
    TaskRow = 14 "tasks" key u64,
    TaskTodoRow = 15 "tasks by copyset" key (CopysetId, u64),
    ChunkserverRow = 16 "chunkservers" key ChunkserverId,
    ChunkserverUuidRow = 17 "chunkservers by uuid" key [u8; 16],
    PoolRow = 18 "pools" key PoolId,
    PoolNameRow = 19 "pools by name" key String,
    CopysetRow = 20 "copysets" key CopysetId,
    HostedRow = 21 "copysets by chunkserver" key (ChunkserverId, CopysetId),
    RequestRow = 22 "requests" key [u8; 16],
    RequestOrderRow = 23 "requests in order" key u64,
    SnapshotGroupRow = 24 "snapshot groups under way" key SnapshotGroupId,
    GroupedRow = 25 "groups of snapshots" key VolumeSnapshotId,
    MoveRow = 26 "moves" key CopysetId,
    OutRow = 27 "chunkservers out" key ChunkserverId,
    FlattenRow = 28 "flattens" key LayerId,
    VolumeOptionsRow = 29 "volume options" key VolumeId,
    ServiceTaskRow = 32 "service tasks" key ServiceTaskId,
    OpenServiceTaskRow = 33 "open service tasks" key ServiceTaskId,
    EndedServiceTaskRow = 34 "ended service tasks" key u64,
    ServiceTaskKeyRow = 35 "service tasks by key" key [u8; 16],
    ScheduleRow = 36 "schedules" key String,
    BackupRow = 37 "backups below layers" key LayerId,
}

/// How far the log is applied. Written in the batch of every entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AppliedRow {
    /// Term and index of the last entry; `None` before the first.
    pub(crate) pos: Option<(u64, u64)>,
    /// The membership last applied, opaque.
    pub(crate) membership: Vec<u8>,
}

/// The identity of the cluster, written once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClusterRow {
    /// Random.
    pub(crate) cluster: [u8; 16],
    /// When it was formed, for people.
    pub(crate) created_unix_ms: u64,
}

/// Kinds of counters; the number is the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Counter {
    /// [`DirectoryId`]; the root took 1.
    Directory = 1,
    /// [`VolumeId`].
    Volume = 2,
    /// [`LayerId`].
    Layer = 3,
    /// [`VolumeSnapshotId`].
    Snapshot = 4,
    /// Layer tasks.
    Task = 5,
    /// [`ChunkserverId`].
    Chunkserver = 6,
    /// [`PoolId`].
    Pool = 7,
    /// [`CopysetId`].
    Copyset = 8,
    /// [`ogee_common::id::ReplicaId`]: never reused (INV).
    Replica = 9,
    /// Position in the order of deduplicated requests.
    Request = 10,
    /// [`SnapshotGroupId`].
    SnapshotGroup = 11,
    /// [`ServiceTaskId`].
    ServiceTask = 16,
    /// Position in the order in which service tasks ended.
    EndedServiceTask = 17,
}

/// The last id given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CounterRow {
    /// 0: none yet.
    pub(crate) last: u64,
}

/// What a name in a folder stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EntryRow {
    /// A folder.
    Directory(DirectoryId),
    /// A volume.
    Volume(VolumeId),
}

/// A folder; the root has no row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DirectoryRow {
    /// Where it lies.
    pub(crate) parent: DirectoryId,
    /// Its name there.
    pub(crate) name: String,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeRow {
    /// The folder it lies in.
    pub(crate) directory: DirectoryId,
    /// Its name there.
    pub(crate) name: String,
    /// Who may delete it; empty: anyone.
    pub(crate) owner: String,
    /// Bytes, a multiple of 4,096.
    pub(crate) size_bytes: u64,
    /// The pool of its layers.
    pub(crate) pool: PoolId,
    /// The head layer.
    pub(crate) layer: LayerId,
    /// For people.
    pub(crate) created_unix_ms: u64,
    /// `path@snapshot` it was cloned from, as named then; empty if none.
    pub(crate) parent: String,
    /// Snapshots with a visible name.
    pub(crate) snapshots: u32,
    /// The last attach epoch given out; raised, never lowered.
    pub(crate) epoch: AttachEpoch,
    /// The attach for writing that has not ended.
    pub(crate) attached: Option<AttachRow>,
}

/// An attach for writing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttachRow {
    /// Its epoch.
    pub(crate) epoch: AttachEpoch,
    /// The SDK process.
    pub(crate) client: u64,
    /// What it calls itself, for people.
    pub(crate) description: String,
}

/// Where a layer's unwritten blocks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ParentRef {
    /// The parent layer.
    pub(crate) layer: LayerId,
    /// The seq to read it at.
    pub(crate) seq: VolumeSeq,
}

/// A layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRow {
    /// The volume it was made for.
    pub(crate) volume: VolumeId,
    /// Where its segments are allocated.
    pub(crate) pool: PoolId,
    /// The seq that writes carry now.
    pub(crate) seq: VolumeSeq,
    /// What it stands on.
    pub(crate) parent: Option<ParentRef>,
    /// Layers below it when it was made.
    pub(crate) depth: u32,
    /// Whether it is a volume's head.
    pub(crate) head: bool,
    /// Snapshots on it, hidden ones included.
    pub(crate) snapshots: u32,
    /// Segments placed for this layer itself.
    pub(crate) segments: u32,
    /// Segments that its ancestors had placed when it was made.
    pub(crate) inherited: u32,
    /// An attach ended without a detach while this was the head: its client may still send writes.
    pub(crate) unclean: bool,
    /// Lower seqs are refused, or are being sealed, in every copyset of the layer; 0: never sealed.
    pub(crate) min_seq: VolumeSeq,
    /// Seal tasks of snapshots that are not done.
    pub(crate) seals: u32,
    /// Snapshots in state [`SnapshotState::Confirming`].
    pub(crate) confirming: u32,
    /// Being deleted: only the task that does so refers to it.
    pub(crate) dropping: bool,
}

/// The placement of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentRow {
    /// A copyset per chunk, in chunk order.
    pub(crate) copysets: Vec<CopysetId>,
    /// The layer's seq when it was placed: a child sees it if it stands on this seq or a later one.
    pub(crate) seq: VolumeSeq,
    /// The seal that must be done before a writer of the layer may see it.
    pub(crate) sealing: Option<u64>,
}

/// How a snapshot's exactness was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Hold {
    /// The client held its writes.
    Held,
    /// Nobody was attached.
    Detached,
    /// Older writes are refused by every copyset.
    Bypassed,
}

/// Whether a snapshot may be read.
///
/// ```text
///            CreateSnapshot             ConfirmSnapshot
///   (none) ──── held ────> Confirming ───────────────────> Ready
///      ├─── detached ──────────│───────────────────────────> ^
///      └─── bypassed ──> Sealing <─ SealSnapshot             │
///                           └──────── seal task done ────────┘
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SnapshotState {
    /// Committed under a hold; that the hold lasted is not confirmed yet. Or of a group that is not confirmed yet.
    Confirming,
    /// This seal task must be done first.
    Sealing(u64),
    /// Immutable.
    Ready,
}

/// A volume snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRow {
    /// Whose it is.
    pub(crate) volume: VolumeId,
    /// Its name in the volume; hidden ones begin with a dot.
    pub(crate) name: String,
    /// Where its data lies.
    pub(crate) layer: LayerId,
    /// The seq to read at.
    pub(crate) seq: VolumeSeq,
    /// Size of the volume then, bytes.
    pub(crate) size_bytes: u64,
    /// Segments placed then, those of ancestors included.
    pub(crate) segments: u32,
    /// For people.
    pub(crate) created_unix_ms: u64,
    /// Whether it may be read.
    pub(crate) state: SnapshotState,
    /// How exactness was got.
    pub(crate) hold: Hold,
    /// Not listed; removed when nothing refers to it.
    pub(crate) hidden: bool,
    /// Layers of other volumes on it.
    pub(crate) clones: u32,
    /// Layers of its own volume on it.
    pub(crate) rollbacks: u32,
}

/// The snapshot with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotNameRow(pub(crate) VolumeSnapshotId);

/// The snapshot at a seq of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerSnapshotRow(pub(crate) VolumeSnapshotId);

/// A layer stands on `(layer, seq)` of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChildRow;

/// A snapshot that the leader must look after: confirming, or hidden without a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnsettledRow;

/// What every copyset of a layer must do once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TaskKind {
    /// Refuse writes with a lower seq.
    Seal(VolumeSeq),
    /// Delete the layer.
    DropLayer,
    /// Merge the versions in `(after, seq]` into the one in `(seq, next]`.
    DropVersion {
        /// The next older seq that is needed; 0 if none.
        after: VolumeSeq,
        /// The seq that is not needed any more.
        seq: VolumeSeq,
        /// The next newer seq that is needed.
        next: VolumeSeq,
    },
    /// Copy into the layer what it reads from its ancestors.
    Flatten {
        /// The lowest seq of the layer that is still read.
        needed: VolumeSeq,
    },
}

/// What happens when a task is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TaskEffect {
    /// Nothing.
    None,
    /// The snapshot is ready.
    SnapshotReady(VolumeSnapshotId),
    /// The segment may be used.
    SegmentOpen(SegmentIndex),
    /// The layer's rows go.
    LayerGone,
    /// The layer lets go of its parent.
    Flattened,
}

/// A layer task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TaskRow {
    /// The layer.
    pub(crate) layer: LayerId,
    /// What to do.
    pub(crate) kind: TaskKind,
    /// What then.
    pub(crate) effect: TaskEffect,
    /// Copysets that have not done it.
    pub(crate) remaining: u32,
}

/// The task of the key is still to be done by the copyset of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TaskTodoRow;

/// A flatten of the layer of the key that is under way. See [`super::flatten`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FlattenRow {
    /// The task that does it.
    pub(crate) task: u64,
    /// Copysets that it began with.
    pub(crate) total: u32,
    /// For people.
    pub(crate) started_unix_ms: u64,
}

/// The answer that a request got, given again when it is repeated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RequestRow {
    /// The encoded answer.
    pub(crate) reply: Vec<u8>,
}

/// The request at a position of the order; the oldest are forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RequestOrderRow(pub(crate) [u8; 16]);
