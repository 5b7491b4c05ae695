//! One test per rule of the state machine.

use super::super::command::{Command, Outcome, Registration};
use super::super::info::{self, Listed, Listing};
use super::super::row::{
    CopysetRow, Hold, LayerRow, Row as _, SegmentRow, SnapshotState, TaskEffect, TaskKind, TaskRow, VolumeRow,
};
use super::super::{layers, snapshots, tasks, topology};
use super::{Bench, CLUSTER, GIB, registration};
use crate::refusal::{Refusal, USERS_SHOWN_MAX};
use ogee_common::id::{AttachEpoch, ChunkserverId, CopysetId, LayerId, ReplicaId, SegmentIndex, VolumeSeq};
use ogee_common::limits::ANCESTRY_DEPTH_MAX;

fn all_tasks(bench: &Bench) -> Vec<TaskRow> {
    bench.read(|tx| Ok(tx.scan::<TaskRow>(&(), None, 1000)?.into_iter().map(|(_, t)| t).collect()))
}

fn do_all_tasks(bench: &mut Bench, copysets: u32) {
    loop {
        let mut done = vec![];
        for copyset in (1..=copysets).map(CopysetId) {
            done.extend(bench.read(|tx| tasks::of_copyset(tx, copyset)).into_iter().map(|(id, _)| (id, copyset)));
        }
        if done.is_empty() {
            return;
        }
        bench.run(Command::TasksDone { done }).expect("done");
    }
}

fn layer(bench: &Bench, id: LayerId) -> LayerRow {
    bench.read(|tx| Ok(tx.expect(&id)?))
}

fn segment(bench: &Bench, id: LayerId, index: u32) -> Option<SegmentRow> {
    let row = layer(bench, id);
    bench.read(|tx| layers::placement(tx, id, &row, SegmentIndex(index), 1)).remove(&SegmentIndex(index))
}

#[test]
fn names_are_checked_where_they_matter() {
    let mut b = Bench::with_pool(2);
    b.create("f/a", GIB).expect("create");
    assert!(matches!(b.create("f/a", GIB), Err(Refusal::PathTaken { .. })));
    assert!(matches!(b.create("f", GIB), Err(Refusal::PathTaken { .. })));
    assert!(matches!(b.create("f/a/x", GIB), Err(Refusal::NotAFolder { .. })));
    let create = |path: &str, size_bytes, pool: &str| Command::CreateVolume {
        path: path.into(),
        size_bytes,
        owner: "ann".into(),
        create_parents: false,
        pool: pool.into(),
    };
    assert!(matches!(b.run(create("no/x", GIB, "")), Err(Refusal::NoSuchFolder { .. })));
    assert!(matches!(b.run(create("x", GIB + 1, "")), Err(Refusal::BadSize { .. })));
    assert!(matches!(b.run(create("x", 4096, "")), Err(Refusal::BadSize { .. })));
    assert!(matches!(b.run(create("x", GIB, "none")), Err(Refusal::NoSuchPool { .. })));
    b.run(create("x", GIB, "p")).expect("create");
    assert!(matches!(b.delete("f"), Err(Refusal::FolderNotEmpty { .. })));
    assert!(matches!(b.delete("x"), Err(Refusal::WrongOwner)));
    assert!(matches!(b.delete("nothing"), Err(Refusal::NoSuchVolume { .. })));
    b.run(Command::DeleteVolume { path: "x".into(), owner: "ann".into() }).expect("delete");
    b.delete("f/a").expect("delete");
    b.delete("f").expect("an empty folder");
    assert_eq!(Bench::empty().create("a", GIB), Err(Refusal::NoPool));
}

#[test]
fn volumes_only_grow() {
    let mut b = Bench::with_pool(1);
    b.create("a", 2 * GIB).expect("create");
    let extend = |size_bytes| Command::ExtendVolume { path: "a".into(), size_bytes };
    b.run(extend(3 * GIB)).expect("grow");
    b.run(extend(3 * GIB)).expect("the same again");
    assert!(matches!(b.run(extend(GIB)), Err(Refusal::Shrink { .. })));
    assert!(matches!(b.run(extend(3 * GIB + 512)), Err(Refusal::BadSize { .. })));
    assert_eq!(b.row("a").1.size_bytes, 3 * GIB);
}

