//! Full disks and bounded memory.

mod support;

use ogee_chunkserver::copyset::CopysetMachine;
use ogee_chunkserver::store::{ChunkStore, SpaceState, StoreTuning};
use ogee_disk::meta::{KeyValue, RowSink};
use ogee_disk::{
    Batch, DataDir, DiskOp, Durability, Fault, FaultRule, MemStore, MetaStore, StoreError, StoreErrorKind, Table,
};
use ogee_raft::api::StateMachine;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use support::ops::{at, entry, open, write, zero};
use support::replica::{Replica, tiny};
use support::run;
use support::world::COPYSET;

/// A committed entry on a full disk waits, readers do not, and everything goes on by itself.
#[test]
fn a_committed_entry_waits_for_space() {
    for op in [DiskOp::Write, DiskOp::Create, DiskOp::Punch] {
        run(async {
            let mut replica = Replica::new(tiny()).await;
            replica.apply(&open()).await;
            replica.apply(&write(1, 0, vec![7; 8192])).await;
            let rule = |times| FaultRule {
                op,
                path_contains: "chunks".into(),
                skip: 0,
                times,
                fault: Fault::Errno(libc::ENOSPC),
            };
            replica.faults.add(rule(3));
            match op {
                DiskOp::Punch => replica.apply(&zero(1, 4096, 4096)).await,
                _ => replica.apply(&write(2, 4096, vec![0; 4096])).await,
            }
            assert_eq!(replica.faults.struck(), 3);
            assert_eq!(replica.parts().process.counters.no_space_pauses.load(Ordering::Relaxed), 3);
            assert_eq!(replica.read_at(2, 4096, 4096).await.expect("read"), [0; 4096]);
            assert_eq!(replica.read_at(2, 0, 4096).await.expect("read"), [7; 4096]);
        });
    }
}

#[test]
fn reads_go_on_while_an_entry_waits() {
    run(async {
        let mut replica = Replica::new(tiny()).await;
        replica.apply(&open()).await;
        replica.apply(&write(1, 0, vec![7; 8192])).await;
        let fault = Fault::Errno(libc::ENOSPC);
        let path_contains = "chunks".into();
        replica.faults.add(FaultRule { op: DiskOp::Write, path_contains, skip: 0, times: u64::MAX, fault });
        let faults = Arc::clone(&replica.faults);
        let (store, index) = (replica.store(), replica.next_index());
        let mut parts = replica.parts.take().expect("running");
        let waiting = tokio::spawn(async move {
            let entry = entry(index, &write(2, 0, vec![8; 4096]));
            parts.machine.apply(vec![entry]).await.expect("apply at last");
            parts
        });
        while faults.struck() < 5 {
            tokio::time::sleep(tiny().no_space_pause).await;
        }
        let head = ogee_proto::data::ReadHead { at: at(1, 0, 8192), tells_missing: false, chain: vec![] };
        match store.read(&head).await.expect("read").outcome {
            ogee_chunkserver::store::ReadOutcome::Data { bytes, .. } => assert_eq!(bytes, [7; 8192].as_slice()),
            other => panic!("{other:?}"),
        }
        faults.clear();
        replica.parts = Some(waiting.await.expect("task"));
        assert_eq!(replica.read_at(2, 0, 4096).await.expect("read"), [8; 4096]);
    });
}

/// A metadata store that is full for a while.
struct FullMeta(MemStore, AtomicU64);

impl MetaStore for FullMeta {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.0.get(table, key)
    }

    fn scan(&self, table: Table, from: Bound<&[u8]>, to: Option<&[u8]>, limit: usize) -> Result<Vec<KeyValue>, StoreError> {
        self.0.scan(table, from, to, limit)
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        if self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
            let source = Box::new(std::io::Error::from_raw_os_error(libc::ENOSPC));
            return Err(StoreError::new(StoreErrorKind::NoSpace, "write", source));
        }
        self.0.write(batch, durability)
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.0.sync()
    }

    fn dump(&self, tables: &[Table], row: &mut RowSink<'_>) -> Result<(), StoreError> {
        self.0.dump(tables, row)
    }
}

