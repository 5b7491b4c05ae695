//! Any single byte of the metadata store's files may flip while it is closed: it is refused, or a read fails, or every row is
//! what was written. Rows that vanish or are older than they should be would be worst: nobody could tell.

use ogee_disk::{Batch, Durability, MetaStore, RocksStore, StoreError, Table};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const T: Table = Table::new(9, "t");

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.0 >> 33) % n as u64).expect("below n")
    }
}

fn key(i: u32) -> Vec<u8> {
    i.to_be_bytes().to_vec()
}

/// Several generations of the same rows, over several openings, so that rows lie in table files and in the log.
fn fill(path: &Path) -> Rows {
    let mut rows = Rows::new();
    for generation in 0..4u8 {
        let store = RocksStore::open(path).expect("open");
        for i in 0..60u32 {
            if i % 4 < u32::from(4 - generation) {
                let mut batch = Batch::new();
                let value: Vec<u8> = (0..150u32).map(|j| u8::try_from((i * 31 + j * 7 + u32::from(generation)) % 251).expect("small")).collect();
                batch.put(T, &key(i), &value);
                store.write(batch, Durability::Synced).expect("write");
                rows.insert(key(i), value);
            }
        }
    }
    rows
}

fn read(path: &Path) -> Result<Rows, StoreError> {
    let store = RocksStore::open(path)?;
    let rows: Rows = store.scan_prefix(T, &[], 1000)?.into_iter().collect();
    for (key, value) in &rows {
        assert_eq!(store.get(T, key)?.as_ref(), Some(value), "a get and a scan agree");
    }
    Ok(rows)
}

fn copy(from: &Path, to: &Path) -> Vec<PathBuf> {
    std::fs::create_dir_all(to).expect("a folder");
    let mut copied = vec![];
    for file in std::fs::read_dir(from).expect("list") {
        let file = file.expect("entry");
        let target = to.join(file.file_name());
        std::fs::copy(file.path(), &target).expect("copy");
        let name = file.file_name().to_string_lossy().into_owned();
        // The text log and the options are for people; nothing is read from them.
        if !name.starts_with("LOG") && !name.starts_with("OPTIONS") && name != "LOCK" && file.metadata().expect("size").len() > 0 {
            copied.push(target);
        }
    }
    copied.sort();
    copied
}

#[test]
fn a_flipped_byte_is_noticed_or_means_nothing() {
    let tmp = tempfile::tempdir().expect("a temporary directory");
    let origin = tmp.path().join("origin");
    let expected = fill(&origin);
    let mut random = Lcg(11);
    let (mut noticed, mut dead, mut wrong) = (0, 0, vec![]);
    for round in 0..200 {
        let flipped = tmp.path().join(format!("{round}"));
        let files = copy(&origin, &flipped);
        let path = &files[random.below(files.len())];
        let mut bytes = std::fs::read(path).expect("read");
        let (at, bit) = (random.below(bytes.len()), 1u8 << random.below(8));
        bytes[at] ^= bit;
        std::fs::write(path, &bytes).expect("write");
        match read(&flipped) {
            Err(_) => noticed += 1,
            Ok(rows) if rows == expected => dead += 1,
            Ok(rows) => wrong.push((path.file_name().map(ToOwned::to_owned), at, bytes.len(), bit, rows.len())),
        }
        std::fs::remove_dir_all(&flipped).expect("remove");
    }
    assert!(wrong.is_empty(), "{} flips changed what is read: {wrong:?}", wrong.len());
    assert!(noticed > 80, "{noticed} noticed, {dead} meant nothing");
}
