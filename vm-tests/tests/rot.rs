//! Silent corruption under load: bytes of data files are flipped behind the back of the chunkservers, each page on one replica only. Nobody
//! ever reads wrong data or an error, and what is read is mended in place.

use anyhow::{Context, Result, ensure};
use ogee_client::{BlockDevice, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::load::Load;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SIZE: u64 = 64 << 20;
const PAGE: usize = 4096;
const CHUNK: u64 = 16 << 20;

fn data_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            data_files(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// Pages of a data file that `share` of the three chunkservers is to lose, and that hold something.
fn pages_of(file: &File, share: u64) -> Result<Vec<(u64, [u8; PAGE])>> {
    let mut pages = vec![];
    for page in (share..CHUNK / PAGE as u64).step_by(3) {
        let mut bytes = [0; PAGE];
        file.read_exact_at(&mut bytes, page * PAGE as u64)?;
        if bytes.iter().any(|b| *b != 0) {
            pages.push((page, bytes));
        }
    }
    Ok(pages)
}

/// Flips a bit in every third page of every data file of chunkserver `number`. Returns how many.
fn rot(cluster: &Cluster, number: u64) -> Result<usize> {
    let folder = cluster.folder().join(format!("cluster/cs-{number}/data/chunks"));
    let mut files = vec![];
    data_files(&folder, &mut files)?;
    let mut count = 0;
    for path in files {
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        for (page, bytes) in pages_of(&file, number - 1)? {
            let at = page * 7 % PAGE as u64;
            file.write_all_at(&[bytes[usize::try_from(at)?] ^ 0x20], page * PAGE as u64 + at)?;
            count += 1;
        }
    }
    Ok(count)
}

async fn verify_all(load: &Load, volume: &Volume, what: &str) -> Result<()> {
    load.verify(volume).await.with_context(|| format!("read everything {what}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rot_is_never_read_and_is_mended_from_the_other_replicas() -> Result<()> {
    let mut cluster = Cluster::start("rot", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "rot test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("disk")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, 4, 23);
    let running = load.start(&volume, 0);
    load.goes_on(&running, 3000).await?;
    // Reads, whole and partial writes meet the rot while it spreads.
    for number in 1..=3 {
        let count = rot(&cluster, number)?;
        ensure!(count > 100, "cs-{number} has only {count} pages to lose");
        load.goes_on(&running, 1000).await?;
    }
    running.finish().await?;
    verify_all(&load, &volume, "after all three rotted").await?;
    let before = volume.stats();
    verify_all(&load, &volume, "once more").await?;
    // Those that led have mended what was read of them; whoever takes over has only one other to ask.
    for number in 1..=3 {
        let victim = format!("cs-{number}");
        cluster.kill(&victim)?;
        verify_all(&load, &volume, &format!("without {victim}")).await?;
        cluster.revive()?;
        let running = load.start(&volume, number);
        load.goes_on(&running, 200).await?;
        running.finish().await?;
    }
    verify_all(&load, &volume, "at the end").await?;
    eprintln!("checksum mismatches that the client saw: {} before, {} in all", before.checksum_mismatches, volume.stats().checksum_mismatches);
    volume.flush().await?;
    volume.detach().await?;
    cluster.shut_down()
}
