//! The state machine as openraft sees it, and as the network and the installation of snapshots share it.
//!
//! openraft's worker owns [`MachineAdapter`]; the machine itself lives in [`Machine`] behind a lock that is held for one
//! batch, one checkpoint or one installation, never across two. Invariants: entries reach the state machine in log
//! order and each once since its last load; an entry at or below its position is skipped, not applied again, because an
//! installed snapshot may be ahead of what openraft knows (see [`crate::snapshot`]); `checkpoint` is what the state
//! machine holds durably, and openraft is told of nothing later, so the log is never purged beyond it.

use crate::alias::{Entry, LogId, SnapshotMeta, StoredMembership, log_id_at, pos_of};
use crate::api::{Applied, ApplyEntry, EntryKind, LogPos, RaftSnapshot, StateMachine, StateMachineError};
use crate::codec::{self, CodecError};
use crate::snapshot::ReplicaSource;
use crate::tail::Tail;
use crate::types::{Reply, TypeConfig};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt};
use ogee_common::checksum::crc32c;
use ogee_common::limits::RAFT_APPLY_ENTRIES_MAX;
use ogee_common::sim;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot};
use std::io;
use std::sync::Arc;
use tokio::sync::{Mutex, watch};

/// [`StateMachine`] without its types.
trait AnyMachine: Send + Sync {
    fn apply(&mut self, entries: Vec<ApplyEntry>) -> BoxFuture<'_, Result<Vec<Bytes>, StateMachineError>>;
    fn checkpoint(&mut self) -> BoxFuture<'_, Result<Applied, StateMachineError>>;
    fn snapshot(&mut self) -> BoxFuture<'_, Result<RaftSnapshot, StateMachineError>>;
    fn install<'a>(
        &'a mut self,
        snapshot: RaftSnapshot,
        source: &'a ReplicaSource,
    ) -> BoxFuture<'a, Result<(), StateMachineError>>;
}

impl<S: StateMachine> AnyMachine for S {
    fn apply(&mut self, entries: Vec<ApplyEntry>) -> BoxFuture<'_, Result<Vec<Bytes>, StateMachineError>> {
        Box::pin(StateMachine::apply(self, entries))
    }

    fn checkpoint(&mut self) -> BoxFuture<'_, Result<Applied, StateMachineError>> {
        Box::pin(StateMachine::checkpoint(self))
    }

    fn snapshot(&mut self) -> BoxFuture<'_, Result<RaftSnapshot, StateMachineError>> {
        Box::pin(StateMachine::snapshot(self))
    }

    fn install<'a>(
        &'a mut self,
        snapshot: RaftSnapshot,
        source: &'a ReplicaSource,
    ) -> BoxFuture<'a, Result<(), StateMachineError>> {
        Box::pin(StateMachine::install(self, snapshot, source))
    }
}

/// Why a state machine cannot be worked with, besides its own errors.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineFault {
    /// Its membership is not what it was given.
    #[error("read the membership that the state machine kept")]
    Membership(#[from] CodecError),
    /// It gave more or fewer replies than it got entries.
    #[error("the state machine answered {replies} of {entries} entries")]
    Replies {
        /// Entries given.
        entries: usize,
        /// Replies got.
        replies: usize,
    },
    /// openraft wants to install what was not fetched.
    #[error("a snapshot that was not installed is to be confirmed")]
    NotInstalled,
    /// The state machine failed.
    #[error(transparent)]
    Machine(#[from] StateMachineError),
}

impl From<MachineFault> for io::Error {
    fn from(fault: MachineFault) -> Self {
        io::Error::other(fault)
    }
}

/// What of an installation came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installed {
    /// The state was replaced.
    Now,
    /// The state was as new already.
    Already,
}

struct Inner {
    machine: Box<dyn AnyMachine>,
    /// Where the state machine is.
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Where openraft believes it is: behind `applied` between the installation of a snapshot and its confirmation.
    confirmed: Option<LogId>,
    checkpoint: Option<SnapshotMeta>,
    tail: Tail,
}

/// The state machine of one replica, shared.
pub(crate) struct Machine {
    /// Group and replica, for a simulation.
    name: (u64, u64),
    inner: Mutex<Inner>,
    /// Counts checkpoints that ended, so that one can be waited for.
    checkpoints: watch::Sender<u64>,
}

