//! One test per rule of group snapshots. What they hold is tested by `oracle`; the order of writes across volumes with
//! scripted clients (`server/mds/tests/group_holds.rs`) and real processes (`vm-tests/tests/group_cut.rs`).

use super::super::command::Command;
use super::super::row::{GroupedRow, Hold, LayerRow, SnapshotGroupRow, SnapshotState, UnsettledRow};
use super::super::{groups, info, snapshots, tasks};
use super::{Bench, GIB, group};
use crate::refusal::Refusal;
use ogee_common::id::{CopysetId, SnapshotGroupId, VolumeSnapshotId};

/// Two attached volumes `a` and `b` with a segment each, and a detached one `c`.
fn three() -> Bench {
    let mut b = Bench::with_pool(4);
    for path in ["a", "b", "c"] {
        b.create(path, 4 * GIB).expect("create");
    }
    for (path, copyset) in [("a", 1), ("b", 2)] {
        b.attach(path, 1);
        b.allocate(path, 0, copyset).expect("placed");
    }
    b
}

fn all(hold: Hold) -> [(&'static str, &'static str, Hold); 3] {
    [("b", "s", hold), ("a", "s", Hold::Held), ("c", "s", hold)]
}

fn states(b: &Bench) -> Vec<(String, SnapshotState)> {
    ["a", "b", "c"]
        .into_iter()
        .filter_map(|path| {
            let (volume, _) = b.row(path);
            let found = b.shared.read(|tx| snapshots::named(tx, volume, path, "s")).ok()?;
            Some((path.to_owned(), found.1.state))
        })
        .collect()
}

fn do_tasks(b: &mut Bench, copyset: u32) {
    let copyset = CopysetId(copyset);
    let done = b.read(|tx| tasks::of_copyset(tx, copyset)).into_iter().map(|(id, _)| (id, copyset)).collect();
    b.run(Command::TasksDone { done }).expect("done");
}

fn nothing_left(b: &Bench) {
    let left = b.read(|tx| {
        Ok((
            tx.scan::<SnapshotGroupRow>(&(), None, 9)?.len(),
            tx.scan::<GroupedRow>(&(), None, 9)?.len(),
            tx.scan::<UnsettledRow>(&(), None, 9)?.len(),
        ))
    });
    assert_eq!(left, (0, 0, 0));
}

#[test]
fn a_group_is_ready_when_confirmed_and_not_seen_before() {
    let mut b = three();
    let (id, made) = b.group(&all(Hold::Held)).expect("group");
    let holds: Vec<_> = made.iter().map(|s| (&s.volume_path[..], s.hold, s.ready, s.group)).collect();
    let expected = [("b", Hold::Held), ("a", Hold::Held), ("c", Hold::Detached)];
    assert_eq!(holds, expected.map(|(path, hold)| (path, hold, false, Some(id))), "in the order of the command");
    for path in ["a", "b", "c"] {
        assert!(b.read(|tx| info::snapshots(tx, path)).is_empty(), "{path}");
        assert!(matches!(b.rollback(path, "s"), Err(Refusal::NotReady { .. })));
    }
    assert!(matches!(b.clone_of(&made[0], "d"), Err(Refusal::NotReady { .. })));
    assert!(matches!(b.allocate("a", 1, 1), Err(Refusal::SnapshotUnderWay)));
    // The commands for single snapshots do not concern it.
    for command in [Command::ConfirmSnapshot { snapshot: made[0].id }, Command::SealSnapshot { snapshot: made[1].id }] {
        b.run(command).expect("nothing happens");
    }
    assert!(states(&b).iter().all(|(_, state)| *state == SnapshotState::Confirming));
    let (_, ready) = group(b.run(Command::ConfirmGroup { group: id })).expect("confirmed");
    assert!(ready.iter().all(|s| s.ready && s.group == Some(id)));
    assert_eq!(b.read(|tx| info::snapshots(tx, "b")), [ready[0].clone()]);
    b.allocate("a", 1, 1).expect("placed");
    b.run(Command::DropGroup { group: id }).expect("too late: nothing happens");
    assert_eq!(states(&b).len(), 3);
    assert_eq!(group(b.run(Command::ConfirmGroup { group: id })), Err(Refusal::SnapshotGone));
    let (second, _) = b.group(&[("a", "t", Hold::Held)]).expect("a group of one");
    assert_eq!(second, SnapshotGroupId(id.0 + 1));
    b.run(Command::DropGroup { group: second }).expect("dropped");
    for path in ["a", "b", "c"] {
        b.run(Command::DeleteSnapshot { path: path.into(), name: "s".into() }).expect("delete");
    }
    nothing_left(&b);
}

#[test]
fn a_group_is_made_whole_or_not_at_all() {
    let mut b = three();
    let taken = b.snapshot("c", Some("s"), Hold::Held).expect("snapshot");
    let before = b.rows();
    assert!(matches!(b.group(&all(Hold::Held)), Err(Refusal::SnapshotTaken { path, .. }) if path == "c"));
    let twice = [("a", "x", Hold::Held), ("a", "y", Hold::Held)];
    assert!(matches!(b.group(&twice), Err(Refusal::Moved { .. })));
    let same = |rows: &[(u8, Vec<u8>, Vec<u8>)]| rows.iter().filter(|(t, _, _)| *t != 1).cloned().collect::<Vec<_>>();
    assert_eq!(same(&b.rows()), same(&before), "only the position in the log moved");
    assert_eq!(taken.group, None);
}

