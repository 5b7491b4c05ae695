//! Writes a backup to a device that reads as zeros, as a new volume does.
//!
//! Invariants: every byte is proved before it is written; what is zeros is not written; the device is flushed at the end.

use crate::error::{RepoError, RepoErrorKind, TransferError};
use crate::export::first_block;
use crate::index::{Index, Merkle};
use crate::layout::BlockRef;
use crate::repository::Repository;
use crate::run::is_zero;
use crate::throttle::Throttle;
use bytes::Bytes;
use futures_util::{TryStreamExt, stream};
use ogee_client::BlockDevice;
use ogee_common::limits::BACKUP_BLOCKS_PARALLEL;

/// Zeros shorter than this are written with their neighbours: a request costs more than they do.
const CELL_BYTES: usize = 64 << 10;

/// What was done.
#[derive(Debug, Clone, Copy, Default)]
pub struct RestoreReport {
    /// Bytes read from the repository, as content.
    pub read_bytes: u64,
}

/// Copies the backup to the start of `device`. `progress` is told of bytes that are done.
///
/// # Errors
/// A block that is missing or damaged, or the device cannot be written; it is then written in part.
pub async fn restore<D: BlockDevice>(
    repo: &Repository, index: &Index, device: &D, throttle: &Throttle, progress: impl Fn(u64) + Sync,
) -> Result<RestoreReport, TransferError> {
    if device.info().size_bytes < index.size_bytes {
        let why = "the volume is smaller than the backup";
        return Err(RepoError::new(RepoErrorKind::Unusable, "restore", index.id.clone(), why).into());
    }
    let mut report = RestoreReport::default();
    let mut merkle = Merkle::new(&repo.sealer);
    let leaves = repo.leaves(index);
    let mut leaves = std::pin::pin!(leaves);
    while let Some((leaf, blocks)) = leaves.try_next().await? {
        merkle.leaf(&blocks);
        let copy = |(i, block): (u64, BlockRef)| {
            let progress = &progress;
            async move {
                if !block.is_zeros() {
                    copy_block(repo, index, device, (i, block), throttle).await?;
                }
                progress(u64::from(index.block_len(i)));
                Ok::<_, TransferError>(())
            }
        };
        let numbered: Vec<_> = (first_block(leaf)..).zip(blocks).collect();
        let len = |(i, b): &(u64, BlockRef)| if b.is_zeros() { 0 } else { u64::from(index.block_len(*i)) };
        report.read_bytes += numbered.iter().map(len).sum::<u64>();
        stream::iter(numbered.into_iter().map(Ok)).try_for_each_concurrent(BACKUP_BLOCKS_PARALLEL, copy).await?;
    }
    if merkle.root(index.size_bytes) != index.root {
        return Err(RepoError::corrupt(&index.id, "the Merkle root is not that of its blocks").into());
    }
    device.flush().await?;
    Ok(report)
}

async fn copy_block<D: BlockDevice>(
    repo: &Repository, index: &Index, device: &D, (i, block): (u64, BlockRef), throttle: &Throttle,
) -> Result<(), TransferError> {
    let len = index.block_len(i);
    throttle.pass(u64::from(len)).await;
    let content = Bytes::from(repo.block(block, usize::try_from(len).unwrap_or(usize::MAX)).await?);
    let at = i * u64::from(index.block_bytes);
    let mut from = 0;
    while from < content.len() {
        let cell = |at: usize| at..(at + CELL_BYTES).min(content.len());
        let mut to = from;
        while to < content.len() && !is_zero(&content[cell(to)]) {
            to = cell(to).end;
        }
        if to > from {
            device.write(at + from as u64, content.slice(from..to)).await?;
        }
        from = cell(to).end.max(to);
    }
    Ok(())
}
