//! An open repository: its description, listing and reading backups. Removing them is `removal.rs`.
//!
//! Invariant: content is returned only if it has the address it was asked by.

use crate::backend::Backend;
use crate::error::{RepoError, RepoErrorKind};
use crate::index::{BackupId, FORMAT, Index, IndexKey, REF_BYTES, open_index, parse_leaf};
use crate::key_file::KeyFile;
use crate::layout::{BlockRef, INDEXES, REMOVED, REPOSITORY, hex};
use crate::seal::Sealer;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_common::limits::{
    BACKUP_BLOCK_BYTES_MAX, BACKUP_BLOCK_BYTES_MIN, BACKUP_BLOCKS_PARALLEL, BACKUP_INDEX_BYTES_MAX,
    BACKUP_OBJECT_OVERHEAD, BACKUP_RECORD_BYTES_MAX,
};
use ogee_common::rng;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// Bytes of a block unless chosen otherwise; see `docs/backup-format.md`.
const BLOCK_BYTES: u32 = 256 << 10;

/// How to open a repository.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Its key, if it is encrypted, or is to be.
    pub key: Option<KeyFile>,
    /// Make it if there is none.
    pub create: bool,
    /// Bytes of a block of a new one: a power of two from 256 KiB to 1 MiB.
    pub block_bytes: Option<u32>,
}

/// The description of a repository, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Description {
    format: u32,
    id: String,
    block_bytes: u32,
    encryption: Option<Encryption>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Encryption {
    cipher: String,
    key_check: String,
}

/// An open repository. Clones share it.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) backend: Backend,
    pub(crate) sealer: Sealer,
    pub(crate) block_bytes: u32,
    id: String,
}

impl Repository {
    /// Opens a repository, or makes it.
    ///
    /// # Errors
    /// There is none, it is of a newer format, or the key is missing, needless or wrong.
    pub async fn open(backend: Backend, options: OpenOptions) -> Result<Self, RepoError> {
        let found = match backend.get(REPOSITORY, BACKUP_RECORD_BYTES_MAX).await {
            Err(e) if e.kind == RepoErrorKind::NotFound && options.create => make(&backend, &options).await?,
            found => found?,
        };
        let bad = |kind, why| RepoError::new(kind, "open", REPOSITORY, why);
        let description: Description = serde_json::from_slice(&found)
            .map_err(|e| bad(RepoErrorKind::Corrupt, "it is no description of a repository").because(e))?;
        if description.format != FORMAT {
            return Err(bad(RepoErrorKind::Unusable, "the repository is of another format; use a newer ogee"));
        }
        let sizes = BACKUP_BLOCK_BYTES_MIN..=BACKUP_BLOCK_BYTES_MAX;
        if !sizes.contains(&description.block_bytes) || !description.block_bytes.is_power_of_two() {
            return Err(bad(RepoErrorKind::Corrupt, "its block size makes no sense"));
        }
        let why = match (&description.encryption, &options.key) {
            (None, None) => None,
            (None, Some(_)) => Some("the repository is not encrypted; leave the key file out"),
            (Some(_), None) => Some("the repository is encrypted; name its key file"),
            (Some(e), Some(key)) => (e.key_check != key.check()).then_some("this is not the repository's key"),
        };
        match why {
            Some(why) => Err(bad(RepoErrorKind::WrongKey, why)),
            None => Ok(Self {
                backend,
                sealer: Sealer { key: options.key },
                block_bytes: description.block_bytes,
                id: description.id,
            }),
        }
    }

    /// The repository's identity.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// All backups that are complete and not removed, oldest first. One that cannot be read is an error of its own.
    ///
    /// # Errors
    /// The repository cannot be listed.
    pub async fn backups(&self) -> Result<Vec<Result<Index, RepoError>>, RepoError> {
        let keys = self.index_keys().await?;
        let read = |key: IndexKey| async move { self.index(&key).await };
        let read: Vec<_> = stream::iter(keys).map(read).buffered(BACKUP_BLOCKS_PARALLEL).collect().await;
        let mut found: Vec<_> = read.into_iter().filter_map(Result::transpose).collect();
        let age = |i: &Result<Index, RepoError>| i.as_ref().map_or((0, 0), |i| (i.made_unix_ms, i.generation));
        found.sort_by_key(age);
        Ok(found)
    }

    /// One backup, by the digits its identity starts with, or the newest by `volume` or `volume@snapshot`.
    ///
    /// # Errors
    /// [`RepoErrorKind::NotFound`]; [`RepoErrorKind::Unusable`] if several identities start so.
    pub async fn find(&self, name: &str) -> Result<Index, RepoError> {
        let keys = self.index_keys().await?;
        let by_id: Vec<_> = keys.iter().filter(|k| name.len() >= 4 && BackupId(k.run).to_string().starts_with(name)).collect();
        if let [key] = by_id[..]
            && let Some(index) = self.index(key).await?
        {
            return Ok(index);
        }
        if by_id.len() > 1 {
            return Err(RepoError::new(RepoErrorKind::Unusable, "find", name, "several backups start so; give more digits"));
        }
        let is_named = |i: &Index| i.volume == name || format!("{}@{}", i.volume, i.snapshot) == name;
        // Damaged ones cannot be asked for their names.
        let newest = self.backups().await?.into_iter().filter_map(Result::ok).rfind(is_named);
        newest.ok_or_else(|| RepoError::new(RepoErrorKind::NotFound, "find", name, "there is no such backup; see: ogee backup ls"))
    }

