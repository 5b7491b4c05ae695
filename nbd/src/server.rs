//! The server: listens, gives each connection to a thread, and stops without losing a reply.
//!
//! Called by the CLI. Each thread has a runtime of its own and its own handles of the devices, so that sockets and
//! buffers of the SDK are not shared between threads; a connection stays on its thread. Invariants: at most
//! `connections_max` connections, more are closed at once with a line in the log; a stop accepts nothing more, lets
//! every connection answer what it took, and ends within `drain_timeout`.

use crate::connection::{Thread, serve};
use crate::execute::OpenExport;
use crate::handshake::ExportInfo;
use crate::listen::{ListenError, ListenOn, Listener};
use crate::protection::TlsOffer;
use crate::stats::NbdStats;
use crate::stream::Accepted;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_client::{BlockDevice, Moment, WriteOrder};
use ogee_common::limits::{
    NBD_ACCEPT_PAUSE, NBD_CHANGED_CONTEXTS_MAX, NBD_CONNECTIONS_DEFAULT, NBD_CONNECTIONS_MAX, NBD_EXPORTS_MAX, NBD_HANDSHAKE_TIMEOUT,
    NBD_STOP_DRAIN, NBD_STRING_BYTES_MAX, NBD_THREADS_MAX,
};
use ogee_proto::net::ServerTls;
use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

/// Threads unless configured, if the machine has as many CPUs.
const THREADS_DEFAULT: usize = 4;

/// A device to serve.
#[derive(Debug, Clone)]
pub struct Export<D> {
    /// The name by which clients ask for it.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// The device; it says itself whether it can be written.
    pub device: D,
    /// Contexts that tell what changed since a snapshot, by their whole names; at most `NBD_CHANGED_CONTEXTS_MAX`.
    pub changed_since: Vec<(String, Moment)>,
}

/// Who must use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// Every client.
    Required,
    /// Clients that come by TCP; others may. Who may open a UNIX socket is said by its permissions.
    RequiredOnTcp,
    /// Nobody; who wants to may. This keeps nobody out, and who can change packets can keep a client from TLS.
    Allowed,
}

impl TlsMode {
    /// What a client is offered that came by TCP or not.
    pub(crate) const fn offer(self, is_tcp: bool) -> TlsOffer {
        match (self, is_tcp) {
            (Self::Required, _) | (Self::RequiredOnTcp, true) => TlsOffer::Demanded,
            (Self::RequiredOnTcp, false) | (Self::Allowed, _) => TlsOffer::Optional,
        }
    }
}

/// TLS of a server.
#[derive(Debug, Clone)]
pub struct NbdTls {
    /// Certificates, and what clients must show.
    pub certificates: Arc<ServerTls>,
    /// Who must use it.
    pub mode: TlsMode,
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct NbdConfig {
    /// Where; at least one.
    pub listen: Vec<ListenOn>,
    /// Threads, 1 to 64; each has its own connections to chunkservers.
    pub threads: usize,
    /// Connections at the same time, 1 to 1,024.
    pub connections_max: usize,
    /// A handshake must be over within this time.
    pub handshake_timeout: Duration,
    /// At a stop, requests in flight are waited for this long.
    pub drain_timeout: Duration,
    /// TLS; without it everything goes in the clear.
    pub tls: Option<NbdTls>,
}

impl NbdConfig {
    /// The defaults for these places.
    #[must_use]
    pub fn new(listen: Vec<ListenOn>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            listen,
            threads: cpus.min(THREADS_DEFAULT),
            connections_max: NBD_CONNECTIONS_DEFAULT,
            handshake_timeout: NBD_HANDSHAKE_TIMEOUT,
            drain_timeout: NBD_STOP_DRAIN,
            tls: None,
        }
    }
}