#[test]
fn listings_page_in_path_order() {
    let mut b = Bench::with_pool(1);
    for path in ["b", "f/a", "f/g/x", "f/g/y", "f/z", "h"] {
        b.create(path, GIB).expect("create");
    }
    let list = |directory: &str, recursive: bool, start_after: &str, limit: usize| {
        let listing = Listing { directory, recursive, start_after, limit };
        let (found, more) = b.read(|tx| info::list(tx, &listing));
        let name = |l: Listed| match l {
            Listed::Folder(path) => path + "/",
            Listed::Volume(info, _) => info.path,
        };
        (found.into_iter().map(name).collect::<Vec<_>>(), more)
    };
    let all = ["b", "f/", "f/a", "f/g/", "f/g/x", "f/g/y", "f/z", "h"];
    assert_eq!(list("", true, "", 100), (all.map(String::from).to_vec(), false));
    for (at, after) in all.iter().enumerate() {
        for limit in 1..4 {
            let rest = &all[at + 1..];
            let expected: Vec<String> = rest.iter().take(limit).map(ToString::to_string).collect();
            let after = after.trim_end_matches('/');
            assert_eq!(list("", true, after, limit), (expected, rest.len() > limit), "after {after}");
        }
    }
    assert_eq!(list("", false, "", 10).0, ["b", "f/", "h"]);
    assert_eq!(list("f", false, "f/a", 10).0, ["f/g/", "f/z"]);
    assert_eq!(list("f/g", true, "", 1), (vec!["f/g/x".to_owned()], true));
}

#[test]
fn a_held_snapshot_is_ready_when_confirmed_and_stops_placement_until_then() {
    let mut b = Bench::with_pool(4);
    b.create("a", 4 * GIB).expect("create");
    b.attach("a", 1);
    b.allocate("a", 0, 1).expect("placed");
    let info = b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    assert!(info.confirming && !info.ready);
    assert!(matches!(b.allocate("a", 1, 2), Err(Refusal::SnapshotUnderWay)));
    b.allocate("a", 0, 3).expect("what is placed stays known");
    let confirm = Command::ConfirmSnapshot { snapshot: info.id };
    let again = super::snapshot(b.run(confirm.clone())).expect("confirmed");
    assert!(again.ready && again.hold == Hold::Held);
    assert_eq!(super::snapshot(b.run(confirm)), Ok(again));
    b.allocate("a", 1, 2).expect("placed");
    assert!(all_tasks(&b).is_empty());
}

#[test]
fn a_snapshot_needs_the_state_that_the_leader_saw() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    let (volume, row) = b.row("a");
    let expected = b.read(|tx| super::attach::expected(tx, &row));
    b.attach("a", 1);
    let command = |hold| Command::CreateSnapshot { volume, name: Some("s".into()), expected, hold };
    assert!(matches!(b.run(command(Hold::Detached)), Err(Refusal::Moved { .. })));
    assert!(matches!(b.run(command(Hold::Held)), Err(Refusal::Moved { .. })));
    let before = b.rows().len();
    assert!(b.run(command(Hold::Bypassed)).is_err());
    assert_eq!(b.rows().len(), before, "a refusal changes nothing");
}

#[test]
fn a_bypassed_snapshot_waits_for_every_copyset_and_new_segments_are_sealed_first() {
    let mut b = Bench::with_pool(5);
    b.create("a", 4 * GIB).expect("create");
    b.attach("a", 1);
    b.allocate("a", 0, 1).expect("placed");
    b.allocate("a", 1, 2).expect("placed");
    let info = b.snapshot("a", Some("s"), Hold::Bypassed).expect("snapshot");
    assert!(!info.ready && !info.confirming);
    assert!(matches!(b.clone_of(&info, "c"), Err(Refusal::NotReady { .. })));
    assert!(matches!(b.rollback("a", "s"), Err(Refusal::NotReady { .. })));
    let (volume, row) = b.row("a");
    let Ok(Outcome::Segment { sealing: Some(task), .. }) = b.allocate("a", 2, 3) else { panic!("not sealed") };
    let expected = TaskRow {
        layer: row.layer,
        kind: TaskKind::Seal(VolumeSeq(2)),
        effect: TaskEffect::SegmentOpen(SegmentIndex(2)),
        remaining: 1,
    };
    assert_eq!(b.read(|tx| Ok(tx.expect::<TaskRow>(&task)?)), expected);
    let done = |b: &mut Bench, copyset| {
        let tasks = b.read(|tx| tasks::of_copyset(tx, CopysetId(copyset)));
        let done = tasks.into_iter().map(|(id, _)| (id, CopysetId(copyset))).collect();
        b.run(Command::TasksDone { done }).expect("done");
        b.read(|tx| Ok(snapshots::named(tx, volume, "a", "s")?.1.state))
    };
    assert!(matches!(done(&mut b, 1), SnapshotState::Sealing(_)));
    assert!(matches!(done(&mut b, 1), SnapshotState::Sealing(_)), "a repeated report counts once");
    assert_eq!(done(&mut b, 2), SnapshotState::Ready);
    assert_eq!(segment(&b, row.layer, 2).and_then(|s| s.sealing), Some(task));
    done(&mut b, 3);
    assert_eq!(segment(&b, row.layer, 2).and_then(|s| s.sealing), None);
    assert!(all_tasks(&b).is_empty());
}

