//! The leader's memory of attached clients: their event streams, and the holds asked of them.
//!
//! One [`Hub`] per node; it is only used while the node leads and forgets everything when a new lead begins. Invariants:
//! at most one stream per volume, the newest; states are sent under the lock that read them, so a client never hears an
//! older seq after a newer one; an acknowledgement counts only for the hold that is under way on the same stream: a new
//! stream or any state sent on it breaks the hold, because the client lets go then. Bounded: one session per attached
//! volume, [`EVENTS_MAX`] events per stream; a client that does not read loses its stream and comes back.

use ogee_common::clock::{self, Instant};
use ogee_common::id::{AttachEpoch, Term, VolumeId};
use ogee_common::qos::VolumeLimits;
use ogee_common::rng;
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::{AttachEvent, AttachState, Empty};
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::Stream;
use tonic::Status;

/// Events that wait in one stream for a client that reads slowly.
const EVENTS_MAX: usize = 16;
/// A client whose stream ended this recently, or that this leader has not had the time to hear of, counts as alive.
pub(crate) const ATTACH_GRACE: Duration = Duration::from_secs(5);

/// What the stream of an attach carries.
pub(crate) type Item = Result<AttachEvent, Status>;

/// A hold under way.
struct Hold {
    token: u64,
    acknowledged: Option<oneshot::Sender<()>>,
}

struct Session {
    epoch: AttachEpoch,
    /// The stream and its number.
    stream: Option<(u64, mpsc::Sender<Item>)>,
    /// When the client was last known to be there.
    seen: Instant,
    hold: Option<Hold>,
}

impl Session {
    fn new(epoch: AttachEpoch) -> Self {
        Self { epoch, stream: None, seen: clock::now(), hold: None }
    }

    fn is_open(&self) -> bool {
        self.stream.as_ref().is_some_and(|(_, s)| !s.is_closed())
    }

    /// Sends an event; a full or closed stream is given up.
    fn send(&mut self, event: Event) -> bool {
        let sent = self.stream.as_ref().is_some_and(|(_, s)| s.try_send(Ok(AttachEvent { event: Some(event) })).is_ok());
        if !sent {
            self.stream = None;
            self.hold = None;
        }
        sent
    }
}

#[derive(Default)]
struct State {
    term: Term,
    since: Option<Instant>,
    sessions: HashMap<VolumeId, Session>,
    streams: u64,
}

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Hub {
    state: Mutex<State>,
    /// Told when a stream opens.
    opened: Notify,
}

