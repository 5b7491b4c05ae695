//! The leader of three MDS nodes dies: running IO does not notice, nothing that was acknowledged is lost, and the rest of the group goes
//! on with everything that needs an MDS.

use anyhow::{Context, Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::load::Load;

const SIZE: u64 = 32 << 20;

const NODES: [&str; 3] = ["mds-1", "mds-2", "mds-3"];

/// Name of the daemon that leads the MDS group.
fn leader(cluster: &Cluster) -> Result<String> {
    let status = cluster.json(&["status", "--json"])?;
    let nodes = status["mds"].as_array().context("no list of MDS nodes")?;
    let leads = |n: &&serde_json::Value| n["leader"].as_bool() == Some(true);
    let id = nodes.iter().find(leads).and_then(|n| n["id"].as_u64()).context("no MDS node leads")?;
    Ok(format!("mds-{id}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn io_does_not_notice_the_death_of_the_mds_leader() -> Result<()> {
    let mut cluster = Cluster::start("mds-killed", 3, 3)?;
    cluster.ok(&["volume", "create", "disk", "--size", "32M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "MDS test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("disk")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, 4, 11);
    let running = load.start(&volume, 0);
    // Every chunk has been written, so placement and fences are known.
    load.goes_on(&running, 1000).await?;
    for round in 0..2 {
        cluster.ok(&["snapshot", "create", &format!("disk@before-{round}")])?;
        load.goes_on(&running, 200).await?;
        let victim = leader(&cluster)?;
        let _ = running.take_longest();
        cluster.kill(&victim)?;
        load.goes_on(&running, 500).await?;
        eprintln!("{victim} killed: longest operation {:?}", running.take_longest());
        // The rest of the group serves, and remembers.
        cluster.ok(&["volume", "create", &format!("made-without-{victim}-{round}"), "--size", "1G"])?;
        cluster.ok(&["snapshot", "create", &format!("disk@after-{round}")])?;
        cluster.revive()?;
    }
    // IO does not need the MDS: it goes on while no node of the group can answer anything.
    for node in NODES {
        cluster.pause(node)?;
    }
    load.goes_on(&running, 500).await?;
    eprintln!("no MDS at all: longest operation {:?}", running.take_longest());
    for node in NODES {
        cluster.resume(node)?;
    }
    running.finish().await?;
    load.verify(&volume).await?;
    volume.detach().await?;
    let snapshots = cluster.json(&["snapshot", "ls", "disk", "--json"])?.to_string();
    for round in 0..2 {
        for name in ["before", "after"] {
            ensure!(snapshots.contains(&format!("{name}-{round}")), "snapshot {name}-{round} is lost: {snapshots}");
        }
    }
    cluster.shut_down()
}
