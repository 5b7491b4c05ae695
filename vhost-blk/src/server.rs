//! The server: one socket, front ends one after another, until stopped.
//!
//! Called by the CLI. While a front end is connected the next one waits in the socket's backlog; a front end that
//! disconnects (guest powered off, QEMU restarted or reconnecting) is followed by the next. Invariants: the next front end
//! is served only when nothing of the previous one is in flight at the device, so a late write cannot overtake a new one;
//! a stop closes the connection only after requests in flight are answered or `drain_timeout` is over. What stays
//! unanswered is noted in the front end's in-flight memory and run again for the connection that brings it back.
//! A server may end by handing everything over to another process (`handover.rs`): then it closes no connection and removes no socket.

use crate::backend::Backend;
use crate::channel::ResizeWatch;
use crate::connection::{Connection, Ended, Requests};
use crate::handover::doorman::Doorman;
use crate::handover::giver::give;
use crate::handover::HandOverTerms;
use crate::stats::VhostBlkStats;
use crate::stop::{StopHandle, Waited, wait_for_one};
use ogee_client::BlockDevice;
use ogee_common::limits::{VHOST_QUEUE_SIZE_MAX, VHOST_QUEUES_MAX, VHOST_STOP_DRAIN};
use ogee_proto::unix_socket::{BoundSocket, SocketError};
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vmm_sys_util::event::{EventConsumer, EventFlag, new_event_consumer_and_notifier};

/// Queues offered unless configured: as many as small VMs have vCPUs, so that `num-queues` may be left out.
pub const NUM_QUEUES_DEFAULT: u16 = 8;
/// Ring entries announced unless configured: QEMU's default for vhost-user-blk.
pub const QUEUE_SIZE_DEFAULT: u16 = 128;
/// While a front end's last requests are waited for, a stop is looked for this often.
const GONE_POLL: Duration = Duration::from_millis(50);

/// What to serve and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostBlkConfig {
    /// The UNIX socket; at most 107 bytes.
    pub socket: PathBuf,
    /// Queues offered, 1 to 64; each costs a thread while a front end is connected.
    pub num_queues: u16,
    /// Ring entries the front end is started with, 4 to 1,024, a power of two. Segments per request follow from it.
    pub queue_size: u16,
    /// Permission bits of the socket; `None`: as the umask has it.
    pub socket_mode: Option<u32>,
    /// Id of the socket's group, one that this process is in unless it is root; `None`: its own.
    pub socket_group: Option<u32>,
    /// At a stop, requests in flight are waited for this long.
    pub drain_timeout: Duration,
}

impl VhostBlkConfig {
    /// The defaults for a socket.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            num_queues: NUM_QUEUES_DEFAULT,
            queue_size: QUEUE_SIZE_DEFAULT,
            socket_mode: None,
            socket_group: None,
            drain_timeout: VHOST_STOP_DRAIN,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ServeError> {
        if !(1..=VHOST_QUEUES_MAX).contains(&self.num_queues) {
            return Err(ServeError::NumQueues { num_queues: self.num_queues });
        }
        if !(4..=VHOST_QUEUE_SIZE_MAX).contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(ServeError::QueueSize { queue_size: self.queue_size });
        }
        Ok(())
    }
}

/// Why serving did not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A number of queues outside 1 to 64.
    #[error("{num_queues} queues: 1 to {VHOST_QUEUES_MAX} can be served")]
    NumQueues {
        /// As configured.
        num_queues: u16,
    },
    /// A queue size that is not a power of two from 4 to 1,024.
    #[error("queue size {queue_size}: must be a power of two from 4 to {VHOST_QUEUE_SIZE_MAX}")]
    QueueSize {
        /// As configured.
        queue_size: u16,
    },
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A system call of the daemon itself failed.
    #[error("{verb}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn io_error(verb: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { verb, source }
}

fn socket_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ServeError {
    let path = path.to_owned();
    move |source| SocketError::Io { verb, path, source }.into()
}

/// How serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeEnd {
    /// By the stop; the socket is removed.
    Stopped,
    /// Another process goes on, with the sockets, the front end and the device: the device must not be given back.
    HandedOver,
}

/// What the server's thread is woken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Stop,
    Other,
    Successor,
}

