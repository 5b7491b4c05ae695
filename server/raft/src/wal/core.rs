//! The state of the log in memory: groups, the queue of records to be written, segments and the entry cache. Pure
//! (no IO, no waiting); called under one mutex by the handles and by the writer.
//!
//! Invariants: records reach the disk in the order they were queued; what a purge or truncation releases counts only
//! once its record is durable; segments are freed and reused strictly from the oldest, and only behind a durable head
//! of the newest; an entry leaves the cache only when it is durable. `logged` is the state of each group as of the last
//! encoded record, which is what a segment's head must say, while `groups` runs ahead by what is still queued.

use super::cache::Cache;
use super::error::{WalError, WalErrorKind};
use super::format::{
    BATCH_HEADER, BatchEncoder, BatchId, GROUP_STATE, GroupState, LogPoint, Record, SavedVote, record_bytes,
};
use super::group::{Group, Location, Releases, Removed, Slot};
use super::replay::note_logged;
use super::{Completion, LogEntry};
use bytes::Bytes;
use ogee_common::limits::{WAL_BATCH_BYTES_MAX, WAL_GROUPS_MAX};
use ogee_disk::{ALIGN, AlignedBuf, LogFile};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// A record that waits for the writer.
struct Queued {
    group: u64,
    record: Record,
    payload: Bytes,
    /// Entries only.
    stamp: u64,
    releases: Releases,
    done: Option<Completion>,
}

/// A segment that may hold live entries.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) file: Arc<LogFile>,
    /// Live entries in it.
    pub(super) live: u64,
}

/// Whether the log takes work.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    Open,
    /// Writes what is queued, then stops.
    Closing,
    /// Takes nothing; says why.
    Ended(WalError),
}

/// What must happen when a batch is durable.
#[derive(Default)]
pub(super) struct InFlight {
    releases: Vec<Releases>,
    done: Vec<Completion>,
    stamp: u64,
    pub(super) records: u64,
    pub(super) entries: u64,
}

/// Where the next batch goes.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) number: u64,
    pub(super) file: Arc<LogFile>,
    pub(super) offset: u64,
}

/// See the module.
pub(super) struct Core {
    pub(super) log: u64,
    pub(super) entry_bytes_max: usize,
    pub(super) phase: Phase,
    pub(super) groups: HashMap<u64, Group>,
    pub(super) logged: BTreeMap<u64, GroupState>,
    queue: VecDeque<Queued>,
    /// Payload bytes in the queue.
    pub(super) queue_bytes: usize,
    /// Oldest first; the last one is being written.
    pub(super) segments: VecDeque<Segment>,
    /// Segments without live entries, oldest first, all older than `segments`.
    pub(super) freed: VecDeque<(u64, Arc<LogFile>)>,
    pub(super) tail: Option<Tail>,
    /// Number of the last batch that was encoded.
    pub(super) sequence: u64,
    pub(super) stamp: u64,
    pub(super) durable_stamp: u64,
    cache: Cache,
    /// The disk was full when the log last tried to grow.
    pub(super) no_space: bool,
    /// Bytes of a segment that was prepared for the next roll.
    pub(super) prepared_bytes: u64,
}

impl Core {
    pub(super) fn new(log: u64, entry_bytes_max: usize, cache_limit: usize) -> Self {
        Self {
            log,
            entry_bytes_max,
            phase: Phase::Open,
            groups: HashMap::new(),
            logged: BTreeMap::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            segments: VecDeque::new(),
            freed: VecDeque::new(),
            tail: None,
            sequence: 0,
            stamp: 0,
            durable_stamp: 0,
            cache: Cache::new(cache_limit),
            no_space: false,
            prepared_bytes: 0,
        }
    }

    fn ready(&self, op: &'static str) -> Result<(), WalError> {
        match &self.phase {
            Phase::Open => Ok(()),
            Phase::Closing => Err(WalError::new(WalErrorKind::Closed, op)),
            Phase::Ended(e) if e.kind() == WalErrorKind::Closed => Err(e.clone()),
            Phase::Ended(e) => Err(e.poisoned()),
        }
    }

    /// Creates the group if it is new.
    pub(super) fn open_group(&mut self, group: u64) -> Result<(), WalError> {
        if !self.groups.contains_key(&group) && self.groups.len() >= WAL_GROUPS_MAX {
            return Err(WalError::new(WalErrorKind::TooBig, "open group"));
        }
        self.groups.entry(group).or_default();
        Ok(())
    }

    fn enqueue(&mut self, group: u64, record: Record, releases: Releases, done: Option<Completion>) {
        let stamp = self.stamp;
        self.queue.push_back(Queued { group, record, payload: Bytes::new(), stamp, releases, done });
    }

