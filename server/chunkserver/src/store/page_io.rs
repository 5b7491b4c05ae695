//! Verified page reads and writes that wait for space.
//!
//! Invariant: [`CopysetStore::read_pages`] says of every page whether its bytes match the checksum that belonged to them
//! at one moment during the call; bytes that do not match are listed in [`PagesRead::bad`] and are never data.

use super::copyset_store::{CopysetStore, Known, Loaded};
use super::error::{ChunkStoreError, ChunkStoreErrorKind, blocking};
use super::key::{RowKey, VersionKey, first_page, row_of};
use super::lookup::{PageSource, View, resolve};
use super::pages::PageSet;
use super::process::count;
use super::state::{DirtyFile, State};
use bytes::BytesMut;
use ogee_common::checksum::{PAGE, crc32c};
use ogee_common::limits::{BUSY_READ_WAIT, CHUNK_BYTES, PAGE_BYTES, PAGES_PER_ROW};
use ogee_disk::{DataFile, DiskError, DiskErrorKind};
use std::ops::Range;
use std::sync::Arc;

/// Holes up to this many bytes are punched on the caller's thread; larger ones on the blocking pool.
const PUNCH_INLINE_BYTES: u64 = 256 << 10;
/// Every so many pauses for space one line is logged.
const NO_SPACE_LOG_EVERY: u64 = 60;

/// Pages as they were at one moment.
#[derive(Debug)]
pub(crate) struct PagesRead {
    /// Where each page came from.
    pub(crate) sources: Vec<PageSource>,
    /// The pages; zeros where the source says so.
    pub(crate) bytes: BytesMut,
    /// Indexes of pages whose bytes are not what was written.
    pub(crate) bad: Vec<usize>,
    /// Of these, those that the disk did not give: what stands in `bytes` is nobody's.
    pub(crate) unread: Vec<usize>,
}

/// Consecutive pages in one file.
struct Run {
    file: Arc<DataFile>,
    offset: u64,
    range: Range<usize>,
}

/// Byte offset of a page in its file.
pub(crate) fn offset_of(page: u32) -> u64 {
    u64::from(page) * u64::from(PAGE_BYTES)
}

impl CopysetStore {
    /// Reads and verifies pages of a chunk. Warm pages cost no thread switch; cold ones go to the blocking pool.
    ///
    /// # Errors
    /// [`ChunkStoreError::Busy`], or when a metadata row cannot be read.
    pub(crate) async fn read_pages(
        self: &Arc<Self>,
        view: &View,
        pages: Range<u32>,
    ) -> Result<PagesRead, ChunkStoreError> {
        let sources = self.sources_of(view, pages.clone()).await?;
        let read = self.fill(sources, pages.start).await?;
        if read.is_settled() {
            return Ok(read);
        }
        // A race with a change, or damage. With the gate held nothing changes, so the second look decides.
        let gate = tokio::time::timeout(BUSY_READ_WAIT, self.gate.lock()).await.map_err(|_| ChunkStoreError::Busy)?;
        let read = self.read_pages_gated(view, pages).await?;
        drop(gate);
        Ok(read)
    }

    /// As [`CopysetStore::read_pages`] for a caller that holds the gate.
    pub(crate) async fn read_pages_gated(
        self: &Arc<Self>,
        view: &View,
        pages: Range<u32>,
    ) -> Result<PagesRead, ChunkStoreError> {
        let sources = self.sources_of(view, pages.clone()).await?;
        self.fill(sources, pages.start).await
    }

    /// Where each page is read from now.
    pub(crate) async fn sources_of(
        self: &Arc<Self>,
        view: &View,
        pages: Range<u32>,
    ) -> Result<Vec<PageSource>, ChunkStoreError> {
        let mut loaded = Loaded::new();
        loop {
            let missing = match self.plan(&self.state(), &loaded, view, pages.clone()) {
                Ok(sources) => return Ok(sources),
                Err(missing) => missing,
            };
            self.load_rows(missing, &mut loaded).await?;
        }
    }

