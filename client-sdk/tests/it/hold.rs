//! Exact snapshots: the hold protocol seen from the MDS and the chunkservers.

use crate::chunkserver::{Reaction, Seen};
use crate::mds::LAYER;
use crate::{Fixture, eventually, pattern, read, within, write};
use ogee_client::{BlockDevice, IoErrorKind, Volume};
use ogee_proto::MdsErrorKind;
use ogee_proto::data::{Opcode, Status};
use ogee_proto::mds::attach_event::Event;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Writes without end through a handle of its own; the task returns how many writes succeeded when `stop` comes.
fn writer(volume: &Volume, lane: u64, stop: Arc<std::sync::atomic::AtomicBool>) -> JoinHandle<u64> {
    let v = volume.for_thread();
    tokio::spawn(async move {
        let mut count = 0;
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            v.write(lane * 4096, pattern(u8::try_from(count % 256).expect("small"), 4096)).await.expect("writes");
            count += 1;
        }
        count
    })
}

fn old_seq_writes(log: &[Seen], seq: u64) -> Vec<&Seen> {
    let is_old = |s: &&Seen| match s {
        Seen::Arrived { opcode: Opcode::Write | Opcode::Zero, seq: s, .. } => *s < seq,
        Seen::Executed { opcode: Opcode::Write | Opcode::Zero, seq: s, .. } => *s < seq,
        _ => false,
    };
    log.iter().filter(is_old).collect()
}

#[tokio::test]
async fn no_write_with_the_old_seq_is_sent_after_the_acknowledgement() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(0, 4096)).await;
    let stop = Arc::default();
    let writers: Vec<_> = (0..8).map(|lane| writer(&v, lane, Arc::clone(&stop))).collect();
    for round in 1..=10u64 {
        let before = f.data.arrived(Opcode::Write);
        eventually("some writes", || f.data.arrived(Opcode::Write) > before + 20).await;
        f.mds.send(Event::Hold(round));
        eventually("the acknowledgement", || f.mds.inner().acks.last() == Some(&round)).await;
        let at_ack = f.data.log().len();
        let seq = f.mds.commit_snapshot();
        // Writers have every chance to misbehave here.
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(f.data.log().len(), at_ack, "nothing is sent while the hold is acknowledged");
        f.mds.send_state();
        let new = |s: &Seen| matches!(s, Seen::Executed { opcode: Opcode::Write, seq: s, .. } if *s == seq);
        eventually("writes with the new seq", || f.data.log()[at_ack..].iter().any(new)).await;
        let log = f.data.log();
        assert_eq!(old_seq_writes(&log[at_ack..], seq), Vec::<&Seen>::new());
        let ack = log.iter().rposition(|s| *s == Seen::Mark("ack")).expect("the mark of the ack");
        assert_eq!(old_seq_writes(&log[ack..], seq), Vec::<&Seen>::new());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for w in writers {
        assert!(within(w).await.expect("no panic") > 0);
    }
    assert_eq!(v.stats().holds, 10);
}

#[tokio::test]
async fn a_hold_waits_for_the_write_in_flight_and_reads_go_on() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(0, 4096)).await;
    let release = Arc::new(Notify::new());
    f.data.script(Opcode::Write, 1, Reaction::Wait(release.clone()));
    let before = f.data.arrived(Opcode::Write);
    let slow = tokio::spawn({
        let v = v.clone();
        async move { v.write(0, pattern(1, 4096)).await }
    });
    eventually("the write", || f.data.arrived(Opcode::Write) > before).await;
    f.mds.send(Event::Hold(5));
    eventually("the hold", || v.stats().holds == 1).await;
    assert_eq!(read(&v, 0, 4096).await, pattern(0, 4096));
    assert_eq!(f.mds.calls("ack_hold"), 0);
    release.notify_one();
    within(slow).await.expect("no panic").expect("the write succeeds");
    eventually("the acknowledgement", || f.mds.inner().acks == [5]).await;
    f.mds.send_state();
    write(&v, 0, pattern(2, 4096)).await;
}

/// The MDS bypassed a client that did not drain; it lets go by itself and learns the new seq from the copysets.
#[tokio::test]
async fn an_unacknowledged_hold_ends_by_itself_and_the_stale_seq_is_refreshed() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(0, 4096)).await;
    f.data.script(Opcode::Write, 1, Reaction::Stall);
    let stuck = tokio::spawn({
        let v = v.for_thread();
        async move { v.write(8192, pattern(1, 4096)).await }
    });
    let before = f.data.arrived(Opcode::Write);
    eventually("the stuck write", || f.data.arrived(Opcode::Write) > before).await;
    f.data.state().copysets.values_mut().for_each(|c| c.leader = 0);
    f.mds.send(Event::Hold(5));
    eventually("the hold", || v.stats().holds == 1).await;
    let held = tokio::spawn({
        let v = v.clone();
        async move { v.write(0, pattern(2, 4096)).await }
    });
    let seq = f.mds.commit_snapshot();
    f.data.seal(LAYER, seq);
    tokio::time::sleep(crate::timing().hold_release_after * 2).await;
    assert_eq!(f.mds.calls("ack_hold"), 0);
    f.data.state().copysets.values_mut().for_each(|c| (c.leader, c.term) = (1, c.term + 1));
    within(held).await.expect("no panic").expect("the held write succeeds");
    within(stuck).await.expect("no panic").expect("the stuck write succeeds");
    let log = f.data.log();
    let stale = |s: &&Seen| matches!(s, Seen::Executed { status: Status::StaleSeq, .. });
    assert!(log.iter().filter(stale).count() >= 1);
    let ok_old = |s: &Seen| matches!(s, Seen::Executed { opcode: Opcode::Write, status: Status::Ok, seq: s, .. } if *s < seq);
    assert_eq!(log.iter().filter(|s| ok_old(s)).count(), 1, "only the first write of all got the old seq");
    assert_eq!(f.mds.inner().subscriptions, 1, "the seq came with the refusal");
}