#[test]
fn an_attach_that_did_not_end_makes_snapshots_seal() {
    let mut b = Bench::with_pool(2);
    b.create("a", GIB).expect("create");
    let first = b.attach("a", 1);
    b.allocate("a", 0, 1).expect("placed");
    let second = b.attach("a", 2);
    assert!(second > first);
    let (volume, row) = b.row("a");
    let refused = b.allocate_as(volume, first, row.layer, 0, 1);
    assert_eq!(refused, Err(Refusal::Fenced { given: first, current: second }));
    assert!(matches!(
        b.run(Command::DetachVolume { volume, epoch: first }),
        Err(Refusal::Fenced { .. })
    ));
    b.run(Command::DetachVolume { volume, epoch: second }).expect("detach");
    let info = b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    assert!(!info.ready, "the first client may still write");
    do_all_tasks(&mut b, 2);
    assert_eq!(b.read(|tx| Ok(snapshots::named(tx, volume, "a", "s")?.1.state)), SnapshotState::Ready);
}

#[test]
fn a_detach_that_gave_writes_up_makes_snapshots_seal() {
    let mut b = Bench::with_pool(2);
    b.create("a", GIB).expect("create");
    let epoch = b.attach("a", 1);
    b.allocate("a", 0, 1).expect("placed");
    let (volume, _) = b.row("a");
    b.run(Command::DetachUnclean { volume, epoch }).expect("detach");
    // The answer was lost and the client says it again; a clean one cannot take it back.
    b.run(Command::DetachVolume { volume, epoch }).expect("repeated");
    let info = b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    assert!(!info.ready, "a write that was given up may still land");
    do_all_tasks(&mut b, 2);
    assert_eq!(b.read(|tx| Ok(snapshots::named(tx, volume, "a", "s")?.1.state)), SnapshotState::Ready);
}

#[test]
fn attaches_exclude_each_other() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    let epoch = b.attach("a", 1);
    let attach = |takes_over| Command::AttachVolume {
        path: "a".into(),
        client: 2,
        description: "other".into(),
        takes_over,
    };
    assert!(matches!(b.run(attach(None)), Err(Refusal::Attached { by, .. }) if by == "client 1"));
    assert!(matches!(b.run(attach(Some(AttachEpoch(epoch.0 + 9)))), Err(Refusal::Attached { .. })));
    assert!(matches!(b.delete("a"), Err(Refusal::Attached { .. })));
    b.run(attach(Some(epoch))).expect("taken over");
    let (volume, row) = b.row("a");
    b.run(Command::DetachVolume { volume, epoch: row.epoch }).expect("detach");
    assert!(b.attach("a", 1) > row.epoch, "an epoch is never given out again");
}

