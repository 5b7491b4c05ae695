//! The network seam: nothing outside this module names `tokio::net`. A simulation swaps these types for its own.
//!
//! [`Network`] says how this process reaches others and who may reach it: plainly, or by TLS 1.3 with a certificate on
//! both sides ([`tls`]). Invariants: once a certificate is configured, no byte of a plain connection from or to another
//! host is given to anybody; loopback is plain unless asked for otherwise; both ends come to the same decision, because
//! both look at the address of their peer alone. Absent: routing, retries, what is said on a connection.

mod certificates;
mod channel;
mod serve;
mod stream;
mod tls;
mod wire;

pub use certificates::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsError};
pub use channel::channel;
pub use serve::{ClientProof, ServerTls, ServerTlsStream, TlsRefused};
pub use stream::{Peer, ReadHalf, Stream, WriteHalf};
pub use wire::{Connecting, Pipe, Port, Wire, use_wire};
pub use tls::TlsConfig;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tls::{Server, Tls};

/// A listening socket.
#[derive(Debug)]
pub struct Listener(Listening);

#[derive(Debug)]
enum Listening {
    Socket(tokio::net::TcpListener),
    Wire { port: Box<dyn Port>, addr: SocketAddr },
}

impl Listener {
    /// The address it listens on.
    ///
    /// # Errors
    /// The error of the socket call.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Listening::Socket(listener) => listener.local_addr(),
            Listening::Wire { addr, .. } => Ok(*addr),
        }
    }
}

impl From<tokio::net::TcpListener> for Listener {
    fn from(listener: tokio::net::TcpListener) -> Self {
        Self(Listening::Socket(listener))
    }
}

/// A client that connected must have shown its certificate within this time.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a connection is for. Told by ALPN under TLS, else by the first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// Frames of the data protocol.
    Data,
    /// gRPC.
    Control,
}

/// How connections of this process are made and taken. Clones share certificates.
#[derive(Debug, Clone, Default)]
pub struct Network {
    tls: Option<Arc<Tls>>,
}

impl Network {
    /// With TLS if there is a configuration; its files are read and checked now, and again when they change.
    ///
    /// # Errors
    /// [`TlsError`] names the file that is of no use.
    pub fn new(config: Option<&TlsConfig>) -> Result<Self, TlsError> {
        let tls = config.map(|c| Tls::load(c).map(Arc::new)).transpose()?;
        Ok(Self { tls })
    }

    /// The TLS to use with a peer; `None`: plain.
    fn tls_with(&self, peer: SocketAddr) -> Option<&Tls> {
        self.tls.as_deref().filter(|tls| tls.covers_loopback() || !peer.ip().to_canonical().is_loopback())
    }

    /// Connects to an address, with TCP_NODELAY. Under TLS the peer's certificate must name the address.
    ///
    /// # Errors
    /// The error of the socket call; `InvalidData` when the peer's certificate is refused or it speaks no TLS.
    pub async fn connect(&self, addr: SocketAddr, plane: Plane) -> io::Result<Stream> {
        self.connect_as(addr, Server::Address(addr.ip()), plane).await
    }

    /// Connects to `host:port`. A certificate must name the host as it is written here, a name or an address.
    ///
    /// # Errors
    /// As [`Network::connect`]; also when the name is unknown.
    pub async fn connect_host(&self, host: &str, plane: Plane) -> io::Result<Stream> {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
        let server = name.parse().map_or_else(|_| Server::Name(name.to_owned()), Server::Address);
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{name} has no address"));
        for addr in tokio::net::lookup_host(host).await? {
            match self.connect_as(addr, server.clone(), plane).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_as(&self, addr: SocketAddr, server: Server, plane: Plane) -> io::Result<Stream> {
        if let Some(wire) = wire::current() {
            return Ok(Stream::wire(wire.connect(addr).await?));
        }
        let stream = tokio::net::TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        match self.tls_with(addr) {
            None => Ok(Stream::plain(stream)),
            Some(tls) => tls.connect(stream, server, plane).await,
        }
    }

    /// Makes an accepted connection usable: under TLS the client shows its certificate first. Run it on the connection's
    /// own task, because the client decides how long it takes (at most five seconds).
    ///
    /// # Errors
    /// The connection is of no use: a client of another host without TLS, or without a certificate of our authority.
    pub async fn admit(&self, accepted: Accepted) -> io::Result<Stream> {
        let stream = match accepted.stream {
            Incoming::Socket(stream) => stream,
            Incoming::Wire(pipe) => return Ok(Stream::wire(pipe)),
        };
        let Some(tls) = self.tls_with(accepted.addr) else { return Ok(Stream::plain(stream)) };
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
            Ok(admitted) => admitted,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time")),
        }
    }
}

/// A connection on which nothing was said yet; see [`Network::admit`].
#[derive(Debug)]
pub struct Accepted {
    stream: Incoming,
    addr: SocketAddr,
}

#[derive(Debug)]
enum Incoming {
    Socket(tokio::net::TcpStream),
    Wire(Box<dyn Pipe>),
}

impl Accepted {
    /// Who connected.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The same socket once more, by which a test can shut it down under its owner.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn second_descriptor(&self) -> io::Result<std::net::TcpStream> {
        use std::os::fd::AsFd;
        match &self.stream {
            Incoming::Socket(stream) => stream.as_fd().try_clone_to_owned().map(Into::into),
            Incoming::Wire(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Listens on `addr`; port 0 picks a free one.
///
/// # Errors
/// The error of the socket call.
pub async fn listen(addr: SocketAddr) -> io::Result<Listener> {
    match wire::current() {
        None => Ok(tokio::net::TcpListener::bind(addr).await?.into()),
        Some(wire) => Ok(Listener(Listening::Wire { port: wire.listen(addr)?, addr })),
    }
}

/// Accepts one connection, with TCP_NODELAY.
///
/// # Errors
/// The error of the socket call.
pub async fn accept(listener: &Listener) -> io::Result<Accepted> {
    match &listener.0 {
        Listening::Socket(listener) => {
            let (stream, addr) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Accepted { stream: Incoming::Socket(stream), addr })
        }
        Listening::Wire { port, .. } => {
            let (pipe, addr) = std::future::poll_fn(|cx| port.poll_accept(cx)).await?;
            Ok(Accepted { stream: Incoming::Wire(pipe), addr })
        }
    }
}