/// What a client must know of its attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Current {
    /// The epoch it belongs to.
    pub(crate) epoch: AttachEpoch,
    /// The seq to write with.
    pub(crate) seq: u64,
    /// Bytes.
    pub(crate) size_bytes: u64,
    /// What the client may do in a second.
    pub(crate) limits: VolumeLimits,
    /// What it writes to stands on no backup.
    pub(crate) complete: bool,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node leads in `term`; what is known from an earlier term is forgotten. A term that it left is over for good.
    pub(crate) fn enter(&self, term: Term) {
        let mut state = self.lock();
        if term > state.term {
            let streams = state.streams;
            *state = State { term, since: Some(clock::now()), streams, ..State::default() };
        }
    }

    /// The node does not lead any more: every stream ends.
    pub(crate) fn leave(&self) {
        let mut state = self.lock();
        state.sessions.clear();
        state.since = None;
    }

    /// A client attached; an earlier one of the volume is told that it is over.
    pub(crate) fn attached(&self, volume: VolumeId, epoch: AttachEpoch) {
        let mut state = self.lock();
        if state.sessions.get(&volume).is_some_and(|s| s.epoch >= epoch) {
            return;
        }
        if let Some(mut old) = state.sessions.insert(volume, Session::new(epoch)) {
            old.send(Event::Detached(Empty {}));
        }
    }

    /// An attach was ended by others, and its client is told. A later attach is left alone.
    pub(crate) fn ended(&self, volume: VolumeId, epoch: AttachEpoch) {
        let mut state = self.lock();
        if state.sessions.get(&volume).is_some_and(|s| s.epoch <= epoch)
            && let Some(mut old) = state.sessions.remove(&volume)
        {
            old.send(Event::Detached(Empty {}));
        }
    }

    /// An attach was ended by its own client, who need not be told.
    pub(crate) fn detached(&self, volume: VolumeId, epoch: AttachEpoch) {
        let mut state = self.lock();
        if state.sessions.get(&volume).is_some_and(|s| s.epoch <= epoch) {
            state.sessions.remove(&volume);
        }
    }

    /// Whether the client of an attach is there, or may be.
    pub(crate) fn is_alive(&self, volume: VolumeId, epoch: AttachEpoch) -> bool {
        let state = self.lock();
        let recent = |at: Instant| clock::now().saturating_duration_since(at) < ATTACH_GRACE;
        match state.sessions.get(&volume) {
            Some(session) if session.epoch == epoch => session.is_open() || recent(session.seen),
            _ => state.since.is_none_or(recent),
        }
    }

    /// Whether the client of an attach is there now.
    pub(crate) fn is_connected(&self, volume: VolumeId, epoch: AttachEpoch) -> bool {
        self.lock().sessions.get(&volume).is_some_and(|s| s.epoch == epoch && s.is_open())
    }

    /// Opens the event stream of an attach. `read` says what is current; its answer is the first event. `None` when the
    /// attach is over, or when the node does not lead any more, so that no client waits at a node that says nothing.
    pub(crate) fn watch(
        self: &Arc<Self>,
        volume: VolumeId,
        epoch: AttachEpoch,
        read: impl FnOnce() -> Option<Current>,
    ) -> Option<EventStream> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let mut state = self.lock();
        state.since?;
        let current = read().filter(|c| c.epoch == epoch)?;
        state.streams += 1;
        let number = state.streams;
        let session = state.sessions.entry(volume).or_insert_with(|| Session::new(current.epoch));
        if session.epoch < current.epoch {
            *session = Session::new(current.epoch);
        }
        session.stream = Some((number, sender));
        session.hold = None;
        session.send(state_event(current));
        drop(state);
        self.opened.notify_waiters();
        Some(EventStream { events, hub: Arc::downgrade(self), volume, number })
    }

    /// Waits until the attach has a stream.
    pub(crate) async fn stream_open(&self, volume: VolumeId, epoch: AttachEpoch) {
        loop {
            let mut opened = std::pin::pin!(self.opened.notified());
            opened.as_mut().enable();
            if self.lock().sessions.get(&volume).is_some_and(|s| s.epoch == epoch && s.is_open()) {
                return;
            }
            opened.await;
        }
    }

    /// Asks the client to hold its writes. `None` when it has no stream.
    pub(crate) fn hold(&self, volume: VolumeId, epoch: AttachEpoch) -> Option<(u64, oneshot::Receiver<()>)> {
        let mut state = self.lock();
        let session = state.sessions.get_mut(&volume).filter(|s| s.epoch == epoch)?;
        let token = rng::nonzero_u64();
        let (sender, receiver) = oneshot::channel();
        session.hold = Some(Hold { token, acknowledged: Some(sender) });
        session.send(Event::Hold(token)).then_some((token, receiver))
    }

    /// The client says that it holds. `false` when this hold is not under way.
    pub(crate) fn acknowledge(&self, volume: VolumeId, epoch: AttachEpoch, token: u64) -> bool {
        let mut state = self.lock();
        let session = state.sessions.get_mut(&volume).filter(|s| s.epoch == epoch);
        let Some(hold) = session.and_then(|s| s.hold.as_mut()).filter(|h| h.token == token) else { return false };
        if let Some(sender) = hold.acknowledged.take() {
            // An error means that the MDS gave up waiting; the state that follows lets the client go.
            let _ = sender.send(());
        }
        true
    }

    /// Whether a hold is still unbroken.
    pub(crate) fn is_held(&self, volume: VolumeId, token: u64) -> bool {
        let state = self.lock();
        let session = state.sessions.get(&volume);
        session.is_some_and(|s| s.is_open() && s.hold.as_ref().is_some_and(|h| h.token == token))
    }

    /// Lets the client go and tells it what is current. The hold, if any, is over.
    pub(crate) fn release(&self, volume: VolumeId, read: impl FnOnce() -> Option<Current>) {
        let mut state = self.lock();
        let Some(current) = read() else { return };
        if let Some(session) = state.sessions.get_mut(&volume).filter(|s| s.epoch == current.epoch) {
            session.hold = None;
            session.send(state_event(current));
        }
    }

    /// Tells the client what is current, unless a hold is under way: its end will tell.
    pub(crate) fn refresh(&self, volume: VolumeId, read: impl FnOnce() -> Option<Current>) {
        let mut state = self.lock();
        let Some(current) = read() else { return };
        let session = state.sessions.get_mut(&volume).filter(|s| s.epoch == current.epoch && s.hold.is_none());
        if let Some(session) = session {
            session.send(state_event(current));
        }
    }

    /// Volumes whose clients have a stream.
    pub(crate) fn watched(&self) -> Vec<VolumeId> {
        self.lock().sessions.iter().filter(|(_, session)| session.is_open()).map(|(volume, _)| *volume).collect()
    }

    /// A stream was dropped by its client or the network.
    fn stream_ended(&self, volume: VolumeId, number: u64) {
        let mut state = self.lock();
        if let Some(session) = state.sessions.get_mut(&volume)
            && session.stream.as_ref().is_some_and(|(n, _)| *n == number)
        {
            session.stream = None;
            session.hold = None;
            session.seen = clock::now();
        }
    }
}

