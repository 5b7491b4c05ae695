//! [`BackupLayer`]: a layer that stands on a backup, as its hydrator sees it: what it still lacks, and pasting.
//!
//! Used by `snapclone`. It is attached to no volume and fenced by nobody: it looks at the layer's own versions with a seq up to the first one
//! that was ever written with, and pastes. Why that is enough (ADR 0016): a page that is present there is present for every seq that is read of
//! the layer, now and ever after; what is present only for later seqs is pasted too, below them. Absent: the backup's content and its order.

use crate::attachment::{AttachInfo, Attachment};
use crate::attempt::{Action, DataPath, Failure, Outcome, Request};
use crate::backup::BackupParent;
use crate::block_device::{IoError, IoErrorKind};
use crate::cluster::Cluster;
use crate::gate::Gate;
use crate::io::Unplaced;
use crate::layout::LayoutCache;
use crate::session::Session;
use crate::stats::Stats;
use crate::thin::paste_of;
use crate::throttle::Throttle;
use bytes::Bytes;
use ogee_common::geometry::ChunkSpan;
use ogee_common::id::{AttachEpoch, ChunkIndex, CopysetId, VolumeId, VolumeSeq};
use ogee_common::limits::{CHUNK_BYTES, PAGE_BYTES, SECTOR_BYTES};
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_proto::data::ChunkPages;
use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// Every seq that is written with is this one or a later one.
const FIRST_SEQ: VolumeSeq = VolumeSeq(1);
/// Bytes in flight that a question counts as: its answer.
const ANSWER_BYTES: u32 = 4096;

/// See the module's documentation. Clones share the connections.
#[derive(Debug, Clone)]
pub struct BackupLayer {
    parent: BackupParent,
    at: Arc<Attachment>,
    session: Arc<Session>,
}

impl BackupLayer {
    /// The layer of a backup's row, in the cluster with this identity. Nothing is asked of it yet.
    #[must_use]
    pub fn new(cluster: &Cluster, identity: [u8; 16], parent: BackupParent) -> Self {
        let path = VolumePath::parse(&format!("layer-{}", parent.layer.0)).expect("letters and digits are a name");
        let info = AttachInfo {
            name: VolumeRef { path, snapshot: None },
            volume: VolumeId(0),
            layer: parent.layer,
            epoch: AttachEpoch(0),
            sector_bytes: SECTOR_BYTES,
        };
        let at = Attachment {
            cluster: cluster.0.clone(),
            info,
            chain: vec![],
            lazy: None,
            recorder: OnceLock::new(),
            gate: Gate::new(FIRST_SEQ),
            throttle: Throttle::default(),
            order: Arc::default(),
            layout: LayoutCache::new(parent.layer, None),
            fences: Default::default(),
            size: watch::Sender::new(parent.size_bytes),
            stats: Stats::default(),
            resubscribe: Arc::default(),
            tasks: Default::default(),
        };
        let session = Session::new(identity, cluster.0.config.network.clone());
        Self { parent, at: Arc::new(at), session }
    }

    /// What it stands on.
    #[must_use]
    pub fn parent(&self) -> &BackupParent {
        &self.parent
    }

    /// The blocks that are looked at together with a block, by one question.
    #[must_use]
    pub fn neighbours(&self, block: u64) -> Range<u64> {
        let together = u64::from(CHUNK_BYTES / self.parent.block_bytes);
        let first = block / together * together;
        first..(first + together).min(self.parent.blocks())
    }

    /// Of the neighbours of a block those that have a page which is not present for everybody who reads the layer.
    ///
    /// # Errors
    /// `Closed` when the layer is gone, `TimedOut` by the cluster's policy.
    pub async fn lacking(&self, block: u64) -> Result<Vec<u64>, IoError> {
        let blocks = self.neighbours(block);
        let chunk = u32::try_from(self.parent.block_start(blocks.start) / u64::from(CHUNK_BYTES)).expect("volumes are bounded");
        let present = self.present(ChunkIndex(chunk)).await?;
        Ok(blocks.filter(|block| !is_present(&self.parent, &present, *block)).collect())
    }

