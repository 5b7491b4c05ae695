//! What the tests of repositories share: devices with content, backups of them, and a whole life of a repository.

#![allow(dead_code)] // each test uses a part of it

use ogee_client::{BlockDevice, MemoryDevice};
use ogee_snapclone::{
    Backend, ExportReport, Index, KeyFile, OpenOptions, RepoError, Repository, Source, Throttle, TransferError, collect,
    export, restore, verify,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of a block of the repositories here.
pub(crate) const BLOCK: usize = 256 << 10;

/// Opens or makes.
pub(crate) async fn open(backend: Backend, key: Option<[u8; 32]>) -> Result<Repository, RepoError> {
    let options = OpenOptions { key: key.map(|k| KeyFile::new(&k)), create: true, block_bytes: None };
    Repository::open(backend, options).await
}

/// Bytes made one by one.
pub(crate) fn content(len: usize, byte: impl Fn(usize) -> u8) -> Vec<u8> {
    (0..len).map(byte).collect()
}

/// Bytes without a zero page that no block repeats.
pub(crate) fn patterned(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        bytes.extend_from_slice(&next().to_le_bytes());
    }
    bytes
}

/// Changes so many pages, chosen by the seed.
pub(crate) fn random_page_changes(bytes: &mut [u8], pages: usize, seed: u64) {
    let noise = patterned(pages * 8, seed);
    for (i, word) in noise.chunks(8).enumerate() {
        let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
        let page = usize::try_from(word % (bytes.len() as u64 / 4096)).expect("small");
        bytes[page * 4096 + i % 4096] ^= 0x55;
    }
}

/// A device with this content.
pub(crate) fn device(bytes: &[u8]) -> MemoryDevice {
    MemoryDevice::with_data(bytes.to_vec(), true)
}

/// A snapshot of volume `vms/VOLUME`.
pub(crate) fn source(volume: u64, snapshot: &str) -> Source {
    Source {
        cluster: "ab".repeat(16),
        volume_id: volume,
        volume: format!("vms/{volume}"),
        snapshot: snapshot.to_owned(),
        snapshot_unix_ms: 1,
        moments: vec![],
        full: false,
    }
}

/// Makes a backup.
pub(crate) async fn back_up(repo: &Repository, device: &MemoryDevice, volume: u64, snapshot: &str) -> ExportReport {
    export(repo, device, source(volume, snapshot), &Throttle::default(), |_| ()).await.expect("backed up")
}

/// The content of a backup.
pub(crate) async fn restored(repo: &Repository, index: &Index) -> Result<Vec<u8>, TransferError> {
    let size = usize::try_from(index.size_bytes).expect("small");
    let device = MemoryDevice::new(size);
    restore(repo, index, &device, &Throttle::default(), |_| ()).await?;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let len = u32::try_from((size - bytes.len()).min(16 << 20)).expect("small");
        bytes.extend(device.read(bytes.len() as u64, len).await.expect("read").to_vec());
    }
    Ok(bytes)
}

/// The files below a folder, in order.
pub(crate) fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if let Ok(bytes) = std::fs::read(&path) {
            found.push((path, bytes));
        }
    }
    found.sort();
    found
}

/// Backs up, changes, backs up again, from another volume too, removes, collects.
pub(crate) async fn whole_life(repo: &Repository) {
    let mut first = patterned(60 * BLOCK + 4096, 1);
    first[10 * BLOCK..30 * BLOCK].fill(0);
    let one = back_up(repo, &device(&first), 1, "one").await;
    assert_eq!(one.index.data_bytes, 40 * BLOCK as u64 + 4096, "zeros are left out");
    assert_eq!(one.new_blocks, 41 + 1, "the blocks and a leaf");
    let mut second = first.clone();
    let pages = second.len() / 4096 / 100;
    random_page_changes(&mut second[..8 * BLOCK], pages, 7);
    let changed = first.chunks(BLOCK).zip(second.chunks(BLOCK)).filter(|(a, b)| a != b).count();
    let two = back_up(repo, &device(&second), 1, "two").await;
    assert_eq!(two.new_blocks, changed as u64 + 1, "only what changed");
    assert!(two.index.new_bytes <= changed as u64 * BLOCK as u64 * 13 / 10);
    assert_eq!(two.index.generation, one.index.generation + 1);
    let clone = back_up(repo, &device(&second), 2, "clone").await;
    assert_eq!(clone.new_blocks, 0, "equal content of another volume is stored once");
    assert_eq!((clone.index.root.as_str(), clone.index.stored_bytes), (two.index.root.as_str(), 0));
    assert_eq!(repo.backups().await.expect("listed").len(), 3);
    for (report, content) in [(&one, &first), (&two, &second), (&clone, &second)] {
        let index = repo.find(&report.index.id).await.expect("found");
        assert_eq!(index, report.index);
        assert!(restored(repo, &index).await.expect("restored") == *content);
        let checked = verify(repo, &index, 1, |_| ()).await.expect("read");
        assert_eq!((checked.damaged, checked.bytes), (0, index.data_bytes));
    }
    assert_eq!(repo.find("vms/1").await.expect("the newest").id, two.index.id);
    assert_eq!(repo.find("vms/1@one").await.expect("by name").id, one.index.id);
    assert!(repo.find("vms/3").await.is_err());
    repo.remove(one.index.backup_id()).await.expect("removed");
    assert!(repo.remove(one.index.backup_id()).await.is_err(), "it shows no more");
    let freed = collect(repo, Duration::from_secs(3600)).await.expect("collected");
    assert_eq!((freed.backups, freed.blocks), (1, changed as u64 + 1));
    assert!(restored(repo, &two.index).await.expect("restored") == second);
    repo.remove(two.index.backup_id()).await.expect("removed");
    collect(repo, Duration::ZERO).await.expect("collected");
    assert!(restored(repo, &clone.index).await.expect("restored") == second, "what it shares stays");
    repo.remove(clone.index.backup_id()).await.expect("removed");
    let freed = collect(repo, Duration::ZERO).await.expect("collected");
    assert_eq!((freed.backups, freed.kept_blocks), (1, 0));
}
