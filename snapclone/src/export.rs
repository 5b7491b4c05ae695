//! Makes a backup of a device that does not change: a snapshot opened for reading.
//!
//! The device says what it holds, page by page. A block without data is not read; nor is one of which no page changed
//! since the base (`base.rs`): its reference is kept. Invariants: the index is published after every block it refers to is
//! stored; what the device does not know is read. Memory is bounded by the blocks in flight, two leaves, and the known blocks.

use crate::base::Base;
use crate::error::{RepoError, RepoErrorKind, TransferError};
use crate::index::{FORMAT, Index, Merkle, ref_text};
use crate::layout::BlockRef;
use crate::repository::Repository;
use crate::run::Run;
use crate::succession::{RunGuard, RunName, Unguarded};
use crate::throttle::Throttle;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_client::{BlockDevice, ExtentKind, IoError, Moment, ReadData, ReadPiece};
use ogee_common::clock;
use ogee_common::limits::{BACKUP_BLOCKS_PARALLEL, BACKUP_LEAF_BLOCKS};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a backup is of.
#[derive(Debug, Clone)]
pub struct Source {
    /// The cluster's identity, hexadecimal.
    pub cluster: String,
    /// The volume's number in its cluster.
    pub volume_id: u64,
    /// The volume's path.
    pub volume: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// When the snapshot was taken, milliseconds since 1970.
    pub snapshot_unix_ms: u64,
    /// Its moment, then those of what it stands on, nearest first. Empty: not known; then everything that holds data is
    /// read, and the next backup cannot be built on this one.
    pub moments: Vec<Moment>,
    /// Build on no other backup: read everything that holds data.
    pub full: bool,
}

/// What was done.
#[derive(Debug, Clone)]
pub struct ExportReport {
    /// The index that was published.
    pub index: Index,
    /// Blocks that were stored, leaves included.
    pub new_blocks: u64,
    /// Bytes read of the device.
    pub read_bytes: u64,
    /// Bytes of blocks that were taken over from the base without being read.
    pub kept_bytes: u64,
}

/// What was done to the device.
#[derive(Debug, Default)]
struct Done {
    read_bytes: AtomicU64,
    kept_bytes: AtomicU64,
}

/// What the device says of a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Content {
    has_data: bool,
    changed: bool,
}

/// Copies the whole device into the repository as one backup. `progress` is told of bytes that are done.
///
/// # Errors
/// The device cannot be read or the repository not written; then no backup is made, and the next one goes on from there.
pub async fn export<D: BlockDevice>(
    repo: &Repository, device: &D, source: Source, throttle: &Throttle, progress: impl Fn(u64) + Sync,
) -> Result<ExportReport, TransferError> {
    Box::pin(export_guarded(repo, device, source, (throttle, &Unguarded), progress)).await
}

/// As [`export`], with somebody who is asked before the run shows.
///
/// # Errors
/// The same, and what the guard says.
pub async fn export_guarded<D: BlockDevice>(
    repo: &Repository, device: &D, source: Source, (throttle, guard): (&Throttle, &impl RunGuard), progress: impl Fn(u64) + Sync,
) -> Result<ExportReport, TransferError> {
    let run = Arc::new(Run::start(repo, &format!("{}-{:016x}", source.cluster, source.volume_id)).await?);
    guard.opened(&RunName(run.record.target.clone())).await?;
    let mut index = Index {
        format: FORMAT,
        id: format!("{:016x}", run.record.target.run),
        generation: run.record.target.generation,
        cluster: source.cluster,
        volume_id: source.volume_id,
        volume: source.volume,
        snapshot: source.snapshot,
        snapshot_unix_ms: source.snapshot_unix_ms,
        layer: source.moments.first().map_or(0, |m| m.layer.0),
        seq: source.moments.first().map_or(0, |m| m.seq.0),
        made_unix_ms: 0,
        size_bytes: device.info().size_bytes,
        block_bytes: repo.block_bytes,
        data_bytes: 0,
        new_bytes: 0,
        stored_bytes: 0,
        root: String::new(),
        leaves: Vec::new(),
    };
    let bases: &[Index] = if source.full { &[] } else { &run.bases };
    let base = Base::choose(bases, &index.cluster, &source.moments);
    let (mut merkle, done) = (Merkle::new(&repo.sealer), Done::default());
    let leaves = index.blocks().div_ceil(BACKUP_LEAF_BLOCKS as u64);
    for leaf in 0..leaves {
        let leaf = usize::try_from(leaf).map_err(|_| too_large())?;
        let held = contents(device, &index, leaf, base.map(|base| base.moment)).await?;
        let kept = match &base {
            Some(base) => base.leaf(repo, &index, leaf).await?,
            None => Vec::new(),
        };
        let plan = plan(&held, &kept);
        let blocks = export_leaf(&run, device, (&index, leaf), plan, (throttle, &progress, &done)).await?;
        index.data_bytes += data_bytes(&index, leaf, &blocks);
        merkle.leaf(&blocks);
        index.leaves.push(ref_text(run.store_leaf(&blocks, throttle).await?));
        run.refresh().await?;
    }
    index.root = merkle.root(index.size_bytes);
    index.new_bytes = run.added.new_bytes.load(Relaxed);
    index.stored_bytes = run.added.stored_bytes.load(Relaxed);
    index.made_unix_ms = clock::unix_ms();
    guard.publishes().await?;
    run.publish(&index).await?;
    let (read_bytes, kept_bytes) = (done.read_bytes.into_inner(), done.kept_bytes.into_inner());
    Ok(ExportReport { index, new_blocks: run.added.blocks.load(Relaxed), read_bytes, kept_bytes })
}