/// Why serving did not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// None, too many, or one twice.
    #[error("{count} exports: 1 to {NBD_EXPORTS_MAX} can be served")]
    ExportCount {
        /// As configured.
        count: usize,
    },
    /// Two exports of one name.
    #[error("{name} is to be exported twice")]
    ExportTwice {
        /// The name.
        name: String,
    },
    /// Longer than NBD allows.
    #[error("the name of an export has {len} bytes, NBD allows {NBD_STRING_BYTES_MAX}")]
    ExportName {
        /// Its bytes.
        len: usize,
    },
    /// Too many contexts, or a name that is too long, not of the namespace, or there twice.
    #[error("the contexts of {export} cannot be served: at most {NBD_CHANGED_CONTEXTS_MAX}, each name once and in the namespace ogee")]
    Contexts {
        /// The export.
        export: String,
    },
    /// A number of threads outside 1 to 64.
    #[error("{threads} threads: 1 to {NBD_THREADS_MAX} are possible")]
    Threads {
        /// As configured.
        threads: usize,
    },
    /// A number of connections outside 1 to 1,024.
    #[error("{connections} connections: 1 to {NBD_CONNECTIONS_MAX} are possible")]
    Connections {
        /// As configured.
        connections: usize,
    },
    /// Nowhere to listen, or it failed.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A thread could not be started.
    #[error("start thread")]
    Thread(#[source] io::Error),
    /// Requests in flight did not end.
    #[error("{connections} connections had requests in flight {} s after the stop; they are left unanswered", limit.as_secs())]
    NotDrained {
        /// How many.
        connections: usize,
        /// The limit.
        limit: Duration,
    },
}

/// A server that listens.
#[derive(Debug)]
pub struct NbdServer<D> {
    exports: Vec<Export<D>>,
    config: NbdConfig,
    listeners: Vec<Listener>,
    stats: NbdStats,
}

impl<D: BlockDevice> NbdServer<D> {
    /// Checks the configuration and listens. From here on clients can connect; they are answered by
    /// [`NbdServer::run`]. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn bind(exports: Vec<Export<D>>, config: NbdConfig) -> Result<Self, ServeError> {
        if !(1..=NBD_EXPORTS_MAX).contains(&exports.len()) {
            return Err(ServeError::ExportCount { count: exports.len() });
        }
        let mut names = BTreeSet::new();
        for Export { name, .. } in &exports {
            if name.len() > NBD_STRING_BYTES_MAX {
                return Err(ServeError::ExportName { len: name.len() });
            }
            if !names.insert(name) {
                return Err(ServeError::ExportTwice { name: name.clone() });
            }
        }
        if let Some(export) = exports.iter().find(|export| !has_sound_contexts(export)) {
            return Err(ServeError::Contexts { export: export.name.clone() });
        }
        if !(1..=NBD_THREADS_MAX).contains(&config.threads) {
            return Err(ServeError::Threads { threads: config.threads });
        }
        if !(1..=NBD_CONNECTIONS_MAX).contains(&config.connections_max) {
            return Err(ServeError::Connections { connections: config.connections_max });
        }
        let mut listeners = vec![];
        for at in &config.listen {
            listeners.extend(Listener::open(at)?);
        }
        if listeners.is_empty() {
            return Err(ListenError::NothingInherited.into());
        }
        let stats = NbdStats::new(config.threads);
        Ok(Self { exports, config, listeners, stats })
    }

    /// What it does, counted; can be read while it runs and afterwards.
    #[must_use]
    pub fn stats(&self) -> NbdStats {
        self.stats.clone()
    }

    /// The TCP addresses it listens on, with their ports.
    #[must_use]
    pub fn tcp_addrs(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(Listener::tcp_addr).collect()
    }

    /// Serves until `stop` ends, then drains.
    ///
    /// # Errors
    /// [`ServeError::Thread`], and [`ServeError::NotDrained`] after a stop.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let (stopping, stopped) = watch::channel(false);
        let orders: Vec<Arc<WriteOrder>> = self.exports.iter().map(|_| Arc::default()).collect();
        let mut workers = vec![];
        for number in 0..self.config.threads {
            workers.push(Worker::start(number, self.thread(number, &orders, &stopped)).map_err(ServeError::Thread)?);
        }
        let slots = Arc::new(Semaphore::new(self.config.connections_max));
        let accepting = accept_all(&self.listeners, &workers, &slots, &self.stats);
        tokio::select! {
            () = stop => {}
            () = accepting => {}
        }
        // New clients are refused by the kernel from here on.
        drop(self.listeners);
        stopping.send_replace(true);
        let all = u32::try_from(self.config.connections_max).expect("it was bounded");
        let limit = self.config.drain_timeout;
        let drained = tokio::time::timeout(limit, slots.acquire_many(all)).await;
        let connections = self.config.connections_max - slots.available_permits();
        workers.into_iter().for_each(Worker::end);
        match drained {
            Ok(_) => Ok(()),
            Err(_) => Err(ServeError::NotDrained { connections, limit }),
        }
    }

    fn thread(&self, number: usize, orders: &[Arc<WriteOrder>], stop: &watch::Receiver<bool>) -> Thread<D> {
        let open = |(export, order): (&Export<D>, &Arc<WriteOrder>)| OpenExport {
            device: export.device.for_thread(),
            order: order.clone(),
            changed_since: export.changed_since.iter().map(|(_, moment)| *moment).collect(),
        };
        let info = |export: &Export<D>| {
            let device = export.device.info();
            ExportInfo {
                name: export.name.clone(),
                description: export.description.clone(),
                size_bytes: device.size_bytes,
                read_only: device.read_only,
                contexts: export.changed_since.iter().map(|(name, _)| name.clone()).collect(),
                sector_bytes: device.sector_bytes,
            }
        };
        Thread {
            exports: self.exports.iter().zip(orders).map(open).collect(),
            infos: self.exports.iter().map(info).collect(),
            handshake_timeout: self.config.handshake_timeout,
            tls: self.config.tls.clone(),
            counters: self.stats.thread(number),
            stop: stop.clone(),
        }
    }
}

