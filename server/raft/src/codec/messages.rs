//! Votes, leader transfer, snapshot manifest and fetch. Each is small and self-contained.
//!
//! ```text
//! vote, pre-vote     vote 17 | last log option(16) | transfer u8
//! their reply        vote 17 | granted u8 | last log option(16)
//! transfer           vote 17 | to u64 | last log option(16)
//! its reply          0 | 1 expected vote 17, actual vote 17 | 2 expected option(16), actual option(16)
//! snapshot           vote 17 | sender process u32 | sender replica u64 | position 16 | manifest crc32c u32 | membership
//! its reply          vote 17
//! fetch              the state machine's own request; its reply's head is the payload's crc32c u32
//! ```

use super::reader::{CodecError, Reader, decode_stored_membership, put_log_id, put_option_log_id, put_vote};
use crate::alias::{LogId, TransferRequest, TransferResponse, Vote, VoteRequest, VoteResponse, log_id_at, pos_of};
use crate::api::{Applied, MANIFEST_BYTES_MAX, RaftSnapshot};
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::checksum::crc32c;
use openraft::raft::TransferLeaderError;

pub(crate) fn encode_vote(request: &VoteRequest) -> Bytes {
    let mut out = BytesMut::with_capacity(35);
    put_vote(&mut out, &request.vote);
    put_option_log_id(&mut out, request.last_log_id.as_ref());
    out.put_u8(u8::from(request.leadership_transfer));
    out.freeze()
}

/// A candidate's vote is not committed; a committed one would make the receiver follow a leader that is none.
pub(crate) fn decode_vote(bytes: &[u8]) -> Result<VoteRequest, CodecError> {
    let mut r = Reader(bytes);
    let mut request = VoteRequest::new(r.vote()?, r.option_log_id()?);
    request.leadership_transfer = r.flag("transfer")?;
    r.finish()?;
    if request.vote.committed { Err(CodecError::OutOfRange("vote of a candidate")) } else { Ok(request) }
}

pub(crate) fn encode_vote_reply(reply: &VoteResponse) -> Bytes {
    let mut out = BytesMut::with_capacity(35);
    put_vote(&mut out, &reply.vote);
    out.put_u8(u8::from(reply.vote_granted));
    put_option_log_id(&mut out, reply.last_log_id.as_ref());
    out.freeze()
}

pub(crate) fn decode_vote_reply(bytes: &[u8]) -> Result<VoteResponse, CodecError> {
    let mut r = Reader(bytes);
    let (vote, granted) = (r.vote()?, r.flag("granted")?);
    let reply = VoteResponse::new(vote, r.option_log_id()?, granted);
    r.finish()?;
    Ok(reply)
}

pub(crate) fn encode_transfer(request: &TransferRequest) -> Bytes {
    let mut out = BytesMut::with_capacity(42);
    put_vote(&mut out, request.from_leader());
    out.put_u64_le(*request.to_node_id());
    put_option_log_id(&mut out, request.last_log_id());
    out.freeze()
}

pub(crate) fn decode_transfer(bytes: &[u8]) -> Result<TransferRequest, CodecError> {
    let mut r = Reader(bytes);
    let (vote, to) = (r.vote()?, r.u64("target replica")?);
    let request = TransferRequest::new(vote, to, r.option_log_id()?);
    r.finish()?;
    if vote.committed { Ok(request) } else { Err(CodecError::OutOfRange("vote of a leader")) }
}

pub(crate) fn encode_transfer_reply(reply: &TransferResponse) -> Bytes {
    let mut out = BytesMut::with_capacity(35);
    match reply {
        Ok(()) => out.put_u8(0),
        Err(TransferLeaderError::VoteChanged { expected, actual }) => {
            out.put_u8(1);
            put_vote(&mut out, expected);
            put_vote(&mut out, actual);
        }
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
            out.put_u8(2);
            put_option_log_id(&mut out, expected.as_ref());
            put_option_log_id(&mut out, actual.as_ref());
        }
    }
    out.freeze()
}

pub(crate) fn decode_transfer_reply(bytes: &[u8]) -> Result<TransferResponse, CodecError> {
    let mut r = Reader(bytes);
    let reply = match r.u8("transfer reply")? {
        0 => Ok(()),
        1 => Err(TransferLeaderError::VoteChanged { expected: r.vote()?, actual: r.vote()? }),
        2 => Err(TransferLeaderError::LogNotFlushed { expected: r.option_log_id()?, actual: r.option_log_id()? }),
        _ => return Err(CodecError::OutOfRange("transfer reply")),
    };
    r.finish()?;
    Ok(reply)
}

/// Who sends a snapshot, by what right, and what of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotHead {
    pub(crate) vote: Vote,
    pub(crate) sender_process: u32,
    pub(crate) sender_replica: u64,
}

impl SnapshotHead {
    /// Encodes the head of a snapshot's frame; `None` if the snapshot holds no position, so that there is nothing to
    /// send. The manifest itself is the frame's payload.
    pub(crate) fn encode(&self, snapshot: &RaftSnapshot) -> Option<Bytes> {
        let pos = snapshot.applied.pos?;
        let mut out = BytesMut::with_capacity(49 + snapshot.applied.membership.len());
        put_vote(&mut out, &self.vote);
        out.put_u32_le(self.sender_process);
        out.put_u64_le(self.sender_replica);
        put_log_id(&mut out, &log_id_at(pos));
        out.put_u32_le(crc32c(&snapshot.manifest));
        out.put_slice(&snapshot.applied.membership);
        Some(out.freeze())
    }

    pub(crate) fn decode(message: &[u8], manifest: Bytes) -> Result<(Self, RaftSnapshot), CodecError> {
        let mut r = Reader(message);
        let head = Self {
            vote: r.vote()?,
            sender_process: r.u32("sender process")?,
            sender_replica: r.u64("sender replica")?,
        };
        let (id, crc): (LogId, u32) = (r.log_id()?, r.u32("manifest crc")?);
        if !head.vote.committed || id.leader_id.term > head.vote.leader_id.term {
            return Err(CodecError::OutOfRange("term beyond the vote"));
        }
        if manifest.len() > MANIFEST_BYTES_MAX {
            return Err(CodecError::OutOfRange("manifest length"));
        }
        if crc32c(&manifest) != crc {
            return Err(CodecError::Checksum);
        }
        let stored = decode_stored_membership(r.0)?;
        if stored.log_id().is_some_and(|at| at > id) {
            return Err(CodecError::OutOfRange("membership log id"));
        }
        let applied = Applied { pos: Some(pos_of(&id)), membership: Bytes::copy_from_slice(r.0) };
        Ok((head, RaftSnapshot { applied, manifest }))
    }
}

/// The answer to a snapshot: the receiver's vote.
pub(crate) fn encode_vote_only(vote: &Vote) -> Bytes {
    let mut out = BytesMut::with_capacity(17);
    put_vote(&mut out, vote);
    out.freeze()
}

pub(crate) fn decode_vote_only(bytes: &[u8]) -> Result<Vote, CodecError> {
    let mut r = Reader(bytes);
    let vote = r.vote()?;
    r.finish()?;
    Ok(vote)
}

pub(crate) fn encode_fetch_reply(payload: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&crc32c(payload).to_le_bytes())
}

pub(crate) fn decode_fetch_reply(head: &[u8], payload: &[u8]) -> Result<(), CodecError> {
    let mut r = Reader(head);
    let crc = r.u32("payload crc")?;
    r.finish()?;
    if crc32c(payload) == crc { Ok(()) } else { Err(CodecError::Checksum) }
}
