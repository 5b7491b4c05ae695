//! Mending damaged pages from other replicas: what a read does when a page does not match its checksum.
//!
//! The replica asks each of the others for the *row* (256 pages of one version) that holds the page, and takes from the
//! answer what it can prove to be its own content:
//! - A page whose checksum is known here is taken if the other's page has the same checksum; the decoder has verified
//!   the bytes against it.
//! - A *damaged* page has no checksum here. It is taken if both rows are the effect of the same entries: the other had
//!   applied everything up to our row's last change before it gathered its row, and its row holds nothing later. Rows
//!   are a function of the log, so equal prefixes mean equal pages.
//!
//! Otherwise (the other lags, is ahead, or its page is bad as well) nothing is taken, and the read stays `Corrupt`: the
//! client tries again.
//!
//! Why it may change files and rows beside the task that applies: it holds the gate, writes bytes that the current row
//! already stands for (so replay converges as before: module docs of `store`), and never changes which pages a row holds
//! nor its last index. Nothing here is flushed: the file is dirty and the next checkpoint flushes it, whose failure ends
//! the replica as always. After a crash before that, the page is found bad once more and repaired again.

use super::fetch::{FetchRequest, FetchedRow, RowsAnswer, pages_sent};
use super::reading::{ReadAnswer, ReadError};
use crate::store::CopysetStore;
use crate::store::copyset_store::Known;
use crate::store::error::{ChunkStoreError, ChunkStoreErrorKind};
use crate::store::key::{VersionKey, first_page, row_of};
use crate::store::lookup::{PageSource, View};
use crate::store::page_io::offset_of;
use crate::store::row::{PageState, Row};
use crate::store::write::NewPage;
use bytes::Bytes;
use ogee_common::checksum::PAGE;
use ogee_common::limits::{PAGES_PER_ROW, READ_REPAIR_PAUSE, READ_REPAIR_ROUNDS, READ_REPAIRS_MAX};
use ogee_proto::data::ReadHead;
use ogee_raft::api::SnapshotSource;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A page to write back.
struct Mended {
    page: u32,
    crc: u32,
    bytes: Bytes,
    /// It was marked as damaged, so the row changes as well.
    was_damaged: bool,
}

impl CopysetStore {
    /// As [`CopysetStore::read`]; a page that does not match its checksum is mended from the other replicas first.
    ///
    /// # Errors
    /// [`ReadError`]; `Corrupt` when no other replica could prove what the page holds.
    pub async fn read_or_repair(
        self: &Arc<Self>,
        head: &ReadHead,
        others: &[impl SnapshotSource],
    ) -> Result<ReadAnswer, ReadError> {
        for _ in 0..READ_REPAIRS_MAX {
            let error = match self.read(head).await {
                Err(error @ ReadError::Corrupt { .. }) => error,
                other => return other,
            };
            let ReadError::Corrupt { page, version, .. } = &error else { return Err(error) };
            if !self.repair(*version, *page, others).await.map_err(ReadError::Store)? {
                return Err(error);
            }
        }
        self.read(head).await
    }

    /// Mends the page, and whatever else is bad in its row, from the first of the others that can; they are asked again
    /// for a while, because one that lags or is ahead may be neither a moment later. One repair at a time per copyset.
    /// Returns whether the page matches its checksum now.
    ///
    /// # Errors
    /// When the own disk failed.
    pub(crate) async fn repair(
        self: &Arc<Self>,
        version: VersionKey,
        page: u32,
        others: &[impl SnapshotSource],
    ) -> Result<bool, ChunkStoreError> {
        let _one_at_a_time = self.repairing.lock().await;
        let row = row_of(page).0;
        let is_good = async || Ok::<_, ChunkStoreError>(self.bad_pages(version, row).await?.is_none_or(|b| !b.contains(&page)));
        for round in 0..READ_REPAIR_ROUNDS {
            for other in others {
                if is_good().await? {
                    return Ok(true);
                }
                if let Some((theirs, applied)) = self.ask(other, version, row).await {
                    self.mend(version, &theirs, applied).await?;
                }
            }
            if is_good().await? {
                return Ok(true);
            }
            if round + 1 < READ_REPAIR_ROUNDS {
                tokio::time::sleep(READ_REPAIR_PAUSE).await;
            }
        }
        Ok(false)
    }

    /// Another replica's row, and the index it had applied before it looked.
    async fn ask(&self, other: &impl SnapshotSource, version: VersionKey, row: u8) -> Option<(FetchedRow, u64)> {
        let request = FetchRequest::Row { version, row }.encode();
        let answer = match other.fetch(request).await {
            Ok(answer) => RowsAnswer::decode(&answer).map_err(|e| Box::new(e) as Box<dyn Error + Send + Sync>),
            Err(error) => Err(error.into()),
        };
        match answer {
            Ok(mut answer) => {
                let theirs = answer.rows.pop().filter(|theirs| theirs.row == row)?;
                Some((theirs, answer.applied))
            }
            Err(error) => {
                tracing::warn!(copyset = self.id().0, ?version, row, error = &*error as &dyn Error, "no help to repair");
                None
            }
        }
    }

