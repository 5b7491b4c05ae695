//! Why a chunkserver does not start or stops.

use std::path::PathBuf;

/// What an operator can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonErrorKind {
    /// The configuration has mistakes.
    Config,
    /// The data directory cannot be used: locked, foreign, wiped or damaged.
    DataDir,
    /// The certificates for TLS are of no use.
    Certificate,
    /// The listening address cannot be bound.
    Listen,
    /// The MDS refuses this disk.
    Identity,
    /// The disk failed; the process must not go on.
    Disk,
}

/// A failure of the whole process.
#[derive(Debug, thiserror::Error)]
#[error("{verb} {}", .path.display())]
pub struct DaemonError {
    /// What an operator can act on.
    pub kind: DaemonErrorKind,
    /// What was tried, as "verb object".
    pub verb: &'static str,
    /// The file or directory concerned.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// A reason that is a fixed sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Reason {
    /// Files but no superblock.
    #[error("it holds files but no superblock; give an empty directory, or the whole old one")]
    NotEmpty,
    /// Superblock of wrong length, magic or checksum.
    #[error("the superblock is damaged; the disk can only come back empty, as a new one")]
    DamagedSuperblock,
    /// The mark of a damaged metadata store.
    #[error(
        "its metadata was found damaged (the file says how); its replicas are rebuilt from the others. Give an empty directory: \
         the disk comes back as a new one"
    )]
    Condemned,
    /// A superblock of a newer format.
    #[error("the superblock has a format that this version does not know")]
    NewerSuperblock,
    /// The MDS knows another id for this disk.
    #[error("the MDS knows this disk under another id or cluster")]
    IdentityMismatch,
    /// Deleted, or its disk was taken out.
    #[error("the data directory is gone: its superblock is not there any more")]
    DirectoryGone,
    /// The log can be written no more.
    #[error("the write-ahead log failed; see the log above for the cause")]
    LogPoisoned,
}
