//! The backup below an open volume: its blocks, fetched once for all who wait, cached, and offered to be pasted.
//!
//! Made by `volume.rs` for a volume that stands on a backup, used by `thin.rs`. Invariants: what comes out was proved by the source; a block that
//! is being fetched is fetched once, and if who fetches gives up, the next who waits goes on; content in memory is bounded by
//! `LAZY_CACHE_BYTES`, and the blocks in flight by what the front ends have in flight; offers are bounded and dropped when nobody keeps up,
//! because the hydrator comes by anyway. A repository that does not answer makes IO wait without end, as a copyset without quorum does: the
//! policy's timeout is the caller's. A damaged block is an error of its read, at once.
//!
//! # When the layer is complete
//!
//! Once every page with data is in the layer, the MDS drops its row, and the backup may be removed. A client that opened the volume before learns of it from
//! the state of its attach (`watch.rs`), or asks when the backup fails or hangs: **no error and no endless wait comes from a backup that the volume
//! does not need any more**. Then nothing is made of what was missing in an earlier answer of a copyset: the caller asks the copyset again, whose answer from
//! now on holds all that the backup had. That the row is gone proves this only while the layer that is read is there: a volume that is deleted loses the
//! row at once and its content later, so the MDS is asked for that layer, after the row. Then the row cannot have gone with its layer: what is read stood on it.
//!
//! Absent: what is missing, and pasting.

use crate::attachment::Attachment;
use crate::attempt::Failure;
use crate::backup::{BackupError, BackupErrorKind, BackupParent, BackupSource};
use crate::block_device::IoErrorKind;
use bytes::Bytes;
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{
    LAZY_ASK_EVERY, LAZY_ASK_TIMEOUT, LAZY_CACHE_BYTES, LAZY_OFFERS_MAX, LAZY_OFFERS_REMEMBERED, LAZY_RETRY_MAX, LAZY_RETRY_MIN,
};
use ogee_common::rng;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::{GetLayoutRequest, ListBackupParentsRequest};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// The content of a block; `None`: zeros.
pub(crate) type Block = Option<Bytes>;

/// What the backup holds, or that nobody needs it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told<T> {
    /// The backup's word.
    Held(T),
    /// The layer is complete; see the module's documentation.
    Complete,
}

/// What the MDS says of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It stands on the backup.
    OnBackup,
    /// It is complete.
    Complete,
    /// No answer.
    Unknown,
}

/// One log line for each so many failed attempts in a row.
const LOG_EVERY: u32 = 16;

#[derive(Debug, Default)]
struct Cache {
    blocks: HashMap<u64, Block>,
    /// In the order in which they came.
    order: VecDeque<u64>,
    bytes: usize,
}

