//! Decoders of this crate over hostile bytes, for the fuzz targets of `vm-tests` (`vm-tests/src/fuzz`). Each function panics when a
//! promise of a decoder is broken. Not an interface.

use crate::codec;
use crate::wal::format::{BatchEncoder, BatchId, EntryKind, LogPoint, Record, SavedVote, decode_batch, entry_payload};
use bytes::Bytes;
use ogee_disk::AlignedBuf;

const ID: BatchId = BatchId { log: 7, segment: 3, sequence: 11 };

/// A batch of the log: as it comes, and one made of these bytes of which some are then changed: it decodes to what was encoded or not at all.
pub fn log_batch(data: &[u8]) {
    let _ = decode_batch(data, ID.log, ID.segment);
    let Some((changes, rest)) = data.split_first() else { return };
    let (changes, rest) = rest.split_at(rest.len().min(usize::from(changes % 4) * 3));
    let mut buf = AlignedBuf::with_capacity(rest.len() * 48 + 8192);
    let mut encoder = BatchEncoder::new(&mut buf, ID);
    let mut wanted = vec![];
    for piece in rest.chunks(9) {
        let number = |i: usize| u64::from(piece.get(i).copied().unwrap_or(0));
        let point = LogPoint { term: number(1), index: number(2) };
        let payload = piece.get(3..).unwrap_or_default();
        let (record, payload) = match piece[0] % 6 {
            0 => (Record::Entry { kind: EntryKind::Command, point }, payload),
            1 => (Record::Entry { kind: EntryKind::Membership, point }, payload),
            2 => (Record::Vote(SavedVote { term: number(1), replica: number(2), committed: number(3) % 2 == 1 }), &[][..]),
            3 => (Record::TruncateFrom(number(2)), &[][..]),
            4 => (Record::Purge(point), &[][..]),
            _ => (Record::Remove, &[][..]),
        };
        let at = encoder.push(number(4), &record, payload);
        wanted.push((number(4), record, at, payload));
    }
    encoder.finish();
    for change in changes.chunks_exact(3) {
        let at = usize::from(change[0]) << 8 | usize::from(change[1]);
        if let Some(byte) = buf.get_mut(at) {
            *byte ^= change[2];
        }
    }
    match decode_batch(&buf, ID.log, ID.segment) {
        Ok(batch) => {
            assert_eq!(batch.records.len(), wanted.len());
            for (found, (group, record, at, payload)) in batch.records.iter().zip(&wanted) {
                assert_eq!((found.group, found.record, found.at, found.payload), (*group, *record, *at, payload.len()));
                if let Record::Entry { kind, point } = *record {
                    assert_eq!(entry_payload(&buf, *at, *group, kind, point), Some(*payload));
                }
            }
        }
        Err(_) => assert!(!changes.is_empty(), "a batch as it was written must decode"),
    }
}

/// Messages between replicas.
pub fn raft_messages(data: &[u8]) {
    let half = data.len() / 2;
    let (message, payload) = data.split_at(half);
    let _ = codec::decode_append(message, &Bytes::copy_from_slice(payload));
    let _ = codec::decode_append_reply(data, None);
    let _ = codec::decode_transfer(data);
    let _ = codec::decode_stored_membership(data);
    let _ = codec::SnapshotHead::decode(message, Bytes::copy_from_slice(payload));
    let _ = codec::decode_fetch_reply(message, payload);
    let _ = codec::decode_beats_reply(data, half);
    if let Ok(vote) = codec::decode_vote(data) {
        assert_eq!(&codec::encode_vote(&vote)[..], data);
    }
    if let Ok(beats) = codec::decode_beats(data) {
        assert_eq!(&codec::encode_beats(&beats)[..], data);
    }
}
