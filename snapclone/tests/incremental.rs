//! A backup that is built on another one reads what changed since, and nothing else; one that cannot be, reads everything
//! that holds data. The device is played: it knows when each of its pages was written, as a chunkserver's bitmaps do.

mod support;

use bytes::Bytes;
use ogee_client::{BlockDevice, DeviceInfo, Extent, ExtentKind, IoError, MemoryDevice, Moment, ReadData};
use ogee_common::id::{LayerId, VolumeSeq};
use ogee_snapclone::{Backend, ExportReport, OpenOptions, Repository, Source, Throttle, collect, export};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{BLOCK, files, open, patterned, restored, source};
use tokio::sync::watch;

const PAGE: usize = 4096;

/// What is made of a source before it is backed up.
type Change = fn(&mut Source);

/// A snapshot: its content, and when its pages were written.
#[derive(Debug, Clone)]
struct Snapshot {
    device: MemoryDevice,
    moments: Vec<Moment>,
    /// Page: the moment it was last written at.
    written: Arc<BTreeMap<usize, Moment>>,
    /// Blocks that were read.
    reads: Arc<Mutex<BTreeSet<u64>>>,
}

impl BlockDevice for Snapshot {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn for_thread(&self) -> Self {
        self.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        self.reads.lock().expect("no panics").insert(offset / BLOCK as u64);
        self.device.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        self.device.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.device.flush().await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.device.discard(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.device.write_zeroes(offset, len).await
    }

    /// At most 100 pages at once, so that the caller must ask again.
    async fn extents(&self, offset: u64, len: u64, since: Option<Moment>) -> Result<Vec<Extent>, IoError> {
        let depth = |layer| self.moments.iter().position(|m| m.layer == layer);
        let since = since.filter(|s| depth(s.layer).is_some_and(|d| s.seq <= self.moments[d].seq));
        let first = usize::try_from(offset).expect("small") / PAGE;
        let end = first + (usize::try_from(len).expect("small") / PAGE).min(100);
        let extent = |page: usize| {
            let written = self.written.get(&page);
            let is_newer = |s: Moment, w: &Moment| depth(w.layer) < depth(s.layer) || (w.layer == s.layer && w.seq > s.seq);
            let kind = if written.is_some() { ExtentKind::Data } else { ExtentKind::Hole };
            let changed = since.is_none_or(|s| written.is_some_and(|w| is_newer(s, w)));
            Extent { len: PAGE as u64, kind, changed }
        };
        Ok((first..end).map(extent).collect())
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.device.resized()
    }
}

/// A volume that is written and snapshotted.
#[derive(Debug, Clone)]
struct Disk {
    bytes: Vec<u8>,
    written: BTreeMap<usize, Moment>,
    /// The head first.
    moments: Vec<Moment>,
}

impl Disk {
    fn new(len: usize) -> Self {
        Self { bytes: vec![0; len], written: BTreeMap::new(), moments: vec![moment(1, 1)] }
    }

    fn write(&mut self, page: usize, seed: u64) {
        self.bytes[page * PAGE..(page + 1) * PAGE].copy_from_slice(&patterned(PAGE, seed));
        self.written.insert(page, self.moments[0]);
    }

    fn snapshot(&mut self) -> Snapshot {
        let device = MemoryDevice::with_data(self.bytes.clone(), true);
        let (moments, written) = (self.moments.clone(), Arc::new(self.written.clone()));
        self.moments[0].seq.0 += 1;
        Snapshot { device, moments, written, reads: Arc::default() }
    }
}

impl Snapshot {
    /// A volume on it.
    fn clone_volume(&self, layer: u64, bytes: &[u8]) -> Disk {
        let moments = std::iter::once(moment(layer, 1)).chain(self.moments.iter().copied()).collect();
        Disk { bytes: bytes.to_vec(), written: (*self.written).clone(), moments }
    }

    /// Blocks in which anything was written.
    fn held(&self) -> BTreeSet<u64> {
        self.written.keys().map(|page| (page * PAGE / BLOCK) as u64).collect()
    }

