//! One request to one copyset, tried until it has a final outcome.
//!
//! Used by `io.rs`, under an IO's ticket and timeout. Each turn of the loop: find the leader, make sure that the fence
//! is up, send, and act on the answer (`verdict.rs` has the table). The loop has no end of its own: the policy "for ever
//! or for a set time" is the caller's timeout. Only checksum mismatches are bounded here, because asking again for
//! ever cannot mend them. Invariants: the order of retries (`session.rs`), no request before the fence (`fence.rs`),
//! the seq is read anew for every attempt (`gate.rs`).
//!
//! A write whose seq became stale is sent again with the new one. Its earlier attempts carried a lower seq; the copyset
//! that said so refuses them from now on, so none can be applied after the new one.

use crate::attachment::Attachment;
use crate::block_device::{IoErrorKind, Moment, ReadPiece};
use crate::cluster::NoSpacePolicy;
use crate::gate::Unsettled;
use crate::resolve::resolve;
use crate::routing::{Target, Witness};
use crate::session::{Connection, Session};
use crate::stats::bump;
use crate::verdict::{Next, judge, settle};
use bytes::Bytes;
use ogee_common::checksum::fragment_crcs;
use ogee_common::geometry::{ChunkSpan, page_fragments};
use ogee_common::id::{ChunkserverId, CopysetId, LayerId, VolumeSeq};
use ogee_common::limits::CORRUPT_RETRIES_MAX;
use ogee_common::rng;
use ogee_proto::data::{
    Ancestor, Frame, LayerHead, OpenLayerHead, Opcode, PAGE_MAP_SINCE, PASTE_SINCE, PageMapHead, PageMapReply, PasteHead, PastePages,
    ReadHead, ReadReply, Status, ThinReply, WriteHead, ZeroHead,
};
use smallvec::SmallVec;
use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Once;
use std::time::Duration;

/// Retries without a pause in a row: enough for a redirect, a new seq and a fence.
const QUICK_RETRIES_MAX: u32 = 4;

/// Why a part of an IO failed for good.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: IoErrorKind,
    pub(crate) source: Option<Box<dyn Error + Send + Sync>>,
}

impl From<IoErrorKind> for Failure {
    fn from(kind: IoErrorKind) -> Self {
        Self { kind, source: None }
    }
}

/// What a chunkserver said that explains a failure.
#[derive(Debug, thiserror::Error)]
#[error("{copyset} answered {status:?} {note}")]
struct Answer {
    copyset: CopysetId,
    status: Status,
    note: String,
}

/// What to do in a copyset.
#[derive(Debug)]
pub(crate) enum Action {
    /// Raise the fence.
    Open,
    /// Read the span.
    Read,
    /// Say what the chunk holds, and what of it may have changed since a moment.
    PageMap(Option<Moment>),
    /// Read the span, and say which of its pages no version has.
    ReadThin,
    /// Fill pages of a layer with what the backup that it stands on holds; the span says only the chunk.
    Paste { layer: LayerId, pages: Box<PastePages>, data: Bytes },
    /// As a page map without comparison, of a chunkserver that can paste: "data" is no guess of ours about an older one.
    Present,
    /// Zero the span; `masks` where a backup may lie below.
    Zero { masks: bool },
    /// Write the span; with the checksums of its page fragments.
    Write { data: Bytes, crcs: Vec<u32> },
}

/// Said once in a process: every IO of such a volume meets it.
static OLD_CHUNKSERVER: Once = Once::new();

impl Action {
    /// Whether a chunkserver that does not know of missing pages would do something else.
    const fn needs_paste(&self) -> bool {
        matches!(self, Self::ReadThin | Self::Present | Self::Paste { .. } | Self::Zero { masks: true })
    }

    /// A write of `data` at byte `offset` of its chunk.
    pub(crate) fn write(offset: u32, data: Bytes) -> Self {
        let crcs = fragment_crcs(offset, &data).collect();
        Self::Write { data, crcs }
    }
}

/// What a request came to.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It was done.
    Done,
    /// What was read.
    Read(ReadPiece),
    /// What was read, and for each page of it whether it is missing.
    Thin(ReadPiece, Vec<bool>),
    /// What the chunk holds.
    PageMap(Box<PageMapReply>),
}

impl Outcome {
    /// What was read of `len` bytes.
    pub(crate) fn into_piece(self, len: u32) -> ReadPiece {
        match self {
            Self::Read(piece) | Self::Thin(piece, _) => piece,
            Self::Done | Self::PageMap(_) => ReadPiece::Zeros(len),
        }
    }
}

