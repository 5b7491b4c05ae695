//! One request against the device.
//!
//! Called by `connection.rs`, which owns the futures. Invariants: a failed IO becomes the error of one request and
//! nothing else; an answer of a wrong length is an error, never shown to the client; a write holds its place in the
//! export's order from before its first step to its end. Every write is durable when the device completes it, so the
//! flag FUA asks for nothing more.

use crate::context::{self, ContextExtents, StatusExtent};
use crate::reply::Outcome;
use crate::request::{Command, Refusal};
use crate::wire::Errno;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_client::{BlockDevice, IoError, IoErrorKind, Moment, WriteOrder, WritePlace};
use ogee_common::limits::{
    NBD_CACHE_BYTES_MAX, NBD_EXTENTS_MAX, NBD_STATUS_QUESTIONS_MAX, NBD_ZERO_WRITES_PARALLEL, REQUEST_BYTES_MAX,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An export as one thread of the server has it.
#[derive(Debug)]
pub(crate) struct OpenExport<D> {
    /// A handle of the thread's own.
    pub(crate) device: D,
    /// Shared by all threads.
    pub(crate) order: Arc<WriteOrder>,
    /// The snapshot of each of its contexts for changes, in their order.
    pub(crate) changed_since: Vec<Moment>,
}

/// A request that has its place and can be carried out at any time.
#[derive(Debug)]
pub(crate) struct Work {
    command: Command,
    payload: Bytes,
    place: Option<WritePlace>,
}

impl Work {
    /// Takes the place of a write in the order of its export.
    pub(crate) fn new(command: Command, payload: Bytes, order: &Arc<WriteOrder>) -> Self {
        let range = match &command {
            Command::Write { offset } => Some(*offset..offset + payload.len() as u64),
            Command::Trim { offset, len } | Command::WriteZeroes { offset, len, .. } => Some(*offset..offset + len),
            _ => None,
        };
        Self { command, payload, place: range.map(|range| order.enter(range)) }
    }

    /// Whether it changes what the device holds.
    pub(crate) const fn is_change(&self) -> bool {
        self.place.is_some()
    }

    /// Bytes that it keeps in memory until it is answered.
    pub(crate) fn bytes(&self) -> usize {
        match self.command {
            Command::Read { len, .. } => len as usize,
            Command::Cache { .. } => REQUEST_BYTES_MAX as usize,
            Command::WriteZeroes { allocate: true, .. } => REQUEST_BYTES_MAX as usize,
            _ => self.payload.len(),
        }
    }
}

/// Carries out a request. `gone`: nobody waits for the answer, so work that comes in many steps may end early.
pub(crate) async fn execute<D: BlockDevice>(export: &OpenExport<D>, work: Work, gone: &AtomicBool) -> Outcome {
    if let Some(place) = &work.place {
        place.turn().await;
    }
    match call(export, work.command, work.payload, gone).await {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::debug!(target: "datapath", %error, "request failed");
            Outcome::Failed(refusal(error.kind))
        }
    }
    // Here `work.place` is left.
}

async fn call<D: BlockDevice>(
    export: &OpenExport<D>,
    command: Command,
    payload: Bytes,
    gone: &AtomicBool,
) -> Result<Outcome, IoError> {
    let device = &export.device;
    match command {
        Command::Read { offset, len, one_chunk } => {
            let data = device.read(offset, len).await?;
            if data.len() != len as usize {
                tracing::error!(target: "datapath", offset, len, got = data.len(), "read of a wrong length");
                return Ok(Outcome::Failed(Refusal { errno: Errno::Io, reason: "the device answered wrongly" }));
            }
            return Ok(Outcome::Read { data, one_chunk });
        }
        Command::Write { offset } => device.write(offset, payload).await?,
        Command::Flush => device.flush().await?,
        Command::Trim { offset, len } => device.discard(offset, len).await?,
        Command::WriteZeroes { offset, len, allocate: false } => device.write_zeroes(offset, len).await?,
        Command::WriteZeroes { offset, len, allocate: true } => {
            return write_real_zeros(device, offset, len, gone).await;
        }
        Command::Cache { offset, len } => read_ahead(device, offset, len, gone).await?,
        Command::BlockStatus { offset, len, one, contexts } => {
            let mut told = Vec::new();
            for context in contexts.iter() {
                let extents_max = if one { 1 } else { NBD_EXTENTS_MAX };
                let extents = block_status(export, context, (offset, len), extents_max).await?;
                told.push(ContextExtents { id: context::id(context), extents });
            }
            return Ok(Outcome::Extents(told));
        }
        Command::Disconnect => {}
    }
    Ok(Outcome::Done)
}

