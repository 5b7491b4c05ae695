//! The scrubs of this disk, on leaders and followers alike. Both compare the records of all pages with those of the other replicas
//! ([`crate::copyset::compare`]); a replica that two others outvote is given up, so that the MDS rebuilds it. The deep one also reads
//! every page of every data file, verifies it and, if need be, mends it from another replica; once a week by itself, or when the MDS
//! orders it. The light one runs once a day and reads no data. The one of a volume is as deep, runs when the MDS orders it, and looks only at
//! the layers of the order.
//!
//! ```text
//!  idle ── interval over, or order ──> running ── last row ──> idle (finished)
//!                                         └── order to cancel ──> idle
//! ```
//! Invariants: it goes in the order of copyset and row, and keeps where it is in the metadata store, so that a restart
//! goes on there; no more than the configured bytes per second are read; it waits for a replica that is not in order, but
//! not for ever: the copyset is then skipped and counted. Times are those of the wall clock: when it jumps, a scrub comes
//! early or late, nothing else.

use super::config::ChunkserverConfig;
use super::copysets::{Copysets, Hosted};
use crate::store::pace::Pace;
use crate::store::row::ROW_MEMORY_BYTES;
use crate::store::{RowKey, VersionKey};
use ogee_common::clock::{self, Instant};
use ogee_common::id::{ChunkIndex, CopysetId, LayerId, VolumeSeq};
use ogee_common::limits::PAGE_BYTES;
use ogee_disk::{Batch, Durability, MetaStore, Table};
use ogee_proto::mds;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Key: the scrub's [`Depth::key`]; value: format version, then [`Progress`] as postcard. It is read again only by this program's restart;
/// one that cannot be read is as good as none.
const TABLE_SCRUB: Table = Table::new(35, "scrub");
const FORMAT: u8 = 2;
/// Records that the light scrub compares in a second, bytes: about 6,000 rows, 6 GiB of data.
const COMPARE_BYTES_PER_SECOND: u64 = 8 << 20;
/// Rows taken at a time.
const ROWS_AT_ONCE: usize = 64;
/// How often an idle scrub looks at the time, and a running one at a replica that is not in order.
const LOOK: Duration = Duration::from_millis(500);
/// A replica that is not in order is waited for this long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Progress is kept at least this often.
const KEEP: Duration = Duration::from_secs(2);

/// A row, as it is kept.
type Place = (u64, u32, u64, u8);

/// How far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    order: u64,
    running: bool,
    started_unix_ms: u64,
    finished_unix_ms: u64,
    /// The copyset that is being read.
    copyset: u32,
    /// The last row of it that is done.
    after: Option<Place>,
    done_rows: u64,
    total_rows: u64,
    pages: u64,
    bad: u64,
    mended: u64,
    skipped: u64,
    compared: u64,
    different: u64,
    /// Of a volume: what it looks at, ascending.
    layers: Vec<u64>,
}

/// What a scrub looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// Records alone.
    Light,
    /// Records and data.
    Deep,
    /// Records and data of some layers.
    Volume,
}

impl Depth {
    const fn key(self) -> &'static [u8] {
        match self {
            Self::Light => b"light",
            Self::Deep => b"deep",
            Self::Volume => b"volume",
        }
    }
}

/// What one step came to.
enum Step {
    Done,
    Wait,
    End,
}

/// A scrub of one disk.
pub(super) struct Scrub {
    depth: Depth,
    copysets: Arc<Copysets>,
    meta: Arc<dyn MetaStore>,
    pace: Pace,
    /// Zero: only when ordered.
    interval: Duration,
    progress: Mutex<Progress>,
    wake: Notify,
}

