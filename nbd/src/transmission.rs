//! The transmission phase of one connection: requests in, work in flight, replies out, all in one task.
//!
//! ```text
//!             DISC, end of input, stop                 nothing in flight, nothing to send
//!   Open ──────────────────────────────> Closing ─────────────────────────────────────────> done
//!    └── broken protocol, socket error ────^ (with the error; replies that cannot be sent are dropped)
//! ```
//!
//! Invariants: requests run concurrently and are answered in any order; what was taken from the socket is always
//! carried out to its end, also when the client is gone (`WriteOrder` of the SDK says why). Taken is what has its place in that order
//! while the client still holds the connection. A client that cuts it may repeat its requests elsewhere at once, so what it left behind in
//! the socket or in the buffer must never be carried out: the cut is looked for between taking the places and the first step, and
//! on a UNIX socket it is seen in the moment the client makes it. The bytes and requests held are
//! bounded by `NBD_CONNECTION_BYTES_MAX` and `NBD_CONNECTION_REQUESTS_MAX`, then the socket is not read; a payload is
//! a slice of the buffer that the socket was read into. A stop takes no further request: the client finds its
//! connection closed, and what is not answered was not taken.

use crate::connection::{ConnectionError, io_error};
use crate::execute::{OpenExport, Work, execute};
use crate::handshake::Agreement;
use crate::reply::{Outcome, Replies, ReplyTo};
use crate::request::{Command, RequestHead, check};
use crate::stats::{Counters, Taken};
use crate::stream::Stream;
use bytes::{Buf, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt};
use ogee_client::BlockDevice;
use ogee_common::clock;
use ogee_common::limits::{NBD_CONNECTION_BYTES_MAX, NBD_CONNECTION_REQUESTS_MAX, NBD_READ_BYTES, NBD_READ_BYTES_MAX};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::sync::watch;

/// The socket is read when this much of the buffer is free, else a new buffer is taken.
const SPARE_BYTES_MIN: usize = 4096;
/// A new buffer has space for so many writes like the last one.
const WRITES_IN_BUFFER: usize = 8;

/// A request that ended.
struct Finished {
    to: ReplyTo,
    taken: Taken,
    held: usize,
    outcome: Outcome,
}

/// A request that has its place and has not begun.
struct Fresh {
    to: ReplyTo,
    taken: Taken,
    held: usize,
    work: Work,
}

/// What the input holds.
enum Next {
    /// Work, and what to hold for it.
    Work(ReplyTo, Taken, Work),
    /// A request that was refused, or one that ends the connection, is dealt with.
    Handled,
    /// So many more bytes are needed.
    Incomplete(usize),
}

/// See the module's documentation.
pub(crate) struct Transmission<'a> {
    stream: &'a mut Stream,
    agreed: Agreement,
    input: BytesMut,
    /// Bytes of the next buffer.
    buffer_bytes: usize,
    replies: Replies,
    /// Whether something that was sent may stay in the stream (TLS).
    unflushed: bool,
    /// Payload bytes of requests in flight.
    held: usize,
    /// Set once; then nothing more is taken from the input.
    closing: Option<Result<(), ConnectionError>>,
    counters: &'a Counters,
    /// The client said DISC.
    disconnected: bool,
}

impl<'a> Transmission<'a> {
    /// `input`: what the handshake has left.
    pub(crate) fn new(stream: &'a mut Stream, agreed: Agreement, input: BytesMut, counters: &'a Counters) -> Self {
        let replies = Replies::new(agreed.framing);
        let buffer_bytes = NBD_READ_BYTES;
        Self { stream, agreed, input, buffer_bytes, replies, unflushed: false, held: 0, closing: None, counters, disconnected: false }
    }

