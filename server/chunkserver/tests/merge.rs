//! Merging of versions, case by case; the random histories of `model.rs` cover the rest.

mod support;

use ogee_chunkserver::store::{ChunkKey, ReadChain, ReadRange};
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_proto::data::{Ancestor, Command, DropVersionHead, FlattenHead};
use support::ops::{LAYER, open, write, zero};
use support::replica::{Replica, tiny};
use support::run;

fn order(after: u64, seq: u64, next: u64) -> Command {
    let [after, seq, next] = [after, seq, next].map(VolumeSeq);
    Command::DropVersion(DropVersionHead { layer: LAYER, after, seq, next })
}

fn seqs(replica: &Replica) -> Vec<u64> {
    replica.store().versions().iter().map(|v| v.seq.0).collect()
}

async fn page(replica: &Replica, seq: u64, page: u32) -> u8 {
    let bytes = replica.read_at(seq, page * 4096, 4096).await.expect("read");
    assert!(bytes.iter().all(|b| *b == bytes[0]));
    bytes[0]
}

/// Pages 0 to 3: seq 1 writes all, seq 2 page 1, seq 3 zeroes page 2, seq 4 page 3.
async fn four_versions() -> Replica {
    let mut replica = Replica::new(tiny()).await;
    replica.apply(&open()).await;
    replica.apply(&write(1, 0, vec![1; 4 * 4096])).await;
    replica.apply(&write(2, 4096, vec![2; 4096])).await;
    replica.apply(&zero(3, 8192, 4096)).await;
    replica.apply(&write(4, 12288, vec![4; 4096])).await;
    replica
}

#[test]
fn the_newest_giver_wins() {
    run(async {
        let mut replica = four_versions().await;
        replica.apply(&order(0, 3, 4)).await;
        assert_eq!(seqs(&replica), [4]);
        for (p, byte) in [(0, 1), (1, 2), (2, 0), (3, 4)] {
            assert_eq!(page(&replica, 4, p).await, byte, "page {p}");
        }
    });
}

#[test]
fn the_oldest_taker_takes() {
    run(async {
        let mut replica = four_versions().await;
        // Seqs 1 to 3 are not needed below 4, but the taker of 1 is 2: 2 then gives on what it has.
        replica.apply(&order(0, 1, 4)).await;
        assert_eq!(seqs(&replica), [2, 3, 4]);
        for (p, byte) in [(0, 1), (1, 2), (2, 1), (3, 1)] {
            assert_eq!(page(&replica, 2, p).await, byte, "page {p}");
        }
        assert_eq!(page(&replica, 3, 2).await, 0);
        replica.apply(&order(0, 1, 4)).await;
        assert_eq!(seqs(&replica), [2, 3, 4], "an order that was carried out does nothing");
    });
}

#[test]
fn without_a_taker_everything_stays() {
    run(async {
        let mut replica = four_versions().await;
        replica.apply(&order(3, 4, 9)).await;
        assert_eq!(seqs(&replica), [1, 2, 3, 4]);
        assert_eq!(page(&replica, 9, 3).await, 4);
        replica.apply(&write(9, 0, vec![9; 4096])).await;
        replica.apply(&order(3, 4, 9)).await;
        assert_eq!(seqs(&replica), [1, 2, 3, 9]);
        assert_eq!((page(&replica, 9, 3).await, page(&replica, 3, 3).await), (4, 1));
    });
}

#[test]
fn a_senseless_order_is_refused() {
    run(async {
        let mut replica = four_versions().await;
        for (after, seq, next) in [(2, 2, 3), (0, 3, 3), (3, 1, 9)] {
            let reply = replica.try_apply(&order(after, seq, next)).await.expect("a reply");
            assert_eq!(support::replica::status_of(&reply), ogee_proto::data::Status::BadRequest);
        }
        assert_eq!(seqs(&replica), [1, 2, 3, 4]);
    });
}

/// A zero mark of the parent is copied as well: reading on with the ancestry from before the flatten, when a merge has laid
/// bare what the mark had covered in the parent, still gives zeros.
#[test]
fn a_flattened_layer_does_not_show_what_a_merge_lays_bare_in_its_parent() {
    run(async {
        let mut replica = Replica::new(tiny()).await;
        replica.apply(&open()).await;
        replica.apply(&write(1, 0, vec![7; 4096])).await;
        replica.apply(&zero(2, 0, 4096)).await;
        let chain = vec![Ancestor { layer: LAYER, seq: VolumeSeq(2) }];
        let head =
            FlattenHead { layer: LayerId(2), chunk: ChunkIndex(0), row: 0, pages: [0xFF; 32], chain: chain.clone() };
        replica.apply(&Command::Flatten(head)).await;
        replica.apply(&write(3, 4096, vec![8; 4096])).await;
        let order = DropVersionHead { layer: LAYER, after: VolumeSeq(1), seq: VolumeSeq(2), next: VolumeSeq(3) };
        replica.apply(&Command::DropVersion(order)).await;
        assert_eq!(replica.read_at(2, 0, 4096).await.expect("read"), vec![7; 4096], "the mark is gone from the parent");
        let at = ChunkKey { layer: LayerId(2), chunk: ChunkIndex(0) };
        let range = ReadRange { at, seq: VolumeSeq(1), chain: ReadChain::Given(chain.into()), offset: 0, len: 4096 };
        assert_eq!(replica.read(&range).await.expect("read"), vec![0; 4096]);
    });
}
