//! The whole store against an oracle: random writes, zeros, snapshots, clones, merges and deletions, with crashes at any
//! point and replay from the last checkpoint.

mod support;

use proptest::prelude::*;
use support::replica::{Replica, tiny};
use support::world::World;
use support::{Rng, run};

/// One history: events, checkpoints, kills, power cuts, sometimes in the middle of a replay.
async fn history(seed: u64, events: u32, mut world: World) {
    let mut rng = Rng(seed);
    let mut replica = Replica::new(tiny()).await;
    for _ in 0..events {
        world.event(&mut rng);
        replica.catch_up(&world.log, world.log.len()).await;
        match rng.below(16) {
            0 | 1 => replica.checkpoint().await,
            2 => replica.check(&world).await,
            3 | 4 => {
                crash(&mut replica, &mut rng).await;
                // The replay may itself be cut short, with or without a checkpoint in it.
                while rng.chance(3) {
                    let from = replica.next_index();
                    let room = (world.log.len() - from) as u64;
                    let upto = from + usize::try_from(rng.below(room + 1)).expect("small");
                    replica.catch_up(&world.log, upto).await;
                    if rng.chance(3) {
                        replica.checkpoint().await;
                    }
                    crash(&mut replica, &mut rng).await;
                }
                replica.catch_up(&world.log, world.log.len()).await;
                replica.check(&world).await;
            }
            _ => {}
        }
    }
    replica.check(&world).await;
    replica.checkpoint().await;
    replica.kill().await;
    assert_eq!(replica.next_index(), world.log.len(), "a checkpoint holds everything");
    replica.check(&world).await;
}

async fn crash(replica: &mut Replica, rng: &mut Rng) {
    let before = replica.store().applied();
    if rng.chance(2) {
        replica.kill().await;
    } else {
        replica.power_cut(rng).await;
    }
    assert!(replica.store().applied().pos <= before.pos, "a crash does not move forward");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_the_oracle(seed in any::<u64>(), events in 1u32..80) {
        run(history(seed, events, World::default()));
    }

    /// Clients that fill missing pages from a backup, and paste what they write in part: whatever was pasted when, what they read is the same.
    #[test]
    fn layers_on_a_backup_agree_with_the_oracle(seed in any::<u64>(), events in 1u32..80) {
        run(history(seed, events, World::lazy()));
    }
}
