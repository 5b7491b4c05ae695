//! An NBD export at a UNIX socket as the target of a load.
//!
//! Any server will do: `ogee nbd serve`, or another program to compare it with; both see the same client. Each job has a
//! connection of its own, with simple replies. Invariants: all requests of one turn of the job's loop go out together, as far
//! as the socket takes them, and all answers that are there are taken at once; a server that is gone or breaks the protocol
//! fails every IO for good, so no load waits for ever. Absent: TCP, TLS, structured replies.

mod link;

use super::target::{IoBuffer, Source, Target, TargetError};
use crate::error::{CliError, ErrorKind};
use link::{Link, Request};
use ogee_nbd::client::{self, ClientError, Negotiated};
use ogee_nbd::wire::command;
use std::cell::RefCell;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::net::UnixStream;

/// A server that is silent for this long while it is connected to is none.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// IOs from this size on are received where they belong; of the one whose head came behind another, the first
/// [`INPUT_BYTES_LARGE`] are copied.
const LARGE_BYTES: usize = 32 << 10;
/// What is received at once for large IOs besides the data.
const INPUT_BYTES_LARGE: usize = 4 << 10;
/// The same for small ones: many answers with their data.
const INPUT_BYTES_SMALL: usize = 128 << 10;

/// An export that can be connected to.
#[derive(Debug, Clone)]
pub(crate) struct NbdSource {
    socket: PathBuf,
    export: String,
    size_bytes: u64,
    io_bytes: usize,
}

impl NbdSource {
    /// Connects once, to learn the size; `io_bytes` is what most IOs have.
    ///
    /// # Errors
    /// Nobody serves the socket, or not this export, or not NBD.
    pub(crate) fn connect(socket: &Path, export: &str, io_bytes: usize) -> Result<Self, CliError> {
        let (_, Negotiated { size_bytes, .. }) = connect(socket, export)?;
        Ok(Self { socket: socket.to_owned(), export: export.to_owned(), size_bytes, io_bytes })
    }
}

fn connect(socket: &Path, export: &str) -> Result<(std::os::unix::net::UnixStream, Negotiated), CliError> {
    client::connect(socket, export, HANDSHAKE_LIMIT).map_err(|error| {
        let kind = match &error {
            ClientError::Io { .. } => ErrorKind::Unavailable,
            ClientError::Refused { .. } => ErrorKind::NotFound,
            ClientError::Protocol { .. } => ErrorKind::Failure,
        };
        CliError::caused(kind, format!("load {}", socket.display()), error)
    })
}

impl Source for NbdSource {
    type Target = NbdTarget;

    fn name(&self) -> String {
        self.socket.display().to_string()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn open(&self) -> Result<NbdTarget, CliError> {
        let (stream, _) = connect(&self.socket, &self.export)?;
        let input_bytes = if self.io_bytes < LARGE_BYTES { INPUT_BYTES_SMALL } else { INPUT_BYTES_LARGE };
        NbdTarget::new(stream, input_bytes)
            .map_err(|e| CliError::caused(ErrorKind::Failure, format!("watch {}", self.socket.display()), e))
    }
}

#[derive(Debug)]
struct State {
    link: Link,
    driver: Option<Waker>,
    /// Set once the connection is of no use any more.
    broken: Option<String>,
}

impl State {
    fn fail_all(&mut self, why: &dyn Error) {
        self.broken.get_or_insert_with(|| why.to_string());
        self.link.wake_all();
    }
}

/// Why the connection is of no use any more.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("the server closed the connection")]
    Gone,
    #[error("{verb}: {source}")]
    Io {
        verb: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Protocol(#[from] link::ProtocolError),
}

fn fault(verb: &'static str) -> impl FnOnce(io::Error) -> Fault {
    move |source| Fault::Io { verb, source }
}

/// The connection is of no use any more.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(String);

/// An answer with an error (proto.md, "Error values").
#[derive(Debug, thiserror::Error)]
#[error("the server answered with error {errno}")]
struct Refused {
    errno: u32,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct NbdTarget {
    stream: UnixStream,
    state: RefCell<State>,
}

impl NbdTarget {
    fn new(stream: std::os::unix::net::UnixStream, input_bytes: usize) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(stream)?;
        let state = State { link: Link::new(input_bytes), driver: None, broken: None };
        Ok(Self { stream, state: RefCell::new(state) })
    }

    /// Sends a request and waits for its answer. `data` is lent to the connection meanwhile.
    async fn request(&self, request: Request, data: &mut Vec<u8>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let place = {
            let mut state = self.state.borrow_mut();
            if let Some(broken) = &state.broken {
                return Err(Box::new(Broken(broken.clone())));
            }
            let place = state.link.submit(request, std::mem::take(data));
            if let Some(driver) = state.driver.take() {
                driver.wake();
            }
            place
        };
        let answer = poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if let Some((errno, back)) = state.link.take(place) {
                *data = back;
                return Poll::Ready(Ok(errno));
            }
            if let Some(broken) = &state.broken {
                return Poll::Ready(Err(Broken(broken.clone())));
            }
            state.link.wait(place, cx.waker());
            Poll::Pending
        });
        match answer.await? {
            0 => Ok(()),
            errno => Err(Box::new(Refused { errno })),
        }
    }

