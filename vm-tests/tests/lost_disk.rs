//! Lost and drained chunkservers: every copyset gets back its three replicas, under verified load and without an error.

use anyhow::{Context, Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::load::Load;
use ogee_vm_tests::process::is_alive;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const WORKERS: usize = 4;
/// For everything to move; on a quiet machine it takes seconds.
const REBUILD_MAX: Duration = Duration::from_secs(180);

fn data(cluster: &Cluster, daemon: &str) -> Result<PathBuf> {
    let log = &cluster.daemon(daemon)?.log;
    Ok(log.parent().context("a folder per daemon")?.join("data"))
}

/// The id of the chunkserver that serves at the address of `daemon` now.
fn id_of(cluster: &Cluster, daemon: &str) -> Result<u64> {
    let state = cluster.json(&["dev", "status", "--dir", &dir(cluster, daemon)?, "--json"])?;
    let daemons = state["daemons"].as_array().context("daemons")?;
    let addr = daemons.iter().find(|d| d["name"] == daemon).context("known")?["addr"].clone();
    let list = cluster.json(&["cluster", "chunkservers", "--json"])?;
    let up = |c: &&Value| c["addr"] == addr && c["state"] == "up";
    let server = list.as_array().context("a list")?.iter().find(up).context("up")?;
    server["id"].as_u64().context("an id")
}

fn dir(cluster: &Cluster, daemon: &str) -> Result<String> {
    let data = data(cluster, daemon)?;
    let root = data.parent().and_then(Path::parent).context("the cluster's folder")?;
    Ok(root.display().to_string())
}

fn hosts(cluster: &Cluster) -> Result<Vec<BTreeSet<u64>>> {
    let list = cluster.json(&["cluster", "copysets", "--json"])?;
    let of = |c: &Value| {
        let replicas = c["replicas"].as_array().context("replicas")?;
        replicas.iter().map(|r| r["chunkserver"].as_u64().context("a chunkserver")).collect()
    };
    list.as_array().context("a list")?.iter().map(of).collect()
}

/// How many copysets each chunkserver leads, except for the one that is out.
fn leads(cluster: &Cluster, out: u64) -> Result<Vec<u64>> {
    let list = cluster.json(&["cluster", "chunkservers", "--json"])?;
    let servers = list.as_array().context("a list")?.iter().filter(|c| c["id"] != out);
    servers.map(|c| c["leaders"].as_u64().context("a number")).collect()
}

/// Waits until nothing is left to move and nobody is on `gone`; what the rest of the cluster looks like then is checked.
fn wait_whole(cluster: &Cluster, gone: u64) -> Result<Duration> {
    let start = clock::now();
    wait_for("the rebuild", REBUILD_MAX, || {
        let status = cluster.json(&["status", "--json"])?;
        let left = status["moves"].as_u64().context("moves")? + status["moves_waiting"].as_u64().context("waiting")?;
        let whole = left == 0 && status["copysets_degraded"] == 0;
        Ok((whole && hosts(cluster)?.iter().all(|on| !on.contains(&gone))).then_some(()))
    })?;
    for on in hosts(cluster)? {
        ensure!(on.len() == 3, "a copyset on {on:?}");
    }
    Ok(start.elapsed())
}

/// Files of chunk data below a data directory; empty folders do not count.
fn data_files(root: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(root)? {
        let path = entry?.path();
        if !path.is_dir() {
            count += 1;
        } else if path.file_name().is_some_and(|n| n != "wal" && n != "meta") {
            count += data_files(&path)?;
        }
    }
    Ok(count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_disk_is_rebuilt_and_a_good_one_drained() -> Result<()> {
    let mut cluster = Cluster::start("rebuild", 4, 1)?;
    cluster.ok(&["volume", "create", "rebuild", "--size", "64M"])?;
    // Logs without their beginnings: the new replicas have to be copied, not replayed.
    cluster.ok(&["volume", "create", "bulk", "--size", "1G"])?;
    cluster.ok(&["bench", "bulk", "--rw", "write", "--bs", "1M", "--iodepth", "4", "--runtime", "3"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "rebuild test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("rebuild")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, WORKERS, 11);
    let running = load.start(&volume, 0);
    load.goes_on(&running, 500).await?;

    // The disk goes under the running process, which has to notice.
    let (lost, pid) = (id_of(&cluster, "cs-2")?, cluster.daemon("cs-2")?.pid);
    std::fs::remove_dir_all(data(&cluster, "cs-2")?)?;
    wait_for("the end of a chunkserver without a disk", Duration::from_secs(30), || Ok((!is_alive(pid)).then_some(())))?;
    load.goes_on(&running, 200).await?;
    cluster.ok(&["cluster", "out", &lost.to_string()])?;
    let rebuilt = wait_whole(&cluster, lost)?;
    load.goes_on(&running, 200).await?;

    // A new disk in its place is a new chunkserver. The old one can be forgotten.
    cluster.revive()?;
    let fresh = id_of(&cluster, "cs-2")?;
    ensure!(fresh != lost, "an empty disk took the identity of the lost one");
    cluster.ok(&["cluster", "rm", &lost.to_string()])?;
    // A good one is drained onto it, and keeps nothing.
    let drained = id_of(&cluster, "cs-3")?;
    cluster.refused(&["cluster", "rm", &drained.to_string()])?;
    cluster.ok(&["cluster", "out", &drained.to_string()])?;
    let moved = wait_whole(&cluster, drained)?;
    let (folder, new) = (data(&cluster, "cs-3")?, data(&cluster, "cs-2")?);
    let plain = |f: &Path| -> Result<usize> { Ok(std::fs::read_dir(f)?.filter(|e| e.as_ref().is_ok_and(|e| e.path().is_file())).count()) };
    let gone = || Ok((data_files(&folder)? == plain(&folder)?).then_some(()));
    wait_for("the data of a drained chunkserver to go", REBUILD_MAX, gone)?;
    ensure!(data_files(&new)? > plain(&new)?, "no data is where it should have gone");
    load.goes_on(&running, 200).await?;

    // And back again: a disk that had a replica of a copyset gets another one of it.
    cluster.ok(&["cluster", "in", &drained.to_string()])?;
    cluster.ok(&["cluster", "out", &fresh.to_string()])?;
    let back = wait_whole(&cluster, fresh)?;
    load.goes_on(&running, 200).await?;

    // Whoever is in leads about as much as the others, and nobody notices how that came about.
    let even = wait_for("leads to be even", REBUILD_MAX, || {
        let leads = leads(&cluster, fresh)?;
        let (least, most) = (leads.iter().min().context("some")?, leads.iter().max().context("some")?);
        Ok((most - least <= 1).then(|| leads.clone()))
    })?;
    load.goes_on(&running, 200).await?;

    // The new replicas are as good as the old ones: the only other one of many chunks is killed.
    cluster.kill("cs-1")?;
    load.goes_on(&running, 200).await?;
    running.finish().await?;
    load.verify(&volume).await?;
    volume.detach().await?;
    cluster.revive()?;
    cluster.shut_down()?;
    eprintln!("lost disk rebuilt in {rebuilt:?}, good one drained in {moved:?}, and back in {back:?}; leads {even:?}");
    Ok(())
}
