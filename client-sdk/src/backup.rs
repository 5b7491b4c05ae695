//! What a volume that stands on a backup needs from outside: the traits by which its missing pages are read.
//!
//! Implemented over a repository by `snapclone`, which knows formats, keys and servers; used by `lazy.rs`. Invariants: a source gives
//! content that it has proved, or an error; a backup never changes, so one content belongs to a block for ever. Absent: caching
//! and retries, which are `lazy.rs`; what is done with the content.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use ogee_common::id::LayerId;
use ogee_common::limits::{BACKUP_BLOCK_BYTES_MAX, BACKUP_BLOCK_BYTES_MIN, VOLUME_BYTES_MAX};
use ogee_proto::mds;
use std::fmt::Debug;
use std::sync::Arc;

/// The backup that a layer stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupParent {
    /// The layer, at the bottom of an ancestry.
    pub layer: LayerId,
    /// The repository's name, in the configuration of whoever reads it.
    pub repository: String,
    /// Number of the run that made the backup.
    pub backup: u64,
    /// Its Merkle root.
    pub root: [u8; 32],
    /// SHA-256 over the places of its leaves.
    pub leaves: [u8; 32],
    /// Bytes that it holds, from the start of the volume on.
    pub size_bytes: u64,
    /// Bytes of a block: a power of two from 256 KiB to 1 MiB, so that a block lies in one metadata row.
    pub block_bytes: u32,
}

impl BackupParent {
    /// Checks what the MDS says; the error names what is wrong.
    ///
    /// # Errors
    /// A field that cannot be.
    pub fn of(message: &mds::BackupParent) -> Result<Self, &'static str> {
        let digest = |bytes: &[u8]| bytes.try_into().map_err(|_| "backup digest");
        let blocks = BACKUP_BLOCK_BYTES_MIN..=BACKUP_BLOCK_BYTES_MAX;
        if message.layer == 0 || message.size_bytes == 0 || message.size_bytes > VOLUME_BYTES_MAX {
            return Err("backup");
        }
        if !blocks.contains(&message.block_bytes) || !message.block_bytes.is_power_of_two() {
            return Err("backup block size");
        }
        Ok(Self {
            layer: LayerId(message.layer),
            repository: message.repository.clone(),
            backup: message.backup,
            root: digest(&message.root)?,
            leaves: digest(&message.leaves)?,
            size_bytes: message.size_bytes,
            block_bytes: message.block_bytes,
        })
    }

    /// The block that holds a byte of the volume.
    #[must_use]
    pub fn block_of(&self, offset: u64) -> u64 {
        offset / u64::from(self.block_bytes)
    }

    /// First byte of a block.
    #[must_use]
    pub fn block_start(&self, block: u64) -> u64 {
        block * u64::from(self.block_bytes)
    }

    /// Bytes of a block; the last one may be shorter, and behind the end there are none.
    #[must_use]
    pub fn block_len(&self, block: u64) -> usize {
        let left = self.size_bytes.saturating_sub(self.block_start(block));
        usize::try_from(left).unwrap_or(usize::MAX).min(self.block_bytes as usize)
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_bytes))
    }
}

/// What a caller can do about a backup that was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupErrorKind {
    /// It may be read later: no answer, no permission now, a server that is overloaded.
    Unavailable,
    /// What is stored is not the backup: it will not become so.
    Damaged,
}

/// A backup was not read.
#[derive(Debug, thiserror::Error)]
#[error("read backup")]
pub struct BackupError {
    /// What a caller can do.
    pub kind: BackupErrorKind,
    /// Why.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// An open backup. One attempt each; the caller repeats.
pub trait BackupSource: Debug + Send + Sync {
    /// Whether a block holds anything but zeros.
    fn holds_data(&self, block: u64) -> BoxFuture<'_, Result<bool, BackupError>>;

    /// The content of a block, proved, [`BackupParent::block_len`] bytes; `None`: all of it is zeros.
    fn block(&self, block: u64) -> BoxFuture<'_, Result<Option<Bytes>, BackupError>>;
}

/// A repository that this process has no access to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration of repositories has none of the name {0:?}")]
pub struct UnknownRepository(pub String);

/// The repositories that a process has access to.
pub trait BackupOpener: Debug + Send + Sync {
    /// A source for a backup. Nothing is asked of the repository yet.
    ///
    /// # Errors
    /// [`UnknownRepository`].
    fn open(&self, parent: &BackupParent) -> Result<Arc<dyn BackupSource>, UnknownRepository>;
}

/// Whether a process with these repositories reads the backup that a volume stands on.
///
/// # Errors
/// [`UnknownRepository`].
pub(crate) fn can_read(opener: Option<&Arc<dyn BackupOpener>>, message: &mds::BackupParent) -> Result<(), UnknownRepository> {
    // What makes no sense is told by the attach.
    let Ok(parent) = BackupParent::of(message) else { return Ok(()) };
    match opener {
        Some(opener) => opener.open(&parent).map(drop),
        None => Err(UnknownRepository(parent.repository)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_is_short_and_nonsense_is_refused() {
        let message = mds::BackupParent {
            layer: 7,
            repository: "main".to_owned(),
            backup: 1,
            root: vec![1; 32].into(),
            leaves: vec![2; 32].into(),
            size_bytes: (600 << 10) + 4096,
            block_bytes: 256 << 10,
            volume: String::new(),
        };
        let parent = BackupParent::of(&message).expect("good");
        assert_eq!((parent.blocks(), parent.block_of(600 << 10), parent.block_start(2)), (3, 2, 512 << 10));
        assert_eq!([0, 1, 2, 3].map(|b| parent.block_len(b)), [256 << 10, 256 << 10, (88 << 10) + 4096, 0]);
        let bad: [fn(&mut mds::BackupParent); 4] =
            [|m| m.layer = 0, |m| m.size_bytes = 0, |m| m.block_bytes = 4096, |m| m.root = vec![0; 31].into()];
        for change in bad {
            let mut other = message.clone();
            change(&mut other);
            assert!(BackupParent::of(&other).is_err(), "{other:?}");
        }
    }
}
