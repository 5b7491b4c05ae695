//! A session: the connections of one thread to chunkservers, and its limits in flight.
//!
//! Made by `Volume::for_thread`; connections are made when first needed, on the runtime that needs them. Used by
//! `attempt.rs` and `resolve.rs`.
//!
//! # Why a retried write is never applied after a later write
//!
//! The invariant of section 6 of ARCHITECTURE.md. Let A be an attempt of a write W whose outcome is unknown, and B the
//! attempt of W that succeeded. A later write starts when W is complete, so after B was applied; it is therefore
//! enough that **A is applied before B or never**. A and B are of the same session (a write stays on its handle).
//!
//! 1. Every attempt names the Raft term it was sent to, and a leader as well as the state machine refuses it under any
//!    other term. So A can only become a log entry of A's term, and B is one of B's term.
//! 2. The term of a copyset's target never goes back (`routing.rs`), so term(A) <= term(B). Terms in a Raft log do not
//!    go back either. If term(A) < term(B), then A's entry lies before B's or is not in the log of B's leader, and then
//!    it will never be committed.
//! 3. If term(A) = term(B), both can only be proposed by the one leader of that term, one chunkserver.
//!    - *On the same connection*: requests are queued at the call and leave in that order (`ogee_proto::link`), and a
//!      chunkserver proposes the requests of a connection in order of arrival. A was proposed before B, or it was
//!      refused.
//!    - *On different connections*: the session numbers its connections to a chunkserver with a generation that only
//!      grows, one connection attempt at a time. B's connection is newer than A's: a request is queued on the newest
//!      one, and [`Session::link`] and the call happen without an await in between. Once the chunkserver has answered
//!      the newer hello, it drops what it had not proposed of older generations. B was sent after that answer.
//!
//! That holds whether the old connection was closed or is merely believed dead ([`Session::retire`]). An attempt that
//! ended with a refusal needs no argument unless the leader lost its office after proposing it; then the answer is
//! `NotLeader`, the entry has term(A), and (2) holds. A write that is given up (IO timeout, dropped future) is
//! unknown for ever, as that section says; `gate.rs` says what that means for snapshots.

use crate::routing::{ReplicaAddr, Target};
use ogee_common::clock::Instant;
use ogee_common::id::{ChunkserverId, ConnectionGeneration, CopysetId, SessionId};
use ogee_common::limits::{INFLIGHT_BYTES_MAX, INFLIGHT_REQUESTS_MAX};
use ogee_common::rng;
use ogee_proto::data::{HelloHead, PROTOCOL_MAX, PROTOCOL_MIN, Role, Status};
use ogee_proto::link::{Link, LinkError};
use ogee_proto::net::Network;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Unit of the semaphore that counts payload bytes.
const PERMIT_BYTES: usize = 1024;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The session's connection to one chunkserver.
#[derive(Debug, Default)]
struct Slot {
    link: Mutex<Option<(ConnectionGeneration, Link)>>,
    /// Held while connecting; the generation of the newest attempt.
    generation: tokio::sync::Mutex<ConnectionGeneration>,
}

/// The last round of asking "who leads"; locked during a round.
#[derive(Debug, Default)]
pub(crate) struct LastRound {
    pub(crate) ended: Option<Instant>,
    /// When the MDS was asked for the replicas.
    pub(crate) refreshed: Option<Instant>,
}

/// The rounds of one copyset.
pub(crate) type Round = Arc<tokio::sync::Mutex<LastRound>>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Session {
    id: SessionId,
    cluster: [u8; 16],
    network: Network,
    slots: Mutex<HashMap<ChunkserverId, Arc<Slot>>>,
    rounds: Mutex<HashMap<CopysetId, Round>>,
    requests: Semaphore,
    bytes: Semaphore,
}

/// A connection and which one it is.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) link: Link,
    generation: ConnectionGeneration,
}

/// The right to have one request in flight.
#[derive(Debug)]
pub(crate) struct InFlight<'a> {
    _request: SemaphorePermit<'a>,
    _bytes: SemaphorePermit<'a>,
}

