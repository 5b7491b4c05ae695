//! One IO of a front end: checked, cut at chunk bounds, its parts run side by side, the results put together.
//!
//! Called by `volume.rs`. Invariants: the payload of a request is a slice of the caller's buffer, never a copy; an IO
//! that lies in one chunk is a plain future without a set of futures around it; the parts of a write run to their end
//! even when one fails, so that nothing of it is still under way when the error is returned; a part counts against the
//! session's limits while it is in flight. Absent: what happens to a request, which is `attempt.rs`.

use crate::attachment::Attachment;
use crate::attempt::{Action, DataPath, Failure, Request};
use crate::block_device::{IoErrorKind, ReadData, ReadPiece};
use crate::cluster::NoSpacePolicy;
use crate::gate::WriteTicket;
use crate::layout::Lookup;
use crate::mds_client::MdsCallError;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_common::geometry::{ChunkSpan, chunk_spans, segment_of};
use ogee_common::id::{ChunkIndex, CopysetId, SegmentIndex};
use ogee_common::limits::{
    CHUNK_BYTES, IO_BYTES_MAX, LAYOUT_PREFETCH_SEGMENTS, REQUEST_BYTES_MAX, SEGMENT_BYTES, ZERO_BYTES_MAX,
    ZERO_SPANS_PARALLEL,
};
use ogee_common::rng;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::GetCopysetsRequest;
use smallvec::SmallVec;
use std::time::Duration;

/// Whether an IO of `len` bytes at `offset` may be done on a device of `size` bytes in sectors of `sector` bytes. Pure.
pub(crate) fn check_range(
    (offset, len): (u64, u64),
    (size, sector): (u64, u32),
    len_max: u64,
) -> Result<(), IoErrorKind> {
    let sector = u64::from(sector);
    let inside = offset.checked_add(len).is_some_and(|end| end <= size);
    if inside && len <= len_max && offset.is_multiple_of(sector) && len.is_multiple_of(sector) {
        Ok(())
    } else {
        Err(IoErrorKind::InvalidInput)
    }
}

/// Longest read or write, bytes.
pub(crate) const LEN_MAX: u64 = IO_BYTES_MAX as u64;

/// What an unplaced segment means to an IO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unplaced {
    /// It needs no placement: it reads as zeros.
    Fine,
    /// Give it one.
    Place,
}

