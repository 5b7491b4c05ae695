//! Backups as what volumes stand on: [`Repositories`] and its sources, by which the SDK reads missing pages (ADR 0016).
//!
//! Invariants: a source gives only blocks of the very backup that the MDS names: the index must have its root and size, and the leaves' places
//! that were pinned when the volume was made; a leaf is proved by its place, a block by its leaf. Nothing is asked of the repository before the
//! first block. What cannot be opened or found is taken for *unavailable*: a folder that is not mounted and a bucket that is misspelt look like a
//! backup that is gone, and IO that waits can go on when somebody has looked. Only what is there and is not what it should be is damage.
//! Content is not kept here, leaves are, at most `LAZY_LEAVES_MAX`.

use crate::error::{RepoError, RepoErrorKind};
use crate::index::{BackupId, Index, IndexKey, Merkle};
use crate::layout::{BlockRef, INDEXES, REPOSITORY, unhex};
use crate::place::Place;
use crate::repository::Repository;
use crate::seal::Sealer;
use bytes::Bytes;
use futures_util::{FutureExt, TryStreamExt};
use futures_util::future::BoxFuture;
use ogee_client::{BackupError, BackupErrorKind, BackupOpener, BackupParent, BackupSource, UnknownRepository};
use ogee_common::limits::{BACKUP_LEAF_BLOCKS, BACKUP_RECORD_BYTES_MAX, LAZY_LEAVES_MAX};
use ogee_proto::mds;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;

/// The repositories that a process has access to, by name.
#[derive(Debug, Clone, Default)]
pub struct Repositories(BTreeMap<String, Place>);

impl Repositories {
    /// Places by name.
    pub fn new(places: impl IntoIterator<Item = (String, Place)>) -> Self {
        Self(places.into_iter().collect())
    }

    /// The place of a name.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<&Place> {
        self.0.get(name)
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl BackupOpener for Repositories {
    fn open(&self, parent: &BackupParent) -> Result<Arc<dyn BackupSource>, UnknownRepository> {
        let place = self.place(&parent.repository).ok_or_else(|| UnknownRepository(parent.repository.clone()))?;
        Ok(Arc::new(RepositoryBackup::new(place.clone(), parent.clone())))
    }
}

/// What pins the leaves of a backup: their places, with the sizes by which they are read. Not keyed: the cluster keeps it, and it tells who sees
/// it nothing but whether two volumes stand on the same backup.
fn pin(index: &Index) -> [u8; 32] {
    let head = [index.size_bytes.to_le_bytes().as_slice(), index.block_bytes.to_le_bytes().as_slice()].concat();
    let leaves: Vec<u8> = index.leaves.iter().flat_map(|leaf| [leaf.as_bytes(), b"\n"].concat()).collect();
    Sealer::default().address(&[&head, &leaves])
}

/// A backup as the MDS keeps it for a volume that is to stand on it.
///
/// # Errors
/// [`RepoErrorKind::Corrupt`] for an index without a root, which none is.
pub fn parent_of(index: &Index, repository: &str) -> Result<mds::BackupParent, RepoError> {
    let root: [u8; 32] = unhex(&index.root).ok_or_else(|| RepoError::corrupt(&index.id, "its root is no digest"))?;
    Ok(mds::BackupParent {
        layer: 0,
        repository: repository.to_owned(),
        backup: index.backup_id().0,
        root: root.to_vec().into(),
        leaves: pin(index).to_vec().into(),
        size_bytes: index.size_bytes,
        block_bytes: index.block_bytes,
        volume: String::new(),
    })
}

/// Whether an index is that of the backup that a volume stands on.
fn is_of(index: &Index, parent: &BackupParent) -> bool {
    index.backup_id() == BackupId(parent.backup)
        && unhex::<32>(&index.root) == Some(parent.root)
        && index.size_bytes == parent.size_bytes
        && index.block_bytes == parent.block_bytes
        && pin(index) == parent.leaves
}

#[derive(Debug, Default)]
struct Leaves {
    by_number: HashMap<usize, Arc<[BlockRef]>>,
    /// In the order in which they came.
    order: VecDeque<usize>,
}

/// A backup below a volume. Opened when the first block is asked for.
#[derive(Debug)]
pub struct RepositoryBackup {
    place: Place,
    parent: BackupParent,
    opened: OnceCell<(Repository, Index)>,
    leaves: Mutex<Leaves>,
}

impl RepositoryBackup {
    /// The backup of a parent, in a repository at this place.
    #[must_use]
    pub fn new(place: Place, parent: BackupParent) -> Self {
        Self { place, parent, opened: OnceCell::new(), leaves: Mutex::default() }
    }

    /// The repository and the index, which are opened if need be.
    ///
    /// # Errors
    /// [`BackupError`].
    pub(crate) async fn open(&self) -> Result<&(Repository, Index), BackupError> {
        // Large, and awaited once in the life of the volume.
        let open = Box::pin(async {
            let repo = self.place.open(false).await.map_err(unavailable)?;
            let index = find(&repo, self.parent.backup).await.map_err(judge)?;
            if is_of(&index, &self.parent) {
                return Ok((repo, index));
            }
            Err(damaged(RepoError::corrupt(&index.id, "it is not the backup that the volume was made of")))
        });
        self.opened.get_or_try_init(|| open).await
    }

