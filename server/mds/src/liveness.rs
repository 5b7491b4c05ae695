//! The leader's memory of chunkservers: when each was last heard of, its room, and who leads which copyset.
//!
//! Used by heartbeats, listings and segment placement. Invariants: nothing here is needed for safety, so it is not
//! replicated and a new leader starts empty; a chunkserver that this leader has not had the time to hear of counts as
//! up; the leader of a copyset is that of the highest term reported. Bounded by the number of chunkservers and copysets.

use crate::balance::HandOver;
use ogee_common::clock::{self, Instant};
use ogee_common::id::{ChunkserverId, CopysetId, ReplicaId, Term};
use ogee_common::limits::HEARTBEAT_DOWN_AFTER;
use ogee_proto::mds::{ScrubOrder, ScrubReport};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A copyset that was asked to change hands is left alone for this long.
const COOL_DOWN: Duration = Duration::from_secs(20);

/// What a heartbeat says of a chunkserver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vitals {
    /// Bytes.
    pub(crate) capacity_bytes: u64,
    /// Bytes that can still be allocated.
    pub(crate) free_bytes: u64,
    /// Empty: healthy.
    pub(crate) disk_error: String,
    /// Replicas that are damaged or missing there while the disk works.
    pub(crate) failed: Vec<ReplicaId>,
    /// Its scrub.
    pub(crate) scrub: ScrubReport,
    /// Its verification of single volumes.
    pub(crate) verify: ScrubReport,
    /// Newest version of the data protocol that it speaks; 0: it did not say.
    pub(crate) protocol: u32,
}

impl Vitals {
    /// What people should know; empty: nothing.
    pub(crate) fn trouble(self) -> String {
        match self.failed.len() {
            n if n > 0 && self.disk_error.is_empty() => format!("{n} damaged or missing replicas are being rebuilt"),
            _ => self.disk_error,
        }
    }
}

/// Whether a chunkserver works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// Heard of lately.
    Up,
    /// Silent for [`HEARTBEAT_DOWN_AFTER`].
    Down,
    /// It reports a failed disk.
    Failed,
}

impl Health {
    /// The word in listings.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Failed => "failed",
        }
    }
}

/// The leader of a copyset as last reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ReportedLeader {
    /// 0: unknown.
    pub(crate) chunkserver: ChunkserverId,
    /// Its term.
    pub(crate) term: Term,
}

/// The scrubs of a chunkserver.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scrubbing {
    /// What it said last; `None`: nothing.
    pub(crate) scrub: Option<ScrubReport>,
    /// The order that it has not obeyed yet; 0: none.
    pub(crate) ordered: u64,
    /// The same of a single volume.
    pub(crate) verify: Option<ScrubReport>,
    /// The same.
    pub(crate) verify_ordered: u64,
}

#[derive(Debug, Default)]
struct State {
    term: Term,
    since: Option<Instant>,
    seen: HashMap<ChunkserverId, (Instant, Vitals)>,
    leaders: HashMap<CopysetId, ReportedLeader>,
    applied: HashMap<(CopysetId, ChunkserverId), u64>,
    /// Since when a chunkserver has been heard of without a break.
    steady: HashMap<ChunkserverId, Instant>,
    /// Chunkservers at whose address another one serves now: they are gone, also before their silence says so.
    displaced: HashSet<ChunkserverId>,
    /// Leads that are to change hands: who gives, who takes, since when.
    hand_overs: HashMap<CopysetId, (HandOver, Instant)>,
    /// Scrubs that were ordered and not yet obeyed.
    scrubs: HashMap<ChunkserverId, ScrubOrder>,
    /// The same of single volumes.
    verifications: HashMap<ChunkserverId, ScrubOrder>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Liveness(Mutex<State>);

impl Liveness {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node leads in `term`; what is known from an earlier term is forgotten.
    pub(crate) fn enter(&self, term: Term) {
        let mut state = self.lock();
        if term > state.term {
            *state = State { term, since: Some(clock::now()), ..State::default() };
        }
    }

