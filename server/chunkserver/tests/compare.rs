//! Replicas compare their records of pages: rows of the same entries are equal, rows of different entries are not judged, a planted
//! difference is found, and whoever two others contradict is outvoted.

mod support;

use bytes::Bytes;
use ogee_chunkserver::copyset::compare::Comparison;
use ogee_chunkserver::store::key::TABLE_ROW;
use ogee_chunkserver::store::row::Row;
use ogee_chunkserver::store::{CopysetStore, VersionKey};
use ogee_common::id::{ChunkIndex, VolumeSeq};
use ogee_disk::{Batch, Durability, MetaStore as _};
use ogee_proto::data::Command;
use ogee_raft::api::{SnapshotSource, StateMachineError};
use std::sync::Arc;
use support::ops::{LAYER, open, write, zero};
use support::replica::{Replica, tiny};
use support::run;
use support::world::COPYSET;

struct Other(Arc<CopysetStore>);

impl SnapshotSource for Other {
    async fn fetch(&self, request: Bytes) -> Result<Bytes, StateMachineError> {
        let answer = self.0.serve_fetch(&request).await;
        answer.map_err(|e| StateMachineError { verb: "serve", source: Box::new(e) })
    }
}

async fn all(replicas: &mut [Replica], command: &Command) {
    for replica in replicas {
        replica.apply(command).await;
    }
}

/// Three replicas of the same history: two versions, several rows, zeroes.
async fn three() -> Vec<Replica> {
    let mut replicas = vec![];
    for _ in 0..3 {
        replicas.push(Replica::new(tiny()).await);
    }
    let history = [open(), write(1, 0, vec![7; 4 * 4096]), write(1, 3 << 20, vec![1; 8192]), zero(2, 4096, 4096), write(2, 5 << 20, vec![9; 512])];
    for command in &history {
        all(&mut replicas, command).await;
    }
    replicas
}

async fn compare(replicas: &[Replica], own: usize) -> Comparison {
    let others: Vec<Other> = (0..replicas.len()).filter(|i| *i != own).map(|i| Other(replicas[i].store())).collect();
    replicas[own].store().compare(None, None, &others).await.expect("compare")
}

/// Gives page 1 of the first version another checksum in the metadata store of a replica, with a right one around the record.
async fn falsify(replica: &mut Replica) {
    replica.checkpoint().await;
    let key = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(1)).row(0).encode(COPYSET);
    let record = replica.meta().get(TABLE_ROW, &key).expect("read").expect("a row");
    let mut row = Row::decode(&key, &record).expect("sound");
    row.set_data(1, 0xDEAD_BEEF);
    let mut batch = Batch::new();
    batch.put(TABLE_ROW, &key, &row.encode(&key));
    replica.meta().write(batch, Durability::Synced).expect("write");
    replica.kill().await;
}

#[test]
fn equal_replicas_do_not_differ() {
    run(async {
        let replicas = three().await;
        for own in 0..3 {
            let found = compare(&replicas, own).await;
            assert_eq!((found.different, found.outvoted), (vec![], vec![]));
            assert_eq!(found.judged, 8, "four rows, two others");
        }
    });
}

#[test]
fn a_replica_that_lags_or_is_ahead_is_not_judged() {
    run(async {
        let mut replicas = three().await;
        replicas[0].apply(&write(2, 0, vec![3; 4096])).await;
        for own in 0..3 {
            assert_eq!(compare(&replicas, own).await.different, vec![], "replica {own}");
        }
        let found = compare(&replicas, 0).await;
        assert_eq!(found.judged, 6, "the row that was changed is not judged, the others are");
    });
}

#[test]
fn a_false_record_is_found_and_outvoted() {
    run(async {
        let mut replicas = three().await;
        falsify(&mut replicas[1]).await;
        let row = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(1)).row(0);
        let found = compare(&replicas, 1).await;
        assert_eq!((found.different, found.outvoted), (vec![row], vec![row]), "two others agree with each other");
        let found = compare(&replicas, 0).await;
        assert_eq!((found.different, found.outvoted), (vec![row], vec![]), "one of two agrees with us");
        let found = compare(&replicas[..2], 0).await;
        assert_eq!((found.different, found.outvoted), (vec![row], vec![]), "nobody can say who is right");
        assert!(replicas[1].store().fault().is_none());
        replicas[1].store().give_up_outvoted();
        assert_eq!(replicas[1].store().fault(), Some(ogee_chunkserver::store::Fault::Damaged));
    });
}

#[test]
fn a_row_that_another_lacks_is_a_difference() {
    run(async {
        let mut replicas = three().await;
        replicas[2].checkpoint().await;
        let key = VersionKey::new(LAYER, ChunkIndex(0), VolumeSeq(2)).row(5).encode(COPYSET);
        let mut row = Row::default();
        row.changed_by(1);
        let mut batch = Batch::new();
        batch.put(TABLE_ROW, &key, &row.encode(&key));
        replicas[2].meta().write(batch, Durability::Synced).expect("write");
        replicas[2].kill().await;
        let found = compare(&replicas, 0).await;
        assert_eq!(found.different.len(), 1);
        assert_eq!(found.outvoted, vec![], "the other one has it");
    });
}
