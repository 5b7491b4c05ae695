//! How long a log's tail is in bytes, so that large entries do not keep gigabytes of it. Used by [`crate::machine`]; pure.
//!
//! Invariant: an answer never says that less may stay than the bytes asked for, as far as entries are known at all; those
//! before the last restart are not.

use std::collections::VecDeque;

/// How many command bytes lie up to which index, coarsely: one mark per batch.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    /// Index, and bytes of all commands up to it.
    marks: VecDeque<(u64, u64)>,
    total: u64,
}

/// Marks kept; the oldest are merged away.
const MARKS_MAX: usize = 4096;

impl Tail {
    /// The entries up to `index` were applied, `bytes` of commands since the last call.
    pub(crate) fn note(&mut self, index: u64, bytes: u64) {
        self.total += bytes;
        self.marks.push_back((index, self.total));
        if self.marks.len() > MARKS_MAX {
            self.marks.pop_front();
        }
    }

    /// The first mark with at most `bytes` bytes between it and `checkpoint`.
    pub(crate) fn beyond(&self, checkpoint: u64, bytes: u64) -> Option<u64> {
        let end = self.marks.iter().rev().find(|(index, _)| *index <= checkpoint)?.1;
        let oldest = self.marks.front()?;
        // Nothing older is known: what the marks hold may be kept as a whole.
        if end - oldest.1 <= bytes {
            return None;
        }
        self.marks
            .iter()
            .find(|(_, total)| end.saturating_sub(*total) <= bytes)
            .map(|(index, _)| *index.min(&checkpoint))
    }

    /// The log up to `upto` is gone.
    pub(crate) fn forget(&mut self, upto: u64) {
        while self.marks.front().is_some_and(|(index, _)| *index < upto) {
            self.marks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_ends_where_its_bytes_are_used_up() {
        let mut tail = Tail::default();
        assert_eq!(tail.beyond(10, 0), None);
        for index in 1..=10 {
            tail.note(index, 100);
        }
        assert_eq!(tail.beyond(10, 900), None, "all that is known fits");
        assert_eq!(tail.beyond(10, 300), Some(7));
        assert_eq!(tail.beyond(8, 300), Some(5), "counted back from the checkpoint, not from the end");
        assert_eq!(tail.beyond(10, 0), Some(10));
        tail.forget(7);
        assert_eq!(tail.beyond(10, 300), None);
        assert_eq!(tail.beyond(10, 299), Some(8));
    }
}
