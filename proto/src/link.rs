//! Connections of the data protocol: many requests at once over one stream, replies in any order.
//!
//! Used by the SDK and the Raft transport ([`Link`], the asking side) and by the servers ([`serve`], the answering
//! side). Invariants: frames leave in the order in which they were queued; the handler sees requests in the order in
//! which they arrived; when a connection ends, every unanswered call ends with [`LinkError::Closed`] and its outcome is
//! unknown. Everything queued when the writer wakes goes out in one vectored system call. Absent: retries, routing.

use crate::data::{
    DecodeError, Frame, FrameReader, HelloHead, HelloReply, Opcode, OutFrame, PROTOCOL_MAX, PROTOCOL_MIN, Role, Status,
};
use crate::net::{Network, Peer, Plane, ReadHalf, Stream, WriteHalf};
use bytes::Bytes;
use ogee_common::limits::CONNECTION_REQUESTS_MAX;
use smallvec::SmallVec;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;

/// Buffers given to one `writev`; the kernel takes at most 1,024.
const IOV_MAX: usize = 256;
/// A connection attempt with its hello may take this long.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);

/// Why a call got no reply.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection could not be made.
    #[error("connect to {addr}")]
    Connect {
        /// The peer.
        addr: SocketAddr,
        /// What the socket said.
        #[source]
        source: io::Error,
    },
    /// The peer answered the hello with a refusal.
    #[error("{addr} refused the connection: {status:?}")]
    Refused {
        /// The peer.
        addr: SocketAddr,
        /// Its reason.
        status: Status,
    },
    /// The peer sent something that is no message.
    #[error("malformed message")]
    Decode(#[from] DecodeError),
    /// The connection ended before the reply; the outcome is unknown.
    #[error("connection closed")]
    Closed,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The outgoing side of a connection.
#[derive(Debug)]
struct SendQueue {
    frames: Mutex<VecDeque<OutFrame>>,
    wake: Notify,
    closed: watch::Sender<bool>,
}

impl SendQueue {
    fn new() -> Arc<Self> {
        let closed = watch::Sender::new(false);
        Arc::new(Self { frames: Mutex::default(), wake: Notify::new(), closed })
    }

    fn push(&self, frame: OutFrame) -> bool {
        if *self.closed.borrow() {
            return false;
        }
        lock(&self.frames).push_back(frame);
        self.wake.notify_one();
        true
    }

    fn close(&self) {
        self.closed.send_replace(true);
        self.wake.notify_one();
    }

    async fn run(&self, mut stream: WriteHalf) -> io::Result<()> {
        loop {
            self.wake.notified().await;
            loop {
                let batch = std::mem::take(&mut *lock(&self.frames));
                if batch.is_empty() {
                    break;
                }
                write_all_vectored(&mut stream, &batch).await?;
            }
            if *self.closed.borrow() {
                return Ok(());
            }
        }
    }
}

async fn write_all_vectored(stream: &mut WriteHalf, batch: &VecDeque<OutFrame>) -> io::Result<()> {
    let buffers: Vec<&[u8]> = batch
        .iter()
        .flat_map(|f| std::iter::once(&f.prefix).chain(f.payload.iter()))
        .filter(|b| !b.is_empty())
        .map(|b| &b[..])
        .collect();
    let (mut first, mut skip) = (0, 0);
    while first < buffers.len() {
        let slices: SmallVec<[IoSlice<'_>; 32]> = buffers[first..]
            .iter()
            .take(IOV_MAX)
            .enumerate()
            .map(|(i, b)| IoSlice::new(if i == 0 { &b[skip..] } else { b }))
            .collect();
        let mut written = stream.write_vectored(&slices).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while first < buffers.len() && written >= buffers[first].len() - skip {
            written -= buffers[first].len() - skip;
            (first, skip) = (first + 1, 0);
        }
        skip += written;
    }
    // Under TLS the last bytes may wait in the session.
    stream.flush().await
}

type Pending = Mutex<Option<HashMap<u64, oneshot::Sender<Frame>>>>;

#[derive(Debug)]
struct LinkInner {
    addr: SocketAddr,
    process: u32,
    version: u16,
    queue: Arc<SendQueue>,
    /// `None` once the connection ended.
    pending: Arc<Pending>,
    next_request: AtomicU64,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Drop for LinkInner {
    fn drop(&mut self) {
        self.queue.close();
        // Their callers hold no link: they learn it from here.
        lock(&self.pending).take();
        self.reader.abort();
        self.writer.abort();
    }
}

/// The asking side of a connection. Clones share it; it closes when the last one is dropped. Its tasks live on the
/// runtime that connected.
#[derive(Debug, Clone)]
pub struct Link(Arc<LinkInner>);

impl Link {
    /// Connects, says hello and waits for the answer, at most a second.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn connect(network: &Network, addr: SocketAddr, hello: &HelloHead) -> Result<Self, LinkError> {
        let connect = |source| LinkError::Connect { addr, source };
        let attempt = async {
            let stream = network.connect(addr, Plane::Data).await.map_err(connect)?;
            Self::handshake(addr, stream, hello).await
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
            Ok(result) => result,
            Err(_) => Err(connect(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn handshake(addr: SocketAddr, stream: Stream, hello: &HelloHead) -> Result<Self, LinkError> {
        let connect = |source| LinkError::Connect { addr, source };
        let (read, mut write) = stream.into_split();
        let frame = OutFrame::request(Opcode::Hello, 0, &hello.encode(), Bytes::new());
        write_all_vectored(&mut write, &VecDeque::from([frame])).await.map_err(connect)?;
        let mut frames = FrameReader::new(read);
        let reply = frames.next().await.map_err(connect)?.ok_or(LinkError::Closed)?;
        match Status::parse(reply.header.status) {
            Status::Ok if reply.header.opcode == Opcode::Hello => {}
            status => return Err(LinkError::Refused { addr, status }),
        }
        let HelloReply { version, process } = HelloReply::decode(reply.head())?;
        if !(hello.version_min..=hello.version_max).contains(&version) {
            return Err(LinkError::Refused { addr, status: Status::Version });
        }
        let queue = SendQueue::new();
        let pending: Arc<Pending> = Arc::new(Mutex::new(Some(HashMap::new())));
        let writer = tokio::spawn({
            let (queue, pending) = (queue.clone(), pending.clone());
            async move {
                if let Err(error) = queue.run(write).await {
                    tracing::debug!(target: "datapath", %addr, %error, "sending ended");
                }
                queue.close();
                lock(&pending).take();
            }
        });
        let reader = tokio::spawn(read_replies(addr, frames, queue.clone(), pending.clone()));
        let next_request = AtomicU64::new(1);
        Ok(Self(Arc::new(LinkInner { addr, process, version, queue, pending, next_request, reader, writer })))
    }

    /// The peer's address.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.0.addr
    }

    /// The process that answered the hello.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.0.process
    }

    /// The version of the protocol that both agreed on.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.0.version
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.0.queue.closed.borrow()
    }

    /// Waits until the connection has ended.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut watch = self.0.queue.closed.subscribe();
        async move {
            // An error means that the link itself is gone, which is closed as well.
            let _ = watch.wait_for(|closed| *closed).await;
        }
    }

    /// Queues a request at once, in the order of calls, and returns the future of its reply. Dropping the future
    /// abandons the reply; the request may still be carried out.
    pub fn call(
        &self,
        opcode: Opcode,
        head: &[u8],
        payload: SmallVec<[Bytes; 2]>,
    ) -> impl Future<Output = Result<Frame, LinkError>> + Send + 'static + use<> {
        let request = self.0.next_request.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        let registered = match lock(&self.0.pending).as_mut() {
            Some(map) => map.insert(request, tx).is_none(),
            None => false,
        };
        if registered {
            self.0.queue.push(OutFrame::request_vectored(opcode, request, head, payload));
        }
        let guard = PendingGuard { pending: self.0.pending.clone(), request };
        async move {
            let reply = rx.await.map_err(|_| LinkError::Closed);
            drop(guard);
            reply
        }
    }
}

/// Forgets an abandoned call, so that the table does not grow.
struct PendingGuard {
    pending: Arc<Pending>,
    request: u64,
}

impl Drop for PendingGuard {
    fn drop(&mut self) {
        if let Some(map) = lock(&self.pending).as_mut() {
            map.remove(&self.request);
        }
    }
}

async fn read_replies(
    addr: SocketAddr,
    mut frames: FrameReader<ReadHalf>,
    queue: Arc<SendQueue>,
    pending: Arc<Pending>,
) {
    loop {
        match frames.next().await {
            Ok(Some(frame)) if frame.header.is_reply => {
                let waiter = lock(&pending).as_mut().and_then(|map| map.remove(&frame.header.request));
                if let Some(waiter) = waiter {
                    // An error means that the caller gave up; its reply is of no use.
                    let _ = waiter.send(frame);
                }
            }
            Ok(Some(_)) => {
                tracing::warn!(target: "datapath", %addr, "a request came on the asking side of a connection");
                break;
            }
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(target: "datapath", %addr, %error, "receiving ended");
                break;
            }
        }
    }
    queue.close();
    lock(&pending).take();
}