    /// Appends entries: readable at once, `done` is called when all are durable.
    pub(super) fn append(&mut self, group: u64, entries: Vec<LogEntry>, done: Completion) -> Result<(), WalError> {
        self.ready("append entries")?;
        let log = self.groups.entry(group).or_default();
        let mut next = log.next();
        for entry in &entries {
            if entry.payload.len() > self.entry_bytes_max {
                return Err(WalError::new(WalErrorKind::TooBig, "append entry"));
            }
            if next.is_some_and(|n| n != entry.index) {
                return Err(WalError::new(WalErrorKind::Gap, "append entry"));
            }
            next = Some(entry.index + 1);
        }
        if entries.is_empty() {
            // Called when everything queued before it is durable.
            self.enqueue(group, Record::TruncateFrom(u64::MAX), vec![], Some(done));
            return Ok(());
        }
        let last = entries.len() - 1;
        let mut done = Some(done);
        for (i, e) in entries.into_iter().enumerate() {
            self.stamp += 1;
            let (stamp, len) = (self.stamp, e.payload.len());
            let cached = Some(e.payload.clone());
            log.push(e.index, Slot { term: e.term, kind: e.kind, len, stamp, location: None, cached });
            self.cache.added(group, e.index, stamp, len);
            self.queue_bytes += len;
            let record = Record::Entry { kind: e.kind, point: LogPoint { term: e.term, index: e.index } };
            let done = if i == last { done.take() } else { None };
            self.queue.push_back(Queued { group, record, payload: e.payload, stamp, releases: vec![], done });
        }
        Ok(())
    }

    pub(super) fn save_vote(&mut self, group: u64, vote: SavedVote, done: Completion) -> Result<(), WalError> {
        self.ready("save vote")?;
        self.groups.entry(group).or_default().vote = Some(vote);
        self.enqueue(group, Record::Vote(vote), vec![], Some(done));
        Ok(())
    }

    fn account(&mut self, removed: Removed) -> Releases {
        self.cache.removed(removed.cached);
        removed.releases
    }

    pub(super) fn truncate_from(&mut self, group: u64, from: u64) -> Result<(), WalError> {
        self.ready("truncate log")?;
        let removed = self.groups.entry(group).or_default().truncate_from(from);
        let releases = self.account(removed);
        self.enqueue(group, Record::TruncateFrom(from), releases, None);
        Ok(())
    }

    pub(super) fn purge(&mut self, group: u64, point: LogPoint) -> Result<(), WalError> {
        self.ready("purge log")?;
        let removed = self.groups.entry(group).or_default().purge(point);
        let releases = self.account(removed);
        self.enqueue(group, Record::Purge(point), releases, None);
        Ok(())
    }

    pub(super) fn remove_group(&mut self, group: u64, done: Completion) -> Result<(), WalError> {
        self.ready("remove group")?;
        let removed = self.groups.remove(&group).map(|mut g| Removed::of(g.slots.drain(..))).unwrap_or_default();
        let releases = self.account(removed);
        self.enqueue(group, Record::Remove, releases, Some(done));
        Ok(())
    }

    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether the first queued record fits behind the tail.
    pub(super) fn fits(&self) -> bool {
        let Some(tail) = &self.tail else { return false };
        let Some(first) = self.queue.front() else { return true };
        let need = self.head_bytes(tail.offset) + record_bytes(first.payload.len());
        tail.offset + need.next_multiple_of(ALIGN) as u64 <= tail.file.bytes()
    }

    /// Bytes in front of the queued records: the batch header and, at the start of a segment, the states of all groups.
    fn head_bytes(&self, offset: u64) -> usize {
        let states = if offset == 0 { self.logged.len() } else { 0 };
        BATCH_HEADER + states * record_bytes(GROUP_STATE)
    }

    /// Makes an empty segment the tail.
    pub(super) fn roll(&mut self, number: u64, file: Arc<LogFile>) {
        self.segments.push_back(Segment { number, file: Arc::clone(&file), live: 0 });
        self.tail = Some(Tail { number, file, offset: 0 });
    }

