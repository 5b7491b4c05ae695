//! A verified load on one volume, through the SDK: every sector knows what it may hold.
//!
//! Used by the crash and stall tests. The volume is cut into one region per worker, so that no two writes under way overlap; each worker
//! writes, zeroes, discards and reads at random and checks every read at once. Contents are unique: a sector holds its own number and the
//! number of the write that filled it. Invariants of the record: before a write starts its content is noted as *possible*; when it is
//! acknowledged it becomes the only one. So a write that was cut off by a crash may be there or not, an acknowledged one must be.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use ogee_client::BlockDevice;
use ogee_common::clock;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of a sector.
const SECTOR: usize = 512;
/// Sectors of the longest operation: 64 KiB crosses pages, and chunks at their bounds.
const OPERATION_SECTORS: usize = 128;
/// A load that gets on must do so within this time.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a sector holds when it reads as zeros.
const ZERO: u64 = 0;

#[derive(Debug, Clone, Default)]
struct Sector {
    acknowledged: u64,
    possible: Vec<u64>,
}

#[derive(Debug)]
struct Region {
    first: usize,
    sectors: Mutex<Vec<Sector>>,
}

impl Region {
    fn lock(&self) -> MutexGuard<'_, Vec<Sector>> {
        self.sectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record of everything that was written to a volume, and its load.
#[derive(Debug)]
pub struct Load {
    regions: Vec<Arc<Region>>,
    seed: u64,
    next_write: Arc<AtomicU64>,
    /// Operations that completed.
    pub operations: Arc<AtomicU64>,
}

/// The workers at work.
#[derive(Debug)]
pub struct Running {
    stop: Arc<AtomicBool>,
    workers: Vec<tokio::task::JoinHandle<Result<()>>>,
    longest: Arc<Mutex<Duration>>,
}

/// What a sector holds after write number `write`.
fn fill(sector: usize, write: u64, out: &mut [u8]) {
    if write == ZERO {
        out.fill(0);
        return;
    }
    let stamp = (sector as u64).rotate_left(32) ^ write.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for (i, part) in out.chunks_exact_mut(16).enumerate() {
        part[..8].copy_from_slice(&write.to_le_bytes());
        part[8..].copy_from_slice(&(stamp ^ i as u64).to_le_bytes());
    }
}

/// Which of the possible writes filled these bytes.
fn identify(sector: usize, bytes: &[u8], state: &Sector) -> Result<u64> {
    let mut expected = [0u8; SECTOR];
    for write in std::iter::once(state.acknowledged).chain(state.possible.iter().copied()) {
        fill(sector, write, &mut expected);
        if bytes == expected {
            return Ok(write);
        }
    }
    let found = u64::from_le_bytes(bytes[..8].try_into().context("a sector has eight bytes")?);
    bail!(
        "sector {sector} holds write {found} (or garbage), acknowledged is {}, possible are {:?}",
        state.acknowledged,
        state.possible
    )
}

impl Load {
    /// A record of a volume of zeros.
    #[must_use]
    pub fn new(size_bytes: u64, workers: usize, seed: u64) -> Self {
        let sectors = usize::try_from(size_bytes).expect("test volumes are small") / SECTOR / workers;
        let region = |w| Arc::new(Region { first: w * sectors, sectors: Mutex::new(vec![Sector::default(); sectors]) });
        let regions = (0..workers).map(region).collect();
        Self { regions, seed, next_write: Arc::new(AtomicU64::new(1)), operations: Arc::default() }
    }

    /// Starts a worker for each region.
    pub fn start<D: BlockDevice>(&self, device: &D, round: u64) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let longest = Arc::new(Mutex::new(Duration::ZERO));
        let workers = self.regions.iter().enumerate().map(|(w, region)| {
            let worker = Worker {
                region: region.clone(),
                device: device.for_thread(),
                rng: StdRng::seed_from_u64(self.seed ^ (round << 8) ^ w as u64),
                next_write: self.next_write.clone(),
                operations: self.operations.clone(),
                longest: longest.clone(),
            };
            tokio::spawn(worker.run(stop.clone()))
        });
        Running { workers: workers.collect(), stop, longest }
    }