#[test]
fn a_clone_refers_to_placements_and_writes_few_rows_whatever_its_size() {
    let mut b = Bench::with_pool(8);
    let size = 64 * GIB;
    b.create("golden", size).expect("create");
    b.attach("golden", 1);
    for index in 0..64 {
        b.allocate("golden", index, index % 8 + 1).expect("placed");
    }
    let (volume, row) = b.row("golden");
    b.run(Command::DetachVolume { volume, epoch: row.epoch }).expect("detach");
    let snapshot = b.snapshot("golden", Some("v1"), Hold::Held).expect("snapshot");
    let segments = SegmentRow::TABLE.number;
    let before = (b.rows().len(), b.count(segments));
    let began = ogee_common::clock::now();
    let clone = b.clone_of(&snapshot, "vm/disk0").expect("clone");
    let cloned = began.elapsed();
    assert_eq!(b.count(segments), before.1);
    assert!(b.rows().len() <= before.0 + 8, "a clone writes a fixed number of rows");
    assert_eq!((clone.allocated_segments, clone.size_bytes, clone.depth), (64, size, 1));
    assert_eq!(clone.parent, "golden@v1");
    for index in 0..64 {
        assert_eq!(segment(&b, clone.layer, index), segment(&b, row.layer, index));
    }
    let mine = b.snapshot("vm/disk0", Some("s"), Hold::Held).expect("snapshot");
    let before = b.rows().len();
    let began = ogee_common::clock::now();
    let back = b.rollback("vm/disk0", "s").expect("rollback");
    let rolled = began.elapsed();
    assert!(b.rows().len() <= before + 8, "a rollback writes a fixed number of rows");
    assert_eq!((back.allocated_segments, back.depth, mine.children), (64, 2, 0));
    println!("64 GiB, all placed: clone {cloned:?}, rollback {rolled:?}");
}


#[test]
fn what_an_ancestor_places_later_is_not_seen_below() {
    let mut b = Bench::with_pool(8);
    b.create("a", 4 * GIB).expect("create");
    b.attach("a", 1);
    b.allocate("a", 0, 1).expect("placed");
    let info = b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    b.run(Command::ConfirmSnapshot { snapshot: info.id }).expect("ready");
    let clone = b.clone_of(&info, "c").expect("clone");
    b.attach("c", 2);
    b.allocate("a", 1, 5).expect("placed by the parent after the clone");
    assert_eq!(segment(&b, clone.layer, 1), None);
    let Ok(Outcome::Segment { copysets, .. }) = b.allocate("c", 0, 7) else { panic!("refused") };
    assert_eq!(copysets[0], CopysetId(1), "the clone's chunk lies where the parent's does");
    let Ok(Outcome::Segment { copysets, .. }) = b.allocate("c", 1, 7) else { panic!("refused") };
    assert_eq!(copysets[0], CopysetId(7), "the parent had nothing there");
}

#[test]
fn deleting_a_snapshot_merges_into_the_next_seq_that_is_needed() {
    let mut b = Bench::with_pool(2);
    b.create("a", GIB).expect("create");
    b.attach("a", 1);
    b.allocate("a", 0, 1).expect("placed");
    let (volume, row) = b.row("a");
    b.run(Command::DetachVolume { volume, epoch: row.epoch }).expect("detach");
    for name in ["s1", "s2", "s3"] {
        b.snapshot("a", Some(name), Hold::Held).expect("snapshot");
    }
    let delete = |name: &str| Command::DeleteSnapshot { path: "a".into(), name: name.into() };
    for name in ["s2", "s3", "s1"] {
        b.run(delete(name)).expect("delete");
    }
    assert!(matches!(b.run(delete("s1")), Err(Refusal::NoSuchSnapshot { .. })));
    let drop_version = |after, seq, next| TaskKind::DropVersion {
        after: VolumeSeq(after),
        seq: VolumeSeq(seq),
        next: VolumeSeq(next),
    };
    let kinds: Vec<_> = all_tasks(&b).into_iter().map(|t| t.kind).collect();
    assert_eq!(kinds, [drop_version(1, 2, 3), drop_version(1, 3, 4), drop_version(0, 1, 4)]);
    let offered = b.read(|tx| tasks::of_copyset(tx, CopysetId(1)));
    assert_eq!(offered.len(), 1, "one after the other in one copyset");
    assert_eq!(offered[0].1.kind, drop_version(1, 2, 3));
    do_all_tasks(&mut b, 2);
    assert!(all_tasks(&b).is_empty());
}

#[test]
fn used_things_are_not_deleted_and_say_who_uses_them() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    let info = b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    for n in 0..USERS_SHOWN_MAX + 2 {
        b.clone_of(&info, &format!("c{n:02}")).expect("clone");
    }
    let delete = Command::DeleteSnapshot { path: "a".into(), name: "s".into() };
    match b.run(delete.clone()) {
        Err(Refusal::HasClones { volumes, more }) => {
            assert_eq!((volumes.len(), more), (USERS_SHOWN_MAX, true));
            assert_eq!(volumes[0], "c00");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(b.delete("a"), Err(Refusal::HasSnapshots { names, more: false }) if names == ["s"]));
    for n in 0..USERS_SHOWN_MAX + 2 {
        b.delete(&format!("c{n:02}")).expect("delete");
    }
    b.run(delete).expect("delete");
    b.delete("a").expect("delete");
}

