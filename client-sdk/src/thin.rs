//! IO on a volume that stands on a backup (ADR 0016): reads that fill missing pages, and what comes before a change of a part of a page.
//!
//! Used by `io.rs` and `extents.rs`. A page is *missing* when no version of the layer or of an ancestor has it, neither as data nor as zeros; then
//! it is what the backup holds. Invariants:
//! - **A read is right at the moment of the chunkserver's answer.** A page that was told as missing had the backup's content then, whatever is
//!   written or pasted while that is fetched; a later write is a later write.
//! - **No part of a page is changed while the page is missing and the backup has something there.** The copyset would take the rest for zeros.
//!   So the page is looked at first and pasted if need be, and only when the paste was applied, or the page was present, or the backup has
//!   zeros there, the write or zeroing is sent. A page that is present stays present (`ogee_chunkserver::store::paste`), so nothing that
//!   happens in between, and no repetition of the request, can make it missing again.
//! - Zeroings of whole pages say that they mask: without anything below them a copyset would record nothing.
//! - A layer that became complete is asked again (`lazy.rs`): no zeros are made of an answer from before. A part of a page may be changed then without a
//!   second look: the page is present by now, or the backup has zeros there.
//! - Pasting is never needed for a read to be right; what is offered in the background may fail or be dropped.

use crate::attachment::Attachment;
use crate::attempt::{Action, DataPath, Failure, Outcome, Request};
use crate::block_device::ReadPiece;
use crate::io::Unplaced;
use crate::lazy::{Lazy, Told};
use crate::session::Session;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use ogee_common::geometry::ChunkSpan;
use ogee_common::id::{ChunkIndex, CopysetId};
use ogee_common::limits::{
    CHUNK_BYTES, LAZY_PASTE_TIMEOUT, LAZY_PASTES_PARALLEL, PAGE_BYTES, PAGES_PER_ROW,
};
use ogee_proto::data::{PageMapReply, PastePages};
use std::ops::Range;
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;

/// First byte of a chunk in its volume.
fn chunk_start(chunk: ChunkIndex) -> u64 {
    u64::from(chunk.0) * u64::from(CHUNK_BYTES)
}

/// Pages that a range of a chunk covers in part: none, one or two. Pure.
pub(crate) fn partial_pages(offset: u32, len: u32) -> impl Iterator<Item = u32> {
    let end = offset + len;
    let first = (!offset.is_multiple_of(PAGE_BYTES)).then_some(offset / PAGE_BYTES);
    let last = (!end.is_multiple_of(PAGE_BYTES)).then_some(end / PAGE_BYTES).filter(|page| Some(*page) != first);
    first.into_iter().chain(last)
}

/// Byte ranges of the span, relative to it, whose pages are missing. Pure.
fn missing_ranges(span: &ChunkSpan, missing: &[bool]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = vec![];
    let first = span.offset / PAGE_BYTES;
    for (page, _) in (first..).zip(missing).filter(|(_, is_missing)| **is_missing) {
        let start = (page * PAGE_BYTES).max(span.offset) - span.offset;
        let end = ((page + 1) * PAGE_BYTES).min(span.offset + span.len) - span.offset;
        match ranges.last_mut().filter(|last| last.end == start as usize) {
            Some(last) => last.end = end as usize,
            None => ranges.push(start as usize..end as usize),
        }
    }
    ranges
}

/// What was read; copied only if something of it was missing.
enum Filled {
    AsRead(ReadPiece),
    Changed(BytesMut),
}