/// A front end's connection that was another process's.
pub(crate) struct TakenConnection<D: BlockDevice> {
    pub(crate) connection: Connection<D>,
    pub(crate) requests: Requests<D>,
    /// The rings that ran.
    pub(crate) started: Vec<usize>,
    /// The size that the front end knows.
    pub(crate) size_bytes: u64,
}

/// A bound socket and the device behind it.
pub struct VhostBlkServer<D: BlockDevice> {
    device: D,
    config: VhostBlkConfig,
    listener: UnixListener,
    stats: Arc<VhostBlkStats>,
    stop: StopHandle,
    socket: Option<BoundSocket>,
    doorman: Option<Doorman>,
    taken: Option<TakenConnection<D>>,
    /// The back end of the front end that is served.
    current: Mutex<Option<Arc<Backend<D>>>>,
}

/// Ends the doorman's thread also if the server's panics.
struct EndOnDrop<'a>(Option<&'a Doorman>);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(doorman) = self.0 {
            doorman.end();
        }
    }
}

impl<D: BlockDevice> VhostBlkServer<D> {
    /// Listens on the socket; front ends may connect from now on and are answered once [`VhostBlkServer::run`] runs.
    ///
    /// # Errors
    /// A configuration out of range, or the socket ([`SocketError`]).
    pub fn bind(device: D, config: VhostBlkConfig, stop: StopHandle) -> Result<Self, ServeError> {
        config.validate()?;
        // The group first: a wider mode must not hold for another one, not even for a moment.
        let (socket, listener) = BoundSocket::bind(&config.socket, None)?;
        if config.socket_group.is_some() {
            let given = lchown(&config.socket, None, config.socket_group);
            given.map_err(socket_error("set the group of", &config.socket))?;
        }
        if let Some(mode) = config.socket_mode {
            let set = fs::set_permissions(&config.socket, Permissions::from_mode(mode));
            set.map_err(socket_error("set the mode of", &config.socket))?;
        }
        let mut server = Self::with_listener(device, config, stop, listener)?;
        server.socket = Some(socket);
        Ok(server)
    }

    /// A server on a socket that listens already.
    ///
    /// # Errors
    /// A configuration out of range.
    pub(crate) fn with_listener(
        device: D,
        config: VhostBlkConfig,
        stop: StopHandle,
        listener: UnixListener,
    ) -> Result<Self, ServeError> {
        config.validate()?;
        let (stats, current) = (Arc::default(), Mutex::new(None));
        Ok(Self { device, config, listener, stats, stop, socket: None, doorman: None, taken: None, current })
    }

    /// Lets a daemon of the same user, or root's, take over; see `handover.rs`. It comes to a socket beside the server's, `PATH.upgrade`.
    ///
    /// # Errors
    /// That socket, whose path is 8 bytes longer than the server's.
    pub fn allow_upgrade(&mut self, terms: HandOverTerms) -> Result<(), ServeError> {
        self.doorman = Some(Doorman::bind(&self.config, terms)?);
        Ok(())
    }

    /// Goes on for a process that has let go.
    ///
    /// # Errors
    /// No file descriptors, or the sockets' paths are gone.
    pub(crate) fn adopt(
        &mut self,
        stats: Arc<VhostBlkStats>,
        upgrades: UnixListener,
        terms: HandOverTerms,
        taken: Option<TakenConnection<D>>,
    ) -> Result<(), ServeError> {
        self.socket = Some(BoundSocket::adopt(&self.config.socket)?);
        self.doorman = Some(Doorman::adopt(&self.config, terms, upgrades)?);
        (self.stats, self.taken) = (stats, taken);
        Ok(())
    }

    /// Does not serve: the paths of the sockets stay, they are another daemon's.
    pub(crate) fn leave(self) {
        self.socket.into_iter().for_each(BoundSocket::leave);
        self.doorman.into_iter().for_each(Doorman::leave);
    }

    /// The counters, readable while the server runs.
    #[must_use]
    pub fn stats(&self) -> Arc<VhostBlkStats> {
        Arc::clone(&self.stats)
    }

