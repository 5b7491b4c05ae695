//! How long IO stands still when a chunkserver dies or hangs: the median of five, with every read verified.
//!
//! On a machine that others use as well a time says as much about them as about us. So the test asserts what is a defect on any machine
//! ([`KILL_CAP`], [`STOP_CAP`]: nobody took over) and prints the medians; `make stalls`, on a quiet machine, holds them to the bars.

use anyhow::{Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::load::Load;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const WORKERS: usize = 4;
const RUNS: u64 = 5;
/// Bars of the medians on a quiet machine.
const KILL_BAR: Duration = Duration::from_secs(2);
const STOP_BAR: Duration = Duration::from_secs(4);
/// No machine is slow enough to excuse more: a stopped chunkserver stays so for [`STOP_FOR`], and nobody may wait for its return.
const KILL_CAP: Duration = Duration::from_secs(8);
const STOP_CAP: Duration = Duration::from_secs(12);
/// Set by `make stalls`: the medians have to hold the bars.
const HOLD_BARS: &str = "OGEE_STALL_BARS";
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
    let bars = std::env::var_os(HOLD_BARS).is_some();
    let (kill_max, stop_max) = if bars { (KILL_BAR, STOP_BAR) } else { (KILL_CAP, STOP_CAP) };
    let (kill, stop) = (median(killed), median(stopped));
    eprintln!("medians: killed {kill:?} (bar {KILL_BAR:?}), stopped {stop:?} (bar {STOP_BAR:?})");
    ensure!(kill <= kill_max, "median stall of a kill: {kill:?}, {kill_max:?} are allowed");
    ensure!(stop <= stop_max, "median stall of a stop: {stop:?}, {stop_max:?} are allowed");
    Ok(())
}
