//! One group's log in memory: which entries are live and where each one is. Pure; owned by [`super::core::Core`].
//!
//! ```text
//!   purged      base                     next
//!     |          | live entries           |
//!  ...p | p+1 .. b, b+1, ..., b+n-1       | b+n
//! ```
//! Invariants: live entries are contiguous; `base == purged + 1` once anything was purged; a slot has a location from
//! the moment its batch was encoded. During recovery a hole may appear in front of `base`, because the segments that
//! held those entries are gone; a later purge or truncation must cover it, else the log is refused. Deliberately absent: IO.

use super::format::{EntryKind, LogPoint, SavedVote};
use bytes::Bytes;
use std::collections::VecDeque;

/// Where an entry's record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) segment: u64,
    /// Byte offset of the record header in the segment.
    pub(super) offset: u64,
}

/// A live entry.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) term: u64,
    pub(super) kind: EntryKind,
    /// Payload bytes.
    pub(super) len: usize,
    /// Number of the append over the whole log: tells apart entries of the same index.
    pub(super) stamp: u64,
    pub(super) location: Option<Location>,
    /// The payload while it is cached.
    pub(super) cached: Option<Bytes>,
}

/// Entries per segment that are live no more, in order.
pub(super) type Releases = Vec<(u64, u64)>;

/// One group.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) vote: Option<SavedVote>,
    pub(super) purged: Option<LogPoint>,
    pub(super) base: Option<u64>,
    pub(super) slots: VecDeque<Slot>,
    /// Recovery only: entries from here up to `base` are missing and not yet known to be purged or truncated.
    pub(super) hole: Option<u64>,
    /// An entry was read back and was not what had been written.
    pub(super) damaged: bool,
}

impl Group {
    /// The index the next entry must have; `None` when any will do.
    pub(super) fn next(&self) -> Option<u64> {
        self.base.map(|b| b + self.slots.len() as u64)
    }

    /// The last live entry, or what was purged last.
    pub(super) fn last(&self) -> Option<LogPoint> {
        match (self.slots.back(), self.next()) {
            (Some(slot), Some(next)) => Some(LogPoint { term: slot.term, index: next - 1 }),
            _ => self.purged,
        }
    }

    pub(super) fn slot(&self, index: u64) -> Option<&Slot> {
        let at = index.checked_sub(self.base?)?;
        self.slots.get(usize::try_from(at).ok()?)
    }

    pub(super) fn slot_mut(&mut self, index: u64) -> Option<&mut Slot> {
        let at = index.checked_sub(self.base?)?;
        self.slots.get_mut(usize::try_from(at).ok()?)
    }

    /// Appends an entry at [`Group::next`].
    pub(super) fn push(&mut self, index: u64, slot: Slot) {
        debug_assert!(self.next().is_none_or(|next| next == index), "logs have no holes");
        self.base.get_or_insert(index);
        self.slots.push_back(slot);
    }

    /// Removes the entries from `from` on.
    pub(super) fn truncate_from(&mut self, from: u64) -> Removed {
        let Some(base) = self.base else { return Removed::default() };
        let keep = usize::try_from(from.saturating_sub(base)).unwrap_or(usize::MAX).min(self.slots.len());
        let removed = Removed::of(self.slots.drain(keep..));
        if let Some(missing) = self.hole
            && from < base
        {
            self.base = Some(from.max(missing));
            self.hole = (from > missing).then_some(missing);
        }
        if self.purged.is_none() && self.hole.is_none() && from <= self.base.unwrap_or(0) {
            self.base = None;
        }
        removed
    }

    /// Removes the entries up to `point`, inclusive; an older point changes nothing.
    pub(super) fn purge(&mut self, point: LogPoint) -> Removed {
        if self.purged.is_some_and(|p| p.index >= point.index) {
            return Removed::default();
        }
        let first = point.index + 1;
        let base = self.base.unwrap_or(first);
        let count = usize::try_from(first.saturating_sub(base)).unwrap_or(usize::MAX).min(self.slots.len());
        let removed = Removed::of(self.slots.drain(..count));
        if first >= base {
            self.hole = None;
            self.base = Some(first);
        } else if let Some(missing) = self.hole {
            self.hole = Some(missing.max(first));
        }
        self.purged = Some(point);
        removed
    }

    /// Takes an entry found by recovery: it replaces what is at its index and behind.
    pub(super) fn replay(&mut self, index: u64, slot: Slot) {
        self.truncate_from(index);
        if self.purged.is_some_and(|p| index <= p.index) {
            return;
        }
        if let Some(next) = self.next().filter(|next| *next != index) {
            let missing = self.hole.or(self.base).unwrap_or(next);
            self.slots.clear();
            self.base = Some(index);
            self.hole = Some(missing);
        }
        self.push(index, slot);
    }
}

/// What a truncation or purge took away.
#[derive(Debug, Default)]
pub(super) struct Removed {
    pub(super) releases: Releases,
    /// Cached bytes that are gone.
    pub(super) cached: usize,
}

impl Removed {
    pub(super) fn of(slots: impl Iterator<Item = Slot>) -> Self {
        let mut out = Self::default();
        for slot in slots {
            out.cached += slot.cached.as_ref().map_or(0, Bytes::len);
            let Some(location) = slot.location else { continue };
            match out.releases.last_mut() {
                Some((segment, count)) if *segment == location.segment => *count += 1,
                _ => out.releases.push((location.segment, 1)),
            }
        }
        out
    }
}
