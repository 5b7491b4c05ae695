//! One connection per pair of processes, shared by all their groups.
//!
//! Used by [`crate::network`] and by the installation of snapshots. Life of a peer:
//!
//! ```text
//!   Down(retry at, failures) --acquire, after retry at--> Connecting --hello answered--> Up
//!            ^                                              |                            |
//!            +-------------- failed: failures + 1 ----------+     closed or stalled -----+
//! ```
//! Invariants: at most one attempt to connect per peer at a time, and it goes on when the caller that started it gives
//! up; while a peer is down callers fail at once instead of waiting; each end of a connection is reported once to
//! [`LinkEvents`]. Absent: retries of requests.

use crate::api::AddressBook;
use bytes::Bytes;
use ogee_common::clock::{self, Instant};
use ogee_common::id::{ConnectionGeneration, SessionId};
use ogee_common::limits::{RAFT_LINK_STALL, RAFT_RECONNECT_MAX, RAFT_RECONNECT_MIN};
use ogee_common::rng;
use ogee_proto::data::{Frame, HelloHead, Opcode, Role};
use ogee_proto::link::{Link, LinkError};
use ogee_proto::net::Network;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Why there is no connection to a peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PeerDown {
    /// The address book does not know the process.
    #[error("the address of process {0} is unknown")]
    NoAddress(u32),
    /// The last attempt failed a moment ago, or the one waited for did.
    #[error("process {0} cannot be reached")]
    Unreachable(u32),
}

/// Who wants to know about connections.
pub(crate) trait LinkEvents: Send + Sync {
    /// A connection to `process` was made.
    fn peer_up(&self, process: u32);
    /// The connection to `process` ended.
    fn peer_down(&self, process: u32);
}

/// A connection that was usable a moment ago.
#[derive(Clone)]
pub(crate) struct LiveLink {
    link: Link,
    generation: u64,
    process: u32,
    /// Milliseconds after `Links::epoch` of the last answer.
    answered: Arc<AtomicU64>,
    /// Set when the connection is replaced, so that calls without a timeout end.
    torn: watch::Sender<bool>,
    epoch: Instant,
}

impl LiveLink {
    /// Queues a request at once and returns the future of its answer. The connection lives at least as long.
    pub(crate) fn call(
        &self,
        opcode: Opcode,
        head: &[u8],
        payload: SmallVec<[Bytes; 2]>,
    ) -> impl Future<Output = Result<Frame, LinkError>> + Send + 'static + use<> {
        let (call, live) = (self.link.call(opcode, head, payload), self.clone());
        async move {
            let answer = call.await;
            if answer.is_ok() {
                live.answered.store(since_ms(live.epoch), Ordering::Relaxed);
            }
            answer
        }
    }

    /// As [`LiveLink::call`], for requests that may take hours: ends as well when the connection is given up.
    pub(crate) async fn long_call(
        &self,
        opcode: Opcode,
        head: &[u8],
        payload: SmallVec<[Bytes; 2]>,
    ) -> Result<Frame, LinkError> {
        let mut torn = self.torn.subscribe();
        let call = self.call(opcode, head, payload);
        tokio::select! {
            answer = call => answer,
            _ = torn.wait_for(|torn| *torn) => Err(LinkError::Closed),
        }
    }
}

fn since_ms(epoch: Instant) -> u64 {
    u64::try_from(clock::now().saturating_duration_since(epoch).as_millis()).unwrap_or(u64::MAX)
}

enum State {
    Down { retry_at: Option<Instant>, failures: u32 },
    Connecting { failures: u32 },
    Up(LiveLink),
}

struct Peer {
    process: u32,
    state: Mutex<State>,
    changed: Notify,
}

impl Peer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every hello of this process says, and how its connections are made.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The chunkserver id or the number of the MDS node.
    pub process: u32,
    /// What the process is.
    pub role: Role,
    /// The cluster; peers of another one refuse.
    pub cluster: [u8; 16],
    /// How peers are connected to.
    pub network: Network,
}

/// All connections of this process to its peers.
pub(crate) struct Links {
    identity: Identity,
    book: Arc<dyn AddressBook>,
    events: std::sync::Weak<dyn LinkEvents>,
    peers: Mutex<HashMap<u32, Arc<Peer>>>,
    generation: AtomicU64,
    epoch: Instant,
}

impl Links {
    pub(crate) fn new(
        identity: Identity,
        book: Arc<dyn AddressBook>,
        events: std::sync::Weak<dyn LinkEvents>,
    ) -> Arc<Self> {
        let (peers, generation) = (Mutex::default(), AtomicU64::new(1));
        Arc::new(Self { identity, book, events, peers, generation, epoch: clock::now() })
    }

    /// The process that all this belongs to.
    pub(crate) fn process(&self) -> u32 {
        self.identity.process
    }