/// Answers one request. Dropping it without a reply leaves the asker waiting until its own timeout.
#[derive(Debug)]
pub struct Responder {
    queue: Arc<SendQueue>,
    opcode: Opcode,
    request: u64,
    _permit: OwnedSemaphorePermit,
}

impl Responder {
    /// Sends the reply.
    pub fn send(self, status: Status, head: &[u8], payload: Bytes) {
        self.queue.push(OutFrame::reply(self.opcode, status, self.request, head, payload));
    }

    /// Sends a reply that is only a status.
    pub fn status(self, status: Status) {
        self.send(status, &[], Bytes::new());
    }

    /// Refuses a malformed request with a sentence for people.
    pub fn bad_request(self, why: &dyn std::fmt::Display) {
        self.send(Status::BadRequest, &[], Bytes::from(why.to_string()));
    }
}

/// What a server does with requests of one connection.
pub trait Handler: Send + Sync + 'static {
    /// Called for each request in order of arrival, on the connection's task. It must not block; what takes time is
    /// spawned with the responder.
    fn handle(&self, frame: Frame, responder: Responder);

    /// Called once when the connection has ended.
    fn closed(&self) {}
}

/// Why a server does not want a connection.
pub type Refusal = Status;

/// Serves one admitted connection until it ends. `accept` looks at the hello and returns the handler, or a refusal. Who
/// has only a client's certificate is refused as a daemon.
///
/// # Errors
/// Errors of the socket and malformed frames; the connection is closed in either case.
pub async fn serve<H: Handler>(
    stream: Stream,
    process: u32,
    accept: impl FnOnce(&HelloHead) -> Result<H, Refusal> + Send,
) -> io::Result<()> {
    serve_up_to(PROTOCOL_MAX, stream, process, accept).await
}

