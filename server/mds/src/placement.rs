//! Plans the copysets of a pool: which chunkservers hold the replicas of each. Pure; called by the leader.
//!
//! Invariants: the replicas of a copyset lie in distinct zones; every zone is used in proportion to its disks, as far as
//! "once per copyset" allows; inside a zone the numbers of copysets per disk differ by at most one; no disk gets more than
//! [`COPYSETS_PER_CHUNKSERVER_MAX`]. Among equally loaded disks the one that shares the fewest copysets with those
//! already chosen is taken, which makes the scatter width (number of distinct partners of a disk) wide, so that many
//! disks help to rebuild a lost one. Any number of zones and unequal zones are planned; there is no retry loop.

use crate::seeded::Seeded;
use ogee_common::id::ChunkserverId;
use ogee_common::limits::COPYSETS_PER_CHUNKSERVER_MAX;
use std::collections::BTreeMap;

/// Copysets made per chunkserver when the operator names no number: as few as keep placement even, because entries of one
/// group share the work of Raft. 24 cost about a tenth more CPU per 4 KiB write at depth 32.
pub(crate) const COPYSETS_PER_CHUNKSERVER_DEFAULT: u32 = 16;

/// Most replicas of a copyset: five survive two losses.
pub(crate) const REPLICAS_MAX: u32 = 5;

/// A disk that can hold replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// The chunkserver.
    pub(crate) id: ChunkserverId,
    /// Its failure domain.
    pub(crate) zone: String,
}

/// Why no plan exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlacementError {
    /// Replicas need as many zones.
    #[error("{replicas} replicas need {replicas} zones with chunkservers, there are {zones}")]
    TooFewZones {
        /// Zones that have a chunkserver.
        zones: usize,
        /// Replicas wanted.
        replicas: u32,
    },
    /// A chunkserver would hold more than [`COPYSETS_PER_CHUNKSERVER_MAX`].
    #[error("{needed} copysets on one chunkserver, at most {COPYSETS_PER_CHUNKSERVER_MAX} are allowed; ask for fewer")]
    TooManyCopysets {
        /// Copysets on the fullest chunkserver of the plan.
        needed: usize,
    },
    /// Replicas outside 1 to 5.
    #[error("{0} replicas; 1 to {REPLICAS_MAX} are possible")]
    Replicas(u32),
}

/// The number of copysets for a pool of `disks` when none was asked for.
pub(crate) fn default_copysets(disks: usize, replicas: u32) -> u32 {
    let disks = u32::try_from(disks).unwrap_or(u32::MAX);
    (disks.saturating_mul(COPYSETS_PER_CHUNKSERVER_DEFAULT) / replicas.max(1)).max(1)
}

/// Plans `copysets` copysets of `replicas` over `disks`; the first chunkserver of each is the preferred first leader.
///
/// # Errors
/// [`PlacementError`].
pub(crate) fn plan(
    disks: &[Disk],
    replicas: u32,
    copysets: u32,
    seed: u64,
) -> Result<Vec<Vec<ChunkserverId>>, PlacementError> {
    if replicas == 0 || replicas > REPLICAS_MAX {
        return Err(PlacementError::Replicas(replicas));
    }
    let mut planner = Planner::new(disks, Seeded::new(seed));
    if planner.zones.len() < replicas as usize {
        return Err(PlacementError::TooFewZones { zones: planner.zones.len(), replicas });
    }
    let sizes: Vec<usize> = planner.zones.iter().map(Vec::len).collect();
    let mut quotas = zone_quotas(&sizes, replicas as usize, copysets as usize);
    let plan = (0..copysets).map(|_| planner.next_copyset(replicas as usize, &mut quotas)).collect();
    let needed = planner.load.iter().copied().max().unwrap_or(0);
    if needed > COPYSETS_PER_CHUNKSERVER_MAX as usize {
        return Err(PlacementError::TooManyCopysets { needed });
    }
    Ok(plan)
}

