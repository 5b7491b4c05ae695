//! AppendEntries. The message holds positions and lengths, the frame's payload the entries' bytes back to back, so that
//! neither side copies them.
//!
//! ```text
//! version u8 = 1 | vote 17 | prev option(16) | committed option(16) | payload crc32c u32 | count u32
//! then count times: term u64 | kind u8 (0 blank, 1 command, 2 membership) | length u32
//! ```
//! Indexes are not sent: they follow `prev` without gaps. The reply is one byte: 0 success, 1 conflict at `prev`,
//! 2 higher vote (vote 17), 3 partial success (option(16)).

use super::reader::{CodecError, Reader, decode_membership, encode_membership, put_len, put_option_log_id, put_vote};
use crate::alias::{AppendRequest, AppendResponse, Entry, LogId};
use crate::types::Command;
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::checksum::{crc32c, crc32c_append};
use ogee_common::limits::{RAFT_APPEND_BYTES_MAX, RAFT_APPEND_ENTRIES_MAX};
use openraft::EntryPayload;
use smallvec::SmallVec;

const VERSION: u8 = 1;
/// Bytes of one entry's header.
const ENTRY_BYTES: usize = 13;
const FIXED_BYTES: usize = 1 + 17 + 17 + 17 + 4 + 4;

/// One AppendEntries frame.
pub(crate) struct AppendFrame {
    pub(crate) message: Bytes,
    pub(crate) payload: SmallVec<[Bytes; 2]>,
    pub(crate) payload_bytes: usize,
    /// The leader's term.
    pub(crate) term: u64,
    /// Whether it carries entries, not only what is committed.
    pub(crate) has_entries: bool,
    /// Where the frame's entries start and end, for the answer.
    pub(crate) prev: Option<LogId>,
    pub(crate) last: Option<LogId>,
}

/// Encodes a request as one frame, or as several in log order if its entries exceed one.
pub(crate) fn encode_append(request: AppendRequest) -> SmallVec<[AppendFrame; 1]> {
    let mut frames = SmallVec::new();
    let mut prev = request.prev_log_id;
    let mut rest = request.entries.into_iter().peekable();
    loop {
        let mut part = Part::default();
        while let Some(entry) = rest.peek() {
            let (kind, bytes) = entry_bytes(entry);
            if !part.admits(bytes.len()) {
                break;
            }
            part.push(entry.log_id, kind, bytes);
            rest.next();
        }
        let last = part.last.or(prev);
        let mut message = BytesMut::with_capacity(FIXED_BYTES + part.headers.len());
        message.put_u8(VERSION);
        put_vote(&mut message, &request.vote);
        put_option_log_id(&mut message, prev.as_ref());
        put_option_log_id(&mut message, request.leader_commit.as_ref());
        message.put_u32_le(part.crc);
        put_len(&mut message, part.headers.len() / ENTRY_BYTES);
        message.put_slice(&part.headers);
        frames.push(AppendFrame {
            message: message.freeze(),
            payload: part.payload,
            payload_bytes: part.bytes,
            term: request.vote.leader_id.term,
            has_entries: !part.headers.is_empty(),
            prev,
            last,
        });
        if rest.peek().is_none() {
            return frames;
        }
        prev = last;
    }
}

#[derive(Default)]
struct Part {
    headers: BytesMut,
    payload: SmallVec<[Bytes; 2]>,
    bytes: usize,
    crc: u32,
    last: Option<LogId>,
}

impl Part {
    /// An empty frame takes any entry: commands are bounded by RAFT_COMMAND_BYTES_MAX when they are proposed.
    fn admits(&self, bytes: usize) -> bool {
        self.headers.is_empty()
            || (self.bytes + bytes <= RAFT_APPEND_BYTES_MAX
                && self.headers.len() < RAFT_APPEND_ENTRIES_MAX * ENTRY_BYTES)
    }

    fn push(&mut self, id: LogId, kind: u8, bytes: Bytes) {
        self.headers.put_u64_le(id.leader_id.term);
        self.headers.put_u8(kind);
        put_len(&mut self.headers, bytes.len());
        self.last = Some(id);
        if !bytes.is_empty() {
            self.crc = crc32c_append(self.crc, &bytes);
            self.bytes += bytes.len();
            self.payload.push(bytes);
        }
    }
}