/// As [`serve`], by a process that speaks the protocol up to a version: tests play older ones.
///
/// # Errors
/// As [`serve`].
pub async fn serve_up_to<H: Handler>(
    version_max: u16,
    stream: Stream,
    process: u32,
    accept: impl FnOnce(&HelloHead) -> Result<H, Refusal> + Send,
) -> io::Result<()> {
    let peer = stream.peer();
    let (read, mut write) = stream.into_split();
    let mut frames = FrameReader::new(read);
    let Some(first) = frames.next().await? else { return Ok(()) };
    let hello = (first.header.opcode == Opcode::Hello)
        .then(|| HelloHead::decode(first.head()))
        .ok_or(io::ErrorKind::InvalidData)?
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    // The highest that both speak.
    let version = hello.version_max.min(version_max);
    let outcome = if version < hello.version_min.max(PROTOCOL_MIN) {
        Err(Status::Version)
    } else if peer == Peer::Client && hello.role != Role::Client {
        tracing::warn!(target: "datapath", role = ?hello.role, process = hello.process, "a client's certificate for a daemon");
        Err(Status::Forbidden)
    } else {
        accept(&hello)
    };
    let status = outcome.as_ref().map_or_else(|s| *s, |_| Status::Ok);
    let head = HelloReply { version, process }.encode();
    let reply = OutFrame::reply(Opcode::Hello, status, first.header.request, &head, Bytes::new());
    write_all_vectored(&mut write, &VecDeque::from([reply])).await?;
    let Ok(handler) = outcome else { return Ok(()) };
    let queue = SendQueue::new();
    let writer = tokio::spawn({
        let queue = queue.clone();
        async move {
            let result = queue.run(write).await;
            queue.close();
            result
        }
    });
    let _ending = Ending { writer, queue: queue.clone(), handler: &handler };
    serve_requests(&mut frames, &queue, &handler).await
}

/// Ends both directions of a served connection, also when the serving task is aborted.
struct Ending<'a, H: Handler> {
    writer: JoinHandle<io::Result<()>>,
    queue: Arc<SendQueue>,
    handler: &'a H,
}

impl<H: Handler> Drop for Ending<'_, H> {
    fn drop(&mut self) {
        self.handler.closed();
        self.queue.close();
        self.writer.abort();
    }
}

async fn serve_requests<H: Handler>(
    frames: &mut FrameReader<ReadHalf>,
    queue: &Arc<SendQueue>,
    handler: &H,
) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(CONNECTION_REQUESTS_MAX));
    let mut closed = queue.closed.subscribe();
    loop {
        let frame = tokio::select! {
            frame = frames.next() => frame?,
            _ = closed.wait_for(|c| *c) => return Ok(()),
        };
        let Some(frame) = frame else { return Ok(()) };
        if frame.header.is_reply {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (opcode, request) = (frame.header.opcode, frame.header.request);
        handler.handle(frame, Responder { queue: queue.clone(), opcode, request, _permit: permit });
    }
}
