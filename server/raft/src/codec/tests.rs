//! Golden bytes, round trips and garbage.

use super::*;
use crate::alias::{
    AppendRequest, AppendResponse, Entry, LogId, Membership, StoredMembership, TransferRequest, TransferResponse, Vote,
    VoteRequest, VoteResponse, log_id_at,
};
use crate::api::{Applied, LogPos, RaftSnapshot};
use crate::codec::reader::decode_membership;
use crate::types::{Command, PeerNode};
use bytes::{Bytes, BytesMut};
use ogee_common::id::Term;
use ogee_common::limits::{RAFT_APPEND_BYTES_MAX, RAFT_COMMAND_BYTES_MAX};
use openraft::EntryPayload;
use openraft::raft::TransferLeaderError;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn id(term: u64, index: u64) -> LogId {
    log_id_at(LogPos { term: Term(term), index })
}

fn command(term: u64, index: u64, bytes: &'static [u8]) -> Entry {
    Entry { log_id: id(term, index), payload: EntryPayload::Normal(Command(Bytes::from_static(bytes))) }
}

fn membership() -> Membership {
    let nodes: BTreeMap<u64, PeerNode> = (1..=3).map(|n| (n, PeerNode { process: 10 })).collect();
    Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes).expect("a valid membership")
}

fn sample_append() -> AppendRequest {
    AppendRequest {
        vote: Vote::new_committed(7, 3),
        prev_log_id: Some(id(5, 41)),
        leader_commit: Some(id(5, 40)),
        entries: vec![
            Entry { log_id: id(6, 42), payload: EntryPayload::Blank },
            command(6, 43, b"first"),
            command(7, 44, b""),
            Entry { log_id: id(7, 45), payload: EntryPayload::Membership(membership()) },
            command(7, 46, b"last"),
        ],
    }
}

fn sample_beats() -> Vec<Beat> {
    (1..=3).map(|n| Beat { group: n, target: 10 * n, term: 7, committed: 100 + n }).collect()
}

#[test]
fn beats_survive_the_way_and_garbage_does_not() {
    let (beats, bytes) = (sample_beats(), encode_beats(&sample_beats()));
    assert_eq!(decode_beats(&bytes), Ok(beats));
    for end in 0..bytes.len() {
        assert!(decode_beats(&bytes[..end]).is_err(), "cut at {end}");
    }
    assert_eq!(decode_beats(&[&bytes[..], &[0]].concat()), Err(CodecError::Trailing(1)));
    assert_eq!(decode_beats(&u32::MAX.to_le_bytes()), Err(CodecError::OutOfRange("beats")));
    assert_eq!(decode_beats(&[1, 0, 0, 0, 0]), Err(CodecError::Short("beats")));
    let far = Beat { group: 1, target: 2, term: 1 << 60, committed: 0 };
    assert_eq!(decode_beats(&encode_beats(&[far])), Err(CodecError::OutOfRange("term")));
    assert_eq!(decode_beats_reply(&encode_beats_reply(&[0, 2]), 3), Ok(vec![0, 2]));
    let wrong: [&[u32]; 4] = [&[0, 3], &[1, 1], &[1, 0], &[0, 1, 2, 3]];
    for refused in wrong {
        assert!(decode_beats_reply(&encode_beats_reply(refused), 3).is_err(), "{refused:?}");
    }
    assert!(decode_beats_reply(&[1, 0, 0, 0], 3).is_err());
}

fn one_frame(request: AppendRequest) -> (Bytes, Bytes) {
    let frames = encode_append(request);
    assert_eq!(frames.len(), 1);
    let frame = frames.into_iter().next().expect("one");
    (frame.message, joined(&frame.payload))
}

fn joined(pieces: &[Bytes]) -> Bytes {
    let mut out = BytesMut::new();
    pieces.iter().for_each(|p| out.extend_from_slice(p));
    out.freeze()
}

fn same(a: &AppendRequest, b: &AppendRequest) -> bool {
    (a.vote, a.prev_log_id, a.leader_commit, &a.entries) == (b.vote, b.prev_log_id, b.leader_commit, &b.entries)
}

