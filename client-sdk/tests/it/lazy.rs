//! Volumes that stand on a backup: missing pages, partial writes, zeroings, pastes, and repositories that fail.

use crate::chunkserver::{Reaction, Seen};
use crate::extents::map;
use crate::mds::{CLUSTER, GIB, LAYER, SIZE};
use crate::{Fixture, eventually, pattern, read, within, write};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ogee_client::{
    BackupError, BackupErrorKind, BackupLayer, BackupOpener, BackupParent, BackupSource, BlockDevice, Cluster, ClusterConfig, ExtentKind, IoErrorKind,
    OpenError, OpenMode, UnknownRepository, Volume,
};
use ogee_common::name::VolumeRef;
use ogee_proto::data::{Opcode, PAGE_MAP_SINCE, Status};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAGE: u64 = 4096;
const BLOCK: u64 = 256 << 10;
/// Bytes of the backup: no multiple of a block, and less than the volume.
const HELD: u64 = 2 * BLOCK + 5 * PAGE;

/// A backup in memory: block 0 and 2 hold data, block 1 is zeros.
#[derive(Debug, Default)]
struct Store {
    fetched: BTreeMap<u64, usize>,
    /// The next so many attempts of anything find no repository.
    away: usize,
    damaged: bool,
    /// Nobody is answered.
    hangs: bool,
}

#[derive(Debug, Clone, Default)]
struct Repo(Arc<Mutex<Store>>);

/// What the backup holds of its bytes.
fn held() -> Vec<u8> {
    let mut all = pattern(3, usize::try_from(HELD).expect("small")).to_vec();
    all[usize::try_from(BLOCK).expect("small")..usize::try_from(2 * BLOCK).expect("small")].fill(0);
    // A page of zeros in a block with data.
    all[4 * 4096..5 * 4096].fill(0);
    all
}

impl Repo {
    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.0.lock().expect("no test panics under the lock")
    }

    fn attempt(&self, block: u64) -> Result<(), BackupError> {
        let mut store = self.store();
        *store.fetched.entry(block).or_default() += 1;
        if store.away > 0 {
            store.away -= 1;
            return Err(BackupError { kind: BackupErrorKind::Unavailable, source: "nobody answers".into() });
        }
        if store.damaged {
            return Err(BackupError { kind: BackupErrorKind::Damaged, source: "another content".into() });
        }
        Ok(())
    }

    fn fetched(&self) -> usize {
        self.store().fetched.values().sum()
    }
}

impl BackupSource for Repo {
    fn holds_data(&self, block: u64) -> BoxFuture<'_, Result<bool, BackupError>> {
        async move { self.attempt(1000 + block).map(|()| block != 1) }.boxed()
    }

    fn block(&self, block: u64) -> BoxFuture<'_, Result<Option<Bytes>, BackupError>> {
        async move {
            while self.store().hangs {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            self.attempt(block)?;
            let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(HELD));
            let range = usize::try_from(from).expect("small")..usize::try_from(to).expect("small");
            Ok((block != 1).then(|| Bytes::copy_from_slice(&held()[range])))
        }
        .boxed()
    }
}

impl BackupOpener for Repo {
    fn open(&self, parent: &BackupParent) -> Result<Arc<dyn BackupSource>, UnknownRepository> {
        assert_eq!((parent.size_bytes, parent.layer.0), (HELD, LAYER));
        if parent.repository == "main" { Ok(Arc::new(self.clone())) } else { Err(UnknownRepository(parent.repository.clone())) }
    }
}

fn parent() -> m::BackupParent {
    m::BackupParent {
        layer: LAYER,
        repository: "main".into(),
        backup: 9,
        root: vec![1; 32].into(),
        leaves: vec![2; 32].into(),
        size_bytes: HELD,
        block_bytes: 256 << 10,
        volume: String::new(),
    }
}