    /// Serves front ends one after another until stopped, then removes the socket, or until another daemon has taken over. Blocks its thread; must not be
    /// called from within a tokio runtime's worker.
    ///
    /// # Errors
    /// System calls that fail for the server itself; what a front end does wrong only ends its connection.
    pub fn run(mut self) -> Result<ServeEnd, ServeError> {
        self.listener.set_nonblocking(true).map_err(io_error("prepare listening socket"))?;
        let taken = self.taken.take();
        let server = &self;
        let end = std::thread::scope(|scope| {
            let doorman = EndOnDrop(server.doorman.as_ref());
            if let Some(doorman) = doorman.0 {
                scope.spawn(move || doorman.run(|| server.queues_in_use()));
            }
            server.serve_all(taken)
        })?;
        if end == ServeEnd::HandedOver {
            self.socket.into_iter().for_each(BoundSocket::leave);
            self.doorman.into_iter().for_each(Doorman::leave);
        }
        Ok(end)
    }

    fn queues_in_use(&self) -> usize {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map_or(0, |backend| backend.rings_in_use())
    }

    fn serve_all(&self, taken: Option<TakenConnection<D>>) -> Result<ServeEnd, ServeError> {
        if let Some(TakenConnection { connection, requests, started, size_bytes }) = taken {
            let handler = Arc::clone(&connection.handler);
            handler.lock().unwrap_or_else(PoisonError::into_inner).start_rings(&started);
            if self.device.info().size_bytes != size_bytes {
                connection.channel.config_changed();
            }
            if self.serve_connection(&connection, requests)? == ServeEnd::HandedOver {
                return Ok(ServeEnd::HandedOver);
            }
        }
        loop {
            match self.wait_or(&self.listener)? {
                Woken::Stop => return Ok(ServeEnd::Stopped),
                Woken::Successor if self.give(None) => return Ok(ServeEnd::HandedOver),
                Woken::Successor => continue,
                Woken::Other => {}
            }
            let end = match self.listener.accept() {
                Ok((stream, _)) => self.serve_front_end(stream)?,
                // Gone before it was accepted.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => continue,
                Err(source) => return Err(ServeError::Io { verb: "accept front end", source }),
            };
            if end == ServeEnd::HandedOver {
                return Ok(end);
            }
        }
    }

    /// Waits until the stop is asked for, `other` is readable, or a daemon is ready to take over.
    fn wait_or(&self, other: &dyn AsRawFd) -> Result<Woken, ServeError> {
        let mut wanted: Vec<&dyn AsRawFd> = vec![self.stop.event(), other];
        wanted.extend(self.doorman.as_ref().map(Doorman::ready_event));
        Ok(match wait_for_one(&wanted, None)? {
            Waited::For(1) => Woken::Other,
            Waited::For(2) => Woken::Successor,
            Waited::For(_) | Waited::TimedOut => Woken::Stop,
        })
    }

    /// Hands over to whoever is ready; whether that came about.
    fn give(&self, connection: Option<&Connection<D>>) -> bool {
        let Some(doorman) = &self.doorman else { return false };
        let successor = doorman.successor();
        successor.is_some_and(|successor| give(doorman, &successor, &self.listener, &self.device, connection))
    }

    fn serve_front_end(&self, stream: UnixStream) -> Result<ServeEnd, ServeError> {
        let config = &self.config;
        stream.set_nonblocking(false).map_err(io_error("prepare connection"))?;
        let stats = Arc::clone(&self.stats);
        let backend = Backend::start(self.device.clone(), config.num_queues, config.queue_size, stats);
        let backend = backend.map_err(io_error("make queues"))?;
        let made = Connection::new(stream, Arc::clone(&backend)).map_err(io_error("prepare connection"));
        match made {
            Ok((connection, requests)) => self.serve_connection(&connection, requests),
            Err(error) => {
                backend.close_and_discard();
                backend.end_threads();
                Err(error)
            }
        }
    }

    fn serve_connection(&self, connection: &Connection<D>, requests: Requests<D>) -> Result<ServeEnd, ServeError> {
        let backend = &connection.backend;
        let set_current = |current| *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
        let _unwinding = EndOnPanic(backend);
        set_current(Some(Arc::clone(backend)));
        let served = self.watch(connection, requests);
        if !matches!(served, Ok(ServeEnd::HandedOver)) {
            self.leave_front_end(backend);
        }
        backend.end_threads();
        set_current(None);
        self.stats.count_end_of_connection();
        served
    }