    /// One turn: sends and receives until both would wait. Never ready.
    fn poll_turn(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.borrow_mut();
        state.driver = Some(cx.waker().clone());
        if state.broken.is_none()
            && let Err(fault) = self.send(&mut state.link, cx).and_then(|()| self.receive(&mut state.link, cx))
        {
            state.fail_all(&fault);
        }
        Poll::Pending
    }

    fn send(&self, link: &mut Link, cx: &mut Context<'_>) -> Result<(), Fault> {
        while link.has_output() {
            let sent = self.stream.try_write_vectored(&link.output());
            match sent {
                Ok(bytes) => link.sent(bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.stream.poll_write_ready(cx) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(ready) => ready.map_err(fault("send requests"))?,
                },
                Err(error) => return Err(fault("send requests")(error)),
            }
        }
        Ok(())
    }

    fn receive(&self, link: &mut Link, cx: &mut Context<'_>) -> Result<(), Fault> {
        loop {
            let received = self.stream.try_read_vectored(&mut link.space());
            match received {
                Ok(0) => return Err(Fault::Gone),
                Ok(bytes) => link.received(bytes)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.stream.poll_read_ready(cx) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(ready) => ready.map_err(fault("receive replies"))?,
                },
                Err(error) => return Err(fault("receive replies")(error)),
            }
        }
    }

    fn error(&self, verb: &'static str, offset: u64, len: u64, source: Box<dyn Error + Send + Sync>) -> TargetError {
        let is_final = self.state.borrow().broken.is_some();
        TargetError { is_final, verb, offset, len, source }
    }
}

impl Drop for NbdTarget {
    fn drop(&mut self) {
        if self.state.get_mut().link.is_idle() {
            // A farewell; a server that does not hear it sees the end of the connection.
            let _ = self.stream.try_write(&Request::DISCONNECT.head(0));
        }
    }
}

/// Memory of one IO; the connection has it while the IO is in flight.
#[derive(Debug)]
pub(crate) struct NbdBuffer(Vec<u8>);

impl IoBuffer for NbdBuffer {
    fn fill(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn contents(&mut self) -> &[u8] {
        &self.0
    }
}

fn length(len: u64) -> u32 {
    u32::try_from(len).expect("an IO is bounded by IO_BYTES_MAX")
}

impl Target for NbdTarget {
    type Buffer = NbdBuffer;

    fn buffer(&self, len: usize) -> Result<NbdBuffer, TargetError> {
        Ok(NbdBuffer(vec![0; len]))
    }

    async fn read(&self, offset: u64, len: usize, buffer: &mut NbdBuffer) -> Result<(), TargetError> {
        let request = Request { kind: command::READ, offset, len: length(len as u64) };
        let done = self.request(request, &mut buffer.0).await;
        done.map_err(|e| self.error("read", offset, len as u64, e))
    }

    async fn write(&self, offset: u64, len: usize, buffer: &mut NbdBuffer) -> Result<(), TargetError> {
        let request = Request { kind: command::WRITE, offset, len: length(len as u64) };
        let done = self.request(request, &mut buffer.0).await;
        done.map_err(|e| self.error("write", offset, len as u64, e))
    }

    async fn flush(&self) -> Result<(), TargetError> {
        let request = Request { kind: command::FLUSH, offset: 0, len: 0 };
        let done = self.request(request, &mut Vec::new()).await;
        done.map_err(|e| self.error("flush", 0, 0, e))
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let request = Request { kind: command::TRIM, offset, len: length(len) };
        let done = self.request(request, &mut Vec::new()).await;
        done.map_err(|e| self.error("discard", offset, len, e))
    }

    async fn drive(&self) {
        poll_fn(|cx| self.poll_turn(cx)).await;
    }
}

#[cfg(test)]
mod tests;
