//! Volumes that stand on backups: what inherits it, what is refused meanwhile, and where their segments lie.

use super::super::command::{Command, Grant, Outcome};
use super::super::row::{BackupRow, Hold, VolumeOptionsRow};
use super::super::{attach, backups, layers};
use super::{Bench, GIB, volume};
use crate::refusal::Refusal;
use ogee_common::id::{CopysetId, LayerId, SegmentIndex};

const BACKUPS_TABLE: u8 = 37;
const SEGMENTS_TABLE: u8 = 8;

fn backup(size_bytes: u64) -> BackupRow {
    BackupRow { repository: "main".into(), backup: 7, root: [1; 32], leaves: [2; 32], size_bytes, block_bytes: 256 << 10 }
}

fn lazy_with(b: &mut Bench, path: &str, backup: BackupRow, placements: Vec<Vec<CopysetId>>) -> Result<Outcome, Refusal> {
    b.run(Command::CreateLazyVolume {
        path: path.into(),
        size_bytes: 4 * GIB,
        owner: String::new(),
        create_parents: true,
        pool: String::new(),
        options: VolumeOptionsRow::default(),
        backup,
        placements,
    })
}

/// A volume of 4 GiB on a backup of a bit more than 2.
fn lazy(b: &mut Bench, path: &str) -> LayerId {
    let placements = vec![vec![CopysetId(1); 64], vec![CopysetId(2); 64]];
    volume(lazy_with(b, path, backup(2 * GIB + 4096), placements)).expect("create").layer
}

fn below(b: &Bench, path: &str) -> Option<LayerId> {
    let layer = b.row(path).1.layer;
    b.read(|tx| backups::below(tx, layer)).map(|(layer, _)| layer)
}

fn placed(b: &Bench, path: &str) -> Vec<(u32, CopysetId)> {
    let layer = b.row(path).1.layer;
    let rows = b.read(|tx| layers::placement(tx, layer, &tx.expect(&layer)?, SegmentIndex(0), 64));
    rows.into_iter().map(|(index, row)| (index.0, row.copysets[0])).collect()
}

fn flatten(b: &mut Bench, path: &str) -> Result<Outcome, Refusal> {
    b.run(Command::FlattenVolume { path: path.into(), cancels: false })
}

#[test]
fn every_segment_of_the_backup_is_placed_for_all_that_will_stand_on_it() {
    let mut b = Bench::with_pool(3);
    let layer = lazy(&mut b, "a");
    let all = [(0, CopysetId(1)), (1, CopysetId(2)), (2, CopysetId(1))];
    assert_eq!(placed(&b, "a"), all);
    let snapshot = b.snapshot("a", None, Hold::Detached).expect("snapshot");
    b.clone_of(&snapshot, "c").expect("clone");
    assert_eq!(placed(&b, "c"), all);
    // The client of a child is told the same copysets, also for what nobody has written.
    b.attach("c", 5);
    let Outcome::Segment { copysets, sealing } = b.allocate("c", 2, 3).expect("placed already") else { panic!("a segment") };
    assert_eq!((copysets[0], sealing), (CopysetId(1), None));
    // Behind the backup a segment is placed as usual.
    let Outcome::Segment { copysets, .. } = b.allocate("c", 3, 3).expect("placed") else { panic!("a segment") };
    assert_eq!(copysets[0], CopysetId(3));
    assert_eq!(b.row("a").1.layer, layer);
}

#[test]
fn what_stands_on_the_layer_stands_on_the_backup_until_it_is_complete() {
    let mut b = Bench::with_pool(2);
    let layer = lazy(&mut b, "a");
    let first = b.snapshot("a", Some("s"), Hold::Detached).expect("snapshot");
    b.clone_of(&first, "c").expect("clone");
    b.rollback("a", "s").expect("rollback");
    b.create("plain", GIB).expect("create");
    for path in ["a", "c"] {
        assert_eq!(below(&b, path), Some(layer), "{path}");
        assert!(matches!(flatten(&mut b, path), Err(Refusal::Hydrating { backup: 7, .. })), "{path}");
    }
    assert_eq!(below(&b, "plain"), None);
    let listed = b.read(|tx| backups::list(tx, LayerId(0), 9));
    assert_eq!(listed, [(layer, backup(2 * GIB + 4096), Some("a".to_owned()))]);
    assert!(b.read(|tx| backups::list(tx, layer, 9)).is_empty());
    for _ in 0..2 {
        assert_eq!(b.run(Command::CompleteBackup { layer }), Ok(Outcome::Done), "also twice");
    }
    assert_eq!((below(&b, "a"), below(&b, "c"), b.count(BACKUPS_TABLE)), (None, None, 0));
    flatten(&mut b, "c").expect("nothing is missing any more");
    assert_eq!(b.run(Command::CompleteBackup { layer: LayerId(999) }), Ok(Outcome::Done), "a layer that is gone");
}

