//! The write-ahead log: one per process, shared by all Raft groups in it. Used by [`crate::log_store`].
//!
//! ```text
//!  append, vote, purge ──> Core (mutex): groups, queue ──> writer task ──> batch ──> segment file
//!  (any group)                    ^                            |  one write in flight
//!                                 └──── callbacks, freeing <───┘
//! ```
//! Everything that is queued when the writer turns to the queue goes into one batch and shares one flush; it never waits
//! for more. Invariants: a callback is called with `Ok` only after its records and all records queued before them are
//! durable; a failed or short write ends the log for good ([`Wal::ended`]) and every later call fails; a full disk ends
//! nothing: the log waits for space and refuses by [`Wal::admit`] before it is needed; memory is bounded by the limits
//! named `WAL_*`. Files: `core` is the state, `writer` the task, `segments` the files, `format` the bytes, `read` the way
//! back, `replay` and `recovery` the start. Deliberately absent: moving live entries out of old segments; the owner
//! checkpoints and purges the groups that [`Wal::pressure`] names.

mod cache;
mod core;
mod error;
pub(crate) mod format;
mod group;
mod read;
mod recovery;
mod replay;
mod segments;
mod stats;
#[cfg(test)]
mod tests;
mod view;
mod writer;

pub use error::{Place, WalError, WalErrorKind};
pub use format::{EntryKind, LogPoint, SavedVote};
pub use stats::WalStats;
pub use view::{GroupView, WalOptions, WalPressure};

use self::core::{Core, Phase};
use bytes::Bytes;
use ogee_common::limits::{WAL_ENTRY_BYTES_MAX, WAL_QUEUE_BYTES_MAX};
use ogee_disk::{ALIGN, DataDir};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// Called once, when what it was given with is durable or never will be. Runs on the writer's task: it must not block.
pub type Completion = Box<dyn FnOnce(Result<(), WalError>) + Send>;

/// One entry of a group's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Position in the group's log, from 0.
    pub index: u64,
    /// Term of the leader that appended it.
    pub term: u64,
    /// What the payload is.
    pub kind: EntryKind,
    /// Opaque bytes; empty for a blank entry.
    pub payload: Bytes,
}

impl LogEntry {
    /// Its position.
    #[must_use]
    pub const fn point(&self) -> LogPoint {
        LogPoint { term: self.term, index: self.index }
    }
}

/// Bytes of a segment in a simulation.
const SEGMENT_BYTES_SIMULATED: u64 = 512 << 10;

/// What the handles and the writer share.
struct Shared {
    core: Mutex<Core>,
    /// Tells the writer that there is work or that the log closes.
    work: Notify,
    /// Tells appends that the queue became shorter.
    drained: Notify,
    /// Why the log takes nothing any more.
    ended: watch::Sender<Option<WalError>>,
    counters: stats::Counters,
    segment_bytes: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the log when the last handle is gone.
struct Handle {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.start_closing();
    }
}

impl Shared {
    fn start_closing(&self) {
        let mut core = self.lock();
        if matches!(core.phase, Phase::Open) {
            core.phase = Phase::Closing;
        }
        drop(core);
        self.work.notify_one();
    }
}

/// A handle to the log; clones share it. The log closes when the last one is dropped, after writing what is queued.
#[derive(Clone)]
pub struct Wal {
    handle: Arc<Handle>,
}

impl std::fmt::Debug for Wal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wal").field("pressure", &self.pressure()).finish()
    }
}

