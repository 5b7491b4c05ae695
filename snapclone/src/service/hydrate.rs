//! Fills a volume that stands on a backup, until it needs the backup no more (ADR 0016).
//!
//! ```text
//!   all leaves read, Merkle root proved ──> pass: profile's blocks, then all in order ──> a pass that found nothing missing ──> complete
//!                                            ^          │ something was missing, and was pasted
//!                                            └──────────┘
//! ```
//! Invariants: the layer is said to be complete only after a pass over every block that holds data found all its pages present, for everybody who reads
//! the layer, now and later (`ogee_client::BackupLayer`); nothing is kept but what is in the layer, so the next owner, or a second one beside,
//! goes on where the pages end; a repository that does not answer is waited for as long as the task is owned, damage fails the task. The volume may
//! be attached, cloned, rolled back or deleted meanwhile: a layer that stands on no backup any more has nothing to be filled.

use super::daemon::Job;
use super::failure::{Failure, chain};
use super::step;
use super::task::HydrateTask;
use crate::export::first_block;
use crate::layout::BlockRef;
use crate::lazy::RepositoryBackup;
use crate::throttle::Throttle;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_client::{BackupError, BackupErrorKind, BackupLayer, BackupParent, BackupSource, IoError, IoErrorKind};
use ogee_common::limits::{HYDRATE_BLOCKS_PARALLEL, LAZY_RETRY_MAX, LAZY_RETRY_MIN};
use ogee_common::rng;
use ogee_proto::mds as m;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};

/// Passes after which a task fails: each finds less, and the second of a healthy cluster finds nothing.
const PASSES_MAX: usize = 16;

/// Which blocks hold data.
struct DataBlocks(Vec<u64>);

impl DataBlocks {
    fn new(blocks: u64) -> Self {
        Self(vec![0; usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX)])
    }

    fn insert(&mut self, block: u64) {
        if let Some(word) = usize::try_from(block / 64).ok().and_then(|i| self.0.get_mut(i)) {
            *word |= 1 << (block % 64);
        }
    }

    fn contains(&self, block: u64) -> bool {
        usize::try_from(block / 64).ok().and_then(|i| self.0.get(i)).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }
}

/// A layer that is being filled.
struct Filling<'a> {
    job: &'a Job<'a>,
    layer: BackupLayer,
    source: RepositoryBackup,
    data: DataBlocks,
    throttle: Throttle,
    read_bytes: AtomicU64,
}

/// Fills the layer, or finds that nothing is left to be done.
///
/// # Errors
/// [`Failure`].
pub(super) async fn make(job: &Job<'_>, task: &HydrateTask) -> Result<Value, Failure> {
    let Some((identity, parent)) = standing(job, task.layer).await? else { return Ok(result(task, 0)) };
    let place = job.place_of(&parent.repository)?;
    let source = RepositoryBackup::new(place.clone(), parent.clone());
    let data = patiently(|| proved(&source)).await?;
    step("hydrate-proved");
    let layer = BackupLayer::new(job.cluster, identity, parent);
    let throttle = Throttle::new(task.throttle);
    let wanted = wanted_first(&source).await;
    let filling = Filling { job, layer, source, data, throttle, read_bytes: AtomicU64::new(0) };
    match filling.first(wanted).await {
        Err(Ended::Gone) => return Ok(result(task, 0)),
        Err(Ended::Failed(Failure::Lost)) => return Err(Failure::Lost),
        // The passes come to whatever it was.
        Err(Ended::Failed(_)) | Ok(()) => {}
    }
    for _ in 0..PASSES_MAX {
        let pasted = match filling.pass().await {
            Err(Ended::Gone) => return Ok(result(task, filling.read_bytes.load(Ordering::Relaxed))),
            Err(Ended::Failed(failure)) => return Err(failure),
            Ok(pasted) => pasted,
        };
        step("hydrate-pass");
        if pasted == 0 {
            job.lease.check().await?;
            let request = m::CompleteBackupParentRequest { layer: task.layer };
            let completed = job.cluster.mds().complete_backup_parent(request).await;
            completed.map_err(|e| Failure::call(&format!("say that volume {} is complete", task.volume), &e))?;
            step("hydrate-completed");
            return Ok(result(task, filling.read_bytes.load(Ordering::Relaxed)));
        }
    }
    Err(Failure::Final(format!("pages of volume {} went missing again after they were pasted {PASSES_MAX} times", task.volume)))
}

fn result(task: &HydrateTask, read_bytes: u64) -> Value {
    json!({"volume": task.volume, "layer": task.layer, "read_bytes": read_bytes})
}

/// The backup that a layer stands on now, and the cluster's identity.
async fn standing(job: &Job<'_>, layer: u64) -> Result<Option<([u8; 16], BackupParent)>, Failure> {
    let request = m::ListBackupParentsRequest { after: layer.saturating_sub(1) };
    let list = job.cluster.mds().list_backup_parents(request).await;
    let list = list.map_err(|e| Failure::call("ask which layers stand on backups", &e))?;
    let Some(message) = list.parents.first().filter(|parent| parent.layer == layer) else { return Ok(None) };
    let bad = |what: &str| Failure::Final(format!("the MDS tells of layer {layer} with a bad {what}"));
    let identity = list.cluster.as_ref().try_into().map_err(|_| bad("cluster"))?;
    Ok(Some((identity, BackupParent::of(message).map_err(bad)?)))
}

