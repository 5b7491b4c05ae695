//! The new daemon's part of a hand-over, step by step: ask, get ready, take, serve.
//!
//! Called by the CLI. [`Upgrade::begin`] asks the running daemon; then the caller opens its device without taking it from anybody; [`Upgrade::prepare`] starts
//! threads and opens connections; [`Prepared::take`] stops the old daemon and takes everything over. What it gives is attached and run by the caller: no ring runs
//! before [`VhostBlkServer::run`]. Invariants: before the old daemon has let go nothing of the guest or of its front end is touched, and no socket path is
//! removed; whatever fails before that leaves the old daemon as it was.

use crate::backend::Backend;
use crate::channel::Channel;
use crate::connection::{Connection, Requests};
use crate::handler::Handler;
use crate::handover::doorman::shape_bytes;
use crate::handover::exchange::Place;
use crate::handover::state::{Estate, FrontEndState};
use crate::handover::wire::{Frame, Kind, VERSION, receive, send};
use crate::handover::{HandOverError, HandOverRefusal, HandOverTerms, io_error, socket_beside, stranger};
use crate::parking::Parking;
use crate::server::{TakenConnection, VhostBlkConfig, VhostBlkServer};
use crate::stats::VhostBlkStats;
use crate::stop::StopHandle;
use ogee_client::BlockDevice;
use ogee_common::limits::{VHOST_STOP_DRAIN, VHOST_UPGRADE_ACCEPT};
use ogee_proto::unix_socket::{SOCKET_PATH_BYTES_MAX, SocketError};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;

/// From `Ready` to the old daemon's state: it may be waiting for the end of requests of a front end that has left.
const ESTATE_LIMIT: Duration = Duration::from_secs(VHOST_STOP_DRAIN.as_secs() * 2);
/// From `Accepted` to `Go`, which ends the old daemon: nothing of the guest is touched meanwhile, so there is nothing to hurry for on a slow machine.
const GO_LIMIT: Duration = Duration::from_secs(60);
/// Header of a message of the front end: request, flags (version 1), bytes that follow.
const FLAGS: u32 = 1;

/// A running daemon that lets this one get ready.
#[derive(Debug)]
pub struct Upgrade {
    stream: UnixStream,
    subject: String,
    client: u64,
    volume: u64,
    queues_in_use: usize,
}

impl Upgrade {
    /// Asks the daemon that serves `config.socket` whether this one may take over; `None`: there is no daemon.
    ///
    /// # Errors
    /// It refuses, is another user's, or speaks another version.
    pub fn begin(config: &VhostBlkConfig, subject: &str) -> Result<Option<Self>, HandOverError> {
        config.validate()?;
        let path = socket_beside(&config.socket);
        // Nobody can listen there: such a daemon is restarted, and warns when it starts.
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Ok(None);
        }
        let stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
            Err(source) => return Err(SocketError::Io { verb: "connect to", path, source }.into()),
        };
        if let Some(uid) = stranger(&stream).map_err(io_error("ask whose the running daemon is"))? {
            return Err(HandOverError::OtherUser { path, uid });
        }
        let hello = [&shape_bytes((config.num_queues, config.queue_size))[..], subject.as_bytes()].concat();
        send(&stream, Kind::Hello, (&hello, &[]), VHOST_UPGRADE_ACCEPT).map_err(HandOverError::Wire)?;
        let welcome = expect(&stream, Kind::Welcome, ESTATE_LIMIT)?;
        let Some((client, rest)) = welcome.body.split_first_chunk::<8>() else { return Err(HandOverError::OutOfPlace) };
        let Some((volume, &[q0, q1])) = rest.split_first_chunk::<8>() else { return Err(HandOverError::OutOfPlace) };
        Ok(Some(Self {
            stream,
            subject: subject.to_owned(),
            client: u64::from_le_bytes(*client),
            volume: u64::from_le_bytes(*volume),
            queues_in_use: usize::from(u16::from_le_bytes([q0, q1])),
        }))
    }

    /// The client as which the running daemon has the volume attached; 0: it has none.
    #[must_use]
    pub fn client(&self) -> u64 {
        self.client
    }

    /// The number of the volume that it serves, whatever that is called now; 0: none.
    #[must_use]
    pub fn volume(&self) -> u64 {
        self.volume
    }

    /// Starts the threads of the queues and opens their connections. Blocks its thread; not to be called from within a tokio runtime's worker.
    ///
    /// # Errors
    /// No threads or file descriptors.
    pub fn prepare<D: BlockDevice>(
        self,
        device: D,
        config: VhostBlkConfig,
        stop: StopHandle,
    ) -> Result<Prepared<D>, HandOverError> {
        let stats = Arc::new(VhostBlkStats::default());
        let backend = Backend::start(device.clone(), config.num_queues, config.queue_size, Arc::clone(&stats));
        let backend = backend.map_err(io_error("make queues"))?;
        let prepared = Prepared { upgrade: self, device, config, stop, stats, backend: Some(backend) };
        if let Some(backend) = &prepared.backend {
            backend.warm_up(prepared.upgrade.queues_in_use);
        }
        Ok(prepared)
    }
}

