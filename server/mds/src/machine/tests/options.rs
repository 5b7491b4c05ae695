//! Options of volumes: sector sizes and limits.

use super::super::command::{Command, Outcome};
use super::super::options;
use super::super::row::{Hold, VolumeOptionsRow};
use super::{Bench, GIB, volume};
use crate::refusal::Refusal;
use ogee_common::qos::{LimitChanges, LimitKind, RateLimit, VolumeLimits};

const OPTIONS_TABLE: u8 = 29;

fn iops(rate: u64) -> RateLimit {
    RateLimit { rate, ..RateLimit::NONE }
}

fn create_with(b: &mut Bench, path: &str, options: VolumeOptionsRow) {
    let command = Command::CreateVolumeWith {
        path: path.into(),
        size_bytes: GIB,
        owner: String::new(),
        create_parents: true,
        pool: String::new(),
        options,
    };
    volume(b.run(command)).expect("create");
}

fn set(b: &mut Bench, path: &str, changes: LimitChanges) -> Result<Outcome, Refusal> {
    b.run(Command::SetLimits { path: path.into(), changes })
}

fn of(b: &Bench, path: &str) -> VolumeOptionsRow {
    let (id, _) = b.row(path);
    b.read(|tx| options::of(tx, id))
}

#[test]
fn a_volume_without_a_row_has_the_default_options() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create, as an older build does");
    assert_eq!(of(&b, "a"), VolumeOptionsRow { sector_bytes: 512, limits: VolumeLimits::NONE });
    assert_eq!(b.count(OPTIONS_TABLE), 0);
    create_with(&mut b, "b", VolumeOptionsRow::default());
    assert_eq!(b.count(OPTIONS_TABLE), 0);
}

#[test]
fn limits_change_one_by_one_and_leave_no_row_when_the_last_one_goes() {
    let mut b = Bench::with_pool(1);
    b.create("a", GIB).expect("create");
    set(&mut b, "a", LimitChanges::default().with(LimitKind::Iops, iops(500))).expect("set");
    set(&mut b, "a", LimitChanges::default().with(LimitKind::ReadIops, iops(300))).expect("set");
    let both = VolumeLimits::NONE.with(LimitKind::Iops, iops(500)).with(LimitKind::ReadIops, iops(300));
    assert_eq!(of(&b, "a").limits, both);
    set(&mut b, "a", LimitChanges::default()).expect("nothing");
    assert_eq!(of(&b, "a").limits, both);
    let none = LimitChanges::default().with(LimitKind::Iops, RateLimit::NONE).with(LimitKind::ReadIops, RateLimit::NONE);
    set(&mut b, "a", none).expect("set");
    assert_eq!((of(&b, "a"), b.count(OPTIONS_TABLE)), (VolumeOptionsRow::default(), 0));
    assert!(matches!(set(&mut b, "nothing", none), Err(Refusal::NoSuchVolume { .. })));
}

#[test]
fn sectors_are_inherited_and_limits_are_not() {
    let mut b = Bench::with_pool(1);
    let limits = VolumeLimits::NONE.with(LimitKind::Bytes, RateLimit { rate: 1 << 20, burst: 2 << 20, burst_seconds: 9 });
    create_with(&mut b, "a", VolumeOptionsRow { sector_bytes: 4096, limits });
    let snapshot = b.snapshot("a", Some("s"), Hold::Detached).expect("snapshot");
    b.clone_of(&snapshot, "c").expect("clone");
    assert_eq!(of(&b, "c"), VolumeOptionsRow { sector_bytes: 4096, limits: VolumeLimits::NONE });
    b.rollback("a", "s").expect("rollback");
    b.run(Command::RenameVolume { path: "a".into(), new_path: "z".into(), create_parents: false }).expect("rename");
    assert_eq!(of(&b, "z"), VolumeOptionsRow { sector_bytes: 4096, limits });
    b.delete("c").expect("delete");
    assert_eq!(b.count(OPTIONS_TABLE), 1);
}