/// The fixture's volume stands on the backup, and its first segment is placed, as the MDS does it.
async fn lazy(change: impl FnOnce(&mut ClusterConfig)) -> (Fixture, Repo) {
    let repo = Repo::default();
    let opener: Arc<dyn BackupOpener> = Arc::new(repo.clone());
    let f = Fixture::with(|config| {
        config.backups = Some(opener);
        change(config);
    })
    .await;
    f.mds.inner().volumes.get_mut("vol").expect("the volume").backup = Some(parent());
    f.mds.place(LAYER, 0);
    (f, repo)
}

fn expected(offset: u64, len: usize) -> Vec<u8> {
    let mut all = held();
    all.resize(usize::try_from(4 * BLOCK).expect("small"), 0);
    let offset = usize::try_from(offset).expect("small");
    all[offset..offset + len].to_vec()
}

async fn is_read(v: &Volume, offset: u64, len: u32) {
    assert!(read(v, offset, len).await == expected(offset, len as usize), "{len} bytes at {offset}");
}

/// Requests of a kind that were carried out.
fn executed(f: &Fixture, wanted: Opcode) -> usize {
    f.data.log().iter().filter(|seen| matches!(seen, Seen::Executed { opcode, .. } if *opcode == wanted)).count()
}

/// Pastes that were carried out.
fn pasted(f: &Fixture) -> usize {
    executed(f, Opcode::Paste)
}

/// Another open of the volume, as by a process with nothing in memory.
async fn other(f: &Fixture) -> (Volume, Repo, Cluster) {
    let repo = Repo::default();
    let config = ClusterConfig { backups: Some(Arc::new(repo.clone())), ..f.mds.config() };
    let cluster = Cluster::connect(config).await.expect("the MDS answers");
    let name = VolumeRef::parse("vol").expect("a valid name");
    let v = Volume::open(&cluster, &name, OpenMode::ReadWrite { steal: true }).await.expect("opens");
    (v, repo, cluster)
}

#[tokio::test]
async fn missing_pages_are_read_from_the_backup_once_and_pasted() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    let reads: Vec<_> = (0..8).map(|i| is_read(&v, i * 8192, 8192)).collect();
    futures_util::future::join_all(reads).await;
    assert_eq!(repo.store().fetched.get(&0), Some(&1), "one fetch for all who wait");
    is_read(&v, 512, 1024).await;
    is_read(&v, BLOCK - 4096, 3 * 8192).await;
    is_read(&v, HELD - 4096, 16384).await;
    is_read(&v, 3 * BLOCK, 4096).await;
    assert_eq!(read(&v, GIB, 4096).await, [0; 4096], "behind the backup, without a placement");
    eventually("two pastes", || pasted(&f) == 2).await;
    let (v, repo, _cluster) = other(&f).await;
    is_read(&v, 0, 65536).await;
    is_read(&v, HELD - 4096, 4096).await;
    assert_eq!(repo.fetched(), 0, "what was pasted is not missing any more");
}

#[tokio::test]
async fn what_a_guest_wrote_wins_and_the_rest_of_its_pages_is_the_backups() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    let mut model = expected(0, usize::try_from(3 * BLOCK).expect("small"));
    let mut put = |offset: usize, data: &[u8]| model[offset..offset + data.len()].copy_from_slice(data);
    // A whole page needs no fetch; parts of pages, of a page of zeros, of two pages at once, of a block of zeros.
    write(&v, 8192, pattern(7, 4096)).await;
    put(8192, &pattern(7, 4096));
    assert_eq!(repo.fetched(), 0);
    for (tag, offset, len) in [(8u8, 512usize, 512usize), (9, 4 * 4096 + 1024, 512), (10, 6 * 4096 + 3584, 1024), (11, 300 << 10, 1536)] {
        write(&v, offset as u64, pattern(tag, len)).await;
        put(offset, &pattern(tag, len));
    }
    within(v.write_zeroes(9 * PAGE + 512, 2 * PAGE)).await.expect("zeroed");
    put(9 * 4096 + 512, &[0; 8192]);
    within(v.discard(20 * PAGE, 4 * PAGE)).await.expect("discarded");
    put(20 * 4096, &[0; 16384]);
    let len = u32::try_from(3 * BLOCK).expect("small");
    let before = pasted(&f);
    assert!(read(&v, 0, len).await == model);
    eventually("the two blocks that were read to be pasted", || pasted(&f) == before + 2).await;
    let (v, repo, _cluster) = other(&f).await;
    assert!(read(&v, 0, len).await == model, "and when it was pasted");
    assert_eq!(repo.store().fetched, [(1, 1)].into(), "a block of zeros is not pasted by readers");
}