impl Scrub {
    /// A scrub as it was left, at the pace and interval of a configuration.
    pub(super) fn of_config(depth: Depth, config: &ChunkserverConfig, copysets: Arc<Copysets>, meta: Arc<dyn MetaStore>) -> Arc<Self> {
        let (hours, bytes_per_second) = match depth {
            Depth::Light => (config.compare_interval_hours, COMPARE_BYTES_PER_SECOND),
            Depth::Deep => (config.scrub_interval_hours, u64::from(config.scrub_mib_per_second) << 20),
            Depth::Volume => (0, u64::from(config.scrub_mib_per_second) << 20),
        };
        let interval = Duration::from_secs(u64::from(hours) * 3600);
        let kept = meta.get(TABLE_SCRUB, depth.key()).ok().flatten();
        let known = kept.and_then(|bytes| decode(&bytes));
        // A new disk has nothing to be scrubbed: its first scrub is due after one interval.
        let progress = known.unwrap_or_else(|| Progress { started_unix_ms: clock::unix_ms(), ..Progress::default() });
        let pace = Pace::new(bytes_per_second);
        Arc::new(Self { depth, copysets, meta, pace, interval, progress: Mutex::new(progress), wake: Notify::new() })
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a heartbeat says of it.
    pub(super) fn report(&self) -> mds::ScrubReport {
        let p = self.progress();
        mds::ScrubReport {
            order: p.order,
            running: p.running,
            started_unix_ms: p.started_unix_ms,
            finished_unix_ms: p.finished_unix_ms,
            done_rows: p.done_rows,
            total_rows: p.total_rows,
            pages: p.pages,
            bad: p.bad,
            mended: p.mended,
            skipped: p.skipped,
            compared: p.compared,
            different: p.different,
        }
    }

    /// Obeys an order of the MDS, once.
    pub(super) fn obey(&self, order: &mds::ScrubOrder) {
        let known = self.progress().order;
        if order.id <= known {
            return;
        }
        if order.cancel {
            let mut p = self.progress();
            (p.order, p.running) = (order.id, false);
            tracing::info!(target: "scrub", done_rows = p.done_rows, "scrub cancelled");
        } else {
            self.begin(order.id, order.layers.clone());
        }
        self.keep();
        self.wake.notify_one();
    }

    fn begin(&self, order: u64, mut layers: Vec<u64>) {
        layers.sort_unstable();
        layers.dedup();
        let meant = |layer: LayerId| self.depth != Depth::Volume || layers.binary_search(&layer.0).is_ok();
        let total_rows = self.copysets.all().iter().map(|h| h.store.row_count(meant)).sum();
        let mut p = self.progress();
        let finished_unix_ms = p.finished_unix_ms;
        let started_unix_ms = clock::unix_ms();
        *p = Progress { order, running: true, started_unix_ms, finished_unix_ms, total_rows, layers, ..Progress::default() };
        tracing::info!(target: "scrub", depth = ?self.depth, order, total_rows, "scrub begins");
    }

    fn is_due(&self) -> bool {
        let since = Duration::from_millis(clock::unix_ms().saturating_sub(self.progress().started_unix_ms));
        !self.interval.is_zero() && since >= self.interval
    }

    fn keep(&self) {
        let mut value = vec![FORMAT];
        value.extend(postcard::to_stdvec(&*self.progress()).expect("numbers always encode"));
        let mut batch = Batch::new();
        batch.put(TABLE_SCRUB, self.depth.key(), &value);
        if let Err(error) = self.meta.write(batch, Durability::Deferred) {
            tracing::warn!(error = &error as &dyn std::error::Error, "keep the progress of the scrub");
        }
    }

    /// Runs until dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut kept = clock::now();
        let mut waiting: Option<Instant> = None;
        loop {
            if !self.progress().running {
                if self.is_due() {
                    let order = self.progress().order;
                    self.begin(order, vec![]);
                } else {
                    tokio::select! {
                        () = tokio::time::sleep(LOOK) => {}
                        () = self.wake.notified() => {}
                    }
                    continue;
                }
            }
            match self.step().await {
                Step::Done => waiting = None,
                Step::Wait if waiting.get_or_insert_with(clock::now).elapsed() < PATIENCE => tokio::time::sleep(LOOK).await,
                Step::Wait => {
                    waiting = None;
                    self.skip();
                }
                Step::End => {
                    self.finish();
                    self.keep();
                }
            }
            if kept.elapsed() >= KEEP {
                self.keep();
                kept = clock::now();
            }
        }
    }

    /// The replica whose turn it is, and the last row of it that is done.
    fn turn(&self) -> Option<(Hosted, Option<RowKey>)> {
        let (copyset, after) = {
            let p = self.progress();
            (p.copyset, p.after)
        };
        let hosted = self.copysets.all().into_iter().find(|h| h.copyset.0 >= copyset)?;
        let same = hosted.copyset.0 == copyset;
        Some((hosted, after.filter(|_| same).map(row_at)))
    }

    /// The next rows of a replica that this scrub looks at, and the place behind which they are all that there are: of one layer at most,
    /// if it looks at layers.
    fn rows_after(&self, hosted: &Hosted, after: Option<RowKey>) -> (Option<RowKey>, Vec<RowKey>) {
        if self.depth != Depth::Volume {
            return (after, hosted.store.rows_after(after, ROWS_AT_ONCE));
        }
        let layers = self.progress().layers.clone();
        for layer in layers {
            let front = layer.checked_sub(1).map(|before| row_at((before, u32::MAX, u64::MAX, u8::MAX)));
            let behind = after.max(front);
            let mut rows = hosted.store.rows_after(behind, ROWS_AT_ONCE);
            rows.retain(|row| row.version.at.layer.0 == layer);
            if !rows.is_empty() {
                return (behind, rows);
            }
        }
        (after, vec![])
    }

    fn skip(&self) {
        if let Some((hosted, _)) = self.turn() {
            tracing::warn!(target: "scrub", copyset = %hosted.copyset, "a replica is not in order and is not scrubbed");
            let mut p = self.progress();
            p.skipped += 1;
            (p.copyset, p.after) = (next(hosted.copyset), None);
        }
    }