impl Machine {
    /// Loads the state machine.
    pub(crate) async fn load<S: StateMachine>(name: (u64, u64), mut machine: S) -> Result<Arc<Self>, MachineFault> {
        let loaded = StateMachine::load(&mut machine).await?;
        let membership = codec::decode_stored_membership(&loaded.membership)?;
        let applied = loaded.pos.map(log_id_at);
        let checkpoint = applied.map(|id| meta(id, membership.clone()));
        let inner = Inner {
            machine: Box::new(machine),
            applied,
            membership,
            confirmed: applied,
            checkpoint,
            tail: Tail::default(),
        };
        Ok(Arc::new(Self { name, inner: Mutex::new(inner), checkpoints: watch::Sender::new(0) }))
    }

    /// Tells a simulation what is applied.
    fn observe(&self, pos: LogPos, kind: &EntryKind) {
        let bytes: &[u8] = match kind {
            EntryKind::Blank => &[],
            EntryKind::Command(bytes) | EntryKind::Membership(bytes) => bytes,
        };
        let ((group, replica), term, index) = (self.name, pos.term.0, pos.index);
        sim::saw(|| sim::Seen::Applied { group, index, term, crc: crc32c(bytes), replica });
    }

    /// Where the state machine is.
    pub(crate) async fn applied(&self) -> Option<LogId> {
        self.inner.lock().await.applied
    }

    /// A manifest of the state.
    pub(crate) async fn snapshot(&self) -> io::Result<RaftSnapshot> {
        Ok(self.inner.lock().await.machine.snapshot().await.map_err(MachineFault::Machine)?)
    }

    /// Replaces the state by a newer one. Apply waits meanwhile.
    pub(crate) async fn install(
        &self,
        snapshot: RaftSnapshot,
        source: &ReplicaSource,
    ) -> Result<Installed, MachineFault> {
        let mut inner = self.inner.lock().await;
        let Some(target) = snapshot.applied.pos.map(log_id_at) else { return Ok(Installed::Already) };
        if inner.applied >= Some(target) {
            return Ok(Installed::Already);
        }
        let membership = codec::decode_stored_membership(&snapshot.applied.membership)?;
        inner.machine.install(snapshot, source).await?;
        inner.applied = Some(target);
        inner.membership = membership.clone();
        inner.checkpoint = Some(meta(target, membership));
        inner.tail = Tail::default();
        Ok(Installed::Now)
    }

    /// Counts the checkpoints that ended.
    pub(crate) fn checkpoints(&self) -> watch::Receiver<u64> {
        self.checkpoints.subscribe()
    }

    /// Up to where the log may go when at most `entries` entries and `bytes` bytes are to stay before the checkpoint.
    pub(crate) async fn purgeable(&self, entries: u64, bytes: u64) -> Option<u64> {
        let mut inner = self.inner.lock().await;
        let checkpoint = inner.checkpoint.as_ref()?.last_log_id?.index;
        let by_entries = checkpoint.checked_sub(entries);
        let upto = by_entries.max(inner.tail.beyond(checkpoint, bytes))?;
        inner.tail.forget(upto);
        Some(upto)
    }

    async fn checkpoint(&self) -> Result<SnapshotMeta, MachineFault> {
        let mut inner = self.inner.lock().await;
        let done = inner.machine.checkpoint().await?;
        let membership = codec::decode_stored_membership(&done.membership)?;
        let checkpoint = SnapshotMeta { last_log_id: done.pos.map(log_id_at), last_membership: membership };
        inner.checkpoint = Some(checkpoint.clone());
        Ok(checkpoint)
    }
}

fn meta(last: LogId, membership: StoredMembership) -> SnapshotMeta {
    SnapshotMeta { last_log_id: Some(last), last_membership: membership }
}

/// What openraft calls a snapshot: nothing but its position, which is beside it. The manifest is made when it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SnapshotMarker;

/// The state machine that openraft owns.
pub(crate) struct MachineAdapter(pub(crate) Arc<Machine>);

