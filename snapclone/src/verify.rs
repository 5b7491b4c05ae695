//! Reads a backup as a restore would and says what is wrong with it.
//!
//! Invariant: it goes on after a damaged block, so that all damage is counted; it stops when the repository does not
//! answer, because that says nothing about the backup.

use crate::error::{RepoError, RepoErrorKind};
use crate::export::first_block;
use crate::index::{Index, Merkle};
use crate::layout::BlockRef;
use crate::repository::Repository;
use futures_util::{StreamExt, stream};
use ogee_common::limits::BACKUP_BLOCKS_PARALLEL;
use std::collections::HashSet;

/// Damage that is named; more is only counted.
const NAMED_MAX: usize = 16;

/// What was found.
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// Blocks and leaves read.
    pub blocks: u64,
    /// Content bytes read.
    pub bytes: u64,
    /// Blocks and leaves that are missing or damaged, or a root that does not match.
    pub damaged: u64,
    /// The first of them.
    pub damage: Vec<RepoError>,
}

impl VerifyReport {
    fn note(&mut self, error: RepoError) -> Result<(), RepoError> {
        if error.kind != RepoErrorKind::Corrupt {
            return Err(error);
        }
        self.damaged += 1;
        if self.damage.len() < NAMED_MAX {
            self.damage.push(error);
        }
        Ok(())
    }
}

/// Reads all of a backup, or every `sample`th block of it (1 is all).
///
/// # Errors
/// The repository does not answer. Damage is no error: it is in the report.
pub async fn verify(
    repo: &Repository, index: &Index, sample: u64, progress: impl Fn(u64),
) -> Result<VerifyReport, RepoError> {
    let mut report = VerifyReport::default();
    let mut merkle = Merkle::new(&repo.sealer);
    let mut whole = true;
    let mut seen = HashSet::new();
    for (leaf, place) in index.leaf_refs().enumerate() {
        let place = place.unwrap_or(BlockRef::ZEROS);
        let blocks = match repo.leaf(index, leaf, place).await {
            Ok(blocks) => blocks,
            Err(e) => {
                whole = false;
                report.note(e)?;
                continue;
            }
        };
        merkle.leaf(&blocks);
        report.blocks += u64::from(!place.is_zeros());
        seen.clear();
        let chosen = (first_block(leaf)..).zip(blocks.iter().copied()).filter(|(i, b)| i % sample == 0 && !b.is_zeros() && seen.insert(*b));
        let read = |(i, block): (u64, BlockRef)| async move {
            let len = index.block_len(i);
            (len, repo.block(block, usize::try_from(len).unwrap_or(usize::MAX)).await)
        };
        let mut reads = stream::iter(chosen).map(read).buffer_unordered(BACKUP_BLOCKS_PARALLEL);
        while let Some((len, result)) = reads.next().await {
            report.blocks += 1;
            match result {
                Ok(_) => report.bytes += u64::from(len),
                Err(e) => report.note(e)?,
            }
        }
        progress((0..blocks.len() as u64).map(|i| u64::from(index.block_len(first_block(leaf) + i))).sum());
    }
    if whole && merkle.root(index.size_bytes) != index.root {
        report.note(RepoError::corrupt(&index.id, "the Merkle root is not that of its blocks"))?;
    }
    Ok(report)
}
