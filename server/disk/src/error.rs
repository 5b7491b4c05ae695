//! [`DiskError`]: what failed, doing what, on which path. Every function of this crate that touches a file returns it.
//!
//! The kind is decided here once, from the errno, so that callers can act on it without knowing the operating system:
//! `NoSpace` is answered by refusing work, `WouldBlock` by taking the slow path, all others poison what they hit.
//! Deliberately absent: retries. A failed write or flush is never repeated (ARCHITECTURE section 3, INV).

use std::io;
use std::path::{Path, PathBuf};

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskErrorKind {
    /// The file system or quota is full. Nothing of the operation may be relied on.
    NoSpace,
    /// The device or file system failed.
    Io,
    /// What was read cannot be right: shorter than it must be, or longer than its limit.
    Corrupt,
    /// The file or directory does not exist.
    NotFound,
    /// The file exists already.
    AlreadyExists,
    /// Another process, or another owner in this process, holds the lock.
    Locked,
    /// The operation would have had to wait.
    WouldBlock,
}

/// A failed disk operation. `Display` says operation and path; the source says why.
#[derive(Debug, thiserror::Error)]
#[error("{op} {}: {kind:?}", path.display())]
pub struct DiskError {
    kind: DiskErrorKind,
    op: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl DiskError {
    /// Wraps an error of the operating system; the kind follows from it.
    #[must_use]
    pub fn new(op: &'static str, path: &Path, source: io::Error) -> Self {
        Self { kind: kind_of(&source), op, path: path.to_owned(), source }
    }

    /// An error whose kind the operating system does not know.
    #[must_use]
    pub fn with_kind(kind: DiskErrorKind, op: &'static str, path: &Path, source: io::Error) -> Self {
        Self { kind, op, path: path.to_owned(), source }
    }

    /// What a caller can act on.
    #[must_use]
    pub const fn kind(&self) -> DiskErrorKind {
        self.kind
    }

    /// The operation, as verb and object.
    #[must_use]
    pub const fn op(&self) -> &'static str {
        self.op
    }

    /// The file or directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn kind_of(e: &io::Error) -> DiskErrorKind {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            DiskErrorKind::NoSpace
        }
        io::ErrorKind::NotFound => DiskErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => DiskErrorKind::AlreadyExists,
        io::ErrorKind::WouldBlock => DiskErrorKind::WouldBlock,
        io::ErrorKind::UnexpectedEof => DiskErrorKind::Corrupt,
        _ => DiskErrorKind::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn kinds_follow_errno() {
        for (errno, kind) in [
            (libc::ENOSPC, DiskErrorKind::NoSpace),
            (libc::EDQUOT, DiskErrorKind::NoSpace),
            (libc::EIO, DiskErrorKind::Io),
            (libc::ENOENT, DiskErrorKind::NotFound),
            (libc::EEXIST, DiskErrorKind::AlreadyExists),
            (libc::EAGAIN, DiskErrorKind::WouldBlock),
        ] {
            let e = DiskError::new("write page", Path::new("/x"), io::Error::from_raw_os_error(errno));
            assert_eq!(e.kind(), kind);
        }
    }

    #[test]
    fn display_names_operation_and_path_but_not_the_source() {
        let e = DiskError::new("write page", Path::new("/data/x"), io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(e.to_string(), "write page /data/x: Io");
        assert!(e.source().is_some());
    }
}
