//! Decides who should lead which copyset, so that every chunkserver leads about as many as the others. Pure; called by the
//! leader of the MDS once a second.
//!
//! Invariants: a lead is handed over only between replicas that have long been up, of a copyset whose replicas all are and
//! that does not move, to one that has applied nearly everything; every hand-over makes the numbers more even (the chunkserver
//! that gives leads at least two more than the one that takes), so it comes to an end and never swings back; a chunkserver
//! that is out gives everything away. At most [`HAND_OVERS_MAX`] at once: each is a moment's pause of its copyset.

use crate::machine::row::CopysetRow;
use ogee_common::id::{ChunkserverId, CopysetId, ReplicaId};
use std::collections::{HashMap, HashSet};

/// Hand-overs that are asked for at once in the whole cluster.
pub(crate) const HAND_OVERS_MAX: usize = 2;
/// A replica that has applied all but so many entries may lead: it catches up in a moment.
const BEHIND_MAX: u64 = 1024;

/// A copyset that may be led by another replica.
#[derive(Debug, Clone)]
pub(crate) struct Led<'a> {
    /// The copyset.
    pub(crate) copyset: CopysetId,
    /// Its replicas.
    pub(crate) row: &'a CopysetRow,
    /// Who leads it.
    pub(crate) leader: ChunkserverId,
    /// How far each replica is, by chunkserver.
    pub(crate) applied: HashMap<ChunkserverId, u64>,
    /// It must not change hands now: a move goes on, or it changed hands a moment ago.
    pub(crate) fixed: bool,
}

/// A lead that should change hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HandOver {
    /// The copyset.
    pub(crate) copyset: CopysetId,
    /// Who leads it.
    pub(crate) from: ChunkserverId,
    /// The replica that should.
    pub(crate) to: ReplicaId,
}

