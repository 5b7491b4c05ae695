//! Pure arithmetic of volumes, segments, chunks and pages. No IO. Property-tested against a byte-by-byte oracle.

use crate::checksum::PAGE;
use crate::id::{ChunkIndex, SegmentIndex};
use crate::limits::{CHUNK_BYTES, CHUNKS_PER_SEGMENT};
use std::ops::Range;

/// A part of an IO that lies in one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSpan {
    /// The chunk of the layer.
    pub chunk: ChunkIndex,
    /// First byte in the chunk.
    pub offset: u32,
    /// Bytes, at least 1.
    pub len: u32,
    /// Where the span starts in the caller's buffer, bytes.
    pub buffer_offset: u64,
}

/// A part of a request that lies in one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageFragment {
    /// The page of the chunk, 0 to 4095.
    pub page: u32,
    /// First byte in the page.
    pub offset: usize,
    /// Bytes of the caller's buffer.
    pub range: Range<usize>,
}

impl PageFragment {
    /// Whether the fragment covers its page whole.
    #[must_use]
    pub fn is_whole_page(&self) -> bool {
        self.range.len() == PAGE
    }
}

/// The segment that holds a chunk.
#[must_use]
pub const fn segment_of(chunk: ChunkIndex) -> SegmentIndex {
    SegmentIndex(chunk.0 / CHUNKS_PER_SEGMENT)
}

/// The position of a chunk in its segment, 0 to 63.
#[must_use]
pub const fn slot_in_segment(chunk: ChunkIndex) -> usize {
    (chunk.0 % CHUNKS_PER_SEGMENT) as usize
}

/// Cuts `[offset, offset + len)` of a volume at chunk bounds and into spans of at most `span_max` bytes, in order.
/// `span_max` must be a divisor of the chunk size or at least as large.
pub fn chunk_spans(offset: u64, len: u64, span_max: u32) -> impl Iterator<Item = ChunkSpan> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let chunk_bytes = u64::from(CHUNK_BYTES);
        let in_chunk = u32::try_from(at % chunk_bytes).expect("a remainder of the chunk size fits");
        let room = (chunk_bytes - u64::from(in_chunk)).min(end - at);
        // Cut at multiples of span_max inside the chunk, so that retries and neighbours split alike.
        let to_cut = span_max - in_chunk % span_max;
        let len = u32::try_from(room).expect("a chunk's room fits").min(to_cut);
        let span = ChunkSpan {
            chunk: ChunkIndex(u32::try_from(at / chunk_bytes).expect("volume size is bounded by VOLUME_BYTES_MAX")),
            offset: in_chunk,
            len,
            buffer_offset: at - offset,
        };
        at += u64::from(len);
        Some(span)
    })
}

/// Cuts `len` bytes at byte `offset` of a chunk at page bounds, in order.
pub fn page_fragments(offset: u32, len: usize) -> impl Iterator<Item = PageFragment> {
    let start = offset as usize;
    let mut done = 0usize;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at = start + done;
        let in_page = at % PAGE;
        let take = (PAGE - in_page).min(len - done);
        let fragment = PageFragment {
            page: u32::try_from(at / PAGE).expect("chunk offsets fit in 32 bits"),
            offset: in_page,
            range: done..done + take,
        };
        done += take;
        Some(fragment)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn spans_tile_the_io(offset in 0u64..1 << 36, len in 0u64..100 << 20, shift in 12u32..25) {
            let span_max = 1u32 << shift;
            let mut at = offset;
            for s in chunk_spans(offset, len, span_max) {
                prop_assert!(s.len >= 1 && s.len <= span_max);
                prop_assert!(s.offset + s.len <= CHUNK_BYTES);
                prop_assert_eq!(u64::from(s.chunk.0) * u64::from(CHUNK_BYTES) + u64::from(s.offset), at);
                prop_assert_eq!(s.buffer_offset, at - offset);
                at += u64::from(s.len);
            }
            prop_assert_eq!(at, offset + len);
        }

        #[test]
        fn fragments_agree_with_a_byte_oracle(offset in 0u32..CHUNK_BYTES - 70_000, len in 0usize..70_000) {
            let mut seen = vec![];
            for f in page_fragments(offset, len) {
                prop_assert!(f.range.end > f.range.start);
                for i in f.range.clone() {
                    seen.push((f.page as usize, f.offset + i - f.range.start));
                }
            }
            let oracle: Vec<_> = (0..len).map(|i| ((offset as usize + i) / PAGE, (offset as usize + i) % PAGE)).collect();
            prop_assert_eq!(seen, oracle);
        }
    }
}
