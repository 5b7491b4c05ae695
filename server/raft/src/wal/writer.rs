//! The writer task: takes what is queued, writes one batch at a time, calls the callbacks, keeps a next segment ready.
//!
//! ```text
//!  wait ──work──> (roll if it does not fit) ──> encode ──> write ──ok──> complete, housekeeping ──> wait
//!    │closing                │ disk full: wait for space     │error
//!    v                       v closing                       v
//!  ended: Closed          ended: Closed                   ended: the error, for ever (INV)
//! ```
//! Behind the last batch, when the log falls idle or closes, comes a *mark*: a batch without records. What stands in front of a whole batch
//! was durable, so damage to the last records is not mistaken for the torn tail of a crash; only what was written less than
//! [`WAL_MARK_AFTER`] before a crash can be. A mark need not be durable itself, and the next batch is written over it.
//!
//! Invariants: one write in flight; a segment is written only from the start on and only once its name is durable; when
//! the task ends, for whatever reason, everyone who waits is told. A full disk is not an error here: the roll waits.

use super::core::{Core, InFlight, Phase};
use super::error::{WalError, WalErrorKind};
use super::recovery::{self, Recovered};
use super::segments::{IDENTITY_NAME, Identity, Place};
use super::stats::Counters;
use super::{Completion, Shared, WalOptions, entry_bytes_max};
use futures_util::FutureExt as _;
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{WAL_MARK_AFTER, WAL_NO_SPACE_RETRY};
use ogee_disk::{ALIGN, AlignedBuf, DiskError, DiskErrorKind, LogFile, LogWriter};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// First size of the batch buffer, bytes; it grows to what a batch needs.
const BUFFER_BYTES: usize = 256 << 10;

/// A recovered log with its next segment, before the writer runs.
pub(super) struct Start {
    core: Core,
    writer: Writer,
}

impl Start {
    pub(super) async fn prepare(place: Place, options: WalOptions) -> Result<Self, WalError> {
        let io = LogWriter::new(options.engine);
        let task = ogee_common::sim::spawn_blocking(move || prepare_blocking(&place, &options).map(|r| (r, place, options)));
        let (recovered, place, options) = task.await.map_err(|_| WalError::new(WalErrorKind::Closed, "open log"))??;
        let Recovered { mut core, identity, next_number, empty } = recovered;
        core.prepared_bytes = empty.as_ref().map_or(0, |f| f.bytes());
        let buf = AlignedBuf::with_capacity(BUFFER_BYTES);
        // What was found may have no mark: the process before was killed in the midst of work.
        let mark_at = core.is_used().then(|| clock::now() + WAL_MARK_AFTER);
        let writer =
            Writer { shared: None, place, options, io, buf, identity, next_number, ready: empty, job: None, retry_at: None, mark_at };
        Ok(Self { core, writer })
    }

    pub(super) fn into_parts(self) -> (Core, Writer) {
        (self.core, self.writer)
    }
}

fn prepare_blocking(place: &Place, options: &WalOptions) -> Result<Recovered, WalError> {
    let new_core = |log| Core::new(log, entry_bytes_max(options.segment_bytes), options.cache_bytes);
    let mut recovered = recovery::recover(&place.dir, &place.sub, new_core)?;
    if recovered.empty.take_if(|f| f.bytes() != options.segment_bytes).is_some() {
        // Prepared under another configuration; nothing was written to it.
        place.remove(recovered.next_number).map_err(|e| WalError::disk("remove segment", e))?;
    }
    if recovered.empty.is_none() {
        let made = place.prepare(recovered.next_number, options.segment_bytes, None);
        recovered.empty = Some(made.map_err(|e| WalError::disk("create segment", e))?);
    }
    Ok(recovered)
}

/// What a job on the blocking pool came to.
enum JobResult {
    Prepared { file: Result<Arc<LogFile>, DiskError>, reused: bool },
    Removed(Result<(), DiskError>),
}

/// The task's own state.
pub(super) struct Writer {
    /// Set when it runs.
    shared: Option<Arc<Shared>>,
    place: Place,
    options: WalOptions,
    io: LogWriter,
    buf: AlignedBuf,
    identity: Identity,
    /// Number of the segment that is prepared or will be.
    next_number: u64,
    ready: Option<Arc<LogFile>>,
    job: Option<JoinHandle<JobResult>>,
    /// After a full disk: not before.
    retry_at: Option<Instant>,
    /// When the last batch gets its mark, if nothing follows it.
    mark_at: Option<Instant>,
}

impl Writer {
    pub(super) const fn segment_bytes(&self) -> u64 {
        self.options.segment_bytes
    }

