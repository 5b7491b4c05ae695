//! Rows of chunkservers, pools and copysets. See [`super`] for the rules of all rows.

use ogee_common::id::{ChunkserverId, PoolId, ReplicaId};
use serde::{Deserialize, Serialize};

/// A chunkserver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunkserverRow {
    /// From its superblock.
    pub(crate) uuid: [u8; 16],
    /// Its data address, `ip:port`.
    pub(crate) addr: String,
    /// Name of its pool, which may not exist yet.
    pub(crate) pool: String,
    /// Its failure domain.
    pub(crate) zone: String,
    /// For people.
    pub(crate) host: String,
    /// Bytes, as registered last.
    pub(crate) capacity_bytes: u64,
    /// For people.
    pub(crate) registered_unix_ms: u64,
}

/// The chunkserver with a uuid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunkserverUuidRow(pub(crate) ChunkserverId);

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PoolRow {
    /// Its name.
    pub(crate) name: String,
    /// Replicas of each copyset.
    pub(crate) replicas: u32,
    /// Number of copysets.
    pub(crate) copysets: u32,
}

/// The pool with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PoolNameRow(pub(crate) PoolId);

/// A replica of a copyset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReplicaRow {
    /// Its id, never reused.
    pub(crate) replica: ReplicaId,
    /// Who hosts it.
    pub(crate) chunkserver: ChunkserverId,
    /// Whether it has been seen; from then on it is never made from nothing again (INV).
    pub(crate) created: bool,
}

/// A copyset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopysetRow {
    /// Its pool.
    pub(crate) pool: PoolId,
    /// Counts membership changes.
    pub(crate) conf_epoch: u64,
    /// Its replicas.
    pub(crate) replicas: Vec<ReplicaRow>,
}

/// The chunkserver of the key has a replica of the copyset of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostedRow;

/// Whether a move goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MoveState {
    /// The new replica is made, catches up and becomes a voter instead of the old one.
    Adding,
    /// The new replica is to be taken out of the group again.
    Cancelling,
}

/// A copyset gets a new replica instead of one that is given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MoveRow {
    /// The replica that goes.
    pub(crate) removed: ReplicaId,
    /// The replica that comes.
    pub(crate) added: ReplicaRow,
    /// How far it is.
    pub(crate) state: MoveState,
    /// For people.
    pub(crate) started_unix_ms: u64,
}

/// Why a chunkserver was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OutReason {
    /// It was silent for long; it is taken back when it is heard of again.
    Silent,
    /// A person said so.
    Asked,
}

impl OutReason {
    /// The word in listings.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Asked => "asked",
        }
    }
}

/// The chunkserver of the key is given up: its replicas move away, and it gets no new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OutRow {
    /// Why.
    pub(crate) reason: OutReason,
    /// For people.
    pub(crate) since_unix_ms: u64,
}
