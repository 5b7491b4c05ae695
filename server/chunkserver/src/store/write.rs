//! The effects of Write and Zero entries. Called by the state machine, one entry at a time, after the rules admitted it.
//!
//! Invariant: data reaches the file before the row says so in memory, both under the gate; after any crash the pair is
//! repaired by replay (module docs of `store`).

use super::copyset_store::{CopysetStore, Known, Loaded};
use super::error::ChunkStoreError;
use super::key::{ChunkKey, VersionKey, first_page, row_of};
use super::lookup::{PageSource, View};
use super::page_io::offset_of;
use super::pages::PageSet;
use super::process::count;
use super::record::VersionRecord;
use super::row::Row;
use ogee_common::checksum::{PAGE, crc32c};
use ogee_common::geometry::{PageFragment, page_fragments};
use ogee_common::limits::{PAGE_BYTES, PAGES_PER_ROW};
use ogee_proto::data::{LayerHead, WriteHead, ZeroHead};
use std::ops::Range;
use std::sync::Arc;

/// A page to be written whole, made from an old page and new bytes.
struct Patched {
    page: u32,
    bytes: Vec<u8>,
    /// `None`: the old page was damaged, so no checksum is right.
    crc: Option<u32>,
}

/// What a page becomes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NewPage {
    Data(u32),
    Zero,
    Damaged,
}

/// Pages that a request touches.
pub(crate) fn pages_of(at: &LayerHead) -> Range<u32> {
    at.offset / PAGE_BYTES..(at.offset + at.len).div_ceil(PAGE_BYTES)
}

impl CopysetStore {
    fn target(at: &LayerHead) -> VersionKey {
        VersionKey::new(at.layer, at.chunk, at.seq)
    }

    /// What a write at `at` reads where it covers a page in part.
    fn write_view(&self, at: &LayerHead) -> View {
        let chain = self.state().layers.get(at.layer).map(|l| Arc::clone(&l.chain)).unwrap_or_default();
        View::Layer { at: ChunkKey { layer: at.layer, chunk: at.chunk }, seq: at.seq, chain }
    }

    /// Applies a Write whose rules were checked.
    ///
    /// # Errors
    /// [`ChunkStoreError::Entry`] when data and checksums differ; otherwise the disk failed.
    pub(crate) async fn write(
        self: &Arc<Self>,
        index: u64,
        head: &WriteHead,
        data: &[u8],
    ) -> Result<(), ChunkStoreError> {
        let at = &head.at;
        let fragments: Vec<PageFragment> = page_fragments(at.offset, data.len()).collect();
        let good = |(f, crc): (&PageFragment, &u32)| crc32c(&data[f.range.clone()]) == *crc;
        if fragments.len() != head.crcs.len() || !fragments.iter().zip(&head.crcs).all(good) {
            return Err(ChunkStoreError::Entry { index });
        }
        let _gate = self.gate.lock().await;
        let mut patched = vec![];
        for f in fragments.iter().filter(|f| !f.is_whole_page()) {
            let mut page = self.old_page(index, at, f.page).await?.1;
            page.bytes[f.offset..f.offset + f.range.len()].copy_from_slice(&data[f.range.clone()]);
            patched.push(page.seal());
        }
        let whole = fragments.iter().zip(&head.crcs).filter(|(f, _)| f.is_whole_page());
        let mut pages: Vec<(u32, NewPage)> = whole.map(|(f, crc)| (f.page, NewPage::Data(*crc))).collect();
        let mut pieces: Vec<(u64, &[u8])> = vec![];
        if let (Some((first, _)), Some(f)) = (pages.first(), fragments.iter().find(|f| f.is_whole_page())) {
            pieces.push((offset_of(*first), &data[f.range.start..f.range.start + pages.len() * PAGE]));
        }
        for p in &patched {
            pieces.push((offset_of(p.page), &p.bytes));
            pages.push((p.page, p.crc.map_or(NewPage::Damaged, NewPage::Data)));
        }
        let target = Self::target(at);
        let loaded = self.rows_to_change(target, pages_of(at)).await?;
        self.state().ensure_version(target, VersionRecord::default());
        self.write_file(target, &pieces).await?;
        self.set_pages(index, target, &pages, &loaded);
        Ok(())
    }

