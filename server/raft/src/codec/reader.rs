//! Bounds-checked reading of the pieces that several messages share. Pure.

use crate::alias::{LogId, Membership, StoredMembership, Vote};
use bytes::{BufMut, Bytes, BytesMut};
use openraft::vote::RaftLeaderId as _;

/// Terms and indexes reach this at most: 2^60 entries at a million a second are 36,000 years, and `+ 1` cannot overflow.
pub(crate) const COUNTER_MAX: u64 = 1 << 60;

/// Why bytes are not a Raft message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CodecError {
    /// Fewer bytes than the fields need.
    #[error("raft message cut short while reading {0}")]
    Short(&'static str),
    /// More bytes than the fields need.
    #[error("{0} bytes too many at the end of the raft message")]
    Trailing(usize),
    /// A field has a value that no peer sends.
    #[error("raft message field {0} is out of range")]
    OutOfRange(&'static str),
    /// The payload was damaged on the way.
    #[error("raft message payload does not match its checksum")]
    Checksum,
}

/// A cursor over a received message.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, n: usize, field: &'static str) -> Result<&'a [u8], CodecError> {
        let (now, rest) = self.0.split_at_checked(n).ok_or(CodecError::Short(field))?;
        self.0 = rest;
        Ok(now)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], CodecError> {
        self.take(N, field)?.try_into().map_err(|_| CodecError::Short(field))
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, CodecError> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, CodecError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(CodecError::OutOfRange(field)),
        }
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A term or an index.
    pub(crate) fn counter(&mut self, field: &'static str) -> Result<u64, CodecError> {
        let value = self.u64(field)?;
        if value < COUNTER_MAX { Ok(value) } else { Err(CodecError::OutOfRange(field)) }
    }

    /// `term u64 | replica u64 | committed u8`.
    pub(crate) fn vote(&mut self) -> Result<Vote, CodecError> {
        let (term, replica) = (self.counter("vote term")?, self.u64("vote replica")?);
        let leader_id = openraft::impls::leader_id_std::LeaderId::new(term, replica);
        Ok(Vote { leader_id, committed: self.flag("vote committed")? })
    }

    /// `term u64 | index u64`.
    pub(crate) fn log_id(&mut self) -> Result<LogId, CodecError> {
        let (term, index) = (self.counter("log id term")?, self.counter("log id index")?);
        Ok(LogId::new(term.into(), index))
    }

    /// `present u8 | log id or nothing`.
    pub(crate) fn option_log_id(&mut self) -> Result<Option<LogId>, CodecError> {
        if self.flag("log id present")? { self.log_id().map(Some) } else { Ok(None) }
    }

    pub(crate) fn finish(self) -> Result<(), CodecError> {
        if self.0.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.0.len())) }
    }
}

pub(crate) fn put_vote(out: &mut BytesMut, vote: &Vote) {
    out.put_u64_le(vote.leader_id.term);
    out.put_u64_le(vote.leader_id.voted_for);
    out.put_u8(u8::from(vote.committed));
}

pub(crate) fn put_log_id(out: &mut BytesMut, id: &LogId) {
    out.put_u64_le(id.leader_id.term);
    out.put_u64_le(id.index);
}

pub(crate) fn put_option_log_id(out: &mut BytesMut, id: Option<&LogId>) {
    out.put_u8(u8::from(id.is_some()));
    if let Some(id) = id {
        put_log_id(out, id);
    }
}

pub(crate) fn put_len(out: &mut BytesMut, len: usize) {
    out.put_u32_le(u32::try_from(len).expect("parts of a frame are bounded by FRAME_BODY_BYTES_MAX"));
}

/// A membership as it stands in a log entry.
pub(crate) fn encode_membership(membership: &Membership) -> Bytes {
    postcard::to_allocvec(membership).expect("a membership has no type that postcard refuses").into()
}

/// The inverse of [`encode_membership`]. openraft looks members up without checking, so each voter must have a node.
pub(crate) fn decode_membership(bytes: &[u8]) -> Result<Membership, CodecError> {
    let membership: Membership =
        postcard::from_bytes(bytes).map_err(|_| CodecError::OutOfRange("membership encoding"))?;
    check_membership(&membership)?;
    Ok(membership)
}

fn check_membership(membership: &Membership) -> Result<(), CodecError> {
    let known = membership.voter_ids().all(|id| membership.get_node(&id).is_some());
    let populated = membership.get_joint_config().iter().all(|config| !config.is_empty());
    if known && populated { Ok(()) } else { Err(CodecError::OutOfRange("membership voters")) }
}

/// A membership with the log id it stands at: what [`crate::Applied::membership`] holds.
pub(crate) fn encode_stored_membership(stored: &StoredMembership) -> Bytes {
    postcard::to_allocvec(stored).expect("a membership has no type that postcard refuses").into()
}

/// The inverse of [`encode_stored_membership`]; empty bytes are no membership.
pub(crate) fn decode_stored_membership(bytes: &[u8]) -> Result<StoredMembership, CodecError> {
    if bytes.is_empty() {
        return Ok(StoredMembership::default());
    }
    let stored: StoredMembership =
        postcard::from_bytes(bytes).map_err(|_| CodecError::OutOfRange("membership encoding"))?;
    check_membership(stored.membership())?;
    match stored.log_id() {
        Some(id) if id.index >= COUNTER_MAX || id.leader_id.term >= COUNTER_MAX => {
            Err(CodecError::OutOfRange("membership log id"))
        }
        _ => Ok(stored),
    }
}
