//! Every acknowledged write survives kill -9 of all processes at any moment.
//!
//! Each round runs a verified load, kills every daemon at a random moment (every third round also the client, in the middle of its
//! requests), starts the cluster again and compares every sector. `OGEE_CRASH_ROUNDS` (default 30) and `OGEE_SEED` choose how long
//! and which.

use anyhow::{Context, Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::load::Load;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Four chunks, so that several copysets take part, and small enough to be compared whole each round.
const SIZE: u64 = 64 << 20;
const WORKERS: usize = 8;
/// After the start of all daemons the cluster must serve within this time, also on a machine that others use.
const RESTART_MAX: Duration = Duration::from_secs(30);

fn variable(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text} is not a number")),
        Err(_) => Ok(default),
    }
}

async fn open(cluster: &Cluster) -> Result<Volume> {
    let config = ClusterConfig { mds: cluster.mds(), description: "crash test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    Ok(Volume::open(&sdk, &VolumeRef::parse("crash")?, OpenMode::ReadWrite { steal: true }).await?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_the_death_of_every_process() -> Result<()> {
    let rounds = variable("OGEE_CRASH_ROUNDS", 30)?;
    let seed = variable("OGEE_SEED", 1)?;
    eprintln!("seed {seed}, {rounds} rounds");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start("crash", 3, 1)?;
    cluster.ok(&["volume", "create", "crash", "--size", "64M"])?;
    let load = Load::new(SIZE, WORKERS, seed);
    let mut volume = open(&cluster).await?;
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        let before = load.operations.load(Ordering::Relaxed);
        let running = load.start(&volume, round);
        let target = before + 50;
        let patience = clock::now() + Duration::from_secs(60);
        while load.operations.load(Ordering::Relaxed) < target && !running.has_failed() && clock::now() < patience {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..600))).await;
        cluster.kill_all()?;
        let client_dies = round % 3 == 2;
        if client_dies {
            running.cut_off().await?;
            drop(volume);
            let start = clock::now();
            cluster.revive()?;
            slowest = slowest.max(start.elapsed());
            volume = open(&cluster).await?;
        } else {
            let start = clock::now();
            cluster.revive()?;
            slowest = slowest.max(start.elapsed());
            running.finish().await?;
        }
        load.verify(&volume).await.with_context(|| format!("round {round} of seed {seed}"))?;
        let done = load.operations.load(Ordering::Relaxed);
        ensure!(done >= target || client_dies, "round {round}: the load did not get going ({done} operations in all)");
    }
    eprintln!("{} operations verified; slowest restart {slowest:?}", load.operations.load(Ordering::Relaxed));
    volume.detach().await?;
    cluster.shut_down()?;
    ensure!(slowest <= RESTART_MAX, "the slowest restart took {slowest:?}, {RESTART_MAX:?} are allowed");
    Ok(())
}
