//! What the owner of the log sets ([`WalOptions`]) and sees ([`GroupView`], [`WalPressure`]). Plain values: they are
//! copies of one moment and keep nothing alive.

use super::format::{LogPoint, SavedVote};
use ogee_common::limits::{WAL_CACHE_BYTES, WAL_SEGMENT_BYTES, WAL_SPARE_SEGMENTS};
use ogee_disk::LogEngine;

/// Sizes of a log. The default is right for a chunkserver.
#[derive(Debug, Clone)]
pub struct WalOptions {
    /// Bytes of a new segment, a multiple of 4 KiB and at least 64 KiB. Entries may be half as large.
    pub segment_bytes: u64,
    /// Payload bytes of recent entries kept in memory.
    pub cache_bytes: usize,
    /// Freed segments kept for reuse.
    pub spare_segments: usize,
    /// How writes reach the disk.
    pub engine: LogEngine,
}

impl Default for WalOptions {
    fn default() -> Self {
        Self {
            segment_bytes: WAL_SEGMENT_BYTES,
            cache_bytes: WAL_CACHE_BYTES,
            spare_segments: WAL_SPARE_SEGMENTS,
            engine: LogEngine::Auto,
        }
    }
}

/// The stored state of a group, without its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupView {
    /// Last vote saved.
    pub vote: Option<SavedVote>,
    /// Last entry purged.
    pub purged: Option<LogPoint>,
    /// Last entry, or what was purged last.
    pub last: Option<LogPoint>,
    /// An entry was read back and was not what had been written.
    pub damaged: bool,
}

/// How full the log is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalPressure {
    /// Segments that hold live entries or are being written.
    pub segments: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that can be written without allocating on the disk: the rest of the tail, the prepared and the freed segments.
    pub room_bytes: u64,
    /// Groups with a live entry in the oldest segment: purging them frees it.
    pub oldest_groups: Vec<u64>,
    /// Payload bytes waiting for the writer.
    pub queued_bytes: usize,
    /// Payload bytes in the cache.
    pub cached_bytes: usize,
    /// The disk was full when the log last tried to grow.
    pub no_space: bool,
}
