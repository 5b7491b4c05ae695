//! What `ogee nbd serve` shows at `/metrics`: connections and requests as the server counts them, and what its volumes did.
//!
//! Invariant: nothing of the IO path is touched; counters are read as they are. Absent: names of exports and clients.

use crate::error::CliError;
use crate::volume_metrics;
use ogee_client::Volume;
use ogee_metrics::{Figures, MetricsServer, Page};
use ogee_nbd::{CommandFigures, CommandKind, NbdStats, Stage};
use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug)]
struct ServedFigures {
    stats: NbdStats,
    volumes: Vec<Volume>,
}

/// Serves the figures of a server and its volumes until dropped.
///
/// # Errors
/// The address cannot be had.
pub(crate) fn serve(addr: SocketAddr, stats: NbdStats, volumes: &[Volume]) -> Result<MetricsServer, CliError> {
    volume_metrics::serve_figures(addr, Arc::new(ServedFigures { stats, volumes: volumes.to_vec() }))
}

impl Figures for ServedFigures {
    fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
        let now = self.stats.now();
        page.counter("nbd_connections", "Connections that were taken", now.connections)?;
        page.gauge("nbd_connections_open", "Connections that have not ended", now.connections_open)?;
        let refused = "Connections closed at once, because all were in use";
        page.counter("nbd_connections_refused", refused, now.connections_refused)?;
        page.counter("nbd_tls_connections", "Connections on which TLS began", now.tls_connections)?;
        let failed = Stage::ALL.iter().map(|stage| (stage.name(), now.failed(*stage)));
        page.counters("nbd_connections_failed", "Connections that ended in an error", "stage", failed)?;
        let of = |value: fn(&CommandFigures) -> u64| {
            CommandKind::ALL.iter().map(move |kind| (kind.name(), value(&now.of(*kind))))
        };
        page.counters("nbd_requests", "Requests that ended, well or not", "command", of(|c| c.requests))?;
        page.counters("nbd_request_errors", "Requests answered with an error", "command", of(|c| c.errors))?;
        let bytes = "Bytes of the ranges of requests that ended well";
        page.counters("nbd_request_bytes", bytes, "command", of(|c| c.bytes))?;
        let time = "Time from when requests were taken to when their replies could be sent, added up";
        page.counters("nbd_request_microseconds", time, "command", of(|c| c.microseconds))?;
        page.gauge("nbd_requests_in_flight", "Requests that have not ended", now.in_flight)?;
        volume_metrics::fill(&self.volumes, page)
    }
}
