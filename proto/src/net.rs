//! The network seam: nothing outside this module names `tokio::net`. A simulation swaps these types for its own.

use std::io;
use std::net::SocketAddr;

/// A connected stream.
pub type Stream = tokio::net::TcpStream;
/// A listening socket.
pub type Listener = tokio::net::TcpListener;

/// Connects with TCP_NODELAY.
///
/// # Errors
/// The error of the socket call.
pub async fn connect(addr: SocketAddr) -> io::Result<Stream> {
    let stream = Stream::connect(addr).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens on `addr`; port 0 picks a free one.
///
/// # Errors
/// The error of the socket call.
pub async fn listen(addr: SocketAddr) -> io::Result<Listener> {
    Listener::bind(addr).await
}

/// Accepts one connection, with TCP_NODELAY.
///
/// # Errors
/// The error of the socket call.
pub async fn accept(listener: &Listener) -> io::Result<(Stream, SocketAddr)> {
    let (stream, addr) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, addr))
}