#[tokio::test]
async fn a_write_that_was_repeated_keeps_the_rest_of_its_page() {
    let (f, _repo) = lazy(|_| ()).await;
    let v = f.open().await;
    f.data.script(Opcode::Paste, 1, Reaction::CloseAfter);
    f.data.script(Opcode::Write, 1, Reaction::SilentAfter);
    write(&v, 3 * PAGE + 512, pattern(7, 512)).await;
    let mut page = expected(3 * PAGE, 4096);
    page[512..1024].copy_from_slice(&pattern(7, 512));
    assert_eq!(read(&v, 3 * PAGE, 4096).await, page);
}

#[tokio::test]
async fn io_waits_for_a_repository_that_does_not_answer() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    repo.store().away = 3;
    is_read(&v, 0, 4096).await;
    assert_eq!(repo.store().fetched.get(&0), Some(&4));
    // Whoever fetches gives up; the next who waits goes on.
    repo.store().hangs = true;
    let first = tokio::time::timeout(Duration::from_millis(50), v.read(2 * BLOCK, 4096));
    let second = is_read(&v, 2 * BLOCK, 4096);
    let release = async {
        tokio::time::sleep(Duration::from_millis(80)).await;
        repo.store().hangs = false;
    };
    let (first, ..) = Box::pin(within(async { tokio::join!(first, second, release) })).await;
    assert!(first.is_err(), "it was given up");
}

#[tokio::test]
async fn a_damaged_block_is_an_error_of_its_read_and_never_data() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    write(&v, 8192, pattern(7, 4096)).await;
    repo.store().damaged = true;
    assert_eq!(within(v.read(0, 4096)).await.expect_err("damaged").kind, IoErrorKind::Corrupt);
    assert_eq!(within(v.write(512, pattern(1, 512))).await.expect_err("the rest of the page").kind, IoErrorKind::Corrupt);
    assert_eq!(read(&v, 8192, 4096).await, pattern(7, 4096), "what was written is there");
    repo.store().damaged = false;
    is_read(&v, 0, 4096).await;
    assert_eq!(f.data.arrived(Opcode::Write), 1, "the partial write was not sent");
}

#[tokio::test]
async fn only_who_reads_backups_opens_the_volume() {
    let (f, _repo) = lazy(|config| config.backups = None).await;
    let name = VolumeRef::parse("vol").expect("a valid name");
    let mode = OpenMode::ReadWrite { steal: false };
    let refused = Volume::open(&f.cluster, &name, mode).await.expect_err("no access at all");
    assert!(matches!(refused, OpenError::Attach { .. }), "{refused}");
    let (f, _repo) = lazy(|_| ()).await;
    f.mds.inner().volumes.get_mut("vol").expect("the volume").backup = Some(m::BackupParent { repository: "other".into(), ..parent() });
    for hides in [false, true] {
        f.mds.inner().stat_hides_backups = hides;
        let refused = Volume::open(&f.cluster, &name, mode).await.expect_err("another repository");
        assert!(matches!(&refused, OpenError::NoRepository { source, .. } if source.0 == "other"), "{refused}");
        assert_eq!(f.mds.calls("attach_volume"), usize::from(hides), "nobody is fenced if it is known before");
    }
    assert_eq!(f.mds.inner().detaches, [false], "the attach was given back");
    f.mds.inner().volumes.get_mut("vol").expect("the volume").backup = Some(m::BackupParent { layer: LAYER + 1, ..parent() });
    let refused = Volume::open(&f.cluster, &name, mode).await.expect_err("not the layer below");
    assert!(matches!(refused, OpenError::BadGrant { field: "backup layer", .. }), "{refused}");
}