/// One entry with whom to answer.
type Waiting = (Entry, Option<ApplyResponder<TypeConfig>>);

impl MachineAdapter {
    async fn apply_batch(&self, batch: Vec<io::Result<Waiting>>) -> io::Result<()> {
        let mut inner = self.0.inner.lock().await;
        let mut entries = Vec::with_capacity(batch.len());
        let mut responders = Vec::with_capacity(batch.len());
        let mut membership = None;
        let (mut last, mut bytes) = (None, 0);
        for item in batch {
            let (entry, responder) = item?;
            last = Some(entry.log_id);
            if inner.applied.is_some_and(|at| entry.log_id.index <= at.index) {
                // Part of an installed snapshot. Its proposer, if it is here at all, lost the lead before that.
                drop(responder);
                continue;
            }
            let pos = pos_of(&entry.log_id);
            let kind = match entry.payload {
                EntryPayload::Blank => EntryKind::Blank,
                EntryPayload::Normal(command) => EntryKind::Command(command.0),
                EntryPayload::Membership(m) => {
                    let stored = StoredMembership::new(Some(entry.log_id), m);
                    let encoded = codec::encode_stored_membership(&stored);
                    membership = Some(stored);
                    EntryKind::Membership(encoded)
                }
            };
            bytes += if let EntryKind::Command(command) = &kind { command.len() as u64 } else { 0 };
            self.0.observe(pos, &kind);
            entries.push(ApplyEntry { pos, kind });
            responders.push(responder);
        }
        if let Some(at) = entries.last().map(|e| e.pos) {
            let expected = entries.len();
            let replies = inner.machine.apply(entries).await.map_err(MachineFault::Machine)?;
            if replies.len() != expected {
                return Err(MachineFault::Replies { entries: expected, replies: replies.len() }.into());
            }
            inner.applied = Some(log_id_at(at));
            inner.membership = membership.unwrap_or_else(|| std::mem::take(&mut inner.membership));
            inner.tail.note(at.index, bytes);
            for (responder, reply) in responders.into_iter().zip(replies) {
                if let Some(responder) = responder {
                    responder.send(Reply(reply));
                }
            }
        }
        inner.confirmed = inner.confirmed.max(last);
        Ok(())
    }
}

impl RaftStateMachine<TypeConfig> for MachineAdapter {
    type SnapshotData = SnapshotMarker;
    type SnapshotBuilder = Checkpointer;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let inner = self.0.inner.lock().await;
        Ok((inner.applied, inner.membership.clone()))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batches = entries.ready_chunks(RAFT_APPLY_ENTRIES_MAX);
        while let Some(batch) = batches.next().await {
            self.apply_batch(batch).await?;
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Checkpointer> {
        let inner = self.0.inner.lock().await;
        // openraft must not hear of a checkpoint beyond what it has applied. It will, after the confirmation.
        if !force && inner.applied != inner.confirmed {
            drop(inner);
            self.0.checkpoints.send_modify(|n| *n += 1);
            return None;
        }
        Some(Checkpointer(self.0.clone()))
    }

    async fn get_snapshot_builder(&mut self) -> Checkpointer {
        Checkpointer(self.0.clone())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        _snapshot: SnapshotMarker,
    ) -> io::Result<()> {
        let mut inner = self.0.inner.lock().await;
        if inner.applied < meta.last_log_id {
            return Err(MachineFault::NotInstalled.into());
        }
        inner.confirmed = inner.confirmed.max(meta.last_log_id);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<TypeConfig, SnapshotMarker>>> {
        let inner = self.0.inner.lock().await;
        Ok(inner.checkpoint.clone().map(|meta| Snapshot { meta, snapshot: SnapshotMarker }))
    }
}

/// Makes a checkpoint in a task of its own, as openraft wants it.
pub(crate) struct Checkpointer(Arc<Machine>);

impl RaftSnapshotBuilder<TypeConfig> for Checkpointer {
    type SnapshotData = SnapshotMarker;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<TypeConfig, SnapshotMarker>> {
        let result = self.0.checkpoint().await;
        self.0.checkpoints.send_modify(|n| *n += 1);
        Ok(Snapshot { meta: result?, snapshot: SnapshotMarker })
    }
}
