//! Receives daemons that want to take over, while the server serves.
//!
//! One thread of the old daemon, which listens on `PATH.sock.upgrade`, looks who comes, and lets one at a time get ready; the others are refused at once. When
//! that one says `Ready` it is given to the server's thread, which does the rest (`giver.rs`).
//!
//! ```text
//!          Hello is right                Ready                  the server's thread
//!   Free ──────────────────► Preparing ─────────► Ready(stream) ──────────────────► Giving
//!    ▲                           │ ends, is late                                      │ did not come about
//!    └───────────────────────────┴────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants: nothing of this touches the front end or a ring; strangers (another user, not root) are not spoken to; a visitor that says nothing holds the thread
//! for [`VHOST_UPGRADE_ACCEPT`] at most, and one that does not get ready keeps others out for [`VHOST_UPGRADE_PREPARE`].

use crate::handover::wire::{Frame, Kind, VERSION, receive, send};
use crate::handover::{HandOverRefusal, HandOverTerms, socket_beside, stranger};
use crate::server::{ServeError, VhostBlkConfig};
use crate::stop::{Waited, wait_for_one};
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{VHOST_UPGRADE_ACCEPT, VHOST_UPGRADE_PREPARE};
use ogee_proto::unix_socket::BoundSocket;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

#[derive(Debug)]
enum Slot {
    Free,
    Preparing,
    Ready(UnixStream),
    Giving,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Doorman {
    pub(crate) listener: UnixListener,
    pub(crate) terms: HandOverTerms,
    /// Queues and ring entries.
    shape: (u16, u16),
    slot: Mutex<Slot>,
    ready: Event,
    end: Event,
    socket: BoundSocket,
}

/// A daemon that is ready; when it is dropped the next one may come.
#[derive(Debug)]
pub(crate) struct Successor<'a> {
    pub(crate) stream: UnixStream,
    doorman: &'a Doorman,
}

impl Drop for Successor<'_> {
    fn drop(&mut self) {
        *self.doorman.slot() = Slot::Free;
    }
}

type Event = (EventConsumer, EventNotifier);

fn failed(source: io::Error) -> ServeError {
    ServeError::Io { verb: "prepare for a hand-over", source }
}

/// What says that somebody is ready, and what ends it all.
fn events() -> Result<(Event, Event), ServeError> {
    let event = || new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).map_err(failed);
    Ok((event()?, event()?))
}

