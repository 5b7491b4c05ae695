//! A vhost-user-blk device as the target of a load: a front end and driver without a virtual machine.
//!
//! Any back end will do: `ogee vhost-blk`, or another program to compare it with; both see the same driver. One connection,
//! and one queue per job. Invariants: a buffer is a slot of its queue, so the depth of a job is bounded by its buffers; all
//! requests of one turn of the job's loop are made available before the device is kicked, and all answers that are there are
//! reaped at once; a device that is gone or breaks the protocol fails every IO for good, so no load waits for ever.
//!
//! Data is copied between a buffer and guest memory only if somebody filled the buffer or looks at it.

mod ring;

use super::target::{IoBuffer, Source, Target, TargetError};
use crate::error::{CliError, ErrorKind};
use ring::{ENTRIES_MAX, QueueShape, Request, Ring, RingError, SharedMemory};
use std::cell::RefCell;
use std::error::Error;
use std::future::poll_fn;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::EventFd;

const SECTOR: u64 = 512;
/// A slot for each IO and one for a request without data.
const DEPTH_MAX: u16 = ENTRIES_MAX / 2;
/// `struct virtio_blk_discard_write_zeroes` (virtio 1.2, 5.2.6).
const RANGE_BYTES: usize = 16;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Flush (bit 9), several queues (12), discard (13).
const WANTED: u64 = 1 << 9 | 1 << 12 | 1 << 13;
const NEEDED: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | PROTOCOL_FEATURES;
/// `struct virtio_blk_config` up to write-zeroes (virtio 1.2, 5.2.4); some back ends refuse to give more.
const CONFIG_BYTES: u32 = 60;

/// What to connect to and how much to have in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VhostOptions {
    /// The back end's socket.
    pub(crate) socket: PathBuf,
    /// Queues; as many jobs can run.
    pub(crate) num_queues: u16,
    /// Requests in flight per queue, 1 to 512.
    pub(crate) depth: u16,
    /// Bytes of the largest IO.
    pub(crate) io_bytes_max: usize,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