/// The MDS went round this client while a write was on its way to a copyset that is not sealed yet. What the client sees of that copyset after
/// a write with the new seq elsewhere is the last word on what belongs to the snapshot (torture, seed 5006).
#[tokio::test]
async fn an_old_write_does_not_land_in_the_snapshot_after_it_was_seen_to_be_missing() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    let (here, there) = (0, u64::from(ogee_common::limits::CHUNK_BYTES));
    for at in [here, there] {
        write(&v, at, pattern(0, 4096)).await;
    }
    let (release, before) = (Arc::new(Notify::new()), f.data.arrived(Opcode::Write));
    f.data.script(Opcode::Write, 1, Reaction::Wait(release.clone()));
    let slow = tokio::spawn({
        let v = v.for_thread();
        async move { v.write(there, pattern(1, 4096)).await }
    });
    eventually("the slow write", || f.data.arrived(Opcode::Write) > before).await;
    let seq = f.mds.commit_snapshot();
    f.mds.send_state();
    let new = |s: &Seen| matches!(s, Seen::Executed { opcode: Opcode::Write, seq: s, .. } if *s == seq);
    let began = ogee_common::clock::now();
    while !f.data.log().iter().any(new) {
        assert!(began.elapsed() < Duration::from_secs(10), "the client does not hear of the new seq");
        write(&v, here, pattern(2, 4096)).await;
    }
    assert_eq!(read(&v, there, 4096).await, pattern(0, 4096), "the slow write is not there yet");
    let seen = f.data.log().len();
    release.notify_one();
    within(slow).await.expect("no panic").expect("it succeeds in the end");
    let log = f.data.log();
    let old = |s: &&Seen| matches!(s, Seen::Executed { opcode: Opcode::Write, status: Status::Ok, seq: s, .. } if *s < seq);
    assert_eq!(log[seen..].iter().find(old), None, "it came too late for the snapshot");
    assert_eq!(read(&v, there, 4096).await, pattern(1, 4096));
}

/// Once acknowledged, a hold is not let go by time: the snapshot may be committed at any moment.
#[tokio::test]
async fn an_acknowledged_hold_waits_for_the_mds() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(0, 4096)).await;
    f.mds.send(Event::Hold(5));
    eventually("the acknowledgement", || f.mds.inner().acks == [5]).await;
    f.mds.go_away();
    let held = tokio::spawn({
        let v = v.clone();
        async move { v.write(0, pattern(2, 4096)).await }
    });
    tokio::time::sleep(crate::timing().hold_release_after * 3).await;
    assert!(!held.is_finished());
    assert_eq!(read(&v, 0, 4096).await, pattern(0, 4096));
    let seq = f.mds.commit_snapshot();
    f.mds.come_back();
    within(held).await.expect("no panic").expect("the held write succeeds");
    let log = f.data.log();
    let ack = log.iter().position(|s| *s == Seen::Mark("ack")).expect("acknowledged");
    assert_eq!(old_seq_writes(&log[ack..], seq), Vec::<&Seen>::new());
}

/// The state did not come although the stream is open: the client asks for it.
#[tokio::test]
async fn an_acknowledged_hold_asks_for_the_state() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    f.mds.send(Event::Hold(5));
    eventually("the acknowledgement", || f.mds.inner().acks == [5]).await;
    let seq = f.mds.commit_snapshot();
    write(&v, 0, pattern(1, 4096)).await;
    let asked = f.mds.inner().subscriptions;
    assert!(asked >= 2, "{asked}: a busy machine may ask more often");
    assert_eq!(old_seq_writes(&f.data.log(), seq), Vec::<&Seen>::new());
}

#[tokio::test]
async fn a_refused_acknowledgement_lets_go() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    f.mds.inner().fail.insert("ack_hold", MdsErrorKind::InvalidArgument);
    f.mds.send(Event::Hold(5));
    eventually("the acknowledgement", || f.mds.calls("ack_hold") == 1).await;
    write(&v, 0, pattern(1, 4096)).await;
    assert_eq!(f.mds.inner().subscriptions, 1);
}

/// A write whose outcome will never be known forbids the acknowledgement until the seq has moved on: given up in the
/// middle of an attempt, or between attempts.
#[tokio::test]
async fn an_abandoned_write_is_not_acknowledged_away() {
    for io_timeout_ms in [100, 600] {
        abandoned_write(Duration::from_millis(io_timeout_ms)).await;
    }
}

async fn abandoned_write(io_timeout: Duration) {
    let f = Fixture::with(|c| c.io_timeout = Some(io_timeout)).await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(0, 4096)).await;
    f.data.script(Opcode::Write, 1, Reaction::Stall);
    let before = f.data.arrived(Opcode::Write);
    let write = v.write(0, pattern(1, 4096));
    let depose = async {
        eventually("the attempt", || f.data.arrived(Opcode::Write) > before).await;
        f.data.depose_leaders();
    };
    let (result, ()) = within(async { tokio::join!(write, depose) }).await;
    assert_eq!(result.expect_err("it times out").kind, IoErrorKind::TimedOut);
    f.mds.send(Event::Hold(5));
    eventually("the hold", || v.stats().holds == 1).await;
    tokio::time::sleep(crate::timing().hold_release_after * 2).await;
    assert_eq!(f.mds.calls("ack_hold"), 0);
    f.mds.commit_snapshot();
    f.mds.send_state();
    f.mds.send(Event::Hold(6));
    eventually("the acknowledgement", || f.mds.inner().acks == [6]).await;
}