    fn read_blocks(&self) -> BTreeSet<u64> {
        self.reads.lock().expect("no panics").clone()
    }
}

fn moment(layer: u64, seq: u64) -> Moment {
    Moment { layer: LayerId(layer), seq: VolumeSeq(seq) }
}

async fn back_up(repo: &Repository, snapshot: &Snapshot, change: impl FnOnce(&mut Source)) -> ExportReport {
    let mut what = Source { moments: snapshot.moments.clone(), ..source(1, "s") };
    change(&mut what);
    export(repo, snapshot, what, &Throttle::default(), |_| ()).await.expect("backed up")
}

async fn repository(root: &Path) -> Repository {
    open(Backend::directory(root), None).await.expect("opened")
}

/// 240 blocks: the first 150 are full, the others were never written but for a page here and there.
fn disk() -> Disk {
    let mut disk = Disk::new(240 * BLOCK);
    for page in 0..150 * BLOCK / PAGE {
        disk.write(page, page as u64 + 1);
    }
    for block in [170, 200, 239] {
        disk.write(block * BLOCK / PAGE + 3, block as u64);
    }
    disk
}

/// 1,030 blocks are two leaves.
#[tokio::test]
async fn each_leaf_is_built_on_that_of_the_base() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let mut disk = Disk::new(1030 * BLOCK);
    let of_block = |block: usize| block * BLOCK / PAGE + 3;
    [0, 500, 1023, 1024, 1029].into_iter().for_each(|block| disk.write(of_block(block), block as u64 + 1));
    back_up(&repo, &disk.snapshot(), |_| ()).await;
    disk.write(of_block(1024), 7);
    disk.write(of_block(1027), 8);
    let two = disk.snapshot();
    let report = back_up(&repo, &two, |_| ()).await;
    assert_eq!(two.read_blocks(), BTreeSet::from([1024, 1027]));
    assert_eq!(report.kept_bytes, 4 * BLOCK as u64);
    let full = back_up(&repo, &two, |s| s.full = true).await;
    assert_eq!(full.index.root, report.index.root);
}

#[tokio::test]
async fn after_one_per_cent_of_pages_changed_only_their_blocks_are_read_and_sent() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let mut disk = disk();
    let one = disk.snapshot();
    let first = back_up(&repo, &one, |_| ()).await;
    assert_eq!(one.read_blocks(), one.held(), "what was never written is not read");
    assert_eq!((first.read_bytes, first.kept_bytes), (153 * BLOCK as u64, 0));
    assert!(restored(&repo, &first.index).await.expect("restored") == disk.bytes);

    let pages = disk.bytes.len() / PAGE;
    let mut changed = BTreeSet::new();
    for word in patterned(pages / 100 * 8, 7).chunks(8) {
        let page = usize::try_from(u64::from_le_bytes(word.try_into().expect("8 bytes")) % pages as u64).expect("small");
        disk.write(page, page as u64 + 1_000_000);
        changed.insert((page * PAGE / BLOCK) as u64);
    }
    let two = disk.snapshot();
    let second = back_up(&repo, &two, |_| ()).await;
    assert_eq!(two.read_blocks(), changed, "the blocks with changed pages and no others");
    let bytes = changed.len() as u64 * BLOCK as u64;
    assert_eq!(second.read_bytes, bytes);
    assert_eq!(second.kept_bytes, two.held().difference(&changed).count() as u64 * BLOCK as u64);
    assert!(second.index.new_bytes >= bytes && second.index.new_bytes * 10 <= bytes * 13, "{}", second.index.new_bytes);
    assert!(restored(&repo, &second.index).await.expect("restored") == disk.bytes);

    // The same without the bitmaps: the same root, everything is read.
    let full = back_up(&repo, &two, |s| s.full = true).await;
    assert_eq!((full.index.root.as_str(), full.kept_bytes, full.new_blocks), (second.index.root.as_str(), 0, 0));
    assert_eq!(two.read_blocks(), two.held());
    // The base may go: what refers to its blocks keeps them.
    repo.remove(first.index.backup_id()).await.expect("removed");
    collect(&repo, Duration::ZERO).await.expect("collected");
    assert!(restored(&repo, &second.index).await.expect("restored") == disk.bytes);
}

/// What cannot be compared is read: no base, one of an unknown moment, of another cluster, of a foreign layer, of later.
#[tokio::test]
async fn without_a_base_that_can_be_compared_everything_is_read() {
    let mut disk = Disk::new(8 * BLOCK);
    (0..3 * BLOCK / PAGE).for_each(|page| disk.write(page, page as u64 + 1));
    let earlier = disk.snapshot();
    disk.write(1, 77);
    let later = disk.snapshot();
    let strange: [(&Snapshot, Change); 4] = [
        (&earlier, |s| s.moments.clear()),
        (&earlier, |s| s.cluster = "cd".repeat(16)),
        (&earlier, |s| s.moments[0].layer.0 = 99),
        (&later, |_| ()),
    ];
    for (i, (base, change)) in strange.into_iter().enumerate() {
        let folder = tempfile::tempdir().expect("a folder");
        let repo = repository(folder.path()).await;
        back_up(&repo, base, change).await;
        let snapshot = Snapshot { reads: Arc::default(), ..if i == 3 { earlier.clone() } else { later.clone() } };
        let report = back_up(&repo, &snapshot, |_| ()).await;
        assert_eq!((snapshot.read_blocks(), report.kept_bytes), (snapshot.held(), 0), "case {i}");
        let content = restored(&repo, &report.index).await.expect("restored");
        assert!(content == snapshot.device.read(0, u32::try_from(8 * BLOCK).expect("small")).await.expect("read").to_vec());
    }
}