impl Wal {
    /// Opens the log in the subdirectory `sub` of a data directory, creating it if there is none; recovers it on the
    /// blocking pool and starts the writer on the calling tokio runtime, on which it stays.
    ///
    /// # Errors
    /// `Corrupt` when what is on disk cannot be right, `Unsupported` when a newer version wrote it, `NoSpace` when the
    /// first segment cannot be created, `TooBig` for impossible options, `Io`.
    pub async fn open(dir: &DataDir, sub: &str, mut options: WalOptions) -> Result<Self, WalError> {
        if ogee_common::sim::running() {
            // Small ones: they roll often, and hundreds of simulated disks fit into memory.
            options.segment_bytes = options.segment_bytes.min(SEGMENT_BYTES_SIMULATED);
        }
        if options.segment_bytes < 64 << 10 || !options.segment_bytes.is_multiple_of(ALIGN as u64) {
            return Err(WalError::new(WalErrorKind::TooBig, "choose segment size"));
        }
        let place = segments::Place { dir: dir.clone(), sub: sub.to_owned() };
        let start = writer::Start::prepare(place, options).await?;
        let (core, writer) = start.into_parts();
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            work: Notify::new(),
            drained: Notify::new(),
            ended: watch::Sender::new(None),
            counters: stats::Counters::default(),
            segment_bytes: writer.segment_bytes(),
        });
        let task = tokio::spawn(writer.run(Arc::clone(&shared)));
        Ok(Self { handle: Arc::new(Handle { shared, writer: Mutex::new(Some(task)) }) })
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    /// Runs a change of the state and wakes the writer if there is now something to write.
    fn change<T>(&self, f: impl FnOnce(&mut Core) -> Result<T, WalError>) -> Result<T, WalError> {
        let mut core = self.shared().lock();
        let idle = !core.has_work();
        let out = f(&mut core);
        let wake = idle && core.has_work();
        drop(core);
        if wake {
            self.shared().work.notify_one();
        }
        out
    }

    /// Writes what is queued and stops. Later calls fail with `Closed`.
    ///
    /// # Errors
    /// Why the log ended, if it did not end by this call.
    pub async fn close(&self) -> Result<(), WalError> {
        self.shared().start_closing();
        let mut ended = self.ended();
        let why = match ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone(),
            Err(_) => None,
        };
        let task = self.handle.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // A panic of the writer has already ended the log with an error.
            let _ = task.await;
        }
        match why {
            Some(e) if e.kind() != WalErrorKind::Closed => Err(e),
            _ => Ok(()),
        }
    }

    /// Becomes `Some` when the log takes nothing any more, for whatever reason. The process then stops its replicas (INV).
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<Option<WalError>> {
        self.shared().ended.subscribe()
    }

    /// The groups the log knows, in order.
    #[must_use]
    pub fn groups(&self) -> Vec<u64> {
        let mut groups: Vec<u64> = self.shared().lock().groups.keys().copied().collect();
        groups.sort_unstable();
        groups
    }

    /// The store of one group; creates the group if it is new. Several stores of one group share its state.
    ///
    /// # Errors
    /// `TooBig` above [`ogee_common::limits::WAL_GROUPS_MAX`] groups.
    pub fn open_group(&self, group: u64) -> Result<crate::log_store::LogStore, WalError> {
        self.shared().lock().open_group(group)?;
        Ok(crate::log_store::LogStore::new(self.clone(), group))
    }

    /// Forgets a group with all its entries and its vote; durable when it returns. The caller has stopped its replica.
    ///
    /// # Errors
    /// `Poisoned`, `Closed`, `Io`.
    pub async fn remove_group(&self, group: u64) -> Result<(), WalError> {
        let (done, durable) = completion();
        self.change(|core| core.remove_group(group, done))?;
        durable.wait("remove group").await
    }

    /// The state of a group; empty if it is unknown.
    #[must_use]
    pub fn group(&self, group: u64) -> GroupView {
        let core = self.shared().lock();
        core.groups
            .get(&group)
            .map_or_else(GroupView::default, |g| GroupView { vote: g.vote, purged: g.purged, last: g.last(), damaged: g.damaged })
    }

    /// Whether `bytes` of new payload may be proposed. False only while the disk is full and the room that is left is
    /// needed for votes, purges and what is already under way.
    ///
    /// # Errors
    /// `NoSpace`; `Poisoned` and `Closed` as appends.
    pub fn admit(&self, bytes: usize) -> Result<(), WalError> {
        let core = self.shared().lock();
        if let Phase::Ended(e) = &core.phase {
            return Err(e.poisoned());
        }
        let need = (bytes + core.queue_bytes) as u64 + self.shared().segment_bytes / 4;
        if core.no_space && room_bytes(&core) < need {
            return Err(WalError::new(WalErrorKind::NoSpace, "admit entry"));
        }
        Ok(())
    }

    /// Waits until the queue has room for more appends.
    ///
    /// # Errors
    /// `Poisoned`, `Closed`.
    pub async fn queue_room(&self) -> Result<(), WalError> {
        loop {
            let drained = self.shared().drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            {
                let core = self.shared().lock();
                if let Phase::Ended(e) = &core.phase {
                    return Err(e.poisoned());
                }
                if core.queue_bytes <= WAL_QUEUE_BYTES_MAX {
                    return Ok(());
                }
            }
            drained.await;
        }
    }

    /// Appends entries, the first one directly behind the group's last. They are readable when this returns; `done` is
    /// called when all of them are durable, after the callbacks of everything queued earlier.
    ///
    /// # Errors
    /// `Gap`, `TooBig`: nothing was appended. `Poisoned`, `Closed`. In all these cases `done` is dropped uncalled.
    pub fn append(&self, group: u64, entries: Vec<LogEntry>, done: Completion) -> Result<(), WalError> {
        self.change(|core| core.append(group, entries, done))
    }

    /// Saves a vote, behind everything queued earlier; `done` is called when it is durable.
    ///
    /// # Errors
    /// `Poisoned`, `Closed`.
    pub fn save_vote(&self, group: u64, vote: SavedVote, done: Completion) -> Result<(), WalError> {
        self.change(|core| core.save_vote(group, vote, done))
    }

    /// Removes the entries from `from` on; durable before anything queued later.
    ///
    /// # Errors
    /// `Poisoned`, `Closed`.
    pub fn truncate_from(&self, group: u64, from: u64) -> Result<(), WalError> {
        self.change(|core| core.truncate_from(group, from))
    }

    /// Removes the entries up to `point`, which may lie beyond the last one; durable before anything queued later.
    ///
    /// # Errors
    /// `Poisoned`, `Closed`.
    pub fn purge(&self, group: u64, point: LogPoint) -> Result<(), WalError> {
        self.change(|core| core.purge(group, point))
    }

    /// The live entries of a range: at least one if there is any, then up to `max_bytes` of payload. Reads files on the
    /// blocking pool when an entry is not cached.
    ///
    /// # Errors
    /// `Corrupt` when a stored entry is not what was written; `Io`.
    pub async fn read(&self, group: u64, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogEntry>, WalError> {
        self.shared().read(group, range, max_bytes).await
    }

    /// How full the log is. Costs a look at every group.
    #[must_use]
    pub fn pressure(&self) -> WalPressure {
        let core = self.shared().lock();
        let oldest = core.segments.front().map(|s| s.number);
        let in_oldest = |g: &group::Group| g.slots.front().and_then(|s| s.location).map(|l| l.segment) == oldest;
        let mut oldest_groups: Vec<u64> =
            core.groups.iter().filter(|(_, g)| !g.slots.is_empty() && in_oldest(g)).map(|(id, _)| *id).collect();
        oldest_groups.sort_unstable();
        WalPressure {
            segments: core.segments.len(),
            bytes: core.segments.iter().map(|s| s.file.bytes()).sum(),
            room_bytes: room_bytes(&core),
            oldest_groups,
            queued_bytes: core.queue_bytes,
            cached_bytes: core.cached_bytes(),
            no_space: core.no_space,
        }
    }

    /// Counters since the log was opened.
    #[must_use]
    pub fn stats(&self) -> WalStats {
        self.shared().counters.snapshot()
    }

    /// Largest payload of an entry, bytes.
    #[must_use]
    pub fn entry_bytes_max(&self) -> usize {
        self.shared().lock().entry_bytes_max
    }
}

fn room_bytes(core: &Core) -> u64 {
    let tail = core.tail.as_ref().map_or(0, |t| t.file.bytes() - t.offset);
    tail + core.prepared_bytes + core.freed.iter().map(|(_, f)| f.bytes()).sum::<u64>()
}

/// Largest entry of a log with such segments: half a segment leaves room for its head.
fn entry_bytes_max(segment_bytes: u64) -> usize {
    usize::try_from(segment_bytes / 2).unwrap_or(usize::MAX).min(WAL_ENTRY_BYTES_MAX)
}

/// Waits for one completion.
pub(crate) struct Durable(tokio::sync::oneshot::Receiver<Result<(), WalError>>);

/// A completion and its waiter.
pub(crate) fn completion() -> (Completion, Durable) {
    let (tx, rx) = tokio::sync::oneshot::channel();
    // The waiter may have gone away; then nobody wants to know.
    (Box::new(move |result| drop(tx.send(result))), Durable(rx))
}

impl Durable {
    pub(crate) async fn wait(self, op: &'static str) -> Result<(), WalError> {
        self.0.await.unwrap_or_else(|_| Err(WalError::new(WalErrorKind::Closed, op)))
    }
}