impl Filled {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Self::AsRead(piece) = self {
            let buffer = match piece {
                ReadPiece::Data(read) => BytesMut::from(&read[..]),
                ReadPiece::Zeros(len) => BytesMut::zeroed(*len as usize),
            };
            *self = Self::Changed(buffer);
        }
        if let Self::Changed(buffer) = self {
            buffer[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn into_piece(self) -> ReadPiece {
        match self {
            Self::AsRead(piece) => piece,
            Self::Changed(buffer) => ReadPiece::Data(buffer.freeze()),
        }
    }
}

impl DataPath<'_> {
    /// The backup below a byte of the volume, if there may be one.
    pub(crate) fn lazy_at(&self, chunk: ChunkIndex, offset: u32) -> Option<&Arc<Lazy>> {
        self.at.lazy.as_ref().filter(|lazy| lazy.reaches(chunk_start(chunk) + u64::from(offset)))
    }

    /// Reads a span, and what is missing of it from the backup.
    pub(crate) async fn read_thin(&self, lazy: &Lazy, copyset: CopysetId, span: ChunkSpan) -> Result<ReadPiece, Failure> {
        let (piece, missing) = self.ask_thin(copyset, span).await?;
        let mut filled = Filled::AsRead(piece);
        for range in missing_ranges(&span, &missing) {
            if self.fill(lazy, &span, range, &mut filled).await? == Told::Complete {
                return self.read_plain(copyset, span).await;
            }
        }
        Ok(filled.into_piece())
    }

    async fn ask_thin(&self, copyset: CopysetId, span: ChunkSpan) -> Result<(ReadPiece, Vec<bool>), Failure> {
        let _in_flight = self.session.admit(span.len).await;
        match self.run(&mut Request { copyset, span, action: Action::ReadThin }, None).await? {
            Outcome::Thin(piece, missing) => Ok((piece, missing)),
            other => Ok((other.into_piece(span.len), vec![])),
        }
    }

    /// Puts in what the backup holds of a range of the span.
    async fn fill(&self, lazy: &Lazy, span: &ChunkSpan, range: Range<usize>, filled: &mut Filled) -> Result<Told<()>, Failure> {
        let start = chunk_start(span.chunk) + u64::from(span.offset);
        let (mut at, end) = (start + range.start as u64, (start + range.end as u64).min(lazy.parent.size_bytes));
        while at < end {
            let block = lazy.parent.block_of(at);
            let stop = end.min(lazy.parent.block_start(block + 1));
            let Told::Held(content) = lazy.block(self.at, block).await? else { return Ok(Told::Complete) };
            if let Some(content) = content {
                let within = |offset: u64| usize::try_from(offset).expect("spans and blocks are bounded");
                let from = within(at - lazy.parent.block_start(block));
                filled.put(within(at - start), &content[from..from + within(stop - at)]);
                lazy.offer(block);
            }
            at = stop;
        }
        Ok(Told::Held(()))
    }

    /// Makes sure of the pages that a span covers in part, before they are changed.
    pub(crate) async fn make_present(&self, copyset: CopysetId, span: &ChunkSpan) -> Result<(), Failure> {
        for page in partial_pages(span.offset, span.len) {
            if let Some(lazy) = self.lazy_at(span.chunk, page * PAGE_BYTES) {
                self.make_page_present(lazy, copyset, span.chunk, page).await?;
            }
        }
        Ok(())
    }

    async fn make_page_present(&self, lazy: &Lazy, copyset: CopysetId, chunk: ChunkIndex, page: u32) -> Result<(), Failure> {
        let span = ChunkSpan { chunk, offset: page * PAGE_BYTES, len: PAGE_BYTES, buffer_offset: 0 };
        let (_, missing) = self.ask_thin(copyset, span).await?;
        if missing.first() != Some(&true) {
            return Ok(());
        }
        let at = chunk_start(chunk) + u64::from(span.offset);
        let block = lazy.parent.block_of(at);
        // Of zeros nothing needs to be pasted: that is what the copyset takes a missing page for.
        let Told::Held(Some(content)) = lazy.block(self.at, block).await? else { return Ok(()) };
        self.paste(lazy, copyset, (block, &content), |p| p == page % PAGES_PER_ROW).await
    }

    /// Pastes those of a block's pages that are wanted, by their number in their row.
    pub(crate) async fn paste(
        &self,
        lazy: &Lazy,
        copyset: CopysetId,
        (block, content): (u64, &Bytes),
        wanted: impl Fn(u32) -> bool,
    ) -> Result<(), Failure> {
        let Some((chunk, pages, data)) = paste_of(lazy.parent.block_start(block), content, wanted) else { return Ok(()) };
        let _in_flight = self.session.admit(u32::try_from(data.len()).unwrap_or(u32::MAX)).await;
        let span = ChunkSpan { chunk, offset: 0, len: CHUNK_BYTES, buffer_offset: 0 };
        let action = Action::Paste { layer: lazy.parent.layer, pages: Box::new(pages), data };
        self.run(&mut Request { copyset, span, action }, None).await.map(drop)
    }

    /// Says of pages that are missing, and of which the backup may hold something, that they are data. `Complete`: the map is of before the layer
    /// was that.
    pub(crate) async fn tell_backup(&self, lazy: &Lazy, chunk: ChunkIndex, map: &mut PageMapReply) -> Result<Told<()>, Failure> {
        let end = (chunk_start(chunk) + u64::from(CHUNK_BYTES)).min(lazy.parent.size_bytes);
        for block in lazy.parent.block_of(chunk_start(chunk))..=lazy.parent.block_of(end - 1) {
            let first = page_in_chunk(chunk, lazy.parent.block_start(block));
            let pages = first..page_in_chunk(chunk, lazy.parent.block_start(block + 1).min(end.next_multiple_of(u64::from(PAGE_BYTES))));
            let is_missing = |map: &PageMapReply, page| !map.data.contains(page) && !map.zero.contains(page);
            if !pages.clone().any(|page| is_missing(map, page)) {
                continue;
            }
            let Told::Held(holds_data) = lazy.holds_data(self.at, block).await? else { return Ok(Told::Complete) };
            for page in pages.filter(|_| holds_data) {
                if is_missing(map, page) {
                    map.data.insert(page);
                }
            }
        }
        Ok(Told::Held(()))
    }
}

/// The page of a chunk at a byte of the volume, which lies in the chunk or right behind it.
fn page_in_chunk(chunk: ChunkIndex, offset: u64) -> u32 {
    u32::try_from((offset - chunk_start(chunk)) / u64::from(PAGE_BYTES)).expect("a chunk has few pages")
}

/// Where content that begins at a byte of the volume, a multiple of a block, belongs: its chunk, and its pages with their data; `None` if
/// none is wanted. Pure.
pub(crate) fn paste_of(start: u64, content: &Bytes, wanted: impl Fn(u32) -> bool) -> Option<(ChunkIndex, PastePages, Bytes)> {
    let chunk = ChunkIndex(u32::try_from(start / u64::from(CHUNK_BYTES)).expect("volumes are bounded"));
    let first = page_in_chunk(chunk, start);
    let row = u8::try_from(first / PAGES_PER_ROW).expect("a chunk has few rows");
    let page = PAGE_BYTES as usize;
    // The last page of a backup whose size is no multiple of a page ends in zeros.
    let whole = match content.len() % page {
        0 => content.clone(),
        rest => {
            let mut padded = BytesMut::from(&content[..]);
            padded.resize(content.len() + page - rest, 0);
            padded.freeze()
        }
    };
    let (pages, data) = PastePages::of(row, first % PAGES_PER_ROW, &whole, wanted);
    (!pages.is_empty()).then_some((chunk, pages, data))
}

/// Pastes what is offered, as long as the volume is open.
pub(crate) async fn run_offers(at: Weak<Attachment>, session: Arc<Session>, mut offers: mpsc::Receiver<u64>) {
    let offers = stream::poll_fn(move |cx| offers.poll_recv(cx));
    let paste = |block| {
        let (at, session) = (at.clone(), session.clone());
        async move {
            if let Some(at) = at.upgrade()
                && let Some(lazy) = at.lazy.clone()
                && let Some(Some(content)) = lazy.cached(block)
            {
                // Bounded, so that a copyset without quorum does not keep a volume alive that nobody uses any more.
                let pasted = tokio::time::timeout(LAZY_PASTE_TIMEOUT, paste_offer(&at, &session, &lazy, (block, &content)));
                if !matches!(pasted.await, Ok(Ok(()))) {
                    tracing::debug!(target: "datapath", block, "an offered block was not pasted");
                }
            }
        }
    };
    offers.for_each_concurrent(LAZY_PASTES_PARALLEL, paste).await;
}

async fn paste_offer(at: &Attachment, session: &Session, lazy: &Lazy, (block, content): (u64, &Bytes)) -> Result<(), Failure> {
    let path = DataPath { at, session };
    let chunk = ChunkIndex(u32::try_from(lazy.parent.block_start(block) / u64::from(CHUNK_BYTES)).expect("volumes are bounded"));
    match path.copyset(chunk, Unplaced::Fine).await? {
        Some(copyset) => path.paste(lazy, copyset, (block, content), |_| true).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(offset: u32, len: u32) -> ChunkSpan {
        ChunkSpan { chunk: ChunkIndex(0), offset, len, buffer_offset: 0 }
    }

    #[test]
    fn pages_that_are_covered_in_part() {
        let pages = |offset, len| partial_pages(offset, len).collect::<Vec<_>>();
        assert!(pages(0, 4096).is_empty() && pages(8192, 1 << 20).is_empty());
        assert_eq!(pages(512, 512), [0], "one page, both ends");
        assert_eq!(pages(512, 3584), [0]);
        assert_eq!(pages(4096, 512), [1]);
        assert_eq!(pages(512, 4096), [0, 1]);
        assert_eq!(pages(3584, 8192 + 1024), [0, 3]);
    }

    #[test]
    fn missing_pages_are_cut_to_the_span_and_joined() {
        assert_eq!(missing_ranges(&span(512, 8192), &[true, false, true]), [0..3584, 7680..8192]);
        assert_eq!(missing_ranges(&span(4096, 12288), &[true, true, false]).first(), Some(&(0..8192)));
        assert_eq!(missing_ranges(&span(4096, 12288), &[true, true, false]).len(), 1);
        assert!(missing_ranges(&span(0, 4096), &[false]).is_empty());
    }

    #[test]
    fn a_block_becomes_pages_of_its_row() {
        let content = Bytes::from([vec![1; 4096], vec![0; 4096], vec![2; 100]].concat());
        let start = (5 << 24) + (3 << 20) + (256 << 10);
        let (chunk, pages, data) = paste_of(start, &content, |_| true).expect("pages");
        assert_eq!((chunk, pages.row, pages.crcs.len()), (ChunkIndex(5), 3, 2));
        assert_eq!((pages.data[8], pages.zero[8]), (0b101, 0b010), "64 pages are 8 bytes of the set");
        assert!(pages.matches(&data) && data[4096 + 99] == 2 && data[4096 + 100] == 0, "the last page is filled up with zeros");
        let (_, one, data) = paste_of(start, &content, |page| page == 65).expect("a page");
        assert_eq!((one.zero[8], data.len()), (0b010, 0));
        assert!(paste_of(start, &content, |_| false).is_none());
    }
}
