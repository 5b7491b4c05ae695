//! [`Recorder`]: notes what a client asks for and gets. [`Recorded`]: a device whose every request is noted.
//!
//! Used by test processes and by tests in their own process. Invariants: an invocation is noted before the request is made, a completion
//! after its answer has come; a request that is dropped or whose process dies in between stays without outcome, which is *unknown*.
//! Numbers of operations are unique over all clients of a history, as long as these have different numbers.

use super::{Action, Event, Layer, Op, Outcome, Run, SECTOR_BYTES, Target, Value, decode, fill, log};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use ogee_client::{BlockDevice, IoError, IoErrorKind};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bits of an operation's number that count; those above are the client's number.
const COUNT_BITS: u32 = 40;

/// Nanoseconds of the machine's monotonic clock, which all processes share; the clock of `ogee_common` cannot be compared between
/// processes.
#[must_use]
pub fn now() -> u64 {
    if let Some(now) = ogee_common::sim::tick_ns() {
        return now;
    }
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(time.tv_sec) * 1_000_000_000 + part(time.tv_nsec)
}

#[derive(Debug)]
enum Sink {
    Memory(Vec<Event>),
    File(File),
}

/// Notes events of one client. Clones share everything.
#[derive(Debug, Clone)]
pub struct Recorder {
    client: u32,
    next: Arc<AtomicU64>,
    sink: Arc<Mutex<Sink>>,
}

impl Recorder {
    /// Keeps the events in memory.
    #[must_use]
    pub fn in_memory(client: u32) -> Self {
        Self::with(client, Sink::Memory(vec![]))
    }

    /// Appends the events to a new file, for a process that may be killed.
    ///
    /// # Errors
    /// When it cannot be made or exists.
    pub fn to_file(client: u32, path: &Path) -> Result<Self> {
        let file = File::options().append(true).create_new(true).open(path);
        Ok(Self::with(client, Sink::File(file.with_context(|| format!("create {}", path.display()))?)))
    }

    fn with(client: u32, sink: Sink) -> Self {
        let next = Arc::new(AtomicU64::new((u64::from(client) << COUNT_BITS) + 1));
        Self { client, next, sink: Arc::new(Mutex::new(sink)) }
    }

    /// A copy of what was noted in memory; empty when it goes to a file.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        match &*self.sink.lock().unwrap_or_else(PoisonError::into_inner) {
            Sink::Memory(events) => events.clone(),
            Sink::File(_) => vec![],
        }
    }

    /// Notes that a layer exists.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn layer(&self, id: u64, layer: Layer) -> Result<()> {
        self.note(Event::Layer { id, layer })
    }

    /// Notes that a request is about to be made. Returns its number.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn invoke(&self, action: Action, target: Target, epoch: u64, range: (u32, u32)) -> Result<u64> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let ((first, count), client, invoked) = (range, self.client, now());
        self.note(Event::Invoke(Op { id, client, action, target, epoch, first, count, invoked, completed: None, found: vec![] }))?;
        Ok(id)
    }

    /// Notes how a request ended, just now.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn complete(&self, op: u64, outcome: Outcome) -> Result<()> {
        self.note(Event::Complete { op, time: now(), outcome })
    }

    fn note(&self, event: Event) -> Result<()> {
        match &mut *self.sink.lock().unwrap_or_else(PoisonError::into_inner) {
            Sink::Memory(events) => events.push(event),
            Sink::File(file) => file.write_all(log::line(&event).as_bytes()).context("write the history")?,
        }
        Ok(())
    }
}

/// A device whose requests are recorded. Offsets are sectors.
#[derive(Debug, Clone)]
pub struct Recorded<D> {
    /// The device.
    pub device: D,
    /// Where it is noted.
    pub recorder: Recorder,
    /// What the device reads and writes.
    pub target: Target,
    /// The epoch of its attach; 0 when read-only.
    pub epoch: u64,
}

/// Bytes of so many sectors.
fn bytes(sectors: u32) -> u64 {
    u64::from(sectors) * SECTOR_BYTES as u64
}

/// What a failed write or zeroing means.
fn failure(error: &IoError) -> Outcome {
    match error.kind {
        IoErrorKind::InvalidInput | IoErrorKind::ReadOnly => Outcome::Void,
        _ => Outcome::Unknown,
    }
}

impl<D: BlockDevice> Recorded<D> {
    /// Another handle of the device, for another thread or task.
    #[must_use]
    pub fn for_thread(&self) -> Self {
        Self { device: self.device.for_thread(), ..self.clone() }
    }

    async fn change(&self, op: u64, io: impl Future<Output = Result<(), IoError>>) -> Result<Result<(), IoError>> {
        let result = io.await;
        self.recorder.complete(op, result.as_ref().map_or_else(failure, |()| Outcome::Ok(vec![])))?;
        Ok(result)
    }

    /// Writes this operation's stamps.
    ///
    /// # Errors
    /// Outside: the record cannot be kept, or this is a snapshot. Inside: the device's error.
    pub async fn write(&self, first: u32, count: u32) -> Result<Result<(), IoError>> {
        let Target::Layer(layer) = self.target else { anyhow::bail!("a snapshot cannot be written") };
        let op = self.recorder.invoke(Action::Write, self.target, self.epoch, (first, count))?;
        let mut data = vec![0u8; usize::try_from(bytes(count))?];
        for (i, sector) in data.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            fill(layer, op, u64::from(first) + i as u64, sector);
        }
        self.change(op, self.device.write(bytes(first), Bytes::from(data))).await
    }

    /// Makes the range zeros by a discard.
    ///
    /// # Errors
    /// As [`Recorded::write`].
    pub async fn discard(&self, first: u32, count: u32) -> Result<Result<(), IoError>> {
        let op = self.recorder.invoke(Action::Zero, self.target, self.epoch, (first, count))?;
        self.change(op, self.device.discard(bytes(first), bytes(count))).await
    }

    /// Makes the range zeros.
    ///
    /// # Errors
    /// As [`Recorded::write`].
    pub async fn write_zeroes(&self, first: u32, count: u32) -> Result<Result<(), IoError>> {
        let op = self.recorder.invoke(Action::Zero, self.target, self.epoch, (first, count))?;
        self.change(op, self.device.write_zeroes(bytes(first), bytes(count))).await
    }

    /// Reads and notes what was found.
    ///
    /// # Errors
    /// As [`Recorded::write`].
    pub async fn read(&self, first: u32, count: u32) -> Result<Result<(), IoError>> {
        let op = self.recorder.invoke(Action::Read, self.target, self.epoch, (first, count))?;
        let data = match self.device.read(bytes(first), u32::try_from(bytes(count))?).await {
            Ok(data) => data.to_vec(),
            Err(error) => {
                self.recorder.complete(op, Outcome::Unknown)?;
                return Ok(Err(error));
            }
        };
        ensure!(data.len() as u64 == bytes(count), "a read of {count} sectors gave {} bytes", data.len());
        self.recorder.complete(op, Outcome::Ok(runs_of(first, &data)))?;
        Ok(Ok(()))
    }
}

/// What was found, in runs.
fn runs_of(first: u32, data: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = vec![];
    for (i, sector) in data.chunks_exact(SECTOR_BYTES).enumerate() {
        let value: Value = decode(u64::from(first) + i as u64, sector);
        match runs.last_mut() {
            Some(run) if run.value == value => run.count += 1,
            _ => runs.push(Run { count: 1, value }),
        }
    }
    runs
}
