//! The back end of one front end: the device, its queues and their threads.
//!
//! Made by the server for each connection and dropped with it, so nothing of one front end (features, write cache mode,
//! a broken ring) is left for the next. The protocol handler sets rings up; this module starts, stops and ends them.
//! Invariants: one thread per queue; a ring is stopped only after the requests taken from it were completed; a thread ends
//! only through [`Backend::end_threads`].
//!
//! | at the stop of a ring | requests in flight |
//! | --- | --- |
//! | GET_VRING_BASE | completed, then the reply is sent; it waits as long as the device does |
//! | daemon stopped | completed, then the connection is closed; after `drain_timeout` they are dropped unanswered |
//! | another daemon takes over | completed if they are so at once, else left to it (`handover.rs`) |
//! | front end closed the connection | waited for before the next front end is served, but not answered |
//! | daemon killed | unknown to the device |
//!
//! What is left unanswered is noted in the shared in-flight memory (`inflight.rs`), if the front end keeps one, and
//! submitted again by the back end of the next connection. Without it the front end starts again from the used index, so
//! a request answered before an older one may run twice and the older one be left out.

use crate::config_space::{ConfigSpace, VERSION_1};
use crate::dirty_log::QueueLog;
use crate::inflight::QueueRecord;
use crate::queue_loop::{QueueLoop, Taken, Vring, started_kick};
use crate::queue_phase::QueuePhase;
use crate::queue_thread::{Call, Summons};
use crate::resubmit::{ResubmitError, recover};
use crate::stats::VhostBlkStats;
use ogee_client::{Arrival, BlockDevice};
use ogee_common::limits::{
    VHOST_QUEUE_SIZE_MAX, VHOST_UPGRADE_DRAIN, VHOST_UPGRADE_DRAIN_UNRECORDED, VHOST_UPGRADE_STEP, VHOST_UPGRADE_WARM_UP,
};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

/// What a queue's thread drives IO with, used by it alone.
struct Worker<D> {
    runtime: Runtime,
    device: D,
}

impl<D: BlockDevice> Worker<D> {
    /// Opens connections ahead of the first request.
    fn warm_up(&self, ready: &SyncSender<()>) {
        let warm = async { tokio::time::timeout(VHOST_UPGRADE_WARM_UP, self.device.warm_up()).await };
        if self.runtime.block_on(warm).is_err() {
            tracing::warn!(target: "controlpath", "not all connections are open at the take-over");
        }
        // Nobody waits any more: then nobody wants to know.
        let _ = ready.send(());
    }
}

/// One virtqueue and its thread.
pub(crate) struct Queue {
    pub(crate) vring: Vring,
    phase: QueuePhase,
    summons: Summons,
    reported: AtomicBool,
    /// Where requests in flight are noted; taken out by the thread while the loop runs.
    record: Mutex<Option<QueueRecord>>,
    /// Whether the ring that was started last has such a record.
    recorded: AtomicBool,
    /// Set when the ring starts, until the thread has looked what a dead back end left.
    unrecovered: AtomicBool,
}

/// The device as one front end sees it.
pub(crate) struct Backend<D> {
    pub(crate) device: D,
    pub(crate) config: ConfigSpace,
    pub(crate) queues: Vec<Queue>,
    pub(crate) memory: GuestMemoryAtomic<GuestMemoryMmap>,
    pub(crate) features: AtomicU64,
    /// Whether the front end has asked for what only a new hypervisor asks for; see [`Backend::arrival`].
    pub(crate) is_new: AtomicBool,
    arrival: OnceLock<Arrival>,
    stats: Arc<VhostBlkStats>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What a back end knows of the hypervisor, as far as the next one must know it; see [`Backend::arrival`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KnownArrival {
    /// No ring has run, and nothing was asked.
    Unknown,
    /// No ring has run, and it is a new one.
    New,
    /// A ring has run.
    Used,
}

/// Requests in flight were dropped, so the ring's position says nothing; the connection ends without an answer.
#[derive(Debug, thiserror::Error)]
#[error("stop virtqueue {index}: requests in flight were given up")]
pub(crate) struct GaveUp {
    index: usize,
}

/// Why rings could not be stopped for a hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotStill {
    /// Requests in flight did not end, and are noted nowhere.
    InFlight,
    /// A loop did not come to the end of its turn.
    Turning,
}

impl<D: BlockDevice> Backend<D> {
    /// A back end with `num_queues` idle queues and their threads.
    ///
    /// # Errors
    /// No file descriptors, runtime or thread for a queue.
    pub(crate) fn start(device: D, num_queues: u16, queue_size: u16, stats: Arc<VhostBlkStats>) -> io::Result<Arc<Self>> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let queue = |_| {
            let vring = Vring::new(memory.clone(), VHOST_QUEUE_SIZE_MAX).map_err(io::Error::other)?;
            Ok(Queue {
                vring,
                phase: QueuePhase::new(),
                summons: Summons::default(),
                reported: AtomicBool::new(false),
                record: Mutex::new(None),
                recorded: AtomicBool::new(false),
                unrecovered: AtomicBool::new(false),
            })
        };
        let queues = (0..num_queues).map(queue).collect::<io::Result<_>>()?;
        let backend = Arc::new(Self {
            config: ConfigSpace::new(num_queues, queue_size),
            queues,
            memory,
            features: AtomicU64::new(0),
            is_new: AtomicBool::new(false),
            arrival: OnceLock::new(),
            device,
            stats,
            threads: Mutex::new(Vec::new()),
        });
        for index in 0..usize::from(num_queues) {
            if let Err(error) = backend.start_thread(index) {
                backend.end_threads();
                return Err(error);
            }
        }
        Ok(backend)
    }

