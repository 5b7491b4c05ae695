//! The administrator of the torture: a process that makes volumes, snapshots, clones, rollbacks and flattens under load, reads snapshots back, and
//! at the end reads everything and compares the replicas.
//!
//! Started by the director as `admin NUMBER MDS SEED FILE CHUNKSERVERS`. It says `ready` when the volumes exist; when its standard input ends
//! it does the last part, and says what it compared. Invariants: operations on volumes are made one after the other, so the head layer
//! of each is known; a snapshot counts as taken when it is ready; what a failed operation left behind is never used.

use super::client::{connect, work};
use super::replicas;
use crate::history::{Action, Layer, Outcome, Recorded, Recorder, Target};
use anyhow::{Context, Result, bail, ensure};
use ogee_client::{BlockDevice, Cluster, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_proto::mds as m;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The volumes that clients write.
pub const VOLUMES: [&str; 2] = ["a", "b"];
/// Their size: four chunks.
const SIZE: u64 = 64 << 20;
/// Snapshots that a volume keeps.
const SNAPSHOTS_MAX: usize = 5;
/// Clones that are kept.
const CLONES_MAX: usize = 3;
/// Sectors of a reading request when everything is read.
const STEP: u32 = 1024;
/// A snapshot that is not ready by then is not used.
const READY_LIMIT: Duration = Duration::from_secs(40);
/// Everything must be scrubbed by then.
const SCRUB_LIMIT: Duration = Duration::from_secs(120);
/// A cluster that is whole again must be healthy by then.
const HEALTHY_LIMIT: Duration = Duration::from_secs(120);

/// What the process was told.
#[derive(Debug, Clone)]
pub struct AdminArgs {
    /// Its number, for the numbers of its operations.
    pub number: u32,
    /// Addresses of the MDS.
    pub mds: Vec<String>,
    /// What everything random follows from.
    pub seed: u64,
    /// Where its history goes.
    pub file: String,
    /// How many chunkservers there are.
    pub chunkservers: u32,
    /// Size of the volumes.
    pub size_bytes: u64,
    /// Copysets.
    pub copysets: u32,
    /// Whether what it has to say is printed.
    pub speaks: bool,
}

impl AdminArgs {
    /// Reads the arguments after the word `admin`.
    ///
    /// # Errors
    /// When one is missing or no number.
    pub(super) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut next = |what: &str| words.next().with_context(|| format!("admin: no {what}"));
        let number = next("number")?.parse().context("admin: number")?;
        let mds = next("MDS")?.split(',').map(str::to_owned).collect();
        let (seed, file) = (next("seed")?.parse().context("admin: seed")?, next("file")?);
        let chunkservers = next("chunkservers")?.parse().context("admin: chunkservers")?;
        Ok(Self { number, mds, seed, file, chunkservers, size_bytes: SIZE, copysets: 16, speaks: true })
    }
}

#[derive(Debug, Clone)]
struct Snap {
    name: String,
    cut: u64,
    clones: u32,
}

#[derive(Debug)]
struct Vol {
    path: String,
    id: u64,
    head: u64,
    snaps: Vec<Snap>,
    clone: bool,
    /// The snapshot that its head reads through to, by its cut.
    stands_on: Option<u64>,
}

struct Admin {
    cluster: Cluster,
    recorder: Recorder,
    rng: StdRng,
    volumes: Vec<Vol>,
    names: u32,
    /// `volume cut old-layer new-layer` of each rollback, for layers that only clients saw.
    rollbacks: std::fs::File,
    stop: Arc<AtomicBool>,
}

/// Tells the director something.
fn say(args: &AdminArgs, what: impl Display) {
    if args.speaks {
        println!("{what}");
    }
}

