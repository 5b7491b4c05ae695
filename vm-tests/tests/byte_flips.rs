//! Single bytes flip on the disk of one chunkserver after the other: in data files of a running and of a stopped one, in the
//! log, its identity and the superblock of a killed one. What clients read never changes, every flip in live bytes is
//! reported, and in the end all replicas are equal again.

use anyhow::{Context, Result, bail, ensure};
use ogee_client::{BlockDevice as _, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::flips::{data, files, flip, id_of, log_of, scrub, wait_whole};
use ogee_vm_tests::load::Load;
use ogee_vm_tests::process::{is_alive, send};
use ogee_vm_tests::torture::replicas;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const PAGE: usize = 4096;
const CHUNK: u64 = 16 << 20;
const SEED: u64 = 4;
/// In data files, each of the two times.
const PAGES_FLIPPED: usize = 110;

/// Flips one byte in each of so many pages that hold something, anywhere in the data files.
fn flip_pages(cluster: &Cluster, number: u64, rng: &mut StdRng) -> Result<usize> {
    let mut paths = vec![];
    files(&data(cluster, number).join("chunks"), &mut paths)?;
    let mut pages = vec![];
    for path in &paths {
        let file = File::open(path)?;
        for page in 0..CHUNK / PAGE as u64 {
            let mut bytes = [0; PAGE];
            file.read_exact_at(&mut bytes, page * PAGE as u64)?;
            if bytes.iter().any(|b| *b != 0) {
                pages.push((path, page));
            }
        }
    }
    ensure!(pages.len() > 4 * PAGES_FLIPPED, "only {} pages hold something", pages.len());
    pages.shuffle(rng);
    for (path, page) in &pages[..PAGES_FLIPPED] {
        flip(path, page * PAGE as u64 + rng.random_range(0..PAGE as u64), 1 << rng.random_range(0..8))?;
    }
    Ok(PAGES_FLIPPED)
}

/// Verifies one volume on all chunkservers and gives pages read, bad, mended.
fn verify_volume(cluster: &Cluster, volume: &str) -> Result<[u64; 3]> {
    let views = cluster.json(&["verify", "volume", volume, "--json"])?;
    let views = views.as_array().context("a list")?;
    ensure!(views.iter().all(|v| v["state"] == "done" && v["skipped_copysets"] == 0 && v["different_records"] == 0), "not done: {views:?}");
    let sum = |key: &str| views.iter().map(|v| v[key].as_u64().with_context(|| format!("no {key} in {v}"))).sum::<Result<u64>>();
    Ok([sum("pages")?, sum("bad_pages")?, sum("mended_pages")?])
}

/// The flip must keep the chunkserver from starting, with this in its last words; then it is flipped back.
fn refused_while_flipped(cluster: &mut Cluster, number: u64, flipped: (&Path, u64), says: &str) -> Result<()> {
    let (path, at) = flipped;
    flip(path, at, 0x40)?;
    let before = log_of(cluster, number)?.len();
    let started = cluster.revive();
    ensure!(started.is_err(), "it starts with a flipped byte at {at} of {}", path.display());
    let log = log_of(cluster, number)?;
    ensure!(log[before..].contains(says), "{says:?} is not in what it says of {}: {}", path.display(), &log[before..]);
    flip(path, at, 0x40)
}

/// Where the last batch with records begins in a log that fell idle, and its segment: the one in front of the mark. See docs/formats/wal.md.
fn last_batch(segments: &[PathBuf]) -> Result<(&Path, u64)> {
    let mut batches = vec![];
    for path in segments {
        let bytes = std::fs::read(path)?;
        let number = |page: &[u8], at: usize| page[at..at + 8].try_into().map(u64::from_le_bytes);
        for (i, page) in bytes.chunks_exact(PAGE).enumerate().filter(|(_, page)| page[..4] == bytes[..4] && page[..4] != [0; 4]) {
            // Of an earlier life of the file, if it names another segment.
            if number(page, 16)? == number(&bytes, 16)? {
                batches.push((number(page, 24)?, i as u64, page[32..36] == [0; 4], path));
            }
        }
    }
    batches.sort_unstable();
    let [.., (_, page, _, path), (_, _, true, _)] = &batches[..] else { bail!("the log does not end with a mark: {:?}", batches.last()) };
    Ok((path, page * PAGE as u64))
}

/// Flips under a running chunkserver, found by verifying the volume they belong to; another volume on the same disks has nothing to do with it.
async fn found_by_verifying(cluster: &Cluster, sdk: &Sdk, rng: &mut StdRng) -> Result<()> {
    let nothing = cluster.ok(&["verify", "volume", "other"])?;
    ensure!(nothing.contains("nothing was ever written"), "{nothing}");
    let other = Volume::open(sdk, &VolumeRef::parse("other")?, OpenMode::ReadWrite { steal: false }).await?;
    for chunk in 0..4 {
        other.write(chunk * CHUNK, vec![7; PAGE].into()).await?;
    }
    other.detach().await?;
    // Followers apply the last write a moment later.
    replicas::compare(sdk).await?;
    let written = verify_volume(cluster, "other")?;
    ensure!(written == [4 * 3, 0, 0], "three replicas of four pages: {written:?}");
    let before = verify_volume(cluster, "disk")?;
    ensure!(before[1] == 0, "{before:?}");
    cluster.ok(&["snapshot", "create", "disk@s"])?;
    cluster.ok(&["clone", "disk@s", "child"])?;
    replicas::compare(sdk).await?;
    let flipped = flip_pages(cluster, 1, rng)? as u64;
    // A page of the other volume may be among them.
    let [_, bad, mended] = verify_volume(cluster, "child")?;
    ensure!(bad == mended && bad + 4 >= flipped && bad <= flipped, "{flipped} flips: {bad} found from a clone, {mended} mended");
    let [_, rest, mended] = verify_volume(cluster, "other")?;
    ensure!(rest == mended && bad + rest == flipped, "{flipped} flips: {bad} in one volume, {rest} in the other");
    let again = verify_volume(cluster, "disk")?;
    ensure!(again[1] == 0, "something is bad still: {again:?}");
    cluster.refused(&["verify", "volume", "nobody"])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bytes_are_never_read_are_reported_and_repaired() -> Result<()> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut cluster = Cluster::start("flips", 4, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    cluster.ok(&["volume", "create", "other", "--size", "64M"])?;
    let config = ClusterConfig { mds: cluster.mds(), description: "flip test".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await?;
    let volume = Volume::open(&sdk, &VolumeRef::parse("disk")?, OpenMode::ReadWrite { steal: false }).await?;
    let load = Load::new(SIZE, 4, 29);
    let running = load.start(&volume, 0);
    load.goes_on(&running, 3000).await?;
    running.finish().await?;

    // A follower may be many entries behind, and would write over flips.
    replicas::compare(&sdk).await?;
    // Data files under a running chunkserver. Nobody reads: the scrub alone has to find every one of them.
    let first = id_of(&cluster, 1)?;
    let flipped = flip_pages(&cluster, 1, &mut rng)? as u64;
    let [pages, bad, mended] = scrub(&cluster, first)?;
    ensure!((bad, mended) == (flipped, flipped), "{flipped} flips in {pages} pages: {bad} found, {mended} mended");
    ensure!(log_of(&cluster, 1)?.matches("finding=\"page\"").count() as u64 >= flipped, "not every finding has its line");
    let again = scrub(&cluster, first)?;
    ensure!(again[1] == 0, "something is bad still: {again:?}");
    load.verify(&volume).await?;

    found_by_verifying(&cluster, &sdk, &mut rng).await?;
    load.verify(&volume).await?;

    // Data files of one that was stopped, and so has checkpointed: no replay writes over the flips. Then the load goes on.
    let second = id_of(&cluster, 2)?;
    let pid = cluster.daemon("cs-2")?.pid;
    send(pid, Signal::TERM)?;
    wait_for("the end of cs-2", Duration::from_secs(30), || Ok((!is_alive(pid)).then_some(())))?;
    let flipped = flip_pages(&cluster, 2, &mut rng)?;
    cluster.revive()?;
    let running = load.start(&volume, 1);
    load.goes_on(&running, 100).await?;
    running.finish().await?;
    let [_, bad, mended] = scrub(&cluster, second)?;
    ensure!(bad == mended && bad > 0, "{bad} bad, {mended} mended");
    // The rest was overwritten or met by a read before the scrub came to it.
    eprintln!("of {flipped} flips before a restart the scrub found {bad}");
    load.verify(&volume).await?;
    let compared = replicas::compare(&sdk).await?;
    eprintln!("equal: {compared:?}");

    // What the whole disk depends on: it does not start, and says why.
    let third = id_of(&cluster, 3)?;
    // Long enough for the log to mark its end.
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.kill("cs-3")?;
    let root = data(&cluster, 3);
    refused_while_flipped(&mut cluster, 3, (&root.join("superblock"), rng.random_range(0..64)), "superblock is damaged")?;
    refused_while_flipped(&mut cluster, 3, (&root.join("wal/identity"), rng.random_range(0..24)), "log")?;
    let mut segments = vec![];
    files(&root.join("wal"), &mut segments)?;
    let segment = segments.iter().find(|p| p.display().to_string().contains("segment-")).context("a segment")?;
    refused_while_flipped(&mut cluster, 3, (segment, 8 + rng.random_range(0..16)), "Corrupt")?;
    // The last thing it had acknowledged: without the mark behind it this would be the torn tail of a crash.
    let named: Vec<PathBuf> = segments.iter().filter(|p| p.display().to_string().contains("segment-")).cloned().collect();
    let (path, at) = last_batch(&named)?;
    for within in [0, 30, 40, 50, 60] {
        refused_while_flipped(&mut cluster, 3, (path, at + within), "Corrupt")?;
    }
    load.verify(&volume).await?;
    // It cannot be mended in place: the disk comes back empty, as a new one, and the others rebuild what it had.
    flip(segment, 20, 0x01)?;
    ensure!(cluster.revive().is_err(), "it starts with a damaged log");
    std::fs::remove_dir_all(&root)?;
    cluster.ok(&["cluster", "out", &third.to_string()])?;
    cluster.revive()?;
    wait_whole(&cluster)?;
    load.verify(&volume).await?;
    let compared = replicas::compare(&sdk).await?;
    eprintln!("equal at the end: {compared:?}");
    volume.detach().await?;
    cluster.shut_down()
}