    /// A chunkserver was heard of.
    pub(crate) fn heard(&self, id: ChunkserverId, vitals: Vitals) {
        let mut state = self.lock();
        let now = clock::now();
        let well = vitals.disk_error.is_empty();
        state.displaced.remove(&id);
        if state.scrubs.get(&id).is_some_and(|order| order.id <= vitals.scrub.order) {
            state.scrubs.remove(&id);
        }
        if state.verifications.get(&id).is_some_and(|order| order.id <= vitals.verify.order) {
            state.verifications.remove(&id);
        }
        let before = state.seen.insert(id, (now, vitals));
        let broke = before.is_none_or(|(at, _)| now.saturating_duration_since(at) >= HEARTBEAT_DOWN_AFTER);
        if broke || !well {
            state.steady.insert(id, now);
        }
    }

    /// Another chunkserver has taken its address. Until it is heard of again it counts as down.
    pub(crate) fn displace(&self, id: ChunkserverId) {
        self.lock().displaced.insert(id);
    }

    /// Orders a scrub (one with layers: a verification) or its end; an order of the kind that was not obeyed yet is forgotten.
    pub(crate) fn order_scrub(&self, id: ChunkserverId, order: ScrubOrder) {
        let mut state = self.lock();
        let orders = if order.layers.is_empty() { &mut state.scrubs } else { &mut state.verifications };
        orders.insert(id, order);
    }

    /// The scrub that a chunkserver was ordered and has not begun.
    pub(crate) fn scrub_order(&self, id: ChunkserverId) -> Option<ScrubOrder> {
        self.lock().scrubs.get(&id).cloned()
    }

    /// The verification that a chunkserver was ordered and has not begun.
    pub(crate) fn verify_order(&self, id: ChunkserverId) -> Option<ScrubOrder> {
        self.lock().verifications.get(&id).cloned()
    }

    /// What a chunkserver has said of its scrubs, and its orders that stand: of one moment, so that an order is either there or obeyed.
    pub(crate) fn scrubbing(&self, id: ChunkserverId) -> Scrubbing {
        let state = self.lock();
        let vitals = state.seen.get(&id).map(|(_, vitals)| vitals);
        let number = |orders: &HashMap<ChunkserverId, ScrubOrder>| orders.get(&id).map_or(0, |order| order.id);
        Scrubbing {
            scrub: vitals.map(|v| v.scrub),
            ordered: number(&state.scrubs),
            verify: vitals.map(|v| v.verify),
            verify_ordered: number(&state.verifications),
        }
    }

    /// A chunkserver says who leads a copyset.
    pub(crate) fn leads(&self, copyset: CopysetId, leader: ReportedLeader) {
        if leader.chunkserver.0 == 0 {
            return;
        }
        let mut state = self.lock();
        let known = state.leaders.entry(copyset).or_default();
        if leader.term >= known.term {
            *known = leader;
        }
    }

    /// A replica says how far it is.
    pub(crate) fn applies(&self, copyset: CopysetId, id: ChunkserverId, index: u64) {
        self.lock().applied.insert((copyset, id), index);
    }

    /// How far a replica was when it was last heard of; 0: never.
    pub(crate) fn applied(&self, copyset: CopysetId, id: ChunkserverId) -> u64 {
        self.lock().applied.get(&(copyset, id)).copied().unwrap_or(0)
    }

    /// Chunkservers that are up and have been for `least`.
    pub(crate) fn steady(&self, least: Duration) -> HashSet<ChunkserverId> {
        let state = self.lock();
        let now = clock::now();
        let silent = |id| {
            let recent = state.seen.get(id).filter(|(at, _)| now.saturating_duration_since(*at) < HEARTBEAT_DOWN_AFTER);
            recent.is_none() || state.displaced.contains(id)
        };
        let long = state.steady.iter().filter(|(id, at)| now.saturating_duration_since(**at) >= least && !silent(id));
        long.map(|(id, _)| *id).collect()
    }

    /// Asks for hand-overs; they stand until [`Liveness::hand_overs_of`] has given them out for `COOL_DOWN`.
    pub(crate) fn ask_hand_overs(&self, orders: Vec<HandOver>) {
        let mut state = self.lock();
        let now = clock::now();
        state.hand_overs.retain(|_, (_, at)| now.saturating_duration_since(*at) < COOL_DOWN);
        state.hand_overs.extend(orders.into_iter().map(|order| (order.copyset, (order, now))));
    }

    /// Whether a copyset was asked to change hands a while ago.
    pub(crate) fn was_asked(&self, copyset: CopysetId) -> bool {
        self.lock().hand_overs.contains_key(&copyset)
    }

