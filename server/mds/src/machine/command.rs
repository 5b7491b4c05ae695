//! The commands of the MDS's Raft log and their answers. Byte format: one version byte, then postcard; see
//! `docs/formats/mds.md`; golden bytes in `tests/golden/commands.txt`.
//!
//! Invariant: everything that a replica cannot compute by itself (time, random choices, which client is alive) is in
//! the command, so that applying it gives the same rows everywhere. Names were checked where they entered.

use super::row::{BackupRow, Hold, OutReason, ServiceTaskRow, VolumeOptionsRow};
use super::schedules::ScheduleCommand;
use super::service_tasks::ServiceTaskCommand;
use crate::refusal::Refusal;
use ogee_common::id::{
    AttachEpoch, ChunkserverId, CopysetId, LayerId, PoolId, ReplicaId, SegmentIndex, ServiceTaskId, SnapshotGroupId,
    VolumeId, VolumeSeq, VolumeSnapshotId,
};
use ogee_common::qos::LimitChanges;
use serde::{Deserialize, Serialize};

/// Version of the log's commands.
pub(crate) const COMMAND_VERSION: u8 = 1;

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Envelope {
    /// The leader's time, for people.
    pub(crate) now_unix_ms: u64,
    /// Chosen by the client; a repeated request gets the first one's answer.
    pub(crate) request: Option<[u8; 16]>,
    /// What to do.
    pub(crate) command: Command,
}

/// What the leader took for granted when it asked for a snapshot; if it does not hold any more, nothing happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Expected {
    /// The head layer.
    pub(crate) layer: LayerId,
    /// Its seq.
    pub(crate) seq: VolumeSeq,
    /// The attach that was held or bypassed; `None`: nobody is attached.
    pub(crate) attached: Option<AttachEpoch>,
}

/// One volume of a group snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupPart {
    /// The volume.
    pub(crate) volume: VolumeId,
    /// The snapshot's name.
    pub(crate) name: String,
    /// What the leader saw.
    pub(crate) expected: Expected,
    /// What the volume's client did.
    pub(crate) hold: Hold,
}

/// A chunkserver that presents itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registration {
    /// From its superblock.
    pub(crate) uuid: [u8; 16],
    /// From its superblock; 0 on a new disk.
    pub(crate) id: ChunkserverId,
    /// From its superblock; `None` on a new disk.
    pub(crate) cluster: Option<[u8; 16]>,
    /// Data address.
    pub(crate) addr: String,
    /// Name of the pool.
    pub(crate) pool: String,
    /// Failure domain.
    pub(crate) zone: String,
    /// For people.
    pub(crate) host: String,
    /// Bytes.
    pub(crate) capacity_bytes: u64,
}

