//! Extents of a volume, by page: what it holds, and what may have changed since an earlier moment.
//!
//! Called by `volume.rs`. Segments without a placement are holes and cost no question; for every other chunk its copyset is
//! asked for a page map. Invariants: an answer begins where it was asked for and has no gaps; it ends early rather than
//! growing (`EXTENT_CHUNKS_MAX`); what is not known is data, and changed. A caller that wants only the first extent
//! costs one or two questions: more than one chunk is asked for at once only while everything is of one kind.

use crate::attempt::{Action, DataPath, Failure, Outcome, Request};
use crate::block_device::{Extent, ExtentKind, Moment};
use crate::io::Unplaced;
use crate::lazy::Told;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_common::geometry::{ChunkSpan, chunk_spans, segment_of};
use ogee_common::id::{ChunkIndex, CopysetId};
use ogee_common::limits::{
    CHUNK_BYTES, EXTENT_CHUNKS_MAX, EXTENT_CHUNKS_PARALLEL, EXTENT_SEGMENTS_MAX, PAGE_BYTES, SEGMENT_BYTES,
};
use ogee_proto::data::{ChunkPages, PageMapReply};

/// Bytes in flight that a question counts as: its answer.
const ANSWER_BYTES: u32 = 4096;

/// Extents that grow at their end.
#[derive(Debug, Default)]
struct Runs(Vec<Extent>);

impl Runs {
    fn push(&mut self, len: u64, kind: ExtentKind, changed: bool) {
        match self.0.last_mut().filter(|last| last.kind == kind && last.changed == changed) {
            Some(last) => last.len += len,
            None => self.0.push(Extent { len, kind, changed }),
        }
    }

    /// Adds the bytes of a span of the chunk that the map is of. `is_compared`: the map tells what changed.
    fn push_span(&mut self, span: &ChunkSpan, map: &PageMapReply, is_compared: bool) {
        let all = ChunkPages::all();
        let changed = map.changed.as_ref().filter(|_| is_compared).unwrap_or(&all);
        let (mut at, end) = (span.offset, span.offset + span.len);
        while at < end {
            let page = at / PAGE_BYTES;
            let stop = end.min((page + 1) * PAGE_BYTES);
            let kind = match (map.data.contains(page), map.zero.contains(page)) {
                (true, _) => ExtentKind::Data,
                (false, true) => ExtentKind::Zero,
                (false, false) => ExtentKind::Hole,
            };
            self.push(u64::from(stop - at), kind, changed.contains(page));
            at = stop;
        }
    }
}

fn chunk_at(offset: u64) -> ChunkIndex {
    ChunkIndex(u32::try_from(offset / u64::from(CHUNK_BYTES)).expect("volumes are bounded"))
}

impl DataPath<'_> {
    /// Extents of a range that was checked, from its start on; they may end early.
    pub(crate) async fn extents(&self, offset: u64, len: u64, since: Option<Moment>) -> Result<Vec<Extent>, Failure> {
        let since = since.filter(|moment| self.at.can_compare(*moment));
        let mut runs = Runs::default();
        let (mut at, end) = (offset, offset + len);
        let (mut segments, mut chunks, mut ahead) = (0, 0, 1);
        while at < end && runs.0.len() < 2 && segments < EXTENT_SEGMENTS_MAX && chunks < EXTENT_CHUNKS_MAX {
            let chunk = chunk_at(at);
            let segment_end = end.min((u64::from(segment_of(chunk).0) + 1) * SEGMENT_BYTES);
            if self.copyset(chunk, Unplaced::Fine).await?.is_none() {
                runs.push(segment_end - at, ExtentKind::Hole, since.is_none());
                (at, segments) = (segment_end, segments + 1);
                continue;
            }
            let stop = segment_end.min((u64::from(chunk.0) + ahead as u64) * u64::from(CHUNK_BYTES));
            let ask = |span: ChunkSpan| async move { Ok::<_, Failure>((span, self.page_map(span.chunk, since).await?)) };
            let maps = stream::iter(chunk_spans(at, stop - at, CHUNK_BYTES)).map(ask).buffered(EXTENT_CHUNKS_PARALLEL);
            let maps: Vec<(ChunkSpan, PageMapReply)> = maps.try_collect().await?;
            maps.iter().for_each(|(span, map)| runs.push_span(span, map, since.is_some()));
            (at, chunks, ahead) = (stop, chunks + maps.len(), EXTENT_CHUNKS_PARALLEL.min(ahead * 2));
        }
        Ok(runs.0)
    }

    async fn page_map(&self, chunk: ChunkIndex, since: Option<Moment>) -> Result<PageMapReply, Failure> {
        let Some(copyset) = self.copyset(chunk, Unplaced::Fine).await? else { return Ok(PageMapReply::unknown()) };
        // Before the map: with a layer that becomes complete behind it, holes of the map would hide what was pasted since.
        let lazy = self.lazy_at(chunk, 0);
        let mut map = self.ask_page_map(copyset, chunk, since).await?;
        match lazy {
            Some(lazy) if self.tell_backup(lazy, chunk, &mut map).await? == Told::Complete => self.ask_page_map(copyset, chunk, since).await,
            _ => Ok(map),
        }
    }

    /// What the cluster holds of a chunk, without what is in a backup alone.
    pub(crate) async fn ask_page_map(&self, copyset: CopysetId, chunk: ChunkIndex, since: Option<Moment>) -> Result<PageMapReply, Failure> {
        let _in_flight = self.session.admit(ANSWER_BYTES).await;
        let span = ChunkSpan { chunk, offset: 0, len: CHUNK_BYTES, buffer_offset: 0 };
        let mut request = Request { copyset, span, action: Action::PageMap(since) };
        Ok(match self.run(&mut request, None).await? {
            Outcome::PageMap(map) => *map,
            Outcome::Done | Outcome::Read(_) | Outcome::Thin(..) => PageMapReply::unknown(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(row: u8, first_byte: u8) -> ChunkPages {
        let mut set = ChunkPages::none();
        let mut bytes = [0; 32];
        bytes[0] = first_byte;
        set.set_row(row, &bytes);
        set
    }

    #[test]
    fn extents_are_cut_at_pages_and_joined_where_they_are_alike() {
        // Pages 0 and 1 data, 2 zero, then nothing; 1 and 2 changed.
        let map = PageMapReply { data: pages(0, 0b011), zero: pages(0, 0b100), changed: Some(pages(0, 0b110)) };
        let span = |offset, len| ChunkSpan { chunk: ChunkIndex(0), offset, len, buffer_offset: 0 };
        let told = |span: ChunkSpan, is_compared| {
            let mut runs = Runs::default();
            runs.push_span(&span, &map, is_compared);
            runs.0.into_iter().map(|e| (e.len, e.kind, e.changed)).collect::<Vec<_>>()
        };
        use ExtentKind::{Data, Hole, Zero};
        assert_eq!(
            told(span(512, CHUNK_BYTES - 512), true),
            [(3584, Data, false), (4096, Data, true), (4096, Zero, true), (u64::from(CHUNK_BYTES) - 12288, Hole, false)]
        );
        assert_eq!(told(span(0, 8192), false), [(8192, Data, true)], "nothing was compared");
        let silent = PageMapReply { changed: None, ..map.clone() };
        let mut runs = Runs::default();
        runs.push_span(&span(8192, 8192), &silent, true);
        assert!(runs.0.iter().all(|e| e.changed), "{runs:?}");
    }
}