fn too_large() -> RepoError {
    RepoError::new(RepoErrorKind::Limit, "back up", "volume", "it is too large")
}

/// First block of a leaf.
pub(crate) fn first_block(leaf: usize) -> u64 {
    leaf as u64 * BACKUP_LEAF_BLOCKS as u64
}

fn data_bytes(index: &Index, leaf: usize, blocks: &[BlockRef]) -> u64 {
    let numbered = (first_block(leaf)..).zip(blocks);
    numbered.filter(|(_, b)| !b.is_zeros()).map(|(i, _)| u64::from(index.block_len(i))).sum()
}

/// What the device says of the blocks of a leaf.
async fn contents<D: BlockDevice>(
    device: &D, index: &Index, leaf: usize, since: Option<Moment>,
) -> Result<Vec<Content>, IoError> {
    let block = u64::from(index.block_bytes);
    let mut held = vec![Content::default(); index.leaf_len(leaf)];
    let start = first_block(leaf) * block;
    let end = index.size_bytes.min(start + held.len() as u64 * block);
    let mut at = start;
    while at < end {
        let extents = device.extents(at, end - at, since).await?;
        for extent in extents.iter().filter(|e| e.len > 0) {
            let blocks = (at - start) / block..=(at + extent.len - 1 - start) / block;
            for i in blocks {
                let content = usize::try_from(i).ok().and_then(|i| held.get_mut(i));
                let Some(content) = content else { continue };
                content.has_data |= extent.kind == ExtentKind::Data;
                content.changed |= extent.changed;
            }
            at += extent.len;
        }
        // A device that says nothing knows nothing.
        if extents.is_empty() {
            held.fill(Content { has_data: true, changed: true });
            break;
        }
    }
    Ok(held)
}

/// What is known of each block without reading it.
fn plan(held: &[Content], kept: &[BlockRef]) -> Vec<Option<BlockRef>> {
    let of_base = kept.iter().copied().map(Some).chain(std::iter::repeat(None));
    let decide = |(content, base): (&Content, Option<BlockRef>)| match content {
        Content { has_data: false, .. } => Some(BlockRef::ZEROS),
        Content { changed: false, .. } => base,
        Content { .. } => None,
    };
    held.iter().zip(of_base).map(decide).collect()
}

async fn export_leaf<D: BlockDevice>(
    run: &Arc<Run>, device: &D, (index, leaf): (&Index, usize), plan: Vec<Option<BlockRef>>,
    (throttle, progress, done): (&Throttle, &(impl Fn(u64) + Sync), &Done),
) -> Result<Vec<BlockRef>, TransferError> {
    let copy = |(i, known): (u64, Option<BlockRef>)| async move {
        let len = index.block_len(i);
        let block = match known {
            Some(known) => {
                let kept = if known.is_zeros() { 0 } else { u64::from(len) };
                done.kept_bytes.fetch_add(kept, Relaxed);
                known
            }
            None => {
                let data = device.read(i * u64::from(index.block_bytes), len).await?;
                done.read_bytes.fetch_add(u64::from(len), Relaxed);
                match contiguous(&data) {
                    Some(content) => run.store_sound(content, throttle).await?,
                    None => BlockRef::ZEROS,
                }
            }
        };
        progress(u64::from(len));
        Ok::<_, TransferError>(block)
    };
    stream::iter((first_block(leaf)..).zip(plan)).map(copy).buffered(BACKUP_BLOCKS_PARALLEL).try_collect().await
}

/// The bytes in one piece; `None` if they are known to be zeros.
fn contiguous(data: &ReadData) -> Option<Bytes> {
    match &data.pieces[..] {
        [ReadPiece::Data(bytes)] => Some(bytes.clone()),
        pieces if pieces.iter().all(|p| matches!(p, ReadPiece::Zeros(_))) => None,
        _ => Some(Bytes::from(data.to_vec())),
    }
}
