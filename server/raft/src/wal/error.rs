//! [`WalError`]: why the log cannot do what it was asked. Returned by every function of the log.
//!
//! The kinds answer one question each: refuse for now (`NoSpace`), refuse this call (`TooBig`, `Gap`), or stop for good
//! (`Poisoned`, `Io`, `Corrupt`). Clones share their source, because one failed flush fails many appends.

use ogee_disk::{DiskError, DiskErrorKind};
use std::sync::Arc;

/// What a caller can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalErrorKind {
    /// The disk is full and the log could not grow; nothing of the call was written.
    NoSpace,
    /// The entry is larger than the log takes, or there are too many groups; nothing was written.
    TooBig,
    /// The entry does not follow the last one; nothing was written.
    Gap,
    /// An earlier write or flush failed: the log takes nothing any more (INV).
    Poisoned,
    /// The log was closed.
    Closed,
    /// The log on disk cannot be right: opening it is refused, or an entry read back is not what was written.
    Corrupt,
    /// The log on disk was written by a newer version.
    Unsupported,
    /// The disk failed.
    Io,
}

/// Where on disk, when the error is about content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Segment number.
    pub segment: u64,
    /// Byte offset in the segment.
    pub offset: u64,
}

/// A failed operation of the log. `Display` says what was tried and where; the source says why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{op}{}: {kind:?}", place_text(*place))]
pub struct WalError {
    kind: WalErrorKind,
    op: &'static str,
    place: Option<Place>,
    #[source]
    source: Option<Arc<DiskError>>,
}

fn place_text(place: Option<Place>) -> String {
    place.map_or_else(String::new, |p| format!(" at segment {} offset {}", p.segment, p.offset))
}

impl WalError {
    pub(crate) const fn new(kind: WalErrorKind, op: &'static str) -> Self {
        Self { kind, op, place: None, source: None }
    }

    pub(crate) const fn at(kind: WalErrorKind, op: &'static str, segment: u64, offset: u64) -> Self {
        Self { kind, op, place: Some(Place { segment, offset }), source: None }
    }

    pub(crate) fn disk(op: &'static str, source: DiskError) -> Self {
        let kind = match source.kind() {
            DiskErrorKind::NoSpace => WalErrorKind::NoSpace,
            DiskErrorKind::Corrupt => WalErrorKind::Corrupt,
            _ => WalErrorKind::Io,
        };
        Self { kind, op, place: None, source: Some(Arc::new(source)) }
    }

    /// The same failure as seen by those who come later.
    pub(crate) fn poisoned(&self) -> Self {
        Self { kind: WalErrorKind::Poisoned, ..self.clone() }
    }

    /// What a caller can act on.
    #[must_use]
    pub const fn kind(&self) -> WalErrorKind {
        self.kind
    }

    /// What was tried.
    #[must_use]
    pub const fn op(&self) -> &'static str {
        self.op
    }

    /// Where the content is wrong, if it is about content.
    #[must_use]
    pub const fn place(&self) -> Option<Place> {
        self.place
    }
}

impl From<WalError> for std::io::Error {
    /// For openraft, which speaks `io::Error`; the kind is kept where std has a word for it.
    fn from(e: WalError) -> Self {
        let kind = match e.kind {
            WalErrorKind::NoSpace => std::io::ErrorKind::StorageFull,
            WalErrorKind::TooBig | WalErrorKind::Gap => std::io::ErrorKind::InvalidInput,
            WalErrorKind::Corrupt | WalErrorKind::Unsupported => std::io::ErrorKind::InvalidData,
            WalErrorKind::Poisoned | WalErrorKind::Closed | WalErrorKind::Io => std::io::ErrorKind::Other,
        };
        Self::new(kind, e)
    }
}
