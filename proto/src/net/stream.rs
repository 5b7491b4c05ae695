//! [`Stream`]: a connection, plain or under TLS, and its two halves.

use super::{Pipe, Plane};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::TlsStream;

/// What is known of who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Nothing: the connection is plain.
    Unverified,
    /// It has a certificate of our authority that is good for clients alone.
    Client,
    /// It has a certificate of our authority that is good for servers: a daemon of the cluster.
    Daemon,
}

#[derive(Debug)]
enum Kind {
    Plain(TcpStream),
    Tls { stream: Box<TlsStream<TcpStream>>, plane: Plane },
    Wire(Box<dyn Pipe>),
}

/// A connected stream. What was written may stay in it until it is flushed.
#[derive(Debug)]
pub struct Stream {
    kind: Kind,
    peer: Peer,
}

impl Stream {
    pub(super) fn plain(stream: TcpStream) -> Self {
        Self { kind: Kind::Plain(stream), peer: Peer::Unverified }
    }

    pub(super) fn wire(pipe: Box<dyn Pipe>) -> Self {
        Self { kind: Kind::Wire(pipe), peer: Peer::Unverified }
    }

    pub(super) fn tls(stream: TlsStream<TcpStream>, plane: Plane, peer: Peer) -> Self {
        Self { kind: Kind::Tls { stream: Box::new(stream), plane }, peer }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// What the peer is going to speak: it waits for its first byte, which stays unread, unless TLS has told already.
    /// `None` when it said nothing and closed.
    ///
    /// # Errors
    /// Errors of the socket.
    pub async fn plane(&mut self) -> io::Result<Option<Plane>> {
        const FRAME_BYTE: u8 = crate::data::MAGIC.to_le_bytes()[0];
        match &mut self.kind {
            Kind::Tls { plane, .. } => Ok(Some(*plane)),
            Kind::Wire(pipe) => {
                let first = std::future::poll_fn(|cx| pipe.poll_first(cx)).await?;
                Ok(first.map(|byte| if byte == FRAME_BYTE { Plane::Data } else { Plane::Control }))
            }
            Kind::Plain(stream) => {
                let mut first = [0];
                let read = stream.peek(&mut first).await?;
                let plane = if first[0] == FRAME_BYTE { Plane::Data } else { Plane::Control };
                Ok((read == 1).then_some(plane))
            }
        }
    }

    /// Both directions, for two tasks.
    #[must_use]
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        match self.kind {
            Kind::Plain(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Plain(read), WriteHalf::Plain(write))
            }
            Kind::Tls { stream, .. } => {
                let (read, write) = tokio::io::split(stream);
                (ReadHalf::Tls(read), WriteHalf::Tls(write))
            }
            Kind::Wire(pipe) => {
                let (read, write) = tokio::io::split(pipe);
                (ReadHalf::Wire(read), WriteHalf::Wire(write))
            }
        }
    }
}

/// The receiving direction of a [`Stream`].
#[derive(Debug)]
pub enum ReadHalf {
    /// Of a plain connection.
    Plain(OwnedReadHalf),
    /// Of one under TLS.
    Tls(tokio::io::ReadHalf<Box<TlsStream<TcpStream>>>),
    /// Of one that is no socket.
    Wire(tokio::io::ReadHalf<Box<dyn Pipe>>),
}

/// The sending direction of a [`Stream`]; dropping it ends that direction.
#[derive(Debug)]
pub enum WriteHalf {
    /// Of a plain connection.
    Plain(OwnedWriteHalf),
    /// Of one under TLS.
    Tls(tokio::io::WriteHalf<Box<TlsStream<TcpStream>>>),
    /// Of one that is no socket.
    Wire(tokio::io::WriteHalf<Box<dyn Pipe>>),
}

/// Calls a poll function of whatever is inside.
macro_rules! inside {
    ($this:expr, $plain:pat => $a:expr, $tls:pat => $b:expr, $wire:pat => $c:expr, $trait:ident :: $call:ident ( $($arg:expr),* )) => {
        match $this {
            $plain => $trait::$call(Pin::new($a), $($arg),*),
            $tls => $trait::$call(Pin::new($b), $($arg),*),
            $wire => $trait::$call(Pin::new($c), $($arg),*),
        }
    };
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        inside!(self.get_mut(), Self::Plain(s) => s, Self::Tls(s) => s, Self::Wire(s) => s,
            AsyncRead::poll_read(cx, buf))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        inside!(&mut self.get_mut().kind, Kind::Plain(s) => s, Kind::Tls { stream: s, .. } => s,
            Kind::Wire(s) => s, AsyncRead::poll_read(cx, buf))
    }
}

macro_rules! write_through {
    ($type:ty, $this:ident => $inner:expr, $plain:pat => $a:expr, $tls:pat => $b:expr, $wire:pat => $c:expr) => {
        impl AsyncWrite for $type {
            fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                let $this = self.get_mut();
                inside!($inner, $plain => $a, $tls => $b, $wire => $c, AsyncWrite::poll_write(cx, buf))
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                let $this = self.get_mut();
                inside!($inner, $plain => $a, $tls => $b, $wire => $c, AsyncWrite::poll_flush(cx))
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                let $this = self.get_mut();
                inside!($inner, $plain => $a, $tls => $b, $wire => $c, AsyncWrite::poll_shutdown(cx))
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bufs: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                let $this = self.get_mut();
                inside!($inner, $plain => $a, $tls => $b, $wire => $c, AsyncWrite::poll_write_vectored(cx, bufs))
            }

            // Both kinds gather.
            fn is_write_vectored(&self) -> bool {
                true
            }
        }
    };
}

write_through!(WriteHalf, this => this, WriteHalf::Plain(s) => s, WriteHalf::Tls(s) => s, WriteHalf::Wire(s) => s);
write_through!(Stream, this => &mut this.kind, Kind::Plain(s) => s, Kind::Tls { stream: s, .. } => s, Kind::Wire(s) => s);

impl tonic::transport::server::Connected for Stream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer
    }
}