#[tokio::test]
async fn a_writer_is_not_taken_from_by_who_cannot_read_the_backup() {
    let (f, _repo) = lazy(|_| ()).await;
    let writer = f.open().await;
    write(&writer, 0, pattern(1, 4096)).await;
    // A host with repositories, but not this one.
    f.mds.inner().volumes.get_mut("vol").expect("the volume").backup = Some(m::BackupParent { repository: "other".into(), ..parent() });
    let config = ClusterConfig { backups: Some(Arc::new(Repo::default())), ..f.mds.config() };
    let cluster = Cluster::connect(config).await.expect("the MDS answers");
    let name = VolumeRef::parse("vol").expect("a valid name");
    let refused = Volume::open(&cluster, &name, OpenMode::ReadWrite { steal: true }).await.expect_err("no access");
    assert!(matches!(&refused, OpenError::NoRepository { .. }), "{refused}");
    assert_eq!(f.mds.calls("attach_volume"), 1, "the writer's own");
    write(&writer, 4096, pattern(2, 4096)).await;
}

#[tokio::test]
async fn extents_tell_what_the_backup_holds() {
    use ExtentKind::{Data, Hole, Zero};
    let (f, _repo) = lazy(|_| ()).await;
    let v = f.open().await;
    within(v.discard(0, PAGE)).await.expect("discarded");
    let rest = HELD - 2 * BLOCK;
    let all = [(PAGE, Zero), (BLOCK - PAGE, Data), (BLOCK, Hole), (rest, Data), (SIZE - HELD, Hole)];
    let all: Vec<_> = all.iter().map(|(len, kind)| (*len, *kind, true)).collect();
    assert_eq!(map(&v, None).await, all);
}

#[tokio::test]
async fn a_paste_that_is_refused_ends_nothing() {
    let (f, _repo) = lazy(|_| ()).await;
    let v = f.open().await;
    f.data.script(Opcode::Paste, 1, Reaction::Reply(Status::LayerGone, Bytes::new()));
    is_read(&v, 0, 4096).await;
    eventually("a paste", || f.data.arrived(Opcode::Paste) == 1).await;
    write(&v, 8192, pattern(7, 4096)).await;
    is_read(&v, 0, 4096).await;
}

#[tokio::test]
async fn chunkservers_that_cannot_tell_missing_pages_are_waited_for() {
    let (f, _repo) = lazy(|config| config.io_timeout = Some(Duration::from_millis(300))).await;
    f.data.state().version = Some(PAGE_MAP_SINCE);
    let v = f.open().await;
    assert_eq!(within(v.read(0, 4096)).await.expect_err("never zeros").kind, IoErrorKind::TimedOut);
    assert_eq!(within(v.discard(0, 4096)).await.expect_err("it would not mask").kind, IoErrorKind::TimedOut);
    assert_eq!(f.data.arrived(Opcode::Read), 0);
}

/// What a hydrator does: all blocks with data are pasted, and the MDS drops the row. Nobody is told.
async fn fill(f: &Fixture) {
    let layer = BackupLayer::new(&f.cluster, CLUSTER, BackupParent::of(&parent()).expect("a good parent"));
    for block in [0, 2] {
        let content = Repo::default().block(block).await.expect("read").expect("data");
        within(layer.paste(block, &content)).await.expect("pasted");
    }
    f.mds.inner().volumes.get_mut("vol").expect("the volume").backup = None;
}

#[tokio::test]
async fn a_client_from_before_the_layer_was_complete_needs_no_backup() {
    // Objects that are gone are damage, a backup whose index is gone does not answer; a server may also just hang.
    let ways: [fn(&mut Store); 3] = [|s| s.damaged = true, |s| s.away = usize::MAX, |s| s.hangs = true];
    for how in ways {
        let (f, repo) = lazy(|_| ()).await;
        // Its first state is of before, so it hears nothing of the end.
        let v = f.open_watched().await;
        fill(&f).await;
        how(&mut repo.store());
        // Pages that neither has: of a block of zeros, and a part of one.
        is_read(&v, BLOCK, 8192).await;
        write(&v, BLOCK + 4 * PAGE + 512, pattern(7, 512)).await;
        let mut page = vec![0; 4096];
        page[512..1024].copy_from_slice(&pattern(7, 512));
        assert_eq!(read(&v, BLOCK + 4 * PAGE, 4096).await, page);
        within(v.write_zeroes(BLOCK + 4 * PAGE + 512, PAGE)).await.expect("zeroed");
        is_read(&v, BLOCK, 65536).await;
        is_read(&v, 0, 65536).await;
        assert_eq!(f.mds.calls("list_backup_parents"), 1, "it is asked once");
    }
}

