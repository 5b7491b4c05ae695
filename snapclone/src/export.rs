//! Makes a backup of a device that does not change: a snapshot opened for reading.
//!
//! Invariant: the index is published after every block it refers to is stored. Memory is bounded by the blocks in
//! flight, one leaf, and the known blocks.

use crate::error::{RepoError, RepoErrorKind, TransferError};
use crate::index::{FORMAT, Index, Merkle, ref_text};
use crate::layout::BlockRef;
use crate::repository::Repository;
use crate::run::Run;
use crate::throttle::Throttle;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_client::{BlockDevice, ReadData, ReadPiece};
use ogee_common::clock;
use ogee_common::limits::{BACKUP_BLOCKS_PARALLEL, BACKUP_LEAF_BLOCKS};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

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
}

/// What was done.
#[derive(Debug, Clone)]
pub struct ExportReport {
    /// The index that was published.
    pub index: Index,
    /// Blocks that were stored, leaves included.
    pub new_blocks: u64,
}

/// Copies the whole device into the repository as one backup. `progress` is told of bytes that are done.
///
/// # Errors
/// The device cannot be read or the repository not written; then no backup is made, and the next one goes on from there.
pub async fn export<D: BlockDevice>(
    repo: &Repository, device: &D, source: Source, throttle: &Throttle, progress: impl Fn(u64) + Sync,
) -> Result<ExportReport, TransferError> {
    let run = Arc::new(Run::start(repo, &format!("{}-{:016x}", source.cluster, source.volume_id)).await?);
    let mut index = Index {
        format: FORMAT,
        id: format!("{:016x}", run.record.target.run),
        generation: run.record.target.generation,
        cluster: source.cluster,
        volume_id: source.volume_id,
        volume: source.volume,
        snapshot: source.snapshot,
        snapshot_unix_ms: source.snapshot_unix_ms,
        made_unix_ms: 0,
        size_bytes: device.info().size_bytes,
        block_bytes: repo.block_bytes,
        data_bytes: 0,
        new_bytes: 0,
        stored_bytes: 0,
        root: String::new(),
        leaves: Vec::new(),
    };
    let mut merkle = Merkle::new(&repo.sealer);
    let leaves = index.blocks().div_ceil(BACKUP_LEAF_BLOCKS as u64);
    for leaf in 0..leaves {
        let leaf = usize::try_from(leaf).map_err(|_| too_large())?;
        let blocks = export_leaf(&run, device, &index, leaf, (throttle, &progress)).await?;
        index.data_bytes += data_bytes(&index, leaf, &blocks);
        merkle.leaf(&blocks);
        index.leaves.push(ref_text(run.store_leaf(&blocks, throttle).await?));
        run.refresh().await?;
    }
    index.root = merkle.root(index.size_bytes);
    index.new_bytes = run.added.new_bytes.load(Relaxed);
    index.stored_bytes = run.added.stored_bytes.load(Relaxed);
    index.made_unix_ms = clock::unix_ms();
    run.publish(&index).await?;
    Ok(ExportReport { index, new_blocks: run.added.blocks.load(Relaxed) })
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

async fn export_leaf<D: BlockDevice>(
    run: &Arc<Run>, device: &D, index: &Index, leaf: usize, (throttle, progress): (&Throttle, &(impl Fn(u64) + Sync)),
) -> Result<Vec<BlockRef>, TransferError> {
    let first = first_block(leaf);
    let copy = |i: u64| async move {
        let len = index.block_len(i);
        let data = device.read(i * u64::from(index.block_bytes), len).await?;
        let block = match contiguous(&data) {
            Some(content) => run.store_sound(content, throttle).await?,
            None => BlockRef::ZEROS,
        };
        progress(u64::from(len));
        Ok::<_, TransferError>(block)
    };
    let blocks = first..first + index.leaf_len(leaf) as u64;
    stream::iter(blocks).map(copy).buffered(BACKUP_BLOCKS_PARALLEL).try_collect().await
}

/// The bytes in one piece; `None` if they are known to be zeros.
fn contiguous(data: &ReadData) -> Option<Bytes> {
    match &data.pieces[..] {
        [ReadPiece::Data(bytes)] => Some(bytes.clone()),
        pieces if pieces.iter().all(|p| matches!(p, ReadPiece::Zeros(_))) => None,
        _ => Some(Bytes::from(data.to_vec())),
    }
}