impl Doorman {
    /// Listens beside the server's socket.
    ///
    /// # Errors
    /// The socket, or no file descriptors.
    pub(crate) fn bind(config: &VhostBlkConfig, terms: HandOverTerms) -> Result<Self, ServeError> {
        let events = events()?;
        let (socket, listener) = BoundSocket::bind(&socket_beside(&config.socket), Some(0o600))?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self::new(config, terms, (listener, socket), events))
    }

    /// Goes on with the listener of another daemon, whose socket stays where it is if that fails.
    ///
    /// # Errors
    /// The socket is gone, or no file descriptors.
    pub(crate) fn adopt(config: &VhostBlkConfig, terms: HandOverTerms, listener: UnixListener) -> Result<Self, ServeError> {
        let events = events()?;
        listener.set_nonblocking(true).map_err(failed)?;
        let socket = BoundSocket::adopt(&socket_beside(&config.socket))?;
        Ok(Self::new(config, terms, (listener, socket), events))
    }

    fn new(
        config: &VhostBlkConfig,
        terms: HandOverTerms,
        (listener, socket): (UnixListener, BoundSocket),
        (ready, end): (Event, Event),
    ) -> Self {
        let shape = (config.num_queues, config.queue_size);
        Self { listener, terms, shape, slot: Mutex::new(Slot::Free), ready, end, socket }
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Becomes readable when somebody is ready.
    pub(crate) fn ready_event(&self) -> &dyn AsRawFd {
        &self.ready.0
    }

    /// Who is ready to take over, if somebody is.
    pub(crate) fn successor(&self) -> Option<Successor<'_>> {
        // Consumed before it is looked; there may be nothing to consume.
        let _ = self.ready.0.consume();
        let mut slot = self.slot();
        match std::mem::replace(&mut *slot, Slot::Giving) {
            Slot::Ready(stream) => Some(Successor { stream, doorman: self }),
            other => {
                *slot = other;
                None
            }
        }
    }

    /// Ends [`Doorman::run`], now or when it starts.
    pub(crate) fn end(&self) {
        if let Err(error) = self.end.1.notify() {
            tracing::error!(target: "controlpath", %error, "end of hand-overs not signalled");
        }
    }

    /// The socket was given away: its path stays.
    pub(crate) fn leave(self) {
        self.socket.leave();
    }

    /// Receives visitors until the end. `queues_in_use` says how many queues are in use.
    pub(crate) fn run(&self, queues_in_use: impl Fn() -> usize) {
        let mut preparing: Option<(UnixStream, Instant)> = None;
        loop {
            let left = preparing.as_ref().map(|(_, until)| until.saturating_duration_since(clock::now()));
            // First the one that gets ready: if it has ended, the next one may.
            let mut wanted: Vec<&dyn AsRawFd> = vec![&self.end.0];
            wanted.extend(preparing.as_ref().map(|(stream, _)| stream as &dyn AsRawFd));
            wanted.push(&self.listener);
            let visitor = wanted.len() - 1;
            match wait_for_one(&wanted, left) {
                Ok(Waited::For(0)) => return,
                Ok(Waited::For(at)) if at == visitor => {
                    if let Some(stream) = self.accept()
                        && let Some(welcome) = self.greet(stream, queues_in_use())
                    {
                        preparing = Some((welcome, clock::now() + VHOST_UPGRADE_PREPARE));
                    }
                }
                Ok(Waited::For(_)) => self.hear(preparing.take()),
                Ok(Waited::TimedOut) => {
                    tracing::warn!(target: "controlpath", limit = ?VHOST_UPGRADE_PREPARE, "a daemon that wants to take over does not get ready");
                    preparing = None;
                    *self.slot() = Slot::Free;
                }
                Err(error) => {
                    tracing::error!(target: "controlpath", %error, source = ?std::error::Error::source(&error), "no upgrade is possible any more");
                    return;
                }
            }
        }
    }

    fn accept(&self) -> Option<UnixStream> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(target: "controlpath", %error, "visitor gone");
                return None;
            }
        };
        match stream.set_nonblocking(false).and_then(|()| stranger(&stream)) {
            Ok(None) => Some(stream),
            Ok(Some(uid)) => {
                tracing::warn!(target: "controlpath", uid, "another user wants to take over: not let in");
                None
            }
            Err(error) => {
                tracing::warn!(target: "controlpath", %error, "it is not known who wants to take over: not let in");
                None
            }
        }
    }

    /// Hears what a visitor wants; gives it back if it may get ready.
    fn greet(&self, stream: UnixStream, queues_in_use: usize) -> Option<UnixStream> {
        let hello = match receive(&stream, VHOST_UPGRADE_ACCEPT) {
            Ok(hello) => hello,
            Err(error) => {
                tracing::debug!(target: "controlpath", %error, "visitor said nothing");
                return None;
            }
        };
        if let Err(refusal) = self.judge(&hello) {
            tracing::warn!(target: "controlpath", %refusal, version = hello.version, "a daemon that wants to take over is refused");
            refuse(&stream, refusal);
            return None;
        }
        let queues = u16::try_from(queues_in_use).unwrap_or(u16::MAX);
        let welcome = [&self.terms.client.to_le_bytes()[..], &self.terms.volume.to_le_bytes(), &queues.to_le_bytes()].concat();
        match send(&stream, Kind::Welcome, (&welcome, &[]), VHOST_UPGRADE_ACCEPT) {
            Ok(()) => {
                tracing::info!(target: "controlpath", "another daemon gets ready to take over");
                Some(stream)
            }
            Err(error) => {
                tracing::debug!(target: "controlpath", %error, "visitor gone");
                *self.slot() = Slot::Free;
                None
            }
        }
    }

    /// Whether a visitor may take over; if so, no other one may from now on.
    fn judge(&self, hello: &Frame) -> Result<(), HandOverRefusal> {
        if hello.version != VERSION || hello.kind != Some(Kind::Hello) {
            return Err(HandOverRefusal::Version);
        }
        let (shape, subject) = hello.body.split_at_checked(4).ok_or(HandOverRefusal::Version)?;
        if shape != shape_bytes(self.shape) {
            return Err(HandOverRefusal::OtherShape);
        }
        if subject != self.terms.subject.as_bytes() {
            return Err(HandOverRefusal::OtherSubject);
        }
        let mut slot = self.slot();
        if matches!(*slot, Slot::Free) {
            *slot = Slot::Preparing;
            Ok(())
        } else {
            Err(HandOverRefusal::Busy)
        }
    }

    /// The one that gets ready has said something, or ended.
    fn hear(&self, preparing: Option<(UnixStream, Instant)>) {
        let Some((stream, _)) = preparing else { return };
        let heard = receive(&stream, VHOST_UPGRADE_ACCEPT);
        if matches!(&heard, Ok(frame) if frame.kind == Some(Kind::Ready)) {
            *self.slot() = Slot::Ready(stream);
            if let Err(error) = self.ready.1.notify() {
                tracing::error!(target: "controlpath", %error, "hand-over not signalled");
            }
            return;
        }
        tracing::warn!(target: "controlpath", ?heard, "a daemon that wanted to take over did not get ready");
        *self.slot() = Slot::Free;
    }
}

/// Queues and ring entries as they are sent.
pub(crate) fn shape_bytes((num_queues, queue_size): (u16, u16)) -> [u8; 4] {
    let ([a, b], [c, d]) = (num_queues.to_le_bytes(), queue_size.to_le_bytes());
    [a, b, c, d]
}

/// Tells why this daemon goes on.
pub(crate) fn refuse(stream: &UnixStream, refusal: HandOverRefusal) {
    if let Err(error) = send(stream, Kind::Refused, (&refusal.code().to_le_bytes(), &[]), VHOST_UPGRADE_ACCEPT) {
        tracing::debug!(target: "controlpath", %error, "refusal not told");
    }
}