/// What to hand over next. `steady` are the chunkservers that have long been up, `out` those that are given up.
pub(crate) fn plan(copysets: &[Led<'_>], steady: &HashSet<ChunkserverId>, out: &HashSet<ChunkserverId>) -> Vec<HandOver> {
    let mut leads: HashMap<ChunkserverId, usize> = HashMap::new();
    for led in copysets {
        *leads.entry(led.leader).or_default() += 1;
    }
    let mut orders: Vec<HandOver> = vec![];
    while orders.len() < HAND_OVERS_MAX {
        let of = |id: ChunkserverId| leads.get(&id).copied().unwrap_or(0);
        // Giving away what is out counts as the greatest unevenness.
        let gain = |from, to| if out.contains(&from) { usize::MAX } else { of(from).saturating_sub(of(to)) };
        let busy: Vec<CopysetId> = orders.iter().map(|o| o.copyset).collect();
        let open = copysets.iter().filter(|led| !busy.contains(&led.copyset));
        let choices = open.flat_map(|led| heirs(led, steady, out).map(move |heir| (led, heir)));
        let best = choices
            .map(|(led, heir)| (gain(led.leader, heir.0), led, heir))
            .filter(|(gain, ..)| *gain >= 2)
            .max_by_key(|(gain, led, heir)| (*gain, std::cmp::Reverse((of(heir.0), led.copyset, heir.1))));
        let Some((_, led, (chunkserver, to))) = best else { break };
        orders.push(HandOver { copyset: led.copyset, from: led.leader, to });
        *leads.entry(led.leader).or_default() -= 1;
        *leads.entry(chunkserver).or_default() += 1;
    }
    orders
}

/// Who could lead instead.
fn heirs<'a>(
    led: &'a Led<'a>,
    steady: &'a HashSet<ChunkserverId>,
    out: &'a HashSet<ChunkserverId>,
) -> impl Iterator<Item = (ChunkserverId, ReplicaId)> + 'a {
    let applied = |id| led.applied.get(&id).copied().unwrap_or(0);
    let whole = !led.fixed && led.row.replicas.iter().all(|r| steady.contains(&r.chunkserver));
    let heirs = led.row.replicas.iter().filter(move |r| {
        whole
            && r.chunkserver != led.leader
            && !out.contains(&r.chunkserver)
            && applied(r.chunkserver).saturating_add(BEHIND_MAX) >= applied(led.leader)
    });
    heirs.map(|r| (r.chunkserver, r.replica))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::row::ReplicaRow;
    use ogee_common::id::PoolId;
    use proptest::prelude::*;

    fn row(copyset: u32, on: &[u32]) -> CopysetRow {
        let replica = |c: &u32| ReplicaRow {
            replica: ReplicaId(u64::from(copyset) * 100 + u64::from(*c)),
            chunkserver: ChunkserverId(*c),
            created: true,
        };
        CopysetRow { pool: PoolId(1), conf_epoch: 1, replicas: on.iter().map(replica).collect() }
    }

    fn led(copyset: u32, row: &CopysetRow, leader: u32) -> Led<'_> {
        let (copyset, leader) = (CopysetId(copyset), ChunkserverId(leader));
        Led { copyset, row, leader, applied: HashMap::new(), fixed: false }
    }

    fn ids(ids: impl IntoIterator<Item = u32>) -> HashSet<ChunkserverId> {
        ids.into_iter().map(ChunkserverId).collect()
    }

    #[test]
    fn only_what_is_whole_steady_and_caught_up_changes_hands() {
        let r = row(1, &[1, 2, 3]);
        let other = row(2, &[1, 2, 3]);
        let both = |first: Led<'_>| plan(&[first, led(2, &other, 1)], &ids(1..=3), &ids([]));
        assert_eq!(both(led(1, &r, 1)).len(), 1, "one of two goes");
        assert_eq!(both(led(1, &r, 2)), vec![], "one each is even");
        let behind = Led { applied: HashMap::from([(ChunkserverId(1), 5000)]), ..led(1, &r, 1) };
        assert!(both(behind).iter().all(|o| o.copyset == CopysetId(2)), "nobody else has applied that much");
        let fixed = Led { fixed: true, ..led(1, &r, 1) };
        assert!(both(fixed).iter().all(|o| o.copyset == CopysetId(2)));
        let pair = [led(1, &r, 1), led(2, &other, 1)];
        assert_eq!(plan(&pair, &ids(1..=2), &ids([])), vec![], "a replica is not steady");
        let drained = plan(&pair[..1], &ids(1..=3), &ids([1]));
        assert_eq!(drained.len(), 1, "who is out leads nothing");
        assert!(plan(&[led(1, &r, 2)], &ids(1..=3), &ids([1, 3])).is_empty(), "and is given nothing");
    }

    proptest! {
        /// Carrying out plan after plan ends, with every chunkserver within one of the others where all have all copysets.
        #[test]
        fn it_becomes_even_and_then_stays(servers in 3u32..6, copysets in 1u32..40, seeds in prop::collection::vec(0u32..100, 40)) {
            let all: Vec<u32> = (1..=servers).collect();
            let rows: Vec<CopysetRow> = (1..=copysets).map(|c| row(c, &all)).collect();
            let mut leaders: Vec<u32> = seeds.iter().take(copysets as usize).map(|s| s % servers + 1).collect();
            for _ in 0..60 {
                let now: Vec<Led<'_>> =
                    (1u32..).zip(&rows).zip(&leaders).map(|((c, r), l)| led(c, r, *l)).collect();
                let orders = plan(&now, &ids(1..=servers), &ids([]));
                prop_assert!(orders.len() <= HAND_OVERS_MAX);
                for order in orders {
                    let at = order.copyset.0 as usize - 1;
                    let heir = rows[at].replicas.iter().find(|r| r.replica == order.to).expect("a replica");
                    prop_assert_eq!(order.from.0, leaders[at]);
                    leaders[at] = heir.chunkserver.0;
                }
            }
            let counts: Vec<usize> = all.iter().map(|s| leaders.iter().filter(|l| *l == s).count()).collect();
            let (least, most) = (counts.iter().min().expect("some"), counts.iter().max().expect("some"));
            prop_assert!(most - least <= 1, "{:?}", counts);
        }
    }
}
