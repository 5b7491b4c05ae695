//! A clone and a rollback of a 64 GiB volume, written in every segment, take at most 20 ms at the MDS and allocate no data.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use ogee_client::{BlockDevice, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::limits::SEGMENT_BYTES;
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use std::path::Path;
use std::time::Duration;

const SEGMENTS: u64 = 64;
/// Milliseconds of one call, its way to the MDS and back included; the median of five.
const COST_MS: f64 = 20.0;

/// Bytes that files below `dir` occupy on the disk.
fn occupied(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() { occupied(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(sum)
}

fn chunk_bytes(cluster: &Cluster) -> Result<u64> {
    // Blocks are allocated when dirty pages are written.
    let synced = std::process::Command::new("sync").status().context("run sync")?;
    ensure!(synced.success(), "sync: {synced}");
    let folder = |n: u32| cluster.folder().join(format!("cluster/cs-{n}/data/chunks"));
    (1..=3).map(|n| occupied(&folder(n))).sum()
}

fn median_ms(cluster: &Cluster, commands: &[Vec<String>]) -> Result<f64> {
    let mut all = vec![];
    for command in commands {
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        let answer = cluster.json(&arguments)?;
        all.push(answer["elapsed_ms"].as_f64().with_context(|| format!("no elapsed_ms in {answer}"))?);
    }
    all.sort_unstable_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clone_and_rollback_cost_the_same_for_any_size() -> Result<()> {
    let cluster = Cluster::start("clone-cost", 3, 1)?;
    cluster.ok(&["volume", "create", "big", "--size", "64G"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "clone cost".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("big")?, OpenMode::ReadWrite { steal: false }).await?;
    for segment in 0..SEGMENTS {
        volume.write(segment * SEGMENT_BYTES, Bytes::from(vec![7; 4096])).await?;
    }
    volume.detach().await?;
    cluster.ok(&["snapshot", "create", "big@s"])?;
    // A follower hears a moment later that the last write is committed, and applies it then.
    let before = wait_for("the writes in all chunk files", Duration::from_secs(10), || {
        let bytes = chunk_bytes(&cluster)?;
        Ok((bytes >= SEGMENTS * 3 * 4096).then_some(bytes))
    })?;
    let clones: Vec<_> = (0..5).map(|n| words(&format!("clone big@s copy-{n} --json"))).collect();
    let clone = median_ms(&cluster, &clones)?;
    let rollbacks: Vec<_> = (0..5).map(|_| words("rollback big@s --json")).collect();
    let rollback = median_ms(&cluster, &rollbacks)?;
    let after = chunk_bytes(&cluster)?;
    eprintln!("64 GiB, {SEGMENTS} segments: clone {clone:.1} ms, rollback {rollback:.1} ms");
    ensure!(after == before, "clones and rollbacks allocated data: {before} bytes before, {after} after");
    ensure!(clone <= COST_MS && rollback <= COST_MS, "clone {clone} ms, rollback {rollback} ms, {COST_MS} ms are allowed");
    let copy = Volume::open(&sdk, &VolumeRef::parse("copy-4")?, OpenMode::ReadOnly).await?;
    for segment in [0, 31, SEGMENTS - 1] {
        let data = copy.read(segment * SEGMENT_BYTES, 8192).await?.to_vec();
        ensure!(data[..4096] == [7; 4096] && data[4096..] == [0; 4096], "segment {segment} of the clone is wrong");
    }
    cluster.shut_down()
}