/// How many copysets each zone takes part in: in proportion to its disks, at most `copysets` each, `replicas * copysets`
/// in all.
fn zone_quotas(sizes: &[usize], replicas: usize, copysets: usize) -> Vec<usize> {
    let mut slots = replicas * copysets;
    let mut disks: usize = sizes.iter().sum();
    let mut quotas: Vec<Option<usize>> = vec![None; sizes.len()];
    // A zone too large for its share takes part in every copyset; the rest is shared by the others.
    while let Some(z) = (0..sizes.len()).find(|z| quotas[*z].is_none() && slots * sizes[*z] > copysets * disks) {
        quotas[z] = Some(copysets);
        slots -= copysets;
        disks -= sizes[z];
    }
    let mut open: Vec<usize> = (0..sizes.len()).filter(|z| quotas[*z].is_none()).collect();
    let mut left = slots;
    for z in &open {
        let share = slots * sizes[*z] / disks;
        quotas[*z] = Some(share);
        left -= share;
    }
    // Largest remainder first; a zone with remainder 0 is never reached, so no quota exceeds `copysets`.
    open.sort_by_key(|z| std::cmp::Reverse(slots * sizes[*z] % disks));
    for z in open.iter().take(left) {
        quotas[*z] = quotas[*z].map(|q| q + 1);
    }
    quotas.into_iter().map(|q| q.unwrap_or(0)).collect()
}

struct Planner<'a> {
    disks: &'a [Disk],
    /// Positions of the disks of each zone.
    zones: Vec<Vec<usize>>,
    load: Vec<usize>,
    /// Copysets shared by two disks, `shared[a * disks + b]`.
    shared: Vec<u32>,
    random: Seeded,
}

impl<'a> Planner<'a> {
    fn new(disks: &'a [Disk], random: Seeded) -> Self {
        let mut zones: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (position, disk) in disks.iter().enumerate() {
            zones.entry(&disk.zone).or_default().push(position);
        }
        let (zones, n) = (zones.into_values().collect(), disks.len());
        Self { disks, zones, load: vec![0; n], shared: vec![0; n * n], random }
    }

    fn next_copyset(&mut self, replicas: usize, quotas: &mut [usize]) -> Vec<ChunkserverId> {
        let mut order: Vec<usize> = (0..quotas.len()).collect();
        self.random.shuffle(&mut order);
        // Taking the zones with the largest rest keeps every rest at most the number of copysets still to come.
        order.sort_by_key(|z| std::cmp::Reverse(quotas[*z]));
        order.truncate(replicas);
        self.random.shuffle(&mut order);
        let mut chosen: Vec<usize> = Vec::with_capacity(replicas);
        for zone in order {
            quotas[zone] -= 1;
            let disk = self.pick(zone, &chosen);
            chosen.push(disk);
        }
        for a in &chosen {
            self.load[*a] += 1;
            for b in &chosen {
                self.shared[a * self.disks.len() + b] += 1;
            }
        }
        chosen.iter().map(|d| self.disks[*d].id).collect()
    }

