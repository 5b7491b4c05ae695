//! What the Raft layer wants from a replicated state machine, and the words both sides share.
//!
//! Implemented by the copyset (chunkserver) and by the MDS; called by one task per group, so `&mut self` methods never
//! overlap. Nothing here names openraft. Invariants: entries are applied in log order, each at least once after the
//! position that [`StateMachine::load`] reported, and never before a majority holds them durably; whatever was applied
//! after the last checkpoint is applied again after a crash.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use ogee_common::id::{ReplicaId, Term};
use std::collections::BTreeMap;
use std::future::Future;

/// A position of the Raft log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPos {
    /// The term of the leader that appended the entry.
    pub term: Term,
    /// The index of the entry, from 0.
    pub index: u64,
}

/// What a checkpoint holds besides the state machine's own rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Last entry whose effect the state holds; `None` for a new replica.
    pub pos: Option<LogPos>,
    /// The membership last applied, opaque to the state machine; empty for none.
    pub membership: Bytes,
}

/// What an entry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// Nothing (a new leader's first entry).
    Blank,
    /// A command of the state machine.
    Command(Bytes),
    /// A new membership, opaque: keep it as [`Applied::membership`].
    Membership(Bytes),
}

/// A committed entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApplyEntry {
    /// Where it stands in the log.
    pub pos: LogPos,
    /// What it asks for.
    pub kind: EntryKind,
}

/// A Raft snapshot as it travels: never data pages, only what is needed to fetch them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftSnapshot {
    /// Position and membership of the state.
    pub applied: Applied,
    /// The state machine's own description; at most [`MANIFEST_BYTES_MAX`] bytes.
    pub manifest: Bytes,
}

/// Bytes of a manifest: it travels in one frame.
pub const MANIFEST_BYTES_MAX: usize = 7 << 20;

/// A state machine that can go on no more. The replica stops and says so; nothing is retried.
#[derive(Debug, thiserror::Error)]
#[error("{verb}")]
pub struct StateMachineError {
    /// What was tried, as "verb object".
    pub verb: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Fetches parts of the sender's state while a snapshot is installed. The request and the answer's form belong to the
/// state machine; a request is at most 64 KiB, an answer at most [`MANIFEST_BYTES_MAX`].
pub trait SnapshotSource: Send + Sync {
    /// Asks the replica that sent the snapshot.
    ///
    /// # Errors
    /// When the sender cannot be reached or refuses; the install fails and is tried again by the leader.
    fn fetch(&self, request: Bytes) -> impl Future<Output = Result<Bytes, StateMachineError>> + Send;
}

/// The other side of [`SnapshotSource`]: answers a replica that installs a snapshot of this one. It is called while the
/// state machine goes on applying, so it works on its own handle of the store.
pub trait FetchHandler: Send + Sync + 'static {
    /// Answers one request of a [`SnapshotSource::fetch`].
    ///
    /// # Errors
    /// When the request makes no sense or the data cannot be read; the asker's install fails and is tried again.
    fn fetch(&self, request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>>;
}

/// A replicated state machine.
pub trait StateMachine: Send + Sync + 'static {
    /// The position of the last durable checkpoint. Called once, before anything else.
    ///
    /// # Errors
    /// When the checkpoint cannot be read; the replica does not start.
    fn load(&mut self) -> impl Future<Output = Result<Applied, StateMachineError>> + Send;

    /// Applies entries in order and returns one reply per entry (empty for blanks and memberships). A command that is
    /// refused (stale epoch, malformed) is a normal reply, not an error.
    ///
    /// # Errors
    /// Only when the replica cannot go on (disk failure); it stops.
    fn apply(&mut self, entries: Vec<ApplyEntry>)
    -> impl Future<Output = Result<Vec<Bytes>, StateMachineError>> + Send;

    /// Makes everything applied so far durable and returns its position: from then on the log up to there may be purged.
    ///
    /// # Errors
    /// Only when the replica cannot go on.
    fn checkpoint(&mut self) -> impl Future<Output = Result<Applied, StateMachineError>> + Send;

    /// Describes the state of the last checkpoint (or a later one) for a replica that fell behind the log.
    ///
    /// # Errors
    /// Only when the replica cannot go on.
    fn snapshot(&mut self) -> impl Future<Output = Result<RaftSnapshot, StateMachineError>> + Send;

    /// Replaces the state by the snapshot's and makes it durable before returning.
    ///
    /// # Errors
    /// When the source fails, the old state (or a partly fetched one that is marked as not servable and will be fetched
    /// again) remains and the leader tries again.
    fn install(
        &mut self,
        snapshot: RaftSnapshot,
        source: &(impl SnapshotSource + 'static),
    ) -> impl Future<Output = Result<(), StateMachineError>> + Send;
}

/// Where processes of the cluster listen. Filled by the MDS's answers, or from configuration for the MDS itself.
pub trait AddressBook: Send + Sync + 'static {
    /// The data address of a process (chunkserver id or MDS node number), if known.
    fn addr(&self, process: u32) -> Option<std::net::SocketAddr>;
}

/// Members of a new group: replica id and the process that hosts it.
pub type Members = BTreeMap<ReplicaId, u32>;

/// A proposal that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposed {
    /// Where it stands in the log.
    pub pos: LogPos,
    /// What the state machine answered.
    pub reply: Bytes,
}

/// What is known of the leader: a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeaderHint {
    /// The process that hosts the leader; 0 unknown.
    pub process: u32,
    /// The term this replica is in.
    pub term: Term,
}

/// Why a proposal or a read barrier failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RaftError {
    /// This replica does not lead, or leads in another term than the one expected. Nothing was proposed.
    #[error("not the leader (leader hint: process {}, {})", .0.process, .0.term)]
    NotLeader(LeaderHint),
    /// The replica leads but has no majority now, or its lease ran out. Nothing was proposed.
    #[error("no majority")]
    NoQuorum,
    /// Leadership was lost while the proposal was under way: its outcome is unknown.
    #[error("outcome unknown: leadership was lost")]
    Unknown,
    /// Too much is proposed already. Nothing was proposed.
    #[error("too many proposals")]
    Overloaded,
    /// The command is longer than [`ogee_common::limits::RAFT_COMMAND_BYTES_MAX`]. Nothing was proposed.
    #[error("command too long")]
    TooLong,
    /// The disk of the leader's log is full. Nothing was proposed.
    #[error("no space for the log")]
    NoSpace,
    /// The replica has stopped (disk failure or shutdown).
    #[error("the replica has stopped")]
    Stopped,
}
