//! A write that was retried is never applied after a later write; detach; resize.

use crate::chunkserver::{Reaction, Seen};
use crate::mds::SIZE;
use crate::{Fixture, eventually, pattern, read, within, write};
use ogee_client::{BlockDevice, IoErrorKind};
use ogee_proto::data::{Opcode, Status};
use ogee_proto::mds::AttachState;
use ogee_proto::mds::attach_event::Event;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// The first attempt stalls on its connection, the retry goes over a new one with a newer generation to the same
/// leader in the same term; the stalled attempt must not come back.
#[tokio::test]
async fn a_stalled_attempt_is_dropped_by_the_next_generation() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(0, 4096)).await;
    f.data.script(Opcode::Write, 1, Reaction::Stall);
    write(&v, 0, pattern(1, 4096)).await;
    write(&v, 0, pattern(2, 4096)).await;
    f.data.release_stalls();
    assert_eq!(read(&v, 0, 4096).await, pattern(2, 4096));
    let log = f.data.log();
    let mut newest = std::collections::HashMap::new();
    for seen in &log {
        if let Seen::Hello { chunkserver, session, generation } = seen {
            let before = newest.insert((*chunkserver, *session), *generation).unwrap_or(0);
            assert!(*generation > before, "generations only grow");
        }
    }
    assert!(newest.values().any(|g| *g >= 2));
}

/// The answer of the first write is lost, so it is sent again; a write to the same place that was begun meanwhile must not land between
/// the two, where the repetition would undo it after it was acknowledged. One to another place does not wait.
#[tokio::test]
async fn a_write_waits_for_an_overlapping_one_that_is_being_repeated() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(0, 4096)).await;
    for round in 0..4 {
        f.data.script(Opcode::Write, 1, Reaction::CloseAfter);
        let before = f.data.arrived(Opcode::Write);
        let first = tokio::spawn({
            let v = v.clone();
            async move { v.write(0, pattern(1, 4096)).await }
        });
        eventually("the first attempt", || f.data.arrived(Opcode::Write) > before).await;
        let newest = pattern(10 + round, 4096);
        write(&v.for_thread(), 0, newest.clone()).await;
        within(first).await.expect("no panic").expect("repeated");
        assert_eq!(read(&v, 0, 4096).await, newest);
    }
}

/// The first attempt stalls at a leader that is deposed meanwhile; its term is over when it is executed. Here the
/// chunkserver does not look at generations, so that nothing but the term protects.
#[tokio::test]
async fn a_stalled_attempt_is_refused_for_its_term() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(0, 4096)).await;
    f.data.state().ignores_generations = true;
    f.data.script(Opcode::Write, 1, Reaction::Stall);
    let before = f.data.arrived(Opcode::Write);
    let stalled = tokio::spawn({
        let v = v.clone();
        async move { v.write(0, pattern(1, 4096)).await }
    });
    eventually("the attempt", || f.data.arrived(Opcode::Write) > before).await;
    f.data.move_leaders();
    within(stalled).await.expect("no panic").expect("the retry succeeds at the new leader");
    write(&v, 0, pattern(2, 4096)).await;
    // The old leader leads again, in another term.
    f.data.move_leaders();
    f.data.move_leaders();
    f.data.release_stalls();
    assert_eq!(read(&v, 0, 4096).await, pattern(2, 4096));
    let refused = |s: &&Seen| matches!(s, Seen::Executed { opcode: Opcode::Write, status: Status::NotLeader, .. });
    assert!(f.data.log().iter().filter(refused).count() >= 1);
}

/// Terms of the requests to one copyset never go back, whatever the hints.
#[tokio::test]
async fn terms_never_go_back() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(0, 512)).await;
    for round in 0..6u8 {
        f.data.move_leaders();
        let old = ogee_proto::data::Redirect { leader: 1, term: ogee_common::id::Term(2) }.encode();
        f.data.script(Opcode::Write, 1, Reaction::Reply(Status::NotLeader, old));
        write(&v, 0, pattern(round, 512)).await;
    }
    let mut newest = 0;
    for seen in f.data.log() {
        if let Seen::Arrived { opcode: Opcode::Write, term, .. } = seen {
            assert!(term >= newest);
            newest = term;
        }
    }
    assert!(newest > 10);
}