impl DataPath<'_> {
    /// Reads a range that was checked.
    pub(crate) async fn read(&self, offset: u64, len: u32) -> Result<ReadData, Failure> {
        let mut spans = chunk_spans(offset, u64::from(len), REQUEST_BYTES_MAX);
        let Some(first) = spans.next() else { return Ok(ReadData::default()) };
        if first.len == len {
            let piece = self.read_span(first).await?;
            return Ok(ReadData { pieces: smallvec::smallvec![piece] });
        }
        let mut parts: FuturesUnordered<_> = std::iter::once(first)
            .chain(spans)
            .enumerate()
            .map(|(i, span)| async move { (i, self.read_span(span).await) })
            .collect();
        let mut pieces: SmallVec<[ReadPiece; 2]> = smallvec::smallvec![ReadPiece::Zeros(0); parts.len()];
        while let Some((i, piece)) = parts.next().await {
            pieces[i] = piece?;
        }
        Ok(ReadData { pieces })
    }

    async fn read_span(&self, span: ChunkSpan) -> Result<ReadPiece, Failure> {
        let Some(copyset) = self.copyset(span.chunk, Unplaced::Fine).await? else {
            return Ok(ReadPiece::Zeros(span.len));
        };
        if let Some(lazy) = self.lazy_at(span.chunk, span.offset) {
            return Box::pin(self.read_thin(lazy, copyset, span)).await;
        }
        self.read_plain(copyset, span).await
    }

    /// Reads a span of which nothing is read from a backup.
    pub(crate) async fn read_plain(&self, copyset: CopysetId, span: ChunkSpan) -> Result<ReadPiece, Failure> {
        let _in_flight = self.session.admit(span.len).await;
        let outcome = self.run(&mut Request { copyset, span, action: Action::Read }, None).await?;
        Ok(outcome.into_piece(span.len))
    }

    /// Writes to a range that was checked.
    pub(crate) async fn write(&self, ticket: &WriteTicket<'_>, offset: u64, data: Bytes) -> Result<(), Failure> {
        let mut spans = chunk_spans(offset, data.len() as u64, REQUEST_BYTES_MAX);
        let Some(first) = spans.next() else { return Ok(()) };
        if first.len as usize == data.len() {
            return self.write_span(ticket, first, data).await;
        }
        let mut parts: FuturesUnordered<_> = std::iter::once(first)
            .chain(spans)
            .map(|span| {
                let start = usize::try_from(span.buffer_offset).expect("an IO is bounded by IO_BYTES_MAX");
                self.write_span(ticket, span, data.slice(start..start + span.len as usize))
            })
            .collect();
        let mut result = Ok(());
        while let Some(part) = parts.next().await {
            result = result.and(part);
        }
        result
    }

    async fn write_span(&self, ticket: &WriteTicket<'_>, span: ChunkSpan, data: Bytes) -> Result<(), Failure> {
        let Some(copyset) = self.copyset(span.chunk, Unplaced::Place).await? else {
            return Err(IoErrorKind::ReadOnly.into());
        };
        if self.lazy_at(span.chunk, 0).is_some() {
            Box::pin(self.make_present(copyset, &span)).await?;
        }
        let _in_flight = self.session.admit(span.len).await;
        let mut request = Request { copyset, span, action: Action::write(span.offset, data) };
        self.run(&mut request, Some(&mut ticket.part())).await.map(drop)
    }

    /// Makes a range that was checked read as zeros. Segments without a placement do already: nothing is sent for them, but
    /// the MDS is asked, so that a client that was taken over has no success here either (ADR 0014).
    pub(crate) async fn zero(&self, ticket: &WriteTicket<'_>, offset: u64, len: u64) -> Result<(), Failure> {
        let mut parts = FuturesUnordered::new();
        let mut result = Ok(());
        let (mut at, end) = (offset, offset + len);
        // The MDS was asked during this request about the segments below.
        let mut asked = SegmentIndex(0);
        while at < end && result.is_ok() {
            let chunk = ChunkIndex(u32::try_from(at / u64::from(CHUNK_BYTES)).expect("volumes are bounded"));
            let segment = segment_of(chunk);
            let stop = ((u64::from(segment.0) + 1) * SEGMENT_BYTES).min(end);
            if matches!(self.at.layout.lookup(chunk), Lookup::At(_)) {
                for span in chunk_spans(at, stop - at, ZERO_BYTES_MAX) {
                    if parts.len() >= ZERO_SPANS_PARALLEL {
                        result = result.and(parts.next().await.unwrap_or(Ok(())));
                    }
                    parts.push(self.zero_span(ticket, span));
                }
            } else if segment >= asked {
                let segments = u32::try_from(end.div_ceil(SEGMENT_BYTES)).expect("volumes are bounded");
                match self.confirm_layout(segment, segments - segment.0).await {
                    Ok(behind) => asked = behind,
                    Err(failure) => result = Err(failure),
                }
                continue;
            }
            at = stop;
        }
        while let Some(part) = parts.next().await {
            result = result.and(part);
        }
        result
    }

    async fn zero_span(&self, ticket: &WriteTicket<'_>, span: ChunkSpan) -> Result<(), Failure> {
        let Some(copyset) = self.copyset(span.chunk, Unplaced::Place).await? else {
            return Err(IoErrorKind::ReadOnly.into());
        };
        let masks = self.lazy_at(span.chunk, span.offset).is_some();
        if masks {
            Box::pin(self.make_present(copyset, &span)).await?;
        }
        let _in_flight = self.session.admit(0).await;
        let mut request = Request { copyset, span, action: Action::Zero { masks } };
        self.run(&mut request, Some(&mut ticket.part())).await.map(drop)
    }

    /// Asks the MDS, until it answers, for up to `count` segments from `first` on, and whether this client is still the writer;
    /// the segment behind the last one that was asked for.
    async fn confirm_layout(&self, first: SegmentIndex, count: u32) -> Result<SegmentIndex, Failure> {
        let at = self.at;
        let behind = SegmentIndex(first.0 + count.min(LAYOUT_PREFETCH_SEGMENTS));
        let mut pause = at.cluster.config.timing.backoff_min;
        loop {
            at.gate.check()?;
            match at.layout.confirm(&at.cluster.mds, at.info.volume, at.info.epoch, first.0..behind.0).await {
                Ok(copysets) => {
                    at.learn_replicas(&copysets).await;
                    return Ok(behind);
                }
                Err(error) => self.pause_before_repeating(error, &mut pause).await?,
            }
        }
    }

    /// The copyset of a chunk; `None` if its segment has no placement and needs none.
    pub(crate) async fn copyset(&self, chunk: ChunkIndex, unplaced: Unplaced) -> Result<Option<CopysetId>, Failure> {
        match (self.at.layout.lookup(chunk), unplaced) {
            (Lookup::At(copyset), _) => Ok(Some(copyset)),
            (Lookup::Unplaced, Unplaced::Fine) => Ok(None),
            // Boxed: it is rare, and its future is large.
            _ => Box::pin(self.find_copyset(chunk, unplaced)).await,
        }
    }

    /// Asks the MDS until it answers.
    async fn find_copyset(&self, chunk: ChunkIndex, unplaced: Unplaced) -> Result<Option<CopysetId>, Failure> {
        let at = self.at;
        let mut pause = at.cluster.config.timing.backoff_min;
        loop {
            at.gate.check()?;
            let asked = match at.layout.lookup(chunk) {
                Lookup::At(copyset) => return Ok(Some(copyset)),
                Lookup::Unplaced if unplaced == Unplaced::Fine => return Ok(None),
                Lookup::Unplaced => at.layout.place(&at.cluster.mds, at.info.volume, at.info.epoch, chunk).await,
                Lookup::Unknown => at.layout.fetch(&at.cluster.mds, chunk).await,
            };
            match asked {
                Ok(copysets) => at.learn_replicas(&copysets).await,
                Err(error) => self.pause_before_repeating(error, &mut pause).await?,
            }
        }
    }

    /// Waits for the time to repeat a failed call to the MDS, if it may be repeated; the next pause is longer.
    async fn pause_before_repeating(&self, error: MdsCallError, pause: &mut Duration) -> Result<(), Failure> {
        self.at.judge_mds(error)?;
        tokio::time::sleep(rng::jitter(*pause)).await;
        *pause = (*pause * 2).min(self.at.cluster.config.timing.backoff_max);
        Ok(())
    }
}