enum VhostError {
    #[error("{verb}")]
    Protocol {
        verb: &'static str,
        #[source]
        source: vhost::Error,
    },
    #[error("the back end lacks feature bits {missing:#x}")]
    Features { missing: u64 },
    #[error("the back end has {offered} queues, {wanted} are wanted")]
    Queues { offered: u64, wanted: u16 },
    #[error("a depth of {depth}: 1 to {DEPTH_MAX} can be had")]
    Depth { depth: u16 },
    #[error("share memory with the back end")]
    Memory(#[source] std::io::Error),
}

fn protocol(verb: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Protocol { verb, source }
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    size_bytes: u64,
    /// Open as long as the device is used; watched by every job for its end.
    connection: UnixStream,
    /// Queues that no job has.
    free: Mutex<Vec<Ring>>,
}

/// A connected device.
#[derive(Debug, Clone)]
pub(crate) struct VhostSource(Arc<Shared>);

impl VhostSource {
    /// Connects and starts the queues.
    ///
    /// # Errors
    /// Nobody serves the socket, or the back end cannot do what is needed.
    pub(crate) fn connect(options: &VhostOptions) -> Result<Self, CliError> {
        let doing = || format!("drive {}", options.socket.display());
        let failed = |e: VhostError| CliError::caused(ErrorKind::Failure, doing(), e);
        if !(1..=DEPTH_MAX).contains(&options.depth) {
            let error = VhostError::Depth { depth: options.depth };
            return Err(CliError::caused(ErrorKind::Usage, doing(), error));
        }
        let unreachable = |e| CliError::caused(ErrorKind::Unavailable, doing(), e);
        let connection = UnixStream::connect(&options.socket).map_err(unreachable)?;
        let stream = connection.try_clone().map_err(unreachable)?;
        let mut front = Frontend::from_stream(stream, u64::from(options.num_queues));
        negotiate(&mut front, options.num_queues).map_err(failed)?;
        let size_bytes = capacity(&mut front).map_err(failed)? * SECTOR;
        let rings = start_queues(&mut front, options).map_err(failed)?;
        let shared = Shared { socket: options.socket.clone(), size_bytes, connection, free: Mutex::new(rings) };
        Ok(Self(Arc::new(shared)))
    }
}

fn negotiate(front: &mut Frontend, num_queues: u16) -> Result<(), VhostError> {
    front.set_owner().map_err(protocol("set owner"))?;
    let offered = front.get_features().map_err(protocol("get features"))?;
    let missing = NEEDED & !offered;
    if missing != 0 {
        return Err(VhostError::Features { missing });
    }
    front.set_features(offered & (NEEDED | WANTED)).map_err(protocol("set features"))?;
    let known = front.get_protocol_features().map_err(protocol("get protocol features"))?;
    let wanted =
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    front.set_protocol_features(known & wanted).map_err(protocol("set protocol features"))?;
    if known.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if known.contains(VhostUserProtocolFeatures::MQ) {
        let offered = front.get_queue_num().map_err(protocol("get number of queues"))?;
        if offered < u64::from(num_queues) {
            return Err(VhostError::Queues { offered, wanted: num_queues });
        }
    }
    Ok(())
}

/// Sectors of the device.
fn capacity(front: &mut Frontend) -> Result<u64, VhostError> {
    let empty = [0; CONFIG_BYTES as usize];
    let config = front.get_config(0, CONFIG_BYTES, VhostUserConfigFlags::empty(), &empty);
    let (_, config) = config.map_err(protocol("get configuration"))?;
    let sectors = config.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    sectors.ok_or(VhostError::Memory(std::io::ErrorKind::UnexpectedEof.into()))
}

fn start_queues(front: &mut Frontend, options: &VhostOptions) -> Result<Vec<Ring>, VhostError> {
    let data_bytes = u64::try_from(options.io_bytes_max.next_multiple_of(4096)).unwrap_or(u64::MAX);
    // As many again for flushes and discards, which have no buffer of their own.
    let shape = QueueShape { slots: options.depth * 2, data_bytes };
    let bytes = shape.bytes().checked_mul(u64::from(options.num_queues));
    let bytes = bytes.ok_or(VhostError::Memory(std::io::ErrorKind::OutOfMemory.into()))?;
    let memory = Arc::new(SharedMemory::new(bytes).map_err(VhostError::Memory)?);
    front.set_mem_table(&[memory.region()]).map_err(protocol("set memory table"))?;
    let mut rings = Vec::new();
    // The last is taken first.
    for index in (0..options.num_queues).rev() {
        let ring = Ring::new(Arc::clone(&memory), shape, index).map_err(VhostError::Memory)?;
        let (config, queue) = (ring.config(), usize::from(index));
        front.set_vring_num(queue, config.queue_size).map_err(protocol("set queue size"))?;
        front.set_vring_addr(queue, &config).map_err(protocol("set queue addresses"))?;
        front.set_vring_base(queue, 0).map_err(protocol("set queue position"))?;
        front.set_vring_call(queue, &ring.call).map_err(protocol("set interrupt"))?;
        front.set_vring_kick(queue, &ring.kick).map_err(protocol("set kick"))?;
        front.set_vring_enable(queue, true).map_err(protocol("enable queue"))?;
        rings.push(ring);
    }
    Ok(rings)
}

impl Source for VhostSource {
    type Target = VhostTarget;

    fn name(&self) -> String {
        self.0.socket.display().to_string()
    }

    fn size_bytes(&self) -> u64 {
        self.0.size_bytes
    }

    async fn open(&self) -> Result<VhostTarget, CliError> {
        let ring = self.0.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(ring) = ring else {
            let text = format!("{}: every queue has a job; use as many queues as jobs", self.0.socket.display());
            return Err(CliError::new(ErrorKind::Usage, text));
        };
        VhostTarget::new(Arc::clone(&self.0), ring)
            .map_err(|e| CliError::caused(ErrorKind::Failure, format!("watch {}", self.0.socket.display()), e))
    }
}

#[expect(deprecated, reason = "the successor wants `AsFd`, which `EventFd` lacks; both own their descriptors, so the call is sound")]
fn watch<T: AsRawFd>(what: T) -> std::io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(what, Interest::READABLE)
}

/// A request as its future sees it.
#[derive(Debug, Default)]
struct Pending {
    status: Option<u8>,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Queue {
    /// `None` only while the target is dropped.
    ring: Option<Ring>,
    pending: Vec<Pending>,
    next_slot: u16,
    /// Slots behind those of the buffers, for requests that have none.
    control: Vec<u16>,
    driver: Option<Waker>,
    /// Set once the device is of no use any more.
    broken: Option<String>,
}

impl Queue {
    fn ring(&mut self) -> &mut Ring {
        self.ring.as_mut().expect("taken only by drop")
    }

