//! A backup that is being made: its record, what it may refer to, its blocks, its publishing.
//!
//! States: open (its record exists) -> published (its index exists) or given up (garbage collection wrote a note under
//! the index's name). Both are decided by one create-if-absent of the same key, so a run that slept for a week cannot
//! publish what was collected. Invariant: a run refers only to blocks of its own, of its bases, and of runs it adopted;
//! base and adopted runs are named in its record before they are looked at. The argument is in `docs/backup-format.md`.
//!
//! A run that fails leaves its record and blocks: the next backup of the volume adopts them, or they are collected.

use crate::error::{RepoError, RepoErrorKind};
use crate::index::{Index, IndexKey, leaf_content, seal_index};
use crate::layout::{Address, BlockRef, INDEXES, REMOVED, RUNS, parse_run_record, run_blocks, run_record};
use crate::repository::Repository;
use crate::throttle::Throttle;
use bytes::Bytes;
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{
    BACKUP_ADOPTED_MAX, BACKUP_BASES_MAX, BACKUP_KNOWN_BLOCKS_MAX, BACKUP_RECORD_BYTES_MAX, BACKUP_RUN_REFRESH,
};
use ogee_common::rng;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The record of an open run, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// What it will publish.
    pub target: IndexKey,
    /// Backups whose blocks it may refer to.
    pub bases: Vec<IndexKey>,
    /// Runs whose blocks it may refer to.
    pub adopted: Vec<u64>,
    /// When it last said that it lives, milliseconds since 1970.
    pub seen_unix_ms: u64,
}

/// Reads a run's record; `None` if the run is over.
pub(crate) async fn read_record(repo: &Repository, run: u64) -> Result<Option<RunRecord>, RepoError> {
    let key = run_record(run);
    match repo.backend.get(&key, BACKUP_RECORD_BYTES_MAX).await {
        Err(e) if e.kind == RepoErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
        Ok(json) => {
            let why = "it is no record of a run; if no backup is running, delete it";
            let record: RunRecord = serde_json::from_slice(&json).map_err(|e| RepoError::corrupt(&key, why).because(e))?;
            if record.target.run == run { Ok(Some(record)) } else { Err(RepoError::corrupt(&key, why)) }
        }
    }
}

/// The open runs.
pub(crate) async fn open_runs(repo: &Repository) -> Result<Vec<(u64, RunRecord)>, RepoError> {
    let mut open = Vec::new();
    for run in repo.backend.list(RUNS, parse_run_record).await? {
        if let Some(record) = read_record(repo, run).await? {
            open.push((run, record));
        }
    }
    Ok(open)
}

/// What a run added so far.
#[derive(Debug, Default)]
pub(crate) struct Added {
    /// Content bytes of new blocks.
    pub new_bytes: AtomicU64,
    /// Bytes of objects written.
    pub stored_bytes: AtomicU64,
    /// New blocks.
    pub blocks: AtomicU64,
}

/// An open run.
#[derive(Debug)]
pub(crate) struct Run {
    pub repo: Repository,
    pub record: RunRecord,
    pub added: Added,
    /// The bases that are there and whole: their blocks may be referred to without being looked at.
    pub bases: Vec<Index>,
    known: Mutex<HashMap<Address, u64>>,
    refreshed: Mutex<Instant>,
}

impl Run {
    /// Opens a run for the next backup of `volume` and learns which blocks are there already.
    pub(crate) async fn start(repo: &Repository, volume: &str) -> Result<Self, RepoError> {
        let run = rng::nonzero_u64();
        let (bases, newest) = choose_bases(repo, volume).await?;
        let open = open_runs(repo).await?;
        let mut same: Vec<_> = open.into_iter().filter(|(_, r)| r.target.volume == volume).collect();
        let generation = same.iter().map(|(_, r)| r.target.generation).fold(newest, u64::max) + 1;
        same.truncate(BACKUP_ADOPTED_MAX);
        let record = RunRecord {
            target: IndexKey { volume: volume.to_owned(), generation, run },
            bases,
            adopted: same.iter().map(|(run, _)| *run).collect(),
            seen_unix_ms: clock::unix_ms(),
        };
        let mut this = Self {
            repo: repo.clone(),
            record,
            added: Added::default(),
            bases: Vec::new(),
            known: Mutex::default(),
            refreshed: Mutex::new(clock::now()),
        };
        repo.backend.replace(&run_record(run), this.record_json()).await?;
        repo.backend.settle().await?;
        this.bases = this.learn_bases().await?;
        for (run, record) in &same {
            this.learn_adopted(*run, record).await?;
        }
        Ok(this)
    }

