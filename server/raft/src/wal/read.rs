//! Reading entries: from the cache where they are, else from the segment files on the blocking pool.
//!
//! Called for replication to a lagging follower and for the replay after a restart. Invariants: what is returned is one
//! moment's view, contiguous, without holes; an entry read from a file is returned only if its record is the one that
//! was written there (group, term, index and both checksums), else the read fails as corrupt. A segment is not reused
//! while a read of it is under way, because the read holds its file. Neighbouring entries share one file read.

use super::core::Core;
use super::error::{WalError, WalErrorKind};
use super::format::{EntryKind, LogPoint, entry_payload, record_bytes};
use super::group::Location;
use super::{LogEntry, Shared};
use bytes::Bytes;
use ogee_disk::{ALIGN, LogFile};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of one file read at most, unless one entry is larger.
const SPAN_BYTES_MAX: u64 = 4 << 20;
/// Bytes of others' records that are read through rather than left out: one more read costs as much as this.
const SPAN_GAP_MAX: u64 = 64 << 10;

/// An entry that must be read from its segment.
struct Stored {
    /// Position in the result.
    at: usize,
    file: Arc<LogFile>,
    location: Location,
    bytes: u64,
}

/// Result entries, some still without payload, and where those payloads are.
struct Plan {
    entries: Vec<LogEntry>,
    stored: Vec<Stored>,
}

fn plan(core: &Core, group: u64, range: &Range<u64>, max_bytes: usize) -> Plan {
    let mut out = Plan { entries: vec![], stored: vec![] };
    let Some(log) = core.groups.get(&group) else { return out };
    let (Some(base), Some(next)) = (log.base, log.next()) else { return out };
    let mut bytes = 0usize;
    for index in range.start.max(base)..range.end.min(next) {
        let Some(slot) = log.slot(index) else { break };
        bytes = bytes.saturating_add(slot.len);
        if bytes > max_bytes && !out.entries.is_empty() {
            break;
        }
        let payload = match (&slot.cached, slot.location) {
            (Some(cached), _) => cached.clone(),
            (None, Some(location)) if slot.len > 0 => {
                let segment = core.segments.iter().find(|s| s.number == location.segment);
                let segment = segment.expect("a segment stays while an entry in it is live");
                let (at, file) = (out.entries.len(), Arc::clone(&segment.file));
                out.stored.push(Stored { at, file, location, bytes: record_bytes(slot.len) as u64 });
                Bytes::new()
            }
            (None, _) => Bytes::new(),
        };
        out.entries.push(LogEntry { index, term: slot.term, kind: slot.kind, payload });
    }
    out
}

impl Shared {
    /// The live entries of `range`, at least one (if there is one) and then up to `max_bytes` of payload.
    pub(super) async fn read(&self, group: u64, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogEntry>, WalError> {
        let Plan { entries, stored } = plan(&self.lock(), group, &range, max_bytes);
        if stored.is_empty() {
            return Ok(entries);
        }
        let task = ogee_common::sim::spawn_blocking(move || fill(group, entries, &stored));
        let read = task.await.map_err(|_| WalError::new(WalErrorKind::Closed, "read log"))?;
        if let Err(error) = &read
            && error.kind() == WalErrorKind::Corrupt
        {
            tracing::error!(target: "controlpath", group, error = error as &dyn std::error::Error, "the log of a replica is damaged");
            if let Some(log) = self.lock().groups.get_mut(&group) {
                log.damaged = true;
            }
        }
        read
    }
}

fn fill(group: u64, mut entries: Vec<LogEntry>, stored: &[Stored]) -> Result<Vec<LogEntry>, WalError> {
    let mut rest = stored;
    while let Some(first) = rest.first() {
        let (span, behind) = rest.split_at(span_len(rest));
        rest = behind;
        let align = ALIGN as u64;
        let start = first.location.offset / align * align;
        let last = span.last().unwrap_or(first);
        let end = (last.location.offset + last.bytes).next_multiple_of(align).min(first.file.bytes());
        let len = usize::try_from(end - start).unwrap_or(usize::MAX);
        let bytes = first.file.read(start, len).map_err(|e| WalError::disk("read log entry", e))?;
        for s in span {
            let entry = &mut entries[s.at];
            let at = usize::try_from(s.location.offset - start).unwrap_or(usize::MAX);
            entry.payload = payload_of(&bytes, at, group, entry.kind, entry.point()).ok_or_else(|| {
                WalError::at(WalErrorKind::Corrupt, "read log entry", s.location.segment, s.location.offset)
            })?;
        }
    }
    Ok(entries)
}

fn payload_of(bytes: &[u8], at: usize, group: u64, kind: EntryKind, point: LogPoint) -> Option<Bytes> {
    entry_payload(bytes, at, group, kind, point).map(Bytes::copy_from_slice)
}

/// How many of the first entries one file read serves.
fn span_len(stored: &[Stored]) -> usize {
    let Some(first) = stored.first() else { return 0 };
    let mut end = first.location.offset + first.bytes;
    for (i, s) in stored.iter().enumerate().skip(1) {
        let near = s.location.segment == first.location.segment
            && s.location.offset >= end
            && s.location.offset - end <= SPAN_GAP_MAX
            && s.location.offset + s.bytes - first.location.offset <= SPAN_BYTES_MAX;
        if !near {
            return i;
        }
        end = s.location.offset + s.bytes;
    }
    stored.len()
}