    /// The sources, or the rows to load first.
    fn plan(
        &self,
        state: &State,
        loaded: &Loaded,
        view: &View,
        pages: Range<u32>,
    ) -> Result<Vec<PageSource>, Vec<RowKey>> {
        let versions = state.sources(view);
        let mut out = Vec::with_capacity(pages.len());
        let mut missing = vec![];
        let mut at = pages.start;
        while at < pages.end {
            let (row, first) = row_of(at);
            let end = (first_page(row) + PAGES_PER_ROW).min(pages.end);
            let mut wanted = PageSet::range(first..first + (end - at));
            let mut found = [PageSource::Absent; PAGES_PER_ROW as usize];
            for version in &versions {
                match self.known_row(state, loaded, version.row(row)) {
                    Known::Absent => {}
                    Known::Unknown => missing.push(version.row(row)),
                    Known::Row(known) => wanted = resolve(wanted, *version, &known, &mut found),
                }
                if wanted.is_empty() {
                    break;
                }
            }
            out.extend_from_slice(&found[first as usize..(first + (end - at)) as usize]);
            at = end;
        }
        if missing.is_empty() { Ok(out) } else { Err(missing) }
    }

    /// Reads the bytes of planned pages and verifies them.
    async fn fill(&self, sources: Vec<PageSource>, first: u32) -> Result<PagesRead, ChunkStoreError> {
        let mut bytes = BytesMut::zeroed(sources.len() * PAGE);
        let (mut cold, mut failed) = (vec![], vec![]);
        for run in self.runs(&sources, first, &mut failed) {
            match run.file.read_at_nowait(&mut bytes[run.range.clone()], run.offset) {
                Ok(true) => {}
                Ok(false) => cold.push(run),
                Err(e) => {
                    tracing::warn!(copyset = self.id.0, error = &e as &dyn std::error::Error, "read of a page failed");
                    failed.push(run.range);
                }
            }
        }
        if !cold.is_empty() {
            (bytes, failed) = blocking(move || {
                for run in cold {
                    if let Err(e) = run.file.read_at(&mut bytes[run.range.clone()], run.offset) {
                        tracing::warn!(error = &e as &dyn std::error::Error, "read of a page failed");
                        failed.push(run.range);
                    }
                }
                Ok((bytes, failed))
            })
            .await?;
        }
        // A page that could not be read holds something else than its data and most often fails here; zeros may match by chance, and are not its data all the same.
        let is_unread = |i: &usize| failed.iter().any(|range| range.contains(&(i * PAGE)));
        let is_bad = |i: &usize| match sources[*i] {
            PageSource::Data { crc, .. } => is_unread(i) || crc32c(&bytes[i * PAGE..(i + 1) * PAGE]) != crc,
            PageSource::Damaged { .. } => true,
            _ => false,
        };
        let bad: Vec<usize> = (0..sources.len()).filter(is_bad).collect();
        let unread = bad.iter().copied().filter(is_unread).collect();
        Ok(PagesRead { sources, bytes, bad, unread })
    }

    /// What to read; to `failed` come the bytes for which there is no file.
    fn runs(&self, sources: &[PageSource], first: u32, failed: &mut Vec<Range<usize>>) -> Vec<Run> {
        let version_at = |i: usize| sources.get(i).and_then(PageSource::version);
        let mut runs = vec![];
        let mut at = 0;
        while at < sources.len() {
            let version = version_at(at);
            let end = (at..).find(|i| *i >= sources.len() || version_at(*i) != version).unwrap_or(sources.len());
            if let Some(version) = version {
                let range = at * PAGE..end * PAGE;
                match self.file_to_read(version) {
                    Some(file) => runs.push(Run { file, offset: u64::from(first) * u64::from(PAGE_BYTES) + (at * PAGE) as u64, range }),
                    None => failed.push(range),
                }
            }
            at = end;
        }
        runs
    }

    /// The open file of a version, or `None` when it is not there (removed meanwhile, or lost).
    fn file_to_read(&self, version: VersionKey) -> Option<Arc<DataFile>> {
        let born = {
            let state = self.state();
            if let Some(dirty) = state.dirty_files.get(&version) {
                return Some(Arc::clone(&dirty.file));
            }
            state.version(version)?.born
        };
        if let Some(file) = self.process.with_files(|files| files.get(&(self.id, version))) {
            return Some(file);
        }
        match self.process.dir.open_data(&version.file_name(self.id)) {
            Ok(file) => {
                let file = Arc::new(file);
                // Only while the version is still the same: a handle of a removed file must not be found again.
                let state = self.state();
                if state.version(version).is_some_and(|v| v.born == born) {
                    self.process.with_files(|files| files.insert((self.id, version), Arc::clone(&file)));
                }
                Some(file)
            }
            Err(e) => {
                tracing::warn!(copyset = self.id.0, error = &e as &dyn std::error::Error, "cannot open a data file");
                None
            }
        }
    }

