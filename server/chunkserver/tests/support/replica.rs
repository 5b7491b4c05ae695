//! A replica: store, state machine and the disk below it, which can be killed or lose power.

use super::Rng;
use super::world::{CHUNKS, COPYSET, Image, REGIONS, Step, World, backup_page, sector_bytes};
use bytes::Bytes;
use ogee_chunkserver::copyset::CopysetMachine;
use ogee_chunkserver::store::{
    ChunkKey, ChunkStore, CopysetStore, ReadChain, ReadError, ReadOutcome, ReadRange, StoreTuning, View,
};
use ogee_common::checksum::fragment_crcs;
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_disk::{DataDir, FaultPlan, MemStore, MetaStore};
use ogee_proto::data::{Ancestor, Status};
use ogee_raft::api::{Applied, RaftSnapshot, SnapshotSource, StateMachine, StateMachineError};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What a power cut may leave of the regions of a data file, per file name.
type Synced = BTreeMap<PathBuf, Vec<u8>>;

pub struct Replica {
    temp: tempfile::TempDir,
    meta: Arc<MemStore>,
    pub faults: Arc<FaultPlan>,
    tuning: StoreTuning,
    synced: Synced,
    pub parts: Option<Parts>,
}

pub struct Parts {
    pub machine: CopysetMachine,
    pub store: Arc<CopysetStore>,
    pub process: Arc<ChunkStore>,
    pub loaded: Applied,
}

/// Tiny caches, so that rows and files are evicted and loaded all the time.
pub fn tiny() -> StoreTuning {
    StoreTuning {
        row_cache_rows: 3,
        open_files: 2,
        writeback_bytes: 64 << 10,
        horizon_entries: 3,
        no_space_pause: Duration::from_millis(1),
        ..StoreTuning::default()
    }
}

impl Replica {
    pub async fn new(tuning: StoreTuning) -> Self {
        let temp = tempfile::tempdir().expect("temp dir");
        let mut replica =
            Self { temp, meta: Arc::default(), faults: FaultPlan::new(), tuning, synced: Synced::new(), parts: None };
        replica.start().await;
        replica
    }

    pub fn root(&self) -> PathBuf {
        self.temp.path().to_path_buf()
    }

    pub fn meta(&self) -> Arc<MemStore> {
        Arc::clone(&self.meta)
    }

    pub async fn start(&mut self) {
        let dir = DataDir::open_with_faults(self.temp.path(), Some(Arc::clone(&self.faults))).expect("data dir");
        let meta: Arc<dyn MetaStore> = Arc::clone(&self.meta) as Arc<dyn MetaStore>;
        let process = ChunkStore::new(dir, meta, self.tuning.clone());
        let store = process.copyset(COPYSET);
        let mut machine = CopysetMachine::new(Arc::clone(&store));
        let loaded = machine.load().await.expect("load");
        self.parts = Some(Parts { machine, store, process, loaded });
    }

    pub fn parts(&mut self) -> &mut Parts {
        self.parts.as_mut().expect("running")
    }

    pub fn store(&self) -> Arc<CopysetStore> {
        Arc::clone(&self.parts.as_ref().expect("running").store)
    }

    /// Index of the next entry to apply.
    pub fn next_index(&self) -> usize {
        let applied = self.store().applied();
        applied.pos.map_or(0, |p| usize::try_from(p.index).expect("small") + 1)
    }

    /// Applies what the replica has not, up to `end`, one entry per call.
    pub async fn catch_up(&mut self, log: &[Step], end: usize) {
        for step in log[..end].iter().skip(self.next_index()) {
            let reply = self.parts().machine.apply(vec![step.entry.clone()]).await.expect("apply");
            assert_eq!(status_of(&reply[0]), step.status, "reply of {:?}", step.entry.pos);
        }
    }

    pub async fn checkpoint(&mut self) {
        let applied = self.parts().machine.checkpoint().await.expect("checkpoint");
        assert_eq!(applied, self.store().applied());
        self.remember_synced();
    }

    fn files(&self) -> Vec<PathBuf> {
        let dir = self.temp.path().join("chunks/00000007");
        let entries = std::fs::read_dir(dir).expect("chunk directory");
        let mut files: Vec<PathBuf> = entries.map(|e| e.expect("entry").path()).collect();
        files.sort();
        files
    }

    /// Everything in the files is durable now.
    pub fn remember_synced(&mut self) {
        self.synced = self.files().into_iter().map(|path| (path.clone(), regions_of(&path))).collect();
    }

    fn stop(&mut self) {
        self.parts = None;
    }

    /// The process is killed; the operating system keeps what was written.
    pub async fn kill(&mut self) {
        self.stop();
        self.meta.power_cut(0);
        self.start().await;
    }

    /// The power fails: of what was not flushed, each sector is old or new; names may be lost; unlinked files may be
    /// back.
    pub async fn power_cut(&mut self, rng: &mut Rng) {
        self.stop();
        self.meta.power_cut(usize::try_from(rng.below(3)).expect("small"));
        for path in self.files() {
            let old = self.synced.get(&path).cloned();
            if old.is_none() && rng.chance(2) {
                std::fs::remove_file(&path).expect("lose a file");
                continue;
            }
            tear(&path, &old.unwrap_or_else(|| vec![0; 3 * 6 * 4096]), rng);
        }
        for (path, content) in &self.synced {
            if !path.exists() && rng.chance(2) {
                put_regions(path, content);
            }
        }
        self.start().await;
    }