    fn peer(&self, process: u32) -> Arc<Peer> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let state = Mutex::new(State::Down { retry_at: None, failures: 0 });
            Arc::new(Peer { process, state, changed: Notify::new() })
        };
        peers.entry(process).or_insert_with(new).clone()
    }

    /// A connection to `process`: the one there is, or a new one.
    ///
    /// # Errors
    /// [`PeerDown`], at once if an attempt failed a moment ago.
    pub(crate) async fn acquire(self: &Arc<Self>, process: u32) -> Result<LiveLink, PeerDown> {
        let peer = self.peer(process);
        let mut waited = false;
        loop {
            let changed = peer.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = peer.state();
                match &*state {
                    State::Up(live) if !live.link.is_closed() => return Ok(live.clone()),
                    // Its watcher is about to notice.
                    State::Up(_) => return Err(PeerDown::Unreachable(process)),
                    State::Down { .. } if waited => return Err(PeerDown::Unreachable(process)),
                    State::Down { retry_at: Some(at), .. } if clock::now() < *at => {
                        return Err(PeerDown::Unreachable(process));
                    }
                    State::Down { failures, .. } => {
                        if self.book.addr(process).is_none() {
                            return Err(PeerDown::NoAddress(process));
                        }
                        *state = State::Connecting { failures: *failures };
                        tokio::spawn(self.clone().connect(peer.clone()));
                    }
                    State::Connecting { .. } => {}
                }
            }
            waited = true;
            changed.await;
        }
    }

    /// Makes a connection and then watches it until it ends.
    async fn connect(self: Arc<Self>, peer: Arc<Peer>) {
        let link = match self.attempt(peer.process).await {
            Ok(link) => link,
            Err(error) => {
                let mut state = peer.state();
                if let State::Connecting { failures } = *state {
                    let failures = failures.saturating_add(1);
                    *state = State::Down { retry_at: Some(clock::now() + backoff(failures)), failures };
                    if failures == 1 {
                        let process = peer.process;
                        tracing::info!(process, error = &*error as &dyn std::error::Error, "cannot connect to peer");
                    }
                }
                drop(state);
                peer.changed.notify_waiters();
                return;
            }
        };
        let (process, generation) = (peer.process, self.generation.fetch_add(1, Ordering::Relaxed));
        let closed = link.closed();
        let torn = watch::Sender::new(false);
        let mut torn_watch = torn.subscribe();
        let answered = Arc::new(AtomicU64::new(since_ms(self.epoch)));
        *peer.state() = State::Up(LiveLink { link, generation, process, answered, torn, epoch: self.epoch });
        peer.changed.notify_waiters();
        tracing::debug!(process, "connected to peer");
        let events = self.events.clone();
        if let Some(events) = events.upgrade() {
            events.peer_up(process);
        }
        // The watcher holds neither the connection nor the table: both may end while it waits.
        drop(self);
        tokio::select! {
            () = closed => {}
            _ = torn_watch.wait_for(|torn| *torn) => {}
        }
        end(&peer, generation);
        tracing::debug!(process, "connection to peer ended");
        if let Some(events) = events.upgrade() {
            events.peer_down(process);
        }
    }

    async fn attempt(&self, process: u32) -> Result<Link, Box<dyn std::error::Error + Send + Sync>> {
        let addr = self.book.addr(process).ok_or(PeerDown::NoAddress(process))?;
        let hello = HelloHead {
            version_min: 1,
            version_max: 1,
            role: self.identity.role,
            process: self.identity.process,
            target: process,
            session: SessionId(0),
            generation: ConnectionGeneration(0),
            cluster: self.identity.cluster,
        };
        let link = Link::connect(&self.identity.network, addr, &hello).await?;
        // An address may have been taken over by another process of the cluster.
        if link.process() == process { Ok(link) } else { Err(PeerDown::Unreachable(process).into()) }
    }

    /// Reports that an answer on `live` did not come in time. If nothing at all came for [`RAFT_LINK_STALL`], the
    /// connection is given up: after a partition TCP itself may wait minutes before it tries again.
    pub(crate) fn suspect(&self, live: &LiveLink) {
        let silent = since_ms(self.epoch).saturating_sub(live.answered.load(Ordering::Relaxed));
        if Duration::from_millis(silent) >= RAFT_LINK_STALL {
            let peer = self.peer(live.process);
            if end(&peer, live.generation) {
                tracing::warn!(process = live.process, silent_ms = silent, "peer does not answer, connecting anew");
            }
            live.torn.send_replace(true);
        }
    }

    /// Gives up every connection, for shutdown.
    pub(crate) fn close(&self) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, peer) in peers.drain() {
            let down = State::Down { retry_at: None, failures: 0 };
            if let State::Up(live) = std::mem::replace(&mut *peer.state(), down) {
                live.torn.send_replace(true);
            }
        }
    }
}

/// Takes a connection out of its slot; `false` if it was no longer there.
fn end(peer: &Peer, generation: u64) -> bool {
    let mut state = peer.state();
    let current = matches!(&*state, State::Up(live) if live.generation == generation);
    if current {
        *state = State::Down { retry_at: None, failures: 0 };
    }
    current
}

fn backoff(failures: u32) -> Duration {
    let doubled = RAFT_RECONNECT_MIN.saturating_mul(1 << failures.min(10));
    rng::jitter(doubled.min(RAFT_RECONNECT_MAX))
}
