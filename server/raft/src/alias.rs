//! openraft's generic types with our type configuration filled in, and conversions between its words and ours.

use crate::api::LogPos;
use crate::types::TypeConfig;
pub(crate) use crate::types::{Entry, LogId, Membership, StoredMembership, Vote};
use ogee_common::id::Term;
use openraft::type_config::alias;

pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub(crate) type AppendResponse = openraft::raft::AppendEntriesResponse<TypeConfig>;
pub(crate) type VoteRequest = openraft::raft::VoteRequest<TypeConfig>;
pub(crate) type VoteResponse = openraft::raft::VoteResponse<TypeConfig>;
pub(crate) type TransferRequest = openraft::raft::TransferLeaderRequest<TypeConfig>;
pub(crate) type TransferResponse = openraft::raft::TransferLeaderResponse<TypeConfig>;
pub(crate) type RpcError = openraft::errors::RPCError<TypeConfig>;

/// The position of a log id.
pub(crate) fn pos_of(id: &LogId) -> LogPos {
    LogPos { term: Term(id.leader_id.term), index: id.index }
}

/// The log id at a position.
pub(crate) fn log_id_at(pos: LogPos) -> LogId {
    LogId::new(pos.term.0.into(), pos.index)
}