/// A daemon that is ready to take over.
pub struct Prepared<D: BlockDevice> {
    upgrade: Upgrade,
    device: D,
    config: VhostBlkConfig,
    stop: StopHandle,
    stats: Arc<VhostBlkStats>,
    /// Taken out when it is used.
    backend: Option<Arc<Backend<D>>>,
}

/// What was taken over. The device has to be attached before the server runs.
pub struct TakenOver<D: BlockDevice> {
    /// The server, with its front end if there was one.
    pub server: VhostBlkServer<D>,
    /// The claim on the socket.
    pub claim: Option<File>,
}

impl<D: BlockDevice> Drop for Prepared<D> {
    fn drop(&mut self) {
        if let Some(backend) = self.backend.take() {
            backend.close_and_give_up();
            backend.end_threads();
        }
    }
}

impl<D: BlockDevice> Prepared<D> {
    /// Stops the running daemon and takes its sockets, its claim and its front end.
    ///
    /// # Errors
    /// The running daemon goes on, except after [`HandOverError::NoGo`], when that is not known, and after an error of a system call of this process.
    pub fn take(mut self) -> Result<TakenOver<D>, HandOverError> {
        let stream = self.upgrade.stream.try_clone().map_err(io_error("duplicate connection"))?;
        self.check_stop()?;
        send(&stream, Kind::Ready, (&[], &[]), VHOST_UPGRADE_ACCEPT).map_err(HandOverError::Wire)?;
        let frame = expect(&stream, Kind::Estate, ESTATE_LIMIT)?;
        let Estate { listener, upgrades, claim, front_end } = Estate::decode(&frame.body, frame.files)?;
        let backend = self.backend.as_ref().map(Arc::clone);
        let taken = front_end.zip(backend).map(|((connection, state), backend)| self.adopt(connection, state, backend));
        let taken = taken.transpose()?;
        let again = claim.as_ref().map(File::try_clone).transpose().map_err(io_error("duplicate claim"))?;
        let is_taken = taken.is_some();
        let Upgrade { client, volume, .. } = self.upgrade;
        let terms = HandOverTerms { subject: self.upgrade.subject.clone(), client, volume, claim: again };
        // Everything that can fail is done now, while the other one still goes on if it does.
        let server = self.server(listener, upgrades, terms, taken)?;
        if let Err(error) = self.check_stop().and_then(|()| agree(&stream)) {
            server.leave();
            return Err(error);
        }
        if is_taken {
            self.backend = None;
        }
        Ok(TakenOver { server, claim })
    }

    /// Whether this daemon may still go on: who was stopped must not take a guest over, nobody would serve it.
    fn check_stop(&self) -> Result<(), HandOverError> {
        if self.stop.is_stopped() { Err(HandOverError::Stopped) } else { Ok(()) }
    }

    fn server(
        &self,
        listener: UnixListener,
        upgrades: UnixListener,
        terms: HandOverTerms,
        taken: Option<TakenConnection<D>>,
    ) -> Result<VhostBlkServer<D>, HandOverError> {
        let mut server = VhostBlkServer::with_listener(self.device.clone(), self.config.clone(), self.stop.clone(), listener)?;
        if let Err(error) = server.adopt(Arc::clone(&self.stats), upgrades, terms, taken) {
            server.leave();
            return Err(error.into());
        }
        Ok(server)
    }

