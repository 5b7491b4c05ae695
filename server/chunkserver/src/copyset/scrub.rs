//! Scrubbing: reading what nobody asks for, so that rot is found while another replica can still mend it.
//!
//! Called by the daemon's scrub, row after row, on leaders and followers alike. Invariants: a page is called bad only if
//! it does not match its checksum while nothing changes it *and* the replica has applied all that an earlier process of
//! it may have applied (else its file may rightly be newer than its row); it is mended by [`super::repair`] alone, with
//! its proofs. Deliberately absent: pace and order, which are the caller's; pages that lie in the kernel's cache are
//! read from there, so what rots below a cached page is found by the next scrub after it has left the cache.

use crate::store::CopysetStore;
use crate::store::error::{ChunkStoreError, ChunkStoreErrorKind};
use crate::store::key::{RowKey, first_page};
use crate::store::lookup::{PageSource, View};
use ogee_common::id::LayerId;
use ogee_common::limits::PAGES_PER_ROW;
use ogee_raft::api::SnapshotSource;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What scrubbing a row came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowScrubbed {
    /// Pages with data that were read.
    pub pages: u32,
    /// Of these, those that did not match their checksum.
    pub bad: u32,
    /// Of these, those that match it now.
    pub mended: u32,
}

impl CopysetStore {
    /// The first `limit` metadata rows behind `after`, in order.
    #[must_use]
    pub fn rows_after(&self, after: Option<RowKey>, limit: usize) -> Vec<RowKey> {
        self.state().rows_after(after, limit)
    }

    /// How many metadata rows of such layers there are. Costs a look at every version.
    #[must_use]
    pub fn row_count(&self, meant: impl Fn(LayerId) -> bool) -> u64 {
        self.state().row_count(meant)
    }

    /// Reads and verifies the pages of a row and mends what is bad from `others`. The caller has called
    /// [`CopysetStore::caught_up`] with reason. `None` when this replica is not in order now; ask again later.
    ///
    /// # Errors
    /// When a metadata row cannot be read or the own disk failed; the replica is out.
    pub async fn scrub_row(
        self: &Arc<Self>,
        key: RowKey,
        others: &[impl SnapshotSource],
    ) -> Result<Option<RowScrubbed>, ChunkStoreError> {
        let servable = {
            let state = self.state();
            state.servable() && !state.installing && state.applied_index() >= state.lenient_until
        };
        if !servable {
            return Ok(None);
        }
        let first = first_page(key.row);
        let read = match self.read_pages(&View::Version(key.version), first..first + PAGES_PER_ROW).await {
            Err(e) if e.kind() == ChunkStoreErrorKind::Busy => return Ok(None),
            other => other?,
        };
        let pages = read.sources.iter().filter(|s| matches!(s, PageSource::Data { .. } | PageSource::Damaged { .. })).count();
        let count = |n: usize| u32::try_from(n).expect("a row has 256 pages");
        let mut done = RowScrubbed { pages: count(pages), bad: count(read.bad.len()), mended: 0 };
        for bad in &read.bad {
            let page = first + count(*bad);
            self.report_damage(&read.sources[*bad], key.version.at.chunk.0, page);
            let mended = self.repair(key.version, page, others).await?;
            done.mended += u32::from(mended);
            tracing::warn!(
                target: "scrub",
                finding = "page",
                copyset = self.id().0,
                layer = key.version.at.layer.0,
                chunk = key.version.at.chunk.0,
                seq = key.version.seq.0,
                page,
                mended,
                "a page did not match its checksum"
            );
        }
        let counters = &self.process().counters;
        counters.scrubbed_pages.fetch_add(u64::from(done.pages), Ordering::Relaxed);
        counters.scrub_bad_pages.fetch_add(u64::from(done.bad), Ordering::Relaxed);
        counters.scrub_mended_pages.fetch_add(u64::from(done.mended), Ordering::Relaxed);
        Ok(Some(done))
    }
}