/// The whole life of the process.
///
/// # Errors
/// What must not happen; a cluster that does not become healthy; replicas that differ.
pub async fn run(args: AdminArgs, stop: Arc<AtomicBool>) -> Result<()> {
    let recorder = Recorder::to_file(args.number, Path::new(&args.file))?;
    let rollbacks = std::fs::File::create(format!("{}.rollbacks", args.file)).context("note rollbacks")?;
    let cluster = connect_for_sure(&args.mds).await?;
    let rng = StdRng::seed_from_u64(args.seed);
    let mut admin = Admin { cluster, recorder, rng, volumes: vec![], names: 0, rollbacks, stop };
    admin.set_up(&args).await?;
    say(&args, "ready");
    while !admin.stop.load(Ordering::Relaxed) {
        admin.step().await?;
        let pause = admin.rng.random_range(0..1_500);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    let healthy = admin.wait_healthy(args.chunkservers).await?;
    say(&args, format_args!("healthy after {:.1} s", healthy.as_secs_f64()));
    admin.read_everything().await?;
    if args.speaks {
        say(&args, admin.scrub().await?);
    }
    let compared = replicas::compare(&admin.cluster).await?;
    say(&args, format_args!("compared {} rows of {} replicas of {} copysets", compared.rows, compared.replicas, compared.copysets));
    Ok(())
}

async fn connect_for_sure(mds: &[String]) -> Result<Cluster> {
    let patience = clock::now() + Duration::from_secs(60);
    loop {
        if let Some(cluster) = connect(mds, Some(Duration::from_secs(20))).await {
            return Ok(cluster);
        }
        ensure!(clock::now() < patience, "no MDS leader after a minute");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Admin {
    async fn set_up(&mut self, args: &AdminArgs) -> Result<()> {
        let chunkservers = args.chunkservers;
        let patience = clock::now() + Duration::from_secs(60);
        loop {
            let up = self.cluster.mds().cluster_status().await.map_or(0, |s| s.chunkservers_up);
            if up == chunkservers {
                break;
            }
            ensure!(clock::now() < patience, "{up} of {chunkservers} chunkservers are up after a minute");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let request = m::CreatePoolRequest { name: "default".into(), replicas: 3, copysets: args.copysets };
        self.cluster.mds().create_pool(request).await?;
        self.wait_healthy(chunkservers).await?;
        for path in VOLUMES {
            let request = m::CreateVolumeRequest { path: path.into(), size_bytes: args.size_bytes, ..Default::default() };
            let made = self.cluster.mds().create_volume(request).await?;
            self.note(&made, None, false)?;
        }
        Ok(())
    }

    async fn wait_healthy(&self, chunkservers: u32) -> Result<Duration> {
        let began = clock::now();
        loop {
            let status = self.cluster.mds().cluster_status().await;
            if let Ok(s) = &status
                && s.chunkservers_up == chunkservers
                && s.copysets > 0
                && s.copysets_with_leader == s.copysets
            {
                return Ok(began.elapsed());
            }
            ensure!(began.elapsed() < HEALTHY_LIMIT, "the cluster is not healthy after {HEALTHY_LIMIT:?}: {status:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Notes the head layer of a volume, a new one or one that was rolled back.
    fn note(&mut self, volume: &m::Volume, parent: Option<u64>, clone: bool) -> Result<()> {
        let sectors = u32::try_from(volume.size_bytes / 512).context("a small volume")?;
        self.recorder.layer(volume.layer, Layer { volume: volume.id, sectors, parent })?;
        match self.volumes.iter_mut().find(|v| v.id == volume.id) {
            Some(known) => (known.head, known.stands_on) = (volume.layer, parent),
            None => {
                let (path, id, head) = (volume.path.clone(), volume.id, volume.layer);
                self.volumes.push(Vol { path, id, head, snaps: vec![], clone, stands_on: parent });
            }
        }
        Ok(())
    }

    fn new_name(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what}-{}", self.names)
    }

    /// One random operation.
    async fn step(&mut self) -> Result<()> {
        let v = self.rng.random_range(0..self.volumes.len());
        let some = (!self.volumes[v].snaps.is_empty()).then(|| self.rng.random_range(0..self.volumes[v].snaps.len().max(1)));
        match (self.rng.random_range(0..15), some) {
            (0..=3, _) => self.snapshot(v).await,
            (4..=5, Some(s)) => self.read_snapshot(v, s).await,
            (6, Some(s)) => self.clone_of(v, Some(s)).await,
            (7, _) => self.clone_of(v, None).await,
            (8, Some(s)) => self.roll_back(v, s).await,
            (9..=10, _) => self.use_clone().await,
            (12..=14, _) => self.flatten(v).await,
            (_, Some(_)) => self.tidy(v).await,
            _ => Ok(()),
        }
    }

    async fn snapshot(&mut self, v: usize) -> Result<()> {
        let (path, head) = (self.volumes[v].path.clone(), self.volumes[v].head);
        let name = self.new_name("s");
        let cut = self.recorder.invoke(Action::Cut, Target::Layer(head), 0, (0, 0))?;
        let request = m::CreateSnapshotRequest { path: path.clone(), name: name.clone() };
        let Ok(taken) = self.cluster.mds().create_snapshot(request).await else { return Ok(()) };
        ensure!(taken.layer == head, "{path}@{name} is a snapshot of layer {}, the head is {head}", taken.layer);
        let patience = clock::now() + READY_LIMIT;
        let mut ready = taken.ready;
        while !ready && clock::now() < patience && !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let list = self.cluster.mds().list_snapshots(m::ListSnapshotsRequest { path: path.clone() }).await;
            ready = list.is_ok_and(|l| l.snapshots.iter().any(|s| s.name == name && s.ready));
        }
        if ready {
            self.recorder.complete(cut, Outcome::Ok(vec![]))?;
            self.volumes[v].snaps.push(Snap { name, cut, clones: 0 });
            if self.rng.random_bool(0.5) {
                let last = self.volumes[v].snaps.len() - 1;
                return self.read_snapshot(v, last).await;
            }
        }
        Ok(())
    }

    async fn read_snapshot(&mut self, v: usize, s: usize) -> Result<()> {
        let (path, snap) = (&self.volumes[v].path, &self.volumes[v].snaps[s]);
        let name = VolumeRef::parse(&format!("{path}@{}", snap.name)).context("the snapshot's name")?;
        let Ok(device) = Volume::open(&self.cluster, &name, OpenMode::ReadOnly).await else { return Ok(()) };
        let disk = Recorded { device, recorder: self.recorder.clone(), target: Target::Cut(snap.cut), epoch: 0 };
        read_all(&disk).await.map(drop)
    }

    async fn clone_of(&mut self, v: usize, s: Option<usize>) -> Result<()> {
        if self.volumes.iter().filter(|v| v.clone).count() >= CLONES_MAX {
            return self.drop_clone().await;
        }
        let (new_path, path) = (self.new_name("clone"), self.volumes[v].path.clone());
        let source_snapshot = s.map_or_else(String::new, |s| self.volumes[v].snaps[s].name.clone());
        // A clone of the live volume takes a snapshot, of which nobody says when it is ready; the first read of the clone does.
        let cut = match s {
            Some(s) => self.volumes[v].snaps[s].cut,
            None => self.recorder.invoke(Action::Cut, Target::Layer(self.volumes[v].head), 0, (0, 0))?,
        };
        let request = m::CloneVolumeRequest { path, source_snapshot, new_path, ..Default::default() };
        if let Some(s) = s {
            self.volumes[v].snaps[s].clones += 1;
        }
        let Ok(made) = self.cluster.mds().clone_volume(request).await else { return Ok(()) };
        self.note(&made, Some(cut), true)
    }

    async fn use_clone(&mut self) -> Result<()> {
        let clones: Vec<usize> = (0..self.volumes.len()).filter(|v| self.volumes[*v].clone).collect();
        if clones.is_empty() {
            return Ok(());
        }
        let v = clones[self.rng.random_range(0..clones.len())];
        let Some(disk) = self.attach(v).await? else { return Ok(()) };
        let (mut rng, stint) = (StdRng::seed_from_u64(self.rng.random()), Duration::from_millis(self.rng.random_range(300..2_000)));
        work(&disk, &mut rng, stint, &self.stop).await?;
        drop(tokio::time::timeout(Duration::from_secs(8), disk.device.detach()).await);
        Ok(())
    }

    async fn attach(&mut self, v: usize) -> Result<Option<Recorded<Volume>>> {
        let name = VolumeRef::parse(&self.volumes[v].path).context("the volume's name")?;
        let Ok(device) = Volume::open(&self.cluster, &name, OpenMode::ReadWrite { steal: true }).await else { return Ok(None) };
        let info = device.attach_info();
        let (target, epoch) = (Target::Layer(info.layer.0), info.epoch.0);
        ensure!(info.layer.0 == self.volumes[v].head, "{name} has head layer {}, not {}", info.layer.0, self.volumes[v].head);
        Ok(Some(Recorded { device, recorder: self.recorder.clone(), target, epoch }))
    }

    /// Rolls back, taking the volume from its client. Tried until it is done: a try that failed may have been carried out, or be so later.
    async fn roll_back(&mut self, v: usize, s: usize) -> Result<()> {
        let (path, snap) = (self.volumes[v].path.clone(), self.volumes[v].snaps[s].clone());
        let (id, old) = (self.volumes[v].id, self.volumes[v].head);
        let patience = clock::now() + Duration::from_secs(300);
        loop {
            let request = m::RollbackVolumeRequest { path: path.clone(), snapshot: snap.name.clone(), detach: true };
            match self.cluster.mds().rollback_volume(request).await {
                Ok(volume) => {
                    let new = volume.layer;
                    writeln!(self.rollbacks, "{id} {} {old} {new}", snap.cut).context("note a rollback")?;
                    self.volumes[v].snaps[s].clones += 1;
                    return self.note(&volume, Some(snap.cut), self.volumes[v].clone);
                }
                Err(error) if clock::now() > patience => bail!("{path} cannot be rolled back to {}: {error}", snap.name),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// Has a volume flattened in the background, or stops that. When it is done, the snapshot that it stood on may go.
    async fn flatten(&mut self, v: usize) -> Result<()> {
        let request = m::FlattenVolumeRequest { path: self.volumes[v].path.clone(), cancel: self.rng.random_bool(0.2) };
        let Ok(volume) = self.cluster.mds().flatten_volume(request).await else { return Ok(()) };
        if volume.depth == 0
            && volume.layer == self.volumes[v].head
            && let Some(cut) = self.volumes[v].stands_on.take()
        {
            let snaps = self.volumes.iter_mut().flat_map(|v| &mut v.snaps);
            snaps.filter(|s| s.cut == cut).for_each(|s| s.clones = s.clones.saturating_sub(1));
        }
        Ok(())
    }

    /// Deletes the oldest snapshot that nothing hangs on, when there are many.
    async fn tidy(&mut self, v: usize) -> Result<()> {
        if self.volumes[v].snaps.len() <= SNAPSHOTS_MAX {
            return Ok(());
        }
        let Some(s) = self.volumes[v].snaps.iter().position(|s| s.clones == 0) else { return Ok(()) };
        let snap = self.volumes[v].snaps.remove(s);
        let request = m::DeleteSnapshotRequest { path: self.volumes[v].path.clone(), name: snap.name };
        // Deleted or not, it is not used any more.
        drop(self.cluster.mds().delete_snapshot(request).await);
        Ok(())
    }

    /// Reads a clone a last time and deletes it.
    async fn drop_clone(&mut self) -> Result<()> {
        let Some(v) = self.volumes.iter().position(|v| v.clone && v.snaps.is_empty()) else { return Ok(()) };
        if let Some(disk) = self.attach(v).await? {
            read_all(&disk).await?;
            drop(tokio::time::timeout(Duration::from_secs(8), disk.device.detach()).await);
        }
        let volume = self.volumes.remove(v);
        drop(self.cluster.mds().delete_volume(m::DeleteVolumeRequest { path: volume.path, ..Default::default() }).await);
        Ok(())
    }

    /// Has all replicas read and mended. What was damaged by a disk that could not be read is mended by then.
    async fn scrub(&self) -> Result<String> {
        let patience = clock::now() + SCRUB_LIMIT;
        let mds = self.cluster.mds();
        let order = mds.order_scrub(m::OrderScrubRequest::default()).await?.order;
        loop {
            let reports: Vec<m::ScrubReport> = mds.list_scrubs().await?.scrubs.into_iter().filter_map(|s| s.report).collect();
            if reports.iter().all(|r| r.order >= order && !r.running) {
                let sum = |of: fn(&m::ScrubReport) -> u64| reports.iter().map(of).sum::<u64>();
                let (pages, bad, mended, skipped) = (sum(|r| r.pages), sum(|r| r.bad), sum(|r| r.mended), sum(|r| r.skipped));
                ensure!(bad == mended && skipped == 0, "scrubbed, {bad} pages bad, {mended} mended, {skipped} copysets skipped");
                return Ok(format!("scrubbed {pages} pages, {bad} bad"));
            }
            ensure!(clock::now() < patience, "the scrub has no end: {reports:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Reads every volume and every snapshot. Nobody else is there any more, and everything works: so nothing may fail.
    async fn read_everything(&mut self) -> Result<()> {
        for v in 0..self.volumes.len() {
            let path = self.volumes[v].path.clone();
            let disk = self.attach(v).await?.with_context(|| format!("{path} cannot be attached in a healthy cluster"))?;
            ensure!(read_all(&disk).await?, "{path} cannot be read in a healthy cluster");
            for s in 0..self.volumes[v].snaps.len() {
                self.read_snapshot(v, s).await?;
            }
            disk.device.detach().await?;
        }
        Ok(())
    }
}

/// Reads a whole device. False if a read failed.
async fn read_all(disk: &Recorded<Volume>) -> Result<bool> {
    let sectors = u32::try_from(disk.device.info().size_bytes / 512).context("a small volume")?;
    for first in (0..sectors).step_by(usize::try_from(STEP)?) {
        if let Err(error) = disk.read(first, STEP.min(sectors - first)).await? {
            ensure!(error.kind != ogee_client::IoErrorKind::Corrupt, "{error}");
            return Ok(false);
        }
    }
    Ok(true)
}
