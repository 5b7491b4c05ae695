//! Any single byte of a log that fell idle, or was closed, may flip while nobody holds it: what is read afterwards is what was written,
//! or the log is refused. Nothing that was acknowledged is taken for a torn tail.

use super::{all, entry, open, open_with, put_durably, segment_files, small, temp};
use crate::wal::{GroupView, LogEntry, LogPoint, SavedVote, Wal, WalErrorKind, completion};
use ogee_disk::ALIGN;
use std::path::Path;
use tempfile::TempDir;

type Content = Vec<(u64, GroupView, Vec<LogEntry>)>;

async fn content(wal: &Wal) -> Content {
    let mut out = vec![];
    for group in wal.groups() {
        out.push((group, wal.group(group), all(wal, group).await));
    }
    out
}

/// More than one segment: entries of three groups, votes, a purge.
async fn fill(wal: &Wal) -> Content {
    for round in 0..12u64 {
        for group in 1..4 {
            let from = wal.group(group).last.map_or(1, |p| p.index + 1);
            put_durably(wal, group, vec![entry(from, 1 + round, 700), entry(from + 1, 1 + round, 2500)]).await;
        }
        let (done, durable) = completion();
        wal.save_vote(1, SavedVote { term: round + 1, replica: 3, committed: true }, done).expect("vote");
        durable.wait("vote").await.expect("durable");
    }
    wal.purge(2, LogPoint { term: 3, index: 6 }).expect("purge");
    put_durably(wal, 2, vec![entry(25, 12, 10)]).await;
    content(wal).await
}

/// The log's files as they are now: what a killed process leaves.
fn copy(from: &Path) -> TempDir {
    let to = temp();
    std::fs::create_dir(to.path().join("wal")).expect("create");
    for name in std::fs::read_dir(from.join("wal")).expect("list").map(|e| e.expect("entry").file_name()) {
        std::fs::copy(from.join("wal").join(&name), to.path().join("wal").join(&name)).expect("copy");
    }
    to
}

fn used_bytes(path: &Path) -> usize {
    std::fs::read(path).expect("read").iter().rposition(|b| *b != 0).map_or(0, |i| i + 1)
}

/// Flips one bit of one byte in a copy; whether the log was refused.
async fn is_refused(log: &Path, name: &str, at: usize, expected: &Content) -> bool {
    let copy = copy(log);
    let path = copy.path().join("wal").join(name);
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[at] ^= 1 << (at % 8);
    std::fs::write(&path, &bytes).expect("write");
    match open_with(copy.path(), small(), None).await {
        Ok(wal) => {
            assert_eq!(&content(&wal).await, expected, "{name} byte {at}");
            wal.close().await.expect("close");
            false
        }
        Err(e) => {
            assert!(matches!(e.kind(), WalErrorKind::Corrupt | WalErrorKind::Unsupported), "{e}");
            true
        }
    }
}

/// Flips bytes of all segments, most of them at the end. Counts (refused, without meaning).
async fn flip(log: &Path, expected: &Content) -> (u32, u32) {
    let names: Vec<String> = segment_files(log).into_iter().filter(|n| used_bytes(&log.join("wal").join(n)) > 0).collect();
    let (last, before) = names.split_last().expect("segments");
    assert!(!before.is_empty(), "more than one segment: {names:?}");
    let mut places: Vec<(&String, usize)> = vec![];
    for name in before {
        places.extend((0..used_bytes(&log.join("wal").join(name))).step_by(509).map(|at| (name, at)));
    }
    // Headers of batches and records begin on pages; the rest by samples.
    let used = used_bytes(&log.join("wal").join(last));
    places.extend((0..used).filter(|at| at % ALIGN < 112 || at % 61 == 0).map(|at| (last, at)));
    let (mut refused, mut dead) = (0, 0);
    for (name, at) in places {
        *(if is_refused(log, name, at, expected).await { &mut refused } else { &mut dead }) += 1;
    }
    (refused, dead)
}

#[tokio::test]
async fn a_flipped_byte_of_a_closed_log_is_refused_or_means_nothing() {
    let tmp = temp();
    let wal = open(tmp.path()).await;
    let expected = fill(&wal).await;
    wal.close().await.expect("close");
    let (refused, dead) = flip(tmp.path(), &expected).await;
    assert!(refused > 300, "{refused} flips were refused, {dead} meant nothing");
}

