//! The format against golden bytes, and the decoder against arbitrary ones.

use crate::wal::format::*;
use crate::wal::segments::Identity;
use ogee_disk::AlignedBuf;
use proptest::prelude::*;

const ID: BatchId = BatchId { log: 0x1122_3344_5566_7788, segment: 3, sequence: 42 };

fn records() -> Vec<(u64, Record, Vec<u8>)> {
    let point = |term, index| LogPoint { term, index };
    let entry = |kind, term, index| Record::Entry { kind, point: point(term, index) };
    let vote = SavedVote { term: 6, replica: 1001, committed: true };
    vec![
        (1, Record::State(GroupState { vote: Some(vote), purged: Some(point(5, 99)), base: Some(100) }), vec![]),
        (2, Record::State(GroupState { vote: None, purged: None, base: None }), vec![]),
        (1, entry(EntryKind::Blank, 6, 100), vec![]),
        (1, entry(EntryKind::Command, 6, 101), b"hello log".to_vec()),
        (1, entry(EntryKind::Membership, 6, 102), vec![1, 2, 3]),
        (2, Record::Vote(SavedVote { term: 7, replica: 2002, committed: false }), vec![]),
        (1, Record::TruncateFrom(102), vec![]),
        (1, Record::Purge(point(6, 100)), vec![]),
        (3, Record::Remove, vec![]),
    ]
}

fn encode(records: &[(u64, Record, Vec<u8>)]) -> AlignedBuf {
    let mut buf = AlignedBuf::with_capacity(64 << 10);
    let mut batch = BatchEncoder::new(&mut buf, ID);
    for (group, record, payload) in records {
        batch.push(*group, record, payload);
    }
    batch.finish();
    buf
}

fn hex(bytes: &[u8]) -> String {
    let line = |chunk: &[u8]| chunk.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    bytes.chunks(16).map(line).collect::<Vec<_>>().join("\n") + "\n"
}

fn used(batch: &[u8]) -> usize {
    BATCH_HEADER + usize::try_from(u32::from_le_bytes(batch[32..36].try_into().expect("four bytes"))).expect("fits")
}

#[test]
fn the_batch_is_the_golden_one() {
    let batch = encode(&records());
    let used = used(&batch);
    assert!(batch.len() == 4096 && batch[used..].iter().all(|b| *b == 0));
    assert_eq!(hex(&batch[..used]), include_str!("../../../tests/golden/wal-batch-v1.hex"));
    let identity = Identity { log: ID.log, used: true }.encode();
    assert_eq!(hex(&identity), include_str!("../../../tests/golden/wal-identity-v1.hex"));
}

#[test]
fn a_batch_is_read_back() {
    let batch = encode(&records());
    let found = decode_batch(&batch, ID.log, ID.segment).expect("whole");
    assert_eq!((found.sequence, found.bytes), (42, 4096));
    let got: Vec<_> = found.records.iter().map(|r| (r.group, r.record)).collect();
    let want: Vec<_> = records().iter().map(|(g, r, _)| (*g, *r)).collect();
    assert_eq!(got, want);
    let hello = &found.records[3];
    let point = LogPoint { term: 6, index: 101 };
    let payload = entry_payload(&batch, hello.at, 1, EntryKind::Command, point);
    assert_eq!(payload, Some(&b"hello log"[..]));
    assert_eq!(entry_payload(&batch, hello.at, 2, EntryKind::Command, point), None, "another group");
    assert_eq!(entry_payload(&batch, hello.at, 1, EntryKind::Membership, point), None, "another kind");
}

#[test]
fn content_of_another_log_or_segment_is_not_ours() {
    let batch = encode(&records());
    assert_eq!(decode_batch(&batch, ID.log + 1, ID.segment).expect_err("foreign"), BatchFault::Invalid);
    assert_eq!(decode_batch(&batch, ID.log, ID.segment + 1).expect_err("stale"), BatchFault::Invalid);
    assert_eq!(decode_batch(&[], ID.log, ID.segment).expect_err("empty"), BatchFault::Invalid);
}

#[test]
fn every_flipped_bit_is_seen() {
    let batch = encode(&records());
    // Padding between records carries no meaning and no checksum; everything else does.
    let found = decode_batch(&batch, ID.log, ID.segment).expect("whole");
    let mut meaning = vec![true; used(&batch)];
    for r in &found.records {
        let end = r.at + RECORD_HEADER + r.payload;
        meaning[end..r.at + record_bytes(r.payload)].fill(false);
    }
    for (byte, means) in meaning.iter().enumerate() {
        for bit in 0..8 {
            let mut bad = batch.to_vec();
            bad[byte] ^= 1 << bit;
            assert_eq!(decode_batch(&bad, ID.log, ID.segment).is_err(), *means, "byte {byte} bit {bit}");
        }
    }
}

proptest! {
    #[test]
    fn the_decoder_takes_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400), body in any::<u32>(), count in any::<u32>()) {
        let mut batch = encode(&[]).to_vec();
        batch.truncate(BATCH_HEADER);
        batch[32..36].copy_from_slice(&body.to_le_bytes());
        batch[36..40].copy_from_slice(&count.to_le_bytes());
        batch.extend(bytes);
        let _ = decode_batch(&batch, ID.log, ID.segment);
    }

    #[test]
    fn a_cut_batch_is_never_taken(cut in 0usize..400, at in 0usize..4096, junk in any::<u8>()) {
        let batch = encode(&records());
        let used = used(&batch);
        let cut = cut.min(used - 1);
        prop_assert!(decode_batch(&batch[..cut], ID.log, ID.segment).is_err());
        let mut bad = batch.to_vec();
        let at = at % used;
        for b in &mut bad[at..used] {
            *b = junk;
        }
        if bad[..used] != batch[..used] {
            let decoded = decode_batch(&bad, ID.log, ID.segment);
            let only_padding = decoded.as_ref().is_ok_and(|b| b.records.len() == records().len());
            prop_assert!(decoded.is_err() || only_padding);
        }
    }
}
