//! The control task of a write attach: listens to the MDS for holds, new seqs, sizes and limits, that the backup below is needed no more, and the end of the attach.
//!
//! Runs on the control thread; owned by the `Attachment`, which it knows only weakly. Invariants: IO never waits for
//! this task unless a hold is under way; when the stream ends, a new one is opened to whoever leads the MDS, for ever;
//! the acknowledgement of a hold is sent by a task that ends as soon as the hold is over, so none is sent late.
//!
//! What it relies on at the MDS: the first message of a stream is the state; when a stream is opened while a hold that
//! this client acknowledged is pending, the MDS must not count on that acknowledgement any more (bypass instead), for
//! the state lets go; hold tokens do not repeat across MDS leaders.

use crate::attachment::Attachment;
use crate::gate::Drained;
use crate::mds_client::{MdsClient, refusal};
use crate::stats::bump;
use ogee_common::clock;
use ogee_common::rng;
use ogee_proto::{MdsErrorKind, volume_limits};
use ogee_proto::mds::{AckHoldRequest, AttachEvent, WatchAttachRequest, attach_event::Event};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A task that ends with its owner.
struct Owned(JoinHandle<()>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts the control task of a write attach.
pub(crate) fn start(at: &Arc<Attachment>) {
    let request = WatchAttachRequest {
        volume: at.info.volume.0,
        epoch: at.info.epoch.0,
        client: at.cluster.client,
    };
    let watcher = Watcher {
        at: Arc::downgrade(at),
        mds: at.cluster.mds.clone(),
        request,
        resubscribe: at.resubscribe.clone(),
        backoff: (at.cluster.config.timing.backoff_min, at.cluster.config.timing.backoff_max),
        holding: None,
    };
    let task = at.cluster.control().spawn(watcher.run());
    at.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
}

/// Loads the layout in the background, so that running IO does not notice when the MDS is lost.
pub(crate) fn warm_up(at: &Arc<Attachment>) {
    let task = at.cluster.control().spawn(load_layout(Arc::downgrade(at)));
    at.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
}

/// Loads the whole layout and the replicas of its copysets. What it misses is asked for when needed.
pub(crate) async fn load_layout(weak: Weak<Attachment>) {
    use ogee_common::{geometry::segment_of, id::ChunkIndex, limits};
    let step = limits::LAYOUT_PREFETCH_SEGMENTS * limits::CHUNKS_PER_SEGMENT;
    let mut chunk = ChunkIndex(0);
    loop {
        let Some(at) = weak.upgrade() else { return };
        if u64::from(segment_of(chunk).0) * limits::SEGMENT_BYTES >= *at.size.borrow() {
            return;
        }
        match at.layout.fetch(&at.cluster.mds, chunk).await {
            Ok(copysets) => at.learn_replicas(&copysets).await,
            Err(error) => tracing::debug!(target: "controlpath", %error, "load layout"),
        }
        chunk.0 += step;
    }
}

struct Watcher {
    at: Weak<Attachment>,
    mds: MdsClient,
    request: WatchAttachRequest,
    resubscribe: Arc<Notify>,
    backoff: (Duration, Duration),
    /// The task that drains and acknowledges the present hold.
    holding: Option<Owned>,
}

/// What comes after a stream or an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    GoOn,
    Stop,
}

impl Watcher {
    async fn run(mut self) {
        let (mut pause, pause_max) = self.backoff;
        loop {
            match self.mds.watch_attach(self.request).await {
                Ok(stream) => {
                    pause = self.backoff.0;
                    if self.follow(stream).await == Then::Stop {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!(target: "controlpath", volume = self.request.volume, %error, "watch attach");
                    if self.is_over(error.kind) {
                        return;
                    }
                }
            }
            if self.at.strong_count() == 0 {
                return;
            }
            tokio::time::sleep(rng::jitter(pause)).await;
            pause = (pause * 2).min(pause_max);
        }
    }

    /// Acts on the events of one stream.
    async fn follow(&mut self, mut stream: tonic::Streaming<AttachEvent>) -> Then {
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                () = self.resubscribe.notified() => return Then::GoOn,
            };
            match message {
                Ok(Some(AttachEvent { event: Some(event) })) => {
                    if self.act(event) == Then::Stop {
                        return Then::Stop;
                    }
                }
                // An event that this build does not know.
                Ok(Some(AttachEvent { event: None })) => {}
                Ok(None) => return Then::GoOn,
                Err(status) => {
                    return match refusal(&status) {
                        Some(kind) if self.is_over(kind) => Then::Stop,
                        _ => Then::GoOn,
                    };
                }
            }
        }
    }

    /// Whether a refusal means that the attach is over; then IO ends too.
    fn is_over(&self, kind: MdsErrorKind) -> bool {
        let over = matches!(kind, MdsErrorKind::Fenced | MdsErrorKind::NotFound | MdsErrorKind::Attached);
        if over && let Some(at) = self.at.upgrade() {
            tracing::warn!(target: "controlpath", volume = %at.info.name, "the attach was ended by the MDS");
            at.end(true);
        }
        over
    }

    fn act(&mut self, event: Event) -> Then {
        let Some(at) = self.at.upgrade() else { return Then::Stop };
        match event {
            Event::State(state) => {
                // First the task, so that no acknowledgement is sent for a hold that is over.
                self.holding = None;
                at.gate.release(ogee_common::id::VolumeSeq(state.seq));
                if let Some(lazy) = at.lazy.as_ref().filter(|_| state.complete) {
                    lazy.complete();
                }
                at.grow(state.size_bytes);
                at.limit(volume_limits(state.limits.as_ref()));
            }
            Event::Hold(token) => {
                self.holding = None;
                bump(&at.stats.holds);
                at.gate.hold(token);
                let hold = drain_and_acknowledge(Arc::downgrade(&at), token);
                self.holding = Some(Owned(tokio::spawn(hold)));
            }
            Event::Detached(_) => {
                tracing::warn!(target: "controlpath", volume = %at.info.name, "the volume was taken by another attach");
                at.end(true);
                return Then::Stop;
            }
        }
        Then::GoOn
    }
}

/// One hold from its announcement to its end. See the drawing in `gate.rs`.
async fn drain_and_acknowledge(at: Weak<Attachment>, token: u64) {
    let Some(strong) = at.upgrade() else { return };
    let timing = strong.cluster.config.timing;
    let began = clock::now();
    let drained = tokio::time::timeout(timing.hold_timeout, strong.gate.drained(token)).await;
    if let Ok(Drained::Yes) = drained {
        let request = AckHoldRequest { volume: strong.info.volume.0, epoch: strong.info.epoch.0, token };
        let mds = strong.cluster.mds.clone();
        drop(strong);
        match mds.ack_hold(request).await {
            Err(error) if error.kind != MdsErrorKind::Unavailable && !error.outcome_unknown => {
                tracing::debug!(target: "controlpath", token, %error, "the MDS does not count on this hold");
                let Some(at) = at.upgrade() else { return };
                at.gate.ack_refused(token);
                at.gate.release_unacknowledged(token);
                return;
            }
            _ => {}
        }
    } else {
        drop(strong);
    }
    loop {
        let until = began + timing.hold_release_after;
        let wait = until.saturating_duration_since(clock::now()).max(timing.backoff_max);
        tokio::time::sleep(wait).await;
        let Some(at) = at.upgrade() else { return };
        if !at.gate.release_unacknowledged(token) {
            return;
        }
        // Acknowledged, and no word since: ask for the state.
        at.resubscribe.notify_one();
    }
}