/// A request to a copyset.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) copyset: CopysetId,
    pub(crate) span: ChunkSpan,
    pub(crate) action: Action,
}

/// The pauses between the attempts of one request.
struct Pauses {
    next: Duration,
    max: Duration,
    quick: u32,
    mismatches: u32,
}

impl Pauses {
    async fn pause(&mut self) {
        self.quick = 0;
        tokio::time::sleep(rng::jitter(self.next)).await;
        // By half, not double: the longest wait after a leader is there again is a third of the time without one.
        self.next = (self.next * 3 / 2).min(self.max);
    }

    async fn quick(&mut self) {
        self.quick += 1;
        if self.quick > QUICK_RETRIES_MAX {
            self.pause().await;
        }
    }
}

/// One handle's way to the copysets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataPath<'a> {
    pub(crate) at: &'a Attachment,
    pub(crate) session: &'a Session,
}

/// An attempt that was sent.
struct Sent {
    target: Target,
    seq: VolumeSeq,
    /// Round of the fence it relied on.
    round: u64,
    answer: Option<Frame>,
}

impl<'a> DataPath<'a> {
    /// Tries until there is a final outcome. `account` is there for what changes data.
    pub(crate) async fn run(
        &self,
        request: &mut Request,
        mut account: Option<&mut Unsettled<'_>>,
    ) -> Result<Outcome, Failure> {
        let timing = &self.at.cluster.config.timing;
        let mut pauses = Pauses { next: timing.backoff_min, max: timing.backoff_max, quick: 0, mismatches: 0 };
        loop {
            self.at.gate.check()?;
            let floor = self.at.gate.floor();
            let round = self.fence_round(request, floor).await?;
            let Some((target, connection)) = self.connection(request.copyset).await else {
                pauses.pause().await;
                continue;
            };
            // An older chunkserver would end the connection.
            if matches!(request.action, Action::PageMap(_)) && connection.link.version() < PAGE_MAP_SINCE {
                return Ok(Outcome::PageMap(Box::new(PageMapReply::unknown())));
            }
            if request.action.needs_paste() && connection.link.version() < PASTE_SINCE {
                OLD_CHUNKSERVER.call_once(|| {
                    let (chunkserver, version) = (target.chunkserver, connection.link.version());
                    tracing::error!(target: "datapath", %chunkserver, version, "a volume on a backup needs newer chunkservers; its IO waits");
                });
                pauses.pause().await;
                continue;
            }
            // No await from here until the request is queued; see `session.rs`.
            let seq = self.at.gate.seq();
            // A snapshot has gone round this client since the fence was looked at: the copyset has to know before it is asked.
            if self.at.gate.floor() > floor {
                continue;
            }
            let before = account.as_mut().map(|a| a.sending(seq));
            let answer = self.send(request, &target, seq, &connection).await;
            let sent = Sent { target, seq, round, answer };
            let next = match &sent.answer {
                Some(frame) => judge(Status::parse(frame.header.status), frame.head()),
                None => Next::Lost,
            };
            if let (Some(account), Some(before)) = (account.as_mut(), before) {
                settle(account, before, next);
            }
            if next == Next::Done
                && let Some(outcome) = sent.answer.as_ref().and_then(|frame| verified(request, frame))
            {
                return Ok(outcome);
            }
            bump(&self.at.stats.retries);
            Box::pin(self.prepare_retry(request, &sent, next, &mut pauses)).await?;
        }
    }

    /// The round of the copyset's fence; raises it if it is not up. 0 where none is needed.
    async fn fence_round(&self, request: &Request, floor: VolumeSeq) -> Result<u64, Failure> {
        if self.at.is_read_only() || matches!(request.action, Action::Open | Action::Paste { .. }) {
            return Ok(0);
        }
        match self.at.fences.of(request.copyset).round(floor) {
            Some(round) => Ok(round),
            None => self.open(request.copyset, floor).await,
        }
    }

