//! The replicated state machine of the MDS: rows in a metadata store, changed by commands of the Raft log.
//!
//! [`MdsMachine`] is given to the Raft layer; [`Shared`] is how the service reads what it applied. Invariants: one batch
//! per log entry holds the entry's changes and its position, so a crash leaves the state after some prefix of the log;
//! batches are not synced one by one, [`MdsMachine::checkpoint`] syncs, and what a crash loses is applied again from the
//! log; a reader never sees half a command. Deliberately absent: time, randomness, liveness (leader's memory), gRPC.
//!
//! | file | what it keeps |
//! | --- | --- |
//! | `namespace` | folders, names, volumes |
//! | `layers` | ancestry, placement by reference, collection |
//! | `snapshots`, `groups`, `clones` | exactness, cuts through several volumes, parents, rollback |
//! | `flatten` | layers that let go of their parents |
//! | `options` | sector sizes and limits |
//! | `backups` | layers that stand on a backup |
//! | `attach` | epochs, segments |
//! | `tasks` | what copysets must do |
//! | `service_tasks`, `schedules` | what daemons such as snapclone do: backups, restores; every so often |
//! | `topology` | chunkservers, pools, copysets, replica ids |

pub(crate) mod apply;
pub(crate) mod attach;
pub(crate) mod backups;
pub(crate) mod clones;
pub(crate) mod command;
mod dump;
pub(crate) mod flatten;
pub(crate) mod groups;
pub(crate) mod info;
pub(crate) mod key;
pub(crate) mod layers;
pub(crate) mod moves;
pub(crate) mod namespace;
pub(crate) mod options;
pub(crate) mod row;
pub(crate) mod schedules;
pub(crate) mod service_tasks;
pub(crate) mod snapshots;
pub(crate) mod tasks;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod topology;
pub(crate) mod tx;

use self::command::{Envelope, encode_answer};
use self::dump::Dump;
use self::row::{AppliedRow, Row};
use self::tx::{RowError, Tx};
use crate::refusal::Refusal;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ogee_common::id::Term;
use ogee_disk::meta::{Durability, MetaStore, StoreError};
use ogee_raft::{
    Applied, ApplyEntry, EntryKind, FetchHandler, LogPos, RaftSnapshot, SnapshotSource, StateMachine,
    StateMachineError,
};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Why a step of a command ended.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The command is refused; nothing of it happens.
    Refused(Box<Refusal>),
    /// The replica cannot go on.
    Rows(RowError),
}

impl Halt {
    /// Puts another reason in the place of a refusal.
    fn replace_refusal(self, refusal: Refusal) -> Self {
        match self {
            Self::Refused(_) => refusal.into(),
            rows @ Self::Rows(_) => rows,
        }
    }
}

impl From<Refusal> for Halt {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl From<RowError> for Halt {
    fn from(error: RowError) -> Self {
        Self::Rows(error)
    }
}

/// The result of a step.
pub(crate) type Step<T> = Result<T, Halt>;

/// The rows, shared by the machine, which writes, and the service, which reads.
pub(crate) struct Shared {
    store: Arc<dyn MetaStore>,
    /// Held for writing while a command changes the store.
    gate: RwLock<()>,
    /// The last snapshot that was too large for one frame.
    dump: Mutex<Option<Dump>>,
}

impl Shared {
    /// Shares a store.
    pub(crate) fn new(store: Arc<dyn MetaStore>) -> Arc<Self> {
        Arc::new(Self { store, gate: RwLock::new(()), dump: Mutex::new(None) })
    }

    /// Reads rows as they are between two commands. `read` must not block or wait.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Tx<'_>) -> T) -> T {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        read(&Tx::new(&*self.store))
    }

    /// Rows of one kind, as they were at one moment. Reads them all, but holds no command up.
    pub(crate) fn count<R: Row>(&self) -> Result<u64, StoreError> {
        let mut rows = 0;
        self.store.dump(&[R::TABLE], &mut |_, _, _| {
            rows += 1;
            true
        })?;
        Ok(rows)
    }
}

impl FetchHandler for Shared {
    fn fetch(&self, request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>> {
        let dump = self.dump.lock().unwrap_or_else(PoisonError::into_inner);
        let page = dump::page(dump.as_ref(), &request).map_err(|e| failed("serve a page of a snapshot", e));
        async move { page }.boxed()
    }
}

fn failed(verb: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> StateMachineError {
    StateMachineError { verb, source: Box::new(source) }
}

/// The state machine.
pub(crate) struct MdsMachine {
    shared: Arc<Shared>,
    applied: AppliedRow,
}

impl MdsMachine {
    /// A machine on the rows of a store; [`StateMachine::load`] is still to be called.
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, applied: AppliedRow { pos: None, membership: vec![] } }
    }

