//! The actors of a scripted race (`races.rs`): a witness, who reads and takes snapshots, and a writer, each a client on a host of its own. They have a
//! volume that nobody else uses, so its layer never has an unclean attach but theirs, and no write of it is given up.
//!
//! Everything is recorded and checked like the requests of all other clients. Invariants: what happens in the volume follows from the scene and
//! the seed; an error that the promises allow is recorded and life goes on, any other ends the process; the witness ends with reading everything.

use crate::races::{Flavour, Scene, Script};
use anyhow::{Context, Result, bail, ensure};
use ogee_client::{Cluster, ClusterConfig, IoError, IoErrorKind, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_proto::mds as m;
use ogee_vm_tests::history::{Action, Layer, Outcome, Recorded, Recorder, Target};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Their volume.
const VOLUME: &str = "c";
/// Its size.
const SIZE_BYTES: u64 = 1 << 20;
/// Sectors that are used: one request, one chunk, so one copyset.
const HOT: u32 = 192;
/// Writes that may be under way, each at a place of its own.
const WRITERS: u32 = 6;
/// Snapshots that are taken in one world; each is read until the end.
const SNAPSHOTS_MAX: usize = 4;
/// A snapshot that is not ready by then is not used.
const READY_LIMIT: Duration = Duration::from_secs(40);
/// The volume must be made by then, and readable at the end.
const LIMIT: Duration = Duration::from_secs(120);
/// Something that failed is tried again after so long.
const RETRY: Duration = Duration::from_millis(20);

/// What an actor was told.
#[derive(Debug)]
pub(crate) struct ActorArgs {
    /// Its number, for the numbers of its operations.
    pub(crate) number: u32,
    /// Addresses of the MDS.
    pub(crate) mds: Vec<String>,
    /// What everything random follows from.
    pub(crate) seed: u64,
    /// Where its history goes.
    pub(crate) file: PathBuf,
    /// When it does what.
    pub(crate) script: Arc<Script>,
}

struct Actor {
    cluster: Cluster,
    recorder: Recorder,
    rng: StdRng,
    script: Arc<Script>,
    /// Snapshots that are ready: name and cut.
    snaps: Vec<(String, u64)>,
}

/// Whether the volume is still there for whoever got this error.
fn goes_on(error: &IoError) -> Result<bool> {
    match error.kind {
        IoErrorKind::Fenced | IoErrorKind::Closed => Ok(false),
        IoErrorKind::TimedOut | IoErrorKind::NoSpace => Ok(true),
        IoErrorKind::Corrupt | IoErrorKind::InvalidInput | IoErrorKind::ReadOnly => bail!("{error}: {:?}", error.source),
    }
}

/// The whole life of the witness.
///
/// # Errors
/// What must not happen.
pub(crate) async fn witness(args: ActorArgs) -> Result<()> {
    let mut actor = Actor::enter(args)?;
    actor.make_volume().await?;
    actor.script.advance(Scene::Begin, Scene::Made);
    actor.script.until(|scene| scene == Scene::Rest).await?;
    while actor.script.scene() != Scene::Over {
        match actor.script.flavour {
            Flavour::OldLeaders => actor.watch().await?,
            _ => actor.snapshot().await?,
        }
    }
    actor.read_everything().await
}

/// The whole life of the writer.
///
/// # Errors
/// What must not happen.
pub(crate) async fn writer(args: ActorArgs) -> Result<()> {
    let mut actor = Actor::enter(args)?;
    actor.script.until(|scene| scene == Scene::Made).await?;
    if actor.script.flavour == Flavour::SlowClients {
        return actor.write_in_lanes().await;
    }
    actor.script.advance(Scene::Made, Scene::Rest);
    while actor.script.until(|scene| scene == Scene::Run).await? == Scene::Run {
        actor.take_over().await?;
    }
    Ok(())
}

impl Actor {
    fn enter(args: ActorArgs) -> Result<Self> {
        let config = ClusterConfig { mds: args.mds, description: "actor".to_owned(), ..ClusterConfig::default() };
        let cluster = Cluster::connect_lazy(config).context("start a client")?;
        let recorder = Recorder::to_file(args.number, &args.file)?;
        Ok(Self { cluster, recorder, rng: StdRng::seed_from_u64(args.seed), script: args.script, snaps: vec![] })
    }

    /// Opens the volume; `None` if that does not work now.
    async fn open(&self, mode: OpenMode) -> Result<Option<Recorded<Volume>>> {
        let name = VolumeRef::parse(VOLUME).context("the volume's name")?;
        let Ok(device) = Volume::open(&self.cluster, &name, mode).await else { return Ok(None) };
        let (layer, epoch) = (device.attach_info().layer.0, device.attach_info().epoch.0);
        Ok(Some(Recorded { device, recorder: self.recorder.clone(), target: Target::Layer(layer), epoch }))
    }

    /// Opens it for sure.
    async fn open_at_last(&self, mode: OpenMode) -> Result<Recorded<Volume>> {
        let patience = clock::now() + LIMIT;
        loop {
            if let Some(disk) = self.open(mode).await? {
                return Ok(disk);
            }
            ensure!(clock::now() < patience, "{VOLUME} cannot be opened within {LIMIT:?}");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Makes the volume and gives every sector that is used a first value, so that a reader need not ask the MDS where it lies.
    async fn make_volume(&mut self) -> Result<()> {
        let request = m::CreateVolumeRequest { path: VOLUME.into(), size_bytes: SIZE_BYTES, ..Default::default() };
        self.cluster.mds().create_volume(request).await.context("make the actors' volume")?;
        let disk = self.open_at_last(OpenMode::ReadWrite { steal: false }).await?;
        let info = disk.device.attach_info();
        let sectors = u32::try_from(SIZE_BYTES / 512).context("a small volume")?;
        self.recorder.layer(info.layer.0, Layer { volume: info.volume.0, sectors, parent: None })?;
        disk.write(0, HOT).await?.context("the first write")?;
        disk.device.detach().await.context("detach")
    }

    /// Reads until a race is over, or the volume is taken over: sometimes as its holder, sometimes as somebody who looks on.
    async fn watch(&mut self) -> Result<()> {
        let mode = if self.rng.random_bool(0.5) { OpenMode::ReadOnly } else { OpenMode::ReadWrite { steal: true } };
        let Some(disk) = self.open(mode).await? else {
            tokio::time::sleep(RETRY).await;
            return Ok(());
        };
        let (mut good, mut raced) = (0, false);
        loop {
            match disk.read(0, HOT).await? {
                Ok(()) => good += 1,
                Err(error) if goes_on(&error)? => {}
                Err(_) => break,
            }
            let scene = self.script.scene();
            if scene == Scene::Over || (raced && scene != Scene::Run) {
                break;
            }
            raced |= scene == Scene::Run;
            if good >= 3 && !raced {
                self.script.advance(Scene::Rest, Scene::Ready);
            }
            let pause = if raced { self.rng.random_range(10..40) } else { self.rng.random_range(60..120) };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.script.advance(Scene::Ready, Scene::Rest);
        self.script.until(|scene| scene != Scene::Run).await?;
        Ok(())
    }

    /// Takes the volume and writes until the race is over.
    async fn take_over(&mut self) -> Result<()> {
        let Some(disk) = self.open(OpenMode::ReadWrite { steal: true }).await? else {
            tokio::time::sleep(RETRY).await;
            return Ok(());
        };
        while self.script.scene() == Scene::Run {
            let count = self.rng.random_range(1..=16);
            let first = self.rng.random_range(0..=HOT - count);
            if let Err(error) = disk.write(first, count).await?
                && !goes_on(&error)?
            {
                break;
            }
            let pause = self.rng.random_range(10..40);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Ok(())
    }

    /// Holds the volume as long as the world lasts, and writes with several writes under way whenever a race goes on.
    async fn write_in_lanes(&mut self) -> Result<()> {
        let disk = self.open_at_last(OpenMode::ReadWrite { steal: false }).await?;
        self.script.advance(Scene::Made, Scene::Rest);
        let start = |lane| {
            let (disk, script, rng) = (disk.for_thread(), self.script.clone(), StdRng::seed_from_u64(self.rng.random()));
            tokio::spawn(write_lane(disk, script, rng, lane))
        };
        let lanes: Vec<_> = (0..WRITERS).map(start).collect();
        for lane in lanes {
            lane.await.context("a writer panicked")??;
        }
        drop(tokio::time::timeout(Duration::from_secs(8), disk.device.detach()).await);
        Ok(())
    }

    /// Takes a snapshot while writes hang, and reads it before and after they have arrived.
    async fn snapshot(&mut self) -> Result<()> {
        if self.snaps.len() >= SNAPSHOTS_MAX || !self.script.advance(Scene::Rest, Scene::Ready) {
            return self.script.until(|scene| scene == Scene::Over).await.map(drop);
        }
        if self.script.until(|scene| scene == Scene::Run).await? == Scene::Over {
            return Ok(());
        }
        if let Some((name, cut)) = self.take().await? {
            self.look(&name, cut).await?;
            self.snaps.push((name.clone(), cut));
            self.script.advance(Scene::Run, Scene::Shown);
            self.script.until(|scene| !matches!(scene, Scene::Run | Scene::Shown)).await?;
            self.look(&name, cut).await?;
        }
        self.script.set(Scene::Rest);
        Ok(())
    }

    async fn take(&mut self) -> Result<Option<(String, u64)>> {
        let Some(live) = self.open(OpenMode::ReadOnly).await? else { return Ok(None) };
        let name = format!("race-{}", self.rng.random::<u32>());
        let cut = self.recorder.invoke(Action::Cut, live.target, 0, (0, 0))?;
        let request = m::CreateSnapshotRequest { path: VOLUME.into(), name: name.clone() };
        let Ok(taken) = self.cluster.mds().create_snapshot(request).await else { return Ok(None) };
        let patience = clock::now() + READY_LIMIT;
        let mut ready = taken.ready;
        while !ready {
            if clock::now() >= patience {
                return Ok(None);
            }
            tokio::time::sleep(RETRY).await;
            let list = self.cluster.mds().list_snapshots(m::ListSnapshotsRequest { path: VOLUME.into() }).await;
            ready = list.is_ok_and(|l| l.snapshots.iter().any(|s| s.name == name && s.ready));
        }
        self.recorder.complete(cut, Outcome::Ok(vec![]))?;
        Ok(Some((name, cut)))
    }

    /// Reads a snapshot, if that works now.
    async fn look(&self, name: &str, cut: u64) -> Result<bool> {
        let name = VolumeRef::parse(&format!("{VOLUME}@{name}")).context("the snapshot's name")?;
        let Ok(device) = Volume::open(&self.cluster, &name, OpenMode::ReadOnly).await else { return Ok(false) };
        let disk = Recorded { device, recorder: self.recorder.clone(), target: Target::Cut(cut), epoch: 0 };
        match disk.read(0, HOT).await? {
            Ok(()) => Ok(true),
            Err(error) => goes_on(&error).map(|_| false),
        }
    }

    /// Reads the volume and all snapshots, when everything works again.
    async fn read_everything(&mut self) -> Result<()> {
        let disk = self.open_at_last(OpenMode::ReadOnly).await?;
        disk.read(0, HOT).await?.context("read the actors' volume")?;
        let patience = clock::now() + LIMIT;
        for (name, cut) in &self.snaps {
            while !self.look(name, *cut).await? {
                ensure!(clock::now() < patience, "{VOLUME}@{name} cannot be read within {LIMIT:?}");
                tokio::time::sleep(RETRY).await;
            }
        }
        Ok(())
    }
}

/// Writes to one place, one write after the other, while a race goes on.
async fn write_lane(disk: Recorded<Volume>, script: Arc<Script>, mut rng: StdRng, lane: u32) -> Result<()> {
    let width = HOT / WRITERS;
    while script.until(|scene| scene != Scene::Rest && scene != Scene::Ready).await? != Scene::Over {
        let count = rng.random_range(1..=width);
        let first = lane * width + rng.random_range(0..=width - count);
        if let Err(error) = disk.write(first, count).await?
            && !goes_on(&error)?
        {
            bail!("a volume that nobody else attaches was lost: {error}");
        }
        let pause = rng.random_range(0..12);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    Ok(())
}
