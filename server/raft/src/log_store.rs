//! [`LogStore`]: one group's log and vote as openraft sees them, on the shared write-ahead log.
//!
//! Called by openraft's core task (writes) and by its replication and apply tasks (reads, through clones). Invariants
//! are those openraft asks for: appended entries are readable at once; votes and appends of a group reach the disk in
//! the order they were given; a flush callback comes only after the entries, and every vote saved before them, are
//! durable. The committed position is not stored: a state machine restarts at its checkpoint and serves only once it
//! has caught up with what a leader knows to be committed. Deliberately absent: the state machine.

use crate::types::{Command, Entry, LogId, Membership, TypeConfig, Vote};
use crate::wal::{EntryKind, LogEntry, LogPoint, SavedVote, Wal, WalError, completion};
use bytes::Bytes;
use futures_util::{Stream, stream};
use ogee_common::limits::WAL_READ_BYTES_MAX;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::type_config::alias::EntryOf;
use openraft::{EntryPayload, OptionalSend};
use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};

/// The log of one group. Clones share it.
#[derive(Debug, Clone)]
pub struct LogStore {
    wal: Wal,
    group: u64,
}

fn log_id(point: LogPoint) -> LogId {
    LogId { leader_id: point.term.into(), index: point.index }
}

const fn point(id: &LogId) -> LogPoint {
    LogPoint { term: id.leader_id.term, index: id.index }
}

fn encode(entry: Entry) -> Result<LogEntry, io::Error> {
    let (kind, payload) = match entry.payload {
        EntryPayload::Blank => (EntryKind::Blank, Bytes::new()),
        EntryPayload::Normal(command) => (EntryKind::Command, command.0),
        EntryPayload::Membership(members) => {
            let bytes = postcard::to_allocvec(&members).map_err(io::Error::other)?;
            (EntryKind::Membership, Bytes::from(bytes))
        }
    };
    let LogPoint { term, index } = point(&entry.log_id);
    Ok(LogEntry { index, term, kind, payload })
}

fn decode(entry: LogEntry) -> Result<Entry, io::Error> {
    let log_id = log_id(entry.point());
    let payload = match entry.kind {
        EntryKind::Blank => EntryPayload::Blank,
        EntryKind::Command => EntryPayload::Normal(Command(entry.payload)),
        EntryKind::Membership => {
            let members: Membership = postcard::from_bytes(&entry.payload)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            EntryPayload::Membership(members)
        }
    };
    Ok(Entry { log_id, payload })
}

/// The indexes a range means, end excluded.
fn indexes(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(i) => *i,
        Bound::Excluded(i) => i.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(i) => i.saturating_add(1),
        Bound::Excluded(i) => *i,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl LogStore {
    pub(crate) const fn new(wal: Wal, group: u64) -> Self {
        Self { wal, group }
    }

    /// The log it lies in.
    #[must_use]
    pub const fn wal(&self) -> &Wal {
        &self.wal
    }

    /// Its group.
    #[must_use]
    pub const fn group(&self) -> u64 {
        self.group
    }

    async fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Entry>, io::Error> {
        let entries = self.wal.read(self.group, range, max_bytes).await?;
        entries.into_iter().map(decode).collect()
    }
}

/// Entries that are read in bounded parts, because a restart may apply more than fits in memory.
struct Parts {
    store: LogStore,
    range: Range<u64>,
    part: VecDeque<Entry>,
    failed: bool,
}

impl Parts {
    async fn next(mut self) -> Option<(Result<Entry, io::Error>, Self)> {
        if self.part.is_empty() && !self.failed && !self.range.is_empty() {
            match self.store.read(self.range.clone(), WAL_READ_BYTES_MAX).await {
                Ok(entries) => {
                    self.range.start = entries.last().map_or(self.range.end, |e| e.log_id.index + 1);
                    self.part = entries.into();
                }
                Err(e) => {
                    self.failed = true;
                    return Some((Err(e), self));
                }
            }
        }
        self.part.pop_front().map(|entry| (Ok(entry), self))
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<EntryOf<TypeConfig>, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let parts = Parts { store: self.clone(), range: indexes(&range), part: VecDeque::new(), failed: false };
        Box::pin(stream::unfold(parts, Parts::next))
    }

    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read(indexes(&range), usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let vote = self.wal.group(self.group).vote;
        Ok(vote.map(|v| {
            if v.committed { Vote::new_committed(v.term, v.replica) } else { Vote::new(v.term, v.replica) }
        }))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start..end, WAL_READ_BYTES_MAX).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let view = self.wal.group(self.group);
        Ok(LogState { last_purged_log_id: view.purged.map(log_id), last_log_id: view.last.map(log_id) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let saved =
            SavedVote { term: vote.leader_id.term, replica: vote.leader_id.voted_for, committed: vote.committed };
        let (done, durable) = completion();
        self.wal.save_vote(self.group, saved, done)?;
        Ok(durable.wait("save vote").await?)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<LogEntry> = entries.into_iter().map(encode).collect::<Result<_, _>>()?;
        self.wal.queue_room().await?;
        let done = move |result: Result<(), WalError>| callback.io_completed(result.map_err(io::Error::from));
        Ok(self.wal.append(self.group, entries, Box::new(done))?)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        Ok(self.wal.truncate_from(self.group, last_log_id.map_or(0, |id| id.index + 1))?)
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        Ok(self.wal.purge(self.group, point(&log_id))?)
    }
}

#[cfg(test)]
mod tests;
