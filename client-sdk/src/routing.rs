//! Who leads a copyset, and where its replicas are. Shared by all volumes and threads of a [`crate::Cluster`]. Pure
//! bookkeeping, no IO (that is in `resolve.rs`).
//!
//! Invariant: the term of a copyset's target never goes back. `session.rs` rests on it: a retry is never sent with a
//! lower term than an earlier attempt. A hint of a lower term is ignored, and when a leader is forgotten its term stays.
//!
//! A leader that did not answer is *suspect*: the same leader and term named by another replica is no news (it has not
//! noticed yet either) and is not believed; the leader's own word is.

use ogee_common::id::{ChunkserverId, CopysetId, Term};
use ogee_proto::mds;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A replica of a copyset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplicaAddr {
    pub(crate) chunkserver: ChunkserverId,
    pub(crate) addr: SocketAddr,
}

/// Where to send a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) chunkserver: ChunkserverId,
    pub(crate) addr: SocketAddr,
    pub(crate) term: Term,
}

impl Target {
    /// The replica that it is.
    pub(crate) fn replica(&self) -> ReplicaAddr {
        ReplicaAddr { chunkserver: self.chunkserver, addr: self.addr }
    }
}

/// The replicas of one copyset.
pub(crate) type Replicas = SmallVec<[ReplicaAddr; 3]>;

#[derive(Debug, Default)]
struct Route {
    replicas: Replicas,
    leader: Option<ChunkserverId>,
    term: Term,
    suspect: Option<(ChunkserverId, Term)>,
}

/// Who says who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Witness {
    /// The leader itself.
    Leader,
    /// A follower, or the MDS.
    Other,
}

/// What is known of copysets; one entry for each copyset that was ever used.
#[derive(Debug, Default)]
pub(crate) struct RouteTable(Mutex<HashMap<CopysetId, Route>>);

impl RouteTable {
    fn map(&self) -> MutexGuard<'_, HashMap<CopysetId, Route>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The leader, if one is known and its address too.
    pub(crate) fn target(&self, copyset: CopysetId) -> Option<Target> {
        let map = self.map();
        let route = map.get(&copyset)?;
        let leader = route.leader?;
        let replica = route.replicas.iter().find(|r| r.chunkserver == leader)?;
        Some(Target { chunkserver: leader, addr: replica.addr, term: route.term })
    }

    /// The replicas; empty if nothing is known of the copyset.
    pub(crate) fn replicas(&self, copyset: CopysetId) -> Replicas {
        self.map().get(&copyset).map(|r| r.replicas.clone()).unwrap_or_default()
    }

    /// Of `copysets`, those that are not known yet, without repetition.
    pub(crate) fn unknown(&self, copysets: &[CopysetId]) -> Vec<u32> {
        let map = self.map();
        let mut ids: Vec<u32> =
            copysets.iter().filter(|c| map.get(c).is_none_or(|r| r.replicas.is_empty())).map(|c| c.0).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Takes over what the MDS knows. Replicas without a usable address are left out.
    pub(crate) fn install(&self, copysets: &[mds::Copyset]) {
        for c in copysets {
            let replicas: Replicas = c
                .replicas
                .iter()
                .filter_map(|r| {
                    Some(ReplicaAddr { chunkserver: ChunkserverId(r.chunkserver), addr: r.addr.parse().ok()? })
                })
                .collect();
            if replicas.len() < c.replicas.len() {
                tracing::warn!(target: "controlpath", copyset = c.id, "a replica has no usable address");
            }
            if !replicas.is_empty() {
                self.map().entry(CopysetId(c.id)).or_default().replicas = replicas;
            }
            self.learn(CopysetId(c.id), ChunkserverId(c.leader), Term(c.term), Witness::Other);
        }
    }

    /// Takes over a hint. Returns whether the copyset has a leader now that may be asked.
    pub(crate) fn learn(&self, copyset: CopysetId, leader: ChunkserverId, term: Term, witness: Witness) -> bool {
        let mut map = self.map();
        let route = map.entry(copyset).or_default();
        let is_news = leader.0 != 0
            && term.0 != 0
            && (term > route.term || (term == route.term && route.leader.is_none()))
            && (witness == Witness::Leader || route.suspect != Some((leader, term)));
        if is_news {
            (route.leader, route.term, route.suspect) = (Some(leader), term, None);
        }
        route.leader.is_some()
    }

    /// The target did not serve a request; if it is still the presumed leader, it is so no more.
    pub(crate) fn forget(&self, copyset: CopysetId, target: &Target) {
        if let Some(route) = self.map().get_mut(&copyset)
            && route.leader == Some(target.chunkserver)
            && route.term == target.term
        {
            route.leader = None;
            route.suspect = Some((target.chunkserver, target.term));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const C: CopysetId = CopysetId(5);

    fn table() -> RouteTable {
        let table = RouteTable::default();
        let replica = |n: u32| mds::Replica { replica: u64::from(n), chunkserver: n, addr: format!("127.0.0.1:{n}") };
        let copyset = mds::Copyset { id: C.0, replicas: (1..4).map(replica).collect(), ..Default::default() };
        table.install(&[copyset]);
        table
    }

    #[test]
    fn a_suspect_is_believed_only_by_its_own_word() {
        let table = table();
        assert!(table.learn(C, ChunkserverId(1), Term(4), Witness::Other));
        let target = table.target(C).expect("a leader is known");
        table.forget(C, &target);
        assert_eq!(table.target(C), None);
        assert!(!table.learn(C, ChunkserverId(1), Term(4), Witness::Other));
        assert!(!table.learn(C, ChunkserverId(2), Term(3), Witness::Leader), "an older term is no news");
        assert!(table.learn(C, ChunkserverId(1), Term(4), Witness::Leader));
        table.forget(C, &target);
        assert!(table.learn(C, ChunkserverId(2), Term(5), Witness::Other));
        table.forget(C, &target);
        assert_eq!(table.target(C).map(|t| t.chunkserver), Some(ChunkserverId(2)), "only the one that failed");
    }

    #[test]
    fn a_leader_without_address_is_no_target() {
        let table = table();
        assert!(table.learn(C, ChunkserverId(9), Term(1), Witness::Other));
        assert_eq!(table.target(C), None);
        assert_eq!(table.unknown(&[C, CopysetId(6), CopysetId(6)]), vec![6]);
    }

    proptest! {
        #[test]
        fn the_term_of_the_target_never_goes_back(
            steps in prop::collection::vec((0u32..4, 0u64..6, any::<bool>(), any::<bool>()), 0..60)
        ) {
            let table = table();
            let mut highest = Term(0);
            for (leader, term, by_itself, fails) in steps {
                let witness = if by_itself { Witness::Leader } else { Witness::Other };
                table.learn(C, ChunkserverId(leader), Term(term), witness);
                if let Some(target) = table.target(C) {
                    prop_assert!(target.term >= highest);
                    highest = target.term;
                    if fails {
                        table.forget(C, &target);
                    }
                }
            }
        }
    }
}
