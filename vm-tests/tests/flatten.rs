//! A clone under verified load is flattened while chunkservers are killed: nobody notices but the parent, which can be deleted then.
//! What the clone and its own snapshots hold stays the same all the time, also after the parent is gone and its chunks with it.

use anyhow::{Context, Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::load::Load;
use ogee_vm_tests::torture::replicas;
use serde_json::Value;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
/// Slow enough to be struck in the middle.
const PACE: &str = "flatten_mib_per_second = 2";

/// Has the chunkservers flatten slowly.
fn slow_down(cluster: &mut Cluster) -> Result<()> {
    for number in 1..=3 {
        let file = cluster.folder().join(format!("cluster/cs-{number}/chunkserver.toml"));
        let text = std::fs::read_to_string(&file)?;
        ensure!(text.contains("flatten_mib_per_second = 32"), "no pace in {}", file.display());
        std::fs::write(&file, text.replace("flatten_mib_per_second = 32", PACE))?;
        cluster.kill(&format!("cs-{number}"))?;
    }
    cluster.revive()
}

async fn open(sdk: &Sdk, name: &str) -> Result<Volume> {
    Ok(Volume::open(sdk, &VolumeRef::parse(name)?, OpenMode::ReadWrite { steal: true }).await?)
}

fn progress(cluster: &Cluster) -> Result<(u64, u64)> {
    let info = cluster.json(&["volume", "info", "clone", "--json"])?;
    let number = |key: &str| info[key].as_u64().with_context(|| format!("no {key} in {info}"));
    Ok((number("flatten_done")?, number("flatten_total")?))
}

fn no_tasks(cluster: &Cluster) -> Result<()> {
    wait_for("the end of all layer tasks", Duration::from_secs(60), || {
        let status: Value = cluster.json(&["status", "--json"])?;
        Ok((status["tasks"].as_u64().context("tasks")? == 0).then_some(()))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flattened_clone_outlives_its_parent() -> Result<()> {
    let mut cluster = Cluster::start("flatten", 3, 1)?;
    slow_down(&mut cluster)?;
    cluster.ok(&["volume", "create", "golden", "--size", "64M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "flatten test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let golden = open(&sdk, "golden").await?;
    let load = Load::new(SIZE, 4, 31);
    let running = load.start(&golden, 0);
    load.goes_on(&running, 3000).await?;
    running.finish().await?;
    golden.detach().await?;
    cluster.ok(&["snapshot", "create", "golden@s"])?;
    cluster.ok(&["clone", "golden@s", "clone"])?;
    let before_all = cluster.checksum("clone")?;

    let clone = open(&sdk, "clone").await?;
    // A snapshot that has nothing of its own, and then one that has something.
    cluster.ok(&["snapshot", "create", "clone@empty"])?;
    let running = load.start(&clone, 1);
    load.goes_on(&running, 100).await?;
    cluster.ok(&["snapshot", "create", "clone@early"])?;
    let early = cluster.checksum("clone@early")?;

    let started = cluster.json(&["volume", "flatten", "clone", "--json"])?;
    ensure!(started["flatten_total"].as_u64().is_some_and(|total| total > 0), "it did not start: {started}");
    for victim in ["cs-2", "cs-1"] {
        let (done, total) = progress(&cluster)?;
        ensure!(done < total, "it was over before {victim} died: {done} of {total}; slow it down");
        cluster.kill(victim)?;
        load.goes_on(&running, 50).await?;
        cluster.revive()?;
        load.goes_on(&running, 50).await?;
    }
    cluster.ok(&["snapshot", "create", "clone@middle"])?;
    let middle = cluster.checksum("clone@middle")?;
    cluster.ok(&["volume", "flatten", "clone", "--cancel"])?;
    ensure!(progress(&cluster)? == (0, 0), "it is cancelled");
    let refused = cluster.refused(&["snapshot", "rm", "golden@s"])?;
    ensure!(refused.contains("clone"), "the parent is in use as long as the flatten is not over: {refused}");
    let flat = cluster.json(&["volume", "flatten", "clone", "--wait", "--json"])?;
    ensure!(flat["depth"] == 0 && flat["parent"] == "" && flat["flatten_total"] == 0, "it is not flat: {flat}");
    load.goes_on(&running, 100).await?;

    cluster.ok(&["snapshot", "rm", "golden@s"])?;
    cluster.ok(&["volume", "rm", "golden"])?;
    no_tasks(&cluster)?;
    // Still with the ancestry of its attach.
    load.goes_on(&running, 100).await?;
    running.finish().await?;
    load.verify(&clone).await?;
    clone.detach().await?;
    let clone = open(&sdk, "clone").await?;
    load.verify(&clone).await?;
    for (name, sum) in [("clone@empty", &before_all), ("clone@early", &early), ("clone@middle", &middle)] {
        ensure!(cluster.checksum(name)? == *sum, "{name} changed");
    }
    let compared = replicas::compare(&sdk).await?;
    eprintln!("equal: {compared:?}");
    clone.detach().await?;
    for name in ["clone@empty", "clone@early", "clone@middle"] {
        cluster.ok(&["snapshot", "rm", name])?;
    }
    cluster.ok(&["volume", "rm", "clone"])?;
    no_tasks(&cluster)?;
    cluster.shut_down()
}
