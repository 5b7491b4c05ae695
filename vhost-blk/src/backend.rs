//! The back end of one front end: what vhost-user-backend asks of a device.
//!
//! Made by the server for each connection and dropped with it, so nothing of one front end (features, write cache mode,
//! a broken ring) is left for the next. Invariants: one queue per worker thread; GET_VRING_BASE is answered only after the
//! requests taken from that ring were completed; a worker thread ends only through [`Backend::end_workers`].
//!
//! | at the stop of a ring | requests in flight |
//! | --- | --- |
//! | GET_VRING_BASE | completed, then the reply is sent; it waits as long as the device does |
//! | daemon stopped | completed, then the connection is closed; after `drain_timeout` they are dropped unanswered |
//! | front end closed the connection | waited for before the next front end is served, but not answered |
//!
//! In the last two cases the front end may send unanswered requests again (QEMU does, from the used index on). Without
//! shared in-flight memory, which is not offered, a request that was answered out of order before an unanswered one may
//! then be run twice, and an unanswered one that lies before an answered one may be left out.
//!
//! The crate has no call that tells a front end about a changed configuration, so a resize is seen when the guest reads
//! the configuration again: GET_CONFIG always carries the size of that moment.

use crate::config_space::{ConfigSpace, VERSION_1, offered_features};
use crate::queue_loop::{QueueLoop, Vring, started_kick};
use crate::queue_phase::QueuePhase;
use crate::stats::VhostBlkStats;
use ogee_client::BlockDevice;
use ogee_common::limits::VHOST_QUEUE_SIZE_MAX;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// What a worker thread drives IO with.
struct Worker<D> {
    runtime: Runtime,
    device: D,
}

/// One virtqueue and its thread.
struct Queue<D> {
    phase: QueuePhase,
    /// Locked by its thread alone, for as long as the ring runs.
    worker: Mutex<Worker<D>>,
    reported: AtomicBool,
    /// Ends the thread. The crate's own exit event leaks a file descriptor per thread and connection.
    exit: (EventConsumer, EventNotifier),
}

/// The device as one front end sees it.
pub(crate) struct Backend<D> {
    device: D,
    config: ConfigSpace,
    queues: Vec<Queue<D>>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    features: AtomicU64,
    stats: Arc<VhostBlkStats>,
}

/// The answer of a worker's event that ends its thread.
#[derive(Debug, thiserror::Error)]
#[error("end of the worker thread")]
struct WorkerEnd;

/// Requests in flight were dropped, so the ring's position says nothing; the connection ends without an answer.
#[derive(Debug, thiserror::Error)]
#[error("stop virtqueue {index}: requests in flight were given up")]
struct GaveUp {
    index: u32,
}

impl<D: BlockDevice> Backend<D> {
    /// A back end with `num_queues` idle queues.
    ///
    /// # Errors
    /// No file descriptors or no runtime for a queue.
    pub(crate) fn new(device: D, num_queues: u16, queue_size: u16, stats: Arc<VhostBlkStats>) -> io::Result<Self> {
        let queue = |_| {
            Ok(Queue {
                phase: QueuePhase::new(),
                worker: Mutex::new(Worker {
                    runtime: Builder::new_current_thread().enable_all().build()?,
                    device: device.for_thread(),
                }),
                reported: AtomicBool::new(false),
                exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?,
            })
        };
        let queues = (0..num_queues).map(queue).collect::<io::Result<_>>()?;
        Ok(Self {
            config: ConfigSpace::new(num_queues, queue_size),
            queues,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            features: AtomicU64::new(0),
            device,
            stats,
        })
    }

    /// The guest memory that the protocol handler fills in.
    pub(crate) fn memory(&self) -> GuestMemoryAtomic<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// Registers the events that end the worker threads.
    ///
    /// # Errors
    /// A failed `epoll_ctl`; the threads cannot be ended then.
    pub(crate) fn register_ends(&self, handlers: &[Arc<VringEpollHandler<Arc<Self>>>]) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        for (queue, handler) in self.queues.iter().zip(handlers) {
            handler.register_listener(queue.exit.0.as_raw_fd(), EventSet::IN, u64::from(self.end_event()))?;
        }
        Ok(())
    }

    /// Ends the worker threads; only after every queue is closed and idle.
    pub(crate) fn end_workers(&self) {
        for queue in &self.queues {
            if let Err(error) = queue.exit.1.notify() {
                tracing::error!(target: "controlpath", %error, "worker thread not ended");
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

    /// The first event number that the crate leaves to back ends.
    fn end_event(&self) -> u16 {
        u16::try_from(self.queues.len() + 1).unwrap_or(u16::MAX)
    }

    /// Runs the loop of a queue until its ring stops.
    fn run_queue(&self, index: usize, vring: &Vring) {
        let Some(queue) = self.queues.get(index) else { return };
        let Some(_running) = queue.phase.enter() else { return };
        let kick = match started_kick(vring) {
            Ok(Some(kick)) => kick,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(target: "controlpath", queue = index, %error, "virtqueue not served: kick not duplicated");
                return;
            }
        };
        let modern = self.features.load(Ordering::Acquire) & VERSION_1 != 0;
        if !modern && !queue.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(target: "controlpath", queue = index,
                "legacy driver without VIRTIO_F_VERSION_1: its requests fail; set disable-legacy=on on the device");
        }
        let worker = queue.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let queue_loop = QueueLoop {
            index,
            device: &worker.device,
            stats: &self.stats,
            phase: &queue.phase,
            vring,
            memory: &self.memory,
            modern,
            reported: &queue.reported,
        };
        if let Err(error) = worker.runtime.block_on(queue_loop.run(kick)) {
            tracing::error!(target: "controlpath", queue = index, %error, "virtqueue not served: kick not watched");
        }
    }
}

impl<D: BlockDevice> VhostUserBackend for Backend<D> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(VHOST_QUEUE_SIZE_MAX)
    }

    fn features(&self) -> u64 {
        offered_features(&self.device.info())
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Each ring keeps it; the crate has told them already.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(&self.device.info(), offset, size)
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        self.config.write(offset, data).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // It is the one this back end was made with; requests in flight keep the mapping they were parsed with.
        Ok(())
    }

    /// One thread per queue. Each element is a bit mask of queues.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let queue = usize::try_from(index).ok().and_then(|index| self.queues.get(index));
        let Some(queue) = queue else { return Ok(()) };
        queue.phase.drain();
        let drained = queue.phase.wait_drained();
        queue.reported.store(false, Ordering::Relaxed);
        if drained { Ok(()) } else { Err(io::Error::other(GaveUp { index })) }
    }

    /// Runs the loop of the thread's queue; it returns when the ring stops.
    fn handle_event(&self, event: u16, _set: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        if event == self.end_event() {
            return Err(io::Error::other(WorkerEnd));
        }
        if let Some(vring) = vrings.get(usize::from(event)) {
            self.run_queue(thread, vring);
        }
        Ok(())
    }
}
