//! Copies an image to a device: only what is not zeros, many blocks at once.
//!
//! The device must read as zeros where nothing is written, as a new volume does. Two filters: holes of the image are
//! never read, and blocks that were read but are zeros are not written. Blocks are cut at multiples of [`BLOCK_BYTES`]
//! and every page is planned at most once, so no two writes in flight touch the same page.

use super::source::ImageSource;
use crate::error::{CliError, ErrorKind};
use crate::output::Progress;
use crate::sdk_error::io_failed;
use crate::sparse::nonzero_runs;
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt, stream};
use ogee_client::BlockDevice;
use ogee_common::limits::{PAGE_BYTES, REQUEST_BYTES_MAX};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one block: one request of the data protocol.
const BLOCK_BYTES: u64 = REQUEST_BYTES_MAX as u64;
/// Blocks in flight: 16 MiB, enough to keep several chunkservers busy.
const BLOCKS_IN_FLIGHT: usize = 16;
/// Zeros shorter than this are written with their neighbours: a request costs more than 64 KiB of zeros.
const CELL_BYTES: usize = 64 << 10;
/// Bytes that the image is asked for data at once.
const PLAN_BYTES: u64 = 256 << 20;

/// What was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Bytes read from the image; holes are not read.
    pub read_bytes: u64,
    /// Bytes written to the device; zeros are not written.
    pub written_bytes: u64,
}

/// Copies the whole image to the start of `device` and flushes.
///
/// # Errors
/// The image cannot be read or the device not written. The device is then written in part.
pub(crate) async fn upload<D: BlockDevice>(
    source: &Arc<ImageSource>, device: &D, progress: &Progress,
) -> Result<Copied, CliError> {
    let (read, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let copy = |block: Range<u64>| {
        let (read, written) = (&read, &written);
        async move {
            let len = block.end - block.start;
            written.fetch_add(copy_block(source, device, block).await?, Ordering::Relaxed);
            read.fetch_add(len, Ordering::Relaxed);
            progress.advance(len);
            Ok(())
        }
    };
    blocks(Arc::clone(source), progress.clone()).try_for_each_concurrent(BLOCKS_IN_FLIGHT, copy).await?;
    device.flush().await.map_err(io_failed)?;
    Ok(Copied { read_bytes: read.into_inner(), written_bytes: written.into_inner() })
}

/// Copies one block and returns the bytes written.
async fn copy_block<D: BlockDevice>(
    source: &Arc<ImageSource>, device: &D, block: Range<u64>,
) -> Result<u64, CliError> {
    let from = Arc::clone(source);
    let len = usize::try_from(block.end - block.start).unwrap_or(usize::MAX);
    let data = Bytes::from(blocking(move || from.read(block.start, len)).await?);
    let runs: Vec<Range<usize>> = nonzero_runs(&data, CELL_BYTES).collect();
    let mut written = 0;
    for run in runs {
        written += run.len() as u64;
        let at = block.start + run.start as u64;
        device.write(at, data.slice(run)).await.map_err(io_failed)?;
    }
    Ok(written)
}

/// Where the plan stands.
struct Plan {
    source: Arc<ImageSource>,
    progress: Progress,
    /// Everything before this byte is planned or a hole.
    position: u64,
    ready: VecDeque<Range<u64>>,
}

/// The blocks of the image that may hold data, in order. Holes count as progress when they are passed.
fn blocks(source: Arc<ImageSource>, progress: Progress) -> impl Stream<Item = Result<Range<u64>, CliError>> {
    let plan = Plan { source, progress, position: 0, ready: VecDeque::new() };
    stream::try_unfold(plan, |mut plan| async move {
        if plan.ready.is_empty() {
            let (source, from) = (Arc::clone(&plan.source), plan.position);
            let found = blocking(move || source.next_data(from, PLAN_BYTES)).await?;
            let Some(found) = found else {
                plan.progress.advance(plan.source.size_bytes().saturating_sub(plan.position));
                return Ok(None);
            };
            let pages = page_aligned(&found, plan.position);
            plan.progress.advance(pages.start - plan.position);
            plan.position = pages.end;
            plan.ready = cut(pages).collect();
        }
        Ok(plan.ready.pop_front().map(|block| (block, plan)))
    })
}

/// Widens a range to whole pages, but not before `floor`, which is a page bound that is planned already.
fn page_aligned(range: &Range<u64>, floor: u64) -> Range<u64> {
    let page = u64::from(PAGE_BYTES);
    (range.start / page * page).max(floor)..range.end.div_ceil(page) * page
}

/// Cuts a range at multiples of the block size.
fn cut(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = ((start / BLOCK_BYTES + 1) * BLOCK_BYTES).min(range.end);
        (start < range.end).then_some(start..at)
    })
}

/// Runs blocking file work off the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(CliError::caused(ErrorKind::Failure, "read the image", e)),
    }
}

#[cfg(test)]
mod tests;