    /// What a chunkserver should hand over now. Given out once: a lead that did not change hands is asked for again later.
    pub(crate) fn hand_overs_of(&self, id: ChunkserverId) -> Vec<HandOver> {
        let mut state = self.lock();
        let own: Vec<CopysetId> = state.hand_overs.values().filter(|(o, _)| o.from == id).map(|(o, _)| o.copyset).collect();
        let mut orders = vec![];
        for copyset in own {
            if let Some((order, _)) = state.hand_overs.get_mut(&copyset) {
                orders.push(*order);
                // It stays in the table, as nobody's, for the time of the cool-down.
                order.from = ChunkserverId(0);
            }
        }
        orders
    }

    /// Whether it was heard of since this lead began.
    pub(crate) fn heard_of(&self, id: ChunkserverId) -> bool {
        self.lock().seen.contains_key(&id)
    }

    /// Who leads a copyset, as last reported.
    pub(crate) fn leader(&self, copyset: CopysetId) -> ReportedLeader {
        self.lock().leaders.get(&copyset).copied().unwrap_or_default()
    }

    /// Copysets that a chunkserver leads, as last reported.
    pub(crate) fn led_by(&self, id: ChunkserverId) -> usize {
        self.lock().leaders.values().filter(|l| l.chunkserver == id).count()
    }

    /// Whether a chunkserver works.
    pub(crate) fn health(&self, id: ChunkserverId) -> Health {
        let state = self.lock();
        let silent = |at: Instant| clock::now().saturating_duration_since(at) >= HEARTBEAT_DOWN_AFTER;
        match state.seen.get(&id) {
            _ if state.displaced.contains(&id) => Health::Down,
            Some((_, vitals)) if !vitals.disk_error.is_empty() => Health::Failed,
            Some((at, _)) if silent(*at) => Health::Down,
            Some(_) => Health::Up,
            None if state.since.is_some_and(silent) => Health::Down,
            None => Health::Up,
        }
    }

    /// What the last heartbeat said, and how long ago that was; the time of this lead for one that was not heard of.
    pub(crate) fn vitals(&self, id: ChunkserverId) -> (Option<Vitals>, Duration) {
        let state = self.lock();
        let ago = |at: Instant| clock::now().saturating_duration_since(at);
        match state.seen.get(&id) {
            Some((at, vitals)) => (Some(vitals.clone()), ago(*at)),
            None => (None, state.since.map_or(Duration::ZERO, ago)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vitals(disk_error: &str) -> Vitals {
        Vitals { capacity_bytes: 10, free_bytes: 5, disk_error: disk_error.to_owned(), failed: vec![], scrub: ScrubReport::default(), verify: ScrubReport::default(), protocol: 3 }
    }

    #[tokio::test(start_paused = true)]
    async fn health_follows_heartbeats() {
        let (live, id) = (Liveness::default(), ChunkserverId(1));
        live.enter(Term(1));
        assert_eq!(live.health(id), Health::Up, "the leader has not had the time to hear of it");
        tokio::time::advance(HEARTBEAT_DOWN_AFTER).await;
        assert_eq!(live.health(id), Health::Down);
        live.heard(id, vitals(""));
        assert_eq!(live.health(id), Health::Up);
        live.heard(id, vitals("EIO"));
        assert_eq!(live.health(id), Health::Failed);
        assert_eq!(live.vitals(id).0, Some(vitals("EIO")));
        live.enter(Term(1));
        assert_eq!(live.health(id), Health::Failed);
        live.heard(id, vitals(""));
        live.displace(id);
        assert_eq!((live.health(id), live.steady(Duration::ZERO).len()), (Health::Down, 0), "another one has its address");
        live.heard(id, vitals(""));
        assert_eq!((live.health(id), live.steady(Duration::ZERO).len()), (Health::Up, 1));
        live.enter(Term(2));
        assert_eq!(live.health(id), Health::Up);
    }

    #[test]
    fn the_highest_term_names_the_leader() {
        let (live, c) = (Liveness::default(), CopysetId(3));
        let leader = |cs, term| ReportedLeader { chunkserver: ChunkserverId(cs), term: Term(term) };
        live.leads(c, leader(1, 5));
        live.leads(c, leader(2, 4));
        live.leads(c, leader(0, 9));
        assert_eq!(live.leader(c), leader(1, 5));
        live.leads(c, leader(2, 6));
        assert_eq!((live.leader(c), live.led_by(ChunkserverId(2)), live.led_by(ChunkserverId(1))), (leader(2, 6), 1, 0));
    }
}