    /// Waits until `count` more operations have completed.
    ///
    /// # Errors
    /// An operation failed, or the load stands still for a minute.
    pub async fn goes_on(&self, running: &Running, count: u64) -> Result<()> {
        let target = self.operations.load(Ordering::Relaxed) + count;
        let patience = clock::now() + PATIENCE;
        while self.operations.load(Ordering::Relaxed) < target {
            ensure!(!running.has_failed(), "an operation failed");
            ensure!(clock::now() < patience, "the load stands still for {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Reads everything and compares; what is found becomes what must be there from now on. To be called when no write
    /// of an earlier attach can land any more.
    ///
    /// # Errors
    /// The first sector that holds what it may not.
    pub async fn verify<D: BlockDevice>(&self, device: &D) -> Result<()> {
        const STEP: usize = 2048;
        for region in &self.regions {
            let count = region.lock().len();
            for from in (0..count).step_by(STEP) {
                let take = STEP.min(count - from);
                let offset = ((region.first + from) * SECTOR) as u64;
                let data = device.read(offset, u32::try_from(take * SECTOR)?).await?.to_vec();
                let mut sectors = region.lock();
                for (i, bytes) in data.chunks_exact(SECTOR).enumerate() {
                    let state = &mut sectors[from + i];
                    state.acknowledged = identify(region.first + from + i, bytes, state)?;
                    state.possible.clear();
                }
            }
        }
        Ok(())
    }
}

impl Running {
    /// Stops the workers after their current operation.
    ///
    /// # Errors
    /// An operation that failed or read something wrong.
    pub async fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.context("a worker of the load panicked")??;
        }
        Ok(())
    }

    /// Cuts the workers off in the middle of their operations, as the death of their process would.
    ///
    /// # Errors
    /// An operation that had failed or read something wrong before.
    pub async fn cut_off(self) -> Result<()> {
        for worker in &self.workers {
            worker.abort();
        }
        for worker in self.workers {
            match worker.await {
                Ok(result) => result?,
                Err(e) if e.is_cancelled() => {}
                Err(e) => return Err(e).context("a worker of the load panicked"),
            }
        }
        Ok(())
    }

    /// The longest operation since the last call.
    #[must_use]
    pub fn take_longest(&self) -> Duration {
        std::mem::take(&mut self.longest.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a worker has ended, which it does only by an error.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.workers.iter().any(tokio::task::JoinHandle::is_finished)
    }
}

struct Worker<D> {
    region: Arc<Region>,
    device: D,
    rng: StdRng,
    next_write: Arc<AtomicU64>,
    operations: Arc<AtomicU64>,
    longest: Arc<Mutex<Duration>>,
}

impl<D: BlockDevice> Worker<D> {
    async fn run(mut self, stop: Arc<AtomicBool>) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let count = self.region.lock().len();
            let take = match self.rng.random_range(0..3) {
                0 => self.rng.random_range(1..=OPERATION_SECTORS),
                _ => 8,
            };
            let mut from = self.rng.random_range(0..=count - take);
            if take == 8 {
                from -= from % 8;
            }
            let start = clock::now();
            match self.rng.random_range(0..10) {
                0..=5 => self.write(from, take).await?,
                6 => self.zero(from, take).await?,
                _ => self.read(from, take).await?,
            }
            let took = start.elapsed();
            let mut longest = self.longest.lock().unwrap_or_else(PoisonError::into_inner);
            *longest = took.max(*longest);
            drop(longest);
            self.operations.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn offset(&self, from: usize) -> u64 {
        ((self.region.first + from) * SECTOR) as u64
    }

    fn note_possible(&self, from: usize, take: usize, write: u64) {
        self.region.lock()[from..from + take].iter_mut().for_each(|s| s.possible.push(write));
    }

    fn note_acknowledged(&self, from: usize, take: usize, write: u64) {
        for sector in &mut self.region.lock()[from..from + take] {
            *sector = Sector { acknowledged: write, possible: vec![] };
        }
    }

    async fn write(&self, from: usize, take: usize) -> Result<()> {
        let write = self.next_write.fetch_add(1, Ordering::Relaxed);
        let mut data = vec![0u8; take * SECTOR];
        for (i, bytes) in data.chunks_exact_mut(SECTOR).enumerate() {
            fill(self.region.first + from + i, write, bytes);
        }
        self.note_possible(from, take, write);
        self.device.write(self.offset(from), Bytes::from(data)).await?;
        self.note_acknowledged(from, take, write);
        Ok(())
    }

    async fn zero(&mut self, from: usize, take: usize) -> Result<()> {
        self.note_possible(from, take, ZERO);
        let (offset, len) = (self.offset(from), (take * SECTOR) as u64);
        if self.rng.random() {
            self.device.discard(offset, len).await?;
        } else {
            self.device.write_zeroes(offset, len).await?;
        }
        self.note_acknowledged(from, take, ZERO);
        Ok(())
    }

    async fn read(&self, from: usize, take: usize) -> Result<()> {
        let data = self.device.read(self.offset(from), u32::try_from(take * SECTOR)?).await?.to_vec();
        ensure!(data.len() == take * SECTOR, "a read of {} bytes gave {}", take * SECTOR, data.len());
        let mut sectors = self.region.lock();
        for (i, bytes) in data.chunks_exact(SECTOR).enumerate() {
            let state = &mut sectors[from + i];
            let found = identify(self.region.first + from + i, bytes, state)?;
            // What was read once may not change back (linearizable registers).
            if state.possible.len() > 1 || found != state.acknowledged {
                *state = Sector { acknowledged: found, possible: vec![] };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_client::MemoryDevice;

    // Operations in memory never wait, so each worker needs a thread.
    #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
    async fn a_right_device_passes_and_a_lost_write_is_found() -> Result<()> {
        let device = MemoryDevice::new(1 << 20);
        let load = Load::new(1 << 20, 2, 1);
        let running = load.start(&device, 0);
        while load.operations.load(Ordering::Relaxed) < 500 {
            tokio::task::yield_now().await;
        }
        running.finish().await?;
        load.verify(&device).await?;
        // Sector 5 loses its last write.
        let write = load.next_write.fetch_add(1, Ordering::Relaxed);
        load.regions[0].lock()[5] = Sector { acknowledged: write, possible: vec![] };
        ensure!(load.verify(&device).await.is_err(), "a lost write must be found");
        Ok(())
    }

    #[tokio::test]
    async fn a_cut_off_write_may_be_there_or_not_but_nothing_else() -> Result<()> {
        let device = MemoryDevice::new(1 << 20);
        let load = Load::new(1 << 20, 1, 1);
        load.regions[0].lock()[3].possible.push(77);
        load.verify(&device).await?;
        load.regions[0].lock()[3].possible.push(77);
        let mut bytes = vec![0; SECTOR];
        fill(3, 77, &mut bytes);
        device.write(3 * 512, Bytes::from(bytes.clone())).await?;
        load.verify(&device).await?;
        fill(3, 78, &mut bytes);
        device.write(3 * 512, Bytes::from(bytes)).await?;
        ensure!(load.verify(&device).await.is_err(), "a write that was never made must be found");
        Ok(())
    }
}
