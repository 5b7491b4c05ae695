//! [`CopysetMachine`]: the replicated state machine of a copyset. Driven by the Raft layer, one call at a time.
//!
//! It decodes a log entry, asks the rules ([`crate::store::LayerTable`]) and gives what they admit to the chunk store.
//! Invariants: entries are applied one after the other and each is all or nothing for the rules; a refusal is a reply and
//! the same on every replica; after the first disk failure, or an entry that this build does not know, nothing is attempted any more. The store's own checkpoint
//! runs between two entries when too much is dirty, so memory is bounded whatever the Raft layer does.
//!
//! Reply of a command: status (u16, little-endian), then the head of the reply ([`Refusal::reply`]).

use super::install::InstallError;
use crate::store::error::{ChunkStoreError, blocking};
use crate::store::{CopysetStore, Refusal};
use bytes::Bytes;
use ogee_common::id::CopysetId;
use ogee_common::limits::{CHUNK_BYTES, WRITEBACK_LAG_MAX};
use ogee_proto::data::{Command, Status};
use ogee_raft::api::{
    Applied, ApplyEntry, EntryKind, LogPos, RaftSnapshot, SnapshotSource, StateMachine, StateMachineError,
};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// The state machine of one copyset replica.
#[derive(Debug)]
pub struct CopysetMachine {
    store: Arc<CopysetStore>,
    /// Write-back that was started last; joined before the next one, so at most one is under way, and an entry waits for
    /// it only when it lags far behind.
    writeback: Option<JoinHandle<Result<(), ChunkStoreError>>>,
    failed: bool,
}

impl CopysetMachine {
    /// The state machine over a copyset's store, which reads share. At most one may live per copyset.
    #[must_use]
    pub const fn new(store: Arc<CopysetStore>) -> Self {
        Self { store, writeback: None, failed: false }
    }

    async fn apply_entry(&mut self, entry: ApplyEntry) -> Result<Bytes, ChunkStoreError> {
        self.extend_horizon(entry.pos.index).await?;
        let reply = match entry.kind {
            EntryKind::Blank => Bytes::new(),
            EntryKind::Membership(membership) => {
                self.store.state().applied.membership = membership;
                Bytes::new()
            }
            EntryKind::Command(command) => self.apply_command(entry.pos, &command).await?,
        };
        self.store.state().applied.pos = Some(entry.pos);
        if self.store.checkpoint_due() {
            self.store.checkpoint().await?;
        }
        self.start_writeback().await?;
        Ok(reply)
    }

    async fn apply_command(&mut self, pos: LogPos, command: &Bytes) -> Result<Bytes, ChunkStoreError> {
        // Whoever proposed it could decode it. To skip what this build does not know would make this replica another one than the others.
        let command = Command::decode(command).map_err(|source| ChunkStoreError::UnknownEntry { index: pos.index, source })?;
        if let Err(refusal) = self.admit(&command, pos) {
            return Ok(refusal.reply().into());
        }
        match command {
            Command::Write(head, data) => self.store.write(pos.index, &head, &data).await?,
            Command::Zero(head) => self.store.zero(pos.index, &head).await?,
            Command::Paste(head, data) => self.store.paste(pos.index, &head, &data).await?,
            Command::DropLayer(layer) => self.store.drop_layer(layer).await,
            Command::DropVersion(order) => self.store.drop_version(pos.index, &order).await?,
            Command::Flatten(head) => self.store.flatten(pos.index, &head).await?,
            Command::OpenLayer(_) | Command::Seal(_) => {}
        }
        Ok(Bytes::copy_from_slice(&Status::Ok.code().to_le_bytes()))
    }

    /// Asks the rules, which record what the command raises.
    fn admit(&self, command: &Command, pos: LogPos) -> Result<(), Refusal> {
        let mut state = self.store.state();
        let own = |copyset: CopysetId| if copyset == self.store.id() { Ok(()) } else { Err(Refusal::BadRequest) };
        match command {
            Command::Write(head, _) => own(head.at.copyset).and_then(|()| state.layers.admit_write(&head.at, pos.term)),
            Command::Zero(head) => own(head.at.copyset).and_then(|()| state.layers.admit_write(&head.at, pos.term)),
            Command::OpenLayer(head) => own(head.copyset).and_then(|()| state.layers.open(head, pos.term)),
            Command::Seal(head) => state.layers.seal(head),
            Command::Flatten(head) => state.layers.flatten(head.layer, &head.chain),
            Command::Paste(head, _) => own(head.copyset).and_then(|()| state.layers.admit_paste(head.layer)),
            Command::DropLayer(layer) => {
                state.layers.drop_layer(*layer);
                Ok(())
            }
            Command::DropVersion(d) if d.after < d.seq && d.seq < d.next => Ok(()),
            Command::DropVersion(_) => Err(Refusal::BadRequest),
        }
    }

