//! The bytes of the log: batches of records. Pure; called by the writer, by recovery and by reads of single entries.
//!
//! A batch is one write: a 48-byte header, records on 8-byte bounds, zeros up to the next 4 KiB. Byte tables are in
//! `docs/formats/wal.md`, golden bytes in `tests/golden`. Invariants: every byte that means something is covered once:
//! payloads by the CRC in their record's header, headers by the CRC in the batch's header; a batch names the log, the
//! segment and its own number, so that content left from an earlier use of the file is recognised. The decoder is
//! total: any bytes give a batch or a [`BatchFault`], and nothing is allocated by an unchecked length.

use ogee_common::checksum::{crc32c, crc32c_append};
use ogee_disk::{ALIGN, AlignedBuf};

/// "OGWB", little-endian.
pub(crate) const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"OGWB");
/// Version of this format.
pub(crate) const FORMAT_VERSION: u16 = 1;
/// Bytes of a batch header.
pub(crate) const BATCH_HEADER: usize = 48;
/// Bytes of a record header.
pub(crate) const RECORD_HEADER: usize = 40;
/// Bytes of the payload of a group state.
pub(crate) const GROUP_STATE: usize = 40;
/// Records start on multiples of this.
const RECORD_ALIGN: usize = 8;

const FLAG_COMMITTED: u8 = 1;
const FLAG_VOTE: u8 = 2;
const FLAG_PURGED: u8 = 4;
const FLAG_BASE: u8 = 8;

/// What an entry carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Nothing: a new leader's first entry.
    Blank,
    /// A command of the state machine.
    Command,
    /// A membership.
    Membership,
}

/// A position of a group's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPoint {
    /// The term of the leader that appended the entry.
    pub term: u64,
    /// The index of the entry, from 0.
    pub index: u64,
}

/// A vote as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedVote {
    /// The term.
    pub term: u64,
    /// The replica voted for.
    pub replica: u64,
    /// Whether a majority granted it.
    pub committed: bool,
}

/// All that a group needs from segments that are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct GroupState {
    pub(crate) vote: Option<SavedVote>,
    pub(crate) purged: Option<LogPoint>,
    /// Index of the first entry that may be live; `None` when no entry was ever appended.
    pub(crate) base: Option<u64>,
}

/// One record without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Record {
    Entry { kind: EntryKind, point: LogPoint },
    Vote(SavedVote),
    TruncateFrom(u64),
    Purge(LogPoint),
    State(GroupState),
    Remove,
}

impl Record {
    const fn kind(&self) -> u8 {
        match self {
            Self::Entry { kind: EntryKind::Blank, .. } => 1,
            Self::Entry { kind: EntryKind::Command, .. } => 2,
            Self::Entry { kind: EntryKind::Membership, .. } => 3,
            Self::Vote(_) => 4,
            Self::TruncateFrom(_) => 5,
            Self::Purge(_) => 6,
            Self::State(_) => 7,
            Self::Remove => 8,
        }
    }

    /// `(flags, index, term)` of the header.
    fn fields(&self) -> (u8, u64, u64) {
        match *self {
            Self::Entry { point, .. } | Self::Purge(point) => (0, point.index, point.term),
            Self::Vote(v) => (if v.committed { FLAG_COMMITTED } else { 0 }, v.replica, v.term),
            Self::TruncateFrom(index) => (0, index, 0),
            Self::State(s) => {
                let committed = s.vote.is_some_and(|v| v.committed);
                let flags = [
                    (committed, FLAG_COMMITTED),
                    (s.vote.is_some(), FLAG_VOTE),
                    (s.purged.is_some(), FLAG_PURGED),
                    (s.base.is_some(), FLAG_BASE),
                ];
                (flags.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum(), 0, 0)
            }
            Self::Remove => (0, 0, 0),
        }
    }
}

/// Bytes that a record with such a payload takes in a batch.
pub(crate) const fn record_bytes(payload: usize) -> usize {
    RECORD_HEADER + payload.next_multiple_of(RECORD_ALIGN)
}

/// Which batch is being written or expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchId {
    /// Random identity of the log, so that a file of another log is not taken for ours.
    pub(crate) log: u64,
    pub(crate) segment: u64,
    /// Counts the batches of the log from 1, over all segments.
    pub(crate) sequence: u64,
}

/// Fills a buffer with one batch.
pub(crate) struct BatchEncoder<'a> {
    buf: &'a mut AlignedBuf,
    crc: u32,
    records: u32,
}