#[tokio::test]
async fn a_flipped_byte_of_an_idle_log_whose_process_is_killed_is_refused_or_means_nothing() {
    let tmp = temp();
    let wal = open(tmp.path()).await;
    let expected = fill(&wal).await;
    let marks = wal.stats().marks;
    super::until("the mark", || wal.stats().marks > marks).await;
    let killed = copy(tmp.path());
    let (refused, dead) = flip(killed.path(), &expected).await;
    assert!(refused > 300, "{refused} flips were refused, {dead} meant nothing");
    wal.close().await.expect("close");
}

#[tokio::test]
async fn an_opened_log_marks_what_it_found() {
    let tmp = temp();
    let wal = open(tmp.path()).await;
    let expected = fill(&wal).await;
    let killed = copy(tmp.path());
    wal.close().await.expect("close");
    let found = segment_files(killed.path());
    let last = found.iter().rfind(|n| used_bytes(&killed.path().join("wal").join(n)) > 0).expect("a segment");
    // Killed at once: its last batch is whatever a crash may have torn.
    let page = (used_bytes(&killed.path().join("wal").join(last)) - 1) / ALIGN * ALIGN;
    assert!(!is_refused_with(killed.path(), last, page).await, "this is a torn tail");
    // Opened once and left idle, then killed again.
    let wal = open(killed.path()).await;
    let flushes = wal.stats().flushes;
    super::until("the head of a new segment", || wal.stats().flushes > flushes).await;
    let again = copy(killed.path());
    assert!(is_refused(again.path(), last, page, &expected).await, "this was acknowledged");
    wal.close().await.expect("close");
}

/// As [`is_refused`], where the content may differ.
async fn is_refused_with(log: &Path, name: &str, at: usize) -> bool {
    let copy = copy(log);
    let path = copy.path().join("wal").join(name);
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).expect("write");
    open_with(copy.path(), small(), None).await.is_err()
}

#[tokio::test]
async fn an_idle_log_marks_its_end_once_and_goes_on_over_the_mark() {
    let tmp = temp();
    let wal = open(tmp.path()).await;
    for index in 1..=3 {
        put_durably(&wal, 1, vec![entry(index, 1, 100)]).await;
        super::until("the mark", || wal.stats().marks == index).await;
        tokio::time::sleep(ogee_common::limits::WAL_MARK_AFTER * 2).await;
        assert_eq!((wal.stats().marks, wal.stats().flushes), (index, index), "one mark is enough");
    }
    let killed = copy(tmp.path());
    assert_eq!(all(&open(killed.path()).await, 1).await.len(), 3);
    wal.close().await.expect("close");
    drop(wal);
    let wal = open(tmp.path()).await;
    assert_eq!(all(&wal, 1).await.len(), 3);
    put_durably(&wal, 1, vec![entry(4, 1, 100)]).await;
    wal.close().await.expect("close");
    drop(wal);
    assert_eq!(all(&open(tmp.path()).await, 1).await.len(), 4);
}

#[tokio::test]
async fn a_mark_that_a_power_cut_takes_after_a_restart_is_not_missed() {
    let tmp = temp();
    let wal = open(tmp.path()).await;
    put_durably(&wal, 1, vec![entry(1, 1, 100)]).await;
    super::until("the mark", || wal.stats().marks == 1).await;
    let killed = copy(tmp.path());
    let name = segment_files(killed.path())[0].clone();
    let mark = used_bytes(&killed.path().join("wal").join(&name)) / ALIGN * ALIGN;
    let wal_after = open(killed.path()).await;
    put_durably(&wal_after, 1, vec![entry(2, 1, 100)]).await;
    // Power fails: the new segment was flushed, the mark in the old one was not.
    let cut = copy(killed.path());
    let path = cut.path().join("wal").join(&name);
    let mut bytes = std::fs::read(&path).expect("read");
    assert_eq!(&bytes[mark..mark + 4], b"OGWB", "this is the mark");
    bytes[mark..mark + ALIGN].fill(0);
    std::fs::write(&path, &bytes).expect("write");
    assert_eq!(all(&open(cut.path()).await, 1).await.len(), 2);
    wal_after.close().await.expect("close");
    wal.close().await.expect("close");
}
