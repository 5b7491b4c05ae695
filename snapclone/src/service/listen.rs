//! Where the APIs listen, and serving HTTP/1.1 there: on TCP, with TLS if wished, or on a UNIX socket.
//!
//! Invariants: at most [`API_CONNECTIONS_MAX`] connections are served at once, more wait in the kernel's queue; a client that does not send the head of its
//! request in time is let go of; when an instance ends no new connection is taken, and requests under way get
//! [`API_SHUTDOWN_TIMEOUT`]. What is served is the router's business.

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ogee_common::limits::{API_CONNECTIONS_MAX, API_HEAD_BYTES_MAX, API_HEAD_TIMEOUT, API_SHUTDOWN_TIMEOUT};
use ogee_proto::net::{ClientProof, ServerTls, TlsError};
use ogee_proto::unix_socket::{BoundSocket, SocketError};
use serde::Deserialize;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

/// Who may connect to a UNIX socket: its owner and its group.
const SOCKET_MODE: u32 = 0o660;
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// An address: `ip:port` or `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum ListenAddr {
    /// TCP.
    Tcp(SocketAddr),
    /// A UNIX socket.
    Unix(PathBuf),
}

impl TryFrom<String> for ListenAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if Path::new(path).is_absolute() => Ok(Self::Unix(path.into())),
            _ => text.parse().map(Self::Tcp).map_err(|_| format!("{text:?} is no address; write ip:port or unix:/path")),
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ListenAddr {
    /// Whether only this host can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(addr) => addr.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

/// A listener that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken, or not one of this host.
    #[error("listen on {addr}")]
    Tcp {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("make the socket")]
    Unix(#[from] SocketError),
    /// The certificates are of no use.
    #[error("set TLS of the API up")]
    Tls(#[from] TlsError),
}

enum Socket {
    Tcp(TcpListener, Option<ServerTls>),
    Unix(UnixListener, #[allow(dead_code, reason = "removes the socket when dropped")] BoundSocket),
}

/// A listener.
pub(super) struct Door(Socket);

impl Door {
    /// Listens. Must be called within a runtime.
    ///
    /// # Errors
    /// [`ListenError`].
    pub(super) fn open(addr: &ListenAddr, tls_dir: Option<&Path>) -> Result<Self, ListenError> {
        match addr {
            ListenAddr::Tcp(addr) => {
                let tls = tls_dir.map(|dir| ServerTls::load(dir, ClientProof::Nothing)).transpose()?;
                let fail = |source| ListenError::Tcp { addr: *addr, source };
                let listener = std::net::TcpListener::bind(addr).map_err(fail)?;
                listener.set_nonblocking(true).map_err(fail)?;
                Ok(Self(Socket::Tcp(TcpListener::from_std(listener).map_err(fail)?, tls)))
            }
            ListenAddr::Unix(path) => {
                let (bound, listener) = BoundSocket::bind(path, Some(SOCKET_MODE))?;
                let fail = |source| SocketError::Io { verb: "listen on", path: path.clone(), source };
                listener.set_nonblocking(true).map_err(fail)?;
                Ok(Self(Socket::Unix(UnixListener::from_std(listener).map_err(fail)?, bound)))
            }
        }
    }

    /// Serves until told to stop, and then what is under way.
    pub(super) async fn serve(self, router: Router, mut stop: watch::Receiver<bool>) {
        let slots = Arc::new(Semaphore::new(API_CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        let (listening, tls) = match self.0 {
            Socket::Tcp(listener, tls) => (Listening::Tcp(listener), tls.map(Arc::new)),
            Socket::Unix(listener, bound) => (Listening::Unix(listener, bound), None),
        };
        loop {
            while connections.try_join_next().is_some() {}
            let next = async {
                let slot = slots.clone().acquire_owned().await;
                (slot, listening.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                () = stopped(&mut stop) => break,
                next = next => next,
            };
            let (router, stop, tls) = (router.clone(), stop.clone(), tls.clone());
            match accepted {
                Ok(Accepted::Tcp(stream)) => connections.spawn(async move {
                    let _slot = slot;
                    match tls {
                        None => talk(stream, router, stop).await,
                        Some(tls) => match tokio::time::timeout(API_HEAD_TIMEOUT, tls.accept(stream)).await {
                            Ok(Ok(stream)) => talk(stream, router, stop).await,
                            Ok(Err(refused)) => tracing::debug!(target: "controlpath", error = %refused.error, "a client was refused"),
                            Err(_) => tracing::debug!(target: "controlpath", "no TLS handshake in time"),
                        },
                    }
                }),
                Ok(Accepted::Unix(stream)) => connections.spawn(async move {
                    let _slot = slot;
                    talk(stream, router, stop).await;
                }),
                Err(error) => {
                    tracing::warn!(target: "controlpath", %error, "accept a connection to the API");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
        }
        drop(listening);
        let ended = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(API_SHUTDOWN_TIMEOUT, ended).await.is_err() {
            tracing::warn!(target: "controlpath", "requests that did not end in time are cut off");
        }
    }
}

enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener, #[allow(dead_code, reason = "removes the socket when dropped")] BoundSocket),
}

enum Accepted {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

impl Listening {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream))
            }
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

/// Waits until told to stop, or for ever if nobody is left to tell.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // The sender is gone only when the instance has ended.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn talk<IO: AsyncRead + AsyncWrite + Unpin>(io: IO, router: Router, mut stop: watch::Receiver<bool>) {
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| router.clone().oneshot(request));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(API_HEAD_TIMEOUT).max_buf_size(API_HEAD_BYTES_MAX);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(io), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(target: "controlpath", %error, "a connection to the API ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_and_sockets_are_local() {
        let read = |text: &str| ListenAddr::try_from(text.to_owned());
        for local in ["127.0.0.1:5555", "[::1]:80", "unix:/run/x.sock", "[::ffff:127.0.0.1]:1"] {
            let addr = read(local).expect(local);
            assert!(addr.is_local(), "{local}");
        }
        for open in ["0.0.0.0:5555", "10.0.0.1:80", "[::]:80"] {
            assert!(!read(open).expect(open).is_local(), "{open}");
        }
        for bad in ["", "5555", "localhost", "unix:relative", "unix:"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(read("unix:/a").expect("a socket").to_string(), "unix:/a");
    }
}
