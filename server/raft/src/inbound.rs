//! What other replicas ask of this one.
//!
//! Called on the task of the connection, in the order of arrival. Invariants: AppendEntries reach openraft in that order
//! (each is queued before the call returns, its answer is awaited elsewhere); a frame for another replica of the same
//! group is refused, so an old address never reaches a new incarnation; no vote reaches openraft while a leader may
//! still rely on a promise that openraft does not know of: one made before a restart, or by a beat
//! ([`crate::promise`]).

use crate::alias::{AppendRequest, AppendResponse, VoteRequest, VoteResponse};
use crate::api::MANIFEST_BYTES_MAX;
use crate::codec;
use crate::poll_once;
use crate::promise::Doubt;
use crate::replica::Replica;
use crate::snapshot;
use bytes::Bytes;
use ogee_common::clock::{self, Instant};
use ogee_proto::data::{Opcode, RaftHead, Status};
use ogee_proto::link::Responder;
use std::sync::Arc;

/// Carries out one request.
pub(crate) fn dispatch(replica: &Arc<Replica>, opcode: Opcode, head: RaftHead, payload: Bytes, responder: Responder) {
    if head.target != replica.id.0 {
        return responder.status(Status::UnknownCopyset);
    }
    match opcode {
        Opcode::RaftAppend => match codec::decode_append(&head.message, &payload) {
            Ok(request) => append(replica, request, responder),
            Err(codec::CodecError::Checksum) => responder.status(Status::PayloadChecksum),
            Err(error) => refuse(replica, opcode, &error, responder),
        },
        Opcode::RaftVote => vote(replica, &head.message, Ballot::Binding, responder),
        Opcode::RaftPreVote => vote(replica, &head.message, Ballot::Probe, responder),
        Opcode::RaftTransfer => transfer(replica, &head.message, responder),
        Opcode::RaftSnapshot => match codec::SnapshotHead::decode(&head.message, payload) {
            Ok((from, snapshot)) => {
                tokio::spawn(snapshot::receive(replica.clone(), from, snapshot, responder));
            }
            Err(error) => refuse(replica, opcode, &error, responder),
        },
        Opcode::FetchPages => fetch(replica, head.message, responder),
        other => responder.bad_request(&format_args!("{other:?} is no request of Raft")),
    }
}

fn refuse(replica: &Replica, opcode: Opcode, error: &codec::CodecError, responder: Responder) {
    tracing::warn!(target: "datapath", group = replica.group, ?opcode, %error, "malformed raft message");
    responder.bad_request(error);
}

fn append(replica: &Arc<Replica>, request: AppendRequest, responder: Responder) {
    let (term, arrival) = (request.vote.leader_id.term, replica.heard(&request.vote));
    let (raft, promise) = (replica.raft.clone(), replica.promise.clone());
    let reply = move |result: Result<AppendResponse, _>, responder: Responder| match result {
        Ok(reply) => {
            if !matches!(reply, AppendResponse::HigherVote(_)) {
                promise.accepted(term, arrival);
            }
            responder.send(Status::Ok, &codec::encode_append_reply(&reply), Bytes::new());
        }
        // The replica has stopped.
        Err(_) => responder.status(Status::DiskFailed),
    };
    match poll_once::start(async move { raft.append_entries(request).await }) {
        Ok(result) => reply(result, responder),
        Err(pending) => {
            tokio::spawn(async move { reply(pending.await, responder) });
        }
    }
}

/// Whether a vote counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ballot {
    Binding,
    Probe,
}

fn vote(replica: &Arc<Replica>, message: &[u8], ballot: Ballot, responder: Responder) {
    let request = match codec::decode_vote(message) {
        Ok(request) => request,
        Err(error) => return refuse(replica, Opcode::RaftVote, &error, responder),
    };
    let now = clock::now();
    // A transfer is asked for by the very leader that the promise was made to.
    if !request.leadership_transfer && now < replica.votes_from {
        return responder.status(Status::NotReady);
    }
    let Some(doubt) = let_through(replica, &request, now) else {
        let refusal = VoteResponse::new(replica.vote(), None, false);
        return responder.send(Status::Ok, &codec::encode_vote_reply(&refusal), Bytes::new());
    };
    let replica = replica.clone();
    if ballot == Ballot::Probe {
        // It changes nothing, whatever the core answers.
        drop(doubt);
        tokio::spawn(async move {
            let Ok(reply) = replica.raft.pre_vote(request).await else { return responder.status(Status::DiskFailed) };
            responder.send(Status::Ok, &codec::encode_vote_reply(&reply), Bytes::new());
        });
        return;
    }
    replica.timer.asked();
    let mut doubt = doubt.over(request.vote.leader_id.term);
    tokio::spawn(async move {
        let Ok(reply) = replica.raft.vote(request).await else { return responder.status(Status::DiskFailed) };
        if !reply.vote_granted {
            doubt.refused();
        }
        drop(doubt);
        responder.send(Status::Ok, &codec::encode_vote_reply(&reply), Bytes::new());
    });
}

/// Whether the core may hear of a vote: not while a lease runs that it knows nothing of.
fn let_through(replica: &Arc<Replica>, request: &VoteRequest, now: Instant) -> Option<Doubt> {
    if request.leadership_transfer {
        return Some(replica.promise.authorized());
    }
    if replica.leads_surely(now) {
        return None;
    }
    replica.promise.ballot(now, replica.tuning.lease())
}

fn transfer(replica: &Arc<Replica>, message: &[u8], responder: Responder) {
    let request = match codec::decode_transfer(message) {
        Ok(request) => request,
        Err(error) => return refuse(replica, Opcode::RaftTransfer, &error, responder),
    };
    let raft = replica.raft.clone();
    let doubt = replica.promise.authorized();
    tokio::spawn(async move {
        let result = raft.handle_transfer_leader(request).await;
        drop(doubt);
        match result {
            Ok(reply) => responder.send(Status::Ok, &codec::encode_transfer_reply(&reply), Bytes::new()),
            Err(_) => responder.status(Status::DiskFailed),
        }
    });
}

fn fetch(replica: &Arc<Replica>, request: Bytes, responder: Responder) {
    let replica = replica.clone();
    tokio::spawn(async move {
        match replica.fetch.fetch(request).await {
            Ok(part) if part.len() > MANIFEST_BYTES_MAX => {
                tracing::error!(target: "controlpath", group = replica.group, bytes = part.len(), "part is too long");
                responder.status(Status::BadRequest);
            }
            Ok(part) => responder.send(Status::Ok, &codec::encode_fetch_reply(&part), part),
            Err(error) => {
                let group = replica.group;
                let error = &error as &dyn std::error::Error;
                tracing::warn!(target: "controlpath", group, error, "cannot serve a part of a raft snapshot");
                responder.status(Status::NotReady);
            }
        }
    });
}