    pub(super) async fn run(mut self, shared: Arc<Shared>) {
        self.shared = Some(Arc::clone(&shared));
        loop {
            let step = self.step(&shared).await;
            let (why, flight) = match step {
                Ok(true) => continue,
                Ok(false) => (WalError::new(WalErrorKind::Closed, "close log"), None),
                Err(failed) => *failed,
            };
            if why.kind() != WalErrorKind::Closed {
                tracing::error!(target: "controlpath", error = &why as &dyn std::error::Error, "the log has failed and takes nothing any more");
            }
            end(&shared, why, flight);
            break;
        }
        // A job on the blocking pool owns files of the log: let it finish before the directory is given away.
        if let Some(job) = self.job.take() {
            let _ = job.await;
        }
    }

    /// Waits for work and writes one batch; `false` when the log closes.
    async fn step(&mut self, shared: &Shared) -> Result<bool, Box<(WalError, Option<InFlight>)>> {
        if !self.wait_for_work(shared).await? {
            if self.mark_at.is_some() {
                self.mark(shared).await?;
            }
            return Ok(false);
        }
        while !shared.lock().fits() {
            if !self.roll(shared).await.map_err(alone)? {
                return Ok(false);
            }
        }
        self.write_batch(shared).await?;
        Ok(true)
    }

    /// Writes what is queued and fits as one batch.
    async fn write_batch(&mut self, shared: &Shared) -> Result<(), Box<(WalError, Option<InFlight>)>> {
        let encoded = shared.lock().encode(&mut self.buf);
        let Some((file, offset, flight)) = encoded else { return Ok(()) };
        // A batch without records at the start of a segment is the mark of the segment before.
        self.mark_at = (flight.records > 0).then(|| clock::now() + WAL_MARK_AFTER);
        shared.drained.notify_waiters();
        let buf = std::mem::replace(&mut self.buf, AlignedBuf::with_capacity(0));
        let bytes = buf.len() as u64;
        let (result, buf) = self.io.write(&file, offset, buf).await;
        self.buf = buf;
        drop(file);
        let result = match result {
            Ok(()) => self.mark_used().await,
            Err(e) => Err(WalError::disk("write batch", e)),
        };
        if let Err(e) = result {
            return Err(Box::new((e, Some(flight))));
        }
        Counters::add(&shared.counters.flushes, 1);
        Counters::add(&shared.counters.bytes, bytes);
        Counters::add(&shared.counters.records, flight.records);
        Counters::add(&shared.counters.entries, flight.entries);
        let done = shared.lock().completed(flight);
        tell(done, &Ok(()));
        self.housekeeping(shared).map_err(alone)
    }

    /// Writes a mark behind the last batch. Where there is no room, or the process has written nothing yet, the head of a new segment is one.
    async fn mark(&mut self, shared: &Shared) -> Result<(), Box<(WalError, Option<InFlight>)>> {
        self.mark_at = None;
        if self.buf.capacity() < ALIGN {
            self.buf = AlignedBuf::with_capacity(BUFFER_BYTES);
        }
        let Some((file, offset)) = shared.lock().mark(&mut self.buf) else {
            if self.roll(shared).await.map_err(alone)? {
                self.write_batch(shared).await?;
            }
            return Ok(());
        };
        let buf = std::mem::replace(&mut self.buf, AlignedBuf::with_capacity(0));
        let (result, buf) = self.io.write_unflushed(&file, offset, buf).await;
        self.buf = buf;
        Counters::add(&shared.counters.marks, 1);
        result.map_err(|e| alone(WalError::disk("mark end of log", e)))
    }

    async fn wait_for_work(&mut self, shared: &Shared) -> Result<bool, Box<(WalError, Option<InFlight>)>> {
        loop {
            {
                let core = shared.lock();
                if core.has_work() {
                    return Ok(true);
                }
                if !matches!(core.phase, Phase::Open) {
                    return Ok(false);
                }
            }
            if self.mark_at.is_some_and(|at| at <= clock::now()) {
                self.mark(shared).await?;
            } else {
                self.pause(shared).await.map_err(alone)?;
            }
        }
    }

    /// Waits for a wake-up, the end of a job, or the time to try again.
    async fn pause(&mut self, shared: &Shared) -> Result<(), WalError> {
        tokio::select! {
            () = shared.work.notified() => Ok(()),
            result = finished(&mut self.job) => {
                self.job = None;
                self.job_done(shared, result)?;
                self.housekeeping(shared)
            }
            () = until(self.retry_at) => {
                self.retry_at = None;
                self.housekeeping(shared)
            }
            () = until(self.mark_at) => Ok(()),
        }
    }

    /// Makes the next segment the tail, waiting for space if need be; `false` when the log closes meanwhile.
    async fn roll(&mut self, shared: &Shared) -> Result<bool, WalError> {
        let fresh = shared.lock().tail.as_ref().is_some_and(|t| t.offset == 0);
        if fresh {
            // Even an empty segment does not hold the states of all groups and one record.
            return Err(WalError::new(WalErrorKind::TooBig, "start segment"));
        }
        self.mark_at = None;
        while self.ready.is_none() {
            if self.job.is_none() && self.retry_at.is_none() {
                self.start_prepare(shared);
            }
            self.pause(shared).await?;
            let core = shared.lock();
            if core.no_space && !matches!(core.phase, Phase::Open) {
                return Ok(false);
            }
        }
        if let Some(file) = self.ready.take() {
            let mut core = shared.lock();
            core.prepared_bytes = 0;
            core.roll(self.next_number, file);
            self.next_number += 1;
        }
        Ok(true)
    }

