//! Decides which replicas move where, so that every copyset has all its replicas, in order, on chunkservers that are not
//! given up. Pure; called by the leader once a second.
//!
//! A replica that its chunkserver reports as failed (damaged or missing, on a disk that works) is rebuilt in its place, as a
//! new replica on the same chunkserver. Invariants: any other replica moves only from a chunkserver that is out, to one that is up, not out, of the same pool, in a zone
//! that no other replica of the copyset is in, and below [`COPYSETS_PER_CHUNKSERVER_MAX`]; a move begins only while a
//! majority of the copyset's replicas is up and in order; nothing moves to a chunkserver of an older build that would not understand what is written; at most [`MOVES_MAX`] moves go on, [`MOVES_PER_TARGET_MAX`] onto one
//! chunkserver, so that a rebuild does not take the disks from the guests. Copysets that have lost most come first, then
//! targets with the fewest copysets. A move whose target went away is given up.

use crate::machine::row::{CopysetRow, MoveRow, MoveState, ReplicaRow};
use ogee_common::id::{ChunkserverId, CopysetId, PoolId, ReplicaId};
use ogee_common::limits::COPYSETS_PER_CHUNKSERVER_MAX;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Moves that go on at once in the whole cluster.
const MOVES_MAX: usize = 16;
/// Moves onto one chunkserver at once.
const MOVES_PER_TARGET_MAX: usize = 2;

/// A chunkserver as a rebuild sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its failure domain.
    pub(crate) zone: String,
    /// The pool it registered for, if that exists.
    pub(crate) pool: Option<PoolId>,
    /// Heard of lately, with a healthy disk.
    pub(crate) up: bool,
    /// Given up.
    pub(crate) out: bool,
    /// Understands every entry that is written to copysets now. One of an older build may do so only while no volume stands on a backup.
    pub(crate) understands: bool,
}

/// Everything there is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scene {
    /// Every chunkserver.
    pub(crate) chunkservers: BTreeMap<ChunkserverId, Candidate>,
    /// Every copyset.
    pub(crate) copysets: Vec<(CopysetId, CopysetRow)>,
    /// Moves that go on.
    pub(crate) moves: HashMap<CopysetId, MoveRow>,
    /// Replicas that failed on chunkservers that are up.
    pub(crate) failed: HashSet<ReplicaId>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Begin a move.
    Start {
        /// The copyset.
        copyset: CopysetId,
        /// Its `conf_epoch`.
        conf_epoch: u64,
        /// The replica that goes.
        removed: ReplicaId,
        /// Who gets a new one.
        to: ChunkserverId,
    },
    /// Give a move up.
    Cancel {
        /// The copyset.
        copyset: CopysetId,
        /// The replica that was to come.
        added: ReplicaId,
    },
}

impl Scene {
    fn is_up(&self, id: ChunkserverId) -> bool {
        self.chunkservers.get(&id).is_some_and(|c| c.up)
    }

    fn is_out(&self, id: ChunkserverId) -> bool {
        self.chunkservers.get(&id).is_some_and(|c| c.out)
    }

    /// Replicas on chunkservers that are out, and failed ones.
    pub(crate) fn to_replace<'a>(&'a self, row: &'a CopysetRow) -> impl Iterator<Item = &'a ReplicaRow> {
        row.replicas.iter().filter(|r| self.is_out(r.chunkserver) || self.failed.contains(&r.replica))
    }

    fn missing(&self, row: &CopysetRow) -> usize {
        self.to_replace(row).count()
    }

    fn working(&self, row: &CopysetRow) -> usize {
        row.replicas.iter().filter(|r| self.is_up(r.chunkserver) && !self.failed.contains(&r.replica)).count()
    }

    /// Replicas to be replaced for which no move goes on.
    pub(crate) fn waiting(&self) -> usize {
        let without = self.copysets.iter().filter(|(id, _)| !self.moves.contains_key(id));
        without.map(|(_, row)| self.missing(row)).sum()
    }

    /// What to do next.
    pub(crate) fn plan(&self) -> Vec<Action> {
        let mut actions: Vec<Action> = vec![];
        let mut load: HashMap<ChunkserverId, usize> = HashMap::new();
        for replica in self.copysets.iter().flat_map(|(_, row)| &row.replicas) {
            *load.entry(replica.chunkserver).or_default() += 1;
        }
        let mut onto: HashMap<ChunkserverId, usize> = HashMap::new();
        for (copyset, moving) in &self.moves {
            *onto.entry(moving.added.chunkserver).or_default() += 1;
            *load.entry(moving.added.chunkserver).or_default() += 1;
            let target = moving.added.chunkserver;
            if moving.state == MoveState::Adding && (!self.is_up(target) || self.is_out(target)) {
                actions.push(Action::Cancel { copyset: *copyset, added: moving.added.replica });
            }
        }
        let mut wanting: Vec<&(CopysetId, CopysetRow)> = self.copysets.iter().filter(|(id, row)| self.wants(*id, row)).collect();
        wanting.sort_by_key(|(id, row)| {
            (self.working(row), std::cmp::Reverse(self.missing(row)), *id)
        });
        for (copyset, row) in wanting {
            if self.moves.len() + actions.iter().filter(|a| matches!(a, Action::Start { .. })).count() >= MOVES_MAX {
                break;
            }
            // A failed one is there to disturb; one that is out may still work.
            let Some(lost) = self.to_replace(row).max_by_key(|r| self.failed.contains(&r.replica)) else { continue };
            let Some(to) = self.target(row, lost, &load, &onto) else { continue };
            *load.entry(to).or_default() += 1;
            *onto.entry(to).or_default() += 1;
            actions.push(Action::Start { copyset: *copyset, conf_epoch: row.conf_epoch, removed: lost.replica, to });
        }
        actions
    }

