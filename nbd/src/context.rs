//! Metadata contexts: which an export has, which of them a query means, and what a device's extents are in each.
//!
//! Called by `handshake.rs` (names, queries) and `execute.rs` (extents). The first context of every export is
//! `base:allocation`; the others are `ogee:changed:SNAPSHOT`, as the export names them. In those, bit 0 says that the range
//! may differ from the snapshot, the other bits are 0: what QEMU's `qemu:dirty-bitmap:` means by "dirty". Invariants: pure; a
//! context has the same number on every connection to a server; neighbours that are alike are told as one.

use crate::handshake::ExportInfo;
use crate::wire::{self, STATE_CHANGED, STATE_HOLE, STATE_ZERO};
use ogee_client::{Extent, ExtentKind};
use ogee_common::limits::NBD_CHANGED_CONTEXTS_MAX;

const _: () = assert!(NBD_CHANGED_CONTEXTS_MAX < u64::BITS as usize);

/// A set of contexts of one export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contexts(u64);

impl Contexts {
    /// `base:allocation` alone.
    pub const ALLOCATION: Self = Self(1);

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// With one more: 0 is `base:allocation`, `i` the export's context `i - 1`.
    #[must_use]
    pub const fn with(self, context: usize) -> Self {
        Self(self.0 | 1 << context)
    }

    /// The contexts in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..=NBD_CHANGED_CONTEXTS_MAX).filter(move |context| self.0 >> context & 1 == 1)
    }
}

/// The number of a context in replies.
pub(crate) fn id(context: usize) -> u32 {
    wire::BASE_ALLOCATION_ID + u32::try_from(context).expect("contexts are bounded by NBD_CHANGED_CONTEXTS_MAX")
}

fn names(export: &ExportInfo) -> impl Iterator<Item = (usize, &str)> {
    let changed = export.contexts.iter().take(NBD_CHANGED_CONTEXTS_MAX).map(String::as_str);
    std::iter::once(wire::BASE_ALLOCATION).chain(changed).enumerate()
}

/// The contexts that a listing is about: all, those of a name, and those whose name begins with a query that ends in a colon.
pub(crate) fn listed<'a>(export: &'a ExportInfo, queries: &'a [&str]) -> impl Iterator<Item = (usize, &'a str)> {
    let is_meant = |name: &str, query: &str| query == name || (query.ends_with(':') && name.starts_with(query));
    names(export).filter(move |(_, name)| queries.is_empty() || queries.iter().any(|query| is_meant(name, query)))
}

/// The contexts that are chosen: by their names.
pub(crate) fn chosen<'a>(export: &'a ExportInfo, queries: &'a [&str]) -> impl Iterator<Item = (usize, &'a str)> {
    names(export).filter(move |(_, name)| queries.contains(name))
}

/// A run of bytes and its flags in a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes, not 0.
    pub len: u64,
    /// As the context defines them.
    pub flags: u32,
}

/// What is told in one context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextExtents {
    /// Its number.
    pub id: u32,
    /// Extents from the request's offset on; at least one.
    pub extents: Vec<StatusExtent>,
}

/// Adds a device's extents to those told so far.
pub(crate) fn tell(context: usize, told: &mut Vec<StatusExtent>, extents: &[Extent]) {
    for extent in extents.iter().filter(|extent| extent.len > 0) {
        let flags = match (context, extent.kind) {
            (0, ExtentKind::Data) => 0,
            (0, ExtentKind::Zero | ExtentKind::Hole) => STATE_HOLE | STATE_ZERO,
            _ if extent.changed => STATE_CHANGED,
            _ => 0,
        };
        match told.last_mut().filter(|last| last.flags == flags) {
            Some(last) => last.len += extent.len,
            None => told.push(StatusExtent { len: extent.len, flags }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alike_in_a_context_is_told_as_one() {
        let extent = |len, kind, changed| Extent { len, kind, changed };
        let (data, zero, hole) = (ExtentKind::Data, ExtentKind::Zero, ExtentKind::Hole);
        let all = [extent(1, data, true), extent(2, zero, true), extent(3, hole, false), extent(4, data, false)];
        let told = |context| {
            let mut told = vec![];
            all.iter().for_each(|extent| tell(context, &mut told, std::slice::from_ref(extent)));
            told.into_iter().map(|e| (e.len, e.flags)).collect::<Vec<_>>()
        };
        assert_eq!(told(0), [(1, 0), (5, 3), (4, 0)]);
        assert_eq!(told(1), [(3, 1), (7, 0)]);
    }
}
