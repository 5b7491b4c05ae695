//! Rot and failing disks: a page that is not what was written is never read as data and never gets a good checksum again;
//! a disk that failed ends the replica.

mod support;

use ogee_chunkserver::store::key::{KIND_APPLIED, TABLE_COPYSET, TABLE_ROW, TABLE_VERSION, copyset_key};
use ogee_chunkserver::store::{ReadError, VersionKey};
use ogee_common::id::{ChunkIndex, VolumeSeq};
use ogee_disk::{Batch, DiskOp, Durability, Fault, FaultRule, MetaStore};
use ogee_proto::data::{Command, DropVersionHead, Status};
use ogee_raft::api::{SnapshotSource, StateMachine, StateMachineError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::ops::{LAYER, is_corrupt, open, write, zero};
use support::replica::{Replica, tiny};
use support::run;
use support::world::COPYSET;

async fn with_pages() -> Replica {
    let mut replica = Replica::new(tiny()).await;
    replica.apply(&open()).await;
    replica.apply(&write(1, 0, vec![7; 4 * 4096])).await;
    replica
}

fn corrupt_pages(replica: &mut Replica) -> u64 {
    replica.parts().process.counters.corrupt_pages.load(Ordering::Relaxed)
}

fn unverified_pages(replica: &mut Replica) -> u64 {
    replica.parts().process.counters.unverified_pages.load(Ordering::Relaxed)
}

#[test]
fn a_flipped_bit_is_never_data() {
    run(async {
        let mut replica = with_pages().await;
        replica.rot(1, 4096 + 100);
        let result = replica.read_at(1, 0, 4 * 4096).await;
        assert!(is_corrupt(&result, 1), "{result:?}");
        assert_eq!(result.expect_err("corrupt").status(), Status::Corrupt);
        assert!(is_corrupt(&replica.read_at(1, 4096 + 512, 512).await, 1), "also when the flipped byte is not asked for");
        assert_eq!(replica.read_at(1, 0, 4096).await.expect("page 0"), [7; 4096]);
        assert_eq!(replica.read_at(1, 8192, 8192).await.expect("pages 2, 3"), [7; 8192]);
        assert_eq!(corrupt_pages(&mut replica), 2);
        replica.apply(&write(1, 4096, vec![8; 4096])).await;
        assert_eq!(replica.read_at(1, 4096, 4096).await.expect("written whole"), [8; 4096]);
    });
}

#[test]
fn a_partial_write_does_not_launder_rot() {
    run(async {
        let mut replica = with_pages().await;
        replica.rot(1, 100);
        replica.apply(&write(1, 512, vec![9; 512])).await;
        assert!(is_corrupt(&replica.read_at(1, 512, 512).await, 0), "no checksum can vouch for the page");
        replica.apply(&write(1, 1024, vec![9; 512])).await;
        replica.apply(&zero(1, 0, 512)).await;
        assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0), "further partial writes do not either");
        replica.checkpoint().await;
        replica.kill().await;
        assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0), "it is remembered");
        replica.apply(&zero(1, 0, 4096)).await;
        assert_eq!(replica.read_at(1, 0, 4096).await.expect("zeroed whole"), [0; 4096]);
        replica.apply(&write(1, 512, vec![9; 512])).await;
        assert_eq!(replica.read_at(1, 512, 512).await.expect("a good page again"), [9; 512]);
        assert_eq!(unverified_pages(&mut replica), 0);
    });
}

#[test]
fn rot_in_an_older_version_is_not_laundered_into_a_newer_one() {
    run(async {
        let mut replica = with_pages().await;
        replica.rot(1, 4096);
        replica.apply(&write(2, 4096 + 512, vec![9; 512])).await;
        assert!(is_corrupt(&replica.read_at(2, 4096, 4096).await, 1));
        replica.rot(1, 8192);
        let order =
            DropVersionHead { layer: LAYER, after: VolumeSeq(0), seq: VolumeSeq(1), next: VolumeSeq(2) };
        replica.apply(&Command::DropVersion(order)).await;
        assert_eq!(replica.store().versions().len(), 1);
        assert!(is_corrupt(&replica.read_at(2, 8192, 4096).await, 2), "a merge passes damage on");
        assert_eq!(replica.read_at(2, 12288, 4096).await.expect("merged"), [7; 4096]);
    });
}

/// The rule of the recovery horizon, from both sides.
#[test]
fn replay_accepts_newer_files_and_only_them() {
    run(async {
        let mut replica = with_pages().await;
        replica.checkpoint().await;
        // The process writes page 0 and dies: the file is newer than the checkpoint.
        replica.apply(&write(1, 1024, vec![9; 512])).await;
        replica.kill().await;
        replica.apply(&write(1, 1024, vec![9; 512])).await;
        assert_eq!(unverified_pages(&mut replica), 1);
        let mut expected = vec![7; 4096];
        expected[1024..1536].fill(9);
        assert_eq!(replica.read_at(1, 0, 4096).await.expect("replayed"), expected);
        // The same page rots after this process wrote it: strict, though the entry is below the horizon.
        replica.rot(1, 0);
        replica.apply(&write(1, 2048, vec![9; 512])).await;
        assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0));
        // Once the replica has caught up, strict for every page.
        replica.store().caught_up();
        replica.rot(1, 4096);
        replica.apply(&write(1, 4096 + 512, vec![9; 512])).await;
        assert!(is_corrupt(&replica.read_at(1, 4096, 4096).await, 1));
        assert_eq!(unverified_pages(&mut replica), 1);
    });
}