/// The extents of a range in a context. The device may say less than asked for; it is asked on while all is of one kind.
async fn block_status<D: BlockDevice>(
    export: &OpenExport<D>,
    context: usize,
    (offset, len): (u64, u64),
    extents_max: usize,
) -> Result<Vec<StatusExtent>, IoError> {
    let since = context.checked_sub(1).and_then(|i| export.changed_since.get(i)).copied();
    let (mut told, mut known) = (Vec::new(), 0);
    for _ in 0..NBD_STATUS_QUESTIONS_MAX {
        let extents = export.device.extents(offset + known, len - known, since).await?;
        known += extents.iter().map(|extent| extent.len).sum::<u64>();
        context::tell(context, &mut told, &extents);
        if known >= len || told.len() != 1 {
            break;
        }
    }
    told.truncate(extents_max);
    Ok(told)
}

/// Zeros that take space, as NO_HOLE wants them.
async fn write_real_zeros<D: BlockDevice>(
    device: &D,
    offset: u64,
    len: u64,
    gone: &AtomicBool,
) -> Result<Outcome, IoError> {
    let zeros = BytesMut::zeroed(REQUEST_BYTES_MAX as usize).freeze();
    let (mut at, end) = (offset, offset + len);
    let mut writes = FuturesUnordered::new();
    let mut result = Ok(());
    while at < end && result.is_ok() && !gone.load(Ordering::Relaxed) {
        let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeros.len());
        writes.push(device.write(at, zeros.slice(..part)));
        at += part as u64;
        if writes.len() >= NBD_ZERO_WRITES_PARALLEL {
            result = writes.next().await.unwrap_or(Ok(()));
        }
    }
    // Nothing may be under way when the range is left to others.
    while let Some(write) = writes.next().await {
        result = result.and(write);
    }
    result?;
    if at < end {
        return Ok(Outcome::Failed(Refusal { errno: Errno::Shutdown, reason: "the connection ended" }));
    }
    Ok(Outcome::Done)
}

/// Reads and forgets, so that the chunkservers have it in memory.
async fn read_ahead<D: BlockDevice>(device: &D, offset: u64, len: u64, gone: &AtomicBool) -> Result<(), IoError> {
    let (mut at, end) = (offset, offset + len.min(NBD_CACHE_BYTES_MAX));
    while at < end && !gone.load(Ordering::Relaxed) {
        let part = u32::try_from(end - at).unwrap_or(u32::MAX).min(REQUEST_BYTES_MAX);
        drop(device.read(at, part).await?);
        at += u64::from(part);
    }
    Ok(())
}

/// What a client is told of a failed IO.
fn refusal(kind: IoErrorKind) -> Refusal {
    let (errno, reason) = match kind {
        IoErrorKind::InvalidInput => (Errno::Inval, "the request does not fit the volume"),
        IoErrorKind::ReadOnly => (Errno::Perm, "the volume is read-only"),
        IoErrorKind::Fenced => (Errno::Shutdown, "another client took the volume"),
        IoErrorKind::NoSpace => (Errno::NoSpc, "the cluster has no space for new data"),
        IoErrorKind::TimedOut => (Errno::Io, "too few replicas answer"),
        IoErrorKind::Corrupt => (Errno::Io, "data failed its checksum on every replica"),
        IoErrorKind::Closed => (Errno::Shutdown, "the volume was detached"),
    };
    Refusal { errno, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_client::MemoryDevice;

    #[test]
    fn every_kind_of_failure_has_an_errno() {
        for (kind, errno) in [
            (IoErrorKind::InvalidInput, 22),
            (IoErrorKind::ReadOnly, 1),
            (IoErrorKind::Fenced, 108),
            (IoErrorKind::NoSpace, 28),
            (IoErrorKind::TimedOut, 5),
            (IoErrorKind::Corrupt, 5),
            (IoErrorKind::Closed, 108),
        ] {
            assert_eq!(refusal(kind).errno.number(), errno, "{kind:?}");
        }
    }

    #[tokio::test]
    async fn zeros_without_a_hole_are_written_and_end_early_when_nobody_waits() {
        let device = MemoryDevice::with_data(vec![7; 20 << 20], false);
        let order = Arc::new(WriteOrder::default());
        let export = OpenExport { device: device.clone(), order: order.clone(), changed_since: vec![] };
        let zeroes = |offset, len| Command::WriteZeroes { offset, len, allocate: true };
        let work = Work::new(zeroes(512, (18 << 20) - 512), Bytes::new(), &order);
        assert_eq!(execute(&export, work, &AtomicBool::new(false)).await, Outcome::Done);
        let data = device.read(0, 20 << 20).await.unwrap().to_vec();
        assert!(data[..512].iter().all(|b| *b == 7) && data[18 << 20..].iter().all(|b| *b == 7));
        assert!(data[512..18 << 20].iter().all(|b| *b == 0));
        assert_eq!(device.counters().writes.load(Ordering::Relaxed), 18);
        let work = Work::new(zeroes(0, 20 << 20), Bytes::new(), &order);
        let outcome = execute(&export, work, &AtomicBool::new(true)).await;
        assert!(matches!(outcome, Outcome::Failed(r) if r.errno == Errno::Shutdown), "{outcome:?}");
    }
}