    fn wants(&self, id: CopysetId, row: &CopysetRow) -> bool {
        !self.moves.contains_key(&id) && self.missing(row) > 0 && 2 * self.working(row) > row.replicas.len()
    }

    fn target(
        &self,
        row: &CopysetRow,
        lost: &ReplicaRow,
        load: &HashMap<ChunkserverId, usize>,
        onto: &HashMap<ChunkserverId, usize>,
    ) -> Option<ChunkserverId> {
        let own = lost.chunkserver;
        if self.failed.contains(&lost.replica) && self.is_up(own) && !self.is_out(own) {
            let busy = onto.get(&own).is_some_and(|n| *n >= MOVES_PER_TARGET_MAX);
            return (!busy).then_some(own);
        }
        let staying = row.replicas.iter().filter(|r| r.replica != lost.replica);
        let zones: Vec<&str> =
            staying.filter_map(|r| self.chunkservers.get(&r.chunkserver)).map(|c| &c.zone[..]).collect();
        let of = |map: &HashMap<ChunkserverId, usize>, id| map.get(&id).copied().unwrap_or(0);
        let fits = |(id, c): &(&ChunkserverId, &Candidate)| {
            c.up && !c.out && c.understands
                && c.pool == Some(row.pool)
                && !zones.contains(&&c.zone[..])
                && row.replicas.iter().all(|r| r.chunkserver != **id)
                && of(onto, **id) < MOVES_PER_TARGET_MAX
                && of(load, **id) < COPYSETS_PER_CHUNKSERVER_MAX as usize
        };
        let candidates = self.chunkservers.iter().filter(fits);
        candidates.min_by_key(|(id, _)| (of(load, **id), **id)).map(|(id, _)| *id)
    }