    /// Serves until the client, an error or a stop ends it.
    pub(crate) async fn run<D: BlockDevice>(
        mut self,
        export: &OpenExport<D>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<(), ConnectionError> {
        let gone = AtomicBool::new(false);
        let mut stopped = pin!(async move {
            // The sender is gone: so is the server.
            let _ = stop.wait_for(|stop| *stop).await;
        });
        let mut in_flight = FuturesUnordered::new();
        let mut fresh: Vec<Fresh> = vec![];
        poll_fn(|cx| {
            loop {
                while let Poll::Ready(Some(Finished { to, taken, held, outcome })) = in_flight.poll_next_unpin(cx) {
                    self.held -= held;
                    self.answer(to, taken, outcome);
                }
                if self.closing.is_none() && stopped.as_mut().poll(cx).is_ready() {
                    self.closing = Some(Ok(()));
                }
                let mut progress = self.poll_send(cx);
                while self.takes_requests(in_flight.len() + fresh.len()) {
                    match self.next(export) {
                        Next::Work(to, taken, work) => {
                            let held = work.bytes();
                            self.held += held;
                            fresh.push(Fresh { to, taken, held, work });
                            progress = true;
                        }
                        Next::Handled => progress = true,
                        Next::Incomplete(missing) => {
                            if !self.poll_receive(cx, missing) {
                                break;
                            }
                            progress = true;
                        }
                    }
                }
                self.drop_if_cut(&mut fresh);
                for Fresh { to, taken, held, work } in fresh.drain(..) {
                    let work = execute(export, work, &gone);
                    in_flight.push(async move { Finished { to, taken, held, outcome: work.await } });
                }
                if matches!(self.closing, Some(Err(_))) {
                    gone.store(true, Ordering::Relaxed);
                }
                if !progress {
                    let is_sent = self.replies.bytes() == 0 && !self.unflushed;
                    let is_over = self.closing.is_some() && in_flight.is_empty() && is_sent;
                    return if is_over { Poll::Ready(()) } else { Poll::Pending };
                }
            }
        })
        .await;
        drop(in_flight);
        self.closing.take().unwrap_or(Ok(()))
    }

    fn takes_requests(&self, in_flight: usize) -> bool {
        self.closing.is_none()
            && in_flight < NBD_CONNECTION_REQUESTS_MAX
            && self.held + self.replies.bytes() < NBD_CONNECTION_BYTES_MAX
    }

    fn answer(&mut self, to: ReplyTo, taken: Taken, outcome: Outcome) {
        self.counters.end(taken, !matches!(outcome, Outcome::Failed(_)), clock::now());
        self.replies.push(to, outcome);
    }

    /// Gives up requests that were taken after the client had cut the connection, without DISC, if there are any that change something.
    fn drop_if_cut(&mut self, fresh: &mut Vec<Fresh>) {
        if fresh.iter().any(|fresh| fresh.work.is_change()) && !self.disconnected && self.stream.is_cut() {
            self.closing = Some(Err(ConnectionError::Cut { requests: fresh.len() }));
            for Fresh { taken, held, .. } in fresh.drain(..) {
                self.held -= held;
                self.counters.end(taken, false, clock::now());
            }
        }
    }

    fn close(&mut self, how: Result<(), ConnectionError>) {
        self.closing.get_or_insert(how);
    }

    /// Takes one request from the input.
    fn next<D: BlockDevice>(&mut self, export: &OpenExport<D>) -> Next {
        let head_bytes = RequestHead::bytes(self.agreed.framing);
        let head = match RequestHead::decode(self.agreed.framing, &self.input) {
            Ok(Some(head)) => head,
            Ok(None) => return Next::Incomplete(head_bytes.saturating_sub(self.input.len()).max(1)),
            Err(error) => {
                self.close(Err(error.into()));
                return Next::Handled;
            }
        };
        if head.payload_len > 0 {
            self.buffer_bytes = (WRITES_IN_BUFFER * head.payload_len).clamp(NBD_READ_BYTES, NBD_READ_BYTES_MAX);
        }
        let total = head_bytes + head.payload_len;
        if self.input.len() < total {
            return Next::Incomplete(total - self.input.len());
        }
        self.input.advance(head_bytes);
        let payload = self.input.split_to(head.payload_len).freeze();
        let to = ReplyTo { cookie: head.cookie, offset: head.offset };
        let take = || self.counters.take(head.kind, head.len, clock::now());
        match check(&head, &self.agreed) {
            Ok(Command::Disconnect) => {
                self.disconnected = true;
                self.close(Ok(()));
            }
            Ok(command) => return Next::Work(to, take(), Work::new(command, payload, &export.order)),
            Err(refusal) => {
                tracing::debug!(target: "datapath", ?head, reason = refusal.reason, "request refused");
                let taken = take();
                self.answer(to, taken, Outcome::Failed(refusal));
            }
        }
        Next::Handled
    }

    /// Reads from the socket; true if that changed anything.
    fn poll_receive(&mut self, cx: &mut Context<'_>, missing: usize) -> bool {
        let spare = self.input.capacity() - self.input.len();
        if spare < missing || spare < SPARE_BYTES_MIN {
            self.input.reserve(missing.max(self.buffer_bytes));
        }
        let received = pin!(self.stream.read_buf(&mut self.input)).poll(cx);
        match received {
            Poll::Pending => return false,
            Poll::Ready(Ok(0)) if self.input.is_empty() => self.close(Ok(())),
            Poll::Ready(Ok(0)) => self.close(Err(ConnectionError::Truncated)),
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(source)) => self.close(Err(io_error("receive requests")(source))),
        }
        true
    }

    /// Sends what there is to send; true if that changed anything.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while self.replies.bytes() > 0 {
            let sent = Pin::new(&mut *self.stream).poll_write_vectored(cx, &self.replies.slices());
            match sent {
                Poll::Pending => return progress,
                Poll::Ready(Ok(bytes)) if bytes > 0 => {
                    self.replies.sent(bytes);
                    self.unflushed = true;
                }
                Poll::Ready(other) => self.cannot_send(other.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into())),
            }
            progress = true;
        }
        if self.unflushed {
            match Pin::new(&mut *self.stream).poll_flush(cx) {
                Poll::Pending => return progress,
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => self.cannot_send(error),
            }
            progress = true;
        }
        progress
    }

    /// Nobody reads replies any more.
    fn cannot_send(&mut self, source: io::Error) {
        self.replies.clear();
        self.unflushed = false;
        self.close(Err(io_error("send replies")(source)));
    }
}
