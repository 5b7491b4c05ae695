//! The loop of one virtqueue: takes chains, runs them against the device, answers them. One thread per queue.
//!
//! Called by the queue's thread when its ring starts; returns when the ring stops. While the ring runs the thread polls the
//! kick, the requests in flight and the device's sockets in one tokio runtime, so a request stays on the thread that
//! received it and the device's connections are looked after even when the guest is idle.
//!
//! Invariants:
//! - The kick eventfd is never read, only its edges are watched. The ring is looked at before the first wait, so a kick that
//!   a dead back end swallowed is not missed; and the driver is interrupted once at the start, for an answer whose
//!   interrupt a dead back end did not send.
//! - What a turn writes into guest memory is marked in the dirty log of that turn, if there is one (`queue_phase.rs`).
//! - A chain is noted in the in-flight record, if there is one, before it is parsed, and the note goes when it is answered.
//! - What a dead back end left is begun, in its order, before anything new is taken; a request that overlaps one of those
//!   begun before waits for it.
//! - The lock of the ring is held for taking and for answering a batch, never across an await or a copy of payload.
//! - A chain that was taken is answered exactly once, unless the phase says that guest memory belongs to somebody else.
//! - From a turn that begins in phase `Holding` to the next one guest memory is not written, and no request is begun.
//! - In flight are at most as many chains as the ring has entries, and [`VHOST_QUEUE_BYTES_MAX`] bytes of payload plus
//!   one request.

use crate::execute::{Finished, execute};
use crate::inflight::QueueRecord;
use crate::queue_phase::{Phase, QueuePhase, TurnLog};
use crate::request::{Parsed, Refusal, Request, Status, parse};
use crate::resubmit::Overlaps;
use crate::stats::{RequestKind, VhostBlkStats};
use futures_util::stream::{FuturesUnordered, StreamExt};
use ogee_client::BlockDevice;
use ogee_common::limits::VHOST_QUEUE_BYTES_MAX;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::futures::Notified;
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::event::EventConsumer;

/// The ring of this crate.
pub(crate) type Vring = VringMutex<GuestMemoryAtomic<GuestMemoryMmap>>;
pub(crate) type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;
/// A chain from the ring and the memory it lies in.
pub(crate) type Taken = (Chain, Arc<GuestMemoryMmap>);

/// Why the ring gives no further chains.
#[derive(Debug, thiserror::Error)]
enum RingError {
    /// The driver's index runs ahead by more than the ring has entries, or the ring is not in guest memory.
    #[error("read available ring")]
    Queue(#[source] virtio_queue::Error),
    /// An entry that is announced cannot be read.
    #[error("read available ring: entry {next_avail} is not readable")]
    Entry { next_avail: u16 },
}

/// Whether the ring may have further chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RingState {
    /// All there is was taken, and the driver will kick for more.
    Open,
    /// No room; take again after a completion.
    Full,
    /// Not started, not enabled or broken.
    Shut,
}

/// What becomes of a chain that was taken.
enum Begun {
    /// To be run, with the head of its chain.
    Run(u16, Request),
    /// Answered without the device.
    Answer(Finished),
}

/// What the loop works with.
pub(crate) struct QueueLoop<'a, D> {
    pub(crate) index: usize,
    pub(crate) device: &'a D,
    pub(crate) stats: &'a VhostBlkStats,
    pub(crate) phase: &'a QueuePhase,
    pub(crate) vring: &'a Vring,
    pub(crate) memory: &'a GuestMemoryAtomic<GuestMemoryMmap>,
    /// Whether the driver negotiated virtio 1.0; requests of a legacy driver fail.
    pub(crate) modern: bool,
    /// Set once a broken ring was reported, so that each kick does not write a line.
    pub(crate) reported: &'a AtomicBool,
    /// Where requests in flight are noted; `None`: the front end keeps no memory for it.
    pub(crate) record: RefCell<Option<&'a mut QueueRecord>>,
    /// The dirty log of this turn.
    pub(crate) turn: RefCell<TurnLog>,
}

/// The kick of a ring that is started and enabled.
pub(crate) fn started_kick(vring: &Vring) -> std::io::Result<Option<EventConsumer>> {
    let ring = vring.get_ref();
    match ring.get_kick() {
        Some(kick) if ring.get_queue().ready() && ring.is_enabled() => kick.try_clone().map(Some),
        _ => Ok(None),
    }
}

/// Watches the edges of a kick.
#[expect(deprecated, reason = "the successor wants `AsFd`, which `EventConsumer` lacks; it owns its descriptor, so the call is sound")]
fn watch(kick: EventConsumer) -> std::io::Result<AsyncFd<EventConsumer>> {
    AsyncFd::with_interest(kick, Interest::READABLE)
}

