//! Installing another replica's snapshot, and fetching its parts.
//!
//! The state machine installs **before** openraft hears of the snapshot, and openraft then only confirms it. Reasons:
//! openraft takes a failed installation as the end of the replica, while ours fails whenever the sender goes away; and
//! it may take hours, during which openraft's state machine worker must not be stuck. Invariants: what is installed was
//! committed, whoever sent it, and is newer than what was there; at most one installation per replica at a time; a
//! crash between installation and confirmation is mended by [`crate::repair`].

use crate::alias::{SnapshotMeta, log_id_at};
use crate::api::{RaftSnapshot, SnapshotSource, StateMachineError};
use crate::codec::{self, SnapshotHead};
use crate::links::Links;
use crate::machine::{Installed, MachineFault, SnapshotMarker};
use crate::replica::Replica;
use bytes::Bytes;
use ogee_common::id::ReplicaId;
use ogee_common::limits::{RAFT_FETCH_REQUEST_BYTES_MAX, RAFT_FETCH_TIMEOUT};
use ogee_proto::data::{Opcode, RaftHead, Status};
use ogee_proto::link::Responder;
use openraft::Snapshot;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Fetches parts of another replica's state: of a snapshot from the replica that sent it, or to repair what is damaged
/// here.
pub struct ReplicaSource {
    links: Arc<Links>,
    process: u32,
    group: u64,
    replica: u64,
}

impl ReplicaSource {
    pub(crate) fn new(own: &Replica, replica: ReplicaId, process: u32) -> Self {
        Self { links: own.links.clone(), process, group: own.group, replica: replica.0 }
    }
}

impl std::fmt::Debug for ReplicaSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicaSource").field("process", &self.process).field("replica", &self.replica).finish_non_exhaustive()
    }
}

/// Why a part did not come.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("a request of {0} bytes is too long")]
    TooLong(usize),
    #[error("the sender answered {0:?}")]
    Refused(Status),
    #[error("the sender did not answer in time")]
    Timeout,
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StateMachineError {
    StateMachineError { verb: "fetch snapshot part", source: source.into() }
}

impl SnapshotSource for ReplicaSource {
    async fn fetch(&self, request: Bytes) -> Result<Bytes, StateMachineError> {
        if request.len() > RAFT_FETCH_REQUEST_BYTES_MAX {
            return Err(failed(FetchError::TooLong(request.len())));
        }
        let live = self.links.acquire(self.process).await.map_err(failed)?;
        let head = RaftHead { group: self.group, target: self.replica, message: request }.encode();
        let call = live.long_call(Opcode::FetchPages, &head, SmallVec::new());
        let Ok(answer) = tokio::time::timeout(RAFT_FETCH_TIMEOUT, call).await else {
            self.links.suspect(&live);
            return Err(failed(FetchError::Timeout));
        };
        let frame = answer.map_err(failed)?;
        match Status::parse(frame.header.status) {
            Status::Ok => {}
            status => return Err(failed(FetchError::Refused(status))),
        }
        let payload = frame.payload();
        codec::decode_fetch_reply(frame.head(), &payload).map_err(failed)?;
        Ok(payload)
    }
}

/// Clears the flag when an installation ends, however it ends.
struct Installing(Arc<Replica>);

impl Installing {
    fn begin(replica: &Arc<Replica>) -> Option<Self> {
        let flag: &AtomicBool = &replica.installing;
        flag.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire).ok().map(|_| Self(replica.clone()))
    }
}

impl Drop for Installing {
    fn drop(&mut self) {
        self.0.installing.store(false, Ordering::Release);
    }
}

/// Installs what a leader sent and answers it with this replica's vote.
pub(crate) async fn receive(replica: Arc<Replica>, head: SnapshotHead, snapshot: RaftSnapshot, responder: Responder) {
    let known = replica.vote();
    if known > head.vote {
        return responder.send(Status::Ok, &codec::encode_vote_only(&known), Bytes::new());
    }
    let Some(installing) = Installing::begin(&replica) else {
        return responder.status(Status::Overloaded);
    };
    let group = replica.group;
    let result = install(&replica, &head, snapshot).await;
    drop(installing);
    match result {
        Ok(vote) => responder.send(Status::Ok, &vote, Bytes::new()),
        Err(error) => {
            tracing::warn!(
                target: "controlpath",
                group,
                from = head.sender_process,
                error = &error as &dyn std::error::Error,
                "raft snapshot was not installed"
            );
            responder.status(Status::NotReady);
        }
    }
}

/// Why an installation failed. The leader tries again.
#[derive(Debug, thiserror::Error)]
enum InstallError {
    #[error("install raft snapshot")]
    Machine(#[source] MachineFault),
    #[error("confirm raft snapshot")]
    Raft(#[source] openraft::errors::Fatal<crate::types::TypeConfig>),
    #[error("the snapshot contradicts what is committed here")]
    Contradiction,
    #[error("the snapshot has no position")]
    Empty,
}

async fn install(replica: &Replica, head: &SnapshotHead, snapshot: RaftSnapshot) -> Result<Bytes, InstallError> {
    let last = snapshot.applied.pos.map(log_id_at).ok_or(InstallError::Empty)?;
    // openraft takes this for its own fault and panics.
    if replica.committed().is_some_and(|at| last > at && last.index <= at.index) {
        return Err(InstallError::Contradiction);
    }
    let fault = |e: codec::CodecError| InstallError::Machine(e.into());
    let membership = codec::decode_stored_membership(&snapshot.applied.membership).map_err(fault)?;
    let source = ReplicaSource::new(replica, ReplicaId(head.sender_replica), head.sender_process);
    let done = replica.machine.install(snapshot, &source).await.map_err(InstallError::Machine)?;
    if done == Installed::Now {
        tracing::info!(target: "controlpath", group = replica.group, index = last.index, "raft snapshot installed");
    }
    let meta = SnapshotMeta { last_log_id: Some(last), last_membership: membership };
    let confirmed = Snapshot { meta, snapshot: SnapshotMarker };
    let answer = replica.raft.install_full_snapshot(head.vote, confirmed).await.map_err(InstallError::Raft)?;
    Ok(codec::encode_vote_only(&answer.vote))
}