    /// The file of a version for writing, created if missing and marked dirty. Called with the gate held.
    pub(crate) fn file_to_write(&self, version: VersionKey) -> Result<Arc<DataFile>, ChunkStoreError> {
        if let Some(dirty) = self.state().dirty_files.get(&version) {
            return Ok(Arc::clone(&dirty.file));
        }
        let cached = self.process.with_files(|files| files.get(&(self.id, version)));
        let (file, created) = match cached {
            Some(file) => (file, false),
            None => {
                let (file, created) = self.open_or_create(version)?;
                (Arc::new(file), created)
            }
        };
        let mut state = self.state();
        state.dirty_files.insert(version, DirtyFile { file: Arc::clone(&file), created, unsubmitted: 0 });
        self.process.with_files(|files| files.remove(&(self.id, version)));
        self.recount(&mut state);
        Ok(file)
    }

    fn open_or_create(&self, version: VersionKey) -> Result<(DataFile, bool), DiskError> {
        let dir = &self.process.dir;
        let name = version.file_name(self.id);
        let file = match dir.open_data(&name) {
            Err(e) if e.kind() == DiskErrorKind::NotFound => dir.create_data(&name)?,
            other => other?,
        };
        // The size is set once, so that a hole at the end reads as zeros; a creation cut short is finished here.
        let created = file.size()? != u64::from(CHUNK_BYTES);
        if created {
            file.set_size(u64::from(CHUNK_BYTES))?;
        }
        Ok((file, created))
    }

    /// Writes pieces of a version's file, waiting for space if need be. Called with the gate held.
    ///
    /// # Errors
    /// Any failure but a full disk; the replica is then out.
    pub(crate) async fn write_file(&self, version: VersionKey, pieces: &[(u64, &[u8])]) -> Result<(), ChunkStoreError> {
        let mut pauses = 0;
        loop {
            let result = self.file_to_write(version).and_then(|file| {
                pieces.iter().try_for_each(|(offset, bytes)| Ok(file.write_at(bytes, *offset)?))
            });
            match result {
                Ok(()) => break,
                Err(e) if e.kind() == ChunkStoreErrorKind::NoSpace => self.pause_for_space(&mut pauses, &e).await,
                Err(e) => return Err(e),
            }
        }
        let written: u64 = pieces.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let mut state = self.state();
        state.unsubmitted += written;
        if let Some(dirty) = state.dirty_files.get_mut(&version) {
            dirty.unsubmitted += written;
        }
        Ok(())
    }

    /// Frees the blocks of a range of pages. Called with the gate held.
    pub(crate) async fn punch(&self, version: VersionKey, pages: Range<u32>) -> Result<(), ChunkStoreError> {
        let (offset, len) = (offset_of(pages.start), offset_of(pages.end) - offset_of(pages.start));
        let mut pauses = 0;
        loop {
            let result = match self.file_to_write(version) {
                Ok(file) if len <= PUNCH_INLINE_BYTES => file.punch_hole(offset, len).map_err(ChunkStoreError::from),
                Ok(file) => blocking(move || Ok(file.punch_hole(offset, len)?)).await,
                Err(e) => Err(e),
            };
            match result {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == ChunkStoreErrorKind::NoSpace => self.pause_for_space(&mut pauses, &e).await,
                Err(e) => return Err(e),
            }
        }
    }

    /// Waits before the same disk operation is tried again on a full disk.
    pub(crate) async fn pause_for_space(&self, pauses: &mut u64, error: &ChunkStoreError) {
        if pauses.is_multiple_of(NO_SPACE_LOG_EVERY) {
            let error = error as &dyn std::error::Error;
            tracing::error!(copyset = self.id.0, error, pauses, "disk full: a committed entry waits for space");
        }
        *pauses += 1;
        count(&self.process.counters.no_space_pauses);
        tokio::time::sleep(self.process.tuning.no_space_pause).await;
    }

    /// Starts write-back of what was written since the last call, if it is enough. The result is the work to run on
    /// the blocking pool; it makes nothing durable.
    pub(crate) fn writeback(&self) -> Option<Vec<Arc<DataFile>>> {
        let mut state = self.state();
        if state.unsubmitted < self.process.tuning.writeback_bytes {
            return None;
        }
        state.unsubmitted = 0;
        let written = state.dirty_files.values_mut().filter(|d| d.unsubmitted > 0);
        Some(written.map(|d| (std::mem::take(&mut d.unsubmitted), Arc::clone(&d.file)).1).collect())
    }
}

impl PagesRead {
    /// Whether a second look could find anything else.
    fn is_settled(&self) -> bool {
        self.bad.iter().all(|i| matches!(self.sources[*i], PageSource::Damaged { .. }))
    }
}