impl<D: BlockDevice> QueueLoop<'_, D> {
    /// Runs until the ring stops and nothing is in flight; `again` are the chains to be run before new ones.
    ///
    /// # Errors
    /// The kick cannot be watched; nothing was taken then.
    pub(crate) async fn run(&self, kick: EventConsumer, mut again: VecDeque<Taken>) -> std::io::Result<()> {
        let kick = watch(kick)?;
        self.interrupt();
        let mut changed = std::pin::pin!(self.phase.changed());
        let mut in_flight = FuturesUnordered::new();
        let mut waiting = VecDeque::new();
        let mut finished = Vec::new();
        let mut payload_bytes = 0;
        let mut ring = RingState::Open;
        let mut overlaps = Overlaps::default();
        loop {
            let phase = self.phase.begin_turn(&mut self.turn.borrow_mut());
            let looked = again.is_empty();
            match phase {
                Phase::Abandoning => return Ok(()),
                Phase::Holding => {
                    poll_fn(|cx| Self::poll_held(cx, changed.as_mut(), &mut in_flight, &mut finished)).await;
                    if changed.as_mut().enable() {
                        changed.set(self.phase.changed());
                    }
                    continue;
                }
                Phase::Discarding => {
                    again.clear();
                    waiting.clear();
                }
                Phase::Running if ring != RingState::Shut && looked => {
                    ring = self.take(&mut waiting, in_flight.len());
                }
                Phase::Idle | Phase::Running | Phase::Draining => {}
            }
            if in_flight.is_empty() {
                overlaps.clear();
            }
            while payload_bytes < VHOST_QUEUE_BYTES_MAX {
                let next = match again.front() {
                    Some((chain, _)) if overlaps.must_wait(chain) => None,
                    Some(_) => again.pop_front(),
                    None => waiting.pop_front(),
                };
                let Some((chain, memory)) = next else { break };
                match self.begin(chain, &memory) {
                    Begun::Run(head, request) => {
                        payload_bytes += request.operation.payload_bytes();
                        in_flight.push(execute(self.device, self.stats, head, request, memory));
                    }
                    Begun::Answer(refused) => finished.push(refused),
                }
            }
            let stopped = phase != Phase::Running || ring == RingState::Shut;
            // With the last of the old ones begun, the ring is looked at before the wait.
            if finished.is_empty() && (looked || !again.is_empty()) {
                if stopped && in_flight.is_empty() && waiting.is_empty() && again.is_empty() {
                    return Ok(());
                }
                poll_fn(|cx| Self::poll_turn(cx, &kick, changed.as_mut(), &mut in_flight, &mut finished)).await;
                if changed.as_mut().enable() {
                    changed.set(self.phase.changed());
                }
            }
            payload_bytes -= finished.iter().map(|done: &Finished| done.payload_bytes).sum::<usize>();
            self.answer(&mut finished);
        }
    }

    /// One wait: everything that is finished, or a kick, or a change of phase.
    fn poll_turn<F>(
        cx: &mut Context<'_>,
        kick: &AsyncFd<EventConsumer>,
        changed: Pin<&mut Notified<'_>>,
        in_flight: &mut FuturesUnordered<F>,
        finished: &mut Vec<Finished>,
    ) -> Poll<()>
    where
        F: Future<Output = Finished>,
    {
        let mut woken = changed.poll(cx).is_ready();
        while let Poll::Ready(Some(done)) = in_flight.poll_next_unpin(cx) {
            finished.push(done);
        }
        woken |= !finished.is_empty();
        // The edge is cleared before the ring is looked at; a kick after that makes a new edge.
        if let Poll::Ready(Ok(mut guard)) = kick.poll_read_ready(cx) {
            guard.clear_ready();
            woken = true;
        }
        if woken { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Waits for a change of phase, while the device goes on with what is in flight.
    fn poll_held<F>(
        cx: &mut Context<'_>,
        changed: Pin<&mut Notified<'_>>,
        in_flight: &mut FuturesUnordered<F>,
        finished: &mut Vec<Finished>,
    ) -> Poll<()>
    where
        F: Future<Output = Finished>,
    {
        while let Poll::Ready(Some(done)) = in_flight.poll_next_unpin(cx) {
            finished.push(done);
        }
        changed.poll(cx)
    }

    /// Takes chains from the ring as long as there is room.
    fn take(&self, waiting: &mut VecDeque<Taken>, in_flight: usize) -> RingState {
        let taken = self.try_take(waiting, in_flight);
        // The ring is asked for interrupts and kicks in its used ring.
        self.mark_used();
        match taken {
            Ok(state) => state,
            Err(error) => {
                if !self.reported.swap(true, Ordering::Relaxed) {
                    tracing::warn!(target: "datapath", queue = self.index, %error, source = ?std::error::Error::source(&error),
                        "broken virtqueue, not served until the driver resets it");
                }
                RingState::Shut
            }
        }
    }

    fn try_take(
        &self,
        waiting: &mut VecDeque<Taken>,
        in_flight: usize,
    ) -> Result<RingState, RingError> {
        let mut ring = self.vring.get_mut();
        if !ring.is_enabled() || !ring.get_queue().ready() {
            return Ok(RingState::Shut);
        }
        let memory = self.memory.memory().into_inner();
        let room = usize::from(ring.get_queue().size());
        let mut promised = false;
        loop {
            ring.disable_notification().map_err(RingError::Queue)?;
            let before = waiting.len();
            let queue = ring.get_queue_mut();
            let chains = queue.iter(Arc::clone(&memory)).map_err(RingError::Queue)?;
            for chain in chains.take(room.saturating_sub(in_flight + before)) {
                if let Some(record) = self.record.borrow_mut().as_mut() {
                    record.taken(chain.head_index());
                }
                waiting.push_back((chain, Arc::clone(&memory)));
            }
            if in_flight + waiting.len() >= room {
                return Ok(RingState::Full);
            }
            if !ring.enable_notification().map_err(RingError::Queue)? {
                return Ok(RingState::Open);
            }
            // The driver may have published its entry after the ring was read, so only an entry that was promised before is missed.
            if promised && waiting.len() == before {
                return Err(RingError::Entry { next_avail: ring.get_queue().next_avail() });
            }
            promised = true;
        }
    }

    /// Parses a chain.
    fn begin(&self, chain: Chain, memory: &Arc<GuestMemoryMmap>) -> Begun {
        let head = chain.head_index();
        let refuse = |reply, status| Begun::Answer(Finished::refused(head, Arc::clone(memory), reply, status));
        match parse(chain) {
            Parsed::Request(request) if self.modern => Begun::Run(head, request),
            Parsed::Request(request) => {
                self.stats.count_error(RequestKind::Malformed);
                refuse(request.reply, Status::IoError)
            }
            Parsed::Refused { reply, refusal } => {
                self.count_refusal(&refusal);
                refuse(reply, refusal.status())
            }
            Parsed::Unanswerable(refusal) => {
                self.count_refusal(&refusal);
                Begun::Answer(Finished::unanswerable(head, Arc::clone(memory)))
            }
        }
    }

    fn count_refusal(&self, refusal: &Refusal) {
        self.stats.count_error(RequestKind::Malformed);
        tracing::debug!(target: "datapath", queue = self.index, %refusal, "chain refused");
    }

    /// Answers a batch: replies first, then the used ring under its lock, then at most one interrupt.
    fn answer(&self, finished: &mut Vec<Finished>) {
        let phase = self.phase.get();
        // Whoever has set `Holding` waits until this turn is over.
        if finished.is_empty() || !matches!(phase, Phase::Running | Phase::Draining | Phase::Holding) {
            finished.clear();
            return;
        }
        let turn = self.turn.borrow();
        let log = turn.log.as_ref();
        let used: Vec<(u16, u32)> = finished.drain(..).map(|done| (done.head, done.write_reply(log))).collect();
        let mut ring = self.vring.get_mut();
        let mut record = self.record.borrow_mut();
        for (head, len) in used {
            if let Some(record) = record.as_mut() {
                record.answering(head);
            }
            if let Err(error) = ring.add_used(head, len) {
                tracing::debug!(target: "datapath", queue = self.index, head, %error, "used ring refused an entry");
            }
            if let Some(record) = record.as_mut() {
                record.answered(head, ring.get_queue().next_used());
            }
        }
        if let Some(log) = log {
            log.mark_used(ring.get_queue().size());
        }
        // An interrupt too many is harmless, one too few hangs the guest.
        if ring.needs_notification().unwrap_or(true)
            && let Err(error) = ring.signal_used_queue()
        {
            tracing::debug!(target: "datapath", queue = self.index, %error, "interrupt not sent");
        }
    }

    /// Marks the used ring in the dirty log, if there is one.
    fn mark_used(&self) {
        if let Some(log) = &self.turn.borrow().log {
            log.mark_used(self.vring.get_ref().get_queue().size());
        }
    }

    /// Interrupts the driver whether it asked for it or not.
    fn interrupt(&self) {
        if let Err(error) = self.vring.get_ref().signal_used_queue() {
            tracing::debug!(target: "datapath", queue = self.index, %error, "interrupt not sent");
        }
    }
}
