//! Raft messages as they travel in [`ogee_proto::data::RaftHead::message`], by hand, little endian.
//!
//! Invariants: every decoder is total (an error, never a panic), allocates nothing by an unchecked length, and hands
//! openraft only what its own peers could have built: terms and indexes below 2^60, entries without gaps and in term
//! order, no position beyond the vote's term. openraft asserts some of that and would take the replica down. Payloads
//! carry a CRC32C in the message. Byte tables are at each message; golden bytes in `tests.rs`.

mod append;
mod beat;
mod messages;
mod reader;

pub(crate) use append::{AppendFrame, decode_append, decode_append_reply, encode_append, encode_append_reply};
pub(crate) use beat::{BEATS_MAX, Beat, decode_beats, decode_beats_reply, encode_beats, encode_beats_reply};
pub(crate) use messages::{
    SnapshotHead, decode_fetch_reply, decode_transfer, decode_transfer_reply, decode_vote, decode_vote_only,
    decode_vote_reply, encode_fetch_reply, encode_transfer, encode_transfer_reply, encode_vote, encode_vote_only,
    encode_vote_reply,
};
pub(crate) use reader::{CodecError, decode_stored_membership, encode_stored_membership};

#[cfg(test)]
mod tests;
