//! The backup below an open volume: its blocks, fetched once for all who wait, cached, and offered to be pasted.
//!
//! Made by `volume.rs` for a volume that stands on a backup, used by `thin.rs`. Invariants: what comes out was proved by the source; a block that
//! is being fetched is fetched once, and if who fetches gives up, the next who waits goes on; content in memory is bounded by
//! `LAZY_CACHE_BYTES`, and the blocks in flight by what the front ends have in flight; offers are bounded and dropped when nobody keeps up,
//! because the hydrator comes by anyway. A repository that does not answer makes IO wait without end, as a copyset without quorum does: the
//! policy's timeout is the caller's. A damaged block is an error of its read, at once. Absent: what is missing, and pasting.

use crate::attempt::Failure;
use crate::backup::{BackupError, BackupErrorKind, BackupParent, BackupSource};
use crate::block_device::IoErrorKind;
use crate::gate::Gate;
use bytes::Bytes;
use ogee_common::limits::{LAZY_CACHE_BYTES, LAZY_OFFERS_MAX, LAZY_OFFERS_REMEMBERED, LAZY_RETRY_MAX, LAZY_RETRY_MIN};
use ogee_common::rng;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// The content of a block; `None`: zeros.
pub(crate) type Block = Option<Bytes>;

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
        let (cache, fetching, offered) = Default::default();
        (Arc::new(Self { parent, source, control, cache, fetching, offers, offered }), taken)
    }

    /// Whether a byte of the volume may be in the backup.
    pub(crate) fn reaches(&self, offset: u64) -> bool {
        offset < self.parent.size_bytes
    }

    /// The content of a block if it is in memory.
    pub(crate) fn cached(&self, block: u64) -> Option<Block> {
        lock(&self.cache).blocks.get(&block).cloned()
    }

    /// The content of a block; waits as long as the repository does not answer.
    ///
    /// # Errors
    /// `Corrupt` when it is damaged; what `gate` says when the volume is closed.
    pub(crate) async fn block(&self, gate: &Gate, block: u64) -> Result<Block, Failure> {
        if let Some(content) = self.cached(block) {
            return Ok(content);
        }
        let turn = self.turn(block);
        let _one_at_a_time = turn.lock().await;
        if let Some(content) = self.cached(block) {
            return Ok(content);
        }
        let content = self.patiently(gate, block, |source| async move { source.block(block).await }).await?;
        lock(&self.cache).insert(block, content.clone(), LAZY_CACHE_BYTES);
        Ok(content)
    }

    /// Whether a block holds anything but zeros; waits as [`Lazy::block`].
    ///
    /// # Errors
    /// The same.
    pub(crate) async fn holds_data(&self, gate: &Gate, block: u64) -> Result<bool, Failure> {
        match self.cached(block) {
            Some(content) => Ok(content.is_some()),
            None => self.patiently(gate, block, |source| async move { source.holds_data(block).await }).await,
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

    async fn patiently<T, F>(&self, gate: &Gate, block: u64, ask: impl Fn(Arc<dyn BackupSource>) -> F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, BackupError>> + Send + 'static,
    {
        let (mut pause, mut failures) = (LAZY_RETRY_MIN, 0u32);
        loop {
            gate.check()?;
            let mut work = Owned(self.control.spawn(ask(self.source.clone())));
            let error = match (&mut work.0).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                // The control thread ends with the cluster.
                Err(_) => return Err(IoErrorKind::Closed.into()),
            };
            let BackupParent { repository, backup, .. } = &self.parent;
            if error.kind == BackupErrorKind::Damaged {
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