    fn start_thread(self: &Arc<Self>, index: usize) -> io::Result<()> {
        let worker = Worker {
            runtime: Builder::new_current_thread().enable_all().build()?,
            device: self.device.for_thread(),
        };
        let backend = Arc::clone(self);
        // What the thread logs is told of the server's volume, where a process has many.
        let span = tracing::Span::current();
        let thread = std::thread::Builder::new().name(format!("vhost-queue-{index}")).spawn(move || {
            let _span = span.enter();
            let queue = &backend.queues[index];
            while let Some(call) = queue.summons.wait() {
                match call {
                    Call::Run => backend.run_queue(index, &worker),
                    Call::WarmUp(ready) => worker.warm_up(&ready),
                }
            }
        });
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread?);
        Ok(())
    }

    /// Ends the threads and waits for them; only after every queue is closed and idle.
    pub(crate) fn end_threads(&self) {
        self.queues.iter().for_each(|queue| queue.summons.end());
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!(target: "controlpath", "a virtqueue's thread panicked");
            }
        }
    }

    /// Closes every queue: nothing more is taken, what was taken is completed.
    pub(crate) fn close_and_drain(&self) {
        self.queues.iter().for_each(|queue| queue.phase.close_and_drain());
    }

    /// Closes every queue of a front end that is gone.
    pub(crate) fn close_and_discard(&self) {
        self.queues.iter().for_each(|queue| queue.phase.close_and_discard());
    }

    /// Closes every queue and drops what is in flight.
    pub(crate) fn close_and_give_up(&self) {
        self.queues.iter().for_each(|queue| queue.phase.close_and_give_up());
    }

    /// Waits until no queue runs; false if one still did when its `timeout` was over.
    pub(crate) fn wait_idle(&self, timeout: Duration) -> bool {
        let deadline = ogee_common::clock::now() + timeout;
        self.queues.iter().all(|queue| {
            queue.phase.wait_idle(deadline.saturating_duration_since(ogee_common::clock::now()))
        })
    }

    /// Lets the threads of the first `count` queues open their connections, and waits for them.
    pub(crate) fn warm_up(&self, count: usize) {
        let (sender, ready) = sync_channel(self.queues.len());
        self.queues.iter().take(count).for_each(|queue| queue.summons.warm_up(sender.clone()));
        drop(sender);
        // Ends when every thread has reported, each within its time.
        while ready.recv().is_ok() {}
    }

    /// Stops all rings for a hand-over: when this has succeeded guest memory is not written any more, until [`Backend::thaw`]. Requests that are not
    /// answered then are in the in-flight record of their ring, and go on at the device.
    ///
    /// # Errors
    /// [`NotStill`]; the rings have to be thawed in this case too.
    pub(crate) fn freeze(&self) -> Result<(), NotStill> {
        self.queues.iter().for_each(|queue| queue.phase.pause());
        if self.wait_idle(VHOST_UPGRADE_DRAIN) {
            return Ok(());
        }
        let deadline = ogee_common::clock::now() + VHOST_UPGRADE_DRAIN_UNRECORDED;
        for queue in self.queues.iter().filter(|queue| !queue.recorded.load(Ordering::Acquire)) {
            if !queue.phase.wait_idle(deadline.saturating_duration_since(ogee_common::clock::now())) {
                return Err(NotStill::InFlight);
            }
        }
        let still = |queue: &Queue| queue.phase.hold(VHOST_UPGRADE_STEP);
        if self.queues.iter().all(still) { Ok(()) } else { Err(NotStill::Turning) }
    }

    /// The hand-over did not come about: the rings go on.
    pub(crate) fn thaw(&self) {
        for queue in &self.queues {
            queue.phase.thaw();
            queue.summons.call();
        }
    }

    /// The ring is set up: marks it as started, with its requests noted in `record` from now on, and wakes its thread.
    pub(crate) fn start_ring(&self, queue: &Queue, record: Option<QueueRecord>) {
        queue.recorded.store(record.is_some(), Ordering::Release);
        *queue.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
        queue.unrecovered.store(true, Ordering::Release);
        queue.vring.set_queue_ready(true);
        queue.summons.call();
    }

    /// Enables or disables a ring. A disabled one completes what it took.
    pub(crate) fn enable_ring(&self, queue: &Queue, enabled: bool) {
        queue.vring.set_enabled(enabled);
        queue.summons.call();
    }

    /// What the ring's loop writes into guest memory from now on is marked in `log`, and in no other.
    pub(crate) fn set_log(queue: &Queue, log: Option<QueueLog>) {
        queue.phase.set_log(log);
    }

    /// Stops a ring after the requests taken from it are completed.
    ///
    /// # Errors
    /// [`GaveUp`]: they were dropped meanwhile.
    pub(crate) fn stop_ring(&self, index: usize, queue: &Queue) -> Result<(), GaveUp> {
        queue.vring.set_queue_ready(false);
        queue.phase.drain();
        let drained = queue.phase.wait_drained();
        queue.reported.store(false, Ordering::Relaxed);
        if drained { Ok(()) } else { Err(GaveUp { index }) }
    }

    /// The chains that a dead back end left in flight; nothing after the first look since the ring started.
    fn left_in_flight(
        &self,
        index: usize,
        queue: &Queue,
        record: Option<&mut QueueRecord>,
    ) -> Result<VecDeque<Taken>, ResubmitError> {
        let Some(record) = record.filter(|_| queue.unrecovered.load(Ordering::Acquire)) else {
            return Ok(VecDeque::new());
        };
        let memory = self.memory.memory().into_inner();
        let again = recover(queue.vring.get_mut().get_queue_mut(), record, &memory)?;
        queue.unrecovered.store(false, Ordering::Release);
        if !again.is_empty() {
            self.stats.count_resubmitted(again.len() as u64);
            tracing::info!(target: "controlpath", queue = index, requests = again.len(), "requests in flight submitted again");
        }
        Ok(again)
    }

    /// A hypervisor that has never used the device reads its configuration space (QEMU: when the device is made) and has no in-flight
    /// memory to bring; one that comes back starts its rings with what it has. What it asks later says nothing.
    fn arrival(&self) -> Arrival {
        let found = || if self.is_new.load(Ordering::Acquire) { Arrival::New } else { Arrival::Back };
        *self.arrival.get_or_init(found)
    }

    /// Queues up to the last one whose ring is started.
    pub(crate) fn rings_in_use(&self) -> usize {
        self.queues.iter().rposition(|queue| queue.vring.get_ref().get_queue().ready()).map_or(0, |last| last + 1)
    }

    /// What is known of the front end's arrival, for a daemon that takes over.
    pub(crate) fn known_arrival(&self) -> KnownArrival {
        match (self.arrival.get(), self.is_new.load(Ordering::Acquire)) {
            (Some(_), _) => KnownArrival::Used,
            (None, true) => KnownArrival::New,
            (None, false) => KnownArrival::Unknown,
        }
    }

    /// The front end was another daemon's until now.
    pub(crate) fn adopt_arrival(&self, known: KnownArrival) {
        self.is_new.store(known == KnownArrival::New, Ordering::Release);
        if known == KnownArrival::Used {
            // Nothing has run here, so nothing is set yet.
            let _ = self.arrival.set(Arrival::Back);
        }
    }

    /// Runs the loop of a queue until its ring stops.
    fn run_queue(&self, index: usize, worker: &Worker<D>) {
        let queue = &self.queues[index];
        let Some(_running) = queue.phase.enter() else { return };
        let kick = match started_kick(&queue.vring) {
            Ok(Some(kick)) => kick,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(target: "controlpath", queue = index, %error, "virtqueue not served: kick not duplicated");
                return;
            }
        };
        worker.device.guest_starts(self.arrival());
        let modern = self.features.load(Ordering::Acquire) & VERSION_1 != 0;
        if !modern && !queue.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(target: "controlpath", queue = index,
                "legacy driver without VIRTIO_F_VERSION_1: its requests fail; set disable-legacy=on on the device");
        }
        let mut record = queue.record.lock().unwrap_or_else(PoisonError::into_inner);
        let again = match self.left_in_flight(index, queue, record.as_mut()) {
            Ok(again) => again,
            Err(error) => {
                tracing::error!(target: "controlpath", queue = index, %error, source = ?std::error::Error::source(&error),
                    "virtqueue not served: requests in flight not recovered");
                return;
            }
        };
        let queue_loop = QueueLoop {
            index,
            device: &worker.device,
            stats: &self.stats,
            phase: &queue.phase,
            vring: &queue.vring,
            memory: &self.memory,
            modern,
            reported: &queue.reported,
            record: RefCell::new(record.as_mut()),
            turn: RefCell::default(),
        };
        if let Err(error) = worker.runtime.block_on(queue_loop.run(kick, again)) {
            tracing::error!(target: "controlpath", queue = index, %error, "virtqueue not served: kick not watched");
        }
    }
}
