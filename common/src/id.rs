//! Identities. Each is its own type, so that a layer can never be passed where a volume is meant.
//!
//! All are allocated by the MDS, start at 1 and are never reused; 0 is never a valid id. The one exception is
//! [`ChunkIndex`] and [`SegmentIndex`], which are positions and start at 0.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $int:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl $name {
            /// The bare integer, for wire and disk formats.
            #[must_use]
            pub const fn get(self) -> $int {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id_type!(
    /// A volume: a named virtual disk. Survives rename, rollback and resize.
    VolumeId, u64, "vol-"
);
id_type!(
    /// A layer: the chunks written under one identity.
    LayerId, u64, "layer-"
);
id_type!(
    /// A volume snapshot as an object with a name.
    VolumeSnapshotId, u64, "snap-"
);
id_type!(
    /// Volume snapshots of several volumes that were taken as one cut.
    SnapshotGroupId, u64, "group-"
);
id_type!(
    /// A service task: work that one instance of a daemon such as snapclone does, kept by the MDS until it is done.
    ServiceTaskId, u64, "task-"
);
id_type!(
    /// A copyset: one Raft group of chunkservers.
    CopysetId, u32, "copyset-"
);
id_type!(
    /// A chunkserver: one process, one data directory, one superblock.
    ChunkserverId, u32, "cs-"
);
id_type!(
    /// One replica of one Raft group in one incarnation. Never reused, even on the same disk (INV).
    ReplicaId, u64, "replica-"
);
id_type!(
    /// A pool of chunkservers over which copysets are made.
    PoolId, u32, "pool-"
);
id_type!(
    /// A directory of the namespace; the root is 1.
    DirectoryId, u64, "dir-"
);
id_type!(
    /// Position of a chunk in its layer, from 0; unit [`crate::limits::CHUNK_BYTES`].
    ChunkIndex, u32, "#"
);
id_type!(
    /// Position of a segment in its layer, from 0; unit [`crate::limits::SEGMENT_BYTES`].
    SegmentIndex, u32, "seg#"
);
id_type!(
    /// Counter of a layer, from 1, raised by each volume snapshot; every write carries it.
    VolumeSeq, u64, "seq-"
);
id_type!(
    /// Raised by the MDS at each attach for writing, from 1; the fence. 0 is a read-only attach.
    AttachEpoch, u64, "attach-epoch-"
);
id_type!(
    /// A Raft term.
    Term, u64, "term-"
);
id_type!(
    /// One SDK session: the unit that orders its own retries. Random, 64 bits.
    SessionId, u64, "session-"
);
id_type!(
    /// Counts the connections of one session to one chunkserver, from 1; a newer one retires older ones.
    ConnectionGeneration, u64, "gen-"
);