    /// Makes sure that the recovery horizon lies at or above an entry before it is applied.
    async fn extend_horizon(&self, index: u64) -> Result<(), ChunkStoreError> {
        let recovery = {
            let state = self.store.state();
            if index <= state.recovery.horizon {
                return Ok(());
            }
            let ahead = index.saturating_add(self.store.process().tuning.horizon_entries);
            crate::store::record::Recovery { horizon: ahead, ..state.recovery }
        };
        self.store.write_recovery(recovery).await
    }

    async fn start_writeback(&mut self) -> Result<(), ChunkStoreError> {
        let is_busy = self.writeback.as_ref().is_some_and(|task| !task.is_finished());
        let cap = self.store.process().tuning.writeback_bytes.saturating_mul(WRITEBACK_LAG_MAX);
        if is_busy && self.store.state().unsubmitted < cap {
            return Ok(());
        }
        let Some(files) = self.store.writeback() else { return Ok(()) };
        self.join_writeback().await?;
        self.writeback = Some(tokio::spawn(blocking(move || {
            for file in files {
                file.start_writeback(0, u64::from(CHUNK_BYTES))?;
            }
            Ok(())
        })));
        Ok(())
    }

    async fn join_writeback(&mut self) -> Result<(), ChunkStoreError> {
        match self.writeback.take() {
            Some(task) => task.await.map_err(|_| ChunkStoreError::Stopped)?,
            None => Ok(()),
        }
    }

    /// Runs nothing after a failure, and remembers one.
    fn judge<T>(&mut self, verb: &'static str, result: Result<T, ChunkStoreError>) -> Result<T, StateMachineError> {
        result.map_err(|e| {
            self.failed = true;
            self.store.note(&e);
            StateMachineError { verb, source: Box::new(e) }
        })
    }

    fn check(&self, verb: &'static str) -> Result<(), StateMachineError> {
        if self.failed {
            return Err(StateMachineError { verb, source: Box::new(ChunkStoreError::Stopped) });
        }
        Ok(())
    }
}

impl StateMachine for CopysetMachine {
    async fn load(&mut self) -> Result<Applied, StateMachineError> {
        let result = self.store.load().await;
        self.judge("load the checkpoint of a copyset", result)
    }

    async fn apply(&mut self, entries: Vec<ApplyEntry>) -> Result<Vec<Bytes>, StateMachineError> {
        let verb = "apply a log entry";
        self.check(verb)?;
        let mut replies = Vec::with_capacity(entries.len());
        for entry in entries {
            let result = self.apply_entry(entry).await;
            replies.push(self.judge(verb, result)?);
        }
        Ok(replies)
    }

    async fn checkpoint(&mut self) -> Result<Applied, StateMachineError> {
        let verb = "checkpoint a copyset";
        self.check(verb)?;
        let mut result = self.join_writeback().await.map(|()| Applied::default());
        if result.is_ok() {
            result = self.store.checkpoint().await;
        }
        self.judge(verb, result)
    }

    async fn snapshot(&mut self) -> Result<RaftSnapshot, StateMachineError> {
        self.checkpoint().await?;
        let result = self.store.raft_snapshot();
        self.judge("describe a copyset", result)
    }

    async fn install(
        &mut self,
        snapshot: RaftSnapshot,
        source: &(impl SnapshotSource + 'static),
    ) -> Result<(), StateMachineError> {
        let verb = "install a Raft snapshot";
        // What was applied before becomes durable first: the fetch replaces checkpointed rows. From here on no repair
        // makes anything dirty.
        self.store.set_installing(true).await;
        let result = match self.checkpoint().await {
            Ok(_) => crate::copyset::install::install(&self.store, &snapshot, source).await,
            Err(e) => return Err(e),
        };
        self.store.set_installing(false).await;
        match result {
            // The source failed: what was fetched is marked, and the leader tries again.
            Err(e) if !e.is_fatal() => Err(StateMachineError { verb, source: Box::new(e) }),
            Err(e) => {
                self.failed = true;
                if let InstallError::Store(error) = &e {
                    self.store.note(error);
                }
                Err(StateMachineError { verb, source: Box::new(e) })
            }
            Ok(()) => Ok(()),
        }
    }
}