#[test]
fn a_dropped_group_leaves_nothing_but_higher_seqs() {
    let mut b = three();
    let seq = |b: &Bench, path: &str| b.read(|tx| Ok(tx.expect::<LayerRow>(&b.row(path).1.layer)?)).seq.0;
    for hold in [Hold::Held, Hold::Bypassed] {
        let before = seq(&b, "b");
        let (id, made) = b.group(&all(hold)).expect("group");
        b.run(Command::DropGroup { group: id }).expect("dropped");
        b.run(Command::DropGroup { group: id }).expect("nothing happens");
        assert_eq!(seq(&b, "b"), before + 1);
        assert_eq!(b.run(Command::ConfirmGroup { group: id }), Err(Refusal::SnapshotGone));
        assert!(b.read(|tx| Ok(tx.get::<GroupedRow>(&made[0].id)?)).is_none());
        nothing_left(&b);
        assert_eq!(b.row("a").1.snapshots, 0);
        for copyset in [1, 2, 1, 2] {
            do_tasks(&mut b, copyset);
        }
        let layer: LayerRow = b.read(|tx| Ok(tx.expect(&b.row("b").1.layer)?));
        assert_eq!((layer.confirming, layer.seals, layer.snapshots), (0, 0, 0));
    }
    b.group(&all(Hold::Held)).expect("the names are free again");
}

#[test]
fn a_bypassed_client_must_be_sealed_off_first() {
    let mut b = three();
    let (id, _) = b.group(&all(Hold::Bypassed)).expect("group");
    let sealed = |b: &Bench| b.read(|tx| groups::bypassed_are_sealed(tx, id));
    assert!(!sealed(&b));
    assert_eq!(b.run(Command::ConfirmGroup { group: id }), Err(Refusal::SnapshotUnderWay));
    do_tasks(&mut b, 2);
    assert!(sealed(&b));
    let (_, made) = group(b.run(Command::ConfirmGroup { group: id })).expect("confirmed");
    assert!(made.iter().all(|s| s.ready));
    assert_eq!(made.iter().map(|s| s.hold).collect::<Vec<_>>(), [Hold::Bypassed, Hold::Held, Hold::Detached]);
}

#[test]
fn nobody_may_attach_a_detached_volume_while_a_bypassed_client_can_write() {
    let mut b = three();
    let (id, _) = b.group(&all(Hold::Bypassed)).expect("group");
    b.attach("c", 1);
    do_tasks(&mut b, 2);
    assert!(matches!(b.run(Command::ConfirmGroup { group: id }), Err(Refusal::Moved { .. })));
    b.run(Command::DropGroup { group: id }).expect("dropped");
    // Where all held, the commit was the cut: who comes later is no part of it.
    let mut b = three();
    let (id, _) = b.group(&all(Hold::Held)).expect("group");
    b.attach("c", 1);
    b.run(Command::ConfirmGroup { group: id }).expect("confirmed");
}

#[test]
fn the_seal_of_an_older_attach_is_not_waited_for() {
    let mut b = three();
    // Taken over: writes of the attach before may still land in copysets that the new one has not touched.
    b.attach("a", 2);
    let (id, _) = b.group(&all(Hold::Held)).expect("group");
    let (_, made) = group(b.run(Command::ConfirmGroup { group: id })).expect("confirmed");
    assert_eq!(made.iter().map(|s| s.ready).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(b.read(|tx| info::snapshots(tx, "a")).len(), 1, "listed as not ready");
    do_tasks(&mut b, 1);
    assert!(states(&b).iter().all(|(_, state)| *state == SnapshotState::Ready));
    nothing_left_under_way(&b);
}

fn nothing_left_under_way(b: &Bench) {
    let left = b.read(|tx| Ok(tx.scan::<SnapshotGroupRow>(&(), None, 9)?.len() + tx.scan::<UnsettledRow>(&(), None, 9)?.len()));
    assert_eq!(left, 0);
}

#[test]
fn a_group_that_lost_a_snapshot_is_not_confirmed() {
    let mut b = three();
    let (id, made) = b.group(&all(Hold::Held)).expect("group");
    let unknown = SnapshotGroupId(id.0 + 1);
    assert_eq!(b.run(Command::ConfirmGroup { group: unknown }), Err(Refusal::SnapshotGone));
    assert_eq!(b.read(|tx| groups::under_way(tx, VolumeSnapshotId(999))), None);
    assert_eq!(b.read(|tx| groups::under_way(tx, made[0].id)), Some(id));
    b.run(Command::DeleteSnapshot { path: "c".into(), name: "s".into() }).expect("delete");
    assert_eq!(b.run(Command::ConfirmGroup { group: id }), Err(Refusal::SnapshotGone));
    b.run(Command::DropGroup { group: id }).expect("dropped");
    assert!(states(&b).is_empty());
    nothing_left(&b);
}
