//! Single bytes flip in the metadata store (RocksDB: the checkpoints of the page maps) of a chunkserver that was killed. It refuses to start and
//! says why, or ends as soon as it meets the damage, or the byte meant nothing; what clients read never changes. A disk that was found
//! damaged comes back empty and the others rebuild what it had. `server/disk/tests/meta_flips.rs` has many more flips, without a cluster.

use anyhow::{Context, Result, ensure};
use ogee_client::{Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::flips::{data, files, flip, id_of, log_of, scrub, wait_whole};
use ogee_vm_tests::load::Load;
use ogee_vm_tests::process::is_alive;
use ogee_vm_tests::torture::replicas;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const SEED: u64 = 9;
/// At least so many, and until one was noticed.
const FLIPS: usize = 6;
/// The chunkserver whose store is flipped.
const VICTIM: u64 = 2;
/// What every refusal names.
const SAYS: &str = "metadata";

/// Files of the store that are read: its text log and its options are for people.
fn store_files(meta: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    files(meta, &mut all)?;
    all.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_text = name.starts_with("LOG") || name.starts_with("OPTIONS") || name == "LOCK" || name == "IDENTITY";
        !is_text && path.metadata().is_ok_and(|m| m.len() > 0)
    });
    Ok(all)
}

/// What became of one flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Refused,
    MetLater,
    MeantNothing,
}

/// Starts the victim with a flipped byte.
fn start_flipped(cluster: &mut Cluster) -> Result<End> {
    let name = format!("cs-{VICTIM}");
    let before = log_of(cluster, VICTIM)?.len();
    let says = |cluster: &Cluster| -> Result<()> {
        let log = log_of(cluster, VICTIM)?;
        ensure!(log[before..].contains(SAYS), "it does not say that its metadata is damaged: {}", &log[before..]);
        Ok(())
    };
    if cluster.revive().is_err() {
        says(cluster)?;
        return Ok(End::Refused);
    }
    // It reads everything; what it cannot trust ends it.
    let pid = cluster.daemon(&name)?.pid;
    let id = id_of(cluster, VICTIM);
    let scrubbed = id.and_then(|id| scrub(cluster, id));
    if is_alive(pid) && let Ok(scrubbed) = scrubbed {
        ensure!(scrubbed[1] == 0, "pages are bad though only metadata was flipped: {scrubbed:?}");
        return Ok(End::MeantNothing);
    }
    wait_for("the end of the damaged chunkserver", Duration::from_secs(60), || Ok((!is_alive(pid)).then_some(())))?;
    says(cluster)?;
    Ok(End::MetLater)
}

/// The disk comes back empty, as a new one, and the others rebuild what it had.
fn rebuild(cluster: &mut Cluster, id: u64) -> Result<()> {
    ensure!(cluster.revive().is_err(), "it starts although its metadata was found damaged");
    std::fs::remove_dir_all(data(cluster, VICTIM))?;
    cluster.ok(&["cluster", "out", &id.to_string()])?;
    cluster.revive()?;
    wait_whole(cluster)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_metadata_is_refused_and_rebuilt_and_never_changes_what_is_read() -> Result<()> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut cluster = Cluster::start("meta-flips", 4, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "flip test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("disk")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, 4, 31);
    let meta = data(&cluster, VICTIM).join("meta");
    let mut ends = vec![];
    while ends.len() < FLIPS || ends.iter().all(|end| *end == End::MeantNothing) {
        ensure!(ends.len() < 4 * FLIPS, "no flip of {} was noticed", ends.len());
        let running = load.start(&volume, ends.len() as u64);
        load.goes_on(&running, 500).await?;
        running.finish().await?;
        replicas::compare(&sdk).await?;
        // A start turns the store's log into tables, so that there are both.
        cluster.kill(&format!("cs-{VICTIM}"))?;
        cluster.revive()?;
        let running = load.start(&volume, 100 + ends.len() as u64);
        load.goes_on(&running, 500).await?;
        running.finish().await?;
        replicas::compare(&sdk).await?;
        let id = id_of(&cluster, VICTIM)?;
        cluster.kill(&format!("cs-{VICTIM}"))?;
        let all = store_files(&meta)?;
        // Bytes of any file, or those of the small ones too.
        let path = match ends.len() % 3 {
            0 => all.choose(&mut rng).context("a file of the store")?,
            _ => all.choose_weighted(&mut rng, |path| path.metadata().map_or(0, |m| m.len())).context("a file of the store")?,
        };
        let (at, bit) = (rng.random_range(0..path.metadata()?.len()), 1 << rng.random_range(0..8));
        flip(path, at, bit)?;
        let end = start_flipped(&mut cluster).with_context(|| format!("byte {at} of {} flipped", path.display()))?;
        eprintln!("byte {at} of {}: {end:?}", path.display());
        load.verify(&volume).await?;
        ends.push(end);
        if end != End::MeantNothing {
            rebuild(&mut cluster, id)?;
            load.verify(&volume).await?;
        }
    }
    let compared = replicas::compare(&sdk).await?;
    eprintln!("equal at the end: {compared:?}");
    volume.detach().await?;
    cluster.shut_down()
}