/// A page that the disk does not give while entries are replayed is damaged: what is in memory instead must get no good checksum. Found by the
/// torture: the replica differed from the others, with a checksum for it.
#[test]
fn replay_does_not_take_a_page_that_cannot_be_read_for_a_newer_one() {
    for lost in [false, true] {
        run(async {
            let mut replica = with_pages().await;
            replica.checkpoint().await;
            replica.apply(&write(1, 1024, vec![9; 512])).await;
            let file = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(1)).file_name(COPYSET);
            if lost {
                std::fs::remove_file(replica.root().join(file)).expect("remove");
            }
            replica.kill().await;
            if !lost {
                let fault = Fault::Errno(libc::EIO);
                replica.faults.add(FaultRule { op: DiskOp::Read, path_contains: "chunks".into(), skip: 0, times: 1, fault });
            }
            replica.apply(&write(1, 1024, vec![9; 512])).await;
            assert_eq!((replica.faults.struck(), unverified_pages(&mut replica)), (u64::from(!lost), 0));
            assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0), "there is no checksum for it");
            replica.apply(&write(1, 2048, vec![9; 512])).await;
            assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0), "nor after another one");
            replica.apply(&write(1, 0, vec![8; 4096])).await;
            assert_eq!(replica.read_at(1, 0, 4096).await.expect("written whole"), [8; 4096]);
        });
    }
}

/// However far the process went beyond its checkpoint, and however the replay is cut up by further crashes, what it wrote is
/// below the horizon that is found afterwards.
#[test]
fn the_horizon_covers_whatever_was_applied() {
    run(async {
        let mut replica = with_pages().await;
        replica.checkpoint().await;
        let far = 4 * tiny().horizon_entries;
        for i in 0..far {
            replica.apply(&write(1, 8192 + 512 * u32::try_from(i % 8).expect("small"), vec![1; 512])).await;
        }
        let last = write(1, 512, vec![9; 512]);
        replica.apply(&last).await;
        replica.kill().await;
        // A part of the replay, a checkpoint, and the next crash.
        replica.apply(&write(1, 8192, vec![1; 512])).await;
        replica.checkpoint().await;
        replica.kill().await;
        for i in 1..far {
            replica.apply(&write(1, 8192 + 512 * u32::try_from(i % 8).expect("small"), vec![1; 512])).await;
        }
        replica.apply(&last).await;
        assert_eq!(replica.read_at(1, 512, 512).await.expect("replayed"), [9; 512]);
        assert_eq!(replica.read_at(1, 8192, 4096).await.expect("replayed"), [1; 4096]);
        assert_eq!(replica.read_at(1, 0, 512).await.expect("replayed"), [7; 512]);
    });
}

#[test]
fn above_the_horizon_every_page_is_verified() {
    run(async {
        let mut replica = with_pages().await;
        replica.checkpoint().await;
        replica.kill().await;
        for _ in 0..tiny().horizon_entries + 1 {
            replica.apply(&write(1, 12288, vec![1; 4096])).await;
        }
        replica.rot(1, 0);
        replica.apply(&write(1, 512, vec![9; 512])).await;
        assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0));
    });
}

#[test]
fn a_lost_data_file_is_damage() {
    run(async {
        let mut replica = with_pages().await;
        replica.checkpoint().await;
        let file = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(1)).file_name(COPYSET);
        std::fs::remove_file(replica.root().join(file)).expect("remove");
        replica.kill().await;
        assert!(is_corrupt(&replica.read_at(1, 0, 4096).await, 0));
    });
}

#[test]
fn damaged_metadata_is_found() {
    run(async {
        let mut replica = with_pages().await;
        replica.checkpoint().await;
        replica.kill().await;
        let version = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(1));
        let meta = replica.meta();
        let flip = |table, key: &[u8]| {
            let mut record = meta.get(table, key).expect("get").expect("a record");
            let middle = record.len() / 2;
            record[middle] ^= 1;
            let mut batch = Batch::new();
            batch.put(table, key, &record);
            meta.write(batch, Durability::Synced).expect("write");
        };
        flip(TABLE_ROW, &version.row(0).encode(COPYSET));
        let error = replica.read_at(1, 0, 4096).await.expect_err("damaged row");
        assert!(matches!(error, ReadError::Store(_)));
        assert_eq!(error.status(), Status::DiskFailed);
        for (table, key) in [(TABLE_VERSION, version.encode(COPYSET)), (TABLE_COPYSET, copyset_key(COPYSET, KIND_APPLIED))]
        {
            flip(table, &key);
            let store = replica.parts().process.copyset(COPYSET);
            let mut machine = ogee_chunkserver::copyset::CopysetMachine::new(store);
            machine.load().await.expect_err("a damaged record is not believed");
            flip(table, &key);
        }
    });
}

