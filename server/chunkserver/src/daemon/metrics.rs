//! What a chunkserver shows at `/metrics`. The counters are kept by those who count; here they get their names.
//!
//! Invariant: a scrape takes no lock for longer than it takes to copy a list of replicas or to sum up sessions, so it
//! does not hold up the daemon's loop.

use super::copysets::Copysets;
use super::scrub::Scrub;
use super::sessions::Sessions;
use crate::store::{ChunkStore, SpaceState};
use ogee_common::limits::WAL_SEGMENT_BYTES;
use ogee_disk::{DataDir, MetaStore};
use ogee_metrics::{Figures, MetricsServer, Page};
use ogee_raft::Wal;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Where the figures come from.
pub(super) struct Metrics {
    pub(super) own: u32,
    pub(super) wal: Wal,
    pub(super) dir: DataDir,
    pub(super) meta: Arc<dyn MetaStore>,
    pub(super) store: Arc<ChunkStore>,
    pub(super) copysets: Arc<Copysets>,
    pub(super) sessions: Arc<Sessions>,
    pub(super) scrub: Arc<Scrub>,
    pub(super) compare: Arc<Scrub>,
}

/// Serves the figures. An address that cannot be had is told and is no reason not to serve data.
pub(super) fn serve(addr: SocketAddr, metrics: Metrics) -> Option<MetricsServer> {
    match MetricsServer::start(addr, Arc::new(metrics)) {
        Ok(server) => Some(server),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, %addr, "there are no metrics");
            None
        }
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("own", &self.own).finish_non_exhaustive()
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn count(n: usize) -> u64 {
    n as u64
}

impl Figures for Metrics {
    fn fill(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauge("chunkserver_id", "Number of this chunkserver", self.own.into())?;
        self.log(page)?;
        self.disk(page)?;
        self.chunks(page)?;
        self.groups(page)?;
        self.scrubs(page)?;
        let (sessions, connections) = self.sessions.count();
        page.gauge("sessions", "Client sessions with connections", count(sessions))?;
        page.gauge("session_connections", "Connections of client sessions", count(connections))
    }
}

impl Metrics {
    fn log(&self, page: &mut Page<'_>) -> fmt::Result {
        let (log, pressure) = (self.wal.stats(), self.wal.pressure());
        page.counter("wal_flushes", "Durable writes of the log, one batch each", log.flushes)?;
        page.counter("wal_written_bytes", "Bytes written to the log, padding included", log.bytes)?;
        page.counter("wal_records", "Records in durable batches", log.records)?;
        page.counter("wal_entries", "Raft entries among the records", log.entries)?;
        page.counter("wal_segments_created", "Log segments that were created", log.segments_created)?;
        page.counter("wal_segments_reused", "Log segments that were reused", log.segments_reused)?;
        let filled = log.segments_created * WAL_SEGMENT_BYTES;
        page.counter("wal_filled_bytes", "Zeros written to new segments of the log, before their use", filled)?;
        page.gauge("wal_bytes", "Bytes of the log that are still needed", pressure.bytes)?;
        page.gauge("wal_queued_bytes", "Payload bytes that wait for the log's writer", count(pressure.queued_bytes))
    }

    fn disk(&self, page: &mut Page<'_>) -> fmt::Result {
        let data = self.dir.data_counters();
        page.counter("data_written_bytes", "Bytes written to data files", get(&data.written_bytes))?;
        page.counter("data_syncs", "fdatasync calls on data files", get(&data.syncs))?;
        let Some(meta) = self.meta.counters() else { return Ok(()) };
        page.counter("meta_batches", "Batches applied to the metadata store", get(&meta.batches))?;
        page.counter("meta_batch_bytes", "Bytes of these batches", get(&meta.batch_bytes))?;
        page.counter("meta_syncs", "Durable writes of the metadata store", get(&meta.syncs))
    }