impl<'a> BatchEncoder<'a> {
    /// Starts a batch in an empty buffer.
    pub(crate) fn new(buf: &'a mut AlignedBuf, id: BatchId) -> Self {
        buf.clear();
        buf.extend(&BATCH_MAGIC.to_le_bytes());
        buf.extend(&FORMAT_VERSION.to_le_bytes());
        buf.extend(&u16::try_from(BATCH_HEADER).expect("48 fits").to_le_bytes());
        buf.extend(&id.log.to_le_bytes());
        buf.extend(&id.segment.to_le_bytes());
        buf.extend(&id.sequence.to_le_bytes());
        buf.extend(&[0; 16]);
        Self { buf, crc: 0, records: 0 }
    }

    /// Appends a record and returns its byte offset in the batch.
    pub(crate) fn push(&mut self, group: u64, record: &Record, payload: &[u8]) -> usize {
        let state = match record {
            Record::State(s) => Some(state_payload(s)),
            _ => None,
        };
        let payload = state.as_ref().map_or(payload, |s| &s[..]);
        let at = self.buf.len();
        let header = record_header(group, record, payload);
        self.buf.extend(&header);
        self.buf.extend(payload);
        self.buf.pad_to(RECORD_ALIGN);
        // The header of the batch is not complete yet: its CRC is continued by these in `finish`.
        self.crc = crc32c_append(self.crc, &header);
        self.records += 1;
        at
    }

    /// Completes the header and pads the batch to whole pages.
    pub(crate) fn finish(self) {
        let body = u32::try_from(self.buf.len() - BATCH_HEADER).expect("a batch is smaller than a segment");
        self.buf[32..36].copy_from_slice(&body.to_le_bytes());
        self.buf[36..40].copy_from_slice(&self.records.to_le_bytes());
        let crc = batch_crc(self.crc, &self.buf[..44]);
        self.buf[44..48].copy_from_slice(&crc.to_le_bytes());
        self.buf.pad_to(ALIGN);
    }
}

/// CRC of all record headers in order, continued by the batch header without its CRC.
fn batch_crc(records: u32, header: &[u8]) -> u32 {
    crc32c_append(records, header)
}

fn record_header(group: u64, record: &Record, payload: &[u8]) -> [u8; RECORD_HEADER] {
    let (flags, index, term) = record.fields();
    let mut h = [0u8; RECORD_HEADER];
    h[0] = record.kind();
    h[1] = flags;
    h[4..8].copy_from_slice(&u32::try_from(payload.len()).expect("payloads are bounded").to_le_bytes());
    h[8..16].copy_from_slice(&group.to_le_bytes());
    h[16..24].copy_from_slice(&index.to_le_bytes());
    h[24..32].copy_from_slice(&term.to_le_bytes());
    h[32..36].copy_from_slice(&crc32c(payload).to_le_bytes());
    let crc = crc32c(&h[..36]);
    h[36..40].copy_from_slice(&crc.to_le_bytes());
    h
}

fn state_payload(s: &GroupState) -> [u8; GROUP_STATE] {
    let vote = s.vote.map_or((0, 0), |v| (v.term, v.replica));
    let purged = s.purged.map_or((0, 0), |p| (p.index, p.term));
    let mut out = [0u8; GROUP_STATE];
    for (i, value) in [vote.0, vote.1, purged.0, purged.1, s.base.unwrap_or(0)].into_iter().enumerate() {
        out[i * 8..i * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }
    out
}

/// Why bytes are not the expected batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BatchFault {
    /// Not a whole batch of this log and segment with a sequence that may be: nothing was written here, or a torn or
    /// damaged batch, or content of an earlier use.
    Invalid,
    /// A whole batch with a record or version this program does not know.
    Unsupported,
}

/// A record found in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) group: u64,
    pub(crate) record: Record,
    /// Byte offset of the record's header from the start of the batch.
    pub(crate) at: usize,
    /// Bytes of the payload.
    pub(crate) payload: usize,
}

/// A whole, verified batch.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) sequence: u64,
    /// Bytes on disk, padding included.
    pub(crate) bytes: usize,
    pub(crate) records: Vec<Found>,
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

