//! Pastes case by case: what wins over them, who sees them, and that they can come again, late, or for a layer that is gone. Random histories
//! with crashes are in `model.rs`, with Raft snapshots in `install.rs`.

mod support;

use ogee_chunkserver::store::{BASE_SEQ, ChunkKey, ChunkStoreError, ChunkStoreErrorKind, ReadChain, ReadRange, VersionKey};
use ogee_common::id::{AttachEpoch, ChunkIndex, CopysetId, LayerId, VolumeSeq};
use ogee_proto::data::{Ancestor, Command, DropVersionHead, LayerHead, PasteHead, PastePages, ReadHead, Status, ZeroHead};
use std::sync::atomic::Ordering;
use support::ops::{LAYER, at, open, write};
use support::replica::{Replica, status_of, tiny};
use support::run;
use support::world::COPYSET;

/// A paste of whole pages, each of one byte, from page `first` of the chunk on.
fn paste(first: u32, bytes: &[u8]) -> Command {
    paste_to(COPYSET, LAYER, first, bytes)
}

fn paste_to(copyset: CopysetId, layer: LayerId, first: u32, bytes: &[u8]) -> Command {
    let content: Vec<u8> = bytes.iter().flat_map(|byte| [*byte; 4096]).collect();
    let (pages, data) = PastePages::of(u8::try_from(first / 256).expect("few rows"), first % 256, &content, |_| true);
    Command::Paste(PasteHead { copyset, layer, chunk: ChunkIndex(0), pages }, data)
}

fn zero_masked(seq: u64, offset: u32, len: u32) -> Command {
    Command::Zero(ZeroHead { at: at(seq, offset, len), masks: true })
}

async fn refused(replica: &mut Replica, command: &Command) -> Status {
    status_of(&replica.try_apply(command).await.expect("apply"))
}

/// What each page reads, `None` if it is missing.
async fn thin(replica: &Replica, seq: u64, pages: std::ops::Range<u32>) -> Vec<Option<u8>> {
    let place = LayerHead { epoch: AttachEpoch(0), ..at(seq, pages.start * 4096, (pages.end - pages.start) * 4096) };
    let head = ReadHead { at: place, tells_missing: true, chain: vec![] };
    let answer = replica.store().read(&head).await.expect("read");
    let bytes = replica.read_at(seq, pages.start * 4096, (pages.end - pages.start) * 4096).await.expect("read");
    assert_eq!(answer.missing.len(), pages.len());
    let byte = |(page, is_missing): (&[u8], &bool)| {
        assert!(page.iter().all(|b| *b == page[0]) && (!is_missing || page[0] == 0));
        (!is_missing).then_some(page[0])
    };
    bytes.chunks(4096).zip(&answer.missing).map(byte).collect()
}

async fn opened() -> Replica {
    let mut replica = Replica::new(tiny()).await;
    replica.apply(&open()).await;
    replica
}

#[test]
fn a_paste_fills_only_what_no_write_and_no_zero_has() {
    run(async {
        let mut replica = opened().await;
        assert_eq!(thin(&replica, 1, 0..4).await, [None; 4]);
        replica.apply(&write(1, 4096, vec![5; 4096])).await;
        replica.apply(&zero_masked(1, 8192, 4096)).await;
        assert_eq!(thin(&replica, 1, 0..4).await, [None, Some(5), Some(0), None]);
        replica.apply(&paste(0, &[1, 2, 3, 0])).await;
        assert_eq!(thin(&replica, 1, 0..5).await, [Some(1), Some(5), Some(0), Some(0), None]);
        replica.apply(&paste(0, &[9, 9, 9, 9])).await;
        assert_eq!(thin(&replica, 1, 0..4).await, [Some(1), Some(5), Some(0), Some(0)], "the first one stays");
        assert_eq!(replica.parts().process.counters.pasted_pages.load(Ordering::Relaxed), 4, "also below what has won");
    });
}

#[test]
fn a_write_and_a_zero_that_come_later_win() {
    run(async {
        let mut replica = opened().await;
        replica.apply(&paste(255, &[1])).await;
        replica.apply(&paste(256, &[2, 3])).await;
        replica.apply(&write(1, 256 * 4096 + 512, vec![7; 512])).await;
        replica.apply(&zero_masked(1, 257 * 4096, 4096)).await;
        let mut page = vec![2; 4096];
        page[512..1024].fill(7);
        assert_eq!(replica.read_at(1, 256 * 4096, 4096).await.expect("read"), page, "the rest of the page is what was pasted");
        replica.apply(&paste(256, &[2, 3])).await;
        assert_eq!(replica.read_at(1, 257 * 4096, 4096).await.expect("read"), [0; 4096]);
        assert_eq!(replica.read_at(1, 255 * 4096, 4096).await.expect("read"), [1; 4096]);
    });
}

