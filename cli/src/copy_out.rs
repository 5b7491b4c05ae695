//! Reads a whole device in order with many reads in flight, and hands the data to a [`Sink`] on a thread of its own.
//!
//! Used by `export` and `checksum`. Blocks that hold nothing are not read. Invariants: the sink sees every byte of the device once, in order; a failed read or
//! a failed sink ends the copy, and the sink's error is the one that is told.

use crate::error::{CliError, ErrorKind};
use crate::output::Progress;
use crate::sdk_error::io_failed;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_client::{BlockDevice, ExtentKind, IoError, ReadData, ReadPiece};
use ogee_common::limits::{CHUNK_BYTES, REQUEST_BYTES_MAX};
use tokio::sync::mpsc;

/// Reads in flight, and blocks that wait for the sink: 16 MiB each.
const BLOCKS_IN_FLIGHT: usize = 16;
/// Chunks of which it is asked ahead what they hold.
const CHUNKS_AHEAD: usize = 4;

/// Takes the bytes of a device in order. Called on a thread that may block.
pub(crate) trait Sink: Send + 'static {
    /// Takes `data`, which lies at byte `offset`.
    ///
    /// # Errors
    /// When it cannot be kept; the copy ends.
    fn put(&mut self, offset: u64, data: &ReadData) -> Result<(), CliError>;
}

/// Copies the whole device into the sink and hands the sink back.
///
/// # Errors
/// A read that failed, or what the sink said.
pub(crate) async fn copy_out<D: BlockDevice, S: Sink>(device: &D, sink: S, progress: &Progress) -> Result<S, CliError> {
    let (sender, receiver) = mpsc::channel(BLOCKS_IN_FLIGHT);
    let writer = tokio::task::spawn_blocking(move || drain(sink, receiver));
    // Ends early when the sink failed: then nobody receives.
    let fed = feed(device, &sender, progress).await;
    drop(sender);
    let drained = match writer.await {
        Ok(drained) => drained,
        Err(e) => Err(CliError::caused(ErrorKind::Failure, "write the copy", e)),
    };
    let sink = drained?;
    fed?;
    Ok(sink)
}

/// A block of the device.
#[derive(Debug, Clone, Copy)]
struct Block {
    offset: u64,
    len: u32,
    has_data: bool,
}

/// The blocks of a chunk, and which of them hold anything.
async fn blocks<D: BlockDevice>(device: &D, start: u64, end: u64) -> Result<Vec<Block>, IoError> {
    let block = |offset: u64| {
        let len = u32::try_from(end - offset).unwrap_or(u32::MAX).min(REQUEST_BYTES_MAX);
        Block { offset, len, has_data: false }
    };
    let mut blocks: Vec<Block> = (start..end).step_by(REQUEST_BYTES_MAX as usize).map(block).collect();
    let mut at = start;
    while at < end {
        let extents = device.extents(at, end - at, None).await?;
        for extent in &extents {
            let holds = |b: &&mut Block| b.offset < at + extent.len && at < b.offset + u64::from(b.len);
            blocks.iter_mut().filter(holds).for_each(|b| b.has_data |= extent.kind == ExtentKind::Data);
            at += extent.len;
        }
        // A device that says nothing knows nothing.
        if extents.is_empty() {
            blocks.iter_mut().for_each(|b| b.has_data = true);
            break;
        }
    }
    Ok(blocks)
}

async fn read<D: BlockDevice>(device: &D, Block { offset, len, has_data }: Block) -> Result<(u64, ReadData), IoError> {
    if has_data {
        return device.read(offset, len).await.map(|data| (offset, data));
    }
    Ok((offset, ReadData { pieces: smallvec::smallvec![ReadPiece::Zeros(len)] }))
}

async fn feed<D: BlockDevice>(
    device: &D, sender: &mpsc::Sender<(u64, ReadData)>, progress: &Progress,
) -> Result<(), CliError> {
    let size = device.info().size_bytes;
    let chunk = u64::from(CHUNK_BYTES);
    let chunks = (0..size.div_ceil(chunk)).map(|i| blocks(device, i * chunk, size.min((i + 1) * chunk)));
    let blocks = stream::iter(chunks).buffered(CHUNKS_AHEAD);
    let each = blocks.map_ok(|blocks| stream::iter(blocks.into_iter().map(Ok::<Block, IoError>))).try_flatten();
    let mut reads = std::pin::pin!(each.map_ok(|block| read(device, block)).try_buffered(BLOCKS_IN_FLIGHT));
    while let Some(read) = reads.next().await {
        let (offset, data) = read.map_err(io_failed)?;
        let len = data.len() as u64;
        if sender.send((offset, data)).await.is_err() {
            return Ok(());
        }
        progress.advance(len);
    }
    Ok(())
}

fn drain<S: Sink>(mut sink: S, mut receiver: mpsc::Receiver<(u64, ReadData)>) -> Result<S, CliError> {
    while let Some((offset, data)) = receiver.blocking_recv() {
        sink.put(offset, &data)?;
    }
    Ok(sink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_client::MemoryDevice;

    struct Collect {
        bytes: Vec<u8>,
        fail_at: Option<u64>,
    }

    impl Sink for Collect {
        fn put(&mut self, offset: u64, data: &ReadData) -> Result<(), CliError> {
            assert_eq!(offset, self.bytes.len() as u64, "in order and without gaps");
            if self.fail_at.is_some_and(|at| offset >= at) {
                return Err(CliError::new(ErrorKind::NoSpace, "the disk is full"));
            }
            self.bytes.extend(data.to_vec());
            Ok(())
        }
    }

    fn device(len: usize) -> (MemoryDevice, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i / 4096 % 251).expect("below 251")).collect();
        (MemoryDevice::with_data(bytes.clone(), true), bytes)
    }

    #[tokio::test]
    async fn every_byte_arrives_once_and_in_order() {
        let (device, bytes) = device((5 << 20) + 12_288);
        let sink = Collect { bytes: vec![], fail_at: None };
        let quiet = Progress::new("test", 0, true);
        let sink = copy_out(&device, sink, &quiet).await.expect("copied");
        assert_eq!(sink.bytes, bytes);
    }

    #[tokio::test]
    async fn a_failing_sink_ends_the_copy_with_its_own_error() {
        let (device, _) = device(64 << 20);
        let sink = Collect { bytes: vec![], fail_at: Some(2 << 20) };
        let error = copy_out(&device, sink, &Progress::new("test", 0, true)).await.map(|_| ()).expect_err("fails");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
}
