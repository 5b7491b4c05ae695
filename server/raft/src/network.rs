//! openraft's view of the other replicas of one group.
//!
//! openraft makes one [`PeerClient`] per task and target; all share the process's [`Links`]. Invariants: a request goes
//! to the replica it is meant for or fails, because its id travels in the frame; a peer that is down makes every call
//! fail at once with `Unreachable`, which openraft retries with backoff. Timeouts of votes are openraft's.

use crate::alias::{
    AppendRequest, AppendResponse, RpcError, TransferRequest, TransferResponse, Vote, VoteRequest, VoteResponse,
};
use crate::api::MANIFEST_BYTES_MAX;
use crate::append_stream::AppendStream;
use crate::codec::{self, CodecError, SnapshotHead};
use crate::lease::LeaseClock;
use crate::links::{Links, LiveLink};
use crate::machine::{Machine, SnapshotMarker};
use crate::ticker::ElectionTimer;
use crate::types::{PeerNode, TypeConfig};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use ogee_common::clock;
use ogee_proto::data::{Frame, Opcode, RaftHead, Status};
use ogee_proto::link::LinkError;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{SnapshotResponse, StreamAppendResult};
use openraft::type_config::alias::SnapshotOf;
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2, StorageError};
use smallvec::SmallVec;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Why an answer is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerRefused {
    /// The peer answered with a status.
    #[error("replica {target} answered {status:?}")]
    Status {
        /// The replica asked.
        target: u64,
        /// Its answer.
        status: Status,
    },
    /// The manifest does not fit a frame.
    #[error("the manifest for replica {target} has {bytes} bytes")]
    ManifestTooLong {
        /// The replica that was to get it.
        target: u64,
        /// Its length.
        bytes: usize,
    },
    /// openraft's stream of answers ended without one.
    #[error("replica {0} gave no answer")]
    NoAnswer(u64),
}

/// openraft's error for a peer that cannot be talked to now.
pub(crate) fn unreachable(error: &(impl std::error::Error + 'static)) -> RpcError {
    RpcError::Unreachable(Unreachable::new(error))
}

/// The frame of a good answer.
pub(crate) fn answer(call: &PeerCall, result: Result<Frame, LinkError>) -> Result<Frame, RpcError> {
    let frame = result.map_err(|e| unreachable(&e))?;
    match Status::parse(frame.header.status) {
        Status::Ok => Ok(frame),
        status => Err(unreachable(&PeerRefused::Status { target: call.target, status })),
    }
}

/// Makes clients for one group.
pub(crate) struct GroupNetwork {
    pub(crate) links: Arc<Links>,
    pub(crate) group: u64,
    pub(crate) replica: u64,
    pub(crate) machine: Arc<Machine>,
    pub(crate) timer: Arc<ElectionTimer>,
    pub(crate) lease: Arc<LeaseClock>,
    /// An answer to a beat of this age stands for one to a heartbeat.
    pub(crate) fresh: Duration,
}

impl GroupNetwork {
    fn client(&self, target: u64, node: &PeerNode, fresh: Option<Duration>) -> PeerClient {
        let call = PeerCall {
            links: self.links.clone(),
            group: self.group,
            replica: self.replica,
            target,
            process: node.process,
            lease: self.lease.clone(),
        };
        PeerClient { call, machine: self.machine.clone(), timer: self.timer.clone(), fresh }
    }
}

impl RaftNetworkFactory<TypeConfig> for GroupNetwork {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, node: &PeerNode) -> PeerClient {
        self.client(target, node, None)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &PeerNode) -> PeerClient {
        self.client(target, node, Some(self.fresh))
    }
}

/// Whom to call.
pub(crate) struct PeerCall {
    links: Arc<Links>,
    group: u64,
    /// The replica that asks.
    pub(crate) replica: u64,
    /// The replica asked.
    pub(crate) target: u64,
    process: u32,
    /// Where answers to AppendEntries are noted.
    pub(crate) lease: Arc<LeaseClock>,
}

impl PeerCall {
    pub(crate) fn links(&self) -> &Arc<Links> {
        &self.links
    }

    /// The head of a frame with `message`.
    pub(crate) fn head(&self, message: Bytes) -> Bytes {
        RaftHead { group: self.group, target: self.target, message }.encode()
    }

    async fn acquire(&self) -> Result<LiveLink, RpcError> {
        self.links.acquire(self.process).await.map_err(|e| unreachable(&e))
    }

    async fn ask(&self, opcode: Opcode, message: Bytes) -> Result<Frame, RpcError> {
        let live = self.acquire().await?;
        let result = live.call(opcode, &self.head(message), SmallVec::new()).await;
        answer(self, result)
    }
}