    fn record_json(&self) -> Vec<u8> {
        let record = RunRecord { seen_unix_ms: clock::unix_ms(), ..self.record.clone() };
        serde_json::to_vec(&record).expect("a record is text and numbers")
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Address, u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns the blocks of the bases, which are protected now, and returns those that are whole. A base that went before
    /// it was protected is left out, and so is what cannot be read of a damaged one.
    async fn learn_bases(&self) -> Result<Vec<Index>, RepoError> {
        let mut whole = Vec::new();
        for base in &self.record.bases {
            // First the mark, then the index: collection deletes them in the other order.
            if self.repo.backend.exists(&base.removed_key()).await? {
                continue;
            }
            let index = match self.repo.index(base).await {
                Ok(Some(index)) if index.block_bytes == self.repo.block_bytes => index,
                Err(e) if e.kind != RepoErrorKind::Corrupt => return Err(e),
                _ => continue,
            };
            match self.repo.each_leaf(&index, |blocks| self.learn(blocks.iter().copied())).await {
                Err(e) if e.kind != RepoErrorKind::Corrupt => return Err(e),
                Err(error) => tracing::warn!(target: "controlpath", %error, "a base of the backup is damaged"),
                Ok(()) => {
                    self.learn(index.leaf_refs().flatten());
                    whole.push(index);
                }
            }
        }
        Ok(whole)
    }

    fn learn(&self, blocks: impl Iterator<Item = BlockRef>) {
        let mut known = self.known();
        for block in blocks.filter(|b| !b.is_zeros()) {
            if known.len() >= BACKUP_KNOWN_BLOCKS_MAX {
                return;
            }
            known.entry(block.address).or_insert(block.run);
        }
    }

    /// Learns the blocks of a run that was interrupted, unless it was given up meanwhile.
    async fn learn_adopted(&self, run: u64, record: &RunRecord) -> Result<(), RepoError> {
        let backend = &self.repo.backend;
        if backend.exists(&record.target.key()).await? {
            return Ok(());
        }
        let blocks = backend.list(&run_blocks(run), BlockRef::parse).await?;
        self.learn(blocks.into_iter());
        Ok(())
    }

    /// Stores a block unless its content is zeros or is there already. `kept` says which of the two it was.
    pub(crate) async fn store(self: &Arc<Self>, content: Bytes, throttle: &Throttle) -> Result<BlockRef, RepoError> {
        let this = self.clone();
        let packed = tokio::task::spawn_blocking(move || this.pack(&content)).await;
        let died = |e| RepoError::new(RepoErrorKind::Failure, "pack", "block", "a thread ended").because(e);
        let (block, len, object) = match packed.map_err(died)? {
            Packed::Zeros => return Ok(BlockRef::ZEROS),
            Packed::Known(block, len) => {
                // What a run that died left may be torn; what was published was settled before.
                let is_sound = !self.record.adopted.contains(&block.run) || self.repo.block(block, len).await.is_ok();
                if is_sound {
                    return Ok(block);
                }
                self.known().remove(&block.address);
                return Err(RepoError::corrupt(&block.key(), TORN));
            }
            Packed::New(block, len, object) => (block, len, object),
        };
        let bytes = object.len() as u64;
        throttle.pass(bytes).await;
        if self.repo.backend.create(&block.key(), object).await? {
            self.added.new_bytes.fetch_add(len as u64, Relaxed);
            self.added.stored_bytes.fetch_add(bytes, Relaxed);
            self.added.blocks.fetch_add(1, Relaxed);
        }
        self.known().insert(block.address, block.run);
        Ok(block)
    }

    /// As [`Run::store`], and once more if what an interrupted run left turns out to be torn.
    pub(crate) async fn store_sound(self: &Arc<Self>, content: Bytes, throttle: &Throttle) -> Result<BlockRef, RepoError> {
        match self.store(content.clone(), throttle).await {
            Err(e) if e.why == TORN => self.store(content, throttle).await,
            done => done,
        }
    }

    /// Stores a leaf.
    pub(crate) async fn store_leaf(self: &Arc<Self>, blocks: &[BlockRef], throttle: &Throttle) -> Result<BlockRef, RepoError> {
        if blocks.iter().all(BlockRef::is_zeros) {
            return Ok(BlockRef::ZEROS);
        }
        self.store_sound(Bytes::from(leaf_content(blocks)), throttle).await
    }

    fn pack(&self, content: &[u8]) -> Packed {
        if is_zero(content) {
            return Packed::Zeros;
        }
        let address = self.repo.sealer.address(&[content]);
        if let Some(run) = self.known().get(&address) {
            return Packed::Known(BlockRef { run: *run, address }, content.len());
        }
        let block = BlockRef { run: self.record.target.run, address };
        Packed::New(block, content.len(), self.repo.sealer.seal(&block.key(), content))
    }

    /// Says from time to time that the run lives.
    pub(crate) async fn refresh(&self) -> Result<(), RepoError> {
        {
            let mut refreshed = self.refreshed.lock().unwrap_or_else(PoisonError::into_inner);
            if clock::now().duration_since(*refreshed) < BACKUP_RUN_REFRESH {
                return Ok(());
            }
            *refreshed = clock::now();
        }
        self.repo.backend.replace(&run_record(self.record.target.run), self.record_json()).await
    }

    /// Publishes the index, and ends the run.
    pub(crate) async fn publish(&self, index: &Index) -> Result<(), RepoError> {
        let (backend, target) = (&self.repo.backend, &self.record.target);
        backend.settle().await?;
        let object = seal_index(&self.repo.sealer, &target.key(), Some(index));
        // "It exists" may also be said of a put of ours whose answer was lost.
        if !backend.create(&target.key(), object).await? && self.repo.index(target).await?.as_ref() != Some(index) {
            let why = "garbage collection gave this backup up, because it did not say that it lives; run it again";
            return Err(RepoError::new(RepoErrorKind::Abandoned, "publish", target.key(), why));
        }
        backend.settle().await?;
        backend.delete(&run_record(target.run)).await?;
        // What interrupted runs left and was of use is referred to now; their records need not wait for collection.
        Ok(())
    }
}

/// Why a block of an adopted run is stored again.
const TORN: &str = "an interrupted backup left it half-written";

enum Packed {
    Zeros,
    Known(BlockRef, usize),
    New(BlockRef, usize, Vec<u8>),
}

/// Whether all bytes are zero; compares a page at a time, by `memcmp`.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|c| c == &ZEROS[..c.len()])
}

/// The newest backups: first of the volume itself, then of every other; and the newest generation ever used.
async fn choose_bases(repo: &Repository, volume: &str) -> Result<(Vec<IndexKey>, u64), RepoError> {
    let removed = repo.backend.list(REMOVED, |key| IndexKey::parse(REMOVED, key)).await?;
    let mut keys = repo.backend.list(INDEXES, |key| IndexKey::parse(INDEXES, key)).await?;
    let newest = keys.iter().chain(&removed).filter(|k| k.volume == volume).map(|k| k.generation).max().unwrap_or(0);
    keys.retain(|key| !removed.contains(key));
    keys.sort_by_key(|key| std::cmp::Reverse(key.generation));
    let (mut own, others): (Vec<_>, Vec<_>) = keys.into_iter().partition(|k| k.volume == volume);
    own.truncate(BACKUP_BASES_MAX / 2);
    let mut seen = std::collections::HashSet::new();
    let newest_of_each = others.into_iter().filter(|k| seen.insert(k.volume.clone()));
    own.extend(newest_of_each);
    own.truncate(BACKUP_BASES_MAX);
    Ok((own, newest))
}