    fn chunks(&self, page: &mut Page<'_>) -> fmt::Result {
        let (store, c) = (&self.store, &self.store.counters);
        let gauge = |n: &AtomicUsize| count(n.load(Ordering::Relaxed));
        page.counter("store_checkpoints", "Checkpoints of copysets that wrote something", get(&c.checkpoints))?;
        page.counter("store_row_loads", "Metadata rows read from the metadata store", get(&c.row_loads))?;
        page.counter("store_corrupt_pages", "Pages that failed their checksum when read", get(&c.corrupt_pages))?;
        page.counter("store_flattened_pages", "Pages copied from ancestors into their layer", get(&c.flattened_pages))?;
        page.counter("store_pasted_pages", "Pages pasted from backups into their layer", get(&c.pasted_pages))?;
        page.counter("store_repaired_pages", "Damaged pages mended from another replica", get(&c.repaired_pages))?;
        let unverified = "Partial writes of a replay onto pages that failed their checksum";
        page.counter("store_unverified_pages", unverified, get(&c.unverified_pages))?;
        page.counter("store_no_space_pauses", "Pauses because of a full disk", get(&c.no_space_pauses))?;
        page.gauge("store_dirty_rows", "Changed metadata rows in memory", gauge(&store.dirty_rows))?;
        page.gauge("store_dirty_files", "Data files with unflushed writes", gauge(&store.dirty_files))?;
        page.gauge("store_cached_rows", "Clean metadata rows in memory", count(store.cached_rows()))?;
        page.gauge("store_open_files", "Clean data files kept open", count(store.cached_files()))?;
        let is_full = store.space_state() == SpaceState::Full;
        page.gauge("store_full", "1 if new data is refused for want of space", is_full.into())
    }

    fn scrubs(&self, page: &mut Page<'_>) -> fmt::Result {
        let (c, now) = (&self.store.counters, self.scrub.report());
        page.counter("scrub_pages", "Pages that scrubs have read and verified", get(&c.scrubbed_pages))?;
        page.counter("scrub_bad_pages", "Pages that scrubs found not to match their checksum", get(&c.scrub_bad_pages))?;
        page.counter("scrub_mended_pages", "Of these, those mended from another replica", get(&c.scrub_mended_pages))?;
        let daily = self.compare.report();
        let of = "Records of pages that the deep scrub (or the daily comparison) that runs, or ran last, compared with another replica's";
        page.gauge("scrub_compared_records", of, now.compared)?;
        page.gauge("compare_compared_records", of, daily.compared)?;
        let of = "Own records that differ from another replica's, found by the deep scrub (or the daily comparison)";
        page.gauge("scrub_different_records", of, now.different)?;
        page.gauge("compare_different_records", of, daily.different)?;
        page.gauge("compare_finished_seconds", "Unix time at which a comparison last came to its end; 0: never", daily.finished_unix_ms / 1000)?;
        page.gauge("scrub_running", "1 while a scrub runs", now.running.into())?;
        page.gauge("scrub_done_rows", "Rows of 256 pages that this or the last scrub has done", now.done_rows)?;
        page.gauge("scrub_total_rows", "Rows that there were when it began", now.total_rows)?;
        page.gauge("scrub_finished_seconds", "Unix time at which a scrub last came to its end; 0: never", now.finished_unix_ms / 1000)?;
        let damaged = count(self.copysets.damaged().len());
        page.gauge("raft_groups_damaged", "Replicas that are damaged or missing here and are to be rebuilt", damaged)
    }

    fn groups(&self, page: &mut Page<'_>) -> fmt::Result {
        let all = self.copysets.all();
        let led = all.iter().filter(|hosted| hosted.group.state().borrow().is_leader).count();
        let failed = all.iter().filter(|hosted| hosted.has_failed()).count();
        let applied = all.iter().map(|hosted| hosted.group.applied_index()).sum();
        page.gauge("raft_groups", "Replicas of copysets that are open here", count(all.len()))?;
        page.gauge("raft_groups_led", "Of these, those that lead", count(led))?;
        page.gauge("raft_groups_failed", "Of these, those that stopped because of an error", count(failed))?;
        page.counter("raft_applied_entries", "Raft entries applied, all replicas, since they were made", applied)
    }
}