/// Decodes the batch at the start of `bytes` if it belongs to the log and segment; the sequence is the caller's to judge.
///
/// # Errors
/// [`BatchFault`].
pub(crate) fn decode_batch(bytes: &[u8], log: u64, segment: u64) -> Result<Batch, BatchFault> {
    let head = bytes.get(..BATCH_HEADER).ok_or(BatchFault::Invalid)?;
    if u32_at(head, 0) != BATCH_MAGIC || u64_at(head, 8) != log || u64_at(head, 16) != segment {
        return Err(BatchFault::Invalid);
    }
    if head[4..6] != FORMAT_VERSION.to_le_bytes() {
        return Err(BatchFault::Unsupported);
    }
    let body = usize::try_from(u32_at(head, 32)).map_err(|_| BatchFault::Invalid)?;
    let end = BATCH_HEADER.checked_add(body).ok_or(BatchFault::Invalid)?;
    let used = bytes.get(..end).ok_or(BatchFault::Invalid)?;
    let count = u32_at(head, 36);
    let mut records = Vec::with_capacity(usize::try_from(count).unwrap_or(0).min(body / RECORD_HEADER));
    let (mut at, mut crc, mut unknown) = (BATCH_HEADER, 0, false);
    for _ in 0..count {
        let (header, payload) = record_parts(used, at).ok_or(BatchFault::Invalid)?;
        crc = crc32c_append(crc, header);
        match record_of(header, payload) {
            Some(record) => records.push(Found { group: u64_at(header, 8), record, at, payload: payload.len() }),
            None => unknown = true,
        }
        at += record_bytes(payload.len());
    }
    if at != end || batch_crc(crc, &head[..44]) != u32_at(head, 44) {
        return Err(BatchFault::Invalid);
    }
    if unknown {
        return Err(BatchFault::Unsupported);
    }
    Ok(Batch { sequence: u64_at(head, 24), bytes: end.next_multiple_of(ALIGN), records })
}

/// Header and payload of the record at `at`, if both checksums hold.
fn record_parts(bytes: &[u8], at: usize) -> Option<(&[u8], &[u8])> {
    let header = bytes.get(at..at.checked_add(RECORD_HEADER)?)?;
    if crc32c(&header[..36]) != u32_at(header, 36) {
        return None;
    }
    let len = usize::try_from(u32_at(header, 4)).ok()?;
    let start = at + RECORD_HEADER;
    let payload = bytes.get(start..start.checked_add(len)?)?;
    // The padding must lie inside too, so that the next record starts inside.
    bytes.get(start..start.checked_add(len.checked_next_multiple_of(RECORD_ALIGN)?)?)?;
    (crc32c(payload) == u32_at(header, 32)).then_some((header, payload))
}

fn record_of(header: &[u8], payload: &[u8]) -> Option<Record> {
    let flags = header[1];
    let point = LogPoint { index: u64_at(header, 16), term: u64_at(header, 24) };
    let entry = |kind| Some(Record::Entry { kind, point });
    match header[0] {
        1 => entry(EntryKind::Blank),
        2 => entry(EntryKind::Command),
        3 => entry(EntryKind::Membership),
        4 => Some(Record::Vote(SavedVote {
            term: point.term,
            replica: point.index,
            committed: flags & FLAG_COMMITTED != 0,
        })),
        5 => Some(Record::TruncateFrom(point.index)),
        6 => Some(Record::Purge(point)),
        7 if payload.len() == GROUP_STATE => Some(Record::State(state_of(flags, payload))),
        8 => Some(Record::Remove),
        _ => None,
    }
}

fn state_of(flags: u8, p: &[u8]) -> GroupState {
    let has = |bit| flags & bit != 0;
    let vote = SavedVote { term: u64_at(p, 0), replica: u64_at(p, 8), committed: has(FLAG_COMMITTED) };
    let purged = LogPoint { index: u64_at(p, 16), term: u64_at(p, 24) };
    GroupState {
        vote: has(FLAG_VOTE).then_some(vote),
        purged: has(FLAG_PURGED).then_some(purged),
        base: has(FLAG_BASE).then(|| u64_at(p, 32)),
    }
}

/// The payload of the entry record at `at`, if it is the record that is meant and its checksums hold.
pub(crate) fn entry_payload(bytes: &[u8], at: usize, group: u64, kind: EntryKind, point: LogPoint) -> Option<&[u8]> {
    let (header, payload) = record_parts(bytes, at)?;
    let found = record_of(header, payload)?;
    (u64_at(header, 8) == group && found == Record::Entry { kind, point }).then_some(payload)
}