impl Attachment {
    /// Whether a failed call to the MDS may be repeated; ends the attach when the refusal means that.
    ///
    /// # Errors
    /// What the IO that made the call comes to.
    pub(crate) fn judge_mds(&self, error: MdsCallError) -> Result<(), Failure> {
        let kind = match error.kind {
            MdsErrorKind::Unavailable | MdsErrorKind::NotLeader => return Ok(()),
            MdsErrorKind::NoSpace if self.cluster.config.no_space == NoSpacePolicy::Wait => return Ok(()),
            MdsErrorKind::NoSpace => IoErrorKind::NoSpace,
            MdsErrorKind::Fenced | MdsErrorKind::Attached => {
                self.end(true);
                IoErrorKind::Fenced
            }
            MdsErrorKind::NotFound => {
                self.end(false);
                IoErrorKind::Closed
            }
            _ => IoErrorKind::InvalidInput,
        };
        Err(Failure { kind, source: Some(Box::new(error)) })
    }

    /// Asks the MDS for the replicas of copysets that are new to this process. A failure is no harm: `resolve.rs` asks
    /// again when they are needed.
    pub(crate) async fn learn_replicas(&self, copysets: &[CopysetId]) {
        let ids = self.cluster.routes.unknown(copysets);
        if ids.is_empty() {
            return;
        }
        match self.cluster.mds.get_copysets(GetCopysetsRequest { ids }).await {
            Ok(list) => self.cluster.routes.install(&list.copysets),
            Err(error) => tracing::debug!(target: "controlpath", %error, "get copysets"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let check = |offset, len| check_range((offset, len), (1 << 20, 512), 1 << 16);
        assert_eq!(check(0, 512), Ok(()));
        assert_eq!(check((1 << 20) - 512, 512), Ok(()));
        for (offset, len) in [(1, 512), (0, 511), (1 << 20, 512), (0, (1 << 16) + 512), (u64::MAX - 511, 1024)] {
            assert_eq!(check(offset, len), Err(IoErrorKind::InvalidInput), "{offset} {len}");
        }
        let check = |offset, len| check_range((offset, len), (1 << 20, 4096), 1 << 16);
        assert_eq!(check(4096, 8192), Ok(()));
        assert_eq!(check(512, 4096), Err(IoErrorKind::InvalidInput));
        assert_eq!(check(4096, 512), Err(IoErrorKind::InvalidInput));
    }
}