#[test]
fn a_failed_disk_ends_the_replica() {
    for op in [DiskOp::Write, DiskOp::Sync] {
        run(async {
            let mut replica = with_pages().await;
            let path_contains = "chunks".into();
            replica.faults.add(FaultRule { op, path_contains, skip: 0, times: 1, fault: Fault::Errno(libc::EIO) });
            let written = replica.try_apply(&write(1, 0, vec![8; 4096])).await;
            let flushed = replica.parts().machine.checkpoint().await;
            assert!(written.is_err() || flushed.is_err());
            assert_eq!(replica.faults.struck(), 1);
            // The disk works again, the replica does not.
            replica.try_apply(&write(1, 0, vec![8; 4096])).await.expect_err("stopped");
            replica.parts().machine.checkpoint().await.expect_err("stopped");
        });
    }
}

/// The kernel tells of a failed flush once. If a flush ahead of the checkpoint hears it, the checkpoint must not succeed.
#[test]
fn a_failed_flush_ahead_fails_the_checkpoint() {
    run(async {
        let mut replica = with_pages().await;
        replica.store().flush_ahead().await;
        replica.apply(&write(1, 0, vec![8; 4096])).await;
        let path_contains = "chunks".into();
        let fault = Fault::Errno(libc::EIO);
        replica.faults.add(FaultRule { op: DiskOp::Sync, path_contains, skip: 0, times: 1, fault });
        replica.store().flush_ahead().await;
        assert_eq!(replica.faults.struck(), 1);
        replica.parts().machine.checkpoint().await.expect_err("what was lost is not called durable");
        replica.try_apply(&write(1, 0, vec![8; 4096])).await.expect_err("stopped");
    });
}

#[test]
fn an_entry_that_does_not_match_its_checksums_ends_the_replica() {
    run(async {
        let mut replica = with_pages().await;
        let Command::Write(mut head, data) = write(1, 0, vec![8; 4096]) else { unreachable!("a write") };
        head.crcs[0] ^= 1;
        replica.try_apply(&Command::Write(head, data)).await.expect_err("damaged entry");
        assert_eq!(replica.read_at(1, 0, 4096).await.expect("old data"), [7; 4096]);
    });
}

struct Direct(Arc<ogee_chunkserver::store::CopysetStore>);

impl SnapshotSource for Direct {
    async fn fetch(&self, request: bytes::Bytes) -> Result<bytes::Bytes, StateMachineError> {
        let answer = self.0.serve_fetch(&request).await;
        answer.map_err(|e| StateMachineError { verb: "serve", source: Box::new(e) })
    }
}

#[test]
fn an_install_passes_damage_on_and_nothing_else() {
    run(async {
        let mut sender = with_pages().await;
        sender.rot(1, 4096);
        let snapshot = sender.snapshot().await;
        let mut receiver = Replica::new(tiny()).await;
        receiver.install(snapshot, &Direct(sender.store())).await.expect("install");
        assert!(is_corrupt(&receiver.read_at(1, 4096, 4096).await, 1));
        assert_eq!(receiver.read_at(1, 0, 4096).await.expect("page 0"), [7; 4096]);
        assert_eq!(receiver.read_at(1, 8192, 8192).await.expect("pages 2, 3"), [7; 8192]);
    });
}

/// Reads race with writes to the same pages on other threads: every page is old or new, and never "corrupt".
#[test]
fn reads_race_with_writes() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(async {
        let mut replica = with_pages().await;
        let store = replica.store();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = tokio::spawn(async move {
            let mut reads = 0u64;
            let at = ogee_chunkserver::store::ChunkKey { layer: LAYER, chunk: ChunkIndex(0) };
            let chain = ogee_chunkserver::store::ReadChain::Known;
            let range = ogee_chunkserver::store::ReadRange { at, seq: VolumeSeq(9), chain, offset: 0, len: 4 * 4096 };
            while !stopped.load(Ordering::Relaxed) {
                match store.read_range(&range).await.expect("never corrupt") {
                    ogee_chunkserver::store::ReadOutcome::AllZero => {}
                    ogee_chunkserver::store::ReadOutcome::Data { bytes, .. } => {
                        bytes.chunks_exact(4096).for_each(|page| assert!(page.iter().all(|b| *b == page[0])));
                    }
                }
                reads += 1;
                tokio::task::yield_now().await;
            }
            reads
        });
        for i in 0..3000u64 {
            let seq = 1 + i / 1000;
            let byte = u8::try_from(i % 250).expect("small") + 1;
            match i % 10 {
                9 => replica.apply(&zero(seq, 0, 4 * 4096)).await,
                _ => replica.apply(&write(seq, 0, vec![byte; 4 * 4096])).await,
            }
            if i % 500 == 499 {
                replica.checkpoint().await;
            }
            tokio::task::yield_now().await;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(reader.await.expect("reader") > 0);
        assert_eq!(corrupt_pages(&mut replica), 0);
    });
}
