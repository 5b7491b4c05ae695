//! What can go wrong with a repository. Every error names the object and what was being done with it.

use std::error::Error;

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoErrorKind {
    /// There is no such repository, backup or object.
    NotFound,
    /// The object's bytes are not what was written: cut short, changed, or of another object.
    Corrupt,
    /// The storage refuses: credentials, permissions.
    Denied,
    /// The storage does not answer, or not in time, after all retries.
    Unavailable,
    /// The storage is full.
    NoSpace,
    /// A key file is missing, not a key, or not the repository's.
    WrongKey,
    /// The place, an option or the repository's format is not one this program can use.
    Unusable,
    /// The run was given up by garbage collection, or its base went; nothing was published.
    Abandoned,
    /// A limit of this program is exceeded.
    Limit,
    /// Anything else.
    Failure,
}

/// A failed operation on a repository.
#[derive(Debug, thiserror::Error)]
#[error("{verb} {object}: {why}")]
pub struct RepoError {
    /// What a caller can act on.
    pub kind: RepoErrorKind,
    /// What was being done: `read`, `write`, `list`, `open`, ...
    pub verb: &'static str,
    /// Which object, as a key within the repository, or the repository's place.
    pub object: String,
    /// What is wrong, and what to do if that is known.
    pub why: &'static str,
    /// What lay below.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

impl RepoError {
    /// An error that starts here.
    pub(crate) fn new(kind: RepoErrorKind, verb: &'static str, object: impl Into<String>, why: &'static str) -> Self {
        Self { kind, verb, object: object.into(), why, source: None }
    }

    /// An object whose bytes are not what was written.
    pub(crate) fn corrupt(object: &str, why: &'static str) -> Self {
        Self::new(RepoErrorKind::Corrupt, "read", object, why)
    }

    /// Adds what lay below.
    pub(crate) fn because(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// A failed operation on a file.
    pub(crate) fn file(verb: &'static str, object: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let (kind, why) = match source.kind() {
            K::NotFound => (RepoErrorKind::NotFound, "it does not exist"),
            K::PermissionDenied | K::ReadOnlyFilesystem => (RepoErrorKind::Denied, "the file system refuses"),
            K::StorageFull | K::QuotaExceeded => (RepoErrorKind::NoSpace, "the file system is full"),
            _ => (RepoErrorKind::Failure, "the file system failed"),
        };
        Self::new(kind, verb, object, why).because(source)
    }
}

/// Copying between a volume and a repository failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The repository failed.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The volume failed.
    #[error(transparent)]
    Volume(#[from] ogee_client::IoError),
    /// Whoever guards the run does not want it to go on; nothing was published by it.
    #[error("the backup was left to another run")]
    Withdrawn,
}
