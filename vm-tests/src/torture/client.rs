//! A client of the torture: a process that attaches a volume, reads and writes it at random, loses it or lets it go, and begins again.
//!
//! Started by the director as `client NUMBER MDS VOLUME SEED FILE`; ends when its standard input does. Every request is appended to FILE
//! before it is made. Invariants: everything random follows from the seed, but for the order in which answers come; an error that
//! the promises allow (fenced, timed out, closed) is recorded and life goes on, any other ends the process with a message.

use crate::history::{Recorded, Recorder, Target};
use anyhow::{Context, Result, bail};
use ogee_client::{Cluster, ClusterConfig, IoError, IoErrorKind, OpenMode, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Requests in flight.
const WORKERS: usize = 6;
/// Sectors of the longest request: crosses pages, and chunks at their bounds.
const SECTORS_MAX: u32 = 96;
/// Sectors of a hot place, where requests meet.
const HOT: u32 = 160;
/// Sectors of a chunk.
const CHUNK: u32 = 32_768;

/// What the process was told.
#[derive(Debug, Clone)]
pub struct ClientArgs {
    /// Its number, for the numbers of its operations.
    pub number: u32,
    /// Addresses of the MDS.
    pub mds: Vec<String>,
    /// The volume it uses.
    pub volume: String,
    /// What everything random follows from.
    pub seed: u64,
    /// Where its history goes.
    pub file: String,
}

impl ClientArgs {
    /// Reads the arguments after the word `client`.
    ///
    /// # Errors
    /// When one is missing or no number.
    pub(super) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut next = |what: &str| words.next().with_context(|| format!("client: no {what}"));
        let number = next("number")?.parse().context("client: number")?;
        let mds = next("MDS")?.split(',').map(str::to_owned).collect();
        let (volume, seed) = (next("volume")?, next("seed")?.parse().context("client: seed")?);
        Ok(Self { number, mds, volume, seed, file: next("file")? })
    }
}

/// Whether standard input has ended.
pub(super) fn stop_flag() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    std::thread::spawn(move || {
        let mut rest = vec![];
        // Whatever it ends with, it has ended.
        drop(std::io::stdin().read_to_end(&mut rest));
        flag.store(true, Ordering::Relaxed);
    });
    stop
}

/// Connects; `None` if nobody answers.
pub(super) async fn connect(mds: &[String], timeout: Option<Duration>) -> Option<Cluster> {
    let config = ClusterConfig { mds: mds.to_vec(), description: "torture".to_owned(), io_timeout: timeout, ..ClusterConfig::default() };
    Cluster::connect(config).await.ok()
}

/// The whole life of the process.
///
/// # Errors
/// What must not happen.
pub async fn run(args: ClientArgs, stop: Arc<AtomicBool>) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(args.seed);
    let recorder = Recorder::to_file(args.number, Path::new(&args.file))?;
    let name = VolumeRef::parse(&args.volume).context("the volume's name")?;
    let mut attached = std::fs::File::create(format!("{}.attached", args.file)).context("note attaches")?;
    while !stop.load(Ordering::Relaxed) {
        // Half of them wait for ever, as guests do.
        let timeout = rng.random_bool(0.5).then_some(Duration::from_secs(6));
        let pause = Duration::from_millis(rng.random_range(0..2_500));
        let opened = match connect(&args.mds, timeout).await {
            Some(cluster) => Volume::open(&cluster, &name, OpenMode::ReadWrite { steal: true }).await.ok(),
            None => None,
        };
        if let Some(volume) = opened {
            let info = volume.attach_info().clone();
            writeln!(attached, "{} {}", info.volume.0, info.layer.0).context("note an attach")?;
            let target = Target::Layer(info.layer.0);
            let disk = Recorded { device: volume.clone(), recorder: recorder.clone(), target, epoch: info.epoch.0 };
            let stint = Duration::from_millis(rng.random_range(1_500..14_000));
            work(&disk, &mut rng, stint, &stop).await?;
            if rng.random_bool(0.6) {
                // Not being able to is as good as not having tried.
                drop(tokio::time::timeout(Duration::from_secs(8), volume.detach()).await);
            }
        }
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// Reads and writes at random until the time is over, the volume is lost or the process is to end. Requests that hang then are dropped.
///
/// # Errors
/// What must not happen.
pub(super) async fn work(disk: &Recorded<Volume>, rng: &mut StdRng, stint: Duration, stop: &Arc<AtomicBool>) -> Result<()> {
    let over = Arc::new(AtomicBool::new(false));
    let sectors = u32::try_from(ogee_client::BlockDevice::info(&disk.device).size_bytes / 512).context("a small volume")?;
    let deadline = clock::now() + stint;
    let start = |_| {
        let worker = Worker { disk: disk.for_thread(), rng: StdRng::seed_from_u64(rng.random()), sectors, over: over.clone(), stop: stop.clone() };
        tokio::spawn(worker.run(deadline))
    };
    let workers: Vec<_> = (0..WORKERS).map(start).collect();
    let patience = deadline + Duration::from_secs(4);
    for mut worker in workers {
        match tokio::time::timeout_at(patience, &mut worker).await {
            Ok(ended) => ended.context("a worker panicked")??,
            Err(_) => worker.abort(),
        }
    }
    Ok(())
}

struct Worker {
    disk: Recorded<Volume>,
    rng: StdRng,
    sectors: u32,
    over: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    async fn run(mut self, deadline: clock::Instant) -> Result<()> {
        while clock::now() < deadline && !self.over.load(Ordering::Relaxed) && !self.stop.load(Ordering::Relaxed) {
            // Sometimes nobody waits for the answer, which makes the outcome unknown.
            let patience = if self.rng.random_range(0..40) == 0 { self.rng.random_range(0..30) } else { 3_600_000 };
            let (first, count) = self.place();
            let (disk, kind) = (&self.disk, self.rng.random_range(0..20));
            let io = async {
                match kind {
                    0..=8 => disk.write(first, count).await,
                    9 => disk.discard(first, count).await,
                    10 => disk.write_zeroes(first, count).await,
                    _ => disk.read(first, count).await,
                }
            };
            if let Ok(done) = tokio::time::timeout(Duration::from_millis(patience), io).await
                && let Err(error) = done?
            {
                self.failed(&error)?;
            }
            let pause = self.rng.random_range(0..24);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Ok(())
    }

    fn place(&mut self) -> (u32, u32) {
        let count = match self.rng.random_range(0..4) {
            0 => self.rng.random_range(1..=SECTORS_MAX),
            1 => self.rng.random_range(1..=7),
            _ => 8,
        };
        let chunks = self.sectors / CHUNK;
        let first = if self.rng.random_bool(0.7) {
            // Around the bound of a chunk, the end of the volume among them.
            let bound = self.rng.random_range(0..=chunks) * CHUNK;
            bound.saturating_sub(HOT / 2) + self.rng.random_range(0..HOT)
        } else {
            self.rng.random_range(0..self.sectors)
        };
        let first = if count == 8 { first - first % 8 } else { first };
        (first.min(self.sectors - count), count)
    }

    fn failed(&self, error: &IoError) -> Result<()> {
        match error.kind {
            IoErrorKind::Fenced | IoErrorKind::Closed => self.over.store(true, Ordering::Relaxed),
            IoErrorKind::TimedOut | IoErrorKind::NoSpace => {}
            IoErrorKind::Corrupt | IoErrorKind::InvalidInput | IoErrorKind::ReadOnly => bail!("{error}: {:?}", error.source),
        }
        Ok(())
    }
}