    /// Pages of a row that do not match their checksums now; `None` when the version is gone.
    async fn bad_pages(self: &Arc<Self>, version: VersionKey, row: u8) -> Result<Option<Vec<u32>>, ChunkStoreError> {
        if self.state().version(version).is_none() {
            return Ok(None);
        }
        let first = first_page(row);
        let read = self.read_pages(&View::Version(version), first..first + PAGES_PER_ROW).await?;
        Ok(Some(read.bad.into_iter().map(|i| first + u32::try_from(i).expect("a row has 256 pages")).collect()))
    }

    /// Writes back what another replica's row proves.
    async fn mend(
        self: &Arc<Self>,
        version: VersionKey,
        theirs: &FetchedRow,
        applied: u64,
    ) -> Result<(), ChunkStoreError> {
        let _gate = self.gate.lock().await;
        let first = first_page(theirs.row);
        let pages = first..first + PAGES_PER_ROW;
        let loaded = self.rows_to_change(version, pages.clone()).await?;
        let ours = match self.known_row(&self.state(), &loaded, version.row(theirs.row)) {
            Known::Row(row) => row,
            Known::Absent | Known::Unknown => return Ok(()),
        };
        let read = self.read_pages_gated(&View::Version(version), pages).await?;
        let mended = provable(&ours, theirs, applied, &read.sources, &read.bad);
        drop(ours);
        {
            let state = self.state();
            if mended.is_empty() || state.installing || !state.servable() {
                return Ok(());
            }
        }
        let pieces: Vec<(u64, &[u8])> = mended.iter().map(|m| (offset_of(first + m.page), m.bytes.as_ref())).collect();
        // Not `write_file`: it waits for space, and with the gate held the copyset would wait as well. A lost file is made
        // again when there is space.
        let file = self.file_to_write(version);
        match file.and_then(|file| pieces.iter().try_for_each(|(offset, bytes)| Ok(file.write_at(bytes, *offset)?))) {
            Ok(()) => {}
            Err(e) if e.kind() == ChunkStoreErrorKind::NoSpace => return Ok(()),
            Err(e) => {
                // As a failed write of an entry: the replica ends.
                self.note(&e);
                return Err(e);
            }
        }
        let changed: Vec<(u32, NewPage)> =
            mended.iter().filter(|m| m.was_damaged).map(|m| (first + m.page, NewPage::Data(m.crc))).collect();
        if !changed.is_empty() {
            // Index 0: the row keeps the index of its last change.
            self.set_pages(0, version, &changed, &loaded);
        }
        self.process().counters.repaired_pages.fetch_add(mended.len() as u64, Ordering::Relaxed);
        tracing::warn!(copyset = self.id().0, ?version, row = theirs.row, pages = mended.len(), "pages repaired");
        Ok(())
    }

    /// Whether pages were found damaged that are not known to be mended.
    #[must_use]
    pub fn has_found_damage(&self) -> bool {
        self.state().has_found()
    }

    /// Mends some of the rows in which pages were found damaged; what cannot be mended now stays for the next call. The caller has
    /// called [`CopysetStore::caught_up`] with reason.
    ///
    /// # Errors
    /// When a metadata row cannot be read or the own disk failed; the replica is out.
    pub async fn mend_found(self: &Arc<Self>, others: &[impl SnapshotSource]) -> Result<(), ChunkStoreError> {
        let found = {
            let mut state = self.state();
            if !state.servable() || state.installing || state.applied_index() < state.lenient_until {
                return Ok(());
            }
            state.take_found()
        };
        for key in found {
            let first_bad = match self.bad_pages(key.version, key.row).await {
                Err(e) if e.kind() == ChunkStoreErrorKind::Busy => None,
                other => Some(other?.and_then(|bad| bad.first().copied())),
            };
            if let Some(Some(page)) = first_bad {
                self.repair(key.version, page, others).await?;
            }
            let is_clean = match self.bad_pages(key.version, key.row).await {
                Err(e) if e.kind() == ChunkStoreErrorKind::Busy => false,
                other => other?.is_none_or(|bad| bad.is_empty()),
            };
            if !is_clean {
                self.state().find(key);
            }
        }
        Ok(())
    }

    /// Says that a Raft snapshot is being installed. While it is, no repair changes anything.
    pub(crate) async fn set_installing(&self, installing: bool) {
        let _gate = self.gate.lock().await;
        self.state().installing = installing;
    }
}

/// The bad pages of our row whose content the other's row proves.
fn provable(ours: &Row, theirs: &FetchedRow, applied: u64, sources: &[PageSource], bad: &[usize]) -> Vec<Mended> {
    let same_entries = applied >= ours.last_index && theirs.meta.last_index <= ours.last_index;
    let mut mended = vec![];
    for (nth, page) in pages_sent(&theirs.meta).iter().enumerate() {
        let (index, PageState::Data { crc, .. }) = (page as usize, theirs.meta.page(page)) else { continue };
        let is_proven = match sources.get(index) {
            Some(PageSource::Data { crc: known, .. }) => *known == crc,
            Some(PageSource::Damaged { .. }) => same_entries,
            _ => false,
        };
        if is_proven && bad.contains(&index) {
            let was_damaged = matches!(sources[index], PageSource::Damaged { .. });
            mended.push(Mended { page, crc, bytes: theirs.data.slice(nth * PAGE..(nth + 1) * PAGE), was_damaged });
        }
    }
    mended
}