    /// Encodes as many queued records as fit into one batch behind the tail. The caller has checked [`Core::fits`].
    pub(super) fn encode(&mut self, buf: &mut AlignedBuf) -> Option<(Arc<LogFile>, u64, InFlight)> {
        let tail = self.tail.as_ref()?;
        let (number, file, start) = (tail.number, Arc::clone(&tail.file), tail.offset);
        let room = usize::try_from(file.bytes() - start).unwrap_or(usize::MAX);
        let head = self.head_bytes(start);
        let (mut bytes, mut count) = (head, 0);
        for item in &self.queue {
            let with = bytes + record_bytes(item.payload.len());
            let full = count > 0 && with - head > WAL_BATCH_BYTES_MAX;
            if full || with.next_multiple_of(ALIGN) > room {
                break;
            }
            (bytes, count) = (with, count + 1);
        }
        if buf.capacity() < bytes.next_multiple_of(ALIGN) {
            *buf = AlignedBuf::with_capacity(bytes.next_power_of_two());
        }
        self.sequence += 1;
        let id = BatchId { log: self.log, segment: number, sequence: self.sequence };
        let mut batch = BatchEncoder::new(buf, id);
        if start == 0 {
            for (group, state) in &self.logged {
                batch.push(*group, &Record::State(*state), &[]);
            }
        }
        let mut flight = InFlight { stamp: self.durable_stamp, ..InFlight::default() };
        for item in self.queue.drain(..count).collect::<Vec<_>>() {
            let at = batch.push(item.group, &item.record, &item.payload);
            self.queue_bytes -= item.payload.len();
            self.encoded(&item, Location { segment: number, offset: start + at as u64 }, &mut flight);
            flight.releases.push(item.releases);
            flight.done.extend(item.done);
        }
        batch.finish();
        if let Some(tail) = &mut self.tail {
            tail.offset = start + buf.len() as u64;
        }
        Some((file, start, flight))
    }

    /// Encodes a mark: a batch without records behind the tail. Neither tail nor sequence move, so the next batch takes its place. `None` when
    /// there is no room, or no tail.
    pub(super) fn mark(&self, buf: &mut AlignedBuf) -> Option<(Arc<LogFile>, u64)> {
        let tail = self.tail.as_ref().filter(|t| t.offset > 0 && t.offset + ALIGN as u64 <= t.file.bytes())?;
        BatchEncoder::new(buf, BatchId { log: self.log, segment: tail.number, sequence: self.sequence + 1 }).finish();
        Some((Arc::clone(&tail.file), tail.offset))
    }

    /// Whether anything was ever written to this log.
    pub(super) const fn is_used(&self) -> bool {
        self.sequence > 0
    }

    /// Takes note of a record that is now part of a batch.
    fn encoded(&mut self, item: &Queued, location: Location, flight: &mut InFlight) {
        flight.records += 1;
        note_logged(&mut self.logged, item.group, &item.record);
        if let Record::Entry { point, .. } = item.record {
            flight.entries += 1;
            flight.stamp = item.stamp;
            let slot = self.groups.get_mut(&item.group).and_then(|g| g.slot_mut(point.index));
            // An entry that was truncated or purged while it was queued is written, but it is not live.
            if let Some(slot) = slot.filter(|s| s.stamp == item.stamp) {
                slot.location = Some(location);
                if let Some(segment) = self.segments.back_mut() {
                    segment.live += 1;
                }
            }
        }
    }

    /// The batch is durable: counts its releases, frees segments, and returns whom to tell.
    pub(super) fn completed(&mut self, flight: InFlight) -> Vec<Completion> {
        self.durable_stamp = flight.stamp;
        for (number, count) in flight.releases.into_iter().flatten() {
            let segment = self.segments.iter_mut().find(|s| s.number == number);
            let segment = segment.expect("a segment stays while an entry in it is live");
            assert!(segment.live >= count, "an entry is released once");
            segment.live -= count;
        }
        self.free_segments();
        self.cache.trim(&mut self.groups, self.durable_stamp);
        flight.done
    }

    /// Frees the oldest segments without live entries and without readers. Never the tail.
    fn free_segments(&mut self) {
        while self.segments.len() > 1 {
            let Some(oldest) = self.segments.front() else { return };
            // A reader holds a clone of the file while it reads an entry that may have been purged since.
            if oldest.live > 0 || Arc::strong_count(&oldest.file) > 1 {
                return;
            }
            if let Some(oldest) = self.segments.pop_front() {
                self.freed.push_back((oldest.number, oldest.file));
            }
        }
    }

    /// Payload bytes held for reads.
    pub(super) const fn cached_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Ends the log; returns everyone who waits.
    pub(super) fn end(&mut self, why: WalError, flight: Option<InFlight>) -> Vec<Completion> {
        let mut waiting = flight.map(|f| f.done).unwrap_or_default();
        waiting.extend(self.queue.drain(..).filter_map(|q| q.done));
        self.queue_bytes = 0;
        self.phase = Phase::Ended(why);
        waiting
    }
}