fn sample_snapshot() -> (SnapshotHead, RaftSnapshot) {
    let head = SnapshotHead { vote: Vote::new_committed(7, 3), sender_process: 12, sender_replica: 3 };
    let stored = StoredMembership::new(Some(id(2, 9)), membership());
    let applied =
        Applied { pos: Some(LogPos { term: Term(6), index: 99 }), membership: encode_stored_membership(&stored) };
    (head, RaftSnapshot { applied, manifest: Bytes::from_static(b"a manifest") })
}

fn check_golden(name: &str, bytes: &[u8]) {
    use std::fmt::Write as _;
    let path = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"));
    let mut text = String::new();
    for line in bytes.chunks(32) {
        line.iter().for_each(|b| write!(text, "{b:02x}").expect("a string takes everything"));
        text.push('\n');
    }
    if std::env::var_os("OGEE_BLESS").is_some() {
        std::fs::write(&path, &text).expect("write the golden file");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(text, golden, "{name} changed on the wire");
}

#[test]
fn golden_messages() {
    let (message, payload) = one_frame(sample_append());
    check_golden("raft-append-v1", &[&message[..], &payload[..]].concat());
    check_golden("raft-append-reply-v1", &encode_append_reply(&AppendResponse::HigherVote(Vote::new(8, 2))));
    let mut vote = VoteRequest::new(Vote::new(9, 4), Some(id(5, 41)));
    vote.leadership_transfer = true;
    check_golden("raft-beat-v1", &encode_beats(&sample_beats()));
    check_golden("raft-beat-reply-v1", &encode_beats_reply(&[0, 2]));
    check_golden("raft-vote-v1", &encode_vote(&vote));
    check_golden("raft-vote-reply-v1", &encode_vote_reply(&VoteResponse::new(Vote::new(9, 4), Some(id(5, 41)), true)));
    let transfer = TransferRequest::new(Vote::new_committed(7, 3), 2, Some(id(7, 46)));
    check_golden("raft-transfer-v1", &encode_transfer(&transfer));
    let (head, snapshot) = sample_snapshot();
    check_golden("raft-snapshot-v1", &head.encode(&snapshot).expect("it has a position"));
}

#[test]
fn append_survives_the_way_without_copies() {
    let request = sample_append();
    let (message, payload) = one_frame(request.clone());
    let back = decode_append(&message, &payload).expect("what was encoded");
    assert!(same(&back, &request));
    let EntryPayload::Normal(Command(first)) = &back.entries[1].payload else { panic!("a command") };
    assert_eq!(first.as_ptr(), payload.as_ptr(), "a slice of the frame");
    let heartbeat = AppendRequest { prev_log_id: None, leader_commit: None, entries: vec![], ..request };
    let (message, payload) = one_frame(heartbeat.clone());
    assert!(same(&decode_append(&message, &payload).expect("a heartbeat"), &heartbeat));
}

#[test]
fn what_exceeds_a_frame_becomes_several_that_follow_each_other() {
    let big = Bytes::from(vec![1; RAFT_COMMAND_BYTES_MAX]);
    let entries: Vec<Entry> =
        (10..17).map(|i| Entry { log_id: id(3, i), payload: EntryPayload::Normal(Command(big.clone())) }).collect();
    let request = AppendRequest {
        vote: Vote::new_committed(3, 1),
        prev_log_id: Some(id(2, 9)),
        leader_commit: Some(id(2, 9)),
        entries: entries.clone(),
    };
    let frames = encode_append(request);
    assert!(frames.len() > 1);
    let (mut prev, mut back) = (Some(id(2, 9)), Vec::new());
    for frame in frames {
        assert!(frame.payload_bytes <= RAFT_APPEND_BYTES_MAX);
        assert_eq!(frame.prev, prev);
        let part = decode_append(&frame.message, &joined(&frame.payload)).expect("each is whole");
        assert_eq!((part.prev_log_id, part.entries.last().map(|e| e.log_id)), (prev, frame.last));
        prev = frame.last;
        back.extend(part.entries);
    }
    assert_eq!(back, entries);
}

#[test]
fn damaged_payloads_are_noticed() {
    let (message, payload) = one_frame(sample_append());
    for at in 0..payload.len() {
        let mut damaged = payload.to_vec();
        damaged[at] ^= 1;
        assert_eq!(decode_append(&message, &Bytes::from(damaged)).err(), Some(CodecError::Checksum));
    }
    let (head, snapshot) = sample_snapshot();
    let message = head.encode(&snapshot).expect("it has a position");
    assert_eq!(SnapshotHead::decode(&message, Bytes::from_static(b"A manifest")).err(), Some(CodecError::Checksum));
    assert!(decode_fetch_reply(&encode_fetch_reply(b"part"), b"part").is_ok());
    assert_eq!(decode_fetch_reply(&encode_fetch_reply(b"part"), b"Part"), Err(CodecError::Checksum));
}

/// What openraft would assert or unwrap.
#[test]
fn what_no_leader_sends_is_refused() {
    let refused = |change: fn(&mut AppendRequest)| {
        let mut request = sample_append();
        change(&mut request);
        let (message, payload) = one_frame(request);
        assert!(matches!(decode_append(&message, &payload), Err(CodecError::OutOfRange(_))));
    };
    refused(|r| r.vote = Vote::new(7, 3));
    refused(|r| r.vote = Vote::new_committed(6, 3));
    refused(|r| r.vote = Vote::new_committed(u64::MAX, 3));
    refused(|r| r.prev_log_id = Some(id(8, 41)));
    refused(|r| r.prev_log_id = Some(id(7, 41)));
    refused(|r| r.prev_log_id = Some(id(5, u64::MAX - 10)));
    refused(|r| r.leader_commit = Some(id(8, 41)));
    refused(|r| r.entries[2].log_id = id(5, 44));
    let stray: Membership = serde_roundtrip(&(vec![BTreeSet::from([1u64, 9])], BTreeMap::from([(1u64, 10u32)])));
    assert!(decode_membership(&postcard::to_allocvec(&stray).expect("encode")).is_err(), "a voter without a node");
    assert_eq!(decode_append_reply(&[1], None).err(), Some(CodecError::OutOfRange("append reply")));
    assert!(decode_vote(&encode_vote(&VoteRequest::new(Vote::new_committed(9, 4), None))).is_err());
    let (mut head, snapshot) = sample_snapshot();
    head.vote = Vote::new_committed(5, 3);
    let message = head.encode(&snapshot).expect("it has a position");
    assert!(SnapshotHead::decode(&message, snapshot.manifest).is_err(), "a snapshot from beyond the vote");
}

fn serde_roundtrip(parts: &(Vec<BTreeSet<u64>>, BTreeMap<u64, u32>)) -> Membership {
    postcard::from_bytes(&postcard::to_allocvec(parts).expect("encode")).expect("the same fields in the same order")
}

fn votes() -> impl Strategy<Value = Vote> {
    (0..1u64 << 59, any::<u64>(), any::<bool>()).prop_map(|(term, replica, committed)| {
        if committed { Vote::new_committed(term, replica) } else { Vote::new(term, replica) }
    })
}

fn ids() -> impl Strategy<Value = Option<LogId>> {
    proptest::option::of((0..1u64 << 59, 0..1u64 << 59).prop_map(|(term, index)| id(term, index)))
}

/// Bytes of a real message with some of them changed, cut or added.
fn mangled(bytes: &[u8], cut: usize, flips: &[(usize, u8)], tail: &[u8]) -> Vec<u8> {
    let mut out = bytes[..cut.min(bytes.len())].to_vec();
    out.extend_from_slice(tail);
    for (at, value) in flips {
        if !out.is_empty() {
            let at = at % out.len();
            out[at] = *value;
        }
    }
    out
}

proptest! {
    #[test]
    fn append_round_trip(
        start in 0..1u64 << 50,
        terms in proptest::collection::vec(0..3u64, 0..40),
        sizes in proptest::collection::vec(0..300usize, 40),
        kinds in proptest::collection::vec(0..3u8, 40),
        commit in 0..100u64,
    ) {
        let mut term = 4;
        let entries: Vec<Entry> = terms.iter().enumerate().map(|(i, step)| {
            term += step;
            let payload = match kinds[i] {
                0 => EntryPayload::Blank,
                1 => EntryPayload::Membership(membership()),
                _ => EntryPayload::Normal(Command(Bytes::from(vec![kinds[i]; sizes[i]]))),
            };
            Entry { log_id: id(term, start + 1 + i as u64), payload }
        }).collect();
        let request = AppendRequest {
            vote: Vote::new_committed(term, 9),
            prev_log_id: Some(id(4, start)),
            leader_commit: Some(id(3, commit)),
            entries,
        };
        let (message, payload) = one_frame(request.clone());
        prop_assert!(same(&decode_append(&message, &payload).expect("what was encoded"), &request));
    }

    #[test]
    fn small_messages_round_trip(vote in votes(), other in votes(), last in ids(), more in ids(), to: u64, flag: bool) {
        let mut request = VoteRequest::new(Vote { committed: false, ..vote }, last);
        request.leadership_transfer = flag;
        prop_assert_eq!(decode_vote(&encode_vote(&request)), Ok(request));
        let reply = VoteResponse::new(vote, last, flag);
        prop_assert_eq!(decode_vote_reply(&encode_vote_reply(&reply)), Ok(reply));
        let transfer = TransferRequest::new(Vote { committed: true, ..vote }, to, last);
        prop_assert_eq!(decode_transfer(&encode_transfer(&transfer)), Ok(transfer));
        let replies: [TransferResponse; 3] = [
            Ok(()),
            Err(TransferLeaderError::VoteChanged { expected: vote, actual: other }),
            Err(TransferLeaderError::LogNotFlushed { expected: last, actual: more }),
        ];
        for reply in replies {
            prop_assert_eq!(decode_transfer_reply(&encode_transfer_reply(&reply)), Ok(reply));
        }
        let replies = [
            AppendResponse::Success,
            AppendResponse::Conflict,
            AppendResponse::HigherVote(vote),
            AppendResponse::PartialSuccess(last),
        ];
        for reply in replies {
            prop_assert_eq!(decode_append_reply(&encode_append_reply(&reply), Some(&id(1, 1))), Ok(reply));
        }
        prop_assert_eq!(decode_vote_only(&encode_vote_only(&vote)), Ok(vote));
    }

    #[test]
    fn snapshots_round_trip(term in 6..1000u64, manifest in proptest::collection::vec(any::<u8>(), 0..100)) {
        let (mut head, mut snapshot) = sample_snapshot();
        head.vote = Vote::new_committed(term, 3);
        snapshot.manifest = Bytes::from(manifest);
        let message = head.encode(&snapshot).expect("it has a position");
        let (back, manifest) = (SnapshotHead::decode(&message, snapshot.manifest.clone()), head);
        prop_assert_eq!(back, Ok((manifest, snapshot)));
    }

    #[test]
    fn garbage_gives_an_error_or_a_sound_message(
        cut in 0..400usize,
        flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        tail in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let (message, payload) = one_frame(sample_append());
        let (head, snapshot) = sample_snapshot();
        let snapshot_message = head.encode(&snapshot).expect("it has a position");
        let sources: [&[u8]; 5] = [
            &message,
            &snapshot_message,
            &encode_vote(&VoteRequest::new(Vote::new(9, 4), Some(id(5, 41)))),
            &encode_transfer(&TransferRequest::new(Vote::new_committed(7, 3), 2, Some(id(7, 46)))),
            &[],
        ];
        for source in sources {
            let bytes = mangled(source, cut, &flips, &tail);
            if let Ok(request) = decode_append(&bytes, &payload) {
                let first = request.prev_log_id.map_or(0, |p| p.index + 1);
                for (i, entry) in request.entries.iter().enumerate() {
                    prop_assert_eq!(entry.log_id.index, first + i as u64);
                    prop_assert!(entry.log_id.leader_id.term <= request.vote.leader_id.term);
                }
            }
            let _ = decode_append(&message, &Bytes::from(mangled(&payload, cut, &flips, &tail)));
            let _ = decode_append_reply(&bytes, None);
            let _ = decode_vote(&bytes);
            let _ = decode_vote_reply(&bytes);
            let _ = decode_transfer(&bytes);
            let _ = decode_transfer_reply(&bytes);
            let _ = decode_vote_only(&bytes);
            let _ = decode_fetch_reply(&bytes, &payload);
            let _ = decode_stored_membership(&bytes);
            let _ = decode_membership(&bytes);
            let _ = SnapshotHead::decode(&bytes, snapshot.manifest.clone());
        }
    }
}