#[tokio::test]
async fn a_base_that_went_or_is_damaged_is_not_built_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let mut disk = Disk::new(8 * BLOCK);
    (0..3 * BLOCK / PAGE).for_each(|page| disk.write(page, page as u64 + 1));
    let first = back_up(&repo, &disk.snapshot(), |_| ()).await;
    repo.remove(first.index.backup_id()).await.expect("removed");
    let two = disk.snapshot();
    let second = back_up(&repo, &two, |_| ()).await;
    assert_eq!((second.read_bytes, second.kept_bytes), (3 * BLOCK as u64, 0));
    // Its leaf is the only object of the second run that is not a block of the volume.
    collect(&repo, Duration::ZERO).await.expect("collected");
    let (leaf, object) = files(&folder.path().join("blocks")).into_iter().min_by_key(|(_, o)| o.len()).expect("objects");
    std::fs::write(&leaf, &object[..object.len() / 2]).expect("damaged");
    let three = disk.snapshot();
    let third = back_up(&repo, &three, |_| ()).await;
    assert_eq!((third.read_bytes, third.kept_bytes), (3 * BLOCK as u64, 0));
    assert!(restored(&repo, &third.index).await.is_ok_and(|bytes| bytes == disk.bytes));
}

#[tokio::test]
async fn a_volume_that_grew_and_one_on_another_are_built_on_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    // The last block is shorter, then not any more.
    let mut disk = Disk::new(4 * BLOCK + PAGE);
    (0..disk.bytes.len() / PAGE).for_each(|page| disk.write(page, page as u64 + 1));
    back_up(&repo, &disk.snapshot(), |_| ()).await;
    disk.bytes.resize(30 * BLOCK, 0);
    disk.write(29 * BLOCK / PAGE, 5);
    let grown = disk.snapshot();
    let report = back_up(&repo, &grown, |_| ()).await;
    assert_eq!(grown.read_blocks(), BTreeSet::from([4, 29]), "the block that was shorter, and the new one");
    assert!(restored(&repo, &report.index).await.expect("restored") == disk.bytes);

    let mut clone = grown.clone_volume(2, &disk.bytes);
    clone.write(0, 9);
    let of_clone = clone.snapshot();
    let other = |s: &mut Source| (s.volume_id, s.volume) = (2, "vms/2".to_owned());
    let report = back_up(&repo, &of_clone, other).await;
    assert_eq!(of_clone.read_blocks(), BTreeSet::from([0]), "everything else is its parent's");
    assert!(restored(&repo, &report.index).await.expect("restored") == clone.bytes);
    let again = clone.snapshot();
    let report = back_up(&repo, &again, other).await;
    assert_eq!((report.read_bytes, report.new_blocks), (0, 0), "its own backup is nearer than that of its parent");
}

/// `tests/golden/plain` was written before indexes had moments, `tests/golden/plain-moment` after.
#[tokio::test]
async fn indexes_of_both_ages_are_read_and_only_the_new_ones_are_built_on() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut disk = Disk::new(300 * BLOCK + PAGE);
    for page in [7, 107, 207].into_iter().flat_map(|block| block * BLOCK / PAGE..(block + 1) * BLOCK / PAGE) {
        disk.write(page, 0);
        let at = page * PAGE;
        (at..at + PAGE).for_each(|i| disk.bytes[i] = u8::try_from(i / 512 % 7).expect("small"));
    }
    let mut snapshot = disk.snapshot();
    if std::env::var_os("OGEE_BLESS").is_some() {
        let root = golden.join("plain-moment");
        let _ = std::fs::remove_dir_all(&root);
        back_up(&repository(&root).await, &snapshot, |_| ()).await;
    }
    for (name, known) in [("plain", None), ("plain-moment", Some(moment(1, 1)))] {
        let folder = tempfile::tempdir().expect("a folder");
        for (path, object) in files(&golden.join(name)) {
            let copy = folder.path().join(path.strip_prefix(golden.join(name)).expect("below it"));
            std::fs::create_dir_all(copy.parent().expect("a folder")).expect("made");
            std::fs::write(copy, object).expect("copied");
        }
        let repo = Repository::open(Backend::directory(folder.path()), OpenOptions::default()).await.expect("opened");
        let index = repo.find("vms/1@s").await.expect("there");
        assert_eq!(index.moment(), known, "{name}");
        assert!(restored(&repo, &index).await.expect("restored") == disk.bytes, "{name}");
        snapshot.reads = Arc::default();
        let next = back_up(&repo, &snapshot, |_| ()).await;
        let read = if known.is_some() { BTreeSet::new() } else { snapshot.held() };
        assert_eq!((snapshot.read_blocks(), next.new_blocks), (read, 0), "{name}");
        assert_eq!(next.index.root, index.root);
    }
}
