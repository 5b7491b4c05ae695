//! Tests of the log as a whole: sharing of flushes, recovery, refusal, reuse, poison, a full disk. The crash property
//! and the format have files of their own.

mod crash;
mod flips;
mod golden;

use super::*;
use ogee_disk::{DiskOp, Fault, FaultPlan, FaultRule, LogEngine};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

pub(super) const SEGMENT: u64 = 64 << 10;

pub(super) fn small() -> WalOptions {
    WalOptions { segment_bytes: SEGMENT, cache_bytes: 16 << 10, spare_segments: 1, engine: LogEngine::Auto }
}

pub(super) async fn open_with(path: &Path, options: WalOptions, plan: Option<Arc<FaultPlan>>) -> Result<Wal, WalError> {
    let dir = DataDir::open_with_faults(path, plan).expect("data directory");
    Wal::open(&dir, "wal", options).await
}

async fn open(path: &Path) -> Wal {
    open_with(path, small(), None).await.expect("open log")
}

fn temp() -> TempDir {
    tempfile::tempdir().expect("temp dir")
}

pub(super) fn entry(index: u64, term: u64, bytes: usize) -> LogEntry {
    let fill = u8::try_from((index * 7 + term) % 251).expect("below 251");
    LogEntry { index, term, kind: EntryKind::Command, payload: Bytes::from(vec![fill; bytes]) }
}

fn put(wal: &Wal, group: u64, entries: Vec<LogEntry>) -> Durable {
    let (done, durable) = completion();
    wal.append(group, entries, done).expect("append");
    durable
}

async fn put_durably(wal: &Wal, group: u64, entries: Vec<LogEntry>) {
    put(wal, group, entries).wait("append").await.expect("durable");
}

async fn all(wal: &Wal, group: u64) -> Vec<LogEntry> {
    wal.read(group, 0..u64::MAX, usize::MAX).await.expect("read")
}

fn segment_files(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(path.join("wal"))
        .expect("list")
        .map(|e| e.expect("entry").file_name().into_string().expect("name"))
        .filter(|n| n.starts_with("segment-"))
        .collect();
    names.sort();
    names
}