#[test]
fn snapshots_and_children_see_it_as_if_it_had_always_been_there() {
    run(async {
        let mut replica = opened().await;
        replica.apply(&write(1, 0, vec![5; 4096])).await;
        replica.apply(&write(2, 4096, vec![6; 4096])).await;
        replica.apply(&paste(0, &[1, 2, 3])).await;
        assert_eq!(thin(&replica, 1, 0..3).await, [Some(5), Some(2), Some(3)], "of page 1 the snapshot has what the backup has");
        assert_eq!(thin(&replica, 2, 0..3).await, [Some(5), Some(6), Some(3)]);
        let chain = vec![Ancestor { layer: LAYER, seq: VolumeSeq(1) }];
        let at = ChunkKey { layer: LayerId(2), chunk: ChunkIndex(0) };
        let range = ReadRange { at, seq: VolumeSeq(1), chain: ReadChain::Given(chain.into()), offset: 4096, len: 4096 };
        assert_eq!(replica.read(&range).await.expect("read"), [2; 4096]);
        // The snapshot goes: what it alone saw is not passed on.
        let [after, seq, next] = [0, 1, 2].map(VolumeSeq);
        replica.apply(&Command::DropVersion(DropVersionHead { layer: LAYER, after, seq, next })).await;
        assert_eq!(thin(&replica, 2, 0..4).await, [Some(5), Some(6), Some(3), None]);
    });
}

#[test]
fn sealed_fenced_and_unopened_layers_take_pastes_and_deleted_ones_do_not() {
    run(async {
        let mut replica = Replica::new(tiny()).await;
        replica.apply(&paste(0, &[4])).await;
        replica.apply(&open()).await;
        assert_eq!(thin(&replica, 1, 0..1).await, [Some(4)], "nobody had opened it");
        let seal = ogee_proto::data::SealHead { layer: LAYER, seq: ogee_proto::data::SEALED_FOR_GOOD };
        replica.apply(&Command::Seal(seal)).await;
        replica.apply(&paste(1, &[5])).await;
        assert_eq!(thin(&replica, 1, 0..2).await, [Some(4), Some(5)]);
        let elsewhere = paste_to(CopysetId(COPYSET.0 + 1), LAYER, 2, &[6]);
        assert_eq!(refused(&mut replica, &elsewhere).await, Status::BadRequest);
        replica.apply(&Command::DropLayer(LAYER)).await;
        assert_eq!(refused(&mut replica, &paste(2, &[6])).await, Status::LayerGone);
        assert!(replica.store().versions().is_empty());
    });
}

#[test]
fn a_zero_that_masks_hides_what_is_pasted_later() {
    run(async {
        let mut replica = opened().await;
        // Nothing lies below, here: without the flag nothing is recorded.
        replica.apply(&Command::Zero(ZeroHead { at: at(1, 0, 8192), masks: false })).await;
        assert_eq!(thin(&replica, 1, 0..2).await, [None, None]);
        replica.apply(&zero_masked(1, 0, 8192)).await;
        replica.apply(&paste(0, &[1, 1, 1])).await;
        assert_eq!(thin(&replica, 1, 0..3).await, [Some(0), Some(0), Some(1)]);
    });
}

#[test]
fn pastes_are_there_after_a_crash_whatever_had_been_written_back() {
    run(async {
        let mut replica = opened().await;
        replica.apply(&paste(0, &[1, 2])).await;
        replica.checkpoint().await;
        let log = [paste(2, &[3]), write(1, 3 * 4096, vec![8; 4096]), paste(2, &[3, 4]), paste(0, &[1, 2, 3])];
        for command in &log {
            replica.apply(command).await;
        }
        replica.kill().await;
        for command in &log {
            replica.apply(command).await;
        }
        assert_eq!(thin(&replica, 1, 0..5).await, [Some(1), Some(2), Some(3), Some(8), None]);
        let base = VersionKey::new(LAYER, ChunkIndex(0), BASE_SEQ);
        assert!(replica.store().versions().contains(&base));
        replica.checkpoint().await;
        replica.kill().await;
        assert_eq!(thin(&replica, 1, 0..5).await, [Some(1), Some(2), Some(3), Some(8), None]);
    });
}

/// An entry of a kind that this build does not know, or with a flag that it does not know, is not skipped: the others would differ from this replica.
#[test]
fn an_entry_of_a_newer_build_stops_the_replica_until_that_is_upgraded() {
    run(async {
        let write = write(1, 0, vec![5; 4096]);
        for (opcode, modifier) in [(0x7f, None), (write.encode()[0], Some(2))] {
            let mut replica = opened().await;
            replica.apply(&paste(0, &[1, 2])).await;
            let mut newer = write.encode().to_vec();
            newer[0] = opcode;
            newer[1] = modifier.unwrap_or(0);
            let before = replica.next_index();
            let error = replica.try_apply_bytes(newer.clone().into()).await.expect_err("it stops");
            let error = error.source.downcast_ref::<ChunkStoreError>().expect("of the store");
            assert_eq!(error.kind(), ChunkStoreErrorKind::UnknownEntry, "{error}");
            assert!(error.to_string().contains("upgraded"), "{error}");
            replica.try_apply(&write).await.expect_err("nothing after it");
            assert_eq!(replica.next_index(), before, "it was not passed over");
            // The newer build finds the replica where it was; here the entry is one that this build knows.
            replica.kill().await;
            let again = replica.next_index();
            assert!(again <= before);
            if again < before {
                replica.apply(&open()).await;
                replica.apply(&paste(0, &[1, 2])).await;
            }
            replica.apply(&write).await;
            assert_eq!(thin(&replica, 1, 0..2).await, [Some(5), Some(2)]);
        }
    });
}