    async fn present(&self, chunk: ChunkIndex) -> Result<ChunkPages, IoError> {
        let ask = async {
            let path = self.path();
            let copyset = self.copyset(chunk).await?;
            let _in_flight = self.session.admit(ANSWER_BYTES).await;
            let span = ChunkSpan { chunk, offset: 0, len: CHUNK_BYTES, buffer_offset: 0 };
            let mut request = Request { copyset, span, action: Action::Present };
            match path.run(&mut request, None).await? {
                Outcome::PageMap(map) => Ok::<_, Failure>(map.data.union(&map.zero)),
                Outcome::Done | Outcome::Read(_) | Outcome::Thin(..) => Err(IoErrorKind::InvalidInput.into()),
            }
        };
        self.limited("look at", u64::from(chunk.0) * u64::from(CHUNK_BYTES), u64::from(CHUNK_BYTES), ask).await
    }

    /// Pastes the content of a block of the backup: what the layer lacks of it.
    ///
    /// # Errors
    /// `Closed` when the layer is gone, `NoSpace` and `TimedOut` by the cluster's policy.
    pub async fn paste(&self, block: u64, content: &Bytes) -> Result<(), IoError> {
        let start = self.parent.block_start(block);
        let paste = async {
            let Some((chunk, pages, data)) = paste_of(start, content, |_| true) else { return Ok(()) };
            let copyset = self.copyset(chunk).await?;
            let _in_flight = self.session.admit(u32::try_from(data.len()).unwrap_or(u32::MAX)).await;
            let span = ChunkSpan { chunk, offset: 0, len: CHUNK_BYTES, buffer_offset: 0 };
            let action = Action::Paste { layer: self.parent.layer, pages: Box::new(pages), data };
            self.path().run(&mut Request { copyset, span, action }, None).await.map(drop)
        };
        self.limited("paste", start, content.len() as u64, paste).await
    }

    fn path(&self) -> DataPath<'_> {
        DataPath { at: &self.at, session: &self.session }
    }

    /// Every segment of the backup was placed when the layer was made.
    async fn copyset(&self, chunk: ChunkIndex) -> Result<CopysetId, Failure> {
        self.path().copyset(chunk, Unplaced::Fine).await?.ok_or(IoErrorKind::InvalidInput.into())
    }

    async fn limited<T>(
        &self,
        verb: &'static str,
        offset: u64,
        len: u64,
        io: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, IoError> {
        let done = match self.at.cluster.config.io_timeout {
            None => io.await,
            Some(limit) => tokio::time::timeout(limit, io).await.unwrap_or(Err(IoErrorKind::TimedOut.into())),
        };
        done.map_err(|Failure { kind, source }| IoError { kind, verb, offset, len, source })
    }
}

/// Whether all pages of a block are present in its chunk. Pure.
fn is_present(parent: &BackupParent, present: &ChunkPages, block: u64) -> bool {
    let offset = u32::try_from(parent.block_start(block) % u64::from(CHUNK_BYTES)).expect("a chunk is bounded");
    let len = u32::try_from(parent.block_len(block)).expect("a block is bounded");
    (offset / PAGE_BYTES..(offset + len).div_ceil(PAGE_BYTES)).all(|page| present.contains(page))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::id::LayerId;

    #[test]
    fn a_block_is_present_when_all_its_pages_are() {
        let parent = BackupParent {
            layer: LayerId(1),
            repository: String::new(),
            backup: 1,
            root: [0; 32],
            leaves: [0; 32],
            size_bytes: (17 << 20) + 4096 + 512,
            block_bytes: 1 << 20,
        };
        let mut present = ChunkPages::none();
        (256..511).for_each(|page| present.insert(page));
        assert!(!is_present(&parent, &present, 1));
        present.insert(511);
        assert!(is_present(&parent, &present, 1) && !is_present(&parent, &present, 2));
        // The last block: a page and a part of one, at 1 MiB of the second chunk.
        let mut present = ChunkPages::none();
        present.insert(256);
        assert!(!is_present(&parent, &present, 17));
        present.insert(257);
        assert!(is_present(&parent, &present, 17));
    }
}
