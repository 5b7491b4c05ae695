//! Damaged pages are mended from other replicas, and only with what the other replica can prove to be the page.

mod support;

use bytes::Bytes;
use ogee_chunkserver::store::{CopysetStore, ReadError, ReadOutcome, VersionKey};
use ogee_common::id::{ChunkIndex, VolumeSeq};
use ogee_disk::{DiskOp, Fault, FaultRule};
use ogee_proto::data::{Command, ReadHead};
use ogee_raft::api::{SnapshotSource, StateMachine, StateMachineError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::ops::{LAYER, at, is_corrupt, open, write, zero};
use support::replica::{Replica, tiny};
use support::run;
use support::world::COPYSET;

/// Another replica, or one that cannot be reached.
struct Other(Option<Arc<CopysetStore>>);

impl SnapshotSource for Other {
    async fn fetch(&self, request: Bytes) -> Result<Bytes, StateMachineError> {
        let down = || StateMachineError { verb: "fetch", source: Box::new(std::io::Error::other("link down")) };
        let store = self.0.as_ref().ok_or_else(down)?;
        let answer = store.serve_fetch(&request).await;
        answer.map_err(|e| StateMachineError { verb: "serve", source: Box::new(e) })
    }
}

/// Two replicas with the same four pages.
async fn pair() -> (Replica, Replica) {
    let (mut own, mut other) = (Replica::new(tiny()).await, Replica::new(tiny()).await);
    for replica in [&mut own, &mut other] {
        replica.apply(&open()).await;
        replica.apply(&write(1, 0, vec![7; 4 * 4096])).await;
    }
    (own, other)
}

async fn both(own: &mut Replica, other: &mut Replica, command: &Command) {
    own.apply(command).await;
    other.apply(command).await;
}

async fn mending_read(own: &Replica, others: &[Other], seq: u64, offset: u32, len: u32) -> Result<Vec<u8>, ReadError> {
    let head = ReadHead { at: at(seq, offset, len), tells_missing: false, chain: vec![] };
    match own.store().read_or_repair(&head, others).await?.outcome {
        ReadOutcome::AllZero => Ok(vec![0; len as usize]),
        ReadOutcome::Data { bytes, .. } => Ok(bytes.to_vec()),
    }
}

fn repaired(replica: &mut Replica) -> u64 {
    replica.parts().process.counters.repaired_pages.load(Ordering::Relaxed)
}

#[test]
fn a_flipped_bit_is_answered_and_mended_from_another_replica() {
    run(async {
        let (mut own, other) = pair().await;
        own.rot(1, 4096 + 100);
        own.rot(1, 3 * 4096);
        assert!(is_corrupt(&mending_read(&own, &[], 1, 0, 4 * 4096).await, 1), "nobody to ask");
        let others = [Other(None), Other(Some(other.store()))];
        assert_eq!(mending_read(&own, &others, 1, 4096 + 512, 512).await.expect("mended"), [7; 512]);
        assert_eq!(repaired(&mut own), 2, "the whole row at once");
        assert_eq!(own.read_at(1, 0, 4 * 4096).await.expect("mended in place"), [7; 4 * 4096]);
        own.checkpoint().await;
        own.kill().await;
        assert_eq!(own.read_at(1, 0, 4 * 4096).await.expect("and durably"), [7; 4 * 4096]);
    });
}

#[test]
fn a_page_that_a_partial_write_found_rotten_is_mended() {
    run(async {
        let (mut own, mut other) = pair().await;
        own.rot(1, 100);
        both(&mut own, &mut other, &write(1, 512, vec![9; 512])).await;
        let others = [Other(Some(other.store()))];
        let mut expected = vec![7; 4096];
        expected[512..1024].fill(9);
        assert_eq!(mending_read(&own, &others, 1, 0, 4096).await.expect("mended"), expected);
        both(&mut own, &mut other, &write(1, 1024, vec![5; 512])).await;
        expected[1024..1536].fill(5);
        assert_eq!(own.read_at(1, 0, 4096).await.expect("an ordinary page again"), expected);
        own.checkpoint().await;
        own.kill().await;
        assert_eq!(own.read_at(1, 0, 4096).await.expect("durably"), expected);
    });
}

/// A page that cannot be read for a partial write is marked damaged, in its version and in the one that is written; both are mended
/// without anybody reading them.
#[test]
fn what_entries_found_unreadable_is_mended_in_the_background() {
    run(async {
        let (mut own, mut other) = pair().await;
        assert!(!own.store().has_found_damage());
        own.faults.add(FaultRule { op: DiskOp::Read, path_contains: String::new(), skip: 0, times: u64::MAX, fault: Fault::Errno(libc::EIO) });
        both(&mut own, &mut other, &write(1, 512, vec![9; 512])).await;
        both(&mut own, &mut other, &write(2, 4096 + 512, vec![8; 512])).await;
        own.faults.clear();
        assert!(own.store().has_found_damage());
        own.store().mend_found(&[Other(None)]).await.expect("nobody to ask");
        assert!(own.store().has_found_damage(), "it stays to be mended");
        own.store().mend_found(&[Other(Some(other.store()))]).await.expect("mended");
        assert!(!own.store().has_found_damage(), "nothing is left");
        let mut expected = vec![7; 8192];
        expected[512..1024].fill(9);
        expected[4096 + 512..4096 + 1024].fill(8);
        assert_eq!(own.read_at(2, 0, 8192).await.expect("an ordinary read"), expected);
        own.checkpoint().await;
        own.kill().await;
        assert_eq!(own.read_at(2, 0, 8192).await.expect("durably"), expected);
    });
}

/// The other replica's row is not the effect of the same entries: its page may be older or newer than ours.
#[test]
fn a_replica_that_lags_or_is_ahead_proves_nothing() {
    run(async {
        let (mut own, mut other) = pair().await;
        own.rot(1, 100);
        let others = [Other(Some(other.store()))];
        let first = write(1, 512, vec![9; 512]);
        own.apply(&first).await;
        assert!(is_corrupt(&mending_read(&own, &others, 1, 0, 4096).await, 0), "it lags");
        other.apply(&first).await;
        let second = write(1, 2048, vec![3; 512]);
        other.apply(&second).await;
        assert!(is_corrupt(&mending_read(&own, &others, 1, 0, 4096).await, 0), "it is ahead");
        own.apply(&second).await;
        let mut expected = vec![7; 4096];
        expected[512..1024].fill(9);
        expected[2048..2560].fill(3);
        assert_eq!(mending_read(&own, &others, 1, 0, 4096).await.expect("mended"), expected);
    });
}

#[test]
fn a_page_with_another_checksum_is_not_taken() {
    run(async {
        let (mut own, mut other) = pair().await;
        let newer = write(1, 4096, vec![8; 4096]);
        own.apply(&newer).await;
        own.rot(1, 4096 + 7);
        let others = [Other(Some(other.store()))];
        assert!(is_corrupt(&mending_read(&own, &others, 1, 4096, 4096).await, 1), "the old page is not ours");
        other.apply(&newer).await;
        assert_eq!(mending_read(&own, &others, 1, 4096, 4096).await.expect("mended"), [8; 4096]);
    });
}

#[test]
fn two_bad_copies_need_a_third() {
    run(async {
        let (own, other) = pair().await;
        let (third, _) = pair().await;
        own.rot(1, 0);
        other.rot(1, 1);
        let others = [Other(Some(other.store()))];
        assert!(is_corrupt(&mending_read(&own, &others, 1, 0, 4096).await, 0));
        let others = [Other(Some(other.store())), Other(Some(third.store()))];
        assert_eq!(mending_read(&own, &others, 1, 0, 4096).await.expect("from the third"), [7; 4096]);
    });
}

#[test]
fn a_parent_version_and_a_merged_one_are_mended() {
    run(async {
        let (mut own, mut other) = pair().await;
        own.rot(1, 4096);
        both(&mut own, &mut other, &write(2, 0, vec![6; 4096])).await;
        let others = [Other(Some(other.store()))];
        assert_eq!(mending_read(&own, &others, 2, 0, 8192).await.expect("older version"), [[6; 4096], [7; 4096]].concat());
        own.rot(1, 8192);
        let order = ogee_proto::data::DropVersionHead {
            layer: LAYER,
            after: VolumeSeq(0),
            seq: VolumeSeq(1),
            next: VolumeSeq(2),
        };
        both(&mut own, &mut other, &Command::DropVersion(order)).await;
        assert!(is_corrupt(&own.read_at(2, 8192, 4096).await, 2), "a merge passes damage on");
        assert_eq!(mending_read(&own, &others, 2, 8192, 4096).await.expect("merged version"), [7; 4096]);
    });
}

#[test]
fn a_lost_data_file_is_made_again() {
    run(async {
        let (mut own, mut other) = pair().await;
        both(&mut own, &mut other, &zero(1, 4096, 4096)).await;
        own.checkpoint().await;
        let file = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(1)).file_name(COPYSET);
        std::fs::remove_file(own.root().join(file)).expect("remove");
        own.kill().await;
        let others = [Other(Some(other.store()))];
        let expected = [vec![7; 4096], vec![0; 4096], vec![7; 2 * 4096]].concat();
        assert_eq!(mending_read(&own, &others, 1, 0, 4 * 4096).await.expect("made again"), expected);
        own.checkpoint().await;
        own.kill().await;
        assert_eq!(own.read_at(1, 0, 4 * 4096).await.expect("durably"), expected);
    });
}

