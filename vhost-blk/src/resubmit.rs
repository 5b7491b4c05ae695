//! What a dead back end left in flight, as chains to be run again.
//!
//! Called when a ring starts. Invariants: nothing of the guest is written; a chain is built from the descriptor table by
//! its head, since its entry of the available ring may have been used again by the driver; two requests that overlap, one
//! of them a change, never run at the same time, so the later one prevails as it would have without the death. The order
//! against the dead back end's own copies, which may still be on their way, is the business of the device: its attach
//! raises the fence, and they are refused (docs/adr/0011-in-flight-requests.md).

use crate::inflight::QueueRecord;
use crate::queue_loop::{Chain, Taken};
use crate::request::{Operation, Parsed, parse};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion};
use vm_memory::mmap::MmapRegionError;

/// Bytes of the page that holds the private available ring.
const PAGE_BYTES: u64 = 4096;
/// Entries of an available ring start here.
const ENTRIES_AT: u64 = 4;

/// Why requests in flight cannot be submitted again; their ring is not served then, so nothing is lost or repeated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResubmitError {
    /// The ring has more entries than the record.
    #[error("recover requests in flight: ring of {size} entries, in-flight memory for {entries}")]
    Size { size: u16, entries: u16 },
    /// The rings are not in guest memory.
    #[error("recover requests in flight: read rings")]
    Ring(#[source] virtio_queue::Error),
    /// No memory, or no free address behind the guest's.
    #[error("recover requests in flight: map private ring")]
    Map(#[source] MmapRegionError),
    /// The same.
    #[error("recover requests in flight: place private ring")]
    Place(#[source] Option<GuestRegionCollectionError>),
    /// A private ring that cannot be written.
    #[error("recover requests in flight: write private ring")]
    Write(#[source] GuestMemoryError),
}

/// Puts `queue` where the dead back end stopped and gives the chains that it left, in its order.
///
/// # Errors
/// See [`ResubmitError`]; the queue's position is then undefined.
pub(crate) fn recover(
    queue: &mut Queue,
    record: &mut QueueRecord,
    memory: &Arc<GuestMemoryMmap>,
) -> Result<VecDeque<Taken>, ResubmitError> {
    if queue.size() > record.entries() {
        return Err(ResubmitError::Size { size: queue.size(), entries: record.entries() });
    }
    let used = queue.used_idx(memory.as_ref(), Ordering::Acquire).map_err(ResubmitError::Ring)?.0;
    let mut heads = record.recover(used);
    heads.retain(|head| *head < queue.size());
    let taken = u16::try_from(heads.len()).unwrap_or(u16::MAX);
    queue.set_next_used(used);
    queue.set_next_avail(used.wrapping_add(taken));
    if heads.is_empty() {
        return Ok(VecDeque::new());
    }
    chains(queue, &heads, memory)
}

/// The chains with these heads. virtio-queue makes chains only out of an available ring; so one is put behind a copy of the
/// guest's memory table. A guest that points a descriptor there finds these heads and nothing else.
fn chains(queue: &Queue, heads: &[u16], memory: &Arc<GuestMemoryMmap>) -> Result<VecDeque<Taken>, ResubmitError> {
    let bytes = (ENTRIES_AT + 2 * u64::from(queue.size()) + 2).next_multiple_of(PAGE_BYTES);
    let after = memory.last_addr().0.checked_add(PAGE_BYTES).map(|end| end & !(PAGE_BYTES - 1));
    let base = GuestAddress(after.ok_or(ResubmitError::Place(None))?);
    let len = usize::try_from(bytes).map_err(|_| ResubmitError::Place(None))?;
    let mapping = MmapRegion::new(len).map_err(ResubmitError::Map)?;
    let region = Arc::new(GuestRegionMmap::new(mapping, base).ok_or(ResubmitError::Place(None))?);
    let extended = memory.insert_region(region).map_err(|e| ResubmitError::Place(Some(e)))?;
    let extended = Arc::new(extended);
    for (at, head) in (base.0 + ENTRIES_AT..).step_by(2).zip(heads) {
        extended.write_obj(head.to_le(), GuestAddress(at)).map_err(ResubmitError::Write)?;
    }
    let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
    extended.write_obj(count.to_le(), GuestAddress(base.0 + 2)).map_err(ResubmitError::Write)?;
    let mut private = Queue::new(queue.max_size()).map_err(ResubmitError::Ring)?;
    private.set_size(queue.size());
    private.try_set_desc_table_address(GuestAddress(queue.desc_table())).map_err(ResubmitError::Ring)?;
    private.try_set_avail_ring_address(base).map_err(ResubmitError::Ring)?;
    private.set_ready(true);
    let chains = private.iter(Arc::clone(&extended)).map_err(ResubmitError::Ring)?;
    Ok(chains.map(|chain| (chain, Arc::clone(&extended))).collect())
}

/// A byte range that a request touches.
#[derive(Debug, Clone, Copy)]
struct Touched {
    start: u64,
    end: u64,
    changes: bool,
}

/// The ranges of requests that were submitted again and may still run.
#[derive(Debug, Default)]
pub(crate) struct Overlaps {
    running: Vec<Touched>,
}

impl Overlaps {
    /// None of them runs any more.
    pub(crate) fn clear(&mut self) {
        self.running.clear();
    }

    /// Whether the request must wait for one that was begun before; if not, it counts as begun.
    pub(crate) fn must_wait(&mut self, chain: &Chain) -> bool {
        let touched = touched(chain);
        let collides = |new: &Touched| {
            let with = |old: &Touched| (old.changes || new.changes) && old.start < new.end && new.start < old.end;
            self.running.iter().any(with)
        };
        if touched.iter().any(collides) {
            return true;
        }
        self.running.extend(touched);
        false
    }
}

/// What a chain's request touches. It is parsed once more than needed; this happens only after a death.
fn touched(chain: &Chain) -> Vec<Touched> {
    let Parsed::Request(request) = parse(chain.clone()) else { return Vec::new() };
    let range = |start: u64, len: u64, changes| Touched { start, end: start.saturating_add(len), changes };
    match request.operation {
        Operation::Read { offset, len } => vec![range(offset, u64::from(len), false)],
        Operation::Write { offset, data } => vec![range(offset, data.len() as u64, true)],
        Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => {
            ranges.iter().map(|r| range(r.offset, r.len, true)).collect()
        }
        Operation::Flush | Operation::GetId => Vec::new(),
    }
}
