//! Counters of a vhost-user-blk device, readable while it serves.
//!
//! Written by the queue loops, read by anyone. Relaxed atomics: each number is exact, but numbers read together may be
//! of slightly different moments. They live as long as the server, across front ends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Kinds of request that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Requests for the serial.
    GetId,
    /// Discards.
    Discard,
    /// Write-zeroes.
    WriteZeroes,
    /// Chains that are not a request; each counts as an error.
    Malformed,
}

impl RequestKind {
    /// All kinds in the order of [`VhostBlkStats`].
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Flush, Self::GetId, Self::Discard, Self::WriteZeroes, Self::Malformed];

    /// A name for tables and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::GetId => "get_id",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::Malformed => "malformed",
        }
    }
}

/// Counters of one kind.
#[derive(Debug, Default)]
struct KindCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// The counts of one kind at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindCounts {
    /// Requests finished, failed ones included.
    pub requests: u64,
    /// Bytes of the volume that successful requests covered.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// Counters of a device.
#[derive(Debug, Default)]
pub struct VhostBlkStats {
    kinds: [KindCounters; RequestKind::ALL.len()],
    connections: AtomicU64,
    connected: AtomicBool,
    resubmitted: AtomicU64,
}

impl VhostBlkStats {
    /// The counts of a kind as of now.
    #[must_use]
    pub fn get(&self, kind: RequestKind) -> KindCounts {
        let counters = &self.kinds[kind as usize];
        KindCounts {
            requests: counters.requests.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
        }
    }

    /// Front ends that connected so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Whether a front end is connected, or was and what it started is not finished at the device.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Requests that a dead back end left in flight and that were submitted again.
    #[must_use]
    pub fn resubmitted(&self) -> u64 {
        self.resubmitted.load(Ordering::Relaxed)
    }

    pub(crate) fn count_resubmitted(&self, requests: u64) {
        self.resubmitted.fetch_add(requests, Ordering::Relaxed);
    }

    pub(crate) fn count_success(&self, kind: RequestKind, bytes: u64) {
        let counters = &self.kinds[kind as usize];
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn count_error(&self, kind: RequestKind) {
        let counters = &self.kinds[kind as usize];
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.connected.store(true, Ordering::Relaxed);
    }

    pub(crate) fn count_end_of_connection(&self) {
        self.connected.store(false, Ordering::Relaxed);
    }
}
