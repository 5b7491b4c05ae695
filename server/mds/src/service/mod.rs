//! The gRPC service: checks what comes in, asks the log, answers what was applied.
//!
//! [`Core`] is what the calls share. Invariants: every call first makes sure that this node leads and has applied
//! everything acknowledged before (a read under lease), so no answer is stale; every change goes through the log; names
//! are parsed here, so the state machine sees only good ones. Calls of clients may be dropped at any point: what must
//! not stop half-way (holds, clones of live volumes) runs in tasks of its own.

pub(crate) mod attach;
mod backups;
pub(crate) mod convert;
pub(crate) mod groups;
pub(crate) mod hold;
pub(crate) mod leases;
pub(crate) mod moves;
pub(crate) mod names;
pub(crate) mod ops;
pub(crate) mod rpc;
pub(crate) mod schedules;
mod scrubs;
pub(crate) mod service_tasks;
pub(crate) mod snapshots;
pub(crate) mod status;
#[cfg(test)]
mod tests;
pub(crate) mod topology;
pub(crate) mod volumes;

use self::leases::Leases;
use self::ops::VolumeOps;
use self::status::CallError;
use crate::hub::{Current, Hub};
use crate::liveness::Liveness;
use crate::log::ReplicatedLog;
use crate::machine::backups::below;
use crate::machine::command::{Command, Envelope, Outcome, decode_answer};
use crate::machine::row::VolumeRow;
use crate::machine::tx::Tx;
use crate::machine::{Shared, Step, namespace, options};
use ogee_common::clock;
use ogee_common::id::VolumeId;
use ogee_raft::{LeaderHint, RaftError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// A command is waited for this long; then its outcome is unknown. Longer than an election takes.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A node of the MDS as clients know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeAddr {
    /// Its number.
    pub(crate) id: u32,
    /// Where it serves gRPC.
    pub(crate) addr: String,
}

/// What all calls share.
pub(crate) struct Core {
    pub(crate) shared: Arc<Shared>,
    pub(crate) log: Arc<dyn ReplicatedLog>,
    pub(crate) nodes: Vec<NodeAddr>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) live: Liveness,
    pub(crate) ops: VolumeOps,
    /// When owners of service tasks were heard of.
    pub(crate) leases: Leases,
    /// Counts reports of done layer tasks.
    pub(crate) progress: watch::Sender<u64>,
    /// A chunkserver that is silent for this long is given up.
    pub(crate) rebuild_after: Duration,
}

impl Core {
    /// The shared part of a node's service.
    pub(crate) fn new(shared: Arc<Shared>, log: Arc<dyn ReplicatedLog>, nodes: Vec<NodeAddr>, rebuild_after: Duration) -> Arc<Self> {
        Arc::new(Self {
            shared,
            log,
            nodes,
            hub: Arc::default(),
            live: Liveness::default(),
            ops: VolumeOps::default(),
            leases: Leases::default(),
            progress: watch::Sender::new(0),
            rebuild_after,
        })
    }

    /// Makes sure that this node leads and that what it reads is current.
    ///
    /// # Errors
    /// `NotLeader`, `Unavailable`.
    pub(crate) async fn lead(&self) -> Result<(), CallError> {
        let barrier = tokio::time::timeout(PROPOSE_TIMEOUT, self.log.read_barrier()).await;
        let what = "the check who leads";
        let barrier = barrier.map_err(|_| CallError::TimedOut { what, limit: PROPOSE_TIMEOUT })?;
        let term = barrier.map_err(|e| self.raft_error(e))?;
        self.hub.enter(term);
        self.live.enter(term);
        self.leases.enter(term);
        Ok(())
    }

    fn raft_error(&self, error: RaftError) -> CallError {
        match error {
            RaftError::NotLeader(LeaderHint { process, .. }) => {
                let node = self.nodes.iter().find(|n| n.id == process);
                CallError::NotLeader { leader: node.map_or_else(String::new, |n| n.addr.clone()) }
            }
            other => CallError::Raft(other),
        }
    }

    /// Reads rows; to be called after [`Core::lead`].
    ///
    /// # Errors
    /// What `read` refuses.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Tx<'_>) -> Step<T>) -> Result<T, CallError> {
        self.shared.read(|tx| read(tx)).map_err(CallError::from)
    }

    /// Has a command applied.
    ///
    /// # Errors
    /// What the state machine refuses; `NotLeader`; `Unavailable`, after which the command may still be applied.
    pub(crate) async fn propose(&self, request: Option<[u8; 16]>, command: Command) -> Result<Outcome, CallError> {
        let envelope = Envelope { now_unix_ms: clock::unix_ms(), request, command };
        let proposed = self.log.propose(envelope.encode().into());
        let reply = match tokio::time::timeout(PROPOSE_TIMEOUT, proposed).await {
            Ok(reply) => reply.map_err(|e| self.raft_error(e))?,
            Err(_) => return Err(CallError::TimedOut { what: "the command", limit: PROPOSE_TIMEOUT }),
        };
        Ok(decode_answer(&reply)??)
    }

    /// Waits until layer tasks have brought about what `check` looks for.
    ///
    /// # Errors
    /// What `check` refuses; `Unavailable` after `limit`.
    pub(crate) async fn wait_for_tasks<T>(
        &self,
        what: &'static str,
        limit: Duration,
        check: impl Fn(&Tx<'_>) -> Step<Option<T>>,
    ) -> Result<T, CallError> {
        let mut progress = self.progress.subscribe();
        let wait = async {
            loop {
                progress.borrow_and_update();
                if let Some(value) = self.read(&check)? {
                    return Ok(value);
                }
                if progress.changed().await.is_err() {
                    return Err(CallError::Ending);
                }
            }
        };
        tokio::time::timeout(limit, wait).await.unwrap_or(Err(CallError::TimedOut { what, limit }))
    }

    /// What the client of a volume must know now; `None` when it is not attached.
    pub(crate) fn current(&self, volume: VolumeId) -> Option<Current> {
        let read = self.shared.read(|tx| -> Step<Option<Current>> {
            let Some(row) = tx.get::<VolumeRow>(&volume)? else { return Ok(None) };
            let seq = namespace::head_seq(tx, &row)?.0;
            let limits = options::of(tx, volume)?.limits;
            let complete = below(tx, row.layer)?.is_none();
            Ok(row.attached.map(|a| Current { epoch: a.epoch, seq, size_bytes: row.size_bytes, limits, complete }))
        });
        read.ok().flatten()
    }
}

impl From<crate::refusal::Refusal> for tonic::Status {
    fn from(refusal: crate::refusal::Refusal) -> Self {
        CallError::from(refusal).into()
    }
}
