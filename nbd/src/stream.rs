//! A client's connection, TCP or UNIX, in the clear or under TLS, as one type.
//!
//! Made by `server.rs`, used by `connection.rs`. These are sockets to clients on this host or near it, not of the
//! cluster's own network. Invariants: TCP connections have NODELAY, because replies are batched here, and keepalive,
//! so that a client whose machine died does not hold a connection for hours; once TLS has begun no byte goes or comes in
//! the clear. What was written may stay here until it is flushed.

use ogee_common::limits::{NBD_KEEPALIVE, NBD_KEEPALIVE_INTERVAL, NBD_READ_BYTES, NBD_UNIX_SEND_BYTES};
use ogee_proto::net::{ServerTls, ServerTlsStream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// An accepted connection that no runtime knows yet.
#[derive(Debug)]
pub(crate) enum Accepted {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Accepted {
    /// Hands the connection to the runtime that is running.
    pub(crate) fn register(self) -> io::Result<Stream> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                let keepalive = TcpKeepalive::new().with_time(NBD_KEEPALIVE).with_interval(NBD_KEEPALIVE_INTERVAL);
                SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
                stream.set_nonblocking(true)?;
                Ok(Socket::Tcp(TcpStream::from_std(stream)?).into())
            }
            Self::Unix(stream) => {
                // Past the system's limit if we may, else up to it. Without either all works, in smaller pieces.
                if set_socket_send_buffer_size_force(&stream, NBD_UNIX_SEND_BYTES).is_err() {
                    let _ = SockRef::from(&stream).set_send_buffer_size(NBD_UNIX_SEND_BYTES);
                }
                stream.set_nonblocking(true)?;
                Ok(Socket::Unix(UnixStream::from_std(stream)?).into())
            }
        }
    }
}

/// A socket of the running runtime.
#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

#[derive(Debug)]
enum Kind {
    Clear(Socket),
    /// TLS reads 4 KiB at a time; the buffer makes fewer calls of it.
    Tls(Box<ServerTlsStream<BufReader<Socket>>>),
    /// A TLS handshake that was given up has taken the socket with it.
    Gone,
}

/// A connection of the running runtime.
#[derive(Debug)]
pub(crate) struct Stream(Kind);

impl From<Socket> for Stream {
    fn from(socket: Socket) -> Self {
        Self(Kind::Clear(socket))
    }
}

impl Stream {
    /// Whether it is TCP, and still in the clear.
    pub(crate) const fn is_clear_tcp(&self) -> bool {
        matches!(self.0, Kind::Clear(Socket::Tcp(_)))
    }

    /// Whether TLS has begun.
    pub(crate) const fn is_tls(&self) -> bool {
        matches!(self.0, Kind::Tls(_))
    }

    /// Shakes hands for TLS. The client decides how long that takes; if this future is dropped, the socket is.
    ///
    /// # Errors
    /// Why the client is not let in; the connection is good for nothing but to be shut down.
    pub(crate) async fn start_tls(&mut self, tls: &ServerTls) -> io::Result<()> {
        let Kind::Clear(socket) = std::mem::replace(&mut self.0, Kind::Gone) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let buffered = BufReader::with_capacity(NBD_READ_BYTES, socket);
        match Box::pin(tls.accept(buffered)).await {
            Ok(stream) => {
                self.0 = Kind::Tls(Box::new(stream));
                Ok(())
            }
            Err(refused) => {
                self.0 = Kind::Clear(refused.io.into_inner());
                Err(refused.error)
            }
        }
    }

    /// Whether the client has closed the connection in both directions. On a UNIX socket this is so from the moment it did; over TCP once
    /// its packets are here. A client that only says no more (half a close) still waits for answers: that is no cut.
    pub(crate) fn is_cut(&self) -> bool {
        let socket = match &self.0 {
            Kind::Clear(socket) => socket,
            Kind::Tls(stream) => stream.get_ref().0.get_ref(),
            Kind::Gone => return true,
        };
        let fd = match socket {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Nothing is asked for: HUP and ERR are always told. A failed call says nothing.
        let mut look = [PollFd::from_borrowed_fd(fd, PollFlags::empty())];
        poll(&mut look, Some(&now)).is_ok_and(|told| told > 0)
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Clear(socket) => Pin::new(socket).poll_read(cx, buf),
            // The end without the alert that announces it: NBD has an end of its own, and a message that is cut short
            // is found here as on a connection in the clear.
            Kind::Tls(stream) => Pin::new(stream).poll_read(cx, buf).map(|read| match read {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
                other => other,
            }),
            Kind::Gone => Poll::Ready(Ok(())),
        }
    }
}

/// Calls a poll function of whatever is inside.
macro_rules! inside {
    ($self:expr, $call:ident($($argument:expr),*), gone $gone:expr) => {
        match &mut $self.get_mut().0 {
            Kind::Clear(socket) => Pin::new(socket).$call($($argument),*),
            Kind::Tls(stream) => Pin::new(stream).$call($($argument),*),
            Kind::Gone => Poll::Ready($gone),
        }
    };
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        inside!(self, poll_write(cx, buf), gone Err(io::ErrorKind::NotConnected.into()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        inside!(self, poll_write_vectored(cx, bufs), gone Err(io::ErrorKind::NotConnected.into()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inside!(self, poll_flush(cx), gone Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inside!(self, poll_shutdown(cx), gone Ok(()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
