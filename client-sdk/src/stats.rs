//! What a volume did: counters and coarse latency histograms.
//!
//! Written by the IO path with relaxed atomics, read by the command line. Invariant: a counter never goes back, except
//! the gauge `inflight`. Absent: rates and percentiles over time; a reader takes two snapshots and subtracts.

use ogee_common::clock;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a latency histogram: bucket `i` counts IOs that took `[2^i, 2^(i+1))` microseconds, the last all longer.
pub const LATENCY_BUCKETS: usize = 26;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Verb {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write zeroes",
        }
    }
}

/// Counters of one kind of IO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct OpStats {
    /// IOs that ended, well or not.
    pub ops: u64,
    /// Of these, those that failed.
    pub errors: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// Histogram of durations, see [`LATENCY_BUCKETS`].
    pub latency_us_log2: [u64; LATENCY_BUCKETS],
}

/// What a volume did since it was opened, all handles together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct VolumeStats {
    /// Reads.
    pub read: OpStats,
    /// Writes.
    pub write: OpStats,
    /// Flushes.
    pub flush: OpStats,
    /// Discards.
    pub discard: OpStats,
    /// Write-zeroes.
    pub write_zeroes: OpStats,
    /// IOs that have not ended.
    pub inflight: u64,
    /// Attempts that did not end in success, redirects included.
    pub retries: u64,
    /// Attempts answered by a chunkserver that does not lead.
    pub redirects: u64,
    /// Attempts without an answer in time or with a broken connection.
    pub unknown_outcomes: u64,
    /// Read replies and writes whose checksums did not match.
    pub checksum_mismatches: u64,
    /// Times that writes were held for a volume snapshot.
    pub holds: u64,
    /// IOs that waited for the volume's limits before they began.
    pub throttled: u64,
}

#[derive(Debug, Default)]
struct OpCounters {
    ops: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

impl OpCounters {
    fn snapshot(&self) -> OpStats {
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        OpStats {
            ops: get(&self.ops),
            errors: get(&self.errors),
            bytes: get(&self.bytes),
            latency_us_log2: std::array::from_fn(|i| get(&self.latency[i])),
        }
    }
}

/// The live counters.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    verbs: [OpCounters; 5],
    inflight: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) redirects: AtomicU64,
    pub(crate) unknown_outcomes: AtomicU64,
    pub(crate) checksum_mismatches: AtomicU64,
    pub(crate) holds: AtomicU64,
    pub(crate) throttled: AtomicU64,
}

/// Adds one to a counter.
pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Stats {
    /// Counts an IO from now until [`OpTimer::done`]; one that is dropped counts as failed.
    pub(crate) fn start(&self, verb: Verb) -> OpTimer<'_> {
        bump(&self.inflight);
        OpTimer { stats: self, verb, started: clock::now(), bytes: None }
    }

    /// The counters as of now; not one instant for all of them.
    pub(crate) fn snapshot(&self) -> VolumeStats {
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        let of = |verb: Verb| self.verbs[verb as usize].snapshot();
        VolumeStats {
            read: of(Verb::Read),
            write: of(Verb::Write),
            flush: of(Verb::Flush),
            discard: of(Verb::Discard),
            write_zeroes: of(Verb::WriteZeroes),
            inflight: get(&self.inflight),
            retries: get(&self.retries),
            redirects: get(&self.redirects),
            unknown_outcomes: get(&self.unknown_outcomes),
            checksum_mismatches: get(&self.checksum_mismatches),
            holds: get(&self.holds),
            throttled: get(&self.throttled),
        }
    }
}

/// The count of one IO.
#[derive(Debug)]
pub(crate) struct OpTimer<'a> {
    stats: &'a Stats,
    verb: Verb,
    started: clock::Instant,
    bytes: Option<u64>,
}

impl OpTimer<'_> {
    /// The IO ended well and moved so many bytes.
    pub(crate) fn done(mut self, bytes: u64) {
        self.bytes = Some(bytes);
    }
}

impl Drop for OpTimer<'_> {
    fn drop(&mut self) {
        let counters = &self.stats.verbs[self.verb as usize];
        bump(&counters.ops);
        match self.bytes {
            Some(bytes) => _ = counters.bytes.fetch_add(bytes, Ordering::Relaxed),
            None => bump(&counters.errors),
        }
        bump(&counters.latency[bucket(self.started.elapsed())]);
        self.stats.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The histogram bucket of a duration. Pure.
fn bucket(took: Duration) -> usize {
    let us = took.as_micros().max(1);
    (us.ilog2() as usize).min(LATENCY_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_microseconds() {
        let of = |us| bucket(Duration::from_micros(us));
        assert_eq!((of(0), of(1), of(2), of(3), of(4), of(1023), of(1024)), (0, 0, 1, 1, 2, 9, 10));
        assert_eq!(of(u64::MAX), LATENCY_BUCKETS - 1);
    }

    #[test]
    fn ops_bytes_errors_and_inflight_are_counted() {
        let stats = Stats::default();
        let timer = stats.start(Verb::Write);
        assert_eq!(stats.snapshot().inflight, 1);
        timer.done(4096);
        drop(stats.start(Verb::Write));
        let s = stats.snapshot();
        assert_eq!((s.inflight, s.write.ops, s.write.errors, s.write.bytes), (0, 2, 1, 4096));
        assert_eq!(s.write.latency_us_log2.iter().sum::<u64>(), 2);
        assert_eq!(s.read, OpStats::default());
    }
}