    /// Scrubs a few rows of one replica.
    async fn step(&self) -> Step {
        let Some((hosted, after)) = self.turn() else { return Step::End };
        if hosted.has_failed() {
            let mut p = self.progress();
            p.skipped += 1;
            (p.copyset, p.after) = (next(hosted.copyset), None);
            return Step::Done;
        }
        if !hosted.group.has_caught_up().await {
            return Step::Wait;
        }
        hosted.store.caught_up();
        let (after, rows) = self.rows_after(&hosted, after);
        if rows.is_empty() {
            let mut p = self.progress();
            (p.copyset, p.after) = (next(hosted.copyset), None);
            return if p.copyset == u32::MAX { Step::End } else { Step::Done };
        }
        if !self.compare(&hosted, after, rows.last().copied()).await {
            return Step::Done;
        }
        if self.depth == Depth::Light {
            self.pace.pass(rows.len() * ROW_MEMORY_BYTES).await;
            let mut p = self.progress();
            (p.copyset, p.after) = (hosted.copyset.0, rows.last().copied().map(place_of));
            p.done_rows += rows.len() as u64;
            return Step::Done;
        }
        for row in rows {
            if !self.progress().running {
                return Step::Done;
            }
            let done = match hosted.store.scrub_row(row, &hosted.group.others()).await {
                Ok(Some(done)) => done,
                Ok(None) => return Step::Wait,
                Err(error) => {
                    tracing::error!(target: "scrub", copyset = %hosted.copyset, error = &error as &dyn std::error::Error, "scrub a replica");
                    return Step::Wait;
                }
            };
            {
                let mut p = self.progress();
                (p.copyset, p.after) = (hosted.copyset.0, Some(place_of(row)));
                p.done_rows += 1;
                p.pages += u64::from(done.pages);
                p.bad += u64::from(done.bad);
                p.mended += u64::from(done.mended);
            }
            self.pace.pass((done.pages * PAGE_BYTES) as usize).await;
        }
        Step::Done
    }

    /// Compares the records of some rows with those of the other replicas. False if this replica was outvoted, and is now given up.
    async fn compare(&self, hosted: &Hosted, after: Option<RowKey>, to: Option<RowKey>) -> bool {
        let found = match hosted.store.compare(after, to, &hosted.group.others()).await {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(target: "scrub", copyset = %hosted.copyset, error = &error as &dyn std::error::Error, "compare replicas");
                return true;
            }
        };
        for row in &found.different {
            let version = row.version;
            tracing::error!(
                target: "scrub",
                finding = "difference",
                copyset = %hosted.copyset,
                layer = version.at.layer.0,
                chunk = version.at.chunk.0,
                seq = version.seq.0,
                row = row.row,
                outvoted = found.outvoted.contains(row),
                "the replicas' records of some pages differ"
            );
        }
        let mut p = self.progress();
        p.compared += found.judged;
        p.different += found.different.len() as u64;
        drop(p);
        let is_outvoted = !found.outvoted.is_empty();
        if is_outvoted {
            hosted.store.give_up_outvoted();
        }
        !is_outvoted
    }

    fn finish(&self) {
        let mut p = self.progress();
        if !p.running {
            return;
        }
        (p.running, p.finished_unix_ms) = (false, clock::unix_ms());
        tracing::info!(target: "scrub", depth = ?self.depth, pages = p.pages, bad = p.bad, mended = p.mended, different = p.different, skipped = p.skipped, "scrub finished");
    }
}

fn next(copyset: CopysetId) -> u32 {
    copyset.0.saturating_add(1)
}

fn place_of(row: RowKey) -> Place {
    (row.version.at.layer.0, row.version.at.chunk.0, row.version.seq.0, row.row)
}

fn row_at((layer, chunk, seq, row): Place) -> RowKey {
    VersionKey::new(LayerId(layer), ChunkIndex(chunk), VolumeSeq(seq)).row(row)
}

fn decode(bytes: &[u8]) -> Option<Progress> {
    let (format, body) = bytes.split_first()?;
    (*format == FORMAT).then(|| postcard::from_bytes(body).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_survives_and_garbage_is_none() {
        let progress = Progress { order: 7, running: true, copyset: 3, after: Some((1, 2, 3, 4)), done_rows: 9, ..Progress::default() };
        let mut bytes = vec![FORMAT];
        bytes.extend(postcard::to_stdvec(&progress).expect("encodes"));
        assert_eq!(decode(&bytes), Some(progress.clone()));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        bytes[0] = 9;
        assert_eq!((decode(&bytes), decode(&[])), (None, None));
        let row = row_at(progress.after.expect("a row"));
        assert_eq!(place_of(row), (1, 2, 3, 4));
    }
}
