//! Limits, sector sizes and serials of volumes in a real cluster: set by the command line, told to clients that are
//! attached, obeyed by them at once. Rates are asserted from above only, over seconds, so that a slow machine passes.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use ogee_client::{BlockDevice, Cluster as Sdk, ClusterConfig, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_common::qos::{LimitKind, RateLimit, VolumeLimits};
use ogee_vm_tests::cluster::{Cluster, binary};
use ogee_vm_tests::nbd::{NbdServer, client};
use ogee_vm_tests::vhost::{Readiness, VhostBackend};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

#[allow(dead_code, reason = "a part of it is used here")]
#[path = "../../vhost-blk/tests/support/driver.rs"]
mod driver;

use driver::{Guest, Ring, VERSION_1, WRITE, config, connect};

/// For anything that must happen.
pub const PATIENCE: Duration = Duration::from_secs(120);
const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
/// Writes in flight of each writer.
const DEPTH: u64 = 8;
const WRITERS: u64 = 2;
const PAGE: u64 = 4096;

fn iops(rate: u64) -> VolumeLimits {
    VolumeLimits::NONE.with(LimitKind::WriteIops, RateLimit { rate, ..RateLimit::NONE })
}

async fn open(cluster: &Cluster, volume: &str, mode: OpenMode) -> Result<Volume> {
    let config = ClusterConfig { mds: cluster.mds(), description: "qos".to_owned(), ..ClusterConfig::default() };
    let sdk = Sdk::connect(config).await.context("connect")?;
    Volume::open(&sdk, &VolumeRef::parse(volume)?, mode).await.with_context(|| format!("open {volume}"))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = clock::now() + PATIENCE;
    while !holds() {
        ensure!(clock::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// One lane of a writer: writes 1, 2, 3, ... to its page.
async fn count(volume: Volume, lane: u64, acknowledged: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> Result<()> {
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let page: Vec<u8> = number.to_le_bytes().repeat(512);
        volume.write(lane * PAGE, Bytes::from(page)).await?;
        acknowledged.store(number, Ordering::SeqCst);
    }
    Ok(())
}

struct Writers {
    volume: Volume,
    lanes: Vec<Arc<AtomicU64>>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Result<()>>>,
}

impl Writers {
    fn start(volume: &Volume) -> Self {
        let (mut lanes, mut tasks, stop) = (vec![], vec![], Arc::new(AtomicBool::new(false)));
        for writer in 0..WRITERS {
            let handle = volume.for_thread();
            for lane in writer * DEPTH..(writer + 1) * DEPTH {
                let acknowledged = Arc::new(AtomicU64::new(0));
                tasks.push(tokio::spawn(count(handle.clone(), lane, acknowledged.clone(), stop.clone())));
                lanes.push(acknowledged);
            }
        }
        Self { volume: volume.clone(), lanes, stop, tasks }
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.lanes.iter().map(|lane| lane.load(Ordering::SeqCst)).collect()
    }

    fn writes(&self) -> u64 {
        self.volume.stats().write.ops
    }

    async fn more(&self, writes: u64) -> Result<()> {
        let target = self.writes() + writes;
        until("more writes", || self.writes() >= target).await
    }

    /// Waits until the client obeys these limits, then for a while: no more than `rate` writes a second pass.
    async fn stay_below(&self, limits: VolumeLimits, rate: u64, window: Duration) -> Result<()> {
        until("the new limits", || self.volume.limits() == limits).await?;
        let (began, before) = (clock::now(), self.writes());
        tokio::time::sleep(window).await;
        let done = self.writes() - before;
        let elapsed_ms = u64::try_from(began.elapsed().as_millis())? + 1;
        // What 100 ms give may have been saved up, and what was let in before may have ended now.
        let allowed = rate * elapsed_ms / 1000 + rate / 10 + 1 + WRITERS * DEPTH;
        ensure!(done <= allowed, "{done} writes in {elapsed_ms} ms at {rate} a second, {allowed} allowed");
        Ok(())
    }

    async fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            tokio::time::timeout(PATIENCE, task).await.context("a writer hangs")???;
        }
        Ok(())
    }
}

/// A snapshot under limits: the hold is acknowledged while writes wait, and the snapshot has what was acknowledged before.
async fn snapshot_of(cluster: &Cluster, writers: &Writers, name: &str) -> Result<String> {
    let before = writers.acknowledged();
    let made = cluster.json(&["snapshot", "create", name, "--json"])?;
    let after = writers.acknowledged();
    let hold = made["hold"].as_str().context("hold")?.to_owned();
    if made["ready"] != true {
        return Ok(hold);
    }
    let snapshot = open(cluster, name, OpenMode::ReadOnly).await?;
    for (lane, (before, after)) in (0..).zip(before.iter().zip(after)) {
        let page = snapshot.read(lane * PAGE, 4096).await?.to_vec();
        let found = u64::from_le_bytes(page[..8].try_into()?);
        ensure!(page == found.to_le_bytes().repeat(512), "lane {lane}: a torn write");
        ensure!((*before..=after + 1).contains(&found), "lane {lane}: {found} in the snapshot, {before} before, {after} after");
    }
    Ok(hold)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_set_live_hold_and_are_lifted() -> Result<()> {
    let cluster = Cluster::start("qos-live", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "1G"])?;
    let volume = open(&cluster, "disk", OpenMode::ReadWrite { steal: false }).await?;
    let writers = Writers::start(&volume);
    writers.more(100).await?;
    ensure!(volume.stats().throttled == 0, "nothing is limited yet");
    let set = |limits: &[&str]| cluster.json(&[&["volume", "set", "disk", "--json"][..], limits].concat());
    let shown = set(&["--write-iops", "40"])?;
    ensure!(shown["limits"] == json!({"write_iops": {"rate": 40}}), "{shown}");
    writers.stay_below(iops(40), 40, Duration::from_secs(4)).await?;
    ensure!(volume.stats().throttled > 0, "writes waited for the limit");
    let mut hold = String::new();
    for attempt in 1..=10 {
        hold = snapshot_of(&cluster, &writers, &format!("disk@s{attempt}")).await?;
        if hold == "held" {
            break;
        }
    }
    ensure!(hold == "held", "ten snapshots, and the client never held its writes in time");
    set(&["--write-iops", "10000", "--write-mib", "1:2:1"])?;
    let bytes = RateLimit { rate: 1 << 20, burst: 2 << 20, burst_seconds: 1 };
    writers.stay_below(iops(10_000).with(LimitKind::WriteBytes, bytes), (2 << 20) / PAGE, Duration::from_secs(3)).await?;
    set(&["--write-iops", "1", "--write-mib", "none"])?;
    writers.stay_below(iops(1), 1, Duration::from_secs(2)).await?;
    let info = cluster.json(&["volume", "info", "disk", "--json"])?;
    ensure!(info["limits"] == json!({"write_iops": {"rate": 1}}), "{info}");
    // At one a second these would take ten minutes.
    set(&["--write-iops", "none"])?;
    writers.more(600).await?;
    writers.end().await?;
    volume.detach().await?;
    ensure!(cluster.json(&["volume", "info", "disk", "--json"])?["limits"] == json!({}), "nothing is left of them");
    ensure!(cluster.refused(&["volume", "set", "disk"])?.contains("--iops"), "nothing to set");
    ensure!(cluster.refused(&["volume", "set", "disk", "--iops", "0"])?.contains("none"), "zero would stop it");
    ensure!(cluster.ogee(&["volume", "set", "nobody", "--iops", "5"])?.code == 3, "there is no such volume");
    cluster.shut_down()
}

fn serve(cluster: &Cluster, volume: &str, socket: &Path, more: &[&str]) -> Result<VhostBackend> {
    let name = socket.file_stem().and_then(|name| name.to_str()).context("a name")?;
    VhostBackend::start(&format!("qos-{name}"), &binary()?, socket, Readiness::Says, |command| {
        command.env("OGEE_MDS", cluster.mds().join(",")).args(["vhost-blk", volume, "--socket"]).arg(socket).args(more);
    })
}

/// IOs that ended, and in how many seconds.
fn load(cluster: &Cluster, socket: &Path, seconds: &str) -> Result<(f64, f64)> {
    let socket = socket.to_str().context("UTF-8")?;
    let arguments = ["bench", "--vhost-socket", socket, "--rw", "randwrite", "--iodepth", "16", "--size", "16M"];
    let report: Value = cluster.json(&[&arguments[..], &["--ramp", "0", "--runtime", seconds, "--json"]].concat())?;
    ensure!(report["errors"] == 0, "{report}");
    Ok((report["ios"].as_f64().context("ios")?, report["seconds"].as_f64().context("seconds")?))
}

/// The daemon that serves a guest obeys limits from its start on, and lets go of them without a restart.
#[test]
fn a_served_volume_is_limited() -> Result<()> {
    let cluster = Cluster::start("qos-served", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M", "--iops", "4"])?;
    let socket = cluster.folder().join("limited.sock");
    let backend = serve(&cluster, "disk", &socket, &[])?;
    let (ios, seconds) = load(&cluster, &socket, "4")?;
    ensure!(ios <= 4.0 * (seconds + 1.0) + 1.0, "{ios} IOs in {seconds} s at 4 a second");
    cluster.ok(&["volume", "set", "disk", "--iops", "none"])?;
    let (ios, seconds) = load(&cluster, &socket, "10")?;
    ensure!(ios > 4.0 * (seconds + 1.0) + 16.0, "{ios} IOs in {seconds} s: the limit is still there");
    backend.stop()?;
    cluster.shut_down()
}

/// Bytes of the page at `sector` as a guest reads them, and the status.
fn read(ring: &mut Ring<'_>, guest: &Guest, sector: u64) -> (u8, Vec<u8>) {
    let data = ring.data();
    let (status, _) = ring.call(IN, sector, &[(data, 4096, WRITE)], false);
    (status, guest.bytes(data, 4096))
}

#[test]
fn sectors_serials_and_shared_read_only_disks() -> Result<()> {
    let cluster = Cluster::start("qos-sectors", 3, 1)?;
    let made = cluster.json(&["volume", "create", "disk", "--size", "64M", "--sector-size", "4096", "--json"])?;
    ensure!(made["sector_bytes"] == 4096, "{made}");
    let sockets: Vec<_> = ["writer", "reader-1", "reader-2"].map(|n| cluster.folder().join(format!("{n}.sock"))).to_vec();
    let writer = serve(&cluster, "disk", &sockets[0], &["--serial", "SN-0123456789ABCDEF"])?;
    let guest = Guest::new();
    let mut front = connect(&sockets[0], &guest, VERSION_1);
    ensure!(config(&mut front, 20, 8)? == [0, 16, 0, 0, 0, 0, 1, 0], "4,096 bytes, physical blocks as large");
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    guest.put_bytes(data, &[7; 4096]);
    ensure!(ring.call(OUT, 8, &[(data, 4096, 0)], false).0 == 0, "an aligned write");
    ensure!(ring.call(OUT, 1, &[(data, 4096, 0)], false).0 == 1, "a write inside of sectors");
    ensure!(ring.call(OUT, 8, &[(data, 512, 0)], false).0 == 1, "a part of a sector");
    ensure!(ring.call(GET_ID, 0, &[(data, 20, WRITE)], false).0 == 0, "the serial");
    ensure!(guest.bytes(data, 20) == b"SN-0123456789ABCDEF\0", "{:?}", guest.bytes(data, 20));
    cluster.ok(&["snapshot", "create", "disk@s"])?;
    guest.put_bytes(data, &[8; 4096]);
    ensure!(ring.call(OUT, 8, &[(data, 4096, 0)], false).0 == 0, "a write after the snapshot");
    // Two more guests read, one the snapshot and one the live volume, while the first one writes.
    let served = [("disk@s", &sockets[1]), ("disk", &sockets[2])];
    let readers = served.map(|(what, socket)| serve(&cluster, what, socket, &["--read-only"]));
    let guests = [Guest::new(), Guest::new()];
    for ((reader, socket), (guest, expected)) in readers.iter().zip(&sockets[1..]).zip(guests.iter().zip([7, 8])) {
        ensure!(reader.is_ok(), "{reader:?}");
        let mut front = connect(socket, guest, VERSION_1);
        ensure!(config(&mut front, 20, 4)? == 4096_u32.to_le_bytes(), "readers have its sectors too");
        let mut ring = Ring::start(&mut front, guest, 0, VERSION_1);
        ensure!(read(&mut ring, guest, 8) == (0, vec![expected; 4096]), "what {socket:?} shows");
        ensure!(ring.call(OUT, 8, &[(ring.data(), 4096, 0)], false).0 == 1, "a write to {socket:?}");
        ensure!(ring.call(GET_ID, 0, &[(ring.data(), 20, WRITE)], false).0 == 0, "the serial");
        ensure!(guest.bytes(ring.data(), 4) == b"ogee", "its own serial");
    }
    ensure!(read(&mut ring, &guest, 8) == (0, vec![8; 4096]), "the writer goes on");
    drop(front);
    for backend in readers.into_iter().chain([Ok(writer)]) {
        backend?.stop()?;
    }
    nbd_says_them(&cluster)?;
    cluster.shut_down()
}

/// A clone has the sectors of its source, and NBD clients are told.
fn nbd_says_them(cluster: &Cluster) -> Result<()> {
    let clone = cluster.json(&["clone", "disk@s", "clone", "--json"])?;
    ensure!(clone["sector_bytes"] == 4096, "{clone}");
    cluster.ok(&["volume", "create", "small", "--size", "64M"])?;
    let server = NbdServer::start(cluster, "qos", &["clone", "small"])?;
    for (export, sector) in [("clone", 4096), ("small", 512)] {
        let info: Value = serde_json::from_str(&client("nbdinfo", &["--json", &server.unix(export)?])?)?;
        ensure!(info["exports"][0]["block_size_minimum"] == sector, "{info}");
    }
    server.stop()
}