/// What can be asked of the state machine. New ones are added at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Gives the cluster its identity, once.
    FormCluster { cluster: [u8; 16] },
    /// Makes a volume.
    CreateVolume { path: String, size_bytes: u64, owner: String, create_parents: bool, pool: String },
    /// Deletes a volume or an empty folder.
    DeleteVolume { path: String, owner: String },
    /// Moves a volume.
    RenameVolume { path: String, new_path: String, create_parents: bool },
    /// Grows a volume.
    ExtendVolume { path: String, size_bytes: u64 },
    /// Makes a snapshot; without a name a hidden one for a clone.
    CreateSnapshot { volume: VolumeId, name: Option<String>, expected: Expected, hold: Hold },
    /// The hold lasted until the snapshot was committed.
    ConfirmSnapshot { snapshot: VolumeSnapshotId },
    /// Nobody knows whether the hold lasted: seal instead.
    SealSnapshot { snapshot: VolumeSnapshotId },
    /// Deletes a snapshot by name.
    DeleteSnapshot { path: String, name: String },
    /// Removes a hidden snapshot that nothing refers to.
    ReapSnapshot { snapshot: VolumeSnapshotId },
    /// Makes a volume on a snapshot.
    CloneVolume { snapshot: VolumeSnapshotId, new_path: String, owner: String, create_parents: bool },
    /// Puts a volume back to one of its snapshots, ending this attach.
    RollbackVolume { path: String, snapshot: String, ends: Option<AttachEpoch> },
    /// Attaches for writing, taking over from this attach.
    AttachVolume { path: String, client: u64, description: String, takes_over: Option<AttachEpoch> },
    /// Ends an attach whose client has drained.
    DetachVolume { volume: VolumeId, epoch: AttachEpoch },
    /// Places a segment.
    AllocateSegment {
        volume: VolumeId,
        epoch: AttachEpoch,
        layer: LayerId,
        index: SegmentIndex,
        copysets: Vec<CopysetId>,
    },
    /// A chunkserver presents itself.
    RegisterChunkserver(Registration),
    /// These replicas exist on their disks.
    ReplicasCreated { replicas: Vec<(CopysetId, ReplicaId)> },
    /// These copysets have done these tasks.
    TasksDone { done: Vec<(u64, CopysetId)> },
    /// Makes a pool with these copysets.
    CreatePool { name: String, replicas: u32, copysets: Vec<Vec<ChunkserverId>> },
    /// Ends an attach whose client has drained, except for writes that it gave up without knowing their outcome.
    DetachUnclean { volume: VolumeId, epoch: AttachEpoch },
    /// Makes snapshots of several volumes as one cut, all or none.
    CreateGroup { parts: Vec<GroupPart> },
    /// The cut is exact: its snapshots are.
    ConfirmGroup { group: SnapshotGroupId },
    /// Nobody knows whether the cut is exact: its snapshots go. What was confirmed stays.
    DropGroup { group: SnapshotGroupId },
    /// Gives a chunkserver up, or with `None` takes it back.
    SetOut { chunkserver: ChunkserverId, reason: Option<OutReason> },
    /// Begins to replace a replica by one elsewhere.
    StartMove { copyset: CopysetId, conf_epoch: u64, removed: ReplicaId, to: ChunkserverId },
    /// Gives a move up.
    CancelMove { copyset: CopysetId, added: ReplicaId },
    /// The group has the new members.
    FinishMove { copyset: CopysetId, added: ReplicaId },
    /// The group has the old members again.
    EndMove { copyset: CopysetId, added: ReplicaId },
    /// Forgets a chunkserver that is out and has nothing.
    RemoveChunkserver { chunkserver: ChunkserverId },
    /// Has the head of a volume copy what it reads from its ancestors, or stops that.
    FlattenVolume { path: String, cancels: bool },
    /// Makes a volume with options that are not the default ones.
    CreateVolumeWith {
        path: String,
        size_bytes: u64,
        owner: String,
        create_parents: bool,
        pool: String,
        options: VolumeOptionsRow,
    },
    /// Sets some limits of a volume.
    SetLimits { path: String, changes: LimitChanges },
    /// Something about service tasks.
    ServiceTask(ServiceTaskCommand),
    /// Something about schedules.
    Schedule(ScheduleCommand),
    /// Makes a volume that stands on a backup.
    CreateLazyVolume {
        path: String,
        size_bytes: u64,
        owner: String,
        create_parents: bool,
        pool: String,
        options: VolumeOptionsRow,
        backup: BackupRow,
        /// Placements that its segments take in turn.
        placements: Vec<Vec<CopysetId>>,
    },
    /// A layer needs the backup that it stands on no more.
    CompleteBackup { layer: LayerId },
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// Done; there is nothing to say.
    Done,
    /// The volume as it is now.
    Volume(Box<VolumeInfo>),
    /// The snapshot as it is now.
    Snapshot(Box<SnapshotInfo>),
    /// The attach.
    Attached(Box<Grant>),
    /// The placement of the segment, and the seal that must be done before it is used.
    Segment { copysets: Vec<CopysetId>, sealing: Option<u64> },
    /// The chunkserver and its cluster.
    Registered { id: ChunkserverId, cluster: [u8; 16] },
    /// The pool.
    Pool(PoolId),
    /// The snapshots of the group as they are now.
    Group { group: SnapshotGroupId, snapshots: Vec<SnapshotInfo> },
    /// The service task as it is now.
    ServiceTask(Box<(ServiceTaskId, ServiceTaskRow)>),
}