/// A write that the repair makes fails: the read fails, the page stays bad, and nothing else happens.
#[test]
fn a_disk_that_cannot_be_written_keeps_the_page_bad() {
    run(async {
        let (mut own, other) = pair().await;
        own.checkpoint().await;
        own.rot(1, 0);
        let rule = FaultRule {
            op: DiskOp::Write,
            path_contains: "chunks".into(),
            skip: 0,
            times: 1,
            fault: Fault::Errno(libc::EIO),
        };
        own.faults.add(rule);
        let others = [Other(Some(other.store()))];
        let error = mending_read(&own, &others, 1, 0, 4096).await.expect_err("the write fails");
        assert!(matches!(error, ReadError::Store(_)), "{error:?}");
        assert!(is_corrupt(&own.read_at(1, 0, 4096).await, 0));
        assert_eq!(mending_read(&own, &others, 1, 0, 4096).await.expect("the disk works again"), [7; 4096]);
    });
}

/// On a full disk a repair gives up at once: the copyset goes on with what needs no space.
#[test]
fn a_full_disk_does_not_hold_up_the_copyset() {
    run(async {
        let (mut own, other) = pair().await;
        own.checkpoint().await;
        own.rot(1, 0);
        let path_contains = "chunks".into();
        let fault = Fault::Errno(libc::ENOSPC);
        own.faults.add(FaultRule { op: DiskOp::Write, path_contains, skip: 0, times: u64::MAX, fault });
        let others = [Other(Some(other.store()))];
        let read = mending_read(&own, &others, 1, 0, 4096);
        let result = tokio::time::timeout(std::time::Duration::from_secs(20), read).await.expect("no waiting for space");
        assert!(is_corrupt(&result, 0));
        own.apply(&zero(1, 4096, 4096)).await;
        own.faults.clear();
        assert_eq!(mending_read(&own, &others, 1, 0, 4096).await.expect("there is space again"), [7; 4096]);
    });
}