    /// A connection that goes on with `state`; nothing of the guest is touched.
    fn adopt(
        &self,
        stream: UnixStream,
        mut state: FrontEndState,
        backend: Arc<Backend<D>>,
    ) -> Result<TakenConnection<D>, HandOverError> {
        let handler = Arc::new(Mutex::new(Handler::new(Arc::clone(&backend))));
        let requests = led(&stream, &handler, &state)?;
        let channel = Channel::default();
        if let Some(found) = state.channel.take() {
            channel.set(found);
        }
        let size_bytes = state.size_bytes;
        let adopted = handler.lock().unwrap_or_else(PoisonError::into_inner).adopt(state);
        let started = adopted.map_err(HandOverError::FrontEnd)?;
        let parking = Parking::new().map_err(io_error("make connection event"))?;
        let connection = Connection { stream, backend, handler, channel, parking };
        Ok(TakenConnection { connection, requests, started, size_bytes })
    }
}

/// What answers the front end's messages on `stream`, with what was negotiated: it is said again on a socket pair, for the crate keeps it in private fields, and
/// then `stream` takes the place of that pair.
fn led<D: BlockDevice>(
    stream: &UnixStream,
    handler: &Arc<Mutex<Handler<D>>>,
    state: &FrontEndState,
) -> Result<Requests<D>, HandOverError> {
    let (ours, mut theirs) = UnixStream::pair().map_err(io_error("make a socket pair"))?;
    let place = Place::of(&ours);
    let mut requests = BackendReqHandler::from_stream(ours, Arc::clone(handler));
    let mut say = |request: FrontendReq, value: Option<u64>| {
        let mut message = Vec::new();
        for word in [request as u32, FLAGS, if value.is_some() { 8 } else { 0 }] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend(value.into_iter().flat_map(u64::to_ne_bytes));
        theirs.write_all(&message).map_err(io_error("write to a socket pair"))?;
        requests.handle_request().map_err(HandOverError::FrontEnd)
    };
    say(FrontendReq::GET_FEATURES, None)?;
    // What was not set is not said: 0 has a meaning there.
    if state.features != 0 {
        say(FrontendReq::SET_FEATURES, Some(state.features))?;
    }
    say(FrontendReq::GET_PROTOCOL_FEATURES, None)?;
    if state.protocol_features != 0 {
        say(FrontendReq::SET_PROTOCOL_FEATURES, Some(state.protocol_features))?;
    }
    place.take(stream).map_err(io_error("put the connection in place"))?;
    Ok(requests)
}

/// The next frame, which must be of a kind and of this version.
fn expect(stream: &UnixStream, kind: Kind, limit: Duration) -> Result<Frame, HandOverError> {
    let frame = receive(stream, limit).map_err(HandOverError::Wire)?;
    if frame.version == VERSION && frame.kind == Some(kind) { Ok(frame) } else { Err(misplaced(&frame)) }
}

/// Accepts what was handed over, and waits until the other one has let go of it.
fn agree(stream: &UnixStream) -> Result<(), HandOverError> {
    send(stream, Kind::Accepted, (&[], &[]), VHOST_UPGRADE_ACCEPT).map_err(HandOverError::Wire)?;
    match receive(stream, GO_LIMIT) {
        Ok(frame) if frame.kind == Some(Kind::Go) => Ok(()),
        // It waited no longer, and has said why before `Accepted` came.
        Ok(frame) => Err(misplaced(&frame)),
        Err(error) => Err(HandOverError::NoGo(error)),
    }
}

/// What a frame means that was not expected.
fn misplaced(frame: &Frame) -> HandOverError {
    if frame.version != VERSION {
        return HandOverError::Version { theirs: frame.version };
    }
    match (frame.kind, &frame.body[..]) {
        (Some(Kind::Refused), [a, b]) => HandOverError::Refused(HandOverRefusal::of(u16::from_le_bytes([*a, *b]))),
        _ => HandOverError::OutOfPlace,
    }
}