/// A volume as callers see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeInfo {
    pub(crate) id: VolumeId,
    pub(crate) path: String,
    pub(crate) owner: String,
    pub(crate) size_bytes: u64,
    pub(crate) layer: LayerId,
    pub(crate) seq: VolumeSeq,
    pub(crate) created_unix_ms: u64,
    pub(crate) parent: String,
    pub(crate) allocated_segments: u64,
    pub(crate) snapshots: u32,
    pub(crate) epoch: AttachEpoch,
    pub(crate) attached_by: Option<String>,
    pub(crate) depth: u32,
    pub(crate) pool: PoolId,
}

/// A snapshot as callers see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotInfo {
    pub(crate) id: VolumeSnapshotId,
    pub(crate) name: String,
    pub(crate) volume: VolumeId,
    pub(crate) volume_path: String,
    pub(crate) layer: LayerId,
    pub(crate) seq: VolumeSeq,
    pub(crate) size_bytes: u64,
    pub(crate) created_unix_ms: u64,
    pub(crate) ready: bool,
    pub(crate) confirming: bool,
    pub(crate) children: u32,
    pub(crate) hold: Hold,
    /// What it was taken together with.
    pub(crate) group: Option<SnapshotGroupId>,
}

/// What an attach may do, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Grant {
    pub(crate) volume: VolumeInfo,
    pub(crate) layer: LayerId,
    pub(crate) seq: VolumeSeq,
    pub(crate) epoch: AttachEpoch,
    pub(crate) size_bytes: u64,
    pub(crate) ancestry: Vec<(LayerId, VolumeSeq)>,
    pub(crate) cluster: [u8; 16],
    /// What the last of the ancestry, or the layer without one, stands on. An answer to an attach is never stored, so its form may change.
    pub(crate) backup: Option<(LayerId, BackupRow)>,
}

/// The answer to a command.
pub(crate) type Answer = Result<Outcome, Refusal>;

/// Bytes that are no command or answer of this build.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    /// Nothing at all.
    #[error("empty")]
    Empty,
    /// Written by a newer build.
    #[error("version {0}, this build knows {COMMAND_VERSION}")]
    Version(u8),
    /// Not what the version says.
    #[error("malformed")]
    Malformed(#[from] postcard::Error),
    /// Bytes behind the end.
    #[error("trailing bytes")]
    Trailing,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_extend(value, vec![COMMAND_VERSION]).expect("plain data always encodes")
}

fn decode<'b, T: Deserialize<'b>>(bytes: &'b [u8]) -> Result<T, DecodeError> {
    let (version, body) = bytes.split_first().ok_or(DecodeError::Empty)?;
    if *version != COMMAND_VERSION {
        return Err(DecodeError::Version(*version));
    }
    let (value, rest) = postcard::take_from_bytes(body)?;
    if rest.is_empty() { Ok(value) } else { Err(DecodeError::Trailing) }
}

impl Envelope {
    /// The bytes of the log entry.
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a log entry.
    ///
    /// # Errors
    /// [`DecodeError`]: the entry was written by a newer build; the replica stops.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        decode(bytes)
    }
}

/// The bytes of an answer.
pub(crate) fn encode_answer(answer: &Answer) -> Vec<u8> {
    encode(answer)
}

/// Reads an answer.
///
/// # Errors
/// [`DecodeError`].
pub(crate) fn decode_answer(bytes: &[u8]) -> Result<Answer, DecodeError> {
    decode(bytes)
}
