//! The server: one socket, front ends one after another, until stopped.
//!
//! Called by the CLI. While a front end is connected the next one waits in the socket's backlog; a front end that
//! disconnects (guest powered off, QEMU restarted or reconnecting) is followed by the next. Invariants: the next front end
//! is served only when nothing of the previous one is in flight at the device, so a late write cannot overtake a new one;
//! a stop closes the connection only after requests in flight are answered or `drain_timeout` is over. What stays
//! unanswered is noted in the front end's in-flight memory and run again for the connection that brings it back.

use crate::backend::Backend;
use crate::channel::{Channel, ResizeWatch, converse};
use crate::stats::VhostBlkStats;
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
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::poll::PollContext;

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

    fn validate(&self) -> Result<(), ServeError> {
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

fn io_error(verb: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { verb, source }
}

fn socket_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ServeError {
    let path = path.to_owned();
    move |source| SocketError::Io { verb, path, source }.into()
}

/// Ends a server from another thread. Clones stop the same server.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    event: (EventConsumer, EventNotifier),
}

impl StopHandle {
    /// A handle to give to [`VhostBlkServer::bind`] or [`serve`].
    ///
    /// # Errors
    /// [`ServeError::Io`]: no file descriptor.
    pub fn new() -> Result<Self, ServeError> {
        let event = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC);
        let event = event.map_err(io_error("make stop event"))?;
        Ok(Self(Arc::new(Stop { requested: AtomicBool::new(false), event })))
    }

    /// Asks the server to end; returns at once. Any number of times, before or while it serves.
    pub fn stop(&self) {
        if !self.0.requested.swap(true, Ordering::AcqRel)
            && let Err(error) = self.0.event.1.notify()
        {
            tracing::error!(target: "controlpath", %error, "stop event not sent");
        }
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.requested.load(Ordering::Acquire)
    }

    /// Waits until the stop is asked for (true) or `other` is readable (false).
    fn wait_or(&self, other: &dyn AsRawFd) -> Result<bool, ServeError> {
        const STOP: u32 = 0;
        const OTHER: u32 = 1;
        let failed = |source: vmm_sys_util::errno::Error| ServeError::Io { verb: "wait for events", source: source.into() };
        let poll = PollContext::new().map_err(failed)?;
        poll.add(&self.0.event.0, STOP).map_err(failed)?;
        poll.add(other, OTHER).map_err(failed)?;
        loop {
            match poll.wait() {
                Ok(events) if events.iter().next().is_some() => return Ok(self.is_stopped()),
                Ok(_) => {}
                Err(error) if error.errno() == EINTR => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// `EINTR` of Linux.
const EINTR: i32 = 4;

/// A bound socket and the device behind it.
pub struct VhostBlkServer<D> {
    device: D,
    config: VhostBlkConfig,
    listener: UnixListener,
    stats: Arc<VhostBlkStats>,
    stop: StopHandle,
    _socket: BoundSocket,
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
        Ok(Self { device, config, listener, stats: Arc::new(VhostBlkStats::default()), stop, _socket: socket })
    }

    /// The counters, readable while the server runs.
    #[must_use]
    pub fn stats(&self) -> Arc<VhostBlkStats> {
        Arc::clone(&self.stats)
    }

    /// Serves front ends one after another until stopped, then removes the socket. Blocks its thread; must not be called
    /// from within a tokio runtime's worker.
    ///
    /// # Errors
    /// System calls that fail for the server itself; what a front end does wrong only ends its connection.
    pub fn run(self) -> Result<(), ServeError> {
        self.listener.set_nonblocking(true).map_err(io_error("prepare listening socket"))?;
        while !self.stop.wait_or(&self.listener)? {
            match self.listener.accept() {
                Ok((stream, _)) => self.serve_front_end(stream)?,
                // Gone before it was accepted.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {}
                Err(source) => return Err(ServeError::Io { verb: "accept front end", source }),
            }
        }
        Ok(())
    }

    fn serve_front_end(&self, stream: UnixStream) -> Result<(), ServeError> {
        let config = &self.config;
        let stats = Arc::clone(&self.stats);
        let backend = Backend::start(self.device.clone(), config.num_queues, config.queue_size, stats);
        let backend = backend.map_err(io_error("make queues"))?;
        let _unwinding = EndOnPanic(&backend);
        let served = self.watch(stream, &backend);
        self.leave_front_end(&backend);
        backend.end_threads();
        self.stats.count_end_of_connection();
        served
    }

    /// Waits for the end of the connection; ends it if the server is to stop.
    fn watch(&self, stream: UnixStream, backend: &Arc<Backend<D>>) -> Result<(), ServeError> {
        stream.set_nonblocking(false).map_err(io_error("prepare connection"))?;
        let connection = stream.try_clone().map_err(io_error("duplicate connection"))?;
        self.stats.count_connection();
        tracing::info!(target: "controlpath", socket = %self.config.socket.display(), "front end connected");
        let (gone, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .map_err(io_error("make connection event"))?;
        let channel = Channel::default();
        let resizes = ResizeWatch::new(&self.device).map_err(io_error("watch size"))?;
        let span = tracing::Span::current();
        let (ended, waited) = std::thread::scope(|scope| {
            let protocol = scope.spawn(|| {
                let _span = span.enter();
                let ended = converse(stream, Arc::clone(backend), &channel);
                notifier.notify().map(|()| ended)
            });
            scope.spawn(|| resizes.run(|| channel.config_changed()));
            let waited = self.stop.wait_or(&gone);
            if !matches!(waited, Ok(false)) {
                self.drain(backend);
                if let Err(error) = connection.shutdown(Shutdown::Both) {
                    tracing::debug!(target: "controlpath", %error, "connection is closed already");
                }
            }
            let ended = protocol.join();
            resizes.end();
            (ended, waited)
        });
        match ended {
            Ok(Ok(reason)) => tracing::info!(target: "controlpath", %reason, "front end left"),
            Ok(Err(error)) => tracing::warn!(target: "controlpath", %error, "end of connection not signalled"),
            Err(_) => tracing::warn!(target: "controlpath", "protocol thread panicked"),
        }
        waited.map(|_| ())
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
pub fn serve<D: BlockDevice>(device: D, config: VhostBlkConfig, stop: StopHandle) -> Result<(), ServeError> {
    VhostBlkServer::bind(device, config, stop)?.run()
}