#[tokio::test]
async fn handles_have_their_own_sessions_and_share_the_data() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 4096)).await;
    let other = v.for_thread();
    // On a thread and runtime of its own, as a front end uses it.
    let seen = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let data = other.read(0, 4096).await.expect("reads").to_vec();
            other.write(4096, pattern(2, 4096)).await.expect("writes");
            data
        })
    });
    eventually("the other thread", || seen.is_finished()).await;
    assert_eq!(seen.join().expect("no panic"), pattern(1, 4096));
    assert_eq!(read(&v, 4096, 4096).await, pattern(2, 4096));
    let log = f.data.log();
    let sessions: std::collections::HashSet<u64> =
        log.iter().filter_map(|s| if let Seen::Hello { session, .. } = s { Some(*session) } else { None }).collect();
    assert_eq!(sessions.len(), 2);
}

#[tokio::test]
async fn detach_waits_for_io_in_flight_and_then_tells_the_mds() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(0, 4096)).await;
    let release = Arc::new(Notify::new());
    f.data.script(Opcode::Write, 1, Reaction::Wait(release.clone()));
    let before = f.data.arrived(Opcode::Write);
    let slow = tokio::spawn({
        let v = v.for_thread();
        async move { v.write(0, pattern(1, 4096)).await }
    });
    eventually("the write", || f.data.arrived(Opcode::Write) > before).await;
    let flush = tokio::spawn({
        let v = v.clone();
        async move { v.flush().await }
    });
    let detach = tokio::spawn({
        let v = v.clone();
        async move { v.detach().await }
    });
    // A write that is refused shows that the detach has begun.
    while within(v.write(0, pattern(2, 4096))).await.is_ok() {}
    assert!(!detach.is_finished() && !flush.is_finished());
    assert_eq!(f.mds.calls("detach_volume"), 0);
    release.notify_one();
    within(slow).await.expect("no panic").expect("what was in flight succeeds");
    within(flush).await.expect("no panic").expect("the flush succeeds");
    within(detach).await.expect("no panic").expect("detaches");
    let log = f.data.log();
    let detached = log.iter().position(|s| *s == Seen::Mark("detach")).expect("the MDS was told");
    let after = |s: &Seen| matches!(s, Seen::Arrived { .. } | Seen::Executed { .. });
    assert!(!log[detached..].iter().any(after), "nothing is sent after the detach");
    within(v.detach()).await.expect("a second detach is no error");
    assert_eq!(f.mds.inner().detaches, [false, false], "nothing was given up");
}

/// A write that was given up may still land after the detach: the MDS is told, so that it seals later snapshots.
#[tokio::test]
async fn a_detach_after_an_abandoned_write_says_so() {
    let f = Fixture::with(|c| c.io_timeout = Some(Duration::from_millis(100))).await;
    let v = f.open().await;
    write(&v, 0, pattern(0, 4096)).await;
    f.data.script(Opcode::Write, 1, Reaction::Stall);
    let error = within(v.write(0, pattern(1, 4096))).await.expect_err("no answer in time");
    assert_eq!(error.kind, IoErrorKind::TimedOut);
    within(v.detach()).await.expect("detaches");
    assert_eq!(f.mds.inner().detaches, [true]);
}

#[tokio::test]
async fn a_resize_is_noticed() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    let mut size = v.for_thread().resized();
    assert_eq!(*size.borrow_and_update(), SIZE);
    f.mds.send(Event::State(AttachState { seq: 1, size_bytes: SIZE + 4096, limits: None, complete: false }));
    within(size.changed()).await.expect("the volume is open");
    assert_eq!((*size.borrow_and_update(), v.info().size_bytes), (SIZE + 4096, SIZE + 4096));
    write(&v, SIZE, pattern(1, 4096)).await;
    f.mds.send(Event::State(AttachState { seq: 2, size_bytes: SIZE, limits: None, complete: false }));
    write(&v, 0, pattern(1, 4096)).await;
    assert_eq!(v.info().size_bytes, SIZE + 4096, "a volume never shrinks");
}