impl Cache {
    fn insert(&mut self, block: u64, content: Block, max: usize) {
        let len = |content: &Block| content.as_ref().map_or(1, Bytes::len);
        if let Entry::Vacant(entry) = self.blocks.entry(block) {
            self.order.push_back(block);
            self.bytes += len(&content);
            entry.insert(content);
        }
        while self.bytes > max && self.order.len() > 1 {
            let oldest = self.order.pop_front().and_then(|block| self.blocks.remove(&block));
            self.bytes -= oldest.as_ref().map_or(0, len);
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Lazy {
    pub(crate) parent: BackupParent,
    source: Arc<dyn BackupSource>,
    /// Where the source's work runs: not on a thread that serves a virtqueue.
    control: Handle,
    cache: Mutex<Cache>,
    /// Locked by who fetches the block.
    fetching: Mutex<HashMap<u64, Weak<tokio::sync::Mutex<()>>>>,
    offers: mpsc::Sender<u64>,
    offered: Mutex<HashSet<u64>>,
    /// The MDS has said that the layer is complete; never taken back.
    complete: AtomicBool,
    /// When the MDS was asked last, and what it said; locked while it is asked.
    asked: tokio::sync::Mutex<Option<(Instant, Standing)>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A task that ends with who waits for it.
struct Owned<T>(JoinHandle<T>);

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Lazy {
    /// The backup below a volume, and where its offers come out.
    pub(crate) fn new(parent: BackupParent, source: Arc<dyn BackupSource>, control: Handle) -> (Arc<Self>, mpsc::Receiver<u64>) {
        let (offers, taken) = mpsc::channel(LAZY_OFFERS_MAX);
        let (cache, fetching, offered, complete, asked) = Default::default();
        (Arc::new(Self { parent, source, control, cache, fetching, offers, offered, complete, asked }), taken)
    }

    /// Whether a byte of the volume may be in the backup and nowhere else.
    pub(crate) fn reaches(&self, offset: u64) -> bool {
        offset < self.parent.size_bytes && !self.is_complete()
    }

    fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// The MDS says that the layer is complete: the backup is asked for nothing any more.
    pub(crate) fn complete(&self) {
        if !self.complete.swap(true, Ordering::AcqRel) {
            tracing::info!(target: "controlpath", layer = self.parent.layer.0, backup = self.parent.backup, "the volume needs its backup no more");
            *lock(&self.cache) = Cache::default();
        }
    }

    /// The content of a block if it is in memory.
    pub(crate) fn cached(&self, block: u64) -> Option<Block> {
        lock(&self.cache).blocks.get(&block).cloned()
    }

    /// The content of a block; waits as long as the repository does not answer.
    ///
    /// # Errors
    /// `Corrupt` when it is damaged; what the gate says when the volume is closed.
    pub(crate) async fn block(&self, at: &Attachment, block: u64) -> Result<Told<Block>, Failure> {
        if let Some(content) = self.cached(block) {
            return Ok(Told::Held(content));
        }
        let turn = self.turn(block);
        let _one_at_a_time = turn.lock().await;
        if let Some(content) = self.cached(block) {
            return Ok(Told::Held(content));
        }
        let told = self.patiently(at, block, |source| async move { source.block(block).await }).await?;
        if let Told::Held(content) = &told {
            lock(&self.cache).insert(block, content.clone(), LAZY_CACHE_BYTES);
        }
        Ok(told)
    }

    /// Whether a block holds anything but zeros; waits as [`Lazy::block`].
    ///
    /// # Errors
    /// The same.
    pub(crate) async fn holds_data(&self, at: &Attachment, block: u64) -> Result<Told<bool>, Failure> {
        match self.cached(block) {
            Some(content) => Ok(Told::Held(content.is_some())),
            None => self.patiently(at, block, |source| async move { source.holds_data(block).await }).await,
        }
    }

    fn turn(&self, block: u64) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = lock(&self.fetching);
        if let Some(turn) = fetching.get(&block).and_then(Weak::upgrade) {
            return turn;
        }
        fetching.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        fetching.insert(block, Arc::downgrade(&turn));
        turn
    }

    async fn patiently<T, F>(&self, at: &Attachment, block: u64, ask: impl Fn(Arc<dyn BackupSource>) -> F) -> Result<Told<T>, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, BackupError>> + Send + 'static,
    {
        let (mut pause, mut failures) = (LAZY_RETRY_MIN, 0u32);
        loop {
            at.gate.check()?;
            if self.is_complete() {
                return Ok(Told::Complete);
            }
            let mut work = Owned(self.control.spawn(ask(self.source.clone())));
            let done = tokio::select! {
                biased;
                done = &mut work.0 => done,
                // A server that takes its time over a refusal, or a folder that hangs.
                complete = Box::pin(self.until_complete(at)) => {
                    complete?;
                    return Ok(Told::Complete);
                }
            };
            let error = match done {
                Ok(Ok(answer)) => return Ok(Told::Held(answer)),
                Ok(Err(error)) => error,
                // The control thread ends with the cluster.
                Err(_) => return Err(IoErrorKind::Closed.into()),
            };
            let BackupParent { repository, backup, .. } = &self.parent;
            let is_damaged = error.kind == BackupErrorKind::Damaged;
            // What is damaged may have been collected since the layer is complete: only a younger answer says that it was not.
            let since = if is_damaged { clock::now() } else { clock::now() - LAZY_ASK_EVERY };
            let standing = Box::pin(self.standing(at, since)).await?;
            if standing == Standing::Complete {
                return Ok(Told::Complete);
            }
            if is_damaged && standing == Standing::OnBackup {
                let why: &dyn std::error::Error = &error;
                tracing::error!(target: "datapath", repository, backup, block, error = why, "the backup below the volume is damaged");
                return Err(Failure { kind: IoErrorKind::Corrupt, source: Some(Box::new(error)) });
            }
            if failures.is_multiple_of(LOG_EVERY) {
                let why: &dyn std::error::Error = &error;
                tracing::warn!(target: "datapath", repository, backup, block, failures, error = why, "the backup below the volume is not read; IO waits");
            }
            failures = failures.saturating_add(1);
            tokio::time::sleep(rng::jitter(pause)).await;
            pause = (pause * 2).min(LAZY_RETRY_MAX);
        }
    }

    /// Waits until the MDS says that the layer is complete.
    async fn until_complete(&self, at: &Attachment) -> Result<(), Failure> {
        loop {
            tokio::time::sleep(LAZY_ASK_EVERY).await;
            if self.standing(at, clock::now() - LAZY_ASK_EVERY).await? == Standing::Complete {
                return Ok(());
            }
        }
    }

    /// What the MDS said of the layer at `since` or later; asked once for all who wait.
    async fn standing(&self, at: &Attachment, since: Instant) -> Result<Standing, Failure> {
        let answer = async {
            let mut asked = self.asked.lock().await;
            if self.is_complete() {
                return Ok(Standing::Complete);
            }
            if let Some((_, known)) = asked.filter(|(when, _)| *when >= since) {
                return Ok(known);
            }
            let begun = clock::now();
            let standing = self.ask(at).await?;
            *asked = Some((begun, standing));
            if standing == Standing::Complete {
                self.complete();
            }
            Ok(standing)
        };
        tokio::time::timeout(LAZY_ASK_TIMEOUT, answer).await.unwrap_or(Ok(Standing::Unknown))
    }

    /// Asks the MDS for the row, and, if that is gone, whether the layer that is read is there.
    async fn ask(&self, at: &Attachment) -> Result<Standing, Failure> {
        let mds = &at.cluster.mds;
        let bottom = self.parent.layer.0;
        let list = match mds.list_backup_parents(ListBackupParentsRequest { after: bottom - 1 }).await {
            Ok(list) => list,
            Err(error) => {
                tracing::debug!(target: "controlpath", layer = bottom, %error, "ask whether the volume stands on its backup");
                let is_later = matches!(error.kind, MdsErrorKind::Unavailable | MdsErrorKind::NotLeader);
                return Ok(if is_later { Standing::Unknown } else { Standing::OnBackup });
            }
        };
        if list.parents.iter().any(|parent| parent.layer == bottom) {
            return Ok(Standing::OnBackup);
        }
        let (layer, volume, epoch) = (at.info.layer.0, at.info.volume.0, at.info.epoch.0);
        match mds.get_layout(GetLayoutRequest { layer, first: 0, count: 1, volume, epoch }).await {
            Ok(_) => Ok(Standing::Complete),
            Err(error) => at.judge_mds(error).map(|()| Standing::Unknown),
        }
    }

    /// Offers a block that is in memory to be pasted, once.
    pub(crate) fn offer(&self, block: u64) {
        let mut offered = lock(&self.offered);
        if offered.len() >= LAZY_OFFERS_REMEMBERED {
            offered.clear();
        }
        if offered.insert(block) && self.offers.try_send(block).is_err() {
            offered.remove(&block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_bounded_and_keeps_what_came_last() {
        let mut cache = Cache::default();
        for block in 0..10 {
            cache.insert(block, (block != 8).then(|| Bytes::from(vec![1; 100])), 350);
            cache.insert(block, None, 350);
        }
        let mut kept: Vec<u64> = cache.blocks.keys().copied().collect();
        kept.sort_unstable();
        assert_eq!(kept, [6, 7, 8, 9]);
        cache.insert(11, Some(Bytes::from(vec![1; 1000])), 350);
        assert_eq!(cache.order, [11], "the last one stays, however large");
    }
}