impl Session {
    /// A session with a new identity and no connection.
    pub(crate) fn new(cluster: [u8; 16], network: Network) -> Arc<Self> {
        Arc::new(Self {
            id: SessionId(rng::nonzero_u64()),
            cluster,
            network,
            slots: Mutex::default(),
            rounds: Mutex::default(),
            requests: Semaphore::new(INFLIGHT_REQUESTS_MAX),
            bytes: Semaphore::new(INFLIGHT_BYTES_MAX / PERMIT_BYTES),
        })
    }

    /// A new session to the same cluster.
    pub(crate) fn another(&self) -> Arc<Self> {
        Self::new(self.cluster, self.network.clone())
    }

    /// Waits until a request with so many bytes of payload may be in flight. Who has the first permit and waits for
    /// the second holds up nobody who has both, so this cannot lock up.
    pub(crate) async fn admit(&self, bytes: u32) -> InFlight<'_> {
        let units = bytes.div_ceil(1024).max(1);
        InFlight {
            _request: self.requests.acquire().await.expect("the semaphore is never closed"),
            _bytes: self.bytes.acquire_many(units).await.expect("the semaphore is never closed"),
        }
    }

    /// The lock of a copyset's "who leads" rounds.
    pub(crate) fn round(&self, copyset: CopysetId) -> Round {
        lock(&self.rounds).entry(copyset).or_default().clone()
    }

    fn slot(&self, chunkserver: ChunkserverId) -> Arc<Slot> {
        lock(&self.slots).entry(chunkserver).or_default().clone()
    }

    /// The open connection to a target, if there is one. Queue the request on it at once, without awaiting anything.
    pub(crate) fn link(&self, target: &Target) -> Option<Connection> {
        self.slot(target.chunkserver).usable(target.addr)
    }

    /// Makes sure that there is a connection to a replica. One attempt at a time; who waited for another's attempt
    /// uses its result.
    pub(crate) async fn connect(&self, to: ReplicaAddr) -> Result<Connection, LinkError> {
        let slot = self.slot(to.chunkserver);
        if let Some(connection) = slot.usable(to.addr) {
            return Ok(connection);
        }
        let mut newest = slot.generation.lock().await;
        if let Some(connection) = slot.usable(to.addr) {
            return Ok(connection);
        }
        newest.0 += 1;
        let generation = *newest;
        let hello = HelloHead {
            version_min: PROTOCOL_MIN,
            version_max: PROTOCOL_MAX,
            role: Role::Client,
            process: 0,
            target: to.chunkserver.0,
            session: self.id,
            generation,
            cluster: self.cluster,
        };
        let link = Link::connect(&self.network, to.addr, &hello).await?;
        if link.process() != to.chunkserver.0 {
            return Err(LinkError::Refused { addr: to.addr, status: Status::WrongTarget });
        }
        *lock(&slot.link) = Some((generation, link.clone()));
        Ok(Connection { link, generation })
    }

    /// The connection is believed dead although it is not closed: it is dropped, and the next request makes a new one.
    pub(crate) fn retire(&self, chunkserver: ChunkserverId, connection: &Connection) {
        let slot = self.slot(chunkserver);
        let mut link = lock(&slot.link);
        if link.as_ref().is_some_and(|(generation, _)| *generation == connection.generation) {
            *link = None;
        }
    }
}

impl Slot {
    fn usable(&self, addr: SocketAddr) -> Option<Connection> {
        let link = lock(&self.link);
        let (generation, link) = link.as_ref()?;
        (link.addr() == addr && !link.is_closed()).then(|| Connection { link: link.clone(), generation: *generation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn requests_and_bytes_in_flight_are_bounded() {
        let session = Session::new([0; 16], Network::default());
        let bytes = u32::try_from(INFLIGHT_BYTES_MAX / 2).expect("the limit fits");
        let first = session.admit(bytes).now_or_never().expect("there is room");
        let _second = session.admit(bytes).now_or_never().expect("there is room");
        assert!(session.admit(1).now_or_never().is_none());
        drop(first);
        let many: Vec<_> = (0..INFLIGHT_REQUESTS_MAX - 1).map(|_| session.admit(0).now_or_never()).collect();
        assert!(many.iter().all(Option::is_some));
        assert!(session.admit(0).now_or_never().is_none());
    }
}
