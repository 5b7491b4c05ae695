//! Rows of group snapshots. See [`crate::machine::groups`]; invariants and format as in [`super`].

use super::Hold;
use ogee_common::id::{AttachEpoch, SnapshotGroupId, VolumeSnapshotId};
use serde::{Deserialize, Serialize};

/// A group that is committed and neither confirmed nor dropped: then the row goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotGroupRow {
    /// Its snapshots, in the order of the command.
    pub(crate) members: Vec<GroupMember>,
}

/// One snapshot of a group that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupMember {
    /// Which.
    pub(crate) snapshot: VolumeSnapshotId,
    /// What its volume's client did when it was committed.
    pub(crate) hold: Hold,
    /// The volume's last attach when it was committed.
    pub(crate) epoch: AttachEpoch,
    /// The task that seals the volume's layer behind the snapshot, if one is needed.
    pub(crate) sealing: Option<u64>,
}

/// The group that the snapshot of the key was taken in. Lives as long as the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupedRow(pub(crate) SnapshotGroupId);