    /// Raises the fence of a copyset, once for all who wait. Boxed: it runs a request of its own, and it is rare.
    fn open(&self, copyset: CopysetId, floor: VolumeSeq) -> Pin<Box<dyn Future<Output = Result<u64, Failure>> + Send + 'a>> {
        let path = *self;
        Box::pin(async move {
            let fence = path.at.fences.of(copyset);
            let mut count = fence.opening.lock().await;
            if let Some(round) = fence.round(floor) {
                return Ok(round);
            }
            // What is sent below carries this, or more.
            let seq = path.at.gate.seq();
            let span = ChunkSpan { chunk: Default::default(), offset: 0, len: 0, buffer_offset: 0 };
            let mut request = Request { copyset, span, action: Action::Open };
            path.run(&mut request, None).await?;
            Ok(fence.opened(&mut count, seq))
        })
    }

    /// The leader and an open connection to it. What is rare is boxed, so that an IO's future stays small.
    pub(crate) async fn connection(&self, copyset: CopysetId) -> Option<(Target, Connection)> {
        let routes = &self.at.cluster.routes;
        let target = match routes.target(copyset) {
            Some(target) => target,
            None => Box::pin(resolve(&self.at.cluster, self.session, copyset)).await?,
        };
        if let Some(connection) = self.session.link(&target) {
            return Some((target, connection));
        }
        if let Err(error) = Box::pin(self.session.connect(target.replica())).await {
            tracing::debug!(target: "datapath", chunkserver = %target.chunkserver, %error, "connect");
            routes.forget(copyset, &target);
            return None;
        }
        // Asked anew: what was true before the await may not be true now, and the term may have risen.
        let target = routes.target(copyset)?;
        self.session.link(&target).map(|connection| (target, connection))
    }

    /// Queues the request at the call and waits for its answer; `None` if the outcome is unknown.
    fn send<'b>(
        &self,
        request: &Request,
        target: &Target,
        seq: VolumeSeq,
        connection: &'b Connection,
    ) -> impl Future<Output = Option<Frame>> + Send + use<'a, 'b> {
        let (opcode, head, payload) = self.encode(request, target, seq);
        let reply = connection.link.call(opcode, &head, payload);
        let (at, session, chunkserver) = (self.at, self.session, target.chunkserver);
        let limit = at.cluster.config.timing.attempt_timeout;
        async move {
            match tokio::time::timeout(limit, reply).await {
                Ok(Ok(frame)) => return Some(frame),
                Ok(Err(error)) => tracing::debug!(target: "datapath", %chunkserver, %error, "attempt"),
                Err(_) => {
                    tracing::debug!(target: "datapath", %chunkserver, "attempt: no answer in time");
                    session.retire(chunkserver, connection);
                }
            }
            bump(&at.stats.unknown_outcomes);
            None
        }
    }

    fn encode(&self, request: &Request, target: &Target, seq: VolumeSeq) -> (Opcode, Bytes, SmallVec<[Bytes; 2]>) {
        let (info, span) = (&self.at.info, &request.span);
        let at = LayerHead {
            copyset: request.copyset,
            chunk: span.chunk,
            layer: info.layer,
            seq,
            epoch: info.epoch,
            term: target.term,
            offset: span.offset,
            len: span.len,
        };
        let none = SmallVec::new();
        let chain = || if self.at.is_read_only() { self.at.chain.clone() } else { Vec::new() };
        match &request.action {
            Action::Read | Action::ReadThin => {
                let tells_missing = matches!(request.action, Action::ReadThin);
                (Opcode::Read, ReadHead { at, tells_missing, chain: chain() }.encode(), none)
            }
            Action::Paste { layer, pages, data } => {
                let head = PasteHead { copyset: request.copyset, layer: *layer, chunk: span.chunk, pages: (**pages).clone() };
                (Opcode::Paste, head.encode(), smallvec::smallvec![data.clone()])
            }
            Action::Present => (Opcode::PageMap, PageMapHead { at, since: None, chain: chain() }.encode(), none),
            Action::PageMap(since) => {
                let since = since.map(|moment| Ancestor { layer: moment.layer, seq: moment.seq });
                (Opcode::PageMap, PageMapHead { at, since, chain: chain() }.encode(), none)
            }
            Action::Zero { masks } => (Opcode::Zero, ZeroHead { at, masks: *masks }.encode(), none),
            Action::Write { data, crcs } => {
                let head = WriteHead { at, crcs: crcs.clone() };
                (Opcode::Write, head.encode(), smallvec::smallvec![data.clone()])
            }
            Action::Open => {
                let (copyset, layer, epoch, term) = (request.copyset, info.layer, info.epoch, target.term);
                let chain = self.at.chain.clone();
                (Opcode::OpenLayer, OpenLayerHead { copyset, layer, epoch, seq, term, chain }.encode(), none)
            }
        }
    }

    /// Does what an answer asks for before the next attempt.
    async fn prepare_retry(
        &self,
        request: &mut Request,
        sent: &Sent,
        next: Next,
        pauses: &mut Pauses,
    ) -> Result<(), Failure> {
        let (at, copyset) = (self.at, request.copyset);
        let routes = &at.cluster.routes;
        match next {
            Next::Moved(redirect) => {
                bump(&at.stats.redirects);
                routes.forget(copyset, &sent.target);
                let known = redirect.is_some_and(|r| {
                    let leader = ChunkserverId(r.leader);
                    let by_itself = leader == sent.target.chunkserver;
                    let witness = if by_itself { Witness::Leader } else { Witness::Other };
                    routes.learn(copyset, leader, r.term, witness)
                });
                if known { pauses.quick().await } else { pauses.pause().await }
            }
            Next::Lost | Next::Misplaced => {
                routes.forget(copyset, &sent.target);
                pauses.quick().await;
            }
            Next::Again => pauses.pause().await,
            Next::Stale(minimum) => match minimum.filter(|m| *m > sent.seq) {
                Some(minimum) => {
                    at.gate.raise_seq(minimum);
                    pauses.quick().await;
                }
                None => {
                    at.resubscribe.notify_one();
                    pauses.pause().await;
                }
            },
            Next::Reopen => {
                at.fences.of(copyset).invalidate(sent.round);
                pauses.quick().await;
            }
            Next::NoSpace if at.cluster.config.no_space == NoSpacePolicy::Wait => pauses.pause().await,
            Next::NoSpace => return Err(failure(request, sent, IoErrorKind::NoSpace)),
            Next::Never(kind) => {
                // A paste is refused for the layer below, which says nothing of the own one.
                if kind != IoErrorKind::InvalidInput && !matches!(request.action, Action::Paste { .. }) {
                    at.end(kind == IoErrorKind::Fenced);
                }
                return Err(failure(request, sent, kind));
            }
            Next::Mismatch | Next::Done => {
                bump(&at.stats.checksum_mismatches);
                pauses.mismatches += 1;
                if pauses.mismatches > CORRUPT_RETRIES_MAX {
                    return Err(failure(request, sent, IoErrorKind::Corrupt));
                }
                // The owner of the buffer may have changed it meanwhile.
                if let Action::Write { data, crcs } = &mut request.action {
                    *crcs = fragment_crcs(request.span.offset, data).collect();
                }
                pauses.pause().await;
            }
        }
        Ok(())
    }
}

