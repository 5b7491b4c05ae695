//! [`ChunkStoreError`]: why the chunk store cannot go on, and how blocking work is handed to other threads.
//!
//! Every kind but [`ChunkStoreErrorKind::Busy`] and [`ChunkStoreErrorKind::Fetch`] ends the replica: nothing that
//! failed on the disk is retried (a full disk is, by the caller that knows the operation). Damaged *pages* are not
//! errors of this type: they are answers of a read.

use ogee_disk::{DiskError, DiskErrorKind, StoreError, StoreErrorKind};
use ogee_proto::data::DecodeError;

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkStoreErrorKind {
    /// A data file or the metadata store failed; the replica is out.
    Disk,
    /// The disk is full; the same operation may succeed later.
    NoSpace,
    /// A metadata record or a log entry is damaged; the replica is out, and is rebuilt from the others.
    Corrupt,
    /// The metadata store itself is damaged: the whole disk is out.
    MetaCorrupt,
    /// The pages are being written by an entry that cannot finish now; try later.
    Busy,
    /// What another replica sent cannot be used; the install fails and is tried again.
    Fetch,
    /// A log entry is of a kind that this build does not know; the replica stops, and goes on where it was under a newer one.
    UnknownEntry,
    /// The process is ending.
    Stopped,
}

/// A failure of the chunk store.
#[derive(Debug, thiserror::Error)]
pub enum ChunkStoreError {
    /// A data file.
    #[error("use data file")]
    Disk(#[from] DiskError),
    /// The metadata store.
    #[error("use metadata store")]
    Meta(#[from] StoreError),
    /// A record of the metadata store is damaged or missing.
    #[error("{what} is damaged or missing")]
    Record {
        /// Which record.
        what: &'static str,
    },
    /// The data of a committed entry does not match its checksums: the log is damaged.
    #[error("log entry {index} does not match its checksums")]
    Entry {
        /// Raft index.
        index: u64,
    },
    /// A committed entry cannot be decoded: the leader is of a newer build.
    #[error("log entry {index} is of a kind that this build does not know; the replica stops until the chunkserver is upgraded")]
    UnknownEntry {
        /// Raft index.
        index: u64,
        /// What is not known.
        #[source]
        source: DecodeError,
    },
    /// A flush of data files failed before; nothing may be called durable any more.
    #[error("an earlier flush of data files failed")]
    FlushFailed,
    /// The pages are being written.
    #[error("pages are being written and the disk is full")]
    Busy,
    /// An answer of another replica is malformed or does not match what was asked.
    #[error("fetched {what} cannot be used")]
    Fetch {
        /// Which part.
        what: &'static str,
    },
    /// A blocking task was cancelled or panicked.
    #[error("blocking task ended early")]
    Stopped,
}

impl ChunkStoreError {
    /// What a caller can act on.
    #[must_use]
    pub fn kind(&self) -> ChunkStoreErrorKind {
        match self {
            Self::Disk(e) if e.kind() == DiskErrorKind::NoSpace => ChunkStoreErrorKind::NoSpace,
            Self::Meta(e) if e.kind() == StoreErrorKind::NoSpace => ChunkStoreErrorKind::NoSpace,
            Self::Meta(e) if e.kind() == StoreErrorKind::Corrupt => ChunkStoreErrorKind::MetaCorrupt,
            Self::Disk(_) | Self::Meta(_) | Self::FlushFailed => ChunkStoreErrorKind::Disk,
            Self::Record { .. } | Self::Entry { .. } => ChunkStoreErrorKind::Corrupt,
            Self::UnknownEntry { .. } => ChunkStoreErrorKind::UnknownEntry,
            Self::Busy => ChunkStoreErrorKind::Busy,
            Self::Fetch { .. } => ChunkStoreErrorKind::Fetch,
            Self::Stopped => ChunkStoreErrorKind::Stopped,
        }
    }
}

/// Runs `work` on the blocking pool: for flushes, cold reads and anything else that may wait for the device.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ChunkStoreError> + Send + 'static,
) -> Result<T, ChunkStoreError> {
    ogee_common::sim::spawn_blocking(work).await.map_err(|_| ChunkStoreError::Stopped)?
}