#[test]
fn a_clone_of_a_live_volume_keeps_its_hidden_snapshot_as_long_as_it_lives() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    let hidden = b.snapshot("a", None, Hold::Held).expect("snapshot");
    assert_eq!(hidden.name, format!(".clone-{}", hidden.id.0));
    b.clone_of(&hidden, "c").expect("clone");
    assert_eq!(b.row("a").1.snapshots, 0);
    assert!(b.read(|tx| info::snapshots(tx, "a")).is_empty());
    assert!(matches!(b.delete("a"), Err(Refusal::HasClones { volumes, .. }) if volumes == ["c"]));
    b.delete("c").expect("delete");
    assert_eq!(b.snapshot("a", None, Hold::Held).expect("a second").name, ".clone-2");
    b.delete("a").expect("hidden snapshots without clones go along");
    assert_eq!(b.read(|tx| Ok(tx.scan::<VolumeRow>(&(), None, 9)?.len())), 0);
    assert_eq!(b.read(|tx| Ok(tx.scan::<LayerRow>(&(), None, 9)?.len())), 0);
}

#[test]
fn a_volume_that_was_rolled_back_can_lose_its_snapshot_and_itself() {
    let mut b = Bench::with_pool(2);
    b.create("a", GIB).expect("create");
    b.attach("a", 1);
    b.allocate("a", 0, 2).expect("placed");
    let (volume, row) = b.row("a");
    b.run(Command::DetachVolume { volume, epoch: row.epoch }).expect("detach");
    b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    b.run(Command::ExtendVolume { path: "a".into(), size_bytes: 2 * GIB }).expect("grow");
    let back = b.rollback("a", "s").expect("rollback");
    assert_eq!(back.size_bytes, GIB, "the size goes back too");
    assert_eq!(b.read(|tx| info::snapshots(tx, "a")).len(), 1, "the snapshot stays listed");
    b.run(Command::DeleteSnapshot { path: "a".into(), name: "s".into() }).expect("delete");
    assert!(b.read(|tx| info::snapshots(tx, "a")).is_empty());
    b.snapshot("a", Some("s"), Hold::Held).expect("the name is free");
    b.run(Command::DeleteSnapshot { path: "a".into(), name: "s".into() }).expect("delete");
    b.delete("a").expect("delete");
    do_all_tasks(&mut b, 2);
    assert_eq!(b.read(|tx| Ok(tx.scan::<LayerRow>(&(), None, 9)?.len())), 0);
}

#[test]
fn rollback_with_a_client_needs_its_consent_and_fences_it() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    let epoch = b.attach("a", 1);
    let refused = b.run(Command::RollbackVolume { path: "a".into(), snapshot: "s".into(), ends: None });
    assert!(matches!(refused, Err(Refusal::Attached { .. })));
    let back = b.rollback("a", "s").expect("rollback");
    assert!(back.epoch > epoch && back.attached_by.is_none());
    // The client wrote nowhere yet, so there is no copyset to fence it in.
    let volume = b.row("a").0;
    assert!(b.read(|tx| layers::is_fenced(tx, volume)));
}

#[test]
fn rollback_from_a_client_fences_it_in_every_copyset_of_the_old_head() {
    let mut b = Bench::with_pool(2);
    b.create("a", GIB).expect("create");
    b.snapshot("a", Some("s"), Hold::Held).expect("snapshot");
    b.attach("a", 1);
    b.allocate("a", 0, 1).expect("a segment");
    let volume = b.row("a").0;
    b.rollback("a", "s").expect("rollback");
    assert!(!b.read(|tx| layers::is_fenced(tx, volume)));
    // Nobody else writes meanwhile, whatever became of the leader that took the volume.
    assert!(matches!(b.try_attach("a", 2), Err(Refusal::MaybeAttached { .. })));
    do_all_tasks(&mut b, 2);
    assert!(b.read(|tx| layers::is_fenced(tx, volume)));
    b.attach("a", 2);
    let epoch = b.row("a").1.epoch;
    b.run(Command::DetachVolume { volume, epoch }).expect("detach");
    // Without a client nothing is fenced.
    b.rollback("a", "s").expect("rollback");
    assert!(b.read(|tx| layers::is_fenced(tx, volume)));
}