fn entry_bytes(entry: &Entry) -> (u8, Bytes) {
    match &entry.payload {
        EntryPayload::Blank => (0, Bytes::new()),
        EntryPayload::Normal(command) => (1, command.0.clone()),
        EntryPayload::Membership(membership) => (2, encode_membership(membership)),
    }
}

/// Decodes a frame; commands are slices of `payload`.
pub(crate) fn decode_append(message: &[u8], payload: &Bytes) -> Result<AppendRequest, CodecError> {
    let mut r = Reader(message);
    if r.u8("version")? != VERSION {
        return Err(CodecError::OutOfRange("version"));
    }
    let vote = r.vote()?;
    if !vote.committed {
        return Err(CodecError::OutOfRange("vote of a leader"));
    }
    let (prev_log_id, leader_commit) = (r.option_log_id()?, r.option_log_id()?);
    let crc = r.u32("payload crc")?;
    let count = r.u32("entry count")? as usize;
    if count > RAFT_APPEND_ENTRIES_MAX || r.0.len() != count * ENTRY_BYTES {
        return Err(CodecError::OutOfRange("entry count"));
    }
    if crc32c(payload) != crc {
        return Err(CodecError::Checksum);
    }
    let newest = vote.leader_id.term;
    if [&prev_log_id, &leader_commit].into_iter().flatten().any(|id| id.leader_id.term > newest) {
        return Err(CodecError::OutOfRange("term beyond the vote"));
    }
    let mut index = prev_log_id.as_ref().map_or(0, |id| id.index + 1);
    let mut oldest = prev_log_id.as_ref().map_or(0, |id| id.leader_id.term);
    let mut offset = 0;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let (term, kind) = (r.counter("entry term")?, r.u8("entry kind")?);
        let end = offset + r.u32("entry length")? as usize;
        if term < oldest || term > newest {
            return Err(CodecError::OutOfRange("entry term"));
        }
        if end > payload.len() {
            return Err(CodecError::Short("entry payload"));
        }
        let bytes = payload.slice(offset..end);
        entries.push(Entry { log_id: LogId::new(term.into(), index), payload: decode_payload(kind, bytes)? });
        (oldest, index, offset) = (term, index + 1, end);
    }
    r.finish()?;
    if offset != payload.len() {
        return Err(CodecError::Trailing(payload.len() - offset));
    }
    Ok(AppendRequest { vote, prev_log_id, entries, leader_commit })
}

fn decode_payload(kind: u8, bytes: Bytes) -> Result<EntryPayload<Command, u64, crate::types::PeerNode>, CodecError> {
    match kind {
        0 if bytes.is_empty() => Ok(EntryPayload::Blank),
        1 => Ok(EntryPayload::Normal(Command(bytes))),
        2 => Ok(EntryPayload::Membership(decode_membership(&bytes)?)),
        _ => Err(CodecError::OutOfRange("entry kind")),
    }
}

/// Encodes the answer to a frame.
pub(crate) fn encode_append_reply(reply: &AppendResponse) -> Bytes {
    let mut out = BytesMut::with_capacity(18);
    match reply {
        AppendResponse::Success => out.put_u8(0),
        AppendResponse::Conflict => out.put_u8(1),
        AppendResponse::HigherVote(vote) => {
            out.put_u8(2);
            put_vote(&mut out, vote);
        }
        AppendResponse::PartialSuccess(upto) => {
            out.put_u8(3);
            put_option_log_id(&mut out, upto.as_ref());
        }
    }
    out.freeze()
}

/// Decodes the answer to a frame that started at `prev`: without `prev` nothing can conflict.
pub(crate) fn decode_append_reply(bytes: &[u8], prev: Option<&LogId>) -> Result<AppendResponse, CodecError> {
    let mut r = Reader(bytes);
    let reply = match r.u8("append reply")? {
        0 => AppendResponse::Success,
        1 if prev.is_some() => AppendResponse::Conflict,
        2 => AppendResponse::HigherVote(r.vote()?),
        3 => AppendResponse::PartialSuccess(r.option_log_id()?),
        _ => return Err(CodecError::OutOfRange("append reply")),
    };
    r.finish()?;
    Ok(reply)
}