/// openraft's client of one other replica.
pub(crate) struct PeerClient {
    call: PeerCall,
    machine: Arc<Machine>,
    timer: Arc<ElectionTimer>,
    /// Of a client for heartbeats: how old an answer to a beat may be to stand for one.
    fresh: Option<Duration>,
}

fn decoded<T>(result: Result<T, CodecError>) -> Result<T, RpcError> {
    result.map_err(|e| unreachable(&e))
}

impl RaftNetworkV2<TypeConfig> for PeerClient {
    type SnapshotData = SnapshotMarker;

    async fn append_entries(&mut self, rpc: AppendRequest, option: RPCOption) -> Result<AppendResponse, RpcError> {
        let requests = Box::pin(futures_util::stream::once(std::future::ready(rpc)));
        let target = self.call.target;
        let mut answers = self.stream_append(requests, option).await?;
        match answers.next().await {
            Some(result) => Ok(AppendResponse::from(result?)),
            None => Err(unreachable(&PeerRefused::NoAnswer(target))),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            // The request comes first: openraft waits out its backoff while it makes one. A call that fails before that
            // would be repeated at once, for as long as the peer is down.
            let Some(first) = input.next().await else {
                let nothing: BoxStream<'s, _> = Box::pin(futures_util::stream::empty());
                return Ok(nothing);
            };
            if self.is_known(&first) {
                let answer: StreamAppendResult<TypeConfig> = Ok(first.prev_log_id);
                let answers: BoxStream<'s, _> = Box::pin(futures_util::stream::once(std::future::ready(Ok(answer))));
                return Ok(answers);
            }
            let live = self.call.acquire().await?;
            let answers: BoxStream<'s, _> = Box::pin(AppendStream::new(&self.call, live, first, input));
            Ok(answers)
        })
    }

    async fn vote(&mut self, rpc: VoteRequest, _option: RPCOption) -> Result<VoteResponse, RpcError> {
        let frame = self.call.ask(Opcode::RaftVote, codec::encode_vote(&rpc)).await?;
        decoded(codec::decode_vote_reply(frame.head()))
    }

    async fn pre_vote(&mut self, rpc: VoteRequest, _option: RPCOption) -> Result<VoteResponse, RpcError> {
        let frame = self.call.ask(Opcode::RaftPreVote, codec::encode_vote(&rpc)).await?;
        let reply = decoded(codec::decode_vote_reply(frame.head()))?;
        self.timer.probed(reply.vote_granted);
        Ok(reply)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        _snapshot: SnapshotOf<TypeConfig, SnapshotMarker>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            result = self.send_snapshot(vote) => result,
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferRequest,
        _option: RPCOption,
    ) -> Result<TransferResponse, RpcError> {
        let frame = self.call.ask(Opcode::RaftTransfer, codec::encode_transfer(&req)).await?;
        decoded(codec::decode_transfer_reply(frame.head()))
    }
}

impl PeerClient {
    /// Whether a heartbeat would tell the follower nothing that it did not confirm a moment ago ([`crate::beat`]).
    fn is_known(&self, request: &AppendRequest) -> bool {
        let since = self.fresh.and_then(|fresh| clock::now().checked_sub(fresh));
        let committed = request.leader_commit.map_or(0, |id| id.index);
        request.entries.is_empty()
            && since.is_some_and(|at| {
                self.call.lease.knows(request.vote.leader_id.term, self.call.target, at, committed)
            })
    }

    /// Sends a fresh manifest and waits, maybe for hours, until it is installed. openraft's snapshot is only a marker:
    /// by the time it is sent the state machine may have a later one.
    async fn send_snapshot(&self, vote: Vote) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let snapshot = self.machine.snapshot().await.map_err(|e| {
            StorageError::from_io_error(openraft::ErrorSubject::StateMachine, openraft::ErrorVerb::Read, e)
        })?;
        let head = SnapshotHead { vote, sender_process: self.call.links.process(), sender_replica: self.call.replica };
        let Some(message) = head.encode(&snapshot) else {
            return Err(ReplicationClosed::new("the state machine has nothing to send").into());
        };
        let bytes = snapshot.manifest.len();
        if bytes > MANIFEST_BYTES_MAX {
            let error = PeerRefused::ManifestTooLong { target: self.call.target, bytes };
            tracing::error!(target: "controlpath", group = self.call.group, %error, "cannot send raft snapshot");
            return Err(unreachable(&error).into());
        }
        tracing::info!(
            target: "controlpath",
            group = self.call.group,
            to = self.call.target,
            manifest_bytes = bytes,
            "sending raft snapshot"
        );
        let live = self.call.acquire().await?;
        let payload = SmallVec::from_iter([snapshot.manifest]);
        let result = live.long_call(Opcode::RaftSnapshot, &self.call.head(message), payload).await;
        let frame = answer(&self.call, result)?;
        Ok(SnapshotResponse::new(decoded(codec::decode_vote_only(frame.head()))?))
    }
}
