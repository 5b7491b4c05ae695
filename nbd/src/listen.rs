//! Where the server listens: UNIX sockets, TCP, and sockets that systemd hands over.
//!
//! Called by `server.rs`. Invariants: a UNIX socket that was made here is removed at the end; one that was handed over
//! is systemd's and stays. Absent: who may connect; that is the socket's directory and mode, or the network.

use crate::stream::Accepted;
use listenfd::ListenFd;
use ogee_proto::unix_socket::{BoundSocket, SocketError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::net::{TcpListener, UnixListener};

/// One place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenOn {
    /// A UNIX socket.
    Unix {
        /// Its path; at most 107 bytes.
        path: PathBuf,
        /// Permission bits; `None`: as the umask has it.
        mode: Option<u32>,
    },
    /// A TCP address; port 0 picks a free one.
    Tcp(SocketAddr),
    /// All sockets of `LISTEN_FDS` (systemd socket activation, sd_listen_fds(3)).
    Inherited,
}

/// Why listening failed.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The UNIX socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The TCP address.
    #[error("listen on {addr}")]
    Tcp {
        /// As configured.
        addr: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Nothing was handed over.
    #[error("no socket was handed over (LISTEN_FDS)")]
    NothingInherited,
    /// What was handed over is not a listening stream socket.
    #[error("socket {index} of LISTEN_FDS is neither a TCP nor a UNIX stream socket that listens")]
    NotAListener {
        /// Counted from 0.
        index: usize,
    },
    /// A handed over socket cannot be used.
    #[error("use socket {index} of LISTEN_FDS")]
    Inherited {
        /// Counted from 0.
        index: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A socket that listens.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    /// With what removes its path.
    Unix { listener: UnixListener, _path: Option<BoundSocket> },
}

impl Listener {
    /// Listens. Needs a tokio runtime.
    pub(crate) fn open(at: &ListenOn) -> Result<Vec<Self>, ListenError> {
        match at {
            ListenOn::Unix { path, mode } => {
                let (bound, listener) = BoundSocket::bind(path, *mode)?;
                let failed = |source| SocketError::Io { verb: "listen on", path: path.clone(), source };
                listener.set_nonblocking(true).map_err(failed)?;
                let listener = UnixListener::from_std(listener).map_err(failed)?;
                Ok(vec![Self::Unix { listener, _path: Some(bound) }])
            }
            ListenOn::Tcp(addr) => {
                let failed = |source| ListenError::Tcp { addr: *addr, source };
                // Not tokio's own: that one is async without need.
                let listener = std::net::TcpListener::bind(addr).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(vec![Self::Tcp(TcpListener::from_std(listener).map_err(failed)?)])
            }
            ListenOn::Inherited => Self::inherited(),
        }
    }

    fn inherited() -> Result<Vec<Self>, ListenError> {
        let mut handed = ListenFd::from_env();
        if handed.len() == 0 {
            return Err(ListenError::NothingInherited);
        }
        (0..handed.len()).map(|index| Self::take(&mut handed, index)).collect()
    }

    fn take(handed: &mut ListenFd, index: usize) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Inherited { index, source };
        // A socket of another type is left in its place by an attempt that fails.
        if let Ok(Some(listener)) = handed.take_unix_listener(index) {
            listener.set_nonblocking(true).map_err(failed)?;
            let listener = UnixListener::from_std(listener).map_err(failed)?;
            return Ok(Self::Unix { listener, _path: None });
        }
        match handed.take_tcp_listener(index) {
            Ok(Some(listener)) => {
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self::Tcp(TcpListener::from_std(listener).map_err(failed)?))
            }
            Ok(None) | Err(_) => Err(ListenError::NotAListener { index }),
        }
    }

    /// The TCP address, for people.
    pub(crate) fn tcp_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix { .. } => None,
        }
    }

    /// The next client, and who it is.
    pub(crate) async fn accept(&self) -> io::Result<(Accepted, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Accepted::Tcp(stream.into_std()?), peer.to_string()))
            }
            Self::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let peer = pid.map_or_else(|| "unix".to_owned(), |pid| format!("unix, process {pid}"));
                Ok((Accepted::Unix(stream.into_std()?), peer))
            }
        }
    }
}