    fn applied(&self) -> Applied {
        let pos = self.applied.pos.map(|(term, index)| LogPos { term: Term(term), index });
        Applied { pos, membership: Bytes::from(self.applied.membership.clone()) }
    }

    /// Applies one entry and returns its encoded answer.
    fn apply_entry(&mut self, entry: &ApplyEntry) -> Result<Bytes, RowError> {
        if self.applied.pos.is_some_and(|(_, index)| entry.pos.index <= index) {
            return Ok(Bytes::new()); // Its effect is in the rows; nobody waits for the answer of a replay.
        }
        let mut applied = self.applied.clone();
        applied.pos = Some((entry.pos.term.0, entry.pos.index));
        let shared = self.shared.clone();
        let mut tx = Tx::new(&*shared.store);
        let mut reply = Bytes::new();
        match &entry.kind {
            EntryKind::Blank => {}
            EntryKind::Membership(membership) => applied.membership = membership.to_vec(),
            EntryKind::Command(command) => {
                let envelope = Envelope::decode(command)?;
                let answer = apply::apply(&mut tx, &envelope)?;
                if answer.is_err() {
                    tx = Tx::new(&*shared.store);
                }
                tracing::debug!(target: "controlpath", index = entry.pos.index, rows = tx.changed(), "applied");
                reply = encode_answer(&answer).into();
            }
        }
        tx.put(&(), &applied);
        let batch = tx.into_batch();
        {
            let _gate = shared.gate.write().unwrap_or_else(PoisonError::into_inner);
            shared.store.write(batch, Durability::Deferred)?;
        }
        self.applied = applied;
        Ok(reply)
    }
}

/// Runs a blocking call of the store away from the event loop.
async fn blocking<T: Send + 'static>(
    verb: &'static str,
    call: impl FnOnce() -> Result<T, RowError> + Send + 'static,
) -> Result<T, StateMachineError> {
    match ogee_common::sim::spawn_blocking(call).await {
        Ok(result) => result.map_err(|e| failed(verb, e)),
        Err(e) => Err(failed(verb, e)),
    }
}

impl StateMachine for MdsMachine {
    async fn load(&mut self) -> Result<Applied, StateMachineError> {
        let shared = self.shared.clone();
        let row = blocking("load metadata", move || {
            // What survived a crash of the process only is made durable before it counts as a checkpoint.
            shared.store.sync()?;
            Tx::new(&*shared.store).get::<AppliedRow>(&())
        });
        if let Some(row) = row.await? {
            self.applied = row;
        }
        Ok(self.applied())
    }

    async fn apply(&mut self, entries: Vec<ApplyEntry>) -> Result<Vec<Bytes>, StateMachineError> {
        entries.iter().map(|e| self.apply_entry(e).map_err(|e| failed("apply a metadata command", e))).collect()
    }

    async fn checkpoint(&mut self) -> Result<Applied, StateMachineError> {
        let shared = self.shared.clone();
        blocking("checkpoint metadata", move || Ok(shared.store.sync()?)).await?;
        Ok(self.applied())
    }

    async fn snapshot(&mut self) -> Result<RaftSnapshot, StateMachineError> {
        let shared = self.shared.clone();
        let dump = blocking("dump metadata", move || Dump::take(&*shared.store)).await?;
        let manifest = dump.manifest();
        *self.shared.dump.lock().unwrap_or_else(PoisonError::into_inner) = dump.keep();
        Ok(RaftSnapshot { applied: self.applied(), manifest })
    }

    async fn install(
        &mut self,
        snapshot: RaftSnapshot,
        source: &(impl SnapshotSource + 'static),
    ) -> Result<(), StateMachineError> {
        let rows = dump::receive(snapshot.manifest, source).await?;
        let shared = self.shared.clone();
        let row = blocking("install metadata", move || {
            let _gate = shared.gate.write().unwrap_or_else(PoisonError::into_inner);
            shared.store.replace_all(row::TABLES, rows)?;
            Tx::new(&*shared.store).expect::<AppliedRow>(&())
        });
        self.applied = row.await?;
        Ok(())
    }
}
