//! One connection: the handshake, then `transmission.rs`, then a close that loses no reply.
//!
//! A task of one worker thread of the server. Invariants: whatever happens here ends this connection alone, with one
//! line in the log that says why; the handshake has a time limit; a reply to an option is sent before the next option
//! is looked at, so that output is bounded by one answer.

use crate::execute::OpenExport;
use crate::handshake::{Agreement, ExportInfo, Handshake, Progress};
use crate::handshake_error::HandshakeError;
use crate::protection::TlsOffer;
use crate::request::RequestError;
use crate::server::NbdTls;
use crate::stats::{Counters, Stage};
use crate::stream::Stream;
use crate::transmission::Transmission;
use bytes::BytesMut;
use ogee_client::BlockDevice;
use ogee_common::limits::NBD_LINGER;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

/// Asked for at least, so that a client's first options come with one read, and what is in the clear behind STARTTLS is seen.
/// What is not seen goes into the TLS handshake, which it breaks.
const HANDSHAKE_READ_BYTES: usize = 1024;

/// Why a connection ended otherwise than the client or a stop wanted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// The handshake broke the protocol.
    #[error("handshake")]
    Handshake(#[from] HandshakeError),
    /// The client was told that TLS is demanded, and left.
    #[error("the client began no TLS, which is demanded here")]
    NoTls,
    /// TLS did not come about.
    #[error("TLS handshake")]
    Tls(#[source] io::Error),
    /// It took too long.
    #[error("handshake not over within {} s", limit.as_secs())]
    HandshakeTimeout {
        /// The limit.
        limit: Duration,
    },
    /// A request broke the protocol.
    #[error("transmission")]
    Request(#[from] RequestError),
    /// The client closed the connection within a message.
    #[error("the client closed the connection in the middle of a message")]
    Truncated,
    /// The client cut it and left requests behind, which it may have repeated elsewhere.
    #[error("the client cut the connection; {requests} requests that it left in the socket are not carried out")]
    Cut {
        /// How many.
        requests: usize,
    },
    /// The socket.
    #[error("{verb}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn io_error(verb: &'static str) -> impl FnOnce(io::Error) -> ConnectionError {
    move |source| ConnectionError::Io { verb, source }
}

/// What the connections of one thread share.
#[derive(Debug)]
pub(crate) struct Thread<D> {
    /// The exports; the index is that of an [`Agreement`].
    pub(crate) exports: Vec<OpenExport<D>>,
    /// Name and description of each; size as of the start.
    pub(crate) infos: Vec<ExportInfo>,
    pub(crate) handshake_timeout: Duration,
    /// Certificates, and who must use them.
    pub(crate) tls: Option<NbdTls>,
    pub(crate) counters: Arc<Counters>,
    /// True when the server stops.
    pub(crate) stop: watch::Receiver<bool>,
}

impl<D: BlockDevice> Thread<D> {
    /// What a client that comes now is told: volumes grow.
    fn infos_now(&self) -> Vec<ExportInfo> {
        let sizes = self.exports.iter().map(|export| export.device.info().size_bytes);
        self.infos.iter().zip(sizes).map(|(info, size_bytes)| ExportInfo { size_bytes, ..info.clone() }).collect()
    }
}

/// Serves one client until it, an error or a stop ends the connection.
pub(crate) async fn serve<D: BlockDevice>(mut stream: Stream, thread: &Thread<D>, peer: &str) {
    tracing::debug!(target: "controlpath", peer, "NBD client connected");
    thread.counters.connected();
    match run(&mut stream, thread, peer).await {
        Ok(()) => tracing::debug!(target: "controlpath", peer, "NBD client left"),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            tracing::warn!(target: "controlpath", peer, "NBD connection closed: {error}{cause}");
        }
    }
    linger(&mut stream).await;
    thread.counters.disconnected();
}

async fn run<D: BlockDevice>(stream: &mut Stream, thread: &Thread<D>, peer: &str) -> Result<(), ConnectionError> {
    let infos = thread.infos_now();
    let mut stop = thread.stop.clone();
    let limit = thread.handshake_timeout;
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(limit, shake_hands(stream, &infos, thread)) => {
            shaken.map_err(|_| ConnectionError::HandshakeTimeout { limit }).flatten()
        }
        // The sender is gone: the server is, too.
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
    };
    let shaken = shaken.inspect_err(|error| {
        let is_tls = matches!(error, ConnectionError::Tls(_));
        thread.counters.failed(if is_tls { Stage::Tls } else { Stage::Handshake });
    })?;
    let Some((agreed, input)) = shaken else { return Ok(()) };
    let name = &infos[agreed.export].name;
    let tls = stream.is_tls();
    tracing::info!(target: "controlpath", peer, export = name, framing = ?agreed.framing, tls, "NBD client attached");
    let transmission = Transmission::new(stream, agreed, input, &thread.counters);
    let ended = transmission.run(&thread.exports[agreed.export], stop).await;
    ended.inspect_err(|_| thread.counters.failed(Stage::Transmission))
}

/// Negotiates; `None` if the client went.
async fn shake_hands<D: BlockDevice>(
    stream: &mut Stream,
    infos: &[ExportInfo],
    thread: &Thread<D>,
) -> Result<Option<(Agreement, BytesMut)>, ConnectionError> {
    let tls = thread.tls.as_ref();
    let offer = tls.map_or(TlsOffer::Absent, |tls| tls.mode.offer(stream.is_clear_tcp()));
    let mut handshake = Handshake::new(offer);
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    Handshake::greet(&mut output);
    loop {
        send(stream, &mut output).await?;
        match handshake.advance(infos, &mut input, &mut output)? {
            Progress::Replied => {}
            Progress::NeedBytes(more) => {
                input.reserve(more.max(HANDSHAKE_READ_BYTES));
                let received = stream.read_buf(&mut input).await.map_err(io_error("receive handshake"))?;
                if received == 0 {
                    return match (handshake.lacks_tls(), input.is_empty()) {
                        (true, _) => Err(ConnectionError::NoTls),
                        (false, true) => Ok(None),
                        (false, false) => Err(ConnectionError::Truncated),
                    };
                }
            }
            Progress::StartTls => {
                send(stream, &mut output).await?;
                // What came in the clear is gone with its buffer, whatever it was.
                input = BytesMut::new();
                let certificates = &tls.expect("it was offered").certificates;
                stream.start_tls(certificates).await.map_err(ConnectionError::Tls)?;
                thread.counters.tls_begun();
            }
            Progress::Aborted => {
                // Some clients close without reading this.
                let _ = send(stream, &mut output).await;
                return if handshake.lacks_tls() { Err(ConnectionError::NoTls) } else { Ok(None) };
            }
            Progress::Transmission(agreed) => {
                send(stream, &mut output).await?;
                return Ok(Some((agreed, input)));
            }
        }
    }
}

async fn send(stream: &mut Stream, output: &mut BytesMut) -> Result<(), ConnectionError> {
    if output.is_empty() {
        return Ok(());
    }
    stream.write_all_buf(output).await.map_err(io_error("send handshake"))?;
    stream.flush().await.map_err(io_error("send handshake"))
}

/// Says that nothing more will come, and waits a moment for the client to close: a socket that is closed with unread
/// input is reset, which could take the last replies with it.
async fn linger(stream: &mut Stream) {
    let until_closed = async {
        stream.shutdown().await?;
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // However this ends, the connection is over.
    let _ = tokio::time::timeout(NBD_LINGER, until_closed).await;
}
