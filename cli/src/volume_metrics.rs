//! What `ogee vhost-blk` and `ogee nbd serve` show at `/metrics`: what their volumes did, as the SDK counts it.
//!
//! Invariant: nothing of the IO path is touched; the SDK's counters are read as they are.

use crate::error::{CliError, ErrorKind};
use ogee_client::{OpStats, Volume, VolumeStats};
use ogee_metrics::{Figures, MetricsServer, Page};
use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug)]
struct VolumeFigures(Volume);

/// The figures of one kind of IO.
type FiguresOf = fn(&VolumeStats) -> &OpStats;

/// Serves the figures of an open volume until dropped.
///
/// # Errors
/// The address cannot be had ([`ErrorKind::Conflict`] if somebody has it).
pub(crate) fn serve(addr: SocketAddr, volume: &Volume) -> Result<MetricsServer, CliError> {
    serve_figures(addr, Arc::new(VolumeFigures(volume.clone())))
}

/// Serves figures until dropped.
///
/// # Errors
/// As [`serve`].
pub(crate) fn serve_figures(addr: SocketAddr, figures: Arc<dyn Figures>) -> Result<MetricsServer, CliError> {
    MetricsServer::start(addr, figures).map_err(|error| {
        let is_taken = error.source.kind() == std::io::ErrorKind::AddrInUse;
        let kind = if is_taken { ErrorKind::Conflict } else { ErrorKind::Failure };
        CliError::caused(kind, format!("serve metrics on {addr}"), error.source)
    })
}

impl Figures for VolumeFigures {
    fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
        fill(std::slice::from_ref(&self.0), page)
    }
}

/// The figures of volumes, added up: names of volumes are not shown.
///
/// # Errors
/// Only those of the page.
pub(crate) fn fill(volumes: &[Volume], page: &mut Page<'_>) -> std::fmt::Result {
    let stats: Vec<VolumeStats> = volumes.iter().map(Volume::stats).collect();
    let kinds: [(&str, FiguresOf); 5] = [
        ("read", |s| &s.read),
        ("write", |s| &s.write),
        ("flush", |s| &s.flush),
        ("discard", |s| &s.discard),
        ("write_zeroes", |s| &s.write_zeroes),
    ];
    let sum = |value: fn(&VolumeStats) -> u64| stats.iter().map(value).sum::<u64>();
    let of = |value: fn(&OpStats) -> u64| {
        let stats = &stats;
        kinds.iter().map(move |(kind, of_kind)| (*kind, stats.iter().map(|s| value(of_kind(s))).sum()))
    };
    page.counters("volume_ios", "IOs that ended, well or not", "kind", of(|o| o.ops))?;
    page.counters("volume_io_errors", "IOs that failed", "kind", of(|o| o.errors))?;
    page.counters("volume_io_bytes", "Bytes of IOs that ended well", "kind", of(|o| o.bytes))?;
    page.gauge("volume_ios_in_flight", "IOs that have not ended", sum(|s| s.inflight))?;
    page.counter("volume_retries", "Attempts that did not end in success, redirects included", sum(|s| s.retries))?;
    let redirects = "Attempts answered by a chunkserver that does not lead";
    page.counter("volume_redirects", redirects, sum(|s| s.redirects))?;
    page.counter("volume_unknown_outcomes", "Attempts without an answer in time", sum(|s| s.unknown_outcomes))?;
    let mismatches = "Replies and writes whose checksums did not match";
    page.counter("volume_checksum_mismatches", mismatches, sum(|s| s.checksum_mismatches))?;
    page.counter("volume_holds", "Times that writes were held for a volume snapshot", sum(|s| s.holds))?;
    let throttled = "IOs that waited for the volume's limits before they began";
    page.counter("volume_throttled_ios", throttled, sum(|s| s.throttled))
}
