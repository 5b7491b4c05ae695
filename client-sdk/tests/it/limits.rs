//! Limits and sector sizes of a volume, as the MDS says them. Rates are asserted from above only: how slow the machine is
//! makes no difference.

use crate::chunkserver::Seen;
use crate::{Fixture, eventually, pattern, read, within, write};
use ogee_client::{BlockDevice, IoError, IoErrorKind, LimitsPolicy, OpenError, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_proto::data::Opcode;
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::{Empty, RateLimit, VolumeLimits};
use std::time::Duration;
use tokio::task::JoinHandle;

fn writes(rate: u64) -> Option<VolumeLimits> {
    Some(VolumeLimits { write_iops: Some(RateLimit { rate, ..Default::default() }), ..Default::default() })
}

/// The volume has these limits from now on; clients are told with the next state.
fn limit(f: &Fixture, limits: Option<VolumeLimits>) {
    f.mds.inner().volumes.get_mut("vol").expect("the volume").volume.limits = limits;
}

/// So many writes, each to a page of its own, through two handles.
fn start(v: &Volume, count: u64) -> Vec<JoinHandle<Result<(), IoError>>> {
    let handles = [v.for_thread(), v.for_thread()];
    let one = |page: u64| {
        let v = handles[usize::from(page.is_multiple_of(2))].clone();
        tokio::spawn(async move { v.write(page * 4096, pattern(1, 4096)).await })
    };
    (0..count).map(one).collect()
}

async fn all_succeed(writes: Vec<JoinHandle<Result<(), IoError>>>) {
    for write in writes {
        within(write).await.expect("no panic").expect("the write succeeds");
    }
}

#[tokio::test]
async fn a_limit_holds_from_the_attach_on_and_is_lifted_live() {
    let f = Fixture::new().await;
    limit(&f, writes(10));
    let v = f.open_watched().await;
    let began = tokio::time::Instant::now();
    let started = start(&v, 400);
    eventually("four writes", || v.stats().write.ops >= 4).await;
    for _ in 0..20 {
        let (done, elapsed) = (v.stats().write.ops, began.elapsed());
        assert!(u128::from(done) <= elapsed.as_millis() / 100 + 2, "{done} writes in {elapsed:?} at 10 a second");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(read(&v, 800 * 4096, 4096).await, vec![0; 4096], "reads are not limited");
    // At the old rate the rest would take half a minute.
    limit(&f, None);
    f.mds.send_state();
    all_succeed(started).await;
    assert!(v.stats().throttled > 100, "{}", v.stats().throttled);
    limit(&f, writes(1));
    f.mds.send_state();
    let before = v.stats().throttled;
    eventually("a write that waits", || {
        drop(start(&v, 1));
        v.stats().inflight >= 3 || v.stats().throttled > before
    })
    .await;
    limit(&f, writes(100_000));
    f.mds.send_state();
    eventually("the end of all writes", || v.stats().inflight == 0).await;
}

/// What waits for limits has not begun: a hold is acknowledged at once, and none of it is sent with the old seq.
#[tokio::test]
async fn a_hold_and_a_flush_do_not_wait_for_throttled_writes() {
    let f = Fixture::new().await;
    limit(&f, writes(1));
    let v = f.open_watched().await;
    let started = start(&v, 100);
    eventually("the first write", || v.stats().write.ops >= 1).await;
    within(v.flush()).await.expect("a flush");
    f.mds.send(Event::Hold(5));
    eventually("the acknowledgement", || f.mds.inner().acks == [5]).await;
    assert!(v.stats().write.ops < 60, "most writes still wait: it would take them a minute");
    let seq = f.mds.commit_snapshot();
    limit(&f, None);
    f.mds.send_state();
    all_succeed(started).await;
    let log = f.data.log();
    let ack = log.iter().rposition(|s| *s == Seen::Mark("ack")).expect("the mark of the ack");
    let is_old = |s: &Seen| matches!(s, Seen::Arrived { opcode: Opcode::Write, seq: s, .. } if *s < seq);
    assert!(!log[ack..].iter().any(is_old), "no write with the old seq is sent after the acknowledgement");
}

/// Two writers to the same pages under limits: each sees what it wrote, while snapshots are taken and limits change.
#[tokio::test]
async fn writers_under_changing_limits_keep_their_order() {
    let f = Fixture::new().await;
    limit(&f, writes(10));
    let v = f.open_watched().await;
    let writer = |lane: u64| {
        let v = v.for_thread();
        tokio::spawn(async move {
            for round in 1..=40_u8 {
                // Two pages of the lane, overlapping the write before.
                v.write(lane * 16384 + u64::from(round % 2) * 4096, pattern(round, 8192)).await.expect("writes");
                let at = lane * 16384 + u64::from(round % 2) * 4096;
                assert_eq!(v.read(at, 8192).await.expect("reads").to_vec(), pattern(round, 8192));
            }
        })
    };
    let writers: Vec<_> = (0..4).map(writer).collect();
    for round in 1..=5_u64 {
        f.mds.send(Event::Hold(round));
        eventually("the acknowledgement", || f.mds.inner().acks.last() == Some(&round)).await;
        f.mds.commit_snapshot();
        limit(&f, writes(100 * round));
        f.mds.send_state();
    }
    for writer in writers {
        within(writer).await.expect("no panic");
    }
    assert!(v.stats().throttled > 0);
}

#[tokio::test]
async fn the_end_of_an_attach_ends_what_waits_for_limits() {
    for fenced in [false, true] {
        let f = Fixture::new().await;
        limit(&f, writes(1));
        let v = f.open_watched().await;
        let started = start(&v, 50);
        eventually("the first write", || v.stats().write.ops >= 1).await;
        if fenced {
            f.mds.send(Event::Detached(Empty {}));
        } else {
            within(v.detach()).await.expect("detach");
        }
        let mut kinds = vec![];
        for write in started {
            kinds.extend(within(write).await.expect("no panic").err().map(|e| e.kind));
        }
        let expected = if fenced { IoErrorKind::Fenced } else { IoErrorKind::Closed };
        assert!(kinds.len() > 20 && kinds.iter().all(|kind| *kind == expected), "{kinds:?}");
    }
}

#[tokio::test]
async fn the_io_timeout_does_not_count_the_wait_for_limits() {
    let f = Fixture::with(|c| c.io_timeout = Some(Duration::from_secs(3))).await;
    // Of 64 KiB a second 256 KiB are taken at once: a debt of 4 s.
    let slow = RateLimit { rate: 64 << 10, ..Default::default() };
    limit(&f, Some(VolumeLimits { bytes: Some(slow), ..Default::default() }));
    let v = f.open().await;
    let began = tokio::time::Instant::now();
    within(v.read(0, 256 << 10)).await.expect("reads");
    within(v.read(0, 4096)).await.expect("it waited longer than the IO timeout");
    assert!(began.elapsed() >= Duration::from_millis(3900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_client_that_copies_for_an_administrator_is_not_limited() {
    let f = Fixture::with(|c| c.limits = LimitsPolicy::Ignore).await;
    limit(&f, writes(1));
    let v = f.open_watched().await;
    all_succeed(start(&v, 200)).await;
    assert_eq!(v.stats().throttled, 0);
}

#[tokio::test]
async fn large_sectors_are_enforced_and_odd_ones_refused() {
    let f = Fixture::new().await;
    let sectors = |bytes| f.mds.inner().volumes.get_mut("vol").expect("the volume").volume.sector_bytes = bytes;
    sectors(4096);
    let v = f.open().await;
    assert_eq!((v.info().sector_bytes, v.attach_info().sector_bytes), (4096, 4096));
    write(&v, 4096, pattern(3, 8192)).await;
    assert_eq!(read(&v, 4096, 8192).await, pattern(3, 8192));
    for (offset, len) in [(512, 4096), (4096, 512), (4096, 4608)] {
        let bytes = usize::try_from(len).expect("small");
        assert_eq!(v.read(offset, len).await.expect_err("unaligned").kind, IoErrorKind::InvalidInput);
        assert_eq!(v.write(offset, pattern(1, bytes)).await.expect_err("unaligned").kind, IoErrorKind::InvalidInput);
        let len = u64::from(len);
        assert_eq!(v.discard(offset, len).await.expect_err("unaligned").kind, IoErrorKind::InvalidInput);
        assert_eq!(v.write_zeroes(offset, len).await.expect_err("unaligned").kind, IoErrorKind::InvalidInput);
    }
    assert_eq!(v.clone().with_serial("SN-1").for_thread().info().serial, "SN-1");
    assert_eq!(v.info().serial, "ogee000000000000000b");
    sectors(1024);
    let name = VolumeRef::parse("vol").expect("a name");
    let refused = Volume::open(&f.cluster, &name, OpenMode::ReadOnly).await;
    assert!(matches!(refused, Err(OpenError::BadGrant { field: "sector size", .. })));
}