/// The blocks of the boot profile, in order; a profile that cannot be read is a pity.
async fn wanted_first(source: &RepositoryBackup) -> Vec<u64> {
    let Ok((repo, index)) = source.open().await else { return vec![] };
    match repo.profile(index.backup_id()).await {
        Ok(profile) => profile.map_or_else(Vec::new, |profile| profile.blocks(index.block_bytes, index.blocks())),
        Err(e) => {
            tracing::warn!(target: "controlpath", backup = index.id, error = chain(&e), "a boot profile is not used");
            vec![]
        }
    }
}

/// Reads all leaves, proves the Merkle root over them, and says which blocks hold data.
async fn proved(source: &RepositoryBackup) -> Result<DataBlocks, BackupError> {
    let mut data = DataBlocks::new(source.open().await?.1.blocks());
    let note = |leaf, blocks: &[BlockRef]| {
        (first_block(leaf)..).zip(blocks).filter(|(_, place)| !place.is_zeros()).for_each(|(block, _)| data.insert(block));
    };
    source.prove(note).await?;
    Ok(data)
}

/// Repeats what a repository did not answer; the owner's lease ends it.
async fn patiently<T, F: Future<Output = Result<T, BackupError>>>(ask: impl Fn() -> F) -> Result<T, Failure> {
    let mut pause = LAZY_RETRY_MIN;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(e) if e.kind == BackupErrorKind::Damaged => return Err(Failure::Final(chain(&e))),
            Err(e) => tracing::warn!(target: "controlpath", error = chain(&e), "a backup is not read; its hydrator waits"),
        }
        tokio::time::sleep(rng::jitter(pause)).await;
        pause = (pause * 2).min(LAZY_RETRY_MAX);
    }
}

/// Why a pass ended early.
enum Ended {
    /// The layer is gone.
    Gone,
    /// Something failed.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<IoError> for Ended {
    fn from(error: IoError) -> Self {
        match error.kind {
            IoErrorKind::Closed => Self::Gone,
            // A full disk, and a cluster that does not answer, are waited for.
            IoErrorKind::TimedOut | IoErrorKind::NoSpace => Self::Failed(Failure::Passing(chain(&error))),
            _ => Self::Failed(Failure::Final(chain(&error))),
        }
    }
}

impl Filling<'_> {
    /// Pastes blocks without looking whether they are there.
    async fn first(&self, blocks: Vec<u64>) -> Result<(), Ended> {
        let wanted = blocks.into_iter().filter(|block| self.data.contains(*block));
        let filled = stream::iter(wanted).map(|block| self.fill(block)).buffered(HYDRATE_BLOCKS_PARALLEL);
        filled.try_collect::<()>().await
    }

    /// Looks at every block that holds data and pastes what is missing; how many blocks that were.
    async fn pass(&self) -> Result<u64, Ended> {
        let parent = self.layer.parent();
        self.job.lease.begin(parent.size_bytes);
        let (mut block, mut pasted) = (0, 0);
        while block < parent.blocks() {
            pasted += self.neighbours_at_last(block).await?;
            let end = self.layer.neighbours(block).end;
            self.job.lease.advance(parent.block_start(end).min(parent.size_bytes) - parent.block_start(block));
            block = end;
        }
        Ok(pasted)
    }

    /// Repeats what failed for a while; the owner's lease ends it.
    async fn neighbours_at_last(&self, block: u64) -> Result<u64, Ended> {
        loop {
            match self.neighbours(block).await {
                Err(Ended::Failed(Failure::Passing(why))) => {
                    tracing::warn!(target: "controlpath", layer = self.layer.parent().layer.0, block, why, "a hydrator waits");
                }
                done => return done,
            }
            tokio::time::sleep(rng::jitter(LAZY_RETRY_MAX)).await;
        }
    }

    /// Pastes what is missing of a block and its neighbours.
    async fn neighbours(&self, block: u64) -> Result<u64, Ended> {
        if !self.layer.neighbours(block).any(|block| self.data.contains(block)) {
            return Ok(0);
        }
        let mut lacking = self.layer.lacking(block).await?;
        lacking.retain(|block| self.data.contains(*block));
        let count = lacking.len() as u64;
        let filled = stream::iter(lacking).map(|block| self.fill(block)).buffer_unordered(HYDRATE_BLOCKS_PARALLEL);
        filled.try_collect::<()>().await?;
        Ok(count)
    }

    async fn fill(&self, block: u64) -> Result<(), Ended> {
        let len = self.layer.parent().block_len(block) as u64;
        self.throttle.pass(len).await;
        // The source said that it holds data; a block that is zeros all the same has nothing to be pasted.
        if let Some(content) = patiently(|| self.source.block(block)).await? {
            self.read_bytes.fetch_add(len, Ordering::Relaxed);
            self.layer.paste(block, &content).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_blocks_are_kept_one_by_one() {
        let mut data = DataBlocks::new(130);
        [0, 63, 64, 129].into_iter().for_each(|block| data.insert(block));
        data.insert(1 << 40);
        let all: Vec<u64> = (0..200).filter(|block| data.contains(*block)).collect();
        assert_eq!(all, [0, 63, 64, 129]);
    }
}
