//! The backup that a layer stands on. See [`crate::machine::backups`]; invariants and format as in [`super`].

use serde::{Deserialize, Serialize};

/// The layer of the key stands on a backup: what no version of it has is read there. A layer without a row, as every one of an
/// older build, stands on none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackupRow {
    /// The repository's name in the configuration of those who read it.
    pub(crate) repository: String,
    /// The backup's identity: the number of its run.
    pub(crate) backup: u64,
    /// Its Merkle root.
    pub(crate) root: [u8; 32],
    /// SHA-256 over the places of its leaves: what is read on demand is proved by it, before all leaves are known.
    pub(crate) leaves: [u8; 32],
    /// Bytes that it holds, from the start of the volume on.
    pub(crate) size_bytes: u64,
    /// Bytes of one of its blocks.
    pub(crate) block_bytes: u32,
}