#[test]
fn the_row_goes_with_the_layer() {
    let mut b = Bench::with_pool(1);
    let placements = vec![vec![CopysetId(1); 64]];
    volume(lazy_with(&mut b, "a", backup(GIB), placements)).expect("create");
    let snapshot = b.snapshot("a", None, Hold::Detached).expect("snapshot");
    b.clone_of(&snapshot, "c").expect("clone");
    b.run(Command::RenameVolume { path: "a".into(), new_path: "z".into(), create_parents: false }).expect("rename");
    assert_eq!(b.read(|tx| backups::list(tx, LayerId(0), 9))[0].2.as_deref(), Some("z"));
    b.delete("c").expect("delete");
    assert_eq!(b.count(BACKUPS_TABLE), 1, "its own volume needs it");
    b.delete("z").expect("delete");
    assert_eq!(b.count(BACKUPS_TABLE), 0);
}

#[test]
fn nonsense_is_refused_and_leaves_nothing() {
    let mut b = Bench::with_pool(1);
    let one = vec![vec![CopysetId(1); 64]];
    assert!(matches!(lazy_with(&mut b, "a", backup(5 * GIB), one.clone()), Err(Refusal::BadSize { .. })));
    assert!(matches!(lazy_with(&mut b, "a", backup(GIB), vec![]), Err(Refusal::PlanOutdated)));
    assert!(matches!(lazy_with(&mut b, "a", backup(GIB), vec![vec![CopysetId(1); 63]]), Err(Refusal::PlanOutdated)));
    assert!(matches!(lazy_with(&mut b, "a", backup(GIB), vec![vec![CopysetId(9); 64]]), Err(Refusal::ForeignCopyset(_))));
    assert_eq!((b.count(BACKUPS_TABLE), b.count(SEGMENTS_TABLE)), (0, 0));
    volume(lazy_with(&mut b, "a", backup(GIB), one.clone())).expect("create");
    assert!(matches!(lazy_with(&mut b, "a", backup(GIB), one), Err(Refusal::PathTaken { .. })));
}

/// What an attach of a volume would be told to stand on, by the very command.
fn granted(b: &mut Bench, path: &str) -> Grant {
    let takes_over = b.row(path).1.attached.map(|a| a.epoch);
    let attach = Command::AttachVolume { path: path.into(), client: 5, description: String::new(), takes_over };
    match b.run(attach) {
        Ok(Outcome::Attached(grant)) => *grant,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_grant_has_ancestry_and_backup_of_one_state() {
    let mut b = Bench::with_pool(2);
    let layer = lazy(&mut b, "a");
    let first = b.snapshot("a", Some("s"), Hold::Detached).expect("snapshot");
    b.clone_of(&first, "c").expect("clone");
    b.create("plain", GIB).expect("create");
    let on = Some((layer, backup(2 * GIB + 4096)));
    let grants = [granted(&mut b, "a"), granted(&mut b, "c"), b.read(|tx| attach::read_only(tx, "a", Some("s")))];
    for grant in &grants {
        assert_eq!(grant.backup, on);
        assert_eq!(grant.ancestry.last().map_or(grant.layer, |(layer, _)| *layer), layer);
    }
    assert_eq!(granted(&mut b, "plain").backup, None);
    // What was granted before another state is what the state was: ancestry and backup, also when the client hears of it later.
    let before = granted(&mut b, "a");
    b.run(Command::DetachVolume { volume: before.volume.id, epoch: before.epoch }).expect("detach");
    b.rollback("a", "s").expect("rollback");
    b.run(Command::CompleteBackup { layer }).expect("complete");
    assert_eq!((before.layer, before.backup), (layer, on));
    assert_eq!(granted(&mut b, "a").backup, None);
}