/// Polls a level; a test that waits for ever fails by this deadline.
async fn until(what: &str, mut level: impl FnMut() -> bool) {
    let deadline = ogee_common::clock::now() + Duration::from_secs(20);
    while !level() {
        assert!(ogee_common::clock::now() < deadline, "timed out waiting for: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn appends_of_many_groups_share_a_flush() {
    let temp = temp();
    let wal = open(temp.path()).await;
    put_durably(&wal, 1, vec![entry(0, 1, 100)]).await;
    let before = wal.stats().flushes;
    let waiting: Vec<Durable> = (10..42).map(|group| put(&wal, group, vec![entry(0, 1, 200)])).collect();
    for durable in waiting {
        durable.wait("append").await.expect("durable");
    }
    assert_eq!(wal.stats().flushes - before, 1, "what is queued in one turn is one flush");

    // Writers that each wait for their own append: while one flush is under way the others gather.
    let before = wal.stats();
    let tasks: Vec<_> = (10..42u64)
        .map(|group| {
            let wal = wal.clone();
            tokio::spawn(async move {
                for index in 1..=30 {
                    put_durably(&wal, group, vec![entry(index, 1, 200)]).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("writer");
    }
    let after = wal.stats();
    assert_eq!(after.entries - before.entries, 32 * 30);
    assert!(after.flushes - before.flushes <= 32 * 30 / 8, "{} flushes", after.flushes - before.flushes);
    wal.close().await.expect("close");
}

#[tokio::test]
async fn callbacks_come_in_order_and_mean_durable() {
    let temp = temp();
    let wal = open(temp.path()).await;
    let order = Arc::new(Mutex::new(vec![]));
    let last = {
        let note = |n: u32| -> Completion {
            let order = Arc::clone(&order);
            Box::new(move |r| {
                r.expect("durable");
                order.lock().expect("lock").push(n);
            })
        };
        wal.append(1, vec![entry(0, 1, 30_000)], note(0)).expect("append");
        wal.save_vote(1, SavedVote { term: 2, replica: 9, committed: true }, note(1)).expect("vote");
        wal.append(2, vec![entry(0, 1, 30_000), entry(1, 1, 30_000)], note(2)).expect("append");
        wal.append(1, vec![entry(1, 2, 10)], note(3)).expect("append");
        put(&wal, 3, vec![entry(0, 1, 10)])
    };
    assert_eq!(all(&wal, 2).await.len(), 2, "readable before it is durable");
    last.wait("append").await.expect("durable");
    assert_eq!(*order.lock().expect("lock"), vec![0, 1, 2, 3]);
}

#[tokio::test]
async fn a_closed_log_comes_back_whole() {
    for engine in [LogEngine::Auto, LogEngine::Blocking] {
        let temp = temp();
        let wal = open_with(temp.path(), WalOptions { engine, ..small() }, None).await.expect("open");
        let vote = SavedVote { term: 3, replica: 8, committed: false };
        for index in 0..20 {
            put(&wal, 5, vec![entry(index, 1, 9000)]);
        }
        wal.save_vote(5, vote, Box::new(drop)).expect("vote");
        wal.truncate_from(5, 15).expect("truncate");
        wal.purge(5, LogPoint { term: 1, index: 4 }).expect("purge");
        put(&wal, 5, vec![entry(15, 3, 10)]);
        wal.close().await.expect("close");
        let refused = wal.append(5, vec![entry(16, 3, 1)], Box::new(drop)).expect_err("closed");
        assert_eq!(refused.kind(), WalErrorKind::Closed);
        drop(wal);

        let wal = open_with(temp.path(), WalOptions { engine, ..small() }, None).await.expect("reopen");
        let view = wal.group(5);
        assert_eq!(view.vote, Some(vote));
        assert_eq!(view.purged, Some(LogPoint { term: 1, index: 4 }));
        assert_eq!(view.last, Some(LogPoint { term: 3, index: 15 }));
        let expect: Vec<LogEntry> = (5..15).map(|i| entry(i, 1, 9000)).chain([entry(15, 3, 10)]).collect();
        assert_eq!(all(&wal, 5).await, expect);
        assert_eq!(wal.groups(), vec![5]);
    }
}

#[tokio::test]
async fn a_file_system_without_direct_io_works_too() {
    let shm = Path::new("/dev/shm");
    let temp = if shm.is_dir() { tempfile::tempdir_in(shm).expect("temp dir") } else { temp() };
    let wal = open(temp.path()).await;
    put_durably(&wal, 1, vec![entry(0, 1, 5000)]).await;
    wal.close().await.expect("close");
    drop(wal);
    assert_eq!(all(&open(temp.path()).await, 1).await, vec![entry(0, 1, 5000)]);
}

#[tokio::test]
async fn segments_are_reused_and_old_content_stays_dead() {
    let temp = temp();
    let mut index = 0;
    for round in 0..4 {
        let wal = open(temp.path()).await;
        assert_eq!(all(&wal, 1).await, (index.max(3) - 3..index).map(|i| entry(i, 1, 5000)).collect::<Vec<_>>());
        for _ in 0..100 {
            put_durably(&wal, 1, vec![entry(index, 1, 5000)]).await;
            if index >= 3 {
                wal.purge(1, LogPoint { term: 1, index: index - 3 }).expect("purge");
            }
            index += 1;
        }
        let stats = wal.stats();
        assert!(stats.segments_reused >= 3, "round {round}: {stats:?}");
        assert!(stats.segments_created <= 6, "round {round}: {stats:?}");
        wal.close().await.expect("close");
        drop(wal);
        assert!(segment_files(temp.path()).len() <= 10, "{:?}", segment_files(temp.path()));
    }
}

#[tokio::test]
async fn a_group_that_purges_nothing_is_named() {
    let temp = temp();
    let wal = open(temp.path()).await;
    put_durably(&wal, 1, vec![entry(0, 1, 100)]).await;
    for index in 0..60 {
        put_durably(&wal, 2, vec![entry(index, 1, 5000)]).await;
        wal.purge(2, LogPoint { term: 1, index }).expect("purge");
    }
    let pressure = wal.pressure();
    assert_eq!(pressure.oldest_groups, vec![1]);
    assert!(pressure.segments >= 4 && pressure.bytes == pressure.segments as u64 * SEGMENT, "{pressure:?}");
    wal.purge(1, LogPoint { term: 1, index: 0 }).expect("purge");
    put_durably(&wal, 2, vec![entry(60, 1, 10)]).await;
    assert_eq!(wal.pressure().segments, 1, "the pinned segments are free");
    for index in 61..200 {
        // Each flush looks after the deletion of one more segment; what is appended is purged, so no new one is pinned.
        put_durably(&wal, 2, vec![entry(index, 1, 10)]).await;
        wal.purge(2, LogPoint { term: 1, index }).expect("purge");
    }
    wal.close().await.expect("close");
    let files = segment_files(temp.path());
    assert!(files.len() <= 4, "tail, next, spare and one being deleted: {files:?}");
}

#[tokio::test]
async fn what_was_replaced_while_it_was_queued_pins_nothing() {
    let temp = temp();
    let wal = open(temp.path()).await;
    for index in 0..40 {
        // All in one turn: the first two never become live, wherever they are written.
        put(&wal, 1, vec![entry(index, 1, 4000), entry(index + 1, 1, 4000)]);
        wal.truncate_from(1, index).expect("truncate");
        put_durably(&wal, 1, vec![entry(index, 2, 4000)]).await;
        assert_eq!(wal.read(1, index..index + 1, 1).await.expect("read"), vec![entry(index, 2, 4000)]);
    }
    assert_eq!(all(&wal, 1).await, (0..40).map(|i| entry(i, 2, 4000)).collect::<Vec<_>>());
    wal.purge(1, LogPoint { term: 2, index: 39 }).expect("purge");
    put_durably(&wal, 1, vec![entry(40, 2, 10)]).await;
    assert_eq!(wal.pressure().segments, 1);
}

#[tokio::test]
async fn cold_entries_are_read_from_files() {
    let temp = temp();
    let wal = open(temp.path()).await;
    let entries: Vec<LogEntry> = (0..50).map(|i| entry(i, 1, if i % 5 == 0 { 0 } else { 3000 })).collect();
    for e in &entries {
        put_durably(&wal, 1, vec![e.clone()]).await;
        put_durably(&wal, 2, vec![e.clone()]).await;
    }
    assert!(wal.pressure().cached_bytes <= 16 << 10);
    assert_eq!(all(&wal, 1).await, entries);
    assert_eq!(wal.read(2, 10..20, usize::MAX).await.expect("read"), entries[10..20]);
    let limited = wal.read(1, 0..50, 7000).await.expect("read");
    assert_eq!(limited, entries[..3], "0 + 3000 + 3000 bytes");
    assert_eq!(wal.read(1, 1..50, 1).await.expect("read"), entries[1..2], "at least one");
    assert!(wal.read(1, 50..60, 1).await.expect("read").is_empty());

    let oldest = temp.path().join("wal").join(&segment_files(temp.path())[0]);
    let mut bytes = std::fs::read(&oldest).expect("read file");
    let at = bytes.windows(64).position(|w| w == [entry(1, 1, 1).payload[0]; 64]).expect("payload on disk");
    bytes[at + 5] ^= 1;
    std::fs::write(&oldest, bytes).expect("damage");
    assert_eq!(wal.read(1, 1..2, usize::MAX).await.expect_err("damaged").kind(), WalErrorKind::Corrupt);
}

#[tokio::test]
async fn big_entries_fit_and_bigger_ones_are_refused() {
    let temp = temp();
    let options = WalOptions { segment_bytes: 10 << 20, cache_bytes: 0, ..WalOptions::default() };
    let wal = open_with(temp.path(), options.clone(), None).await.expect("open");
    let max = wal.entry_bytes_max();
    assert_eq!(max, WAL_ENTRY_BYTES_MAX);
    let refused = wal.append(1, vec![entry(0, 1, max + 1)], Box::new(drop)).expect_err("too big");
    assert_eq!(refused.kind(), WalErrorKind::TooBig);
    let sizes = [max, 1_100_000, 1_100_000, max, 1, 3_000_000, max, 1_100_000];
    let entries: Vec<LogEntry> = (0..).zip(sizes).map(|(i, n)| entry(i, 1, n)).collect();
    put_durably(&wal, 1, entries.clone()).await;
    assert_eq!(all(&wal, 1).await, entries);
    wal.close().await.expect("close");
    drop(wal);
    let wal = open_with(temp.path(), options, None).await.expect("reopen");
    assert_eq!(all(&wal, 1).await, entries);
}

#[tokio::test]
async fn holes_are_refused() {
    let temp = temp();
    let wal = open(temp.path()).await;
    put_durably(&wal, 1, vec![entry(0, 1, 10)]).await;
    for wrong in [vec![entry(2, 1, 10)], vec![entry(0, 1, 10)], vec![entry(1, 1, 10), entry(3, 1, 10)]] {
        let refused = wal.append(1, wrong, Box::new(drop)).expect_err("hole");
        assert_eq!(refused.kind(), WalErrorKind::Gap);
    }
    assert_eq!(all(&wal, 1).await.len(), 1);
}

#[tokio::test]
async fn a_removed_group_is_gone_and_may_start_anew() {
    let temp = temp();
    let wal = open(temp.path()).await;
    put_durably(&wal, 1, vec![entry(0, 1, 10), entry(1, 1, 10)]).await;
    wal.save_vote(1, SavedVote { term: 1, replica: 1, committed: true }, Box::new(drop)).expect("vote");
    put(&wal, 1, vec![entry(2, 1, 10)]);
    wal.remove_group(1).await.expect("remove");
    assert!(wal.groups().is_empty() && wal.group(1) == GroupView::default());
    put_durably(&wal, 2, vec![entry(0, 5, 10)]).await;
    wal.close().await.expect("close");
    drop(wal);
    let wal = open(temp.path()).await;
    assert_eq!(wal.groups(), vec![2]);
    put_durably(&wal, 1, vec![entry(7, 9, 10)]).await;
    assert_eq!(all(&wal, 1).await, vec![entry(7, 9, 10)]);
}

#[tokio::test]
async fn the_segment_size_may_change_between_runs() {
    let temp = temp();
    let mut index = 0;
    for kib in [64u64, 128, 64, 256, 64] {
        let options = WalOptions { segment_bytes: kib << 10, ..small() };
        let wal = open_with(temp.path(), options, None).await.expect("open");
        assert_eq!(wal.group(1).last.map(|l| l.index), u64::checked_sub(index, 1));
        for _ in 0..40 {
            put_durably(&wal, 1, vec![entry(index, 1, 30_000)]).await;
            wal.purge(1, LogPoint { term: 1, index: index.saturating_sub(2) }).expect("purge");
            index += 1;
        }
        assert_eq!(all(&wal, 1).await, vec![entry(index - 2, 1, 30_000), entry(index - 1, 1, 30_000)]);
        wal.close().await.expect("close");
    }
}

fn rule(op: DiskOp, path: &str, fault: Fault) -> FaultRule {
    FaultRule { op, path_contains: path.into(), skip: 0, times: u64::MAX, fault }
}

#[tokio::test]
async fn a_failed_write_or_flush_ends_the_log_for_good() {
    let faults = [
        rule(DiskOp::Write, "segment-", Fault::Errno(5)),
        rule(DiskOp::Sync, "segment-", Fault::Errno(5)),
        rule(DiskOp::Write, "segment-", Fault::Torn { bytes: 512 }),
    ];
    for fault in faults {
        let temp = temp();
        let plan = FaultPlan::new();
        let wal = open_with(temp.path(), small(), Some(plan.clone())).await.expect("open");
        put_durably(&wal, 1, vec![entry(0, 1, 10)]).await;
        plan.add(fault);
        // Larger than what the torn write stores: else the batch would be whole, and rightly come back.
        let first = put(&wal, 1, vec![entry(1, 1, 1000)]);
        let second = put(&wal, 2, vec![entry(0, 1, 10)]);
        assert_eq!(first.wait("append").await.expect_err("failed").kind(), WalErrorKind::Io);
        assert_eq!(second.wait("append").await.expect_err("failed").kind(), WalErrorKind::Io);
        plan.clear();
        let later = wal.append(1, vec![entry(2, 1, 10)], Box::new(drop)).expect_err("poisoned");
        assert_eq!(later.kind(), WalErrorKind::Poisoned);
        assert_eq!(wal.purge(1, LogPoint { term: 1, index: 0 }).expect_err("poisoned").kind(), WalErrorKind::Poisoned);
        assert_eq!(wal.queue_room().await.expect_err("poisoned").kind(), WalErrorKind::Poisoned);
        assert_eq!(wal.admit(1).expect_err("poisoned").kind(), WalErrorKind::Poisoned);
        assert!(wal.ended().borrow().as_ref().is_some_and(|e| e.kind() == WalErrorKind::Io));
        assert_eq!(wal.close().await.expect_err("failed").kind(), WalErrorKind::Io);
        drop(wal);
        let wal = open(temp.path()).await;
        assert_eq!(all(&wal, 1).await, vec![entry(0, 1, 10)]);
        assert!(all(&wal, 2).await.is_empty());
    }
}

#[tokio::test]
async fn a_full_disk_refuses_before_the_log_is_full_and_resumes() {
    let temp = temp();
    let plan = FaultPlan::new();
    let wal = open_with(temp.path(), small(), Some(plan.clone())).await.expect("open");
    plan.add(rule(DiskOp::Create, "creating", Fault::Errno(28)));
    let mut index = 0;
    while wal.admit(4000).is_ok() {
        assert!(index < 100, "the log grows without space");
        put_durably(&wal, 1, vec![entry(index, 1, 4000)]).await;
        index += 1;
    }
    assert_eq!(wal.admit(4000).expect_err("full").kind(), WalErrorKind::NoSpace);
    let pressure = wal.pressure();
    assert!(pressure.no_space && pressure.room_bytes >= SEGMENT / 8, "{pressure:?}");
    // A vote and a purge still go through.
    let (done, durable) = completion();
    wal.save_vote(1, SavedVote { term: 2, replica: 1, committed: false }, done).expect("vote");
    durable.wait("vote").await.expect("durable");
    // What is appended all the same waits and fails nothing.
    let mut waiting = vec![];
    for _ in 0..10 {
        waiting.push(put(&wal, 1, vec![entry(index, 2, 4000)]));
        index += 1;
    }
    until("the log stalls", || wal.pressure().room_bytes < 4096 + 4000).await;
    assert!(wal.ended().borrow().is_none());
    plan.clear();
    for durable in waiting {
        durable.wait("append").await.expect("durable after space returned");
    }
    until("the log sees the space", || wal.admit(4000).is_ok()).await;
    assert_eq!(all(&wal, 1).await.len() as u64, index);
}

#[tokio::test]
async fn a_full_disk_at_the_start_is_said() {
    let temp = temp();
    let plan = FaultPlan::new();
    plan.add(rule(DiskOp::Create, "creating", Fault::Errno(28)));
    let e = open_with(temp.path(), small(), Some(plan.clone())).await.expect_err("full");
    assert_eq!(e.kind(), WalErrorKind::NoSpace);
    plan.clear();
    open(temp.path()).await;
}

/// Three segments with entries of group 1; returns how many entries there are.
async fn three_segments(path: &Path) -> u64 {
    let wal = open(path).await;
    let mut index = 0;
    while wal.pressure().segments < 3 || wal.pressure().room_bytes > SEGMENT / 2 {
        put_durably(&wal, 1, vec![entry(index, 1, 3000)]).await;
        index += 1;
    }
    wal.close().await.expect("close");
    index
}

fn damage(path: &Path, segment: usize, offset: usize) {
    let file = path.join("wal").join(&segment_files(path)[segment]);
    let mut bytes = std::fs::read(&file).expect("read file");
    bytes[offset] ^= 0x10;
    std::fs::write(&file, bytes).expect("damage");
}

#[tokio::test]
async fn damage_in_front_of_the_tail_is_refused() {
    for (segment, offset) in [(0, 0), (0, 4096 + 60), (1, 8192 + 100), (1, 0), (2, 0), (2, 4096 + 10)] {
        let temp = temp();
        three_segments(temp.path()).await;
        damage(temp.path(), segment, offset);
        let e = open_with(temp.path(), small(), None).await.expect_err("damaged");
        assert_eq!(e.kind(), WalErrorKind::Corrupt, "segment {segment} offset {offset}: {e}");
    }
}

#[tokio::test]
async fn missing_files_are_refused() {
    for name in ["identity", "first", "middle", "all"] {
        let temp = temp();
        three_segments(temp.path()).await;
        let files = segment_files(temp.path());
        let remove: Vec<&str> = match name {
            "identity" => vec!["identity"],
            "first" => vec![&files[0]],
            "middle" => vec![&files[1]],
            _ => files.iter().map(String::as_str).collect(),
        };
        for file in remove {
            std::fs::remove_file(temp.path().join("wal").join(file)).expect("remove");
        }
        let opened = open_with(temp.path(), small(), None).await;
        assert_eq!(opened.expect_err("incomplete").kind(), WalErrorKind::Corrupt, "{name}");
    }
}

#[tokio::test]
async fn a_torn_tail_is_cut_and_stays_cut() {
    let temp = temp();
    let count = three_segments(temp.path()).await;
    // The last batch with records of the last written segment: found by walking the batches. Its process did not come to write the mark.
    let files = segment_files(temp.path());
    let identity = std::fs::read(temp.path().join("wal/identity")).expect("identity");
    let log = u64::from_le_bytes(identity[8..16].try_into().expect("eight bytes"));
    let bytes = std::fs::read(temp.path().join("wal").join(&files[2])).expect("read file");
    let (mut at, mut last) = (0, 0);
    while let Ok(batch) = format::decode_batch(&bytes[at..], log, 3) {
        if batch.records.is_empty() {
            damage(temp.path(), 2, at);
        } else {
            last = at;
        }
        at += batch.bytes;
    }
    damage(temp.path(), 2, last + 200);
    for _ in 0..3 {
        let wal = open(temp.path()).await;
        assert_eq!(wal.group(1).last, Some(LogPoint { term: 1, index: count - 2 }), "one entry was torn off");
        wal.close().await.expect("close");
    }
    let wal = open(temp.path()).await;
    put_durably(&wal, 1, vec![entry(count - 1, 2, 50)]).await;
    wal.close().await.expect("close");
    drop(wal);
    // The torn batch becomes whole again, as if the device had held it back: it must not come to life.
    damage(temp.path(), 2, last + 200);
    let wal = open(temp.path()).await;
    assert_eq!(wal.group(1).last, Some(LogPoint { term: 2, index: count - 1 }));
    assert_eq!(all(&wal, 1).await.last(), Some(&entry(count - 1, 2, 50)));
}

#[tokio::test]
async fn a_log_of_a_newer_version_is_refused() {
    let temp = temp();
    three_segments(temp.path()).await;
    let file = temp.path().join("wal").join(&segment_files(temp.path())[0]);
    let mut bytes = std::fs::read(&file).expect("read file");
    bytes[4] = 2;
    std::fs::write(&file, bytes).expect("change version");
    let e = open_with(temp.path(), small(), None).await.expect_err("newer");
    assert_eq!(e.kind(), WalErrorKind::Unsupported);
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_log() {
    let temp = temp();
    let wal = open(temp.path()).await;
    let mut ended = wal.ended();
    let durable = put(&wal, 1, vec![entry(0, 1, 10)]);
    drop(wal);
    durable.wait("append").await.expect("what was queued is written");
    ended.wait_for(Option::is_some).await.expect("the writer ends");
}
