//! How long IO stands still when a chunkserver dies or hangs: the median of five, with every read verified.

use anyhow::{Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::load::Load;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const WORKERS: usize = 4;
const RUNS: u64 = 5;
const KILL_MAX: Duration = Duration::from_secs(2);
const STOP_MAX: Duration = Duration::from_secs(4);
/// How long a stopped chunkserver stays stopped.
const STOP_FOR: Duration = Duration::from_secs(20);

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_or_hung_chunkserver_costs_a_short_stall_and_nothing_else() -> Result<()> {
    let mut cluster = Cluster::start("stall", 3, 1)?;
    cluster.ok(&["volume", "create", "stall", "--size", "64M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "stall test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("stall")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, WORKERS, 7);
    let running = load.start(&volume, 0);
    load.goes_on(&running, 500).await?;
    let (mut killed, mut stopped) = (vec![], vec![]);
    for run in 0..RUNS {
        let victim = format!("cs-{}", run % 3 + 1);
        let _ = running.take_longest();
        cluster.kill(&victim)?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        load.goes_on(&running, 100).await?;
        killed.push(running.take_longest());
        cluster.revive()?;
        load.goes_on(&running, 500).await?;
    }
    for run in 0..RUNS {
        let victim = format!("cs-{}", run % 3 + 1);
        let _ = running.take_longest();
        cluster.pause(&victim)?;
        tokio::time::sleep(STOP_FOR).await;
        load.goes_on(&running, 100).await?;
        cluster.resume(&victim)?;
        load.goes_on(&running, 500).await?;
        stopped.push(running.take_longest());
    }
    running.finish().await?;
    load.verify(&volume).await?;
    volume.detach().await?;
    cluster.shut_down()?;
    eprintln!("longest operation with a chunkserver killed: {killed:?}; stopped: {stopped:?}");
    let (kill, stop) = (median(killed), median(stopped));
    ensure!(kill <= KILL_MAX, "median stall of a kill: {kill:?}, {KILL_MAX:?} are allowed");
    ensure!(stop <= STOP_MAX, "median stall of a stop: {stop:?}, {STOP_MAX:?} are allowed");
    Ok(())
}