#[test]
fn ancestry_has_an_end() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    let mut refused = None;
    for n in 0..=ANCESTRY_DEPTH_MAX {
        let name = format!("s{n}");
        b.snapshot("a", Some(&name), Hold::Held).expect("snapshot");
        refused = b.rollback("a", &name).err();
    }
    assert_eq!(refused, Some(Refusal::TooDeep { depth: 65 }));
    assert_eq!(layer(&b, b.row("a").1.layer).depth, 64);
}

#[test]
fn a_repeated_request_gets_the_first_answer() {
    use super::super::command::Envelope;
    let mut b = Bench::with_pool(1);
    let create = |request: u8| Envelope {
        now_unix_ms: 5,
        request: Some([request; 16]),
        command: Command::CreateVolume {
            path: "a".into(),
            size_bytes: GIB,
            owner: String::new(),
            create_parents: false,
            pool: String::new(),
        },
    };
    let first = b.apply(&create(1)).expect("create");
    assert_eq!(b.apply(&create(1)), Ok(first));
    assert!(matches!(b.apply(&create(2)), Err(Refusal::PathTaken { .. })));
    b.delete("a").expect("delete");
    assert!(b.apply(&create(2)).is_ok(), "a refusal is not kept");
}

#[test]
fn disks_keep_their_identity() {
    let mut b = Bench::with_pool(1);
    let register = |r: Registration| Command::RegisterChunkserver(r);
    let known = Registration { id: ChunkserverId(1), cluster: Some(CLUSTER), ..registration(1) };
    let same = Outcome::Registered { id: ChunkserverId(1), cluster: CLUSTER };
    assert_eq!(b.run(register(known.clone())), Ok(same.clone()));
    assert_eq!(b.run(register(registration(1))), Ok(same), "it crashed before it wrote its superblock");
    let wrong = Registration { id: ChunkserverId(2), ..known.clone() };
    assert!(matches!(b.run(register(wrong)), Err(Refusal::WrongIdentity(_))));
    let foreign = Registration { uuid: [9; 16], ..known.clone() };
    assert!(matches!(b.run(register(foreign)), Err(Refusal::WrongIdentity(_))));
    let other = Registration { cluster: Some([0; 16]), ..known.clone() };
    assert_eq!(b.run(register(other)), Err(Refusal::WrongCluster));
    let moved = Registration { zone: "z9".into(), ..known };
    assert!(matches!(b.run(register(moved)), Err(Refusal::PlaceFixed(_))));
    let new = b.run(register(registration(4))).expect("a new disk");
    assert_eq!(new, Outcome::Registered { id: ChunkserverId(4), cluster: CLUSTER });
    assert!(b.shared.read(|tx| topology::identified(tx, ChunkserverId(1), [2; 16])).is_err());
    assert_eq!(Bench::empty().run(register(registration(1))), Err(Refusal::NotFormed));
}

#[test]
fn pools_are_planned_on_what_is_there() {
    let mut b = Bench::with_pool(2);
    let hosts = |ids: [u32; 3]| ids.map(ChunkserverId).to_vec();
    let create = |name: &str, copysets| Command::CreatePool { name: name.into(), replicas: 3, copysets };
    assert!(matches!(b.run(create("p", vec![])), Err(Refusal::PoolTaken { .. })));
    assert_eq!(b.run(create("q", vec![hosts([1, 2, 3])])), Err(Refusal::PlanOutdated), "they are in another pool");
    let copysets = b.read(|tx| Ok(tx.scan::<CopysetRow>(&(), None, 9)?));
    let replicas: Vec<u64> = copysets.iter().flat_map(|(_, c)| &c.replicas).map(|r| r.replica.0).collect();
    assert_eq!(replicas, [1, 2, 3, 4, 5, 6], "replica ids are never given out twice");
    b.run(Command::ReplicasCreated { replicas: vec![(CopysetId(1), ReplicaId(2)), (CopysetId(1), ReplicaId(9))] })
        .expect("created");
    let created: Vec<bool> =
        b.read(|tx| Ok(tx.expect::<CopysetRow>(&CopysetId(1))?)).replicas.iter().map(|r| r.created).collect();
    assert_eq!(created, [false, true, false]);
    assert!(matches!(b.create("a", GIB).and_then(|_| {
        b.attach("a", 1);
        b.allocate("a", 0, 77).map(|_| ())
    }), Err(Refusal::ForeignCopyset(CopysetId(77)))));
    assert!(matches!(b.allocate("a", 1, 1), Err(Refusal::BehindEnd(_))));
}