    /// Whether a silent chunkserver may be given up unasked: not while most of its pool is away too, because then the
    /// network or the MDS is what is broken, and moving everything would only make it worse.
    pub(crate) fn may_give_up(&self, id: ChunkserverId) -> bool {
        let Some(own) = self.chunkservers.get(&id) else { return false };
        let same: Vec<&Candidate> = self.chunkservers.values().filter(|c| c.pool == own.pool && !c.out).collect();
        2 * same.iter().filter(|c| c.up).count() > same.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const POOL: PoolId = PoolId(1);

    fn candidate(zone: usize) -> Candidate {
        Candidate { zone: format!("z{zone}"), pool: Some(POOL), up: true, out: false, understands: true }
    }

    fn replica(copyset: u32, chunkserver: u32) -> ReplicaRow {
        let replica = ReplicaId(u64::from(copyset) * 100 + u64::from(chunkserver));
        ReplicaRow { replica, chunkserver: ChunkserverId(chunkserver), created: true }
    }

    fn copyset(id: u32, on: &[u32]) -> (CopysetId, CopysetRow) {
        let replicas = on.iter().map(|c| replica(id, *c)).collect();
        (CopysetId(id), CopysetRow { pool: POOL, conf_epoch: 1, replicas })
    }

    fn scene(zones: &[usize], copysets: &[&[u32]]) -> Scene {
        let chunkservers = (1u32..).zip(zones).map(|(id, z)| (ChunkserverId(id), candidate(*z))).collect();
        let copysets = (1u32..).zip(copysets).map(|(id, on)| copyset(id, on)).collect();
        Scene { chunkservers, copysets, ..Scene::default() }
    }

    fn change(scene: &mut Scene, id: u32, change: impl FnOnce(&mut Candidate)) {
        change(scene.chunkservers.get_mut(&ChunkserverId(id)).expect("known"));
    }

    #[test]
    fn a_lost_disk_is_rebuilt_in_a_free_zone() {
        let mut s = scene(&[0, 1, 2, 1], &[&[1, 2, 3]]);
        assert_eq!(s.plan(), vec![]);
        change(&mut s, 2, |c| c.up = false);
        assert_eq!(s.plan(), vec![], "silence alone moves nothing");
        change(&mut s, 2, |c| c.out = true);
        let (copyset, removed, to) = (CopysetId(1), ReplicaId(102), ChunkserverId(4));
        assert_eq!(s.plan(), vec![Action::Start { copyset, conf_epoch: 1, removed, to }]);
        change(&mut s, 3, |c| c.up = false);
        assert_eq!(s.plan(), vec![], "no majority");
        change(&mut s, 3, |c| c.up = true);
        change(&mut s, 4, |c| c.understands = false);
        assert_eq!(s.plan(), vec![], "a chunkserver of an older build");
        change(&mut s, 4, |c| (c.understands, c.zone) = (true, "z0".to_owned()));
        assert_eq!(s.plan(), vec![], "two replicas in one zone");
    }

    #[test]
    fn a_failed_replica_is_rebuilt_in_its_place_while_the_others_are_a_majority() {
        let mut s = scene(&[0, 1, 2], &[&[1, 2, 3]]);
        s.failed.insert(ReplicaId(102));
        let (copyset, removed, to) = (CopysetId(1), ReplicaId(102), ChunkserverId(2));
        assert_eq!(s.plan(), vec![Action::Start { copyset, conf_epoch: 1, removed, to }]);
        assert_eq!(s.waiting(), 1);
        s.failed.insert(ReplicaId(103));
        assert_eq!(s.plan(), vec![], "two of three have failed: nobody can say what is right");
        s.failed.remove(&ReplicaId(103));
        change(&mut s, 1, |c| c.up = false);
        assert_eq!(s.plan(), vec![], "no majority");
        change(&mut s, 1, |c| c.up = true);
        change(&mut s, 2, |c| c.out = true);
        assert_eq!(s.plan(), vec![], "its place is given up and there is no other");
    }

    #[test]
    fn a_move_onto_a_dead_target_is_given_up() {
        let mut s = scene(&[0, 1, 2, 1], &[&[1, 2, 3]]);
        change(&mut s, 2, |c| c.out = true);
        let added = replica(1, 4);
        let row = MoveRow { removed: ReplicaId(102), added, state: MoveState::Adding, started_unix_ms: 0 };
        s.moves.insert(CopysetId(1), row.clone());
        assert_eq!(s.plan(), vec![]);
        change(&mut s, 4, |c| c.up = false);
        assert_eq!(s.plan(), vec![Action::Cancel { copyset: CopysetId(1), added: added.replica }]);
        s.moves.insert(CopysetId(1), MoveRow { state: MoveState::Cancelling, ..row });
        assert_eq!(s.plan(), vec![]);
    }

    #[test]
    fn one_silent_disk_is_given_up_and_half_of_them_are_not() {
        let mut s = scene(&[0, 1, 2, 3], &[]);
        change(&mut s, 1, |c| c.up = false);
        assert!(s.may_give_up(ChunkserverId(1)));
        change(&mut s, 2, |c| c.up = false);
        assert!(!s.may_give_up(ChunkserverId(1)));
        change(&mut s, 2, |c| c.out = true);
        assert!(s.may_give_up(ChunkserverId(1)), "who is given up already does not count");
    }

    proptest! {
        /// Applying plan after plan ends with every replica on a chunkserver that is in, if there is room in the zones.
        #[test]
        fn every_copyset_is_whole_in_the_end(
            per_zone in 1usize..4, zones in 4usize..7, copysets in 1u32..30, out in 1u32..4, seed: u64,
        ) {
            let places: Vec<usize> = (0..zones * per_zone).map(|i| i % zones).collect();
            let mut s = scene(&places, &[]);
            let disks: Vec<_> = s.chunkservers.iter()
                .map(|(id, c)| crate::placement::Disk { id: *id, zone: c.zone.clone() }).collect();
            let Ok(plan) = crate::placement::plan(&disks, 3, copysets, seed) else { return Ok(()) };
            s.copysets = (1u32..).zip(&plan)
                .map(|(id, on)| copyset(id, &on.iter().map(|c| c.0).collect::<Vec<_>>())).collect();
            change(&mut s, out, |c| { c.out = true; c.up = false; });
            let mut next = 1_000_000u64;
            for _ in 0..400 {
                let actions = s.plan();
                let mut onto: HashMap<ChunkserverId, usize> = HashMap::new();
                for action in actions {
                    let Action::Start { copyset, removed, to, .. } = action else { panic!("nothing went away") };
                    prop_assert!(s.chunkservers[&to].up && !s.chunkservers[&to].out);
                    let count = onto.entry(to).or_default();
                    *count += 1;
                    prop_assert!(*count <= MOVES_PER_TARGET_MAX);
                    let (_, row) = s.copysets.iter_mut().find(|(id, _)| *id == copyset).expect("known");
                    let place = row.replicas.iter_mut().find(|r| r.replica == removed).expect("a replica");
                    next += 1;
                    *place = ReplicaRow { replica: ReplicaId(next), chunkserver: to, created: true };
                    let zones: BTreeSet<&str> = row.replicas.iter().map(|r| &s.chunkservers[&r.chunkserver].zone[..]).collect();
                    prop_assert_eq!(zones.len(), 3);
                }
            }
            let full = s.chunkservers.values().filter(|c| !c.out).count() * COPYSETS_PER_CHUNKSERVER_MAX as usize;
            if (copysets as usize) * 3 * 2 < full {
                prop_assert!(s.copysets.iter().all(|(_, row)| s.missing(row) == 0));
            }
        }
    }
}