    fn pick(&mut self, zone: usize, chosen: &[usize]) -> usize {
        let mut candidates = self.zones[zone].clone();
        self.random.shuffle(&mut candidates);
        let shared = |d: usize| chosen.iter().map(|c| self.shared[d * self.disks.len() + c]).sum::<u32>();
        let best = candidates.into_iter().min_by_key(|d| (self.load[*d], shared(*d)));
        best.expect("a zone has at least one disk")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn disks(zones: &[usize]) -> Vec<Disk> {
        let zone_of = zones.iter().enumerate().flat_map(|(z, n)| std::iter::repeat_n(z, *n));
        zone_of.zip(1u32..).map(|(z, id)| Disk { id: ChunkserverId(id), zone: format!("z{z}") }).collect()
    }

    fn loads(disks: &[Disk], plan: &[Vec<ChunkserverId>]) -> Vec<usize> {
        disks.iter().map(|d| plan.iter().filter(|c| c.contains(&d.id)).count()).collect()
    }

    fn spread(loads: &[usize]) -> usize {
        loads.iter().max().expect("disks") - loads.iter().min().expect("disks")
    }

    proptest! {
        #[test]
        fn replicas_lie_in_distinct_zones_and_zones_are_even_inside(
            zones in prop::collection::vec(1usize..8, 1..9),
            replicas in 1u32..=5,
            copysets in 1u32..80,
            seed: u64,
        ) {
            let disks = disks(&zones);
            let plan = match plan(&disks, replicas, copysets, seed) {
                Ok(plan) => plan,
                Err(PlacementError::TooFewZones { zones: n, .. }) => {
                    prop_assert!(n < replicas as usize);
                    return Ok(());
                }
                Err(PlacementError::TooManyCopysets { needed }) => {
                    prop_assert!(needed > 50 && copysets > 50);
                    return Ok(());
                }
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            };
            prop_assert_eq!(plan.len(), copysets as usize);
            let zone_of = |id: ChunkserverId| &disks[id.0 as usize - 1].zone;
            for copyset in &plan {
                let distinct: BTreeSet<_> = copyset.iter().map(|id| zone_of(*id)).collect();
                prop_assert_eq!(distinct.len(), replicas as usize);
            }
            let loads = loads(&disks, &plan);
            for z in 0..zones.len() {
                let zone = format!("z{z}");
                let inside: Vec<usize> =
                    disks.iter().zip(&loads).filter(|(d, _)| d.zone == zone).map(|(_, l)| *l).collect();
                prop_assert!(spread(&inside) <= 1, "zone {} of {:?}: {:?}", z, zones, inside);
            }
        }

        #[test]
        fn equal_zones_give_even_disks(
            zones in 3usize..8, per_zone in 1usize..8, copysets in 1u32..60, seed: u64,
        ) {
            let disks = disks(&vec![per_zone; zones]);
            if let Ok(plan) = plan(&disks, 3, copysets, seed) {
                prop_assert!(spread(&loads(&disks, &plan)) <= 1);
            }
        }

        #[test]
        fn quotas_add_up_and_fit(
            sizes in prop::collection::vec(1usize..50, 3..10), replicas in 1usize..=3, copysets in 1usize..500,
        ) {
            let quotas = zone_quotas(&sizes, replicas, copysets);
            prop_assert_eq!(quotas.iter().sum::<usize>(), replicas * copysets);
            prop_assert!(quotas.iter().all(|q| *q <= copysets));
        }

        #[test]
        fn scatter_is_wide(zones in 3usize..6, per_zone in 3usize..8, seed: u64) {
            let disks = disks(&vec![per_zone; zones]);
            let copysets = default_copysets(disks.len(), 3);
            let plan = plan(&disks, 3, copysets, seed).expect("a plan");
            for disk in &disks {
                let partners: BTreeSet<_> =
                    plan.iter().filter(|c| c.contains(&disk.id)).flatten().filter(|id| **id != disk.id).collect();
                let possible = (disks.len() - per_zone).min(2 * COPYSETS_PER_CHUNKSERVER_DEFAULT as usize);
                // By chance alone 2 * 16 partners drawn from 28 are 19 different ones.
                prop_assert!(partners.len() * 10 >= possible * 6, "{} of {possible} partners", partners.len());
            }
        }
    }

    #[test]
    fn a_dominant_zone_is_used_once_per_copyset() {
        let disks = disks(&[10, 1, 1]);
        let plan = plan(&disks, 3, 30, 1).expect("a plan");
        assert_eq!(loads(&disks, &plan)[10..], [30, 30]);
    }

    #[test]
    fn impossible_wishes_are_refused() {
        assert_eq!(
            plan(&disks(&[5, 5]), 3, 1, 1),
            Err(PlacementError::TooFewZones { zones: 2, replicas: 3 })
        );
        assert_eq!(plan(&disks(&[1, 1, 1]), 3, 51, 1), Err(PlacementError::TooManyCopysets { needed: 51 }));
        assert_eq!(plan(&disks(&[1]), 0, 1, 1), Err(PlacementError::Replicas(0)));
        assert_eq!(plan(&disks(&[1]), 6, 1, 1), Err(PlacementError::Replicas(6)));
    }

    #[test]
    fn the_default_number_follows_the_disks() {
        assert_eq!(default_copysets(3, 3), 16);
        assert_eq!(default_copysets(1, 1), 16);
        assert_eq!(default_copysets(0, 3), 1);
    }
}