    /// Looks after the job and starts the next one: prepare the next segment in time, or delete freed segments beyond
    /// the spares. Never waits; under load this is the only place that sees a job end.
    fn housekeeping(&mut self, shared: &Shared) -> Result<(), WalError> {
        if let Some(result) = finished(&mut self.job).now_or_never() {
            self.job = None;
            self.job_done(shared, result)?;
        }
        if self.job.is_some() {
            return Ok(());
        }
        let (freed, late) = {
            let core = shared.lock();
            let late = core.tail.as_ref().is_some_and(|t| t.offset > t.file.bytes() / 2);
            (core.freed.len(), late)
        };
        if self.ready.is_none() && (freed > 0 || (late && self.retry_at.is_none())) {
            self.start_prepare(shared);
        } else if freed > self.options.spare_segments {
            let oldest = shared.lock().freed.pop_front();
            if let Some((number, file)) = oldest {
                let place = self.place.clone();
                self.job = Some(ogee_common::sim::spawn_blocking(move || {
                    drop(file);
                    JobResult::Removed(place.remove(number))
                }));
            }
        }
        Ok(())
    }

    fn start_prepare(&mut self, shared: &Shared) {
        let freed = shared.lock().freed.pop_front();
        let (place, number, bytes) = (self.place.clone(), self.next_number, self.options.segment_bytes);
        self.job = Some(ogee_common::sim::spawn_blocking(move || {
            let reused = freed.as_ref().is_some_and(|(_, f)| f.bytes() == bytes);
            JobResult::Prepared { file: place.prepare(number, bytes, freed), reused }
        }));
    }

    fn job_done(&mut self, shared: &Shared, result: JobResult) -> Result<(), WalError> {
        match result {
            JobResult::Removed(result) => result.map_err(|e| WalError::disk("remove segment", e)),
            JobResult::Prepared { file: Ok(file), reused } => {
                let counters = &shared.counters;
                Counters::add(if reused { &counters.segments_reused } else { &counters.segments_created }, 1);
                let mut core = shared.lock();
                core.prepared_bytes = file.bytes();
                core.no_space = false;
                self.ready = Some(file);
                Ok(())
            }
            // Reusing a file needs no space: there, and only there, an error of any kind may have lost the file's name.
            JobResult::Prepared { file: Err(e), reused: false } if e.kind() == DiskErrorKind::NoSpace => {
                if !std::mem::replace(&mut shared.lock().no_space, true) {
                    tracing::warn!(target: "controlpath", error = &e as &dyn std::error::Error, "disk full: the log cannot grow");
                }
                self.retry_at = Some(clock::now() + WAL_NO_SPACE_RETRY);
                Ok(())
            }
            JobResult::Prepared { file: Err(e), .. } => Err(WalError::disk("prepare segment", e)),
        }
    }

    /// Notes durably that the log is in use, once, behind its first batch.
    async fn mark_used(&mut self) -> Result<(), WalError> {
        if self.identity.used {
            return Ok(());
        }
        self.identity.used = true;
        let (identity, place) = (self.identity, self.place.clone());
        let task = ogee_common::sim::spawn_blocking(move || identity.write(&place.dir, &place.path(IDENTITY_NAME)));
        let written = task.await.map_err(|_| WalError::new(WalErrorKind::Closed, "mark log used"))?;
        written.map_err(|e| WalError::disk("mark log used", e))
    }
}

impl Drop for Writer {
    /// The task was dropped with its runtime, or panicked: those who wait are told.
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            end(&shared, WalError::new(WalErrorKind::Closed, "stop log writer"), None);
        }
    }
}

fn alone(e: WalError) -> Box<(WalError, Option<InFlight>)> {
    Box::new((e, None))
}

fn end(shared: &Shared, why: WalError, flight: Option<InFlight>) {
    let mut core = shared.lock();
    if matches!(core.phase, Phase::Ended(_)) {
        return;
    }
    let waiting = core.end(why.clone(), flight);
    drop(core);
    tell(waiting, &Err(why.clone()));
    shared.ended.send_replace(Some(why));
    shared.drained.notify_waiters();
}

fn tell(done: Vec<Completion>, result: &Result<(), WalError>) {
    for completion in done {
        completion(result.clone());
    }
}

async fn finished(job: &mut Option<JoinHandle<JobResult>>) -> JobResult {
    let Some(job) = job else { return std::future::pending().await };
    match job.await {
        Ok(result) => result,
        Err(e) => {
            let source = std::io::Error::other(e);
            JobResult::Removed(Err(DiskError::new("run log job", std::path::Path::new(""), source)))
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