    fn fail_all(&mut self, why: &dyn Error) {
        self.broken.get_or_insert_with(|| why.to_string());
        self.pending.iter_mut().filter_map(|p| p.waker.take()).for_each(Waker::wake);
    }

    /// Kicks, and takes every answer that is there; answers that come later make an interrupt.
    fn turn(&mut self) -> Result<(), RingError> {
        self.ring().kick_if_wanted()?;
        loop {
            while let Some((slot, status)) = self.ring().next_used()? {
                let pending = &mut self.pending[usize::from(slot)];
                pending.status = Some(status);
                if let Some(waker) = pending.waker.take() {
                    waker.wake();
                }
            }
            if !self.ring().arm()? {
                return Ok(());
            }
        }
    }
}

/// The end of the back end, seen on its socket.
#[derive(Debug, thiserror::Error)]
#[error("the back end closed the connection")]
struct Gone;

/// The device is of no use any more.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(String);

/// A status other than OK (virtio 1.2, 5.2.6).
#[derive(Debug, thiserror::Error)]
#[error("the device answered with status {status}")]
struct BadStatus {
    status: u8,
}

/// One queue of the device.
#[derive(Debug)]
pub(crate) struct VhostTarget {
    shared: Arc<Shared>,
    queue: RefCell<Queue>,
    call: AsyncFd<EventFd>,
    hangup: AsyncFd<UnixStream>,
}

impl VhostTarget {
    fn new(shared: Arc<Shared>, ring: Ring) -> std::io::Result<Self> {
        let call = watch(ring.call.try_clone()?)?;
        // A descriptor of its own: jobs of one thread share an epoll, which takes each only once.
        let hangup = watch(shared.connection.try_clone()?)?;
        let pending = std::iter::repeat_with(Pending::default).take(usize::from(ring.slots())).collect();
        let control = (ring.slots() / 2..ring.slots()).collect();
        let queue = Queue { ring: Some(ring), pending, next_slot: 0, control, driver: None, broken: None };
        Ok(Self { shared, queue: RefCell::new(queue), call, hangup })
    }

    /// Submits a request and waits for its status.
    async fn request(&self, slot: u16, request: Request, sector: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
        {
            let mut queue = self.queue.borrow_mut();
            if let Some(broken) = &queue.broken {
                return Err(Box::new(Broken(broken.clone())));
            }
            queue.pending[usize::from(slot)] = Pending::default();
            queue.ring().submit(slot, request, sector)?;
            if let Some(driver) = queue.driver.take() {
                driver.wake();
            }
        }
        let status = poll_fn(|cx| {
            let mut queue = self.queue.borrow_mut();
            if let Some(status) = queue.pending[usize::from(slot)].status {
                return Poll::Ready(Ok(status));
            }
            if let Some(broken) = &queue.broken {
                return Poll::Ready(Err(Broken(broken.clone())));
            }
            let waker = &mut queue.pending[usize::from(slot)].waker;
            if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        });
        match status.await? {
            0 => Ok(()),
            status => Err(Box::new(BadStatus { status })),
        }
    }