/// Repairs run beside the task that applies, checkpoints and merges; afterwards the replica is equal to the undamaged one.
#[test]
fn repairs_race_with_entries_and_checkpoints() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(async {
        let (mut own, mut other) = pair().await;
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (stopped, store, peer) = (Arc::clone(&stop), own.store(), other.store());
        let reader = tokio::spawn(async move {
            let others = [Other(Some(peer))];
            while !stopped.load(Ordering::Relaxed) {
                for page in 0..4 {
                    let head = ReadHead { at: at(1, page * 4096, 4096), tells_missing: false, chain: vec![] };
                    match store.read_or_repair(&head, &others).await {
                        Ok(_) | Err(ReadError::Corrupt { .. } | ReadError::Refused(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                }
                tokio::task::yield_now().await;
            }
        });
        for i in 0..1500u32 {
            let byte = u8::try_from(i % 250).expect("small");
            let page = i % 4;
            let command = match i % 7 {
                0 => zero(1, page * 4096, 4096),
                1 | 2 => write(1, page * 4096, vec![byte; 4096]),
                _ => write(1, page * 4096 + 512 * (i % 8), vec![byte; 512]),
            };
            if i % 3 == 0 {
                own.rot(1, u64::from(page * 4096 + i % 4096));
            }
            both(&mut own, &mut other, &command).await;
            if i % 50 == 49 {
                own.checkpoint().await;
            }
            tokio::task::yield_now().await;
        }
        stop.store(true, Ordering::Relaxed);
        reader.await.expect("reader");
        let others = [Other(Some(other.store()))];
        let expected = other.read_at(1, 0, 4 * 4096).await.expect("undamaged");
        assert!(mending_read(&own, &others, 1, 0, 4 * 4096).await.expect("mended") == expected);
        own.parts().machine.checkpoint().await.expect("checkpoint");
        own.kill().await;
        // What was repaired while a checkpoint was under way may be found damaged once more (`store/checkpoint.rs`), never wrong.
        match own.read_at(1, 0, 4 * 4096).await {
            Ok(read) => assert!(read == expected),
            Err(error) => assert!(matches!(error, ReadError::Corrupt { .. }), "{error:?}"),
        }
        assert!(repaired(&mut own) == 0, "a fresh process");
        assert!(mending_read(&own, &others, 1, 0, 4 * 4096).await.expect("mended once more") == expected);
    });
}