fn has_sound_contexts<D>(export: &Export<D>) -> bool {
    let names: BTreeSet<&str> = export.changed_since.iter().map(|(name, _)| name.as_str()).collect();
    let is_sound = |name: &&str| name.len() <= NBD_STRING_BYTES_MAX && name.starts_with("ogee:");
    export.changed_since.len() <= NBD_CHANGED_CONTEXTS_MAX
        && names.len() == export.changed_since.len()
        && names.iter().all(is_sound)
}

/// Accepts on every listener, for ever.
async fn accept_all<D: BlockDevice>(
    listeners: &[Listener],
    workers: &[Worker<D>],
    slots: &Arc<Semaphore>,
    stats: &NbdStats,
) {
    let mut next_worker = 0;
    let accept = |listener| async move { (listener, Listener::accept(listener).await) };
    let mut accepting: FuturesUnordered<_> = listeners.iter().map(accept).collect();
    while let Some((listener, accepted)) = accepting.next().await {
        match accepted {
            Ok((client, peer)) => match slots.clone().try_acquire_owned() {
                Ok(slot) => {
                    workers[next_worker % workers.len()].take(client, peer, slot);
                    next_worker += 1;
                }
                Err(_) => {
                    stats.refused();
                    tracing::warn!(target: "controlpath", peer, "NBD client refused: all connections are in use");
                }
            },
            Err(error) => {
                tracing::warn!(target: "controlpath", %error, "accept failed");
                tokio::time::sleep(NBD_ACCEPT_PAUSE).await;
            }
        }
        accepting.push(accept(listener));
    }
}

/// One thread and what it needs to serve connections.
#[derive(Debug)]
struct Worker<D> {
    runtime: tokio::runtime::Handle,
    shared: Arc<Thread<D>>,
    end: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl<D: BlockDevice> Worker<D> {
    fn start(number: usize, shared: Thread<D>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("nbd-{number}")).spawn(move || {
            // An error: the server is gone, which is the end as well.
            let _ = runtime.block_on(ended);
        })?;
        Ok(Self { runtime: handle, shared: Arc::new(shared), end, thread })
    }

    /// Serves a client on this thread.
    fn take(&self, client: Accepted, peer: String, slot: OwnedSemaphorePermit) {
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            match client.register() {
                Ok(stream) => serve(stream, &shared, &peer).await,
                Err(error) => tracing::warn!(target: "controlpath", peer, %error, "set up connection"),
            }
            drop(slot);
        });
    }

    /// Ends the thread; what it still served is dropped.
    fn end(self) {
        let _ = self.end.send(());
        if self.thread.join().is_err() {
            tracing::error!(target: "controlpath", "a thread of the NBD server panicked");
        }
    }
}