    /// Reads every view of the world and compares it with the oracle; its page maps, too.
    pub async fn check(&self, world: &World) {
        self.check_page_maps(world).await;
        for version in self.store().versions() {
            assert!(!world.layers[&version.at.layer.0].gone, "{version:?} of a deleted layer");
        }
        for (layer, seq) in world.views() {
            for chunk in 0..CHUNKS {
                let l = &world.layers[&layer];
                self.check_chunk(world, (layer, chunk, seq), l.ancestors()).await;
                if !l.old_chain.is_empty() {
                    self.check_chunk(world, (layer, chunk, seq), l.old_ancestors()).await;
                }
            }
        }
    }

    async fn check_chunk(&self, world: &World, (layer, chunk, seq): (u64, u32, u64), chain: Vec<Ancestor>) {
        let expected = world.view(layer, chunk, seq);
        let chain = ReadChain::Given(chain.into());
        for (i, (from, to)) in REGIONS.iter().enumerate() {
            let range = ReadRange {
                at: ChunkKey { layer: LayerId(layer), chunk: ChunkIndex(chunk) },
                seq: VolumeSeq(seq),
                chain: chain.clone(),
                offset: *from,
                len: to - from,
            };
            let mut found = self.read(&range).await.expect("read");
            if world.lazy_bottom(layer).is_some() {
                self.fill_missing(&range, &mut found).await;
            }
            let expected = region_bytes(&expected, i);
            if found != expected {
                let sector = found.chunks(512).zip(expected.chunks(512)).position(|(a, b)| a != b);
                panic!("layer {layer} chunk {chunk} seq {seq} region {i}: first wrong sector {sector:?} ({chain:?})");
            }
        }
    }

    /// Puts in what the backup holds of pages that no version has, as a client does.
    async fn fill_missing(&self, range: &ReadRange, found: &mut [u8]) {
        let ReadChain::Given(chain) = range.chain.clone() else { panic!("a chain is given") };
        let view = View::Layer { at: range.at, seq: range.seq, chain };
        let map = self.store().page_map_of(&view, None).await.expect("a map");
        for (page, bytes) in (range.offset / 4096..).zip(found.chunks_mut(4096)) {
            if !map.data.contains(page) && !map.zero.contains(page) {
                assert!(bytes.iter().all(|b| *b == 0), "page {page} is missing and not zeros");
                bytes.copy_from_slice(&backup_page(range.at.chunk.0, page));
            }
        }
    }

    /// Reads bytes and checks the checksums that come with them.
    pub async fn read(&self, range: &ReadRange) -> Result<Vec<u8>, ReadError> {
        match self.store().read_range(range).await? {
            ReadOutcome::AllZero => Ok(vec![0; range.len as usize]),
            ReadOutcome::Data { bytes, crcs } => {
                assert_eq!(fragment_crcs(range.offset, &bytes).collect::<Vec<_>>(), crcs, "checksums of the reply");
                Ok(bytes.to_vec())
            }
        }
    }

    pub async fn snapshot(&mut self) -> RaftSnapshot {
        let snapshot = self.parts().machine.snapshot().await.expect("snapshot");
        self.remember_synced();
        snapshot
    }

    pub async fn install(
        &mut self,
        snapshot: RaftSnapshot,
        source: &(impl SnapshotSource + 'static),
    ) -> Result<(), StateMachineError> {
        self.parts().machine.install(snapshot, source).await
    }
}

pub fn status_of(reply: &Bytes) -> Status {
    match reply.first_chunk::<2>() {
        None => Status::Ok,
        Some(code) => Status::parse(u16::from_le_bytes(*code)),
    }
}

fn region_bytes(image: &Image, region: usize) -> Vec<u8> {
    image[region * 48..(region + 1) * 48].iter().flat_map(|token| sector_bytes(*token)).collect()
}

fn regions_of(path: &PathBuf) -> Vec<u8> {
    let file = std::fs::File::open(path).expect("data file");
    let mut out = vec![];
    for (from, to) in REGIONS {
        let mut part = vec![0; (to - from) as usize];
        file.read_exact_at(&mut part, u64::from(from)).expect("data file has its size");
        out.extend(part);
    }
    out
}

fn put_regions(path: &PathBuf, content: &[u8]) {
    let file = std::fs::File::create(path).expect("data file");
    file.set_len(16 << 20).expect("size");
    for ((from, _), part) in REGIONS.iter().zip(content.chunks_exact(6 * 4096)) {
        file.write_all_at(part, u64::from(*from)).expect("write");
    }
}

/// Takes each sector from the old or the new content.
fn tear(path: &PathBuf, old: &[u8], rng: &mut Rng) {
    let file = std::fs::OpenOptions::new().write(true).read(true).open(path).expect("data file");
    if file.metadata().expect("stat").len() != 16 << 20 {
        return;
    }
    let mode = rng.below(3);
    for ((from, to), part) in REGIONS.iter().zip(old.chunks_exact(6 * 4096)) {
        for (i, sector) in part.chunks_exact(512).enumerate() {
            let keep_new = match mode {
                0 => rng.chance(2),
                1 => i % 8 < 4,
                _ => false,
            };
            if !keep_new {
                let at = u64::from(*from) + (i as u64) * 512;
                assert!(at < u64::from(*to));
                file.write_all_at(sector, at).expect("write");
            }
        }
    }
}
