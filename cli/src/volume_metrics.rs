//! What `ogee vhost-blk` shows at `/metrics`: what its volume did, as the SDK counts it.
//!
//! Invariant: nothing of the IO path is touched; the SDK's counters are read as they are.

use crate::error::{CliError, ErrorKind};
use ogee_client::{OpStats, Volume};
use ogee_metrics::{Figures, MetricsServer, Page};
use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug)]
struct VolumeFigures(Volume);

/// Serves the figures of an open volume until dropped.
///
/// # Errors
/// The address cannot be had ([`ErrorKind::Conflict`] if somebody has it).
pub(crate) fn serve(addr: SocketAddr, volume: &Volume) -> Result<MetricsServer, CliError> {
    MetricsServer::start(addr, Arc::new(VolumeFigures(volume.clone()))).map_err(|error| {
        let is_taken = error.source.kind() == std::io::ErrorKind::AddrInUse;
        let kind = if is_taken { ErrorKind::Conflict } else { ErrorKind::Failure };
        CliError::caused(kind, format!("serve metrics on {addr}"), error.source)
    })
}

impl Figures for VolumeFigures {
    fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
        let s = self.0.stats();
        let kinds = [
            ("read", s.read),
            ("write", s.write),
            ("flush", s.flush),
            ("discard", s.discard),
            ("write_zeroes", s.write_zeroes),
        ];
        let of = |value: fn(&OpStats) -> u64| kinds.iter().map(move |(kind, stats)| (*kind, value(stats)));
        page.counters("volume_ios", "IOs that ended, well or not", "kind", of(|o| o.ops))?;
        page.counters("volume_io_errors", "IOs that failed", "kind", of(|o| o.errors))?;
        page.counters("volume_io_bytes", "Bytes of IOs that ended well", "kind", of(|o| o.bytes))?;
        page.gauge("volume_ios_in_flight", "IOs that have not ended", s.inflight)?;
        page.counter("volume_retries", "Attempts that did not end in success, redirects included", s.retries)?;
        page.counter("volume_redirects", "Attempts answered by a chunkserver that does not lead", s.redirects)?;
        page.counter("volume_unknown_outcomes", "Attempts without an answer in time", s.unknown_outcomes)?;
        let mismatches = "Replies and writes whose checksums did not match";
        page.counter("volume_checksum_mismatches", mismatches, s.checksum_mismatches)?;
        page.counter("volume_holds", "Times that writes were held for a volume snapshot", s.holds)
    }
}