#[tokio::test]
async fn what_was_missing_before_the_layer_was_complete_is_read_again() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    repo.store().hangs = true;
    // The copyset says that the pages are missing; then they are filled, and the backup goes before it has answered.
    let filled = async {
        eventually("the copyset's answer", || executed(&f, Opcode::Read) == 1).await;
        fill(&f).await;
        let mut store = repo.store();
        (store.damaged, store.hangs) = (true, false);
    };
    Box::pin(async { tokio::join!(is_read(&v, 0, 65536), filled) }).await;
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    repo.store().hangs = true;
    let filled = async {
        eventually("the look at the page", || executed(&f, Opcode::Read) == 1).await;
        fill(&f).await;
        let mut store = repo.store();
        (store.damaged, store.hangs) = (true, false);
    };
    let mut page = expected(3 * PAGE, 4096);
    page[512..1024].copy_from_slice(&pattern(7, 512));
    Box::pin(async { tokio::join!(write(&v, 3 * PAGE + 512, pattern(7, 512)), filled) }).await;
    assert_eq!(read(&v, 3 * PAGE, 4096).await, page, "the rest of the page is what was filled in");
}

#[tokio::test]
async fn extents_need_no_backup_when_the_layer_is_complete() {
    use ExtentKind::{Data, Hole, Zero};
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open().await;
    fill(&f).await;
    repo.store().damaged = true;
    let all = [(4 * PAGE, Data), (PAGE, Zero), (BLOCK - 5 * PAGE, Data), (BLOCK, Hole), (HELD - 2 * BLOCK, Data), (SIZE - HELD, Hole)];
    let all: Vec<_> = all.iter().map(|(len, kind)| (*len, *kind, true)).collect();
    assert_eq!(map(&v, None).await, all, "what was pasted");
}

#[tokio::test]
async fn the_state_of_the_attach_tells_that_the_layer_is_complete() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open_watched().await;
    fill(&f).await;
    // The size, so that it is seen when the state was heard.
    f.mds.inner().volumes.get_mut("vol").expect("the volume").volume.size_bytes += PAGE;
    f.mds.send_state();
    eventually("the state", || v.info().size_bytes == SIZE + PAGE).await;
    is_read(&v, BLOCK, 65536).await;
    assert_eq!((repo.fetched(), f.mds.calls("list_backup_parents")), (0, 0));
}

#[tokio::test]
async fn nothing_is_made_up_while_the_mds_says_nothing_or_the_volume_is_gone() {
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open_watched().await;
    // So that the layout is known.
    write(&v, 8192, pattern(7, 4096)).await;
    fill(&f).await;
    repo.store().damaged = true;
    f.mds.go_away();
    let back = async {
        eventually("an attempt", || repo.fetched() > 0).await;
        f.mds.come_back();
    };
    Box::pin(async { tokio::join!(is_read(&v, BLOCK, 4096), back) }).await;
    // The row goes with the layer, too.
    let (f, repo) = lazy(|_| ()).await;
    let v = f.open_watched().await;
    write(&v, 8192, pattern(7, 4096)).await;
    repo.store().away = usize::MAX;
    f.mds.inner().volumes.get_mut("vol").expect("the volume").backup = None;
    f.mds.inner().fail.insert("get_layout", MdsErrorKind::NotFound);
    assert_eq!(within(v.read(0, 4096)).await.expect_err("never zeros").kind, IoErrorKind::Closed);
}