#[test]
fn a_checkpoint_waits_for_space() {
    run(async {
        let temp = tempfile::tempdir().expect("temp dir");
        let meta = Arc::new(FullMeta(MemStore::new(), AtomicU64::new(0)));
        let process = ChunkStore::new(DataDir::open(temp.path()).expect("dir"), meta.clone(), tiny());
        let mut machine = CopysetMachine::new(process.copyset(COPYSET));
        machine.load().await.expect("load");
        machine.apply(vec![entry(1, &open()), entry(2, &write(1, 0, vec![7; 4096]))]).await.expect("apply");
        meta.1.store(4, Ordering::Relaxed);
        let applied = machine.checkpoint().await.expect("checkpoint at last");
        assert_eq!(applied.pos.expect("a position").index, 2);
        assert_eq!(process.counters.no_space_pauses.load(Ordering::Relaxed), 4);
        assert_eq!(process.counters.checkpoints.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn what_a_full_disk_still_takes() {
    run(async {
        let tuning = StoreTuning { space_reserve_bytes: u64::MAX, ..tiny() };
        let mut replica = Replica::new(tuning).await;
        replica.apply(&open()).await;
        replica.apply(&write(1, 0, vec![7; 8192])).await;
        let process = Arc::clone(&replica.parts().process);
        assert_eq!(process.space_state(), SpaceState::Roomy, "nobody has looked yet");
        assert_eq!(process.refresh_space().expect("usage"), SpaceState::Full);
        let store = replica.store();
        assert!(!store.needs_space(&at(1, 0, 8192)), "an overwrite");
        assert!(!store.needs_space(&at(1, 512, 512)), "a part of a page");
        assert!(store.needs_space(&at(1, 4096, 8192)), "one new page");
        assert!(store.needs_space(&at(2, 0, 4096)), "a new version");
        assert!(store.needs_space(&at(1, 255 * 4096, 8192)), "other rows");
        replica.apply(&zero(1, 0, 4096)).await;
        assert!(store.needs_space(&at(1, 0, 4096)), "its block was freed");
        replica.checkpoint().await;
        drop((store, process));
        replica.kill().await;
        assert!(!replica.store().needs_space(&at(1, 4096, 4096)), "also when the row must be read");
    });
    let temp = tempfile::tempdir().expect("temp dir");
    let tuning = StoreTuning { space_reserve_bytes: 0, ..tiny() };
    let process = ChunkStore::new(DataDir::open(temp.path()).expect("dir"), Arc::new(MemStore::new()), tuning);
    assert_eq!(process.refresh_space().expect("usage"), SpaceState::Roomy);
}

/// Rows and files in memory never exceed the tuning, however much is touched.
#[test]
fn memory_is_bounded() {
    run(async {
        let tuning =
            StoreTuning { row_cache_rows: 10, open_files: 4, dirty_rows: 30, dirty_files: 8, ..StoreTuning::default() };
        let mut replica = Replica::new(tuning).await;
        replica.apply(&open()).await;
        for i in 0..400u32 {
            let mut command = write(1 + u64::from(i / 40), (i % 16) * (1 << 20), vec![1; 4096]);
            if let ogee_proto::data::Command::Write(head, _) = &mut command {
                head.at.chunk.0 = i / 16 % 5;
            }
            replica.apply(&command).await;
            let process = &replica.parts().process;
            assert!(process.cached_rows() <= 10 && process.cached_files() <= 4);
        }
        let checkpoints = replica.parts().process.counters.checkpoints.load(Ordering::Relaxed);
        assert!(checkpoints >= 400 / 32, "the store checkpoints by itself: {checkpoints}");
        // Everything is still there, and reading it keeps the bounds.
        let loads = replica.parts().process.counters.row_loads.load(Ordering::Relaxed);
        for row in 0..16u32 {
            replica.read_at(99, row << 20, 4096).await.expect("read");
            let process = &replica.parts().process;
            assert!(process.cached_rows() <= 10 && process.cached_files() <= 4);
        }
        assert!(replica.parts().process.counters.row_loads.load(Ordering::Relaxed) > loads, "evicted rows are loaded");
        let due = replica.store().checkpoint_due();
        replica.checkpoint().await;
        assert!(!replica.store().checkpoint_due(), "was {due}");
    });
}

/// A removed replica leaves nothing, and a new one of the same copyset starts empty.
#[test]
fn a_removed_copyset_is_gone() {
    run(async {
        let mut replica = Replica::new(tiny()).await;
        replica.apply(&open()).await;
        replica.apply(&write(1, 0, vec![7; 4096])).await;
        replica.checkpoint().await;
        replica.parts().process.remove_copyset(COPYSET).expect("remove");
        replica.parts().process.remove_copyset(COPYSET).expect("again");
        replica.kill().await;
        assert_eq!(replica.next_index(), 0);
        assert!(replica.store().versions().is_empty());
        assert_eq!(std::fs::read_dir(replica.root().join("chunks/00000007")).expect("dir").count(), 0);
    });
}

/// Zeros over nothing allocate nothing and leave no version; over something they free it.
#[test]
fn zeros_take_no_space() {
    run(async {
        let mut replica = Replica::new(tiny()).await;
        replica.apply(&open()).await;
        replica.apply(&zero(1, 0, 16 << 20)).await;
        assert!(replica.store().versions().is_empty());
        replica.apply(&write(1, 0, vec![7; 1 << 20])).await;
        replica.apply(&zero(1, 0, 16 << 20)).await;
        replica.checkpoint().await;
        let file = std::fs::read_dir(replica.root().join("chunks/00000007")).expect("dir").next().expect("a file");
        let stat = file.expect("entry").metadata().expect("stat");
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&stat), 0);
        assert_eq!(stat.len(), 16 << 20);
    });
}
