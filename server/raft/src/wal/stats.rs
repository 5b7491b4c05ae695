//! Counters of the log, for metrics. Written by the writer, read by anyone; they only grow.

use std::sync::atomic::{AtomicU64, Ordering};

/// Live counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) flushes: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) records: AtomicU64,
    pub(super) entries: AtomicU64,
    pub(super) marks: AtomicU64,
    pub(super) segments_created: AtomicU64,
    pub(super) segments_reused: AtomicU64,
}

/// What the log has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WalStats {
    /// Durable writes: one batch each.
    pub flushes: u64,
    /// Bytes written to segments, padding included.
    pub bytes: u64,
    /// Records in durable batches, heads of segments not counted.
    pub records: u64,
    /// Entries among them.
    pub entries: u64,
    /// Marks behind the last batch, which are not flushed.
    pub marks: u64,
    /// Segments that were created.
    pub segments_created: u64,
    /// Segments that were reused.
    pub segments_reused: u64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> WalStats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        WalStats {
            flushes: get(&self.flushes),
            bytes: get(&self.bytes),
            records: get(&self.records),
            entries: get(&self.entries),
            marks: get(&self.marks),
            segments_created: get(&self.segments_created),
            segments_reused: get(&self.segments_reused),
        }
    }
}
