//! What an MDS node shows at `/metrics`.
//!
//! Invariant: a scrape reads rows without holding up commands. What only the leader knows is shown by the leader only.

use crate::liveness::Health;
use crate::machine::row::{ChunkserverRow, CopysetRow, SnapshotRow, TaskRow, VolumeRow};
use crate::service::Core;
use ogee_common::id::ChunkserverId;
use ogee_metrics::{Figures, MetricsServer, Page};
use ogee_raft::{RaftGroup, Wal};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// Where the figures come from.
pub(crate) struct Metrics {
    pub(crate) core: Arc<Core>,
    pub(crate) group: RaftGroup,
    pub(crate) wal: Wal,
}

/// Serves the figures. An address that cannot be had is told and is no reason not to serve.
pub(crate) fn serve(addr: SocketAddr, metrics: Metrics) -> Option<MetricsServer> {
    match MetricsServer::start(addr, Arc::new(metrics)) {
        Ok(server) => Some(server),
        Err(error) => {
            tracing::error!(target: "controlpath", error = &error as &dyn std::error::Error, %addr, "there are no metrics");
            None
        }
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Figures for Metrics {
    fn fill(&self, page: &mut Page<'_>) -> fmt::Result {
        let is_leader = self.group.state().borrow().is_leader;
        page.gauge("mds_leader", "1 if this node leads", is_leader.into())?;
        page.counter("mds_commands", "Log entries applied since the cluster was made", self.group.applied_index())?;
        let log = self.wal.stats();
        page.counter("wal_flushes", "Durable writes of the log, one batch each", log.flushes)?;
        page.counter("wal_written_bytes", "Bytes written to the log, padding included", log.bytes)?;
        page.counter("wal_entries", "Raft entries in durable batches", log.entries)?;
        let shared = &self.core.shared;
        let rows = [
            ("mds_volumes", "Volumes", shared.count::<VolumeRow>()),
            ("mds_snapshots", "Volume snapshots", shared.count::<SnapshotRow>()),
            ("mds_copysets", "Copysets", shared.count::<CopysetRow>()),
            ("mds_chunkservers", "Chunkservers that were registered", shared.count::<ChunkserverRow>()),
            ("mds_tasks", "Tasks under way", shared.count::<TaskRow>()),
        ];
        for (name, meaning, rows) in rows {
            // A store that cannot be read ends the node by other ways; here its figure is missing.
            if let Ok(rows) = rows {
                page.gauge(name, meaning, rows)?;
            }
        }
        if is_leader { self.chunkservers_up(page) } else { Ok(()) }
    }
}

impl Metrics {
    fn chunkservers_up(&self, page: &mut Page<'_>) -> fmt::Result {
        let up = |id: &ChunkserverId| self.core.live.health(*id) == Health::Up;
        let all = self.core.read(|tx| Ok(tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?));
        let Ok(all) = all else { return Ok(()) };
        let n = all.iter().filter(|(id, _)| up(id)).count();
        page.gauge("mds_chunkservers_up", "Chunkservers that report, as the leader sees it", n as u64)
    }
}
