//! An open volume and the thread that serves it.
//!
//! Made and ended by the volume's keeper (`attachment.rs`). Invariants: the volume is attached before its socket exists, and given back
//! after the server has let it go (ADR 0011 needs the first, the second keeps a late IO from being refused); an open volume that
//! cannot be served is given back.

use super::daemon::Site;
use super::spec::Spec;
use crate::error::{CliError, ErrorKind};
use crate::open::{close_volume, give_back};
use crate::vhost::serve_failed;
use ogee_client::Volume;
use ogee_common::name::VolumeRef;
use ogee_proto::unix_socket::BoundSocket;
use ogee_vhost_blk::{ServeError, StopHandle, VhostBlkConfig, VhostBlkServer, VhostBlkStats};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Whether a socket could be made at a path, as far as can be seen: to be asked before a volume is taken from anybody for it.
///
/// # Errors
/// There is no such folder ([`ErrorKind::NotFound`]), something that is not a socket is there ([`ErrorKind::Usage`]), or somebody listens
/// there ([`ErrorKind::Conflict`]).
pub(super) async fn check_place(socket: &Path) -> Result<(), CliError> {
    let path = socket.to_owned();
    // A stranger's socket at the path may let a connection wait.
    let checked = tokio::task::spawn_blocking(move || BoundSocket::check(&path)).await;
    let checked = checked.map_err(|e| CliError::caused(ErrorKind::Failure, "look at the socket's path", e))?;
    checked.map_err(|e| serve_failed(ServeError::Socket(e)))
}

/// A volume that is served.
pub(super) struct Running {
    volume: Volume,
    stats: Arc<VhostBlkStats>,
    stop: StopHandle,
    /// Until the server has ended.
    ended: Option<oneshot::Receiver<Result<(), ServeError>>>,
    thread: JoinHandle<()>,
}

impl Running {
    /// Serves an open volume.
    ///
    /// # Errors
    /// The socket cannot be served; the volume is given back then.
    pub(super) async fn start(site: &Site, spec: &Spec, name: &VolumeRef, volume: Volume) -> Result<Self, CliError> {
        let volume = match &spec.serial {
            Some(serial) => volume.with_serial(serial),
            None => volume,
        };
        let served = Self::serve(site, spec, name, volume.clone()).await;
        if served.is_err() {
            give_back(&volume).await;
        }
        served
    }

    async fn serve(site: &Site, spec: &Spec, name: &VolumeRef, volume: Volume) -> Result<Self, CliError> {
        let stop = StopHandle::new().map_err(serve_failed)?;
        let config = VhostBlkConfig {
            num_queues: spec.queues,
            socket_mode: spec.socket_mode.or(site.socket_mode),
            socket_group: spec.socket_group.or(site.socket_group),
            ..VhostBlkConfig::new(&spec.socket)
        };
        let (device, handle) = (volume.clone(), stop.clone());
        // A stranger's socket at the path may let a connection wait.
        let bound = tokio::task::spawn_blocking(move || VhostBlkServer::bind(device, config, handle)).await;
        let bound = bound.map_err(|e| CliError::caused(ErrorKind::Failure, "listen on the socket", e))?;
        let server = bound.map_err(serve_failed)?;
        let stats = server.stats();
        let (finished, ended) = oneshot::channel();
        let span = tracing::info_span!(target: "controlpath", "vhost", volume = %name);
        let thread = std::thread::Builder::new().name("vhost-blk".to_owned()).spawn(move || {
            let _span = span.entered();
            // The receiver is gone only when the daemon was told to leave everything.
            let _ = finished.send(server.run().map(drop));
        });
        let thread = thread.map_err(|e| CliError::caused(ErrorKind::Failure, "start the server's thread", e))?;
        Ok(Self { volume, stats, stop, ended: Some(ended), thread })
    }

    /// The open volume.
    pub(super) fn volume(&self) -> &Volume {
        &self.volume
    }

    /// What its front ends did.
    pub(super) fn stats(&self) -> Arc<VhostBlkStats> {
        Arc::clone(&self.stats)
    }

    /// Waits for the server's end. Cancellation-safe; afterwards it returns at once.
    ///
    /// # Errors
    /// Why it ended, unless it was told to.
    pub(super) async fn ended(&mut self) -> Result<(), CliError> {
        let Some(ended) = &mut self.ended else { return Ok(()) };
        let outcome = ended.await;
        self.ended = None;
        match outcome {
            Ok(outcome) => outcome.map_err(serve_failed),
            Err(_) => Err(CliError::new(ErrorKind::Failure, "the server's thread panicked; see the daemon's log")),
        }
    }

    /// Answers what is in flight, for at most the drain timeout, closes the connection, removes the socket and gives the volume back.
    ///
    /// # Errors
    /// The first of: how the server ended, and that the volume could not be given back.
    pub(super) async fn end(mut self) -> Result<(), CliError> {
        self.stop.stop();
        let served = self.ended().await;
        // It has nothing left to do; a panic was told already.
        let _ = self.thread.join();
        let closed = close_volume(&self.volume).await;
        served.and(closed)
    }
}