    /// Waits for the end of the connection; ends it if the server is to stop.
    fn watch(&self, connection: &Connection<D>, requests: Requests<D>) -> Result<ServeEnd, ServeError> {
        self.stats.count_connection();
        tracing::info!(target: "controlpath", socket = %self.config.socket.display(), "front end connected");
        let (gone, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .map_err(io_error("make connection event"))?;
        let resizes = ResizeWatch::new(&self.device).map_err(io_error("watch size"))?;
        let span = tracing::Span::current();
        let (ended, waited) = std::thread::scope(|scope| {
            let protocol = scope.spawn(|| {
                let _span = span.enter();
                let ended = connection.converse(requests);
                notifier.notify().map(|()| ended)
            });
            scope.spawn(|| resizes.run(|| connection.channel.config_changed()));
            let waited = self.wait_for_end(connection, &gone);
            let ended = protocol.join();
            resizes.end();
            (ended, waited)
        });
        match ended {
            Ok(Ok(Ended::Closed(reason))) => tracing::info!(target: "controlpath", %reason, "front end left"),
            // Said by who handed it over.
            Ok(Ok(Ended::Left)) => {}
            Ok(Err(error)) => tracing::warn!(target: "controlpath", %error, "end of connection not signalled"),
            Err(_) => tracing::warn!(target: "controlpath", "protocol thread panicked"),
        }
        waited
    }

    /// Waits until the front end has left, the server is to stop (then the connection is ended), or everything was handed over.
    fn wait_for_end(&self, connection: &Connection<D>, gone: &EventConsumer) -> Result<ServeEnd, ServeError> {
        loop {
            let woken = self.wait_or(gone);
            match woken {
                Ok(Woken::Other) => return Ok(ServeEnd::Stopped),
                Ok(Woken::Successor) if self.give(Some(connection)) => return Ok(ServeEnd::HandedOver),
                Ok(Woken::Successor) => continue,
                Ok(Woken::Stop) | Err(_) => {}
            }
            self.drain(&connection.backend);
            if let Err(error) = connection.stream.shutdown(Shutdown::Both) {
                tracing::debug!(target: "controlpath", %error, "connection is closed already");
            }
            return woken.map(|_| ServeEnd::Stopped);
        }
    }

    /// Answers what is in flight, for at most the drain timeout, then gives it up.
    fn drain(&self, backend: &Backend<D>) {
        backend.close_and_drain();
        if !backend.wait_idle(self.config.drain_timeout) {
            tracing::warn!(target: "controlpath", timeout = ?self.config.drain_timeout,
                "requests in flight left unanswered at stop");
            backend.close_and_give_up();
        }
    }

    /// Waits until the device has finished what a gone front end started; a stop limits the wait.
    fn leave_front_end(&self, backend: &Backend<D>) {
        backend.close_and_discard();
        if !self.stop.is_stopped() {
            self.device.guest_left();
        }
        while !backend.wait_idle(GONE_POLL) {
            if self.stop.is_stopped() {
                if !backend.wait_idle(self.config.drain_timeout) {
                    backend.close_and_give_up();
                }
                // The loops poll; they end as soon as they are told to drop everything.
                while !backend.wait_idle(GONE_POLL) {}
            }
        }
    }
}

/// Ends the queues if the server panics: in a process with other servers nobody else would, and they would go on with a ring that the
/// front end brings to the next one.
struct EndOnPanic<'a, D: BlockDevice>(&'a Arc<Backend<D>>);

impl<D: BlockDevice> Drop for EndOnPanic<'_, D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close_and_give_up();
            while !self.0.wait_idle(GONE_POLL) {}
            self.0.end_threads();
        }
    }
}

/// Binds and runs in one call; see [`VhostBlkServer`].
///
/// # Errors
/// As [`VhostBlkServer::bind`] and [`VhostBlkServer::run`].
pub fn serve<D: BlockDevice>(device: D, config: VhostBlkConfig, stop: StopHandle) -> Result<ServeEnd, ServeError> {
    VhostBlkServer::bind(device, config, stop)?.run()
}