    async fn place_of(&self, block: u64) -> Result<BlockRef, BackupError> {
        let (repo, index) = self.open().await?;
        let number = usize::try_from(block).unwrap_or(usize::MAX) / BACKUP_LEAF_BLOCKS;
        let leaf = match self.known_leaf(number) {
            Some(leaf) => leaf,
            None => {
                let outside = || damaged(RepoError::corrupt(&index.id, "the backup has no such block"));
                let place = index.leaf_refs().nth(number).flatten().ok_or_else(outside)?;
                let read = repo.leaf(index, number, place).await;
                let leaf: Arc<[BlockRef]> = self.judged(repo, read).await?.into();
                self.keep_leaf(number, &leaf);
                leaf
            }
        };
        let outside = || damaged(RepoError::corrupt(&index.id, "the backup has no such block"));
        leaf.get(usize::try_from(block).unwrap_or(usize::MAX) % BACKUP_LEAF_BLOCKS).copied().ok_or_else(outside)
    }

    fn known_leaf(&self, number: usize) -> Option<Arc<[BlockRef]>> {
        self.leaves.lock().unwrap_or_else(PoisonError::into_inner).by_number.get(&number).cloned()
    }

    fn keep_leaf(&self, number: usize, leaf: &Arc<[BlockRef]>) {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if leaves.by_number.insert(number, leaf.clone()).is_none() {
            leaves.order.push_back(number);
        }
        if leaves.order.len() > LAZY_LEAVES_MAX
            && let Some(oldest) = leaves.order.pop_front()
        {
            leaves.by_number.remove(&oldest);
        }
    }

    async fn read(&self, block: u64) -> Result<Option<Bytes>, BackupError> {
        let place = self.place_of(block).await?;
        if place.is_zeros() {
            return Ok(None);
        }
        let (repo, _) = self.open().await?;
        let read = repo.block(place, self.parent.block_len(block)).await;
        Ok(Some(Bytes::from(self.judged(repo, read).await?)))
    }

    /// Reads all leaves in order and gives each of them on, then proves the Merkle root over them.
    ///
    /// # Errors
    /// [`BackupError`].
    pub(crate) async fn prove(&self, mut each: impl FnMut(usize, &[BlockRef])) -> Result<(), BackupError> {
        let (repo, index) = self.open().await?;
        let mut merkle = Merkle::new(&repo.sealer);
        let mut leaves = std::pin::pin!(repo.leaves(index));
        loop {
            let next = leaves.try_next().await;
            let Some((number, blocks)) = self.judged(repo, next).await? else { break };
            merkle.leaf(&blocks);
            each(number, &blocks);
        }
        if merkle.root(index.size_bytes) == index.root {
            return Ok(());
        }
        Err(damaged(RepoError::corrupt(&index.id, "the Merkle root is not that of its blocks")))
    }

    /// An object that is missing is damage only if the repository is there.
    async fn judged<T>(&self, repo: &Repository, read: Result<T, RepoError>) -> Result<T, BackupError> {
        let error = match read {
            Ok(content) => return Ok(content),
            Err(error) => error,
        };
        if error.kind == RepoErrorKind::Corrupt && repo.backend.get(REPOSITORY, BACKUP_RECORD_BYTES_MAX).await.is_err() {
            return Err(unavailable(error));
        }
        Err(judge(error))
    }
}

/// The index of a run, also of a backup that is marked as removed: its blocks are there until they are collected.
async fn find(repo: &Repository, run: u64) -> Result<Index, RepoError> {
    let missing = || RepoError::new(RepoErrorKind::NotFound, "find", BackupId(run).to_string(), "the backup below the volume is not there");
    let keys = repo.backend.list(INDEXES, |key| IndexKey::parse(INDEXES, key)).await?;
    let key = keys.into_iter().find(|key| key.run == run).ok_or_else(missing)?;
    repo.index(&key).await?.ok_or_else(missing)
}

fn unavailable(error: RepoError) -> BackupError {
    BackupError { kind: BackupErrorKind::Unavailable, source: Box::new(error) }
}

fn damaged(error: RepoError) -> BackupError {
    BackupError { kind: BackupErrorKind::Damaged, source: Box::new(error) }
}

fn judge(error: RepoError) -> BackupError {
    if error.kind == RepoErrorKind::Corrupt { damaged(error) } else { unavailable(error) }
}

impl BackupSource for RepositoryBackup {
    fn holds_data(&self, block: u64) -> BoxFuture<'_, Result<bool, BackupError>> {
        async move { Ok(!self.place_of(block).await?.is_zeros()) }.boxed()
    }

    fn block(&self, block: u64) -> BoxFuture<'_, Result<Option<Bytes>, BackupError>> {
        self.read(block).boxed()
    }
}
