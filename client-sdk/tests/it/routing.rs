//! Leaders that move, connections that break, answers that do not come; the layout cache and the fence.

use crate::chunkserver::{Reaction, Seen};
use crate::mds::{GIB, LAYER};
use crate::{Fixture, eventually, pattern, read, within, write};
use bytes::Bytes;
use ogee_client::{BlockDevice, OpenMode};
use ogee_common::id::Term;
use ogee_proto::data::{Opcode, Redirect, Status};
use ogee_proto::mds::Ancestor;

#[tokio::test]
async fn redirects_are_followed_and_the_leader_is_remembered() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    f.data.move_leaders();
    write(&v, 0, pattern(2, 512)).await;
    assert_eq!(v.stats().redirects, 1);
    let statuses = f.data.arrived(Opcode::Status);
    write(&v, 0, pattern(3, 512)).await;
    assert_eq!((v.stats().redirects, f.data.arrived(Opcode::Status)), (1, statuses));
    assert_eq!(read(&v, 0, 512).await, pattern(3, 512));
}

#[tokio::test]
async fn a_leader_unknown_to_the_redirect_is_found_by_asking() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    f.data.move_leaders();
    let nobody = Redirect { leader: 0, term: Term(0) }.encode();
    f.data.script(Opcode::Write, 1, Reaction::Reply(Status::NotLeader, nobody));
    write(&v, 0, pattern(2, 512)).await;
    assert_eq!(read(&v, 0, 512).await, pattern(2, 512));
}

#[tokio::test]
async fn broken_connections_and_lost_answers_are_not_felt() {
    let f = Fixture::new().await;
    let v = f.open().await;
    for (i, reaction) in [Reaction::Close, Reaction::CloseAfter, Reaction::SilentAfter].into_iter().enumerate() {
        let tag = u8::try_from(i).expect("small") + 1;
        f.data.script(Opcode::Write, 1, reaction.clone());
        write(&v, 0, pattern(tag, 8192)).await;
        f.data.script(Opcode::Read, 1, reaction);
        assert_eq!(read(&v, 0, 8192).await, pattern(tag, 8192));
    }
    assert!(v.stats().unknown_outcomes >= 6);
    assert_eq!(v.stats().write.errors + v.stats().read.errors, 0);
}

#[tokio::test]
async fn every_temporary_status_is_retried() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    for status in [
        Status::NotReady,
        Status::DiskFailed,
        Status::UnknownCopyset,
        Status::Overloaded,
        Status::OldGeneration,
        Status::WrongTarget,
        Status::Version,
        Status::Unknown,
        Status::NotLeader,
        Status::StaleSeq,
    ] {
        f.data.script(Opcode::Write, 2, Reaction::Reply(status, Bytes::new()));
        write(&v, 0, pattern(2, 512)).await;
    }
}

#[tokio::test]
async fn a_chunkserver_that_moved_is_found_through_the_mds() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    for id in 1..=3 {
        f.data.listen(id).await;
    }
    // The old sockets still accept, but know nobody.
    f.data.script(Opcode::Write, 1, Reaction::Close);
    write(&v, 0, pattern(2, 512)).await;
    assert_eq!(read(&v, 0, 512).await, pattern(2, 512));
}

#[tokio::test]
async fn the_fence_is_raised_once_per_copyset_and_again_when_forgotten() {
    let f = Fixture::new().await;
    let v = f.open().await;
    let other = v.for_thread();
    let writes = (0..16u64).map(|i| {
        let v = if i % 2 == 0 { &v } else { &other };
        v.write(i * 4096, pattern(1, 4096))
    });
    within(futures_util::future::try_join_all(writes)).await.expect("all succeed");
    assert_eq!(f.data.arrived(Opcode::OpenLayer), 1);
    let log = f.data.log();
    let first = |wanted: Opcode| {
        log.iter().position(|s| matches!(s, Seen::Executed { opcode, .. } if *opcode == wanted)).expect("executed")
    };
    assert!(first(Opcode::OpenLayer) < first(Opcode::Write));
    f.data.forget_fences();
    write(&v, 0, pattern(2, 512)).await;
    assert_eq!(f.data.arrived(Opcode::OpenLayer), 2);
    assert_eq!(f.mds.calls("allocate_segment"), 1, "one question for all first writes");
}

