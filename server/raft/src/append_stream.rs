//! Pipelined AppendEntries to one follower: several frames under way on the ordered connection, answers in order.
//!
//! Used by openraft's replication and heartbeat tasks through [`crate::network`]. Invariants: frames are queued on the
//! connection in the order of openraft's requests, and the follower hands them to its Raft in that order (see
//! [`crate::inbound`]); answers are yielded in the order of the frames, and the stream ends with the first error. A
//! request that exceeds a frame becomes several frames with an answer each, which openraft allows: an answer only says
//! up to where the logs match. Bounded by [`RAFT_PIPELINE_FRAMES_MAX`] and [`RAFT_PIPELINE_BYTES_MAX`].

use crate::alias::{AppendRequest, AppendResponse, RpcError};
use crate::codec::{self, AppendFrame};
use crate::links::LiveLink;
use crate::network::{PeerCall, answer, unreachable};
use crate::types::TypeConfig;
use futures_util::{Stream, StreamExt};
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{RAFT_PIPELINE_BYTES_MAX, RAFT_PIPELINE_FRAMES_MAX};
use ogee_proto::data::{Frame, Opcode};
use ogee_proto::link::LinkError;
use openraft::errors::Timeout;
use openraft::raft::StreamAppendResult;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// An answer that takes longer makes the connection suspect. A follower answers after its flush, so this is far above
/// a slow flush.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// News of what is committed waits so long for entries to travel with. It saves a frame and its answer per write and
/// follower under light load, and costs only that followers apply a little later.
const COMMIT_HOLD: Duration = Duration::from_millis(20);

type Answer = Pin<Box<dyn Future<Output = Result<Frame, LinkError>> + Send>>;
type Item = Result<StreamAppendResult<TypeConfig>, RpcError>;

struct UnderWay {
    answer: Answer,
    sent: Instant,
    frame: AppendFrame,
}

/// The stream of answers.
pub(crate) struct AppendStream<'a, S> {
    call: &'a PeerCall,
    live: LiveLink,
    /// `None` once it has ended.
    requests: Option<S>,
    /// Frames of the last request that wait for room.
    waiting: SmallVec<[AppendFrame; 1]>,
    /// A frame that says only what is committed. Never the first of a stream, so heartbeats are not held.
    held: Option<AppendFrame>,
    hold_timer: Option<Pin<Box<tokio::time::Sleep>>>,
    under_way: VecDeque<UnderWay>,
    under_way_bytes: usize,
    timer: Option<Pin<Box<tokio::time::Sleep>>>,
    failed: bool,
}

impl<'a, S> AppendStream<'a, S>
where
    S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
{
    pub(crate) fn new(call: &'a PeerCall, live: LiveLink, first: AppendRequest, requests: S) -> Self {
        Self {
            call,
            live,
            requests: Some(requests),
            waiting: codec::encode_append(first),
            held: None,
            hold_timer: None,
            under_way: VecDeque::new(),
            under_way_bytes: 0,
            timer: None,
            failed: false,
        }
    }

    fn has_room(&self) -> bool {
        self.under_way.len() < RAFT_PIPELINE_FRAMES_MAX
            && (self.under_way.is_empty() || self.under_way_bytes < RAFT_PIPELINE_BYTES_MAX)
    }

    fn send(&mut self, mut frame: AppendFrame) {
        let payload = std::mem::take(&mut frame.payload);
        let head = self.call.head(std::mem::take(&mut frame.message));
        let sent = clock::now();
        let answer = Box::pin(self.live.call(Opcode::RaftAppend, &head, payload));
        self.under_way_bytes += frame.payload_bytes;
        self.under_way.push_back(UnderWay { answer, sent, frame });
    }

    /// Sends what openraft has ready and the pipeline has room for.
    fn fill(&mut self, cx: &mut Context<'_>) {
        while self.has_room() {
            if !self.waiting.is_empty() {
                let frame = self.waiting.remove(0);
                self.send(frame);
                continue;
            }
            let Some(requests) = &mut self.requests else { return };
            match requests.poll_next_unpin(cx) {
                Poll::Ready(Some(request)) => {
                    self.waiting = codec::encode_append(request);
                    // What was held is in here too. openraft needs no answer of its own to each request.
                    self.held = if self.waiting.iter().any(|frame| frame.has_entries) { None } else { self.waiting.pop() };
                }
                Poll::Ready(None) => {
                    self.requests = None;
                    self.waiting.extend(self.held.take());
                }
                Poll::Pending => {
                    if self.poll_hold(cx).is_pending() {
                        return;
                    }
                    self.waiting.extend(self.held.take());
                }
            }
        }
    }

    /// Ready when what is held has been held long enough. The timer runs on when its frame leaves, so that it is set at
    /// most once in [`COMMIT_HOLD`].
    fn poll_hold(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.held.is_none() {
            return Poll::Pending;
        }
        let timer = self.hold_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(COMMIT_HOLD)));
        ready!(timer.as_mut().poll(cx));
        self.hold_timer = None;
        Poll::Ready(())
    }

    fn finish(&mut self, result: Result<Frame, LinkError>) -> Item {
        let done = self.under_way.pop_front().expect("an answer belongs to the first frame under way");
        self.under_way_bytes -= done.frame.payload_bytes;
        let frame = answer(self.call, result)?;
        let reply = codec::decode_append_reply(frame.head(), done.frame.prev.as_ref()).map_err(|e| unreachable(&e))?;
        if !matches!(reply, AppendResponse::HigherVote(_)) {
            self.call.lease.answered(done.frame.term, self.call.target, done.sent);
        }
        Ok(reply.into_stream_result(done.frame.prev, done.frame.last))
    }

    /// Whether the first frame under way has waited too long. The timer is set again only when it fires, not per frame.
    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let Some(first) = self.under_way.front() else { return Poll::Pending };
            let deadline = first.sent + ANSWER_TIMEOUT;
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
            ready!(timer.as_mut().poll(cx));
            if clock::now() >= deadline {
                return Poll::Ready(());
            }
            self.timer = None;
        }
    }

    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        if self.failed {
            return Poll::Ready(None);
        }
        self.fill(cx);
        let Some(first) = self.under_way.front_mut() else {
            return if self.requests.is_none() { Poll::Ready(None) } else { Poll::Pending };
        };
        if let Poll::Ready(result) = first.answer.as_mut().poll(cx) {
            let item = self.finish(result);
            self.failed = item.is_err();
            return Poll::Ready(Some(item));
        }
        ready!(self.poll_timeout(cx));
        self.failed = true;
        self.call.links().suspect(&self.live);
        let timeout = Timeout {
            action: openraft::RPCTypes::AppendEntries,
            id: self.call.replica,
            target: self.call.target,
            timeout: ANSWER_TIMEOUT,
        };
        Poll::Ready(Some(Err(RpcError::Timeout(timeout))))
    }
}

impl<S> Stream for AppendStream<'_, S>
where
    S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
{
    type Item = Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        self.get_mut().poll_item(cx)
    }
}