    /// One turn of the driver; never ready.
    fn poll_turn(&self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut queue = self.queue.borrow_mut();
            queue.driver = Some(cx.waker().clone());
            if queue.broken.is_some() {
                return Poll::Pending;
            }
            if let Err(error) = queue.turn() {
                queue.fail_all(&error);
                return Poll::Pending;
            }
            // The front end asks nothing while a load runs, so anything on its socket is its end.
            if self.hangup.poll_read_ready(cx).is_ready() {
                queue.fail_all(&Gone);
                return Poll::Pending;
            }
            match self.call.poll_read_ready(cx) {
                // Only edges are of interest: the counter is never read, and the rings are looked at after it.
                Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                Poll::Ready(Err(error)) => queue.fail_all(&error),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// A request without a buffer.
    async fn control(&self, request: Request, data: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let (slot, memory, at) = {
            let mut queue = self.queue.borrow_mut();
            let slot = queue.control.pop().ok_or("more requests in flight than the depth")?;
            let (memory, at) = queue.ring().data(slot);
            (slot, memory, at)
        };
        memory.put(at, data)?;
        let done = self.request(slot, request, 0).await;
        self.queue.borrow_mut().control.push(slot);
        done
    }

    fn error(&self, verb: &'static str, offset: u64, len: u64, source: Box<dyn Error + Send + Sync>) -> TargetError {
        let is_final = self.queue.borrow().broken.is_some();
        TargetError { is_final, verb, offset, len, source }
    }
}

impl Drop for VhostTarget {
    fn drop(&mut self) {
        // Given back for the next load; a queue with requests in flight is not.
        let ring = self.queue.get_mut().ring.take();
        if let Some(ring) = ring.filter(Ring::is_idle) {
            self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).push(ring);
        }
    }
}

/// A slot of the queue; its data lies in guest memory, and a copy of it here once somebody asked for it.
#[derive(Debug)]
pub(crate) struct VhostBuffer {
    slot: u16,
    memory: Arc<SharedMemory>,
    at: u64,
    copy: Vec<u8>,
    /// Whether the copy has to go to guest memory before a write.
    filled: bool,
}

impl IoBuffer for VhostBuffer {
    fn fill(&mut self) -> &mut [u8] {
        self.filled = true;
        &mut self.copy
    }

    fn contents(&mut self) -> &[u8] {
        self.memory.get(self.at, &mut self.copy).expect("the buffer was cut out of this memory");
        &self.copy
    }
}

impl VhostBuffer {
    fn settle(&mut self, len: usize) {
        if std::mem::take(&mut self.filled) {
            self.memory.put(self.at, &self.copy[..len]).expect("the buffer was cut out of this memory");
        }
    }
}

/// No slot is left, or an IO does not fit into one.
#[derive(Debug, thiserror::Error)]
#[error("the queue has {slots} slots of {data_bytes} bytes")]
struct NoSlot {
    slots: u16,
    data_bytes: u64,
}

fn length_sectors(len: u64) -> u32 {
    u32::try_from(len / SECTOR).expect("a discard is bounded by IO_BYTES_MAX")
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("an IO is bounded by IO_BYTES_MAX")
}

impl Target for VhostTarget {
    type Buffer = VhostBuffer;

    fn buffer(&self, len: usize) -> Result<VhostBuffer, TargetError> {
        let mut queue = self.queue.borrow_mut();
        let slot = queue.next_slot;
        let ring = queue.ring();
        let fits = slot < ring.slots() / 2 && len as u64 <= ring.data_bytes();
        if !fits {
            let source = NoSlot { slots: ring.slots() / 2, data_bytes: ring.data_bytes() };
            return Err(TargetError { is_final: true, verb: "buffer", offset: 0, len: len as u64, source: Box::new(source) });
        }
        let (memory, at) = ring.data(slot);
        queue.next_slot += 1;
        Ok(VhostBuffer { slot, memory, at, copy: vec![0; len], filled: true })
    }

    async fn read(&self, offset: u64, len: usize, buffer: &mut VhostBuffer) -> Result<(), TargetError> {
        let done = self.request(buffer.slot, Request::Read(length(len)), offset / SECTOR).await;
        done.map_err(|e| self.error("read", offset, len as u64, e))
    }

    async fn write(&self, offset: u64, len: usize, buffer: &mut VhostBuffer) -> Result<(), TargetError> {
        buffer.settle(len);
        let done = self.request(buffer.slot, Request::Write(length(len)), offset / SECTOR).await;
        done.map_err(|e| self.error("write", offset, len as u64, e))
    }

    async fn flush(&self) -> Result<(), TargetError> {
        let done = self.control(Request::Flush, &[]).await;
        done.map_err(|e| self.error("flush", 0, 0, e))
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let mut range = [0; RANGE_BYTES];
        range[..8].copy_from_slice(&(offset / SECTOR).to_le_bytes());
        range[8..12].copy_from_slice(&length_sectors(len).to_le_bytes());
        let done = self.control(Request::Discard, &range).await;
        done.map_err(|e| self.error("discard", offset, len, e))
    }

    async fn drive(&self) {
        poll_fn(|cx| self.poll_turn(cx)).await;
    }
}

#[cfg(test)]
mod tests;