    /// Applies a Zero whose rules were checked. Whole pages become zero pages; a part of a page is written like data,
    /// unless the page reads as zeros already.
    ///
    /// # Errors
    /// When the disk failed.
    pub(crate) async fn zero(self: &Arc<Self>, index: u64, head: &ZeroHead) -> Result<(), ChunkStoreError> {
        let at = &head.at;
        let _gate = self.gate.lock().await;
        let target = Self::target(at);
        let first_whole = at.offset.div_ceil(PAGE_BYTES);
        let whole = first_whole..((at.offset + at.len) / PAGE_BYTES).max(first_whole);
        let mut patched = vec![];
        let touched = pages_of(at);
        for page in touched.clone().filter(|p| !whole.contains(p)) {
            let (source, mut old) = self.old_page(index, at, page).await?;
            if !source.is_zero() {
                let start = at.offset.max(page * PAGE_BYTES) - page * PAGE_BYTES;
                let end = (at.offset + at.len).min((page + 1) * PAGE_BYTES) - page * PAGE_BYTES;
                old.bytes[start as usize..end as usize].fill(0);
                patched.push(old.seal());
            }
        }
        let masks = !whole.is_empty() && (head.masks || self.must_mask(at, target));
        if patched.is_empty() && !masks {
            return Ok(());
        }
        let loaded = self.rows_to_change(target, touched).await?;
        self.state().ensure_version(target, VersionRecord::default());
        let pieces: Vec<(u64, &[u8])> = patched.iter().map(|p| (offset_of(p.page), p.bytes.as_slice())).collect();
        if !pieces.is_empty() {
            self.write_file(target, &pieces).await?;
        }
        let mut pages: Vec<(u32, NewPage)> =
            patched.iter().map(|p| (p.page, p.crc.map_or(NewPage::Damaged, NewPage::Data))).collect();
        if masks {
            self.punch_data(target, whole.clone(), &loaded).await?;
            pages.extend(whole.map(|p| (p, NewPage::Zero)));
        }
        self.set_pages(index, target, &pages, &loaded);
        Ok(())
    }

    /// Whether zero pages must be recorded: something may lie below, or the version itself exists.
    fn must_mask(&self, at: &LayerHead, target: VersionKey) -> bool {
        let state = self.state();
        let has_chain = state.layers.get(at.layer).is_some_and(|l| !l.chain.is_empty());
        has_chain || state.versions(target.at).iter().any(|v| v.seq <= at.seq)
    }

    /// Frees the blocks of pages that hold data.
    async fn punch_data(&self, target: VersionKey, pages: Range<u32>, loaded: &Loaded) -> Result<(), ChunkStoreError> {
        let mut at = pages.start;
        let mut holes: Vec<Range<u32>> = vec![];
        while at < pages.end {
            let (row, first) = row_of(at);
            let end = (first_page(row) + PAGES_PER_ROW).min(pages.end);
            if let Known::Row(known) = self.known_row(&self.state(), loaded, target.row(row)) {
                let data = known.data().intersection(PageSet::range(first..first + (end - at)));
                for run in data.runs() {
                    let run = first_page(row) + run.start..first_page(row) + run.end;
                    match holes.last_mut() {
                        Some(last) if last.end == run.start => last.end = run.end,
                        _ => holes.push(run),
                    }
                }
            }
            at = end;
        }
        for hole in holes {
            self.punch(target, hole).await?;
        }
        Ok(())
    }

    /// The page that a partial write changes, verified by the rule of the recovery horizon.
    async fn old_page(
        self: &Arc<Self>,
        index: u64,
        at: &LayerHead,
        page: u32,
    ) -> Result<(PageSource, Patched), ChunkStoreError> {
        let read = self.read_pages_gated(&self.write_view(at), page..page + 1).await?;
        let source = read.sources[0];
        let mut crc = Some(0);
        if !read.bad.is_empty() {
            let own = matches!(source, PageSource::Data { version, touched: false, .. } if version == Self::target(at));
            // What the disk did not give is no newer content either.
            if own && read.unread.is_empty() && index <= self.state().lenient_until {
                count(&self.process.counters.unverified_pages);
            } else {
                self.report_damage(&source, at.chunk.0, page);
                crc = None;
            }
        }
        Ok((source, Patched { page, bytes: read.bytes.to_vec(), crc }))
    }