fn failure(request: &Request, sent: &Sent, kind: IoErrorKind) -> Failure {
    let status = sent.answer.as_ref().map_or(Status::Unknown, |frame| Status::parse(frame.header.status));
    let note = match (&sent.answer, status) {
        (Some(frame), Status::BadRequest) => String::from_utf8_lossy(&frame.payload()).into_owned(),
        (_, Status::Ok) => "with data that does not match its checksums".to_owned(),
        _ => String::new(),
    };
    Failure { kind, source: Some(Box::new(Answer { copyset: request.copyset, status, note })) }
}

/// What a good answer says, or `None` if it does not match its checksums.
fn verified(request: &Request, frame: &Frame) -> Option<Outcome> {
    match request.action {
        Action::Read => read_data(request, frame, &ReadReply::decode(frame.head()).ok()?).map(Outcome::Read),
        Action::ReadThin => {
            let ThinReply { read, missing } = ThinReply::decode(frame.head()).ok()?;
            let pages = page_fragments(request.span.offset, request.span.len as usize).count();
            let piece = read_data(request, frame, &read).filter(|_| missing.len() == pages)?;
            Some(Outcome::Thin(piece, missing))
        }
        Action::PageMap(_) | Action::Present => PageMapReply::decode(frame.head()).ok().map(|map| Outcome::PageMap(Box::new(map))),
        _ => Some(Outcome::Done),
    }
}

fn read_data(request: &Request, frame: &Frame, ReadReply { crcs }: &ReadReply) -> Option<ReadPiece> {
    let data = frame.payload();
    if crcs.is_empty() && data.is_empty() {
        return Some(ReadPiece::Zeros(request.span.len));
    }
    let matches = data.len() == request.span.len as usize && fragment_crcs(request.span.offset, &data).eq(crcs.iter().copied());
    matches.then_some(ReadPiece::Data(data))
}
