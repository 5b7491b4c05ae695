//! RocksDB and memory agree under random operations, with reopening; and each kind of error is met once.

use super::*;
use proptest::prelude::*;

const A: Table = Table::new(1, "a");
const B: Table = Table::new(2, "b");
const LAST: Table = Table::new(255, "last");
const TABLES: [Table; 3] = [A, B, LAST];

#[derive(Debug, Clone)]
enum Op {
    Write(Vec<(u8, u8, Vec<u8>, Vec<u8>)>, bool),
    Get(u8, Vec<u8>),
    Scan(u8, Vec<u8>, bool, Option<Vec<u8>>, usize),
    Prefix(u8, Vec<u8>, usize),
    Sync,
    Replace(u8, Vec<(Vec<u8>, Vec<u8>)>),
    Dump,
    Reopen,
}

/// Short keys over a small alphabet with the extreme bytes, so that ranges and prefixes meet.
fn key() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(7), Just(254), Just(255)], 0..4)
}

fn op() -> impl Strategy<Value = Op> {
    let change = (0u8..5, 0u8..3, key(), key());
    prop_oneof![
        6 => (proptest::collection::vec(change, 0..6), any::<bool>()).prop_map(|(c, s)| Op::Write(c, s)),
        3 => (0u8..3, key()).prop_map(|(t, k)| Op::Get(t, k)),
        3 => (0u8..3, key(), any::<bool>(), proptest::option::of(key()), 0usize..8)
            .prop_map(|(t, f, e, to, n)| Op::Scan(t, f, e, to, n)),
        2 => (0u8..3, key(), 0usize..8).prop_map(|(t, k, n)| Op::Prefix(t, k, n)),
        1 => Just(Op::Sync),
        1 => (0u8..3, proptest::collection::vec((key(), key()), 0..5)).prop_map(|(t, r)| Op::Replace(t, r)),
        1 => Just(Op::Dump),
        1 => Just(Op::Reopen),
    ]
}

fn batch(changes: &[(u8, u8, Vec<u8>, Vec<u8>)]) -> Batch {
    let mut batch = Batch::new();
    for (what, table, k, v) in changes {
        let table = TABLES[usize::from(*table)];
        match what {
            0 => batch.delete(table, k),
            1 => batch.delete_range(table, k, Some(v)),
            2 => batch.delete_prefix(table, k),
            _ => batch.put(table, k, v),
        }
    }
    batch
}

fn dump(store: &dyn MetaStore) -> Vec<Row> {
    let mut rows = vec![];
    let mut take = |table, key: &[u8], value: &[u8]| {
        rows.push(Row { table, key: key.to_vec(), value: value.to_vec() });
        true
    };
    store.dump(&TABLES, &mut take).expect("dump");
    rows
}

fn same(mem: &dyn MetaStore, rocks: &dyn MetaStore, op: &Op) {
    match op {
        Op::Write(changes, synced) => {
            let durability = if *synced { Durability::Synced } else { Durability::Deferred };
            mem.write(batch(changes), durability).expect("mem write");
            rocks.write(batch(changes), durability).expect("rocks write");
        }
        Op::Get(t, k) => {
            let t = TABLES[usize::from(*t)];
            assert_eq!(mem.get(t, k).expect("get"), rocks.get(t, k).expect("get"));
        }
        Op::Scan(t, from, excluded, to, limit) => {
            let t = TABLES[usize::from(*t)];
            let from = if *excluded { Bound::Excluded(&from[..]) } else { Bound::Included(&from[..]) };
            let got = |s: &dyn MetaStore| s.scan(t, from, to.as_deref(), *limit).expect("scan");
            assert_eq!(got(mem), got(rocks));
        }
        Op::Prefix(t, k, limit) => {
            let t = TABLES[usize::from(*t)];
            let got = mem.scan_prefix(t, k, *limit).expect("scan");
            assert!(got.iter().all(|(key, _)| key.starts_with(k)));
            assert_eq!(got, rocks.scan_prefix(t, k, *limit).expect("scan"));
        }
        Op::Sync => rocks.sync().and(mem.sync()).expect("sync"),
        Op::Replace(t, rows) => {
            let t = TABLES[usize::from(*t)];
            let row = |(k, v): &(Vec<u8>, Vec<u8>)| Row { table: t.number, key: k.clone(), value: v.clone() };
            for store in [mem, rocks] {
                store.replace_all(&[t], rows.iter().map(row).collect()).expect("replace");
            }
        }
        Op::Dump | Op::Reopen => assert_eq!(dump(mem), dump(rocks)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn rocks_and_memory_agree(ops in proptest::collection::vec(op(), 1..60)) {
        let temp = tempfile::tempdir().expect("temp dir");
        let mem = MemStore::new();
        let mut rocks = RocksStore::open(temp.path()).expect("open");
        for op in &ops {
            same(&mem, &rocks, op);
            if matches!(op, Op::Reopen) {
                drop(rocks);
                rocks = RocksStore::open(temp.path()).expect("reopen");
                prop_assert_eq!(dump(&mem), dump(&rocks));
            }
        }
        prop_assert_eq!(dump(&mem), dump(&rocks));
    }

    #[test]
    fn a_power_cut_keeps_a_prefix(values in proptest::collection::vec((0u8..4, any::<bool>()), 1..40), keep in 0usize..10) {
        let store = MemStore::new();
        let mut synced = 0;
        for (i, (k, sync)) in values.iter().enumerate() {
            let mut b = Batch::new();
            b.put(A, &[*k], &[u8::try_from(i).expect("few")]);
            b.put(B, &[*k], &[u8::try_from(i).expect("few")]);
            store.write(b, if *sync { Durability::Synced } else { Durability::Deferred }).expect("write");
            if *sync {
                synced = i + 1;
            }
        }
        let kept = (synced + keep.min(store.deferred())).min(values.len());
        store.power_cut(keep);
        for k in 0..4u8 {
            let expect = values[..kept].iter().rposition(|(key, _)| *key == k).map(|i| vec![u8::try_from(i).expect("few")]);
            prop_assert_eq!(store.get(A, &[k]).expect("get"), expect.clone());
            prop_assert_eq!(store.get(B, &[k]).expect("get"), expect);
        }
    }
}

#[test]
fn a_store_has_one_owner() {
    let temp = tempfile::tempdir().expect("temp dir");
    let first = RocksStore::open(temp.path()).expect("open");
    assert_eq!(RocksStore::open(temp.path()).expect_err("second owner").kind(), StoreErrorKind::Locked);
    drop(first);
}

#[test]
fn damage_is_reported_as_damage() {
    let temp = tempfile::tempdir().expect("temp dir");
    let store = RocksStore::open(temp.path()).expect("open");
    let mut b = Batch::new();
    b.put(A, b"k", b"v");
    store.write(b, Durability::Synced).expect("write");
    drop(store);
    std::fs::write(temp.path().join("CURRENT"), b"MANIFEST-nonsense\n").expect("damage");
    let e = RocksStore::open(temp.path()).expect_err("damaged");
    assert!(matches!(e.kind(), StoreErrorKind::Corrupt | StoreErrorKind::Io), "{e:?}");
}