#[tokio::test]
async fn zeroing_what_was_never_written_asks_nobody() {
    // The fake is slow at zeroing a quarter of a million pages, and no retry shall be counted here.
    let f = Fixture::with(|c| c.timing.attempt_timeout = std::time::Duration::from_secs(20)).await;
    let v = f.open().await;
    within(v.discard(0, 2 * GIB.min(v.info().size_bytes / 2))).await.expect("discards");
    within(v.write_zeroes(4096, 4096)).await.expect("writes zeroes");
    assert_eq!((f.mds.calls("allocate_segment"), f.data.arrived(Opcode::Zero)), (0, 0));
    write(&v, 0, pattern(1, 16384)).await;
    within(v.discard(0, v.info().size_bytes)).await.expect("discards");
    assert_eq!(read(&v, 0, 16384).await, vec![0; 16384]);
    let zeroed = |s: &&Seen| matches!(s, Seen::Executed { opcode: Opcode::Zero, .. });
    assert_eq!(f.data.log().iter().filter(zeroed).count(), 64, "the placed segment's chunks and no others");
}

#[tokio::test]
async fn a_reader_of_a_live_volume_sees_new_writes_and_new_segments() {
    let f = Fixture::new().await;
    let reader = f.open_as("vol", OpenMode::ReadOnly).await;
    assert_eq!(read(&reader, 0, 512).await, vec![0; 512]);
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    let mut seen = Vec::new();
    while seen != pattern(1, 512) {
        seen = read(&reader, 0, 512).await;
    }
    f.mds.commit_snapshot();
    f.mds.send_state();
    write(&v, 0, pattern(2, 512)).await;
    assert_eq!(read(&reader, 0, 512).await, pattern(2, 512));
    assert_eq!(reader.attach_info().epoch.0, 0);
}

#[tokio::test]
async fn snapshots_and_clones_are_read_through_their_ancestry() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(1, 8192)).await;
    let seq = f.mds.commit_snapshot();
    f.mds.send_state();
    // The MDS tells the client; until then the client writes with the old seq, so the copysets are sealed as well.
    f.data.seal(LAYER, seq);
    write(&v, 0, pattern(2, 4096)).await;
    let snapshot = f.open_as("vol@s1", OpenMode::ReadOnly).await;
    assert_eq!(read(&snapshot, 0, 8192).await, pattern(1, 8192));
    assert_eq!(read(&v, 0, 4096).await, pattern(2, 4096));

    // A clone of the snapshot: a layer with a parent and the same placement.
    f.mds.place(77, 0);
    {
        let mut inner = f.mds.inner();
        let mut clone = inner.volumes["vol"].clone();
        (clone.volume.id, clone.volume.layer, clone.client) = (12, 77, 0);
        clone.ancestry = vec![Ancestor { layer: LAYER, seq: 1 }];
        inner.volumes.insert("clone".into(), clone);
    }
    let clone = f.open_as("clone", OpenMode::ReadWrite { steal: false }).await;
    assert_eq!(read(&clone, 0, 8192).await, pattern(1, 8192));
    write(&clone, 512, pattern(3, 512)).await;
    let mut want = pattern(1, 8192).to_vec();
    want[512..1024].copy_from_slice(&pattern(3, 512));
    assert_eq!(read(&clone, 0, 8192).await, want);
    within(clone.discard(4096, 4096)).await.expect("discards");
    assert_eq!(read(&clone, 4096, 4096).await, vec![0; 4096], "zeros mask the parent");
    let reader = f.open_as("clone", OpenMode::ReadOnly).await;
    assert_eq!(read(&reader, 0, 4096).await, want[..4096], "a reader sends the ancestry itself");
    assert_eq!(read(&snapshot, 0, 8192).await, pattern(1, 8192));
}

#[tokio::test]
async fn io_goes_on_without_the_mds() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(1, 512)).await;
    f.mds.go_away();
    f.data.move_leaders();
    for chunk in 0..64u64 {
        write(&v, chunk << 24, pattern(2, 4096)).await;
    }
    let other = v.for_thread();
    assert_eq!(read(&other, 3 << 24, 4096).await, pattern(2, 4096));
    let waits = tokio::spawn({
        let v = v.clone();
        async move { v.write(GIB, pattern(3, 512)).await }
    });
    let asked = f.mds.calls("allocate_segment");
    eventually("a question for a new segment", || f.mds.calls("allocate_segment") > asked).await;
    assert!(!waits.is_finished());
    f.mds.come_back();
    within(waits).await.expect("no panic").expect("the write succeeds when the MDS is back");
    eventually("a new event stream", || f.mds.inner().subscriptions == 2).await;
}