    /// Counts and logs a page that failed its checksum, and notes it to be mended.
    pub(crate) fn report_damage(&self, source: &PageSource, chunk: u32, page: u32) {
        if let Some(version) = source.version() {
            self.state().find(version.row(row_of(page).0));
        }
        count(&self.process.counters.corrupt_pages);
        tracing::error!(copyset = self.id.0, chunk, page, ?source, "stored page does not match its checksum");
    }

    /// Loads the existing rows of a version that cover pages, so that they can be changed without waiting.
    pub(crate) async fn rows_to_change(
        self: &Arc<Self>,
        target: VersionKey,
        pages: Range<u32>,
    ) -> Result<Loaded, ChunkStoreError> {
        let mut loaded = Loaded::new();
        let rows = row_of(pages.start).0..=row_of(pages.end - 1).0;
        loop {
            let mut missing = vec![];
            {
                let state = self.state();
                for row in rows.clone() {
                    match self.known_row(&state, &loaded, target.row(row)) {
                        Known::Unknown => missing.push(target.row(row)),
                        Known::Absent => {}
                        // Held here, because the cache may evict it before it is changed. Not a dirty one: it
                        // stays, and a second owner would make the change copy it.
                        Known::Row(known) => {
                            if let Some(stamp) = state.stamp(target)
                                && !state.dirty_rows.contains_key(&target.row(row))
                            {
                                loaded.insert(target.row(row), (stamp, known));
                            }
                        }
                    }
                }
            }
            if missing.is_empty() {
                return Ok(loaded);
            }
            self.load_rows(missing, &mut loaded).await?;
        }
    }

    /// Records what pages have become. Only the applying task changes rows, so `loaded` is current.
    pub(crate) fn set_pages(&self, index: u64, target: VersionKey, pages: &[(u32, NewPage)], loaded: &Loaded) {
        let mut state = self.state();
        for (page, new) in pages {
            let (row, page) = row_of(*page);
            let key = target.row(row);
            if !state.dirty_rows.contains_key(&key) {
                self.process.with_rows(|rows| rows.remove(&(self.id, key)));
            }
            let clean = || loaded.get(&key).map_or_else(|| Arc::new(Row::default()), |(_, row)| Arc::clone(row));
            let row = state.row_mut(key, index, clean);
            match new {
                NewPage::Data(crc) => row.set_data(page, *crc),
                NewPage::Zero => row.set_zero(page),
                NewPage::Damaged => row.set_damaged(page),
            }
            if matches!(new, NewPage::Damaged) {
                state.find(key);
            }
        }
        self.recount(&mut state);
    }

    /// Whether a Write would allocate blocks: some page of it has no data in the version it goes to. Ask only when
    /// [`super::ChunkStore::space_state`] is `Full`, and then do not propose it; it may block for a metadata row.
    #[must_use]
    pub fn needs_space(&self, at: &LayerHead) -> bool {
        let target = Self::target(at);
        let pages = pages_of(at);
        let (first_row, last_row) = (row_of(pages.start).0, row_of(pages.end - 1).0);
        (first_row..=last_row).any(|row| {
            let known = self.known_row(&self.state(), &Loaded::new(), target.row(row));
            let data = match known {
                Known::Absent => PageSet::EMPTY,
                Known::Row(row) => row.data(),
                // An unreadable row is found by whoever needs it; here it only means that we cannot know.
                Known::Unknown => match self.read_row(target.row(row)) {
                    Ok(Some(row)) => row.data(),
                    _ => PageSet::EMPTY,
                },
            };
            let first = first_page(row);
            let wanted = pages.start.max(first) - first..pages.end.min(first + PAGES_PER_ROW) - first;
            !PageSet::range(wanted).minus(data).is_empty()
        })
    }
}

impl Patched {
    /// Computes the checksum of the finished page, unless there can be none.
    fn seal(mut self) -> Self {
        self.crc = self.crc.map(|_| crc32c(&self.bytes));
        self
    }
}
