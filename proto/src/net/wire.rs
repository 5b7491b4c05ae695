//! The other kind of wire: connections that somebody else makes, for a simulation.
//!
//! A simulation names the wire of this thread's current process before it lets that process run ([`use_wire`]); from then on
//! connections and listeners are made by it. Invariant: a thread that was never told uses sockets. Absent: any such wire.

use std::cell::RefCell;
use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection of a wire.
pub trait Pipe: AsyncRead + AsyncWrite + Send + Sync + Unpin + Debug {
    /// The first byte that was not read yet, which stays; `None` at the end.
    ///
    /// # Errors
    /// Of the connection.
    fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<u8>>>;
}

/// What becomes ready with a connection.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<Box<dyn Pipe>>> + Send>>;

/// Where connections come in.
pub trait Port: Send + Sync + Debug {
    /// The next one, and who it is.
    ///
    /// # Errors
    /// The process has no network.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Box<dyn Pipe>, SocketAddr)>>;
}

/// Makes connections for one process.
pub trait Wire: Send + Sync + Debug {
    /// Connects.
    fn connect(&self, to: SocketAddr) -> Connecting;

    /// Listens.
    ///
    /// # Errors
    /// The address is in use.
    fn listen(&self, at: SocketAddr) -> io::Result<Box<dyn Port>>;
}

thread_local! {
    static WIRE: RefCell<Option<Arc<dyn Wire>>> = const { RefCell::new(None) };
}

/// The wire of what this thread does from now on; `None`: sockets.
pub fn use_wire(wire: Option<Arc<dyn Wire>>) {
    WIRE.set(wire);
}

pub(super) fn current() -> Option<Arc<dyn Wire>> {
    WIRE.with_borrow(Clone::clone)
}
