//! The Raft log as the service sees it: propose, read barrier, who leads.
//!
//! One small trait, so that the service can be tested on a log without a network and the Raft layer can be replaced.
//! Invariants: a proposal's answer is that of the state machine; after a barrier, rows read here are linearizable.

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ogee_common::id::Term;
use ogee_raft::{RaftError, RaftGroup};
use tokio::sync::watch;

/// Who leads, as far as this node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Lead {
    /// Number of the MDS node that leads; 0 unknown.
    pub(crate) node: u32,
    /// The term this node is in.
    pub(crate) term: Term,
    /// Whether it is this node.
    pub(crate) here: bool,
    /// Whether this node's replica has stopped for good.
    pub(crate) stopped: bool,
}

/// A replicated log.
pub(crate) trait ReplicatedLog: Send + Sync + 'static {
    /// Proposes a command; queued at the call. Ends when it is applied here, with the state machine's answer.
    fn propose(&self, command: Bytes) -> BoxFuture<'static, Result<Bytes, RaftError>>;

    /// Waits until what is applied here is linearizable for a read that starts now.
    fn read_barrier(&self) -> BoxFuture<'static, Result<Term, RaftError>>;

    /// Changes of the lead.
    fn lead(&self) -> watch::Receiver<Lead>;

    /// Index of the last entry applied here.
    fn applied(&self) -> u64;
}

/// The log of a Raft group.
pub(crate) struct GroupLog {
    group: RaftGroup,
    lead: watch::Receiver<Lead>,
}

impl GroupLog {
    /// Follows a group; the task that does so ends with the group.
    pub(crate) fn new(group: RaftGroup) -> Self {
        let mut state = group.state();
        let (sender, lead) = watch::channel(Lead::default());
        tokio::spawn(async move {
            loop {
                let now = {
                    let s = state.borrow_and_update();
                    let stopped = s.status != ogee_raft::GroupStatus::Running;
                    Lead { node: s.leader.process, term: s.leader.term, here: s.is_leader && !stopped, stopped }
                };
                sender.send_if_modified(|old| std::mem::replace(old, now) != now);
                if now.stopped || state.changed().await.is_err() {
                    return;
                }
            }
        });
        Self { group, lead }
    }
}

impl ReplicatedLog for GroupLog {
    fn propose(&self, command: Bytes) -> BoxFuture<'static, Result<Bytes, RaftError>> {
        let proposed = self.group.propose(command, None);
        async move { Ok(proposed.await?.reply) }.boxed()
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<Term, RaftError>> {
        self.group.read_barrier().boxed()
    }

    fn lead(&self) -> watch::Receiver<Lead> {
        self.lead.clone()
    }

    fn applied(&self) -> u64 {
        self.group.applied_index()
    }
}
