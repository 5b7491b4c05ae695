//! One operation of one disk fails, under verified load: a flush or write of the log, a write of a data file. It takes out that disk only: its process
//! ends and says why, the others lead at once and no IO fails, the MDS sees it. A supervisor starts it again and it holds what it should.

use anyhow::{Context, Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_disk::fault_file::FAULTS_VARIABLE;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::flips::{id_of, log_of};
use ogee_vm_tests::load::Load;
use ogee_vm_tests::process::is_alive;
use ogee_vm_tests::torture::replicas;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const VICTIM: u64 = 2;
const LIMIT: Duration = Duration::from_secs(60);
/// What fails (`server/disk/src/fault_file.rs`), and what the process must say of it before it ends.
const FAULTS: [(&str, &str); 4] = [
    ("sync segment- 20 1 errno:5", "Input/output error"),
    ("write segment- 20 1 torn:512", "segment-"),
    ("write segment- 20 1 errno:5", "Input/output error"),
    ("write chunks/ 20 1 errno:5", "Input/output error"),
];

/// What the MDS says of a chunkserver.
fn state_of(cluster: &Cluster, id: u64) -> Result<String> {
    let list = cluster.json(&["cluster", "chunkservers", "--json"])?;
    let own = list.as_array().context("a list")?.iter().find(|c| c["id"] == id).context("listed")?;
    Ok(own["state"].as_str().context("a state")?.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_operation_takes_out_its_disk_only() -> Result<()> {
    let mut cluster = Cluster::start("failed-disk", 4, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "failed disk test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("disk")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, 4, 37);
    let running = load.start(&volume, 0);
    load.goes_on(&running, 300).await?;
    let (name, id) = (format!("cs-{VICTIM}"), id_of(&cluster, VICTIM)?);
    let plan = cluster.folder().join("faults");
    for (fault, says) in FAULTS {
        // It is started again as one whose disk can be made to fail; until the file is there, it does not.
        cluster.kill(&name)?;
        cluster.revive_with(&[(FAULTS_VARIABLE, &plan.display().to_string())])?;
        wait_for("the MDS to see it up", LIMIT, || Ok((state_of(&cluster, id)? == "up").then_some(())))?;
        let (pid, before) = (cluster.daemon(&name)?.pid, log_of(&cluster, VICTIM)?.len());
        std::fs::write(plan.with_extension("new"), format!("{fault}\n"))?;
        std::fs::rename(plan.with_extension("new"), &plan)?;
        wait_for(&format!("the end of the chunkserver after {fault:?}"), LIMIT, || Ok((!is_alive(pid)).then_some(())))?;
        std::fs::remove_file(&plan)?;
        load.goes_on(&running, 300).await?;
        let log = log_of(&cluster, VICTIM)?;
        ensure!(log[before..].contains(says), "after {fault:?} {says:?} is not in what it says: {}", &log[before..]);
        wait_for("the MDS to see it fail", LIMIT, || Ok((state_of(&cluster, id)? != "up").then_some(())))?;
        eprintln!("{fault}: longest operation {:?}", running.take_longest());
        cluster.revive()?;
        wait_for("the MDS to see it up", LIMIT, || Ok((state_of(&cluster, id)? == "up").then_some(())))?;
        load.goes_on(&running, 300).await?;
    }
    running.finish().await?;
    load.verify(&volume).await?;
    let compared = replicas::compare(&sdk).await?;
    eprintln!("equal at the end: {compared:?}");
    volume.detach().await?;
    cluster.shut_down()
}