    /// Names of indexes that are not marked as removed, in the order of volumes and generations.
    pub(crate) async fn index_keys(&self) -> Result<Vec<IndexKey>, RepoError> {
        let removed: HashSet<_> = self.removed_keys().await?.into_iter().collect();
        let mut keys = self.backend.list(INDEXES, |key| IndexKey::parse(INDEXES, key)).await?;
        keys.retain(|key| !removed.contains(key));
        keys.sort();
        Ok(keys)
    }

    /// Indexes that are marked as removed.
    pub(crate) async fn removed_keys(&self) -> Result<Vec<IndexKey>, RepoError> {
        self.backend.list(REMOVED, |key| IndexKey::parse(REMOVED, key)).await
    }

    /// Reads an index; `None` if its run was given up, or the index is gone.
    pub(crate) async fn index(&self, key: &IndexKey) -> Result<Option<Index>, RepoError> {
        let name = key.key();
        let max = BACKUP_INDEX_BYTES_MAX + BACKUP_OBJECT_OVERHEAD;
        match self.backend.get(&name, max).await {
            Ok(object) => open_index(&self.sealer, &name, &object, BACKUP_INDEX_BYTES_MAX),
            Err(e) if e.kind == RepoErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Reads a block and proves it: `len` bytes with this address.
    pub(crate) async fn block(&self, block: BlockRef, len: usize) -> Result<Vec<u8>, RepoError> {
        let name = block.key();
        let object = match self.backend.get(&name, len + BACKUP_OBJECT_OVERHEAD).await {
            Err(e) if e.kind == RepoErrorKind::NotFound => {
                return Err(RepoError::corrupt(&name, "a block of the backup is missing").because(e));
            }
            object => object?,
        };
        let sealer = self.sealer.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let content = sealer.open(&name, &object, len)?;
            if content.len() != len || sealer.address(&[&content]) != block.address {
                return Err(RepoError::corrupt(&name, "its content is not what was stored"));
            }
            Ok(content)
        });
        opened.await.map_err(|e| RepoError::new(RepoErrorKind::Failure, "read", block.key(), "a thread ended").because(e))?
    }

    /// The blocks of a leaf of an index.
    pub(crate) async fn leaf(&self, index: &Index, i: usize, place: BlockRef) -> Result<Vec<BlockRef>, RepoError> {
        let len = index.leaf_len(i);
        if place.is_zeros() {
            return Ok(vec![BlockRef::ZEROS; len]);
        }
        let content = self.block(place, len * REF_BYTES).await?;
        parse_leaf(&content, len).ok_or_else(|| RepoError::corrupt(&place.key(), "it is no leaf"))
    }

    /// All leaves of an index in order, a few ahead.
    pub(crate) fn leaves<'a>(
        &'a self, index: &'a Index,
    ) -> impl futures_util::Stream<Item = Result<(usize, Vec<BlockRef>), RepoError>> + 'a {
        let read = move |(i, place): (usize, Option<BlockRef>)| async move {
            let place = place.ok_or_else(|| RepoError::corrupt(&index.id, "a leaf has no place"))?;
            Ok((i, self.leaf(index, i, place).await?))
        };
        stream::iter(index.leaf_refs().enumerate()).map(read).buffered(BACKUP_BLOCKS_PARALLEL)
    }

    /// Blocks of all leaves, to be worked on; leaves themselves are not among them.
    pub(crate) async fn each_leaf(
        &self, index: &Index, mut each: impl FnMut(&[BlockRef]),
    ) -> Result<(), RepoError> {
        let leaves = self.leaves(index);
        let mut leaves = std::pin::pin!(leaves);
        while let Some((_, blocks)) = leaves.try_next().await? {
            each(&blocks);
        }
        Ok(())
    }
}

/// Describes a new repository; of several makers one wins, and all read what it wrote.
async fn make(backend: &Backend, options: &OpenOptions) -> Result<Vec<u8>, RepoError> {
    let block_bytes = options.block_bytes.unwrap_or(BLOCK_BYTES);
    let sizes = BACKUP_BLOCK_BYTES_MIN..=BACKUP_BLOCK_BYTES_MAX;
    if !sizes.contains(&block_bytes) || !block_bytes.is_power_of_two() {
        let why = "the block size must be 256 KiB, 512 KiB or 1 MiB";
        return Err(RepoError::new(RepoErrorKind::Unusable, "create", REPOSITORY, why));
    }
    let id = hex(&[rng::nonzero_u64().to_be_bytes(), rng::nonzero_u64().to_be_bytes()].concat());
    let encryption = |key: &KeyFile| Encryption { cipher: "aes-256-gcm".to_owned(), key_check: key.check() };
    let description = Description { format: FORMAT, id, block_bytes, encryption: options.key.as_ref().map(encryption) };
    let json = serde_json::to_vec(&description).expect("a description is text and numbers");
    backend.create(REPOSITORY, json).await?;
    backend.settle().await?;
    backend.get(REPOSITORY, BACKUP_RECORD_BYTES_MAX).await
}