fn state_event(current: Current) -> Event {
    let Current { seq, size_bytes, limits, complete, .. } = current;
    Event::State(AttachState { seq, size_bytes, limits: Some(limits.into()), complete })
}

/// The events of one attach, as gRPC sends them.
pub(crate) struct EventStream {
    events: mpsc::Receiver<Item>,
    hub: Weak<Hub>,
    volume: VolumeId,
    number: u64,
}

impl Stream for EventStream {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        self.events.poll_recv(cx)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if let Some(hub) = self.hub.upgrade() {
            hub.stream_ended(self.volume, self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt as _;

    const V: VolumeId = VolumeId(7);

    fn current(epoch: u64, seq: u64) -> Current {
        Current { epoch: AttachEpoch(epoch), seq, size_bytes: 1 << 20, limits: VolumeLimits::NONE, complete: true }
    }

    async fn next(stream: &mut EventStream) -> Option<Event> {
        stream.next().await.and_then(|item| item.expect("an event").event)
    }

    fn hub() -> Arc<Hub> {
        let hub = Arc::new(Hub::default());
        hub.enter(Term(1));
        hub
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_is_acknowledged_on_its_own_stream_only() {
        let hub = hub();
        hub.attached(V, AttachEpoch(1));
        assert!(hub.hold(V, AttachEpoch(1)).is_none(), "no stream");
        let mut stream = hub.watch(V, AttachEpoch(1), || Some(current(1, 5))).expect("current");
        assert_eq!(next(&mut stream).await, Some(state_event(current(1, 5))));
        let (token, acknowledged) = hub.hold(V, AttachEpoch(1)).expect("a stream");
        assert_eq!(next(&mut stream).await, Some(Event::Hold(token)));
        assert!(!hub.acknowledge(V, AttachEpoch(1), token ^ 1));
        assert!(!hub.acknowledge(V, AttachEpoch(2), token));
        assert!(hub.acknowledge(V, AttachEpoch(1), token));
        acknowledged.await.expect("acknowledged");
        assert!(hub.is_held(V, token));
        hub.refresh(V, || Some(current(1, 5)));
        assert!(hub.is_held(V, token), "a change of size does not break a hold");
        let again = hub.watch(V, AttachEpoch(1), || Some(current(1, 5))).expect("current");
        assert!(!hub.is_held(V, token), "a new stream does");
        assert!(!hub.acknowledge(V, AttachEpoch(1), token));
        drop((stream, again));
    }

    #[tokio::test(start_paused = true)]
    async fn clients_are_alive_while_their_stream_is_open_and_a_little_longer() {
        let hub = hub();
        hub.attached(V, AttachEpoch(1));
        let stream = hub.watch(V, AttachEpoch(1), || Some(current(1, 1))).expect("current");
        tokio::time::advance(ATTACH_GRACE * 3).await;
        assert!(hub.is_alive(V, AttachEpoch(1)));
        drop(stream);
        assert!(hub.is_alive(V, AttachEpoch(1)));
        tokio::time::advance(ATTACH_GRACE).await;
        assert!(!hub.is_alive(V, AttachEpoch(1)));
        hub.enter(Term(2));
        assert!(hub.is_alive(V, AttachEpoch(1)), "a new leader gives clients time to come back");
        tokio::time::advance(ATTACH_GRACE).await;
        assert!(!hub.is_alive(V, AttachEpoch(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_taken_attach_is_told_and_loses_its_stream() {
        let hub = hub();
        hub.attached(V, AttachEpoch(1));
        let mut old = hub.watch(V, AttachEpoch(1), || Some(current(1, 1))).expect("current");
        hub.attached(V, AttachEpoch(2));
        assert!(matches!(next(&mut old).await, Some(Event::State(_))));
        assert_eq!(next(&mut old).await, Some(Event::Detached(Empty {})));
        assert_eq!(next(&mut old).await, None);
        drop(old);
        let mut new = hub.watch(V, AttachEpoch(2), || Some(current(2, 1))).expect("current");
        hub.release(V, || Some(current(1, 9)));
        hub.leave();
        assert_eq!(next(&mut new).await, Some(state_event(current(2, 1))));
        assert_eq!(next(&mut new).await, None, "another epoch's state is not sent, and the lead is over");
        hub.enter(Term(1));
        assert!(hub.watch(V, AttachEpoch(2), || Some(current(2, 1))).is_none(), "a call that was slow to notice");
        hub.enter(Term(2));
        assert!(hub.watch(V, AttachEpoch(2), || Some(current(2, 1))).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_attach_that_is_meant_ends() {
        let hub = hub();
        hub.attached(V, AttachEpoch(3));
        let mut stream = hub.watch(V, AttachEpoch(3), || Some(current(3, 1))).expect("current");
        assert!(hub.watch(V, AttachEpoch(2), || Some(current(3, 1))).is_none(), "another epoch");
        hub.ended(V, AttachEpoch(2));
        hub.detached(V, AttachEpoch(2));
        assert!(matches!(next(&mut stream).await, Some(Event::State(_))));
        hub.ended(V, AttachEpoch(3));
        assert_eq!(next(&mut stream).await, Some(Event::Detached(Empty {})));
        hub.attached(V, AttachEpoch(4));
        let mut stream = hub.watch(V, AttachEpoch(4), || Some(current(4, 1))).expect("current");
        hub.detached(V, AttachEpoch(4));
        assert!(matches!(next(&mut stream).await, Some(Event::State(_))));
        assert_eq!(next(&mut stream).await, None, "who detaches is not told");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_loses_its_stream() {
        let hub = hub();
        hub.attached(V, AttachEpoch(1));
        let mut stream = hub.watch(V, AttachEpoch(1), || Some(current(1, 1))).expect("current");
        for seq in 0..2 * EVENTS_MAX as u64 {
            hub.refresh(V, || Some(current(1, seq)));
        }
        let mut events = 0;
        while next(&mut stream).await.is_some() {
            events += 1;
        }
        assert_eq!(events, EVENTS_MAX);
    }
}
